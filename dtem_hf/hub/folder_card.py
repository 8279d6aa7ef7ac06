"""The model card of an adapter's folder: made from the folder's files, and updated until a user edits it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from huggingface_hub import ModelCard

from ..configuration import CONFIG_NAME
from ..files import read_text, write_text
from .card import card_of
from .layout import CARD_NAME, EVALUATION_NAME, LARGEST_CARD, PICTURES, TRAINING_NAME
from .reading import read_config
from .records import read_record


_MARK = "<!-- made by dtem-hf, which keeps a card that was edited: "
PathLike = str | os.PathLike[str]


def folder_card(adapter_dir: PathLike, repo_id: str | None = None) -> str:
    """The text of an adapter folder's card, from the records and the `layout.PICTURES` that the folder holds.

    Raises FileNotFoundError for a folder without an adapter, and what `card_of` raises.
    """
    folder = Path(adapter_dir)
    read = read_config(folder / CONFIG_NAME, str(folder))
    pictures = {caption: name for name, caption in PICTURES.items() if (folder / name).is_file()}
    evaluation, training = (
        read_record(folder / name) if (folder / name).exists() else None for name in (EVALUATION_NAME, TRAINING_NAME)
    )
    card = card_of(read.config, read.backbone, evaluation, training=training, pictures=pictures, repo_id=repo_id)
    return marked(card)


def write_card(adapter_dir: PathLike) -> Path:
    """Write the card of `folder_card` into the folder, over an existing one. Returns its path."""
    path = Path(adapter_dir) / CARD_NAME
    write_text(path, folder_card(adapter_dir))
    return path


@contextmanager
def refreshed_card(adapter_dir: PathLike) -> Iterator[Path]:
    """`with refreshed_card(folder) as folder:` change files in a folder; afterwards its card is made again.

    An edited card is kept, with a warning.
    """
    folder = Path(adapter_dir)
    path = folder / CARD_NAME
    untouched = not os.path.lexists(path) or _is_untouched(path)
    yield folder
    if untouched:
        write_card(folder)
    else:
        warnings.warn(f"{path} was edited and is kept; delete it to have it made again.", stacklevel=3)


def _is_untouched(path: Path) -> bool:
    try:
        return is_made(read_text(path, LARGEST_CARD))
    except ValueError:  # not a text file of reasonable size: a user put it there
        return False


def marked(card: ModelCard) -> str:
    """The text of a card, with a last line that holds its digest: `is_made` recognises edited cards by it."""
    text = f"{card}".rstrip() + "\n"
    return f"{text}\n{_MARK}{_digest(text)} -->\n"


def is_made(text: str) -> bool:
    """Whether this package made a card and it was not edited since."""
    body, mark, digest = text.partition(f"\n{_MARK}")
    return bool(mark) and digest.strip() == f"{_digest(body)} -->"


def _digest(text: str) -> str:
    return sha256(text.replace("\r\n", "\n").strip().encode()).hexdigest()[:16]
