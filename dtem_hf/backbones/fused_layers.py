"""Which layers run as one call: those whose modules do what their classes say, with nobody to see them at it.

The modules are asked in every pass, as hooks, LoRA, other weights and a `forward` of one's own come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from ..ops import fused_layer
from ..ops.fused_layer import Affine, LayerWeights, MergePart
from ..reducers import leave_matched
from ..token_state import TokenState
from .bare_modules import (
    all_are_hooked,
    bare_linear,
    bare_norm,
    computes_as_torch,
    gelu_of,
    is_bare_parameter,
    is_hooked,
)
from .open_attention import OpenAttention, has_stock_function
from .open_mlp import OpenMLP


class LayerParts(NamedTuple):
    """The modules of a pre-norm layer: x += scale1 · attention(norm1(x)); merge; x += scale2 · mlp(norm2(x)).

    `idle` are those between them that do nothing at inference, `scales` those that hold scale1 and scale2.
    """

    norm1: Any
    attention: Any
    norm2: Any
    mlp: Any
    idle: Sequence[nn.Module] = ()
    scales: tuple[nn.Module, nn.Module] | None = None


def run_fused(layer: Any, x: Tensor, attention_mask: Tensor | None, state: TokenState) -> Tensor | None:
    """Run a layer on [B, n, D] as one call, and record what it merged; None where its modules have to run.

    Where nothing was merged and nothing is, they do: a plain model's computation is kept, bit for bit.
    """
    if attention_mask is not None or layer.training or not fused_layer.can_run(x):
        return None
    index, reducer = layer.merge_index, layer.merge_reducer
    _, r = state.enter(index, x.shape[1])
    if (r == 0 and not state.has_merged(index)) or state.padding(index) is not None or reducer.runs_in_every_layer:
        return None
    if 2 * r > x.shape[1] - state.num_prefix_tokens:  # a hook has taken tokens away
        return None
    parts = layer.fused_parts()
    weights = None if parts is None else weights_of(parts, x.shape[2])
    if weights is None:
        return None
    num_rows = state.rows_read(index)
    merge = None
    if r and num_rows is None:
        merge = _merge_part(layer, index, r, state, x.shape[2])
        if merge is None:
            return None
    bias, sizes = layer.attention_bias(x, None, state), state.sizes(index)
    if not _fit(x, sizes, bias, weights.heads):
        return None
    out, merged = fused_layer.run(x, weights, sizes, bias, merge, num_rows, state.scratch)
    if merged is not None:
        leave_matched(state, index, merged, x.shape[1])
    elif num_rows is not None:
        state.hand_on_rows(index, num_rows)
    else:
        state.pass_on(index, out)
    return out


def _fit(x: Tensor, sizes: Tensor | None, bias: Tensor | None, heads: int) -> bool:
    """Whether what is known of the tokens is of the tokens that came: a hook may have changed their number."""
    if sizes is not None and sizes.shape != x.shape[:2]:
        return False
    if bias is None:
        return True
    images, for_heads, *of_keys = bias.shape
    return images in (1, len(x)) and for_heads in (1, heads) and of_keys == [1, x.shape[1]]


def _merge_part(layer: Any, index: int, r: int, state: TokenState, width: int) -> MergePart | None:
    source = layer.merge_reducer.metric_source(layer, index, state)
    if source is None:
        return None
    embedding = norm_power = None
    if source.linear is not None:
        embedding = _linear(source.linear)
        if embedding is None or embedding.weight.shape[1] != width:
            return None
    if state.embedding is not None:
        norm_power = state.embedding.norm_power_of(index)
        if norm_power is not None and not _is_bare(norm_power, (1,)):
            return None
    return MergePart(r, state.num_prefix_tokens, embedding, norm_power)


def weights_of(parts: LayerParts, width: int) -> LayerWeights | None:
    """The weights of a layer of a merged model, of tokens [B, n, width]; None where its modules have to run."""
    attention, mlp = parts.attention, parts.mlp
    if not isinstance(attention, OpenAttention) or not _runs(attention, OpenAttention):
        return None
    if not isinstance(mlp, OpenMLP) or not _runs(mlp, OpenMLP):
        return None
    if (
        all_are_hooked()
        or not computes_as_torch()
        or parts.attention.training
        or is_hooked(attention)
        or is_hooked(mlp)
    ):
        return None
    activation = _activation(parts.mlp.activation_fn)
    if activation is None or not has_stock_function(attention) or not all(_is_idle(module) for module in parts.idle):
        return None
    return _gather(parts, getattr(parts.attention, attention.output_name), activation, width)


def _runs(module: Any, mixin: type) -> bool:
    """Whether calling a module runs what a class says: derived classes may say otherwise."""
    cls: Any = type(module)
    return cls.forward is mixin.forward and cls.__call__ is nn.Module.__call__  # type: ignore[attr-defined]


def _gather(parts: LayerParts, output: Any, activation: str, width: int) -> LayerWeights | None:
    attention, mlp = parts.attention, parts.mlp
    norm1, norm2 = _norm(parts.norm1, width), _norm(parts.norm2, width)
    query, key, value = _linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)
    out, grow, shrink = _linear(output), _linear(mlp.fc1), _linear(mlp.fc2)
    if norm1 is None or norm2 is None or query is None or key is None or value is None:
        return None
    if out is None or grow is None or shrink is None:
        return None
    scale1 = scale2 = None
    if parts.scales is not None:
        scale1, scale2 = (_scale(module, width) for module in parts.scales)
        if scale1 is None or scale2 is None:
            return None
    inner, heads = len(query.weight), len(query.weight) // attention.head_dim
    shapes = [(inner, width)] * 3 + [(width, inner), (len(grow.weight), width), (width, len(grow.weight))]
    found = [part.weight.shape for part in (query, key, value, out, grow, shrink)]
    if found != shapes or inner != heads * attention.head_dim:
        return None
    return LayerWeights(
        *(norm1, query, key, value, out, norm2, grow, shrink, scale1, scale2),
        heads=heads,
        scaling=getattr(attention, attention.scaling_name),
        norm1_eps=parts.norm1.eps,
        norm2_eps=parts.norm2.eps,
        activation=activation,
    )


def _linear(module: Any) -> Affine | None:
    found = bare_linear(module)
    if found is None or found.weight.dim() != 2 or not _lies_in_rows(found.weight):
        return None
    if found.bias is None:
        return found
    return found if found.bias.shape == found.weight.shape[:1] and _lies_in_rows(found.bias) else None


def _norm(module: Any, width: int) -> Affine | None:
    found = bare_norm(module)
    if found is None or module.normalized_shape != (width,):
        return None
    for parameter in found:
        if parameter is not None and (parameter.shape != (width,) or not _lies_in_rows(parameter)):
            return None
    return found


def _lies_in_rows(parameter: Any) -> bool:
    return parameter.layout is torch.strided and parameter.is_contiguous()


def _is_bare(parameter: Any, shape: tuple[int, ...]) -> bool:
    return is_bare_parameter(parameter) and parameter.shape == shape and _lies_in_rows(parameter)


def _scale(module: Any, width: int) -> Tensor | None:
    """The one parameter of a layer scale that transformers wrote."""
    parameters = list(module._parameters.values())
    stock = _is_stock(module) and type(module).__name__.endswith("LayerScale") and len(parameters) == 1
    fits = stock and not is_hooked(module) and _is_bare(parameters[0], (width,))
    return parameters[0] if fits else None


def _is_idle(module: Any) -> bool:
    kind = type(module)
    drops = kind is nn.Dropout or (_is_stock(module) and kind.__name__.endswith("DropPath"))
    return (kind is nn.Identity or (drops and not module.training)) and not is_hooked(module)


def _is_stock(module: Any) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _activation(module: Any) -> str | None:
    """The name of an activation that can be applied in the call; None for any other."""
    if is_hooked(module):
        return None
    if type(module) is QuickGELUActivation:
        return "quick_gelu"
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(gelu_of(module) or "")
