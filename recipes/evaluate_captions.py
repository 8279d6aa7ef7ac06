"""Score the captions that a model writes under several amounts of merging, or a result file; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("evaluation.captions")
