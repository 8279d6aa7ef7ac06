"""Checkpoints of a run: write them atomically, find, check and load the newest, remove old ones."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType

from ..errors import BadValue
from ..files import WRITE_ERRORS, read_json, write_json
from .arguments import TrainArguments


STATE_NAME = "run_state.json"
_LARGEST_STATE = 64 << 20  # bytes; it holds positions in streams of many shards
# Options that do not change the result of a run.
_WITHOUT_EFFECT = {
    *("resume", "num_workers", "num_threads", "report_to", "gradient_checkpointing", "output_dir"),
    *("checkpoint_every", "keep_checkpoints", "glance_every"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "push_every", "hub_branch", "overwrite_card"),
    # Only the product of these and the number of processes counts: `images_per_step`.
    *("batch_size", "gradient_accumulation_steps"),
}


def keep_only_learned(models: list[Any], weights: list[dict[str, Any]], output_dir: str) -> None:
    """Hook for `Accelerator.save_state`: remove frozen parameters from the checkpoint."""
    # With FSDP and DeepSpeed, this hook gets no weights: they write models themselves.
    for model, state in zip(models, weights, strict=False):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                state.pop(name, None)


def save(accelerator: Accelerator, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint under a temporary name and rename it; then remove all but the newest `keep`.

    If the write fails, it removes the partial files and raises OSError that names the newest complete checkpoint.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    if accelerator.is_main_process:
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        accelerator.save_state(str(partial), **({"exclude_frozen_parameters": True} if deepspeed else {}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(partial / STATE_NAME, state)
    except WRITE_ERRORS as error:
        free = shutil.disk_usage(folder).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({free:.0f} MB are free there): "
            f"{error}. {last_good(folder)}. Free some space and run the same command again."
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-{8 * '[0-9]'}/{STATE_NAME}"))


def last_good(folder: Path) -> str:
    """The newest complete checkpoint, in words."""
    kept = complete(folder)
    return f"last good checkpoint: {kept[-1].name if kept else 'none'}"


def load(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Restore optimiser, schedule, random states and learned weights; returns the state saved with them."""
    # A checkpoint holds no frozen weights; only FSDP's checkpoints hold all weights.
    options = {DistributedType.FSDP: {}, DistributedType.DEEPSPEED: {"load_module_strict": False}}
    accelerator.load_state(str(checkpoint), **options.get(accelerator.distributed_type, {"strict": False}))
    # Checkpoints are written between steps: the next batch is the first of its step.
    accelerator.step = 0
    return read_json(checkpoint / STATE_NAME, _LARGEST_STATE)


def check_same_run(
    arguments: TrainArguments, images_per_step: int, identity: dict[str, str], state: dict[str, Any]
) -> None:
    """Raise ValueError that names the first option, or its content, that differs from the checkpoint's run.

    `identity` holds digests of the content that was read, by option.
    """
    advice = f"choose another output_dir than {arguments.output_dir}, or pass --resume never to start over"
    before = state["arguments"]
    for name, value in asdict(arguments).items():
        if name not in _WITHOUT_EFFECT and before.get(name, value) != value:
            raise BadValue(name, value, f"this run was started with {before[name]!r}; use that, {advice}")
    if state["images_per_step"] != images_per_step:
        raise BadValue(
            "batch_size",
            arguments.batch_size,
            f"batch_size × gradient_accumulation_steps × processes is {images_per_step}, and this run was started "
            f"with {state['images_per_step']}; use that, {advice}",
        )
    for name, found in identity.items():
        if state.get("identity", {}).get(name, found) != found:
            what = f"what this run read at its start; its content has changed since: restore it, {advice}"
            raise BadValue(name, getattr(arguments, name, arguments.model), what)
