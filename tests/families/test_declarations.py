"""What a family declares is held by a test: without any one declaration, a check that is named here fails.

The checks are tests of the files beside this one, run again on a family that lacks the declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from dtem_hf import ToMeConfig
from dtem_hf.families import FAMILIES, Family, find_family
from tests.families import (
    test_packed_rows,
    test_promises,
    test_slow_reference,
    test_unmerging,
    test_whole_models,
)
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.methods import ONE_OF_EACH


def family_of(case: FamilyCase) -> Family:
    return next(family for family in FAMILIES if case.encoder in family.models)


def own(case: FamilyCase, name: str) -> Callable[..., None]:
    """A test in the family's own file."""
    return getattr(import_module(f"tests.families.{case}"), name)


# Each is given a case and an empty folder.


def equals_the_slow_reference(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_slow_reference.test_a_merged_model_equals_the_slow_reference(row, "tome", "eager")
    if not case.rows:
        own(case, "equals_the_slow_reference")()


def merges_softly_as_the_slow_reference(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_slow_reference.test_a_merged_model_equals_the_slow_reference(row, "soft", "eager")


def ranks_as_the_slow_reference(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_slow_reference.test_a_merged_model_equals_the_slow_reference(row, "evit", "eager")


def drops_out_as_the_plain_model(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_promises.test_where_nothing_is_reduced_all_is_the_plain_model_bit_for_bit(row, "tome", True)


def plans_what_torch_counts(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_promises.test_the_plan_is_what_torch_counts(row, "tome")


def counts_the_encoder_alone(case: FamilyCase, folder: Path) -> None:
    for model_class in (*case.others, *case.dense):
        test_whole_models.test_a_model_that_does_more_than_see_is_counted_as_its_encoder(case, model_class)


def returns_as_many_tokens_as_planned(case: FamilyCase, folder: Path) -> None:
    for row in case.rows:
        test_promises.test_recorded_states_have_the_plans_lengths(row)
    if not case.rows[0].anatomy.whole:
        test_unmerging.test_all_tokens_come_back_in_place(case, "tome")
    for _, model_class in (pair for pair in test_whole_models.WITH_TEXT if pair[0] is case):
        test_whole_models.test_a_model_with_text_reads_the_merged_tokens_of_its_tower(case, model_class)


def knows_the_models_of_the_case(case: FamilyCase, folder: Path) -> None:
    for model in case.models:
        assert model in find_family(model).models


def lays_all_tokens_on_their_grid(case: FamilyCase, folder: Path) -> None:
    for _, backbone in (pair for pair in test_unmerging.BACKBONES if pair[0] is case):
        test_unmerging.test_feature_maps_lie_on_their_grid(case, backbone, (32, 32), "tome", folder)
    pixels = next(iter(case.inputs(3).values()))
    if hasattr(import_module(f"tests.families.{case}"), "all_tokens_reach_the_reader"):
        own(case, "all_tokens_reach_the_reader")()
    if case.family in ("beit", "data2vec_vision"):
        own(case, "test_segmentation_sees_the_grid")("tome", pixels)
    if case.family == "vit_mae":
        own(case, "test_maes_decoder_gets_all_visible_tokens")(ToMeConfig(r=4), False, pixels)


def counts_visual_tokens(case: FamilyCase, folder: Path) -> None:
    for name in ("loss_is_that_of_the_text", "loss_knows_the_number_of_frames"):
        own(case, f"the_{name}")(ToMeConfig, 9)
    own(case, "test_decoder_sees_as_many_tokens_softly_as_hard")(None)
    if own(case, "CACHES_RIGHTLY"):
        own(case, "cached_generation_is_the_slow_one_image_by_image")(ToMeConfig, 9)
        own(case, "test_the_bare_model_steps_with_a_cache")(ToMeConfig)


def weighs_tokens_by_their_sizes(case: FamilyCase, folder: Path) -> None:
    if hasattr(import_module(f"tests.families.{case}"), "every_model_weighs_tokens"):
        own(case, "every_model_weighs_tokens")()


def counts_frames(case: FamilyCase, folder: Path) -> None:
    own(case, "test_the_plan_says_how_many_tokens_the_decoder_gets")(9, 3)


def puts_recorded_states_in_place(case: FamilyCase, folder: Path) -> None:
    own(case, "test_recorded_states_come_back_in_place")()


def refuses_what_cannot_be_merged(case: FamilyCase, folder: Path) -> None:
    for name, test in vars(import_module(f"tests.families.{case}")).items():
        if name.startswith("test_") and name.endswith("refused"):
            test()


def rounds_sizes_as_the_processor(case: FamilyCase, folder: Path) -> None:
    if case.rows[0].anatomy.whole:
        test_packed_rows.test_sizes_are_rounded_as_the_processor_does(case)


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Family)}
Check = Callable[[FamilyCase, Path], None]
Mutation = tuple[str, Family, tuple[Check, ...]]
# Of each word for a model that reads tokens: another one, and what then fails.
READERS: dict[str, tuple[str, Check]] = {
    "tokens": ("grid", returns_as_many_tokens_as_planned),
    "mean": ("tokens", equals_the_slow_reference),
    "masked_mean": ("tokens", equals_the_slow_reference),
    "grid": ("tokens", lays_all_tokens_on_their_grid),
    "weighed": ("tokens", weighs_tokens_by_their_sizes),
    "masks": ("tokens", equals_the_slow_reference),
    "rows": ("tokens", returns_as_many_tokens_as_planned),
}
PARTS = (equals_the_slow_reference, weighs_tokens_by_their_sizes, counts_visual_tokens)
METHODS: dict[str, tuple[Check, ...]] = {
    "check": (refuses_what_cannot_be_merged,),
    "num_tokens": (plans_what_torch_counts, refuses_what_cannot_be_merged, rounds_sizes_as_the_processor),
    "input_shape": (plans_what_torch_counts, refuses_what_cannot_be_merged),
    "input_sides": (plans_what_torch_counts,),
    "outside_cost": (plans_what_torch_counts,),
    "encoder_cost": (plans_what_torch_counts,),
    "parts": PARTS,
    "model_mixins": (puts_recorded_states_in_place,),
}


def without(mapping: Any, key: Any) -> dict[Any, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def anatomies(case: FamilyCase, family: Family) -> Iterator[Mutation]:
    """Each name exchanged for another one of the layer, each part of a branch left out."""
    parts = family.anatomy
    others = {"attention": parts.mlp, "heads": "training", "query": parts.key, "key": parts.query}
    others |= {"norm1": parts.norm2, "norm2": parts.norm1, "mlp": parts.norm2}
    if parts.query == parts.key:
        del others["query"], others["key"]
    elif not any(row.has_cls for row in case.rows):  # no method ranks tokens by a query
        del others["query"]
    for name, value in others.items():
        checks = (equals_the_slow_reference, ranks_as_the_slow_reference, plans_what_torch_counts)
        wanted = {"query": checks[1:2], "attention": checks[::2]}.get(name, checks[:1])
        yield f"anatomy.{name}", replace(family, anatomy=replace(parts, **{name: value})), wanted
    for branch in ("branch1", "branch2"):
        for part in getattr(parts, branch):
            left = tuple(other for other in getattr(parts, branch) if other != part)
            checks = (equals_the_slow_reference, drops_out_as_the_plain_model)
            yield f"anatomy.{branch}-{part}", replace(family, anatomy=replace(parts, **{branch: left})), checks
    packed = replace(parts, packed=not parts.packed)
    yield "anatomy.packed", replace(family, anatomy=packed), (equals_the_slow_reference,)


def mutations(case: FamilyCase) -> Iterator[Mutation]:
    """The family without each of its declarations: a name, the family, and the checks of which one has to fail."""
    family = family_of(case)
    for cls in family.encoders:
        yield (
            f"encoders-{cls.__name__}",
            replace(family, encoders=without(family.encoders, cls)),
            (equals_the_slow_reference, lays_all_tokens_on_their_grid),
        )
    yield from anatomies(case, family)
    for cls, reader in family.models.items():
        name = cls.__name__
        yield f"models-{name}", replace(family, models=without(family.models, cls)), (knows_the_models_of_the_case,)
        word, check = READERS[reader] if isinstance(reader, str) else ("tokens", counts_visual_tokens)
        yield f"models-{name}-{word}", replace(family, models={**family.models, cls: word}), (check,)
    prefix = family.num_prefix_tokens + 1
    checks = (equals_the_slow_reference, merges_softly_as_the_slow_reference)
    yield "num_prefix_tokens", replace(family, num_prefix_tokens=prefix), checks
    names = {
        "prefix_fields": checks,
        "width_field": (merges_softly_as_the_slow_reference,),
        "input_fields": (plans_what_torch_counts,),
        "patch_fields": (plans_what_torch_counts,),
        "patch_map": (plans_what_torch_counts,),
        "padding_mask": (equals_the_slow_reference,),
    }
    for name, wanted in names.items():
        if getattr(family, name) != DEFAULTS[name]:
            yield name, replace(family, **{name: DEFAULTS[name]}), wanted
    for name in family.required:
        left = without(family.required, name)
        yield f"required-{name}", replace(family, required=left), (refuses_what_cannot_be_merged,)
    for cls in family.composites:
        left = tuple(other for other in family.composites if other is not cls)
        yield f"composites-{cls.__name__}", replace(family, composites=left), (counts_the_encoder_alone,)
    if family.frames:
        yield "frames", replace(family, frames=None), (counts_frames,)
    for field in ("encoder_parts", "layer_parts", "model_parts"):
        for name in getattr(family, field):
            yield f"{field}-{name}", replace(family, **{field: without(getattr(family, field), name)}), PARTS
    if family.layer_merging is not DEFAULTS["layer_merging"]:
        checks = (equals_the_slow_reference, refuses_what_cannot_be_merged)
        yield "layer_merging", replace(family, layer_merging=DEFAULTS["layer_merging"]), checks
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    for name, method in vars(type(family)).items():
        if type(family) is not Family and callable(method) and not name.startswith("_"):
            lesser: Any = type("Lesser", (type(family),), {name: getattr(Family, name)})
            yield name, lesser(**values), METHODS[name]


NEEDED_LATER = (
    "git-models-GitModel-tokens",
    "git-model_parts-encoder.layer.0.attention.self",
    "siglip2-outside_cost",
)
ALL = [
    pytest.param(case, *mutation[1:], id=f"{case}-{mutation[0]}")
    for case in CASES.values()
    for mutation in mutations(case)
]


def fails(check: Check, case: FamilyCase, folder: Path) -> bool:
    try:
        check(case, folder)
    except (Exception, pytest.fail.Exception):
        return True
    return False


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[[FamilyCase, Family], None]:
    """Puts a family in the place of a case's own."""

    def put(case: FamilyCase, family: Family) -> None:
        found = [family if each is family_of(case) else each for each in FAMILIES]
        monkeypatch.setattr("dtem_hf.families.FAMILIES", found)

    return put


# Tests of the files beside this one, which run every row of every family with its declarations.
RUN_BESIDE = (
    merges_softly_as_the_slow_reference,
    ranks_as_the_slow_reference,
    drops_out_as_the_plain_model,
    plans_what_torch_counts,
    counts_the_encoder_alone,
    returns_as_many_tokens_as_planned,
)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_with_all_declarations_no_check_fails(case: FamilyCase, declare: Any, tmp_path: Path) -> None:
    """A copy of a family stands in its place as it does without a declaration, so that it alone makes a check fail.

    What is run beside this file anyway is run again in one of each kind.
    """
    declare(case, replace(family_of(case)))
    for number, check in enumerate(dict.fromkeys(check for *_, checks in mutations(case) for check in checks)):
        if check in RUN_BESIDE and case.family not in ONE_OF_EACH:
            continue
        if check is equals_the_slow_reference and case.rows and case.family not in ONE_OF_EACH:
            continue
        if check is not counts_visual_tokens or case.family == "git":
            check(case, tmp_path / str(number))


@pytest.mark.parametrize("case, family, checks", ALL)
def test_without_a_declaration_a_check_fails(
    case: FamilyCase,
    family: Family,
    checks: tuple[Check, ...],
    declare: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if request.node.callspec.id in NEEDED_LATER and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers 5.24 needs this declaration, and 5.17 does not")
    declare(case, family)
    assert any(fails(check, case, tmp_path) for check in checks)


def test_every_field_of_a_family_is_mutated() -> None:
    """A new field, or a new method of a family's own, needs a line in `mutations`."""
    mutated = {str(each.id).partition("-")[2].partition("-")[0].partition(".")[0] for each in ALL}
    assert {field.name for field in fields(Family)} <= mutated
