"""One opener: what a camera, a scanner and a scientist store comes out as the same picture, for every program."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dtem_hf import opening
from dtem_hf.data.captioned_images import ImageFolder
from dtem_hf.data.captions import CaptionedImage
from dtem_hf.data.images import ProcessedImages, load_images
from dtem_hf.errors import UnreadableImage
from dtem_hf.opening import open_image


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT_BIT = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((RAMP * 65535).round().astype(np.uint16), ".png"),
        ((RAMP * 65535).round().astype(np.uint16), ".tif"),
        ((RAMP * 65535).round().astype(">u2"), ".tif"),
        (RAMP.astype(np.float32), ".tif"),
        ((RAMP * 255).astype(np.float32), ".tif"),
        ((RAMP * 65535).astype(np.int32), ".tif"),
        (EIGHT_BIT.astype(np.int32), ".tif"),
        (EIGHT_BIT, ".png"),
    ],
)
def test_grey_of_any_depth_is_the_same_picture(tmp_path, values, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(values).save(path)
    found = np.asarray(open_image(path, "x"))
    assert found.shape == (16, 16, 3) and (found[..., 0] == EIGHT_BIT).all() and (found[..., 2] == EIGHT_BIT).all()


@pytest.mark.parametrize("bad", [-1.0, 1e6, np.nan])
def test_values_that_mean_nothing_are_refused(tmp_path, bad):
    values = RAMP.astype(np.float32)
    values[3, 4] = bad
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match=r"x cannot be read .*values from 0 to 1 or 255 or 65535"):
        open_image(tmp_path / "x.tif", "x")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_upright(tmp_path, orientation):
    upright = np.zeros((20, 30, 3), dtype=np.uint8)
    upright[:5] = 250  # the sky
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.rot90(upright, turns).copy()).save(path, quality=95, exif=exif.tobytes())
    found = np.asarray(open_image(path, "photo"))
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() < 30
    captioned = ImageFolder({1: CaptionedImage("photo.jpg", ["a sky"])}, tmp_path, None)
    (tmp_path / "labels.csv").write_text("file,label\nphoto.jpg,0\n")
    processed = ProcessedImages(load_images(str(tmp_path)), None)
    for other in (captioned.open(0), processed.open(0)):
        assert np.array_equal(np.asarray(other), found)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    image.paste((10, 20, 30, 255), (0, 0, 2, 2))
    if mode == "P":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([10, 20, 30, 200, 0, 0])
        image.putpixel((3, 0), 1)
        image.save(tmp_path / "x.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "x.png")
    found = np.asarray(open_image(tmp_path / "x.png", "x"))
    assert found[0, 3].tolist() == [255, 255, 255] and found[0, 0].max() < 40


def test_bytes_and_pictures_are_opened_alike():
    stored = io.BytesIO()
    Image.fromarray(EIGHT_BIT).save(stored, "png")
    for source in ({"bytes": stored.getvalue(), "path": None}, Image.fromarray(EIGHT_BIT)):
        assert np.array_equal(np.asarray(open_image(source, "x"))[..., 1], EIGHT_BIT)


def test_pixels_are_bounded(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(opening, "MOST_PIXELS", 1200)
    assert open_image(tmp_path / "x.png", "x").size == (40, 30)
    monkeypatch.setattr(opening, "MOST_PIXELS", 1199)
    with pytest.raises(UnreadableImage, match="at most 1,199 pixels"):
        open_image(tmp_path / "x.png", "x")
