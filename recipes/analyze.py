"""Show what an adapter has learned: Kendall correlation with keys, and pictures of merged tokens.

python recipes/analyze.py --model facebook/deit-small-patch16-224 --data path/to/images --adapter me/dtem-deit-small
python recipes/analyze.py --model ... --data ... --adapter ... --limit 16    # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.analyze")
