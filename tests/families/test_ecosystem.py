"""What people do with models, for every family: pipelines, registration, device maps, dtypes, compilers, exports.

What a family cannot do stands in its case with the reason, and is tested, too: the plain model cannot do it either.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    ASTFeatureExtractor,
    BertTokenizer,
    Blip2Processor,
    BlipProcessor,
    GitProcessor,
    InstructBlipProcessor,
    OwlViTImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTImageProcessorPil,
)

import dtem_hf
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
    register,
    unregister,
)
from dtem_hf.models.attach import merged_class
from tests.support.ecosystem import (
    DOCUMENT,
    MOST_USED,
    document,
    exported_models,
    lacks,
    models_of,
    tasks_of,
)
from tests.support.families import CASES
from tests.support.family_case import PATCH, WORDS, FamilyCase
from tests.support.passes import as_dtype
from tests.support.unmerging import layers_of, tensors


MERGE = ToMeConfig(r=6)
SIDE = 24
AUTO = [(case, auto, model_class) for case in CASES.values() for auto, model_class in models_of(case)]
by_model = pytest.mark.parametrize(
    "case, auto, model_class", AUTO, ids=[f"{auto}-{model_class.__name__}" for _, auto, model_class in AUTO]
)


@pytest.fixture(params=CASES.values(), ids=str)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return request.param


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


# Auto classes


def same_weights(ours: Any, theirs: Any) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.usefixtures("registered")
@by_model
def test_registered_auto_classes_merge(case: FamilyCase, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A checkpoint of every class of every family comes back as that class, plain or merged, as is asked."""
    stock, plain = getattr(transformers, auto), case.make_small(model_class)
    if auto == "AutoBackbone":  # asks the Hub before it looks into a folder, so this is as far as it goes without one
        merged = stock.from_config(attach(plain, MERGE).config)
        assert isinstance(merged, model_class)
        assert merged.merge_config == MERGE
        return
    plain.save_pretrained(tmp_path)
    merged = stock.from_pretrained(tmp_path, merge=MERGE)
    assert type(merged) is type(attach(case.make_small(model_class), MERGE))
    assert merged.merge_config == MERGE
    assert same_weights(merged, plain)
    for kwargs in ({}, {"merge": None}):
        found = stock.from_pretrained(tmp_path, **kwargs)
        assert type(found) is model_class
        assert same_weights(found, plain)
    merged.save_pretrained(tmp_path)
    again = stock.from_pretrained(tmp_path)
    assert type(again) is type(merged)
    assert again.merge_config == MERGE


@by_model
def test_auto_classes_of_our_own_merge(case: FamilyCase, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A base checkpoint with a learned method, and what was saved merged."""
    plain = case.make_small(model_class)
    plain.save_pretrained(tmp_path)
    ours = getattr(dtem_hf, auto)
    merged = ours.from_pretrained(tmp_path, merge=DTEMConfig(r=6))
    assert type(merged) is type(attach(plain, DTEMConfig(r=6)))
    assert same_weights(merged, plain)
    merged.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path)
    assert type(again) is type(merged)
    assert same_weights(again, merged)


def test_registration_is_idempotent_and_undone() -> None:
    """For every Auto class and config, down to the order of several classes for one config."""

    def chosen() -> list[tuple[type, ...]]:
        found = [getattr(transformers, auto)._model_mapping[cls.config_class] for _, auto, cls in AUTO]
        return [each if isinstance(each, tuple) else (each,) for each in found]

    before = chosen()
    unregister()
    assert chosen() == before
    register()
    once = chosen()
    register()
    assert chosen() == once
    assert all(
        issubclass(one, other) for a, b in zip(once, before, strict=True) for one, other in zip(a, b, strict=True)
    )
    assert not set(once) & set(before)
    unregister()
    unregister()
    assert chosen() == before


# Pipelines


def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocabulary, model_input_names=["input_ids", "attention_mask"])


def parts(case: FamilyCase, task: str) -> dict[str, Any]:
    """What a pipeline needs beside the model."""
    size = {"height": SIDE, "width": SIDE}
    if task == "audio-classification":
        return {"feature_extractor": ASTFeatureExtractor(num_mel_bins=SIDE, max_length=SIDE)}
    look = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=36)
    look = look if case.family == "siglip2" else ViTImageProcessorPil(size=size)
    if task == "zero-shot-object-detection":
        look = OwlViTImageProcessorPil(size=size, crop_size=size)
    if task == "image-text-to-text" and case.family == "blip_2":
        return {"processor": Blip2Processor(look, tokenizer(), num_query_tokens=4)}
    if task == "image-text-to-text" and case.family == "instructblip":
        return {"processor": InstructBlipProcessor(look, tokenizer(), tokenizer(), num_query_tokens=4)}
    if task == "image-text-to-text":
        return {"processor": (GitProcessor if case.family == "git" else BlipProcessor)(look, tokenizer())}
    return {"image_processor": look, **({"tokenizer": tokenizer()} if task.startswith("zero-shot") else {})}


def ask(task: str, pipe: Any) -> Any:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)).resize((40, 50))
    torch.manual_seed(0)  # what is masked at random is masked alike
    if task == "audio-classification":
        return pipe(np.random.default_rng(0).standard_normal(8000, dtype=np.float32))
    if task.startswith("zero-shot"):
        options = {"threshold": 0.0} if task == "zero-shot-object-detection" else {}
        return pipe(image, candidate_labels=["cat", "dog", "hen"], **options)
    if task == "image-text-to-text":
        return pipe(images=image, text="a photo", max_new_tokens=4)
    return pipe(image)


def alike(ours: Any, theirs: Any) -> None:
    if isinstance(theirs[0], dict):
        near = [{k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in x.items()} for x in theirs]
        assert ours == near
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


PIPELINES = [(case, *rest) for case in CASES.values() for rest in tasks_of(case)]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "case, task, auto, model_class", PIPELINES, ids=[f"{task}-{cls.__name__}" for _, task, _, cls in PIPELINES]
)
def test_pipelines_run_merged_models(case: FamilyCase, task: str, auto: str, model_class: Any, tmp_path: Path) -> None:
    """One that is given, one that is loaded with `model_kwargs`, one that was saved merged: they answer alike."""
    plain = case.make_small(model_class)
    plain.save_pretrained(tmp_path / "plain")
    merged = attach(case.make_small(model_class), MERGE)
    merged.save_pretrained(tmp_path / "merged")
    given = transformers.pipeline(task, model=merged, **parts(case, task))
    plan = merged.merge_plan()
    with merged.trace_merging() as trace:
        answer = ask(task, given)
    assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
    for folder, kwargs in (("plain", {"model_kwargs": {"merge": MERGE}}), ("merged", {})):
        pipe = transformers.pipeline(task, model=str(tmp_path / folder), device="cpu", **kwargs, **parts(case, task))
        assert type(pipe.model) is type(merged)
        assert pipe.model.merge_config == MERGE
        alike(ask(task, pipe), answer)


# Where and as what weights are loaded


@pytest.fixture
def folder(case: FamilyCase, tmp_path: Path) -> Path:
    """A plain model that `AutoModel` yields, with all that its family has."""
    case.make_small(widest(case)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def widest(case: FamilyCase) -> Any:
    """The model with the most around the encoder, of those that `AutoModel` yields; else the encoder."""
    return [case.encoder, *(model_class for auto, model_class in models_of(case) if auto == "AutoModel")][-1]


def loader(case: FamilyCase) -> Any:
    """`AutoModel`, or the merged encoder's class where that yields none of the family's models."""
    known = any(auto == "AutoModel" for auto, _ in models_of(case))
    return dtem_hf.AutoModel if known else merged_class(case.encoder)


def all_inputs(case: FamilyCase, count: int) -> dict[str, Tensor]:
    """With a text for those that read one."""
    return {**case.small_inputs(count), **case.words(widest(case), count)}


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors of a forward pass, also those of outputs inside the output."""
    with torch.no_grad():
        return tensors(model(**inputs))


both_methods = pytest.mark.parametrize("config", [MERGE, DTEMConfig(r=6)], ids=["tome", "dtem"])


@both_methods
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(case: FamilyCase, folder: Path, device_map: str, config: Any) -> None:
    expected = outputs(loader(case).from_pretrained(folder, merge=config), all_inputs(case, 2))
    model = loader(case).from_pretrained(folder, merge=config, device_map=device_map)
    close(outputs(model, all_inputs(case, 2)), expected)


def first_layer_on_disk(model: Any) -> dict[str, str]:
    """A device map that leaves everything else on the CPU."""
    first = layers_of(model)[0]
    held = [name for name, module in model.named_modules() if first in module.modules()]
    names = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in held]
    names += [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name.count(".") == 0]
    return {name: "cpu" for name in names if name not in held and f"{held[-1]}." not in name} | {held[-1]: "disk"}


@both_methods
def test_weights_on_disk(case: FamilyCase, folder: Path, config: Any, tmp_path: Path) -> None:
    """Accelerate brings them in for as long as their module runs: loaded merged, and merged when already there."""
    plain, merged = case.make_small(widest(case)), attach(case.make_small(widest(case)), config)
    inputs = all_inputs(case, 2)
    before, behind = outputs(plain, inputs), outputs(merged, inputs)
    options = {"device_map": first_layer_on_disk(merged), "offload_folder": tmp_path / "disk"}
    loaded = loader(case).from_pretrained(folder, merge=config, **options)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    close(outputs(loaded, inputs), behind)
    options["device_map"] = first_layer_on_disk(plain)
    model = loader(case).from_pretrained(folder, **options)
    close(outputs(model, inputs), before)
    close(outputs(attach(model, config), inputs), behind)
    close(outputs(detach(model), inputs), before)


def test_loading_as_bfloat16(case: FamilyCase, folder: Path) -> None:
    """Also what is learned; sizes stay float32."""
    if lacks(case, "bfloat16"):
        with pytest.raises(RuntimeError, match="dtype"):
            outputs(case.make_small(widest(case)).bfloat16(), as_dtype(all_inputs(case, 2), torch.bfloat16))
        return
    model = loader(case).from_pretrained(folder, merge=DTEMConfig(r=6), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = as_dtype(all_inputs(case, 2), torch.bfloat16)
    with model.trace_merging() as trace:
        found = outputs(model, inputs)
    assert {sizes.dtype for sizes in trace.sizes} == {torch.float32}
    assert all(value.isfinite().all() for value in found)
    assert torch.bfloat16 in {value.dtype for value in found}


# Compilers and exports

EXPORTED = [(case, model_class) for case in CASES.values() for model_class in exported_models(case)]
by_exported = pytest.mark.parametrize(
    "case, model_class", EXPORTED, ids=[model_class.__name__ for _, model_class in EXPORTED]
)


def make_merged(case: FamilyCase, model_class: Any, config: Any = MERGE, eager: bool = False) -> Any:
    return attach(case.make_small(model_class, "eager" if eager else None), config)


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        first = model(**inputs)[0]
    return first[0] if isinstance(first, tuple) else first  # of a backbone, the first feature map


@by_exported
def test_one_graph_of_torch_compile(case: FamilyCase, model_class: Any, config: Any = MERGE) -> None:
    torch._dynamo.reset()
    model = make_merged(case, model_class, config)
    if lacks(case, "compile"):
        with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
            compiled = torch.compile(case.make_small(model_class), fullgraph=True, backend="aot_eager")
            first_output(compiled, case.small_inputs(3))
        return
    try:
        ours = first_output(torch.compile(model, fullgraph=True, backend="aot_eager"), case.small_inputs(3))
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            first_output(torch.compile(detach(model), fullgraph=True, backend="aot_eager"), case.small_inputs(3))
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
def exported(family: str, model_class: Any, config: Any = MERGE) -> tuple[Any, torch.export.ExportedProgram]:
    """A merged model and its graph for any batch, as the ONNX exporter can read it."""
    case = CASES[family]
    model = make_merged(case, model_class, config, eager="onnx" in case.eager_only)
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
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        ours = session.run(None, {name: value.numpy() for name, value in case.small_inputs(count).items()})[0]
        torch.testing.assert_close(
            torch.from_numpy(ours), first_output(model, case.small_inputs(count)), atol=1e-4, rtol=1e-4
        )


@by_exported
def test_onnx_runtime_with_a_dynamic_batch(case: FamilyCase, model_class: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    if lacks(case, "onnx") or "onnx" in case.eager_only:
        plain = case.make_small(model_class)
        with pytest.raises(Exception):  # noqa: B017 (what torch.onnx or onnxruntime raises is its own affair)
            assert_onnx_runs(case, plain, export(plain, case), path)
    if not lacks(case, "onnx"):
        assert_onnx_runs(case, *exported(case.family, model_class), path)


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


# The table of all this


def test_the_documented_table_is_what_is_tested_here() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()
    columns = {column for case in CASES.values() for column in (*case.lacking, *case.eager_only)}
    assert columns <= {"pipelines", "bfloat16", "compile", "export", "onnx"}


def test_all_holds_for_the_families_that_most_people_use() -> None:
    whole = {case.family for case in CASES.values() if not case.lacking and not case.eager_only}
    assert whole >= set(MOST_USED)
