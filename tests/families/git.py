"""GIT: whoever reads the number of visual tokens sees the true one, in loss and generation, batch, beams and frames.

`PROMISES` are checked on merged models; and again with the number taken from where a naive implementation would take
it, where they must fail.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, GitConfig, GitForCausalLM, GitModel, GitVisionModel
from transformers.modeling_outputs import BaseModelOutput

from dtem_hf import AutoModelForCausalLM, DTEMConfig, ToMeConfig, attach, detach
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import clip_like
from tests.support.slow_model import Outputs, Weights, layer_norm


def git_head(weights: Weights, root: str, x: Tensor, sizes: Tensor) -> Outputs:
    return {"last_hidden_state": layer_norm(weights, root + "post_layernorm", x, 1e-5)}


CASE = FamilyCase(
    "git",
    encoder=GitVisionModel,
    rows=(Row(GitVisionModel, clip_like("vision_model.", git_head), "last_hidden_state"),),
    others=(GitModel, GitForCausalLM),
    attentions=("eager",),
)

PAD, STEPS = 0, 6
# What forward passes call it: transformers gave it another name in 5.24.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
METHODS = [ToMeConfig, DTEMConfig]
REDUCTIONS = [9, [11, 0, 14, 3]]
PROMPTS = [[1, 7], [1, 9, 30, 4, 22]]


def make(model_class: type = GitForCausalLM, frames: int | None = None) -> Any:
    """A GIT of 65 tokens per image and 4 vision layers, with weights large enough that captions differ."""
    torch.manual_seed(7)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    config = GitConfig(
        vision_config={**widths, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4},
        **widths,
        num_hidden_layers=2,
        vocab_size=48,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
        num_image_with_embedding=frames,
    )
    model = model_class(config).eval()
    for parameter in getattr(getattr(model, "git", model), "img_temporal_embedding", []):
        parameter.data.normal_(std=0.5)  # all zeros when new, as if frames had no order
    return model


def merged(config_class: Any, r: Any = 9, frames: int | None = None, **fields: Any) -> Any:
    """A merged model, in `.eval()`; what a method learns is moved away from where it starts."""
    model = attach(make(frames=frames), config_class(r=r, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(*shape: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(*shape, 3, *size, generator=torch.Generator().manual_seed(2))


def pad(prompts: list[list[int]], side: str) -> dict[str, Tensor]:
    """Token ids and mask of a padded batch."""
    longest = max(map(len, prompts))
    gaps = [[PAD] * (longest - len(prompt)) for prompt in prompts]
    rows = [gap + p if side == "left" else p + gap for gap, p in zip(gaps, prompts, strict=True)]
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def positions(attention_mask: Tensor) -> Tensor:
    """Positions of the text, which padding does not move."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def handed_on(model: Any, run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `run` returns, and how many visual tokens reached the decoder each time any did."""
    counts: list[int] = []
    decoder = getattr(model, "git", model)
    hook = decoder.visual_projection.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[1]))
    try:
        return run(), counts
    finally:
        hook.remove()


@torch.no_grad()
def greedy_alone(model: Any, image: Tensor, prompt: list[int], **kwargs: Any) -> tuple[list[int], Tensor]:
    """The slow way to a caption: one image, no padding, no cache; its tokens, and the logits [STEPS, V]."""
    tokens, trail = list(prompt), []
    for _ in range(STEPS):
        logits = model(pixel_values=image, input_ids=torch.tensor([tokens]), use_cache=False, **kwargs).logits[0, -1]
        trail.append(logits)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], torch.stack(trail)


def generate(model: Any, pixel_values: Tensor, prompts: list[list[int]], **kwargs: Any) -> Any:
    """transformers' own generation, with logits, for prompts padded on the left."""
    kwargs = {"max_new_tokens": STEPS, "do_sample": False, **kwargs}
    return model.generate(
        pixel_values=pixel_values,
        **pad(prompts, "left"),
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def assert_generates_as_alone(model: Any, pixel_values: Tensor, **kwargs: Any) -> None:
    """A cached, padded batch says what the slow way says of each image alone."""
    output = generate(model, pixel_values, PROMPTS, **kwargs)
    for row, prompt in enumerate(PROMPTS):
        tokens, logits = greedy_alone(model, pixel_values[row : row + 1], prompt, **kwargs)
        torch.testing.assert_close(torch.stack(output.logits)[:, row], logits, atol=1e-4, rtol=1e-4)
        assert output.sequences[row, -STEPS:].tolist() == tokens
    assert len({tuple(row[-STEPS:].tolist()) for row in output.sequences}) == len(PROMPTS)  # and not the same of all


def assert_loss_by_hand(model: Any, pixel_values: Tensor, **kwargs: Any) -> None:
    """The model's loss is the mean over next words, of the text alone and without what labels leave out."""
    inputs = pad(PROMPTS, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, 2] = -100
    with torch.no_grad():
        output, (visual,) = handed_on(
            model, lambda: model(pixel_values=pixel_values, labels=labels, **inputs, **kwargs)
        )
    losses = []
    for row in range(len(labels)):
        for word in range(1, labels.shape[1]):
            if labels[row, word] != -100:
                log_shares = output.logits[row, visual + word - 1].double().log_softmax(dim=-1)
                losses.append(-log_shares[labels[row, word]])
    assert output.logits.shape[1] == visual + labels.shape[1]
    assert len(losses) == 4
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)


CACHES_RIGHTLY = Version(transformers.__version__) >= Version("5.18")


@pytest.fixture
def right_cache() -> None:
    if not CACHES_RIGHTLY:
        pytest.skip("before 5.18, the plain model adds the length of its cache to positions that hold it already")


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
    if request.param in CACHED:
        request.getfixturevalue("right_cache")
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


def loss_and_gradients(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The captioning loss of a batch padded on the right, and the gradient for every parameter that it depends on."""
    model.zero_grad()
    inputs = pad(PROMPTS, "right")
    loss = model(pixel_values=pixel_values, labels=inputs["input_ids"], **inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def captions(model: Any, pixel_values: Tensor) -> list[Tensor]:
    """Greedy, by beams and by lot: sequences, and all logits of the first."""
    greedy = generate(model, pixel_values, PROMPTS)
    beams = generate(model, pixel_values, PROMPTS, num_beams=3).sequences
    torch.manual_seed(5)
    sampled = generate(model, pixel_values, PROMPTS, do_sample=True).sequences
    return [*greedy.logits, greedy.sequences, beams, sampled]


def is_plain(model: Any, frames: int | None = None) -> bool:
    """Whether captions, loss and gradients are the plain model's, bit for bit."""
    pixel_values = images(2) if frames is None else images(2, frames)
    plain = make(frames=frames)
    pairs = zip(captions(model, pixel_values), captions(plain, pixel_values), strict=True)
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        return False
    return same_bits(loss_and_gradients(model, pixel_values), loss_and_gradients(plain, pixel_values))


@pytest.mark.parametrize("frames", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_r_zero_unmerged_and_detached_are_the_plain_model_bit_for_bit(method: Any, frames: int | None) -> None:
    assert is_plain(merged(method, 0, frames), frames)
    model = merged(method, 9, frames)
    with model.unmerged():
        assert is_plain(model, frames)
    assert not is_plain(model, frames)
    model = detach(model)
    assert is_plain(model, frames)
    plain = make(frames=frames)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    attention = model.git.encoder.layer[0].attention.self
    assert attention.image_patch_tokens == 65 * (frames or 1)
    assert vars(attention).keys() == vars(plain.git.encoder.layer[0].attention.self).keys()


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


@pytest.mark.parametrize("frames", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_decoder_gets_the_merged_tokens_as_they_are(method: Any, frames: int | None) -> None:
    """The stock model, which is handed the tokens of the merged tower instead of its own, says the same."""
    model, plain = merged(method, 9, frames), make(frames=frames)
    pixel_values = images(2) if frames is None else images(2, frames)

    def merged_features(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=model.git.image_encoder(pixel_values).last_hidden_state)

    plain.git.image_encoder.forward = merged_features
    for side in ("left", "right"):
        inputs = pad(PROMPTS, side)
        with torch.no_grad():
            ours, theirs = (m(pixel_values=pixel_values, **inputs).logits for m in (model, plain))
        assert ours.shape[1] == model.merge_plan().output_tokens + 5
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frames", [None, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_stock_model_generates_the_same_when_told_tokens_and_number(method: Any, frames: int | None) -> None:
    """With a cache and padding, greedily, by beams and by lot: nothing but the tower is another."""
    model, plain = merged(method, 9, frames), make(frames=frames)
    pixel_values = images(2) if frames is None else images(2, frames)
    plain.git.image_encoder = model.git.image_encoder
    plain.git.encoder.layer[0].attention.self.image_patch_tokens = model.merge_plan().output_tokens
    assert all(map(torch.equal, captions(model, pixel_values), captions(plain, pixel_values)))


@pytest.mark.usefixtures("right_cache")
@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_in_place_are_counted_as_such(method: Any) -> None:
    model = merged(method, 9, unmerge=True)
    assert_loss_by_hand(model, images(2))
    assert_generates_as_alone(model, images(2))
    assert model.merge_plan().output_tokens == 65


@pytest.mark.usefixtures("right_cache")
@pytest.mark.parametrize("method", METHODS)
def test_words_that_are_guessed_ahead_do_not_change_the_caption(method: Any) -> None:
    """Looked up in the prompt or said by an assistant: several words at once, and a cache that is cut back."""
    model, prompt = merged(method), [[1, 24, 22, 24, 22, 24]]
    expected = generate(model, images(1), prompt, use_cache=False, max_new_tokens=12).sequences
    for guesses in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make()}):
        assert torch.equal(generate(model, images(1), prompt, max_new_tokens=12, **guesses).sequences, expected)


@pytest.mark.usefixtures("right_cache")
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


@pytest.mark.parametrize("frames", [None, 3])
def test_the_captioning_loss_reaches_what_is_learned(frames: int | None) -> None:
    """Softly merged tokens stay in the encoder, and do not reach the decoder; the loss depends on the metric."""
    model = merged(DTEMConfig, [7, 0, 6, 5], frames).train()
    pixel_values = images(2) if frames is None else images(2, frames)
    assert_loss_by_hand(model, pixel_values)
    gradients = loss_and_gradients(model, pixel_values)
    learned = [name for name, _ in model.named_parameters() if "merge_embedding" in name]
    idle = set(learned[2:4])  # weight and bias of the second layer, which merges nothing
    assert len(learned) == 8
    reached = {name for name in gradients if name not in idle or gradients[name].any()}
    assert reached == {"loss", *(name for name, _ in model.named_parameters())} - idle
    for name in set(learned) - idle:
        assert gradients[name].isfinite().all()
        assert gradients[name].abs().max() > 1e-6, name


def test_a_step_along_the_gradient_lowers_the_captioning_loss() -> None:
    """Of what is learned, where the relaxation is mild and nothing depends on the order of sorted tokens."""
    model = merged(DTEMConfig, [0, 0, 12, 0], score_temperature=0.5, assignment_temperature=1.0).train()
    gradients = loss_and_gradients(model, images(2))
    learned = dict(model.git.image_encoder.merge_embedding.named_parameters())
    moving = {name: gradients.get(f"git.image_encoder.merge_embedding.{name}") for name in learned}
    with torch.no_grad():
        for name, gradient in moving.items():
            if gradient is not None and gradient.any():
                learned[name] -= 0.05 * gradient / gradient.norm()
    assert loss_and_gradients(model, images(2))["loss"] < gradients["loss"] - 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(method: Any) -> None:
    model = merged(method, 9).train()
    plainly = loss_and_gradients(model, images(2))
    model.gradient_checkpointing_enable()
    again = loss_and_gradients(model, images(2))
    assert plainly.keys() == again.keys()
    for name in plainly:
        torch.testing.assert_close(again[name], plainly[name], atol=1e-6, rtol=1e-5)


def test_one_graph_of_torch_compile_gives_the_same_loss() -> None:
    """Tower, count and decoder together, without a break."""
    torch._dynamo.reset()
    model, inputs = merged(DTEMConfig), pad(PROMPTS, "right")
    inputs |= {"pixel_values": images(2), "labels": inputs["input_ids"]}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_says_the_same(method: Any, tmp_path: Path) -> None:
    model = merged(method, [11, 0, 14, 3], frames=3)
    expected = captions(model, images(2, 3)), loss_and_gradients(model, images(2, 3))
    model.save_pretrained(tmp_path / "merged")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert type(loaded) is type(model)
        assert all(map(torch.equal, captions(loaded, images(2, 3)), expected[0]))
        assert same_bits(loss_and_gradients(loaded, images(2, 3)), expected[1])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", merge=None)
    assert type(plain) is GitForCausalLM
    assert is_plain(plain, frames=3)


def test_an_adapter_carries_what_was_learned(tmp_path: Path) -> None:
    model = merged(DTEMConfig, 9)
    model.save_merge_adapter(tmp_path / "adapter")
    make().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", merge=str(tmp_path / "adapter"))
    assert all(map(torch.equal, captions(loaded, images(2)), captions(model, images(2))))


def test_threads_count_their_own_tokens() -> None:
    """One captions images, one videos, one runs unmerged, on one model and at the same time, padded and cached."""
    model = merged(ToMeConfig, 9, frames=3)
    videos, stills = images(2, 3), images(2)
    expected = generate(model, videos, PROMPTS).sequences, generate(model, stills, PROMPTS).sequences
    with model.unmerged():
        expected_unmerged = generate(model, videos, PROMPTS).sequences
    barrier, failures = threading.Barrier(3), []

    def repeatedly(check: Callable[[], None]) -> None:
        try:
            for _ in range(4):
                barrier.wait(timeout=60)
                check()
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    def unmerged() -> None:
        with model.unmerged():
            assert torch.equal(generate(model, videos, PROMPTS).sequences, expected_unmerged)

    def of(pixel_values: Tensor, sequences: Tensor) -> Callable[[], None]:
        def check() -> None:
            assert torch.equal(generate(model, pixel_values, PROMPTS).sequences, sequences)

        return check

    checks = (unmerged, of(videos, expected[0]), of(stills, expected[1]))
    threads = [threading.Thread(target=repeatedly, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not torch.equal(expected[0], expected_unmerged)


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
