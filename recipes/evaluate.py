"""Evaluate a classifier, or an encoder by its features, with and without merging; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.classification")
