"""Every promise, for every backbone and every method.

A new backbone is one entry of `ROWS`, a new method one of `METHODS`. What a row brings: how to make its model, small
and with random weights; the Auto class that yields it; the outputs that are compared; and its layers taken apart for
the slow reference, which runs one image at a time through the plain model's own submodules.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import slow_reference as slow
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import dtem_hf
from dtem_hf import DTEMConfig, MergeAdapter, MergeConfig, ToMeConfig, attach, detach


@dataclass(frozen=True)
class SlowLayer:
    """One layer taken apart: everything maps [n, D] to [n, D]."""

    norm: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    heads: int
    scaling: float
    project: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SlowModel:
    """A plain model taken apart: `head` maps the last tokens [n, D] and their sizes [n] to the outputs."""

    embed: Callable[[Tensor], Tensor]
    num_prefix_tokens: int
    layers: list[SlowLayer]
    head: Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One backbone: `make` takes changes to its config and gives it four layers; `take_apart` makes `outputs`."""

    name: str
    make: Callable[..., Any]
    auto: Any
    outputs: tuple[str, ...]
    take_apart: Callable[[Any], SlowModel]
    image_size: int = 32
    other_image_sizes: tuple[int, ...] = ()


def make_vit(model_class: type, **changes: Any) -> Any:
    torch.manual_seed(1)
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "num_labels": 10,
        "initializer_range": 0.2,
    }
    return model_class(ViTConfig(**{**values, **changes})).eval()


def take_vit_apart(model: Any) -> SlowModel:
    encoder = model if isinstance(model, ViTModel) else model.vit

    def layer(stock: Any) -> SlowLayer:
        attention = stock.attention
        return SlowLayer(
            norm=stock.layernorm_before,
            queries=attention.q_proj,
            keys=attention.k_proj,
            values=attention.v_proj,
            heads=attention.num_attention_heads,
            scaling=attention.scaling,
            project=attention.o_proj,
            mlp=lambda x: stock.mlp(stock.layernorm_after(x)),
        )

    def head(x: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        x = encoder.layernorm(x)
        if encoder is model:
            return {"last_hidden_state": x, "pooler_output": encoder.pooler(x.unsqueeze(0)).squeeze(0)}
        return {"logits": model.classifier(x[0])}

    return SlowModel(
        embed=lambda image: encoder.embeddings(image.unsqueeze(0)).squeeze(0),
        num_prefix_tokens=1,
        layers=[layer(stock) for stock in encoder.layers],
        head=head,
    )


ROWS = [
    Row(
        "vit",
        lambda **changes: make_vit(ViTModel, **changes),
        dtem_hf.AutoModel,
        ("last_hidden_state", "pooler_output"),
        take_vit_apart,
        other_image_sizes=(48, 16),
    ),
    Row(
        "vit-classifier",
        lambda **changes: make_vit(ViTForImageClassification, **changes),
        dtem_hf.AutoModelForImageClassification,
        ("logits",),
        take_vit_apart,
        other_image_sizes=(48, 16),
    ),
]


@dataclass(frozen=True)
class Method:
    """One reduction method; `config` takes its fields."""

    name: str
    config: Callable[..., MergeConfig]
    learns: bool


METHODS = [Method("tome", ToMeConfig, learns=False), Method("dtem", DTEMConfig, learns=True)]
REDUCTIONS = [9, [11, 0, 14, 3]]
# Softly merged tokens are sorted by size. At the published temperatures most sizes are equal but for rounding, so
# their order, and all that follows, is left to chance; at these no two are.
MILD = {"score_temperature": 0.5, "assignment_temperature": 1.0}


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def images(row: Row, count: int = 3, size: int | None = None) -> Tensor:
    size = size or row.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def embedding_of(model: nn.Module) -> list[nn.Linear] | None:
    """The learned embedding, found by its published name."""
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "merge_embedding"]
    return list(found[0].layers) if found else None


def merged(row: Row, method: Method, r: Any = 9, model: Any = None, **fields: Any) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(row.make() if model is None else model, method.config(r=r, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def run(row: Row, model: Any, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The compared outputs of a forward pass without gradients."""
    with torch.no_grad():
        output = model(pixel_values=pixel_values, **kwargs)
    return {name: output[name] for name in row.outputs}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def gradients(row: Row, model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The gradient of a fixed function of all outputs for every parameter that it depends on."""
    model.zero_grad()
    output = model(pixel_values=pixel_values)
    sum((output[name].float() * weigh(output[name])).sum() for name in row.outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weigh(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4))


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
            f"layers.{i}.{part}" for i in range(4) for part in ("weight", "bias")
        }
        assert len(list(model.merge_parameters())) == 8
    else:
        assert extra == []
        assert list(model.merge_parameters()) == []


def slow_outputs(
    row: Row,
    model: Any,
    image: Tensor,
    reductions: list[int],
    method: Method,
    soft: bool = False,
    **temperatures: float,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One image through METHOD.md section 1, layer by layer: outputs, and the sizes behind every layer."""
    parts = row.take_apart(model)
    embedding = embedding_of(model)
    prefix = parts.num_prefix_tokens
    x = parts.embed(image)
    sizes = torch.ones(len(x), dtype=x.dtype)
    active, trail = len(x), []
    for index, (layer, r) in enumerate(zip(parts.layers, reductions, strict=True)):
        h = layer.norm(x)
        q, k, v = layer.queries(h), layer.keys(h), layer.values(h)
        x = x + layer.project(slow.attention(q, k, v, layer.heads, layer.scaling, sizes))
        if embedding is None:
            width = k.shape[-1] // layer.heads
            metric = sum(k[:, head * width : (head + 1) * width] for head in range(layer.heads)) / layer.heads
        else:
            metric = embedding[index](h.detach())
        if r and soft:
            x, sizes = slow.soft_merge(x, sizes, metric, active, r, prefix, **temperatures)
            order = slow.sort_by_size(sizes, active, prefix)
            x, sizes = x[order], sizes[order]
            active -= r
        elif r:
            pairs = slow.hard_matching(metric, r, prefix)
            x, sizes, _, _ = slow.hard_merge(x, sizes, pairs, prefix)
        x = x + layer.mlp(x)
        trail.append(sizes)
    return parts.head(x, sizes), trail


@pytest.mark.parametrize("r", REDUCTIONS, ids=str)
def test_hard_merging_equals_the_slow_reference(row: Row, method: Method, r: Any) -> None:
    """Every image on its own, with loops, in float64."""
    model = merged(row, method, r=r)
    pixel_values = images(row, 2)
    with model.trace_merging() as trace:
        ours = run(row, model, pixel_values)
    reductions = model.merge_plan().reductions
    assert reductions == (r if isinstance(r, list) else [r] * 4)
    exact = copy.deepcopy(model).double()
    for image in range(2):
        with torch.no_grad():
            theirs, trail = slow_outputs(row, exact, pixel_values[image].double(), reductions, method)
        close({name: ours[name][image].double() for name in ours}, theirs, 2e-5)
        for sizes, expected in zip(trace.sizes, trail, strict=True):
            assert torch.equal(sizes[image].double(), expected)


def test_soft_merging_equals_the_slow_reference_with_gradients(row: Row) -> None:
    dtem = next(method for method in METHODS if method.name == "dtem")
    model = merged(row, dtem, r=[7, 0, 6, 5], **MILD).train()
    pixel_values = images(row, 2)
    with model.trace_merging() as trace:
        ours = run(row, model, pixel_values)
    exact = copy.deepcopy(model).double()
    total = 0
    for image in range(2):
        theirs, trail = slow_outputs(
            row, exact, pixel_values[image].double(), [7, 0, 6, 5], dtem, soft=True, t1=0.5, t2=1.0
        )
        close({name: ours[name][image].double() for name in ours}, {k: v.detach() for k, v in theirs.items()}, 2e-5)
        for sizes, expected in zip(trace.sizes, trail, strict=True):
            torch.testing.assert_close(sizes[image].double(), expected.detach(), atol=1e-5, rtol=0)
        total = total + sum((value * weigh(ours[name])[image]).sum() for name, value in theirs.items())
    total.backward()
    our_gradients = gradients(row, model, pixel_values)
    for name, parameter in exact.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-9:
            error = (our_gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-4, (name, error)


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
    assert same_bits(outputs, run(row, model, images(row, 2)))
    assert len(trace.source_maps) == len(trace.sizes) == 4
    for source, sizes, count in zip(trace.source_maps, trace.sizes, plan.tokens, strict=True):
        assert source.dtype == torch.int64
        assert source.shape == (2, plan.num_tokens)
        assert sizes.dtype == torch.float32
        assert sizes.shape == (2, count)
        for image in range(2):
            assert source[image].bincount(minlength=count).tolist() == sizes[image].tolist()
        prefix = row.take_apart(model).num_prefix_tokens
        assert source[:, :prefix].tolist() == [list(range(prefix))] * 2
        assert (sizes[:, :prefix] == 1).all()


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
        assert same_bits(ours, listed)
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


def prediction(row: Row, outputs: dict[str, Tensor]) -> list[int]:
    return outputs[row.outputs[-1]].flatten(1).argmax(-1).tolist()


def test_batch_of_one_and_of_64_predict_the_same(row: Row, method: Method) -> None:
    model, pixel_values = merged(row, method), images(row, 64)
    together = run(row, model, pixel_values)
    alone = [run(row, model, image.unsqueeze(0)) for image in pixel_values]
    assert [prediction(row, outputs)[0] for outputs in alone] == prediction(row, together)
    close({name: torch.cat([outputs[name] for outputs in alone]) for name in row.outputs}, together, 1e-4)


def test_one_and_two_cpu_threads_predict_the_same(row: Row, method: Method) -> None:
    model, pixel_values = merged(row, method), images(row, 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(row, model, pixel_values))
    finally:
        torch.set_num_threads(before)
    assert prediction(row, results[0]) == prediction(row, results[1])
    close(*results, 1e-4)


def test_saved_and_loaded_is_the_same_bit_for_bit(row: Row, method: Method, tmp_path: Path) -> None:
    """The merge and what it has learned come back by themselves."""
    model = merged(row, method, r=[11, 0, 14, 3])
    model.save_pretrained(tmp_path)
    loaded = row.auto.from_pretrained(tmp_path)
    assert loaded.merge_config == model.merge_config
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert same_bits(run(row, loaded, images(row)), run(row, model, images(row)))
    plain = row.auto.from_pretrained(tmp_path, merge=None)
    assert type(plain) is type(row.make())
    assert same_bits(run(row, plain, images(row)), run(row, row.make(), images(row)))


def test_a_base_checkpoint_with_a_config_is_the_attached_model(row: Row, method: Method, tmp_path: Path) -> None:
    row.make().save_pretrained(tmp_path)
    loaded = row.auto.from_pretrained(tmp_path, merge=method.config(r=9))
    assert same_bits(run(row, loaded, images(row)), run(row, attach(row.make(), method.config(r=9)), images(row)))


def test_an_adapter_carries_what_was_learned_bit_for_bit(row: Row, method: Method, tmp_path: Path) -> None:
    """By folder and by object, when loading and on a model in memory."""
    if not method.learns:
        pytest.skip("a method that learns nothing has no adapter")
    model = merged(row, method, r=[11, 0, 14, 3])
    model.save_merge_adapter(tmp_path / "adapter")
    row.make().save_pretrained(tmp_path / "base")
    adapter = MergeAdapter.from_pretrained(tmp_path / "adapter")
    expected = run(row, model, images(row))
    for merge in (tmp_path / "adapter", str(tmp_path / "adapter"), adapter):
        for loaded in (row.auto.from_pretrained(tmp_path / "base", merge=merge), attach(row.make(), merge)):
            assert loaded.merge_config == model.merge_config
            assert same_bits(run(row, loaded, images(row)), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_merged_model_of_its_own(row: Row, method: Method, copied: Callable[[Any], Any]) -> None:
    model = merged(row, method)
    before = run(row, model, images(row))
    twin = copied(model)
    assert same_bits(run(row, twin, images(row)), before)
    assert type(twin) is type(model)
    twin.set_reduction(3)
    for parameter in twin.merge_parameters():
        parameter.data.zero_()
    assert not same_bits(run(row, twin, images(row)), before)
    assert same_bits(run(row, model, images(row)), before)
    assert model.merge_plan().reductions == [9] * 4
    assert same_bits(run(row, detach(twin), images(row)), run(row, row.make(), images(row)))


def test_threads_on_one_model_do_not_see_each_others_options(row: Row, method: Method) -> None:
    """One traces, one runs unmerged, one just runs, all at the same time and again and again."""
    model = merged(row, method)
    pixel_values = [images(row, count) for count in (1, 2, 3)]
    plain = run(row, row.make(), pixel_values[1])
    expected = run(row, model, pixel_values[2])
    with model.trace_merging() as alone:
        traced = run(row, model, pixel_values[0])
    barrier, failures = threading.Barrier(3), []

    def repeatedly(check: Callable[[], None]) -> None:
        try:
            for _ in range(8):
                barrier.wait(timeout=60)
                check()
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    def trace() -> None:
        with model.trace_merging() as found:
            close(run(row, model, pixel_values[0]), traced)
        assert all(torch.equal(a, b) for a, b in zip(found.source_maps, alone.source_maps, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found.sizes, alone.sizes, strict=True))

    def unmerged() -> None:
        with model.unmerged():
            close(run(row, model, pixel_values[1]), plain)

    threads = [
        threading.Thread(target=repeatedly, args=(check,))
        for check in (trace, unmerged, lambda: close(run(row, model, pixel_values[2]), expected))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_graph_of_torch_compile_equals_eager(row: Row, method: Method) -> None:
    """As Dynamo and AOTAutograd make it, without a break."""
    torch._dynamo.reset()
    model = merged(row, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(run(row, compiled, images(row)), run(row, model, images(row)))


def test_one_graph_of_torch_compile_trains_as_eager_does(row: Row, method: Method) -> None:
    if not method.learns:
        pytest.skip("a method that learns nothing is the same in training")
    torch._dynamo.reset()
    model = merged(row, method, **MILD).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = {name.removeprefix("_orig_mod."): value for name, value in gradients(row, compiled, images(row)).items()}
    theirs = gradients(row, model, images(row))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm() + 1e-5, name


@cache
def exported(row: Row, method: Method) -> tuple[Any, torch.export.ExportedProgram]:
    """A merged model, and its graph for any batch."""
    model = merged(row, method)
    batch = torch.export.Dim("batch", min=1, max=64)
    pixel_values = {"pixel_values": images(row, 2)}
    return model, torch.export.export(model, (), pixel_values, dynamic_shapes={"pixel_values": {0: batch}})


def test_exported_with_a_dynamic_batch_equals_eager(row: Row, method: Method) -> None:
    model, program = exported(row, method)
    for count in (1, 2, 7):
        close(run(row, program.module(), images(row, count)), run(row, model, images(row, count)))


def test_onnx_runtime_with_a_dynamic_batch_equals_eager(row: Row, method: Method, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, program = exported(row, method)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(program, f=path, output_names=list(row.outputs), dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 7):
        ours = session.run(list(row.outputs), {"pixel_values": images(row, count).numpy()})
        named = dict(zip(row.outputs, map(torch.from_numpy, ours), strict=True))
        close(named, run(row, model, images(row, count)), 1e-4)
