"""Measure what merging costs a captioning model in the loss of captions that people wrote.

python recipes/evaluate_caption_loss.py --model runs/small-git --images path/to/flickr8k --captions captions.txt \\
    --hold_out 200 --r 4 8 12 --adapter runs/small-git-dtem/adapter
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.caption_loss")
