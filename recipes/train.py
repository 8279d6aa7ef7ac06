"""Learn a merge embedding for a frozen vision transformer.

accelerate launch recipes/train.py --config recipes/configs/deit_tiny_sample.yaml
python recipes/train.py --model facebook/deit-tiny-patch16-224 --data path/to/images --steps 200   # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("training.program")
