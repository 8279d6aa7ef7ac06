"""Measure what merging saves on this machine: multiply-adds, images per second and memory.

python recipes/benchmark.py --model facebook/deit-small-patch16-224 --methods tome --r 8 16 --batch_sizes 1 16 64
python recipes/benchmark.py --model path/to/config --random_weights True --rounds 5    # a laptop's CPU
"""

from dtem_hf.evaluation.benchmark import main


if __name__ == "__main__":
    main()
