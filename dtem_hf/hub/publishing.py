"""Publish an adapter's folder on the Hub, and read the results in a published card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, ModelCard

from ..configuration import CONFIG_NAME
from ..errors import BadValue
from ..files import read_bytes, read_text
from .client import download, publish
from .folder_card import folder_card, is_made
from .layout import CARD_NAME, EVALUATION_NAME, LARGEST_CARD, MODEL_CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME
from .reading import check_is_adapter, parse_tensors, read_config, split_reference
from .records import clean, is_repo_id, read_record, without_private


# The model type in config.json. transformers does not know it, and names it in its error: the user sees an adapter.
MODEL_TYPE = "dtem_hf_merge_adapter"
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_LARGEST_PICTURE = 1 << 24
_LARGEST_METADATA = 1 << 17
_MOST_RESULTS = 1000


def publish_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    branch: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    with_card: bool = True,
    **options: Any,
) -> CommitInfo:
    """Publish an adapter's folder in one commit: the files that `published_files` lists, and no others.

    `branch` and `revision` mean the same; `options` go to `client.publish`. Raises FileNotFoundError or ValueError for
    a folder without a valid adapter, and what `client.publish` raises.
    """
    if branch is not None and revision not in (None, branch):
        raise BadValue("revision", revision, f"the same as branch={branch!r}, or one of them alone")
    files = published_files(folder, repo_id)
    if not with_card:
        del files[CARD_NAME]
    model_type = json.loads(files[CONFIG_NAME])["backbone"]["model_type"]
    message = commit_message or f"Upload merge adapter for {model_type}"
    return publish(repo_id, files, message, branch=branch or revision, **options)


def published_files(folder: str | os.PathLike[str], repo_id: str | None = None) -> dict[str, bytes]:
    """The files of an adapter's folder to publish, by name: config, tensors, card, records, and the card's pictures.

    Hub tokens and paths of this machine are removed from JSON. A card that was not edited is made again with the name
    of the repository. `config.json` is added for transformers. Raises FileNotFoundError, and ValueError for an invalid
    adapter and for links, pipes, devices and files that are too large.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise BadValue("repo_id", repo_id, "USER/REPO, of letters, digits, '-', '_' and '.'")
    folder = Path(folder)
    check_is_adapter(folder)
    files = {}
    for name in (CONFIG_NAME, EVALUATION_NAME, TRAINING_NAME):
        if name == CONFIG_NAME or os.path.lexists(folder / name):
            files[name] = _json(without_private(read_record(folder / name, links=False)))
    adapter = read_config(folder / CONFIG_NAME, str(folder))
    files[WEIGHTS_NAME] = read_bytes(folder / WEIGHTS_NAME, adapter.largest_weights, links=False)
    parse_tensors(files[WEIGHTS_NAME], adapter, str(folder))
    card = folder_card(folder, repo_id=repo_id if repo_id and "/" in repo_id else None)
    if os.path.lexists(folder / CARD_NAME):
        written = read_text(folder / CARD_NAME, LARGEST_CARD, links=False)
        card = card if is_made(written) else written
    files[CARD_NAME] = card.encode()
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICTURE_SUFFIXES and f"({path.name})" in card:
            files[path.name] = read_bytes(path, _LARGEST_PICTURE, links=False)
    files[MODEL_CONFIG_NAME] = _json({"model_type": MODEL_TYPE})
    return files


def card_results(reference: str, **hub_options: Any) -> list[dict[str, Any]]:
    """The evaluation results in an adapter's card; an empty list if there is no readable card.

    `reference` is a folder, a Hub id, or `id@revision`. Texts are on one line, and values are numbers.
    """
    name, revision = split_reference(reference)
    try:
        path = Path(name, CARD_NAME)
        if not Path(name).is_dir():
            path, _ = download(name, CARD_NAME, LARGEST_CARD, revision, **hub_options)
        text = read_text(path, LARGEST_CARD)
        if len(text.split("\n---", 1)[0]) > _LARGEST_METADATA:
            return []
        results = getattr(ModelCard(text, ignore_metadata_errors=True).data, "eval_results", None) or []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
        return []
    return [
        {
            "task": _shown(result.task_type),
            "dataset": _shown(result.dataset_name),
            "split": _shown(result.dataset_split),
            "metric": _shown(result.metric_name or result.metric_type),
            "value": result.metric_value,
        }
        for result in results[:_MOST_RESULTS]
        if isinstance(result.metric_value, (int, float)) and abs(result.metric_value) < 1e18
    ]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _shown(text: Any) -> str | None:
    return clean(text) if isinstance(text, str) else None
