"""A calibrated plan: no more multiply-adds than it may have, no worse than the even one, and the same every time."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTModel

from dtem_hf import BadValue, DTEMConfig, DTPSConfig, EViTConfig, ToMeConfig, UnsupportedModelError, attach, calibrate


CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}


def make(kind=ViTForImageClassification, **more):
    torch.manual_seed(0)
    return kind(ViTConfig(**CONFIG | more, num_labels=5, initializer_range=0.3)).eval()


def images(count=24):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def mean_kl(model, pixels):
    """By the definition, with the unmerged model as the reference."""
    with torch.no_grad():
        ours = model(pixels).logits.softmax(-1).double()
        with model.unmerged():
            reference = model(pixels).logits.softmax(-1).double()
    return (reference * (reference.log() - ours.log())).sum(-1).mean().item()


@pytest.mark.parametrize(
    "config", [ToMeConfig(r=8), DTEMConfig(r=8), EViTConfig(keep_rate=0.6)], ids=lambda c: c.method
)
def test_better_than_the_even_plan_at_no_more_multiply_adds(config):
    model, pixels = attach(make(), config), images()
    result = calibrate(model, pixels, flops=0.7, evaluations=60)
    plan = model.merge_plan()
    assert plan.ratio <= 0.7 and result.flops == plan.ratio
    assert list(result.reductions) == list(plan.reductions)
    assert mean_kl(model, pixels) == pytest.approx(result.distance, rel=1e-4)
    assert result.evaluations <= 60
    even = attach(make(), config)
    even.set_reduction(flops=0.7)
    assert mean_kl(even, pixels) == pytest.approx(result.even_distance, rel=1e-4)
    # Merging here and there differs in a model with random weights, so an even plan is hardly ever the best.
    assert result.distance < result.even_distance


@pytest.mark.parametrize("depth", [3, 4])
def test_a_method_that_learns_scores_keeps_the_number_of_its_layers(depth):
    """Three layers have only two in front of which patches can leave."""
    model = attach(make(num_hidden_layers=depth), DTPSConfig(keep_rate=0.7))
    result = calibrate(model, images(8), evaluations=12)
    assert len(model.merge_config.layers) == depth - 1 and 0 not in model.merge_config.layers
    assert mean_kl(model, images(8)) == pytest.approx(result.distance, rel=1e-4)
    assert result.distance <= result.even_distance


def test_same_images_same_plan_however_they_come():
    pixels = images()
    results = []
    for given in (pixels, list(pixels.split(24)), [{"pixel_values": pixels}]):
        model = attach(make(), ToMeConfig(r=6))
        results.append((calibrate(model, given, batch_size=24, evaluations=20), model.merge_plan().reductions))
    assert results[0] == results[1] == results[2]


def test_the_share_left_out_is_that_of_the_plan_in_force():
    model = attach(make(), ToMeConfig(r=10))
    before = model.merge_plan().ratio
    calibrate(model, images(8), evaluations=10)
    assert model.merge_plan().ratio <= before


def test_models_without_logits_are_compared_by_features():
    model = attach(make(ViTModel), ToMeConfig(r=8))
    result = calibrate(model, images(), flops=0.7, evaluations=30)
    with torch.no_grad():
        ours = model(images()).last_hidden_state[:, 0]
        with model.unmerged():
            reference = model(images()).last_hidden_state[:, 0]
    cosine = (ours * reference).sum(-1) / ours.norm(dim=-1) / reference.norm(dim=-1)
    assert result.distance == pytest.approx((1 - cosine).mean().item(), rel=1e-3)


def test_a_grid_is_compared_patch_by_patch():
    model = attach(make(ViTModel), ToMeConfig(r=8, unmerge=True))
    result = calibrate(model, images(8), flops=0.7, evaluations=6, features="grid")
    with torch.no_grad():
        ours = model(images(8)).last_hidden_state[:, 1:]
        with model.unmerged():
            reference = model(images(8)).last_hidden_state[:, 1:]
    cosine = (ours * reference).sum(-1) / ours.norm(dim=-1) / reference.norm(dim=-1)
    assert result.distance == pytest.approx((1 - cosine).mean().item(), rel=1e-3)


def test_a_dense_heads_maps_are_compared():
    def head(patches):  # [B, 32, 8, 8] -> [B, 8, 8]
        return patches.mean(dim=1).sigmoid()

    model = attach(make(ViTModel), ToMeConfig(r=8))
    result = calibrate(model, images(8), flops=0.7, evaluations=6, head=head)
    with torch.no_grad():
        ours = attach(make(ViTModel), ToMeConfig(r=list(result.reductions), unmerge=True))(images(8))
        reference = make(ViTModel)(images(8))
    maps = [output.last_hidden_state[:, 1:].mean(dim=2).sigmoid() for output in (ours, reference)]
    assert result.distance == pytest.approx((maps[0] - maps[1]).abs().mean().item(), rel=1e-4)


def test_of_a_model_that_reads_text_the_encoder_is_calibrated():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=CONFIG, projection_dim=16)).eval()
    result = calibrate(attach(model, ToMeConfig(r=8)), images(8), flops=0.7, evaluations=12)
    assert result.distance <= result.even_distance and model.merge_plan().ratio <= 0.7


def test_modes_are_as_they_were():
    model = attach(make(), ToMeConfig(r=8)).train()
    calibrate(model, images(8), evaluations=3)
    assert all(module.training for module in model.modules())


def test_refusals_leave_the_model_as_it_was():
    model = attach(make(), ToMeConfig(r=8))
    before = model.merge_config
    with pytest.raises(BadValue, match=r"flops=0\.001"):
        calibrate(model, images(4), flops=0.001)
    for flops in (0, 2, math.nan, "0.5"):
        with pytest.raises(BadValue, match=f"flops={flops!r}: a number above 0, up to 1"):
            calibrate(model, images(4), flops=flops)
    no_images = ([], None, 5, [None], [{"labels": 1}], {"pixel_values": images(4)})
    for nothing in (*no_images, torch.zeros(0, 3, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(BadValue, match="images"):
            calibrate(model, nothing)
    with pytest.raises(BadValue, match="evaluations=0"):
        calibrate(model, images(4), evaluations=0)
    with pytest.raises(BadValue, match="batch_size=0"):
        calibrate(model, images(4), batch_size=0)
    with pytest.raises(BadValue, match="features='x': one of auto"):
        calibrate(model, images(4), features="x")
    assert model.merge_config == before
    with pytest.raises(UnsupportedModelError, match="attach"):
        calibrate(make(), images(4))
