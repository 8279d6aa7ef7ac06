"""Export a merged model for ONNX Runtime, OpenVINO or AOTInductor, for any batch size, and compare it with eager.

python recipes/export.py --model facebook/deit-small-patch16-224 --method tome --r 16
python recipes/export.py --model facebook/deit-small-patch16-224 --merge me/dtem-deit-small --formats onnx openvino
python recipes/export.py --model path/to/model --r 16 --formats onnx openvino --int8 path/to/images
python recipes/export.py --model path/to/model --flops 0.5 --dtype bfloat16 --formats aot_inductor
python recipes/export.py --model path/to/config --random_weights True --method none    # the plain model

Every file has a record beside it: model.onnx has model.onnx.json, and so on. The folder of ONNX and OpenVINO files has
Optimum's layout, with config.json and preprocessor_config.json.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..configuration import MergeConfig
from ..data.folders import NO_LABELS
from ..data.images import ProcessedImages, load_images
from ..errors import BadValue, need
from ..families import find_encoder
from ..files import replacing_together, write_json
from ..models.attach import UNSET
from ..models.auto import auto_class, load_whole
from ..models.copies import share_weights
from ..models.install import detach
from ..models.vision import image_part, image_shape
from ..opening import load_processor
from ..programs.arguments import (
    DTYPES,
    ModelArguments,
    above_zero,
    at_least,
    check_no_adapter,
    one_of,
    option,
    parse_arguments,
    read_config,
    read_reduction,
)
from ..programs.conditions import conditions, data_name, describe_model, versions
from ..programs.processes import say
from ..progress import tqdm
from .aot_inductor import PackageRunner, write_package
from .graph import INPUT_NAME, attention_as, export_graph, output_names
from .onnx_runtime import LOWEST_OPSET, OPSET, OnnxRunner, check_opset, quantise_onnx, write_onnx, written_opset
from .openvino_runtime import OpenVinoRunner, write_openvino
from .parity import TOLERANCE, Runner, check_parity, measure_change


# The file names of Optimum's layout, and of AOTInductor.
FORMATS = {"onnx": "model.onnx", "openvino": "openvino_model.xml", "aot_inductor": "model.pt2"}
_LARGEST_HELD_OUT = 100
_PLAIN = "none"


@dataclass(kw_only=True)
class ExportArguments(ModelArguments):
    """Export a merged model; if the model also reads text, only the part that reads images."""

    model: str = option("model: Hub id or local folder; with --random_weights, its config is enough")
    merge: str | None = option("adapter: Hub id, id@revision or local folder", default=None)
    method: str | None = option(
        f"method without an adapter: {', '.join(sorted(MergeConfig._methods))}, or {_PLAIN} for the plain model; left "
        "out, the one that the model was saved with, or dtem",
        default=None,
    )
    r: str | None = option("tokens merged per layer: a number, a JSON list or a JSON schedule", default=None)
    flops: float | None = option("share of the multiply-adds to reach, instead of r", default=None)
    random_weights: bool = option("read only the model's config, to try a shape", default=False)
    formats: list[str] = option(f"some of {', '.join(FORMATS)}", default_factory=lambda: ["onnx"])
    dtype: str = option(
        f"dtype to compute in: {', '.join(DTYPES)}; input and outputs are float32. For OpenVINO, float16 is only the "
        "dtype of stored weights; the runtime chooses the dtype to compute in",
        default="float32",
    )
    int8: str | None = option(
        "ONNX, OpenVINO: quantise to int8 (by ONNX Runtime, NNCF) with these images: Hub dataset id or folder",
        default=None,
    )
    split: str = option("int8: split of a Hub dataset, or of a folder with train, val or test in it", default="train")
    limit: int = option(
        f"int8: images to read; a quarter of them, at most {_LARGEST_HELD_OUT}, measure the change", default=400
    )
    check: str | None = option(
        "int8: measure the change on these images instead, and quantise with all of --limit", default=None
    )
    image_size: int | None = option("pixels in height and width; left out, the model's own", default=None)
    opset: int = option(f"ONNX: operator set, {LOWEST_OPSET} or more", default=OPSET)
    merge_form: str = option(
        "ONNX: one_hot, for every runtime (TensorRT has no scatter that adds), or scatter", default="one_hot"
    )
    attention: str = option(
        "eager, sdpa, or auto: sdpa for AOTInductor, else eager, which gives the shorter graph", default="auto"
    )
    tolerance: float = option("largest difference from eager in float32, absolute or relative", default=TOLERANCE)
    unchecked: bool = option("write a file even if nothing on this machine can run and check it", default=False)
    seed: int = option("seed of the check's images and of random weights", default=0)
    output_dir: str = option("folder for the files", default="runs/export")

    def __post_init__(self) -> None:
        one_of(self, "dtype", DTYPES)
        one_of(self, "merge_form", ("one_hot", "scatter"))
        one_of(self, "attention", ("auto", "eager", "sdpa"))
        one_of(self, "method", (None, _PLAIN, *sorted(MergeConfig._methods)))
        one_of(self, "formats", FORMATS)
        if "openvino" in self.formats and self.dtype == "bfloat16":
            raise BadValue("dtype", self.dtype, "float32 or float16 for OpenVINO, which can run these in bfloat16")
        if self.int8 is not None and ("aot_inductor" in self.formats or self.dtype != "float32" or self.unchecked):
            raise BadValue("int8", self.int8, "the formats onnx or openvino with dtype float32, without --unchecked")
        if self.check is not None and self.int8 is None:
            raise BadValue("check", self.check, "no value without --int8: other files are checked on random images")
        at_least(self, 2, "limit")
        if os.path.realpath(self.output_dir) == os.path.realpath(self.model):
            raise BadValue("output_dir", self.output_dir, "another folder than the model's, whose config it replaces")
        above_zero(self, "tolerance")
        if self.merge is not None and self.method is not None:
            raise BadValue("method", self.method, "nothing beside --merge: the adapter names its method")
        if read_reduction(self.r, self.flops) and self.method == _PLAIN:
            raise BadValue("r, flops", (self.r, self.flops), f"neither of the two with --method {_PLAIN}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the files, and print their differences from eager."""
    arguments = parse_arguments(ExportArguments, argv, __doc__ or "")
    for record in export(arguments):
        size = sum(file["bytes"] for file in record["files"])
        path = Path(arguments.output_dir) / record["files"][0]["name"]
        print(f"written: {path}, {size:,} bytes; {_said(record)}")


def _said(record: dict[str, Any]) -> str:
    parity = record["parity"]
    if parity is None:
        return f"not checked: {record['unchecked_because']}"
    said = [
        f"{name} within {figures['largest_difference']:.1e} of eager"
        + (f", same class in {figures['agreement']:.1f} %, KL {figures['kl']:.2g}" if "kl" in figures else "")
        for name, figures in parity["outputs"].items()
    ]
    return ", ".join(said) + (f", on {parity['images']} images" if "images" in parity else "")


def export(arguments: ExportArguments) -> list[dict[str, Any]]:
    """Write every format, and return the records of the files. A format that fails leaves no file."""
    if "onnx" in arguments.formats:
        need("onnx", "--formats onnx", *(["onnx", "onnxscript"] if arguments.unchecked else []))
        check_opset(arguments.opset)
    if "openvino" in arguments.formats:
        need("openvino" if arguments.int8 is None else "int8", "--formats openvino")
    device = arguments.choose_device()
    model = load_for_export(arguments).to(device=device, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.image_size is not None:
        family, encoder = find_encoder(model)
        family.num_tokens(encoder, arguments.image_size)  # raises for images smaller than a patch
    records = []
    for kind in (progress := tqdm(arguments.formats, desc="export", unit="file")):
        progress.set_postfix_str(kind)
        records.append(export_format(arguments, model, kind, device))
    return records


def export_format(arguments: ExportArguments, model: Any, kind: str, device: torch.device) -> dict[str, Any]:
    """Write and check one format, and return its record. If it fails, neither file nor record is left."""
    attention = arguments.attention
    if attention == "auto":
        attention = "sdpa" if kind == "aot_inductor" else "eager"
    half_weights = kind == "openvino" and arguments.dtype == "float16"
    if half_weights:
        model = copy.deepcopy(model).float()
    shape = image_shape(model, arguments.image_size)
    images: Sequence[Tensor] = ()
    held_out: Sequence[Tensor] = ()
    with replacing_together(arguments.output_dir) as folder, attention_as(model, attention):
        path = folder / FORMATS[kind]
        names = output_names(model, torch.zeros(1, *shape, device=device))
        with ops.merge_form({"onnx": arguments.merge_form, "openvino": "openvino"}.get(kind, "torch")):
            program = export_graph(model, shape)
        if arguments.int8 is not None:
            images, held_out = _calibration_images(arguments, shape)
        if kind == "onnx":
            files = write_onnx(program, path, names, arguments.opset)
            if images:
                quantise_onnx(path, images)
        elif kind == "openvino":
            files = write_openvino(program, path, names, half_weights, images)
        else:
            files = write_package(program, path)
        parity, reason = None, None
        try:
            run = _runner(kind, path, device, arguments.dtype)
        except (BadValue, ImportError) as error:
            if not arguments.unchecked:
                raise
            reason = str(error)
        else:
            if held_out:
                parity = measure_change(model, run, names, held_out)
            else:
                parity = check_parity(model, run, names, shape, arguments.tolerance, arguments.seed)
        if kind != "aot_inductor":
            _write_configs(model, arguments.model, folder)
        record = {
            **conditions(device),
            "format": kind,
            "files": [_described(file) for file in files],
            **({"opset": written_opset(path), "merge_form": arguments.merge_form} if kind == "onnx" else {}),
            **({} if arguments.int8 is None else {"int8": _described_data(arguments, len(images))}),
            "model": describe_model(arguments.model, model),
            "random_weights": arguments.random_weights,
            **_described_merge(model, arguments),
            "dtype": arguments.dtype,
            "attention": attention,
            "input": {"name": INPUT_NAME, "shape": ["batch", *shape], "dtype": "float32"},
            "outputs": names,
            "parity": parity,
            **({} if reason is None else {"unchecked_because": reason}),
            "versions": versions("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf"),
        }
        write_json(path.with_name(f"{path.name}.json"), record)
    return record


def _runner(kind: str, path: Path, device: torch.device, dtype: str) -> Runner:
    if kind == "onnx":
        return OnnxRunner(path, device, dtype)
    return OpenVinoRunner(path, device) if kind == "openvino" else PackageRunner(path)


def _calibration_images(
    arguments: ExportArguments, shape: tuple[int, ...]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Images [1, C, H, W] to quantise with, and other images to measure the change on."""
    pixels: Sequence[Tensor] = _Pixels(arguments, str(arguments.int8), arguments.limit)
    if len(pixels) < 2:
        raise BadValue("int8", arguments.int8, "2 images or more")
    if tuple(pixels[0].shape[1:]) != shape:
        raise BadValue("image_size", arguments.image_size, f"the processor's: {list(pixels[0].shape[2:])}")
    if arguments.check is not None:
        return pixels, _Pixels(arguments, arguments.check, None)
    pixels = list(tqdm(pixels, desc="read", unit="image"))
    count = min(max(len(pixels) // 4, 1), _LARGEST_HELD_OUT)
    return pixels[:-count], pixels[-count:]


class _Pixels(Sequence[Tensor]):
    """Processed images, each as a batch of one, which are read on access."""

    def __init__(self, arguments: ExportArguments, data: str, limit: int | None) -> None:
        images = load_images(data, arguments.split, limit, NO_LABELS)
        self._images = ProcessedImages(images, load_processor(arguments.model))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        return self._images[i]["pixel_values"].unsqueeze(0)


def _write_configs(model: Any, name: str, folder: Path) -> None:
    """Write the config of the part that reads images, and the model's processor, if any, in Optimum's layout."""
    part: Any = image_part(model, find_encoder(model)[1])
    config = copy.deepcopy(part.config)
    plain = type(detach(share_weights(part)) if hasattr(part, "merge_config") else part)
    config.architectures = [plain.__name__]
    config.save_pretrained(folder)
    try:
        processor = load_processor(name).to_dict()
    except (OSError, ValueError):
        say(f"{name} has no image processor: preprocessor_config.json is not written")
        return
    # Optimum uses transformers 4, whose ViT processor cannot keep the aspect ratio; CLIP's is the same but for that.
    if processor["image_processor_type"] == "ViTImageProcessor" and "shortest_edge" in processor["size"]:
        processor["image_processor_type"] = "CLIPImageProcessor"
    write_json(folder / "preprocessor_config.json", processor)


def load_for_export(arguments: ExportArguments) -> Any:
    """Load or make the model of the arguments, and merge it."""
    config = read_config(arguments.model)
    merge: Any = arguments.merge or UNSET
    if arguments.method == _PLAIN:
        merge = None
    elif arguments.method is not None or (merge is UNSET and getattr(config, "merge", None) is None):
        merge = MergeConfig.from_dict({"method": arguments.method or "dtem"})
        check_no_adapter("method", None if arguments.random_weights else merge)
    if arguments.random_weights:
        torch.manual_seed(arguments.seed)
        model = auto_class(config).from_config(config, merge=merge)
    else:
        model = load_whole(auto_class(config), arguments.model, merge=merge)
    if reduction := read_reduction(arguments.r, arguments.flops):
        model.set_reduction(**reduction)
    return model


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _described_data(arguments: ExportArguments, count: int) -> dict[str, Any]:
    check = {} if arguments.check is None else {"check": data_name(arguments.check)}
    return {"data": data_name(str(arguments.int8)), "images": count, **check}


def _described_merge(model: Any, arguments: ExportArguments) -> dict[str, Any]:
    if not hasattr(model, "merge_plan"):
        return {"merge": None}
    plan = model.merge_plan(arguments.image_size)
    return {"merge": model.merge_config.to_dict(), "adapter": arguments.merge, "plan": plan.to_dict()}
