"""Learned shifts of a backbone's LayerNorm parameters and biases: against copies of it that were changed by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtem_hf import (
    AutoModelForImageClassification,
    BadValue,
    DTEMConfig,
    MergeAdapter,
    UnsupportedModelError,
    attach,
    detach,
)
from dtem_hf.deploy.graph import export_graph
from dtem_hf.errors import AdapterError
from dtem_hf.families import find_encoder
from tests.support.families import row_of
from tests.support.packed_rows import rows_of


Make = Callable[..., Any]
CONFIG = DTEMConfig(r=5, learn_shifts=True, relaxation="hard")
FAMILIES = ["clip", "siglip2", "beit-both", "dinov3_vit", "deit", "videomae", "qwen2_vl", "qwen3_vl"]


def shifted(model: Any) -> Any:
    """With shifts as a run might leave them."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "merge_embedding.shifts." in name:
            assert not parameter.any()
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels).logits
    return found


def shifts_of(model: Any) -> dict[str, Tensor]:
    """By the names that the parameters have in the encoder."""
    tensors = model.to_merge_adapter().tensors
    return {name.removeprefix("shifts."): value for name, value in tensors.items() if name.startswith("shifts.")}


def changed_by_hand(model: Any, gone: Sequence[float]) -> Any:
    """A copy without shifts that merges alike, whose parameters were moved by the shares gone behind its layers."""
    changed = detach(copy.deepcopy(model))
    attach(changed, DTEMConfig(r=model.merge_config.r, relaxation="hard"))
    encoders = [find_encoder(each)[1] for each in (changed, model)]
    for ours, theirs in zip(*(encoder.merge_embedding.projections for encoder in encoders), strict=True):
        ours.load_state_dict(theirs.state_dict())
    parameters = dict(encoders[0].named_parameters())
    for name, shift in shifts_of(model).items():
        layer = int(name.split(".")[1]) if name.startswith(("layers.", "blocks.")) else len(gone) - 1
        parameters[name].data += (gone[layer] if layer else 0) * shift
    return changed


@pytest.mark.parametrize("r", [5, [0, 0, 7, 2], [0, 9, 0, 0]])
def test_a_pass_equals_that_of_a_copy_whose_parameters_were_changed_by_hand(
    make_classifier: Make, pixels: Tensor, r: Any
) -> None:
    """The share of the tokens that are gone behind each layer, of 65 tokens; none in the first."""
    model = shifted(attach(make_classifier(), CONFIG))
    model.set_reduction(r)
    by_layer = [r] * 4 if isinstance(r, int) else r
    changed = changed_by_hand(model, [sum(by_layer[: layer + 1]) / 65 for layer in range(4)])
    torch.testing.assert_close(logits(model, pixels), logits(changed, pixels), atol=1e-6, rtol=1e-6)
    model.set_reduction(0)
    assert not torch.allclose(logits(model, pixels), logits(changed, pixels), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("r", [[4, 4, 4, 4], [0, 0, 9, 2]])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_packed_images_move_the_layers_each_by_its_own_share(family: str, r: list[int]) -> None:
    """What joins patches behind the layers, or between them, sees all images at once, and does not move."""
    model, grids = shifted(attach(row_of(family).make(), dataclasses.replace(CONFIG, r=r))), [(1, 8, 8), (1, 4, 8)]
    assert all(name.startswith("blocks.") for name in shifts_of(model))
    inputs = rows_of(grids)
    packed = model(**inputs).last_hidden_state
    lengths = [math.prod(grid) for grid in grids]
    images = zip(grids, inputs["hidden_states"].split(lengths), packed.split(lengths), strict=True)
    for grid, patches, ours in images:
        changed = changed_by_hand(model, [sum(r[: layer + 1]) / len(patches) for layer in range(4)])
        alone = changed(hidden_states=patches, grid_thw=torch.tensor([grid])).last_hidden_state
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_all_norms_and_biases_of_the_layers_move_and_no_matrix(make_classifier: Make) -> None:
    model = attach(make_classifier(), CONFIG)
    wanted = {
        name
        for name, parameter in make_classifier().vit.named_parameters()
        if name.startswith("layer") and parameter.dim() == 1
    }
    assert shifts_of(model).keys() == wanted and len(wanted) == 4 * 10 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_start_at_plain_merging_and_are_given_back(family: str) -> None:
    row = row_of(family)
    plain = row.make()
    inputs = row.inputs(2)

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**inputs)[0]
        return output

    expected = run(plain)
    model = attach(copy.deepcopy(plain), CONFIG)
    assert torch.equal(run(model), run(attach(copy.deepcopy(plain), DTEMConfig(r=5, relaxation="hard"))))
    merged = run(shifted(model))
    assert merged.isfinite().all()
    model.set_reduction(0)
    assert torch.equal(run(model), expected)
    model.set_reduction(5)
    assert torch.equal(run(model), merged)
    assert torch.equal(run(detach(model)), expected)


def test_unmerged_and_detached_it_is_the_plain_model_bit_for_bit(make_classifier: Make, pixels: Tensor) -> None:
    plain = make_classifier()
    model = shifted(attach(make_classifier(), CONFIG))
    merged = logits(model, pixels)
    with model.unmerged():
        assert torch.equal(logits(model, pixels), logits(plain, pixels))
    model.set_reduction(0)
    assert torch.equal(logits(model, pixels), logits(plain, pixels))
    model.set_reduction(5)
    assert torch.equal(logits(model, pixels), merged)
    detach(model)
    assert torch.equal(logits(model, pixels), logits(plain, pixels))
    assert [
        (n, type(m), vars(m).keys()) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.Linear)
    ] == [(n, type(m), vars(m).keys()) for n, m in plain.named_modules() if isinstance(m, nn.LayerNorm | nn.Linear)]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_saved_and_loaded_as_adapter_and_as_model(make_classifier: Make, pixels: Tensor, tmp_path: Path) -> None:
    model = shifted(attach(make_classifier(), CONFIG))
    merged = logits(model, pixels)
    model.save_merge_adapter(tmp_path / "adapter")
    assert torch.equal(logits(attach(make_classifier(), tmp_path / "adapter"), pixels), merged)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, pixels), merged)
    assert torch.equal(logits(copy.deepcopy(again), pixels), merged)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "model", merge=None).eval()
    assert torch.equal(logits(plain, pixels), logits(make_classifier(), pixels))
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "plain", merge=tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, pixels), merged)
    with pytest.raises(BadValue, match="learn_shifts=False: True, as in the learned embedding"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "model", merge=DTEMConfig(r=5))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("shifts.layers.2.mlp.fc1.bias"),
            r"shifts.layers.2.mlp.fc1.bias: the model has this parameter",
        ),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("shifts.")], "the model has this parameter"),
        (lambda t: t.update({"shifts.layers.9.mlp.fc1.bias": torch.ones(4)}), "the model no such tensor"),
        (
            lambda t: t.update({"shifts.layernorm.bias": torch.ones(5)}),
            r"shifts.layernorm.bias: the adapter has \[5\]",
        ),
        (lambda t: t.update({"shifts.layernorm.bias": torch.ones(2, 2)}), r"shifts.layernorm.bias is F32 \[2, 2\]"),
        (lambda t: t.update({"shifts.layernorm.bias": torch.tensor([torch.inf])}), "holds NaN or infinity"),
        (lambda t: t.update({"shifts.../x": torch.ones(5)}), "first difference: 'shifts.../x'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(make_classifier: Make, tmp_path: Path, edit: Any, message: str) -> None:
    attach(make_classifier(), CONFIG).save_merge_adapter(tmp_path)
    tensors = load_file(tmp_path / "merge_adapter.safetensors")
    edit(tensors)
    adapter = MergeAdapter.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "merge_adapter.safetensors", metadata={"format": "pt"})
    config = (tmp_path / "merge_config.json").read_text().replace('"tensors_sha256"', '"other"')
    (tmp_path / "merge_config.json").write_text(config)
    assert adapter.config == CONFIG
    with pytest.raises(AdapterError, match=message), pytest.warns(UserWarning, match="ignoring other"):
        attach(make_classifier(), tmp_path)


class OtherLinear(nn.Linear):
    """As quantised ones are: a kind that computes in a way of its own."""


def test_linear_maps_of_another_kind_are_refused(make_classifier: Make, pixels: Tensor) -> None:
    model = make_classifier()
    model.vit.layers[1].mlp.fc1.__class__ = OtherLinear
    with pytest.raises(UnsupportedModelError, match=r"learn_shifts=True: layers\.1\.mlp\.fc1 is a OtherLinear"):
        attach(model, CONFIG)
    assert torch.equal(logits(model, pixels), logits(make_classifier(), pixels))
    attach(model, DTEMConfig(r=5))


def test_gradients_reach_every_shift_behind_the_first_merge(make_classifier: Make, pixels: Tensor) -> None:
    """With and without gradient checkpointing, alike; keys' biases change no attention."""
    found = []
    for checkpointing in (False, True):
        model = shifted(attach(make_classifier(), CONFIG)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixels).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.vit.merge_embedding.shifts.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any() == (not name.startswith("LAYERS-0-")), name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_compiled_and_exported_it_is_the_same(make_classifier: Make, pixels: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch._dynamo.reset()
    model = shifted(attach(make_classifier(num_hidden_layers=2), CONFIG))
    expected = logits(model, pixels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, pixels), expected, atol=1e-5, rtol=1e-5)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(export_graph(model, (3, 32, 32)), f=path, dynamo=True, optimize=False, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ours = session.run(None, {"pixel_values": pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(ours), expected, atol=1e-5, rtol=1e-5)


def test_low_precision_stays_finite(make_classifier: Make, pixels: Tensor) -> None:
    model = shifted(attach(make_classifier().bfloat16(), CONFIG))
    assert logits(model, pixels.bfloat16()).isfinite().all()
    model = shifted(attach(make_classifier(), CONFIG))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, pixels).isfinite().all()
