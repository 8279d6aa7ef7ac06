"""Segmentation: mIoU against a count of pixels, and a head that learns synthetic masks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BeitImageProcessorPil, ViTConfig, ViTImageProcessorPil, ViTModel

from dtem_hf import BadValue
from dtem_hf.data.masks import load_segmentation
from dtem_hf.errors import NoTrainedHead
from dtem_hf.evaluation.segmentation import (
    SegmentationArguments,
    class_shares,
    confusion,
    evaluate_segmentation,
    main,
    mean_iou,
    window_logits,
)
from dtem_hf.extra_models import SegmenterConfig, SegmenterForSemanticSegmentation
from tests.support.runs import flags


COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]], dtype=np.uint8)


def write_squares(folder, number, seed, size=32):
    """Images of coloured squares on a ground, with noise; the mask is which colour, and one corner is ignored."""
    draw = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(number):
        mask = np.zeros((size, size), dtype=np.uint8)
        for c in (1, 2):
            top, left = draw.integers(0, size - 12, 2)
            mask[top : top + 12, left : left + 12] = c
        noise = draw.integers(-20, 20, (size, size, 3))
        Image.fromarray((COLOURS[mask].astype(int) + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
        mask[:2, :2] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(root / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    write_squares(root / "train", 24, 0)
    write_squares(root / "test", 8, 1)
    return root


def options(root, **changes):
    values = {"model": str(root / "vit"), "train": str(root / "train"), "test": str(root / "test"), "steps": 200}
    return {**values, "methods": ["none", "tome"], "r": ["4", "16"], **changes}


def test_mean_iou_is_that_of_a_count_of_pixels():
    draw = np.random.default_rng(0)
    mask, predicted = draw.integers(0, 4, (9, 7)), draw.integers(0, 5, (9, 7))
    mask[0] = 255
    scores = []
    for c in range(6):
        both = either = 0
        for y in range(1, 9):
            for x in range(7):
                both += mask[y, x] == c and predicted[y, x] == c
                either += mask[y, x] == c or predicted[y, x] == c
        if either:
            scores.append(both / either)
    assert len(scores) == 5
    assert mean_iou(confusion(predicted, mask, 6)) == pytest.approx(np.mean(scores), abs=1e-12)
    assert mean_iou(confusion(np.where(mask == 255, 0, mask), mask, 4)) == 1
    with pytest.raises(BadValue, match="mask=3: classes below 3"):
        confusion(predicted, mask, 3)


def test_class_shares_of_a_patch_are_those_of_its_pixels():
    mask = np.random.default_rng(0).integers(0, 4, (12, 8)).astype(np.uint8)
    mask[mask == 3] = 255
    shares = class_shares(mask, (3, 2), 3)
    for row in range(3):
        for column in range(2):
            patch = mask[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            for c in range(3):
                assert shares[row, column, c].item() == pytest.approx(np.mean(patch == c))


def test_a_head_learns_squares_and_merging_costs_a_bit(squares, tmp_path, capsys):
    main(flags(options(squares, r=["4", "32"], output_dir=tmp_path)))
    result = json.loads((tmp_path / "segmentation.json").read_text())
    none, few, many = result["rows"]
    assert result["num_classes"] == 3 and result["data"]["num_images"] == 8
    assert none["miou"] > 75 and abs(none["miou"] - few["miou"]) < 5 and 25 < many["miou"] < none["miou"] - 5
    assert many["tokens"] == 65 - 32 - 16
    assert "mIoU" in capsys.readouterr().out


def test_r_of_zero_changes_nothing(squares):
    none, zero = evaluate_segmentation(SegmentationArguments(**options(squares, r=["0"], steps=20)))["rows"]
    assert none["miou"] == zero["miou"] and none["pixel_accuracy"] == zero["pixel_accuracy"]


def test_what_is_no_pair_of_image_and_mask_is_named(tmp_path):
    with pytest.raises(BadValue, match=r"images/NAME\.jpg and masks/NAME\.png"):
        load_segmentation(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_segmentation("./absent", "train")
    folder = write_squares(tmp_path / "a", 2, 0)
    Image.new("L", (5, 5)).save(folder / "masks" / "1.png")
    with pytest.raises(BadValue, match=r"mask 1=\(5, 5\): one class per pixel, .*\(32, 32\)"):
        load_segmentation(str(folder), "train")[1]
    Image.new("RGB", (5, 5)).save(folder / "images" / "2.JPG")
    with pytest.raises(FileNotFoundError, match="a mask is missing for 2"):
        load_segmentation(str(folder), "train")
    Image.new("RGB", (5, 5)).save(folder / "images" / "0.jpg")
    with pytest.raises(BadValue, match=r"data='.*0\.png': one file named 0; 0\.jpg is another"):
        load_segmentation(str(folder), "train")
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="an image is missing for 0"):
        load_segmentation(str(folder), "train")
    with pytest.raises(BadValue, match="steps=0"):
        SegmentationArguments(model="m", train="a", test="b", steps=0)


@pytest.mark.parametrize("shape, stride", [((8, 8), 8), ((8, 13), 8), ((11, 17), 5), ((9, 8), 1)])
def test_windows_cover_the_image_and_overlaps_are_averaged(shape, stride):
    """Against every pixel's own list of the windows that it is in; the model marks each of its pixels by its place."""
    window = 8

    class Model:
        def __call__(self, pixel_values):
            weights = torch.arange(window * window).reshape(window, window) / 7
            return SimpleNamespace(logits=torch.cat([pixel_values[:, :1] * weights, pixel_values[:, :1] + 1], dim=1))

    pixels = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = window_logits(Model(), pixels, window, stride, batch_size=3)
    assert found.shape == (2, *shape)
    tops, lefts = ([*range(0, side - window, stride), side - window] for side in shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            seen = [
                float(pixels[0, y, x] * ((y - top) * window + x - left) / 7)
                for top in tops
                for left in lefts
                if top <= y < top + window and left <= x < left + window
            ]
            assert seen and found[0, y, x].item() == pytest.approx(np.mean(seen), abs=1e-5)
            assert found[1, y, x].item() == pytest.approx(float(pixels[0, y, x]) + 1, abs=1e-5)


@pytest.fixture(scope="module")
def segmenter(squares):
    """A random Segmenter of 3 classes, whose processor takes a mask's 0 for none."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = SegmenterConfig(**sizes, image_size=16, patch_size=4, num_labels=3, initializer_range=0.3)
    SegmenterForSemanticSegmentation(config).save_pretrained(squares / "segmenter")
    size = {"height": 16, "width": 16}
    processor = BeitImageProcessorPil(size=size, do_center_crop=False, do_reduce_labels=True)
    processor.save_pretrained(squares / "segmenter")
    return squares / "segmenter"


def test_a_models_own_segmentation_is_measured_on_windows(squares, segmenter, tmp_path):
    """Of images twice as wide as high: two windows, side by side, are those that the plain model gets by hand."""
    draw = np.random.default_rng(5)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    total = np.zeros((3, 3), dtype=np.int64)
    model = SegmenterForSemanticSegmentation.from_pretrained(segmenter).eval()
    for i in range(3):
        picture = draw.integers(0, 256, (16, 32, 3), dtype=np.uint8)
        mask = draw.integers(0, 4, (16, 32)).astype(np.uint8)
        mask[0, :5] = 255
        Image.fromarray(picture).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
        pixels = picture / 127.5 - 1
        halves = torch.from_numpy(pixels).float().permute(2, 0, 1).split(16, dim=2)
        with torch.no_grad():
            best = torch.cat([model(half[None]).logits[0] for half in halves], dim=2).argmax(0)
        for y in range(16):
            for x in range(32):
                if mask[y, x] not in (0, 255):
                    total[mask[y, x] - 1, best[y, x]] += 1
    arguments = options(squares, model=str(segmenter), train=None, test=str(tmp_path), r=["0", "4"])
    result = evaluate_segmentation(SegmentationArguments(**arguments))
    none, zero, merged = result["rows"]
    assert none["pixel_accuracy"] == pytest.approx(100 * np.trace(total) / total.sum(), abs=1e-9)
    assert none["miou"] == zero["miou"] == pytest.approx(100 * mean_iou(total), abs=1e-9)
    assert merged["miou"] != none["miou"] and merged["tokens"] == 17 - 4 - 4
    assert result["num_classes"] == 3 and "training_data" not in result


def test_a_model_without_a_trained_segmentation_is_refused(squares, segmenter, tmp_path):
    SegmenterForSemanticSegmentation.from_pretrained(segmenter).vit.save_pretrained(tmp_path)
    BeitImageProcessorPil().save_pretrained(tmp_path)
    arguments = SegmentationArguments(**options(squares, model=str(tmp_path), train=None))
    with pytest.raises(NoTrainedHead, match=r"lacks decoder\.class_embeddings, which would be random; .* --train"):
        evaluate_segmentation(arguments)
