"""Every YAML file is complete, and those of published recipes hold their numbers (docs/method.md section 5)."""

from pathlib import Path

import pytest
import yaml

from dtem_hf.programs.arguments import read_arguments
from dtem_hf.training.arguments import TrainArguments


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
EMBEDDING = {"lr": 1e-4, "min_lr": 1e-6, "weight_decay": 1e-4, "max_grad_norm": 5.0, "warmup_steps": 0}
IMAGENET = {
    **EMBEDDING,
    "task": "classification",
    "data": "ILSVRC/imagenet-1k",
    "batch_size": 128,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.0,
    "augmentation": "randaugment",
}
PUBLISHED = {
    **{
        f"deit_{size}_imagenet1k.yaml": {
            **IMAGENET,
            "model": f"facebook/deit-{size}-patch16-224",
            "r": "16",
            "epochs": 30,
        }
        for size in ("tiny", "small", "base")
    },
    **{
        f"deit_{size}_end_to_end.yaml": {**IMAGENET, "train_backbone": True, "r": "16", "epochs": 100}
        for size in ("tiny", "small")
    },
    **{
        f"mae_{size}_imagenet1k.yaml": {**IMAGENET, "epochs": 30, "proportional_attention": False}
        for size in ("base", "large")
    },
    "lv_vit_small_imagenet1k.yaml": {**IMAGENET, "epochs": 30},
    "segmenter_small_ade20k.yaml": EMBEDDING,
    **{
        f"git_{size}_coco.yaml": {
            **EMBEDDING,
            "task": "captioning",
            "model": f"microsoft/git-{size}-coco",
            "split": "train+restval",  # Karpathy's 113,287; train alone has 82,783
        }
        for size in ("base", "large")
    },
}


def training_configs():
    return sorted(path.name for path in CONFIGS.glob("*.yaml") if "task" in yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("name", training_configs())
def test_config_is_complete_and_is_launched_by_the_command_in_it(name):
    arguments = read_arguments(TrainArguments, ["--config", str(CONFIGS / name)], "")
    assert arguments.model and arguments.data and arguments.output_dir.startswith("runs/")
    assert f"recipes/train.py --config recipes/configs/{name}" in (CONFIGS / name).read_text()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipes_hold_the_published_numbers(name):
    arguments = read_arguments(TrainArguments, ["--config", str(CONFIGS / name)], "")
    for option, value in PUBLISHED[name].items():
        assert getattr(arguments, option) == value, option


def test_epochs_of_imagenet_are_the_steps_that_the_files_name():
    assert round(30 * 1_281_167 / (8 * 128)) == 37_534
    assert round(100 * 1_281_167 / (8 * 128)) == 125_114
