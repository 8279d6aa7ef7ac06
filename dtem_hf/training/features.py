"""What an encoder makes of an image, as one vector: what is compared where there are no logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import BadValue
from ..families import find_encoder
from ..scope import Scope, open_scope


FEATURES = ("auto", "pooled", "cls", "patches")
FEATURE_LOSSES = ("cosine", "mse")


@contextmanager
def recorded_features(model: Any, kind: str) -> Iterator[Callable[[], Tensor]]:
    """`with recorded_features(model, kind) as features:` run the model, then `features()` is [B, D] of that pass.

    `pooled` is the encoder's own pooled output, `cls` its first final token, `patches` the mean of its final patch
    tokens, weighted by their sizes. `auto` is the first of these that there is; it passes over a pooler like ViT's,
    whose weights many checkpoints lack. Raises ValueError where an encoder has not what is asked for.
    """
    family, encoder = find_encoder(model)
    prefix = family.geometry(encoder).num_prefix_tokens
    if kind == "cls" and not prefix:
        raise BadValue("features", kind, f"pooled or patches, as {type(encoder).__name__} has no CLS token")
    outputs: list[Any] = []
    handle = encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        # Asked to prepare for a plain mean, a merged encoder hands on tokens that are weighed by their sizes.
        with open_scope(Scope(reader="mean" if kind == "patches" or not prefix else "tokens")):
            yield lambda: _pool(encoder, outputs[-1], kind, prefix)
    finally:
        handle.remove()


def _pool(encoder: Any, output: Any, kind: str, num_prefix_tokens: int) -> Tensor:
    pooled: Any = getattr(output, "pooler_output", None)
    tokens = output[0]
    if kind == "pooled" and pooled is None:
        raise BadValue("features", kind, f"cls or patches, as {type(encoder).__name__} has no pooled output")
    trusted = pooled is not None and not hasattr(getattr(encoder, "pooler", None), "dense")
    if kind == "pooled" or (kind == "auto" and trusted):
        return pooled.float()
    if kind == "cls" or (kind == "auto" and num_prefix_tokens):
        return tokens[:, 0].float()
    return tokens[:, num_prefix_tokens:].float().mean(dim=1)


def feature_distance(reference: Tensor, features: Tensor, kind: str) -> Tensor:
    """[B, D] twice -> [B]: one minus the cosine, or the mean squared difference."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(features.float(), reference, dim=-1)
    return (features.float() - reference).square().mean(dim=-1)
