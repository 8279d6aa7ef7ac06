"""Convert an LV-ViT classifier, in its authors' layout, to one of this package with the same outputs.

python recipes/convert_lv_vit.py --checkpoint lv_vit.safetensors --output_dir lv-vit-small
dtem-hf plan lv-vit-small --method tome --r 16   # the folder then works like any other model
"""

from dtem_hf.convert.lv_vit import main
from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script(main)
