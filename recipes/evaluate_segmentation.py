"""Measure segmentation by a linear head on patch tokens, under several methods and amounts of merging.

python recipes/evaluate_segmentation.py --model facebook/dinov2-small --train path/to/train --test path/to/test --r 4 8
python recipes/evaluate_segmentation.py --model ... --train ... --test ... --limit 50 --steps 200    # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.segmentation")
