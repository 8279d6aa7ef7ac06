"""Every promise about a merged ViT in use: batches, threads, files, copies, and graphs made of it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtem_hf import MergeAdapter, attach, detach
from tests.support.vit_rows import (  # noqa: F401
    MILD,
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
