"""Merging on a backbone that was quantised, offloaded or wrapped is exact, and what was learned comes back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, distributed
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import (
    AutoModelForImageClassification,
    DTEMConfig,
    MergeAdapter,
    ToMeConfig,
    UnsupportedModelError,
    attach,
    detach,
)
from tests.support.loading import COLUMNS, WAYS, Way, in_memory


# Sizes that kernels for quantised weights accept.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain checkpoint, a trained adapter with powers and lengths, and the same merged checkpoint."""
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=4, image_size=32, patch_size=4, initializer_range=0.2, **SIZES)
    plain = ViTForImageClassification(config).eval()
    found = {name: tmp_path_factory.mktemp(name) for name in ("plain", "adapter", "merged")}
    plain.save_pretrained(found["plain"])
    model = attach(plain, DTEMConfig(r=9, learn_exponents=True, learn_norms=True))
    with torch.no_grad():
        for parameter in model.merge_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_merge_adapter(found["adapter"])
    model.save_pretrained(found["merged"])
    return found


@torch.no_grad()
def logits(model: Any, pixels: Tensor) -> Tensor:
    return model.eval()(pixels).logits.float()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """With a process group of one process, where it is needed."""
    way = WAYS[request.param]
    if way.grouped:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield way
    if way.grouped:
        distributed.destroy_process_group()


@pytest.mark.parametrize("attached", COLUMNS)
def test_a_backbone_of_any_kind_merges(
    way: Way, attached: str, folders: dict[str, Path], pixels: Tensor, tmp_path: Path
) -> None:
    """r = 0 and detach give the backbone's own bits; plans go by declared sizes; an adapter comes back unchanged."""
    model = way.load(transformers.AutoModelForImageClassification, folders["plain"], tmp_path)
    own = logits(model, pixels)
    merge: Any = {"tome": ToMeConfig(r=9), "dtem": DTEMConfig(r=9), "adapter": folders["adapter"]}[attached]
    if attached in way.refused:
        with pytest.raises(UnsupportedModelError, match=way.refused[attached]):
            attach(model, merge)
        assert torch.equal(logits(model, pixels), own)
        return
    running = way.wrap(attach(model, merge))
    reference = attach(in_memory(transformers.AutoModelForImageClassification, folders["plain"], tmp_path), merge)
    if not way.with_lora:  # its products are counted, too
        assert model.merge_plan() == reference.merge_plan()
    merged, plan = logits(running, pixels), model.merge_plan()
    if not way.quantised:
        assert torch.equal(merged, logits(reference, pixels))
    assert not torch.equal(merged, own)
    model.set_reduction(4)
    model.set_reduction(9)
    assert model.merge_plan() == plan and torch.equal(logits(running, pixels), merged)
    model.set_reduction(0)
    assert torch.equal(logits(running, pixels), own)
    if attached == "adapter":
        ours, theirs = model.to_merge_adapter().tensors, MergeAdapter.from_pretrained(folders["adapter"]).tensors
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    detach(model)
    assert torch.equal(logits(running, pixels), own)


def test_an_untrained_embedding_equals_the_mean_key(
    way: Way, folders: dict[str, Path], pixels: Tensor, tmp_path: Path
) -> None:
    """It is taken from what a module returns whose weights cannot be read.

    Modules that quantise their input, too, are no affine maps: there, the embedding is held against the weights.
    """
    if way.refused:
        pytest.skip("no embedding can be attached")
    model = way.load(transformers.AutoModelForImageClassification, folders["plain"], tmp_path)
    by_keys = logits(attach(model, ToMeConfig(r=9)), pixels)
    by_embedding = logits(way.wrap(attach(model, DTEMConfig(r=9))), pixels)
    if not way.rounds_inputs:
        torch.testing.assert_close(by_embedding, by_keys, atol=1e-4, rtol=1e-4)
        return
    weights = in_memory(transformers.AutoModelForImageClassification, folders["plain"], tmp_path).vit.layers
    for index, layer in enumerate(weights):
        mean = layer.attention.k_proj.weight.view(4, 16, 64).mean(dim=0)
        error = model.to_merge_adapter().tensors[f"layers.{index}.weight"] - mean
        assert error.norm() < 0.02 * mean.norm()


def test_a_learned_embedding_in_a_checkpoint_comes_back(
    way: Way, folders: dict[str, Path], pixels: Tensor, tmp_path: Path
) -> None:
    """Its parameters are never quantised, and are not those that an untrained embedding starts from."""
    if way.with_lora or way.refused:
        pytest.skip("merged after it was loaded")
    model = way.wrap(way.load(AutoModelForImageClassification, folders["merged"], tmp_path))
    inner = getattr(model, "module", model)
    ours, theirs = inner.to_merge_adapter().tensors, MergeAdapter.from_pretrained(folders["adapter"]).tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = way.load(transformers.AutoModelForImageClassification, folders["plain"], tmp_path)
    expected = logits(attach(plain, folders["adapter"]), pixels)
    torch.testing.assert_close(logits(model, pixels), expected, atol=1e-5, rtol=1e-5)
    untrained = logits(attach(plain, DTEMConfig(r=9)), pixels)
    assert not torch.allclose(untrained, expected, atol=1e-2)


def test_a_module_that_replaces_the_key_projection_gives_the_keys(folders: dict[str, Path], pixels: Tensor) -> None:
    """Quantised or wrapped after merging: the keys are those of the module that is there now."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * torch.linspace(0.1, 3, 64)

    model = attach(transformers.AutoModelForImageClassification.from_pretrained(folders["plain"]), ToMeConfig(r=9))
    replaced = copy.deepcopy(model)
    for layer in replaced.vit.layers:
        layer.attention.k_proj = Doubled(layer.attention.k_proj)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer in scaled.vit.layers:
            layer.attention.k_proj.weight *= torch.linspace(0.1, 3, 64)[:, None]
            layer.attention.k_proj.bias *= torch.linspace(0.1, 3, 64)
    assert not torch.allclose(logits(model, pixels), logits(scaled, pixels), atol=1e-2)
    torch.testing.assert_close(logits(replaced, pixels), logits(scaled, pixels), atol=1e-5, rtol=1e-5)
