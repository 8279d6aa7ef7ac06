"""Multiply-adds of a metric, a layer and an encoder, and the plan that one r per layer gives.

A layer that has too few tokens for its r merges as many as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple


class MetricCost(NamedTuple):
    """Multiply-adds of a layer's metric: per token, per image, and the `width` of the compared features.

    `compared` says which pairs of non-prefix tokens the method compares: A tokens with B tokens ("halves"), all tokens
    with all ("all"), or the tokens that leave with the tokens that stay ("leaving").
    """

    per_token: int
    per_image: int = 0
    width: int = 0
    compared: Literal["halves", "all", "leaving"] = "halves"

    def multiply_adds(self, num_tokens: int, r: int, num_prefix_tokens: int) -> int:
        """Multiply-adds for one image of `num_tokens` tokens in a layer that merges r of them away."""
        free = num_tokens - num_prefix_tokens
        some = {"halves": free // 2, "all": free, "leaving": r}[self.compared]
        others = free if self.compared == "all" else free - some
        return num_tokens * self.per_token + self.per_image + some * others * self.width


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one encoder layer, independent of the number of tokens.

    `before`: per token before the merge (projections). `after`: per token after the merge (MLP). `per_pair`: per pair
    of query and key (scores and values). `metric` counts only if the layer merges tokens.
    """

    before: int
    per_pair: int
    after: int
    metric: MetricCost

    def multiply_adds(self, num_tokens: int, r: int, num_prefix_tokens: int, between: bool = False) -> int:
        """Multiply-adds of the layer for one image of `num_tokens` tokens, if it merges r of them away.

        `between`: it merges behind its MLP, in front of the next layer.
        """
        grown = num_tokens if between else num_tokens - r
        total = num_tokens * self.before + num_tokens**2 * self.per_pair + grown * self.after
        return total + (self.metric.multiply_adds(num_tokens, r, num_prefix_tokens) if r else 0)


@dataclass(frozen=True)
class EncoderCost:
    """Multiply-adds of a model: of its encoder's layers, and outside of them.

    `stem` counts per patch, `head` per image, `tail` per output token, `tail_pairs` per pair of output tokens.
    `pairwise`: a layer can merge at most half of its non-prefix tokens, as each merged token needs a partner that
    stays. `between`: the method merges between layers, not inside them.
    """

    layers: tuple[LayerCost, ...]
    stem: int
    head: int
    num_prefix_tokens: int
    tail: int = 0
    tail_pairs: int = 0
    pairwise: bool = True
    between: bool = False

    def plan(self, num_tokens: int, reductions: Sequence[int]) -> MergePlan:
        """The plan for `num_tokens` tokens and one r per layer; an r too large for its layer is lowered."""
        lowered, tokens, costs, n = [], [], [], num_tokens
        for layer, r in zip(self.layers, reductions, strict=True):
            if self.pairwise:
                r = min(r, max(n - self.num_prefix_tokens, 0) // 2)
            lowered.append(r)
            costs.append(layer.multiply_adds(n, r, self.num_prefix_tokens, self.between))
            n -= r
            tokens.append(n)
        around = self.stem * (num_tokens - self.num_prefix_tokens) + self.head
        plain = sum(layer.multiply_adds(num_tokens, 0, self.num_prefix_tokens) for layer in self.layers)
        return MergePlan(
            num_tokens=num_tokens,
            reductions=lowered,
            tokens=tokens,
            layer_multiply_adds=costs,
            multiply_adds=around + self._on_output(n) + sum(costs),
            unmerged_multiply_adds=around + self._on_output(num_tokens) + plain,
            output_tokens=n,
        )

    def _on_output(self, num_tokens: int) -> int:
        """Multiply-adds on the tokens that the encoder returns."""
        return num_tokens * (self.tail + num_tokens * self.tail_pairs)


@dataclass(frozen=True)
class MergePlan:
    """Tokens and multiply-adds of one image, computed without running the model.

    `num_tokens` tokens, with the prefix, enter the first layer. Layer i merges `reductions[i]` away and returns
    `tokens[i]`. `multiply_adds` counts the whole model, or the image encoder alone in a captioner or dual encoder.
    `output_tokens` counts all frames of an input together.
    """

    num_tokens: int
    reductions: list[int]
    tokens: list[int]
    layer_multiply_adds: list[int]
    multiply_adds: int
    unmerged_multiply_adds: int
    output_tokens: int

    @property
    def ratio(self) -> float:
        """Multiply-adds as a share of the unmerged model's."""
        return self.multiply_adds / self.unmerged_multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, `ratio` included."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        layers = zip(self.reductions, self.tokens, self.layer_multiply_adds, strict=True)
        rows = [f"{i:>5} {r:>4} {n:>7} {cost / 1e6:>16.1f}" for i, (r, n, cost) in enumerate(layers)]
        total = (
            f"{self.num_tokens} -> {self.tokens[-1]} tokens; {self.multiply_adds / 1e9:.3f} G multiply-adds per "
            f"image, {self.ratio:.3f} of the unmerged {self.unmerged_multiply_adds / 1e9:.3f} G"
        )
        return "\n".join([f"{'layer':>5} {'r':>4} {'tokens':>7} {'M multiply-adds':>16}", *rows, total])
