"""What people do with a merged GIT: it is trained, compiled, saved, copied to threads, and plain again on demand."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GitForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from dtem_hf import AutoModelForCausalLM, DTEMConfig, ToMeConfig, detach
from tests.families.git import METHODS, right_cache
from tests.support.git_models import (
    PROMPTS,
    assert_generates_as_alone,
    assert_loss_by_hand,
    generate,
    images,
    make,
    merged,
    pad,
)


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


@right_cache
@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_in_place_are_counted_as_such(method: Any) -> None:
    model = merged(method, 9, unmerge=True)
    assert_loss_by_hand(model, images(2))
    assert_generates_as_alone(model, images(2))
    assert model.merge_plan().output_tokens == 65


@right_cache
@pytest.mark.parametrize("method", METHODS)
def test_words_that_are_guessed_ahead_do_not_change_the_caption(method: Any) -> None:
    """Looked up in the prompt or said by an assistant: several words at once, and a cache that is cut back."""
    model, prompt = merged(method), [[1, 24, 22, 24, 22, 24]]
    expected = generate(model, images(1), prompt, use_cache=False, max_new_tokens=12).sequences
    for guesses in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make()}):
        assert torch.equal(generate(model, images(1), prompt, max_new_tokens=12, **guesses).sequences, expected)


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
