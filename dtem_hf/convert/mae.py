"""Convert an MAE fine-tuned classifier, in its authors' layout, to a BEiT of transformers with the same logits.

python recipes/convert_mae.py --checkpoint mae_finetuned_vit_base.safetensors --output_dir mae-base

The layout is timm's: `cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.{i}`, `fc_norm` (of the mean of the patch
tokens) or `norm` (of the CLS token), `head`. Such a classifier is exactly a BEiT with absolute positions, no relative
bias and no layer scale (docs/method.md section 6). BEiT's keys have no bias: it would add the same number to all
scores of a query, and softmax ignores that. So ToMe compares keys without their bias.

A merged model's mean counts every token by its size. Without training, merge without proportional attention:
`ToMeConfig(r=16, proportional_attention=False)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import BeitConfig, BeitForImageClassification

from ..errors import BadValue
from .checkpoint import Layout, check_heads, count_blocks, imagenet_processor, shape_of, side_of_grid


# Names and numbers of heads of the published sizes, by width and number of layers; shapes do not show the heads.
PUBLISHED = {(768, 12): ("ViT-B", 12), (1024, 24): ("ViT-L", 16), (1280, 32): ("ViT-H", 16)}
_LAYER_NORM_EPS = 1e-6
_NAMES = (
    (r"^beit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^beit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^beit\.embeddings\.", ""),
    (r"^beit\.layers\.", "blocks."),
    (r"^beit\.pooler\.layernorm", "fc_norm"),
    (r"^beit\.layernorm", "norm"),
    (r"^classifier\.", "head."),
)


def mae_config(tensors: Mapping[str, Tensor], num_attention_heads: int | None = None) -> Any:
    """The config of the BEiT that equals a checkpoint, from the names and shapes of its tensors.

    Raises ValueError that names the first tensor that is missing or has a wrong shape.
    """
    _check_kind(tensors)
    width, _, patch_size, _ = stem = shape_of(tensors, "patch_embed.proj.weight", (None, 3, None, None))
    shape_of(tensors, "patch_embed.proj.weight", (*stem[:3], patch_size))
    num_layers = count_blocks(tensors, "blocks.")
    return BeitConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=_heads(width, num_layers, num_attention_heads),
        intermediate_size=shape_of(tensors, "blocks.0.mlp.fc1.weight", (None, width))[0],
        layer_norm_eps=_LAYER_NORM_EPS,
        image_size=side_of_grid(tensors, "pos_embed", width) * patch_size,
        patch_size=patch_size,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
        use_mean_pooling="fc_norm.weight" in tensors,
        num_labels=shape_of(tensors, "head.weight", (None, width))[0],  # type: ignore[call-arg]
    )


def _check_kind(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a checkpoint of another kind."""
    if any(name.startswith(("decoder_", "mask_token")) for name in tensors):
        fits = "a fine-tuned classifier; this is a pre-trained MAE, which transformers has as ViTMAEForPreTraining"
        raise BadValue("checkpoint", "decoder_…", fits)
    if ("fc_norm.weight" in tensors) == ("norm.weight" in tensors):
        found = "both" if "norm.weight" in tensors else "neither"
        fits = "exactly one: fc_norm for the patches' mean, or norm for the CLS token"
        raise BadValue("fc_norm.weight, norm.weight", found, fits)


def _heads(width: int, num_layers: int, given: int | None) -> int:
    if given is not None:
        return check_heads(width, given)
    if (width, num_layers) not in PUBLISHED:
        sizes = ", ".join(f"{name} ({layers} layers, width {w})" for (w, layers), (name, _) in PUBLISHED.items())
        fits = f"a number for {num_layers} layers of width {width}; known are {sizes}"
        raise BadValue("num_attention_heads", None, fits)
    return PUBLISHED[width, num_layers][1]


def _title(config: Any) -> tuple[str, str]:
    size, _ = PUBLISHED.get((config.hidden_size, config.num_hidden_layers), ("a ViT", None))
    return size, f"from the {'mean of the patches' if config.use_mean_pooling else 'CLS token'}"


MAE = Layout(
    kind="an MAE classifier",
    model_class=BeitForImageClassification,
    names=_NAMES,
    config=mae_config,
    processor=lambda config: imagenet_processor(config.image_size, 224 / 256 if config.image_size <= 224 else 1),
    title=_title,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, save, and describe the model."""
    MAE.convert(argv, __doc__)
