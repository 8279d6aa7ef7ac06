"""Zero-shot classification and image search with a merged CLIP or SigLIP.

python examples/clip_search.py path/to/images --labels "a photo of a cat" "a photo of a dog"
python examples/clip_search.py path/to/images --query "a red car" --model google/siglip-base-patch16-224
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoProcessor

from dtem_hf import AutoModel, ToMeConfig


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="openai/clip-vit-base-patch16")
    parser.add_argument("--r", type=int, default=8, help="tokens that every layer of the image tower merges away")
    parser.add_argument("--labels", nargs="+", help="texts to choose from, for every image")
    parser.add_argument("--query", help="a text to search the images for")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    if not args.labels and not args.query:
        parser.error("give --labels, --query, or both")

    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model, merge=ToMeConfig(r=args.r)).eval()

    @torch.inference_mode()
    def embed_texts(texts: list[str]) -> torch.Tensor:
        padding = "max_length" if model.config.model_type.startswith("siglip") else True
        inputs = processor(text=texts, return_tensors="pt", padding=padding)
        return normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    @torch.inference_mode()
    def embed_images() -> torch.Tensor:
        found = []
        for first in range(0, len(paths), args.batch_size):
            pictures = [Image.open(path).convert("RGB") for path in paths[first : first + args.batch_size]]
            inputs = processor(images=pictures, return_tensors="pt")
            found.append(model.get_image_features(**inputs).pooler_output)
        return normalize(torch.cat(found), dim=-1)

    images = embed_images()  # [images, width]: save this as the index of a search
    with model.unmerged():
        plain = embed_images()
    print(f"cosine to the plain embeddings: {cosine_similarity(images, plain).mean():.4f} on {len(paths)} images")

    if args.labels:
        best = (images @ embed_texts(args.labels).T).argmax(-1)
        for path, index in zip(paths, best.tolist(), strict=True):
            print(f"{path.relative_to(args.images)}\t{args.labels[index]}")
    if args.query:
        scores = (images @ embed_texts([args.query]).T).squeeze(-1)
        for score, index in zip(*scores.topk(min(5, len(paths))), strict=True):
            print(f"{score:.3f}\t{paths[index].relative_to(args.images)}")


if __name__ == "__main__":
    main()
