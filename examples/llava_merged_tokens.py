"""Ask LLaVA or PaliGemma about an image. The language model reads merged tokens, so its prompt is shorter.

    python examples/llava_merged_tokens.py photo.jpg "What is this?"
    python examples/llava_merged_tokens.py photo.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --r 12

`unmerge=False` gives the language model merged tokens. The prompt then needs one image placeholder for each merged
token: `dtem_hf.AutoProcessor.from_pretrained(..., merge=model)` writes them.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dtem_hf import AutoModelForImageTextToText, AutoProcessor, ToMeConfig


PROMPTS = {"llava": "USER: <image>\n{} ASSISTANT:", "paligemma": "<image> {}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--r", type=int, default=12, help="tokens that every layer of the vision tower merges away")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, …; auto: as it was saved")
    args = parser.parse_args()

    merge = ToMeConfig(r=args.r, unmerge=False)
    model: Any = AutoModelForImageTextToText.from_pretrained(args.model, merge=merge, dtype=args.dtype).eval()
    processor = AutoProcessor.from_pretrained(args.model, merge=model)
    picture = Image.open(args.image).convert("RGB")
    text = PROMPTS[model.config.model_type].format(args.question)

    @torch.inference_mode()
    def answer() -> tuple[str, int]:
        """The answer, and how many tokens the language model read before it wrote."""
        inputs = processor(images=picture, text=text, return_tensors="pt").to(model.device, model.dtype)
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        return processor.decode(tokens[0, length:], skip_special_tokens=True).strip(), length

    said, length = answer()
    model.set_reduction(0)  # the processor asks the model at every call: a new r needs no new processor
    plain, plain_length = answer()
    print(f"merged, a prompt of {length} tokens: {said}")
    print(f"plain, a prompt of {plain_length} tokens: {plain}")


if __name__ == "__main__":
    main()
