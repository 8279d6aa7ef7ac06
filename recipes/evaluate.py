"""Evaluate a classifier, or an encoder by its features, under several methods and amounts of merging.

python recipes/evaluate.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/evaluate.py --model ... --data ... --methods tome --r 8 16 --limit 200    # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.classification")
