"""Train one backbone in every way of a list, evaluate each, and put them into a table; `--help` has examples.

python recipes/training_table.py --rows FILE --model M --train IMAGES --dev LABELLED_IMAGES
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.training_table")
