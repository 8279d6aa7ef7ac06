"""The Fisher loss: it weighs every possible merge by its effect on the output, without a gradient through merging.

To first order, merging tokens a and b changes log p(y | image) by g_a·(m − x_a) + g_b·(m − x_b), where m is their mean
and g the gradient. The mean of the square over classes y, drawn from the model's own probabilities, is twice the KL
divergence that the merge causes. The loss is the expected divergence of the merges that soft grouping would choose.
Its gradient reaches each layer's embedding only through the layer's similarities. The forward pass merges hard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..configuration import DTEMConfig
from ..token_state import MergeStep
from .task_arguments import TaskArguments


_TINY = 1e-20


def fisher_loss(
    steps: Sequence[MergeStep],
    outputs: Sequence[Tensor],
    num_prefix_tokens: int,
    config: DTEMConfig,
    arguments: TaskArguments,
) -> Tensor:
    """Expected cost of the merges that soft grouping would choose, divided by the cost of random merges: a scalar.

    `steps` are the merge steps of the forward pass that gave `outputs`; each output is a sum over the images. Every
    image has the same weight, however certain the model is about it.
    """
    divergence: list[Any] = [0.0] * len(steps)
    for number, output in enumerate(outputs):
        last = number == len(outputs) - 1
        # Behind the last layer's attention, a classifier reads one token: the gradients of all others are zero.
        gradients = torch.autograd.grad(output, [s.x for s in steps], retain_graph=not last, materialize_grads=True)
        for i, (step, gradient) in enumerate(zip(steps, gradients, strict=True)):
            sizes = None if step.sizes is None else step.sizes.detach()
            change = ops.first_order_change(step.x.detach(), sizes, gradient, num_prefix_tokens)
            divergence[i] = divergence[i] + change.square() / len(outputs)
    losses = [_expected(s, d, num_prefix_tokens, config, arguments) for s, d in zip(steps, divergence, strict=True)]
    return torch.stack(losses).mean()


def _expected(
    step: MergeStep, divergence: Tensor, num_prefix_tokens: int, config: DTEMConfig, arguments: TaskArguments
) -> Tensor:
    halves = ops.split_even_odd
    scores = ops.cosine_scores(*halves(step.metric, num_prefix_tokens))
    similarity = ops.cosine_scores(*halves(step.keys, num_prefix_tokens))
    # Relative to the image's mean: between images, divergences differ by orders of magnitude.
    divergence = divergence / (divergence.mean(dim=(1, 2), keepdim=True) + _TINY)
    cost = (divergence + arguments.fisher_floor + _TINY) * torch.exp(arguments.fisher_similarity * (1 - similarity))
    if step.padding is not None:
        scores = ops.put_empty_first(scores, *halves(step.padding, num_prefix_tokens))
    chosen = ops.soft_grouping(scores, step.r, config.top_k, config.score_temperature, config.assignment_temperature)
    return ((chosen * cost).sum(dim=(1, 2)) / (step.r * cost.mean(dim=(1, 2)))).mean()


def sampled_log_probability(logits: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """Sum over the images of log p(y), for one y per image that is drawn from p: logits [B, classes] -> scalar.

    A draw depends only on seed, epoch, image and `sample`, and not on the batch.
    """
    uniform = torch.tensor([[draw.random()] for draw in _generators(batch, seed, sample)], dtype=torch.float32)
    return _drawn(logits.float().log_softmax(-1), uniform).sum()


def sampled_words(logits: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """Like `sampled_log_probability`, with one word y for every predicted position of a caption.

    `logits` [B, V + T, classes] begin with those of V visual tokens; the batch's labels [B, T] are -100 at padding.
    """
    labels = batch["labels"]
    log_p = logits[:, -labels.shape[1] : -1].float().log_softmax(-1)
    uniform = np.stack([draw.random(labels.shape[1] - 1, np.float32) for draw in _generators(batch, seed, sample)])
    return _drawn(log_p, torch.from_numpy(uniform).unsqueeze(-1))[labels[:, 1:] != -100].sum()


def sampled_projection(features: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """Sum over the images of the projections of their normalised features on random directions: a scalar.

    The mean square of its change is the squared change of the features [B, D] or [B, N, D].
    """
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    directions = np.stack([draw.standard_normal(features.shape[1:]) for draw in _generators(batch, seed, sample)])
    return (features * torch.from_numpy(directions).to(features)).sum()


def _drawn(log_p: Tensor, uniform: Tensor) -> Tensor:
    """log p(y) of classes y that uniform numbers in [0, 1) draw from p: [..., classes], [..., 1] -> [...]."""
    up_to = log_p.detach().exp().cumsum(-1)
    y = torch.searchsorted(up_to, uniform.to(up_to.device) * up_to[..., -1:]).clamp(max=log_p.shape[-1] - 1)
    return log_p.gather(-1, y).squeeze(-1)


def _generators(batch: dict[str, Tensor], seed: int, sample: int) -> list[np.random.Generator]:
    numbers = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
    return [np.random.default_rng((seed, sample, epoch, index)) for epoch, index in numbers]
