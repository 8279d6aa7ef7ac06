"""The model card of an adapter, made from its config and its JSON records of training and evaluation.

A card is published, and its config and records may come from anyone. So a YAML writer writes the metadata, names in
the body are code on one line without backticks, and figures are checked to be numbers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration import KeepRateConfig, MergeConfig
from ..errors import BadValue, check_whole
from ..labels import METHOD_NAMES, method_name, multiply_adds_unit, reduction_label
from .facts import BackboneFacts
from .records import as_code, as_line, as_text, data_name_of, entry, is_repo_id, versions_of, without_private


_TEMPLATE = Path(__file__).with_name("card_template.md")
_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-to-text": "AutoModelForImageTextToText",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
}
# The pipeline tag of an adapter that was not evaluated, by its training task.
_TRAINED_FOR = {
    **dict.fromkeys(("feature_distillation", "feature_fisher"), "image-feature-extraction"),
    **dict.fromkeys(("captioning", "caption_fisher"), "image-text-to-text"),
    "contrastive": "zero-shot-image-classification",
}
# Columns that show how much merging changes, by the compared outputs: title, entry of a row, number format.
_COLUMNS = {
    "classes": [("Agreement (%)", "agreement", ".2f"), ("KL", "kl", ".4f")],
    "maps": [("Map error", "map_error", ".4f"), ("IoU", "iou", ".3f")],
    "features": [("Cosine", "cosine", ".4f")],
}
# Entries that a row may lack: without labels, with too few images, or if the evaluation measures other figures.
_OPTIONAL = ("top1", "top5", "same_nearest", "knn_top1", "images_per_second", "speedup")
_OPTIONAL_COLUMNS = [
    ("Top-1 (%)", "top1", ".2f"),
    ("Top-5 (%)", "top5", ".2f"),
    ("Same nearest (%)", "same_nearest", ".2f"),
    ("k-NN top-1 (%)", "knn_top1", ".2f"),
]


def card_of(
    config: MergeConfig,
    backbone: BackboneFacts,
    evaluation: dict[str, Any] | None,
    *,
    training: dict[str, Any] | None = None,
    pictures: dict[str, str] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of an adapter, from the records of its evaluation and training (None: the card says there is none).

    `pictures` are file names in the adapter's folder by caption; `repo_id` is the card's repository. Raises ValueError
    that names an invalid entry of a record, picture or repository.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise BadValue("repo_id", repo_id, "a Hub id like user/repo")
    record = evaluation or {}
    learned = entry(entry(training or {}, "training", "arguments", dict, {}), "training.arguments", "task", str, "")
    default = _TRAINED_FOR.get(learned, "image-classification")
    if default == "image-feature-extraction" and config.unmerge is False:  # a language model reads merged tokens
        default = "image-text-to-text"
    task = entry(record, "evaluation", "task", str, default)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", task):
        raise BadValue("evaluation.task", task, "a pipeline tag like image-classification")
    base_model = backbone.base_model if is_repo_id(backbone.base_model) and _is_public(backbone.base_model) else None
    rows = [] if evaluation is None else _rows(evaluation)
    results = []
    if any(row["method"] == config.method for row in rows):
        if entry(record, "evaluation", "adapter", str, None) is None:
            expected = f"the adapter of its {config.method} rows; they were measured without one"
            raise BadValue("evaluation.adapter", None, expected)
        results = _eval_results(task, record, rows, config.method)
    name = _code(backbone.base_model or None)
    return ModelCard.from_template(
        _metadata(config.method, backbone.model_type, base_model, task, results, data_name_of(training, "training")),
        template_path=str(_TEMPLATE),
        method=method_name(config.method),
        by_share=isinstance(config, KeepRateConfig),
        shifts=getattr(config, "learn_shifts", False),
        backbone=name or f"a {as_code(backbone.model_type)} backbone",
        facts={
            "Backbone": name or "not recorded",
            "Revision": _code(backbone.base_revision or None),
            "Model type": as_code(backbone.model_type),
            "Size": f"{backbone.num_layers} layers, width {backbone.hidden_size}",
            "Merge config": as_code(json.dumps(config.to_dict())),
        },
        auto_class=_AUTO_CLASSES.get(task, "AutoModel"),
        base_id=json.dumps(base_model or "your/backbone"),
        adapter_id=json.dumps(repo_id or "user/repo"),
        placeholders=[
            *([] if base_model else ["`your/backbone` by the backbone's"]),
            *([] if repo_id else ["`user/repo` by this repository's"]),
        ],
        evaluation=None if evaluation is None else _evaluation_text(evaluation, rows),
        training=None if training is None else _training_text(training),
        pictures=[(as_text(caption), picture_path(path)) for caption, path in (pictures or {}).items()],
    )


def picture_path(name: str) -> str:
    """Check a picture's path: inside the folder, and without characters that are special in Markdown."""
    if not re.fullmatch(r"[A-Za-z0-9]\w*([.-]\w+)*(/[A-Za-z0-9]\w*([.-]\w+)*)*", name, re.ASCII):
        raise BadValue("pictures", name, "a file name in the adapter's folder, of letters, digits, '_', '-' and '.'")
    return name


def _is_public(name: str | None) -> bool:
    """Whether a name holds neither a Hub token nor a path of a machine."""
    return without_private(name) == name


def _metadata(
    method: str, model_type: str, base_model: str | None, task: str, results: list[EvalResult], data_name: str | None
) -> ModelCardData:
    is_type = re.fullmatch(r"[a-z]\w*([.-]\w+)*", model_type, re.ASCII) and _is_public(model_type)
    name = (base_model or (model_type if is_type else "adapter")).split("/")[-1]
    return ModelCardData(
        library_name="dtem-hf",
        license="apache-2.0",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter",
        pipeline_tag=task,
        tags=["token-merging", method, *([model_type] if is_type else [])],
        # A name without a user is the name of a local folder.
        datasets=[data_name] if data_name and "/" in data_name and is_repo_id(data_name) else None,
        metrics=["accuracy"] if results else None,
        model_name=f"{method}-{name}" if results else None,
        eval_results=results or None,
    )


def _eval_results(task: str, evaluation: dict[str, Any], rows: list[dict[str, Any]], method: str) -> list[EvalResult]:
    """Top-1 and top-5 of the adapter's method at every r."""
    name = data_name_of(evaluation, "evaluation") or "unnamed"
    dataset_type = name if is_repo_id(name) else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:96] or "unnamed"
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_type,
            dataset_name=name,
            metric_type="accuracy",
            metric_value=round(row[key], 9),
            metric_name=f"{title}, {reduction_label(row['r'])} (%)",
            metric_args={"r": row["r"], "top_k": top_k},
        )
        for row in rows
        for key, title, top_k in (("top1", "Top-1 accuracy", 1), ("top5", "Top-5 accuracy", 5))
        if row["method"] == method and row[key] is not None
    ]


def _rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation, checked."""
    rows = []
    for i, row in enumerate(entry(evaluation, "evaluation", "rows", list)):
        where = f"evaluation.rows[{i}]"
        if not isinstance(row, dict):
            raise BadValue(where, row, "an object")
        try:
            reduction_label(row.get("r"))
        except BadValue as error:
            raise BadValue(f"{where}.r", row.get("r"), error.expected) from error
        checked: dict[str, Any] = {"method": entry(row, where, "method", str), "r": row.get("r")}
        if not re.fullmatch(r"[a-z0-9_]{1,32}", checked["method"]):
            raise BadValue(f"{where}.method", checked["method"], "the name of a method, like dtem")
        compared = [name for _, name, _ in _COLUMNS[_compared([row])]]
        for name in (*compared, "multiply_adds", "ratio"):
            checked[name] = entry(row, where, name, float)
        for name in _OPTIONAL:
            checked[name] = entry(row, where, name, float, None)
        rows.append(checked)
    return rows


def _compared(rows: list[dict[str, Any]]) -> str:
    """The outputs that an evaluation's rows compare: "maps" of a dense head, "features" or "classes"."""
    names = {name for row in rows for name in row}
    return "maps" if "map_error" in names else "features" if "cosine" in names else "classes"


def _evaluation_text(evaluation: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The template's values for an evaluation."""
    where = "evaluation"
    num_images = entry(entry(evaluation, where, "data", dict), "evaluation.data", "num_images", int)
    size = entry(evaluation, where, "image_size", list)
    if len(size) != 2:
        raise BadValue("evaluation.image_size", size, "[height, width]")
    for extent in size:
        check_whole("evaluation.image_size", extent, 1, 1 << 20)
    device, dtype, command = (as_code(entry(evaluation, where, name, str)) for name in ("device", "dtype", "command"))
    threads, batch_size = (entry(evaluation, where, name, int) for name in ("threads", "batch_size"))
    hardware = entry(evaluation, where, "hardware", str, None)
    machine = f"{device}, {threads} threads" if hardware is None else as_code(hardware)
    images = f"{num_images:,} of {as_code(data_name_of(evaluation, where) or 'unnamed')}"
    conditions = {
        "Images": f"{images}, {size[0]}×{size[1]} pixels",
        "Hardware": f"{machine}, batch size {batch_size}, {dtype}",
        "Versions": versions_of(evaluation, where),
        "Command": command,
    }
    return {"conditions": conditions, **_table(rows)}


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Header and cells: the unmerged model first, then by falling multiply-adds; methods at the same r together."""
    compared = _compared(rows)
    measured = [column for column in _OPTIONAL_COLUMNS if any(row[column[1]] is not None for row in rows)]
    columns = [*measured, *_COLUMNS[compared]]
    factor, unit = multiply_adds_unit(max((row["multiply_adds"] for row in rows), default=0))
    header = ["Method", "Reduction", *(title for title, _, _ in columns), f"Multiply-adds ({unit})"]
    header += [] if compared == "maps" else ["Images/s"]
    most: dict[str, float] = {}
    for row in rows:
        label = reduction_label(row["r"])
        most[label] = max(most.get(label, 0), row["multiply_adds"])
    order = [*METHOD_NAMES, *sorted({row["method"] for row in rows} - set(METHOD_NAMES))]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        label = reduction_label(row["r"])
        return row["method"] != "none", -most[label], label, order.index(row["method"])

    cells = [
        [
            as_text(method_name(row["method"])),
            as_text(reduction_label(row["r"])),
            *(_figure(row[name], form) for _, name, form in columns),
            f"{row['multiply_adds'] / factor:.3f} ({row['ratio']:.2f}×)",
            *([] if compared == "maps" else [_speed(row)]),
        ]
        for row in sorted(rows, key=place)
    ]
    return {"compared": compared, "measured": [name for _, name, _ in measured], "header": header, "rows": cells}


def _speed(row: dict[str, Any]) -> str:
    ratio = "" if row["speedup"] is None else f" ({row['speedup']:.2f}×)"
    return _figure(row["images_per_second"], ".1f") + ratio


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _code(text: str | None) -> str | None:
    return None if text is None else as_code(text)


def _training_text(training: dict[str, Any]) -> dict[str, Any]:
    """The template's values for a training run, without missing entries."""
    where = "training"
    best = entry(training, where, "best_validation", dict, {})
    figures = [f"{as_code(name)} {entry(best, 'training.best_validation', name, float):.4g}" for name in best]
    numbers = {name: entry(training, where, name, int, None) for name in ("steps", "images_seen", "best_step", "seed")}
    steps, images_seen, best_step = (_figure(numbers[name], ",") for name in ("steps", "images_seen", "best_step"))
    num_images = entry(entry(training, where, "data", dict, {}), "training.data", "num_images", int, None)
    hardware, command = (_code(entry(training, where, name, str, None)) for name in ("hardware", "command"))
    seconds = entry(training, where, "seconds", float, None)
    data = data_name_of(training, where)
    facts = {
        "Data": None if data is None else as_code(data) + ("" if num_images is None else f", {num_images:,} images"),
        "Steps": steps,
        "Images seen": images_seen,
        "Time": None if seconds is None else f"{seconds:,.0f} s",
        "Best step": best_step,
        "Validation at the best step": ", ".join(figures) or None,
        "Seed": numbers["seed"],
        "Hardware": hardware,
        "Versions": versions_of(training, where),
        "Command": command,
    }
    arguments = entry(training, where, "arguments", dict, {}).items()
    return {
        "facts": {name: value for name, value in facts.items() if value not in (None, "–")},
        "arguments": [as_line(f"{name}: {json.dumps(value, ensure_ascii=False)}") for name, value in arguments],
    }
