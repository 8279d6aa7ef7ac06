"""What the tasks on captioned images have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ...data.captioned_images import CaptionCollate
from ...data.images import load_processor
from ..captioned_images import load_captioned_images
from .base import Task, TaskData


class CaptionTask(Task):
    """Base of tasks that learn from images with captions: in an epoch, every image comes with one of its captions."""

    def load_data(self, model: Any) -> TaskData:
        train, validation = load_captioned_images(self.arguments, load_processor(self.arguments.model))
        return TaskData(train, validation, self.make_collate(self.load_tokenizer()))

    def load_tokenizer(self) -> Any:
        """The tokenizer that lies with the model."""
        return AutoTokenizer.from_pretrained(self.arguments.model)

    def make_collate(self, tokenizer: Any) -> CaptionCollate:
        """What makes batches of captioned images."""
        return CaptionCollate(tokenizer, {"max_length": self.arguments.max_caption_tokens, "padding": True})

    def save_model(self, model: Any, folder: Path) -> None:
        super().save_model(model, folder)
        self.load_tokenizer().save_pretrained(folder)
