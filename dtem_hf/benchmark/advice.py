"""Measure a model as it is and merged by several r, and say which r to take on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration import MatchingConfig, MergeConfig, ToMeConfig
from ..deploy.runtimes import RUNTIMES, Run, make_run
from ..errors import BadValue
from ..evaluation.metrics import bootstrap_interval
from ..evaluation.variants import make_variants
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.copies import share_weights
from ..models.distances import feature_distance, kl_to, output_of
from ..models.install import detach
from ..models.timing import time_interleaved
from ..models.vision import pixel_batches
from .efficiency import speeds
from .runtimes import room_for_graphs
from .verdict import judge, pick, sentence


# Those that merge r tokens per layer.
METHODS = [name for name, config in MergeConfig._methods.items() if issubclass(config, MatchingConfig)]
# Without r: the smallest ones that leave these shares of the multiply-adds.
_SHARES = (0.8, 0.65, 0.5, 0.4)
# What may be lost where nothing is said: of 1 - agreement, of 1 - cosine.
_MOST_LOSS = {"logits": 0.1, "features": 0.05}
_WARMUP = 2
# Compiling takes a minute for each row, and other forms of a runtime are for those who ask for them.
_USUAL = [name for name in RUNTIMES if name != "compile" and not name.startswith(tuple(f"{n}_" for n in RUNTIMES))]


@dataclass(frozen=True)
class Advice:
    """The sentence, what was picked (`method`, `r`, or None), a verdict per batch size, and the measured rows.

    A row's `loss`: the share of images whose class changes, or one minus the features' cosine. `left_out` says why.
    """

    sentence: str
    method: str | None
    r: int | None
    max_loss: float
    verdicts: list[dict[str, Any]]
    left_out: dict[str, str]
    rows: list[dict[str, Any]]

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
) -> Advice:
    """Measure a model as it is and merged by several r, on the device it lies on, and say which r to take.

    `images` are pixel values [n, C, H, W], or batches of them (tensors, or dicts with `pixel_values`); 100 will do.
    `methods` left out are ToMe and the adapter's; `r` left out are four that leave 0.8 to 0.4 of the multiply-adds;
    `runtimes` left out are those that can run here, without compiled models, which take a minute for each row.
    `max_loss` is the share of images whose class may change (left out: 0.1), or one minus the cosine of the `features`
    (auto, pooled, cls or patches) of a model without classes (0.05). The model is not changed. Raises ValueError for
    nonsense and for a runtime that was asked for and cannot run the model, ImportError where its packages are absent.
    """
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
    compared, steps = len(models) * len(batches), len(models) * (1 + len(batch_sizes) * (rounds + _WARMUP))
    with tqdm(total=compared + steps * len(runtimes or _USUAL), desc="advise", unit="step") as progress:
        kind, losses = _losses(models, [batch.to(device) for batch in batches], features, progress)
        runs, left_out = _runs(models, shape, runtimes, compile_mode, progress)
        progress.total = compared + steps * len(runs)
        found = zip(variants, shares, losses, strict=True)
        facts = [{"method": v.method, "r": v.shown_r or 0, "ratio": share, **loss} for v, share, loss in found]
        rows = [{"runtime": runtime, **row, "batches": []} for runtime in runs for row in facts]
        with room_for_graphs(len(rows) * (1 + len(batch_sizes))):
            _time(rows, list(chain(*runs.values())), torch.cat(batches).to(device), batch_sizes, rounds, progress)
    most = _MOST_LOSS[kind] if max_loss is None else max_loss
    picked = pick(rows, most)
    verdicts = [] if picked is None else [judge(rows, picked, place) for place in range(len(batch_sizes))]
    taken = picked or {"method": None, "r": None}
    return Advice(sentence(rows, picked, verdicts, most), taken["method"], taken["r"], most, verdicts, left_out, rows)


def handful(model: Any, shape: tuple[int, ...]) -> list[int]:
    """A few r for a plain model and images of [C, H, W]: the smallest that leave 0.8, 0.65, 0.5, 0.4 of its cost."""
    merged, found = attach(share_weights(model), ToMeConfig(r=0)), [0]

    def ratio(r: int) -> float:
        merged.set_reduction(r)
        return merged.merge_plan(shape[-2:]).ratio

    most = merged.merge_plan(shape[-2:]).num_tokens
    for share in _SHARES:
        found += [next((r for r in range(found[-1] + 1, most) if ratio(r) <= share), most)]
    return [r for r in found[1:] if r < most] or [1]


@torch.inference_mode()
def _losses(
    models: Sequence[Any], batches: Sequence[Tensor], features: str, progress: Any
) -> tuple[str, list[dict[str, Any]]]:
    """Whether logits or features are compared, and how far every model's are from the first one's."""
    progress.set_postfix_str("losses")
    lost: list[list[Tensor]] = [[] for _ in models]
    divergences: list[list[Tensor]] = [[] for _ in models]
    for batch in batches:
        kind, reference = output_of(models[0], batch, features)
        for i, model in enumerate(models):
            output = output_of(model, batch, features)[1] if i else reference
            if kind == "logits":
                lost[i].append((output.argmax(-1) != reference.argmax(-1)).double())
                divergences[i].append(kl_to(reference, output).double())
            else:
                lost[i].append(feature_distance(reference, output, "cosine").double())
            progress.update()
    rows = []
    for values, divergence in zip(map(torch.cat, lost), divergences, strict=True):
        loss, interval = values.mean().item(), bootstrap_interval(values.cpu().numpy())
        kept = {"agreement": None, "kl": None, "cosine": 1 - loss}
        if divergence:
            kept = {"agreement": 100 * (1 - loss), "kl": torch.cat(divergence).mean().item(), "cosine": None}
        rows.append({"loss": loss, "loss_interval": interval, **kept})
    return kind, rows


def _runs(
    models: Sequence[Any], shape: Any, runtimes: Sequence[str], compile_mode: str, progress: Any
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Every model in every runtime, and why others were left out; a runtime that was asked for must run."""
    runs: dict[str, list[Run]] = {}
    left_out: dict[str, str] = {}
    for runtime in runtimes or _USUAL:
        progress.set_postfix_str(f"prepare {runtime}")
        made: list[Run] = []
        try:
            for model in models:
                made.append(make_run(runtime, model, shape, compile_mode))
                progress.update()
            runs[runtime] = made
        except (ImportError, RuntimeError, ValueError) as error:
            if runtimes:
                raise
            left_out[runtime] = " ".join(str(error).split())
    return runs, left_out


@torch.inference_mode()
def _time(
    rows: Sequence[Any], runs: Sequence[Run], pixels: Tensor, batch_sizes: Sequence[int], rounds: int, progress: Any
) -> None:
    """Fill the rows' `batches`; `speedup` is over the unmerged model in its runtime, `over_first` in the first one."""
    plain = [i for i, row in enumerate(rows) if not row["r"]]
    own = [max(start for start in plain if start <= i) for i in range(len(rows))]
    for size in batch_sizes:
        progress.set_postfix_str(f"batches of {size}")
        batch = pixels[torch.arange(size, device=pixels.device) % len(pixels)]
        calls = [partial(run, batch) for run in runs]
        seconds = time_interleaved(calls, pixels.device, rounds, _WARMUP, progress.update, batch_size=size)
        best = min(plain, key=lambda i: np.median(seconds[:, i]))
        over = {
            name: [cell["speedup"] for cell in speeds(seconds, size, [reference] * len(rows))]
            for name, reference in (("over_best_plain", best), ("over_first", 0))
        }
        for i, (row, cell) in enumerate(zip(rows, speeds(seconds, size, own), strict=True)):
            row["batches"].append({"batch_size": size, **cell, **{name: values[i] for name, values in over.items()}})
