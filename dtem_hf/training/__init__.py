"""Training of merge embeddings; `main` is the program behind `recipes/train.py`."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import need


need("train", __name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run training with command-line arguments (None: those of the process)."""
    from .program import main as run

    run(argv)
