"""Every method as the tests for all families run it: a new method is one entry here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtem_hf import (
    DTEMConfig,
    DTPSConfig,
    ETPSConfig,
    EViTConfig,
    MergeConfig,
    PiToMeConfig,
    ToFuConfig,
    ToMeConfig,
)
from tests.support import slow_reference as slow
from tests.support.family_case import Row
from tests.support.slow_steps import Reduction, Step


# Softly merged tokens are sorted by size: at these temperatures no two sizes are equal but for rounding.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0, "top_k": 8}
LEARN = {"learn_exponents": True, "learn_norms": True}
R = [8, 5, 4]


# One of each kind: prefix tokens (one, two, none), padding, positions that follow the tokens.
ONE_OF_EACH = ("vit", "deit", "clip", "siglip", "siglip2", "beit", "dinov3_vit")


@dataclass(frozen=True)
class MethodCase:
    """A method's config for four layers of 64 patches (`config`), and one that merges nothing.

    `slow` are configs for three layers of 36 patches, with what the slow reference does in them; `real` is one for the
    twelve layers of a DeiT-tiny. `needs_cls`: the method runs only where there is a CLS token. `families` are those
    that it is tested on, where one of each kind is enough; none given: all.
    """

    config: MergeConfig
    nothing: MergeConfig
    slow: Mapping[str, tuple[MergeConfig, Reduction]]
    real: tuple[MergeConfig, Reduction]
    needs_cls: bool = False
    families: tuple[str, ...] = ()

    def fits(self, row: Row) -> bool:
        """Whether the method is run on a family's row."""
        return (row.has_cls or not self.needs_cls) and (not self.families or row.family in self.families)


def by_energy(r: int, margin: float) -> Step:
    return lambda x, sizes, metric, attended, prefix, _: slow.merge_by_energy(x, sizes, metric, prefix, r, margin)


def squeezed(rate: float, stage: int) -> Step:
    return lambda x, sizes, metric, attended, prefix, patches: slow.squeeze(
        x, sizes, attended, prefix, math.floor(rate**stage * patches + 1e-9)
    )


def fused(r: int, prune: bool) -> Step:
    return lambda x, sizes, metric, attended, prefix, _: slow.fuse_pairs(x, sizes, metric, prefix, r, prune)


def at(layers: dict[int, Any], depth: int) -> list[Any]:
    """One entry per layer, None where none is given."""
    return [layers.get(index) for index in range(depth)]


SOFT = {"t1": 0.5, "t2": 1.0, "top_k": 8}
METHODS = {
    "tome": MethodCase(
        ToMeConfig(r=9),
        ToMeConfig(r=0),
        {
            "tome": (ToMeConfig(r=R), Reduction(r=R)),
            "tome-uncounted": (ToMeConfig(r=R, proportional_attention=False), Reduction(r=R, proportional=False)),
        },
        (ToMeConfig(r=13), Reduction(r=[13] * 12)),
    ),
    "dtem": MethodCase(
        DTEMConfig(r=9),
        DTEMConfig(r=0),
        {
            "dtem": (DTEMConfig(r=[8, 0, 7]), Reduction(r=[8, 0, 7])),
            # Soft in `.eval()`: nothing else is drawn.
            "soft": (
                DTEMConfig(r=[6, 0, 5], relaxation="soft", **MILD),
                Reduction(r=[6, 0, 5], soft=True, relaxation=SOFT),
            ),
            # Powers of sizes in attention, and lengths of means, as they are learned.
            "aggregated": (DTEMConfig(r=R, **LEARN), Reduction(r=R)),
            "soft-aggregated": (
                DTEMConfig(r=[6, 0, 5], relaxation="soft", **MILD, **LEARN),
                Reduction(r=[6, 0, 5], soft=True, relaxation=SOFT),
            ),
        },
        (DTEMConfig(r=13, init="random"), Reduction(r=[13] * 12)),
    ),
    "evit": MethodCase(
        EViTConfig(0.6),
        EViTConfig(1.0),
        {
            "evit": (EViTConfig(0.7, [0, 1]), Reduction(keep_rates=[0.7, 0.7, None], proportional=False)),
            "evit-counted": (
                EViTConfig(0.6, [0, 2], proportional_attention=True),
                Reduction(keep_rates=[0.6, None, 0.6]),
            ),
        },
        (EViTConfig(0.7), Reduction(keep_rates=at(dict.fromkeys((3, 6, 9), 0.7), 12), proportional=False)),
        needs_cls=True,
    ),
    "etps": MethodCase(
        ETPSConfig(0.6),
        ETPSConfig(1.0),
        {
            "etps": (
                ETPSConfig(0.7, [0, 1]),
                Reduction([squeezed(0.7, 1), squeezed(0.7, 2), None], proportional=False),
            ),
            "etps-counted": (
                ETPSConfig(0.6, [0, 2], proportional_attention=True),
                Reduction([squeezed(0.6, 1), None, squeezed(0.6, 2)]),
            ),
        },
        (ETPSConfig(0.7), Reduction(at({3 * s: squeezed(0.7, s) for s in (1, 2, 3)}, 12), proportional=False)),
        needs_cls=True,
        families=ONE_OF_EACH,
    ),
    "dtps": MethodCase(
        DTPSConfig(0.6),
        DTPSConfig(1.0),
        {
            "dtps": (
                DTPSConfig(0.7, [1, 2]),
                Reduction([squeezed(0.7, 1), squeezed(0.7, 2), None], proportional=False, between=True),
            ),
            "dtps-counted": (
                DTPSConfig(0.6, [2], proportional_attention=True),
                Reduction([None, squeezed(0.6, 1), None], between=True),
            ),
        },
        (
            DTPSConfig(0.7),
            Reduction(at({3 * s - 1: squeezed(0.7, s) for s in (1, 2, 3)}, 12), proportional=False, between=True),
        ),
        families=ONE_OF_EACH,
    ),
    "pitome": MethodCase(
        PiToMeConfig(r=9),
        PiToMeConfig(r=0),
        {"pitome": (PiToMeConfig(r=R), Reduction([by_energy(8, 0.9), by_energy(5, 0.5), by_energy(4, 0.1)]))},
        (PiToMeConfig(r=13), Reduction([by_energy(13, 0.9 - 0.8 * index / 11) for index in range(12)])),
        families=ONE_OF_EACH,
    ),
    "tofu": MethodCase(
        ToFuConfig(r=9),
        ToFuConfig(r=0),
        {"tofu": (ToFuConfig(r=R), Reduction([fused(8, True), fused(5, False), fused(4, False)]))},
        (ToFuConfig(r=13), Reduction([fused(13, index < 6) for index in range(12)])),
        families=ONE_OF_EACH,
    ),
}
