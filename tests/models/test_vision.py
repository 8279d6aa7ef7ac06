"""The part of a model that sees images."""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

import dtem_hf
from dtem_hf.models.vision import evaluating, image_part, run_on_pixels


def test_a_model_that_also_needs_text_runs_its_vision_tower():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 32}, vision_config={**small, "image_size": 16, "patch_size": 8}
    )
    model = CLIPModel(config)
    part = image_part(model, next(module for name, module in model.named_modules() if name == "vision_model.encoder"))
    assert part is model.vision_model
    part(pixel_values=torch.zeros(1, 3, 16, 16))


def test_any_size_and_dtype(make_classifier):
    model = dtem_hf.attach(make_classifier().bfloat16(), dtem_hf.ToMeConfig(r=2))
    output = run_on_pixels(model, torch.zeros(2, 3, 32, 48))
    assert output.logits.dtype == torch.bfloat16 and output.logits.shape == (2, 10)


def test_every_module_is_in_the_mode_it_was_in():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before == [True, True, False, False]
