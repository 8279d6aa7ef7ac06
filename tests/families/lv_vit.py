"""LV-ViT: a convolutional stem, halved residuals, a second head whose largest logit of all tokens counts by half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dtem_hf import ToMeConfig, attach
from dtem_hf.extra_models import LVViTForImageClassification, LVViTModel
from tests.support.family_case import FamilyCase, Inputs, Row
from tests.support.slow_anatomies import patches, vit_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm, linear
from tests.support.slow_steps import Tokens
from tests.support.unmerging import METHODS


def lv_vit_embed(weights: Weights, inputs: Inputs) -> Tensor:
    """Every batch norm by its formula, from the statistics in the weights."""
    root, x = "vit.embeddings.patch_embeddings.", inputs["pixel_values"][None]
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        kernel, norm = weights[f"{root}stem.{i}.weight"], f"{root}stem.{i + 1}."
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2).movedim(1, -1)
        x = (x - weights[norm + "running_mean"]) / (weights[norm + "running_var"] + 1e-5).sqrt()
        x = (x * weights[norm + "weight"] + weights[norm + "bias"]).clamp(min=0).movedim(-1, 1)
    x = torch.cat([weights["vit.embeddings.cls_token"][0], patches(weights, root + "projection", x[0])])
    return x + weights["vit.embeddings.position_embeddings"][0]


def lv_vit_head(weights: Weights, tokens: Tokens) -> Outputs:
    """What a soft merge has merged away is no longer read."""
    x = layer_norm(weights, "vit.layernorm", tokens.x[: tokens.active], 1e-5)
    largest = torch.stack([linear(weights, "token_classifier", token) for token in x[1:]]).max(dim=0).values
    return {"logits": linear(weights, "classifier", x[0]) + largest / 2}


CASE = FamilyCase(
    "lv_vit",
    encoder=LVViTModel,
    rows=(
        Row(
            LVViTForImageClassification,
            vit_like("vit.", None, embed=lv_vit_embed, reader=lv_vit_head, eps=1e-5, residual=0.5),
        ),
    ),
    vision={"stem_width": 8},
)


@torch.no_grad()
def test_in_training_mode_batches_leave_no_trace() -> None:
    """A frozen backbone stays as it is: its batch norms keep their statistics, and use them."""
    model, inputs = CASE.make(LVViTForImageClassification), CASE.inputs(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**inputs).logits
    assert torch.equal(model.train()(**inputs).logits, expected)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_labels_make_a_loss_that_merging_changes() -> None:
    model, inputs, labels = CASE.make(LVViTForImageClassification), CASE.inputs(3), torch.tensor([1, 4, 9])
    plain = model(**inputs, labels=labels)
    torch.testing.assert_close(plain.loss, F.cross_entropy(plain.logits, labels))
    merged = attach(model, ToMeConfig(r=9))(**inputs, labels=labels)
    torch.testing.assert_close(merged.loss, F.cross_entropy(merged.logits, labels))
    assert not torch.allclose(merged.loss, plain.loss, atol=1e-3)


@torch.no_grad()
def test_what_is_softly_merged_away_has_no_logits() -> None:
    """Whether all tokens come back in place or not."""
    model, seen = attach(CASE.make(LVViTForImageClassification), METHODS["soft"]), []
    handle = model.vit.register_forward_hook(lambda *a: seen.append(a[2].last_hidden_state))
    short, left = model(**CASE.inputs(3)).logits, model.merge_plan().tokens[-1]
    handle.remove()
    every = model.token_classifier(seen[0])
    assert every.shape[1] == 65
    expected = model.classifier(seen[0][:, 0]) + every[:, 1:left].max(dim=1).values / 2
    torch.testing.assert_close(short, expected)
    assert (every[:, left:].max(dim=1).values > every[:, 1:left].max(dim=1).values).any()
    full = attach(model, METHODS["soft"], unmerge=True)(**CASE.inputs(3)).logits
    torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-5)


every_model_weighs_tokens = test_what_is_softly_merged_away_has_no_logits
