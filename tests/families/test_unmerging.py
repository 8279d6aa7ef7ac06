"""Who needs every token gets every token, in its place: against what source maps say, gathered by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dtem_hf
from dtem_hf import DTEMConfig, ToMeConfig, UnsupportedModelError, attach, detach
from dtem_hf.families import find_family
from tests.support import methods
from tests.support.families import CASES, ROWS
from tests.support.family_case import FamilyCase, Row
from tests.support.unmerging import METHODS, put_back, run_recording, traced


Make = Callable[..., Any]


def fits(row: Row, method: str) -> bool:
    """Whether a method needs no CLS token, or there is one."""
    return method not in methods.METHODS or methods.METHODS[method].fits(row)


def with_methods(rows: list[Row]) -> pytest.MarkDecorator:
    """Every method on every row that it fits."""
    pairs = [(row, method) for row in rows for method in METHODS if fits(row, method)]
    return pytest.mark.parametrize("row, method", pairs, ids=[f"{row}-{method}" for row, method in pairs])


def reader_of(model_class: Any) -> Any:
    """How models of a class read the tokens."""
    return find_family(model_class).reader(model_class)


def bare(case: FamilyCase) -> Any:
    """The family's encoder, with all that its rows know of relative positions."""
    return case.make(case.encoder, **{name: value for name, value in case.small.items() if name.startswith("use_")})


@pytest.mark.parametrize(
    "case, method",
    [
        pytest.param(case, method, id=f"{case}-{method}")
        for case in CASES.values()
        for method in METHODS
        # Where they are never away, there is nothing to put back.
        if reader_of(case.encoder) != "grid" and fits(case.rows[0], method) and not case.rows[0].anatomy.whole
    ],
)
def test_all_tokens_come_back_in_place(case: FamilyCase, method: str) -> None:
    """Last and recorded hidden states; everything else is what it is without."""
    inputs = case.inputs(3)
    short, trace = traced(attach(bare(case), METHODS[method]), **inputs, output_hidden_states=True)
    model = attach(bare(case), METHODS[method], unmerge=True)
    full, full_trace = traced(model, **inputs, output_hidden_states=True)
    live, returned = trace.source_maps[-1], short.last_hidden_state.shape[1]
    live = live.where(live < returned, 0)  # what was softly merged away does not come back alone
    there = (live == trace.source_maps[-1]).unsqueeze(-1)
    torch.testing.assert_close(there * full.last_hidden_state, there * put_back(short.last_hidden_state, live))
    assert len(full.hidden_states) == len(short.hidden_states) == 5
    assert torch.equal(full.hidden_states[0], short.hidden_states[0])
    for i, source in enumerate(trace.source_maps):
        assert torch.equal(source, full_trace.source_maps[i])
        assert torch.equal(full.hidden_states[i + 1], put_back(short.hidden_states[i + 1], source))
    if "pooler_output" in short:
        assert torch.equal(full.pooler_output, short.pooler_output)
    plan = model.merge_plan()
    assert full.last_hidden_state.shape[1] == plan.output_tokens == plan.num_tokens


@pytest.mark.parametrize("method", ["tome", "soft"])
def test_tuples_are_unmerged_as_outputs_are(make_bare: Make, pixels: Tensor, method: str) -> None:
    model = attach(make_bare(), METHODS[method], unmerge=True)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        named, plain = model(pixels, **wanted), model(pixels, **wanted, return_dict=False)
    for ours, theirs in zip(plain, named.to_tuple(), strict=True):
        for a, b in zip(*((ours, theirs) if isinstance(ours, tuple) else ((ours,), (theirs,))), strict=True):
            assert torch.equal(a, b)


def test_the_argument_overrides_the_field_and_the_field_says_it_alone(make_bare: Make, pixels: Tensor) -> None:
    for field in (False, True):
        for argument in (None, False, True):
            config = ToMeConfig(r=9, unmerge=field)
            model = attach(make_bare(), config, unmerge=argument)
            unmerged = field if argument is None else argument
            assert model.merge_config.unmerge is model.config.merge["unmerge"] is unmerged
            assert model(pixels).last_hidden_state.shape[1] == (65 if unmerged else 29)
            assert config.unmerge is field  # the user's own object is left alone


def test_it_survives_saving_loading_and_changing_r(make_bare: Make, pixels: Tensor, tmp_path: Path) -> None:
    model = attach(make_bare(), DTEMConfig(r=9), unmerge=True)
    model.save_pretrained(tmp_path / "model")
    model.save_merge_adapter(tmp_path / "adapter")
    make_bare().save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        loaded = dtem_hf.AutoModel.from_pretrained(tmp_path / "model")
        adapted = dtem_hf.AutoModel.from_pretrained(tmp_path / "plain", merge=tmp_path / "adapter")
        assert torch.equal(loaded(pixels).last_hidden_state, expected)
        assert torch.equal(adapted(pixels).last_hidden_state, expected)
        loaded.set_reduction(3)
        assert loaded(pixels).last_hidden_state.shape[1] == 65
        assert attach(loaded, tmp_path / "adapter", unmerge=False)(pixels).last_hidden_state.shape[1] == 29


@pytest.mark.parametrize("training", [False, True])
def test_where_nothing_is_merged_nothing_changes(make_bare: Make, pixels: Tensor, training: bool) -> None:
    plain = make_bare().train(training)
    model = attach(make_bare().train(training), DTEMConfig(r=0), unmerge=True)
    with torch.no_grad():
        expected = plain(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, expected)
        model.set_reduction(9)
        with model.unmerged():
            assert torch.equal(model(pixels).last_hidden_state, expected)
        assert torch.equal(detach(model)(pixels).last_hidden_state, expected)


@torch.no_grad()
@with_methods([row for row in ROWS if row.output == "logits"])
def test_a_classifier_sees_no_difference(row: Row, method: str) -> None:
    """Also one that averages: each patch is there once, or each token is weighed."""
    inputs = row.inputs(3)
    short = attach(row.make(), METHODS[method])(**inputs).logits
    full = attach(row.make(), METHODS[method], unmerge=True)(**inputs).logits
    torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full, row.make()(**inputs).logits, atol=1e-3)


STAGES = {"out_features": ["stem", "stage1", "stage3", "stage4"], "use_relative_position_bias": True}
BACKBONES = [
    (case, model_class)
    for case in CASES.values()
    for model_class in case.models
    if case.rows and model_class.__name__.endswith("Backbone")
]
every_backbone = pytest.mark.parametrize("case, backbone", BACKBONES, ids=[str(case) for case, _ in BACKBONES])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@every_backbone
def test_feature_maps_lie_on_their_grid(
    case: FamilyCase, backbone: Any, size: tuple[int, int], method: str, tmp_path: Path
) -> None:
    """Unasked, as dense heads need all tokens; the backbone is loaded by its Auto class."""
    plain, prefix = case.make(backbone, **STAGES), case.rows[0].anatomy.prefix
    norm = getattr(plain, "layernorm", None) or getattr(plain, "norm", None) or torch.nn.Identity()
    plain.save_pretrained(tmp_path)
    model = dtem_hf.AutoBackbone.from_pretrained(tmp_path, merge=METHODS[method])
    assert type(model).__name__ == backbone.__name__
    images = torch.randn(2, 3, *size)
    output, tokens = run_recording(model, images)
    height, width = size[0] // 4, size[1] // 4
    assert len(output.feature_maps) == 4
    for feature_map, stage in zip(output.feature_maps, (0, 1, 3, 4), strict=True):
        # [B, P + h · w, D] -> [B, D, h, w]
        expected = norm(tokens[stage])[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
        torch.testing.assert_close(feature_map, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        unmerged = plain(images).feature_maps
    assert torch.equal(output.feature_maps[0], unmerged[0])
    assert not torch.allclose(output.feature_maps[-1], unmerged[-1], atol=1e-3)
    if method != "soft":
        different = {tuple(patch.tolist()) for patch in output.feature_maps[-1][0].flatten(1).T}
        assert len(different) == model.merge_plan(image_size=size).tokens[-1] - prefix


@every_backbone
def test_a_backbone_that_merges_nothing_is_the_plain_one(case: FamilyCase, backbone: Any, pixels: Tensor) -> None:
    with torch.no_grad():
        expected = case.make(backbone, **STAGES)(pixels).feature_maps
        model = attach(case.make(backbone, **STAGES), ToMeConfig(r=0))
        assert all(map(torch.equal, model(pixels).feature_maps, expected))
        model.set_reduction(9)
        assert not torch.equal(model(pixels).feature_maps[-1], expected[-1])
        assert all(map(torch.equal, detach(model)(pixels).feature_maps, expected))


def test_vitdet_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Its layers work on windows of a grid, which merged tokens do not form."""
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    model = transformers.VitDetBackbone(config)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"VitDetBackbone cannot be merged: .*windows"):
        attach(model, ToMeConfig(r=4))
    assert [type(module) for module in model.modules()] == classes
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"AutoBackbone for model type 'vitdet' .*windows"):
        dtem_hf.AutoBackbone.from_pretrained(tmp_path, merge=ToMeConfig(r=4))


def test_a_copy_and_a_compiled_model_are_unmerged_as_well(make_bare: Make, pixels: Tensor) -> None:
    model = attach(make_bare(), ToMeConfig(r=9), unmerge=True)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(pixels).last_hidden_state, expected)
        compiled: nn.Module = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
