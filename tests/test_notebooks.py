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


def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One behind the other in one kernel, which forgets all names in between: its start takes as long as a run."""
    for variable, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    all_cells, last = [], {}
    for name in PRINTED:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells)
        for cell in cells:
            for long, short in SHORTER.items():
                cell.source = cell.source.replace(long, short)
        all_cells += [*cells, nbformat.v4.new_code_cell("%reset -f")]
        last[name] = cells[-1]
    notebook.cells = all_cells
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name, printed in PRINTED.items():
        assert printed in "".join(output.get("text", "") for output in last[name].outputs)
