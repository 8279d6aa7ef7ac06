"""Measure what merging costs a captioning model in the loss of captions that people wrote; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.caption_loss")
