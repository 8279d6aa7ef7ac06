"""Compilers and exports, for every family: one graph of torch.compile, torch.export and ONNX Runtime for any batch.

What a family cannot do stands in its case with the reason, and is tested, too: the plain model cannot do it either.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dtem_hf import (
    DTEMConfig,
    DTPSConfig,
    ETPSConfig,
    EViTConfig,
    PiToMeConfig,
    ToFuConfig,
    ToMeConfig,
    attach,
    detach,
)
from tests.support.ecosystem import exported_models, lacks
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.unmerging import layers_of


MERGE = ToMeConfig(r=6)
EXPORTED = [(case, model_class) for case in CASES.values() for model_class in exported_models(case)]
by_exported = pytest.mark.parametrize(
    "case, model_class", EXPORTED, ids=[model_class.__name__ for _, model_class in EXPORTED]
)


def make_merged(case: FamilyCase, model_class: Any, config: Any = MERGE, eager: bool = False) -> Any:
    """A merged model: the layers behind the first see merged tokens.

    Of the families, ViT's merge again: a second merge adds operators to a graph that the first has, and that are the
    same for every family.
    """
    model = attach(case.make_small(model_class, "eager" if eager else None), config)
    if case.family != "vit":
        model.set_reduction([MERGE.r, *[0] * (len(layers_of(model)) - 1)])
    return model


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        first = model(**inputs)[0]
    return first[0] if isinstance(first, tuple) else first  # of a backbone, the first feature map


@by_exported
def test_one_graph_of_torch_compile(case: FamilyCase, model_class: Any, config: Any = MERGE) -> None:
    """Dynamo's; that the operators of a family can be traced behind it is seen where its graph is exported."""
    torch._dynamo.reset()
    model = make_merged(case, model_class, config)
    backend = "aot_eager" if lacks(case, "export") else "eager"
    if lacks(case, "compile"):
        from_torch_2_13 = torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode
        with pytest.raises((from_torch_2_13, torch._dynamo.exc.TorchDynamoException)):
            compiled = torch.compile(case.make_small(model_class), fullgraph=True, backend=backend)
            first_output(compiled, case.small_inputs(3))
        return
    try:
        ours = first_output(torch.compile(model, fullgraph=True, backend=backend), case.small_inputs(3))
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            first_output(torch.compile(detach(model), fullgraph=True, backend=backend), case.small_inputs(3))
        pytest.skip("with these versions, the plain model does not compile either")
    theirs = first_output(model, case.small_inputs(3))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "qwen2_vl"])
def test_behind_a_graph_break_a_compiled_encoder_is_merged_all_the_same(family: str) -> None:
    torch._dynamo.reset()
    case = CASES[family]
    model = make_merged(case, case.encoder)
    expected = first_output(model, case.small_inputs(2))
    layers_of(model)[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(first_output(compiled, case.small_inputs(2)), expected, atol=1e-5, rtol=1e-5)


def export(model: Any, case: FamilyCase) -> torch.export.ExportedProgram:
    inputs, batch = case.small_inputs(2), torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})


@cache
def exported(family: str, model_class: Any) -> tuple[Any, torch.export.ExportedProgram]:
    """A merged model and its graph for any batch, as the ONNX exporter can read it."""
    case = CASES[family]
    model = make_merged(case, model_class, eager="onnx" in case.eager_only)
    return model, export(model, case)


def assert_exports(case: FamilyCase, model: Any, program: torch.export.ExportedProgram) -> None:
    for count in (1, 5):
        inputs = case.small_inputs(count)
        ours, theirs = first_output(program.module(), inputs), first_output(model, inputs)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@by_exported
def test_export_with_a_dynamic_batch(case: FamilyCase, model_class: Any) -> None:
    if lacks(case, "export"):
        with pytest.raises(Exception, match=r"batch|data-dependent"):
            export(case.make_small(model_class), case)
        return
    model, program = exported(case.family, model_class)
    assert_exports(case, model, program)
    if "onnx" in case.eager_only:
        model = make_merged(case, model_class)
        assert_exports(case, model, export(model, case))


def write_onnx(program: torch.export.ExportedProgram, path: str) -> None:
    torch.onnx.export(program, f=path, dynamo=True, optimize=False, verbose=False)


def assert_onnx_runs(case: FamilyCase, model: Any, program: torch.export.ExportedProgram, path: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    write_onnx(program, path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        ours = session.run(None, {name: value.numpy() for name, value in case.small_inputs(count).items()})[0]
        torch.testing.assert_close(
            torch.from_numpy(ours), first_output(model, case.small_inputs(count)), atol=1e-4, rtol=1e-4
        )


def described(program: torch.export.ExportedProgram) -> str:
    """A graph without its weights: each operator with all its arguments, and the shapes of what it returns."""
    numbers = {node: f"%{number}" for number, node in enumerate(program.graph.nodes)}
    lines = []
    for node, number in numbers.items():
        arguments = torch.fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        made = tree_map(lambda value: getattr(value, "dtype", ""), node.meta.get("val"))
        shapes = tree_map(lambda value: getattr(value, "shape", value), node.meta.get("val"))
        lines.append(f"{number} = {'' if node.op == 'placeholder' else node.target}{arguments}: {made} {shapes}")
    return "\n".join(lines)


RAN_IN_ONNX_RUNTIME: set[str] = set()


@by_exported
def test_onnx_runtime_with_a_dynamic_batch(case: FamilyCase, model_class: Any, tmp_path: Path) -> None:
    """The exporter sees a graph, and not a family: of graphs that are equal but for their weights, one is written."""
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    if lacks(case, "onnx") or "onnx" in case.eager_only:
        plain = case.make_small(model_class)
        with pytest.raises(Exception):  # noqa: B017 (what torch.onnx or onnxruntime raises is its own affair)
            assert_onnx_runs(case, plain, export(plain, case), path)
    if not lacks(case, "onnx"):
        model, program = exported(case.family, model_class)
        graph = described(program)
        if graph not in RAN_IN_ONNX_RUNTIME:
            assert_onnx_runs(case, model, program, path)
        RAN_IN_ONNX_RUNTIME.add(graph)


OTHER_METHODS = [
    DTEMConfig(r=6),
    EViTConfig(layers=[0, 1]),
    ETPSConfig(layers=[0, 1]),
    DTPSConfig(layers=[1]),
    PiToMeConfig(r=6),
    ToFuConfig(r=6),
]


@pytest.mark.parametrize("config", OTHER_METHODS, ids=lambda config: config.method)
def test_other_methods_are_one_graph_of_torch_compile(config: Any) -> None:
    test_one_graph_of_torch_compile(CASES["vit"], CASES["vit"].encoder, config)


@pytest.mark.parametrize("config", OTHER_METHODS, ids=lambda config: config.method)
def test_other_methods_are_exported(config: Any, tmp_path: Path) -> None:
    """That of the table is ToMe, as its keys are each family's own."""
    pytest.importorskip("onnxscript")
    case = CASES["vit"]
    model = make_merged(case, case.encoder, config)
    program = export(model, case)
    assert_exports(case, model, program)
    assert_onnx_runs(case, model, program, str(tmp_path / "model.onnx"))
