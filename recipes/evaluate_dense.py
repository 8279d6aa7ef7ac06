"""Compare a dense head's maps from merged tokens with those from the unmerged model's; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.dense")
