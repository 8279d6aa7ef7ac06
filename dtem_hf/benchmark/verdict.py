"""Decide from measured rows which r to take, and whether merging pays.

A row is one method at one r (0: the unmerged model) in one runtime. The rows of the first runtime come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


Row = dict[str, Any]


def pick(rows: Sequence[Row], max_loss: float) -> Row | None:
    """The row with the largest r whose loss is at most `max_loss`, or None; of several methods, that of least loss."""
    allowed = [row for row in rows if row["r"] and row["loss"] <= max_loss]
    return max(allowed, key=lambda row: (row["r"], -row["loss"]), default=None)


def least(rows: Sequence[Row]) -> Row:
    """The merged row with the smallest loss."""
    return min((row for row in rows if row["r"]), key=lambda row: row["loss"])


def judge(rows: Sequence[Row], picked: Row, place: int) -> dict[str, Any]:
    """Judge a picked method and r at one batch size (the one at `place`), in its fastest runtime.

    Merging pays if it beats the fastest unmerged runtime in at least three of four rounds; else `because` gives the
    reason. `merging_share` is merging's part of the gain over the unmerged model in the first runtime; the rest is the
    runtime's part. It is a share of the logarithm, as the two factors multiply. None if there is no gain.
    """
    cells = {row["runtime"]: row["batches"][place] for row in rows if is_same(row, picked)}
    plain = {row["runtime"]: row["batches"][place] for row in rows if not row["r"]}
    runtime, best_plain = max(cells, key=lambda name: _speed(cells[name])), max(plain, key=lambda n: _speed(plain[n]))
    cell = cells[runtime]
    own, over_plain, gain = cell["speedup"]["median"], cell["over_best_plain"], cell["over_first"]["median"]
    pays = over_plain["q25"] > 1
    if pays:
        because = None
    elif own <= 1:
        because = (
            f"{runtime} has {own:.2f}× the speed at {picked['ratio']:.2f} of the unmerged model's multiply-adds: "
            "matching and merging take the time that they save"
        )
    elif over_plain["median"] <= 1:
        because = (
            f"the fastest merged runtime, {runtime}, makes {_speed(cell):.1f} images/s, and the unmerged model "
            f"{_speed(plain[best_plain]):.1f} in {best_plain}"
        )
    else:
        because = (
            f"the gain of {over_plain['median']:.2f}× over the unmerged model in {best_plain} is within the noise of "
            f"this machine (quartiles {over_plain['q25']:.2f}–{over_plain['q75']:.2f})"
        )
    return {
        "batch_size": cell["batch_size"],
        "runtime": runtime,
        "images_per_second": _speed(cell),
        "speedup": own,
        "best_plain": best_plain,
        "over_best_plain": over_plain["median"],
        "first_runtime": rows[0]["runtime"],
        "over_first": gain,
        "merging_share": min(1.0, max(0.0, math.log(own)) / math.log(gain)) if gain > 1 else None,
        "pays": pays,
        "because": because,
    }


def sentence(rows: Sequence[Row], picked: Row | None, verdicts: Sequence[dict[str, Any]], max_loss: float) -> str:
    """The advice in words: which r to take and its gain at every batch size, or why merging does not pay."""
    if picked is None:
        row = least(rows)
        return f"It does not pay here, because even {_name(row)} {_cost(row)}, and max_loss={max_loss:g} allows less."
    if not verdicts:
        return f"The largest r within the loss is {_name(picked)}: it {_cost(picked)}. No speed was measured."
    gains = [_gain(verdict) for verdict in verdicts if verdict["pays"]]
    reasons = {_batch(verdict): verdict["because"] for verdict in verdicts if not verdict["pays"]}
    if not gains:
        losses = "; ".join(f"with {batch} {because}" for batch, because in reasons.items())
        return f"It does not pay here, because at {_name(picked)}, the largest r within the loss, {losses}."
    losses = "".join(f"; with {batch} it does not pay, because {because}" for batch, because in reasons.items())
    tried = "" if any(row["r"] > picked["r"] for row in rows) else ", the largest that was tried"
    return f"Take {_name(picked)}{tried}: it gives {', and '.join(gains)}; it {_cost(picked)}{losses}."


def is_same(row: Row, other: Row) -> bool:
    """Whether two rows have the same method and the same r."""
    return (row["method"], row["r"]) == (other["method"], other["r"])


def _speed(cell: dict[str, Any]) -> float:
    return cell["images_per_second"]["median"]


def _name(row: Row) -> str:
    return f"r = {row['r']} ({row['method']})"


def _batch(verdict: dict[str, Any]) -> str:
    return "one image at a time" if verdict["batch_size"] == 1 else f"{verdict['batch_size']} images at a time"


def _cost(row: Row) -> str:
    low, high = row["loss_interval"]
    if row["cosine"] is not None:
        return f"turns the features to a cosine of {row['cosine']:.3f} (95 % interval {1 - high:.3f} to {1 - low:.3f})"
    within = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return f"changes the class of {100 * row['loss']:.1f} % of the images ({within})"


def _gain(verdict: dict[str, Any]) -> str:
    """The gain at one batch size: over unmerged in the same runtime, in the best, and in the first runtime."""
    v = verdict
    text = f"{v['speedup']:.2f}× with {_batch(v)} in {v['runtime']} ({v['images_per_second']:.1f} images/s"
    if v["best_plain"] != v["runtime"]:
        text += f", {v['over_best_plain']:.2f}× the best unmerged runtime, {v['best_plain']}"
    if v["first_runtime"] != v["runtime"]:
        share = v["merging_share"]
        text += f", {v['over_first']:.2f}× unmerged {v['first_runtime']}"
        text += "" if share is None else f", {100 * share:.0f} % of that gain by merging"
    return f"{text})"
