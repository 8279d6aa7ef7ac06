"""Token merging for Hugging Face vision transformers: one keyword makes a model faster; adapters learn to merge."""

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
        "AutoModelForImageMatting",
        "AutoModelForImageSegmentation",
        "AutoModelForImageTextToText",
        "AutoModelForInstanceSegmentation",
        "AutoModelForKeypointDetection",
        "AutoModelForMaskedImageModeling",
        "AutoModelForMaskedLM",
        "AutoModelForMultimodalLM",
        "AutoModelForNormalEstimation",
        "AutoModelForObjectDetection",
        "AutoModelForPoseEstimation",
        "AutoModelForPreTraining",
        "AutoModelForSemanticSegmentation",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForTokenClassification",
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

if TYPE_CHECKING:  # type checkers treat `import X as X` as a public name
    from .benchmark.advice import Advice as Advice
    from .benchmark.advice import advise as advise
    from .configuration import DTEMConfig as DTEMConfig
    from .configuration import DTPSConfig as DTPSConfig
    from .configuration import ETPSConfig as ETPSConfig
    from .configuration import EViTConfig as EViTConfig
    from .configuration import MergeConfig as MergeConfig
    from .configuration import PiToMeConfig as PiToMeConfig
    from .configuration import ToFuConfig as ToFuConfig
    from .configuration import ToMeConfig as ToMeConfig
    from .costs import MergePlan as MergePlan
    from .errors import AdapterError as AdapterError
    from .errors import BadValue as BadValue
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .hub.adapter import MergeAdapter as MergeAdapter
    from .models.attach import attach as attach
    from .models.auto import AutoBackbone as AutoBackbone
    from .models.auto import AutoModel as AutoModel
    from .models.auto import AutoModelForAudioClassification as AutoModelForAudioClassification
    from .models.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from .models.auto import AutoModelForDepthEstimation as AutoModelForDepthEstimation
    from .models.auto import AutoModelForImageClassification as AutoModelForImageClassification
    from .models.auto import AutoModelForImageMatting as AutoModelForImageMatting
    from .models.auto import AutoModelForImageSegmentation as AutoModelForImageSegmentation
    from .models.auto import AutoModelForImageTextToText as AutoModelForImageTextToText
    from .models.auto import AutoModelForInstanceSegmentation as AutoModelForInstanceSegmentation
    from .models.auto import AutoModelForKeypointDetection as AutoModelForKeypointDetection
    from .models.auto import AutoModelForMaskedImageModeling as AutoModelForMaskedImageModeling
    from .models.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from .models.auto import AutoModelForMultimodalLM as AutoModelForMultimodalLM
    from .models.auto import AutoModelForNormalEstimation as AutoModelForNormalEstimation
    from .models.auto import AutoModelForObjectDetection as AutoModelForObjectDetection
    from .models.auto import AutoModelForPoseEstimation as AutoModelForPoseEstimation
    from .models.auto import AutoModelForPreTraining as AutoModelForPreTraining
    from .models.auto import AutoModelForSemanticSegmentation as AutoModelForSemanticSegmentation
    from .models.auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from .models.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .models.auto import AutoModelForSpeechSeq2Seq as AutoModelForSpeechSeq2Seq
    from .models.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from .models.auto import AutoModelForUniversalSegmentation as AutoModelForUniversalSegmentation
    from .models.auto import AutoModelForVideoClassification as AutoModelForVideoClassification
    from .models.auto import AutoModelForVisualQuestionAnswering as AutoModelForVisualQuestionAnswering
    from .models.auto import AutoModelForZeroShotImageClassification as AutoModelForZeroShotImageClassification
    from .models.auto import AutoModelForZeroShotObjectDetection as AutoModelForZeroShotObjectDetection
    from .models.auto import register as register
    from .models.auto import unregister as unregister
    from .models.calibration import Calibration as Calibration
    from .models.calibration import calibrate as calibrate
    from .models.install import detach as detach
    from .models.processor import AutoProcessor as AutoProcessor
    from .schedule import ConstantSchedule as ConstantSchedule
    from .schedule import FlopsSchedule as FlopsSchedule
    from .schedule import InflectedSchedule as InflectedSchedule
    from .schedule import KeepRateSchedule as KeepRateSchedule
    from .schedule import LinearSchedule as LinearSchedule
    from .token_state import MergeTrace as MergeTrace


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


__all__ = sorted(_HOME_OF)
