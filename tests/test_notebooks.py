"""The notebooks run from the first cell to the last, and are stored without what they print."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
# What each prints at its end, among others.
PRINTED = {"tour": '"r": 10', "train_your_adapter": "merge_adapter.safetensors"}
# What takes a reader longer.
SHORTER = {"epochs=2": "epochs=1", "steps=20": "steps=4", "limit=180": "limit=90"}


def test_every_notebook_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    for cell in cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert PRINTED[name] in "".join(output.get("text", "") for output in cells[-1].outputs)
