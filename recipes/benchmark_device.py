"""Run all measurements on an accelerator in one call: DeiT-S to DINOv2-L at batch 1, 32 and 256 in bfloat16.

python recipes/benchmark_device.py --output_dir runs/device
python recipes/benchmark_device.py --models deit-small --runtimes reduce-overhead --batch_sizes 32 --minutes 4
python recipes/benchmark_device.py --tiny True --device cpu --dtype float32    # a tiny model, on a laptop

It times plain and merged models with random weights, eager and compiled, with each attention implementation. It
measures the share of a pass that matching and merging take. It finds out whether attention is faster with the sizes as
a mask or as extra features of the keys. On CUDA it compares the Triton kernels with tensor operations: difference and
time.

Every measurement has a folder; device.json is written again after each. Eager models run first, because compiling a
model takes a minute or more. No measurement starts after --minutes; those left out are listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers import CLIPVisionConfig, Dinov2Config, ViTConfig

from dtem_hf import ops
from dtem_hf.benchmark.program import BenchmarkArguments, benchmark
from dtem_hf.benchmark.tables import markdown, print_benchmark
from dtem_hf.deploy.runtimes import COMPILE_MODES
from dtem_hf.files import write_json, write_text
from dtem_hf.models.timing import time_interleaved
from dtem_hf.ops import kernels
from dtem_hf.programs.arguments import DTYPES, at_least, one_of, option, parse_arguments, run_script
from dtem_hf.programs.conditions import conditions
from dtem_hf.programs.lock import only_run_in
from dtem_hf.programs.processes import choose_device


_CLASSIFIER: dict[str, Any] = {"architectures": ["ViTForImageClassification"]}
_LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
# The models, each with the r that halves its multiply-adds.
SHAPES: dict[str, tuple[Any, int]] = {
    "deit-small": (ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **_CLASSIFIER), 16),
    "vit-large": (ViTConfig(**_LARGE, intermediate_size=4096, **_CLASSIFIER), 8),
    "clip-large": (
        CLIPVisionConfig(**_LARGE, intermediate_size=4096, patch_size=14, architectures=["CLIPVisionModel"]),
        10,
    ),
    "dinov2-large-518": (Dinov2Config(**_LARGE, image_size=518, patch_size=14, architectures=["Dinov2Model"]), 50),
}
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,  # a compiler takes as long as there are layers
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
_TINY_SHAPES: dict[str, tuple[Any, int]] = {"tiny": (ViTConfig(**_TINY, intermediate_size=128, **_CLASSIFIER), 8)}


@dataclass(kw_only=True)
class DeviceArguments:
    """Measure plain and merged models of the published sizes on an accelerator."""

    models: list[str] = option(f"some of {', '.join(SHAPES)}", default_factory=lambda: list(SHAPES))
    batch_sizes: list[int] = option("images per batch", default_factory=lambda: [1, 32, 256])
    runtimes: list[str] = option(
        f"some of eager, and modes of torch.compile: {', '.join(COMPILE_MODES)}",
        default_factory=lambda: ["eager", "reduce-overhead", "default"],
    )
    attentions: list[str] = option(
        "attn_implementation of the models; flash_attention_2 needs its package, or the kernels package and the Hub",
        default_factory=lambda: ["sdpa", "flex_attention"],
    )
    minutes: float = option("start no measurement after this many", default=9.0)
    dtype: str = option(", ".join(DTYPES), default="bfloat16")
    rounds: int = option("timed rounds", default=30)
    device: str = option("where to run", default="cuda")
    tiny: bool = option("a tiny model with two images in one round, to test the program", default=False)
    output_dir: str = option("folder for device.json and one folder per measurement", default="runs/device")

    def __post_init__(self) -> None:
        one_of(self, "models", SHAPES)
        one_of(self, "runtimes", ("eager", *COMPILE_MODES))
        at_least(self, 0, "minutes")
        at_least(self, 1, "rounds")
        if self.tiny:
            self.batch_sizes, self.runtimes, self.attentions, self.rounds = [2], ["eager", "default"], ["sdpa"], 1


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the result of every model and mode, and a summary."""
    arguments = parse_arguments(DeviceArguments, argv, __doc__ or "")
    device = choose_device(arguments.device)
    shapes = _TINY_SHAPES if arguments.tiny else {name: SHAPES[name] for name in arguments.models}
    started = time.monotonic()
    with only_run_in(arguments.output_dir) as folder:
        summary: dict[str, Any] = {**conditions(device), "rows": [], "left_out": []}

        def note(name: str, found: Any) -> None:
            summary[name] = found
            write_json(folder / "device.json", summary)

        note("kernels", [compare_kernels(device, batch_size) for batch_size in arguments.batch_sizes])
        forms = product(shapes.items(), arguments.batch_sizes)
        note(
            "attention",
            [
                {"model": name, **compare_bias_forms(batch_size, config, device, arguments.dtype, arguments.rounds)}
                for (name, (config, _)), batch_size in forms
            ],
        )
        for runtime, attention, batch_size, name in product(
            arguments.runtimes, arguments.attentions, reversed(arguments.batch_sizes), shapes
        ):
            label = f"{name}-{runtime}-{attention}-{batch_size}"
            if time.monotonic() - started > 60 * arguments.minutes:
                note("left_out", [*summary["left_out"], label])
                continue
            config, r = shapes[name]
            path = folder / "configs" / name
            config.save_pretrained(path)
            torch._dynamo.reset()  # a second batch size would be compiled for all sizes, which takes twice as long
            begun = time.monotonic()
            result = benchmark(_benchmark_arguments(arguments, path, r, runtime, attention, batch_size))
            write_json(folder / label / "benchmark.json", result)
            write_text(folder / label / "benchmark.md", markdown(result))
            print_benchmark(result)
            note("rows", summary["rows"] + summarize(result, name, runtime, time.monotonic() - begun))
        for label in summary["left_out"]:
            print(f"left out, as --minutes {arguments.minutes:g} had passed: {label}")
        print(f"written: {folder / 'device.json'}, and a folder for each model, runtime, attention and batch size")


def _benchmark_arguments(
    arguments: DeviceArguments, path: Path, r: int, runtime: str, attention: str, batch_size: int
) -> BenchmarkArguments:
    is_eager = runtime == "eager"
    return BenchmarkArguments(
        model=str(path),
        random_weights=True,
        methods=["none", "tome"],
        r=[str(r)],
        runtimes=["eager" if is_eager else "compile"],
        compile_mode="default" if is_eager else runtime,
        attention=attention,
        breakdown=True,
        batch_sizes=[batch_size],
        rounds=arguments.rounds,
        device=arguments.device,
        dtype=arguments.dtype,
    )


def summarize(result: dict[str, Any], model: str, runtime: str, seconds: float) -> list[dict[str, Any]]:
    """The merged rows of a benchmark: speed-up, its share of the ideal, and what the measurement took."""
    return [
        {
            "model": model,
            "runtime": runtime,
            "attention": result["attention"],
            "batch_size": batch["batch_size"],
            "images_per_second": batch["images_per_second"],
            "speedup": batch["speedup"]["median"],
            "ideal_speedup": row["ideal_speedup"],
            "of_ideal": batch["of_ideal"],
            "merging": batch["merging"] if runtime != "eager" else batch["breakdown"],
            "measured_in_seconds": round(seconds, 1),
        }
        for row in result["rows"]
        if row["method"] != "none"
        for batch in row["batches"]
    ]


@torch.inference_mode()
def compare_bias_forms(batch_size: int, config: Any, device: torch.device, dtype: str, rounds: int) -> dict[str, Any]:
    """Time fused attention without a size bias, with the bias as a mask, and with the bias in the keys.

    It uses half of the tokens of the config's model. Returns median seconds, the kernels that run, and the faster form
    of the bias.
    """
    heads, num_tokens = config.num_attention_heads, (config.image_size // config.patch_size) ** 2 // 2
    dim = config.hidden_size // heads
    states = batch_size, heads, num_tokens, dim
    query, key, value = (torch.randn(states, device=device).to(getattr(torch, dtype)) for _ in range(3))
    bias = ops.size_bias(torch.rand(batch_size, num_tokens, device=device) * 8 + 1, query.dtype)
    scaling = dim**-0.5

    def on_keys() -> Tensor:
        extended = ops.extend_keys(query, key, value, bias, scaling)
        return F.scaled_dot_product_attention(*extended, scale=scaling)[..., :dim]

    calls: dict[str, Callable[[], Tensor]] = {
        "none": partial(F.scaled_dot_product_attention, query, key, value, scale=scaling),
        "mask": partial(F.scaled_dot_product_attention, query, key, value, attn_mask=bias, scale=scaling),
        "extended_keys": on_keys,
    }
    medians = np.median(time_interleaved(list(calls.values()), device, rounds), axis=0).tolist()
    seconds = dict(zip(calls, medians, strict=True))
    extended = ops.extend_keys(query, key, value, bias, scaling)
    inputs = {"none": (query, key, value, None), "mask": (query, key, value, bias), "extended_keys": (*extended, None)}
    return {
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "kernels": {form: SDPBackend(torch._fused_sdp_choice(*given)).name for form, given in inputs.items()},
        "faster": min(("mask", "extended_keys"), key=seconds.__getitem__),
    }


@torch.inference_mode()
def compare_kernels(device: torch.device, batch_size: int, rounds: int = 30) -> dict[str, Any] | None:
    """Compare the Triton kernels with tensor operations on the same device, for each dtype; None without kernels.

    Returns whether matching and sizes are equal, the largest difference of merged tokens, and median seconds of both.
    """
    if device.type not in kernels.devices:
        return None
    found: dict[str, Any] = {"batch_size": batch_size}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        draw = torch.Generator().manual_seed(0)
        # With ±1 entries every score is exact, and there are many ties.
        metric = (torch.randint(0, 2, (batch_size, 197, 16), generator=draw) * 2.0 - 1).to(device, dtype)
        x = torch.randn(batch_size, 197, 384, generator=draw).to(device, dtype)

        def run() -> tuple[Any, Tensor, Tensor]:
            matching = ops.bipartite_soft_matching(metric, 16)  # noqa: B023 (run at once)
            return (matching, *ops.merge_tokens(x, None, matching))  # noqa: B023

        def plainly() -> tuple[Any, Tensor, Tensor]:
            with kernels.disabled():
                return run()

        (matching, merged, sizes), (expected, plain, plain_sizes) = run(), plainly()
        seconds = np.median(time_interleaved([run, plainly], device, rounds), axis=0).tolist()
        found[str(dtype).removeprefix("torch.")] = {
            "same_matching": all(torch.equal(a, b) for a, b in zip(matching[:3], expected[:3], strict=True)),
            "same_sizes": torch.equal(sizes, plain_sizes),
            "largest_difference": float((merged.float() - plain.float()).abs().max()),
            "seconds": dict(zip(("kernels", "plain"), seconds, strict=True)),
        }
    return found


if __name__ == "__main__":
    run_script(main)
