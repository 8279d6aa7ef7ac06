"""Measure segmentation by a linear head on patch tokens, or a model's own, under several amounts of merging.

python recipes/evaluate_segmentation.py --model facebook/dinov2-small --train path/to/train --test path/to/test --r 4 8
python recipes/evaluate_segmentation.py --model ... --train ... --test ... --limit 50 --steps 200    # a laptop's CPU
python recipes/evaluate_segmentation.py --model checkpoints/segmenter-small --test path/to/test --flops 0.65 0.5
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.segmentation")
