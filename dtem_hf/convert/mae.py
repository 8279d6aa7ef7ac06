"""Convert an MAE fine-tuned classifier, in its authors' layout, to a BEiT of transformers with the same logits.

python recipes/convert_mae.py --checkpoint mae_finetuned_vit_base.safetensors --output_dir mae-base

The layout is timm's: `cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.{i}`, `fc_norm` (of the mean of the patch
tokens) or `norm` (of the CLS token), `head`. Such a classifier is exactly a BEiT with absolute positions, no relative
bias and no layer scale (METHOD.md section 6). BEiT's keys have no bias: a key's bias adds the same to all scores of a
query, which softmax does not see. ToMe, which compares keys, then compares them without it.

A merged model's mean counts every token by its size. Without training, merge without proportional attention:
`ToMeConfig(r=16, proportional_attention=False)`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import BeitConfig, BeitForImageClassification, BitImageProcessorPil

from ..errors import BadValue
from ..files import replacing_folder
from ..programs.arguments import option, parse_arguments


# Shapes do not tell the number of heads: those of the published sizes, by width and number of layers.
PUBLISHED = {(768, 12): ("ViT-B", 12), (1024, 24): ("ViT-L", 16), (1280, 32): ("ViT-H", 16)}
_LAYER_NORM_EPS = 1e-6
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# A block's tensors, by their name in BEiT; queries, keys and values come from `attn.qkv`.
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# One line of Python that unpickles tensors and the options of the training program, but no code.
_TO_SAFETENSORS = (
    "import argparse, sys, torch; from safetensors.torch import save_file; "
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in state.get('model', state).items()}, sys.argv[2])"
)


@dataclass(kw_only=True)
class ConvertArguments:
    """Convert an MAE fine-tuned classifier to a BEiT with the same logits."""

    checkpoint: str = option(
        "classifier in its authors' layout, as safetensors; a .pth gets its conversion command shown"
    )
    output_dir: str = option("folder for the converted model and its image processor; must not exist, or be empty")
    num_attention_heads: int | None = option(
        "heads per layer; needed only for sizes other than ViT-B, ViT-L and ViT-H", default=None
    )
    labels: str | None = option("text file with the name of a class per line, in the head's order", default=None)


def mae_config(shapes: Mapping[str, Sequence[int]], num_attention_heads: int | None = None) -> Any:
    """The config of the BEiT that equals a checkpoint, from the names and shapes of its tensors.

    Raises ValueError that names the first tensor that is missing, unknown, or of an odd shape.
    """
    _check_kind(shapes)
    stem = _shape(shapes, "patch_embed.proj.weight", (None, 3, None, None))
    width, patch_size = stem[0], stem[2]
    num_patches = _shape(shapes, "pos_embed", (1, None, width))[1] - 1
    grid = math.isqrt(max(num_patches, 0))
    if grid < 1 or grid**2 != num_patches:
        raise BadValue("pos_embed", list(shapes["pos_embed"]), "one position for CLS and a square of them for patches")
    num_layers = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    if not num_layers:
        raise BadValue("blocks.0.norm1.weight", None, "a tensor; the checkpoint has no blocks")
    config = BeitConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=_heads(width, num_layers, num_attention_heads),
        intermediate_size=_shape(shapes, "blocks.0.mlp.fc1.weight", (None, width))[0],
        layer_norm_eps=_LAYER_NORM_EPS,
        image_size=grid * patch_size,
        patch_size=patch_size,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
        use_mean_pooling="fc_norm.weight" in shapes,
        num_labels=_shape(shapes, "head.weight", (None, width))[0],  # type: ignore[call-arg]
    )
    expected = _expected_shapes(config)
    for name, shape in expected.items():
        _shape(shapes, name, shape)
    unknown = sorted(set(shapes) - set(expected))
    if unknown:
        raise BadValue("checkpoint", unknown[0], "tensors of an MAE classifier only; it has no place for this one")
    return config


def convert_mae(tensors: Mapping[str, Tensor], config: Any) -> BeitForImageClassification:
    """The classifier with a checkpoint's tensors, in float32 and in `.eval()`; `config` is `mae_config`'s."""
    state = {
        "beit.embeddings.cls_token": tensors["cls_token"],
        "beit.embeddings.position_embeddings": tensors["pos_embed"],
    }
    pairs = {
        "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
        "head": "classifier",
        **({"fc_norm": "beit.pooler.layernorm"} if config.use_mean_pooling else {"norm": "beit.layernorm"}),
    }
    for i in range(config.num_hidden_layers):
        pairs |= {f"blocks.{i}.{theirs}": f"beit.layers.{i}.{ours}" for theirs, ours in _BLOCK.items()}
        for kind in ("weight", "bias"):
            for projection, part in zip("qkv", tensors[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                if (projection, kind) != ("k", "bias"):
                    state[f"beit.layers.{i}.attention.{projection}_proj.{kind}"] = part
    for theirs, ours in pairs.items():
        state |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    with torch.device("meta"):
        model = BeitForImageClassification(config)
    model.load_state_dict({key: value.float().contiguous() for key, value in state.items()}, assign=True)
    return model.eval()


def mae_processor(image_size: int) -> BitImageProcessorPil:
    """The preprocessing that these models were evaluated with: bicubic, centre crop, ImageNet's mean and deviation."""
    shortest_edge = int(image_size / (224 / 256)) if image_size <= 224 else image_size
    return BitImageProcessorPil(
        size={"shortest_edge": shortest_edge},
        crop_size={"height": image_size, "width": image_size},
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, save, and describe the model."""
    arguments = parse_arguments(ConvertArguments, argv, __doc__ or "")
    output, checkpoint = Path(arguments.output_dir), Path(arguments.checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadValue("output_dir", str(output), "a folder that is empty or does not exist")
    try:
        with _opened(checkpoint) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
            config = mae_config(shapes, arguments.num_attention_heads)
            if arguments.labels is not None:
                config.id2label = _read_labels(Path(arguments.labels), config.num_labels)
                config.label2id = {label: i for i, label in config.id2label.items()}
            model = convert_mae({name: file.get_tensor(name) for name in shapes}, config)
    except SafetensorError as error:
        raise BadValue("checkpoint", str(checkpoint), f"a readable safetensors file ({error})") from error
    _save(model, output)
    size, _ = PUBLISHED.get((config.hidden_size, config.num_hidden_layers), ("a ViT", None))
    pooled = "mean of the patches" if config.use_mean_pooling else "CLS token"
    print(
        f"{output}: {size} of {config.num_hidden_layers} layers and width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patches of {config.patch_size} in {config.image_size} pixels, "
        f"{config.num_labels} classes from the {pooled}; {model.num_parameters() / 1e6:.1f} M parameters"
    )
    print(f'AutoModelForImageClassification.from_pretrained("{output}", merge=...) merges it')


def _check_kind(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a checkpoint of another kind."""
    if any(name.startswith(("decoder_", "mask_token")) for name in shapes):
        fits = "a fine-tuned classifier; this is a pre-trained MAE, which transformers has as ViTMAEForPreTraining"
        raise BadValue("checkpoint", "decoder_…", fits)
    if ("fc_norm.weight" in shapes) == ("norm.weight" in shapes):
        found, fits = (
            "both" if "norm.weight" in shapes else "neither",
            "fc_norm of the patches' mean, or norm of the CLS",
        )
        raise BadValue("fc_norm.weight, norm.weight", found, f"one: {fits} token")


def _heads(width: int, num_layers: int, given: int | None) -> int:
    if given is None:
        if (width, num_layers) not in PUBLISHED:
            sizes = ", ".join(f"{name} ({layers} layers, width {w})" for (w, layers), (name, _) in PUBLISHED.items())
            raise BadValue(
                "num_attention_heads", None, f"a number for {num_layers} layers of width {width}; known are {sizes}"
            )
        return PUBLISHED[width, num_layers][1]
    if given < 1 or width % given:
        raise BadValue("num_attention_heads", given, f"a number that divides the width, {width}")
    return given


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint in the authors' layout."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    linear = {"head": (config.num_labels, width), "patch_embed.proj": (width, 3, patch, patch)}
    norms = ["fc_norm" if config.use_mean_pooling else "norm"]
    for i in range(config.num_hidden_layers):
        linear[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        linear[f"blocks.{i}.attn.proj"] = (width, width)
        linear[f"blocks.{i}.mlp.fc1"] = (inner, width)
        linear[f"blocks.{i}.mlp.fc2"] = (width, inner)
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (config.image_size // patch) ** 2 + 1, width),
    }
    for name, shape in linear.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        expected |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return expected


def _shape(shapes: Mapping[str, Sequence[int]], name: str, expected: Sequence[int | None]) -> tuple[int, ...]:
    """A tensor's shape, in which None fits any number."""
    shown = "×".join("any" if size is None else str(size) for size in expected)
    if name not in shapes:
        raise BadValue(name, None, f"a tensor of shape {shown}; the checkpoint has none of that name")
    found = tuple(shapes[name])
    fits = len(found) == len(expected) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(found, expected, strict=True)
    )
    if not fits:
        raise BadValue(name, list(found), f"a tensor of shape {shown}")
    return found


def _opened(path: Path) -> Any:
    """A safetensors file. Raises ValueError that shows how a pickled file becomes one."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no such file")
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        line = shlex.join(["python", "-c", _TO_SAFETENSORS, str(path), str(path.with_suffix(".safetensors"))])
        raise BadValue("checkpoint", str(path), f"safetensors, which holds no code; this line makes it: {line}")
    return safe_open(path, framework="pt")


def _read_labels(path: Path, num_labels: int) -> dict[int, str]:
    labels = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(labels) != num_labels:
        raise BadValue("labels", str(path), f"{num_labels} lines, one per class of the head; it has {len(labels)}")
    return dict(enumerate(labels))


def _save(model: Any, output: Path) -> None:
    """Write model and processor into a folder, whole or not at all."""
    with replacing_folder(output) as folder:
        model.save_pretrained(folder)
        mae_processor(model.config.image_size).save_pretrained(folder)
