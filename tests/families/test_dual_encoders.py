"""CLIP, SigLIP, SigLIP 2: whole models merge in the vision tower only; padding counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from dtem_hf import DTEMConfig, ToMeConfig, attach, detach


METHODS = [ToMeConfig, DTEMConfig]
DUAL = [CLIPModel, SiglipModel, Siglip2Model]
CLASSIFIERS = [CLIPForImageClassification, SiglipForImageClassification, Siglip2ForImageClassification]
PATCHES = 64
GRIDS = [(8, 8), (6, 9), (3, 7)]  # 64, 54 and 21 patches
WORDS = torch.tensor([[1, 7, 9, 2, 2], [1, 9, 30, 4, 2]])


def make(model_class: Any) -> Any:
    """A model of 64 patches per image and 4 vision layers, with weights large enough that outputs differ."""
    torch.manual_seed(7)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    text = {**widths, "num_hidden_layers": 2, "vocab_size": 48, "max_position_embeddings": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**widths, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4, "num_patches": PATCHES}
    config_class = next(c for c in (CLIPConfig, Siglip2Config, SiglipConfig) if is_of(model_class, c))
    config = config_class(text_config=text, vision_config=vision, num_labels=10)
    if "VisionModel" in model_class.__name__:
        config = config.vision_config
    model = model_class(config).eval()
    # The families' own initialisation is too tame for tokens to differ much, and leaves biases at zero.
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "probe")):
            parameter.data.normal_(std=0.3)
    return model


def is_of(model_class: Any, config_class: Any) -> bool:
    return model_class.__name__.startswith(config_class.__name__.removesuffix("Config"))


def merged(model_class: Any, method: Any, r: Any = 9, **fields: Any) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(make(model_class), method(r=r, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def padded(grids: list[tuple[int, int]], longest: int = PATCHES) -> dict[str, Tensor]:
    """Patches of images of different shapes, each drawn for itself, and padding of noise that nobody may look at."""
    patches = torch.randn(len(grids), longest, 48, generator=torch.Generator().manual_seed(4)) * 5
    mask = torch.zeros(len(grids), longest, dtype=torch.long)
    for row, (height, width) in enumerate(grids):
        count = height * width
        patches[row, :count] = torch.randn(count, 48, generator=torch.Generator().manual_seed(count))
        mask[row, :count] = 1
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def pictures(model_class: Any) -> dict[str, Tensor]:
    if is_of(model_class, Siglip2Config):
        return padded(GRIDS)
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def one(images: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in images.items()}


@torch.no_grad()
def run(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """All tensors that a model makes, with those of its towers."""
    words = {"input_ids": WORDS} if any(isinstance(model, dual) for dual in DUAL) else {}
    made = model(**pictures(type(model)), **words, **kwargs)
    found = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    for tower in ("text", "vision"):
        for name, value in (made.get(f"{tower}_model_output") or {}).items():
            found[f"{tower}.{name}"] = value
    return found


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_class", [*DUAL, *CLASSIFIERS])
def test_r_zero_unmerged_and_detached_are_the_plain_model_bit_for_bit(model_class: Any, method: Any) -> None:
    expected = run(make(model_class))
    assert same_bits(run(merged(model_class, method, 0)), expected)
    model = merged(model_class, method)
    assert not same_bits(run(model), expected)
    with model.unmerged():
        assert same_bits(run(model), expected)
    assert same_bits(run(detach(model)), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in make(model_class).modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_class", DUAL)
def test_only_the_vision_tower_is_merged(model_class: Any, method: Any) -> None:
    model = merged(model_class, method)
    ours, plain = run(model), run(make(model_class))
    text = [name for name in ours if name.startswith("text")]
    assert {"text_embeds", "text.last_hidden_state", "text.pooler_output"} <= set(text)
    assert all(torch.equal(ours[name], plain[name]) for name in text)
    for name in ("image_embeds", "vision.pooler_output", "logits_per_image"):
        assert not torch.allclose(ours[name], plain[name], atol=1e-3), name
    tokens = model.merge_plan().num_tokens
    assert plain["vision.last_hidden_state"].shape[1] == tokens
    assert ours["vision.last_hidden_state"].shape[1] == model.merge_plan().output_tokens == tokens - 36
    # The layers of the text tower, of the same class in all three families, are left alone.
    stock = type(make(model_class).text_model.encoder.layers[0])
    assert all(type(layer) is stock for layer in model.text_model.encoder.layers)
    assert all(type(layer) is not stock for layer in model.vision_model.encoder.layers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_class", DUAL)
def test_images_score_by_the_cosine_of_their_features(model_class: Any, method: Any) -> None:
    """Features asked for one by one give the scores of the whole, and an image's do not depend on its batch."""
    model, images = merged(model_class, method), pictures(model_class)
    with torch.no_grad():
        together = model(**images, input_ids=WORDS)
        words = model.get_text_features(input_ids=WORDS).pooler_output
        for row in range(3):
            image = model.get_image_features(**one(images, row)).pooler_output
            cosine = torch.nn.functional.cosine_similarity(image, words, dim=-1)
            score = cosine * model.logit_scale.exp() + getattr(model, "logit_bias", 0)
            torch.testing.assert_close(together.logits_per_image[row], score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_padding_never_joins_what_is_real(method: Any, training: bool) -> None:
    """What lies in the padding changes no bit of what is real, and where padding is enough, nothing else leaves."""
    model = merged(Siglip2VisionModel, method).train(training)
    images = padded(GRIDS)
    other = dict(images, pixel_values=images["pixel_values"].clone())
    other["pixel_values"][images["pixel_attention_mask"] == 0] = 100.0
    with model.trace_merging() as trace:
        ours = model(**images)
    torch.testing.assert_close(ours.pooler_output, model(**other).pooler_output, atol=1e-6, rtol=1e-6)
    real = [height * width for height, width in GRIDS]
    if training and method is DTEMConfig:
        assert [sizes.sum().item() for sizes in trace.sizes[-1]] == pytest.approx(real, abs=1e-3)
        return
    assert trace.sizes[-1].sum(dim=1).tolist() == real
    # 21 patches and 43 of padding: of the 36 that leave, all but those that parity hides from the merge are padding.
    plain = make(Siglip2VisionModel)(**images)
    model.set_reduction([9, 8, 0, 0])
    few = model(**images)
    torch.testing.assert_close(few.pooler_output[2], plain.pooler_output[2], atol=1e-5, rtol=1e-5)
    assert (few.pooler_output[0] - plain.pooler_output[0]).abs().max() > 1e-2
