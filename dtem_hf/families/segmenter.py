"""Segmenter: a decoder that attends to merged tokens by their sizes; only its masks are unmerged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..costs import EncoderCost, MetricCost
from ..extra_models.segmenter import SegmenterForSemanticSegmentation, SegmenterModel
from ..scope import current_state
from .anatomy import linear_cost
from .family import Family
from .readers import read_bias
from .vit import VIT_LAYER


class MergedMasks:
    """Mixin for the decoder: from merged tokens [B, n, D] to masks of all patches [B, N, classes]."""

    def forward(self: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        state = current_state()
        if state is None or not state.changed:
            return super().forward(tokens, attention_mask)  # type: ignore[misc]
        prefix, bias = state.num_prefix_tokens, read_bias(tokens, tokens.dtype)
        if bias is not None:  # each class counts once
            bias = F.pad(bias[..., prefix:], (0, self.class_embeddings.shape[1]))
        masks: Tensor = super().forward(tokens, bias)  # type: ignore[misc]
        return masks if state.unmerged else ops.unmerge_tokens(masks, state.source(-1)[:, prefix:] - prefix)


class SegmenterFamily(Family):
    """The decoder's layers run on the merged tokens and the classes, without the prefix."""

    def encoder_cost(self, model: nn.Module, encoder: Any, metric: MetricCost) -> EncoderCost:
        cost = super().encoder_cost(model, encoder, metric)
        if not isinstance(model, SegmenterForSemanticSegmentation):
            return cost
        decoder, config = model.decoder, encoder.config
        layers = linear_cost(decoder.layers.modules())
        per_patch = layers + linear_cost([decoder.projection, decoder.patch_projection])
        per_patch += config.num_labels * config.hidden_size  # a score for each class
        per_class = layers + linear_cost([decoder.class_projection])
        per_pair = 2 * config.hidden_size * config.num_decoder_layers
        more = config.num_labels - cost.num_prefix_tokens  # the decoder runs on n + more tokens; the encoder returns n
        head = config.num_labels * per_class - cost.num_prefix_tokens * per_patch + more**2 * per_pair
        return replace(cost, head=head, tail=per_patch + 2 * more * per_pair, tail_pairs=per_pair)


FAMILY = SegmenterFamily(
    encoders={SegmenterModel: "layers"},
    anatomy=VIT_LAYER,
    models={SegmenterModel: "tokens", SegmenterForSemanticSegmentation: "masks"},
    model_parts={"decoder": MergedMasks},
)
