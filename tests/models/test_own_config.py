"""A merged model's config is its own: what a caller does to theirs, or to a copy, changes no model."""

import numpy as np
import pytest
import torch

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, ToMeConfig, attach, detach


def test_a_config_may_be_changed_for_the_next_model(make_classifier):
    config, models = ToMeConfig(), []
    for r in (2, 8):
        config.r = r
        models.append(attach(make_classifier(), config))
    assert [model.merge_config.r for model in models] == [model.config.merge["r"] for model in models] == [2, 8]
    assert models[0].merge_plan(64).reductions == [2] * 4


def test_lists_and_what_merge_config_returns_are_copies(make_classifier, pixels):
    reductions = [2, 2, 2, 2]
    model = attach(make_classifier(), ToMeConfig(r=reductions))
    with torch.no_grad():
        expected = model(pixels).logits
        reductions[0] = 20
        model.merge_config.r[1] = 20
        model.merge_config.proportional_attention = False
        model.config.merge["r"][2] = 20
        assert torch.equal(model(pixels).logits, expected)
    assert model.merge_config == ToMeConfig(r=[2, 2, 2, 2])


def test_two_models_of_one_adapter_do_not_share_its_config(make_classifier):
    adapter = attach(make_classifier(), DTEMConfig(r=2)).to_merge_adapter()
    first, second = attach(make_classifier(), adapter), attach(make_classifier(), adapter)
    first.set_reduction(5)
    assert (second.merge_config.r, adapter.config.r) == (2, 2)


@pytest.mark.parametrize("field, value", [("relaxation", "zz"), ("top_k", -1), ("proportional_attention", "no")])
def test_a_field_that_was_changed_to_nonsense_is_refused(make_classifier, field, value, tmp_path):
    config = DTEMConfig(r=2)
    setattr(config, field, value)
    model = make_classifier()
    with pytest.raises(BadValue, match=f"{field}="):
        attach(model, config)
    assert not hasattr(model.config, "merge")
    adapter = attach(make_classifier(), DTEMConfig(r=2)).to_merge_adapter()
    setattr(adapter.config, field, value)
    with pytest.raises(BadValue, match=f"{field}="):
        adapter.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.*"))


def test_numpy_numbers_are_numbers():
    assert ToMeConfig(r=np.int64(4)).to_dict()["r"] == 4 and ToMeConfig(r=np.arange(3)).r == [0, 1, 2]
    assert [type(r) for r in ToMeConfig(r=[np.int32(1), 2]).r] == [int, int]


def test_a_learned_embedding_that_a_given_config_leaves_out_is_reported(make_classifier, tmp_path, caplog):
    plain = make_classifier().config
    attach(make_classifier(), DTEMConfig(r=2)).save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        AutoModelForImageClassification.from_pretrained(tmp_path, merge=None)
        assert "merge_embedding" not in caplog.text  # it was asked for
        AutoModelForImageClassification.from_pretrained(tmp_path, config=plain)
    assert "merge_embedding" in caplog.text and "UNEXPECTED" in caplog.text


@pytest.mark.parametrize("model", [torch.nn.Sequential(), None, "facebook/deit-tiny-patch16-224"])
def test_what_is_no_model_of_transformers_is_named(model):
    with pytest.raises(BadValue, match=rf"model='{type(model).__name__}': a transformers model"):
        attach(model, ToMeConfig())


@pytest.mark.parametrize("model", [None, "facebook/deit-small-patch16-224"])
def test_what_is_no_model_at_all_cannot_be_detached(model):
    with pytest.raises(BadValue, match=rf"model='{type(model).__name__}': a model of transformers"):
        detach(model)


@pytest.mark.parametrize(
    "options, field", [({"target_speedup": "2"}, "target_speedup"), ({"batch_size": 0}, "batch_size")]
)
def test_a_speedup_that_makes_no_sense_is_named_before_anything_runs(make_classifier, options, field):
    model = attach(make_classifier(), ToMeConfig(r=2))
    with pytest.raises(BadValue, match=f"{field}="):
        model.set_reduction(**{"target_speedup": 1.2, **options})
    assert model.merge_config.r == 2
