"""Convert an MAE fine-tuned classifier, in its authors' layout, to a BEiT of transformers; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("convert.mae")
