"""Token merging for Hugging Face vision transformers: faster by one keyword, and adapters learn what to merge."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__


# Where each public name lives. Names are loaded when they are first used, so that `import dtem_hf` costs nothing.
_HOMES = {
    "benchmark.advice": ("Advice", "advise"),
    "hub.adapter": ("MergeAdapter",),
    "models.auto": (
        "AutoBackbone",
        "AutoModel",
        "AutoModelForAudioClassification",
        "AutoModelForCausalLM",
        "AutoModelForDepthEstimation",
        "AutoModelForImageClassification",
        "AutoModelForImageSegmentation",
        "AutoModelForImageTextToText",
        "AutoModelForInstanceSegmentation",
        "AutoModelForKeypointDetection",
        "AutoModelForMaskedImageModeling",
        "AutoModelForMultimodalLM",
        "AutoModelForObjectDetection",
        "AutoModelForPoseEstimation",
        "AutoModelForPreTraining",
        "AutoModelForSemanticSegmentation",
        "AutoModelForUniversalSegmentation",
        "AutoModelForVideoClassification",
        "AutoModelForVisualQuestionAnswering",
        "AutoModelForZeroShotImageClassification",
        "AutoModelForZeroShotObjectDetection",
        "register",
        "unregister",
    ),
    "models.calibration": ("Calibration", "calibrate"),
    "configuration": (
        "DTEMConfig",
        "DTPSConfig",
        "ETPSConfig",
        "EViTConfig",
        "MergeConfig",
        "PiToMeConfig",
        "ToFuConfig",
        "ToMeConfig",
    ),
    "costs": ("MergePlan",),
    "errors": ("AdapterError", "BadValue", "UnsupportedModelError"),
    "models.attach": ("attach",),
    "models.install": ("detach",),
    "models.processor": ("AutoProcessor",),
    "schedule": (
        "ConstantSchedule",
        "FlopsSchedule",
        "InflectedSchedule",
        "KeepRateSchedule",
        "LinearSchedule",
    ),
    "token_state": ("MergeTrace",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .benchmark.advice import Advice, advise
    from .configuration import (
        DTEMConfig,
        DTPSConfig,
        ETPSConfig,
        EViTConfig,
        MergeConfig,
        PiToMeConfig,
        ToFuConfig,
        ToMeConfig,
    )
    from .costs import MergePlan
    from .errors import AdapterError, BadValue, UnsupportedModelError
    from .hub.adapter import MergeAdapter
    from .models.attach import attach
    from .models.auto import (
        AutoBackbone,
        AutoModel,
        AutoModelForAudioClassification,
        AutoModelForCausalLM,
        AutoModelForDepthEstimation,
        AutoModelForImageClassification,
        AutoModelForImageSegmentation,
        AutoModelForImageTextToText,
        AutoModelForInstanceSegmentation,
        AutoModelForKeypointDetection,
        AutoModelForMaskedImageModeling,
        AutoModelForMultimodalLM,
        AutoModelForObjectDetection,
        AutoModelForPoseEstimation,
        AutoModelForPreTraining,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
        AutoModelForVideoClassification,
        AutoModelForVisualQuestionAnswering,
        AutoModelForZeroShotImageClassification,
        AutoModelForZeroShotObjectDetection,
        register,
        unregister,
    )
    from .models.calibration import Calibration, calibrate
    from .models.install import detach
    from .models.processor import AutoProcessor
    from .schedule import (
        ConstantSchedule,
        FlopsSchedule,
        InflectedSchedule,
        KeepRateSchedule,
        LinearSchedule,
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
    "Advice",
    "AutoBackbone",
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForCausalLM",
    "AutoModelForDepthEstimation",
    "AutoModelForImageClassification",
    "AutoModelForImageSegmentation",
    "AutoModelForImageTextToText",
    "AutoModelForInstanceSegmentation",
    "AutoModelForKeypointDetection",
    "AutoModelForMaskedImageModeling",
    "AutoModelForMultimodalLM",
    "AutoModelForObjectDetection",
    "AutoModelForPoseEstimation",
    "AutoModelForPreTraining",
    "AutoModelForSemanticSegmentation",
    "AutoModelForUniversalSegmentation",
    "AutoModelForVideoClassification",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForZeroShotObjectDetection",
    "AutoProcessor",
    "BadValue",
    "Calibration",
    "ConstantSchedule",
    "DTEMConfig",
    "DTPSConfig",
    "ETPSConfig",
    "EViTConfig",
    "FlopsSchedule",
    "InflectedSchedule",
    "KeepRateSchedule",
    "LinearSchedule",
    "MergeAdapter",
    "MergeConfig",
    "MergePlan",
    "MergeTrace",
    "PiToMeConfig",
    "ToFuConfig",
    "ToMeConfig",
    "UnsupportedModelError",
    "advise",
    "attach",
    "calibrate",
    "detach",
    "register",
    "unregister",
]
