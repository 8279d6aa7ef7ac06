"""Where and as what weights are loaded, for every family; and the table of what people do with models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dtem_hf
from dtem_hf import (
    DTEMConfig,
    ToMeConfig,
    attach,
    detach,
)
from dtem_hf.models.attach import merged_class
from tests.support.ecosystem import (
    DOCUMENT,
    MOST_USED,
    document,
    lacks,
    models_of,
)
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.methods import ONE_OF_EACH
from tests.support.passes import as_dtype
from tests.support.unmerging import layers_of, tensors


MERGE = ToMeConfig(r=6)


@pytest.fixture(params=CASES.values(), ids=str)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return request.param


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


@pytest.mark.parametrize(
    ("device_map", "config"), [("cpu", MERGE), ("auto", DTEMConfig(r=6))], ids=["cpu-tome", "auto-dtem"]
)
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


# The keys that ToMe compares are each family's own; DTEM's weights are kept alike in all: one of each kind shows it.
ON_DISK = [pytest.param(case, MERGE, id=f"{case}-tome") for case in CASES.values()]
ON_DISK += [pytest.param(CASES[family], DTEMConfig(r=6), id=f"{family}-dtem") for family in ONE_OF_EACH]


@pytest.mark.parametrize("case, config", ON_DISK)
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


# The table of what this file, and those of Auto classes, pipelines and exports, test


def test_the_documented_table_is_what_is_tested_here() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()
    columns = {column for case in CASES.values() for column in (*case.lacking, *case.eager_only)}
    assert columns <= {"pipelines", "bfloat16", "compile", "export", "onnx"}


def test_all_holds_for_the_families_that_most_people_use() -> None:
    whole = {case.family for case in CASES.values() if not case.lacking and not case.eager_only}
    assert whole >= set(MOST_USED)
