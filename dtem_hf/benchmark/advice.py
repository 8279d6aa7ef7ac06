"""Measure a model as it is and merged by several r, and say which r to take on this machine."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration import MatchingConfig, MergeConfig, ToMeConfig
from ..deploy.runtimes import RUNTIMES, Run, is_exported, make_run
from ..errors import BadValue
from ..evaluation.metrics import bootstrap_interval, share_interval
from ..evaluation.variants import make_variants
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.copies import share_weights
from ..models.distances import feature_distance, kl_to, output_of
from ..models.install import detach
from ..models.timing import timed_rounds
from ..models.vision import pixel_batches
from ..progress import tqdm
from .efficiency import speeds
from .runtimes import room_for_graphs
from .verdict import Row, judge, least, pick, sentence


# Those that merge r tokens per layer.
METHODS = [name for name, config in MergeConfig._methods.items() if issubclass(config, MatchingConfig)]
# Without r: the smallest ones that leave these shares of the multiply-adds.
_SHARES = (0.75, 0.6, 0.5)
# What may be lost where nothing is said: of 1 - agreement, of 1 - cosine.
_MOST_LOSS = {"logits": 0.1, "features": 0.05}
_WARMUP = 1
_LEAST_ROUNDS = 4
# A row is timed no longer where the 95 % interval of its mean speed-up is no wider than this, to either side.
_NARROW = 0.02
# Guesses for the remaining time, until a row was made ready and ran: seconds of an export, and of compiling for one
# batch size; the time of a pass beside eager's.
_EXPORT, _COMPILE, _FASTER = 10.0, 30.0, 0.6
# Compiling takes a minute for each row, and other forms of a runtime are for those who ask for them.
_USUAL = [name for name in RUNTIMES if name != "compile" and not name.startswith(tuple(f"{n}_" for n in RUNTIMES))]


@dataclass(frozen=True)
class Advice:
    """The sentence, what was picked (`method`, `r`, or None), a verdict per batch size, and the measured rows.

    A row's `loss`: the share of images whose class changes, or one minus the features' cosine. `left_out` says why.
    `finished` is False while speeds are still measured.
    """

    sentence: str
    method: str | None
    r: int | None
    max_loss: float
    verdicts: list[dict[str, Any]]
    left_out: dict[str, str]
    rows: list[Row]
    finished: bool = True

    def __str__(self) -> str:
        return self.sentence


def advise(
    model: Any,
    images: Any,
    *,
    adapter: MergeAdapter | str | os.PathLike[str] | None = None,
    methods: Sequence[str] = (),
    r: Sequence[int] = (),
    runtimes: Sequence[str] = (),
    compile_mode: str = "default",
    batch_sizes: Sequence[int] = (1, 16),
    max_loss: float | None = None,
    features: str = "auto",
    rounds: int = 10,
    minutes: float = 3.0,
    report: Callable[[Advice], Any] = lambda advice: None,
) -> Advice:
    """Measure a model as it is and merged by several r, on the device it lies on, and say which r to take.

    `images` are pixel values [n, C, H, W], or batches of them (tensors, or dicts with `pixel_values`); 100 will do.
    `methods` left out are ToMe and the adapter's; `runtimes` left out are those that can run here, without compiled
    models, which take a minute for each row. `r` left out are three that leave 0.75, 0.6 and 0.5 of the multiply-adds;
    then only the one that is taken runs in other runtimes than the first. `max_loss` is the share of images whose
    class may change (left out: 0.1), or one minus the cosine of the `features` (auto, pooled, cls, patches or grid) of
    a model without classes (0.05). A row is timed in at most `rounds` rounds, fewer where its speed-up is known to 2 %
    or `minutes` are over. `report` is called with what is known whenever more is. The model is not changed. Raises
    ValueError for nonsense and for a runtime that was asked for and cannot run the model, ImportError where its
    packages are absent.
    """
    started = time.monotonic()
    for name, values in (("r", r), ("batch_sizes", batch_sizes)):
        if min(values, default=name == "r") < 1:
            raise BadValue(name, list(values), "whole numbers, each 1 or more; the unmerged model is always measured")
    for name, named, known in (("methods", methods, METHODS), ("runtimes", runtimes, RUNTIMES)):
        if not set(named) <= set(known):
            raise BadValue(name, list(named), f"some of {', '.join(known)}")
    plain = detach(share_weights(model)).eval()
    batches, device = pixel_batches(images, 16), next(plain.parameters()).device
    shape = tuple(batches[0].shape[1:])
    if adapter is not None and not isinstance(adapter, MergeAdapter):
        adapter = MergeAdapter.from_reference(adapter)
    adapters = {} if adapter is None else {"adapter": adapter}
    wanted = list(methods) or list(dict.fromkeys(["tome", *(given.config.method for given in adapters.values())]))
    variants = make_variants(plain, wanted, list(r) or handful(plain, shape), [], adapters)
    models = [variant.standalone() for variant in variants]
    shares = [1.0, *(merged.merge_plan(shape[-2:]).ratio for merged in models[1:])]
    names = list(runtimes or _USUAL)
    with _remaining_time() as (seconds, show):
        everything = range(len(models))
        for runtime in filter(is_exported, names):
            seconds[f"prepare {runtime}"] = _EXPORT * (len(models) if r else 2)
        seconds["timing"] = max(0.0, 60 * minutes - sum(seconds.values()))
        began = time.monotonic()
        kind, losses = _losses(models, [batch.to(device) for batch in batches], features, seconds, show)
        a_batch = (time.monotonic() - began) / len(batches)
        found = zip(variants, shares, losses, strict=True)
        facts = [{"method": v.method, "r": v.shown_r or 0, "ratio": share, **loss} for v, share, loss in found]
        most = _MOST_LOSS[kind] if max_loss is None else max_loss
        picked, rows = pick(facts, most), [{"runtime": names[0], **row, "batches": []} for row in facts]
        left_out: dict[str, str] = {}

        def advice(finished: bool) -> Advice:
            verdicts = [] if picked is None else [judge(rows, picked, i) for i in range(len(rows[0]["batches"]))]
            taken = picked or {"method": None, "r": None}
            said = sentence(rows, picked, verdicts, most)
            return Advice(said, taken["method"], taken["r"], most, verdicts, left_out, rows, finished)

        report(advice(finished=False))
        chosen = everything if r else [0, facts.index(picked or least(facts))]
        numbers: dict[str, Sequence[int]] = {name: everything if name == names[0] else chosen for name in names}
        runs, left_out = _runs(models, numbers, shape, not runtimes, compile_mode, seconds, show)
        rows = [{"runtime": runtime, **facts[i], "batches": []} for runtime, i in runs]
        per_image = [a_batch * share / sum(shares) / len(batches[0]) for share in shares]
        guess = sum(per_image[i] * (1 if runtime == "eager" else _FASTER) for runtime, i in runs)
        end = started + 60 * minutes
        with room_for_graphs(len(rows) * (1 + len(batch_sizes))):
            pixels = torch.cat(batches).to(device)
            for _ in _time(rows, list(runs.values()), pixels, batch_sizes, rounds, end, guess, seconds, show):
                report(advice(finished=False))
    return advice(finished=True)


def handful(model: Any, shape: tuple[int, ...]) -> list[int]:
    """A few r for a plain model and images of [C, H, W]: the smallest that leave 0.75, 0.6 and 0.5 of its cost."""
    merged, found = attach(share_weights(model), ToMeConfig(r=0)), [0]

    def ratio(r: int) -> float:
        merged.set_reduction(r)
        return merged.merge_plan(shape[-2:]).ratio

    most = merged.merge_plan(shape[-2:]).num_tokens // 2 + 1  # a layer merges fewer
    with warnings.catch_warnings():  # of an r that is too large for images of the model's own size
        warnings.simplefilter("ignore")
        for share in _SHARES:
            found += [next((r for r in range(found[-1] + 1, most) if ratio(r) <= share), most)]
    return [r for r in found[1:] if r < most] or [1]


@contextmanager
def _remaining_time() -> Iterator[tuple[dict[str, float], Callable[[str], None]]]:
    """One progress bar of seconds: a dict of those that are left, by what takes them, and a function that draws it."""
    left: dict[str, float] = {}
    began = time.monotonic()
    with tqdm(total=1.0, desc="advise", bar_format="{desc}: {percentage:3.0f}%|{bar:20}|{postfix}") as bar:

        def show(doing: str) -> None:
            passed, remaining = time.monotonic() - began, round(sum(left.values()))
            bar.n, bar.total = passed, passed + remaining
            bar.set_postfix_str(f"about {remaining // 60}:{remaining % 60:02d} left, {doing}")

        yield left, show
        left.clear()
        show("done")


@torch.inference_mode()
def _losses(
    models: Sequence[Any],
    batches: Sequence[Tensor],
    features: str,
    seconds: dict[str, float],
    show: Callable[[str], None],
) -> tuple[str, list[dict[str, Any]]]:
    """Whether logits or features are compared, and how far every model's are from the first one's."""
    lost: list[list[Tensor]] = [[] for _ in models]
    divergences: list[list[Tensor]] = [[] for _ in models]
    for number, batch in enumerate(batches, 1):
        began = time.monotonic()
        kind, reference = output_of(models[0], batch, features)
        for i, model in enumerate(models):
            output = output_of(model, batch, features)[1] if i else reference
            if kind == "logits":
                lost[i].append((output.argmax(-1) != reference.argmax(-1)).double())
                divergences[i].append(kl_to(reference, output).double())
            else:
                lost[i].append(feature_distance(reference, output, "cosine").double())
        seconds["losses"] = (time.monotonic() - began) * (len(batches) - number)
        show("losses")
    rows = []
    for values, divergence in zip(map(torch.cat, lost), divergences, strict=True):
        loss = values.mean().item()
        if divergence:
            interval = share_interval(int(values.sum()), len(values))
            kept = {"agreement": 100 * (1 - loss), "kl": torch.cat(divergence).mean().item(), "cosine": None}
        else:
            interval = bootstrap_interval(values.cpu().numpy())
            kept = {"agreement": None, "kl": None, "cosine": 1 - loss}
        rows.append({"loss": loss, "loss_interval": interval, **kept})
    return kind, rows


def _runs(
    models: Sequence[Any],
    wanted: dict[str, Sequence[int]],
    shape: Any,
    may_lack: bool,
    compile_mode: str,
    seconds: dict[str, float],
    show: Callable[[str], None],
) -> tuple[dict[tuple[str, int], Run], dict[str, str]]:
    """The wanted models in every runtime, by runtime and number, and why others were left out.

    Unless it `may_lack`, a runtime must run.
    """
    runs: dict[tuple[str, int], Run] = {}
    left_out: dict[str, str] = {}
    for runtime, numbers in wanted.items():
        made: dict[tuple[str, int], Run] = {}
        try:
            for i in numbers:
                show(f"prepare {runtime}")
                began = time.monotonic()
                made[runtime, i] = make_run(runtime, models[i], shape, compile_mode)
                seconds[f"prepare {runtime}"] = (time.monotonic() - began) * (len(numbers) - len(made))
            runs |= made
        except (ImportError, RuntimeError, ValueError) as error:
            if not may_lack:
                raise
            left_out[runtime] = " ".join(str(error).split())
            seconds[f"prepare {runtime}"] = 0.0
    return runs, left_out


@torch.inference_mode()
def _time(
    rows: Sequence[Row],
    runs: Sequence[Run],
    pixels: Tensor,
    batch_sizes: Sequence[int],
    rounds: int,
    end: float,
    guess: float,
    seconds: dict[str, float],
    show: Callable[[str], None],
) -> Iterator[None]:
    """Fill the rows' `batches` anew after every round; what is left until `end` is shared by the batch sizes.

    `speedup` is over the unmerged model in its runtime, `over_first` in the first one. `guess`: seconds of all rows
    for one image.
    """
    plain = [i for i, row in enumerate(rows) if not row["r"]]
    own = [max(start for start in plain if start <= i) for i in range(len(rows))]
    del seconds["timing"]
    for place, size in enumerate(batch_sizes):
        began = time.monotonic()
        budget = max(0.0, end - began) / (len(batch_sizes) - place)
        for later in batch_sizes[place:]:
            a_round = guess * max(later, 8)
            compiling = _COMPILE * sum(row["runtime"] == "compile" for row in rows)
            longest = max(budget, (_LEAST_ROUNDS + _WARMUP) * a_round)
            seconds[f"batches of {later}"] = compiling + min(longest, (rounds + _WARMUP) * a_round)
        show(f"batches of {size}")
        batch = pixels[torch.arange(size, device=pixels.device) % len(pixels)]
        known: set[int] = set()
        found: list[np.ndarray] = []
        calls = [partial(run, batch) for run in runs]
        for number, one in enumerate(timed_rounds(calls, pixels.device, batch_size=size, skipped=known)):
            if number < _WARMUP:
                warm = time.monotonic()
                continue
            found.append(one)
            _add_cells(rows, place, np.stack(found), size, plain, own)
            yield
            known |= {i for i in range(len(rows)) if i not in plain and _is_narrow(np.stack(found), own[i], i)}
            each, until = (time.monotonic() - warm) / len(found), began + budget - time.monotonic()
            left = max(_LEAST_ROUNDS - len(found), until // each)
            left = 0 if len(known) + len(plain) == len(rows) else min(rounds - len(found), left)
            seconds[f"batches of {size}"] = each * max(0, left)
            show(f"batches of {size}")
            if left <= 0:
                break


def _add_cells(
    rows: Sequence[Row], place: int, seconds: np.ndarray, size: int, plain: Sequence[int], own: Sequence[int]
) -> None:
    """Write what some rounds say into the rows' `batches`."""
    best = min(plain, key=lambda i: np.nanmedian(seconds[:, i]))
    over = {
        name: [cell["speedup"] for cell in speeds(seconds, size, [reference] * len(rows))]
        for name, reference in (("over_best_plain", best), ("over_first", 0))
    }
    for i, (row, cell) in enumerate(zip(rows, speeds(seconds, size, own), strict=True)):
        row["batches"][place:] = [{"batch_size": size, **cell, **{name: values[i] for name, values in over.items()}}]


def _is_narrow(seconds: np.ndarray, reference: int, i: int) -> bool:
    """Whether the speed-up of a run is known: seconds [rounds, runs]."""
    ratios = seconds[:, reference] / seconds[:, i]
    ratios = ratios[~np.isnan(ratios)]
    spread = 1.96 * ratios.std(ddof=1) / len(ratios) ** 0.5 if len(ratios) >= _LEAST_ROUNDS else np.inf
    return bool(spread <= _NARROW * ratios.mean())
