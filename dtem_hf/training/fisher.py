"""Learn merges from what they would do: the Fisher information of every edge, without a gradient through merging.

To first order, merging tokens a and b changes log p(y | image) by g_a·(m − x_a) + g_b·(m − x_b), where m is their mean
and g the gradient. The mean of its square over classes y, drawn as likely as the model itself thinks them, is twice
the KL divergence that the merge causes. Each layer's embedding learns to choose the edges that cost least: the loss is
the expected cost of what soft grouping would choose, and reaches the embedding through its similarities alone. The
forward pass merges hard, with tokens really removed, so there is no gap between what is trained and what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..configuration import DTEMConfig
from ..errors import BadValue
from ..programs.arguments import option
from ..token_state import MergeStep


_TINY = 1e-20


@dataclass(kw_only=True)
class FisherArguments:
    """Options of the tasks fisher and feature_fisher."""

    fisher_samples: int = option("fisher: gradients per image and step", default=1)
    fisher_similarity: float = option(
        "fisher: a merge of tokens whose attention keys differ costs more, by exp of this times 1 - cosine",
        default=4.0,
    )
    fisher_floor: float = option(
        "fisher: the least that a merge costs, as a share of the mean over an image", default=1e-3
    )

    def check_fisher(self) -> None:
        """Raise ValueError for options that make no sense."""
        if self.fisher_samples < 1:
            raise BadValue("fisher_samples", self.fisher_samples, "1 or more")
        for name in ("fisher_similarity", "fisher_floor"):
            if not getattr(self, name) >= 0:
                raise BadValue(name, getattr(self, name), "0 or more")


def fisher_loss(
    steps: Sequence[MergeStep],
    outputs: Sequence[Tensor],
    num_prefix_tokens: int,
    config: DTEMConfig,
    arguments: FisherArguments,
) -> Tensor:
    """Expected cost of the merges that soft grouping would choose, as a share of a random choice's: a scalar.

    `steps` are recorded in the forward pass that `outputs`, sums over its images, came from. 1 is what merging at
    random would cost. Every image counts alike, however sure of it the model is.
    """
    damage: list[Any] = [0.0] * len(steps)
    for number, output in enumerate(outputs):
        last = number == len(outputs) - 1
        # Behind the last layer's attention a classifier reads one token, and merging the others changes nothing.
        gradients = torch.autograd.grad(output, [s.x for s in steps], retain_graph=not last, materialize_grads=True)
        for i, (step, gradient) in enumerate(zip(steps, gradients, strict=True)):
            sizes = None if step.sizes is None else step.sizes.detach()
            change = ops.first_order_change(step.x.detach(), sizes, gradient, num_prefix_tokens)
            damage[i] = damage[i] + change.square() / len(outputs)
    losses = [_expected(s, d, num_prefix_tokens, config, arguments) for s, d in zip(steps, damage, strict=True)]
    return torch.stack(losses).mean()


def _expected(
    step: MergeStep, damage: Tensor, num_prefix_tokens: int, config: DTEMConfig, arguments: FisherArguments
) -> Tensor:
    halves = ops.split_even_odd
    scores = ops.cosine_scores(*halves(step.metric, num_prefix_tokens))
    similarity = ops.cosine_scores(*halves(step.keys, num_prefix_tokens))
    # Only what is cheap within an image matters, and the scale of the damage differs by orders between images.
    damage = damage / (damage.mean(dim=(1, 2), keepdim=True) + _TINY)
    cost = (damage + arguments.fisher_floor + _TINY) * torch.exp(arguments.fisher_similarity * (1 - similarity))
    if step.padding is not None:
        scores = ops.put_empty_first(scores, *halves(step.padding, num_prefix_tokens))
    chosen = ops.soft_grouping(scores, step.r, config.top_k, config.score_temperature, config.assignment_temperature)
    return (chosen * cost).sum() / (step.r * len(cost) * cost.mean())


def sampled_log_probability(logits: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """Sum over the images of log p(y), for one y each that is drawn from p: logits [B, classes] -> scalar.

    What is drawn depends on seed, epoch, image and `sample` alone, so however images are dealt out, it is the same.
    """
    log_p = logits.float().log_softmax(-1)
    uniform = torch.tensor([[draw.random()] for draw in _generators(batch, seed, sample)], dtype=torch.float32)
    up_to = log_p.detach().exp().cumsum(-1)
    y = torch.searchsorted(up_to, uniform.to(up_to.device) * up_to[:, -1:]).clamp(max=logits.shape[-1] - 1)
    return log_p.gather(1, y).sum()


def sampled_words(logits: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """As `sampled_log_probability`, for a word y each at every place of a caption where one is predicted.

    logits [B, V + T, classes], those of V visual tokens in front; the batch's labels [B, T] are -100 at padding.
    """
    labels = batch["labels"]
    log_p = logits[:, -labels.shape[1] : -1].float().log_softmax(-1)
    uniform = np.stack([draw.random(labels.shape[1] - 1, np.float32) for draw in _generators(batch, seed, sample)])
    up_to = log_p.detach().exp().cumsum(-1)
    wanted = torch.from_numpy(uniform).to(up_to.device).unsqueeze(-1) * up_to[..., -1:]
    y = torch.searchsorted(up_to, wanted).clamp(max=logits.shape[-1] - 1)
    return log_p.gather(-1, y).squeeze(-1)[labels[:, 1:] != -100].sum()


def sampled_projection(features: Tensor, batch: dict[str, Tensor], seed: int, sample: int) -> Tensor:
    """Sum over the images of a random direction's share of their features, which are brought to length 1: a scalar.

    The mean square of its change is the squared distance that features move.
    """
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    directions = np.stack([draw.standard_normal(features.shape[-1]) for draw in _generators(batch, seed, sample)])
    return (features * torch.from_numpy(directions).to(features)).sum()


def _generators(batch: dict[str, Tensor], seed: int, sample: int) -> list[np.random.Generator]:
    numbers = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
    return [np.random.default_rng((seed, sample, epoch, index)) for epoch, index in numbers]


Sampler = Callable[[Tensor, dict[str, Tensor], int, int], Tensor]
