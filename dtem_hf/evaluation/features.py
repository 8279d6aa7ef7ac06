"""Measure an encoder without a head: compare its features, and their nearest neighbours, with the unmerged model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..models.distances import recorded_features
from ..models.vision import run_on_pixels
from ..programs.processes import say
from .metrics import bootstrap_interval
from .parts import Columns
from .variants import Variant, median_speeds, run_in_turn


# The number of images whose similarities to all others are in memory at once.
_CHUNK = 1024


@torch.inference_mode()
def measure_features(
    variants: Sequence[Variant], device: torch.device, batch: dict[str, Tensor], first: int, kind: str
) -> Columns:
    """Run all rows on a batch in turn, starting with row `first`; `kind` is a kind of `recorded_features`.

    Returns labels [B] and, for R rows, `features` [B, R, D] and `seconds_per_image` [1, R].
    """
    pixels = batch["pixel_values"].to(device=device, dtype=variants[0].model.dtype)

    def features_of(model: Any) -> Tensor:
        with recorded_features(model, kind) as features:
            run_on_pixels(model, pixels)
            return features()

    found, seconds = run_in_turn(variants, features_of, device, first)
    return {
        "labels": batch["labels"].numpy(),
        "seconds_per_image": seconds[None] / len(pixels),
        "features": torch.stack(found, dim=1).cpu().numpy(),
    }


def feature_rows(
    variants: Sequence[Variant], columns: Columns, device: torch.device, neighbours: int
) -> list[dict[str, Any]]:
    """One dict per row, from the columns of all images: the mean cosine with row 0, and shares in percent.

    `same_nearest` is the share of images whose nearest other image is the same as in row 0 (None for a single image).
    `knn_top1` is the share of images whose label wins the vote of their `neighbours` nearest other images (`vote`). It
    counts only images whose label another image has, too; it is None if there are none, for a single label, and for
    too few images. `change_interval` is the interval of the change of `knn_top1` from row 0.
    """
    labels, speeds = columns["labels"], median_speeds(columns["seconds_per_image"])
    known = labels >= 0
    _, place, counts = np.unique(labels[known], return_inverse=True, return_counts=True)
    shared = counts[place] > 1
    votes = shared.any() and len(counts) > 1 and len(place) > neighbours
    if known.any() and not votes:
        say(f"no k-NN top-1: it needs more than {neighbours} labelled images, two labels, and two images of one label")
    rows: list[dict[str, Any]] = []
    for i, (variant, (speed, speedup)) in enumerate(zip(variants, speeds, strict=True)):
        features = torch.from_numpy(columns["features"][:, i])
        closest = nearest(features.to(device), 1)[:, 0] if len(features) > 1 else None
        right = None
        if votes:
            others = place[nearest(features[torch.from_numpy(known)].to(device), neighbours)]
            right = (vote(others) == place)[shared].astype(float)
        if i == 0:
            reference, reference_closest, reference_right = features.double(), closest, right
        cosine = F.cosine_similarity(features.double(), reference, dim=-1).numpy()
        same = None if closest is None else 100.0 * (closest == reference_closest)
        rows.append(
            {
                **variant.facts(),
                "cosine": float(cosine.mean()),
                "cosine_interval": bootstrap_interval(cosine),
                "same_nearest": None if same is None else float(same.mean()),
                "same_nearest_interval": None if same is None else bootstrap_interval(same),
                "knn_top1": None if right is None else float(100 * right.mean()),
                "change_interval": None if right is None else bootstrap_interval(100 * (right - reference_right)),
                "images_per_second": speed,
                "speedup": speedup,
                **variant.costs(),
            }
        )
    return rows


def nearest(features: Tensor, count: int) -> NDArray[np.int64]:
    """The `count` nearest other images of every image, by cosine, the nearest first: [n, D] -> [n, count]."""
    unit, found = F.normalize(features, dim=-1), []
    for start in range(0, len(unit), _CHUNK):
        similar = unit[start : start + _CHUNK] @ unit.T
        similar.diagonal(start).fill_(-torch.inf)  # an image is not its own neighbour
        found.append(similar.topk(count, dim=1).indices)
    return torch.cat(found).cpu().numpy()


def vote(labels: NDArray[Any]) -> NDArray[Any]:
    """The most frequent label of the neighbours, of several the nearest one's: [n, k], nearest first -> [n]."""
    votes = (labels[:, :, None] == labels[:, None, :]).sum(axis=2)
    return labels[np.arange(len(labels)), votes.argmax(axis=1)]  # argmax takes the first of equals
