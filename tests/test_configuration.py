"""Configs: round trips, versions, and the message for every value that makes no sense."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from dtem_hf import (
    DTEMConfig,
    DTPSConfig,
    ETPSConfig,
    EViTConfig,
    MergeConfig,
    PiToMeConfig,
    ToFuConfig,
    ToMeConfig,
)
from dtem_hf.configuration import CONFIG_NAME, FORMAT_VERSION
from dtem_hf.errors import BadValue
from dtem_hf.schedule import ConstantSchedule, FlopsSchedule, InflectedSchedule, LinearSchedule, ListSchedule


CONFIGS = [
    ToMeConfig(),
    ToMeConfig(r=0, proportional_attention=False),
    ToMeConfig(r=[3, 0, 5]),
    ToMeConfig(r=(3, 0, 5)),
    ToMeConfig(r=ConstantSchedule(4)),
    ToMeConfig(r=ListSchedule((4, 2))),
    ToMeConfig(r=LinearSchedule(4.5, 0.25)),
    ToMeConfig(r=InflectedSchedule(8, -0.5)),
    ToMeConfig(r=FlopsSchedule(0.65, 0.5)),
    ToMeConfig(flops=0.5),
    DTEMConfig(),
    DTEMConfig(
        r=8,
        embed_dim=48,
        top_k=5,
        score_temperature=0.2,
        assignment_temperature=0.3,
        init="random",
        relaxation="soft",
        proportional_attention=False,
    ),
    DTEMConfig(flops=0.5),
    DTEMConfig(unmerge=True),
    DTEMConfig(r=8, learn_exponents=True, learn_norms=True),
    DTEMConfig(learn_norms=True, proportional_attention=False),
    EViTConfig(),
    EViTConfig(0.5, (2, 0)),
    EViTConfig(keep_rate=1, layers=[], proportional_attention=True, unmerge=True),
    ETPSConfig(0.5, (2, 0)),
    DTPSConfig(0.5, [1]),
    PiToMeConfig(8, margin=0.5, last_margin=-0.1),
    ToFuConfig(flops=0.5, prune_layers=0),
]


def same(ours: MergeConfig, theirs: MergeConfig) -> bool:
    return type(ours) is type(theirs) and ours.schedule == theirs.schedule and ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trips(config: MergeConfig, tmp_path: Path) -> None:
    """Through a dict, through JSON text, through a folder and through pickle, by the base class and by its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reader in (MergeConfig, type(config)):
            assert same(reader.from_dict(config.to_dict()), config)
            assert same(reader.from_dict(json.loads(json.dumps(config.to_dict()))), config)
            assert same(reader.from_dict(json.loads(str(config))), config)
            config.save_pretrained(tmp_path / "new" / "folder")
            assert same(reader.from_pretrained(tmp_path / "new" / "folder"), config)
        assert same(pickle.loads(pickle.dumps(config)), config)


def test_the_defaults_are_those_of_the_paper() -> None:
    assert DTEMConfig().to_dict() == {
        "method": "dtem",
        "version": "1.0",
        "r": 16,
        "embed_dim": None,
        "top_k": 3,
        "score_temperature": 0.1,
        "assignment_temperature": 0.1,
        "init": "keys",
        "proportional_attention": True,
        "relaxation": "auto",
        "learn_exponents": False,
        "learn_norms": False,
        "learn_shifts": False,
        "unmerge": None,
        "part": None,
    }
    assert ToMeConfig().to_dict() == {
        "method": "tome",
        "version": "1.0",
        "r": 16,
        "proportional_attention": True,
        "unmerge": None,
        "part": None,
    }
    assert EViTConfig().to_dict() == {
        "method": "evit",
        "version": "1.0",
        "keep_rate": 0.7,
        "layers": None,
        "proportional_attention": False,
        "unmerge": None,
        "part": None,
    }


def test_r_is_positional_and_flops_is_a_schedule() -> None:
    assert DTEMConfig(8) == DTEMConfig(r=8)
    assert ToMeConfig([1, 2]).schedule == ListSchedule((1, 2))
    assert ToMeConfig(flops=0.5).r == FlopsSchedule(0.5)


def test_reading_changes_neither_the_dict_nor_shares_its_list() -> None:
    values = ToMeConfig(r=[3, 0, 5]).to_dict()
    before = json.dumps(values)
    MergeConfig.from_dict(values)
    assert json.dumps(values) == before


@pytest.mark.parametrize("config_class", MergeConfig._methods.values())
def test_every_field_has_help_and_a_default(config_class: type[MergeConfig]) -> None:
    """The command line and the docs are made from them."""
    for field in fields(config_class):
        assert len(field.metadata["help"]) > 10
        assert field.default is not MISSING


def test_unknown_keys_are_dropped_with_a_warning_that_names_them() -> None:
    values = {**DTEMConfig(r=5).to_dict(), "sharpness": 3, "colour": "blue"}
    with pytest.warns(UserWarning, match="DTEMConfig: ignoring colour, sharpness.*upgrade dtem_hf"):
        config = MergeConfig.from_dict(values)
    assert same(config, DTEMConfig(r=5))


def test_an_older_config_with_fewer_keys_takes_the_defaults() -> None:
    assert same(MergeConfig.from_dict({"method": "dtem"}), DTEMConfig())


def test_a_newer_minor_version_warns() -> None:
    version = f"{FORMAT_VERSION[0]}.{FORMAT_VERSION[1] + 1}"
    with pytest.warns(UserWarning, match=f"format {version}, newer"):
        config = MergeConfig.from_dict({**ToMeConfig(r=5).to_dict(), "version": version})
    assert same(config, ToMeConfig(r=5))


@pytest.mark.parametrize("version", ["2.0", "17.3"])
def test_a_newer_major_version_is_refused(version: str) -> None:
    with pytest.raises(BadValue, match=rf"version='{version}': .*up to 1\.x; upgrade dtem_hf"):
        MergeConfig.from_dict({**ToMeConfig().to_dict(), "version": version})


@pytest.mark.parametrize("version", ["", "1", "one.zero", "1.0.0", "-1.0", "1.x", [1, 0], "1." + "9" * 5000])
def test_what_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(BadValue, match="version="):
        MergeConfig.from_dict({**ToMeConfig().to_dict(), "version": version})


@pytest.mark.parametrize("method", ["tomee", "", None, 3, ["tome"]])
def test_an_unknown_method_lists_the_known_ones(method: Any) -> None:
    with pytest.raises(BadValue, match=r"method=.*dtem, dtps, etps, evit, pitome, tofu, tome"):
        MergeConfig.from_dict({"method": method})


def test_a_config_of_another_method_is_refused() -> None:
    with pytest.raises(BadValue, match=r"method='tome': DTEMConfig reads 'dtem'"):
        DTEMConfig.from_dict(ToMeConfig().to_dict())


@pytest.mark.parametrize("values", [None, [], "dtem", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(BadValue, match="a JSON object"):
        MergeConfig.from_dict(values)


BAD = [
    ("r", -1, "from 0"),
    ("r", 1.5, "whole number"),
    ("r", "16", "whole number"),
    ("r", True, "whole number"),
    ("r", None, "whole number"),
    ("r", {"kind": "zigzag"}, "linear"),
    ("embed_dim", 0, "from 1"),
    ("embed_dim", -8, "from 1"),
    ("embed_dim", 64.0, "whole number"),
    ("embed_dim", True, "whole number"),
    ("top_k", 0, "from 1"),
    ("top_k", 2.5, "whole number"),
    ("top_k", None, "whole number"),
    ("score_temperature", 0, "from 1e-06"),
    ("score_temperature", -0.1, "from 1e-06 to 1000000.0"),
    ("score_temperature", float("nan"), "from 1e-06 to 1000000.0"),
    ("score_temperature", float("inf"), "from 1e-06 to 1000000.0"),
    ("score_temperature", "hot", "from 1e-06 to 1000000.0"),
    ("assignment_temperature", 0.0, "from 1e-06 to 1000000.0"),
    ("assignment_temperature", True, "from 1e-06 to 1000000.0"),
    ("init", "zeros", "keys, random"),
    ("init", None, "keys, random"),
    ("relaxation", "firm", "auto, straight_through, soft, hard"),
    ("relaxation", ["soft"], "auto, straight_through, soft, hard"),
    ("proportional_attention", 1, "bool"),
    ("proportional_attention", None, "bool"),
    ("learn_exponents", 1, "bool"),
    ("learn_exponents", None, "bool"),
    ("learn_norms", "yes", "bool"),
    ("learn_norms", 0, "bool"),
    ("learn_shifts", "all", "bool"),
    ("unmerge", 1, "bool"),
    ("unmerge", "yes", "bool"),
]
BAD_EVIT = [
    ("keep_rate", 0, "above 0, up to 1"),
    ("keep_rate", 1.5, "to 1"),
    ("keep_rate", float("nan"), "to 1"),
    ("keep_rate", True, "to 1"),
    ("keep_rate", None, "to 1"),
    ("layers", 3, "a list of at most"),
    ("layers", [1, 1], "each layer once"),
    ("proportional_attention", None, "bool"),
    ("part", "", "dotted name"),
    ("part", 3, "dotted name"),
]


@pytest.mark.parametrize(
    "config_class, field, value, expected",
    [
        *((DTEMConfig, *case) for case in BAD),
        *((EViTConfig, *case) for case in BAD_EVIT),
        (PiToMeConfig, "margin", 1.5, "from -1 to 1"),
        (PiToMeConfig, "last_margin", None, "from -1 to 1"),
        (ToFuConfig, "prune_layers", -1, "from 0"),
        (ToFuConfig, "prune_layers", 2.0, "a whole number"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x)[:20],
)
def test_bad_values_name_the_field_the_value_and_what_fits(
    config_class: type[MergeConfig], field: str, value: Any, expected: str
) -> None:
    """When the object is made and when it is read."""
    for make in (
        lambda: config_class(**{field: value}),
        lambda: MergeConfig.from_dict({"method": config_class.method, field: value}),
    ):
        with pytest.raises(BadValue) as raised:
            make()
        assert raised.value.field == field
        assert str(raised.value).startswith(f"{field}={value!r}: ")
        assert expected in str(raised.value)


@pytest.mark.parametrize("values, field", [([1, -2], "r[1]"), (["x"], "r[0]"), ([1, True], "r[1]")])
def test_a_bad_entry_of_a_list_is_named_by_its_place(values: list[Any], field: str) -> None:
    with pytest.raises(BadValue) as raised:
        ToMeConfig(r=values)
    assert raised.value.field == field


@pytest.mark.parametrize("value", [-0.5, 0, 1.01, float("nan"), "half", True])
def test_a_bad_share_of_flops_is_named(value: Any) -> None:
    with pytest.raises(BadValue, match="flops="):
        DTEMConfig(flops=value)


def test_a_folder_without_config_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        MergeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"method": "dtem", "score_temperature": NaN}')
    with pytest.raises(BadValue, match="score_temperature=nan"):
        MergeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('["dtem"]')
    with pytest.raises(BadValue, match="a JSON object"):
        MergeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(BadValue, match=CONFIG_NAME):
        MergeConfig.from_pretrained(tmp_path)


def test_an_adapters_config_can_be_read_as_a_config(tmp_path: Path) -> None:
    """What the adapter was trained for is no field of the method."""
    values = {**DTEMConfig(r=5).to_dict(), "backbone": {"model_type": "vit", "num_layers": 4, "hidden_size": 32}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(MergeConfig.from_pretrained(tmp_path), DTEMConfig(r=5))
