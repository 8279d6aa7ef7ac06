"""Train an adapter in a plain PyTorch loop, and compare it with ToMe on images that it was not trained on.

python examples/train_plain_loop.py path/to/images --output my-adapter
python examples/train_plain_loop.py path/to/images --model facebook/deit-small-patch16-224 --r 16 --steps 500
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import kl_div
from transformers import AutoImageProcessor

from dtem_hf import AutoModelForImageClassification, DTEMConfig


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

    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    random.Random(0).shuffle(paths)
    held_out, training = paths[: args.batch_size], paths[args.batch_size :]
    processor = AutoImageProcessor.from_pretrained(args.model)

    def read(chosen: list[Path]) -> torch.Tensor:
        pictures = [Image.open(path).convert("RGB") for path in chosen]
        return processor(pictures, return_tensors="pt")["pixel_values"]

    # Untrained, the embedding compares tokens as ToMe does.
    model: Any = AutoModelForImageClassification.from_pretrained(args.model, merge=DTEMConfig(r=args.r))
    embedding = list(model.requires_grad_(False).merge_parameters())
    for parameter in embedding:
        parameter.requires_grad_(True)

    def divergence(pixels: torch.Tensor) -> torch.Tensor:
        """KL divergence of the merged model's classes from those of the plain model, which needs no labels."""
        with torch.no_grad(), model.unmerged():
            target = model(pixels).logits.log_softmax(-1)
        return kl_div(model(pixels).logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    test = read(held_out)
    with torch.no_grad():
        before = divergence(test).item()  # in eval mode tokens are merged hard, as they will be in use

    optimizer = torch.optim.AdamW(embedding, lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    model.train()  # merges softly, so that gradients reach the embedding
    for step in range(args.steps):
        loss = divergence(read(random.sample(training, min(args.batch_size, len(training)))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(embedding, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        print(f"KL on {len(held_out)} held-out images: {before:.4f} before, {divergence(test).item():.4f} after")
    model.save_merge_adapter(args.output)
    print(f'written: {args.output}; load it with merge="{args.output}"')


if __name__ == "__main__":
    main()
