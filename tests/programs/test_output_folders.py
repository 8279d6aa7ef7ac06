"""Programs that write into a folder: one run at a time, and only processes that know each other."""

from __future__ import annotations

import signal
import time
from importlib import import_module
from pathlib import Path

import pytest

from dtem_hf import BadValue
from dtem_hf.evaluation import captions
from dtem_hf.evaluation.caption_loss import CaptionLossArguments
from dtem_hf.evaluation.classification import EvaluateArguments
from dtem_hf.programs.arguments import parse_arguments
from dtem_hf.programs.lock import LOCK_NAME, only_run_in
from tests.support.children import Child


ROOT = Path(__file__).parents[2]
NOWHERE = "nowhere"
IMAGES = ["--model", NOWHERE, "--data", NOWHERE]
CAPTIONED = ["--images", NOWHERE, "--captions", NOWHERE]
CAPTION_LOSS = ["--model", NOWHERE, *CAPTIONED]
PROGRAMS = {
    "dtem_hf.benchmark.advise": IMAGES,
    "recipes.benchmark_device": ["--device", "cpu"],
    "dtem_hf.benchmark.program": ["--model", NOWHERE],
    "recipes.benchmark_training": ["--model", NOWHERE],
    "dtem_hf.evaluation.analyze": [*IMAGES, "--adapter", NOWHERE],
    "dtem_hf.evaluation.calibrate": [*IMAGES, "--flops", "0.7", "--method", "tome"],
    "dtem_hf.evaluation.captions": ["--model", NOWHERE, "--annotations", NOWHERE, "--images", NOWHERE],
    "dtem_hf.evaluation.classification": IMAGES,
    "dtem_hf.evaluation.comparison": IMAGES,
    "dtem_hf.evaluation.dense": [*IMAGES, "--head", "heads:depth"],
    "dtem_hf.evaluation.segmentation": ["--model", NOWHERE, "--train", NOWHERE, "--test", NOWHERE],
    "dtem_hf.training.program": IMAGES,
    "dtem_hf.training.small_git": CAPTIONED,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_second_run_in_a_folder_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    main = import_module(name).main
    with only_run_in(tmp_path / "run"):
        before = list((tmp_path / "run").iterdir())
        with pytest.raises(BadValue, match=r"output_dir='.*run': a folder that no other run is using; process"):
            main([*PROGRAMS[name], "--output_dir", str(tmp_path / "run")])
        assert list((tmp_path / "run").iterdir()) == before == [tmp_path / "run" / LOCK_NAME]


def test_ctrl_c_ends_a_script_with_one_line(vit_folder: Path, tmp_path: Path) -> None:
    words = ["--model", vit_folder, "--rounds", 10000, "--output_dir", tmp_path / "run"]
    script = Child([ROOT / "recipes" / "benchmark.py", *words], tmp_path / "log")
    while script.is_alive() and not (tmp_path / "run" / LOCK_NAME).exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGINT)
    assert script.wait() == 130
    said = f"no result was written to {tmp_path / 'run'}, and the same command starts over"
    assert (tmp_path / "log").read_text().splitlines()[-1] == f"Stopped by Ctrl-C: {said}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_is_no_folder(name: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(BadValue, match=r"output_dir='.*': a folder; .*bad\.jpg is a file"):
        import_module(name).main([*PROGRAMS[name], "--output_dir", str(tmp_path / "bad.jpg" / below)])


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(BadValue, match=r"a folder; .*out is a link to nothing"):
        parse_arguments(EvaluateArguments, [*IMAGES, "--output_dir", str(tmp_path / "out")], "")


@pytest.mark.parametrize("below", ["", "runs/x"])
def test_results_do_not_lie_among_the_images(below: str, tmp_path: Path) -> None:
    """Their pictures would be images of the next run; a labels.csv says which images there are."""
    (tmp_path / "link").symlink_to(tmp_path / "images")
    (tmp_path / "images").mkdir()
    words = ["--model", "user/model", "--data", str(tmp_path / "link")]
    inside = ["--output_dir", str(tmp_path / "images" / below)]
    with pytest.raises(BadValue, match=r"output_dir='.*': a folder outside of data='.*link'"):
        parse_arguments(EvaluateArguments, [*words, *inside], "")
    assert parse_arguments(EvaluateArguments, [*words, "--output_dir", str(tmp_path / "images2")], "")
    (tmp_path / "images" / "labels.csv").touch()
    assert parse_arguments(EvaluateArguments, [*words, *inside], "")


@pytest.mark.parametrize(
    ("output", "right"), [("there", "the path of a file"), ("bad.jpg/x.html", "a folder; .*bad.jpg is a")]
)
def test_a_folder_is_no_file(output: str, right: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(BadValue, match=f"output='.*': {right}"):
        parse_arguments(CaptionLossArguments, [*CAPTION_LOSS, "--output", str(tmp_path / output)], "")


def test_scores_of_predictions_that_cannot_be_read_leave_no_folder(tmp_path: Path) -> None:
    for name in ("references.json", "bad.json"):
        (tmp_path / name).write_text("{")
    before = sorted(tmp_path.iterdir())
    given = ["--annotations", before[1], "--predictions", before[0], "--output", tmp_path / "runs" / "a" / "s.json"]
    with pytest.raises(BadValue, match="is not valid JSON"):
        captions.main([str(each) for each in given])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [*PROGRAMS, "dtem_hf.evaluation.caption_loss"])
def test_strangers_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched as two by torchrun, and Accelerate knows of one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    target = ["--output_dir", str(tmp_path / "run")]
    if name == "dtem_hf.evaluation.caption_loss":
        target = [*CAPTION_LOSS, "--output", str(tmp_path / "run" / "loss.json")]
    with pytest.raises(RuntimeError, match="2 processes were launched and Accelerate sees 1"):
        import_module(name).main([*PROGRAMS.get(name, []), *target])
    assert not (tmp_path / "run").exists()
