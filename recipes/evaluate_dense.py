"""Compare a dense head's maps from merged tokens with those from the unmerged model's: `--help` has the contract.

python recipes/evaluate_dense.py --model facebook/dinov2-small --head my_heads:depth --data path/to/images --adapter A
python recipes/evaluate_dense.py --model ... --head ... --data ... --methods tome --r 8 16 --limit 50  # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.dense")
