"""DINOv2: one CLS token, then the patches; layer scale; a classifier that averages, and a backbone for dense heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Backbone,
    Dinov2Encoder,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from ..token_state import TokenState
from .base import Backbone, LayerMerging
from .masked_attention import MaskedAttention
from .readers import Averaged, Between
from .transition import LayerParts, OpenAttention


class Dinov2LayerMerging(LayerMerging):
    """Merging between the attention and the MLP of a `Dinov2Layer`."""

    def fused_parts(self: Any) -> LayerParts:
        scales = self.layer_scale1, self.layer_scale2
        return LayerParts(self.norm1, self.attention, self.norm2, self.mlp, (self.drop_path,), scales)

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, token_state: TokenState | None = None, **kwargs: Any
    ) -> Tensor:
        if token_state is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        attention_mask = args[0] if args else kwargs.pop("attention_mask", None)
        fused = self.run_fused(hidden_states, attention_mask, token_state, kwargs)
        if fused is not None:
            return fused
        normed = self.norm1(hidden_states)
        bias = self.attention_bias(hidden_states, attention_mask, token_state)
        attended, inside = self.run_attention(self.attention, token_state, normed, attention_mask=bias, **kwargs)
        attended = self.drop_path(self.layer_scale1(attended)) + inside.rows(hidden_states)
        hidden_states = self.merge_step(attended, normed, token_state, bias, inside=inside)
        return self.drop_path(self.layer_scale2(self.run_mlp(self.norm2(hidden_states), token_state))) + hidden_states


class Dinov2Like(Backbone):
    """Families whose layers are built like those of DINOv2; `normalising` lies between encoder and classifier."""

    layer_merging: ClassVar[type[LayerMerging]] = Dinov2LayerMerging
    open_attention: ClassVar[type[OpenAttention] | None] = OpenAttention
    normalising: ClassVar[type[nn.Module]]

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        return super().model_mixins(model_class) or (Between,)

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.layer

    def num_prefix_tokens(self, encoder: Any) -> int:
        return 1 + getattr(encoder.config, "num_register_tokens", 0)

    def attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        projections = _projections(layer)
        return getattr(projections, "k_proj", None) or projections.key, projections.num_attention_heads

    def query_linear(self, layer: Any) -> nn.Module:
        projections = _projections(layer)
        return getattr(projections, "q_proj", None) or projections.query

    def readers(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        if isinstance(model, self.averaging):
            yield from ((module, Averaged) for module in model.modules() if isinstance(module, self.normalising))
        for layer in self.layers(encoder):
            projections = _projections(layer)
            if projections is not layer.attention:
                yield projections, MaskedAttention


def _projections(layer: Any) -> Any:
    """The module with queries, keys and values: before transformers took it out, one more lay around it."""
    return getattr(layer.attention, "attention", layer.attention)


class Dinov2Family(Dinov2Like):
    encoder_class = Dinov2Encoder
    models = {
        "AutoModel": (Dinov2Model,),
        "AutoModelForImageClassification": (Dinov2ForImageClassification,),
        "AutoBackbone": (Dinov2Backbone,),
    }
    averaging = (Dinov2ForImageClassification,)
    dense = (Dinov2Backbone,)
    normalising = Dinov2Model
