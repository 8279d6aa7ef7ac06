"""The promises that need no reference, for every family: small models of the real classes with random weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dtem_hf
from dtem_hf import DTEMConfig, EViTConfig, ToMeConfig, UnsupportedModelError, attach, detach
from tests.support.family_table import FAMILIES, inputs_of, make


METHODS = {
    "tome": lambda: ToMeConfig(r=9),
    "dtem": lambda: DTEMConfig(r=9),
    "evit": lambda: EViTConfig(keep_rate=0.6),
}
# Softly merged tokens are sorted by size: at these temperatures no two sizes are equal but for rounding.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0}


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest, family: str) -> str:
    if request.param == "evit" and not FAMILIES[family].cls:
        pytest.skip("no CLS token for EViT")
    return request.param


def run(family: str, model: Any, count: int = 2, **kwargs: Any) -> Tensor:
    inputs = inputs_of(family, count)
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return model(**inputs, **kwargs)[FAMILIES[family].output]


@torch.no_grad()
def test_r_zero_unmerged_and_detached_are_the_plain_model_bit_for_bit(family: str, method: str) -> None:
    model = make(family)
    plain = run(family, model)
    nothing = EViTConfig(keep_rate=1.0) if method == "evit" else {"tome": ToMeConfig, "dtem": DTEMConfig}[method](r=0)
    assert torch.equal(run(family, attach(model, nothing)), plain)
    attach(model, METHODS[method]())
    merged = run(family, model)
    assert merged.shape != plain.shape or not torch.equal(merged, plain)
    with model.unmerged():
        assert torch.equal(run(family, model), plain)
    state = model.state_dict()
    assert torch.equal(run(family, detach(model)), plain)
    assert set(model.state_dict()) == {key for key in state if "merge_embedding" not in key}


@torch.no_grad()
def test_untrained_dtem_from_keys_is_tome(family: str) -> None:
    ours, theirs = (run(family, attach(make(family), METHODS[name]())) for name in ("dtem", "tome"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_attention_equals_sdpa(family: str, method: str) -> None:
    if "sdpa" not in FAMILIES[family].attentions:
        pytest.skip("transformers knows eager attention alone for this family")
    ours, theirs = (run(family, attach(make(family, kind), METHODS[method]())) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bfloat16_stays_finite_with_its_gradients(family: str, method: str, training: bool) -> None:
    model = attach(make(family).bfloat16(), METHODS[method]()).train(training)
    output = run(family, model)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def gradients(family: str, model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)  # positions of DINOv3 are drawn
    model.zero_grad()
    run(family, model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = attach(make(family), DTEMConfig(r=9, **MILD)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(family, model))
    assert found[0].keys() == found[1].keys()
    assert any("merge_embedding" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_saved_and_loaded_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    auto = FAMILIES[family].auto
    if auto is None:
        pytest.skip("no Auto class yields this model alone")
    model = attach(make(family), DTEMConfig(r=[11, 0, 9, 3]))
    for parameter in model.merge_parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = getattr(dtem_hf, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(run(family, loaded), run(family, model))
    model.save_merge_adapter(tmp_path / "adapter")
    assert torch.equal(run(family, attach(make(family), tmp_path / "adapter")), run(family, model))


@torch.no_grad()
def test_the_plan_is_what_torch_counts(family: str, method: str) -> None:
    model = attach(make(family, "eager"), METHODS[method]())
    plan = model.merge_plan()
    for expected, context in (
        (plan.multiply_adds, nullcontext),
        (plan.full_multiply_adds, model.trace_merging),
        (plan.unmerged_multiply_adds, model.unmerged),
    ):
        with context(), FlopCounterMode(display=False) as counter:
            run(family, model, count=1)
        assert expected == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
def test_a_trace_counts_every_patch_once(family: str, method: str) -> None:
    model = attach(make(family), METHODS[method]())
    plan = model.merge_plan()
    with model.trace_merging() as trace:
        run(family, model)
    assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
    for source, sizes in zip(trace.source_maps, trace.sizes, strict=True):
        for image in range(2):
            counted = source[image].bincount(minlength=sizes.shape[1])
            assert counted.tolist() == sizes[image].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["beit-absolute", "data2vec-absolute", "dinov2", "clip-classifier", "ijepa-classifier"]
)
def test_means_are_weighted_by_sizes(family: str) -> None:
    """With every token put back where it was, a plain mean is the weighted one."""
    weighed, whole = (run(family, attach(make(family), ToMeConfig(r=9), unmerge=back)) for back in (False, True))
    torch.testing.assert_close(weighed, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family, row in FAMILIES.items() if not row.cls])
def test_evit_is_refused_without_a_cls_token(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"evit.*Model has none"):
        attach(make(family), EViTConfig())


def test_a_pooler_on_a_patch_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="pooler reads the first patch"):
        attach(transformers.IJepaModel(FAMILIES["ijepa"].config(), add_pooling_layer=True), ToMeConfig(r=9))
