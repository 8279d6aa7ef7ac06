"""LV-ViT and Segmenter against their forward passes in plain torch, from tensors with the authors' names."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

import dtem_hf
from dtem_hf import BadValue, ToMeConfig
from dtem_hf.convert import lv_vit, segmenter
from dtem_hf.convert.lv_vit import lv_vit_config
from dtem_hf.extra_models import LVViTConfig
from tests.support import slow_reference as slow


ROOT = Path(__file__).parent.parent.parent
WIDTH, STEM, LAYERS, HEADS, CLASSES, PATCH, SIDE = 32, 6, 3, 4, 7, 4, 32
Checkpoint = dict[str, Tensor]


def draw(*shape: int) -> Tensor:
    return 0.2 * torch.randn(*shape)


def linear_tensors(name: str, outputs: int, inputs: int, bias: bool = True) -> Checkpoint:
    return {f"{name}.weight": draw(outputs, inputs), **({f"{name}.bias": draw(outputs)} if bias else {})}


def norm_tensors(name: str, width: int = WIDTH) -> Checkpoint:
    return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}


def block_tensors(root: str, inner: int, qkv_bias: bool) -> Checkpoint:
    return {
        **norm_tensors(root + "norm1"),
        **linear_tensors(root + "attn.qkv", 3 * WIDTH, WIDTH, qkv_bias),
        **linear_tensors(root + "attn.proj", WIDTH, WIDTH),
        **norm_tensors(root + "norm2"),
        **linear_tensors(root + "mlp.fc1", inner, WIDTH),
        **linear_tensors(root + "mlp.fc2", WIDTH, inner),
    }


def encoder_tensors(root: str, channels: int, patch: int, inner: int, qkv_bias: bool) -> Checkpoint:
    tensors = {
        f"{root}cls_token": draw(1, 1, WIDTH),
        f"{root}pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        f"{root}patch_embed.proj.weight": draw(WIDTH, channels, patch, patch),
        f"{root}patch_embed.proj.bias": draw(WIDTH),
        **norm_tensors(f"{root}norm"),
    }
    for i in range(LAYERS):
        tensors |= block_tensors(f"{root}blocks.{i}.", inner, qkv_bias)
    return tensors


def lv_vit_checkpoint() -> Checkpoint:
    tensors = encoder_tensors("", STEM, PATCH // 2, 3 * WIDTH, qkv_bias=False)
    for i, (channels, size) in enumerate(((3, 7), (STEM, 3), (STEM, 3)), start=1):
        tensors[f"patch_embed.conv{i}.weight"] = draw(STEM, channels, size, size)
        tensors |= norm_tensors(f"patch_embed.bn{i}", STEM)
        tensors[f"patch_embed.bn{i}.running_mean"] = draw(STEM)
        tensors[f"patch_embed.bn{i}.running_var"] = 1 + draw(STEM).abs()
        tensors[f"patch_embed.bn{i}.num_batches_tracked"] = torch.tensor(1000)
    return tensors | linear_tensors("head", CLASSES, WIDTH) | linear_tensors("aux_head", CLASSES, WIDTH)


def segmenter_checkpoint() -> Checkpoint:
    tensors = encoder_tensors("encoder.", 3, PATCH, 4 * WIDTH, qkv_bias=True)
    for i in range(2):
        tensors |= block_tensors(f"decoder.blocks.{i}.", 4 * WIDTH, qkv_bias=True)
    return {
        **tensors,
        **linear_tensors("encoder.head", 11, WIDTH),
        **linear_tensors("decoder.proj_dec", WIDTH, WIDTH),
        "decoder.cls_emb": draw(1, CLASSES, WIDTH),
        "decoder.proj_patch": draw(WIDTH, WIDTH),
        "decoder.proj_classes": draw(WIDTH, WIDTH),
        **norm_tensors("decoder.decoder_norm"),
        **norm_tensors("decoder.mask_norm", CLASSES),
    }


def linear(t: Checkpoint, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def norm(t: Checkpoint, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])


def block(t: Checkpoint, root: str, x: Tensor, sizes: Tensor, scale: float, r: int = 0) -> Any:
    """A block on the tokens of one image [n, D] of sizes [n], with ToMe in loops; also who stands for whom."""
    q, k, v = linear(t, root + "attn.qkv", norm(t, root + "norm1", x)).chunk(3, dim=-1)
    mixed = slow.attention(q, k, v, HEADS, (WIDTH // HEADS) ** -0.5, sizes)
    x, source = x + scale * linear(t, root + "attn.proj", mixed), list(range(len(x)))
    if r:
        pairs = slow.hard_matching(k.unflatten(-1, (HEADS, -1)).mean(dim=1), r, 1)
        x, sizes, source, _ = slow.hard_merge(x, sizes, pairs, 1)
    hidden = F.gelu(linear(t, root + "mlp.fc1", norm(t, root + "norm2", x)))
    return x + scale * linear(t, root + "mlp.fc2", hidden), sizes, source


def encode(t: Checkpoint, root: str, patches: Tensor, scale: float, r: int) -> tuple[Tensor, Tensor, list[int]]:
    """The tokens of one image behind the last norm, their sizes, and where every token of the image went."""
    x = torch.cat([t[f"{root}cls_token"][0], patches[0].flatten(1).T]) + t[f"{root}pos_embed"][0]
    sizes, place = torch.ones(len(x)).double(), list(range(len(x)))
    for i in range(LAYERS):
        x, sizes, source = block(t, f"{root}blocks.{i}.", x, sizes, scale, r)
        place = [source[p] for p in place]
    return norm(t, f"{root}norm", x), sizes, place


def lv_vit_logits(tensors: Checkpoint, pixels: Tensor, r: int) -> Tensor:
    """The classifier in float64, one image at a time: [B, 3, h, w] -> [B, C]."""
    t, logits = {name: tensor.double() for name, tensor in tensors.items()}, []
    for image in pixels.double():
        x = image[None]
        for i in (1, 2, 3):
            kernel, bn = t[f"patch_embed.conv{i}.weight"], f"patch_embed.bn{i}."
            x = F.conv2d(x, kernel, stride=2 if i == 1 else 1, padding=kernel.shape[-1] // 2)
            statistics = (t[bn + "running_mean"], t[bn + "running_var"], t[bn + "weight"], t[bn + "bias"])
            x = F.batch_norm(x, *statistics).relu()
        x = F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH // 2)
        tokens, _, _ = encode(t, "", x, 0.5, r)
        logits.append(linear(t, "head", tokens[0]) + 0.5 * linear(t, "aux_head", tokens[1:]).amax(dim=0))
    return torch.stack(logits)


def segmenter_logits(tensors: Checkpoint, pixels: Tensor, r: int) -> Tensor:
    """The masks in float64, one image at a time: [B, 3, h, w] -> [B, C, h, w]."""
    t, logits = {name: tensor.double() for name, tensor in tensors.items()}, []
    for image in pixels.double():
        x = F.conv2d(
            image[None], t["encoder.patch_embed.proj.weight"], t["encoder.patch_embed.proj.bias"], stride=PATCH
        )
        tokens, sizes, place = encode(t, "encoder.", x, 1.0, r)
        x = torch.cat([linear(t, "decoder.proj_dec", tokens[1:]), t["decoder.cls_emb"][0]])
        sizes = torch.cat([sizes[1:], torch.ones(CLASSES)])
        for i in range(2):
            x, _, _ = block(t, f"decoder.blocks.{i}.", x, sizes, 1.0)
        x = norm(t, "decoder.decoder_norm", x)
        patches, classes = x[:-CLASSES] @ t["decoder.proj_patch"], x[-CLASSES:] @ t["decoder.proj_classes"]
        masks = F.normalize(patches, dim=1) @ F.normalize(classes, dim=1).T
        masks = norm(t, "decoder.mask_norm", masks)[[p - 1 for p in place[1:]]]
        grid = masks.T.unflatten(1, (SIDE // PATCH, SIDE // PATCH))
        logits.append(F.interpolate(grid[None], size=image.shape[1:], mode="bilinear")[0])
    return torch.stack(logits)


KINDS: dict[str, tuple[Any, ...]] = {
    "lv_vit": (lv_vit, lv_vit_checkpoint, lv_vit_logits, "AutoModelForImageClassification"),
    "segmenter": (segmenter, segmenter_checkpoint, segmenter_logits, "AutoModelForSemanticSegmentation"),
}


def convert(kind: str, tensors: Checkpoint, folder: Path, *more: str) -> Path:
    save_file(tensors, folder / "checkpoint.safetensors")
    scale = ["--residual_scale", "0.5"] if kind == "lv_vit" else []
    words = ["--checkpoint", str(folder / "checkpoint.safetensors"), "--output_dir", str(folder / "model")]
    KINDS[kind][0].main([*words, "--num_attention_heads", str(HEADS), *scale, *more])
    return folder / "model"


@torch.no_grad()
@pytest.mark.parametrize("r", [0, 4, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_original(kind: str, r: int, pixels: Tensor, tmp_path: Path) -> None:
    """Plain, and merged by ToMe."""
    _, checkpoint, forward, auto = KINDS[kind]
    tensors = checkpoint()
    folder = convert(kind, tensors, tmp_path)
    model = getattr(dtem_hf, auto).from_pretrained(folder, merge=ToMeConfig(r=r) if r else None)
    expected = forward(tensors, pixels, r)
    torch.testing.assert_close(model(pixels).logits.double(), expected, atol=2e-5, rtol=1e-5)
    if r:
        assert (forward(tensors, pixels, 0) - expected).abs().max() > 1e-3


def without(name: str) -> Callable[[Checkpoint], Any]:
    return lambda tensors: tensors.pop(name)


def reshaped(name: str, *shape: int) -> Callable[[Checkpoint], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        ("lv_vit", without("patch_embed.bn2.running_var"), "patch_embed.bn2.running_var=None: a tensor of shape 6;"),
        ("lv_vit", without("aux_head.weight"), "aux_head.weight=None: a tensor of shape 7×32"),
        (
            "lv_vit",
            reshaped("blocks.0.attn.qkv.bias", 96),
            "'blocks.0.attn.qkv.bias': only tensors of an LV-ViT classifier",
        ),
        (
            "lv_vit",
            reshaped("patch_embed.conv1.weight", 6, 3, 5, 5),
            "patch_embed.conv1.weight=[6, 3, 5, 5]: a tensor",
        ),
        ("lv_vit", reshaped("pos_embed", 1, 64, 32), "pos_embed=[1, 64, 32]: one position for CLS, and a square"),
        ("segmenter", without("encoder.blocks.1.attn.qkv.bias"), "encoder.blocks.1.attn.qkv.bias=None: a tensor of"),
        ("segmenter", without("decoder.cls_emb"), "decoder.cls_emb=None: a tensor of shape 1×any×32"),
        ("segmenter", reshaped("decoder.proj_patch", 32, 16), "decoder.proj_patch=[32, 16]: a tensor of shape 32×32"),
        ("segmenter", reshaped("decoder.blocks.7.norm1.bias", 32), "decoder.blocks.2.attn.qkv.weight=None"),
        (
            "segmenter",
            reshaped("decoder.head.weight", 7, 32),
            "'decoder.head.weight': only tensors of a Segmenter with a",
        ),
        ("segmenter", lambda tensors: tensors.clear(), "encoder.patch_embed.proj.weight=None"),
    ],
)
def test_what_is_missing_or_odd_is_named(
    kind: str, damage: Callable[[Checkpoint], Any], message: str, tmp_path: Path
) -> None:
    tensors = KINDS[kind][1]()
    damage(tensors)
    with pytest.raises(BadValue) as raised:
        convert(kind, tensors, tmp_path)
    assert message in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_what_shapes_do_not_tell_is_asked_for() -> None:
    """But for LV-ViT-S, which is known."""
    with pytest.raises(
        BadValue, match=r"residual_scale=\(None, None\): .* 3 layers of width 32; only LV-ViT-S is known"
    ):
        lv_vit_config(lv_vit_checkpoint())
    with pytest.raises(BadValue, match="num_attention_heads=5: a number that divides the width"):
        lv_vit_config(lv_vit_checkpoint(), 5, 0.5)
    with torch.device("meta"):
        tensors = {
            "patch_embed.proj.weight": torch.empty(384, 64, 8, 8),
            "pos_embed": torch.empty(1, 197, 384),
            "head.weight": torch.empty(1000, 384),
            **{f"blocks.{i}.mlp.fc1.weight": torch.empty(1152, 384) for i in range(16)},
        }
    config = lv_vit_config(tensors)
    assert (config.num_attention_heads, config.residual_scale, config.patch_size, config.image_size) == (
        6,
        0.5,
        16,
        224,
    )
    assert config.to_dict() == LVViTConfig(num_labels=1000).to_dict()


def test_processors_and_labels_come_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class {i}" for i in range(CLASSES)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    for kind, size in (("lv_vit", {"shortest_edge": 35}), ("segmenter", {"height": 32, "width": 32})):
        (tmp_path / kind).mkdir()
        folder = convert(kind, KINDS[kind][1](), tmp_path / kind, "--labels", str(tmp_path / "labels.txt"))
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        assert {name: processor.size[name] for name in size} == size
        model = getattr(dtem_hf, KINDS[kind][3]).from_pretrained(folder)
        assert [model.config.id2label[i] for i in range(CLASSES)] == names
        assert "4 heads, patches of 4 in 32 pixels, 7 classes" in capsys.readouterr().out
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]
    assert processor.do_reduce_labels is False


@pytest.mark.parametrize("kind", [*KINDS, "mae"])
def test_the_recipes_have_help_with_an_example(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"convert_{kind}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / f"convert_{kind}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"python recipes/convert_{kind}.py --checkpoint" in printed and "--num_attention_heads" in printed
