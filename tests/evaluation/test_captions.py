"""Captions end to end with a small GIT: texts, visual tokens, costs, and what an interruption leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM

from dtem_hf import AutoModelForCausalLM, BadValue, ToMeConfig
from dtem_hf.evaluation import captions
from dtem_hf.evaluation.captions import EvaluateCaptionsArguments, evaluate_captions, main
from dtem_hf.evaluation.captions_generation import count_generation
from dtem_hf.evaluation.captions_scoring import METRICS
from dtem_hf.evaluation.variants import make_variants
from dtem_hf.opening import load_processor
from dtem_hf.training.small_git import make_tokenizer
from tests.support.runs import flags, watch


WORDS = "a man woman dog cat on in the red blue street beach runs sits two with ball"


@pytest.fixture(scope="module")
def git_folder(tmp_path_factory):
    """A GIT with random weights that are large enough to say different things of different images."""
    folder = tmp_path_factory.mktemp("git")
    tokenizer = make_tokenizer([WORDS], 60)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = GitForCausalLM(
        GitConfig(
            vision_config={**small, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
            **small,
            num_hidden_layers=1,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Nine images with two captions each, in COCO's format."""
    folder = tmp_path_factory.mktemp("coco")
    draw = np.random.default_rng(0)
    annotations = []
    for i in range(9):
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 30)).save(folder / f"{i}.png")
        annotations += [{"image_id": 100 + i, "caption": " ".join(draw.permutation(WORDS.split())[:6])} for _ in "ab"]
    images = [{"id": 100 + i, "file_name": f"{i}.png"} for i in range(9)]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture
def options(git_folder, coco, tmp_path, monkeypatch):
    # METEOR takes seconds to start; without Java nothing is scored, and the captions are what matters here.
    monkeypatch.setenv("PATH", str(tmp_path))
    return {
        "model": str(git_folder),
        "images": str(coco),
        "annotations": str(coco / "annotations.json"),
        "methods": ["none", "tome"],
        "r": ["2", "4"],
        "batch_size": 4,
        "max_new_tokens": 6,
        "num_workers": 0,
        "output_dir": str(tmp_path / "out"),
    }


def by_hand(git_folder, coco, merge, **settings):
    """One image at a time by a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(git_folder, merge=merge).eval()
    processor = load_processor(str(git_folder))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(git_folder)
    found = {}
    for i in range(9):
        pixels = processor(images=Image.open(coco / f"{i}.png").convert("RGB"), return_tensors="pt").pixel_values
        tokens = model.generate(pixel_values=pixels, max_new_tokens=6, do_sample=False, **settings)
        found[100 + i] = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    return found


def results(folder, name):
    return {entry["image_id"]: entry["caption"] for entry in json.loads((Path(folder) / name).read_text())}


def test_result_files_hold_what_each_model_says_alone(options, git_folder, coco):
    result = evaluate_captions(EvaluateCaptionsArguments(**options))
    assert [row["results"] for row in result["rows"]] == [
        "results_none.json",
        "results_tome-r-2.json",
        "results_tome-r-4.json",
    ]
    settings = {"num_beams": 4, "length_penalty": 0.6}
    for row, merge in zip(result["rows"], [None, ToMeConfig(r=2), ToMeConfig(r=4)], strict=True):
        assert results(options["output_dir"], row["results"]) == by_hand(git_folder, coco, merge, **settings)
    texts = [tuple(results(options["output_dir"], row["results"]).values()) for row in result["rows"]]
    assert len(set(texts)) == 3 and len(set(texts[0])) > 1
    assert [row["visual_tokens"] for row in result["rows"]] == [17, 11, 5]
    assert all(row[metric] is None for row in result["rows"] for metric in METRICS)
    assert set(result["reasons"]) == set(METRICS) and result["generation"]["num_beams"] == 4
    assert not (Path(options["output_dir"]) / "parts").exists()


def test_costs_of_encoder_and_decoding(options, git_folder):
    model = AutoModelForCausalLM.from_pretrained(git_folder, merge=None).eval()
    pixels = torch.zeros(1, 3, 32, 32)
    greedy = {"num_beams": 1, "max_new_tokens": 6, "do_sample": False}
    plain, merged = (count_generation(row, pixels, greedy) for row in make_variants(model, ["none", "tome"], [4], []))
    plans = [row.plan for row in make_variants(model, ["none", "tome"], [4], [])]
    # What the plan counts is the model without its decoder's repeated steps: the difference is the encoder's.
    saved = plain["encoder_multiply_adds"] - merged["encoder_multiply_adds"]
    assert 0 < saved <= plans[0].multiply_adds - plans[1].multiply_adds
    patches, width = 16, 32
    stem, layer = patches * 3 * 64 * width, 17 * 8 * width**2 + 2 * 17**2 * width
    assert plain["encoder_multiply_adds"] == stem + 3 * layer
    assert 0 < merged["decoding_multiply_adds"] < plain["decoding_multiply_adds"]


def test_an_interrupted_run_goes_on_where_it_stopped(options, monkeypatch):
    expected = evaluate_captions(EvaluateCaptionsArguments(**options))
    files = {row["results"]: results(options["output_dir"], row["results"]) for row in expected["rows"]}
    shutil.rmtree(options["output_dir"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        done = watch(patched, captions, "caption_batch", stop_behind=2)
        evaluate_captions(EvaluateCaptionsArguments(**options))
    with pytest.raises(BadValue, match="settings="):
        evaluate_captions(EvaluateCaptionsArguments(**{**options, "max_new_tokens": 5}))
    later = watch(monkeypatch, captions, "caption_batch")
    evaluate_captions(EvaluateCaptionsArguments(**options))
    assert [batch["image_id"].tolist() for batch in done] == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert [batch["image_id"].tolist() for batch in later] == [[108]]
    for name, texts in files.items():
        assert results(options["output_dir"], name) == texts


def test_captions_of_other_images_are_not_gone_on_with(options, coco, tmp_path, monkeypatch):
    for path in coco.iterdir():
        shutil.copy(path, tmp_path)
    options = {**options, "images": str(tmp_path)}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        watch(patched, captions, "caption_batch", stop_behind=1)
        evaluate_captions(EvaluateCaptionsArguments(**options))
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "8.png")
    with pytest.raises(BadValue, match=r"images=.*the unfinished run"):
        evaluate_captions(EvaluateCaptionsArguments(**options))


def test_program_writes_and_shows_the_table(options, monkeypatch, capsys):
    main(flags(options, r=["2"], limit=4, num_beams=1))
    result = json.loads((Path(options["output_dir"]) / "captions.json").read_text())
    assert result["data"]["num_images"] == 4 and len(result["rows"]) == 2
    assert "length_penalty" not in result["generation"]
    shown = capsys.readouterr().out
    assert "visual tokens" in shown
    assert shown.index("METEOR will be null") < shown.index("visual tokens") and "no java on the PATH" in shown


def test_scoring_alone_says_how_many_images_it_scored(coco, options, tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": 101, "caption": "a dog"}]))
    main(
        [
            *["--annotations", str(coco / "annotations.json"), "--predictions", str(tmp_path / "p.json")],
            *["--output", str(tmp_path / "s.json")],
        ]
    )
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["num_images"], scores["num_annotated_images"]) == (1, 9)
    assert "1 of 9 images have a prediction" in capsys.readouterr().out


def test_images_that_are_missing_or_outside_the_folder_are_named(options, coco, tmp_path):
    content = json.loads((coco / "annotations.json").read_text())
    content["images"][3]["file_name"] = "absent.png"
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"1 of 9 images are not in .*absent\.png"):
        evaluate_captions(EvaluateCaptionsArguments(**{**options, "annotations": str(tmp_path / "a.json")}))
    content["images"][3]["file_name"] = "../outside.png"
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(BadValue, match="a file inside the folder"):
        evaluate_captions(EvaluateCaptionsArguments(**{**options, "annotations": str(tmp_path / "a.json")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "exactly one"),
        ({"predictions": "p.json"}, "exactly one"),
        ({"images": None}, "images=None"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"limit": 0}, "limit=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_bad_options_are_named(options, change, message):
    with pytest.raises(BadValue, match=message):
        captions.EvaluateCaptionsArguments(**{**options, **change})
