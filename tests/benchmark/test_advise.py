"""The adviser: what it measures, and runs of its command. No figure of speed is tested."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification, ViTModel
from typer.testing import CliRunner

from dtem_hf import BadValue, DTEMConfig, ToMeConfig, advise, attach
from dtem_hf.benchmark.advice import handful
from dtem_hf.benchmark.advise import AdviseArguments, main
from dtem_hf.benchmark.tables import advice_cells, advice_page
from dtem_hf.cli import app
from dtem_hf.deploy.runtimes import RUNTIMES, make_run
from dtem_hf.models import timing


def test_the_handful_leaves_the_shares_and_no_smaller_r_does(make_classifier: Callable[..., Any]) -> None:
    merged = attach(make_classifier(), ToMeConfig(r=0))

    def ratio(r: int, size: int) -> float:
        merged.set_reduction(r)
        return merged.merge_plan(size).ratio

    for size in (32, 64):  # of larger images, more tokens merge
        found = handful(make_classifier(), (3, size, size))
        for r, share in zip(found, (0.75, 0.6, 0.5), strict=True):
            assert ratio(r, size) <= share < ratio(r - 1, size)


def test_the_command_advises_on_a_folder(
    vit_folder: Path, image_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ["--num_images", "20", "--r", "2", "4", "--runtimes", "eager", "--batch_sizes", "1", "3"]
    main([str(vit_folder), str(image_folder), *options, "--rounds", "2", "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "advice.json").read_text())
    shown = capsys.readouterr()
    assert result["sentence"] in shown.out
    assert (
        "(time limit in 2:5" in shown.err and "advise: 100%" in shown.err and "prepare: " not in shown.err
    )  # one bar, that ends full
    assert (tmp_path / "advice.md").read_text() == advice_page(result)
    assert (tmp_path / "advice.png").stat().st_size > 0
    rows = result["rows"]
    assert [(row["method"], row["r"]) for row in rows] == [("none", 0), ("tome", 2), ("tome", 4)]
    assert (rows[0]["agreement"], rows[0]["kl"]) == (100, 0)
    for row in rows:
        assert [cell["batch_size"] for cell in row["batches"]] == [1, 3]
        assert row["loss_interval"][0] <= row["loss"] <= row["loss_interval"][1]
    assert result["data"]["num_images"] == 20 and result["hardware"] and result["versions"]


def test_a_run_that_is_stopped_leaves_what_it_measured(
    vit_folder: Path, image_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third round of the second batch size: both have speeds, and the user is told."""
    original, started = timing.timed_rounds, []

    def stopping(*arguments: Any, **options: Any) -> Any:
        started.append(0)
        for number, seconds in enumerate(original(*arguments, **options)):
            if len(started) == 2 and number == 2:
                raise KeyboardInterrupt
            yield seconds

    monkeypatch.setattr("dtem_hf.benchmark.advice.timed_rounds", stopping)
    options = ["--num_images", "5", "--r", "2", "--runtimes", "eager", "--batch_sizes", "1", "2", "--rounds", "5"]
    with pytest.raises(SystemExit) as stopped:
        main([str(vit_folder), str(image_folder), *options, "--output_dir", str(tmp_path)])
    assert stopped.value.code == 130
    result = json.loads((tmp_path / "advice.json").read_text())
    assert not result["finished"] and "The run was stopped" in (tmp_path / "advice.md").read_text()
    assert [[cell["batch_size"] for cell in row["batches"]] for row in result["rows"]] == [[1, 2], [1, 2]]
    assert "stopped: these are the results until then" in capsys.readouterr().out


def test_a_run_that_is_killed_before_any_round_leaves_the_losses(make_classifier: Any, pixels: torch.Tensor) -> None:
    reports: list[Any] = []
    advise(
        make_classifier(),
        pixels,
        r=[6],
        runtimes=["eager"],
        batch_sizes=[1],
        rounds=2,
        max_loss=1,
        report=reports.append,
    )
    assert [report.finished for report in reports] == [False] * 3  # the losses, and two rounds
    assert "No speed was measured" in reports[0].sentence and reports[0].r == 6
    assert "r = 6" in reports[1].sentence and "No speed" not in reports[1].sentence


def test_an_r_that_was_not_asked_for_runs_in_other_runtimes_only_if_it_is_taken(
    make_classifier: Any, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager runs under the name of ONNX Runtime here, as an export takes seconds."""

    def make(runtime: str, *arguments: Any) -> Any:
        return make_run("eager", *arguments)

    monkeypatch.setattr("dtem_hf.benchmark.advice.make_run", make)
    options: dict[str, Any] = {"runtimes": ["eager", "onnxruntime"], "batch_sizes": [2], "rounds": 1, "max_loss": 1}
    found = advise(make_classifier(), pixels, **options)
    eager = [row["r"] for row in found.rows if row["runtime"] == "eager"]
    assert len(eager) == 4 and found.r == eager[-1]
    assert [row["r"] for row in found.rows if row["runtime"] == "onnxruntime"] == [0, found.r]
    columns, lines = advice_cells(found.rows)
    assert columns[-1] == "onnxruntime, 2 images" and [line[-1] == "–" for line in lines] == [False, True, True, False]


def test_a_row_whose_speedup_is_known_is_timed_no_longer(
    make_classifier: Any, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock without noise all speed-ups are known after four rounds; on a noisy one, rounds decide."""
    rounds: list[int] = []
    noise = [0]

    def timed(calls: Any, *arguments: Any, skipped: Any, **options: Any) -> Any:
        for number in count():
            rounds.append(number)
            yield np.array([2.0, np.nan if 1 in skipped else 1.0 + noise[0] * (number % 2)])

    monkeypatch.setattr("dtem_hf.benchmark.advice.timed_rounds", timed)

    def rounds_of(**options: Any) -> int:
        rounds.clear()
        advise(make_classifier(), pixels, r=[6], runtimes=["eager"], batch_sizes=[1], rounds=9, **options)
        return len(rounds)

    assert rounds_of() == 5  # one of them to warm up
    noise[0] = 1
    assert rounds_of() == 10
    assert rounds_of(minutes=0) == 5


def test_an_encoder_without_its_architecture_gets_no_random_head(
    make_bare: Callable[..., ViTModel], vit_folder: Path, image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """The config alone would pass for a classifier's."""
    make_bare().save_pretrained(tmp_path / "model")
    shutil.copy(vit_folder / "preprocessor_config.json", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("architectures")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    options = ["--num_images", "3", "--r", "2", "--runtimes", "eager", "--batch_sizes", "1", "--rounds", "1"]
    main([str(tmp_path / "model"), str(image_folder), *options, "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "advice.json").read_text())["rows"]
    assert rows[1]["agreement"] is None and 0 < rows[1]["cosine"] < 1
    assert "the checkpoint lacks classifier.bias, which would be random" in capsys.readouterr().err


def test_the_options_of_the_documentation_are_enough(tmp_path: Path) -> None:
    """`dtem-hf advise MODEL IMAGES` leaves the runtimes to the program."""
    assert AdviseArguments(model="user/model", data="images").runtimes == []


def test_losses_are_those_of_the_models_themselves(
    make_classifier: Callable[..., ViTForImageClassification], pixels: torch.Tensor
) -> None:
    plain = make_classifier()
    found = advise(plain, pixels, r=[6], runtimes=["eager"], batch_sizes=[1], rounds=1, max_loss=0.5)
    with torch.no_grad():
        expected = plain(pixel_values=pixels).logits.softmax(-1).double()
        merged = attach(make_classifier(), ToMeConfig(r=6))(pixel_values=pixels).logits.softmax(-1).double()
    row = found.rows[1]
    assert row["kl"] == pytest.approx((expected * (expected / merged).log()).sum(-1).mean().item(), rel=1e-4)
    changed = (expected.argmax(-1) != merged.argmax(-1)).double().mean().item()
    assert row["loss"] == pytest.approx(changed) and row["agreement"] == pytest.approx(100 * (1 - changed))
    assert row["ratio"] == attach(make_classifier(), ToMeConfig(r=6)).merge_plan().ratio
    assert not hasattr(plain, "merge_config")


def test_an_encoder_is_judged_by_the_cosine_of_its_features(
    make_bare: Callable[..., ViTModel], pixels: torch.Tensor
) -> None:
    found = advise(make_bare(), [pixels, pixels[:2]], r=[6], runtimes=["eager"], batch_sizes=[2], rounds=1, max_loss=1)
    with torch.no_grad():
        ours, reference = (
            model(pixel_values=pixels).last_hidden_state[:, 0]
            for model in (attach(make_bare(), ToMeConfig(r=6)), make_bare())
        )
    cosine = torch.nn.functional.cosine_similarity(ours, reference)
    assert found.rows[1]["cosine"] == pytest.approx(torch.cat([cosine, cosine[:2]]).mean().item(), rel=1e-5)
    assert found.rows[1]["agreement"] is None and (found.method, found.r) == ("tome", 6)


def test_an_adapter_stands_beside_tome(make_classifier: Callable[..., Any], pixels: torch.Tensor) -> None:
    adapter = attach(make_classifier(), DTEMConfig(r=3, init="random", embed_dim=4)).to_merge_adapter("user/tiny")
    found = advise(make_classifier(), pixels, adapter=adapter, r=[6], runtimes=["eager"], batch_sizes=[1], rounds=1)
    assert [(row["method"], row["r"]) for row in found.rows] == [("none", 0), ("tome", 6), ("dtem", 6)]
    assert found.rows[1]["kl"] != found.rows[2]["kl"]


def test_a_runtime_that_cannot_run_is_left_out_unless_asked_for(
    make_classifier: Callable[..., Any], pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the ONNX packages only eager is left, and the advice says why."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    options: dict[str, Any] = {"r": [6], "batch_sizes": [1], "rounds": 1}
    found = advise(make_classifier(), pixels, **options)
    assert {row["runtime"] for row in found.rows} == {"eager"}
    assert "dtem-hf[onnx]" in found.left_out["onnxruntime"] and set(found.left_out) < set(RUNTIMES)
    with pytest.raises(ImportError, match="dtem-hf"):
        advise(make_classifier(), pixels, runtimes=["onnxruntime"], **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": [0]}, r"r=\[0\]"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"runtimes": ["tpu"]}, "runtimes.*some of eager"),
        ({"methods": ["evit"]}, "methods.*some of.*tome"),  # it keeps a share, and merges no r per layer
        ({"methods": ["none"]}, "methods"),
        ({"r": 4}, "r=4: a list of whole numbers"),
        ({"r": [2.5]}, r"r=\[2\.5\]"),
        ({"batch_sizes": ["a"]}, "batch_sizes=.*whole numbers"),
        ({"rounds": 0}, "rounds=0"),
        ({"minutes": -1}, "minutes=-1"),
        ({"max_loss": 2}, "max_loss=2: a number from 0 to 1"),
        ({"max_loss": "x"}, "max_loss='x'"),
        ({"features": "x"}, "features='x': one of auto, pooled"),
        ({"images": None}, "images='NoneType': pixel values"),
        ({"images": [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)]}, "images=.*images of one size"),
    ],
)
def test_nonsense_is_named(
    make_classifier: Callable[..., Any], pixels: torch.Tensor, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadValue, match=named):
        advise(make_classifier(), **{"images": pixels, **options})


def test_help_has_two_examples(capsys: Any) -> None:
    assert CliRunner().invoke(app, ["advise", "--help"]).stdout.count("\ndtem-hf advise ") == 2
