"""Convert an LV-ViT classifier, in its authors' layout, to `LVViTForImageClassification` with the same logits.

python recipes/convert_lv_vit.py --checkpoint lvvit_s-26M-224-83.3.safetensors --output_dir lv-vit-small

The layout is timm's, plus the stem's `patch_embed.conv{1,2,3}` and `bn{1,2,3}`, and `aux_head`, a head on every patch.
LV-ViT-S halves the output of attention and MLP before it adds them; for other sizes, give the factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import BadValue
from ..extra_models.lv_vit import LVViTConfig, LVViTForImageClassification
from ..programs.arguments import above_zero, option
from .checkpoint import ConvertArguments, Layout, check_heads, count_blocks, imagenet_processor, shape_of, side_of_grid


# Values that shapes do not show, by width and number of layers: heads, and the factor of residuals (LV-ViT-S).
PUBLISHED = {(384, 16): (6, 0.5)}
_CROP_SHARE = 0.9
_PATCHES = r"^vit\.embeddings\.patch_embeddings\."
_NAMES = (
    *((rf"{_PATCHES}stem\.{3 * i}\.", f"patch_embed.conv{i + 1}.") for i in range(3)),
    *((rf"{_PATCHES}stem\.{3 * i + 1}\.", f"patch_embed.bn{i + 1}.") for i in range(3)),
    (rf"{_PATCHES}projection\.", "patch_embed.proj."),
    (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^vit\.embeddings\.", ""),
    (r"^vit\.layers\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^token_classifier\.", "aux_head."),
)


@dataclass(kw_only=True)
class ConvertLVViTArguments(ConvertArguments):
    """Convert an LV-ViT classifier to one of this package with the same logits."""

    residual_scale: float | None = option(
        "factor of the outputs of attention and MLP; needed only for sizes other than LV-ViT-S", default=None
    )

    def __post_init__(self) -> None:
        above_zero(self, "residual_scale")


def lv_vit_config(
    tensors: Mapping[str, Tensor], num_attention_heads: int | None = None, residual_scale: float | None = None
) -> Any:
    """The config of a checkpoint, from the names and shapes of its tensors. Raises ValueError that names one."""
    width, stem_width, side, _ = shape_of(tensors, "patch_embed.proj.weight", (None, None, None, None))
    num_layers, patch_size = count_blocks(tensors, "blocks."), 2 * side
    heads, scale = PUBLISHED.get((width, num_layers), (num_attention_heads, residual_scale))
    heads, scale = num_attention_heads or heads, residual_scale or scale
    if heads is None or scale is None:
        fits = f"a number each for {num_layers} layers of width {width}; only LV-ViT-S is known (16 layers, width 384)"
        raise BadValue("num_attention_heads, residual_scale", (heads, scale), fits)
    return LVViTConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=check_heads(width, heads),
        intermediate_size=shape_of(tensors, "blocks.0.mlp.fc1.weight", (None, width))[0],
        image_size=side_of_grid(tensors, "pos_embed", width) * patch_size,
        patch_size=patch_size,
        stem_width=stem_width,
        residual_scale=scale,
        num_labels=shape_of(tensors, "head.weight", (None, width))[0],  # type: ignore[call-arg]
    )


LV_VIT = Layout(
    kind="an LV-ViT classifier",
    model_class=LVViTForImageClassification,
    names=_NAMES,
    config=lv_vit_config,
    processor=lambda config: imagenet_processor(config.image_size, _CROP_SHARE),
    title=lambda config: ("an LV-ViT", "from the CLS token and the patches"),
    arguments=ConvertLVViTArguments,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, save, and describe the model."""
    LV_VIT.convert(argv, __doc__)
