"""What a pass of a merged model keeps beside the promises in `families/test_promises.py`: tested on ViT alone."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from dtem_hf import DTEMConfig, MergeConfig, ToMeConfig, UnsupportedModelError, attach, detach
from dtem_hf.models.install import recorded_steps
from tests.support import methods
from tests.support.families import row_of
from tests.support.family_case import Row
from tests.support.passes import MILD, gradients, merged, run, same_bits
from tests.support.unmerging import layers_of


METHODS: dict[str, MergeConfig] = {"tome": ToMeConfig(r=9), "dtem": DTEMConfig(r=9)}


@pytest.fixture(params=["vit", "vit-bare"])
def row(request: pytest.FixtureRequest) -> Row:
    return row_of(request.param)


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> MergeConfig:
    return METHODS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str)
@pytest.mark.parametrize("make", [ToMeConfig, DTEMConfig])
def test_low_precision_is_near_float32(row: Row, make: Any, dtype: torch.dtype, tolerance: float) -> None:
    """As far as the dtype goes, where one merge, of the two tokens most alike, is the same in both."""
    ours, theirs = (run(row, merged(row, make(r=[1, 0, 0, 0]), dtype=kind)) for kind in (dtype, torch.float32))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_keeps_sizes_in_float32_and_everything_finite(row: Row, config: MergeConfig, training: bool) -> None:
    model = merged(row, config).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with model.trace_merging() as trace:
            outputs = run(row, model)
        found = gradients(row, model)
    assert all(value.isfinite().all() for value in (*outputs.values(), *found.values()))
    for sizes in trace.sizes:
        assert sizes.dtype == torch.float32
        whole = torch.full((2,), float(model.merge_plan().num_tokens))
        torch.testing.assert_close(sizes.sum(1), whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_on_the_meta_device_a_pass_has_the_shapes_of_a_real_one(row: Row, method: str, training: bool) -> None:
    """As programs need that plan memory before weights are loaded."""
    model = attach(row.make(), methods.METHODS[method].config).train(training)
    pixels = row.inputs(2)["pixel_values"]
    real = model(pixels)[0]
    empty = model.to("meta")(pixels.to("meta"))[0]
    assert empty.is_meta and empty.shape == real.shape and empty.dtype == real.dtype


def test_reentrant_checkpointing_changes_no_gradient_or_is_refused(row: Row, config: MergeConfig) -> None:
    """It never loses a gradient silently."""
    expected = gradients(row, merged(row, config).train())
    model = merged(row, config).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        found = gradients(row, model)
    except ValueError as error:
        assert "use_reentrant" in str(error)
        return
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_layer_is_refused(row: Row, config: MergeConfig, reentrant: bool) -> None:
    """It would run the plain layer again, and soft merging would get the gradient of that."""
    model = merged(row, config).train()
    layers = layers_of(model)
    for index, layer in enumerate(list(layers)):
        implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_enable"):
        gradients(row, model)


def test_gradient_checkpointing_works_for_a_frozen_backbone(row: Row) -> None:
    """Modular training: only the embedding learns."""
    found = []
    for checkpointing in (False, True):
        model = merged(row, METHODS["dtem"]).train().requires_grad_(False)
        for parameter in model.merge_parameters():
            parameter.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(row, model))
    assert all("merge_embedding" in name for name in found[0])
    assert len(found[0]) >= 6  # what the last of four layers merges may reach nothing
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_merged_model_of_its_own(row: Row, config: MergeConfig, copied: Callable[[Any], Any]) -> None:
    model = merged(row, config)
    before = run(row, model)
    twin = copied(model)
    assert same_bits(run(row, twin), before)
    assert type(twin) is type(model)
    twin.set_reduction(3)
    for parameter in twin.merge_parameters():
        parameter.zero_()
    assert not same_bits(run(row, twin), before)
    assert same_bits(run(row, model), before)
    assert model.merge_plan().reductions == [9] * 4
    assert same_bits(run(row, detach(twin)), run(row, row.make()))


def test_threads_on_one_model_do_not_see_each_others_options(row: Row, config: MergeConfig) -> None:
    """One traces, one runs unmerged, one just runs, all at the same time and again and again."""
    model = merged(row, config)
    inputs = [row.inputs(count) for count in (1, 2, 3)]

    def close(ours: Any, theirs: Any) -> None:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        plain, expected = run(row, row.make(), inputs[1]), run(row, model, inputs[2])
        with model.trace_merging() as alone:
            traced = run(row, model, inputs[0])
    barrier, failures = threading.Barrier(3), []

    @torch.no_grad()
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
            close(run(row, model, inputs[0]), traced)
        assert all(torch.equal(a, b) for a, b in zip(found.source_maps, alone.source_maps, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found.sizes, alone.sizes, strict=True))

    def unmerged() -> None:
        with model.unmerged():
            close(run(row, model, inputs[1]), plain)

    checks = (trace, unmerged, lambda: close(run(row, model, inputs[2]), expected))
    threads = [threading.Thread(target=repeatedly, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.no_grad()
def test_a_task_that_outlives_a_block_runs_without_its_options(row: Row) -> None:
    """asyncio gives a task a copy of the context, with the block that has ended meanwhile."""
    model, plain = merged(row, METHODS["tome"]), row.make()
    expected, unmerged = run(row, model), run(row, plain)

    async def program() -> None:
        ended = asyncio.Event()

        async def task(inside: dict[str, torch.Tensor]) -> None:
            assert same_bits(run(row, model), inside)
            await ended.wait()
            with model.trace_merging() as own:
                assert same_bits(run(row, model), expected)
            assert len(own.sizes) == 4

        with model.trace_merging() as trace, recorded_steps(model) as steps:
            tasks = [asyncio.create_task(task(expected))]
            await asyncio.sleep(0)
            kept, recorded = list(trace.sizes), len(steps)
            with model.unmerged():
                tasks.append(asyncio.create_task(task(unmerged)))
                await asyncio.sleep(0)
        assert len(kept) == recorded == 4
        ended.set()
        await asyncio.gather(*tasks)
        assert all(ours is theirs for ours, theirs in zip(trace.sizes, kept, strict=True))
        assert len(steps) == recorded

    asyncio.run(program())


def test_one_graph_of_torch_compile_trains_as_eager_does(row: Row) -> None:
    torch._dynamo.reset()
    model = attach(row.make(num_hidden_layers=2), DTEMConfig(r=9, **MILD)).train()
    found = []
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        each(**row.inputs(2))[row.output].square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    theirs, ours = found
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm() + 1e-5, name


@torch.no_grad()
def test_a_compiled_model_follows_the_options_of_its_passes() -> None:
    """DINOv2's classifier opens a scope around its encoder's."""
    torch._dynamo.reset()
    row = row_of("dinov2")
    model = merged(row, METHODS["tome"])
    plain, expected = run(row, row.make("sdpa")), run(row, model)
    compiled = torch.compile(model, backend="eager")
    assert same_bits(run(row, compiled), expected)
    with model.unmerged():
        assert same_bits(run(row, compiled), plain)
    with model.trace_merging() as trace:
        assert same_bits(run(row, compiled), expected)
    assert [sizes.shape[1] for sizes in trace.sizes] == list(model.merge_plan().tokens)
    assert same_bits(run(row, compiled), expected)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with model.unmerged(), pytest.raises(torch._dynamo.exc.Unsupported, match="unmerged"):
        run(row, whole)


@torch.no_grad()
def test_an_unmerged_model_is_exported_without_merging(row: Row, config: MergeConfig) -> None:
    model = merged(row, config)
    with model.unmerged():
        exported = torch.export.export(model, (), row.inputs(2))
    assert same_bits(run(row, exported.module()), run(row, row.make("sdpa")))
