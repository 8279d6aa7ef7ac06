"""Train a small GIT from scratch on captioned images, in minutes on a laptop's CPU; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("training.small_git")
