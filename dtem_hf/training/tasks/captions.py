"""What the tasks on captioned images have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

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


class CaptionCollate:
    """Batches: pixel_values [B, C, H, W]; input_ids, attention_mask and labels (-100 at padding) [B, T]; and numbers.

    The numbers are index, epoch and caption_id, [B] each.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self.tokenizer, self.options = tokenizer, options

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        text = self.tokenizer(
            [item["caption"] for item in items],
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
            **self.options,
        )
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100),
            **{name: torch.tensor([item[name] for item in items]) for name in ("index", "epoch", "caption_id")},
        }
