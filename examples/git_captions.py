"""Write captions with GIT, plain and merged: fewer visual tokens shorten the encoder and every step of decoding.

python examples/git_captions.py photo.jpg another.jpg
python examples/git_captions.py photo.jpg --model microsoft/git-base-coco --r 8
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from dtem_hf import AutoModelForCausalLM, ToMeConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", default="microsoft/git-base-coco")
    parser.add_argument("--r", type=int, default=8, help="tokens that every layer of the image encoder merges away")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, merge=ToMeConfig(r=args.r)).eval()
    pictures = [Image.open(path).convert("RGB") for path in args.images]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]

    plan = model.merge_plan()
    print(f"the text decoder reads {plan.output_tokens} visual tokens of an image instead of {plan.num_tokens}")

    @torch.inference_mode()
    def captions() -> tuple[list[str], float]:
        start = time.perf_counter()
        tokens = model.generate(pixel_values=pixels, max_new_tokens=args.max_new_tokens, do_sample=False)
        return processor.batch_decode(tokens, skip_special_tokens=True), time.perf_counter() - start

    merged, seconds = captions()
    with model.unmerged():
        plain, plain_seconds = captions()
    for path, with_merging, without in zip(args.images, merged, plain, strict=True):
        print(f"{path.name}\n  merged: {with_merging.strip()}\n  plain:  {without.strip()}")
    print(f"seconds for {len(pictures)} captions: {seconds:.2f} merged, {plain_seconds:.2f} plain")


if __name__ == "__main__":
    main()
