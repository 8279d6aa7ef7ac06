"""Advise which r to take on this machine for your images, and whether merging pays at all. Labels are not read.

dtem-hf advise facebook/deit-small-patch16-224 path/to/images
dtem-hf advise MODEL IMAGES --adapter user/dtem-deit-small --runtimes eager onnxruntime --max_loss 0.05

For a few r, the program measures how many predictions change and how fast the model is in every runtime. Its advice is
the largest r within the allowed loss. All rows run in turn within every round, so that other load on the machine
affects all alike. It writes the results after every round, so that an interrupted run leaves its results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..deploy.runtimes import COMPILE_MODES, RUNTIMES, check_runtime, need_runtime
from ..evaluation.arguments import DrawnImages
from ..files import write_json, write_text
from ..models.auto import auto_class, load_encoder
from ..models.distances import FEATURES
from ..programs.arguments import DTYPES, at_least, one_of, option, parse_arguments, read_config
from ..programs.conditions import conditions, describe_model
from ..programs.lock import only_run_in
from ..programs.processes import say
from ..report.plots import plot_advice
from ..report.tables import SPEEDUP_LEGEND, print_rows
from .advice import METHODS, advise
from .tables import advice_cells, advice_page


@dataclass(kw_only=True)
class AdviseArguments(DrawnImages):
    """Measure what merging saves and changes, and advise which r to take."""

    adapter: str | None = option("trained adapter to measure beside ToMe: Hub id or local folder", default=None)
    methods: list[str] = option(
        f"some of {', '.join(METHODS)}; left out: tome, and the adapter's method", default_factory=list
    )
    r: list[int] = option(
        "tokens merged per layer, one row each; left out: three that leave 0.75, 0.6 and 0.5 of the "
        "multiply-adds, of which only the picked one runs in runtimes other than the first",
        default_factory=list,
    )
    runtimes: list[str] = option(
        f"some of {', '.join(RUNTIMES)}; left out: those that work here, without compile, which takes minutes",
        default_factory=list,
    )
    compile_mode: str = option(f"mode of torch.compile: {', '.join(COMPILE_MODES)}", default="default")
    batch_sizes: list[int] = option("images per batch, one verdict each", default_factory=lambda: [1, 16])
    max_loss: float | None = option(
        "largest share of the images whose class may change (left out: 0.1), or, for a model without classes, largest "
        "one minus cosine of its features (0.05)",
        default=None,
    )
    features: str = option(f"features of a model without classes: {', '.join(FEATURES)}", default="auto")
    rounds: int = option(
        "largest number of timed rounds; a row ends when its speed-up is known to within 2 percent", default=10
    )
    minutes: float = option("time limit for starting rounds; every row gets at least four", default=3.0)
    dtype: str = option(", ".join(DTYPES), default="float32")
    output_dir: str = option("folder for advice.json, advice.md and advice.png", default="runs/advise")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rounds")
        at_least(self, 0, "max_loss", "minutes")
        one_of(self, "dtype", DTYPES)
        one_of(self, "compile_mode", COMPILE_MODES)
        one_of(self, "features", FEATURES)
        if self.runtimes:
            one_of(self, "runtimes", RUNTIMES)
        check_runtime(self, *self.runtimes)
        for name in self.runtimes:
            need_runtime(name)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write JSON, page and picture, and print the table and the advice."""
    arguments = parse_arguments(AdviseArguments, argv, __doc__ or "", leading=("model", "data"))
    result: dict[str, Any] = {}
    with only_run_in(arguments.output_dir) as folder:

        def write(advice: dict[str, Any]) -> None:
            result.update(advice)
            write_json(folder / "advice.json", result)
            write_text(folder / "advice.md", advice_page(result))

        try:
            write(advise_on(arguments, write))
        except KeyboardInterrupt:
            if not result:
                raise
        is_timed = bool(result["rows"][0]["batches"])
        if is_timed:
            plot_advice(result["rows"], folder / "advice.png", result["model"]["name"])
    title = f"{result['model']['name']}: images/s (speed-up)"
    print_rows(title, *advice_cells(result["rows"]), names=2, legend=SPEEDUP_LEGEND)
    for runtime, reason in result["left_out"].items():
        print(f"not measured: {runtime} ({reason})")
    print(result["sentence"])
    print(f"written: {folder / 'advice.json'}, advice.md{' and advice.png' if is_timed else ''}")
    if not result["finished"]:
        print("stopped: these are the results until then; the same command starts over")
        raise SystemExit(130)


def advise_on(
    arguments: AdviseArguments, report: Callable[[dict[str, Any]], Any] = lambda result: None
) -> dict[str, Any]:
    """Load model and images, measure, and return the content of `advice.json`; `report` gets intermediate versions."""
    a, device = arguments, arguments.choose_device()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # read before this program adds its own load
    kind = auto_class(read_config(a.model))
    options = {"merge": None, "dtype": getattr(torch, a.dtype)}
    model, loaded = kind.from_pretrained(a.model, output_loading_info=True, **options)
    if loaded["missing_keys"]:
        say(f"the checkpoint lacks {min(loaded['missing_keys'])}, which would be random: features are compared")
        model = load_encoder(a.model, a.features, dtype=options["dtype"])
    model = model.to(device)
    pixels, data = a.draw()
    names = ("adapter", "methods", "r", "runtimes", "compile_mode", "batch_sizes", "max_loss", "features", "rounds")
    facts = {
        **conditions(device),
        "load_average": load,
        "model": describe_model(a.model, model),
        "adapter": a.adapter,
        "data": data,
        "image_size": list(pixels.shape[-2:]),
        "features": a.features,
        "rounds": a.rounds,
        "minutes": a.minutes,
        "compile_mode": a.compile_mode,
        "dtype": a.dtype,
    }
    advice = advise(
        model,
        pixels,
        **{name: getattr(a, name) for name in (*names, "minutes")},
        report=lambda found: report({**facts, **asdict(found)}),
    )
    return {**facts, **asdict(advice)}
