"""What of an adapter's folder is published on the Hub, and what a published card says of its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, ModelCard

from ..configuration import CONFIG_NAME
from ..errors import BadValue
from .card import CARD_NAME, EVALUATION_NAME, TRAINING_NAME, folder_card, is_made
from .client import download, publish
from .records import clean, read_record, without_private


# transformers says in its error what it was given by this; it has no class of the name.
MODEL_TYPE = "dtem_hf_merge_adapter"
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_LARGEST_PICTURE = 1 << 24
_LARGEST_CARD = 1 << 20
_LARGEST_METADATA = 1 << 17
_MOST_RESULTS = 1000


def publish_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite_card: bool = False,
    token: str | bool | None = None,
    with_card: bool = True,
) -> CommitInfo:
    """Publish an adapter's folder in one commit: what `published_files` lists and nothing else of it.

    `branch` and `revision` mean the same. Raises FileNotFoundError or AdapterError for a folder that holds no sound
    adapter, and what `dtem_hf.hub.publish` raises.
    """
    if branch is not None and revision not in (None, branch):
        raise BadValue("revision", revision, f"the same as branch={branch!r}, or one of them alone")
    files = published_files(folder, repo_id)
    if not with_card:
        del files[CARD_NAME]
    return publish(
        repo_id,
        files,
        commit_message or f"Upload merge adapter for {json.loads(files[CONFIG_NAME])['backbone']['model_type']}",
        private=private,
        branch=branch or revision,
        create_pr=create_pr,
        overwrite_card=overwrite_card,
        token=token,
    )


def published_files(folder: str | os.PathLike[str], repo_id: str | None = None) -> dict[str, bytes]:
    """What of an adapter's folder is published, by name: config, tensors, card, records, and the card's pictures.

    Records go without Hub tokens and without the folders of this machine. A card that nobody has edited names the
    repository. `config.json` is added, by which transformers says what it was given.
    """
    from .adapter import WEIGHTS_NAME, MergeAdapter  # adapter.py needs this module

    folder = Path(folder)
    MergeAdapter.from_pretrained(folder)
    card = folder_card(folder, repo_id=repo_id if repo_id and "/" in repo_id else None)
    if (folder / CARD_NAME).is_file():
        written = (folder / CARD_NAME).read_text(encoding="utf-8")
        card = card if is_made(written, folder) else written
    files = {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    files[CARD_NAME] = card.encode()
    for name in (EVALUATION_NAME, TRAINING_NAME):
        if (folder / name).is_file():
            record = without_private(read_record(folder / name))
            files[name] = (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICTURE_SUFFIXES and f"({path.name})" in card and path.is_file():
            if path.is_symlink() or path.stat().st_size > _LARGEST_PICTURE:
                raise BadValue(path.name, path, f"a picture in the folder itself, of {_LARGEST_PICTURE} bytes at most")
            files[path.name] = path.read_bytes()
    files["config.json"] = (json.dumps({"model_type": MODEL_TYPE}, indent=2) + "\n").encode()
    return files


def card_results(reference: str, **hub_options: Any) -> list[dict[str, Any]]:
    """The evaluation results in an adapter's card; none where it has no card, or one that cannot be read.

    `reference` is a folder, a Hub id, or `id@revision`. Texts are on one line, and values are numbers.
    """
    from .adapter import split_reference

    name, revision = split_reference(reference)
    try:
        path = Path(name, CARD_NAME)
        if not Path(name).is_dir():
            path, _ = download(name, CARD_NAME, _LARGEST_CARD, revision, **hub_options)
        if path.stat().st_size > _LARGEST_CARD:
            return []
        text = path.read_text(encoding="utf-8")
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


def _shown(text: Any) -> str | None:
    return clean(text) if isinstance(text, str) else None
