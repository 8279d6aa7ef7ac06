"""Publish an adapter on the Hub, and load it from there.

    python examples/publish_adapter.py my-adapter me/dtem-deit-tiny            # only shows what would be published
    python examples/publish_adapter.py my-adapter me/dtem-deit-tiny --push     # publishes it, as a private repository

`my-adapter` is a folder that training wrote. Log in first with `hf auth login`, or set HF_TOKEN. The same from the
command line: `dtem-hf push my-adapter me/dtem-deit-tiny --private`.
"""

import argparse
from pathlib import Path

import torch

from dtem_hf import MergeAdapter
from dtem_hf.hub.publishing import publish_folder, published_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo_id", help="user/repository; created if it does not exist")
    parser.add_argument("--push", action="store_true", help="publish; left out: a dry run without network")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    args = parser.parse_args()

    adapter = MergeAdapter.from_reference(args.folder)
    backbone = adapter.backbone
    print(f"method {adapter.config.method}, {sum(tensor.numel() for tensor in adapter.tensors.values()):,} parameters")
    print(f"for {backbone.base_model or 'a model of unrecorded name'} ({backbone.model_type})")
    if backbone.base_model is None:
        print("Its card will not say which model it is for: save it with save_merge_adapter(folder, base_model=...).")
    if not (args.folder / "evaluation.json").is_file():
        print(
            "Its card will hold no results: `dtem-hf evaluate --adapter FOLDER --write_card` measures and adds them."
        )
    for name, content in sorted(published_files(args.folder, args.repo_id).items()):
        print(f"{len(content):>10,} bytes  {name}")
    if not args.push:
        print("Nothing was published: this was a dry run. --push publishes these files in one commit.")
        return

    commit = publish_folder(args.folder, args.repo_id, private=not args.public)
    print(f"published: {commit}")
    # Anyone who may read the repository loads it like this, or with from_pretrained(..., merge="user/repo@revision").
    again = MergeAdapter.from_reference(args.repo_id)
    same = all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())
    print(f"read back: {'the same tensors' if same else 'other tensors than those that were sent'}")


if __name__ == "__main__":
    main()
