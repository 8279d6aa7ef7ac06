"""The Auto classes, `register` and what stock transformers makes of a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import dtem_hf
from dtem_hf import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BadValue,
    DTEMConfig,
    ToMeConfig,
    UnsupportedModelError,
    attach,
)
from dtem_hf.families import SUPPORTED
from dtem_hf.families.containers import CONTAINERS


Make = Callable[..., Any]


def logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixels).logits


@pytest.fixture
def transformers_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that transformers says, at its usual level."""
    transformers.utils.logging.enable_propagation()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    yield caplog
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.disable_propagation()


def test_without_merge_it_is_transformers_own(base: Path, make_classifier: Make, pixels: Tensor) -> None:
    for loaded in (
        AutoModelForImageClassification.from_pretrained(base),
        AutoModelForImageClassification.from_pretrained(base, merge=None),
    ):
        assert type(loaded) is ViTForImageClassification
        assert torch.equal(logits(loaded, pixels), logits(make_classifier(), pixels))
    assert type(AutoModel.from_pretrained(base)) is ViTModel


def test_every_auto_class_is_one_of_transformers() -> None:
    names = [name for name in dtem_hf.__all__ if name.startswith("Auto")]
    assert len(names) >= 6
    for name in names:
        assert issubclass(getattr(dtem_hf, name), getattr(transformers, name))


def test_every_auto_class_that_has_a_model_with_an_encoder_inside_is_here() -> None:
    types = [*CONTAINERS, "modernvbert", "t5gemma2", *(cls.config_class.model_type for cls in SUPPORTED)]
    configs = [CONFIG_MAPPING[name] for name in types if name in CONFIG_MAPPING]
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("Auto") else None
        if mapping is not None and any(config in mapping for config in configs):
            assert name in dtem_hf.__all__


@pytest.mark.parametrize("config", [ToMeConfig(r=9), DTEMConfig(r=9), DTEMConfig(r=9, init="random")], ids=str)
def test_a_base_checkpoint_loads_without_a_word_about_the_embedding(
    base: Path, config: Any, transformers_log: pytest.LogCaptureFixture
) -> None:
    model, info = AutoModelForImageClassification.from_pretrained(base, merge=config, output_loading_info=True)
    assert isinstance(model, ViTForImageClassification)
    assert not [key for key in info["missing_keys"] if "merge" in key]
    assert not info["unexpected_keys"]
    assert "merge" not in transformers_log.text


def test_a_real_missing_key_is_still_reported(base: Path, transformers_log: pytest.LogCaptureFixture) -> None:
    """Silence is for the embedding alone."""
    tensors = load_file(base / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForImageClassification.from_pretrained(base, merge=DTEMConfig(r=9), output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight"}
    assert "classifier.weight" in transformers_log.text


def test_a_merged_checkpoint_comes_back_without_a_word(
    checkpoint: Path, learned: Any, pixels: Tensor, transformers_log: pytest.LogCaptureFixture
) -> None:
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert loaded.merge_config == learned.merge_config
    assert torch.equal(logits(loaded, pixels), logits(learned, pixels))
    assert "merge" not in transformers_log.text


def test_merge_none_gives_the_plain_model_of_a_merged_checkpoint(
    checkpoint: Path, make_classifier: Make, pixels: Tensor, tmp_path: Path, transformers_log: pytest.LogCaptureFixture
) -> None:
    """Also in what it says of itself, and in what it saves."""
    plain = AutoModelForImageClassification.from_pretrained(checkpoint, merge=None)
    assert type(plain) is ViTForImageClassification
    assert {type(module).__mro__[0] for module in plain.modules()} == {
        type(module) for module in make_classifier().modules()
    }
    assert not hasattr(plain.config, "merge")
    assert torch.equal(logits(plain, pixels), logits(make_classifier(), pixels))
    assert "merge_embedding" not in transformers_log.text
    plain.save_pretrained(tmp_path / "again")
    assert "merge" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_given_merge_wins_over_the_saved_one(checkpoint: Path, make_classifier: Make, pixels: Tensor) -> None:
    """A method that learns nothing: the embedding in the checkpoint plays no part."""
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, merge=ToMeConfig(r=3))
    assert loaded.merge_config == ToMeConfig(r=3)
    assert torch.equal(logits(loaded, pixels), logits(attach(make_classifier(), ToMeConfig(r=3)), pixels))


@pytest.mark.parametrize("embed_dim", [8, 16])
def test_a_given_adapter_wins_over_the_saved_embedding(
    checkpoint: Path, make_classifier: Make, pixels: Tensor, embed_dim: int
) -> None:
    """Of the same width or of another."""
    other = attach(make_classifier(), DTEMConfig(r=9, embed_dim=embed_dim, init="random"))
    other.save_merge_adapter(checkpoint.parent / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, merge=checkpoint.parent / "adapter")
    assert torch.equal(logits(loaded, pixels), logits(other, pixels))


def test_a_given_width_that_the_saved_embedding_has_not_is_named(checkpoint: Path) -> None:
    """Neither an untrained embedding in its place, nor an error that does not say why."""
    with pytest.raises(ValueError, match="embed_dim"):
        AutoModelForImageClassification.from_pretrained(checkpoint, merge=DTEMConfig(r=9, embed_dim=16))


def test_a_given_config_keeps_the_learned_embedding_that_fits_it(
    checkpoint: Path, learned: Any, pixels: Tensor
) -> None:
    """Loading a trained checkpoint at another r is how it is used."""
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, merge=DTEMConfig(r=3))
    learned.set_reduction(3)
    assert torch.equal(logits(loaded, pixels), logits(learned, pixels))


def test_stock_transformers_loads_a_merged_checkpoint_as_the_plain_model(
    checkpoint: Path, make_classifier: Make, pixels: Tensor
) -> None:
    loaded, info = transformers.AutoModelForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert type(loaded) is ViTForImageClassification
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded, pixels), logits(make_classifier(), pixels))


@pytest.mark.parametrize("lost", [slice(None), slice(0, 1), slice(5, 6)], ids=["all of it", "a bias", "a weight"])
def test_a_recorded_embedding_that_is_not_there_is_an_error(checkpoint: Path, lost: slice) -> None:
    """All of it or one tensor of it: never a model that quietly merges by something else."""
    tensors = load_file(checkpoint / "model.safetensors")
    keys = sorted(key for key in tensors if "merge_embedding" in key)
    assert len(keys) == 8
    for key in keys[lost]:
        del tensors[key]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"merge_embedding\.projections\.\d\..* is missing.*merge=None"):
        AutoModelForImageClassification.from_pretrained(checkpoint)
    assert type(AutoModelForImageClassification.from_pretrained(checkpoint, merge=None)) is ViTForImageClassification


@pytest.mark.parametrize(
    "change, error",
    [
        ({"method": "evitt"}, "method='evitt'"),
        ({"version": "2.0"}, "version='2.0'"),
        ({"r": [1, 2, 3]}, "3 layers and the model has 4"),
        ({"r": -4}, "r=-4"),
    ],
    ids=str,
)
def test_a_saved_merge_that_makes_no_sense_is_refused(checkpoint: Path, change: dict[str, Any], error: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["merge"].update(change)
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        AutoModelForImageClassification.from_pretrained(checkpoint)
    assert error in str(raised.value)


def test_other_attention_is_refused_before_anything_is_loaded(
    base: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "own_attention", lambda *args, **kwargs: None)
    for folder, kwargs in ((base, {"merge": DTEMConfig(r=4)}), (base, {"merge": ToMeConfig(r=4)}), (checkpoint, {})):
        with pytest.raises(UnsupportedModelError, match="attn_implementation='own_attention'"):
            AutoModelForImageClassification.from_pretrained(folder, attn_implementation="own_attention", **kwargs)


def test_a_plain_model_may_use_any_attention(base: Path, checkpoint: Path) -> None:
    for folder in (base, checkpoint):
        model = AutoModelForImageClassification.from_pretrained(
            folder, merge=None, attn_implementation="flex_attention"
        )
        assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_exact_attention_can_be_chosen(base: Path, pixels: Tensor, name: str) -> None:
    model = AutoModelForImageClassification.from_pretrained(base, merge=ToMeConfig(r=4), attn_implementation=name)
    assert model.config._attn_implementation == name
    assert logits(model, pixels).isfinite().all()


def test_other_keywords_work_as_ever(base: Path, pixels: Tensor, make_classifier: Make) -> None:
    """dtype, config changes, an explicit config, sharded checkpoints and placement."""
    merge = DTEMConfig(r=9)
    expected = logits(attach(make_classifier(), merge), pixels)
    load = AutoModelForImageClassification.from_pretrained
    half = load(base, merge=merge, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    theirs = attach(load(base, dtype=torch.bfloat16), merge).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in half.state_dict().items())
    other_head = load(base, merge=merge, num_labels=3, ignore_mismatched_sizes=True)
    assert logits(other_head, pixels).shape == (3, 3)
    config = ViTConfig.from_pretrained(base)
    assert torch.equal(logits(load(base, merge=merge, config=config), pixels), expected)
    assert not hasattr(config, "merge") or config.merge == merge.to_dict()
    attach(make_classifier(), merge).save_pretrained(base.parent / "shards", max_shard_size="20KB")
    assert len(list((base.parent / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(base.parent / "shards"), pixels), expected)
    assert torch.equal(logits(load(base, merge=merge, device_map="cpu"), pixels), expected)


def test_weights_from_memory_come_without_a_name(
    base: Path, learned: Any, make_classifier: Make, pixels: Tensor
) -> None:
    """As transformers takes them: a config and a state dict; what was made of them has no base model to record."""
    load = AutoModelForImageClassification.from_pretrained
    loaded = load(None, config=learned.config, state_dict=learned.state_dict())
    assert torch.equal(logits(loaded, pixels), logits(learned, pixels))
    assert loaded.to_merge_adapter().backbone.base_model is None
    plain = make_classifier()
    merged = load(None, config=plain.config, state_dict=plain.state_dict(), merge=ToMeConfig(r=9))
    assert torch.equal(logits(merged, pixels), logits(load(base, merge=ToMeConfig(r=9)), pixels))
    with pytest.raises(OSError):  # transformers' own answer to no name at all
        load(None, merge=ToMeConfig(r=9))


def test_the_class_of_a_merged_model_loads_merged_models(checkpoint: Path, learned: Any, pixels: Tensor) -> None:
    for loaded in (
        type(learned).from_pretrained(checkpoint),
        type(learned).from_pretrained(pretrained_model_name_or_path=checkpoint),
    ):
        assert torch.equal(logits(loaded, pixels), logits(learned, pixels))


def test_a_bare_model_from_a_merged_classifier_and_back(
    checkpoint: Path, learned: Any, make_classifier: Make, make_bare: Make, pixels: Tensor, tmp_path: Path
) -> None:
    """The embedding is found under the head's prefix as the backbone's own weights are."""
    bare = AutoModel.from_pretrained(checkpoint)
    with torch.no_grad():
        ours, theirs = bare(pixels).last_hidden_state, learned.vit(pixels).last_hidden_state
    assert torch.equal(ours, theirs)
    bare.save_pretrained(tmp_path / "bare")
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(classifier.vit(pixels).last_hidden_state, theirs)


def test_what_cannot_be_a_merge_is_refused_by_name(base: Path) -> None:
    with pytest.raises(BadValue, match=r"merge=16: a config such as ToMeConfig\(r=16\)"):
        AutoModelForImageClassification.from_pretrained(base, merge=16)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub id"):
        AutoModelForImageClassification.from_pretrained(base, merge="no/such/folder")
    with pytest.raises(BadValue, match="3 layers and the model has 4"):
        AutoModelForImageClassification.from_pretrained(base, merge=ToMeConfig(r=[1, 2, 3]))


def test_models_that_cannot_be_merged_are_refused_with_those_that_can(base: Path, tmp_path: Path) -> None:
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(tmp_path / "bert")
    assert type(AutoModel.from_pretrained(tmp_path / "bert")) is BertModel
    with pytest.raises(UnsupportedModelError, match=r"'bert' cannot be merged: it holds no encoder"):
        AutoModel.from_pretrained(tmp_path / "bert", merge=ToMeConfig(r=1))
    with pytest.raises(
        UnsupportedModelError,
        match=r"AutoModelForCausalLM has no model of type 'vit'; AutoModelForImageClassification has",
    ):
        AutoModelForCausalLM.from_pretrained(base, merge=ToMeConfig(r=1))


def test_from_config_merges_random_weights(tiny_config: Make, pixels: Tensor) -> None:
    config = tiny_config()
    torch.manual_seed(5)
    merged = AutoModelForImageClassification.from_config(config, merge=DTEMConfig(r=9))
    torch.manual_seed(5)
    plain = AutoModelForImageClassification.from_config(config)
    assert type(plain) is ViTForImageClassification
    assert not hasattr(config, "merge")
    merged.eval(), plain.eval()
    assert torch.equal(logits(merged, pixels), logits(attach(plain, DTEMConfig(r=9)), pixels))
    recorded = merged.config
    assert AutoModelForImageClassification.from_config(recorded).merge_config == DTEMConfig(r=9)
    assert type(AutoModelForImageClassification.from_config(recorded, merge=None)) is ViTForImageClassification
    assert recorded.merge == DTEMConfig(r=9).to_dict()
