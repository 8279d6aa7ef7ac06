"""Attaching, changing and detaching on models in memory; what merged models promise is in `tests/families`."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertModel, ViTForImageClassification, ViTModel

from dtem_hf import (
    BadValue,
    DTEMConfig,
    LinearSchedule,
    MergeAdapter,
    ToMeConfig,
    UnsupportedModelError,
    attach,
    detach,
)
from tests.support.children import run_python


Make = Callable[..., Any]


def logits(model: Any, pixels: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(pixels, **kwargs).logits


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All of a model that attaching could change: classes, attributes, parameters and config."""
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    parameters = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    return modules, parameters, json.dumps(model.config.to_dict(), default=str)


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    modules, parameters, config = snapshot(model)
    assert modules == before[0]
    assert config == before[2]
    assert parameters.keys() == before[1].keys()
    for name, (identity, value) in parameters.items():
        assert identity == before[1][name][0]
        assert torch.equal(value, before[1][name][1])


def test_attaching_again_replaces_what_was_attached(make_classifier: Make, pixels: Tensor) -> None:
    model = make_classifier()
    for config in (DTEMConfig(r=5), ToMeConfig(r=9), DTEMConfig(r=9, embed_dim=16), DTEMConfig(r=3, init="random")):
        torch.manual_seed(0)
        assert attach(model, config) is model
        torch.manual_seed(0)
        fresh = attach(make_classifier(), config)
        assert model.merge_config == config
        assert list(model.state_dict()) == list(fresh.state_dict())
        assert type(model) is type(fresh)
        assert torch.equal(logits(model, pixels), logits(fresh, pixels))
    assert torch.equal(logits(detach(model), pixels), logits(make_classifier(), pixels))


def test_attaching_anew_starts_the_embedding_anew(make_classifier: Make) -> None:
    model = attach(make_classifier(), DTEMConfig(r=9))
    start = [parameter.clone() for parameter in model.merge_parameters()]
    for parameter in model.merge_parameters():
        parameter.data.normal_()
    attach(model, DTEMConfig(r=9))
    assert all(torch.equal(a, b) for a, b in zip(start, model.merge_parameters(), strict=True))


def test_none_detaches_and_a_plain_model_stays_as_it_is(make_classifier: Make) -> None:
    model = make_classifier()
    before = snapshot(model)
    assert detach(model) is model
    assert attach(model, None) is model
    attach(model, DTEMConfig(r=9))
    assert attach(model, None) is model
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [ToMeConfig(r=4), DTEMConfig(r=4)], ids=["tome", "dtem"])
def test_detach_takes_a_loaded_model_back_as_well(make_classifier: Make, tmp_path: Path, config: Any) -> None:
    """One that was built merged, and not merged in memory: nothing of it stays either."""
    from dtem_hf import AutoModelForImageClassification

    make_classifier().save_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(plain) is ViTForImageClassification
    loaded = detach(AutoModelForImageClassification.from_pretrained(tmp_path, merge=config))
    ours, theirs = snapshot(loaded), snapshot(plain)
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]


def misfits(make_classifier: Make, folder: Path) -> dict[str, tuple[Any, type[Exception], str]]:
    """What cannot be attached to the small classifier: the merge, the error, and a part of its message."""
    wide, deep = make_classifier(hidden_size=64), make_classifier(num_hidden_layers=5)
    for name, model in (("wide", wide), ("deep", deep)):
        attach(model, DTEMConfig(r=4)).save_merge_adapter(folder / name)
    return {
        "list": (ToMeConfig(r=[1, 2, 3]), BadValue, "3 layers and the model has 4"),
        "flops": (DTEMConfig(flops=0.001), BadValue, "flops=0.001"),
        "embed_dim": (
            DTEMConfig(embed_dim=9),
            BadValue,
            "embed_dim=9: init='keys' needs a multiple of 8, from 8 to 32",
        ),
        "wide adapter": (folder / "wide", ValueError, "hidden_size: the adapter was trained for 64, the model has 32"),
        "deep adapter": (
            str(folder / "deep"),
            ValueError,
            "num_layers: the adapter was trained for 5, the model has 4",
        ),
        "no adapter": (folder / "nowhere" / "at" / "all", FileNotFoundError, "nowhere"),
        "number": (16, BadValue, "merge=16: a config"),
        "unknown method": ({"method": "evitt"}, BadValue, "method='evitt'"),
    }


@pytest.mark.parametrize("attached", [None, DTEMConfig(r=5), ToMeConfig(r=5)], ids=["plain", "dtem", "tome"])
@pytest.mark.parametrize(
    "misfit", ["list", "flops", "embed_dim", "wide adapter", "deep adapter", "no adapter", "number", "unknown method"]
)
def test_a_failed_attach_leaves_the_model_as_it_was(
    make_classifier: Make, pixels: Tensor, tmp_path: Path, attached: Any, misfit: str
) -> None:
    model = attach(make_classifier(), attached)
    before, expected = snapshot(model), logits(model, pixels)
    merge, error, message = misfits(make_classifier, tmp_path)[misfit]
    with pytest.raises(error) as raised:
        attach(model, merge)
    assert message in str(raised.value)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, pixels), expected)


def test_a_class_put_on_top_stays_when_the_merging_is_taken_out(make_classifier: Make, pixels: Tensor) -> None:
    """torch's parametrizations make a class of the module's own, in which its weight is computed."""

    def normed(model: Any) -> Any:
        for layer in model.vit.layers:
            parametrizations.weight_norm(layer.mlp.fc1)
        return model

    plain = normed(make_classifier())
    model = normed(attach(make_classifier(), DTEMConfig(r=5, learn_shifts=True)))
    assert torch.equal(logits(model, pixels), logits(attach(normed(make_classifier()), DTEMConfig(r=5)), pixels))
    detach(model)
    assert torch.equal(logits(model, pixels), logits(plain, pixels))
    found, wanted = type(model.vit.layers[0].mlp.fc1), type(plain.vit.layers[0].mlp.fc1)
    assert found.__name__ == wanted.__name__ and found.__bases__ == wanted.__bases__


def test_layers_that_are_one_module_are_refused(make_classifier: Make) -> None:
    """A layer knows its place in the encoder, and so it can have one only."""
    model = make_classifier()
    model.vit.layers[2] = model.vit.layers[1]
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="ViTModel: some of its layers are one module"):
        attach(model, ToMeConfig(r=5))
    assert_unchanged(model, before)


def test_an_unsupported_model_stays_as_it_was() -> None:
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="BertModel cannot be merged: it holds no encoder"):
        attach(model, DTEMConfig(r=1))
    assert_unchanged(model, before)


def test_attach_follows_the_models_dtype_mode_and_trainability(make_classifier: Make) -> None:
    model = attach(make_classifier().bfloat16().train().requires_grad_(False), DTEMConfig(r=4))
    assert {parameter.dtype for parameter in model.merge_parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.merge_parameters())
    assert all(module.training for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"vit.merge_embedding.projections.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }


def test_hooks_signature_and_configured_names_survive(make_classifier: Make, make_bare: Make, pixels: Tensor) -> None:
    """What transformers, Trainer and torch.export read off a model."""
    model, seen = make_classifier(), []
    model.vit.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    attach(model, ToMeConfig(r=9))
    logits(model, pixels)
    assert seen == [65 - 27]
    for make in (make_classifier, make_bare):
        plain, merged = make(), attach(make(), DTEMConfig(r=9))
        assert inspect.signature(merged.forward) == inspect.signature(plain.forward)
        assert merged.main_input_name == plain.main_input_name
        assert merged._no_split_modules == plain._no_split_modules


def test_two_models_of_one_class_share_their_merged_class(make_classifier: Make) -> None:
    first, second = (attach(make_classifier(), DTEMConfig(r=4)) for _ in range(2))
    assert type(first) is type(second)
    assert type(first.vit.layers[0]) is type(second.vit.layers[3])


def test_a_pickled_model_runs_in_another_process(make_classifier: Make, pixels: Tensor, tmp_path: Path) -> None:
    """Which knows of dtem_hf only by what the pickle says."""
    model = attach(make_classifier(), DTEMConfig(r=[9, 0, 4, 3]))
    torch.save({"model": model, "pixels": pixels}, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "loaded = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.save(loaded['model'](loaded['pixels']).logits, sys.argv[2])\n"
    )
    run_python(["-c", program, tmp_path / "model.pt", tmp_path / "logits.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, pixels), atol=1e-6, rtol=1e-6)


def test_the_config_holds_plain_json(make_classifier: Make, tmp_path: Path) -> None:
    model = attach(make_classifier(), DTEMConfig(r=LinearSchedule(4.5), top_k=2))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["merge"] == model.merge_config.to_dict() == model.config.merge
    assert saved["merge"]["r"] == {"kind": "linear", "r": 4.5, "slope": 0.5}
    assert saved["architectures"] == ["ViTForImageClassification"]


def mask(count: int) -> Tensor:
    """Which of the 65 tokens the model may look at."""
    allowed = torch.ones(count, 65, dtype=torch.long)
    allowed[:, 40:] = 0
    return allowed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [ToMeConfig(r=4), DTEMConfig(r=[0, 4, 0, 0])], ids=["tome", "dtem"])
def test_a_mask_over_patches_is_refused_by_name(
    make_classifier: Make, make_bare: Make, pixels: Tensor, config: Any, training: bool
) -> None:
    classifier, bare = (attach(make(), config).train(training) for make in (make_classifier, make_bare))
    with pytest.raises(UnsupportedModelError, match="attention_mask"):
        classifier(pixels, attention_mask=mask(3))
    with pytest.raises(UnsupportedModelError, match="attention_mask"):
        bare(pixels, None, None, mask(3))
    assert classifier(pixels).logits.isfinite().all()


def test_a_mask_works_as_ever_where_nothing_is_merged(make_classifier: Make, pixels: Tensor) -> None:
    plain, model = make_classifier(), attach(make_classifier(), DTEMConfig(r=0))
    expected = logits(plain, pixels, attention_mask=mask(3))
    assert not torch.equal(expected, logits(plain, pixels))
    assert torch.equal(logits(model, pixels, attention_mask=mask(3)), expected)
    model.set_reduction(5)
    with model.unmerged():
        assert torch.equal(logits(model, pixels, attention_mask=mask(3)), expected)


def test_layers_of_different_modes_stay_finite(make_classifier: Make, pixels: Tensor) -> None:
    """Freezing a layer by `.eval()` puts a hard merge behind a soft one, whose merged tokens have sizes near 0."""
    model = attach(make_classifier(), DTEMConfig(r=20)).train()
    model.vit.layers[1].eval()
    output = model(pixels).logits
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_the_default_backend_of_torch_compile_equals_eager(make_classifier: Make, pixels: Tensor) -> None:
    """Inductor's generated code; that there is one graph for every backbone is tested with a quicker backend."""
    model = attach(make_classifier(num_hidden_layers=2), DTEMConfig(r=9))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixels), logits(model, pixels), atol=1e-5, rtol=1e-5)


def test_an_adapter_in_memory_is_a_copy(make_classifier: Make) -> None:
    """Training on does not change what was taken out."""
    model = attach(make_classifier(), DTEMConfig(r=4))
    adapter: MergeAdapter = model.to_merge_adapter()
    before = {key: value.clone() for key, value in adapter.tensors.items()}
    for parameter in model.merge_parameters():
        parameter.data.zero_()
    assert all(torch.equal(adapter.tensors[key], value) for key, value in before.items())


def test_the_bare_encoder_holds_its_embedding_itself(make_bare: Make) -> None:
    model = attach(make_bare(), DTEMConfig(r=4))
    assert isinstance(model, ViTModel)
    assert next(key for key in model.state_dict() if "merge" in key) == "merge_embedding.projections.0.weight"


def replace_one(layers: nn.ModuleList, other: nn.ModuleList) -> None:
    layers[2] = other[2]


def replace_the_last(layers: nn.ModuleList, other: nn.ModuleList) -> None:
    layers[3] = other[3]


def remove_the_last(layers: nn.ModuleList, other: nn.ModuleList) -> None:
    del layers[3]


def reorder(layers: nn.ModuleList, other: nn.ModuleList) -> None:
    layers[0], layers[1] = layers[1], layers[0]


@pytest.mark.parametrize("change", [replace_one, replace_the_last, remove_the_last, reorder])
def test_layers_that_change_after_attach_are_an_error_until_attach_runs_again(
    make_classifier: Make, pixels: Tensor, change: Callable[[nn.ModuleList, nn.ModuleList], None]
) -> None:
    model, plain = attach(make_classifier(), ToMeConfig(r=9)), make_classifier()
    change(model.vit.layers, make_classifier().vit.layers)
    change(plain.vit.layers, make_classifier().vit.layers)
    with pytest.raises(UnsupportedModelError, match=r"Layer [0-3] .* Attach again"):
        model(pixels)
    attach(model, ToMeConfig(r=9))
    expected = attach(copy.deepcopy(plain), ToMeConfig(r=9))
    assert torch.equal(logits(model, pixels), logits(expected, pixels))
    assert torch.equal(logits(detach(model), pixels), logits(plain, pixels))


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def test_a_wrapper_around_a_layer_may_come_after_attach(make_classifier: Make, pixels: Tensor) -> None:
    model = attach(make_classifier(), ToMeConfig(r=9))
    expected = logits(model, pixels)
    model.vit.layers[2] = Wrapper(model.vit.layers[2])
    assert torch.equal(logits(model, pixels), expected)
