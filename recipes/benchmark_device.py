"""All measurements on an accelerator in one call: DeiT-S to DINOv2-L at batch 1, 32 and 256 in bfloat16.

python recipes/benchmark_device.py --output_dir runs/device
python recipes/benchmark_device.py --models vit-large --attentions flex_attention --minutes 4
python recipes/benchmark_device.py --tiny True --device cpu --dtype float32    # in small, on a laptop
"""

from dtem_hf.programs.arguments import run_script


if __name__ == "__main__":
    run_script("benchmark.device")
