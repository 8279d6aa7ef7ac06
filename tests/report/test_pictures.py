"""Pictures of merged tokens against loops over patches and pixels, and against what is read back from the PNG."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

import dtem_hf
from dtem_hf.report.pictures import (
    displayed_pixels,
    draw_merged_layers,
    draw_merged_tokens,
    merged_token_image,
    token_groups,
)


def random_map(rows: int, columns: int, tokens: int, prefix: int, seed: int = 0) -> np.ndarray:
    """A source map in which patches share tokens at random, as positions behind the prefix."""
    draw = np.random.default_rng(seed)
    return np.concatenate([np.arange(prefix), prefix + draw.integers(0, tokens, rows * columns)])


def slow_colours(pixels: np.ndarray, source: np.ndarray, prefix: int, grid: tuple[int, int]) -> np.ndarray:
    """The mean over all pixels of all patches with a patch's token, patch by patch: [rows, columns, 3]."""
    rows, columns = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    colours = np.zeros((rows, columns, 3))
    for row in range(rows):
        for column in range(columns):
            members = [
                pixels[r * height : (r + 1) * height, c * width : (c + 1) * width].reshape(-1, 3)
                for r in range(rows)
                for c in range(columns)
                if source[prefix + r * columns + c] == source[prefix + row * columns + column]
            ]
            colours[row, column] = np.concatenate(members).mean(axis=0)
    return colours


def is_border(y: int, x: int, source: np.ndarray, prefix: int, columns: int, height: int, width: int) -> bool:
    """Whether the pixel above, or to the left, belongs to another token."""

    def token(row: int, column: int) -> int:
        return source[prefix + (row // height) * columns + column // width]

    return (y > 0 and token(y - 1, x) != token(y, x)) or (x > 0 and token(y, x - 1) != token(y, x))


def panels(path) -> list[np.ndarray]:
    """The pictures in a figure of one row, found by the frame of ink around them: [h, w, 3] in 0..1 each."""
    page = np.asarray(Image.open(path).convert("RGB")) / 255
    ink = (page < 0.97).any(axis=-1)
    rows = np.flatnonzero(ink.mean(axis=1) > 0.6)
    page, ink = page[rows[0] : rows[-1] + 1], ink[rows[0] : rows[-1] + 1]
    columns = np.flatnonzero(ink.mean(axis=0) > 0.6)
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    return [page[:, run[0] : run[-1] + 1] for run in runs if len(run) > 20]


def patch_centres(panel: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The colour in the middle of every patch of a picture."""
    rows, columns = grid
    y = ((np.arange(rows) + 0.5) * panel.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * panel.shape[1] / columns).astype(int)
    return panel[y[:, None], x[None, :]]


def rc_settings() -> dict[str, object]:
    """matplotlib's settings, without asking for the backend in the way that chooses one."""
    return {name: dict.__getitem__(matplotlib.rcParams, name) for name in dict.keys(matplotlib.rcParams)}


def flat_patches(rows: int, columns: int, patch: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """An image in which every patch has one colour, none of them near white: [H, W, channels] uint8."""
    colours = np.random.default_rng(seed).integers(0, 200, (rows, columns, channels), dtype=np.uint8)
    return colours.repeat(patch, axis=0).repeat(patch, axis=1)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (7, 3), (1, 5)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_groups_are_the_source_map_row_by_row(rows, columns, prefix):
    source = random_map(rows, columns, 4, prefix)
    groups = token_groups(torch.from_numpy(source), prefix, (rows, columns))
    assert groups.shape == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            assert groups[row, column] == source[prefix + row * columns + column]


def test_a_source_map_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"source_map=\(13,\).*1 prefix tokens and 3×5 patches"):
        token_groups(np.zeros(13, dtype=int), 1, (3, 5))
    with pytest.raises(ValueError, match="source_map"):
        merged_token_image(np.zeros((12, 20, 3)), np.zeros(17, dtype=int), 1, 4)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "patch"), [(4, 4, 4), (3, 7, 4), (7, 3, 5), (2, 5, (3, 6)), (5, 2, (6, 2))]
)
def test_every_pixel_of_the_picture(rows, columns, patch, prefix):
    height, width = patch if isinstance(patch, tuple) else (patch, patch)
    pixels = np.random.default_rng(1).random((rows * height, columns * width, 3))
    source = random_map(rows, columns, 5, prefix)
    picture = merged_token_image(pixels, source, prefix, patch)
    colours = slow_colours(pixels, source, prefix, (rows, columns))
    assert picture.shape == pixels.shape
    for y in range(rows * height):
        for x in range(columns * width):
            if is_border(y, x, source, prefix, columns, height, width):
                assert set(picture[y, x]) in ({0.0}, {1.0}), (y, x)
            else:
                np.testing.assert_allclose(picture[y, x], colours[y // height, x // width], atol=1e-12)


def test_a_border_stands_out_from_its_token():
    for level, border in ((0.0, 1.0), (0.3, 1.0), (0.9, 0.0), (1.0, 0.0)):
        picture = merged_token_image(np.full((4, 8, 3), level), [0, 1, 2], 1, 4)
        assert (picture[:, 4] == border).all()
        np.testing.assert_allclose(np.delete(picture, 4, axis=1), level, atol=1e-12)


def test_one_token_has_no_border_and_every_patch_its_own_has_all():
    pixels = np.random.default_rng(2).random((12, 20, 3))
    one = merged_token_image(pixels, np.zeros(16, dtype=int), 1, 4)
    np.testing.assert_allclose(one, np.broadcast_to(pixels.mean(axis=(0, 1)), one.shape), atol=1e-12)
    own = merged_token_image(pixels, np.arange(16), 1, 4)
    border = np.isin(own, (0.0, 1.0)).all(axis=-1)
    lines = (np.arange(12) % 4 == 0)[:, None] & (np.arange(12) > 0)[:, None]
    lines = lines | ((np.arange(20) % 4 == 0) & (np.arange(20) > 0))[None, :]
    assert (border == lines).all()


def test_pixels_that_fill_no_patch_stay():
    pixels = np.random.default_rng(3).random((14, 23, 3))
    picture = merged_token_image(pixels, random_map(3, 5, 4, 1), 1, 4)
    assert (picture[12:] == pixels[12:]).all() and (picture[:, 20:] == pixels[:, 20:]).all()
    np.testing.assert_array_equal(
        picture[:12, :20], merged_token_image(pixels[:12, :20], random_map(3, 5, 4, 1), 1, 4)
    )


def test_the_arguments_are_left_alone():
    pixels, source = np.random.default_rng(4).random((8, 8, 3)), random_map(2, 2, 2, 1)
    before = pixels.copy(), source.copy()
    merged_token_image(pixels, source, 1, 4)
    np.testing.assert_array_equal(pixels, before[0])
    np.testing.assert_array_equal(source, before[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
)
def test_normalisation_is_undone(options):
    image = flat_patches(8, 12, 4)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48}, **options)
    pixel_values = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values[0]
    np.testing.assert_allclose(displayed_pixels(pixel_values, processor), image / 255, atol=1e-6)


@pytest.mark.parametrize("method", ["tome", "dtem"])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 10), (10, 6)])
def test_the_figure_shows_what_the_model_merged(make_classifier, tmp_path, method, rows, columns):
    image = flat_patches(rows, columns, 4)
    size = {"height": 4 * rows, "width": 4 * columns}
    config = {"tome": dtem_hf.ToMeConfig, "dtem": dtem_hf.DTEMConfig}[method](r=9)
    model = dtem_hf.attach(make_classifier(image_size=(4 * rows, 4 * columns)), config)
    processor = ViTImageProcessorPil(size=size)
    draw_merged_tokens([Image.fromarray(image)], {"merged": model}, processor, tmp_path / "figure.png")

    with torch.no_grad(), model.trace_merging() as trace:
        model(**processor(images=Image.fromarray(image), return_tensors="pt"))
    source = trace.source_maps[-1][0].numpy()
    seen, merged = panels(tmp_path / "figure.png")
    assert merged.shape[1] / merged.shape[0] == pytest.approx(columns / rows, rel=0.03)
    np.testing.assert_allclose(patch_centres(seen, (rows, columns)), image[2::4, 2::4] / 255, atol=0.02)
    expected = slow_colours(image / 255, source, 1, (rows, columns))
    np.testing.assert_allclose(patch_centres(merged, (rows, columns)), expected, atol=0.02)
    assert np.abs(expected - image[2::4, 2::4] / 255).max() > 0.1


def test_a_grid_over_layers_shows_the_groups_of_every_layer(make_classifier, tmp_path):
    """Patches of one colour in a panel are those that share a token behind that layer, and no others."""
    image = flat_patches(8, 8, 4)
    model = dtem_hf.attach(make_classifier(), dtem_hf.DTEMConfig(r=12))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    draw_merged_layers(Image.fromarray(image), {"m": model}, processor, tmp_path / "f.png")
    with torch.no_grad(), model.trace_merging() as trace:
        model(**processor(images=Image.fromarray(image), return_tensors="pt"))
    _, *drawn = panels(tmp_path / "f.png")
    assert len(drawn) == 4
    for layer, panel in enumerate(drawn):
        source = trace.source_maps[layer][0].numpy()
        colours = patch_centres(panel, (8, 8)).reshape(64, 3)
        expected = slow_colours(image / 255, source, 1, (8, 8)).reshape(64, 3)
        np.testing.assert_allclose(colours, expected, atol=0.02)
        groups = token_groups(source, 1, (8, 8)).reshape(64)
        for i in range(64):
            for j in range(i):
                same = np.abs(colours[i] - colours[j]).max() < 0.004  # a step of 8 bits
                if groups[i] == groups[j]:
                    assert same, (layer, i, j)
                elif np.abs(expected[i] - expected[j]).max() > 0.02:
                    assert not same, (layer, i, j)


def test_a_grid_over_methods_and_layers(make_classifier, tmp_path):
    models = {
        "a": dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=4)),
        "b": dtem_hf.attach(make_classifier(), dtem_hf.ToMeConfig(r=12)),
    }
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.fromarray(flat_patches(8, 8, 4))
    draw_merged_layers(image, models, processor, tmp_path / "two.png")
    draw_merged_layers(image, {"a": models["a"]}, processor, tmp_path / "one.png")
    two, one = Image.open(tmp_path / "two.png"), Image.open(tmp_path / "one.png")
    assert two.width == one.width and two.height > 1.7 * one.height
