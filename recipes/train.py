"""Learn a merge embedding for a frozen vision transformer; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("training.program")
