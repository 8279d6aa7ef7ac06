"""A run is known by what it read, and keeps its parts until its results are written."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from dtem_hf import BadValue
from dtem_hf.evaluation import classification
from dtem_hf.evaluation.classification import EvaluateArguments, evaluate, main
from tests.support.command_line import run
from tests.support.full_disk import full_disk
from tests.support.runs import flags, watch


ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(vit_folder, image_folder, tmp_path):
    """Copies of a model and images that a test may change."""
    shutil.copytree(vit_folder, tmp_path / "model")
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path


@pytest.fixture
def options(folders):
    return {
        "model": str(folders / "model"),
        "data": str(folders / "images"),
        "methods": ["none", "tome"],
        "r": ["2"],
        "batch_size": 7,
        "num_workers": 0,
        "output_dir": str(folders / "out"),
    }


def figures(result):
    return [[row[name] for name in ("top1", "top5", "agreement", "kl", "multiply_adds")] for row in result["rows"]]


def interrupt(options, monkeypatch, behind=3):
    """Stop an evaluation behind some batches."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        watch(patched, classification, "measure_batch", stop_behind=behind)
        evaluate(EvaluateArguments(**options))


def mend_labels(folders):
    lines = (folders / "images" / "labels.csv").read_text().splitlines()
    name, _ = lines[2].split(",")
    lines[2] = f"{name},4"
    (folders / "images" / "labels.csv").write_text("\n".join(lines) + "\n")


def change_an_image(folders):
    Image.new("RGB", (40, 36), "red").save(folders / "images" / "1.png")


def change_the_processor(folders):
    path = folders / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.1, 0.2, 0.3]}))


@pytest.mark.parametrize(
    ("change", "field"),
    [(mend_labels, "images"), (change_an_image, "images"), (change_the_processor, "processor")],
    ids=["labels", "image", "processor"],
)
def test_a_run_with_other_input_is_not_gone_on_with(options, folders, monkeypatch, change, field):
    interrupt(options, monkeypatch)
    change(folders)
    with pytest.raises(BadValue, match=rf"{field}=.*the unfinished run in .* --resume never"):
        evaluate(EvaluateArguments(**options))
    anew = figures(evaluate(EvaluateArguments(**options, resume="never")))
    assert anew == figures(evaluate(EvaluateArguments(**{**options, "output_dir": str(folders / "other")})))


def test_the_option_that_differs_is_named(options, monkeypatch):
    interrupt(options, monkeypatch)
    for change, said in (
        ({"limit": 9}, "num_images=9:.* has 48"),
        ({"split": "test"}, "split='test':.* 'validation'"),
    ):
        with pytest.raises(BadValue, match=said):
            evaluate(EvaluateArguments(**options, **change))


def test_a_run_that_measured_nothing_leaves_nothing(options, folders, monkeypatch):
    """It neither stands in the way of the next command nor leaves empty folders."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        watch(patched, classification, "measure_batch", stop_behind=0)
        main(flags({**options, "output_dir": str(folders / "new" / "out")}))
    assert not (folders / "new").exists()


def test_ctrl_c_says_what_is_kept(options, folders, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    for behind, said in ((0, f"no result was written to {folders / 'out'}"), (3, "out keeps 3 finished batches")):
        with monkeypatch.context() as patched:
            watch(patched, classification, "measure_batch", stop_behind=behind)
            stopped = run("evaluate", *flags(options))
        assert stopped.exit_code == 130 and stopped.stdout == ""
        assert stopped.stderr.startswith("Stopped by Ctrl-C: ") and said in stopped.stderr
        assert len(list(folders.glob("out/parts/*.npz"))) == behind


def test_parts_that_a_kill_left_are_not_another_runs(options, folders, monkeypatch):
    """Killed while parts were removed, `run.json` first: the next run has the same batches and other rows."""
    interrupt(options, monkeypatch, behind=5)
    parts = folders / "out" / "parts"
    (parts / "run.json").unlink()
    other = {**options, "r": ["4"]}
    expected = figures(evaluate(EvaluateArguments(**{**other, "output_dir": str(folders / "clean")})))
    assert figures(evaluate(EvaluateArguments(**other))) == expected
    assert not parts.exists()


def test_parts_stay_until_the_results_are_written(options, folders, monkeypatch):
    """The disk is full in that moment: the same command writes what was measured, and measures nothing again."""

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(classification, "write_json", fail)
        main(flags(options))
    assert len(list((folders / "out" / "parts").glob("*.npz"))) == 7

    again = watch(monkeypatch, classification, "measure_batch")
    main(flags(options))
    assert again == []
    assert len(json.loads((folders / "out" / "evaluation.json").read_text())["rows"]) == 2
    assert sorted(path.name for path in (folders / "out").iterdir()) == ["accuracy.png", "evaluation.json"]


def test_a_full_disk_is_one_line(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags(options)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut off
    with full_disk(600), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / "evaluate.py"), run_name="__main__")
    errors = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" not in errors and "Error: [Errno 27] File too large" in errors.splitlines()[-1]


def test_home_of_the_hub_may_be_read_only(options, folders):
    """The metrics need no folder there: a file stands in its place."""
    (folders / "home").write_text("")
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folders), "HF_HOME": str(folders / "home" / "hf")}
    environment |= {"MPLCONFIGDIR": matplotlib.get_cachedir(), "OMP_NUM_THREADS": "1"}  # fonts are not listed anew
    subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *flags(options)], check=True, env=environment
    )
    assert (folders / "out" / "evaluation.json").is_file()
