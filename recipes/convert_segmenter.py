"""Convert a Segmenter, in its authors' layout, to one of this package with the same outputs.

python recipes/convert_segmenter.py --checkpoint segmenter.safetensors --output_dir segmenter-small
dtem-hf plan segmenter-small --method tome --r 16   # the folder then works like any other model
"""

from dtem_hf.convert.segmenter import main
from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script(main)
