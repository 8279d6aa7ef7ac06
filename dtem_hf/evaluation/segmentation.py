"""Measure semantic segmentation with and without merging, by a linear head on patch tokens or a model's own head.

python recipes/evaluate_segmentation.py --model facebook/dinov2-small --train path/to/train --test path/to/test --r 4 8
python recipes/evaluate_segmentation.py --model ... --train ... --test ... --limit 50 --steps 200    # a laptop's CPU
python recipes/evaluate_segmentation.py --model checkpoints/segmenter-small --test path/to/test --flops 0.65 0.5

A folder holds `images/NAME.jpg` (or .png) and `masks/NAME.png`, whose pixels are classes; 255 is ignored. Without
`--train`, the program measures the model's own segmentation: it resizes the shorter side of an image to the model's
size, cuts out windows of that size, and averages logits where windows overlap. If the processor has
`do_reduce_labels`, as for ADE20k, the value 0 of a mask is ignored, too, and the value c is class c − 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.masks import IGNORED, SegmentationImages, load_segmentation
from ..errors import BadValue, NoTrainedHead
from ..families import find_encoder
from ..files import write_json
from ..models.auto import AutoModelForSemanticSegmentation, load_encoder
from ..models.vision import image_shape, run_on_pixels
from ..opening import load_processor
from ..programs.arguments import above_zero, at_least, option, parse_arguments, read_config
from ..programs.conditions import data_name
from ..programs.lock import only_run_in
from ..progress import tqdm
from ..report.tables import print_table
from .arguments import RowArguments
from .parts import batches_of
from .variants import Variant


_PATCHES_PER_STEP = 1024


@dataclass(kw_only=True)
class SegmentationArguments(RowArguments):
    """Measure mIoU with several amounts of merging, by a linear head on patches or a model's own segmentation."""

    r: list[str] = option(
        "tokens merged per layer, one row each; left out, 4, 8 and 12 unless flops are given", default_factory=list
    )
    train: str | None = option(
        "images and masks to train a linear head on: folder, or Hub dataset id; left out, use the model's own head",
        default=None,
    )
    test: str = option("images and masks to measure with: folder, or Hub dataset id")
    window_stride: int | None = option(
        "pixels between the windows of a model's own segmentation; left out, the window size", default=None
    )
    train_split: str = option("split of a Hub dataset", default="train")
    test_split: str = option("split of a Hub dataset", default="validation")
    image_column: str = option("column of a Hub dataset that holds the image", default="image")
    mask_column: str = option("column of a Hub dataset that holds the mask", default="annotation")
    num_classes: int | None = option(
        "number of classes; left out, the largest class in the training masks plus one", default=None
    )
    limit: int | None = option("use only this many images of each set, the first ones", default=None)
    steps: int = option("optimiser steps of the head", default=500)
    lr: float = option("learning rate of the head", default=1e-2)
    batch_size: int = option("images per batch", default=16)
    seed: int = option("seed of all random numbers", default=0)
    output_dir: str = option("folder for segmentation.json", default="runs/segmentation")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "limit", "num_classes", "window_stride")
        above_zero(self, "lr")
        if self.num_classes is not None and self.num_classes > IGNORED:
            raise BadValue("num_classes", self.num_classes, f"at most {IGNORED}: the value {IGNORED} is ignored")
        if not self.r and not self.flops:
            self.r = ["4", "8", "12"]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train the head, measure, print the table, and write JSON."""
    arguments = parse_arguments(SegmentationArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as folder:
        path = folder / "segmentation.json"
        result = evaluate_segmentation(arguments)
        write_json(path, result)
        print_table(result)
        print(f"written: {path}")


def evaluate_segmentation(arguments: SegmentationArguments) -> dict[str, Any]:
    """Measure every row, with the model's own head or one trained on unmerged patches: `segmentation.json`."""
    device = arguments.choose_device()
    read_config(arguments.model)  # raises early if the model does not exist
    columns = (arguments.image_column, arguments.mask_column, arguments.limit)
    test = load_segmentation(arguments.test, arguments.test_split, *columns)
    processor = load_processor(arguments.model)
    if arguments.train is None:
        model = _load_segmenter(arguments.model).to(device).eval()
        variants = arguments.make_variants(model, arguments.load_adapters())
        num_classes, learned = model.config.num_labels, dict[str, Any]()
        predictions = _by_own_head(test, variants, processor, arguments)
    else:
        train = load_segmentation(arguments.train, arguments.train_split, *columns)
        model = load_encoder(arguments.model, "grid").to(device).eval()
        variants = arguments.make_variants(model, arguments.load_adapters(), unmerge=True)
        reader = PatchReader.of(model, processor, device)
        num_classes = arguments.num_classes or 1 + max(_largest_class(train[i][1]) for i in range(len(train)))
        head = train_head(variants[0], train, reader, num_classes, arguments)
        predictions = _by_linear_head(test, variants, reader, head, arguments)
        learned = {"training_data": {"name": data_name(arguments.train), "num_images": len(train)}}
        learned |= {"steps": arguments.steps}
    matrices = [np.zeros((num_classes, num_classes), dtype=np.int64) for _ in variants]
    for row, scores, mask in predictions:
        matrices[row] += confusion(upsampled_classes(scores, mask.shape), mask, num_classes)
    rows = [
        {
            **variant.facts(),
            "miou": 100 * mean_iou(matrix),
            "pixel_accuracy": 100 * float(np.trace(matrix) / matrix.sum()),
            **variant.costs(),
        }
        for variant, matrix in zip(variants, matrices, strict=True)
    ]
    return {
        **arguments.facts(model, device),
        "data": {"name": data_name(arguments.test), "num_images": len(test)},
        **learned,
        "num_classes": num_classes,
        "rows": rows,
    }


# The number of a row, its logits [classes, rows, columns] for one image, in any resolution, and the image's mask.
Prediction = tuple[int, Tensor, NDArray[np.uint8]]


def _by_linear_head(
    test: SegmentationImages, variants: Sequence[Variant], reader: PatchReader, head: nn.Linear, arguments: Any
) -> Iterator[Prediction]:
    for pixels, masks in _batches(test, reader, arguments.batch_size, "measure"):
        for row, variant in enumerate(variants):
            with torch.inference_mode():  # [B, rows, columns, D] -> [B, classes, rows, columns]
                logits = head(patch_features(variant, pixels, reader)).permute(0, 3, 1, 2)
            for scores, mask in zip(logits, masks, strict=True):
                yield row, scores, mask


def _load_segmenter(name: str) -> Any:
    """Load a model with its own segmentation head. Raises NoTrainedHead if a part of it would be random."""
    model, info = AutoModelForSemanticSegmentation.from_pretrained(name, merge=None, output_loading_info=True)
    if info["missing_keys"]:
        lacks = f"a trained segmentation model, and this one lacks {min(info['missing_keys'])}, which would be random"
        raise NoTrainedHead("model", name, f"{lacks}; for a linear head on its patches, pass --train")
    return model


def _by_own_head(
    test: SegmentationImages, variants: Sequence[Variant], processor: Any, arguments: Any
) -> Iterator[Prediction]:
    model = variants[0].model
    _, height, width = image_shape(model)
    if height != width:
        raise BadValue("model", arguments.model, f"a model of square images, not {height}×{width}")
    resize: dict[str, Any] = {"do_resize": True, "size": {"shortest_edge": height}, "do_center_crop": False}
    for i in tqdm(range(len(test)), desc="measure", unit="image"):
        image, mask = test[i]
        if getattr(processor, "do_reduce_labels", False):
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1)
        pixels = processor(images=[image], return_tensors="pt", **resize).pixel_values.to(model.device)
        for row, variant in enumerate(variants):
            with variant.ready() as ready:
                stride = arguments.window_stride or height
                yield row, window_logits(ready, pixels[0], height, stride, arguments.batch_size), mask


@torch.inference_mode()
def window_logits(model: Any, pixels: Tensor, window: int, stride: int, batch_size: int) -> Tensor:
    """Average the logits of windows of an image: [C, H, W] -> [classes, H, W]. No side is smaller than a window.

    Windows start every `stride` pixels; the last of a row, or of a column, ends at the image's edge. If the logits
    [B, classes, h, w] are smaller than a window, they are enlarged.
    """
    starts = [[*range(0, side - window, stride), side - window] for side in pixels.shape[1:]]
    corners = [(top, left) for top in starts[0] for left in starts[1]]
    total: Tensor | None = None
    for numbers in batches_of(len(corners), batch_size):
        chosen = [corners[i] for i in numbers]
        cut = torch.stack([pixels[:, top : top + window, left : left + window] for top, left in chosen])
        logits = model(pixel_values=cut).logits.float()
        logits = F.interpolate(logits, size=(window, window), mode="bilinear", align_corners=False)
        if total is None:
            # The last channel counts the windows of every pixel.
            total = logits.new_zeros(logits.shape[1] + 1, *pixels.shape[1:])
        for (top, left), scores in zip(chosen, logits, strict=True):
            total[:-1, top : top + window, left : left + window] += scores
            total[-1, top : top + window, left : left + window] += 1
    assert total is not None
    return total[:-1] / total[-1]


@dataclass
class PatchReader:
    """Resizes whole images to `sides` (height, width), which a backbone splits into a `grid` (rows, columns)."""

    processor: Any
    sides: tuple[int, ...]
    grid: tuple[int, int]
    device: torch.device

    @classmethod
    def of(cls, model: Any, processor: Any, device: torch.device) -> PatchReader:
        """Make a reader with a model's image size and patches."""
        family, encoder = find_encoder(model)
        sides, patch = family.input_sides(encoder.config), family.patch_sides(encoder.config)
        return cls(processor, sides, (sides[0] // patch[0], sides[1] // patch[1]), device)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize images without cropping: pixels [B, C, H, W]."""
        size = dict(zip(("height", "width"), self.sides, strict=True))
        resize = {"do_resize": True, "size": size, "do_center_crop": False}
        return self.processor(images=list(images), return_tensors="pt", **resize).pixel_values.to(self.device)


@torch.inference_mode()
def patch_features(variant: Variant, pixels: Tensor, reader: PatchReader) -> Tensor:
    """Every patch's token, or the token it was merged into: [B, C, H, W] -> [B, rows, columns, D], float32."""
    rows, columns = reader.grid
    with variant.ready() as model:
        tokens = run_on_pixels(model, pixels).last_hidden_state
    return tokens[:, -rows * columns :].float().unflatten(1, (rows, columns))  # prefix tokens come first


def _batches(images: SegmentationImages, reader: PatchReader, size: int, title: str) -> Iterator[tuple[Tensor, Any]]:
    """Yield pixels [B, C, H, W] and the images' masks."""
    for numbers in tqdm(batches_of(len(images), size), desc=title, unit="batch"):
        pictures, masks = zip(*(images[i] for i in numbers), strict=True)
        yield reader.pixels(pictures), masks


def train_head(
    variant: Variant, images: SegmentationImages, reader: PatchReader, num_classes: int, arguments: Any
) -> nn.Linear:
    """Train a linear map from patch tokens to classes; its targets are the shares of the classes in a patch."""
    features, targets = [], []
    for pixels, masks in _batches(images, reader, arguments.batch_size, "read"):
        features.append(patch_features(variant, pixels, reader).flatten(0, 2).cpu())
        targets += [class_shares(mask, reader.grid, num_classes).flatten(0, 1) for mask in masks]
    x, y = torch.cat(features).clone(), torch.cat(targets)
    known = y.sum(-1) > 0
    x, y = x[known], y[known]
    mean, scale = x.mean(0), 1 / (x.std(0) + 1e-6)
    x = (x - mean) * scale
    draw = torch.Generator().manual_seed(arguments.seed)
    head = nn.Linear(x.shape[1], num_classes)
    nn.init.normal_(head.weight, std=0.01, generator=draw)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=arguments.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    for _ in tqdm(range(arguments.steps), desc="train the head", unit="step"):
        chosen = torch.randint(len(x), (min(_PATCHES_PER_STEP, len(x)),), generator=draw)
        loss = F.cross_entropy(head(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():  # fold the standardisation into the head
        head.weight.mul_(scale)
        head.bias.sub_(head.weight @ mean)
    return head.to(reader.device)


def upsampled_classes(logits: Tensor, size: tuple[int, ...]) -> NDArray[np.int64]:
    """The best class of every pixel, after bilinear upsampling: [classes, rows, columns] -> [H, W]."""
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0).cpu().numpy()


def class_shares(mask: NDArray[np.uint8], grid: tuple[int, int], num_classes: int) -> Tensor:
    """The share of every class in every patch, without ignored pixels: mask [H, W] -> [rows, columns, classes]."""
    one_hot = torch.from_numpy((mask[None] == np.arange(num_classes)[:, None, None]).astype(np.float32))
    return F.adaptive_avg_pool2d(one_hot[None], grid)[0].permute(1, 2, 0)


def confusion(predicted: NDArray[Any], mask: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """The number of pixels of class i that were predicted as class j: [classes, classes], without ignored pixels."""
    if (largest := _largest_class(mask)) >= num_classes:
        raise BadValue("mask", largest, f"classes below {num_classes}, or {IGNORED} for no class")
    known = mask != IGNORED
    pairs = mask[known].astype(np.int64) * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Mean intersection over union of the classes that occur in masks or predictions."""
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    present = union > 0
    return float((np.diag(matrix)[present] / union[present]).mean()) if present.any() else math.nan


def _largest_class(mask: NDArray[np.uint8]) -> int:
    return int(mask[mask != IGNORED].max(initial=0))
