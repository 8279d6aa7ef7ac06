"""Train a small ViT, learn what to merge, measure, save and load it again; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("quickstart")
