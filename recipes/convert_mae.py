"""Convert an MAE fine-tuned classifier, in its authors' layout, to a BEiT of transformers with the same logits.

python recipes/convert_mae.py --checkpoint mae_finetuned_vit_base.safetensors --output_dir mae-base
dtem-hf plan mae-base --method tome --r 16   # the folder then works like any other model
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("convert.mae")
