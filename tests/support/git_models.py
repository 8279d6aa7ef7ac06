"""Small GITs, plain and merged; what they say and lose, computed image by image and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GitConfig, GitForCausalLM

from dtem_hf import attach


PAD, STEPS = 0, 6
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
