"""Classify a folder of images with a merged model, and compare it with the plain one.

python examples/classify_folder.py path/to/images
python examples/classify_folder.py path/to/images --model facebook/deit-small-patch16-224 --r 13
python examples/classify_folder.py path/to/images --merge me/dtem-deit-small   # a trained adapter
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor

from dtem_hf import AutoModelForImageClassification, ToMeConfig


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="facebook/deit-tiny-patch16-224")
    parser.add_argument("--merge", help="an adapter's Hub id or folder; left out: ToMe, which needs no training")
    parser.add_argument("--r", type=int, default=13, help="tokens that every layer merges away")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"images: there is no picture in {args.images}")

    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageClassification.from_pretrained(args.model, merge=args.merge or ToMeConfig())
    model.eval().set_reduction(args.r)
    print(model.merge_plan())  # tokens and multiply-adds, layer by layer

    agreed = 0
    seconds = {"plain": 0.0, "merged": 0.0}
    for first in range(0, len(paths), args.batch_size):
        batch = paths[first : first + args.batch_size]
        inputs = processor([Image.open(path).convert("RGB") for path in batch], return_tensors="pt")
        with torch.inference_mode():
            if first == 0:
                model(**inputs)  # the first pass is slow, and not timed
            start = time.perf_counter()
            merged = model(**inputs).logits
            seconds["merged"] += time.perf_counter() - start
            start = time.perf_counter()
            with model.unmerged():  # inside, the model runs as if nothing were attached
                plain = model(**inputs).logits
            seconds["plain"] += time.perf_counter() - start
        agreed += int((merged.argmax(-1) == plain.argmax(-1)).sum())
        for path, probabilities in zip(batch, merged.softmax(-1), strict=True):
            best = int(probabilities.argmax())
            print(f"{path.relative_to(args.images)}\t{model.config.id2label[best]}\t{probabilities[best]:.3f}")

    print(f"same class as the plain model: {agreed} of {len(paths)}")
    for name, taken in seconds.items():
        print(f"{name}: {len(paths) / taken:.1f} images/s")


if __name__ == "__main__":
    main()
