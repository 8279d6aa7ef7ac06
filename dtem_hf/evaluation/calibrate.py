"""Search for the r of every layer that changes a model's outputs least, on unlabelled images, at equal multiply-adds.

python recipes/calibrate.py --model facebook/deit-tiny-patch16-224 --adapter runs/deit-tiny/adapter \\
    --data path/to/images --r 16 --output_dir runs/deit-tiny-calibrated
python recipes/calibrate.py --model facebook/deit-tiny-patch16-224 --method tome --flops 0.5 --data path/to/images
python recipes/calibrate.py --model facebook/dinov2-small --head my_heads:shade --adapter A --r 16 --data IMAGES
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configuration import MergeConfig
from ..errors import BadValue
from ..files import write_json
from ..hub.adapter import MergeAdapter
from ..models.attach import attach
from ..models.auto import load_encoder, load_trained_classifier
from ..models.calibration import calibrate
from ..models.dense_head import DenseHead
from ..models.distances import FEATURES
from ..programs.arguments import (
    at_least,
    one_of,
    option,
    parse_arguments,
    parse_reduction,
    read_config,
    read_reduction,
)
from ..programs.conditions import conditions, describe_model
from ..programs.functions import load_function
from ..programs.lock import only_run_in
from .arguments import DrawnImages


@dataclass(kw_only=True)
class CalibrateArguments(DrawnImages):
    """Search for a plan: one r per layer."""

    num_images: int = option("images to compare plans on, drawn by seed", default=256)
    limit: int | None = option("draw them from this many images, the first ones", default=None)
    batch_size: int = option("images per batch", default=32)
    adapter: str | None = option("trained adapter: Hub id or local folder", default=None)
    method: str | None = option(
        f"method without an adapter: {', '.join(sorted(MergeConfig._methods))}; those that learn are untrained",
        default=None,
    )
    r: str | None = option("give the plan the multiply-adds of this r; left out, of the adapter's r", default=None)
    flops: float | None = option("or this share of the unmerged model's multiply-adds", default=None)
    features: str = option(
        f"features to compare, of an encoder without a head: {', '.join(FEATURES[1:])}; auto: compare the logits of a "
        "classifier",
        default="auto",
    )
    head: str | None = option(
        "module:function that makes maps [B, H, W] from patches [B, D, rows, columns]; compare these maps",
        default=None,
    )
    evaluations: int = option("largest number of plans to measure", default=60)
    output_dir: str = option(
        "folder for the adapter with its plan, or the config, and calibration.json", default="runs/calibrate"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "evaluations", "limit", "batch_size")
        one_of(self, "features", FEATURES)
        if self.head is not None and self.features not in ("auto", "grid"):
            raise BadValue("features", self.features, "auto or grid: the head reads every patch")
        if (self.adapter is None) == (self.method is None):
            raise BadValue("adapter, method", (self.adapter, self.method), "exactly one of the two")
        read_reduction(self.r, self.flops)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, search, and write the result."""
    arguments = parse_arguments(CalibrateArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir):
        record = calibrate_model(arguments)
        print(
            f"r per layer {record['reductions']}: distance {record['distance']:.4g}, even plan "
            f"{record['even_distance']:.4g}"
        )
        print(f"written: {arguments.output_dir}")


def calibrate_model(arguments: CalibrateArguments) -> dict[str, Any]:
    """Search, write the adapter or config with its new plan, and return the content of `calibration.json`."""
    a, device = arguments, arguments.choose_device()
    read_config(a.model)  # raises early if the model does not exist
    head = None if a.head is None else DenseHead(load_function("head", a.head), a.head)
    if a.features == "auto" and head is None:
        model = load_trained_classifier(a.model, merge=None)
    else:
        model = load_encoder(a.model, a.features)
    model.to(device).eval()
    adapter = None if a.adapter is None else MergeAdapter.from_reference(a.adapter)
    attach(model, adapter or MergeConfig.from_dict({"method": a.method}))
    if a.r is not None:
        model.set_reduction(parse_reduction(a.r))
    pixels, data = a.draw(a.limit)
    options: dict[str, Any] = {name: getattr(a, name) for name in ("evaluations", "batch_size", "features")}
    found = calibrate(model, pixels, a.flops, head=head, **options)
    record = {
        **conditions(device),
        "model": describe_model(a.model, model),
        "adapter": a.adapter,
        "method": model.merge_config.method,
        "data": data,
        "features": a.features,
        "head": a.head,
        **asdict(found),
        "reductions": list(found.reductions),
    }
    output = Path(a.output_dir)
    result: Any = model.merge_config
    if adapter is not None:
        result = MergeAdapter(result, adapter.tensors, adapter.backbone)
    result.save_pretrained(output)
    write_json(output / "calibration.json", record)
    return record
