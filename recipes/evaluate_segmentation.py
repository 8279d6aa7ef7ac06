"""Measure mIoU by a linear head on patches or a model's own head, with and without merging; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.segmentation")
