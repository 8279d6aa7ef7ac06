"""Every promise that a pass keeps, for ViT and the matching methods: identity, traces, precision, gradients.

That a merged model is the right one is in `backbones/test_equals_slow_reference.py`, for every family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dtem_hf import DTEMConfig, ToMeConfig, attach, detach
from tests.support.vit_rows import (  # noqa: F401
    METHODS,
    MILD,
    REDUCTIONS,
    Method,
    Row,
    close,
    gradients,
    images,
    merged,
    pytest_generate_tests,
    run,
    same_bits,
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_r_zero_is_the_plain_model_bit_for_bit(row: Row, method: Method, training: bool) -> None:
    plain, model = row.make().train(training), merged(row, method, r=0).train(training)
    assert same_bits(run(row, model, images(row)), run(row, plain, images(row)))
    ours, theirs = (gradients(row, m, images(row)) for m in (model, plain))
    assert same_bits(ours, theirs)


def test_unmerged_is_the_plain_model_bit_for_bit(row: Row, method: Method) -> None:
    plain, model = row.make(), merged(row, method)
    with model.unmerged():
        assert same_bits(run(row, model, images(row)), run(row, plain, images(row)))
    assert not same_bits(run(row, model, images(row)), run(row, plain, images(row)))


def snapshot(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


def test_detach_gives_back_the_plain_model(row: Row, method: Method) -> None:
    """Outputs bit for bit, classes, attributes, state and config."""
    model = row.make()
    modules, state, config = snapshot(model), model.state_dict(), model.config.to_dict()
    before = run(row, model, images(row))
    attached = merged(row, method, model=model)
    assert attached is model
    assert type(model) is not modules[""][0]
    run(row, model, images(row))
    gradients(row, model.train(), images(row))
    assert detach(model.eval()) is model
    assert snapshot(model) == modules
    assert same_bits(model.state_dict(), state)
    assert model.config.to_dict() == config
    assert same_bits(run(row, model, images(row)), before)


def test_a_merged_model_is_one_of_its_own_class(row: Row, method: Method) -> None:
    """isinstance, names and the backbone's parameter names stay; what is learned comes in one container."""
    plain, model = row.make(), merged(row, method)
    assert isinstance(model, type(plain))
    for (name, ours), (_, theirs) in zip(
        ((n, m) for n, m in model.named_modules() if "merge_embedding" not in n), plain.named_modules(), strict=True
    ):
        assert isinstance(ours, type(theirs)), name
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours).__module__ == type(theirs).__module__
    extra = sorted(set(model.state_dict()) - set(plain.state_dict()))
    assert [key for key in model.state_dict() if key not in extra] == list(plain.state_dict())
    if method.learns:
        assert {key.split("merge_embedding.")[1] for key in extra} == {
            f"projections.{i}.{part}" for i in range(4) for part in ("weight", "bias")
        }
        assert len(list(model.merge_parameters())) == 8
    else:
        assert extra == []
        assert list(model.merge_parameters()) == []


@pytest.mark.parametrize("r", REDUCTIONS, ids=str)
def test_untrained_dtem_from_keys_is_tome(row: Row, r: Any) -> None:
    ours, theirs = (run(row, attach(row.make(), config(r=r)), images(row)) for config in (DTEMConfig, ToMeConfig))
    close(ours, theirs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_eager_attention_equals_sdpa(row: Row, method: Method, training: bool) -> None:
    models = []
    for attention in ("eager", "sdpa"):
        fields = MILD if method.learns else {}
        models.append(merged(row, method, model=row.make(attn_implementation=attention), **fields).train(training))
        assert models[-1].config._attn_implementation == attention
    close(*(run(row, model, images(row)) for model in models), 2e-5)
    if training:
        ours, theirs = (gradients(row, model, images(row)) for model in models)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert (ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm() + 1e-5, name


@pytest.mark.parametrize("r", REDUCTIONS, ids=str)
def test_recorded_states_have_the_plans_lengths(row: Row, method: Method, r: Any) -> None:
    model = merged(row, method, r=r, model=row.make(attn_implementation="eager"))
    plan = model.merge_plan()
    with torch.no_grad():
        output = model(pixel_values=images(row), output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in output.hidden_states] == [plan.num_tokens, *plan.tokens]
    entering = [plan.num_tokens, *plan.tokens[:-1]]
    assert [weights.shape[-2:] for weights in output.attentions] == [(n, n) for n in entering]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)


def test_a_trace_says_which_token_every_patch_ended_in(row: Row, method: Method) -> None:
    """As many point at a token as it stands for; only the last pass stays."""
    model = merged(row, method, r=[11, 0, 14, 3])
    plan = model.merge_plan()
    with model.trace_merging() as trace:
        run(row, model, images(row, 5))
        outputs = run(row, model, images(row, 2))
    # It sees all rows of the last layer, which a classifier leaves out else: the same up to rounding.
    torch.testing.assert_close(outputs, run(row, model, images(row, 2)), atol=1e-5, rtol=1e-5)
    assert len(trace.source_maps) == len(trace.sizes) == 4
    for source, sizes, count in zip(trace.source_maps, trace.sizes, plan.tokens, strict=True):
        assert source.dtype == torch.int64
        assert source.shape == (2, plan.num_tokens)
        assert sizes.dtype == torch.float32
        assert sizes.shape == (2, count)
        for image in range(2):
            assert source[image].bincount(minlength=count).tolist() == sizes[image].tolist()
        assert source[:, :1].tolist() == [[0]] * 2
        assert (sizes[:, :1] == 1).all()


def test_a_soft_trace_follows_every_token_to_its_place(row: Row) -> None:
    dtem = next(method for method in METHODS if method.name == "dtem")
    model = merged(row, dtem).train()
    with model.trace_merging() as trace:
        run(row, model, images(row))
    for source, sizes in zip(trace.source_maps, trace.sizes, strict=True):
        assert source.sort(dim=1).values.tolist() == [list(range(source.shape[1]))] * 3
        assert not sizes.requires_grad
        torch.testing.assert_close(sizes.sum(1), torch.full((3,), float(source.shape[1])), atol=1e-3, rtol=0)


def test_other_image_sizes_follow_their_own_plan(row: Row, method: Method) -> None:
    """With interpolated positions: a constant r is the list that the plan for that size gives, clamped if need be."""
    if not row.other_image_sizes:
        pytest.skip("this backbone takes one image size")
    for size in row.other_image_sizes:
        model = merged(row, method, r=9)
        plan = model.merge_plan(image_size=size)
        with model.trace_merging() as trace:
            ours = run(row, model, images(row, 2, size), interpolate_pos_encoding=True)
        assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
        listed = run(row, merged(row, method, r=plan.reductions), images(row, 2, size), interpolate_pos_encoding=True)
        torch.testing.assert_close(ours, listed, atol=1e-5, rtol=1e-5)  # as above
        model.set_reduction(0)
        ours = run(row, model, images(row, 2, size), interpolate_pos_encoding=True)
        assert same_bits(ours, run(row, row.make(), images(row, 2, size), interpolate_pos_encoding=True))


def test_a_wrong_image_size_is_refused_as_the_plain_model_refuses_it(row: Row, method: Method) -> None:
    messages = []
    for model in (row.make(), merged(row, method)):
        with pytest.raises(ValueError) as raised:
            model(pixel_values=images(row, 1, row.image_size + 16))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_finite(row: Row, method: Method, dtype: torch.dtype, training: bool) -> None:
    """Outputs and all gradients; sizes stay float32 and add up."""
    model = merged(row, method, model=row.make().to(dtype)).train(training)
    with model.trace_merging() as trace:
        outputs = run(row, model, images(row))
    for name, value in outputs.items():
        assert value.dtype == dtype
        assert value.isfinite().all(), name
    for sizes in trace.sizes:
        assert sizes.dtype == torch.float32
        torch.testing.assert_close(
            sizes.sum(1), torch.full((3,), float(model.merge_plan().num_tokens)), atol=1e-3, rtol=0
        )
    if training:
        found = gradients(row, model, images(row))
        assert all(gradient.isfinite().all() for gradient in found.values())
        if method.learns:
            learned = [gradient for name, gradient in found.items() if "merge_embedding" in name]
            assert any(gradient.any() for gradient in learned)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str)
def test_low_precision_is_near_float32(row: Row, method: Method, dtype: torch.dtype, tolerance: float) -> None:
    """As far as the dtype goes, where one merge, of the two tokens most alike, is the same in both."""
    ours, theirs = (
        run(row, merged(row, method, r=[1, 0, 0, 0], model=row.make().to(kind)), images(row).to(kind))
        for kind in (dtype, torch.float32)
    )
    close({name: value.float() for name, value in ours.items()}, theirs, tolerance)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_keeps_sizes_in_float32_and_everything_finite(row: Row, method: Method, training: bool) -> None:
    model = merged(row, method).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with model.trace_merging() as trace:
            outputs = run(row, model, images(row))
        found = gradients(row, model, images(row))
    assert all(value.isfinite().all() for value in (*outputs.values(), *found.values()))
    for sizes in trace.sizes:
        assert sizes.dtype == torch.float32
        torch.testing.assert_close(
            sizes.sum(1), torch.full((3,), float(model.merge_plan().num_tokens)), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(row: Row, method: Method, use_reentrant: bool) -> None:
    """In its reentrant form it is as good or it is refused; it never loses a gradient silently."""
    expected = gradients(row, merged(row, method).train(), images(row))
    model = merged(row, method).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    try:
        found = gradients(row, model, images(row))
    except ValueError as error:
        assert use_reentrant
        assert "use_reentrant" in str(error)
        return
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close({name: found[name]}, {name: expected[name]}, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_works_for_a_frozen_backbone(row: Row, method: Method) -> None:
    """Modular training: only the embedding learns."""
    if not method.learns:
        pytest.skip("a method that learns nothing has nothing to train")
    found = []
    for checkpointing in (False, True):
        model = merged(row, method).train().requires_grad_(False)
        for parameter in model.merge_parameters():
            parameter.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(row, model, images(row)))
    assert all("merge_embedding" in name for name in found[0])
    assert len(found[0]) >= 6  # what the last of four layers merges may reach nothing
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
