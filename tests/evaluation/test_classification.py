"""Evaluation: figures against a brute force on the same images, rows that share weights, and bad input."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

from dtem_hf import (
    AutoModelForImageClassification,
    BadValue,
    DTEMConfig,
    EViTConfig,
    FlopsSchedule,
    MergeAdapter,
    ToMeConfig,
    attach,
)
from dtem_hf.data.images import ProcessedImages, load_images
from dtem_hf.evaluation import classification
from dtem_hf.evaluation.classification import EvaluateArguments, evaluate, main
from dtem_hf.evaluation.variants import make_variants, run_in_turn
from dtem_hf.models.copies import share_weights
from dtem_hf.opening import load_processor
from tests.support.children import start_together
from tests.support.runs import flags, watch


ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(vit_folder, tmp_path):
    """A DTEM adapter with random weights, learned at r = 2."""
    torch.manual_seed(3)
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2, init="random"))
    model.save_merge_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def options(vit_folder, image_folder, adapter, tmp_path):
    return {
        "model": str(vit_folder),
        "data": str(image_folder),
        "adapter": str(adapter),
        "r": ["1", "[4, 0, 3, 0]"],
        "flops": [0.7],
        "batch_size": 7,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
    }


def brute_force(vit_folder, image_folder, merge):
    """One image at a time, with a model of its own; figures by hand."""
    plain = ViTForImageClassification.from_pretrained(vit_folder)
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=merge)
    images = ProcessedImages(load_images(str(image_folder)), load_processor(str(vit_folder)))
    agree, kl, right, labelled = 0, 0.0, 0, 0
    for i in range(len(images)):
        item = images[i]
        with torch.no_grad():
            p = plain(item["pixel_values"][None]).logits[0].double().softmax(-1).numpy()
            q = model(item["pixel_values"][None]).logits[0].double().softmax(-1).numpy()
        agree += p.argmax() == q.argmax()
        kl += float(np.sum(p * (np.log(p) - np.log(q))))
        if item["labels"] >= 0:
            labelled += 1
            right += q.argmax() == item["labels"]
    return {"agreement": 100 * agree / 48, "kl": kl / 48, "top1": 100 * right / labelled, "top5": 100.0}


def test_rows_equal_a_brute_force(options, vit_folder, image_folder, adapter):
    result = evaluate(EvaluateArguments(**options))
    assert [(row["method"], row["r"]) for row in result["rows"]] == [
        ("none", None),
        *[(method, r) for method in ("tome", "dtem") for r in (1, [4, 0, 3, 0], FlopsSchedule(0.7).to_json())],
    ]
    learned = MergeAdapter.from_pretrained(adapter)
    for row in result["rows"]:
        merge = None
        if row["method"] == "tome":
            merge = ToMeConfig(r=row["r"])
        elif row["method"] == "dtem":
            merge = MergeAdapter(DTEMConfig(r=row["r"]), learned.tensors, learned.backbone)
        for name, value in brute_force(vit_folder, image_folder, merge).items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (row["method"], row["r"], name)
    assert result["rows"][0]["agreement"] == 100 and result["rows"][0]["kl"] == 0 and result["rows"][0]["ratio"] == 1
    assert all(row["ratio"] <= 0.7 for row in result["rows"] if isinstance(row["r"], dict))
    assert result["data"] == {
        "name": result["data"]["name"],
        "num_images": 48,
        "labelled": True,
        "labels": "class numbers",
    }


def test_attention_without_sizes_is_asked_for_in_all_methods(options, vit_folder, image_folder, adapter):
    result = evaluate(EvaluateArguments(**{**options, "r": ["3"], "flops": []}, proportional_attention=False))
    weighed = evaluate(EvaluateArguments(**{**options, "r": ["3"], "flops": []}))
    learned = MergeAdapter.from_pretrained(adapter)
    config = DTEMConfig(r=3, proportional_attention=False)
    merges = [ToMeConfig(r=3, proportional_attention=False), MergeAdapter(config, learned.tensors, learned.backbone)]
    for row, with_sizes, merge in zip(result["rows"][1:], weighed["rows"][1:], merges, strict=True):
        expected = brute_force(vit_folder, image_folder, merge)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert abs(row["kl"] - with_sizes["kl"]) > 1e-4
    assert result["proportional_attention"] is False and weighed["proportional_attention"] is None


@pytest.mark.parametrize("runtime, package", [("openvino", "openvino"), ("onnxruntime", "onnxruntime")])
def test_another_runtime_gives_the_figures_of_eager(options, one_layer_vit_folder, runtime, package):
    pytest.importorskip(package)
    settings = {**options, "model": str(one_layer_vit_folder), "adapter": None}
    settings |= {"methods": ["tome"], "r": ["3"], "flops": [], "limit": 20}
    eager = evaluate(EvaluateArguments(**settings))["rows"]
    found = evaluate(EvaluateArguments(**settings, runtime=runtime))
    assert found["runtime"] == runtime
    for ours, theirs in zip(found["rows"], eager, strict=True):
        for name in ("top1", "top5", "agreement"):
            assert ours[name] == theirs[name]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)


def test_methods_differ_with_a_learned_embedding(options):
    rows = {(row["method"], str(row["r"])): row for row in evaluate(EvaluateArguments(**options))["rows"]}
    assert rows["tome", "1"]["kl"] != rows["dtem", "1"]["kl"]


def test_dtem_without_an_adapter_starts_from_keys(options, vit_folder, image_folder):
    rows = evaluate(EvaluateArguments(**{**options, "adapter": None}))["rows"]
    for row in rows[4:7]:
        assert row["method"] == "dtem"
        for name, value in brute_force(vit_folder, image_folder, DTEMConfig(r=row["r"])).items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (row["r"], name)


def test_images_without_labels_give_no_accuracy(options, image_folder, tmp_path):
    (tmp_path / "bare").mkdir()
    for i in range(3):
        (tmp_path / "bare" / f"{i}.png").write_bytes((image_folder / f"{i}.png").read_bytes())
    (tmp_path / "bare" / "labels.csv").write_text("file,label\n0.png,\n1.png,\n2.png,\n")
    result = evaluate(EvaluateArguments(**{**options, "data": str(tmp_path / "bare")}))
    assert all(row["top1"] is None and row["top5"] is None for row in result["rows"])
    assert not result["data"]["labelled"]


def test_rows_share_the_weights_of_one_model(vit_folder):
    model = ViTForImageClassification.from_pretrained(vit_folder)
    rows = make_variants(model, ["none", "tome", "dtem"], [1, 2], [], None)
    assert [row.label for row in rows] == ["none", "tome r=1", "tome r=2", "dtem r=1", "dtem r=2"]
    for row in rows:
        for name, parameter in row.model.named_parameters():
            if "merge_embedding" not in name:
                assert parameter is model.get_parameter(name)
    copied = share_weights(attach(model, DTEMConfig(r=1)))
    assert copied.vit.merge_embedding.projections[0].weight is model.vit.merge_embedding.projections[0].weight


def test_evit_has_keep_rates_and_shares_and_no_r(vit_folder):
    model = ViTForImageClassification.from_pretrained(vit_folder)
    keep = {"kind": "keep_rate", "keep_rate": 0.5}
    rows = make_variants(model, ["tome", "evit"], [2, keep], [0.7])
    assert [(row.method, row.shown_r) for row in rows] == [
        ("none", None),
        ("tome", 2),
        ("tome", FlopsSchedule(0.7).to_json()),
        ("evit", {**keep, "layers": None}),
        ("evit", FlopsSchedule(0.7).to_json()),
    ]
    assert all(row.plan.ratio <= 0.7 for row in rows if row.shown_r == FlopsSchedule(0.7).to_json())
    expected = attach(ViTForImageClassification.from_pretrained(vit_folder), EViTConfig(keep_rate=0.5))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), rows[3].ready() as merged:
        assert torch.equal(merged(pixels).logits, expected(pixels).logits)
    with pytest.raises(BadValue, match="an amount that suits evit"):
        make_variants(model, ["evit"], [2], [])


def test_rows_take_turns_at_running_first(vit_folder):
    rows = make_variants(ViTForImageClassification.from_pretrained(vit_folder), ["tome"], [1, 2], [])
    for first in range(3):
        order = []

        def run(model, order=order):
            order.append(next(i for i, row in enumerate(rows) if row.model is model))
            return len(order)

        results, seconds = run_in_turn(rows, run, torch.device("cpu"), first)
        # Rows 1 and 2 are one model, set anew.
        assert order == [[0, 1, 1], [1, 1, 0], [1, 0, 1]][first]
        assert results == [[1, 2, 3], [3, 1, 2], [2, 3, 1]][first] and (seconds > 0).all()


def test_a_standalone_model_is_the_row(vit_folder):
    rows = make_variants(ViTForImageClassification.from_pretrained(vit_folder), ["tome", "evit"], [], [0.7])
    pixels = torch.randn(2, 3, 32, 32)
    for row in rows:
        alone = row.standalone()
        with torch.no_grad(), row.ready() as shared:
            assert torch.equal(alone(pixels).logits, shared(pixels).logits)
    assert type(rows[0].standalone()) is ViTForImageClassification


def test_program_writes_json_and_plot(options, tmp_path, capsys):
    main(flags(options, r=["1", "3"], flops=None, limit=9))
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(result["rows"]) == 5 and result["data"]["num_images"] == 9
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "dtem" in capsys.readouterr().out


COUNTED = ("top1", "top5", "calibration_error", "agreement", "kl", "multiply_adds", "ratio", "tokens")


def counted(result):
    """The figures that do not depend on how fast the machine is."""
    return [[row["method"], row["r"], *(row[name] for name in COUNTED)] for row in result["rows"]]


def test_two_processes_give_what_one_gives_to_the_last_digit(options, tmp_path):
    """48 images in batches of 7: seven batches, the last of 6, for two processes."""
    one = evaluate(EvaluateArguments(**options))
    assert one["processes"] == 1
    command = [ROOT / "recipes" / "evaluate.py", *flags(options, output_dir=tmp_path / "two")]
    processes = start_together(command, 2, tmp_path, {**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert [process.wait() for process in processes] == [0, 0], processes[0].log.read_text()
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["processes"] == 2
    assert two["data"]["num_images"] == one["data"]["num_images"] == 48
    assert counted(two) == counted(one)
    assert not (tmp_path / "two" / "parts").exists()


def test_processes_that_do_not_know_each_other_are_refused(options, monkeypatch):
    """As torchrun on a CPU starts them without ACCELERATE_USE_CPU: each would do everything."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched and Accelerate sees 1"):
        evaluate(EvaluateArguments(**options))


def test_an_interrupted_run_goes_on_where_it_stopped(options, monkeypatch):
    expected = counted(evaluate(EvaluateArguments(**options)))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        done = watch(patched, classification, "measure_batch", stop_behind=3)
        evaluate(EvaluateArguments(**options))
    finished = sorted((Path(options["output_dir"]) / "parts").glob("*.npz"))
    assert len(finished) == 3
    with pytest.raises(BadValue, match=r"batch_size=8: the unfinished run in .* has 7"):
        evaluate(EvaluateArguments(**{**options, "batch_size": 8}))
    with pytest.raises(BadValue, match="rows="):
        evaluate(EvaluateArguments(**{**options, "r": ["1"]}))
    later = watch(monkeypatch, classification, "measure_batch")
    assert counted(evaluate(EvaluateArguments(**options))) == expected
    assert sorted(index for batch in done + later for index in batch["index"].tolist()) == list(range(48))
    assert not (Path(options["output_dir"]) / "parts").exists()


def test_resume_never_starts_over(options):
    folder = Path(options["output_dir"]) / "parts"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "part-00000000.npz").write_bytes(b"not to be read")
    with pytest.raises(BadValue, match="the unfinished run"):
        evaluate(EvaluateArguments(**options))
    assert len(evaluate(EvaluateArguments(**options, resume="never"))["rows"]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["none", "magic"]}, "methods=.*not magic"),
        ({"r": [], "flops": []}, "at least one r"),
        ({"r": ["-3"]}, "r=-3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_bad_options_are_named(options, change, message):
    with pytest.raises(BadValue, match=message):
        evaluate(EvaluateArguments(**{**options, **change}))


def test_results_go_into_the_card_of_a_local_adapter(options, adapter):
    main(flags(options, r=["1"], flops=None, write_card=True))
    result = json.loads((adapter / "evaluation.json").read_text())
    card = (adapter / "README.md").read_text()
    assert (
        f"{result['rows'][2]['agreement']:.1f}" in card and "![Accuracy against multiply-adds](accuracy.png)" in card
    )
    (adapter / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README\.md was edited and is kept"):
        main(flags(options, r=["2"], flops=None, write_card=True))
    assert json.loads((adapter / "evaluation.json").read_text())["rows"][2]["r"] == 2
    assert (adapter / "README.md").read_text() == "mine"
    with pytest.raises(BadValue, match="write_card=True"):
        EvaluateArguments(model="m", data="d", write_card=True)
