"""Search for the r of every layer that costs a model least, at equal multiply-adds: `--help` has examples.

python recipes/calibrate.py --model facebook/deit-tiny-patch16-224 --method tome --flops 0.5 --data path/to/images
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.calibrate")
