"""What changes from step to step of a run: how much is merged, how sharply, and whether softly at all."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..configuration import DTEMConfig
from ..errors import BadValue
from ..models.install import set_merge_config
from ..programs.arguments import option


if TYPE_CHECKING:
    from .arguments import TrainArguments


@dataclass(kw_only=True)
class CurriculumArguments:
    """The options of the curriculum; without any, every step is as the config says."""

    sample_r: list[int] = option(
        "numbers of tokens of which each step draws its r, like 8 13 16 20", default_factory=list
    )
    last_score_temperature: float | None = option(
        "score_temperature at the end, reached exponentially; left out, it stays", default=None
    )
    last_assignment_temperature: float | None = option(
        "assignment_temperature at the end, reached exponentially; left out, it stays", default=None
    )
    straight_through_from: int | None = option(
        "step from which tokens are really removed, with the gradients of soft merging; 0: from the start",
        default=None,
    )

    def check_curriculum(self) -> None:
        """Raise ValueError for options that make no sense."""
        if any(r < 0 for r in self.sample_r):
            raise BadValue("sample_r", self.sample_r, "numbers of tokens, 0 or more, like 8 13 16 20")
        for name in ("last_score_temperature", "last_assignment_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadValue(name, value, "a number above 0")
        if self.straight_through_from is not None and self.straight_through_from < 0:
            raise BadValue("straight_through_from", self.straight_through_from, "a step, 0 or more")


class Curriculum:
    """The config of every step. What is drawn for a step depends on the seed and the step alone, in all processes."""

    def __init__(self, arguments: TrainArguments) -> None:
        self.arguments = arguments
        self.config = arguments.merge_config()

    def at(self, step: int) -> DTEMConfig:
        """The config that step `step` (from 0) trains with."""
        a = self.arguments
        changes: dict[str, Any] = {}
        if a.sample_r:
            draw = random.Random(a.seed * 1_000_003 + step)
            changes["r"] = draw.choice(a.sample_r)
        done = step / max(a.steps - 1, 1)
        for name in ("score_temperature", "assignment_temperature"):
            last = getattr(a, f"last_{name}")
            if last is not None:
                changes[name] = getattr(self.config, name) * (last / getattr(self.config, name)) ** done
        if a.straight_through_from is not None and step >= a.straight_through_from:
            changes["relaxation"] = "straight_through"
        return replace(self.config, **changes)

    def enter(self, model: Any, step: int) -> None:
        """Set a model up for a step."""
        set_merge_config(model, self.at(step))

    def leave(self, model: Any) -> None:
        """Set a model up as it will be used."""
        set_merge_config(model, self.config)
