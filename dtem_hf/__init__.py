"""Any Hugging Face vision transformer, 1.5-2x faster, by one keyword; the policy is a small adapter on the Hub."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Where each public name lives. Names are loaded when they are first used, so that `import dtem_hf` costs nothing.
_HOMES = {
    "adapter": ("MergeAdapter",),
    "auto": (
        "AutoBackbone",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageClassification",
        "AutoModelForImageTextToText",
        "AutoModelForPreTraining",
        "AutoModelForSemanticSegmentation",
        "AutoModelForVisualQuestionAnswering",
        "AutoModelForZeroShotImageClassification",
        "register",
        "unregister",
    ),
    "calibration": ("Calibration", "calibrate"),
    "configuration": ("DTEMConfig", "EViTConfig", "MergeConfig", "ToMeConfig"),
    "errors": ("AdapterError", "BadValue", "UnsupportedModelError"),
    "modeling": ("attach", "detach"),
    "schedule": (
        "ConstantSchedule",
        "FlopsSchedule",
        "InflectedSchedule",
        "KeepRateSchedule",
        "LinearSchedule",
        "MergePlan",
    ),
    "token_state": ("MergeTrace",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .adapter import MergeAdapter
    from .auto import (
        AutoBackbone,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForPreTraining,
        AutoModelForSemanticSegmentation,
        AutoModelForVisualQuestionAnswering,
        AutoModelForZeroShotImageClassification,
        register,
        unregister,
    )
    from .calibration import Calibration, calibrate
    from .configuration import DTEMConfig, EViTConfig, MergeConfig, ToMeConfig
    from .errors import AdapterError, BadValue, UnsupportedModelError
    from .modeling import attach, detach
    from .schedule import (
        ConstantSchedule,
        FlopsSchedule,
        InflectedSchedule,
        KeepRateSchedule,
        LinearSchedule,
        MergePlan,
    )
    from .token_state import MergeTrace


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = [
    "AdapterError",
    "AutoBackbone",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForPreTraining",
    "AutoModelForSemanticSegmentation",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForZeroShotImageClassification",
    "BadValue",
    "Calibration",
    "ConstantSchedule",
    "DTEMConfig",
    "EViTConfig",
    "FlopsSchedule",
    "InflectedSchedule",
    "KeepRateSchedule",
    "LinearSchedule",
    "MergeAdapter",
    "MergeConfig",
    "MergePlan",
    "MergeTrace",
    "ToMeConfig",
    "UnsupportedModelError",
    "attach",
    "calibrate",
    "detach",
    "register",
    "unregister",
]
