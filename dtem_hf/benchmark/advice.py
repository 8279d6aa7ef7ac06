"""Measure a model unmerged and merged with several r, and advise which r to take on this machine."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration import MatchingConfig, MergeConfig, ToMeConfig
from ..deploy.runtimes import RUNTIMES, Run, make_run
from ..errors import MOST_TOKENS, BadValue, check_number, check_whole
from ..evaluation.metrics import bootstrap_interval, share_interval
from ..evaluation.variants import Variant, make_variants
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.copies import share_weights
from ..models.distances import feature_distance, kl_to, output_of
from ..models.install import detach
from ..models.timing import timed_rounds
from ..models.vision import pixel_batches
from ..progress import tqdm
from .efficiency import speeds
from .rows import room_for_graphs
from .verdict import Row, judge, least, pick, sentence


# The methods that merge r tokens per layer.
METHODS = [name for name, config in MergeConfig._methods.items() if issubclass(config, MatchingConfig)]
# The default r are the smallest that leave these shares of the multiply-adds.
_SHARES = (0.75, 0.6, 0.5)
# The default largest loss: of 1 - agreement for logits, of 1 - cosine for features.
_MOST_LOSS = {"logits": 0.1, "features": 0.05}
_BATCH = 16  # images per batch when outputs are compared
_LEAST_ROUNDS = 4
# The timing of a row ends when the 95 % interval of its mean speed-up is within this share, to either side.
_NARROW = 0.02
# The default runtimes: without compile, which takes a minute per row, and without other forms of a runtime.
_USUAL = [name for name in RUNTIMES if name != "compile" and not name.startswith(tuple(f"{n}_" for n in RUNTIMES))]


@dataclass(frozen=True)
class Advice:
    """The advice as a sentence, the picked `method` and `r` (or None), a verdict per batch size, the measured rows.

    A row's `loss` is the share of images whose class changes, or one minus the features' cosine. `left_out` gives the
    reason for every runtime that was not measured. `finished` is False while speeds are still measured.
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
    """Measure a model unmerged and merged with several r, on its device, and advise which r to take.

    `images` are pixel values [n, C, H, W], or batches of them (tensors, or dicts with `pixel_values`); 100 are enough.
    The default `methods` are ToMe and the adapter's. The default `runtimes` are those that work on this machine,
    without torch.compile, which takes a minute per row. The default `r` are the smallest that leave 0.75, 0.6 and 0.5
    of the multiply-adds; then only the picked r runs in runtimes other than the first. `max_loss` is the share of
    images whose class may change (default 0.1). For a model without classes it is one minus the cosine of the
    `features` (auto, pooled, cls, patches or grid; default 0.05). A row is timed for at most `rounds` rounds, fewer if
    its speed-up is known to 2 % or `minutes` are over. `report` is called with each intermediate advice. The model
    does not change. Raises ValueError for invalid values and for a named runtime that cannot run the model,
    ImportError if its packages are missing.
    """
    check_whole("rounds", rounds, 1, MOST_TOKENS)
    check_number("minutes", minutes, 0, 1e6)
    check_number("max_loss", max_loss or 0, 0, 1)
    _check_lists(methods, runtimes, r, batch_sizes)
    end = time.monotonic() + 60 * minutes
    batches = pixel_batches(images, _BATCH)
    if len(shapes := {tuple(x.shape[1:]) for x in batches}) > 1:
        raise BadValue("images", sorted(shapes), "images of one size")
    plain = detach(share_weights(model)).eval()
    pixels = torch.cat(batches).to(next(plain.parameters()).device)
    variants = _variants(plain, adapter, methods, r, tuple(pixels.shape[1:]))
    models, names = [variant.standalone() for variant in variants], list(runtimes or _USUAL)
    with _bar(end) as show:
        kind, losses = _losses(models, pixels, features, show)
        found = zip(variants, losses, strict=True)
        facts = [{"method": v.method, "r": v.shown_r or 0, "ratio": v.plan.ratio, **loss} for v, loss in found]
        most = _MOST_LOSS[kind] if max_loss is None else max_loss
        picked, rows = pick(facts, most), [{"runtime": names[0], **row, "batches": []} for row in facts]
        report(_advice(rows, picked, most, {}, finished=False))
        everything: Sequence[int] = range(len(models))
        chosen = everything if r else [0, facts.index(picked or least(facts))]
        numbers = {name: everything if name == names[0] else chosen for name in names}
        runs, left_out = _runs(models, numbers, pixels.shape[1:], not runtimes, compile_mode, show)
        rows = [{"runtime": runtime, **facts[i], "batches": []} for runtime, i in runs]
        with room_for_graphs(len(rows) * (1 + len(batch_sizes))):
            for _ in _time(rows, list(runs.values()), pixels, batch_sizes, rounds, end, show):
                report(_advice(rows, picked, most, left_out, finished=False))
    return _advice(rows, picked, most, left_out, finished=True)


def _check_lists(methods: Any, runtimes: Any, r: Any, batch_sizes: Any) -> None:
    """Raise ValueError that names the first of these arguments of `advise` that is invalid."""
    for name, counts, least_many in (("r", r, 0), ("batch_sizes", batch_sizes, 1)):
        if not _are_counts(counts) or len(counts) < least_many:
            expected = "a list of whole numbers, each 1 or more; the unmerged model is always measured"
            raise BadValue(name, counts, expected)
    for name, named, known in (("methods", methods, METHODS), ("runtimes", runtimes, RUNTIMES)):
        if not set(named) <= set(known):
            raise BadValue(name, list(named), f"some of {', '.join(known)}")


def _are_counts(values: Any) -> bool:
    whole = isinstance(values, Sequence) and all(isinstance(each, Integral) for each in values)
    return whole and min(values, default=1) >= 1


def _variants(
    plain: Any, adapter: Any, methods: Sequence[str], r: Sequence[int], shape: tuple[int, ...]
) -> list[Variant]:
    """The rows for images of [C, H, W]: the unmerged model, then every method at every r."""
    if adapter is not None and not isinstance(adapter, MergeAdapter):
        adapter = MergeAdapter.from_reference(adapter)
    adapters = {} if adapter is None else {"adapter": adapter}
    wanted = list(methods) or list(dict.fromkeys(["tome", *(given.config.method for given in adapters.values())]))
    return make_variants(plain, wanted, list(r) or handful(plain, shape), [], adapters, (shape[-2], shape[-1]))


def _advice(rows: list[Row], picked: Row | None, max_loss: float, left_out: dict[str, str], finished: bool) -> Advice:
    verdicts = [] if picked is None else [judge(rows, picked, i) for i in range(len(rows[0]["batches"]))]
    taken = picked or {"method": None, "r": None}
    said = sentence(rows, picked, verdicts, max_loss)
    return Advice(said, taken["method"], taken["r"], max_loss, verdicts, left_out, rows, finished)


def handful(model: Any, shape: tuple[int, ...]) -> list[int]:
    """A few r for a plain model and images of [C, H, W], one for each of the shares of multiply-adds `_SHARES`."""
    merged, found = attach(share_weights(model), ToMeConfig(r=0)), [0]

    def ratio(r: int) -> float:
        merged.set_reduction(r)
        return merged.merge_plan(shape[-2:]).ratio

    most = merged.merge_plan(shape[-2:]).num_tokens // 2 + 1  # above what a layer can merge
    with warnings.catch_warnings():  # no warnings for an r that is too large for images of the model's own size
        warnings.simplefilter("ignore")
        for share in _SHARES:
            found += [next((r for r in range(found[-1] + 1, most) if ratio(r) <= share), most)]
    return [r for r in found[1:] if r < most] or [1]


@contextmanager
def _bar(end: float) -> Iterator[Callable[[str], None]]:
    """A progress bar of the time until `end`, after which no round starts; yields a function to show an activity."""
    began = time.monotonic()
    with tqdm(total=end - began, desc="advise", bar_format="{desc}: {percentage:3.0f}%|{bar:20}|{postfix}") as bar:

        def show(doing: str) -> None:
            left = max(0.0, end - time.monotonic())
            bar.n = bar.total - left
            bar.set_postfix_str(f"{doing} (time limit in {int(left) // 60}:{int(left) % 60:02d})")

        yield show
        bar.n = bar.total
        bar.set_postfix_str("done")


@torch.inference_mode()
def _losses(
    models: Sequence[Any], pixels: Tensor, features: str, show: Callable[[str], None]
) -> tuple[str, list[dict[str, Any]]]:
    """Compare every model's outputs with the first model's: returns "logits" or "features", and a dict per model."""
    lost: list[list[Tensor]] = [[] for _ in models]
    divergences: list[list[Tensor]] = [[] for _ in models]
    batches = pixels.split(_BATCH)
    for number, batch in enumerate(batches, 1):
        show(f"compare outputs, batch {number} of {len(batches)}")
        kind, reference = output_of(models[0], batch, features)
        for i, model in enumerate(models):
            output = output_of(model, batch, features)[1] if i else reference
            if kind == "logits":
                lost[i].append((output.argmax(-1) != reference.argmax(-1)).double())
                divergences[i].append(kl_to(reference, output).double())
            else:
                lost[i].append(feature_distance(reference, output, "cosine").double())
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
    shape: tuple[int, ...],
    may_lack: bool,
    compile_mode: str,
    show: Callable[[str], None],
) -> tuple[dict[tuple[str, int], Run], dict[str, str]]:
    """The wanted models in every runtime, by runtime and number, and the reasons for runtimes that were left out.

    A runtime may be left out only if `may_lack`; otherwise its error is raised.
    """
    runs: dict[tuple[str, int], Run] = {}
    left_out: dict[str, str] = {}
    for runtime, numbers in wanted.items():
        made: dict[tuple[str, int], Run] = {}
        try:
            for i in numbers:
                show(f"prepare {runtime}, model {len(made) + 1} of {len(numbers)}")
                made[runtime, i] = make_run(runtime, models[i], shape, compile_mode)
            runs |= made
        except (ImportError, RuntimeError, ValueError) as error:
            if not may_lack:
                raise
            left_out[runtime] = " ".join(str(error).split())
    return runs, left_out


@torch.inference_mode()
def _time(
    rows: Sequence[Row],
    runs: Sequence[Run],
    pixels: Tensor,
    batch_sizes: Sequence[int],
    rounds: int,
    end: float,
    show: Callable[[str], None],
) -> Iterator[None]:
    """Fill the rows' `batches` anew after every round; the batch sizes share the time until `end`.

    `speedup` is over the unmerged model in the row's runtime, `over_first` over the unmerged model in the first one.
    """
    plain = [i for i, row in enumerate(rows) if not row["r"]]
    own = [max(start for start in plain if start <= i) for i in range(len(rows))]
    for place, size in enumerate(batch_sizes):
        began = time.monotonic()
        until = began + max(0.0, end - began) / (len(batch_sizes) - place)
        batch = pixels[torch.arange(size, device=pixels.device) % len(pixels)]
        known: set[int] = set()
        found: list[np.ndarray] = []
        calls = [partial(run, batch) for run in runs]
        for number, one in enumerate(timed_rounds(calls, pixels.device, batch_size=size, skipped=known)):
            show(f"batches of {size}, round {number + 1}")
            if number == 0:  # a warm-up round
                warm = time.monotonic()
                continue
            found.append(one)
            _add_cells(rows, place, np.stack(found), size, plain, own)
            yield
            known |= {i for i in range(len(rows)) if i not in plain and _is_narrow(np.stack(found), own[i], i)}
            next_end = time.monotonic() + (time.monotonic() - warm) / len(found)
            is_late = len(found) >= _LEAST_ROUNDS and next_end > until
            if len(found) >= rounds or is_late or len(known) + len(plain) == len(rows):
                break


def _add_cells(
    rows: Sequence[Row], place: int, seconds: np.ndarray, size: int, plain: Sequence[int], own: Sequence[int]
) -> None:
    """Write the figures of the rounds so far into the rows' `batches`."""
    best = min(plain, key=lambda i: np.nanmedian(seconds[:, i]))
    over = {
        name: [cell["speedup"] for cell in speeds(seconds, size, [reference] * len(rows))]
        for name, reference in (("over_best_plain", best), ("over_first", 0))
    }
    for i, (row, cell) in enumerate(zip(rows, speeds(seconds, size, own), strict=True)):
        row["batches"][place:] = [{"batch_size": size, **cell, **{name: values[i] for name, values in over.items()}}]


def _is_narrow(seconds: np.ndarray, reference: int, i: int) -> bool:
    """Whether the interval of a run's speed-up is narrow enough: seconds [rounds, runs]."""
    ratios = seconds[:, reference] / seconds[:, i]
    ratios = ratios[~np.isnan(ratios)]
    spread = 1.96 * ratios.std(ddof=1) / len(ratios) ** 0.5 if len(ratios) >= _LEAST_ROUNDS else np.inf
    return bool(spread <= _NARROW * ratios.mean())
