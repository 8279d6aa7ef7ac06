"""Evaluate captions: let a model write them under several methods and amounts of merging, or score a result file.

python recipes/evaluate_captions.py --model microsoft/git-base-coco --images coco --annotations dataset_coco.json \\
    --split test --methods tome --r 4 8 12
python recipes/evaluate_captions.py --annotations captions_val2014.json --predictions results.json --output scores.json
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.captions")
