"""ViT, and DeiT as it is published on the Hub (without its distillation token): one CLS token, then the patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel

from ..token_state import TokenState
from .bare_modules import drop
from .base import Backbone, LayerMerging, linear_cost
from .open_attention import AttentionPass, OpenAttention, opens


class ViTLayerMerging(LayerMerging):
    """Merging between the attention and the MLP of a `ViTLayer`."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if token_state is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        normed = self.layernorm_before(hidden_states)
        bias = self.attention_bias(hidden_states, attention_mask, token_state)
        num_rows = token_state.rows_read(self.merge_index)
        if not isinstance(self.attention, OpenAttention):
            attended, _ = self.attention(normed, bias, **kwargs)
            hidden_states = self.merge_step(drop(self.dropout, attended) + hidden_states, normed, token_state, bias)
        else:
            inside = AttentionPass(num_rows, merged=token_state.has_merged(self.merge_index))
            attended, _ = self.attention(normed, bias, attention_pass=inside, **kwargs)  # type: ignore[operator]
            if num_rows is None:
                attended = drop(self.dropout, attended) + hidden_states
                hidden_states = self.merge_step(attended, normed, token_state, bias, keys=inside.keys)
            else:
                hidden_states = drop(self.dropout, attended) + hidden_states[:, :num_rows]
                token_state.hand_on_rows(self.merge_index, num_rows)
        return drop(self.dropout, self.run_mlp(self.layernorm_after(hidden_states), token_state)) + hidden_states


class ViTLike(Backbone):
    """Families whose layers are built like those of ViT."""

    layer_merging = ViTLayerMerging

    def layers(self, encoder: Any) -> Sequence[nn.Module]:
        return encoder.layers

    def num_prefix_tokens(self, encoder: nn.Module) -> int:
        return 1

    def attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def key_linear(self, layer: Any) -> tuple[nn.Module, int]:
        return layer.attention.k_proj, layer.attention.num_attention_heads

    def query_linear(self, layer: Any) -> nn.Module:
        return layer.attention.q_proj

    def readers(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        for layer in self.layers(encoder):
            if self.hands_out_keys(layer):
                yield self.attention(layer), OpenAttention

    def hands_out_keys(self, layer: Any) -> bool:
        return opens(layer.attention, self.encoder_class)

    def row_cost(self, layer: Any) -> int:
        return linear_cost([layer.attention.q_proj, layer.attention.o_proj])


class ViTFamily(ViTLike):
    encoder_class = ViTModel
    models = {"AutoModel": (ViTModel,), "AutoModelForImageClassification": (ViTForImageClassification,)}
    prefix_readers = (ViTForImageClassification,)
