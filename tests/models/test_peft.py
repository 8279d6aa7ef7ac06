"""LoRA and a merge adapter on one model: in either order the same, and neither loads what is the other's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dtem_hf import AutoModelForImageClassification, DTEMConfig, MergeAdapter, ToMeConfig, attach, detach


Make = Callable[..., Any]
TARGETS = ["q_proj", "k_proj", "v_proj"]


def with_noise(model: Any, name: str) -> Any:
    """The parameters with `name` in theirs, somewhere else than where they start."""
    draw = torch.Generator().manual_seed(7)
    for key, parameter in sorted(model.named_parameters()):
        if name in key:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


@pytest.fixture(params=[False, True], ids=["embedding", "shifts"])
def adapter(make_classifier: Make, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    config = DTEMConfig(r=9, learn_shifts=request.param, relaxation="hard" if request.param else "auto")
    model = with_noise(attach(make_classifier(), config), "merge_embedding")
    model.save_merge_adapter(tmp_path / "merge")
    return tmp_path / "merge"


@pytest.fixture
def lora(make_classifier: Make, tmp_path: Path) -> Path:
    model = with_noise(get_peft_model(make_classifier(), LoraConfig(target_modules=TARGETS, r=4)), "lora_")
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def expected(make_classifier: Make, adapter: Path, lora: Path, pixels: Tensor) -> Tensor:
    """Of the low-rank products added to the weights by hand, and merged."""
    from safetensors.torch import load_file

    model = make_classifier()
    config = json.loads((lora / "adapter_config.json").read_text())
    parts = load_file(lora / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for key in [key for key in parts if key.endswith("lora_A.weight")]:
        product = parts[key.replace("lora_A", "lora_B")] @ parts[key]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        model.get_submodule(name).weight.data += scale * product
    return logits(attach(model, adapter), pixels)


@pytest.mark.parametrize("base_merged", [False, True], ids=["given", "recorded"])
def test_an_auto_class_loads_lora_with_its_base_model(
    base: Path, adapter: Path, lora: Path, expected: Tensor, make_classifier: Make, pixels: Tensor, base_merged: bool
) -> None:
    """As transformers' own does, from a folder that holds LoRA and no model."""
    if base_merged:
        attach(make_classifier(), adapter).save_pretrained(base)
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    merge = {} if base_merged else {"merge": adapter}
    model = AutoModelForImageClassification.from_pretrained(lora, **merge)
    torch.testing.assert_close(logits(model, pixels), expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForImageClassification.from_pretrained(lora, merge=None)
    assert not hasattr(plain, "merge_config")
    assert torch.equal(logits(plain, pixels), logits(detach(model), pixels))


WAYS: dict[str, Callable[[Any, Path, Path], Any]] = {
    "merge, PeftModel": lambda model, merge, lora: PeftModel.from_pretrained(attach(model, merge), lora),
    "PeftModel, merge": lambda model, merge, lora: attach(PeftModel.from_pretrained(model, lora), merge),
    "merge, load_adapter": lambda model, merge, lora: (attach(model, merge).load_adapter(str(lora)), model)[1],
    "load_adapter, merge": lambda model, merge, lora: (model.load_adapter(str(lora)), attach(model, merge))[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_both_in_either_order(
    way: str, make_classifier: Make, adapter: Path, lora: Path, expected: Tensor, pixels: Tensor
) -> None:
    model = WAYS[way](make_classifier(), adapter, lora)
    torch.testing.assert_close(logits(model, pixels), expected, rtol=1e-4, atol=1e-5)
    # Both do something.
    assert not torch.allclose(expected, logits(attach(make_classifier(), adapter), pixels), atol=1e-3)
    assert not torch.allclose(expected, logits(detach(model), pixels), atol=1e-3)


def test_every_order_gives_the_same_bits(make_classifier: Make, adapter: Path, lora: Path, pixels: Tensor) -> None:
    first, *others = (logits(way(make_classifier(), adapter, lora), pixels) for way in WAYS.values())
    assert all(torch.equal(other, first) for other in others)


def test_what_a_merged_model_can_do_it_can_through_the_wrapper(
    make_classifier: Make, adapter: Path, lora: Path, pixels: Tensor, tmp_path: Path
) -> None:
    model = attach(PeftModel.from_pretrained(make_classifier(), lora), adapter)
    assert isinstance(model, PeftModel)
    model.set_reduction(3)
    assert model.merge_plan().reductions == [3] * 4
    model.save_merge_adapter(tmp_path / "again")
    before, after = MergeAdapter.from_pretrained(adapter), MergeAdapter.from_pretrained(tmp_path / "again")
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    plain = PeftModel.from_pretrained(make_classifier(), lora)
    assert torch.equal(logits(detach(model), pixels), logits(plain, pixels))
    assert not hasattr(model.config, "merge")


def test_neither_loads_what_is_the_others(make_classifier: Make, adapter: Path, lora: Path) -> None:
    assert not (adapter / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(make_classifier(), adapter)
    with pytest.raises(FileNotFoundError, match=r"merge_config\.json"):
        attach(make_classifier(), lora)


def test_lora_on_all_linear_layers_leaves_the_embedding_alone(
    make_classifier: Make, adapter: Path, pixels: Tensor
) -> None:
    """An adapter would have no place for a low-rank part of the embedding."""
    model = with_noise(
        get_peft_model(attach(make_classifier(), adapter), LoraConfig(target_modules="all-linear")), "lora_"
    )
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert not any("lora_" in name for name, _ in model.named_parameters() if "merge_embedding" in name)
    ours, theirs = model.to_merge_adapter().tensors, MergeAdapter.from_pretrained(adapter).tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_embedding_that_peft_trains_and_saves_is_the_one_that_counts(
    make_classifier: Make, adapter: Path, pixels: Tensor, tmp_path: Path
) -> None:
    """`modules_to_save` trains a copy: it is optimised, runs, and is what an adapter is made of."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["merge_embedding"])
    model = get_peft_model(attach(make_classifier(), adapter), config)
    before = logits(model, pixels)
    parameters = list(model.merge_parameters())
    assert parameters and all(p.requires_grad for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    trained = logits(model, pixels)
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, pixels), before)
    model.save_merge_adapter(tmp_path / "trained")
    read = MergeAdapter.from_pretrained(tmp_path / "trained")
    assert {id(p) for p in parameters} == {id(p) for p in model.merge_parameters()}
    torch.testing.assert_close(logits(attach(make_classifier(), read), pixels), trained)


def test_detached_no_hook_stays_on_keys_that_were_wrapped(make_classifier):
    model = attach(make_classifier(), ToMeConfig(r=2))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["k_proj"], r=4))
    assert any(module._forward_hooks for module in wrapped.modules())
    detach(wrapped)
    assert not any(module._forward_hooks for module in wrapped.modules())


@pytest.mark.parametrize("content", ["{}", '{"base_model_name_or_path": null}'])
def test_a_peft_adapter_that_names_no_base_model_is_no_model(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        AutoModelForImageClassification.from_pretrained(tmp_path, merge=ToMeConfig(r=2))
