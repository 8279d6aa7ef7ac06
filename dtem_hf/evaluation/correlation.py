"""Kendall's τ per layer between token similarities by keys and by a learned embedding (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F

from ..embedding import mean_key_projection
from ..errors import BadValue
from ..families import find_encoder
from ..models.attach import MergeMixin
from ..models.copies import share_weights
from ..models.encoder import embedding_of
from ..models.vision import evaluating, run_on_pixels
from ..ops import cosine_scores, split_even_odd


@torch.no_grad()
def similarity_correlations(model: Any, pixel_values: Tensor) -> NDArray[np.float64]:
    """Kendall's τ between the similarities by keys and by the embedding: [B, C, H, W] -> [layers, B].

    The pairs are those of bipartite matching, A tokens with B tokens. Nothing is merged, so every layer sees all
    tokens. The model does not change. Raises ValueError if it has no learned embedding.
    """
    encoder = find_encoder(model)[1]
    if not isinstance(model, MergeMixin) or not getattr(embedding_of(encoder), "projections", None):
        raise BadValue("model", type(model).__name__, "a model with a learned embedding: attach DTEM or an adapter")
    model = share_weights(model)
    model.set_reduction(0)
    family, encoder = find_encoder(model)
    prefix, names = family.geometry(encoder).num_prefix_tokens, family.anatomy
    inputs: list[Tensor] = []
    hooks = [
        getattr(layer, names.norm1).register_forward_hook(lambda _, args, normed: inputs.append(normed))
        for layer in family.layers(encoder)
    ]
    try:
        with evaluating(model):
            run_on_pixels(model, pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    keys = family.key_projections(encoder, inputs[0].new_empty(0))
    taus = []
    for projection, embed, normed in zip(keys, encoder.merge_embedding.projections, inputs, strict=True):
        by_keys, by_embedding = (
            cosine_scores(*split_even_odd(metric, prefix)).flatten(1).cpu().numpy()  # [B, a, b] -> [B, a · b]
            for metric in (F.linear(normed, *mean_key_projection(projection)), embed(normed))
        )
        taus.append([kendalltau(x, y).statistic for x, y in zip(by_keys, by_embedding, strict=True)])
    return np.asarray(taus)


def block_ranges(num_layers: int) -> list[tuple[int, int]]:
    """First and last layer, counted from 1, of three nearly equal ranges: of 12 layers, 1–4, 5–8 and 9–12."""
    parts = np.array_split(np.arange(1, num_layers + 1), min(3, num_layers))
    return [(int(part[0]), int(part[-1])) for part in parts]


def correlation_table(correlations: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Mean τ over layers and images, a row per range of blocks: τ [layers, B] by name (before, after training).

    `…_std` is the standard deviation over images of the mean over the range's layers.
    """
    layers = {len(values) for values in correlations.values()}
    if len(layers) != 1:
        raise BadValue("correlations", sorted(layers), "the same number of layers under every name")
    rows = []
    for first, last in block_ranges(layers.pop()):
        row: dict[str, Any] = {"blocks": f"{first}–{last}"}
        for name, values in correlations.items():
            per_image = values[first - 1 : last].mean(axis=0)
            row[name] = float(per_image.mean())
            row[f"{name}_std"] = float(per_image.std())
        rows.append(row)
    return rows
