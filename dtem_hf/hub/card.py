"""The model card of an adapter, made from its config and the JSON of training and evaluation; nothing typed by hand.

A card is published, and the names in it come from configs and records that anyone may have written. Metadata goes
through a YAML writer; names stand in the body as code, on one line and without backticks; figures are checked to be
numbers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration import MergeConfig
from ..errors import BadValue
from ..files import write_text
from ..schedule import ConstantSchedule, ListSchedule, as_schedule
from .records import as_code, as_line, as_text, data_name_of, entry, is_repo_id, read_record, versions_of


if TYPE_CHECKING:
    from .adapter import BackboneFacts

CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
TRAINING_NAME = "training.json"
# By these names a folder's pictures are put into its card.
PICTURES = {
    "accuracy.png": "Accuracy against multiply-adds",
    "merged_tokens.png": "Merged tokens: each token that is left has one colour and one outline",
}
_TEMPLATE = Path(__file__).with_name("card_template.md")
_METHOD_NAMES = {"none": "unmerged", "tome": "ToMe", "soft": "ToMe, merged softly", "evit": "EViT", "dtem": "DTEM"}
_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-to-text": "AutoModelForImageTextToText",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
}


def card_of(
    config: MergeConfig,
    backbone: BackboneFacts,
    evaluation: dict[str, Any] | None,
    *,
    training: dict[str, Any] | None = None,
    pictures: dict[str, str] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of an adapter, from the JSON of its evaluation and training (None: it says that there is none).

    `pictures` are file names in the adapter's folder by caption; `repo_id` is the repository the card will lie in.
    Raises ValueError that names an entry of the JSON, a picture or a repository that makes no sense.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise BadValue("repo_id", repo_id, "a Hub id like user/repo")
    task = entry(evaluation or {}, "evaluation", "task", str, "image-classification")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", task):
        raise BadValue("evaluation.task", task, "a pipeline tag like image-classification")
    base_model = backbone.base_model if is_repo_id(backbone.base_model) else None
    results = [] if evaluation is None else _rows(evaluation)
    measured = [row for row in results if row["method"] == config.method]
    if measured and entry(evaluation or {}, "evaluation", "adapter", str, None) is None:
        raise BadValue(
            "evaluation.adapter", None, f"its {config.method} rows were measured with no adapter; name this one"
        )
    return ModelCard.from_template(
        _metadata(config, backbone, base_model, task, evaluation, results, training),
        template_path=str(_TEMPLATE),
        method=method_name(config.method),
        backbone=as_code(backbone.base_model) if backbone.base_model else f"a {as_code(backbone.model_type)} backbone",
        facts={
            "Backbone": as_code(backbone.base_model) if backbone.base_model else "not recorded",
            "Revision": as_code(backbone.base_revision) if backbone.base_revision else None,
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
        evaluation=None if evaluation is None else _evaluation_text(evaluation, results),
        training=None if training is None else _training_text(training),
        pictures=[(as_text(caption), _picture_path(name)) for caption, name in (pictures or {}).items()],
    )


def folder_card(
    adapter_dir: str | os.PathLike[str],
    evaluation_path: str | os.PathLike[str] | None = None,
    training_path: str | os.PathLike[str] | None = None,
    pictures: dict[str, str] | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of the card of an adapter folder.

    What is left out is taken from the folder if it is there: `evaluation.json`, `training.json`, `accuracy.png` and
    `merged_tokens.png`. `pictures` are files in the folder by caption. Raises FileNotFoundError for what is named and
    not there, and what `card_of` raises.
    """
    from .adapter import MergeAdapter  # adapter.py needs this module

    folder = Path(adapter_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {folder}")
    if pictures is None:
        pictures = {caption: name for name, caption in PICTURES.items() if (folder / name).is_file()}
    for name in pictures.values():
        if not (folder / _picture_path(name)).is_file():
            raise FileNotFoundError(f"there is no picture {name} in {folder}")
    if evaluation_path is None and (folder / EVALUATION_NAME).is_file():
        evaluation_path = folder / EVALUATION_NAME
    if training_path is None and (folder / TRAINING_NAME).is_file():
        training_path = folder / TRAINING_NAME
    adapter = MergeAdapter.from_pretrained(folder)
    card = card_of(
        adapter.config,
        adapter.backbone,
        None if evaluation_path is None else read_record(evaluation_path),
        training=None if training_path is None else read_record(training_path),
        pictures=pictures,
        repo_id=repo_id,
    )
    return f"{card}\n"


def write_card(
    adapter_dir: str | os.PathLike[str],
    evaluation_path: str | os.PathLike[str] | None = None,
    training_path: str | os.PathLike[str] | None = None,
    pictures: dict[str, str] | None = None,
    overwrite: bool = False,
    repo_id: str | None = None,
) -> Path:
    """Write the card that `folder_card` makes of a folder, whole or not at all, and return its path.

    Raises FileExistsError where a card is there and `overwrite` is false, and what `folder_card` raises.
    """
    path = Path(adapter_dir) / CARD_NAME
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True to replace it")
    write_text(path, folder_card(adapter_dir, evaluation_path, training_path, pictures, repo_id))
    return path


@contextmanager
def refreshed_card(adapter_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """`with refreshed_card(folder) as folder:` change what lies there; the card follows, unless somebody edited it."""
    folder = Path(adapter_dir)
    path = folder / CARD_NAME
    untouched = not path.exists() or is_made(path.read_text(encoding="utf-8"), folder)
    yield folder
    if untouched:
        write_card(folder, overwrite=True)


def is_made(card: str, adapter_dir: str | os.PathLike[str]) -> bool:
    """Whether a card is what `folder_card` makes of the folder, so that nobody has edited it."""
    return card.rstrip() == folder_card(adapter_dir).rstrip()


def method_name(method: str) -> str:
    """How a method is called in tables and plots."""
    return _METHOD_NAMES.get(method, method)


def reduction_label(r: Any) -> str:
    """What a schedule is called in tables and plots: "r=16", "flops=0.5", "linear r=8". ValueError if it is none."""
    if r is None:
        return "–"
    schedule = as_schedule(r)
    if isinstance(schedule, (ConstantSchedule, ListSchedule)):
        return f"r={schedule.to_json()}"
    values = {f.name: getattr(schedule, f.name) for f in fields(schedule) if getattr(schedule, f.name) != f.default}  # type: ignore[arg-type]
    text = " ".join(f"{name}={value}" for name, value in values.items())
    return text if schedule.kind in values else f"{schedule.kind} {text}"


def multiply_adds_unit(largest: float) -> tuple[float, str]:
    """Factor and letter of the unit in which multiply-adds of this magnitude are written."""
    return (1e9, "G") if largest >= 1e9 else (1e6, "M")


def _metadata(
    config: MergeConfig,
    backbone: BackboneFacts,
    base_model: str | None,
    task: str,
    evaluation: dict[str, Any] | None,
    results: list[dict[str, Any]],
    training: dict[str, Any] | None,
) -> ModelCardData:
    model_type = backbone.model_type if re.fullmatch(r"[a-z]\w*([.-]\w+)*", backbone.model_type, re.ASCII) else None
    data_name = data_name_of(training, "training")
    measured = [] if evaluation is None else _eval_results(task, evaluation, results, config.method)
    return ModelCardData(
        library_name="dtem-hf",
        license="apache-2.0",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter",
        pipeline_tag=task,
        tags=[tag for tag in ("token-merging", config.method, model_type) if tag],
        # What it was trained on. A name without a user is a folder's, and on the Hub nobody's.
        datasets=[data_name] if data_name and "/" in data_name and is_repo_id(data_name) else None,
        metrics=["accuracy"] if measured else None,
        model_name=f"{config.method}-{(base_model or model_type or 'adapter').split('/')[-1]}" if measured else None,
        eval_results=measured or None,
    )


def _eval_results(
    task: str, evaluation: dict[str, Any], results: list[dict[str, Any]], method: str
) -> list[EvalResult]:
    """Top-1 and top-5 of the adapter's method at every r."""
    name = data_name_of(evaluation, "evaluation") or "unnamed"
    dataset_type = name if is_repo_id(name) else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:96] or "unnamed"
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_type,
            dataset_name=name,
            metric_type="accuracy",
            metric_value=row[key],
            metric_name=f"{title}, {reduction_label(row['r'])} (%)",
            metric_args={"r": row["r"], "top_k": top_k},
        )
        for row in results
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
        for name in ("agreement", "kl", "multiply_adds", "ratio"):
            checked[name] = entry(row, where, name, float)
        # No labels; too few images to time.
        for name in ("top1", "top5", "images_per_second", "speedup"):
            checked[name] = entry(row, where, name, float, None)
        rows.append(checked)
    return rows


def _evaluation_text(evaluation: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template says of an evaluation."""
    where = "evaluation"
    data = entry(evaluation, where, "data", dict)
    num_images = entry(data, "evaluation.data", "num_images", int)
    size = entry(evaluation, where, "image_size", list)
    if len(size) != 2 or not all(isinstance(extent, int) for extent in size):
        raise BadValue("evaluation.image_size", size, "[height, width]")
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
    return {"conditions": conditions, "labelled": _is_labelled(results), **_table(results)}


def _table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Header and cells: the unmerged model, then r by r, so that methods stand below each other."""
    labelled = _is_labelled(results)
    factor, unit = multiply_adds_unit(max((row["multiply_adds"] for row in results), default=0))
    header = ["Method", "Reduction", *(["Top-1 (%)", "Top-5 (%)"] if labelled else []), "Agreement (%)", "KL"]
    header += [f"Multiply-adds ({unit})", "Images/s"]
    most: dict[str, float] = {}
    for row in results:
        label = reduction_label(row["r"])
        most[label] = max(most.get(label, 0), row["multiply_adds"])
    order = [*_METHOD_NAMES, *sorted({row["method"] for row in results} - set(_METHOD_NAMES))]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        label = reduction_label(row["r"])
        return row["method"] != "none", -most[label], label, order.index(row["method"])

    cells = []
    for row in sorted(results, key=place):
        cells.append(
            [
                as_text(method_name(row["method"])),
                as_text(reduction_label(row["r"])),
                *([_figure(row["top1"], ".2f"), _figure(row["top5"], ".2f")] if labelled else []),
                f"{row['agreement']:.2f}",
                f"{row['kl']:.4f}",
                f"{row['multiply_adds'] / factor:.3f} ({row['ratio']:.2f}×)",
                _figure(row["images_per_second"], ".1f")
                + ("" if row["speedup"] is None else f" ({row['speedup']:.2f}×)"),
            ]
        )
    return {"header": header, "rows": cells}


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _is_labelled(results: list[dict[str, Any]]) -> bool:
    return any(row["top1"] is not None for row in results)


def _training_text(training: dict[str, Any]) -> dict[str, Any]:
    """What the template says of a training run; what was not recorded is left out."""
    where = "training"
    data = entry(training, where, "data", dict, {})
    best = entry(training, where, "best_validation", dict, {})
    figures = {name: entry(best, "training.best_validation", name, float) for name in best}
    numbers = {name: entry(training, where, name, int, None) for name in ("steps", "images_seen", "best_step", "seed")}
    num_images = entry(data, "training.data", "num_images", int, None)
    seconds = entry(training, where, "seconds", float, None)
    hardware = entry(training, where, "hardware", str, None)
    command = entry(training, where, "command", str, None)
    name = data_name_of(training, where)
    facts = {
        "Data": None if name is None else as_code(name) + ("" if num_images is None else f", {num_images:,} images"),
        "Steps": None if numbers["steps"] is None else f"{numbers['steps']:,}",
        "Images seen": None if numbers["images_seen"] is None else f"{numbers['images_seen']:,}",
        "Time": None if seconds is None else f"{seconds:,.0f} s",
        "Best step": None if numbers["best_step"] is None else f"{numbers['best_step']:,}",
        "Validation at the best step": ", ".join(f"{as_code(key)} {value:.4g}" for key, value in figures.items())
        or None,
        "Seed": numbers["seed"],
        "Hardware": None if hardware is None else as_code(hardware),
        "Versions": versions_of(training, where),
        "Command": None if command is None else as_code(command),
    }
    arguments = entry(training, where, "arguments", dict, {})
    return {
        "facts": facts,
        "arguments": [
            as_line(f"{name}: {json.dumps(value, ensure_ascii=False)}") for name, value in arguments.items()
        ],
    }


def _picture_path(name: str) -> str:
    """A picture's path in the repository: inside the folder, and without anything special to Markdown."""
    if not re.fullmatch(r"[A-Za-z0-9]\w*([.-]\w+)*(/[A-Za-z0-9]\w*([.-]\w+)*)*", name, re.ASCII):
        raise BadValue(
            "pictures", name, "the name of a file in the adapter's folder, of letters, digits, '_', '-' and '.'"
        )
    return name
