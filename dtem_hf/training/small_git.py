"""A small GIT, trained from scratch on captioned images: a captioning model for tests and examples without a Hub.

python recipes/train_small_git.py --images path/to/flickr8k --captions captions.txt --output_dir runs/small-git
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    DataCollatorForLanguageModeling,
    GitConfig,
    GitForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ..data.captioned_images import ImageFolder, hold_out
from ..data.captions import read_annotations
from ..errors import BadValue
from ..files import write_json
from ..programs.arguments import above_zero, at_least, option, parse_arguments
from ..programs.conditions import command, hardware, versions
from ..programs.lock import only_run_in
from ..progress import tqdm


_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


@dataclass(kw_only=True)
class SmallGitArguments:
    """Train a small GIT from scratch."""

    images: str = option("folder of images")
    captions: str = option("table with the columns image and caption, like Flickr8k's, or COCO's annotations")
    validation_size: int = option("images to leave out: those that the training program holds out", default=0)
    output_dir: str = option("folder for the model, its processor and training.json", default="runs/small-git")
    steps: int = option("optimiser steps", default=800)
    batch_size: int = option("images per step, with one caption each", default=32)
    lr: float = option("largest learning rate", default=1e-3)
    image_size: int = option("pixels in height and width", default=96)
    patch_size: int = option("pixels in height and width of a patch", default=12)
    hidden_size: int = option("width of the image encoder and of the decoder", default=128)
    vision_layers: int = option("layers of the image encoder", default=4)
    text_layers: int = option("layers of the decoder", default=2)
    vocab_size: int = option("largest number of word pieces", default=2000)
    max_tokens: int = option("longest caption in word pieces; longer captions are cut", default=24)
    seed: int = option("seed of every random draw", default=0)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "vision_layers", "text_layers", "vocab_size")
        at_least(self, 1, "image_size", "patch_size", "hidden_size", "max_tokens")
        at_least(self, 0, "validation_size")
        above_zero(self, "lr")
        if self.image_size % self.patch_size:
            raise BadValue("patch_size", self.patch_size, f"a divisor of image_size {self.image_size}")
        if self.hidden_size % 4:
            raise BadValue("hidden_size", self.hidden_size, "a multiple of 4, as there are four heads")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    arguments = parse_arguments(SmallGitArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir):
        record = train_small_git(arguments)
    print(f"loss {record['first_loss']:.3f} at the start, {record['last_loss']:.3f} at the end")
    print(f"written: {arguments.output_dir}")


def train_small_git(arguments: SmallGitArguments) -> dict[str, Any]:
    """Train and save model, tokenizer and image processor; returns the content of `training.json`."""
    started = time.perf_counter()
    images, _ = hold_out(read_annotations(arguments.captions), arguments.validation_size)
    if not images:
        raise BadValue("validation_size", arguments.validation_size, "fewer than the captioned images")
    captions = [image.captions for image in images.values()]
    tokenizer = make_tokenizer([text for texts in captions for text in texts], arguments.vocab_size)
    side = {"height": arguments.image_size, "width": arguments.image_size}
    processor = CLIPImageProcessorPil(size=side, do_center_crop=False)
    torch.manual_seed(arguments.seed)
    model = GitForCausalLM(make_config(arguments, tokenizer)).train()
    # The images are small: read each once and keep all in memory.
    pictures = ImageFolder(images, Path(arguments.images), processor)
    places = tqdm(range(len(pictures)), desc="read", unit="image")
    pixels = torch.stack([pictures[i]["pixel_values"] for i in places])

    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # pads, and leaves padding out of the loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    draw = torch.Generator().manual_seed(arguments.seed)
    losses: list[float] = []
    progress = tqdm(range(arguments.steps), desc="train a small GIT", unit="step")
    for _ in progress:
        chosen = torch.randint(len(captions), (arguments.batch_size,), generator=draw)
        drawn = (captions[i] for i in chosen.tolist())
        texts = [own[int(torch.randint(len(own), (), generator=draw))] for own in drawn]
        words = tokenizer(texts, truncation=True, max_length=arguments.max_tokens)["input_ids"]
        loss = model(pixel_values=pixels[chosen], **collate([{"input_ids": ids} for ids in words])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    output = Path(arguments.output_dir)
    model.eval().save_pretrained(output)
    tokenizer.save_pretrained(output)
    processor.save_pretrained(output)
    record = {
        "command": command(),
        "arguments": asdict(arguments),
        "num_images": len(captions),
        "num_captions": sum(map(len, captions)),
        "first_loss": losses[0],
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
    }
    write_json(output / "training.json", record)
    return record


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case word pieces learned from captions, with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(_SPECIAL), show_progress=False)
    )
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def make_config(arguments: SmallGitArguments, tokenizer: PreTrainedTokenizerFast) -> GitConfig:
    """The config of a GIT of the size in the arguments."""
    width = arguments.hidden_size
    sizes: dict[str, Any] = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 4 * width}
    # With GIT's default of 0.02, such a narrow model does not learn to use the image.
    sizes["initializer_range"] = width**-0.5
    return GitConfig(
        vision_config={
            **sizes,
            "num_hidden_layers": arguments.vision_layers,
            "image_size": arguments.image_size,
            "patch_size": arguments.patch_size,
        },
        **sizes,
        num_hidden_layers=arguments.text_layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
