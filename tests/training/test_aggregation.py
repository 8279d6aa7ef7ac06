"""How merged tokens count, learned: neutral at the start, saved with the adapter, taught through the hard merge alone.

That the mathematics is right in every family is tests/families/test_slow_reference.py's.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter, attach
from dtem_hf.errors import AdapterError
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import choose_learned, optimizer_groups
from dtem_hf.training.program import train
from tests.support.training_processes import logged


LEARN = {"learn_exponents": True, "learn_norms": True}


def disturbed(model):
    """Exponents and shares of lengths as a run might leave them."""
    for name, parameter in model.named_parameters():
        if "merge_embedding.exponents" in name:
            parameter.data = 0.5 + torch.rand_like(parameter)
        elif "merge_embedding.norms" in name:
            parameter.data = torch.rand_like(parameter)
    return model


def logits(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels).logits


@pytest.mark.parametrize("relaxation", ["hard", "soft"])
def test_untrained_it_changes_nothing(make_classifier, pixels, relaxation):
    plain = attach(make_classifier(), DTEMConfig(r=5, relaxation=relaxation)).eval()
    expected = logits(plain, pixels)
    learning = attach(make_classifier(), DTEMConfig(r=5, relaxation=relaxation, **LEARN)).eval()
    torch.testing.assert_close(logits(learning, pixels), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(disturbed(learning), pixels), expected, atol=1e-3)


def test_lengths_are_given_back_in_full_at_a_share_of_one(make_classifier, pixels):
    """Two tokens of length 1 at right angles: their mean is 0.7 long, and 1 with all of it given back."""
    model = attach(make_classifier(), DTEMConfig(r=5, learn_norms=True))
    embedding = model.vit.merge_embedding
    x = torch.tensor([[[0.5, 0.5], [3.0, 4.0]]])
    for share, length in ((0.0, 0.5**0.5), (0.5, 0.5**0.25), (1.0, 1.0)):
        embedding.norms[1].value.data.fill_(share)
        found = embedding.lengthen(1, x, lambda: torch.tensor([[[1.0], [5.0]]]))
        assert found[0, 0].norm().item() == pytest.approx(length, abs=1e-6)
        assert torch.equal(found[0, 1], x[0, 1])


def test_a_compiled_model_and_low_precision_agree(make_classifier, pixels):
    model = disturbed(attach(make_classifier(num_hidden_layers=2), DTEMConfig(r=5, **LEARN))).eval()
    expected = logits(model, pixels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, pixels), expected, atol=1e-5, rtol=1e-5)
    assert logits(model.bfloat16(), pixels.bfloat16()).isfinite().all()


def test_an_adapter_brings_it_along(make_classifier, pixels, tmp_path):
    model = disturbed(attach(make_classifier(), DTEMConfig(r=5, **LEARN))).eval()
    model.save_merge_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "merge_adapter.safetensors")
    assert {name: list(tensors[name].shape) for name in ("exponents.3", "norms.0")} == {
        "exponents.3": [4],
        "norms.0": [1],
    }
    assert torch.equal(logits(attach(make_classifier(), tmp_path / "adapter").eval(), pixels), logits(model, pixels))
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    with pytest.raises(BadValue, match="learn_norms=False: True, as in the learned embedding"):
        AutoModelForImageClassification.from_pretrained(
            tmp_path / "model", merge=DTEMConfig(r=5, learn_exponents=True)
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("exponents.2"), "exponents.2"),
        (lambda t: t.pop("exponents.0"), "exponents.0"),
        (
            lambda t: t.update({"exponents.1": torch.ones(5)}),
            r"exponents.1 is F32 \[5\], and its config needs F32 \[4\]",
        ),
        (lambda t: t.update({"norms.1": torch.ones(2)}), r"norms.1 is F32 \[2\], and its config needs F32 \[1\]"),
        (lambda t: t.update({"norms.4": torch.ones(1)}), "norms.4"),
        (lambda t: t.update({"norms.1": torch.tensor([torch.nan])}), "norms.1 holds NaN"),
    ],
)
def test_a_file_that_is_not_what_its_config_says_is_refused(make_classifier, tmp_path, edit, message):
    attach(make_classifier(), DTEMConfig(r=5, **LEARN)).save_merge_adapter(tmp_path)
    tensors = load_file(tmp_path / "merge_adapter.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "merge_adapter.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=message):
        MergeAdapter.from_pretrained(tmp_path)


def test_tensors_that_the_config_does_not_announce_are_refused(make_classifier, tmp_path):
    attach(make_classifier(), DTEMConfig(r=5, **LEARN)).save_merge_adapter(tmp_path)
    config = json.loads((tmp_path / "merge_config.json").read_text())
    (tmp_path / "merge_config.json").write_text(json.dumps({**config, "learn_norms": False}))
    with pytest.raises(AdapterError, match=r"norms\.0"):
        MergeAdapter.from_pretrained(tmp_path)


def test_exponents_of_other_heads_do_not_fit(make_classifier, tmp_path):
    config = DTEMConfig(r=5, embed_dim=16, init="random", **LEARN)
    attach(make_classifier(), config).save_merge_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"exponents.0: the adapter has \[4\], the model \[2\]"):
        attach(make_classifier(num_attention_heads=2), tmp_path)


def test_config_refusals():
    with pytest.raises(BadValue, match="learn_exponents=True: False, or use proportional_attention"):
        DTEMConfig(learn_exponents=True, proportional_attention=False)
    with pytest.raises(BadValue, match="learn_norms='yes'"):
        DTEMConfig(learn_norms="yes")


def test_it_has_a_learning_rate_of_its_own_and_no_weight_decay(vit_folder):
    model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2, **LEARN))
    choose_learned(model, train_backbone=False)
    arguments = TrainArguments(model="m", data="d", lr=1e-3, aggregation_lr=3e-2, **LEARN)
    comparing, counting = optimizer_groups(model, arguments)
    embedding = model.vit.merge_embedding
    assert {id(p) for p in counting["params"]} == {id(p) for p in embedding.aggregation_parameters()}
    assert {id(p) for p in comparing["params"]} == {id(p) for p in embedding.projections.parameters()}
    assert (comparing["lr"], counting["lr"], counting["weight_decay"]) == (1e-3, 3e-2, 0.0)


def test_it_is_learned_through_the_hard_merge_alone(options, vit_folder, tmp_path):
    """From an adapter that counts merged tokens wrongly; what tokens are compared by stays, bit for bit."""
    wrong = AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2, **LEARN))
    for name, parameter in wrong.named_parameters():
        if "merge_embedding.norms" in name or "merge_embedding.exponents" in name:
            parameter.data.fill_(3.0)
    wrong.save_merge_adapter(tmp_path / "wrong")
    rates = {"lr": 0.0, "aggregation_lr": 0.2, "steps": 20, "validate_every": 10}
    run = {**options, **LEARN, **rates, "relaxation": "hard", "start_from": str(tmp_path / "wrong")}
    train(TrainArguments(**run))
    before = MergeAdapter.from_pretrained(tmp_path / "wrong")
    after = MergeAdapter.from_pretrained(Path(options["output_dir"], "adapter"))
    for key, tensor in before.tensors.items():
        assert torch.equal(after.tensors[key], tensor) == key.startswith("layers.") or key.endswith((".0", ".3")), key
    kl = [figures["kl"] for figures in logged(options["output_dir"], "validation")]
    assert min(kl) < 0.8 * kl[0]


def test_a_run_that_learns_it_starts_from_an_adapter_without(options, tmp_path):
    train(TrainArguments(**{**options, "steps": 2, "init": "random"}))
    adapter = Path(options["output_dir"], "adapter")
    first = MergeAdapter.from_pretrained(adapter)
    second = {**options, **LEARN, "lr": 0.0, "relaxation": "hard", "start_from": str(adapter), "steps": 1}
    train(TrainArguments(**{**second, "output_dir": str(tmp_path / "second")}))
    learned = MergeAdapter.from_pretrained(tmp_path / "second" / "adapter")
    assert set(learned.tensors) - set(first.tensors) == {
        f"{name}.{i}" for name in ("norms", "exponents") for i in range(4)
    }
    assert all(torch.equal(learned.tensors[key], first.tensors[key]) for key in first.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr=0.0: a number above 0; with learn_exponents or learn_norms or learn_shifts also 0"),
        ({"lr": -1.0, **LEARN}, "lr=-1.0: a number above 0, or 0"),
        ({"aggregation_lr": 0.0}, "aggregation_lr=0.0: a number above 0"),
        ({"shift_lr": 0.0}, "shift_lr=0.0: a number above 0"),
    ],
)
def test_rates_that_make_no_sense_are_refused(options, change, message):
    with pytest.raises(BadValue, match=message):
        TrainArguments(**{**options, **change})


def test_the_task_that_teaches_merges_alone_says_where_to_learn_it(options):
    with pytest.raises(BadValue, match=r"learn_norms=True: False with task fisher: .*distillation, with start_from"):
        train(TrainArguments(**{**options, "task": "fisher", "learn_norms": True}))


def test_shifts_are_learned_behind_an_adapter_without_them(options, vit_folder, tmp_path):
    """Through the hard merge, at a rate of their own; the backbone stays, and so does what tokens are compared by."""
    attach(AutoModelForImageClassification.from_pretrained(vit_folder), DTEMConfig(r=5)).save_merge_adapter(
        tmp_path / "first"
    )
    run = {"learn_shifts": True, "lr": 0.0, "shift_lr": 0.003, "relaxation": "hard", "r": "5", "sample_r": [3, 5]}
    steps = {"steps": 24, "validate_every": 6, "start_from": str(tmp_path / "first")}
    train(TrainArguments(**{**options, **run, **steps}))
    first = MergeAdapter.from_pretrained(tmp_path / "first")
    learned = MergeAdapter.from_pretrained(Path(options["output_dir"], "adapter"))
    assert all(torch.equal(learned.tensors[key], tensor) for key, tensor in first.tensors.items())
    moved = {key for key in learned.tensors.keys() - first.tensors.keys() if learned.tensors[key].any()}
    assert moved == {key for key in learned.tensors if key.startswith("shifts.") and ".0." not in key}
    kl = [figures["kl"] for figures in logged(options["output_dir"], "validation")]
    assert min(kl) < 0.95 * kl[0]
