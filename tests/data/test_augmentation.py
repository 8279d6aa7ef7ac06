"""Augmentation: draws that depend on the key alone, values that fit the model, and images of one size."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from dtem_hf import BadValue
from dtem_hf.data.augmentation import AUGMENTATIONS, augmented_pixels


PROCESSOR = ViTImageProcessorPil(size={"height": 24, "width": 32})
RANDOM = [name for name in AUGMENTATIONS if name != "none"]


@pytest.fixture(scope="module")
def image():
    """A smooth picture: red grows to the right, green downwards."""
    y, x = np.mgrid[0:120, 0:200]
    return Image.fromarray(np.stack([x * 255 / 199, y * 255 / 119, 0 * x + 60], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", RANDOM)
def test_draw_depends_on_the_key_alone(name, image):
    first = augmented_pixels(image, PROCESSOR, name, (0, 1, 2))
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(augmented_pixels(image, PROCESSOR, name, (0, 1, 2)), first)
    assert torch.equal(torch.get_rng_state(), before)
    others = [augmented_pixels(image, PROCESSOR, name, (0, 1, k)) for k in range(3, 11)]
    assert any(not torch.equal(other, first) for other in others)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_come_as_the_model_takes_them(name, image):
    """Normalised: no value outside what black and white become."""
    low, high = ((value - 0.5) / 0.5 for value in (0, 1))
    for k in range(30):
        pixels = augmented_pixels(image, PROCESSOR, name, (7, 0, k))
        assert pixels.shape == (3, 24, 32) and pixels.dtype == torch.float32
        assert pixels.min() >= low - 1e-5 and pixels.max() <= high + 1e-5


def test_crops_are_parts_of_the_image_flipped_or_not(image):
    """Red grows evenly to the right, or, where flipped, to the left; green grows downwards."""
    flipped = 0
    for k in range(40):
        red, green, blue = augmented_pixels(image, PROCESSOR, "resized_crop", (0, 0, k))
        across, down = red.diff(dim=1).mean(), green.diff(dim=0).mean()
        assert down > 0 and red.diff(dim=0).abs().max() < 0.03
        assert blue.std() < 1e-2
        flipped += bool(across < 0)
    assert 8 < flipped < 32


def test_size_is_that_of_the_crop_where_there_is_one(image):
    cropping = DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 16, "width": 16})
    assert augmented_pixels(image, cropping, "resized_crop", (0, 0, 0)).shape == (3, 16, 16)


def test_some_images_are_erased_in_part(image):
    plain = [augmented_pixels(image, PROCESSOR, "resized_crop", (0, 0, k)) for k in range(60)]
    full = [augmented_pixels(image, PROCESSOR, "trivialaugment", (0, 0, k)) for k in range(60)]
    erased = [int((x == 0).all(0).sum()) for x in full]
    assert all((x == 0).all(0).sum() == 0 for x in plain)
    assert 5 < sum(count > 10 for count in erased) < 30


def test_a_crop_needs_images_of_one_size(image):
    edges = ViTImageProcessorPil(size={"shortest_edge": 24})
    with pytest.raises(BadValue, match="a processor that makes images of one size"):
        augmented_pixels(image, edges, "resized_crop", (0, 0, 0))
