"""The benchmark program: rows, runtimes, batch sizes and what it refuses. No figure of speed is tested."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GitConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

from dtem_hf import BadValue, DTEMConfig, ToMeConfig, attach, ops
from dtem_hf.benchmark.breakdown import PARTS, MergingAlone, break_down
from dtem_hf.benchmark.program import BenchmarkArguments, benchmark, main
from dtem_hf.benchmark.rows import answering_entries
from dtem_hf.benchmark.tables import markdown, print_benchmark
from dtem_hf.evaluation.variants import make_variants
from dtem_hf.programs.functions import load_function


PEERS = """
from dtem_hf import ToMeConfig, attach
not_a_function = 3
def plain(model, r):
    return lambda pixels: model(pixel_values=pixels).logits
def merged(model, r):
    model = attach(model, ToMeConfig(r=r))
    return lambda pixels: model(pixel_values=pixels).logits
def nothing(model, r):
    return None
"""

ONCE = {"batch_sizes": [2], "rounds": 1, "warmup": 0}


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """The name of a module of the user's own, in the folder one is in."""
    (tmp_path / "my_peers.py").write_text(PEERS)
    (tmp_path / "my_broken_peers.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    return "my_peers"


def test_every_row_at_every_batch_size(vit_folder, tmp_path, capsys):
    options = ["--r", "1", "4", "--flops", "0.7", "--methods", "tome", "--batch_sizes", "1", "3", "--rounds", "2"]
    main(["--model", str(vit_folder), *options, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "benchmark.json").read_text())
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["none", "tome", "tome", "tome"]
    assert {row["runtime"] for row in rows} == {"eager"}
    assert all([batch["batch_size"] for batch in row["batches"]] == [1, 3] for row in rows)
    assert rows[3]["ratio"] <= 0.7 and rows[1]["multiply_adds"] > rows[2]["multiply_adds"]
    for row in rows:
        assert row["ideal_speedup"] == pytest.approx(1 / row["ratio"])
        for batch in row["batches"]:
            assert batch["peak_memory"] > 0
            assert batch["of_ideal"] == pytest.approx(batch["speedup"]["median"] / row["ideal_speedup"])
    assert result["image_size"] == [32, 32]
    assert "tome" in capsys.readouterr().out
    assert (tmp_path / "benchmark.md").read_text() == markdown(result)
    assert (tmp_path / "speedup.png").stat().st_size > 0


@pytest.mark.parametrize("methods", [["none"], ["none", "tome"]])
def test_images_smaller_than_a_patch_are_refused(vit_folder, methods):
    with pytest.raises(BadValue, match="image_size=1: at least one patch of"):
        benchmark(BenchmarkArguments(model=str(vit_folder), methods=methods, image_size=1, **ONCE))


def test_runtimes_and_peers_stand_in_the_same_rounds(one_layer_vit_folder, peers):
    pytest.importorskip("onnxruntime")
    settings = {"model": str(one_layer_vit_folder), "methods": ["tome"], "r": ["4"], **ONCE}
    settings |= {"runtimes": ["onnxruntime", "eager"], "peer": [f"{peers}:plain", f"{peers}:merged"]}
    rows = benchmark(BenchmarkArguments(**settings, breakdown=True))["rows"]
    assert [(row["runtime"], row["method"], row["r"]) for row in rows] == [
        ("onnxruntime", "none", None),
        ("onnxruntime", "tome", 4),
        ("eager", "none", None),
        ("eager", "tome", 4),
        ("peer", "my_peers:plain", 4),
        ("peer", "my_peers:merged", 4),
    ]
    # A peer's cost is counted like a model's, and the peer is compared with the plain model in eager.
    assert [row["multiply_adds"] for row in rows[4:]] == [row["multiply_adds"] for row in rows[2:4]]
    assert rows[5]["ideal_speedup"] == rows[3]["ideal_speedup"] > 1
    for i in (0, 2):
        assert rows[i]["batches"][0]["speedup"]["median"] == 1
    assert set(rows[3]["batches"][0]["breakdown"]["shares"]) == {*PARTS, "rest"}
    assert rows[2]["batches"][0]["breakdown"] is None


def test_peers_are_exported_where_that_is_asked(one_layer_vit_folder, peers):
    pytest.importorskip("onnxruntime")
    settings = {"model": str(one_layer_vit_folder), "methods": ["none"], "r": ["4"], **ONCE}
    settings |= {"runtimes": ["eager", "onnxruntime"], "peer": [f"{peers}:plain"], "peer_runtimes": ["onnxruntime"]}
    rows = benchmark(BenchmarkArguments(**settings))["rows"]
    assert [(row["runtime"], row["method"]) for row in rows] == [
        ("eager", "none"),
        ("onnxruntime", "none"),
        ("onnxruntime", f"{peers}:plain"),
    ]
    assert rows[2]["ratio"] == 1 and rows[1]["batches"][0]["speedup"]["median"] == 1


def test_the_breakdown_sees_every_part_and_leaves_no_trace(make_classifier, pixels):
    model = attach(make_classifier(), DTEMConfig(r=6))
    before = dict(vars(ops))
    found = break_down(model, lambda: model(pixels), torch.device("cpu"), rounds=2, warmup=0)
    assert all(found["seconds"][part] > 0 for part in (*PARTS, "rest"))
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert dict(vars(ops)) == before
    assert "metric" not in vars(model.vit.merging.method)
    assert break_down(make_classifier(), lambda: None, torch.device("cpu"), rounds=1, warmup=0) is None


def test_merging_alone_does_what_the_plan_says(make_classifier):
    plan = attach(make_classifier(), ToMeConfig(r=[6, 0, 5, 4])).merge_plan()
    counts = [n for n, r in zip([plan.num_tokens, *plan.tokens], plan.reductions, strict=False) if r]
    noise = [torch.randn(2, n, 8) for n in counts]
    merged = MergingAlone(plan, 1)(noise, noise, [torch.ones(2, n) for n in counts])
    assert [x.shape[1] for x in merged[::2]] == [plan.tokens[i] for i in (0, 2, 3)]


def test_captioning_from_pixels_to_text(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    config = GitConfig(vision_config={**sizes, "image_size": 16, "patch_size": 4}, **sizes, vocab_size=110)
    config.save_pretrained(tmp_path)
    settings = {"methods": ["tome"], "r": ["2"], "batch_sizes": [1, 2], "rounds": 1, "warmup": 0}
    result = benchmark(
        BenchmarkArguments(model=str(tmp_path), random_weights=True, task="captioning", caption_tokens=3, **settings)
    )
    plain, merged = result["rows"]
    assert merged["output_tokens"] == 13 and "output_tokens" not in plain
    # The decoder reads fewer tokens, too.
    assert merged["multiply_adds"] < plain["multiply_adds"]
    assert "captions of 3 tokens" in markdown(result)


@pytest.mark.parametrize("kind", ["llava", "vipllava", "paligemma"])
def test_answering_with_all_tokens_and_with_merged_ones(kind, tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 4, "num_hidden_layers": 3}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": 30}
    fields = {"image_token_index": 9}
    if kind == "paligemma":
        fields |= {"projection_dim": 16, "hidden_size": 16}
        vision |= {"model_type": "siglip_vision_model", "projection_dim": 16, "vision_use_head": False}
        text |= {"model_type": "gemma", "head_dim": 8}
    else:
        vision |= {"model_type": "clip_vision_model"}
        text |= {"model_type": "llama"}
        fields |= {"vision_feature_layer": -2} if kind == "llava" else {"vision_feature_layers": [-2, -3]}
    AutoConfig.for_model(kind, vision_config=vision, text_config=text, **fields).save_pretrained(tmp_path / "config")
    settings = "--methods tome --r 2 --batch_sizes 1 2 --rounds 2 --warmup 0 --prompt_tokens 5 --answer_tokens 3"
    folders = ["--model", str(tmp_path / "config"), "--output_dir", str(tmp_path / "out")]
    main([*folders, "--task", "answering", "--random_weights", "True", "--device", "cpu", *settings.split()])
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [(row["method"], row["r"], row["tokens_read"]) for row in result["rows"]] == [
        ("none", None, "all"),
        ("tome", 2, "all"),
        ("tome", 2, "merged"),
    ]
    plain, everywhere, merged = (row["multiply_adds"] for row in result["rows"])
    assert plain > everywhere > merged  # the language model's prompt is shorter, too
    for row in result["rows"]:
        for batch in row["batches"]:
            assert batch["prefill_seconds"]["median"] > 0 and "decoding_seconds" in batch
    page = (tmp_path / "out" / "benchmark.md").read_text()
    assert "answers of 3 tokens to prompts of 5 tokens and an image" in page and "tome, merged tokens" in page
    assert re.search(r"prefill [\d.]+ ms, decoding -?[\d.]+ ms", page)
    assert (tmp_path / "out" / "speedup.png").stat().st_size > 0 and "answers/s" in capsys.readouterr().out


def test_what_a_language_model_reads_is_what_the_row_says(tmp_path):
    """The lengths of the prompts of all rows, at the language model's first layer."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
        text_config={**sizes, "model_type": "llama", "num_key_value_heads": 1, "vocab_size": 30},
        image_token_index=9,
    )
    model = LlavaForConditionalGeneration(config).eval()
    variants = make_variants(model, ["tome"], [2], [])
    merged = make_variants(model, ["tome"], [2], [], unmerge=False)[1:]
    entries = answering_entries(variants, merged, (3, 16, 16), prompt=5, length=3)
    lengths = []
    for entry in entries:
        layer = entry.model.model.language_model.layers[0]
        layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        assert entry.run(torch.randn(2, 3, 16, 16)).shape == (2, lengths[-3] + 3)
        entry.begin(torch.randn(1, 3, 16, 16))
    # The last layer is not read: one layer merges two of 16 tokens.
    assert lengths == [21, 1, 1, 21] * 2 + [19, 1, 1, 19]


def test_answering_takes_a_model_that_can_be_handed_merged_tokens(vit_folder):
    with pytest.raises(BadValue, match=r"task='answering'.*LLaVA.*not a ViTForImageClassification"):
        benchmark(BenchmarkArguments(model=str(vit_folder), task="answering", r=["2"], batch_sizes=[1]))


def test_captioning_takes_a_model_that_writes(vit_folder):
    with pytest.raises(BadValue, match=r"task='captioning'.*writes text"):
        benchmark(BenchmarkArguments(model=str(vit_folder), task="captioning", r=["2"], batch_sizes=[1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "module:function"),
        (":plain", "module:function"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("my_broken_peers:f", "no_such_library"),
        ("my_peers:missing", "my_peers, which has .*merged, nothing, plain"),
        ("my_peers:not_a_function", "a function of my_peers"),
    ],
)
def test_a_peer_that_cannot_be_had_is_named(peers, name, message):
    with pytest.raises(BadValue, match=message):
        load_function("peer", name)


def test_a_peer_that_returns_nothing_to_call(vit_folder, peers):
    with pytest.raises(BadValue, match="returns a callable, not NoneType"):
        benchmark(BenchmarkArguments(model=str(vit_folder), r=["2"], batch_sizes=[1], peer=[f"{peers}:nothing"]))


def test_a_config_is_enough_with_random_weights(tmp_path):
    ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    options = {"r": ["2"], "batch_sizes": [1], "rounds": 1, "warmup": 0, "image_size": 24}
    result = benchmark(BenchmarkArguments(model=str(tmp_path), random_weights=True, **options))
    assert result["image_size"] == [24, 24] and len(result["rows"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [4, 0]}, "batch_sizes"),
        ({"dtype": "int8"}, "dtype"),
        ({"runtimes": ["tensorrt"]}, "runtimes"),
        ({"runtimes": []}, "runtimes"),
        ({"compile_mode": "fast"}, "compile_mode"),
        ({"rounds": 0}, "rounds"),
        ({"caption_tokens": 0}, "caption_tokens"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"answer_tokens": 1}, "answer_tokens"),
        ({"task": "answering", "image_size": 64}, "image_size"),
        ({"runtimes": ["onnxruntime"], "dtype": "bfloat16", "device": "cpu"}, "dtype"),
        ({"runtimes": ["openvino"], "dtype": "bfloat16"}, "openvino_bfloat16"),
        ({"peer_runtimes": ["mine"]}, "peer_runtimes"),
        ({"task": "captioning", "runtimes": ["compile"]}, "task"),
        ({"peer": ["no_such_module:f"]}, "peer"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(BadValue, match=message):
        BenchmarkArguments(model="m", **change)


@pytest.mark.parametrize("folder", ["deit-small", "deit-tiny-batches"])
def test_no_figure_is_parted_from_its_unit_in_a_terminal(folder, capsys):
    path = Path(__file__).parents[2] / "docs" / "performance" / folder / "benchmark.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    print_benchmark(result)
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for line in lines if "│" in line for cell in line.split("│")]
    parted = [cell for cell in cells if re.search(r"(^|\s)(of|MiB|ms|%)(\s|$)", cell)]
    assert all(re.fullmatch(r"[\d.]+ (of ideal|MiB|ms|%)", cell) for cell in parted)
    batches = [batch for row in result["rows"] for batch in row["batches"]]
    assert sum(line.count(" of ideal") for line in lines) == sum(batch["of_ideal"] is not None for batch in batches)
