"""The description of a family of encoders, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..costs import EncoderCost, LayerCost, MetricCost
from ..embedding import Geometry, KeyProjection
from ..errors import BadValue, UnsupportedModelError
from .anatomy import Anatomy, convolution_cost, linear_cost
from .layer import LayerMerging
from .readers import READERS
from .shifts import Shiftable, shiftable_modules


@dataclass(frozen=True)
class Family:
    """One family of encoders. It has no state; all other facts come from the encoder.

    `encoders`: transformers' modules that run the layers, each with the dotted name of its list of layers. `anatomy`:
    the names of a layer's parts. `models`: the models with such an encoder, and how each reads its tokens: a word of
    `READERS`, or a mixin. `num_prefix_tokens`: tokens in front of the patches, which never merge; the config fields
    `prefix_fields` add to them. `width_field`: the config field of the width D. `input_fields`, `patch_fields`: the
    config fields with the sizes of an input and of a patch; for clips, the number of frames first. `patch_map`: the
    name of the linear map that embeds patches, if no convolution does. `padding_mask`: the argument of the encoder
    that is 0 for padding. `required`: config fields with the only value that can be merged, and the reason.

    `composites`: models with more than vision (text towers, decoders); only the multiply-adds of their encoder count.
    `frames`: the field of a composite's config for the number of images per input. `encoder_parts`, `layer_parts` and
    `model_parts`: modules that read tokens or their number, by dotted name, each with a mixin that makes it read
    merged tokens; missing names are skipped. `layer_merging`: the mixin for layers.
    """

    encoders: Mapping[type[nn.Module], str]
    anatomy: Anatomy
    models: Mapping[type[nn.Module], str | type]
    num_prefix_tokens: int = 1
    prefix_fields: tuple[str, ...] = ("num_register_tokens",)
    width_field: str = "hidden_size"
    input_fields: tuple[str, ...] = ("image_size",)
    patch_fields: tuple[str, ...] = ("patch_size",)
    patch_map: str = ""
    padding_mask: str = ""
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    composites: tuple[type[nn.Module], ...] = ()
    frames: str | None = None
    encoder_parts: Mapping[str, type] = field(default_factory=dict)
    layer_parts: Mapping[str, type] = field(default_factory=dict)
    model_parts: Mapping[str, type] = field(default_factory=dict)
    layer_merging: type[LayerMerging] = LayerMerging

    def reader(self, model_class: type) -> str | type:
        """How models of a class read the tokens: a word of `READERS`, or a mixin."""
        return next(self.models[cls] for cls in model_class.__mro__ if cls in self.models)

    def model_mixins(self, model_class: type) -> tuple[type, ...]:
        """The mixins for a merged model of a class."""
        reader = self.reader(model_class)
        return READERS[reader] if isinstance(reader, str) else (reader,)

    def layers(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """The encoder's layers, in order."""
        return attrgetter(next(path for cls, path in self.encoders.items() if isinstance(encoder, cls)))(encoder)

    def shiftable(self, encoder: nn.Module) -> list[Shiftable]:
        """The modules of an encoder whose parameters can be shifted."""
        return list(shiftable_modules(encoder, self.layers(encoder), "rows" in self.models.values()))

    def geometry(self, encoder: Any) -> Geometry:
        """Widths and counts, from declared sizes: weights may be packed, sharded or offloaded."""
        layers, width = self.layers(encoder), getattr(encoder.config, self.width_field)
        prefix = self.num_prefix_tokens + sum(getattr(encoder.config, name, 0) for name in self.prefix_fields)
        return Geometry(len(layers), width, *self.anatomy.heads_of(layers[0], width), prefix)

    def parts(self, model: nn.Module, encoder: nn.Module) -> Iterator[tuple[nn.Module, type]]:
        """Modules that read tokens or their number, each with its mixin."""
        roots = [(model, self.model_parts), (encoder, self.encoder_parts)]
        roots += [(layer, self.layer_parts) for layer in self.layers(encoder)]
        for root, named in roots:
            for name, mixin in named.items():
                try:
                    yield root.get_submodule(name), mixin
                except AttributeError:  # an optional part
                    continue

    def key_projections(self, encoder: Any, like: Tensor) -> list[KeyProjection]:
        """Every layer's map to attention keys; `like` has the device and dtype of the layers' input."""
        width = getattr(encoder.config, self.width_field)
        return [self.anatomy.key_projection(layer, width, like) for layer in self.layers(encoder)]

    def padding_sizes(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Sizes [B, N] for inputs with padding (size 0), from the encoder's arguments; None without padding."""
        mask = inputs.get(self.padding_mask)
        return None if mask is None else mask.flatten(1).float()

    def check(self, model: nn.Module, encoder: Any) -> None:
        """Raise UnsupportedModelError if settings of a model of the family prevent merging."""
        for name, (value, why) in self.required.items():
            if (found := getattr(encoder.config, name)) != value:
                raise UnsupportedModelError(f"{name}={found!r}: {why}")

    def input_sides(self, config: Any) -> tuple[int, ...]:
        """Height and width of the model's own images in pixels; of clips, the number of frames in front."""
        return _sides_in(config, *self.input_fields)

    def patch_sides(self, config: Any) -> tuple[int, ...]:
        """Height and width of a patch in pixels; of clips, its number of frames in front."""
        return _sides_in(config, *self.patch_fields)

    def input_shape(self, encoder: Any, image_size: Any = None) -> tuple[int, ...]:
        """The shape of one input: (channels, height, width), of clips the frames first. `image_size` None: its own."""
        sides = self.input_sides(encoder.config)
        if image_size is not None:  # of a clip, the number of frames may be left out
            given = _sides(image_size, "image_size", len(sides))
            sides = (*sides[: -len(given)], *given)
        return (*sides[:-2], getattr(encoder.config, "num_channels", 3), *sides[-2:])

    def num_tokens(self, encoder: Any, image_size: Any = None) -> int:
        """Tokens that enter the first layer for an input of a size (None: the model's own).

        `image_size` is a number of pixels, (height, width), or of a clip (frames, height, width).
        """
        *frames, _, height, width = self.input_shape(encoder, image_size)
        patch = self.patch_sides(encoder.config)
        counts = [side // part for side, part in zip((*frames, height, width), patch, strict=True)]
        if 0 in counts:
            frames_wanted = f" and {patch[0]} frames" if frames else ""
            raise BadValue(
                "image_size", image_size, f"at least one patch of {patch[-2]}×{patch[-1]} pixels{frames_wanted}"
            )
        return math.prod(counts) + self.geometry(encoder).num_prefix_tokens

    def frames_of(self, model: Any) -> int:
        """How many images a model takes per input; their tokens are returned together."""
        seen = getattr(model.config, self.frames or "", None) if isinstance(model, self.composites) else None
        return seen or 1

    def encoder_cost(self, model: nn.Module, encoder: nn.Module, metric: MetricCost) -> EncoderCost:
        """Count the multiply-adds of matrix products and convolutions, as `torch.utils.flop_counter` does."""
        layers, geometry = self.layers(encoder), self.geometry(encoder)
        inside = {id(module) for layer in layers for module in layer.modules()}
        if (embedding := getattr(encoder, "merge_embedding", None)) is not None:
            inside |= {id(module) for module in embedding.modules()}
        seeing = encoder if isinstance(model, self.composites) else model
        stem, head, tail = self.outside_cost([module for module in seeing.modules() if id(module) not in inside])
        return EncoderCost(
            layers=tuple(self._layer_cost(layer, geometry, metric) for layer in layers),
            stem=stem,
            head=head,
            tail=tail,
            num_prefix_tokens=geometry.num_prefix_tokens,
        )

    def outside_cost(self, modules: Sequence[nn.Module]) -> tuple[int, ...]:
        """Multiply-adds of the modules outside the layers: per patch, per image, and per output token.

        A head that attends to the tokens has one query. The query's projection counts per image; keys, values, scores
        and weighted sums count per token.
        """
        widths = [module.embed_dim for module in modules if isinstance(module, nn.MultiheadAttention)]
        per_patch = linear_cost(
            getattr(module, self.patch_map) for module in modules if hasattr(module, self.patch_map)
        )
        head = linear_cost(modules) - per_patch + sum(width**2 for width in widths)
        return convolution_cost(modules) + per_patch, head, sum(2 * width**2 + 2 * width for width in widths)

    def _layer_cost(self, layer: nn.Module, geometry: Geometry, metric: MetricCost) -> LayerCost:
        before = list(attrgetter(self.anatomy.attention)(layer).modules())
        seen = {id(module) for module in before}
        after = [module for module in layer.modules() if id(module) not in seen]
        return LayerCost(linear_cost(before), 2 * geometry.num_heads * geometry.head_dim, linear_cost(after), metric)


def _sides_in(config: Any, *names: str) -> tuple[int, ...]:
    *frames, size = names
    return (*(getattr(config, name) for name in frames), *_sides(getattr(config, size), size, 3))


def _sides(value: Any, name: str, most: int) -> tuple[int, ...]:
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    whole = all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in sides)
    if not whole or not 2 <= len(sides) <= most:
        clips = ", or (frames, height, width)" if most == 3 else ""
        raise BadValue(name, value, f"a number of pixels, or (height, width){clips}")
    return sides


def input_like(encoder: Any) -> Tensor:
    """An empty tensor with the dtype and the device that an encoder computes with; on meta if it has no values yet."""
    dtype = next(parameter.dtype for parameter in encoder.parameters() if parameter.is_floating_point())
    for parameter in encoder.parameters():
        if not parameter.is_meta:
            return torch.empty(0, dtype=dtype, device=parameter.device)
    for module in encoder.modules():  # all offloaded: accelerate brings weights to this device
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.empty(0, dtype=dtype, device=device)
    return torch.empty(0, dtype=dtype, device="meta")
