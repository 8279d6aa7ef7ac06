"""The table of families: small models of the real classes, with random weights and no bias or scale that is neutral.

A new backbone is one row of `FAMILIES`, with its anatomy in `slow_anatomies`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.dinov2 import modeling_dinov2


# Before transformers took it out, a module more lay around its attention, and the activation had another name.
NESTED = ("dinov2",) if hasattr(modeling_dinov2, "Dinov2SelfAttention") else ()

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.2,
}
LABELLED = {**VISION, "num_labels": 10}
DINO = {name: value for name, value in LABELLED.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 32,
}
PATCHES = {**{name: value for name, value in VISION.items() if name != "image_size"}, "num_patches": 64}
OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
CLASSIFIER = "AutoModelForImageClassification"


@dataclass(frozen=True)
class Family:
    """The model class, its config, the Auto class that yields it (None: none does), and the output compared.

    `cls` says whether there is a CLS token, without which EViT is refused.
    """

    model: str
    config: Callable[[], Any]
    auto: str | None = CLASSIFIER
    output: str = "logits"
    attentions: tuple[str, ...] = ("eager", "sdpa")
    cls: bool = True


def towers(config: Any, vision: dict[str, Any] = VISION) -> Callable[[], Any]:
    return lambda: config(vision_config=vision, text_config=TEXT, num_labels=10)


FAMILIES: dict[str, Family] = {
    "vit": Family("ViTForImageClassification", lambda: hf.ViTConfig(**LABELLED)),
    "vit-bare": Family("ViTModel", lambda: hf.ViTConfig(**VISION), "AutoModel", "pooler_output"),
    "deit": Family("DeiTForImageClassification", lambda: hf.DeiTConfig(**LABELLED)),
    "deit-teacher": Family("DeiTForImageClassificationWithTeacher", lambda: hf.DeiTConfig(**LABELLED)),
    "vit_msn": Family("ViTMSNForImageClassification", lambda: hf.ViTMSNConfig(**LABELLED)),
    "vit_mae": Family(
        "ViTMAEModel", lambda: hf.ViTMAEConfig(**VISION, mask_ratio=0.25), "AutoModel", "last_hidden_state"
    ),
    "ijepa": Family("IJepaModel", lambda: hf.IJepaConfig(**VISION), "AutoModel", "last_hidden_state", cls=False),
    "ijepa-classifier": Family("IJepaForImageClassification", lambda: hf.IJepaConfig(**LABELLED), cls=False),
    **{
        f"{family}-{name}": Family(model, lambda config=config, bias=bias: config(**LABELLED, **bias))
        for name, bias in (("relative", OWN), ("shared", SHARED), ("both", OWN | SHARED), ("absolute", ABSOLUTE))
        for family, model, config in (
            ("beit", "BeitForImageClassification", hf.BeitConfig),
            ("data2vec", "Data2VecVisionForImageClassification", hf.Data2VecVisionConfig),
        )
    },
    "dinov2": Family("Dinov2ForImageClassification", lambda: hf.Dinov2Config(**DINO)),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersForImageClassification",
        lambda: hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3),
    ),
    "dinov3_vit": Family(
        "DINOv3ViTModel", lambda: hf.DINOv3ViTConfig(**VISION, num_register_tokens=4), "AutoModel", "pooler_output"
    ),
    "clip": Family("CLIPVisionModel", lambda: hf.CLIPVisionConfig(**VISION), "AutoModel", "pooler_output"),
    "clip-projection": Family(
        "CLIPVisionModelWithProjection", lambda: hf.CLIPVisionConfig(**VISION), None, "image_embeds"
    ),
    "clip-classifier": Family("CLIPForImageClassification", towers(hf.CLIPConfig)),
    "siglip": Family(
        "SiglipVisionModel", lambda: hf.SiglipVisionConfig(**VISION), "AutoModel", "pooler_output", cls=False
    ),
    "siglip-classifier": Family("SiglipForImageClassification", towers(hf.SiglipConfig), cls=False),
    "siglip2": Family(
        "Siglip2VisionModel", lambda: hf.Siglip2VisionConfig(**PATCHES), "AutoModel", "pooler_output", cls=False
    ),
    "siglip2-classifier": Family("Siglip2ForImageClassification", towers(hf.Siglip2Config, PATCHES), cls=False),
    # transformers knows eager attention alone for these two.
    "git": Family("GitVisionModel", lambda: hf.GitVisionConfig(**VISION), None, "last_hidden_state", ("eager",)),
    "blip": Family("BlipVisionModel", lambda: hf.BlipVisionConfig(**VISION), None, "pooler_output", ("eager",)),
}


def make(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """The family's model in `.eval()`, the same one every time; `changes` are made to its (vision) config."""
    row = FAMILIES[family]
    torch.manual_seed(1)
    config = row.config()
    for name, value in changes.items():
        setattr(getattr(config, "vision_config", config), name, value)
    config._attn_implementation = attention if attention in row.attentions else "eager"
    model = getattr(hf, row.model)(config).eval()
    for parameter in model.parameters():  # some start at zero: positions, biases by position
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def inputs_of(family: str, count: int, height: int = 32, width: int = 32) -> dict[str, Tensor]:
    """Images of noise, as the family takes them, in patches of 4 pixels."""
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, height, width, generator=draw)
    grid = (height // 4, width // 4)
    if family == "vit_mae":  # its mask is drawn from this noise
        return {"pixel_values": pixels, "noise": torch.rand(count, grid[0] * grid[1], generator=draw)}
    if family.startswith("siglip2"):  # patches as they come, and none of them padding
        flat = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return {
            "pixel_values": flat,
            "pixel_attention_mask": torch.ones(flat.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([grid] * count),
        }
    return {"pixel_values": pixels}
