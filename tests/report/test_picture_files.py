"""Pictures of merged tokens of any image, model and file format; what they leave alone and refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 asks for torchvision

import dtem_hf
from dtem_hf.report.pictures import (
    displayed_pixels,
    draw_merged_tokens,
)
from tests.report.test_pictures import flat_patches, panels, patch_centres, rc_settings, slow_colours
from tests.support.children import run_python


def test_digits_with_one_channel(make_classifier, tmp_path):
    image = flat_patches(7, 7, 4, channels=1)[..., 0]
    model = dtem_hf.attach(make_classifier(image_size=28, num_channels=1), dtem_hf.ToMeConfig(r=6))
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])
    draw_merged_tokens([Image.fromarray(image)], {"merged": model}, processor, tmp_path / "figure.png")
    with torch.no_grad(), model.trace_merging() as trace:
        model(pixel_values=torch.from_numpy(image / 127.5 - 1).float()[None, None])
    grey = np.repeat(image[..., None], 3, axis=-1) / 255
    seen, merged = panels(tmp_path / "figure.png")
    np.testing.assert_allclose(patch_centres(seen, (7, 7)), grey[2::4, 2::4], atol=0.02)
    expected = slow_colours(grey, trace.source_maps[-1][0].numpy(), 1, (7, 7))
    np.testing.assert_allclose(patch_centres(merged, (7, 7)), expected, atol=0.02)


def test_the_pixels_seen_are_those_behind_resize_and_crop(deit_tiny_folder, shared, tmp_path):
    path = min((shared / "assets" / "images" / "dev").glob("*.jpg"))
    processor = AutoImageProcessor.from_pretrained(deit_tiny_folder, backend="pil")
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    resized = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    pixel_values = processor(images=image, return_tensors="pt").pixel_values[0]
    np.testing.assert_allclose(displayed_pixels(pixel_values, processor), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_any_mode_and_size(make_classifier, tmp_path, mode):
    image = Image.fromarray(flat_patches(5, 9, 11)).convert("L" if mode in "IF" else "RGB").convert(mode)
    model = dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=4))
    draw_merged_tokens(
        [image], {"m": model}, ViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path / "f.png"
    )
    assert panels(tmp_path / "f.png")[0].std() > 0


def test_sixteen_bits_are_scaled_not_cut_off(make_classifier, tmp_path):
    levels = flat_patches(8, 8, 4, channels=1)[..., 0]
    model = dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=0))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.fromarray(levels.astype(np.uint16) * 256)
    assert image.mode == "I;16"
    draw_merged_tokens([image], {"m": model}, processor, tmp_path / "f.png")
    expected = np.repeat(levels[2::4, 2::4, None], 3, axis=-1) / 255
    np.testing.assert_allclose(patch_centres(panels(tmp_path / "f.png")[0], (8, 8)), expected, atol=0.02)


def test_images_of_another_size_than_the_models_own(make_classifier, tmp_path):
    model = dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=4))
    processor = ViTImageProcessorPil(do_resize=False)
    images = [Image.fromarray(flat_patches(6, 11, 4)), Image.fromarray(flat_patches(8, 8, 4))]
    draw_merged_tokens(images, {"m": model}, processor, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0


def test_models_of_other_patch_sizes_and_dtypes_side_by_side(make_classifier, tmp_path):
    image = flat_patches(4, 4, 8)
    models = {
        "patch 4": dtem_hf.attach(make_classifier(patch_size=4), dtem_hf.ToMeConfig(r=0)),
        "patch 8": dtem_hf.attach(make_classifier(patch_size=8).bfloat16(), dtem_hf.ToMeConfig(r=0)),
    }
    draw_merged_tokens(
        [Image.fromarray(image)], models, ViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path / "f.png"
    )
    _, fine, coarse = panels(tmp_path / "f.png")
    np.testing.assert_allclose(patch_centres(fine, (8, 8)), image[2::4, 2::4] / 255, atol=0.02)
    np.testing.assert_allclose(patch_centres(coarse, (4, 4)), image[4::8, 4::8] / 255, atol=0.02)


def test_models_and_matplotlib_are_left_as_they_were(make_classifier, tmp_path):
    model = dtem_hf.attach(make_classifier(hidden_dropout_prob=0.5), dtem_hf.DTEMConfig(r=8)).train()
    model.classifier.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    settings = rc_settings()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.fromarray(flat_patches(8, 8, 4))
    draw_merged_tokens([image], {"50 % of $y_": model}, processor, tmp_path / "a.png")
    assert {name: module.training for name, module in model.named_modules()} == modes
    draw_merged_tokens([image], {"50 % of $y_": model.eval()}, processor, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert rc_settings() == settings


def test_pyplot_and_its_global_state_stay_out():
    code = "import sys, dtem_hf.report.pictures; assert 'matplotlib.pyplot' not in sys.modules"
    run_python(["-c", code], check=True)


def test_what_cannot_be_drawn_is_named_and_nothing_is_written(make_classifier, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.fromarray(flat_patches(8, 8, 4))
    merged = dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=4))
    path = tmp_path / "f.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"models\['plain'\]='ViTForImageClassification': a merged model"):
        draw_merged_tokens([image], {"plain": make_classifier()}, processor, path)
    with pytest.raises(ValueError, match="at least one"):
        draw_merged_tokens([], {"m": merged}, processor, path)
    with pytest.raises(ValueError, match="at least one"):
        draw_merged_tokens([image], {}, processor, path)
    with pytest.raises(ValueError, match="num_channels=2"):
        two = dtem_hf.attach(make_classifier(num_channels=2), dtem_hf.ToMeConfig(r=4))
        draw_merged_tokens([image], {"m": two}, processor, path)
    with pytest.raises(ValueError, match=r"path=.*\.png"):
        draw_merged_tokens([image], {"m": merged}, processor, tmp_path / "f.docx")
    assert [p.name for p in tmp_path.iterdir()] == ["f.png"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", ["svg", "pdf", "jpg", "PNG"])
def test_the_suffix_is_the_format(make_classifier, tmp_path, suffix):
    merged = dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=4))
    path = tmp_path / f"f.{suffix}"
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    draw_merged_tokens([Image.fromarray(flat_patches(8, 8, 4))], {"m": merged}, processor, path)
    start = {"svg": b"<?xml", "pdf": b"%PDF", "jpg": b"\xff\xd8\xff", "PNG": b"\x89PNG"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
