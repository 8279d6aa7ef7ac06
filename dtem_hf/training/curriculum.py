"""The curriculum: r, the temperatures and the kind of merge at every training step."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any, get_type_hints

from ..configuration import DTEMConfig, DTPSConfig
from ..errors import BadValue
from ..programs.arguments import above_zero, at_least, one_of, option, parse_reduction
from ..schedule import as_schedule


# The configs of the methods that training can learn, by the option `method`.
_LEARNED: dict[str, type[DTEMConfig | DTPSConfig]] = {"dtem": DTEMConfig, "dtps": DTPSConfig}


def _merge_options() -> list[tuple[str, Any, Any]]:
    """The fields of these configs as command-line options. r is text: a number, a list or a schedule.

    The default None stands for the default of the method's config.
    """
    options: dict[str, tuple[Any, str, list[str]]] = {}
    for method, kind in _LEARNED.items():
        hints = get_type_hints(kind)
        for f in fields(kind):
            hint = str if f.name == "r" else hints[f.name]
            said = options.setdefault(f.name, (hint | None, f.metadata["help"], []))[2]
            said += [] if f.default is None else [f"{method}: {f.default}"]
    return [
        (name, hint, option(f"{text} ({', '.join(said)})" if said else text, default=None))
        for name, (hint, text, said) in options.items()
    ]


MergeArguments: Any = make_dataclass("MergeArguments", _merge_options(), kw_only=True)


@dataclass(kw_only=True)
class CurriculumArguments(MergeArguments):
    """The merge config to learn, and how it changes during a run; by default it does not change."""

    method: str = option(f"method to learn: {' or '.join(_LEARNED)}", default="dtem")
    steps: int = option("optimiser steps", default=400)
    seed: int = option("seed of every random draw", default=0)
    sample_r: list[str] = option(
        "values of r (numbers, lists, schedules) from which each step draws one, like 8 13 16 20",
        default_factory=list,
    )
    last_score_temperature: float | None = option(
        "score_temperature at the last step, approached exponentially; left out, it does not change", default=None
    )
    last_assignment_temperature: float | None = option(
        "assignment_temperature at the last step, approached exponentially; left out, it does not change", default=None
    )
    straight_through_from: int | None = option(
        "step from which merging is hard, with the gradients of soft merging; 0: from the start", default=None
    )

    def __post_init__(self) -> None:
        one_of(self, "method", _LEARNED)
        own = {f.name: f.default for f in fields(_LEARNED[self.method])}
        for f in fields(MergeArguments):
            if f.name in own and getattr(self, f.name) is None:
                setattr(self, f.name, str(own[f.name]) if f.name == "r" else own[f.name])
            elif f.name not in own:
                self._refuse(f.name)
        if self.method == "dtps":
            for name in ("sample_r", "last_score_temperature", "last_assignment_temperature", "straight_through_from"):
                self._refuse(name)
        at_least(self, 1, "steps")
        at_least(self, 0, "straight_through_from")
        self.sample_r = [parse_reduction(r, "sample_r") if isinstance(r, str) else r for r in self.sample_r]
        for r in self.sample_r:
            try:
                as_schedule(r)
            except BadValue as error:
                raise BadValue("sample_r", self.sample_r, f"numbers, lists or schedules ({error})") from error
        above_zero(self, "last_score_temperature", "last_assignment_temperature")
        self.merge_config()

    def _refuse(self, name: str) -> None:
        if (value := getattr(self, name)) not in (None, []):
            raise BadValue(name, value, f"no value: method {self.method} has no such option")

    def merge_config(self) -> DTEMConfig | DTPSConfig:
        """The config that is learned, and saved with the adapter. Raises ValueError for an invalid option."""
        kind = _LEARNED[self.method]
        values = {f.name: getattr(self, f.name) for f in fields(kind)}
        if "r" in values:
            values["r"] = parse_reduction(str(values["r"]))
        return kind.from_dict(values)

    def config_at(self, step: int) -> DTEMConfig | DTPSConfig:
        """The config of training step `step` (from 0); it is the same in all processes."""
        config, changes = self.merge_config(), dict[str, Any]()
        if self.sample_r:
            changes["r"] = random.Random(self.seed * 1_000_003 + step).choice(self.sample_r)
        done = step / max(self.steps - 1, 1)
        for name in ("score_temperature", "assignment_temperature"):
            if (last := getattr(self, f"last_{name}")) is not None:
                first = getattr(config, name)
                changes[name] = first * (last / first) ** done
        if self.straight_through_from is not None and step >= self.straight_through_from:
            changes["relaxation"] = "straight_through"
        return replace(config, **changes)
