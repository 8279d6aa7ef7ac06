"""SigLIP 2: SigLIP's layers on patches that come flat, with padding behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Siglip2ForImageClassification, Siglip2Model, Siglip2VisionModel

from dtem_hf import BadValue, ToMeConfig, attach
from tests.families.siglip import siglip, siglip_classifier_head, siglip_head
from tests.support.family_case import PATCH, FamilyCase, Inputs, Row, images
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, linear


def siglip2(root: str = "", head: Callable[..., Outputs] = siglip_head) -> Anatomy:
    """Patches come flat, with positions resized to the image's own grid; what is behind them counts for nothing."""

    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        table = weights[root + "embeddings.position_embedding.weight"]
        side, (height, width) = round(len(table) ** 0.5), inputs["spatial_shapes"].tolist()
        square = table.T.unflatten(1, (side, side)).unsqueeze(0)
        resized = interpolate(square, (height, width), mode="bilinear", antialias=True)[0].flatten(1).T
        real = linear(weights, root + "embeddings.patch_embedding", inputs["pixel_values"][: height * width]) + resized
        return torch.cat([real, torch.full_like(real[:1], 7.0).expand(len(inputs["pixel_values"]) - len(real), -1)])

    return siglip(root, head, embed=embed)


def packed(count: int, height: int = 32, width: int = 32) -> Inputs:
    """Images of one shape as flat patches [count, N, 3 · 4 · 4], none of them padding."""
    pixels = images(count, height, width)["pixel_values"]
    flat = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": flat,
        "pixel_attention_mask": torch.ones(flat.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[height // PATCH, width // PATCH]] * count),
    }


def padded(count: int) -> Inputs:
    """Images of 28 and 30 patches in turn, behind which noise stands for padding up to 36."""
    inputs = packed(count, 24, 24)
    for row in range(count):
        height, width = ((4, 7), (5, 6))[row % 2]
        inputs["spatial_shapes"][row] = torch.tensor([height, width])
        inputs["pixel_attention_mask"][row, height * width :] = 0
    return inputs


CASE = FamilyCase(
    "siglip2",
    encoder=Siglip2VisionModel,
    rows=(
        Row(Siglip2VisionModel, siglip2(), "pooler_output"),
        Row(Siglip2ForImageClassification, siglip2("vision_model.", siglip_classifier_head), variant="classifier"),
    ),
    others=(Siglip2Model,),
    inputs=packed,
    uneven=padded,
    lacking={
        "export": "positions are resized image by image, in a loop over the batch",
        "onnx": "positions are resized in such a loop, or checked by an operator that torch.onnx has no form of",
    },
    mended={"export": "5.24"},
)


def test_an_image_size_is_refused() -> None:
    """The processor decides how many patches an image gets."""
    model = attach(CASE.make(Siglip2VisionModel), ToMeConfig(r=9))
    with pytest.raises(BadValue, match=r"image_size=32: none: the processor's max_num_patches sets the number"):
        model.merge_plan(image_size=32)


@torch.no_grad()
def test_a_classifier_gets_as_many_tokens_as_planned() -> None:
    """All of them, as it averages by the mask of the patches as they came; its encoder alone returns merged ones."""
    for row in CASE.rows:
        model, seen = attach(row.make(), ToMeConfig(r=9)), []
        encoder = model.vision_model if hasattr(model, "vision_model") else model
        encoder.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output[0].shape[1]))
        model(**row.inputs(2))
        assert seen == [model.merge_plan().output_tokens]
        assert seen == [64 if row.model is Siglip2ForImageClassification else 64 - 4 * 9]
