"""Terminal output of the commands: errors and notes of one line each, and small tables."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from .errors import said_by_worker, said_of_stop
from .version import __version__


def show_version(wanted: bool) -> None:
    """Print the version and end the command, if `wanted`."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


class OneLineErrors(TyperGroup):
    """Show an error that a user can correct as one red line on stderr; exit with 2 for ValueError, else with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_note  # type: ignore[assignment]
                return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as error:
            _say(said_of_stop(error), typer.colors.YELLOW)
            raise typer.Exit(130) from error
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            said = said_by_worker(error)  # torch makes a RuntimeError of a worker's BadValue
            if ctx.params["traceback"] or (isinstance(error, RuntimeError) and said is None):
                raise
            message = " ".join((said or str(error)).split()) or type(error).__name__
            _say(f"Error: {message}", typer.colors.RED)
            raise typer.Exit(1 if isinstance(error, (OSError, ImportError)) else 2) from error


def _show_note(message: Warning, *_: Any) -> None:
    """Show a warning as one line, without the line of code that raised it."""
    _say(f"Note: {message}", typer.colors.YELLOW)


def _say(line: str, colour: str) -> None:
    """Write a line to stderr; in colour on a terminal, unless NO_COLOR is set (no-color.org)."""
    typer.secho(line, fg=None if os.environ.get("NO_COLOR") else colour, err=True)


def print_table(header: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Print rows as a table; columns with a header are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=bool(header))
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)
