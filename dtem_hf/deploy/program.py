"""Write a merged model as an ONNX file or an AOTInductor package, for any batch, and check it against eager.

python recipes/export.py --model facebook/deit-small-patch16-224 --method tome --r 16
python recipes/export.py --model facebook/deit-small-patch16-224 --merge me/dtem-deit-small --formats onnx aot_inductor
python recipes/export.py --model path/to/model --flops 0.5 --dtype bfloat16 --formats aot_inductor
python recipes/export.py --model path/to/config --random_weights True --method none    # the plain model

Every file has a record beside it: model.onnx and model.onnx.json, model.pt2 and model.pt2.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoConfig

from .. import ops
from ..configuration import MergeConfig
from ..errors import BadValue
from ..files import replacing_together, write_json
from ..models.attach import UNSET
from ..models.auto import auto_class
from ..models.vision import image_shape
from ..programs.arguments import DTYPES, ModelArguments, one_of, option, parse_arguments, parse_reduction
from ..programs.conditions import conditions, describe_model
from .aot_inductor import PackageRunner, write_package
from .graph import INPUT_NAME, export_graph, output_names
from .onnx_runtime import LOWEST_OPSET, OPSET, OnnxRunner, need_onnx, write_onnx, written_opset
from .parity import TOLERANCE, check_parity


FORMATS = {"onnx": "model.onnx", "aot_inductor": "model.pt2"}
_PLAIN = "none"


@dataclass(kw_only=True)
class ExportArguments(ModelArguments):
    """Write a merged model for deployment; of one that also reads text, the part that sees images."""

    model: str = option("model: Hub id or local folder; or, with --random_weights, one that has its config")
    merge: str | None = option("adapter: Hub id, id@revision or local folder", default=None)
    method: str | None = option(
        f"without an adapter: {', '.join(sorted(MergeConfig._methods))}, or {_PLAIN} for the plain model; left out, "
        "what the model was saved with, or dtem",
        default=None,
    )
    r: str | None = option("tokens merged per layer: a number, a JSON list or a JSON schedule", default=None)
    flops: float | None = option("share of the multiply-adds to reach, instead of r", default=None)
    random_weights: bool = option("read the model's config alone, to try out a shape", default=False)
    formats: list[str] = option(f"some of {', '.join(FORMATS)}", default_factory=lambda: ["onnx"])
    dtype: str = option(f"what is computed in: {', '.join(DTYPES)}; input and outputs are float32", default="float32")
    image_size: int | None = option("pixels in height and width; left out, the model's own", default=None)
    opset: int = option(f"ONNX: operator set, {LOWEST_OPSET} or more", default=OPSET)
    merge_form: str = option(
        "ONNX: one_hot, which every runtime can run (TensorRT has no scatter that adds), or scatter", default="one_hot"
    )
    attention: str = option(
        "eager, sdpa, or auto: eager in ONNX, where it is the shorter graph, and sdpa in AOTInductor", default="auto"
    )
    tolerance: float = option("largest difference from eager in float32, absolute or relative", default=TOLERANCE)
    unchecked: bool = option("write a file even where nothing here can run and check it", default=False)
    seed: int = option("of the images of the check, and of random weights", default=0)
    output_dir: str = option("folder for the files", default="runs/export")

    def __post_init__(self) -> None:
        one_of(self, "dtype", DTYPES)
        one_of(self, "merge_form", ops.MERGE_FORMS)
        one_of(self, "attention", ("auto", "eager", "sdpa"))
        one_of(self, "method", (None, _PLAIN, *sorted(MergeConfig._methods)))
        one_of(self, "formats", FORMATS)
        if self.opset < LOWEST_OPSET:
            raise BadValue("opset", self.opset, f"{LOWEST_OPSET} or more")
        if self.tolerance <= 0:
            raise BadValue("tolerance", self.tolerance, "a number above 0")
        if self.merge is not None and self.method is not None:
            raise BadValue("method", self.method, "nothing beside --merge, which says its own")
        if self.r is not None and self.flops is not None:
            raise BadValue("r, flops", (self.r, self.flops), "one of them")
        if self.method == _PLAIN and (self.r is not None or self.flops is not None):
            raise BadValue("r, flops", (self.r, self.flops), f"neither of them with --method {_PLAIN}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the files, print how far they are from eager."""
    arguments = parse_arguments(ExportArguments, argv, __doc__ or "")
    console = Console(width=140)
    for record in export(arguments):
        parity = record["parity"]
        if parity is None:
            said = f"not checked: {record['unchecked_because']}"
        else:
            said = ", ".join(
                f"{name} within {figures['largest_difference']:.1e} of eager"
                for name, figures in parity["outputs"].items()
            )
        size = sum(file["bytes"] for file in record["files"])
        console.print(f"written: {Path(arguments.output_dir) / record['files'][0]['name']}, {size:,} bytes; {said}")


def export(arguments: ExportArguments) -> list[dict[str, Any]]:
    """Write every format. Returns the records beside the files; a format that fails leaves no file."""
    if "onnx" in arguments.formats:
        need_onnx("onnx", "onnxscript", *([] if arguments.unchecked else ["onnxruntime"]))
    device = arguments.choose_device()
    model = load_for_export(arguments).to(device=device, dtype=getattr(torch, arguments.dtype)).eval()
    records = []
    for kind in (progress := tqdm(arguments.formats, desc="export", unit="file")):
        progress.set_postfix_str(kind)
        records.append(export_format(arguments, model, kind, device))
    return records


def export_format(arguments: ExportArguments, model: Any, kind: str, device: torch.device) -> dict[str, Any]:
    """Write and check one format: the file and its record, or neither of them. Returns the record."""
    attention = arguments.attention
    if attention == "auto":
        attention = "eager" if kind == "onnx" else "sdpa"
    model.set_attn_implementation(attention)
    shape = image_shape(model, arguments.image_size)
    names = output_names(model, torch.zeros(1, *shape, device=device))
    with replacing_together(arguments.output_dir) as folder:
        path = folder / FORMATS[kind]
        with ops.merge_form(arguments.merge_form if kind == "onnx" else "scatter"):
            program = export_graph(model, shape)
        files = write_onnx(program, path, names, arguments.opset) if kind == "onnx" else write_package(program, path)
        parity, reason = None, None
        try:
            run = OnnxRunner(path, device, arguments.dtype) if kind == "onnx" else PackageRunner(path)
        except (BadValue, ImportError) as error:
            if not arguments.unchecked:
                raise
            reason = str(error)
        else:
            parity = check_parity(model, run, names, shape, arguments.tolerance, arguments.seed)
        record = {
            **(made := conditions(device)),
            "format": kind,
            "files": [_described(file) for file in files],
            **({"opset": written_opset(path), "merge_form": arguments.merge_form} if kind == "onnx" else {}),
            "model": describe_model(arguments.model, model),
            "random_weights": arguments.random_weights,
            **_described_merge(model, arguments),
            "dtype": arguments.dtype,
            "attention": attention,
            "input": {"name": INPUT_NAME, "shape": ["batch", *shape], "dtype": "float32"},
            "outputs": names,
            "parity": parity,
            **({} if reason is None else {"unchecked_because": reason}),
            "device": device.type,
            "versions": {**made["versions"], **_onnx_versions()},
        }
        write_json(path.with_name(f"{path.name}.json"), record)
    return record


def load_for_export(arguments: ExportArguments) -> Any:
    """The model that the arguments ask for, merged as they say, with random weights if they say so."""
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
    merge: Any = arguments.merge or UNSET
    if arguments.method == _PLAIN:
        merge = None
    elif arguments.method is not None or (merge is UNSET and getattr(config, "merge", None) is None):
        merge = MergeConfig.from_dict({"method": arguments.method or "dtem"})
    if arguments.random_weights:
        torch.manual_seed(arguments.seed)
        model = auto_class(config).from_config(config, merge=merge)
    else:
        model = auto_class(config).from_pretrained(arguments.model, merge=merge)
    if arguments.r is not None or arguments.flops is not None:
        r = None if arguments.r is None else parse_reduction(arguments.r)
        model.set_reduction(r, flops=arguments.flops)
    return model


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _described_merge(model: Any, arguments: ExportArguments) -> dict[str, Any]:
    if not hasattr(model, "merge_plan"):
        return {"merge": None}
    plan = model.merge_plan(arguments.image_size)
    return {"merge": model.merge_config.to_dict(), "adapter": arguments.merge, "plan": plan.to_dict()}


def _onnx_versions() -> dict[str, str]:
    found = {}
    for name in ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
