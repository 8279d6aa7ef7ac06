"""A whole project in minutes on a laptop's CPU: train a ViT, learn what to merge, measure, save, load again.

    make quickstart
    python recipes/quickstart.py --output_dir runs/quickstart

The images are the handwritten digits that come with scikit-learn: 1,797 real scans of 8×8 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from .configuration import ToMeConfig
from .data.images import ProcessedImages, collate, load_images
from .errors import need
from .evaluation.classification import EvaluateArguments, evaluate
from .files import write_json, write_text
from .hub.folder_card import write_card
from .models.attach import attach
from .models.auto import AutoModelForImageClassification
from .programs.arguments import LABELS_NAME, at_least, option, parse_arguments
from .progress import tqdm
from .report.pictures import draw_merged_tokens
from .report.plots import plot_accuracy
from .report.tables import print_table
from .training.arguments import TrainArguments
from .training.program import train


REDUCTIONS = (6, 10, 14, 18)
LEARNED_AT = 14
_TEST_IMAGES = 450
# Upscaled so that one pixel of a scan is one patch.
_SCALE = 4


@dataclass(kw_only=True)
class QuickstartArguments:
    """Train, merge, measure, save and load on handwritten digits."""

    output_dir: str = option("folder for all results", default="runs/quickstart")
    epochs: int = option("passes over the digits when the plain ViT is trained", default=15)
    steps: int = option("steps of learning the merge embedding", default=150)
    seed: int = option("the seed of all random numbers", default=0)

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "steps")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the quickstart; each part prints its results."""
    arguments = parse_arguments(QuickstartArguments, argv, __doc__ or "")
    output = Path(arguments.output_dir)
    torch.manual_seed(arguments.seed)

    print("1/5  a small ViT learns handwritten digits")
    write_digits(output / "digits")
    accuracy = train_backbone(output, arguments)
    print(f"     plain model: {accuracy:.1f} % of {_TEST_IMAGES} held-out digits")

    print(f"2/5  a merge embedding learns from the plain model's outputs, without labels (r = {LEARNED_AT})")
    train(
        TrainArguments(
            model=str(output / "vit"),
            data=str(output / "digits" / "train"),
            output_dir=str(output / "merge"),
            r=str(LEARNED_AT),
            steps=arguments.steps,
            batch_size=64,
            lr=2e-3,
            validation_size=192,
            validate_every=50,
            checkpoint_every=50,
            num_workers=0,
            seed=arguments.seed,
        )
    )
    adapter = output / "merge" / "adapter"

    print("3/5  accuracy without merging, with ToMe and with DTEM, at several r")
    result = evaluate(
        EvaluateArguments(
            model=str(output / "vit"),
            data=str(output / "digits" / "test"),
            r=[str(r) for r in REDUCTIONS],
            adapter=str(adapter),
            batch_size=90,
            output_dir=str(output / "evaluation"),
            num_workers=0,
        )
    )
    print_table(result)

    print("4/5  pictures and the card")
    draw(output, result, adapter)

    print("5/5  the adapter comes back with merge=")
    check_round_trip(output, adapter)
    print(f"done; look at {adapter}: accuracy.png, merged_tokens.png, and README.md, the adapter's card")


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as PNGs with a labels.csv, split into train and test."""
    need("quickstart", "the quickstart", "sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for name, members in (("test", order[:_TEST_IMAGES]), ("train", order[_TEST_IMAGES:])):
        lines = ["file,label"]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in members:
            scan = Image.fromarray((digits.images[i] * 255 / 16).round().astype(np.uint8))
            scan.resize((8 * _SCALE, 8 * _SCALE), Image.Resampling.BICUBIC).save(folder / name / f"{i:04d}.png")
            lines.append(f"{i:04d}.png,{digits.target[i]}")
        write_text(folder / name / LABELS_NAME, "\n".join(lines) + "\n")


def train_backbone(output: Path, arguments: QuickstartArguments) -> float:
    """Train a small ViT on the digits, save it with its processor, and return its test accuracy in percent."""
    size = 8 * _SCALE
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    config = ViTConfig(
        image_size=size,
        patch_size=_SCALE,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=192,
        initializer_range=0.1,
        id2label={i: str(i) for i in range(10)},
    )
    model = ViTForImageClassification(config)
    sets = {}
    for name in ("train", "test"):
        images = ProcessedImages(load_images(str(output / "digits" / name)), processor)
        sets[name] = collate([images[i] for i in range(len(images))])
    steps = list(_batches(sets["train"], 32, arguments.epochs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=len(steps))
    model.train()
    for pixels, labels in tqdm(steps, desc="train the plain ViT", unit="step"):
        loss = F.cross_entropy(model(pixel_values=_jitter(pixels)).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        predicted = model(pixel_values=sets["test"]["pixel_values"]).logits.argmax(-1)
    model.save_pretrained(output / "vit")
    processor.save_pretrained(output / "vit")
    return 100 * (predicted == sets["test"]["labels"]).double().mean().item()


def _batches(data: dict[str, Tensor], size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        for rows in torch.randperm(len(data["labels"])).split(size):
            yield data["pixel_values"][rows], data["labels"][rows]


def _jitter(pixels: Tensor) -> Tensor:
    """Shift a batch by up to one pixel of the scan in each direction, and repeat the edges."""
    dx, dy = (int(torch.randint(-_SCALE, _SCALE + 1, ())) for _ in range(2))
    padded = F.pad(pixels, [_SCALE] * 4, mode="replicate")
    size = pixels.shape[-1]
    return padded[..., _SCALE + dy : _SCALE + dy + size, _SCALE + dx : _SCALE + dx + size]


def draw(output: Path, result: dict[str, Any], adapter: Path) -> None:
    """Write the evaluation's record, the plot, the picture of merged tokens and the card into the adapter's folder."""
    write_json(adapter / "evaluation.json", result)
    plot_accuracy(result["rows"], adapter / "accuracy.png", title="Handwritten digits, small ViT")
    test = output / "digits" / "test"
    labelled = [line.split(",") for line in (test / LABELS_NAME).read_text().splitlines()[1:]]
    first = {label: name for name, label in reversed(labelled)}
    models = {
        f"{name}, r = {LEARNED_AT}": AutoModelForImageClassification.from_pretrained(output / "vit", merge=merge)
        for name, merge in (("ToMe", ToMeConfig(r=LEARNED_AT)), ("DTEM", adapter))
    }
    processor = ViTImageProcessorPil.from_pretrained(output / "vit")
    scans = [Image.open(test / first[digit]) for digit in "2358"]
    draw_merged_tokens(scans, models, processor, adapter / "merged_tokens.png")
    write_card(adapter)


def check_round_trip(output: Path, adapter: Path) -> None:
    """Load the adapter with `merge=` and with `attach`, and a saved merged model; raise if any logit differs."""
    name = output / "vit"
    pixels = torch.randn(8, 3, 8 * _SCALE, 8 * _SCALE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        merged = AutoModelForImageClassification.from_pretrained(name, merge=str(adapter))
        expected = merged(pixel_values=pixels).logits
        attached = attach(ViTForImageClassification.from_pretrained(name), str(adapter))
        merged.save_pretrained(output / "vit-merged")
        again = AutoModelForImageClassification.from_pretrained(output / "vit-merged")
        for way, model in (("attach", attached), ("save_pretrained", again)):
            if not torch.equal(model(pixel_values=pixels).logits, expected):
                raise RuntimeError(f"the logits differ after {way}")
    print("     merge=, attach and save_pretrained give the same logits, bit for bit")
