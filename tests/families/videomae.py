"""VideoMAE: no CLS token; the classifier averages, the decoder needs every token that its mask leaves visible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import FamilyCase, Inputs, Row, clips
from tests.support.slow_anatomies import mean, tubelets, vit_like
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, layer_norm, linear
from tests.support.unmerging import run_recording


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Clips of 8 frames; patches are 8 pixels wide, and two frames long."""
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {"decoder_" + name: value for name, value in decoder.items()}
    return {**fields, **decoder, "num_frames": 8, "tubelet_size": 2, "patch_size": 8}


def sinusoids(count: int, width: int) -> Tensor:
    """Sines and cosines of positions, in turn: [count, width], in float32 as transformers keeps them."""
    rows = [
        [(np.cos if j % 2 else np.sin)(position / 10000 ** (2 * (j // 2) / width)) for j in range(width)]
        for position in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float32).double()


def videomae(root: str, head: Any) -> Anatomy:
    def embed(weights: Weights, inputs: Inputs) -> Tensor:
        x = tubelets(weights, root + "embeddings.patch_embeddings.projection", inputs["pixel_values"])
        return x + sinusoids(*x.shape)

    return vit_like(
        root,
        head,
        specials=(),
        embed=embed,
        layer=root + "encoder.layer.{}.",
        mlp=("intermediate.dense", "output.dense"),
    )


def bare_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    return {"last_hidden_state": layer_norm(weights, "layernorm", x, 1e-12)}


def classifier_head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    return {"logits": linear(weights, "classifier", layer_norm(weights, "fc_norm", mean(x, sizes), 1e-5))}


CASE = FamilyCase(
    "videomae",
    encoder=VideoMAEModel,
    rows=(
        Row(VideoMAEForVideoClassification, videomae("videomae.", classifier_head)),
        Row(
            VideoMAEModel,
            videomae("", bare_head),
            "last_hidden_state",
            variant="bare",
            vision={"use_mean_pooling": False},
        ),
    ),
    others=(VideoMAEForPreTraining,),
    inputs=clips,
    spelled=spelled,
)


def test_a_classifier_of_the_first_patch_is_refused() -> None:
    model = CASE.make(VideoMAEForVideoClassification, use_mean_pooling=False)
    with pytest.raises(UnsupportedModelError, match="use_mean_pooling=False: the classifier reads the first patch"):
        attach(model, ToMeConfig(r=9))


@pytest.mark.parametrize("config", [ToMeConfig(r=4), DTEMConfig(r=4, relaxation="soft")], ids=["tome", "soft"])
def test_the_decoder_gets_all_visible_tokens(config: MergeConfig) -> None:
    """In the order of its positions, whatever the mask leaves."""
    plain, model = (CASE.make(VideoMAEForPreTraining, use_mean_pooling=False) for _ in range(2))
    attach(model, config)
    pixels = clips(2)["pixel_values"]
    ranks = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)).argsort(dim=1).argsort(dim=1)
    masked = ranks >= 33  # 33 of 64 are visible
    output, tokens = run_recording(model, pixels, bool_masked_pos=masked)
    assert tokens[-1].shape[1] == 33

    def unmerged(*args: Any) -> Any:
        """The plain encoder's output with the tokens that were put back by hand."""
        args[2].last_hidden_state = plain.videomae.layernorm(tokens[-1])
        return args[2]

    with torch.no_grad():
        stock = plain(pixels, masked)
        plain.videomae.register_forward_hook(unmerged)
        expected = plain(pixels, masked)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.logits, stock.logits, atol=1e-3)


def all_tokens_reach_the_reader() -> None:
    test_the_decoder_gets_all_visible_tokens(ToMeConfig(r=4))


def test_a_budget_above_the_number_of_tokens_merges_what_it_can() -> None:
    """16 frames of 224 pixels are 1,568 tokens; a layer merges at most half of what reaches it."""
    config = CASE.config(VideoMAEModel)
    config.image_size, config.patch_size, config.num_frames = 224, 16, 16
    model = attach(VideoMAEModel(config), ToMeConfig(r=2000))
    assert model.merge_plan().num_tokens == 1568
    assert model.merge_plan().tokens == [784, 392, 196, 98]
    with torch.no_grad():
        assert model(torch.randn(1, 16, 3, 224, 224)).last_hidden_state.shape[1] == 98


def test_an_odd_number_of_frames_leaves_one_out() -> None:
    """As the stock model's convolution does."""
    model = attach(CASE.make(VideoMAEForVideoClassification), ToMeConfig(r=9))
    pixels = clips(2, frames=9)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, model(pixels[:, :8]).logits)
    assert model.merge_plan((9, 32, 32)) == model.merge_plan()
