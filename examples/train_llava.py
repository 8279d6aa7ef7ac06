"""Train an adapter for LLaVA on the language model's own loss, so that it merges patches the answers do not need.

    python examples/train_llava.py answers.csv --output my-adapter
    python examples/train_llava.py answers.csv --model llava-hf/llava-1.5-7b-hf --r 12 --steps 500

`answers.csv` has the columns image (a path relative to the file), question and answer. To train on images without
answers, use `recipes/train.py --task feature_fisher --model llava-hf/llava-1.5-7b-hf`; it needs no language model.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from dtem_hf import AutoModelForImageTextToText, AutoProcessor, DTEMConfig


PROMPT = "USER: <image>\n{} ASSISTANT:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--r", type=int, default=12, help="tokens that every layer of the vision tower merges away")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", default="bfloat16", help="in float16, as LLaVA is saved, gradients may vanish")
    parser.add_argument("--output", type=Path, default=Path("my-adapter"))
    args = parser.parse_args()

    # The language model reads merged tokens, in training as in use.
    merge = DTEMConfig(r=args.r, unmerge=False)
    model: Any = AutoModelForImageTextToText.from_pretrained(args.model, merge=merge, dtype=args.dtype)
    for parameter in model.requires_grad_(False).merge_parameters():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()  # bfloat16 would lose small steps
    processor = AutoProcessor.from_pretrained(args.model, merge=model)
    processor.tokenizer.padding_side = "right"

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Prompts with their answers; the loss is that of the answers alone."""
        images = [[Image.open(args.answers.parent / row["image"]).convert("RGB")] for row in rows]
        asked = [PROMPT.format(row["question"]) for row in rows]
        answers = [f" {row['answer']}{processor.tokenizer.eos_token}" for row in rows]
        texts = [question + answer for question, answer in zip(asked, answers, strict=True)]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for i, (image, question) in enumerate(zip(images, asked, strict=True)):
            labels[i, : processor(images=image, text=question, return_tensors="pt")["input_ids"].shape[1]] = -100
        return {**batch, "pixel_values": batch["pixel_values"].to(model.dtype), "labels": labels}

    with open(args.answers, newline="", encoding="utf-8") as file:
        dataset: Any = list(csv.DictReader(file))
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        logging_steps=max(args.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collate).train()  # merges softly
    model.eval().save_merge_adapter(args.output)
    print(f'written: {args.output}; load it with merge="{args.output}"')


if __name__ == "__main__":
    main()
