"""What merging saves on this machine: multiply-adds, images per second and memory, at several batch sizes.

python recipes/benchmark.py --model facebook/deit-small-patch16-224 --methods tome --r 8 16 --batch_sizes 1 16 64
python recipes/benchmark.py --model path/to/config --random_weights True --rounds 5    # a laptop's CPU
python recipes/benchmark.py --model ... --runtimes eager compile onnxruntime --breakdown True
python recipes/benchmark.py --model ... --dtype bfloat16 --runtimes compile --compile_mode reduce-overhead    # CUDA
python recipes/benchmark.py --model ... --peer my_library:merged    # beside a callable of your own
python recipes/benchmark.py --task captioning --model microsoft/git-base --r 4 8 12 --batch_sizes 1 8
"""

from dtem_hf.benchmark.program import main
from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script(main)
