"""V-JEPA 2: rotary positions by frame, row and column; a pooler with two attentions, and a predictor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2ForVideoClassification, VJEPA2Model

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, attach
from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Inputs, Row, clips
from tests.support.slow_anatomies import tubelets, vit_like
from tests.support.slow_model import Anatomy, Outputs
from tests.support.slow_parts import Weights, gelu, layer_norm, linear
from tests.support.unmerging import assert_the_reader_gets_all_tokens, put_back, traced


def spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Clips of 8 frames; patches are 8 pixels wide, and two frames long."""
    predictor = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_mask_tokens": 2}
    return {
        **{name: value for name, value in fields.items() if name not in ("image_size", "intermediate_size")},
        **{f"pred_{name}": value for name, value in predictor.items()},
        "crop_size": fields["image_size"],
        "frames_per_clip": 8,
        "tubelet_size": 2,
        "patch_size": 8,
        "mlp_ratio": 2.0,
        "num_pooler_layers": 1,
    }


def videos(count: int, height: int = 32, width: int = 32) -> Inputs:
    return {"pixel_values_videos": clips(count, height, width)["pixel_values"]}


def embed(weights: Weights, inputs: Inputs) -> Tensor:
    return tubelets(weights, "vjepa2.encoder.embeddings.patch_embeddings.proj", inputs["pixel_values_videos"])


def places(inputs: Inputs) -> Tensor:
    """Frame, row and column of every patch: [N, 3]."""
    frames, _, height, width = inputs["pixel_values_videos"].shape
    return torch.tensor([[t, i, j] for t in range(frames // 2) for i in range(height // 8) for j in range(width // 8)])


def turn(x: Tensor, places: Tensor, anatomy: Anatomy) -> Tensor:
    """Of a head of 8 numbers, two turn with each coordinate, and two stay; x [n, H·8], places [n, 3]."""
    heads = []
    for part in x.chunk(anatomy.heads, dim=1):
        turned = [part[:, 6:]]
        for axis in (2, 1, 0):  # of two numbers, the frequency is 1
            a, b = part[:, 2 * axis], part[:, 2 * axis + 1]
            cos, sin = places[:, axis].cos(), places[:, axis].sin()
            turned.insert(0, torch.stack([a * cos - b * sin, b * cos + a * sin], dim=1))
        heads.append(torch.cat(turned, dim=1))
    return torch.cat(heads, dim=1)


def head(weights: Weights, x: Tensor, sizes: Tensor) -> Outputs:
    """A layer that attends to all tokens, then one query; each token as often as it counts."""

    def attended(root: str, queries: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (
            linear(weights, root + name, y)
            for name, y in (("q_proj", queries), ("k_proj", tokens), ("v_proj", tokens))
        )
        return slow.attention(q, k, v, 4, 8**-0.5, sizes)

    def mlp(root: str, y: Tensor) -> Tensor:
        y = layer_norm(weights, root + "layer_norm2", y, 1e-6)
        return linear(weights, root + "mlp.fc2", gelu(linear(weights, root + "mlp.fc1", y)))

    x = layer_norm(weights, "vjepa2.encoder.layernorm", x, 1e-6)
    root = "pooler.self_attention_layers.0."
    normed = layer_norm(weights, root + "layer_norm1", x, 1e-6)
    x = x + linear(weights, root + "self_attn.out_proj", attended(root + "self_attn.", normed, normed))
    x = x + mlp(root, x)
    root, query = "pooler.cross_attention_layer.", weights["pooler.query_tokens"][0]
    pooled = query + attended(root + "cross_attn.", query, layer_norm(weights, root + "layer_norm1", x, 1e-6))
    return {"logits": linear(weights, "classifier", pooled + mlp(root, pooled))[0]}


CASE = FamilyCase(
    "vjepa2",
    encoder=VJEPA2Model,
    rows=(
        Row(
            VJEPA2ForVideoClassification,
            vit_like(
                "vjepa2.",
                head,
                specials=(),
                embed=embed,
                layer="vjepa2.encoder.layer.{}.",
                norms=("norm1", "norm2"),
                qkv=("attention.query", "attention.key", "attention.value"),
                out="attention.proj",
                eps=1e-6,
                places=places,
                turn=turn,
            ),
        ),
    ),
    others=(VJEPA2ForVideoClassification,),
    inputs=videos,
    spelled=spelled,
)


MERGES = [ToMeConfig(r=9), DTEMConfig(r=9), DTEMConfig(r=9, relaxation="soft")]


@pytest.mark.parametrize("merge", MERGES, ids=["tome", "dtem", "soft"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_predictor_gets_all_tokens_in_place(merge: MergeConfig, masked: bool) -> None:
    inputs: dict[str, Any] = CASE.inputs(2)
    if masked:
        order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        inputs |= {"context_mask": [order[:, :40]], "target_mask": [order[:, 40:]]}
    output = assert_the_reader_gets_all_tokens(CASE, VJEPA2Model, merge, inputs)
    assert output.last_hidden_state.shape[1] == 64


def all_tokens_reach_the_reader() -> None:
    test_the_predictor_gets_all_tokens_in_place(ToMeConfig(r=9), False)


def test_recorded_states_come_back_in_place() -> None:
    """As a tuple as well; the classifier records its merged tokens."""
    inputs = CASE.inputs(2)
    model = attach(CASE.make(VJEPA2Model), ToMeConfig(r=9))
    output, trace = traced(model, **inputs, output_hidden_states=True)
    plain = CASE.make(VJEPA2Model)
    assert [x.shape[1] for x in output.hidden_states] == [64] * 5
    for state, source in zip(output.hidden_states[1:], trace.source_maps, strict=True):
        first = {int(place): i for i, place in reversed(list(enumerate(source[0])))}
        live = torch.stack([state[0, first[place]] for place in range(len(first))])
        assert torch.equal(put_back(live[None], source[:1])[0], state[0])
    with torch.no_grad():
        parts = model(**inputs, output_hidden_states=True, return_dict=False)
        assert torch.equal(output.hidden_states[0], plain(**inputs, output_hidden_states=True).hidden_states[0])
    states = next(part for part in parts if isinstance(part, tuple) and len(part) == 5)
    assert all(map(torch.equal, states, output.hidden_states))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_pooler_weighs_tokens(attention: str) -> None:
    """Of a token that stands for m patches, the pooler sees what it sees of m equal ones."""
    inputs = CASE.inputs(2)
    model = attach(CASE.make(VJEPA2ForVideoClassification, attention), ToMeConfig(r=9))
    merged, _ = traced(model, **inputs)
    everywhere, _ = traced(attach(model, ToMeConfig(r=9), unmerge=True), **inputs)
    torch.testing.assert_close(merged.logits, everywhere.logits, atol=1e-5, rtol=1e-5)


def every_model_weighs_tokens() -> None:
    test_the_pooler_weighs_tokens("sdpa")
