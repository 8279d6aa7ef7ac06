"""Measure what merging saves on this machine: multiply-adds, images per second and memory, at several batch sizes.

python recipes/benchmark.py --model facebook/deit-small-patch16-224 --methods tome --r 8 16 --batch_sizes 1 16 64
python recipes/benchmark.py --model path/to/config --random_weights True --rounds 5    # a laptop's CPU
python recipes/benchmark.py --model ... --runtimes eager compile onnxruntime openvino openvino_bfloat16
python recipes/benchmark.py --model ... --dtype bfloat16 --runtimes compile --compile_mode reduce-overhead    # CUDA
python recipes/benchmark.py --model ... --peer my_library:merged    # with your own function beside
python recipes/benchmark.py --task captioning --model microsoft/git-base --r 4 8 12 --batch_sizes 1 8
python recipes/benchmark.py --task answering --model llava-hf/llava-1.5-7b-hf --r 12 --dtype bfloat16 --batch_sizes 1 8

Every round runs every row once, so that other load on the machine affects all alike. A speed-up is the median of the
ratios within rounds to the unmerged model in the same runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..deploy.runtimes import COMPILE_MODES, RUNTIMES, check_runtime
from ..errors import BadValue
from ..evaluation.arguments import METHODS_HELP, RowArguments
from ..families.containers import container_of
from ..files import write_json, write_text
from ..models.auto import auto_class
from ..models.vision import image_shape
from ..programs.arguments import DTYPES, at_least, one_of, option, parse_arguments, read_config
from ..programs.functions import load_function
from ..programs.lock import only_run_in
from ..report.plots import plot_speedups
from .rows import Entry, answering_entries, captioning_entries, image_entries, measure_entries, room_for_graphs
from .tables import markdown, print_benchmark


@dataclass(kw_only=True)
class BenchmarkArguments(RowArguments):
    """Measure what merging saves. The images are noise, because their content does not change the cost."""

    model: str = option("model: Hub id or local folder; if it also reads text, the part that reads images")
    task: Literal["images", "captioning", "answering"] = option(
        "images: one pass over images; captioning: greedy captions of a fixed length; answering: greedy answers of a "
        "vision-language model to a prompt, first with all tokens for its language model, then with merged tokens",
        default="images",
    )
    methods: list[str] = option(METHODS_HELP, default_factory=lambda: ["none", "dtem"])
    r: list[str] = option("tokens merged per layer, one row each", default_factory=lambda: ["8", "16"])
    random_weights: bool = option("read only the model's config, which is enough to time it", default=False)
    runtimes: list[str] = option(
        f"some of {', '.join(RUNTIMES)}; every row is measured in each", default_factory=lambda: ["eager"]
    )
    compile_mode: str = option(
        f"mode of torch.compile: {', '.join(COMPILE_MODES)}; reduce-overhead uses CUDA graphs", default="default"
    )
    attention: str | None = option(
        "attn_implementation: sdpa, flash_attention_2, flex_attention, ...; left out, transformers chooses",
        default=None,
    )
    peer: list[str] = option(
        "module:function to measure in the same run: function(model, r) gets a plain model (in eval mode, on the "
        "device, in the dtype) and one r, and returns a callable that takes pixels [B, C, H, W]",
        default_factory=list,
    )
    peer_runtimes: list[str] = option(
        "runtimes to measure peers in; in others than eager, the peer's callable must be one graph of tensors",
        default_factory=lambda: ["eager"],
    )
    breakdown: bool = option("measure the time of the parts of merged rows", default=False)
    batch_sizes: list[int] = option("images per batch, one column each", default_factory=lambda: [1, 16, 64])
    image_size: int | None = option("pixels in height and width; left out, the model's own", default=None)
    caption_tokens: int = option("captioning: tokens per caption", default=20)
    prompt_tokens: int = option("answering: text tokens of the prompt", default=40)
    answer_tokens: int = option("answering: tokens per answer", default=20)
    rounds: int = option("timed rounds; each runs every row once", default=20)
    warmup: int = option("rounds before the timed ones", default=3)
    dtype: str = option(", ".join(DTYPES), default="float32")
    seed: int = option("seed of random weights and images", default=0)
    output_dir: str = option("folder for benchmark.json, benchmark.md and speedup.png", default="runs/benchmark")

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise BadValue("batch_sizes", self.batch_sizes, "numbers of images, each 1 or more")
        one_of(self, "dtype", DTYPES)
        one_of(self, "runtimes", RUNTIMES)
        one_of(self, "compile_mode", COMPILE_MODES)
        at_least(self, 1, "rounds", "caption_tokens", "prompt_tokens")
        at_least(self, 2, "answer_tokens")
        at_least(self, 0, "warmup")
        one_of(self, "peer_runtimes", RUNTIMES)
        check_runtime(self, *self.runtimes, *(self.peer_runtimes if self.peer else []))
        if self.task != "images" and (self.runtimes != ["eager"] or self.peer or self.breakdown):
            raise BadValue("task", self.task, "only the runtime eager, without peers and breakdown")
        if self.task == "answering" and self.image_size is not None:
            raise BadValue("image_size", self.image_size, "none: answering reads images of the model's own size")
        for name in self.peer:
            load_function("peer", name)


# The options for the lengths of a task's texts.
LENGTHS = {"captioning": ("caption_tokens",), "answering": ("prompt_tokens", "answer_tokens")}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the table, and write JSON, Markdown and a plot."""
    arguments = parse_arguments(BenchmarkArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as folder:
        result = benchmark(arguments)
        write_json(folder / "benchmark.json", result)
        write_text(folder / "benchmark.md", markdown(result))
        plot_speedups(result["rows"], folder / "speedup.png", result["model"]["name"])
        print_benchmark(result)
        print(f"written: {folder / 'benchmark.json'}, benchmark.md and speedup.png")


def benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    """Measure every row at every batch size, and return the content of `benchmark.json`."""
    device = arguments.choose_device()
    model = _load(arguments).to(device=device, dtype=getattr(torch, arguments.dtype)).eval()
    adapters = arguments.load_adapters()
    variants = arguments.make_variants(model, adapters, image_size=arguments.image_size)
    shape = image_shape(model, arguments.image_size)
    torch.manual_seed(arguments.seed)
    entries: list[Entry]
    if arguments.task == "captioning":
        entries = captioning_entries(variants, shape, arguments.caption_tokens)
    elif arguments.task == "answering":
        if not container_of(type(model)).counts_placeholders:
            raise BadValue("task", "answering", f"a model such as LLaVA or PaliGemma, not a {type(model).__name__}")
        merged = arguments.make_variants(model, adapters, unmerge=False)[1:]
        entries = answering_entries(variants, merged, shape, arguments.prompt_tokens, arguments.answer_tokens)
    else:
        entries = image_entries(model, variants, shape, arguments)
    with room_for_graphs(len(entries) * (1 + len(arguments.batch_sizes))):
        rows = measure_entries(entries, shape, device, model.dtype, arguments)
    return {
        **arguments.facts(model, device),
        "random_weights": arguments.random_weights,
        "task": arguments.task,
        **{name: getattr(arguments, name) for name in LENGTHS.get(arguments.task, ())},
        "image_size": list(shape[1:]),
        "rounds": arguments.rounds,
        "compile_mode": arguments.compile_mode,
        "dtype": arguments.dtype,
        "attention": model.config._attn_implementation,
        "rows": rows,
    }


def _load(arguments: BenchmarkArguments) -> Any:
    config = read_config(arguments.model)
    kind = auto_class(config)
    options = {} if arguments.attention is None else {"attn_implementation": arguments.attention}
    if arguments.random_weights:
        torch.manual_seed(arguments.seed)
        return kind.from_config(config, merge=None, **options)
    return kind.from_pretrained(arguments.model, merge=None, **options)
