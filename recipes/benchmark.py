"""What merging saves on this machine: multiply-adds, images per second and memory; `--help` has examples."""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("benchmark.program")
