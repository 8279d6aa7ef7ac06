"""Every YAML file in recipes/configs starts: its program takes a step, or measures, on small random models.

Model, data, size and length of the run come from the command line; all else is what the file says.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessorPil,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessorPil,
)

from dtem_hf import DTEMConfig, attach
from dtem_hf.convert import checkpoint, lv_vit
from dtem_hf.evaluation import analyze, calibrate, captions, comparison, segmentation
from dtem_hf.extra_models import (
    LVViTConfig,
    LVViTForImageClassification,
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
)
from dtem_hf.models.auto import auto_class
from dtem_hf.programs.arguments import read_arguments
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from recipes import training_table


ROOT = Path(__file__).parents[2]
CONFIGS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("recipes/configs/*.yaml"))}
TRAINED = [name for name, values in CONFIGS.items() if "task" in values]
PROGRAMS = {
    "imagenet1k_comparison.yaml": comparison,
    "imagenet1k_ablation.yaml": comparison,
    "imagenet1k_correlation.yaml": analyze,
    "coco_captions.yaml": captions,
}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory):
    """16 images of noise, all of them with a label."""
    folder, draw = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    lines = ["file,label"]
    for i in range(16):
        Image.fromarray(draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{i % 5}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(vit_folder, git_folder, tmp_path_factory):
    """A small model of each family, by the first word of the files that are for it."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    # What recipes/convert_mae.py makes of a classifier.
    config = BeitConfig(
        **sizes,
        image_size=32,
        patch_size=8,
        num_labels=5,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.0,
    )
    BeitForImageClassification(config).save_pretrained(folder / "mae")
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder / "mae")
    dinov2 = Dinov2Config(**sizes, image_size=32, patch_size=8, mlp_ratio=2)
    Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    BitImageProcessorPil(size=SIZE, do_center_crop=False).save_pretrained(folder / "dinov2")
    # The saliency head beside its encoder: three transposed convolutions, their norms, and one that ends in a map.
    tensors = {"final_conv.weight": torch.randn(1, 4, 1, 1), "final_conv.bias": torch.zeros(1)}
    for i, (inner, outer) in enumerate(((32, 6), (6, 5), (5, 4)), start=1):
        up, norm = torch.nn.ConvTranspose2d(inner, outer, 4), torch.nn.BatchNorm2d(outer)
        tensors |= {f"upconv{i}.{name}": value for name, value in up.state_dict().items()}
        tensors |= {f"bn{i}.{name}": value for name, value in norm.state_dict().items()}
    save_file(tensors, folder / "dinov2" / "decoder.safetensors")
    lv_vit = LVViTConfig(**sizes, image_size=32, patch_size=8, stem_width=8, num_labels=5)
    LVViTForImageClassification(lv_vit).save_pretrained(folder / "lv")
    ViTImageProcessorPil(size=SIZE).save_pretrained(folder / "lv")
    segmenter = SegmenterConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    SegmenterForSemanticSegmentation(segmenter).save_pretrained(folder / "segmenter")
    processor = BeitImageProcessorPil(size=SIZE, do_center_crop=False, do_reduce_labels=True)
    processor.save_pretrained(folder / "segmenter")
    made = {name: folder / name for name in ("mae", "dinov2", "lv", "segmenter")}
    return {"deit": vit_folder, "git": git_folder, **made}


@pytest.fixture(scope="module")
def karpathy(captioned_folder, tmp_path_factory):
    """The captioned images in Karpathy's format: 12 to learn from in two splits, 6 to validate on, 6 to test on."""
    path = tmp_path_factory.mktemp("karpathy") / "dataset_coco.json"
    splits = ["train", "restval", "val", "test"] * 6
    images = [
        {"split": split, "imgid": i, "filename": f"{i}.png", "sentences": [{"raw": f"red left of blue {i}"}]}
        for i, split in enumerate(splits)
    ]
    path.write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    return path


def family_of(name):
    return name.removeprefix("small_").partition("_")[0]


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_recipe_takes_a_step(
    name, models, labelled_folder, captioned_folder, karpathy, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])  # of the head in recipes/
    monkeypatch.setenv("DINOV2_SALIENCY", str(models["dinov2"]))
    asked, model = CONFIGS[name], models[family_of(name)]
    small = {"batch_size": 4, "validation_size": 4, "validate_every": 1, "num_workers": 0, "glance_every": 0}
    changed = {"model": model, "data": labelled_folder, "output_dir": tmp_path / "run", **small}
    changed |= {"epochs": 0.01} if "epochs" in asked else {"steps": 1}
    if "captions" in asked:
        karpathys = "split" in asked
        changed |= {"data": captioned_folder}
        changed |= {"captions": karpathy if karpathys else captioned_folder / "captions.txt"}
    if "validation_data" in asked:
        changed |= {"validation_data": labelled_folder}
    if "start_from" in asked:  # adapters of the recipes before it
        aggregates = "straight" in name  # the recipe before that one has learned exponents and norms
        loaded = auto_class(AutoConfig.from_pretrained(model)).from_pretrained(model)
        config = DTEMConfig(learn_exponents=aggregates, learn_norms=aggregates)
        attach(loaded, config).save_merge_adapter(tmp_path / "start")
        changed |= {"start_from": tmp_path / "start"}
    summary = train(
        read_arguments(TrainArguments, ["--config", str(ROOT / "recipes/configs" / name), *words(**changed)], "")
    )
    assert summary["steps"] == 1 and summary["images_seen"] == 4
    kept = {key: value for key, value in asked.items() if key not in {*changed, "r"}}
    assert {key: summary["arguments"][key] for key in kept} == kept
    assert summary["arguments"]["r"] == (None if asked.get("method") == "dtps" else str(asked["r"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(next(line["loss"] for line in lines if "loss" in line))
    assert sorted(line["step"] for line in lines if "validation" in line) == [0, 1]
    assert (tmp_path / "run" / "adapter" / "merge_adapter.safetensors").is_file()
    assert (tmp_path / "run" / "model").is_dir() == asked.get("train_backbone", False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_measuring_recipe_measures(
    name, make_classifier, git_folder, labelled_folder, captioned_folder, karpathy, tmp_path, monkeypatch
):
    # Without Java nothing is scored, and the captions are what matters here.
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    asked, folder, adapter, output = CONFIGS[name], git_folder, tmp_path / "adapter", tmp_path / "out"
    if "images" not in asked:  # as many layers as the published models have, for all shares of the multiply-adds
        folder = tmp_path / "model"
        make_classifier(num_hidden_layers=12, num_labels=5).save_pretrained(folder)
        ViTImageProcessorPil(size=SIZE).save_pretrained(folder)
    model = attach(auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder), DTEMConfig())
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_merge_adapter(adapter)
    changed = {"model": folder, "limit": 4, "batch_size": 2, "output_dir": output}
    if "images" in asked:
        changed |= {"images": captioned_folder, "annotations": karpathy, "adapter": adapter, "max_new_tokens": 3}
    else:
        changed |= {"data": labelled_folder, "adapters" if "flops" in asked else "adapter": adapter}
    changed |= {"num_workers": 0} if "num_workers" in asked else {"pictures": 1}
    PROGRAMS[name].main(["--config", str(ROOT / "recipes/configs" / name), *words(**changed)])
    (path,) = [path for path in output.glob("*.json") if not path.name.startswith("results_")]
    result = json.loads(path.read_text())
    assert result["data"]["num_images"] == 4
    if name == "imagenet1k_correlation.yaml":
        assert [row["blocks"] for row in result["rows"]] == ["1–4", "5–8", "9–12"]
        assert all(row["after"] < 0.99 < row["before"] for row in result["rows"])  # it starts from keys
        return
    methods = ["tome", "soft", "dtem"] if asked.get("ablation") else asked["methods"][1:]
    amounts = asked["r"] if "r" in asked else asked["flops"]
    for method in methods:
        rows = [row for row in result["rows"] if row["method"] == method]
        found = [row["r"] if "r" in asked else row["r"]["flops"] for row in rows]
        assert found == amounts, method
        if "flops" in asked and method != "soft":
            assert [row["ratio"] for row in rows] == pytest.approx(amounts, abs=0.06), method


def test_the_recipe_of_a_models_own_segmentation_measures(models, tmp_path):
    folder, draw = models["segmenter"], np.random.default_rng(0)
    for part, shape in (("images", (36, 48, 3)), ("masks", (36, 48))):
        (tmp_path / part).mkdir()
        for i in range(3):
            Image.fromarray(draw.integers(0, 6, shape, dtype=np.uint8)).save(tmp_path / part / f"{i}.png")
    adapter = attach(SegmenterForSemanticSegmentation.from_pretrained(folder), DTEMConfig())
    adapter.save_merge_adapter(tmp_path / "adapter")
    changed = {"model": folder, "test": tmp_path, "adapter": tmp_path / "adapter", "output_dir": tmp_path / "out"}
    config = ROOT / "recipes/configs/ade20k_comparison.yaml"
    segmentation.main(["--config", str(config), *words(**changed)])
    rows = json.loads((tmp_path / "out" / "segmentation.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "tome", "tome", "dtem", "dtem"]
    assert rows[0]["ratio"] == 1 > rows[1]["ratio"] > rows[2]["ratio"]
    assert all(0 <= row["miou"] <= 100 for row in rows)


def test_the_rows_of_the_training_table_are_options_of_its_programs():
    values = CONFIGS["training_table.yaml"]
    names = {
        program: {field.name for field in dataclasses.fields(kind)}
        for program, kind in {None: TrainArguments, "calibrate": calibrate.CalibrateArguments}.items()
    }
    assert set(values["common"]) <= names[None]
    for row in values["rows"]:
        assert set(row) <= {field.name for field in dataclasses.fields(training_table.Row)}
        assert set(row.get("options", {})) <= names[row.get("program")], row["name"]


def test_every_file_is_started_here():
    assert set(CONFIGS) == {*TRAINED, *PROGRAMS, "ade20k_comparison.yaml", "training_table.yaml"}


def test_every_command_of_the_papers_tables_is_one_that_its_program_takes():
    """The commands in recipes/paper/README.md, word by word; each names one file, and that file tells the program."""
    page = (ROOT / "recipes/paper/README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]
    kinds = {
        "train.py": TrainArguments,
        "compare.py": comparison.CompareArguments,
        "analyze.py": analyze.AnalyzeArguments,
        "evaluate_captions.py": captions.EvaluateCaptionsArguments,
        "evaluate_segmentation.py": segmentation.SegmentationArguments,
        "convert_mae.py": checkpoint.ConvertArguments,
        "convert_lv_vit.py": lv_vit.ConvertLVViTArguments,
        "convert_segmenter.py": checkpoint.ConvertArguments,
    }
    used = set()
    for command in commands:
        program = next(i for i, word in enumerate(command) if word.startswith("recipes/"))
        options = command[program + 1 :]
        if "--config" in options:
            place = options.index("--config") + 1
            used.add(Path(options[place]).name)
            options[place] = str(ROOT / options[place])
        read_arguments(kinds[Path(command[program]).name], options, "")
    tables = ("imagenet1k", "coco", "end_to_end", "ade20k")
    assert used == {name for name in CONFIGS if any(word in name for word in tables)}
