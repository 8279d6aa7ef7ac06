"""The table of ways to train: every row by the recipes themselves, once; and what stands in the table."""

import json
import runpy

import pytest
import yaml

from dtem_hf import BadValue
from recipes.training_table import main


@pytest.fixture
def rows(tmp_path):
    """A YAML file of three rows that build on each other."""
    values = {
        "reductions": [1, 2],
        "common": {"r": 2, "steps": 2, "batch_size": 4, "validation_size": 8, "num_workers": 0, "glance_every": 0},
        "rows": [
            {"name": "tome", "title": "ToMe", "method": "tome"},
            {"name": "learned", "title": "learned", "options": {"task": "fisher", "lr": 0.01}},
            {
                "name": "planned",
                "title": "planned",
                "start_from": "learned",
                "program": "calibrate",
                "options": {"num_images": 8, "evaluations": 3},
            },
        ],
    }
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_here(command, check):
    """A recipe in this process: to import what it needs takes a new one longer than to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")


@pytest.mark.usefixtures("any_precision")
def test_rows_are_made_once_and_stand_in_the_table(rows, vit_folder, image_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("subprocess.run", run_here)
    folders = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "out")]
    data = ["--model", str(vit_folder), "--train", str(image_folder), "--dev", str(image_folder)]
    command = ["--rows", str(rows), *data, *folders]
    main(command)
    records = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("tome", "learned", "planned")
    }
    assert records["learned"]["training"]["steps"] == 2
    measured = {
        name: [row for evaluation in record["evaluations"] for row in evaluation["rows"] if row["method"] != "none"]
        for name, record in records.items()
    }
    assert [row["r"] for row in measured["learned"]] == [1, 2]
    plans = [found["reductions"] for found in records["planned"]["calibrations"]]
    assert [row["r"] for row in measured["planned"]] == plans
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if "learned.json" in line).split("|")]
    own, tome = measured["learned"][1], measured["tome"][1]
    assert cells[5:8] == [f"{own['kl']:.4f}", f"{own['kl'] / tome['kl']:.2f}", f"{own['top1']:.1f}"]
    assert (tmp_path / "out" / "table.png").stat().st_size > 1000
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
    capfd.readouterr()
    main(command)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "==" not in capfd.readouterr().out


def test_a_line_with_an_unknown_key_is_refused(rows, tmp_path):
    values = yaml.safe_load(rows.read_text())
    values["rows"][0]["lr"] = 1
    rows.write_text(yaml.safe_dump(values))
    with pytest.raises(BadValue, match=r"a name and some of .*options"):
        main(["--rows", str(rows), "--model", "m", "--train", "t", "--dev", "d"])


@pytest.mark.parametrize("row", [{"title": "without a name"}, {"name": "odd", "colour": "blue"}])
def test_a_row_that_makes_no_sense_is_refused(rows, row):
    rows.write_text(yaml.safe_dump({**yaml.safe_load(rows.read_text()), "rows": [row]}))
    with pytest.raises(BadValue, match=r"rows=.*: a name and some of method, name, options, program"):
        main(["--rows", str(rows), "--model", "m", "--train", "t", "--dev", "d"])


def test_a_row_goes_on_from_one_above_it(rows):
    values = yaml.safe_load(rows.read_text())
    values["rows"][1]["start_from"] = "planned"
    rows.write_text(yaml.safe_dump(values))
    with pytest.raises(BadValue, match="start_from of learned='planned': a row above it"):
        main(["--rows", str(rows), "--model", "m", "--train", "t", "--dev", "d"])
