"""The rows of a benchmark: make the runs in every runtime, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..costs import MergePlan
from ..deploy.graph import ImageGraph
from ..deploy.runtimes import Run, is_exported, make_run
from ..errors import BadValue
from ..evaluation.captions_generation import count_generation
from ..evaluation.variants import Variant
from ..models.copies import share_weights
from ..models.processor import Reading, count_dropped_tokens
from ..models.timing import time_interleaved
from ..models.vision import run_on_pixels
from ..programs.functions import load_function
from ..progress import tqdm
from ..schedule import as_schedule
from .breakdown import break_down, merging_alone
from .efficiency import break_even, count_multiply_adds, peak_memory, speeds, spread


@dataclass
class Entry:
    """One row: `run` takes pixels [B, C, H, W], and `reference` is the index of the row to compare it with.

    `model` is None for a peer; `multiply_adds` is per image, None if it cannot be counted. `begin` runs until the
    first token of an answer. `tokens_read` says which tokens the language model reads, "all" or "merged".
    """

    runtime: str
    method: str
    r: Any
    run: Callable[[Tensor], Any]
    reference: int
    multiply_adds: int | None
    model: Any = None
    plan: MergePlan | None = None
    adapter: str | None = None
    begin: Callable[[Tensor], Any] | None = None
    tokens_read: str | None = None


def image_entries(model: Any, variants: Sequence[Variant], shape: tuple[int, ...], arguments: Any) -> list[Entry]:
    """Make a row for every variant in every runtime, then for every peer at every r; the first variant is unmerged.

    A peer is compared with the unmerged model in the peer's runtime, or else in eager. `arguments` are the program's.
    """
    like = next(model.parameters())
    one = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    models = [variant.standalone() for variant in variants]
    counts = [count_multiply_adds(partial(run_on_pixels, merged, one)) for merged in models]
    peers = [(name, r) for name in arguments.peer for r in arguments.reductions()]
    total = len(arguments.runtimes) * len(variants) + len(arguments.peer_runtimes) * len(peers)
    entries: list[Entry] = []
    with tqdm(total=total, desc="prepare", unit="row", leave=False) as progress:
        for runtime in arguments.runtimes:
            reference = len(entries)
            for variant, merged, count in zip(variants, models, counts, strict=True):
                progress.set_postfix_str(f"{runtime} {variant.label}")
                run = make_run(runtime, merged, shape, arguments.compile_mode)
                entries.append(_entry(runtime, variant, merged, run, reference, count, shape))
                progress.update()
        plain = {entry.runtime: entry.reference for entry in entries}
        for name, r in peers:
            progress.set_postfix_str(name)
            shared = share_weights(model)
            run = peer_run(name, shared, r)
            # The counter sees only torch; a count of 0 means unknown.
            counted = count_multiply_adds(partial(run, one)) or None
            for runtime in arguments.peer_runtimes:
                reference = plain.get(runtime, plain.get("eager", 0))
                own = run
                if runtime != "eager":
                    own = make_run(runtime, PeerGraph(shared, run), shape, arguments.compile_mode)
                row = "peer" if runtime == "eager" else runtime
                entries.append(Entry(row, name, as_schedule(r).to_json(), own, reference, counted))
                progress.update()
    return entries


def peer_run(name: str, model: nn.Module, r: Any) -> Run:
    """Call a peer, `module:function`, with a plain model and an r; it returns a callable of pixels [B, C, H, W].

    The model is in eval mode, on the benchmark's device and in its dtype. Raises ValueError if the result is not
    callable.
    """
    run = load_function("peer", name)(model, r)
    if not callable(run):
        raise BadValue("peer", name, f"a function that returns a callable, not {type(run).__name__}")
    return run


class PeerGraph(ImageGraph):
    """A peer's callable as a module that can be exported; `model` is the model that the peer was called with."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__(model)
        self._run = run

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self._run(pixel_values),)


def captioning_entries(variants: Sequence[Variant], shape: tuple[int, ...], length: int) -> list[Entry]:
    """Make a row for every variant that writes greedy captions of exactly `length` tokens."""
    if not hasattr(variants[0].model, "generate"):
        raise BadValue("task", "captioning", f"a model that writes text, not a {type(variants[0].model).__name__}")
    settings = {"max_new_tokens": length, "min_new_tokens": length, "num_beams": 1, "do_sample": False}
    like = next(variants[0].model.parameters())
    one = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    entries = []
    for variant in tqdm(variants, desc="count", unit="row", leave=False):
        merged = variant.standalone()
        count = sum(count_generation(variant, one, settings).values())

        def run(pixels: Tensor, model: Any = merged) -> Tensor:
            return model.generate(pixel_values=pixels, **settings)

        entries.append(_entry("eager", variant, merged, run, 0, count, shape))
    return entries


def answering_entries(
    variants: Sequence[Variant], merged: Sequence[Variant], shape: tuple[int, ...], prompt: int, length: int
) -> list[Entry]:
    """Make a row for every variant that writes greedy answers of exactly `length` tokens.

    A prompt is an image and a text of `prompt` tokens. For the variants in `merged`, the language model reads merged
    tokens, and the prompt has fewer image tokens.
    """
    plain = variants[0].model
    like, num_plain = next(plain.parameters()), variants[0].plan.num_tokens - count_dropped_tokens(plain)
    image, vocabulary = plain.config.image_token_id, plain.config.get_text_config().vocab_size
    text = torch.randint(vocabulary - 1, (prompt,), device=like.device)
    text += text >= image  # any token but the placeholder
    one = torch.randn(1, *shape, device=like.device, dtype=like.dtype)
    entries = []
    for variant in tqdm([*variants, *merged], desc="count", unit="row", leave=False):
        model = variant.standalone()
        number = Reading(model).count(num_plain)
        row = torch.cat([text.new_full((number,), image), text])

        def answer(pixels: Tensor, tokens: int = length, model: Any = model, row: Tensor = row) -> Tensor:
            ids = row.expand(len(pixels), -1)
            settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": 1, "do_sample": False}
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            return model.generate(**inputs, **settings)

        count = count_multiply_adds(partial(answer, one))
        entry = _entry("eager", variant, model, answer, 0, count, shape)
        read = "all" if number == num_plain else "merged"
        entries.append(replace(entry, begin=partial(answer, tokens=1), tokens_read=read))
    return entries


def _entry(runtime: str, variant: Variant, model: Any, run: Any, reference: int, count: int, shape: Any) -> Entry:
    plan = model.merge_plan(tuple(shape[1:])) if hasattr(model, "merge_plan") else None
    return Entry(runtime, variant.method, variant.shown_r, run, reference, count, model, plan, variant.adapter)


@contextmanager
def room_for_graphs(count: int) -> Iterator[None]:
    """Let torch.compile keep `count` graphs of the same code, and as many for batches of one image."""
    with torch._dynamo.config.patch(
        recompile_limit=max(2 * count, torch._dynamo.config.recompile_limit),
        accumulated_recompile_limit=max(2 * count, torch._dynamo.config.accumulated_recompile_limit),
    ):
        yield


@torch.inference_mode()
def measure_entries(
    entries: Sequence[Entry], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, arguments: Any
) -> list[dict[str, Any]]:
    """Measure every row on noise of [C, H, W] at every batch size; all rows run in turn within each round.

    `dtype` is the dtype of the pixels, except for exported graphs, which take float32. `arguments` are the program's.
    """
    rounds, warmup, breakdown = arguments.rounds, arguments.warmup, arguments.breakdown
    rows = [_facts(entry, entries[entry.reference]) for entry in entries]
    runs_each = len(entries) + sum(entry.begin is not None for entry in entries)
    total = len(arguments.batch_sizes) * runs_each * (rounds + warmup)
    with tqdm(total=total, desc="benchmark", unit="run") as progress:
        for batch_size in arguments.batch_sizes:
            progress.set_postfix_str(f"batch {batch_size}")
            pixels = torch.randn(batch_size, *shape, device=device)
            runs = [
                partial(_run, entry, pixels if is_exported(entry.runtime) else pixels.to(dtype)) for entry in entries
            ]
            begins = [partial(entry.begin, pixels.to(dtype)) for entry in entries if entry.begin is not None]
            both = time_interleaved([*runs, *begins], device, rounds, warmup, progress.update)
            seconds, prefill = both[:, : len(runs)], both[:, len(runs) :]
            timings = speeds(seconds, batch_size, [entry.reference for entry in entries])
            for i, (row, timing, entry, run) in enumerate(zip(rows, timings, entries, runs, strict=True)):
                ideal = row["ideal_speedup"]
                cell = {
                    "batch_size": batch_size,
                    **timing,
                    "of_ideal": None if ideal is None else timing["speedup"]["median"] / ideal,
                    "peak_memory": peak_memory(run, device) if entry.runtime in ("eager", "compile") else None,
                }
                if entry.begin is not None:  # if one entry has it, all have it
                    cell["prefill_seconds"] = spread(prefill[:, i])
                    cell["decoding_seconds"] = spread(seconds[:, i] - prefill[:, i])
                if breakdown and entry.runtime == "eager":
                    cell["breakdown"] = break_down(entry.model, run, device, max(3, rounds // 2), 1)
                elif breakdown and entry.runtime == "compile":
                    alone = entry.plan and merging_alone(entry.model, entry.plan, batch_size, arguments.compile_mode)
                    cell["merging"] = None
                    if alone:  # matching and merging, compiled and timed separately
                        median = float(np.median(time_interleaved([alone], device, rounds, warmup)))
                        cell["merging"] = {"seconds": median, "share": median / float(np.median(seconds[:, i]))}
                row["batches"].append(cell)
    for row, entry in zip(rows, entries, strict=True):
        measured = {batch["batch_size"]: batch["speedup"]["median"] for batch in row["batches"]}
        row["break_even_batch_size"] = None if entry is entries[entry.reference] else break_even(measured)
    return rows


def _run(entry: Entry, pixels: Tensor) -> Any:
    try:
        return entry.run(pixels)
    except Exception as error:
        error.add_note(f"while {entry.runtime} {entry.method} r={entry.r} ran on a batch of {len(pixels)}")
        raise


def _facts(entry: Entry, reference: Entry) -> dict[str, Any]:
    count, plain = entry.multiply_adds, reference.multiply_adds
    ratio = count / plain if count is not None and plain is not None else None
    return {
        "runtime": entry.runtime,
        "method": entry.method,
        "r": entry.r,
        **({} if entry.tokens_read is None else {"tokens_read": entry.tokens_read}),
        **({} if entry.adapter is None else {"adapter": entry.adapter}),
        "parameters": None if entry.model is None else entry.model.num_parameters(),
        "multiply_adds": count,
        "ratio": ratio,
        "ideal_speedup": None if ratio is None else 1 / ratio,
        **({} if entry.plan is None else {"output_tokens": entry.plan.output_tokens}),
        "batches": [],
    }
