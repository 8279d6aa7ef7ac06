"""Show what an adapter learned: Kendall correlation with keys, and pictures; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.analyze")
