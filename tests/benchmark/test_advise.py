"""The adviser: what it says about given figures, and one run of the command. No figure of speed is tested."""

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
from dtem_hf.benchmark.verdict import judge, pick, sentence
from dtem_hf.cli import app
from dtem_hf.deploy.runtimes import RUNTIMES, make_run
from dtem_hf.models import timing


DOCS = Path(__file__).resolve().parents[2] / "docs"


def make_rows(
    speeds: dict[str, dict[tuple[str, int], float]], losses: dict[tuple[str, int], float], spread: float = 0.01
) -> list[dict[str, Any]]:
    """Rows of one batch size of 16, from images per second of every (method, r) in every runtime."""
    first = next(iter(speeds.values()))["none", 0]
    best = max(runtime["none", 0] for runtime in speeds.values())

    def around(value: float) -> dict[str, float]:
        return {"median": value, "q25": value * (1 - spread), "q75": value * (1 + spread)}

    return [
        {
            "runtime": runtime,
            "method": method,
            "r": r,
            "ratio": 1 - r / 32,
            "loss": losses.get((method, r), 0.0),
            "loss_interval": [losses.get((method, r), 0.0) / 2, losses.get((method, r), 0.0) * 2],
            "cosine": None,
            "batches": [
                {
                    "batch_size": 16,
                    "images_per_second": around(speed),
                    "speedup": around(speed / measured["none", 0]),
                    "over_best_plain": around(speed / best),
                    "over_first": around(speed / first),
                }
            ],
        }
        for runtime, measured in speeds.items()
        for (method, r), speed in measured.items()
    ]


LOSSES = {("tome", 8): 0.04, ("tome", 16): 0.2, ("dtem", 8): 0.03, ("dtem", 16): 0.09}
EAGER = {("none", 0): 10.0, ("tome", 8): 14.0, ("tome", 16): 21.0, ("dtem", 8): 13.0, ("dtem", 16): 20.0}


@pytest.mark.parametrize(
    ("max_loss", "picked"),
    [
        (1.0, ("dtem", 16)),  # both methods may merge 16, and this one loses less
        (0.09, ("dtem", 16)),
        (0.08, ("dtem", 8)),
        (0.03, ("dtem", 8)),
        (0.02, None),
    ],
)
def test_the_largest_r_within_the_loss_is_picked(max_loss: float, picked: Any) -> None:
    row = pick(make_rows({"eager": EAGER}, LOSSES), max_loss)
    assert (None if row is None else (row["method"], row["r"])) == picked


def advice_on(speeds: dict[str, Any], max_loss: float = 0.1, **options: Any) -> tuple[dict[str, Any], str]:
    rows = make_rows(speeds, LOSSES, **options)
    picked = pick(rows, max_loss)
    assert picked is not None
    verdict = judge(rows, picked, 0)
    return verdict, sentence(rows, picked, [verdict], max_loss)


def test_in_one_runtime_all_of_the_gain_is_merging_s() -> None:
    verdict, text = advice_on({"eager": EAGER})
    assert (verdict["speedup"], verdict["over_first"], verdict["merging_share"]) == (2.0, 2.0, 1.0)
    assert text == (
        "Take r = 16 (dtem), the largest that was tried: it gives 2.00× with 16 images at a time in eager "
        "(20.0 images/s); it changes the class of 9.0 % of the images (95 % interval 4.5 to 18.0 %)."
    )


def test_a_runtime_s_part_of_the_gain_is_not_merging_s() -> None:
    """Four times as fast by the runtime, and again by merging: each brings half of the factor of sixteen."""
    verdict, text = advice_on({"eager": EAGER, "graph": {**dict.fromkeys(EAGER, 40.0), ("dtem", 16): 160.0}})
    assert (verdict["runtime"], verdict["best_plain"], verdict["pays"]) == ("graph", "graph", True)
    assert verdict["merging_share"] == pytest.approx(0.5)
    assert "4.00× with 16 images at a time in graph" in text
    assert "16.00× unmerged eager, 50 % of that gain by merging" in text


def test_a_faster_unmerged_runtime_is_named() -> None:
    verdict, text = advice_on({"eager": EAGER, "graph": {**dict.fromkeys(EAGER, 25.0), ("dtem", 16): 19.0}})
    assert not verdict["pays"] and verdict["runtime"] == "eager"
    assert text.startswith("It does not pay here, because")
    assert "the fastest merged runtime, eager, makes 20.0 images/s, and the unmerged model 25.0 in graph" in text


def test_merging_that_is_slower_does_not_pay() -> None:
    verdict, text = advice_on({"eager": {**EAGER, ("dtem", 16): 8.0}})
    assert not verdict["pays"] and verdict["merging_share"] is None
    assert "eager has 0.80× the speed at 0.50 of the unmerged model's multiply-adds" in text


def test_a_gain_within_the_noise_is_none() -> None:
    verdict, text = advice_on({"eager": {**EAGER, ("dtem", 16): 11.0}}, spread=0.2)
    assert not verdict["pays"]
    assert "the gain of 1.10× over the unmerged model in eager is within the noise" in text
    assert advice_on({"eager": {**EAGER, ("dtem", 16): 11.0}}, spread=0.05)[0]["pays"]


def test_each_batch_size_has_its_verdict_in_the_sentence() -> None:
    rows = make_rows({"eager": EAGER}, LOSSES)
    picked = pick(rows, 0.1)
    assert picked is not None
    good = judge(rows, picked, 0)
    bad = {**good, "batch_size": 1, "pays": False, "because": "it is slow"}
    text = sentence(rows, picked, [bad, good], 0.1)
    assert "it gives 2.00× with 16 images at a time" in text
    assert text.endswith("; with one image at a time it does not pay, because it is slow.")


def test_only_the_largest_r_is_said_to_be_the_largest_tried() -> None:
    assert "tried" not in advice_on({"eager": EAGER}, max_loss=0.05)[1]


def test_no_r_within_the_loss_is_said_with_the_least_one() -> None:
    rows = make_rows({"eager": EAGER}, LOSSES)
    text = sentence(rows, pick(rows, 0.01), [], 0.01)
    assert "even r = 8 (dtem) changes the class of 3.0 % of the images (95 % interval 1.5 to 6.0 %), and" in text
    assert "max_loss=0.01 allows less" in text
    without_classes = [{**row, "cosine": 1 - row["loss"]} for row in rows]
    text = sentence(without_classes, None, [], 0.01)
    assert "even r = 8 (dtem) turns the features to a cosine of 0.970 (95 % interval 0.940 to 0.985), and" in text


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
    assert "advise: 100%" in shown.err and "prepare: " not in shown.err  # one bar, that ends full
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
    assert "stopped: this is what was measured until then" in capsys.readouterr().out


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
    assert "classifier.bias is not in the checkpoint and would be random" in capsys.readouterr().err


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
    ],
)
def test_nonsense_is_named(
    make_classifier: Callable[..., Any], pixels: torch.Tensor, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadValue, match=named):
        advise(make_classifier(), pixels, **options)


def test_help_has_two_examples(capsys: Any) -> None:
    assert CliRunner().invoke(app, ["advise", "--help"]).stdout.count("\ndtem-hf advise ") == 2


@pytest.mark.parametrize("path", sorted(DOCS.glob("which-r/*/advice.json")), ids=lambda path: path.parent.name)
def test_the_page_quotes_what_the_command_wrote(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == advice_page(result)
    picked = pick(result["rows"], result["max_loss"])
    assert picked is not None and (picked["method"], picked["r"]) == (result["method"], result["r"])
    assert result["verdicts"] == [judge(result["rows"], picked, place) for place in range(len(result["verdicts"]))]
    assert result["sentence"] == sentence(result["rows"], picked, result["verdicts"], result["max_loss"])
    page = (DOCS / "which-r.md").read_text(encoding="utf-8")
    assert result["sentence"] in page.replace("\n> ", " ") and f"`{result['command']}`" in page
    assert f"](which-r/{path.parent.name}/advice.md)" in page and f"](which-r/{path.parent.name}/advice.png)" in page
