"""Compare methods at the same cost: tables as Markdown, CSV and JSON, and a Pareto plot.

python recipes/compare.py --model facebook/deit-small-patch16-224 --data imagenet-1k --adapters me/dtem-deit-small
python recipes/compare.py --model ... --data path/to/images --limit 200 --flops 0.65 0.5    # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.comparison")
