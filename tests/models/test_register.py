"""Transformers' own Auto classes and pipelines take `merge=` when they are registered, and forget it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import (
    DTEMConfig,
    ToMeConfig,
    attach,
    detach,
    register,
    unregister,
)
from dtem_hf.families import SUPPORTED
from dtem_hf.models.derived import DerivedMixin
from tests.models.test_auto import Make, logits
from tests.models.test_containers import read, same
from tests.support.containers import built, gemma3, trocr


ENCODERS = {cls.config_class for cls in SUPPORTED}


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.mark.usefixtures("registered")
def test_registered_auto_classes_take_merge_for_a_base_checkpoint(
    base: Path, learned: Any, make_classifier: Make, pixels: Tensor
) -> None:
    stock = transformers.AutoModelForImageClassification
    expected = logits(attach(make_classifier(), ToMeConfig(r=9)), pixels)
    assert torch.equal(logits(stock.from_pretrained(base, merge=ToMeConfig(r=9)), pixels), expected)
    learned.save_merge_adapter(base.parent / "adapter")
    for merge in (base.parent / "adapter", str(base.parent / "adapter"), learned.to_merge_adapter()):
        assert torch.equal(logits(stock.from_pretrained(base, merge=merge), pixels), logits(learned, pixels))
    for model in (stock.from_pretrained(base), stock.from_pretrained(base, merge=None)):
        assert type(model) is ViTForImageClassification
        assert torch.equal(logits(model, pixels), logits(make_classifier(), pixels))
    bare = transformers.AutoModel.from_pretrained(base, merge=ToMeConfig(r=9))
    assert bare.merge_plan().tokens == [56, 47, 38, 29]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["left out", "none", "config", "folder"])
def test_registered_auto_classes_take_merge_for_a_merged_checkpoint(
    checkpoint: Path, learned: Any, make_classifier: Make, pixels: Tensor, kind: str
) -> None:
    stock = transformers.AutoModelForImageClassification
    learned.save_merge_adapter(checkpoint.parent / "adapter")
    arguments: dict[str, Any] = {
        "left out": {},
        "none": {"merge": None},
        "config": {"merge": ToMeConfig(r=5).to_dict()},
        "folder": {"merge": str(checkpoint.parent / "adapter")},
    }[kind]
    expected = {"none": make_classifier(), "config": attach(make_classifier(), ToMeConfig(r=5))}.get(kind, learned)
    loaded = stock.from_pretrained(checkpoint, **arguments)
    assert type(loaded) is type(expected)
    assert torch.equal(logits(loaded, pixels), logits(expected, pixels))


@pytest.mark.usefixtures("registered")
def test_registered_auto_classes_do_not_get_in_the_way_of_plain_models(base: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(base, attn_implementation="flex_attention")
    assert type(model) is ViTForImageClassification
    model = transformers.AutoModelForImageClassification.from_config(ViTConfig.from_pretrained(base))
    assert type(detach(model)) is ViTForImageClassification


@torch.no_grad()
@pytest.mark.usefixtures("registered")
def test_a_model_may_build_the_one_inside_by_a_registered_class(tmp_path: Path) -> None:
    """As Gemma 3's classifier does, from its own config, which names the tower as the classifier holds it."""
    generator, inputs = gemma3()
    config = generator.config
    config.pad_token_id = config.text_config.pad_token_id = 0
    model = attach(transformers.Gemma3ForSequenceClassification(config).eval(), DTEMConfig(r=3))
    model.save_pretrained(tmp_path)
    for load in (transformers.AutoModelForSequenceClassification, type(model)):
        loaded = load.from_pretrained(tmp_path)
        assert loaded.merge_config.part == "model.vision_tower"
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_register_is_idempotent_and_undone(base: Path) -> None:
    stock = transformers.AutoModelForImageClassification
    before = dict(stock._model_mapping.items())
    register()
    register()
    stock.from_pretrained(base, merge=ToMeConfig(r=9))
    unregister()
    assert dict(stock._model_mapping.items()) == before
    with pytest.raises(TypeError, match="merge"):
        stock.from_pretrained(base, merge=ToMeConfig(r=9))
    assert type(stock.from_pretrained(base)) is ViTForImageClassification
    unregister()
    assert type(stock.from_pretrained(base)) is ViTForImageClassification


def test_transformers_own_auto_classes_take_containers_when_registered(tmp_path: Path) -> None:
    model, inputs = built(trocr)
    model.save_pretrained(tmp_path / "plain")
    merged = read(attach(model, ToMeConfig(r=3)), inputs)
    model.save_pretrained(tmp_path / "merged")
    register()
    try:
        given = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "plain", merge=ToMeConfig(r=3)
        ).eval()
        saved = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    finally:
        unregister()
    assert same(read(given, inputs), merged) and same(read(saved, inputs), merged)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert type(plain) is transformers.VisionEncoderDecoderModel


def test_every_type_of_model_that_holds_an_encoder_by_default_is_registered() -> None:
    stock = transformers.AutoModel, transformers.AutoModelForPreTraining, transformers.AutoModelForDepthEstimation
    holders = [config for config in transformers.CONFIG_MAPPING.values() if holds_encoder(config)]
    assert transformers.VideoLlavaConfig in holders
    offered = [(auto, config) for auto in stock for config in holders if config in auto._model_mapping]
    register()
    try:
        plain = [config.model_type for auto, config in offered if not issubclass(mapped(auto, config), DerivedMixin)]
    finally:
        unregister()
    assert not plain


def holds_encoder(config_class: Any) -> bool:
    """Whether a model of a type has, by default, an encoder of another type inside that can be merged."""
    if not getattr(config_class, "sub_configs", None):
        return False
    try:
        config = config_class()
    except Exception:  # a type that has no default: each says so by an error of its own
        return False
    return any(isinstance(part, encoder) for part in inner(config) for encoder in ENCODERS)


def inner(config: Any) -> Iterator[Any]:
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            yield part
            yield from inner(part)


def mapped(auto: Any, config: Any) -> Any:
    found = auto._model_mapping[config]
    return found[0] if isinstance(found, (list, tuple)) else found


@pytest.mark.usefixtures("registered")
def test_a_pipeline_takes_merge_in_its_model_keywords(base: Path, make_classifier: Make) -> None:
    image = __import__("PIL.Image").Image.effect_noise((40, 50), 80).convert("RGB")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(base)
    pipe = transformers.pipeline(
        "image-classification", model=str(base), model_kwargs={"merge": ToMeConfig(r=9)}, device="cpu"
    )
    assert pipe.model.merge_config == ToMeConfig(r=9)
    answers = pipe(image, top_k=10)
    pixel_values = pipe.image_processor(image, return_tensors="pt")["pixel_values"]
    expected = logits(attach(make_classifier(), ToMeConfig(r=9)), pixel_values)[0].softmax(-1)
    found = {answer["label"]: answer["score"] for answer in answers}
    for index, label in pipe.model.config.id2label.items():
        assert found[label] == pytest.approx(expected[index].item(), abs=1e-6)
