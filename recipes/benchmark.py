"""What merging saves on this machine: multiply-adds, images per second and memory, at several batch sizes.

python recipes/benchmark.py --model facebook/deit-small-patch16-224 --methods tome --r 8 16 --batch_sizes 1 16 64
python recipes/benchmark.py --model path/to/config --random_weights True --rounds 5    # a laptop's CPU
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("benchmark.program")
