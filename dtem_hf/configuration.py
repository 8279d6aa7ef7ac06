"""Merge configs: one dataclass per method. `model.config.merge` and adapters hold them as plain JSON."""

from __future__ import annotations

import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import InitVar, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from .costs import EncoderCost
from .errors import MOST_LAYERS, WIDEST, BadValue, check_number, check_whole
from .files import read_json, write_json
from .schedule import FlopsSchedule, KeepRateSchedule, Schedule, SqueezeBetweenSchedule, SqueezeSchedule, as_schedule
from .version import __version__


CONFIG_NAME = "merge_config.json"
# Every saved config holds it. A higher minor version loads with a warning, a higher major version is refused.
FORMAT_VERSION = (1, 0)
# An adapter's config file has these keys beside the method's fields.
ADAPTER_KEYS = {"backbone", "tensors_sha256"}


def _help(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


@dataclass(kw_only=True)
class MergeConfig(ABC):
    """The fields that all methods share. `MergeConfig.from_dict` returns the subclass that `method` names.

    `title` is the method's name in tables and plots. `learns`: the method has learned tensors. `needs_adapter`: it is
    useless with untrained tensors.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    learns: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False
    _methods: ClassVar[dict[str, type[MergeConfig]]] = {}

    proportional_attention: bool = _help(
        "let a token that stands for m patches count m times in attention", default=True
    )
    unmerge: bool | None = _help(
        "return all tokens in place (true) or the merged tokens (false); left out, the model that reads them decides",
        default=None,
    )
    part: str | None = _help("the dotted name of the encoder to merge, if a model holds several", default=None)

    def __init_subclass__(cls) -> None:
        if "method" in cls.__dict__:
            MergeConfig._methods[cls.method] = cls

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for the first field with an invalid value."""
        self._check_flags("proportional_attention", *(() if self.unmerge is None else ("unmerge",)))
        if not isinstance(self.part, (str, type(None))) or self.part == "":
            raise BadValue("part", self.part, "the dotted name of a module, or none")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise BadValue(name, getattr(self, name), "a bool")

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The schedule: it resolves to one r per layer, the number of tokens that the layer merges away."""

    @abstractmethod
    def with_reduction(self, r: Any, cost: EncoderCost, num_tokens: int) -> Self:
        """A copy with another r, for an encoder of this cost and number of tokens. Raises ValueError for a bad r."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with `method` and `version`."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        values = {name: value.to_json() if isinstance(value, Schedule) else copy(value) for name, value in given}
        return {"method": self.method, "version": ".".join(map(str, FORMAT_VERSION)), **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read the output of `to_dict`. Unknown keys, of a newer version, are dropped with a warning.

        Raises ValueError for an unknown method, a newer major version, or an invalid value.
        """
        if not isinstance(values, dict):
            raise BadValue("merge", values, "a JSON object made by MergeConfig.to_dict()")
        values = dict(values)
        # Check the version first: a newer format may name methods that this version does not know.
        check_version(values.pop("version", None))
        method = values.pop("method", getattr(cls, "method", None))
        kind = MergeConfig._methods.get(method) if isinstance(method, str) else None
        if kind is None:
            raise BadValue("method", method, f"one of {', '.join(sorted(MergeConfig._methods))}")
        if not issubclass(kind, cls):
            raise BadValue("method", method, f"{cls.__name__} reads {cls.method!r}; use MergeConfig.from_dict for any")
        known = {f.name for f in fields(kind)}
        unknown = sorted(set(values) - known - ADAPTER_KEYS)
        if unknown:
            warnings.warn(
                f"{kind.__name__}: ignoring {_shorten(unknown)}, which this version of dtem_hf does not know; "
                "upgrade dtem_hf if they matter.",
                stacklevel=2,
            )
        return kind(**{name: value for name, value in values.items() if name in known})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `merge_config.json` into a folder, which is made if needed. A failed write leaves no partial file."""
        write_json(Path(save_directory) / CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Read `merge_config.json` from a folder, such as an adapter's. Raises FileNotFoundError or ValueError."""
        return cls.from_dict(read_json(Path(directory) / CONFIG_NAME))

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


@dataclass
class MatchingConfig(MergeConfig):
    """The fields of the methods that merge r tokens per layer by bipartite soft matching."""

    r: Any = _help("tokens merged per layer: an int, a list with one per layer, or a schedule", default=16)
    flops: InitVar[float | None] = field(default=None, kw_only=True)

    def __post_init__(self, flops: float | None) -> None:
        if flops is not None:
            self.r = FlopsSchedule(flops)
        self.check()

    def check(self) -> None:
        super().check()
        if isinstance(self.r, np.ndarray | np.generic):
            self.r = self.r.tolist()
        if isinstance(self.r, list | tuple):  # a copy: the caller may change the list later
            self.r = [each.item() if isinstance(each, np.generic) else each for each in self.r]
        schedule = as_schedule(self.r)
        self.r = schedule if isinstance(self.r, dict) else self.r

    @property
    def schedule(self) -> Schedule:
        return as_schedule(self.r)

    def with_reduction(self, r: Any, cost: EncoderCost, num_tokens: int) -> Self:
        return replace(self, r=r)


@dataclass
class ToMeConfig(MatchingConfig):
    """ToMe: merge by the similarity of attention keys, without training (ICLR 2023, arXiv 2210.09461)."""

    method: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"


# Fields of DTEMConfig that add learned parameters beside the embedding.
LEARN_FIELDS = ("learn_exponents", "learn_norms", "learn_shifts")
_CHOICES = {"init": ("keys", "random"), "relaxation": ("auto", "straight_through", "soft", "hard")}


@dataclass
class DTEMConfig(MatchingConfig):
    """DTEM: merge by the similarity of a learned, decoupled embedding (NeurIPS 2024, arXiv 2412.10569)."""

    method: ClassVar[str] = "dtem"
    title: ClassVar[str] = "DTEM"
    learns: ClassVar[bool] = True

    embed_dim: int | None = _help(
        "width of the embedding; None: the width of a head, doubled if the model is 1024 wide or more", default=None
    )
    top_k: int = _help("similarities that soft grouping keeps per token", default=3)
    score_temperature: float = _help("temperature of the similarities in soft grouping", default=0.1)
    assignment_temperature: float = _help("temperature of the rounds of soft grouping", default=0.1)
    init: Literal["keys", "random"] = _help(
        "start from the mean attention key (equal to ToMe), or at random", default="keys"
    )
    relaxation: Literal["auto", "straight_through", "soft", "hard"] = _help(
        "auto: merge softly in .train(), hard in .eval(); straight_through: always merge hard, in .train() with the "
        "gradients of the soft merge; soft, hard: the same in both modes",
        default="auto",
    )
    learn_exponents: bool = _help(
        "learn for each head how much token sizes count in attention: size m is raised to a learned power, at first 1",
        default=False,
        kw_only=True,
    )
    learn_norms: bool = _help(
        "learn for each layer what share of the length that a mean of tokens loses a merged token gets back",
        default=False,
        kw_only=True,
    )
    learn_shifts: bool = _help(
        "learn shifts of the backbone's LayerNorm parameters and biases, added in proportion to the merged tokens",
        default=False,
        kw_only=True,
    )

    def check(self) -> None:
        super().check()
        self._check_flags(*LEARN_FIELDS)
        if self.learn_exponents and not self.proportional_attention:
            raise BadValue("learn_exponents", True, "False, or use proportional_attention=True, which it changes")
        if self.embed_dim is not None:
            check_whole("embed_dim", self.embed_dim, 1, WIDEST)
        check_whole("top_k", self.top_k, 1, WIDEST)
        for name in ("score_temperature", "assignment_temperature"):
            check_number(name, getattr(self, name), 1e-6, 1e6)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadValue(name, getattr(self, name), f"one of {', '.join(choices)}")


@dataclass
class PiToMeConfig(MatchingConfig):
    """PiToMe: merge tokens that many others resemble, protect distinct tokens (NeurIPS 2024, arXiv 2405.16148)."""

    method: ClassVar[str] = "pitome"
    title: ClassVar[str] = "PiToMe"

    margin: float = _help("cosine above which two tokens count as alike, in the first layer", default=0.9)
    last_margin: float = _help("this margin in the last layer; between, it changes linearly", default=0.1)

    def check(self) -> None:
        super().check()
        for name in ("margin", "last_margin"):
            check_number(name, getattr(self, name), -1, 1)


@dataclass
class ToFuConfig(MatchingConfig):
    """ToFu: early layers prune, late layers merge and restore the length (WACV 2024, arXiv 2312.01026)."""

    method: ClassVar[str] = "tofu"
    title: ClassVar[str] = "ToFu"

    prune_layers: int | None = _help("how many layers prune, from the first on; None: half of all", default=None)

    def check(self) -> None:
        super().check()
        if self.prune_layers is not None:
            check_whole("prune_layers", self.prune_layers, 0, MOST_LAYERS)


@dataclass
class KeepRateConfig(MergeConfig):
    """The fields of the methods that keep a share of the patch tokens (the keep rate) in some layers."""

    keep_rate: float = _help("share of the patch tokens that a reducing layer keeps", default=0.7)
    layers: list[int] | None = _help(
        "layers that reduce, counted from 0; None: the layers at one, two and three quarters of the depth",
        default=None,
    )
    proportional_attention: bool = _help(
        "let a token that stands for m patches count m times in attention", default=False, kw_only=True
    )
    _schedule: ClassVar[type[KeepRateSchedule]] = KeepRateSchedule

    def check(self) -> None:
        super().check()
        layers = self.schedule.layers
        self.layers = None if layers is None else list(layers)

    @property
    def schedule(self) -> KeepRateSchedule:
        return self._schedule(self.keep_rate, self.layers)  # type: ignore[arg-type]

    def with_reduction(self, r: Any, cost: EncoderCost, num_tokens: int) -> Self:
        schedule = as_schedule(r) if isinstance(r, (dict, Schedule)) else r
        if isinstance(schedule, FlopsSchedule) and not schedule.slope:
            schedule = self.schedule.for_flops(cost, num_tokens, schedule.flops)
        if not isinstance(schedule, KeepRateSchedule):
            expected = f"a KeepRateSchedule, or a share of the multiply-adds in flops: {self.title} has no r"
            raise BadValue("r", r, expected)
        layers = None if schedule.layers is None else list(schedule.layers)
        return replace(self, keep_rate=schedule.keep_rate, layers=layers)


@dataclass
class EViTConfig(KeepRateConfig):
    """EViT: keep the patches that the CLS token attends to most, fuse the others (ICLR 2022, arXiv 2202.07800)."""

    method: ClassVar[str] = "evit"
    title: ClassVar[str] = "EViT"


@dataclass
class ETPSConfig(KeepRateConfig):
    """eTPS: like EViT, but each pruned patch joins the most similar kept patch (CVPR 2023, arXiv 2304.10716)."""

    method: ClassVar[str] = "etps"
    title: ClassVar[str] = "eTPS"
    _schedule: ClassVar[type[KeepRateSchedule]] = SqueezeSchedule


@dataclass
class DTPSConfig(KeepRateConfig):
    """dTPS: like eTPS, but a learned network scores patches, in front of layers (CVPR 2023, arXiv 2304.10716)."""

    method: ClassVar[str] = "dtps"
    title: ClassVar[str] = "dTPS"
    learns: ClassVar[bool] = True
    needs_adapter: ClassVar[bool] = True
    _schedule: ClassVar[type[KeepRateSchedule]] = SqueezeBetweenSchedule


def check_version(version: Any) -> None:
    """Raise ValueError for a newer major version, warn about a newer minor version; None is the first version."""
    if version is None:
        return
    found = re.fullmatch(r"(\d{1,5})\.(\d{1,5})", str(version), re.ASCII)
    if found is None:
        raise BadValue("version", version, "a version like '1.0'")
    major, minor = int(found[1]), int(found[2])
    newest = ".".join(map(str, FORMAT_VERSION))
    if major > FORMAT_VERSION[0]:
        raise BadValue(
            "version",
            version,
            f"this dtem_hf ({__version__}) reads formats up to {FORMAT_VERSION[0]}.x; upgrade dtem_hf to one that "
            f"reads format {major}.{minor}: pip install --upgrade dtem-hf",
        )
    if (major, minor) > FORMAT_VERSION:
        warnings.warn(
            f"merge config of format {major}.{minor}, newer than the {newest} that this dtem_hf ({__version__}) "
            "knows; pip install --upgrade dtem-hf.",
            stacklevel=3,
        )


def _shorten(names: list[str]) -> str:
    """At most five names for a message, shortened: a file may hold long or unprintable names."""
    shown = ", ".join(name if name.isidentifier() else repr(name) for name in (name[:50] for name in names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
