"""ViT-MAE: a quarter of the patches is left out; its decoder needs all the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEForPreTraining, ViTMAEModel

from dtem_hf import DTEMConfig, EViTConfig, MergeConfig, ToMeConfig, attach
from tests.support.family_case import FamilyCase, Inputs, Row, images
from tests.support.slow_anatomies import normed_tokens, patches, vit_like
from tests.support.slow_parts import Weights
from tests.support.unmerging import run_recording


def mae_embed(weights: Weights, inputs: Inputs) -> Tensor:
    """The quarter of the patches that is left out is that of the largest noise; the others come by their noise."""
    positions = weights["embeddings.position_embeddings"][0]
    x = patches(weights, "embeddings.patch_embeddings.projection", inputs["pixel_values"]) + positions[1:]
    noise = inputs["noise"].tolist()
    order = sorted(range(len(x)), key=lambda i: noise[i])[: int(len(x) * 0.75)]
    return torch.cat([weights["embeddings.cls_token"][0] + positions[:1], x[order]])


def noisy_images(count: int, height: int = 32, width: int = 32) -> Inputs:
    """With the noise that decides which patches are left out."""
    draw = torch.Generator().manual_seed(3)
    return {**images(count, height, width), "noise": torch.rand(count, height * width // 16, generator=draw)}


CASE = FamilyCase(
    "vit_mae",
    encoder=ViTMAEModel,
    rows=(Row(ViTMAEModel, vit_like("", normed_tokens("layernorm"), embed=mae_embed), "last_hidden_state"),),
    others=(ViTMAEForPreTraining,),
    vision={
        "mask_ratio": 0.25,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    inputs=noisy_images,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [ToMeConfig(r=4), DTEMConfig(r=4), EViTConfig(0.5)], ids=["tome", "dtem", "evit"])
def test_maes_decoder_gets_all_visible_tokens(config: MergeConfig, training: bool, pixels: Tensor) -> None:
    """In the shuffled order of its random mask, with the loss of the patches that it left out."""
    plain, model = (CASE.make(ViTMAEForPreTraining, mask_ratio=0.5).train(training) for _ in range(2))
    attach(model, config)
    noise = torch.rand(3, 64)
    output, tokens = run_recording(model, pixels, noise=noise)
    assert model.merge_plan().num_tokens == tokens[-1].shape[1] == 33
    with torch.no_grad():
        unmerged = plain(pixels, noise=noise)
        latent = plain.vit.layernorm(tokens[-1])
        expected = plain.decoder(latent, output.ids_restore).logits
    assert torch.equal(output.mask, unmerged.mask) and torch.equal(output.ids_restore, unmerged.ids_restore)
    torch.testing.assert_close(output.logits, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output.logits, unmerged.logits, atol=1e-3)
    per_patch = (output.logits - plain.patchify(pixels)).square().mean(dim=-1)
    hidden = [per_patch[image, patch] for image, patch in output.mask.nonzero().tolist()]
    torch.testing.assert_close(output.loss, torch.stack(hidden).mean(), atol=1e-5, rtol=1e-5)


def test_maes_encoder_alone_draws_the_same_mask_and_hands_on_fewer_tokens(pixels: Tensor) -> None:
    plain, model = (CASE.make(ViTMAEModel, mask_ratio=0.5).train() for _ in range(2))
    attach(model, ToMeConfig(r=4))
    torch.manual_seed(3)
    expected = plain(pixels)
    torch.manual_seed(3)
    output = model(pixels)
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(output.ids_restore, expected.ids_restore)
    assert (expected.last_hidden_state.shape[1], output.last_hidden_state.shape[1]) == (33, 17)
