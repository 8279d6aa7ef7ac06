"""Search for the r of every layer that costs a model least, at equal multiply-adds; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.calibrate")
