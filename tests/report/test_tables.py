"""Tables in a terminal: none of their figures is parted from its unit."""

from __future__ import annotations

from typing import Any

import pytest

from dtem_hf.report.tables import print_rows


COLUMNS = ["runtime", "method", *(f"eager, {2**i} images" for i in range(8))]
LINES = [["onnxruntime", "tome", *(f"{i}21.5 (1.0{i}×)" for i in range(8))] for _ in range(2)]


@pytest.mark.parametrize("width", [60, 80, 300, None])
def test_a_narrow_terminal_gets_some_tables(width: int | None, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the names of its rows; a file (None) gets one table, however wide."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    print_rows("model", COLUMNS, LINES, names=2, legend="speed-up: a ratio")
    shown = capsys.readouterr().out
    for line in LINES:
        assert all(cell in shown for cell in line)
    tables = shown.count("method")
    assert shown.count("onnxruntime") == 2 * tables and shown.count("speed-up: a ratio") == 1
    assert tables == {60: 6, 80: 3}.get(width or 0, 1)
    if width is not None:
        assert max(map(len, shown.splitlines())) <= width
