"""Convert an LV-ViT classifier, in its authors' layout, to one of this package; `--help` has examples."""

from dtem_hf.convert.lv_vit import main
from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script(main)
