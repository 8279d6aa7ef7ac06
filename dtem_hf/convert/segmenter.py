"""Convert a Segmenter with a mask transformer, in its authors' layout, to one of this package with the same masks.

python recipes/convert_segmenter.py --checkpoint seg_small_mask.safetensors --output_dir segmenter-small

The layout is timm's under `encoder.`, and under `decoder.`: `proj_dec`, `cls_emb`, `blocks.{i}`, `decoder_norm`,
`proj_patch`, `proj_classes`, `mask_norm`. `encoder.head`, the classifier of the encoder's pre-training, is not needed
and is left out. A model of 150 classes is taken for one of ADE20k, where 0 means no class in masks: its processor gets
`do_reduce_labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import BeitImageProcessorPil

from ..extra_models.segmenter import SegmenterConfig, SegmenterForSemanticSegmentation
from .checkpoint import Layout, check_heads, count_blocks, shape_of, side_of_grid


# The width of a head in all published sizes.
_HEAD_DIM = 64
_ADE20K_CLASSES = 150
_BILINEAR = 2  # Pillow's number for it
_NAMES = (
    (r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^vit\.embeddings\.", "encoder."),
    (r"^vit\.layernorm\.", "encoder.norm."),
    (r"^vit\.layers\.", "encoder.blocks."),
    (r"^decoder\.layers\.", "decoder.blocks."),
    (r"^decoder\.layernorm\.", "decoder.decoder_norm."),
    (r"^decoder\.projection\.", "decoder.proj_dec."),
    (r"^decoder\.class_embeddings", "decoder.cls_emb"),
    (r"^decoder\.patch_projection\.weight", "decoder.proj_patch"),
    (r"^decoder\.class_projection\.weight", "decoder.proj_classes"),
)


def segmenter_config(tensors: Mapping[str, Tensor], num_attention_heads: int | None = None) -> Any:
    """The config of a checkpoint, from the names and shapes of its tensors. Raises ValueError that names one."""
    width, channels, patch_size, _ = shape_of(tensors, "encoder.patch_embed.proj.weight", (None, None, None, None))
    heads = width // _HEAD_DIM if num_attention_heads is None else num_attention_heads
    return SegmenterConfig(
        hidden_size=width,
        num_hidden_layers=count_blocks(tensors, "encoder.blocks."),
        num_decoder_layers=count_blocks(tensors, "decoder.blocks."),
        num_attention_heads=check_heads(width, heads),
        intermediate_size=shape_of(tensors, "encoder.blocks.0.mlp.fc1.weight", (None, width))[0],
        image_size=side_of_grid(tensors, "encoder.pos_embed", width) * patch_size,
        patch_size=patch_size,
        num_channels=channels,
        num_labels=shape_of(tensors, "decoder.cls_emb", (1, None, width))[1],  # type: ignore[call-arg]
    )


def _processor(config: Any) -> BeitImageProcessorPil:
    return BeitImageProcessorPil(
        size={"height": config.image_size, "width": config.image_size},
        do_center_crop=False,
        resample=_BILINEAR,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_reduce_labels=config.num_labels == _ADE20K_CLASSES,
    )


SEGMENTER = Layout(
    kind="a Segmenter with a mask transformer",
    model_class=SegmenterForSemanticSegmentation,
    names=_NAMES,
    config=segmenter_config,
    processor=_processor,
    title=lambda config: ("a Segmenter", "with a mask each"),
    auto="AutoModelForSemanticSegmentation",
    transposed=("decoder.proj_patch", "decoder.proj_classes"),
    unread=("encoder.head.weight", "encoder.head.bias"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, save, and describe the model."""
    SEGMENTER.convert(argv, __doc__)
