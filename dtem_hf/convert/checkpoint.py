"""Shared code of the converters: read a checkpoint in its authors' layout, rename its tensors, write the model."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import BitImageProcessorPil

from ..errors import BadValue
from ..files import replacing_folder
from ..programs.arguments import option, parse_arguments


# One line of Python that unpickles only tensors and the options of the training program, and runs no code.
_TO_SAFETENSORS = (
    "import argparse, sys, torch; from safetensors.torch import save_file; "
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "state = state.get('model', state.get('state_dict', state)); "
    "save_file({k: v.contiguous() for k, v in state.items()}, sys.argv[2])"
)
# Patterns of transformers' names for the parts of a ViT block, with timm's names.
_BLOCK = (
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"attention\.o_proj\.", "attn.proj."),
    (r"attention\.([qkv])_proj\.", r"attn.qkv:\1."),
)


@dataclass(kw_only=True)
class ConvertArguments:
    """Convert a checkpoint to a model of transformers with the same outputs."""

    checkpoint: str = option("model in its authors' layout, as safetensors; for a .pth, a conversion command is shown")
    output_dir: str = option("folder for the converted model and its image processor; must be missing or empty")
    num_attention_heads: int | None = option(
        "heads per layer; needed only for sizes that are not published", default=None
    )
    labels: str | None = option("text file with one class name per line, in the head's order", default=None)


def read_checkpoint(path: Path, output: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError that names the file, or `output` if it is not empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadValue("output_dir", str(output), "a folder that is empty or does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: this file does not exist")
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        line = shlex.join(["python", "-c", _TO_SAFETENSORS, str(path), str(path.with_suffix(".safetensors"))])
        raise BadValue("checkpoint", str(path), f"a safetensors file, which holds no code; make it with: {line}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise BadValue("checkpoint", str(path), f"a readable safetensors file ({error})") from error


def shape_of(tensors: Mapping[str, Tensor], name: str, expected: Sequence[int | None]) -> tuple[int, ...]:
    """A tensor's shape. Raises ValueError that names the tensor if the shape is not `expected`; None fits any size."""
    shown = "×".join("any" if size is None else str(size) for size in expected)
    if name not in tensors:
        raise BadValue(name, None, f"a tensor of shape {shown}; the checkpoint has none of that name")
    found = tuple(tensors[name].shape)
    fits = len(found) == len(expected) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(found, expected, strict=True)
    )
    if not fits:
        raise BadValue(name, list(found), f"a tensor of shape {shown}")
    return found


def side_of_grid(tensors: Mapping[str, Tensor], name: str, width: int) -> int:
    """The number of patches in a row, from the position embeddings of CLS and a square grid: [1, 1 + side², width]."""
    num_patches = shape_of(tensors, name, (1, None, width))[1] - 1
    side = math.isqrt(num_patches)
    if side < 1 or side**2 != num_patches:
        found = list(tensors[name].shape)
        raise BadValue(name, found, "one position for CLS, and a square number of positions for patches")
    return side


def count_blocks(tensors: Mapping[str, Tensor], root: str) -> int:
    """The number of blocks, from the numbers behind the name `root`. Raises ValueError if there are none."""
    found = {match[1] for name in tensors if (match := re.match(rf"{re.escape(root)}(\d+)\.", name))}
    if not found:
        raise BadValue(f"{root}0.norm1.weight", None, "a tensor; the checkpoint has no blocks")
    return len(found)


def check_heads(width: int, heads: int) -> int:
    """Return the number of heads. Raises ValueError if it does not divide the width."""
    if heads < 1 or width % heads:
        raise BadValue("num_attention_heads", heads, f"a number that divides the width, {width}")
    return heads


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How to convert one kind of checkpoint to a model.

    `kind` names such a checkpoint in errors. `names` are pairs for `re.sub`, applied in turn to the model's names;
    they give the checkpoint's names. The names of a ViT block, which all kinds share, are not among them. The
    checkpoint stores the tensors `transposed` in transposed form, and may hold the tensors `unread`, which are not
    used. `config` makes the model's config from the tensors, the number of heads and the options of `arguments`.
    `processor` makes the image processor from this config, `title` the model's name and a text about its head. `auto`
    is the Auto class that loads the model.
    """

    kind: str
    model_class: Any
    names: Sequence[tuple[str, str]]
    config: Callable[..., Any]
    processor: Callable[[Any], Any]
    title: Callable[[Any], tuple[str, str]]
    auto: str = "AutoModelForImageClassification"
    arguments: type[ConvertArguments] = ConvertArguments
    transposed: Sequence[str] = ()
    unread: Sequence[str] = ()

    def load(self, tensors: Mapping[str, Tensor], config: Any) -> Any:
        """The model with all tensors of a checkpoint, in float32 and in eval mode.

        Raises ValueError that names the first tensor that is missing, unknown, or has a wrong shape.
        """
        with torch.device("meta"):
            model = self.model_class(config)
        state, used = {}, set(self.unread)
        for key, like in model.state_dict().items():
            name = key
            for pattern, replacement in (*self.names, *_BLOCK):
                name = re.sub(pattern, replacement, name)
            name, _, part = name.partition(":")  # "….attn.qkv:q.weight"
            expected = [*like.shape]
            if part:
                projection, _, ending = part.partition(".")
                name, expected[0] = f"{name}.{ending}", 3 * expected[0]
            turned = name in self.transposed
            shape_of(tensors, name, expected[::-1] if turned else expected)
            tensor = tensors[name].T if turned else tensors[name]
            tensor = tensor.chunk(3)["qkv".index(projection)] if part else tensor
            state[key] = tensor.to(like.dtype).contiguous()
            used.add(name)
        for name in sorted(tensors.keys() - used):
            raise BadValue("checkpoint", name, f"only tensors of {self.kind}, which has no such tensor")
        model.load_state_dict(state, assign=True)
        return model.eval()

    def convert(self, argv: Sequence[str] | None, description: str | None) -> None:
        """Read a checkpoint, write model and processor into a folder, atomically, and describe them."""
        arguments = vars(parse_arguments(self.arguments, argv, description or ""))
        path, output, labels = (arguments.pop(name) for name in ("checkpoint", "output_dir", "labels"))
        tensors = read_checkpoint(Path(path), Path(output))
        config = self.config(tensors, **arguments)
        name_labels(config, labels)
        model, (title, read_from) = self.load(tensors, config), self.title(config)
        with replacing_folder(Path(output)) as folder:
            model.save_pretrained(folder)
            self.processor(config).save_pretrained(folder)
        print(
            f"{output}: {title} of {config.num_hidden_layers} layers and width {config.hidden_size}, "
            f"{config.num_attention_heads} heads, patches of {config.patch_size} in {config.image_size} pixels, "
            f"{config.num_labels} classes {read_from}; {model.num_parameters() / 1e6:.1f} M parameters"
        )
        print(f'dtem_hf.{self.auto}.from_pretrained("{output}", merge=...) merges it')


def imagenet_processor(image_size: int, kept: float) -> BitImageProcessorPil:
    """A bicubic processor with ImageNet's mean and deviation; its centre crop keeps a share of the shortest edge."""
    return BitImageProcessorPil(
        size={"shortest_edge": int(image_size / kept)},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def name_labels(config: Any, labels: str | None) -> None:
    """Name the classes by a text file with one name per line. Raises ValueError for a wrong number of lines."""
    if labels is None:
        return
    lines = [line.strip() for line in Path(labels).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != config.num_labels:
        fits = f"{config.num_labels} lines, one per class of the head; it has {len(lines)}"
        raise BadValue("labels", labels, fits)
    config.id2label = dict(enumerate(lines))
    config.label2id = {label: i for i, label in enumerate(lines)}
