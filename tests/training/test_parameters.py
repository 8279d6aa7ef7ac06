"""What learns and how fast: groups of the optimiser, against plain rules on the names of a ViT's parameters."""

import pytest
import torch

from dtem_hf import AutoModelForImageClassification, BadValue, DTEMConfig
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import choose_learned, learned_parameters, optimizer_groups, relax


@pytest.fixture
def model(vit_folder):
    return AutoModelForImageClassification.from_pretrained(vit_folder, merge=DTEMConfig(r=2))


def arguments(**changes):
    return TrainArguments(model="m", data="d", lr=1e-3, backbone_lr=1e-4, **changes)


def test_frozen_backbone_is_in_no_group(model):
    choose_learned(model, train_backbone=False)
    (group,) = optimizer_groups(model, arguments())
    assert {id(p) for p in group["params"]} == {id(p) for p in model.merge_parameters()}
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)
    assert {id(p) for p in learned_parameters(model)} == {id(p) for p in group["params"]}


def test_end_to_end_every_parameter_is_in_one_group_with_its_rate(model):
    choose_learned(model, train_backbone=True)
    options = arguments(train_backbone=True, layer_decay=0.5, backbone_weight_decay=0.3)
    found = {}
    for group in optimizer_groups(model, options):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    rates = {"embeddings": 0.5**5, "layers.0": 0.5**4, "layers.1": 0.5**3, "layers.2": 0.5**2, "layers.3": 0.5}
    names = dict(model.named_parameters())
    assert len(found) == len(names)
    for name, parameter in names.items():
        if "merge_embedding" in name:
            assert found[id(parameter)] == (1e-3, 1e-4)
            continue
        place = next((part for part in rates if f".{part}." in name), None)
        matrix = name.endswith("weight") and parameter.dim() > 1
        rate = 1e-4 * (rates[place] if place else 1)
        assert found[id(parameter)] == (pytest.approx(rate), 0.3 if matrix else 0.0), name


def test_dropout_wakes_only_where_the_backbone_learns(model):
    pixels = torch.randn(2, 3, 32, 32)
    for train_backbone in (False, True):
        relax(model, True, train_backbone)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, model(pixels).logits) == (not train_backbone)
            relax(model, False, train_backbone)
            assert torch.equal(model(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay=0.0: above 0 and at most 1"),
        ({"layer_decay": 1.1}, "layer_decay=1.1"),
        ({"backbone_weight_decay": -1.0}, "backbone_weight_decay=-1.0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5: a number from 0 to 1"),
        ({"augmentation": "blur"}, "augmentation='blur': one of none, flip"),
        ({"features": "eyes"}, "features='eyes': one of auto"),
        ({"feature_loss": "l1"}, "feature_loss='l1': one of cosine, mse"),
        ({"mixup": -0.1}, "mixup=-0.1"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(BadValue, match=message):
        arguments(**change)
