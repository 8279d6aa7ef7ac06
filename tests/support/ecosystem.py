"""The families as people use them: what the rows of `test_ecosystem.py` are made of, and the table of what holds.

    python tests/ecosystem.py   # writes docs/ecosystem.md

A cell of the table is what a row promises, and `test_ecosystem.py` holds every row to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    BeitConfig,
    BlipConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    GitConfig,
    GitVisionConfig,
    IJepaConfig,
    PretrainedConfig,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMSNConfig,
)

from dtem_hf import ToMeConfig
from dtem_hf.families import families
from dtem_hf.files import write_text


SIDE, PATCH, PATCHES = 24, 4, 36
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
NAFLEX = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": PATCHES}
DINO = {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", ".", "cat", "dog", "hen"]
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
BLIP_TEXT = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 3}
MERGE = ToMeConfig(r=6)
TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def images(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))}


def noisy_images(count: int) -> dict[str, Tensor]:
    """With the noise that decides which patches are masked."""
    return {**images(count), "noise": torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(3))}


def patches(count: int) -> dict[str, Tensor]:
    """Images of six by six patches, the first of five by six and with padding."""
    generator = torch.Generator().manual_seed(2)
    mask, shapes = torch.ones(count, PATCHES, dtype=torch.int32), torch.full((count, 2), 6)
    mask[0, 30:], shapes[0, 0] = 0, 5
    pixel_values = torch.randn(count, PATCHES, 3 * PATCH**2, generator=generator)
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@dataclass(frozen=True)
class Row:
    """One family: a small config for each of its config classes, and what goes into its encoder.

    `lacking` says of what does not hold ("export", "onnx") why, `eager_only` of what holds with eager attention only;
    from the transformers in `mended` on, it holds all the same.
    """

    name: str
    configs: tuple[PretrainedConfig, ...]
    encoder: str
    inputs: Callable[[int], dict[str, Tensor]] = images
    lacking: Mapping[str, str] = field(default_factory=dict)
    eager_only: Mapping[str, str] = field(default_factory=dict)
    mended: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, column: str) -> bool:
        """Whether something does not hold with the transformers that is installed."""
        mended = column in self.mended and Version(transformers.__version__) >= Version(self.mended[column])
        return column in self.lacking and not mended

    @property
    def encoder_class(self) -> Any:
        return getattr(transformers, self.encoder)

    def make(self, model_class: Any, attention: str | None = None) -> Any:
        """A plain model with random weights, always the same ones."""
        config = copy.deepcopy(next(config for config in self.configs if type(config) is model_class.config_class))
        config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return model_class(config).eval()


def relative_bias(**values: Any) -> dict[str, Any]:
    return {**values, "use_shared_relative_position_bias": True}


SDPA_ONNX = "torch.onnx cannot follow SDPA with a bias for every pair of tokens"
ROWS = [
    Row("vit", (ViTConfig(**VISION),), "ViTModel"),
    Row("deit", (DeiTConfig(**VISION),), "DeiTModel"),
    Row("vit_msn", (ViTMSNConfig(**VISION),), "ViTMSNModel"),
    Row(
        "vit_mae",
        (ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),),
        "ViTMAEModel",
        noisy_images,
    ),
    Row("ijepa", (IJepaConfig(**VISION),), "IJepaModel"),
    Row(
        "beit",
        (BeitConfig(**{**relative_bias(**VISION), "num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]}),),
        "BeitModel",
        eager_only={"onnx": SDPA_ONNX},
    ),
    Row(
        "data2vec_vision",
        (Data2VecVisionConfig(**relative_bias(**VISION)),),
        "Data2VecVisionModel",
        eager_only={"onnx": SDPA_ONNX},
    ),
    Row("dinov2", (Dinov2Config(**DINO),), "Dinov2Model"),
    Row("dinov2_with_registers", (Dinov2WithRegistersConfig(**DINO),), "Dinov2WithRegistersModel"),
    Row("dinov3_vit", (DINOv3ViTConfig(**VISION),), "DINOv3ViTModel"),
    Row(
        "clip",
        (CLIPVisionConfig(**VISION), CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)),
        "CLIPVisionModel",
    ),
    Row(
        "siglip",
        (SiglipVisionConfig(**VISION), SiglipConfig(vision_config=VISION, text_config=TEXT)),
        "SiglipVisionModel",
    ),
    Row(
        "siglip2",
        (Siglip2VisionConfig(**NAFLEX), Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
        "Siglip2VisionModel",
        patches,
        lacking={
            "export": "positions are resized image by image, in a loop over the batch",
            "onnx": "positions are resized in such a loop, or checked by an operator that torch.onnx has no form of",
        },
        mended={"export": "5.24"},
    ),
    Row("git", (GitVisionConfig(**VISION), GitConfig(vision_config=VISION, **TEXT)), "GitVisionModel"),
    Row(
        "blip",
        (BlipVisionConfig(**VISION), BlipConfig(vision_config=VISION, text_config=BLIP_TEXT, projection_dim=16)),
        "BlipVisionModel",
    ),
]


def models_of(row: Row) -> list[tuple[str, Any]]:
    """The models of a row's family with the Auto classes that yield them."""
    family = next(each for each in families() if row.encoder_class in each.all_models())
    return [(auto, model_class) for auto, group in family.models.items() for model_class in group]


def tasks_of(row: Row) -> list[tuple[str, str, Any]]:
    """Every task of a family; of those that have none but to see, the features."""
    found = [(TASKS[auto], auto, model_class) for auto, model_class in models_of(row) if auto in TASKS]
    bare = [("image-feature-extraction", auto, each) for auto, each in models_of(row) if auto == "AutoModel"]
    return found or bare


def exported_models(row: Row) -> list[Any]:
    """The encoder; of those that most people use, the classifier around it, too."""
    classifiers = [each for auto, each in models_of(row) if auto == "AutoModelForImageClassification"]
    return [row.encoder_class, *(classifiers if row.name in MOST_USED else [])]


MOST_USED = ("vit", "dinov2", "clip", "git")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
PREFACE = """# What holds with merging on

Written by `python tests/ecosystem.py` from the rows that `tests/test_ecosystem.py` tests, every cell on the family's
own code with small random weights. Pipelines run a merged model that is given, one that is loaded with
`model_kwargs={"merge": ...}` and one that was saved merged. Classes are those that take `merge=`: of `dtem_hf`, and of
transformers after `register()`. `device_map` is "cpu", "auto", or one with a layer on disk. Compiled and exported are
the encoders, and the classifiers of ViT, DINOv2 and CLIP; exports take any batch size, and onnxruntime runs the ONNX
file. "Eager only" means `attn_implementation="eager"`.
"""
COLUMNS = {
    "device_map": "`device_map`",
    "bfloat16": '`dtype="bfloat16"`',
    "compile": "`torch.compile(fullgraph=True)`",
    "export": "`torch.export`",
    "onnx": "ONNX",
}


def document() -> str:
    """What each family promises, in Markdown."""
    notes: dict[str, int] = {}

    def cell(row: Row, column: str) -> str:
        reason = row.lacking.get(column) or row.eager_only.get(column)
        if reason is None:
            return "yes"
        if column not in row.lacking:
            held = "eager only"
        elif column not in row.mended:
            held = "no"
        else:
            held, reason = "yes", f"from transformers {row.mended[column]} on; before, {reason}"
        return f"{held} [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = [
        " | ".join(["family", "pipelines", "classes", *COLUMNS.values()]),
        " | ".join(["---"] * (3 + len(COLUMNS))),
    ]
    for row in ROWS:
        tasks = ", ".join(dict.fromkeys(task for task, _, _ in tasks_of(row)))
        classes = ", ".join(dict.fromkeys(f"`{auto}`" for auto, _ in models_of(row)))
        lines.append(" | ".join([row.name, tasks, classes, *(cell(row, column) for column in COLUMNS)]))
    table = "\n".join(f"| {line} |" for line in lines)
    return "\n".join([PREFACE, table, "", *(f"[{number}] {reason}.  " for reason, number in notes.items())]) + "\n"


if __name__ == "__main__":
    write_text(DOCUMENT, document())
    print(f"written: {DOCUMENT}")
