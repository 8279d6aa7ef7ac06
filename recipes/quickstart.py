"""Train a small ViT on real handwritten digits, learn what to merge, measure, save and load it again.

make quickstart
python recipes/quickstart.py --output_dir runs/quickstart
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("quickstart")
