"""The base class of tasks on captioned images: data and batches. `captioning` and `contrastive` are such tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...data.captioned_images import CaptionCollate, CaptionedImages, Images, hold_out
from ...data.captions import has_splits, read_annotations
from ...errors import BadValue
from ...opening import load_processor
from ...programs.identity import digest
from ..task_arguments import TaskArguments
from .base import Task, TaskData


class CaptionTask(Task):
    """Base of tasks that learn from images with captions; each epoch draws one caption per image."""

    def load_data(self, model: Any) -> TaskData:
        processor, tokenizer = load_processor(self.arguments.model), self.load_tokenizer()
        train, validation = load_captioned_images(self.arguments, processor)
        identity = {
            "data": train.images.digest(),
            "validation_data": validation.images.digest(),
            "captions": digest([[i.captions for i in data.images.images.values()] for data in (train, validation)]),
            "model's processor and tokenizer": digest([processor.to_dict(), tokenizer.get_vocab()]),
        }
        return TaskData(train, validation, self.make_collate(tokenizer), identity)

    def load_tokenizer(self) -> Any:
        """The tokenizer in the model's folder or repository."""
        return AutoTokenizer.from_pretrained(self.arguments.model)

    def make_collate(self, tokenizer: Any) -> CaptionCollate:
        """A function that makes batches of captioned images."""
        return CaptionCollate(tokenizer, {"max_length": self.arguments.max_caption_tokens, "padding": True})

    def save_model(self, model: Any, folder: Path) -> None:
        super().save_model(model, folder)
        self.load_tokenizer().save_pretrained(folder)


def load_captioned_images(arguments: TaskArguments, processor: Any) -> tuple[CaptionedImages, CaptionedImages]:
    """The training images and the validation images.

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
    return (
        CaptionedImages(images, Path(a.data), processor, a.seed, a.augmentation),
        CaptionedImages(held_out, Path(a.validation_data or a.data), processor, every_caption=True),
    )
