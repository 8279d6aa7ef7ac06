"""GIT: whoever reads the number of visual tokens sees the true one, in loss and generation, batch, beams and frames.

`PROMISES` are checked on merged models; and again with the number taken from where a naive implementation would take
it, where they must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, GitForCausalLM, GitModel, GitVisionModel

from dtem_hf import DTEMConfig, ToMeConfig, attach
from tests.support.family_case import FamilyCase, Row
from tests.support.git_models import (
    PAD,
    PROMPTS,
    assert_generates_as_alone,
    assert_loss_by_hand,
    generate,
    handed_on,
    images,
    make,
    merged,
    pad,
    positions,
)
from tests.support.slow_anatomies import clip_like
from tests.support.slow_model import Outputs
from tests.support.slow_parts import Weights, layer_norm


def git_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    return {"last_hidden_state": layer_norm(weights, root + "post_layernorm", x, 1e-5)}


CASE = FamilyCase(
    "git",
    encoder=GitVisionModel,
    rows=(Row(GitVisionModel, clip_like("vision_model.", git_head), "last_hidden_state"),),
    others=(GitModel, GitForCausalLM),
    attentions=("eager",),
)

# What forward passes call it: transformers gave it another name in 5.24.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
METHODS = [ToMeConfig, DTEMConfig]
REDUCTIONS = [9, [11, 0, 14, 3]]


CACHES_RIGHTLY = Version(transformers.__version__) >= Version("5.18")


WRONG_CACHE = "before 5.18, the plain model adds the length of its cache to positions that hold it already"
right_cache = pytest.mark.skipif(not CACHES_RIGHTLY, reason=WRONG_CACHE)


def test_the_plain_model_generates_the_same_with_a_cache_from_5_18_on() -> None:
    """Why the promises about caches are skipped before."""
    cached, uncached = (
        generate(make(), images(2), PROMPTS, use_cache=use_cache).logits for use_cache in (True, False)
    )
    same = all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(cached, uncached, strict=True))
    assert same == CACHES_RIGHTLY


Promise = Callable[[Any, Any], None]


def the_loss_is_that_of_the_text(method: Any, r: Any) -> None:
    assert_loss_by_hand(merged(method, r), images(2))


def cached_generation_is_the_slow_one_image_by_image(method: Any, r: Any) -> None:
    model = merged(method, r)
    assert_generates_as_alone(model, images(2))
    cached, uncached = (generate(model, images(2), PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)


@torch.no_grad()
def steps_with_a_cache_are_the_full_pass(method: Any, r: Any) -> None:
    """Prompt and picture first, then one word, then three at once."""
    model = merged(method, r)
    inputs = pad([[1, 7, 5, 8, 6, 40], [1, 9, 30, 4, 22, 17, 19, 3]], "left")
    mask, where = inputs["attention_mask"], positions(inputs["attention_mask"])
    full = model(pixel_values=images(2), position_ids=where, use_cache=False, **inputs).logits[:, -8:]
    past: Any = DynamicCache(config=model.config)
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        output = model(
            pixel_values=images(2) if start == 0 else None,
            input_ids=inputs["input_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=where[:, start:stop],
            **{CACHE: past},
            use_cache=True,
        )
        ours, theirs = output.logits[:, start - stop :], full[:, start:stop]
        words = mask[:, start:stop].bool()
        torch.testing.assert_close(ours[words], theirs[words], atol=1e-4, rtol=1e-4)


def the_loss_of_a_padded_batch_is_that_of_each_alone(method: Any, r: Any) -> None:
    """Padded on either side: means of single losses, each weighed by its number of next words."""
    model, pixel_values = merged(method, r), images(2)
    with torch.no_grad():
        alone = [
            model(pixel_values=image, input_ids=torch.tensor([p]), labels=torch.tensor([p])).loss
            for image, p in zip(pixel_values.split(1), PROMPTS, strict=True)
        ]
        weights = torch.tensor([len(p) - 1 for p in PROMPTS])
        expected = (torch.stack(alone) * weights).sum() / weights.sum()
        for side in ("right", "left"):
            inputs = pad(PROMPTS, side)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            # The first word has nothing in front of it to be foretold from, and padding is no such thing.
            labels[torch.arange(2), inputs["attention_mask"].argmax(dim=-1)] = -100
            where = positions(inputs["attention_mask"])
            loss = model(pixel_values=pixel_values, labels=labels, position_ids=where, **inputs).loss
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def beams_of_a_padded_batch_are_those_of_each_alone(method: Any, r: Any) -> None:
    model, pixel_values = merged(method, r), images(2)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "eos_token_id": 24}
    together = generate(model, pixel_values, PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, pixel_values[row : row + 1], [prompt], use_cache=False, **options)
        ours = together.sequences[2 * row : 2 * row + 2, max(map(len, PROMPTS)) :]
        theirs = alone.sequences[:, len(prompt) :]
        assert [[w for w in s.tolist() if w != PAD] for s in ours] == [
            [w for w in s.tolist() if w != PAD] for s in theirs
        ]
        scores = together.sequences_scores[2 * row : 2 * row + 2]
        torch.testing.assert_close(scores, alone.sequences_scores, atol=1e-4, rtol=1e-4)


def the_loss_knows_the_number_of_frames(method: Any, r: Any) -> None:
    """Also of two frames, in a model for three."""
    model = merged(method, r, frames=3)
    for frames in (3, 2):
        assert_loss_by_hand(model, images(2, frames))


def generation_knows_the_number_of_frames(method: Any, r: Any) -> None:
    model = merged(method, r, frames=3)
    for frames in (3, 2):
        assert_generates_as_alone(model, images(2, frames))


def the_loss_knows_the_image_size(method: Any, r: Any) -> None:
    for size in ((48, 48), (24, 32)):
        assert_loss_by_hand(merged(method, r), images(2, size=size), interpolate_pos_encoding=True)


def generation_knows_the_image_size(method: Any, r: Any) -> None:
    for size in ((48, 48), (24, 32)):
        assert_generates_as_alone(merged(method, r), images(2, size=size), interpolate_pos_encoding=True)


LOSSES: list[Promise] = [
    the_loss_is_that_of_the_text,
    the_loss_of_a_padded_batch_is_that_of_each_alone,
    the_loss_knows_the_number_of_frames,
    the_loss_knows_the_image_size,
]
CACHED: list[Promise] = [
    cached_generation_is_the_slow_one_image_by_image,
    steps_with_a_cache_are_the_full_pass,
    beams_of_a_padded_batch_are_those_of_each_alone,
    generation_knows_the_number_of_frames,
    generation_knows_the_image_size,
]
PROMISES = [*LOSSES, *CACHED]


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Promise:
    """One of `PROMISES`; skipped where the installed transformers makes its plain model break it."""
    if request.param in CACHED and not CACHES_RIGHTLY:
        pytest.skip(WRONG_CACHE)
    return request.param


@pytest.mark.parametrize("r", REDUCTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("promise", PROMISES, indirect=True, ids=lambda promise: promise.__name__)
def test_promise(promise: Promise, method: Any, r: Any) -> None:
    promise(method, r)


Patch = pytest.MonkeyPatch
Naive = Callable[[Patch], None]


def stock_count(attention: Any) -> int:
    return attention.__dict__["image_patch_tokens"]


def count_with(patch: Patch, count: Callable[[Any], int]) -> None:
    """Have the decoder ask `count`, which is given the attention that the stock model asks."""
    from dtem_hf.families import git

    patch.setattr(git.TrueImagePatchTokens, "image_patch_tokens", property(count))


def count_of_an_unmerged_image(patch: Patch) -> None:
    """A merged tower in a stock model."""
    count_with(patch, stock_count)


def count_of_one_frame(patch: Patch) -> None:
    from dtem_hf.scope import current_scope

    def count(attention: Any) -> int:
        scope = current_scope()
        return scope.num_tokens // 3 if scope is not None else stock_count(attention)

    count_with(patch, count)


def count_of_the_models_own_image_size(patch: Patch) -> None:
    """From the plan, once and for all."""
    count_with(patch, lambda _: 65 - 4 * 9)


def count_where_there_are_pictures_only(patch: Patch) -> None:
    """Right in the first pass, forgotten in those that have a cache instead."""
    from dtem_hf.families import git

    patch.setattr(git, "cached_visual_tokens", lambda inputs: 0)


def count_that_takes_padding_for_pictures(patch: Patch) -> None:
    """What is in the cache and is none of the words that the mask of the first image lets through."""
    from dtem_hf.families import git

    def count(inputs: Any) -> int:
        if inputs.get("pixel_values") is not None or inputs.get(CACHE) is None:
            return 0
        words = int(inputs["attention_mask"][0].sum())
        return inputs[CACHE].get_seq_length() + inputs["input_ids"].shape[1] - words

    patch.setattr(git, "cached_visual_tokens", count)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "promise, naive",
    [
        *((promise, count_of_an_unmerged_image) for promise in PROMISES),
        *((promise, count_where_there_are_pictures_only) for promise in CACHED),
        *((promise, count_that_takes_padding_for_pictures) for promise in CACHED),
        (the_loss_knows_the_number_of_frames, count_of_one_frame),
        (generation_knows_the_number_of_frames, count_of_one_frame),
        (the_loss_knows_the_image_size, count_of_the_models_own_image_size),
        (generation_knows_the_image_size, count_of_the_models_own_image_size),
    ],
    indirect=["promise"],
    ids=lambda function: function.__name__,
)
def test_a_naive_count_breaks_the_promise(
    promise: Promise, naive: Naive, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    naive(monkeypatch)
    # A loss that is not the one by hand or of no words at all, another caption, a mask of the wrong length.
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        promise(method, 9)


@pytest.mark.parametrize("r", REDUCTIONS, ids=str)
@pytest.mark.parametrize("frames", [None, 3])
def test_the_plan_says_how_many_tokens_the_decoder_gets(r: Any, frames: int | None) -> None:
    model = merged(ToMeConfig, r, frames)
    for size in ((32, 32), (48, 48), (24, 32)):
        pixel_values = images(1, size=size) if frames is None else images(1, frames, size=size)
        _, counts = handed_on(model, lambda: generate_one(model, pixel_values))  # noqa: B023 (called here)
        assert counts == [model.merge_plan(size).output_tokens]
    assert model.merge_plan().output_tokens == (65 - (36 if r == 9 else 28)) * (frames or 1)


def generate_one(model: Any, pixel_values: Tensor) -> Tensor:
    return model.generate(pixel_values=pixel_values, max_new_tokens=3, interpolate_pos_encoding=True)


@right_cache
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_bare_model_steps_with_a_cache(method: Any) -> None:
    """`GitModel`, on its own: text behind a cached, padded prompt is what the full pass makes of it."""
    model = attach(make(GitModel), method(r=9))
    inputs = pad([[1, 7], [1, 9, 30, 4]], "left")
    mask, where = inputs["attention_mask"], positions(inputs["attention_mask"])
    full = model(pixel_values=images(2), position_ids=where, **inputs).last_hidden_state
    assert full.shape[1] == model.merge_plan().output_tokens + 4
    past: Any = DynamicCache(config=model.config)
    for start, stop in ((0, 3), (3, 4)):
        ours = model(
            pixel_values=images(2) if start == 0 else None,
            input_ids=inputs["input_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=where[:, start:stop],
            **{CACHE: past},
            use_cache=True,
        ).last_hidden_state[:, start - stop :]
    torch.testing.assert_close(ours, full[:, -1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frames", [None, 2])
def test_decoder_sees_as_many_tokens_softly_as_hard(frames: int | None) -> None:
    """It weighs all alike: one that was merged away must not be read as if it were there, or counted."""
    model = merged(DTEMConfig, [7, 0, 6, 5], frames)
    counted: list[int] = []
    attention = model.git.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda module, arguments, output: counted.append(module.image_patch_tokens))
    pixel_values = images(2) if frames is None else images(2, frames)
    with torch.no_grad():
        hard = model.git(**pad(PROMPTS, "right"), pixel_values=pixel_values).last_hidden_state
        soft = model.train().git(**pad(PROMPTS, "right"), pixel_values=pixel_values).last_hidden_state
        with model.unmerged():
            plain = model.git(**pad(PROMPTS, "right"), pixel_values=pixel_values).last_hidden_state
    assert soft.shape == hard.shape
    assert plain.shape[1] - soft.shape[1] == 18 * (frames or 1)
    assert counted[:2] == [(65 - 18) * (frames or 1)] * 2
