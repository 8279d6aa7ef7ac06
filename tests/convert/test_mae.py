"""MAE's classifiers against their forward pass written out in plain torch; and what is no such checkpoint."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

import dtem_hf
from dtem_hf import BadValue, ToMeConfig, attach
from dtem_hf.convert.mae import MAE, mae_config, main
from tests.support import slow_reference as slow
from tests.support.children import run_python


WIDTH, LAYERS, HEADS, CLASSES, PATCH, SIDE = 32, 3, 4, 7, 4, 32
Checkpoint = dict[str, Tensor]


def random_checkpoint(norm: str = "fc_norm") -> Checkpoint:
    """In the authors' layout, with weights large enough that attention is not flat and biases that are not zero."""

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape)

    tensors = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, WIDTH)}
    linear = {"patch_embed.proj": (WIDTH, 3, PATCH, PATCH), "head": (CLASSES, WIDTH)}
    norms = [norm]
    for i in range(LAYERS):
        linear[f"blocks.{i}.attn.qkv"] = (3 * WIDTH, WIDTH)
        linear[f"blocks.{i}.attn.proj"] = (WIDTH, WIDTH)
        linear[f"blocks.{i}.mlp.fc1"] = (2 * WIDTH, WIDTH)
        linear[f"blocks.{i}.mlp.fc2"] = (WIDTH, 2 * WIDTH)
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    for name, shape in linear.items():
        tensors |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    for name in norms:
        tensors |= {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}
    return tensors


def forward(tensors: Checkpoint, pixels: Tensor, r: int = 0) -> Tensor:
    """The classifier in float64, one image at a time: [B, 3, h, w] -> [B, C].

    With r, that many tokens per layer are merged by ToMe without proportional attention, in loops; keys are compared
    without their bias, which BEiT has no place for.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-6)

    logits = []
    for image in pixels.double():
        patches = F.conv2d(image[None], t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH)
        x = torch.cat([t["cls_token"][0], patches[0].flatten(1).T]) + t["pos_embed"][0]
        sizes = torch.ones(len(x)).double()
        for i in range(LAYERS):
            q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
            mixed = []
            for qh, kh, vh in zip(*(part.chunk(HEADS, dim=-1) for part in (q, k, v)), strict=True):
                mixed.append((qh @ kh.T / (WIDTH // HEADS) ** 0.5).softmax(dim=-1) @ vh)
            x = x + linear(torch.cat(mixed, dim=-1), f"blocks.{i}.attn.proj")
            if r:
                bare = k - t[f"blocks.{i}.attn.qkv.bias"].chunk(3)[1]
                x, sizes = merge(x, sizes, bare.unflatten(-1, (HEADS, -1)).mean(dim=1), r)
            hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
            x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
        if "fc_norm.weight" in t:
            pooled = sum(size * token for size, token in zip(sizes[1:], x[1:], strict=True)) / sizes[1:].sum()
            logits.append(linear(norm(pooled, "fc_norm"), "head"))
        else:
            logits.append(linear(norm(x, "norm")[0], "head"))
    return torch.stack(logits)


def merge(x: Tensor, sizes: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """docs/method.md section 3 for one image, by the suite's loops."""
    x, sizes, _, _ = slow.hard_merge(x, sizes, slow.hard_matching(metric, r, 1), 1)
    return x, sizes


def write(tensors: Checkpoint, folder: Path, name: str = "mae.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def convert(checkpoint: Path, output: Path, *more: str) -> None:
    main(["--checkpoint", str(checkpoint), "--output_dir", str(output), "--num_attention_heads", str(HEADS), *more])


@pytest.fixture(params=["fc_norm", "norm"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """Of a classifier of the patches' mean, and of the CLS token."""
    return random_checkpoint(request.param)


def test_logits_are_those_of_the_original(checkpoint: Checkpoint, pixels: Tensor, tmp_path: Path) -> None:
    convert(write(checkpoint, tmp_path), tmp_path / "a" / "beit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a" / "beit")
    with torch.no_grad():
        logits = model(pixels).logits
    torch.testing.assert_close(logits.double(), forward(checkpoint, pixels), atol=1e-5, rtol=1e-5)
    assert type(model).__name__ == "BeitForImageClassification"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["beit"]  # nothing of a temporary folder stays


def test_in_training_mode_it_draws_nothing(pixels: Tensor) -> None:
    tensors = random_checkpoint()
    model = MAE.load(tensors, mae_config(tensors, HEADS))
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model.train()(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize("r", [4, 12])
def test_merged_without_proportional_attention_the_mean_counts_sizes(
    checkpoint: Checkpoint, pixels: Tensor, tmp_path: Path, r: int
) -> None:
    convert(write(checkpoint, tmp_path), tmp_path / "beit")
    config = ToMeConfig(r=r, proportional_attention=False)
    model = dtem_hf.AutoModelForImageClassification.from_pretrained(tmp_path / "beit", merge=config)
    with torch.no_grad():
        logits = model(pixels).logits
        with_sizes = attach(model, ToMeConfig(r=r))(pixels).logits
    expected = forward(checkpoint, pixels, r)
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-5)
    assert (with_sizes - expected).abs().max() > 1e-3
    assert (forward(checkpoint, pixels) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_lower_precision_becomes_float32(dtype: torch.dtype, pixels: Tensor, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_checkpoint().items()}
    convert(write(tensors, tmp_path), tmp_path / "beit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "beit")
    assert model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits.double(), forward(tensors, pixels), atol=1e-5, rtol=1e-5)


def published_shapes(width: int, layers: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Of a published size at 224 pixels and 1000 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (224 // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    for i in range(layers):
        for name, out, into in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)]:
            shapes |= {f"blocks.{i}.{name}.weight": (out * width, into * width)}
            shapes |= {f"blocks.{i}.{name}.bias": (out * width,)}
    for name in ["fc_norm", *(f"blocks.{i}.norm{k}" for i in range(layers) for k in (1, 2))]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


@pytest.mark.parametrize(
    "width, layers, patch, heads, millions",
    [(768, 12, 16, 12, 86.6), (1024, 24, 16, 16, 304.3), (1280, 32, 14, 16, 632.0)],
    ids=["ViT-B", "ViT-L", "ViT-H"],
)
def test_published_sizes_are_read_off_shapes(width: int, layers: int, patch: int, heads: int, millions: float) -> None:
    shapes = published_shapes(width, layers, patch)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    config = mae_config(tensors)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, layers, heads)
    assert (config.patch_size, config.image_size, config.intermediate_size) == (patch, 224, 4 * width)
    assert (config.num_labels, config.layer_norm_eps) == (1000, 1e-6)
    assert config.use_mean_pooling and config.use_absolute_position_embeddings
    assert type(config.layer_scale_init_value) is float and config.layer_scale_init_value == 0.0
    model = MAE.load(tensors, config)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert model.num_parameters() == count - layers * width  # but for the keys' biases
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_labels_and_processor_come_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A centre crop of bicubically resized pixels, normalised as ImageNet's are, also of a grey image."""
    names = [f"class {i}" for i in range(CLASSES)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    convert(write(random_checkpoint(), tmp_path), tmp_path / "beit", "--labels", str(tmp_path / "labels.txt"))
    config = json.loads((tmp_path / "beit" / "config.json").read_text())
    assert list(config["id2label"].values()) == names
    assert config["label2id"]["class 3"] == 3
    printed = capsys.readouterr().out
    assert "3 layers and width 32, 4 heads, patches of 4 in 32 pixels, 7 classes from the mean" in printed

    processor = AutoImageProcessor.from_pretrained(tmp_path / "beit", backend="pil")
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80), dtype=np.uint8))
    resized = grey.convert("RGB").resize((57, 36), Image.Resampling.BICUBIC)  # 36 = 32 / (224 / 256), rounded down
    cropped = resized.crop((12, 2, 44, 34))
    expected = (np.asarray(cropped) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    ours = processor(grey, return_tensors="pt").pixel_values[0]
    assert ours.shape == (3, 32, 32)
    torch.testing.assert_close(ours.double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-5, rtol=1e-5)


def without(name: str) -> Callable[[Checkpoint], Any]:
    return lambda tensors: tensors.pop(name)


def reshaped(name: str, *shape: int) -> Callable[[Checkpoint], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("cls_token"), "cls_token=None: a tensor of shape 1×1×32; the checkpoint has none of that name"),
        (without("pos_embed"), "pos_embed=None: a tensor of shape 1×any×32"),
        (without("patch_embed.proj.weight"), "patch_embed.proj.weight=None: a tensor of shape any×3×any×any"),
        (without("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias=None: a tensor of shape 96"),
        (without("head.weight"), "head.weight=None: a tensor of shape any×32"),
        (without("fc_norm.weight"), "fc_norm.weight, norm.weight='neither'"),
        (without("fc_norm.bias"), "fc_norm.bias=None: a tensor of shape 32"),
        (reshaped("norm.weight", 32), "fc_norm.weight, norm.weight='both'"),
        (
            reshaped("pos_embed", 1, 64, 32),
            "pos_embed=[1, 64, 32]: one position for CLS, and a square number of positions",
        ),
        (reshaped("pos_embed", 1, 65, 48), "pos_embed=[1, 65, 48]: a tensor of shape 1×any×32"),
        (
            reshaped("pos_embed", 1, 1, 32),
            "pos_embed=[1, 1, 32]: one position for CLS, and a square number of positions",
        ),
        (reshaped("patch_embed.proj.weight", 32, 3, 4, 8), "patch_embed.proj.weight=[32, 3, 4, 8]: a tensor of"),
        (reshaped("patch_embed.proj.weight", 32, 1, 4, 4), "patch_embed.proj.weight=[32, 1, 4, 4]: a tensor of"),
        (reshaped("blocks.2.mlp.fc1.weight", 60, 32), "blocks.2.mlp.fc1.weight=[60, 32]: a tensor of shape 64×32"),
        (reshaped("head.bias", 8), "head.bias=[8]: a tensor of shape 7"),
        (reshaped("blocks.0.ls1.gamma", 32), "checkpoint='blocks.0.ls1.gamma': only tensors of an MAE classifier"),
        (reshaped("blocks.4.norm1.weight", 32), "blocks.3.attn.qkv.weight=None"),
        (reshaped("mask_token", 1, 1, 32), "which transformers has as ViTMAEForPreTraining"),
        (lambda tensors: tensors.clear(), "fc_norm.weight, norm.weight='neither'"),
    ],
)
def test_what_is_missing_or_odd_is_named(damage: Callable[[Checkpoint], Any], message: str, tmp_path: Path) -> None:
    tensors = random_checkpoint()
    damage(tensors)
    with pytest.raises(BadValue) as raised:
        convert(write(tensors, tmp_path), tmp_path / "beit")
    assert message in str(raised.value)
    assert not (tmp_path / "beit").exists()


@pytest.mark.parametrize(
    "heads, message",
    [
        (None, "num_attention_heads=None: a number for 3 layers of width 32; known are ViT-B (12 layers, width 768)"),
        (5, "num_attention_heads=5: a number that divides the width, 32"),
        (0, "num_attention_heads=0: a number that divides the width, 32"),
    ],
)
def test_heads_that_do_not_fit(heads: int | None, message: str) -> None:
    with pytest.raises(BadValue) as raised:
        mae_config(random_checkpoint(), heads)
    assert message in str(raised.value)


def test_a_pth_is_refused_with_the_line_that_converts_it(pixels: Tensor, tmp_path: Path) -> None:
    """The line works as it is printed, also on what the authors save beside the weights, and runs no code."""
    tensors, folder = random_checkpoint(), tmp_path / "with a space"
    folder.mkdir()
    saved = {"model": tensors, "epoch": 99, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, folder / "mae.pth")
    with pytest.raises(BadValue, match="a safetensors file, which holds no code") as raised:
        convert(folder / "mae.pth", tmp_path / "beit")
    line = re.search(r"make it with: (python .*)\.$", str(raised.value))
    assert line is not None
    run_python(shlex.split(line[1])[1:], check=True)
    convert(folder / "mae.safetensors", tmp_path / "beit")
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(tmp_path / "beit")(pixels).logits
    torch.testing.assert_close(logits.double(), forward(tensors, pixels), atol=1e-5, rtol=1e-5)

    torch.save({"model": tensors, "args": Path("x")}, folder / "mae.pth")  # anything else is not unpickled
    again = run_python(shlex.split(line[1])[1:])
    assert again.returncode != 0
    assert "UnpicklingError" in again.stderr


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="this file does not exist"):
        convert(tmp_path / "nothing.safetensors", tmp_path / "beit")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadValue, match="a readable safetensors file"):
        convert(tmp_path / "broken.safetensors", tmp_path / "beit")
    good = write(random_checkpoint(), tmp_path)
    with pytest.raises(BadValue, match=r"output_dir=.*a folder that is empty or does not exist"):
        convert(good, tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(BadValue, match=r"labels=.*7 lines, one per class of the head; it has 2"):
        convert(good, tmp_path / "beit", "--labels", str(tmp_path / "labels.txt"))
    assert not (tmp_path / "beit").exists()
    (tmp_path / "empty").mkdir()
    convert(good, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
