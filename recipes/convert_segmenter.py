"""Convert a Segmenter, in its authors' layout, to one of this package with the same outputs; `--help` has examples."""

from dtem_hf.convert.segmenter import main
from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script(main)
