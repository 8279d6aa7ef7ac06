"""The model card of an adapter's folder: made from what lies there, and kept up to date until it is edited by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..configuration import CONFIG_NAME
from ..files import read_text, write_text
from .card import card_of, picture_path
from .layout import CARD_NAME, EVALUATION_NAME, LARGEST_CARD, PICTURES, TRAINING_NAME
from .reading import read_config
from .records import read_record


PathLike = str | os.PathLike[str]


def folder_card(
    adapter_dir: PathLike,
    evaluation_path: PathLike | None = None,
    training_path: PathLike | None = None,
    pictures: dict[str, str] | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of the card of an adapter's folder.

    By default, `evaluation.json`, `training.json` and the pictures that `layout.PICTURES` names are taken from the
    folder if they are there. `pictures` are files in the folder by caption. Raises FileNotFoundError for a named file
    that is not there, and what `card_of` raises.
    """
    folder = Path(adapter_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {folder}")
    if pictures is None:
        pictures = {caption: name for name, caption in PICTURES.items() if (folder / name).is_file()}
    for name in pictures.values():
        if not (folder / picture_path(name)).is_file():
            raise FileNotFoundError(f"there is no picture {name} in {folder}")
    records = []
    for given, name in ((evaluation_path, EVALUATION_NAME), (training_path, TRAINING_NAME)):
        path = folder / name if given is None else Path(given)
        records.append(read_record(path) if given is not None or path.exists() else None)
    read = read_config(folder / CONFIG_NAME, str(folder))
    card = card_of(read.config, read.backbone, records[0], training=records[1], pictures=pictures, repo_id=repo_id)
    return f"{card}\n"


def write_card(
    adapter_dir: PathLike,
    evaluation_path: PathLike | None = None,
    training_path: PathLike | None = None,
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
def refreshed_card(adapter_dir: PathLike) -> Iterator[Path]:
    """`with refreshed_card(folder) as folder:` change files in a folder; its card follows, unless it was edited."""
    folder = Path(adapter_dir)
    path = folder / CARD_NAME
    untouched = not os.path.lexists(path) or _is_untouched(path, folder)
    yield folder
    if untouched:
        write_card(folder, overwrite=True)


def _is_untouched(path: Path, folder: Path) -> bool:
    try:
        card = read_text(path, LARGEST_CARD)
    except ValueError:  # no program wrote this file
        return False
    return is_made(card, folder)


def is_made(card: str, adapter_dir: PathLike) -> bool:
    """Whether a card is what `folder_card` makes of the folder, and so was not edited."""
    return card.rstrip() == folder_card(adapter_dir).rstrip()
