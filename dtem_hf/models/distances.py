"""How far a merged model's output is from the unmerged one's: logits, features, and captions' losses."""

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
    ours, theirs = logits.float().log_softmax(-1), reference.log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


def feature_distance(reference: Tensor, features: Tensor, kind: str) -> Tensor:
    """[B, D] twice -> [B]: one minus the cosine, or the mean squared difference. Of [B, N, D], the mean over N."""
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

    The V logits of visual tokens, which GIT puts before those of the text, are left out.
    """
    predicted, wanted = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
    losses = F.cross_entropy(predicted.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    counted = (wanted != -100).sum(dim=1)
    return torch.where(counted > 0, losses.sum(dim=1) / counted, torch.nan)


@contextmanager
def recorded_features(model: Any, kind: str, states: Sequence[int] = (-1,)) -> Iterator[Callable[[], Tensor]]:
    """`with recorded_features(model, kind) as features:` run the model, then `features()` is [B, D] of that pass.

    `pooled` is the encoder's own pooled output, `cls` its first final token, `patches` the mean of its final patch
    tokens, weighted by their sizes. `grid` is all N of these, back in place: [B, N, D]. `auto` is the first of the
    other three that there is; it passes over a pooler like ViT's, whose weights many checkpoints lack. With other
    `states`, `grid` is of these hidden states (the input first), side by side: run the model with
    output_hidden_states=True. Raises ValueError where an encoder lacks what is asked for.
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
        # Asked to prepare for a plain mean, a merged encoder hands on tokens that are weighed by their sizes.
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
