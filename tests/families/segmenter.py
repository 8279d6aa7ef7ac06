"""Segmenter: a mask decoder that attends to merged tokens by their sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dtem_hf import MergeConfig, ToMeConfig, attach
from dtem_hf.extra_models import SegmenterForSemanticSegmentation, SegmenterModel
from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import PATCH, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, gelu, layer_norm, linear
from tests.support.slow_steps import Tokens, in_place
from tests.support.unmerging import METHODS, run_recording


def mask_logits(weights: Weights, tokens: Tokens) -> Outputs:
    """A mask for each token, from a decoder in which it counts as often as it stands for patches; CLS has none.

    All patches get the mask of their token, and a square of them is enlarged.
    """
    classes, last = weights["decoder.class_embeddings"][0], layer_norm(weights, "vit.layernorm", tokens.x, 1e-5)[1:]
    x = torch.cat([linear(weights, "decoder.projection", last), classes])
    counted = torch.cat([tokens.sizes[1:], tokens.sizes.new_ones(len(classes))])
    for i in range(2):
        root = f"decoder.layers.{i}."
        h = layer_norm(weights, root + "layernorm_before", x, 1e-5)
        q, k, v = (linear(weights, f"{root}attention.{name}_proj", h) for name in "qkv")
        mixed = slow.attention(q, k, v, 4, (q.shape[1] // 4) ** -0.5, counted)
        x = x + linear(weights, root + "attention.o_proj", mixed)
        h = gelu(linear(weights, root + "mlp.fc1", layer_norm(weights, root + "layernorm_after", x, 1e-5)))
        x = x + linear(weights, root + "mlp.fc2", h)
    x = layer_norm(weights, "decoder.layernorm", x, 1e-5)
    patches, classes = (
        torch.stack([vector / vector.norm() for vector in linear(weights, f"decoder.{name}", part)])
        for name, part in (("patch_projection", x[: len(last)]), ("class_projection", x[len(last) :]))
    )
    masks = layer_norm(weights, "decoder.mask_norm", patches @ classes.T, 1e-5)
    masks = in_place(replace(tokens, x=torch.cat([masks[:1], masks])))[1:]  # [N, C]
    side = math.isqrt(len(masks))
    maps = masks.T.unflatten(1, (side, side))[None]
    return {"logits": F.interpolate(maps, size=(PATCH * side, PATCH * side), mode="bilinear")[0]}


CASE = FamilyCase(
    "segmenter",
    encoder=SegmenterModel,
    rows=(Row(SegmenterForSemanticSegmentation, vit_like("vit.", None, reader=mask_logits, eps=1e-5)),),
)


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_merged_tokens_are_those_of_all_tokens_put_back_by_hand(method: str) -> None:
    """Hard-merged, a token by its size counts as all of its copies do; softly, all tokens go on."""
    model, plain = (CASE.make(SegmenterForSemanticSegmentation) for _ in range(2))
    attach(model, METHODS[method])
    inputs = CASE.inputs(3, 24, 40)
    output, tokens = run_recording(model, **inputs, interpolate_pos_encoding=True)
    with torch.no_grad():
        masks = plain.decoder(plain.vit.layernorm(tokens[-1])[:, 1:])
        maps = masks.transpose(1, 2).unflatten(2, (6, 10))
        expected = F.interpolate(maps, size=(24, 40), mode="bilinear")
        unmerged = plain(**inputs, interpolate_pos_encoding=True).logits
    if method != "soft":
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    assert output.logits.shape == unmerged.shape == (3, 10, 24, 40)
    assert not torch.allclose(output.logits, unmerged, atol=1e-3)


@pytest.mark.parametrize("merge", METHODS.values(), ids=METHODS)
def test_the_decoder_sees_as_many_tokens_as_are_left(merge: MergeConfig) -> None:
    model, seen = attach(CASE.make(SegmenterForSemanticSegmentation), merge), []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model(**CASE.inputs(2))
    tokens = model.merge_plan().tokens[-1] if merge is not METHODS["soft"] else model.merge_plan().num_tokens
    assert seen == [tokens - 1 + 10]


def test_labels_make_a_loss_that_passes_over_what_is_ignored() -> None:
    model, inputs = CASE.make(SegmenterForSemanticSegmentation), CASE.inputs(2)
    labels = torch.randint(0, 10, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels[:, :20] = 255
    output = model(**inputs, labels=labels)
    known = output.logits[:, :, 20:].movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(output.loss, F.cross_entropy(known, labels[:, 20:].flatten()))


@torch.no_grad()
def test_the_whole_model_is_one_graph() -> None:
    """Compiled, and exported for any batch."""
    torch._dynamo.reset()
    model = attach(CASE.make_small(SegmenterForSemanticSegmentation), ToMeConfig(r=6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), CASE.small_inputs(2), dynamic_shapes=batch)
    expected = model(**CASE.small_inputs(3)).logits
    torch.testing.assert_close(compiled(**CASE.small_inputs(3)).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(program.module()(**CASE.small_inputs(3)).logits, expected, atol=1e-5, rtol=1e-5)
