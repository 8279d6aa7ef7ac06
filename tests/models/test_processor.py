"""Language models that are handed merged tokens: prompts, generation and losses with fewer placeholders."""

from __future__ import annotations

import copy
import pickle
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dtem_hf
from dtem_hf import BadValue, DTEMConfig, ToMeConfig, attach, detach
from dtem_hf.families import find_place
from tests.support.containers import VIT, built, llava, paligemma, vipllava


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "\n", "<image>", "what", "is", "this", "and", "that"]


def word_tokenizer() -> Any:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<image>", "\n"])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def saved_processor(folder: Path, kind: str) -> None:
    size = {"height": 32, "width": 32}
    if kind != "paligemma":
        images = tf.CLIPImageProcessor(size=size, crop_size=size)
        processor: Any = tf.LlavaProcessor(
            images,
            word_tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        images = tf.SiglipImageProcessor(size=size)
        images.image_seq_length = 64
        processor = tf.PaliGemmaProcessor(images, word_tokenizer())
    processor.save_pretrained(folder)


BUILDS = {"llava": llava, "vipllava": vipllava, "paligemma": paligemma}


@pytest.fixture(params=BUILDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A merged model that hands on merged tokens, and its processor."""
    saved_processor(tmp_path, request.param)
    model, _ = built(BUILDS[request.param])
    attach(model, ToMeConfig(r=5), unmerge=False)
    return model, dtem_hf.AutoProcessor.from_pretrained(tmp_path, merge=model)


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 32, 3), dtype=np.uint8))


def ask(processor: Any, images: list[Any], texts: list[str]) -> dict[str, Tensor]:
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
    return {name: value for name, value in batch.items() if name != "labels"}


def reads_last(model: Any) -> bool:
    """PaliGemma reads the output of the last of four layers; LLaVA its input; VipLLaVA that of the third, too."""
    return isinstance(model, tf.PaliGemmaForConditionalGeneration)


def handed_on(model: Any, r: int, num_patches: int = 64) -> int:
    return num_patches - (4 if reads_last(model) else 3) * r


@torch.no_grad()
def features(model: Any, pixels: Tensor, **options: Any) -> Tensor:
    """What the projector makes of images [B, C, H, W], of the outputs of the tower's layers by themselves."""
    place, outputs = find_place(model), []
    layers = place.encoder.encoder.layers
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in layers]
    with model.trace_merging() as trace:
        last = place.holder(pixels, **options).last_hidden_state
    for hook in hooks:
        hook.remove()
    if isinstance(model, tf.LlavaForConditionalGeneration):
        read = outputs[2][:, 1:]
    elif reads_last(model):
        read = last
    else:  # behind the third layer, and the means of the second one's tokens over the groups that the third makes
        counts = trace.sizes[2].shape[1]
        means = torch.zeros(len(pixels), counts, outputs[1].shape[2])
        for image in range(len(pixels)):
            second, third = trace.source_maps[1][image].tolist(), trace.source_maps[2][image].tolist()
            for group in range(counts):
                members = {second[patch] for patch in range(len(second)) if third[patch] == group}
                weights = {member: float(trace.sizes[1][image, member]) for member in members}
                mean = sum(weight * outputs[1][image, member] for member, weight in weights.items())
                means[image, group] = mean / sum(weights.values())
        read = torch.cat([outputs[2][:, 1:], means[:, 1:]], dim=-1)
    return model.model.multi_modal_projector(read)


def answered_by_hand(model: Any, inputs: dict[str, Tensor], images: list[Tensor]) -> Tensor:
    """Logits where the features [n, D] of images stand in the places of their placeholders, in order."""
    embeds, row = model.get_input_embeddings()(inputs["input_ids"]), torch.cat(images)
    places = (inputs["input_ids"] == WORDS.index("<image>")).nonzero().tolist()
    assert len(places) == len(row)
    for (prompt, place), feature in zip(places, row, strict=True):
        embeds[prompt, place] = feature
    rest = {name: value for name, value in inputs.items() if name in ("attention_mask", "token_type_ids")}
    return model(inputs_embeds=embeds, **rest).logits


def test_an_image_gets_as_many_placeholders_as_tokens_are_handed_on(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    for r in (5, 0, 3):
        model.set_reduction(r)
        inputs = ask(processor, pictures(1), ["<image> what is this"])
        assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == handed_on(model, r)
        assert processor._get_num_multimodal_tokens(image_sizes=[[32, 32]]).num_image_tokens == [handed_on(model, r)]
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()


def test_a_processor_reaches_workers_and_copies(pair: tuple[Any, Any]) -> None:
    """A pickled one writes prompts for the model as it was then; a copy in the same process goes on asking it."""
    model, processor = pair
    pickled = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(processor))))
    copied = copy.deepcopy(processor)
    model.set_reduction(3)
    for asked, r in ((pickled, 5), (copied, 3), (processor, 3)):
        inputs = ask(asked, pictures(1), ["<image> what is this"])
        assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == handed_on(model, r)
    assert type(pickled).__name__ == type(processor).__name__


def test_a_model_that_was_detached_gets_plain_prompts(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    detach(model)
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == 64
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_all_tokens_in_place_need_no_other_prompts(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    attach(model, ToMeConfig(r=5))
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    assert (inputs["input_ids"] == WORDS.index("<image>")).sum() == 64


def test_cached_generation_is_generation_without_a_cache(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (
        model.generate(**inputs, use_cache=cache, eos_token_id=59, **options) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_batch_is_each_prompt_by_itself(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    first, second = pictures(2)
    texts = ["<image> what is this", "<image> this"]
    batch = ask(processor, [[first], [second]], texts)
    assert not batch["attention_mask"].all()
    together = model(**batch).logits[:, -1]
    for i, picture in enumerate((first, second)):
        alone = model(**ask(processor, [[picture]], [texts[i]])).logits[0, -1]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_two_images_in_a_prompt_are_put_in_their_places(pair: tuple[Any, Any]) -> None:
    """By hand: the features that the projector gives for each image, in the place of its placeholders."""
    model, processor = pair
    inputs = ask(processor, [pictures(2)], ["<image> and <image> what"])
    expected = answered_by_hand(model, inputs, list(features(model, inputs["pixel_values"])))
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_text_alone(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == WORDS.index("<image>"), -100)
    output = model(**inputs, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


def test_features_that_are_computed_before_are_read_as_pixels_are(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    if "mm_encoder_outputs" not in signature(type(model.model).forward).parameters:
        pytest.skip(f"transformers {tf.__version__} takes no mm_encoder_outputs")
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        features = model.get_image_features(pixels, return_dict=True)
        given = model(**inputs, mm_encoder_outputs={"image": features}).logits
        assert torch.equal(given, model(**inputs, pixel_values=pixels).logits)


def test_a_stock_prompt_is_refused_with_what_makes_the_right_one(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = pair
    stock = tf.AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokens: 64, features: \d+.*AutoProcessor.from_pretrained\(\.\.\., merge="):
        model(**ask(stock, pictures(1), ["<image> what is this"]))


def test_a_processor_for_a_model_that_counts_no_placeholders_is_refused(tmp_path: Path) -> None:
    saved_processor(tmp_path, "llava")
    with pytest.raises(ValueError, match=r"merge='ViTModel': .*LLaVA"):
        dtem_hf.AutoProcessor.from_pretrained(
            tmp_path, merge=attach(tf.ViTModel(tf.ViTConfig(**VIT)), ToMeConfig(r=2))
        )
    assert not hasattr(dtem_hf.AutoProcessor.from_pretrained(tmp_path), "reading")


def test_soft_training_hands_on_as_many_tokens_as_the_plan(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    attach(model.train(), DTEMConfig(r=5), unmerge=False)
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in model.merge_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0  # type: ignore[union-attr]


def test_a_saved_processor_is_a_plain_one(pair: tuple[Any, Any], tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path / "again")
    again = tf.AutoProcessor.from_pretrained(tmp_path / "again")
    assert (ask(again, pictures(1), ["<image> this"])["input_ids"] == WORDS.index("<image>")).sum() == 64


@torch.no_grad()
def test_layers_behind_the_one_that_is_read_do_not_run(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    encoder = find_place(model).encoder
    ran: list[int] = []
    for i, layer in enumerate(encoder.encoder.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    inputs = ask(processor, pictures(1), ["<image> what is this"])
    counter = FlopCounterMode(display=False)
    model.set_attn_implementation("eager")
    with counter:
        model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert ran == list(range(4 if reads_last(model) else 3))
    projected = model.model.multi_modal_projector
    on_tokens = sum(m.in_features * m.out_features for m in projected.modules() if isinstance(m, torch.nn.Linear))
    plan = model.merge_plan()
    assert counter.get_total_flops() // 2 == plan.multiply_adds + on_tokens * handed_on(model, 5)
    # Back in all-tokens mode, all layers count and run again.
    attach(model, ToMeConfig(r=5))
    assert (model.merge_plan().multiply_adds > plan.multiply_adds) is not reads_last(model)


def test_softly_merged_layers_are_stacked_and_learn_with_recomputed_layers() -> None:
    """Gradient checkpointing runs layers again: the same loss and gradients come out."""
    model, _ = built(vipllava)
    attach(model.train(), DTEMConfig(r=5), unmerge=False)
    inputs = {"input_ids": torch.tensor([[7, *[5] * handed_on(model, 5), 8, 9]] * 2)}
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.merge_parameters())])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    assert sum(float(gradient.abs().sum()) for gradient in found[0][1:]) > 0


@torch.no_grad()
@pytest.mark.parametrize("build, others", [(llava, -1), (vipllava, [-1, -3])], ids=["llava", "vipllava"])
def test_other_layers_than_it_was_merged_for_are_refused(build: Any, others: Any) -> None:
    """Layers behind the last one that is read do not run: another one would be read as it never was."""
    model, inputs = built(build)
    pixels, takes = inputs["pixel_values"], signature(model.model.get_image_features).parameters
    name = next(each for each in takes if each.startswith("vision_feature_layer"))  # VipLLaVA's had an s once

    def features() -> Tensor:
        found = model.model.get_image_features(pixels, **{name: others}).pooler_output
        return torch.stack(list(found))

    plain, settled = features(), getattr(model.config, name)
    attach(model, ToMeConfig(r=0), unmerge=False)
    with pytest.raises(
        BadValue, match=r"vision_feature_layer=.*-1.*: -2.*, for which it was merged with unmerge=False"
    ):
        features()
    with model.unmerged():
        assert torch.equal(features(), plain)
    setattr(model.config, name, others)
    with pytest.raises(BadValue, match="set it in the config and attach again"):
        model.model.get_image_features(pixels)
    attach(model, ToMeConfig(r=0), unmerge=False)
    assert torch.equal(features(), plain)
    setattr(model.config, name, settled)
    attach(model, ToMeConfig(r=0))  # all tokens in place: all layers run
    assert torch.equal(features(), plain)
