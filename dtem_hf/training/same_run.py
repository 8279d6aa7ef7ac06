"""Check that a checkpoint belongs to the run that the user started."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import BadValue
from .arguments import TrainArguments


# Options that do not change the result of a run.
_WITHOUT_EFFECT = {
    *("resume", "num_workers", "num_threads", "report_to", "gradient_checkpointing", "output_dir"),
    *("checkpoint_every", "keep_checkpoints", "glance_every"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "push_every", "hub_branch", "overwrite_card"),
    # Only the product of these and the number of processes counts: `images_per_step`.
    *("batch_size", "gradient_accumulation_steps"),
}


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
