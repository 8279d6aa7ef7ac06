"""Dense features with a merged DINOv2: every patch gets the token that it was merged into, in its place.

    python examples/dinov2_features.py photo.jpg
    python examples/dinov2_features.py photo.jpg --model facebook/dinov2-small --r 12 --output features.png

The picture shows the image, then the plain and the merged model's features: their three main directions as red, green
and blue.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor

from dtem_hf import AutoModel, ToMeConfig


def as_colours(features: torch.Tensor, directions: torch.Tensor) -> Image.Image:
    """Features [rows, columns, D] along three directions [D, 3], as an RGB picture with one pixel per patch."""
    values = (features - features.mean((0, 1))) @ directions
    low, high = values.amin((0, 1)), values.amax((0, 1))
    return Image.fromarray(((values - low) / (high - low) * 255).byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="facebook/dinov2-small")
    parser.add_argument("--r", type=int, default=12, help="tokens that every layer merges away")
    parser.add_argument("--output", type=Path, default=Path("features.png"))
    args = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(args.model)
    # `unmerge=True` hands on all tokens, in place. AutoBackbone and segmentation models do so by themselves.
    model = AutoModel.from_pretrained(args.model, merge=ToMeConfig(r=args.r, unmerge=True)).eval()
    picture = Image.open(args.image).convert("RGB")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    rows, columns = (size // model.config.patch_size for size in pixels.shape[-2:])

    @torch.inference_mode()
    def patch_features() -> torch.Tensor:
        tokens = model(pixels).last_hidden_state[0]
        return tokens[-rows * columns :].unflatten(0, (rows, columns))  # without the CLS token

    merged = patch_features()
    with model.unmerged():
        plain = patch_features()
    print(model.merge_plan(tuple(pixels.shape[-2:])))
    print(f"cosine of merged to plain features: {cosine_similarity(merged, plain, dim=-1).mean():.4f}")

    flat = plain.flatten(0, 1)
    directions = torch.pca_lowrank(flat, q=3)[2]  # of the plain features, for both pictures
    size = (columns * 16, rows * 16)
    panels = [picture.resize(size)]
    panels += [as_colours(each, directions).resize(size, Image.Resampling.NEAREST) for each in (plain, merged)]
    sheet = Image.new("RGB", (3 * size[0], size[1]))
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * size[0], 0))
    sheet.save(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
