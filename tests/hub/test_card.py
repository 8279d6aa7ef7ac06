"""Model cards, read back by huggingface_hub, PyYAML and a Markdown parser, against the JSON they are made of."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

import dtem_hf
from dtem_hf.hub.card import card_of
from dtem_hf.hub.facts import BackboneFacts
from dtem_hf.labels import reduction_label


pytestmark = pytest.mark.usefixtures("offline")
BASE = "facebook/deit-tiny-patch16-224"


def facts(**changes) -> BackboneFacts:
    values = {"model_type": "vit", "num_layers": 12, "hidden_size": 192, "base_model": BASE, "base_revision": "1a2b3c"}
    return BackboneFacts(**{**values, **changes})


def row(method, r, top1, multiply_adds, **changes) -> dict:
    values = {
        "method": method,
        "r": r,
        "top1": top1,
        "top5": None if top1 is None else top1 + 11.123456789,
        "agreement": 91.25,
        "kl": 0.0123456,
        "multiply_adds": multiply_adds,
        "ratio": multiply_adds / 1_258_000_000,
        "tokens": 50,
        "images_per_second": 123.456,
        "speedup": 1.5,
    }
    return {**values, **changes}


def evaluation(**changes) -> dict:
    rows = [row("none", None, 78.5, 1_258_000_000)]
    for r, madds in ((8, 927_000_000), (16, 636_000_000), ({"kind": "flops", "flops": 0.4}, 503_200_000)):
        rows += [row("dtem", r, 75.123456789 + madds / 1e10, madds + 1000), row("tome", r, 74.5, madds)]
    values = {
        "command": "recipes/evaluate.py --model m --r 8 16",
        "model": {"name": "deit-tiny", "model_type": "vit", "num_parameters": 5_717_416},
        "adapter": "runs/adapter",
        "data": {"name": "ILSVRC/imagenet-1k", "num_images": 50_000, "labelled": True},
        "image_size": [224, 320],
        "batch_size": 16,
        "device": "cpu",
        "threads": 2,
        "dtype": "float32",
        "versions": {"dtem_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "rows": rows,
    }
    return {**values, **changes}


def training(**changes) -> dict:
    values = {
        "command": "recipes/train.py --steps 400",
        "arguments": {"lr": 5e-4, "r": "16", "betas": [0.9, 0.999], "data": "me/photos"},
        "data": {"name": "me/photos", "num_images": 3080},
        "steps": 400,
        "images_seen": 12_800,
        "seconds": 310.4,
        "best_step": 300,
        "best_validation": {"kl": 0.123456},
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        "hardware": "x86_64 CPU, 2 threads",
    }
    return {**values, **changes}


def saved(card: ModelCard, tmp_path) -> ModelCard:
    """A card written and read back, with the metadata parsed by PyYAML alone as a witness."""
    card.save(tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    read = ModelCard.load(tmp_path / "card.md")
    assert yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]) == read.data.to_dict()
    return read


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the Markdown table whose first header is `first`."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_metadata_reads_back(tmp_path):
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(), evaluation(), training=training()), tmp_path)
    assert card.data.library_name == "dtem-hf"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == BASE
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["token-merging", "dtem", "vit"]
    assert card.data.datasets == ["me/photos"]
    for name in (card.data.base_model, *card.data.datasets):
        validate_repo_id(name)


def test_model_index_holds_the_figures_of_the_json(tmp_path):
    record = evaluation()
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(), record), tmp_path)
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "dtem-deit-tiny-patch16-224"
    found = {(json.dumps(x.metric_args["r"]), x.metric_args["top_k"]): x.metric_value for x in results}
    assert found == {
        (json.dumps(x["r"]), top_k): x[key]
        for x in record["rows"]
        if x["method"] == "dtem"
        for key, top_k in (("top1", 1), ("top5", 5))
    }
    assert len(results) == 6 and len({x.metric_name for x in results}) == 6
    assert {(x.task_type, x.dataset_type, x.dataset_name, x.metric_type) for x in results} == {
        ("image-classification", "ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k", "accuracy")
    }


def test_the_table_holds_every_row(tmp_path):
    record = evaluation()
    header, rule, *cells = table(card_of(dtem_hf.DTEMConfig(), facts(), record).text, "Method")
    assert header[:4] == ["Method", "Reduction", "Top-1 (%)", "Top-5 (%)"] and len(rule) == len(header) == 8
    names = {"none": "unmerged", "tome": "ToMe", "dtem": "DTEM"}
    labels = {"null": "–", "8": "r=8", "16": "r=16", '{"kind": "flops", "flops": 0.4}': "flops=0.4"}
    expected = [
        [
            names[x["method"]],
            labels[json.dumps(x["r"])],
            f"{x['top1']:.2f}",
            f"{x['top5']:.2f}",
            "91.25",
            "0.0123",
            f"{x['multiply_adds'] / 1e9:.3f} ({x['ratio']:.2f}×)",
            "123.5 (1.50×)",
        ]
        for x in record["rows"]
    ]
    assert sorted(cells) == sorted(expected)
    assert [cell[0] for cell in cells] == ["unmerged", *["ToMe", "DTEM"] * 3]
    assert [cell[1] for cell in cells] == ["–", "r=8", "r=8", "r=16", "r=16", "flops=0.4", "flops=0.4"]


def test_the_body_holds_the_conditions_and_the_training_record():
    text = card_of(dtem_hf.DTEMConfig(r=16), facts(), evaluation(), training=training()).text
    for part in (
        "50,000 of `ILSVRC/imagenet-1k`, 224×320 pixels",
        "`cpu`, 2 threads, batch size 16, `float32`",
        "`recipes/evaluate.py --model m --r 8 16`",
        "`recipes/train.py --steps 400`",
        "`me/photos`, 3,080 images",
        "- Seed: 7",
        "- Steps: 400",
        "- Images seen: 12,800",
        "- Best step: 300",
        "`kl` 0.1235",
        "`x86_64 CPU, 2 threads`",
        "`torch 2.13.0`",
        "\nlr: 0.0005\n",
        "\nbetas: [0.9, 0.999]\n",
        "12 layers, width 192",
        "`1a2b3c`",
        '"r": 16',
    ):
        assert part in text, part


def test_the_usage_is_three_lines_of_python():
    def usage(**kwargs) -> str:
        card = card_of(dtem_hf.DTEMConfig(), facts(base_model=kwargs.pop("base", BASE)), None, **kwargs)
        return re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)[1]

    code = usage(repo_id="me/my-adapter")
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3
    assert f'AutoModelForImageClassification.from_pretrained("{BASE}", merge="me/my-adapter")' in code
    assert 'from_pretrained("your/backbone", merge="user/repo")' in usage(base=None)
    with pytest.raises(ValueError, match="repo_id"):
        usage(repo_id='x", trust_remote_code=True) #')


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("zero-shot-image-classification", "AutoModelForZeroShotImageClassification"),
        ("image-text-to-text", "AutoModelForImageTextToText"),
        ("image-feature-extraction", "AutoModel"),
    ],
)
def test_the_task_of_the_evaluation_is_the_pipeline_tag(tmp_path, task, auto_class):
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(), evaluation(task=task)), tmp_path)
    assert card.data.pipeline_tag == task
    assert card.data.eval_results[0].task_type == task
    assert f"from dtem_hf import {auto_class}\n" in card.text
    assert hasattr(dtem_hf, auto_class)


@pytest.mark.parametrize(
    ("task", "unmerge", "auto_class"),
    [
        ("fisher", None, "AutoModelForImageClassification"),
        ("feature_fisher", None, "AutoModel"),
        ("feature_fisher", False, "AutoModelForImageTextToText"),
        ("captioning", None, "AutoModelForImageTextToText"),
        ("contrastive", None, "AutoModelForZeroShotImageClassification"),
    ],
)
def test_without_an_evaluation_the_training_says_what_a_model_is_for(task, unmerge, auto_class):
    card = card_of(dtem_hf.DTEMConfig(unmerge=unmerge), facts(), None, training={"arguments": {"task": task}})
    assert f"from dtem_hf import {auto_class}\n" in card.text


def test_an_adapter_that_was_not_evaluated_says_so(tmp_path):
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(), None), tmp_path)
    assert "\nNot evaluated.\n" in card.text and "\nNot recorded.\n" in card.text
    assert card.data.eval_results is None and card.data.datasets is None
    assert (
        "Top-1" not in card.text and "Not evaluated" not in card_of(dtem_hf.DTEMConfig(), facts(), evaluation()).text
    )


def test_without_labels_there_is_no_accuracy(tmp_path):
    rows = [{**x, "top1": None, "top5": None} for x in evaluation()["rows"]]
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(), evaluation(rows=rows)), tmp_path)
    assert card.data.eval_results is None and card.data.metrics is None
    assert "Top-1" not in card.text and "no labels" in card.text
    assert len(table(card.text, "Method")) == 2 + len(rows)


def test_rows_that_were_not_timed_have_no_speed():
    rows = [row("none", None, 78.5, 10**9, images_per_second=None, speedup=None)]
    assert table(card_of(dtem_hf.DTEMConfig(), facts(), evaluation(rows=rows)).text, "Method")[2][-1] == "–"


def test_a_training_record_with_gaps():
    text = card_of(dtem_hf.DTEMConfig(), facts(), None, training={"steps": 3}).text
    assert "- Steps: 3" in text and "None" not in text and "Seed" not in text


@pytest.mark.parametrize("name", ["/home/me/deit", "../deit", "deit tiny", "a/b/c", "x.git"])
def test_a_backbone_that_is_no_hub_id_is_not_in_the_metadata(tmp_path, name):
    card = saved(card_of(dtem_hf.DTEMConfig(), facts(base_model=name), evaluation()), tmp_path)
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()


def test_names_of_folders_are_no_datasets(tmp_path):
    record = training(data={"name": "photos", "num_images": 10})
    assert saved(card_of(dtem_hf.DTEMConfig(), facts(), None, training=record), tmp_path).data.datasets is None


def test_tokens_and_folders_of_the_machine_are_not_published():
    record = training(
        command="train.py --data /home/alice/My/data --hub_token hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
        arguments={
            "output_dir": "~/runs/secret/x",
            "token": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
            "url": "https://a.example/b/c",
        },
    )
    text = str(card_of(dtem_hf.DTEMConfig(), facts(), evaluation(command="evaluate.py /srv/alice/d"), training=record))
    assert "AbCdEf" not in text and "alice" not in text and "secret" not in text
    assert "--data …/data" in text and "https://a.example/b/c" in text


def test_pictures_are_shown():
    text = card_of(
        dtem_hf.DTEMConfig(), facts(), None, pictures={"Merged [tokens]": "pictures/merged_tokens.v2.png"}
    ).text
    assert r"![Merged \[tokens\]](pictures/merged_tokens.v2.png)" in text


@pytest.mark.parametrize(
    ("r", "label"),
    [
        (None, "–"),
        (16, "r=16"),
        ([4, 3, 2], "r=[4, 3, 2]"),
        ({"kind": "flops", "flops": 0.5}, "flops=0.5"),
        ({"kind": "flops", "flops": 0.5, "slope": 0.25}, "flops=0.5 slope=0.25"),
        ({"kind": "linear", "r": 8}, "linear r=8"),
        ({"kind": "inflected", "r": 13, "inflection": 0.5}, "inflected r=13 inflection=0.5"),
    ],
)
def test_labels_of_schedules(r, label):
    assert reduction_label(r) == label
