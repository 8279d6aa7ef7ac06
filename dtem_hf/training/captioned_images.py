"""Which captioned images a run learns from, and which it is validated on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.captioned_images import CaptionedImages, Images, hold_out
from ..data.captions import has_splits, read_annotations
from ..errors import BadValue


if TYPE_CHECKING:
    from .arguments import TrainArguments


def load_captioned_images(arguments: TrainArguments, processor: Any) -> tuple[CaptionedImages, CaptionedImages]:
    """What to learn from and what to validate on, as the options say.

    Raises FileNotFoundError or ValueError that names the option, the entry or the image.
    """
    a = arguments
    if a.captions is None:
        raise BadValue("captions", None, "COCO's annotations, Karpathy's JSON, or a table of image and caption")
    splits = has_splits(a.captions)
    images: Images = read_annotations(a.captions, a.split if splits else None)
    if a.validation_captions is not None or splits:
        path = a.validation_captions or a.captions
        validation_split = {"validation": "val"}.get(a.validation_split, a.validation_split)
        held_out: Images = read_annotations(path, validation_split if has_splits(path) else None)
        _, held_out = hold_out(held_out, min(a.validation_size, len(held_out)))
    else:
        if a.validation_size >= len(images):
            raise BadValue("validation_size", a.validation_size, f"fewer than the {len(images)} captioned images")
        images, held_out = hold_out(images, a.validation_size)
    validation_folder = Path(a.validation_data or a.data)
    return (
        CaptionedImages(images, Path(a.data), processor, a.seed, a.augmentation),
        CaptionedImages(held_out, validation_folder, processor, every_caption=True),
    )
