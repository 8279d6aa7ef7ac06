"""Train an adapter with transformers' Trainer, on images without labels: the frozen plain model is the teacher.

    python examples/train_with_trainer.py path/to/images --output my-adapter
    python examples/train_with_trainer.py path/to/images --model facebook/deit-small-patch16-224 --r 16 --steps 500

`recipes/train.py` does the same with validation, resuming, several processes, and a card. This is the short way.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import kl_div
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from dtem_hf import AutoModelForImageClassification, DTEMConfig


class Images(Dataset):
    def __init__(self, folder: Path, processor: Any) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        self.processor = processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = Image.open(self.paths[index]).convert("RGB")
        return {"pixel_values": self.processor(picture, return_tensors="pt")["pixel_values"][0]}


class DistillationTrainer(Trainer):
    """The loss is the KL divergence of the merged model's classes from those of the plain model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        with torch.no_grad(), self.accelerator.unwrap_model(model).unmerged():
            target = model(**inputs).logits.log_softmax(-1)
        output = model(**inputs)
        loss = kl_div(output.logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
        return (loss, output) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="facebook/deit-tiny-patch16-224")
    parser.add_argument("--r", type=int, default=16, help="tokens that every layer merges away")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("my-adapter"))
    args = parser.parse_args()

    model = AutoModelForImageClassification.from_pretrained(args.model, merge=DTEMConfig(r=args.r))
    for parameter in model.requires_grad_(False).merge_parameters():
        parameter.requires_grad_(True)  # the embedding alone learns

    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    dataset = Images(args.images, AutoImageProcessor.from_pretrained(args.model))
    trainer = DistillationTrainer(model, arguments, train_dataset=dataset)
    print(f"last loss: {trainer.train().training_loss:.4f}")

    model.eval().save_merge_adapter(args.output)  # about a megabyte
    print(f'written: {args.output}; load it with merge="{args.output}"')


if __name__ == "__main__":
    main()
