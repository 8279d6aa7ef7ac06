"""BLIP: attention that the stock module takes no mask for, and the captioning, answering and matching models on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dtem_hf import DTEMConfig, ToMeConfig, attach, detach
from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, gelu, layer_norm


def blip_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    """The pooled token is normalised twice."""
    x = layer_norm(weights, root + "post_layernorm", x, 1e-5)
    return {"last_hidden_state": x, "pooler_output": layer_norm(weights, root + "post_layernorm", x[0], 1e-5)}


CASE = FamilyCase(
    "blip",
    encoder=BlipVisionModel,
    rows=(
        Row(
            BlipVisionModel,
            clip_like("", blip_head, qkv=("self_attn.qkv",), out="self_attn.projection", activation=gelu),
            "pooler_output",
        ),
    ),
    others=(BlipModel, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval),
    text={"encoder_hidden_size": 32, "sep_token_id": 3},
    attentions=("eager",),
)

PAD, BOS, SEP, STEPS = 0, 1, 2, 6
METHODS = [ToMeConfig, DTEMConfig]
WHOLE = [BlipModel, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval]
WORDS = torch.tensor([[BOS, 7, 9, SEP, PAD], [BOS, 9, 30, 4, SEP]])


def make(model_class: Any, **vision: Any) -> Any:
    """A BLIP of 65 tokens per image and 4 vision layers, with weights large enough that outputs differ."""
    torch.manual_seed(7)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    text = {"num_hidden_layers": 2, "vocab_size": 48, "encoder_hidden_size": 32, "max_position_embeddings": 32}
    special = {"bos_token_id": BOS, "pad_token_id": PAD, "sep_token_id": SEP, "eos_token_id": SEP}
    config = BlipConfig(
        text_config={**widths, **text, **special},
        vision_config={**widths, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4, **vision},
        projection_dim=16,
        image_text_hidden_size=16,
        initializer_range=0.3,
    )
    return model_class(config.vision_config if model_class is BlipVisionModel else config).eval()


def merged(model_class: Any, method: Any, r: Any = 9, **vision: Any) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(make(model_class, **vision), method(r=r))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def inputs(count: int = 2) -> dict[str, Tensor]:
    return {
        "pixel_values": images(count),
        "input_ids": WORDS[:count],
        "attention_mask": (WORDS[:count] != PAD).long(),
    }


def outputs(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """All tensors that a model makes of two images and their words."""
    if isinstance(model, BlipForQuestionAnswering):
        kwargs = {"labels": WORDS, **kwargs}
    with torch.no_grad():
        made = model(**inputs(), **kwargs)
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_class", WHOLE)
def test_r_zero_unmerged_and_detached_are_the_plain_model_bit_for_bit(model_class: Any, method: Any) -> None:
    expected = outputs(make(model_class))
    assert len(expected) >= 2
    assert same_bits(outputs(merged(model_class, method, 0)), expected)
    model = merged(model_class, method)
    assert not same_bits(outputs(model), expected)
    with model.unmerged():
        assert same_bits(outputs(model), expected)
    assert same_bits(outputs(detach(model)), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in make(model_class).modules()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_class", WHOLE[1:])
def test_text_reads_the_merged_tokens_as_they_are(model_class: Any, method: Any) -> None:
    """The stock model, which is handed the tokens of the merged tower instead of its own, says the same."""
    model, plain = merged(model_class, method), make(model_class)

    def merged_features(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return model.vision_model(pixel_values)

    plain.vision_model.forward = merged_features
    ours = outputs(model)
    assert same_bits(ours, outputs(plain))
    assert ours["last_hidden_state"].shape[1] == model.merge_plan().output_tokens == 65 - 36


@pytest.mark.parametrize("size, handed_on", [(32, 29), (48, 145 - 36), (24, 37 - 17 - 9 - 5 - 2)])
def test_other_image_sizes_hand_on_what_the_plan_says(size: int, handed_on: int) -> None:
    r: Any = 9 if size > 24 else [17, 9, 5, 2]
    model = merged(BlipForConditionalGeneration, ToMeConfig, r)
    with torch.no_grad():
        output = model(images(size=size), input_ids=WORDS, interpolate_pos_encoding=True)
    assert output.image_embeds.shape[1] == model.merge_plan(size).output_tokens == handed_on


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attention_counts_a_token_as_often_as_patches_it_stands_for(method: Any, training: bool) -> None:
    """Outputs and recorded weights of every layer, against exponentials that are multiplied by the sizes."""
    model = merged(BlipVisionModel, method, [11, 0, 14, 3]).train(training)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.encoder.layers:
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, output: seen.append(((*args, *kwargs.values())[0], output[0])), with_kwargs=True
        )
    with torch.no_grad(), model.trace_merging() as trace:
        recorded = model(images(), output_attentions=True).attentions
    sizes = [torch.ones(2, 65), *trace.sizes[:3]]
    assert len(recorded) == len(seen) == 4
    for index, (layer, (normed, attended)) in enumerate(zip(model.encoder.layers, seen, strict=True)):
        attention = layer.self_attn
        assert recorded[index].shape == (2, 4, normed.shape[1], normed.shape[1])
        for image in range(2):
            # [n, 3 · H · d] -> 3 × [n, H · d]
            q, k, v = attention.qkv(normed[image]).chunk(3, dim=-1)
            counted = slow.attention(q, k, v, 4, 8**-0.5, sizes[index][image])
            expected = attention.projection(counted)
            torch.testing.assert_close(attended[image], expected, atol=1e-5, rtol=1e-4)
            # The weights themselves, of the first head: what it takes of values that are one-hot.
            n = len(q)
            wide_q, wide_k = (pad(x[:, :8], (0, n - 8)) for x in (q, k))
            weights = slow.attention(wide_q, wide_k, torch.eye(n), 1, 8**-0.5, sizes[index][image])
            torch.testing.assert_close(recorded[index][image, 0], weights, atol=1e-5, rtol=1e-4)
            if index == 3:  # and one that does not count is another
                uncounted = attention.projection(slow.attention(q, k, v, 4, 8**-0.5, None))
                assert (uncounted - expected).abs().max() > 1e-2


def test_dropout_of_attention_is_as_in_the_stock_module() -> None:
    """Half of the shares are dropped and the others doubled, also behind a merge."""
    model = merged(BlipVisionModel, ToMeConfig, [9, 9, 0, 0], attention_dropout=0.5).train()
    with torch.no_grad():
        recorded = model(images(), output_attentions=True).attentions
    assert [weights.shape[-1] for weights in recorded] == [65, 56, 47, 47]
    for weights in recorded:
        assert (weights == 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert weights.sum(dim=-1).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_the_next_words(method: Any) -> None:
    model = merged(BlipForConditionalGeneration, method)
    labels = WORDS.masked_fill(WORDS == PAD, -100)
    with torch.no_grad():
        output = model(**inputs(), labels=labels)
    losses = [
        -output.logits[row, word - 1].double().log_softmax(dim=-1)[labels[row, word]]
        for row in range(2)
        for word in range(1, 5)
        if labels[row, word] != -100
    ]
    assert len(losses) == 7
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "model_class", [BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval]
)
def test_what_is_learned_gets_a_gradient(model_class: Any) -> None:
    model = merged(model_class, DTEMConfig, [7, 0, 6, 5]).train()
    words = {} if model_class is BlipForImageTextRetrieval else {"labels": WORDS}
    output = model(**inputs(), **words)
    (output.loss if words else output.itm_score[:, 0].sum()).backward()
    for index, parameter in enumerate(model.merge_parameters()):
        if index in (2, 3):  # weight and bias of the second layer, which merges nothing
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 1e-6, index


@torch.no_grad()
def greedy_alone(model: Any, image: Tensor, prompt: list[int]) -> list[int]:
    """The slow way to a caption: one image, and the whole text again for every word."""
    tokens = list(prompt)
    for _ in range(STEPS):
        tokens.append(int(model(image, input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("method", METHODS)
def test_cached_captions_are_the_slow_ones_image_by_image(method: Any) -> None:
    model = merged(BlipForConditionalGeneration, method)
    prompt = [BOS, 7, 9]
    # `generate` takes a prompt with its closing token, and cuts that off.
    asked = torch.tensor([[*prompt, SEP]]).repeat(3, 1)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    made = model.generate(images(3), input_ids=asked.clone(), **options)
    uncached = model.generate(images(3), input_ids=asked.clone(), use_cache=False, **options)
    assert torch.equal(made, uncached)
    assert len({tuple(row) for row in made.tolist()}) > 1
    for row in range(3):
        alone = greedy_alone(model, images(3)[row : row + 1], prompt)
        stop = alone.index(SEP) + 1 if SEP in alone else len(alone)
        assert [word for word in made[row].tolist() if word != PAD] == [word for word in alone[:stop] if word != PAD]


@pytest.mark.parametrize("method", METHODS)
def test_beams_of_a_batch_are_those_of_each_alone(method: Any) -> None:
    model = merged(BlipForConditionalGeneration, method)
    options = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 2}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    together = model.generate(images(3), **options)
    for row in range(3):
        alone = model.generate(images(3)[row : row + 1], use_cache=False, **options)
        ours = together.sequences[2 * row : 2 * row + 2]
        width = alone.sequences.shape[1]
        assert torch.equal(ours[:, :width], alone.sequences)
        assert (ours[:, width:] == PAD).all()
        scores = together.sequences_scores[2 * row : 2 * row + 2]
        torch.testing.assert_close(scores, alone.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_r_zero_captions_and_answers_are_the_plain_models(method: Any) -> None:
    for model_class in (BlipForConditionalGeneration, BlipForQuestionAnswering):
        made = []
        for model in (merged(model_class, method, 0), make(model_class)):
            torch.manual_seed(5)
            asked = {"pixel_values": images(), "input_ids": WORDS[1:].repeat(2, 1)}
            made.append(model.generate(**asked, do_sample=True, max_new_tokens=STEPS))
        assert torch.equal(*made)


@pytest.mark.parametrize("method", METHODS)
def test_answers_with_a_cache_are_those_without(method: Any) -> None:
    model = merged(BlipForQuestionAnswering, method)
    asked = {"pixel_values": images(), "input_ids": WORDS[1:].repeat(2, 1)}
    cached, uncached = (
        model.generate(**asked, max_new_tokens=STEPS, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    plain = make(BlipForQuestionAnswering).generate(**asked, max_new_tokens=STEPS)
    assert not torch.equal(cached, plain)


@pytest.mark.parametrize("method", METHODS)
def test_matching_compares_cls_which_is_never_merged(method: Any) -> None:
    """Without its matching head, the model takes a cosine of the first tokens; by hand from the tower."""
    model = merged(BlipForImageTextRetrieval, method)
    with torch.no_grad():
        score = model(**inputs(), use_itm_head=False).itm_score
        tower = model.vision_model(images()).last_hidden_state
        image = model.vision_proj(tower[:, 0])
        text = model.text_encoder(WORDS, attention_mask=(WORDS != PAD).long()).last_hidden_state
        words = model.text_proj(text[:, 0])
    expected = cosine_similarity(image.unsqueeze(1), words.unsqueeze(0), dim=-1)
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)
    with model.trace_merging() as trace, torch.no_grad():
        model.vision_model(images())
    assert (trace.sizes[-1][:, 0] == 1).all()


@torch.no_grad()
def test_text_sees_as_many_tokens_softly_as_hard() -> None:
    """It weighs all alike: one that was merged away must not be read as if it were there."""
    for model_class in WHOLE[1:]:
        model = merged(model_class, DTEMConfig, [7, 0, 6, 5])
        hard = model(**inputs(), **answers(model_class)).last_hidden_state
        soft = model.train()(**inputs(), **answers(model_class)).last_hidden_state
        assert soft.shape == hard.shape
        assert hard.shape[1] == model.merge_plan().output_tokens == 65 - 18


def answers(model_class: Any) -> dict[str, Tensor]:
    return {"labels": WORDS} if model_class is BlipForQuestionAnswering else {}
