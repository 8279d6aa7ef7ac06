"""The model card of an adapter's folder: made from what lies there, and kept up to date until it is edited by hand."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..configuration import CONFIG_NAME
from ..files import read_text, write_text
from .card import card_of
from .layout import CARD_NAME, EVALUATION_NAME, LARGEST_CARD, PICTURES, TRAINING_NAME
from .reading import read_config
from .records import read_record


PathLike = str | os.PathLike[str]


def folder_card(adapter_dir: PathLike, repo_id: str | None = None) -> str:
    """The text of the card of an adapter's folder, with those of its records and `layout.PICTURES` that are there.

    Raises FileNotFoundError for a folder without an adapter, and what `card_of` raises.
    """
    folder = Path(adapter_dir)
    read = read_config(folder / CONFIG_NAME, str(folder))
    pictures = {caption: name for name, caption in PICTURES.items() if (folder / name).is_file()}
    evaluation, training = (
        read_record(folder / name) if (folder / name).exists() else None for name in (EVALUATION_NAME, TRAINING_NAME)
    )
    card = card_of(read.config, read.backbone, evaluation, training=training, pictures=pictures, repo_id=repo_id)
    return f"{card}\n"


def write_card(adapter_dir: PathLike) -> Path:
    """Write the card that `folder_card` makes of a folder, in place of one that is there. Returns its path."""
    path = Path(adapter_dir) / CARD_NAME
    write_text(path, folder_card(adapter_dir))
    return path


@contextmanager
def refreshed_card(adapter_dir: PathLike) -> Iterator[Path]:
    """`with refreshed_card(folder) as folder:` change files in a folder; its card follows.

    A card that was edited is kept, with a warning.
    """
    folder = Path(adapter_dir)
    path = folder / CARD_NAME
    untouched = not os.path.lexists(path) or _is_untouched(path, folder)
    yield folder
    if untouched:
        write_card(folder)
    else:
        warnings.warn(f"{path} was edited and is kept; remove it to have it made again.", stacklevel=3)


def _is_untouched(path: Path, folder: Path) -> bool:
    try:
        return is_made(read_text(path, LARGEST_CARD), folder)
    except ValueError:  # no program wrote this file, or what lies beside it makes no card
        return False


def is_made(card: str, adapter_dir: PathLike) -> bool:
    """Whether a card is what `folder_card` makes of the folder, and so was not edited."""
    return card.rstrip() == folder_card(adapter_dir).rstrip()
