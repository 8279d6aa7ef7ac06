"""Train a small GIT from scratch on captioned images, in minutes on a laptop's CPU.

python recipes/train_small_git.py --images path/to/flickr8k --captions captions.txt --output_dir runs/small-git
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("training.small_git")
