"""What people do with models, for every family: pipelines, registration, device maps, dtypes, compilers, exports.

A new family is one entry of `ROWS`. What a family cannot do stands in `lacking` with the reason, and is tested, too:
the plain model cannot do it either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    BeitConfig,
    BertTokenizer,
    BlipConfig,
    BlipProcessor,
    BlipVisionConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    GitConfig,
    GitProcessor,
    GitVisionConfig,
    PretrainedConfig,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMSNConfig,
)

import dtem_hf
from dtem_hf import DTEMConfig, ToMeConfig, attach, detach, register, unregister
from dtem_hf.backbones import families
from dtem_hf.modeling import merged_layers


SIDE, PATCH, PATCHES = 24, 4, 36
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
NAFLEX = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": PATCHES}
DINO = {**{k: v for k, v in VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", ".", "cat", "dog", "hen"]
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
BLIP_TEXT = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 3}
MERGE = ToMeConfig(r=6)
TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def images(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))}


def noisy_images(count: int) -> dict[str, Tensor]:
    """With the noise that decides which patches are masked."""
    return {**images(count), "noise": torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(3))}


def patches(count: int) -> dict[str, Tensor]:
    """Images of six by six patches, the first of five by six and with padding."""
    generator = torch.Generator().manual_seed(2)
    mask, shapes = torch.ones(count, PATCHES, dtype=torch.int32), torch.full((count, 2), 6)
    mask[0, 30:], shapes[0, 0] = 0, 5
    pixel_values = torch.randn(count, PATCHES, 3 * PATCH**2, generator=generator)
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@dataclass(frozen=True)
class Row:
    """One family: a small config for each of its config classes, and what goes into its encoder.

    `lacking` names what does not hold ("compile", "export", "onnx"), and why.
    """

    name: str
    configs: tuple[PretrainedConfig, ...]
    encoder: str
    inputs: Callable[[int], dict[str, Tensor]] = images
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def encoder_class(self) -> Any:
        return getattr(transformers, self.encoder)

    def make(self, model_class: Any) -> Any:
        """A plain model with random weights, always the same ones."""
        config = next(config for config in self.configs if type(config) is model_class.config_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return model_class(copy.deepcopy(config)).eval()


def relative_bias(**values: Any) -> dict[str, Any]:
    return {**values, "use_shared_relative_position_bias": True}


SDPA_ONNX = "torch.onnx cannot follow SDPA with a bias for every pair of tokens; attn_implementation='eager' goes"
ROWS = [
    Row("vit", (ViTConfig(**VISION),), "ViTModel"),
    Row("deit", (DeiTConfig(**VISION),), "DeiTModel"),
    Row("vit_msn", (ViTMSNConfig(**VISION),), "ViTMSNModel"),
    Row(
        "vit_mae",
        (ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),),
        "ViTMAEModel",
        noisy_images,
    ),
    Row(
        "beit",
        (BeitConfig(**{**relative_bias(**VISION), "num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]}),),
        "BeitModel",
        lacking={"onnx": SDPA_ONNX},
    ),
    Row(
        "data2vec_vision",
        (Data2VecVisionConfig(**relative_bias(**VISION)),),
        "Data2VecVisionModel",
        lacking={"onnx": SDPA_ONNX},
    ),
    Row("dinov2", (Dinov2Config(**DINO),), "Dinov2Model"),
    Row("dinov2_with_registers", (Dinov2WithRegistersConfig(**DINO),), "Dinov2WithRegistersModel"),
    Row("dinov3_vit", (DINOv3ViTConfig(**VISION),), "DINOv3ViTModel"),
    Row(
        "clip",
        (CLIPVisionConfig(**VISION), CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)),
        "CLIPVisionModel",
    ),
    Row(
        "siglip",
        (SiglipVisionConfig(**VISION), SiglipConfig(vision_config=VISION, text_config=TEXT)),
        "SiglipVisionModel",
    ),
    Row(
        "siglip2",
        (Siglip2VisionConfig(**NAFLEX), Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
        "Siglip2VisionModel",
        patches,
        lacking=dict.fromkeys(["export", "onnx"], "positions are resized image by image, in a loop over the batch"),
    ),
    Row("git", (GitVisionConfig(**VISION), GitConfig(vision_config=VISION, **TEXT)), "GitVisionModel"),
    Row(
        "blip",
        (BlipVisionConfig(**VISION), BlipConfig(vision_config=VISION, text_config=BLIP_TEXT, projection_dim=16)),
        "BlipVisionModel",
    ),
]


def models_of(row: Row) -> list[tuple[str, Any]]:
    """The models of a row's family with the Auto classes that yield them."""
    family = next(each for each in families() if row.encoder_class in each.all_models())
    return [(auto, model_class) for auto, group in family.models.items() for model_class in group]


AUTO = [(row, auto, model_class) for row in ROWS for auto, model_class in models_of(row)]
by_model = pytest.mark.parametrize(
    "row, auto, model_class", AUTO, ids=[f"{auto}-{model_class.__name__}" for _, auto, model_class in AUTO]
)


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


def last_hidden_state(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def merged_encoder(row: Row) -> Any:
    return attach(row.make(row.encoder_class), MERGE)


def test_every_family_has_a_row() -> None:
    rows = {row.encoder_class for row in ROWS}
    assert len(rows) == len(ROWS) == len(families())
    for family in families():
        assert len(rows & set(family.all_models())) == 1, type(family).__name__


# Auto classes


def same_weights(ours: Any, theirs: Any) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.usefixtures("registered")
@by_model
def test_registered_auto_classes_merge(row: Row, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A checkpoint of every class of every family comes back as that class, plain or merged, as is asked."""
    stock, plain = getattr(transformers, auto), row.make(model_class)
    if auto == "AutoBackbone":  # asks the Hub before it looks into a folder, so this is as far as it goes without one
        merged = stock.from_config(attach(plain, MERGE).config)
        assert isinstance(merged, model_class)
        assert merged.merge_config == MERGE
        return
    plain.save_pretrained(tmp_path)
    merged = stock.from_pretrained(tmp_path, merge=MERGE)
    assert type(merged) is type(attach(row.make(model_class), MERGE))
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
def test_auto_classes_of_our_own_merge(row: Row, auto: str, model_class: Any, tmp_path: Path) -> None:
    """A base checkpoint with a learned method, and what was saved merged."""
    plain = row.make(model_class)
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


def parts(row: Row, task: str) -> dict[str, Any]:
    """What a pipeline needs beside the model."""
    size = {"height": SIDE, "width": SIDE}
    look = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=PATCHES)
    look = look if row.name == "siglip2" else ViTImageProcessorPil(size=size)
    if task == "image-text-to-text":
        return {"processor": (GitProcessor if row.name == "git" else BlipProcessor)(look, tokenizer())}
    return {"image_processor": look, **({"tokenizer": tokenizer()} if task.startswith("zero-shot") else {})}


def ask(task: str, pipe: Any) -> Any:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)).resize((40, 50))
    torch.manual_seed(0)  # what is masked at random is masked alike
    if task == "zero-shot-image-classification":
        return pipe(image, candidate_labels=["cat", "dog", "hen"])
    if task == "image-text-to-text":
        return pipe(images=image, text="a photo", max_new_tokens=4)
    return pipe(image)


def alike(ours: Any, theirs: Any) -> None:
    if isinstance(theirs[0], dict):
        near = [{k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in x.items()} for x in theirs]
        assert ours == near
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def tasks_of(row: Row) -> list[tuple[str, str, Any]]:
    """Every task of a family; of those that have none but to see, the features."""
    found = [(TASKS[auto], auto, model_class) for auto, model_class in models_of(row) if auto in TASKS]
    bare = [("image-feature-extraction", auto, each) for auto, each in models_of(row) if auto == "AutoModel"]
    return found or bare


PIPELINES = [(row, *rest) for row in ROWS for rest in tasks_of(row)]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "row, task, auto, model_class", PIPELINES, ids=[f"{task}-{cls.__name__}" for _, task, _, cls in PIPELINES]
)
def test_pipelines_run_merged_models(row: Row, task: str, auto: str, model_class: Any, tmp_path: Path) -> None:
    """One that is given, one that is loaded with `model_kwargs`, one that was saved merged: they answer alike."""
    plain = row.make(model_class)
    plain.save_pretrained(tmp_path / "plain")
    merged = attach(row.make(model_class), MERGE)
    merged.save_pretrained(tmp_path / "merged")
    given = transformers.pipeline(task, model=merged, **parts(row, task))
    plan = merged.merge_plan()
    with merged.trace_merging() as trace:
        answer = ask(task, given)
    assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
    for folder, kwargs in (("plain", {"model_kwargs": {"merge": MERGE}}), ("merged", {})):
        pipe = transformers.pipeline(task, model=str(tmp_path / folder), device="cpu", **kwargs, **parts(row, task))
        assert type(pipe.model) is type(merged)
        assert pipe.model.merge_config == MERGE
        alike(ask(task, pipe), answer)


# Where and as what weights are loaded


@pytest.fixture
def folder(row: Row, tmp_path: Path) -> Path:
    """A plain model that `AutoModel` yields, with all that its family has."""
    row.make(widest(row)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def widest(row: Row) -> Any:
    return next(model_class for auto, model_class in models_of(row) if auto == "AutoModel")


def all_inputs(row: Row, count: int) -> dict[str, Tensor]:
    """With a text for those that read one."""
    inputs = row.inputs(count)
    if hasattr(widest(row).config_class(), "text_config") or row.name == "git":
        inputs["input_ids"] = torch.tensor([[2, 7, 8, 9, 7, 11, 10, 3]] * count)
    return inputs


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All plain tensors of a forward pass."""
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, Tensor)]


both_methods = pytest.mark.parametrize("config", [MERGE, DTEMConfig(r=6)], ids=["tome", "dtem"])


@both_methods
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(row: Row, folder: Path, device_map: str, config: Any) -> None:
    expected = outputs(dtem_hf.AutoModel.from_pretrained(folder, merge=config), all_inputs(row, 2))
    model = dtem_hf.AutoModel.from_pretrained(folder, merge=config, device_map=device_map)
    close(outputs(model, all_inputs(row, 2)), expected)


def first_layer_on_disk(model: Any) -> dict[str, str]:
    """A device map that leaves everything else on the CPU."""
    first = merged_layers(model)[0]
    held = [name for name, module in model.named_modules() if first in module.modules()]
    names = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in held]
    names += [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name.count(".") == 0]
    return {name: "cpu" for name in names if name not in held and f"{held[-1]}." not in name} | {held[-1]: "disk"}


@both_methods
def test_weights_on_disk(row: Row, folder: Path, config: Any, tmp_path: Path) -> None:
    """Accelerate brings them in for as long as their module runs: loaded merged, and merged when already there."""
    plain, merged = row.make(widest(row)), attach(row.make(widest(row)), config)
    inputs = all_inputs(row, 2)
    before, behind = outputs(plain, inputs), outputs(merged, inputs)
    options = {"device_map": first_layer_on_disk(merged), "offload_folder": tmp_path / "disk"}
    loaded = dtem_hf.AutoModel.from_pretrained(folder, merge=config, **options)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    close(outputs(loaded, inputs), behind)
    options["device_map"] = first_layer_on_disk(plain)
    model = dtem_hf.AutoModel.from_pretrained(folder, **options)
    close(outputs(model, inputs), before)
    close(outputs(attach(model, config), inputs), behind)
    close(outputs(detach(model), inputs), before)


def test_loading_as_bfloat16(row: Row, folder: Path) -> None:
    """Also what is learned; sizes stay float32."""
    model = dtem_hf.AutoModel.from_pretrained(folder, merge=DTEMConfig(r=6), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = all_inputs(row, 2)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with model.trace_merging() as trace:
        found = outputs(model, inputs)
    assert [sizes.shape[1] for sizes in trace.sizes] == model.merge_plan().tokens
    assert {sizes.dtype for sizes in trace.sizes} == {torch.float32}
    assert all(value.isfinite().all() for value in found)
    assert torch.bfloat16 in {value.dtype for value in found}


# Compilers and exports


def test_one_graph_of_torch_compile(row: Row) -> None:
    torch._dynamo.reset()
    model = merged_encoder(row)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        last_hidden_state(compiled, row.inputs(3)), last_hidden_state(model, row.inputs(3)), atol=1e-5, rtol=1e-5
    )


def export(model: Any, row: Row) -> torch.export.ExportedProgram:
    inputs, batch = row.inputs(2), torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})


@cache
def exported(row_name: str) -> tuple[Any, torch.export.ExportedProgram]:
    """A merged encoder and its graph for any batch."""
    row = next(row for row in ROWS if row.name == row_name)
    model = merged_encoder(row)
    return model, export(model, row)


def test_export_with_a_dynamic_batch(row: Row) -> None:
    if "export" in row.lacking:
        with pytest.raises(Exception, match="batch"):
            export(row.make(row.encoder_class), row)
        return
    model, program = exported(row.name)
    for count in (1, 5):
        ours = last_hidden_state(program.module(), row.inputs(count))
        torch.testing.assert_close(ours, last_hidden_state(model, row.inputs(count)), atol=1e-5, rtol=1e-5)


def test_onnx_runtime_with_a_dynamic_batch(row: Row, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    if "onnx" in row.lacking:
        with pytest.raises(Exception):  # noqa: B017 (what torch.onnx raises is its own affair)
            program = export(row.make(row.encoder_class), row)
            torch.onnx.export(program, f=path, dynamo=True, optimize=False, verbose=False)
        return
    model, program = exported(row.name)
    torch.onnx.export(program, f=path, dynamo=True, optimize=False, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        ours = session.run(None, {name: value.numpy() for name, value in row.inputs(count).items()})[0]
        theirs = last_hidden_state(model, row.inputs(count))
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=1e-4)
