"""A model that holds several encoders: `part=` chooses everywhere, and another choice takes the earlier one out."""

import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import dtem_hf
from dtem_hf import AutoModelForImageTextToText, BadValue, DTEMConfig, MergeAdapter, ToMeConfig, attach, detach


IMAGES, VIDEOS = "model.image_tower", "model.video_tower"


def make():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)
    text = LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=4, vocab_size=64)
    return VideoLlavaForConditionalGeneration(VideoLlavaConfig(vision_config=vision, text_config=text)).eval()


def merged_parts(model):
    return [
        name for name in (IMAGES, VIDEOS) if any("merging" in vars(m) for m in model.get_submodule(name).modules())
    ]


def embeddings(model):
    return [name for name, _ in model.named_modules() if name.endswith("merge_embedding")]


@pytest.fixture
def plain_folder(tmp_path):
    make().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_another_part_takes_the_place_of_the_first():
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model, DTEMConfig(r=2), part="image_tower")
    attach(model, ToMeConfig(r=3), part="video_tower")
    assert merged_parts(model) == [VIDEOS] and not embeddings(model)
    assert model.merge_config == ToMeConfig(r=3, part=VIDEOS) and model.merge_plan().reductions == [3, 3]
    detach(model)
    assert not merged_parts(model) and not hasattr(model.config, "merge") and type(model) is type(make())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with pytest.raises(BadValue, match=r"part=None: a part of VideoLlava.*video_tower.*image_tower"):
        attach(model, ToMeConfig())


def test_parts_that_were_merged_by_themselves_are_detached_with_the_model():
    model = make()
    for part in (IMAGES, VIDEOS):
        attach(model.get_submodule(part), DTEMConfig(r=2))
    detach(model)
    assert not merged_parts(model) and not embeddings(model)


def test_a_part_of_a_merged_model_is_not_detached_alone():
    model = attach(make(), ToMeConfig(r=2), part="image_tower")
    with pytest.raises(BadValue, match=r"model='CLIPVisionModel': the whole merged model"):
        detach(model.get_submodule(IMAGES))
    assert merged_parts(model) == [IMAGES]


def test_from_pretrained_takes_the_part(plain_folder):
    model = AutoModelForImageTextToText.from_pretrained(plain_folder, merge=ToMeConfig(r=2, part="image_tower"))
    assert merged_parts(model) == [IMAGES]


@pytest.mark.parametrize("wanted", [DTEMConfig(r=2, part="image_tower"), ToMeConfig(r=2, part="image_tower")])
def test_another_part_than_the_recorded_one_is_merged(tmp_path, wanted):
    attach(make(), DTEMConfig(r=3), part="video_tower").save_pretrained(tmp_path)
    assert merged_parts(AutoModelForImageTextToText.from_pretrained(tmp_path)) == [VIDEOS]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, merge=wanted)
    assert merged_parts(model) == [IMAGES] and all(name.startswith(IMAGES) for name in embeddings(model))
    with pytest.raises(BadValue, match="part='audio'"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, merge=DTEMConfig(part="audio"))


def test_an_adapter_names_the_part_that_it_is_for(plain_folder, tmp_path):
    model = attach(make(), DTEMConfig(r=2), part="video_tower")
    torch.nn.init.normal_(next(model.merge_parameters()))
    model.save_merge_adapter(tmp_path / "adapter")
    for again in (
        attach(make(), tmp_path / "adapter"),
        attach(make(), MergeAdapter.from_pretrained(tmp_path / "adapter"), part=VIDEOS),
        AutoModelForImageTextToText.from_pretrained(plain_folder, merge=tmp_path / "adapter"),
    ):
        assert merged_parts(again) == [VIDEOS]
        assert torch.equal(next(again.merge_parameters()), next(model.merge_parameters()))


def test_what_lies_between_a_merged_model_and_its_layers_is_not_detached_alone(make_classifier):
    model = attach(make_classifier(), ToMeConfig(r=2))
    for part in (model.vit, model.vit.layers, model.vit.layers[0]):
        with pytest.raises(BadValue, match=r"model='.*': the whole merged model"):
            detach(part)
    assert model.merge_config.r == 2 and "merging" in vars(model.vit)


def test_transformers_own_auto_class_takes_it_when_registered(tmp_path):
    attach(make(), DTEMConfig(r=2), part="image_tower").save_pretrained(tmp_path)
    dtem_hf.register()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    finally:
        dtem_hf.unregister()
    assert merged_parts(model) == [IMAGES] and model.merge_config == DTEMConfig(r=2, part=IMAGES)
