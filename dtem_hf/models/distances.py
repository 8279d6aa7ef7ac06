"""Distances between the outputs of merged and unmerged models (logits, features, maps), and losses of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadValue
from ..families import find_encoder
from ..scope import Scope, open_scope
from .vision import run_on_pixels


POOLED_FEATURES = ("auto", "pooled", "cls", "patches")
FEATURES = (*POOLED_FEATURES, "grid")
FEATURE_LOSSES = ("cosine", "mse")


def kl_to(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ model) in nats, per image: logits [B, classes] twice -> [B]."""
    model, target = logits.float().log_softmax(-1), reference.log_softmax(-1)
    return F.kl_div(model, target, log_target=True, reduction="none").sum(-1)


def feature_distance(reference: Tensor, features: Tensor, kind: str) -> Tensor:
    """One minus the cosine, or the mean squared difference: [B, D] twice -> [B]. For [B, N, D], the mean over N."""
    if kind == "cosine":
        distance = 1 - F.cosine_similarity(features.float(), reference, dim=-1)
    else:
        distance = (features.float() - reference).square().mean(dim=-1)
    return distance.reshape(len(distance), -1).mean(dim=1)


def map_error(maps: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of every map: [B, H, W] twice -> [B]."""
    return (maps - reference).abs().mean(dim=(1, 2))


def output_of(model: Any, pixel_values: Tensor, kind: str = "auto") -> tuple[str, Tensor]:
    """("logits", [B, classes]) of a classifier, ("features", [B, D] or [B, N, D]) of any other model, in float32.

    `kind` is that of `recorded_features`.
    """
    with recorded_features(model, kind) as features:
        logits: Any = getattr(run_on_pixels(model, pixel_values), "logits", None)
        is_classifier = logits is not None and logits.dim() == 2
        return ("logits", logits.float()) if is_classifier else ("features", features())


def caption_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each caption's tokens but the first: [B, V + T, classes], [B, T] -> [B].

    GIT puts the logits of V visual tokens before the logits of the text; they do not count.
    """
    predicted, wanted = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
    losses = F.cross_entropy(predicted.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    counted = (wanted != -100).sum(dim=1)
    return torch.where(counted > 0, losses.sum(dim=1) / counted, torch.nan)


@contextmanager
def recorded_features(model: Any, kind: str, states: Sequence[int] = (-1,)) -> Iterator[Callable[[], Tensor]]:
    """`with recorded_features(model, kind) as features:` run the model; then `features()` is of this pass, in float32.

    `pooled` [B, D] is the encoder's pooled output, `cls` [B, D] its first final token, `patches` [B, D] the mean of
    its final patch tokens, weighted by their sizes. `grid` [B, N, D] is all N patch tokens, in place. `auto` is the
    first available of pooled, cls and patches; it ignores a pooler like ViT's, whose weights many checkpoints lack.
    `states` are indices of hidden states (0: the input of the first layer), which `grid` concatenates; for others than
    the last, run the model with output_hidden_states=True. Raises ValueError if the encoder lacks the wanted features.
    """
    if kind not in FEATURES:
        raise BadValue("features", kind, f"one of {', '.join(FEATURES)}")
    family, encoder = find_encoder(model)
    prefix = family.geometry(encoder).num_prefix_tokens
    if kind == "cls" and not prefix:
        raise BadValue("features", kind, f"pooled or patches, as {type(encoder).__name__} has no CLS token")
    outputs: list[Any] = []
    handle = encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        # For the reader "mean", a merged encoder scales its tokens so that their plain mean is weighted by size.
        reader = "mean" if kind == "patches" or not prefix else "tokens"
        with open_scope(Scope(reader="grid" if kind == "grid" else reader)):
            yield lambda: _pool(encoder, outputs[-1], kind, prefix, states)
    finally:
        handle.remove()


def _pool(encoder: Any, output: Any, kind: str, num_prefix_tokens: int, states: Sequence[int]) -> Tensor:
    pooled: Any = getattr(output, "pooler_output", None)
    tokens = output[0] if tuple(states) == (-1,) else torch.cat([output.hidden_states[i] for i in states], dim=-1)
    if kind == "pooled" and pooled is None:
        raise BadValue("features", kind, f"cls or patches, as {type(encoder).__name__} has no pooled output")
    trusted = pooled is not None and not hasattr(getattr(encoder, "pooler", None), "dense")
    if kind == "pooled" or (kind == "auto" and trusted):
        return pooled.float()
    if kind == "cls" or (kind == "auto" and num_prefix_tokens):
        return tokens[:, 0].float()
    patches = tokens[:, num_prefix_tokens:].float()
    return patches if kind == "grid" else patches.mean(dim=1)
