"""Options of all programs are checked before a program starts."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest

from dtem_hf import BadValue
from dtem_hf.benchmark.advise import AdviseArguments
from dtem_hf.benchmark.program import BenchmarkArguments
from dtem_hf.convert.lv_vit import ConvertLVViTArguments
from dtem_hf.deploy.program import ExportArguments
from dtem_hf.evaluation.analyze import AnalyzeArguments
from dtem_hf.evaluation.calibrate import CalibrateArguments
from dtem_hf.evaluation.caption_loss import CaptionLossArguments
from dtem_hf.evaluation.captions import EvaluateCaptionsArguments
from dtem_hf.evaluation.classification import EvaluateArguments
from dtem_hf.evaluation.comparison import CompareArguments
from dtem_hf.evaluation.dense import DenseArguments
from dtem_hf.evaluation.segmentation import SegmentationArguments
from dtem_hf.quickstart import QuickstartArguments
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.small_git import SmallGitArguments
from recipes.benchmark_device import DeviceArguments
from recipes.benchmark_training import TrainingStepArguments


EXTRA: dict[type, dict[str, Any]] = {
    AdviseArguments: {},
    AnalyzeArguments: {},
    BenchmarkArguments: {},
    CalibrateArguments: {"method": "tome"},
    CaptionLossArguments: {},
    CompareArguments: {},
    ConvertLVViTArguments: {},
    DenseArguments: {},
    DeviceArguments: {},
    EvaluateArguments: {},
    EvaluateCaptionsArguments: {"model": "m", "images": "i"},
    ExportArguments: {},
    QuickstartArguments: {},
    SegmentationArguments: {},
    SmallGitArguments: {},
    TrainArguments: {},
    TrainingStepArguments: {},
}
FLOATS = [
    (kind, f.name) for kind in EXTRA for f in fields(kind) if get_type_hints(kind)[f.name] in (float, float | None)
]


def make(kind: Any, **changes: Any) -> Any:
    """The arguments of a program, with some text for each that has no default."""
    needed = {f.name: "x" for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return kind(**{**needed, **EXTRA[kind], **changes})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda each: getattr(each, "__name__", each))
def test_no_option_is_nan_or_infinite(kind: type, name: str, value: float) -> None:
    """NaN passes every comparison that asks for too small a number, and a record in JSON holds neither."""
    make(kind)
    with pytest.raises(BadValue, match=f"{name}={value}:"):
        make(kind, **{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (QuickstartArguments, "epochs", 0),
        (QuickstartArguments, "steps", 0),
        (DeviceArguments, "rounds", 0),
        (SmallGitArguments, "patch_size", 0),
        (SmallGitArguments, "validation_size", -1),
        (CaptionLossArguments, "max_caption_tokens", 1),
        *((kind, "num_workers", -1) for kind in EXTRA if "num_workers" in get_type_hints(kind)),
    ],
)
def test_too_small_a_number_is_named(kind: type, name: str, value: int) -> None:
    with pytest.raises(BadValue, match=rf"{name}={value}: \d or more"):
        make(kind, **{name: value})
