"""What a file in `tests/families` declares, and the small models and images that every test makes from it.

A family's file sets `CASE = FamilyCase(...)`; `tests.support.families` finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.copies import built_once
from tests.support.slow_model import Anatomy


Inputs = dict[str, Tensor]

PATCH = 4
# For every family: a config ignores the fields that it does not know.
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": PATCH,
    "num_patches": 64,
    "initializer_range": 0.2,
}
# Where speed counts more than depth: 36 patches.
SMALL = {"num_hidden_layers": 2, "image_size": 24, "num_patches": 36}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", ".", "cat", "dog", "hen"]
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}


def images(count: int, height: int = 32, width: int = 32) -> Inputs:
    """Images of noise: [count, 3, height, width]."""
    return {"pixel_values": torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))}


def clips(count: int, height: int = 32, width: int = 32, frames: int = 8) -> Inputs:
    """Clips of noise: [count, frames, 3, height, width]."""
    noise = torch.randn(count, frames, 3, height, width, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": noise}


@dataclass(frozen=True, eq=False)
class Row:
    """One model class in one setting, with the anatomy that the slow reference runs.

    `output` names the output that is compared where one is enough; `vision` are changes to the vision config; `case`
    is filled in by the case that it becomes a part of.
    """

    model: Any
    anatomy: Anatomy
    output: str = "logits"
    variant: str = ""
    vision: Mapping[str, Any] = field(default_factory=dict)
    case: Any = None

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}" if self.variant else self.family

    @property
    def family(self) -> str:
        return self.case.family

    @property
    def has_cls(self) -> bool:
        return self.anatomy.prefix > 0

    def make(self, attention: str = "sdpa", **vision: Any) -> Any:
        """The model in `.eval()`, always with the same weights."""
        return self.case.make(self.model, attention, **{**self.vision, **vision})

    def inputs(self, count: int, height: int = 32, width: int = 32) -> Inputs:
        return self.case.inputs(count, height, width)


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """One family: its models, how they are made, what goes in, and what of the ecosystem does not hold for it.

    `encoder` is the class that is compiled and exported, `others` are further classes that can be merged,
    `dense` those that need all tokens in their places and are not in `others`. `vision`
    and `text` are config fields beside those of `VISION` and `TEXT`, `whole` those of a model with text around them,
    `small` those beside `SMALL`. `inputs` makes
    images by count, height and width; `spelled` turns config fields as they are called here into the family's own;
    `uneven` makes images of 36 patches at most that are not square, or padded,
    where the family makes a difference. `attentions` are the implementations that transformers has.

    `lacking` says of what does not hold ("export", "onnx") why, `eager_only` of what holds with eager attention only;
    from the transformers in `mended` on, it holds all the same.
    """

    family: str
    encoder: Any
    rows: tuple[Row, ...]
    others: tuple[Any, ...] = ()
    dense: tuple[Any, ...] = ()
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[..., Inputs] = images
    spelled: Callable[[dict[str, Any]], dict[str, Any]] = dict
    uneven: Callable[[int], Inputs] | None = None
    attentions: tuple[str, ...] = ("eager", "sdpa")
    lacking: Mapping[str, str] = field(default_factory=dict)
    eager_only: Mapping[str, str] = field(default_factory=dict)
    mended: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(replace(row, case=self) for row in self.rows))

    def __str__(self) -> str:
        return self.family

    @cached_property
    def models(self) -> tuple[Any, ...]:
        """Every model class of the family that can be merged, once."""
        return tuple(dict.fromkeys([self.encoder, *(row.model for row in self.rows), *self.others, *self.dense]))

    def config(self, model_class: Any, **vision: Any) -> Any:
        """A small config for a model class; `vision` are fields of the part of it that sees."""
        config_class = model_class.config_class
        fields = self.spelled({**VISION, **self.vision, **vision})
        if "vision_config" not in config_class.sub_configs:
            return config_class(**{"num_labels": 10, **fields})
        text = {**TEXT, **self.text}
        if "text_config" not in config_class.sub_configs:
            return config_class(vision_config=fields, **text)
        whole = {"num_labels": 10, "projection_dim": 16, **self.whole}
        return config_class(vision_config=fields, text_config=text, **whole)

    def make(self, model_class: Any, attention: str | None = "sdpa", **vision: Any) -> Any:
        """A plain model in `.eval()` with random weights, always the same ones, and none of them neutral."""
        key = (self, model_class, attention, repr(sorted(vision.items())))
        return built_once(key, lambda: self._build(model_class, attention, **vision))

    def _build(self, model_class: Any, attention: str | None, **vision: Any) -> Any:
        config = self.config(model_class, **vision)
        config._attn_implementation = "eager" if attention not in (None, *self.attentions) else attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = model_class(config).eval()
            for parameter in model.parameters():  # some start at zero: positions, biases by position
                parameter.data += 0.05 * torch.randn_like(parameter)
            for module in model.modules():  # as trained; transformers 5.17 loads it as zeros, whatever is saved
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight.data[module.padding_idx] = 0
        return model

    def words(self, model_class: Any, count: int) -> Inputs:
        """Texts for a model class that reads one, nothing for one that only sees."""
        if "vision_config" not in model_class.config_class.sub_configs:
            return {}
        text = torch.tensor([[2, 7, 8, 9, 7, 11, 10, 3]] * count)
        takes = signature(model_class.forward).parameters
        words = {name: text for name in ("input_ids", "decoder_input_ids", "qformer_input_ids") if name in takes}
        if "image_embeds_position_mask" in takes:  # of Kosmos-2, whose image takes the place of the first words
            words["image_embeds_position_mask"] = (
                (torch.arange(text.shape[1]) < self.whole["latent_query_num"]).long().expand(count, -1)
            )
        return {**words, "attention_mask": torch.ones_like(text)} if "attention_mask" in takes else words

    def make_small(self, model_class: Any, attention: str | None = None) -> Any:
        """A model of few layers and 36 patches."""
        return self.make(model_class, attention, **{**SMALL, **self.small})

    def small_inputs(self, count: int) -> Inputs:
        """Images for a model of 36 patches."""
        return self.inputs(count, 24, 24) if self.uneven is None else self.uneven(count)
