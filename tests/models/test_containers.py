"""Models around an encoder: what they return, where they are merged, and how they come back from a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dtem_hf
from dtem_hf import DTEMConfig, ToMeConfig, UnsupportedModelError, attach, detach
from dtem_hf.families import find_place
from dtem_hf.families.containers import CONTAINERS as TYPES
from dtem_hf.models.auto import auto_class
from dtem_hf.scope import Scope, open_scope
from tests.support.containers import (
    CONTAINERS,
    TEXT,
    VIT,
    Build,
    built,
    depth_anything,
    dual_encoder,
    gemma3,
    idefics2,
    images,
    llava,
    llava_next,
    paligemma,
    qwen2_vl,
    trocr,
    vipllava,
)


parametrized = pytest.mark.parametrize("build", CONTAINERS, ids=lambda build: build.__name__)


def test_every_type_of_container_has_its_row_here() -> None:
    assert sorted(build()[0].config.model_type for build in CONTAINERS) == sorted(TYPES)


@torch.no_grad()
def read(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    names = ("logits", "heatmaps", "predicted_depth", "logits_per_image")
    return next(output[name] for name in names if name in output)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two models have the same weights and merges: convolutions may run in another order after loading."""
    return torch.allclose(one, other, atol=1e-7, rtol=1e-6)


@parametrized
def test_nothing_merged_is_the_plain_model_bit_for_bit_and_detach_restores_it(build: Build) -> None:
    model, inputs = built(build)
    plain, classes = read(model, inputs), [type(module) for module in model.modules()]
    names, config = list(model.state_dict()), model.config.to_dict()
    assert torch.equal(read(attach(model, DTEMConfig(r=0)), inputs), plain)
    model.set_reduction(3)
    assert not torch.equal(read(model, inputs), plain)
    with model.unmerged():
        assert torch.equal(read(model, inputs), plain)
    assert torch.equal(read(detach(model), inputs), plain)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names and model.config.to_dict() == config


@parametrized
def test_untrained_dtem_is_tome(build: Build) -> None:
    model, inputs = built(build)
    tome = read(attach(model, ToMeConfig(r=4)), inputs)
    torch.testing.assert_close(read(attach(model, DTEMConfig(r=4)), inputs), tome, atol=1e-5, rtol=1e-5)


@parametrized
def test_eager_attention_is_sdpa_and_an_image_does_not_depend_on_its_batch(build: Build) -> None:
    model, inputs = built(build)
    attach(model, ToMeConfig(r=4))
    both = read(model, inputs)
    if build is not paligemma:  # the plain model's own logits differ between the two by 0.04
        model.set_attn_implementation("eager")
        torch.testing.assert_close(read(model, inputs), both, atol=1e-4, rtol=1e-4)
    if build is not dual_encoder:
        single = read(model, {name: tensor.chunk(2)[0] for name, tensor in inputs.items()})
        torch.testing.assert_close(single, both[:1], atol=1e-4, rtol=1e-4)


@parametrized
def test_saved_and_loaded_it_is_merged_with_what_was_learned(build: Build, tmp_path: Path) -> None:
    model, inputs = built(build)
    plain = read(model, inputs)
    attach(model, DTEMConfig(r=3))
    for parameter in model.merge_parameters():
        nn.init.normal_(parameter)
    merged = read(model, inputs)
    model.save_pretrained(tmp_path / "model")
    model.save_merge_adapter(tmp_path / "adapter")
    auto = auto_class(model.config)
    again = auto.from_pretrained(tmp_path / "model").eval()
    assert same(read(again, inputs), merged) and again.merge_config == model.merge_config
    assert same(read(auto.from_pretrained(tmp_path / "model", merge=None).eval(), inputs), plain)
    detach(model).save_pretrained(tmp_path / "plain")
    adapted = auto.from_pretrained(tmp_path / "plain", merge=tmp_path / "adapter").eval()
    assert same(read(adapted, inputs), merged)
    stock = type(model).from_pretrained(tmp_path / "model").eval()
    assert same(read(stock, inputs), plain)


@parametrized
def test_the_plan_is_what_the_encoder_does(build: Build) -> None:
    model, inputs = built(build)
    attach(model, ToMeConfig(r=5))
    model.set_attn_implementation("eager")
    place = find_place(model)
    if "image_grid_thw" in inputs:
        seen, size = (inputs["pixel_values"].chunk(2)[0], inputs["image_grid_thw"][:1]), (32, 32)
    else:
        pixels = inputs["pixel_values"][:1].flatten(0, -4)[:1]
        seen, size = (pixels,), tuple(pixels.shape[2:])
    counter = FlopCounterMode(display=False)
    with model.trace_merging() as trace, torch.no_grad(), counter:
        place.holder(*seen)
    plan = model.merge_plan(image_size=size)
    assert [sizes.shape[1] for sizes in trace.sizes] == list(plan.tokens)
    assert counter.get_total_flops() // 2 == plan.multiply_adds


@parametrized
def test_bfloat16_is_finite(build: Build) -> None:
    model, inputs = built(build)
    attach(model.bfloat16(), ToMeConfig(r=4))
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    assert read(model, inputs).isfinite().all()


def test_a_part_merged_by_itself_comes_back_merged(tmp_path: Path) -> None:
    model, inputs = built(trocr)
    attach(model.encoder, DTEMConfig(r=3))
    for parameter in model.encoder.merge_parameters():
        nn.init.normal_(parameter)
    sources = traced_sources(model.encoder, inputs)
    model.save_pretrained(tmp_path)
    again = dtem_hf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.merge_config.part == "encoder" and again.merge_config.r == DTEMConfig(r=3).r
    assert torch.equal(traced_sources(again, inputs), sources)


@torch.no_grad()
@pytest.mark.parametrize("build", [llava, gemma3, idefics2, qwen2_vl], ids=lambda build: build.__name__)
def test_a_container_comes_back_merged_without_its_head(build: Build, tmp_path: Path) -> None:
    """By its checkpoint and by its adapter, both of which name the part as it is called in the whole."""
    model, inputs = built(build)
    plain = copy.deepcopy(model.model)
    attach(model, DTEMConfig(r=3))
    for parameter in model.merge_parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    for headless in (dtem_hf.AutoModel.from_pretrained(tmp_path).eval(), attach(plain, model.to_merge_adapter())):
        assert f"model.{headless.merge_config.part}" == model.merge_config.part
        assert torch.equal(headless(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tf.ViTModel(tf.ViTConfig(**VIT)), "part='tower': None, as ViTModel is merged as a whole"),
        (lambda: tf.BertModel(tf.BertConfig(**TEXT)), "BertModel cannot be merged"),
    ],
)
def test_a_part_of_what_has_none_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(make(), ToMeConfig(r=3), part="tower")


@torch.no_grad()
def traced_sources(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with model.trace_merging() as trace:
        find_place(model).holder(inputs["pixel_values"])
    return trace.source_maps[-1]


def two_towers() -> Any:
    class Pair(tf.PreTrainedModel):
        config_class = tf.ViTConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.left, self.right = tf.ViTModel(config), tf.ViTModel(config)
            self.post_init()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return torch.cat([self.left(pixel_values).pooler_output, self.right(pixel_values).pooler_output], dim=1)

    torch.manual_seed(0)
    return Pair(tf.ViTConfig(**VIT)).eval()


def test_of_several_encoders_one_is_chosen_by_name() -> None:
    model = two_towers()
    with pytest.raises(ValueError, match=r"part=None.*'left' \(ViTModel\), 'right' \(ViTModel\)"):
        attach(model, ToMeConfig(r=3))
    with pytest.raises(ValueError, match=r"part='middle'.*'left'.*'right'"):
        attach(model, ToMeConfig(r=3), part="middle")
    left, right = model(images()).chunk(2, dim=1)
    attach(model, ToMeConfig(r=3), part="right")
    merged_left, merged_right = model(images()).chunk(2, dim=1)
    assert torch.equal(merged_left, left) and not torch.equal(merged_right, right)
    assert model.config.merge["part"] == "right" and model.merge_config.part == "right"


def test_a_model_without_a_vision_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="BertModel cannot be merged: it holds no encoder"):
        attach(tf.BertModel(tf.BertConfig(**TEXT)), ToMeConfig(r=3))


@torch.no_grad()
def test_a_decoder_attends_to_a_merged_token_as_often_as_it_stands_for_patches() -> None:
    """Attention to m equal tokens is attention to one of them with log m added to its score."""
    model, inputs = built(trocr)
    everywhere = read(attach(model, ToMeConfig(r=6), unmerge=True), inputs)
    merged = read(attach(model, ToMeConfig(r=6)), inputs)
    torch.testing.assert_close(merged, everywhere, atol=2e-6, rtol=1e-5)
    unweighed = model.decoder(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=model.encoder(inputs["pixel_values"]).last_hidden_state,
    ).logits
    assert (unweighed - everywhere).abs().max() > 1e-3


@torch.no_grad()
def test_softly_merged_tokens_in_their_places_are_weighed_too() -> None:
    """By hand: a mask of the logarithm of every token's size."""
    model, inputs = built(trocr)
    attach(model, DTEMConfig(r=6, relaxation="soft"), unmerge=True)
    with model.trace_merging() as trace:
        found = read(model, inputs)
        states = model.encoder(inputs["pixel_values"]).last_hidden_state
    mask = trace.sizes[-1].gather(1, trace.source_maps[-1]).clamp(min=1e-8).log()[:, None, None].expand(-1, -1, 4, -1)
    words = {"input_ids": inputs["decoder_input_ids"], "encoder_hidden_states": states}
    torch.testing.assert_close(found, model.decoder(**words, encoder_attention_mask=mask).logits, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, model.decoder(**words).logits, atol=1e-3)


@torch.no_grad()
def test_a_reader_weighs_by_the_sizes_of_the_last_pass() -> None:
    model, inputs = built(trocr)
    attach(model, ToMeConfig(r=6))
    with open_scope(Scope(reader="sized")) as scope:
        model.encoder(inputs["pixel_values"])
        assert scope.sizes is not None and scope.sizes.sum(dim=1).tolist() == [65, 65]
        with model.unmerged():
            model.encoder(inputs["pixel_values"])
        assert scope.sizes is None


@torch.no_grad()
def test_a_decoder_is_handed_the_encoders_output_with_its_sizes_or_warns(recwarn: pytest.WarningsRecorder) -> None:
    model, inputs = built(trocr)
    attach(model, ToMeConfig(r=6))
    pixels, words = inputs["pixel_values"], inputs["decoder_input_ids"]
    computed = model.encoder(pixels)
    found = model(encoder_outputs=computed, decoder_input_ids=words).logits
    assert torch.equal(found, model(**inputs).logits)
    with model.unmerged():
        plain = model.encoder(pixels).to_tuple()
    model(encoder_outputs=plain, decoder_input_ids=words)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"encoder_outputs: 41 tokens without their sizes \(token_sizes\)"):
        lost = model(encoder_outputs=(computed.last_hidden_state,), decoder_input_ids=words).logits
    assert not torch.allclose(lost, found, atol=1e-3)


@pytest.mark.parametrize("decoder", [None, tf.BertConfig, tf.GPT2Config], ids=["trocr", "bert", "gpt2"])
def test_generation_with_beams_equals_that_with_all_tokens_in_place(decoder: Any) -> None:
    model, inputs = built(trocr)
    if decoder is not None:
        text = TEXT if decoder is tf.BertConfig else {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60}
        config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VIT), decoder(**text))
        model = tf.VisionEncoderDecoderModel(config).eval()
    options = {"num_beams": 3, "max_new_tokens": 6, "decoder_start_token_id": 2, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 59}
    found = []
    for unmerge in (True, None):
        attach(model, ToMeConfig(r=6), unmerge=unmerge)
        found.append(model.generate(inputs["pixel_values"], **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits), atol=1e-5, rtol=1e-5)


def test_soft_training_hands_a_decoder_only_the_tokens_that_still_take_part() -> None:
    model, inputs = built(trocr)
    attach(model.train(), DTEMConfig(r=6))
    seen: list[Tensor] = []
    attention = model.decoder.model.decoder.layers[0].encoder_attn
    attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model(**inputs, labels=inputs["decoder_input_ids"]).loss
    assert seen[0].shape[1] == 65 - 4 * 6
    loss.backward()
    gradients = [parameter.grad for parameter in model.merge_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


@pytest.mark.parametrize("build", CONTAINERS[CONTAINERS.index(llava) :], ids=lambda build: build.__name__)
def test_the_loss_of_a_language_model_teaches_the_tower(build: Build) -> None:
    """Layers that merge nothing get a gradient, too, if only 0: several processes wait for all of them."""
    model, inputs = built(build)
    attach(model.requires_grad_(False), DTEMConfig(r=[6, 0, 6, 6])).train()
    for parameter in model.merge_parameters():
        parameter.requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {layer: [] for layer in range(4)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[int(name.split(".")[-2])].append(parameter.grad)
    for layer, found in gradients.items():
        assert len(found) == 2 and all(gradient.isfinite().all() for gradient in found)
        unread = layer == 3 and build in (llava, vipllava, llava_next)
        assert any(gradient.any() for gradient in found) == (layer != 1 and not unread)


def test_a_container_merged_from_the_start_is_what_attach_makes(tmp_path: Path) -> None:
    model, inputs = built(depth_anything)
    model.save_pretrained(tmp_path)
    loaded = dtem_hf.AutoModelForDepthEstimation.from_pretrained(tmp_path, merge=DTEMConfig(r=4)).eval()
    assert same(read(loaded, inputs), read(attach(model, DTEMConfig(r=4)), inputs))
    with pytest.raises(UnsupportedModelError, match="BertModel cannot be merged"):
        dtem_hf.AutoModel.from_config(tf.BertConfig(**TEXT), merge=ToMeConfig(r=2))
