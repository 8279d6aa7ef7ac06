"""The Auto classes and pipelines of the families, and the table of what works with merging.

    python -m tests.support.ecosystem   # writes docs/ecosystem.md

A cell of the table is a claim of the family's case; the tests for all families check every claim.
The table of loaded and wrapped backbones is made in `tests.support.loading`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

import dtem_hf
from dtem_hf.families.containers import CONTAINERS
from dtem_hf.files import write_text
from tests.support import loading
from tests.support.families import CASES
from tests.support.family_case import FamilyCase


TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForZeroShotObjectDetection": "zero-shot-object-detection",
    "AutoModelForAudioClassification": "audio-classification",
}
# Of this package, and of transformers under the same name.
AUTO_CLASSES = sorted(name for name in dtem_hf.__all__ if hasattr(getattr(transformers, name, None), "_model_mapping"))


def autos_of(model_class: Any) -> list[str]:
    """The Auto classes of transformers that load a model class."""
    found = []
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        classes = mapping.get(model_class.config_class, ())
        if model_class in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    return found


def models_of(case: FamilyCase) -> list[tuple[str, Any]]:
    """The models of a family with the Auto classes that load them."""
    return sorted(
        ((auto, each) for each in case.models for auto in autos_of(each)), key=lambda pair: AUTO_CLASSES.index(pair[0])
    )


def tasks_of(case: FamilyCase) -> list[tuple[str, str, Any]]:
    """Every task of a family; for image encoders without a task, feature extraction."""
    if "pipelines" in case.lacking:
        return []
    found = [(TASKS[auto], auto, model_class) for auto, model_class in models_of(case) if auto in TASKS]
    bare = [("image-feature-extraction", auto, each) for auto, each in models_of(case) if auto == "AutoModel"]
    takes_pixels = not any(row.anatomy.whole for row in case.rows)  # and no rows of patches
    alone = [each for each in bare if "text_config" not in each[2].config_class.sub_configs]
    return found or [each for each in alone if "image" in each[2].input_modalities and takes_pixels]


def exported_models(case: FamilyCase) -> list[Any]:
    """The encoder; in the most used families, the classifier around it, if there is one."""
    classifiers = [each for auto, each in models_of(case) if auto == "AutoModelForImageClassification"]
    return (classifiers if case.family in MOST_USED else []) or [case.encoder]


def lacks(case: FamilyCase, column: str) -> bool:
    """Whether a feature does not work with the installed transformers."""
    mended = column in case.mended and Version(transformers.__version__) >= Version(case.mended[column])
    return column in case.lacking and not mended


MOST_USED = ("vit", "dinov2", "clip", "git")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
PREFACE = """# What holds with merging on

`make ecosystem` writes this page from the families' files in `tests/families`. The tests there check every cell on the
family's own code, with small random weights. "Pipelines" were tested with a merged model, with
`model_kwargs={"merge": ...}`, and with a folder that was saved merged. "Classes" take `merge=`: in `dtem_hf`, and in
transformers after `register()`. `device_map` was "cpu", "auto", and a map with a layer on disk. The compiled and
exported model is the encoder; for ViT, DINOv2 and CLIP it is the classifier. Exports take any batch size, and
onnxruntime runs the ONNX file. "Eager only" means `attn_implementation="eager"`.
"""
COLUMNS = {
    "device_map": "`device_map`",
    "bfloat16": '`dtype="bfloat16"`',
    "compile": "`torch.compile(fullgraph=True)`",
    "export": "`torch.export`",
    "onnx": "ONNX",
}


def document() -> str:
    """What each family promises, in Markdown."""
    notes: dict[str, int] = {}

    def cell(case: FamilyCase, column: str) -> str:
        reason = case.lacking.get(column) or case.eager_only.get(column)
        if reason is None:
            return "yes"
        if column not in case.lacking:
            held = "eager only"
        elif column not in case.mended:
            held = "no"
        else:
            held, reason = "yes", f"from transformers {case.mended[column]} on; before, {reason}"
        return f"{held} [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = [
        " | ".join(["family", "pipelines", "classes", *COLUMNS.values()]),
        " | ".join(["---"] * (3 + len(COLUMNS))),
    ]
    for case in CASES.values():
        tasks = ", ".join(dict.fromkeys(task for task, _, _ in tasks_of(case)))
        classes = ", ".join(dict.fromkeys(f"`{auto}`" for auto, _ in models_of(case)))
        tasks = cell(case, "pipelines") if "pipelines" in case.lacking else tasks
        lines.append(" | ".join([case.family, tasks, classes, *(cell(case, column) for column in COLUMNS)]))
    table = "\n".join(f"| {line} |" for line in lines)
    numbered = "\n".join(f"[{number}] {reason}.  " for reason, number in notes.items())
    return "\n".join([PREFACE, table, "", numbered, "", containers(), "", loading.document()])


CONTAINERS_PREFACE = """## Models around an encoder

Any model with one of these encoders inside can be merged. `tests/models/test_containers.py` tests those below: r = 0
equals the plain model bit for bit, `detach` restores it, an untrained DTEM equals ToMe, eager attention equals SDPA, a
saved model loads merged, the plan equals the encoder's, and bfloat16 outputs are finite. A type that is not listed
reads all tokens, in place. With `unmerge=False`, the language models of LLaVA, VipLLaVA and PaliGemma get the merged
tokens (`tests/models/test_processor.py`).
"""
READ = {
    "grid": "all tokens, in place",
    "tokens": "the pooled output",
    "sized": "the merged tokens, weighed by their sizes in cross-attention",
}


def containers() -> str:
    """How each type of container reads the tokens of the encoder inside, in Markdown."""
    lines = ["| type | what it reads | classes |", "| --- | --- | --- |"]
    for model_type, container in sorted(CONTAINERS.items()):
        read = READ[container.reader] + ("; or the merged ones" if container.counts_placeholders else "")
        config_class = transformers.CONFIG_MAPPING[model_type]
        names = [name for name in AUTO_CLASSES if config_class in getattr(transformers, name)._model_mapping]
        lines.append(f"| {model_type} | {read} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join([CONTAINERS_PREFACE, *lines]) + "\n"


if __name__ == "__main__":
    write_text(DOCUMENT, document())
    print(f"written: {DOCUMENT}")
