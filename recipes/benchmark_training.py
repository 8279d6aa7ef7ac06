"""Time and memory of training steps, beside the plain backbone's and those of the method as it is defined.

python recipes/benchmark_training.py --model facebook/deit-tiny-patch16-224 --batch_size 32
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("benchmark.training_step")
