"""What merging saves on this machine: multiply-adds, images per second and memory, at several batch sizes.

python recipes/benchmark.py --model facebook/deit-small-patch16-224 --methods tome --r 8 16 --batch_sizes 1 16 64
python recipes/benchmark.py --model path/to/config --random_weights True --rounds 5    # a laptop's CPU
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..adapter import MergeAdapter
from ..arguments import option, parse_arguments, parse_reduction
from ..auto import auto_class
from ..backbones import find_backbone
from ..card import reduction_label
from ..conditions import command, hardware, versions
from ..errors import BadValue
from ..files import write_json
from ..vision import run_on_pixels
from .classification import describe_model, evaluation_device
from .efficiency import break_even, count_multiply_adds, count_parameters, peak_memory, speeds, time_interleaved
from .variants import Variant, make_variants, method_names


@dataclass(kw_only=True)
class BenchmarkArguments:
    """Measure what merging saves; the images are noise, as their content does not change the cost."""

    model: str = option("model: Hub id or local folder; of one that also reads text, the part that sees images")
    methods: list[str] = option(f"some of {', '.join(method_names())}", default_factory=lambda: ["none", "dtem"])
    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["8", "16"])
    flops: list[float] = option("shares of the multiply-adds to reach, one row each", default_factory=list)
    adapter: str | None = option("adapter for dtem: Hub id or local folder", default=None)
    random_weights: bool = option("read the model's config alone, which is enough to time it", default=False)
    batch_sizes: list[int] = option("images per batch, one column each", default_factory=lambda: [1, 16, 64])
    image_size: int | None = option("pixels in height and width; left out, the model's own", default=None)
    rounds: int = option("timed rounds, in each of which every row runs once", default=20)
    warmup: int = option("rounds before those", default=3)
    device: str = option("where to run; auto takes an accelerator if there is one", default="auto")
    dtype: str = option("float32, bfloat16 or float16", default="float32")
    output_dir: str = option("folder for benchmark.json", default="runs/benchmark")

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise BadValue("batch_sizes", self.batch_sizes, "numbers of images, each 1 or more")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BadValue("dtype", self.dtype, "float32, bfloat16 or float16")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the table, write JSON."""
    arguments = parse_arguments(BenchmarkArguments, argv, __doc__ or "")
    result = benchmark(arguments)
    path = Path(arguments.output_dir) / "benchmark.json"
    write_json(path, result)
    print_benchmark(result)
    print(f"written: {path}")


def benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    """Measure every row at every batch size. Returns what is written to `benchmark.json`."""
    device = evaluation_device(arguments.device)
    model = _load(arguments).to(device=device, dtype=getattr(torch, arguments.dtype)).eval()
    adapters = {}
    if arguments.adapter is not None:
        adapters[arguments.adapter] = MergeAdapter.from_reference(arguments.adapter)
    reductions = [parse_reduction(text) for text in arguments.r]
    variants = make_variants(model, arguments.methods, reductions, arguments.flops, adapters)
    config = find_backbone(model)[1].config
    size = arguments.image_size or config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config.num_channels, height, width)
    return {
        "command": command(),
        "model": describe_model(arguments.model, model),
        "random_weights": arguments.random_weights,
        "adapter": arguments.adapter,
        "image_size": [height, width],
        "rounds": arguments.rounds,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "dtype": arguments.dtype,
        "versions": versions(),
        "rows": measure_costs(variants, shape, arguments.batch_sizes, device, arguments.rounds, arguments.warmup),
    }


@torch.inference_mode()
def measure_costs(
    variants: Sequence[Variant],
    shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    device: torch.device,
    rounds: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Costs of every row on noise of [C, H, W], the first row being the one that speed-ups refer to."""

    rows: list[dict[str, Any]] = []
    models = [variant.standalone() for variant in variants]
    one = torch.randn(1, *shape, device=device)
    for variant, model in zip(variants, models, strict=True):
        counted = count_multiply_adds(partial(run_on_pixels, model, one))
        rows.append(
            {
                "method": variant.method,
                "r": variant.shown_r,
                **({} if variant.adapter is None else {"adapter": variant.adapter}),
                "parameters": count_parameters(model),
                "multiply_adds": counted,
                "ratio": counted / (rows[0]["multiply_adds"] if rows else counted),
                "ideal_speedup": (rows[0]["multiply_adds"] if rows else counted) / counted,
                "batches": [],
            }
        )
    for batch_size in batch_sizes:
        pixels = torch.randn(batch_size, *shape, device=device)
        runs = [partial(run_on_pixels, model, pixels) for model in models]
        seconds = time_interleaved(runs, device, rounds, warmup)
        for row, timing, run in zip(rows, speeds(seconds, batch_size), runs, strict=True):
            row["batches"].append({"batch_size": batch_size, **timing, "peak_memory": peak_memory(run, device)})
    for row in rows:
        measured = {batch["batch_size"]: batch["speedup"]["median"] for batch in row["batches"]}
        row["break_even_batch_size"] = break_even(measured) if row is not rows[0] else None
    return rows


def print_benchmark(result: dict[str, Any]) -> None:
    """Show a benchmark in the terminal: a line per row, speed and speed-up under every batch size."""
    sizes = [batch["batch_size"] for batch in result["rows"][0]["batches"]]
    table = Table(title=f"{result['model']['name']} on {result['hardware']}, images/s (quartiles), speed-up, memory")
    for column in ("method", "r", "M mult-adds", "ideal", *(f"batch {size}" for size in sizes), "break-even"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["rows"]:
        cells = [row["method"], "" if row["r"] is None else reduction_label(row["r"])]
        cells += [f"{row['multiply_adds'] / 1e6:.1f}", f"{row['ideal_speedup']:.2f}×"]
        for batch in row["batches"]:
            speed, memory = batch["images_per_second"], batch["peak_memory"]
            shown = f"{speed['median']:.1f} ({speed['q25']:.1f}–{speed['q75']:.1f})"
            shown += f"\n{batch['speedup']['median']:.2f}×"
            cells.append(shown if memory is None else f"{shown}, {memory / 2**20:.0f} MiB")
        table.add_row(*cells, str(row["break_even_batch_size"] or "–"))
    Console(width=140).print(table)


def _load(arguments: BenchmarkArguments) -> Any:
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
    kind = auto_class(config)
    if arguments.random_weights:
        return kind.from_config(config, merge=None)
    return kind.from_pretrained(arguments.model, merge=None)
