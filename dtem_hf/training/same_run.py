"""Whether a checkpoint belongs to the run that was asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import BadValue
from .arguments import TrainArguments


# Options that change how a run is carried out and not what comes out of it.
_NOT_PART_OF_A_RUN = {
    "resume",
    "num_workers",
    "num_threads",
    "keep_checkpoints",
    "checkpoint_every",
    "glance_every",
    "report_to",
    "gradient_checkpointing",
    "output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "push_every",
    "hub_branch",
    "overwrite_card",
    # Only their product, with the number of processes, is part of a run.
    "batch_size",
    "gradient_accumulation_steps",
}


def check_same_run(arguments: TrainArguments, images_per_step: int, state: dict[str, Any]) -> None:
    """Raise ValueError that names the first option that differs from those a checkpoint's run was started with."""
    advice = f"choose another output_dir than {arguments.output_dir}, or pass --resume never to start over"
    before = state["arguments"]
    for name, value in asdict(arguments).items():
        if name not in _NOT_PART_OF_A_RUN and before.get(name, value) != value:
            raise BadValue(name, value, f"this run was started with {before[name]!r}; go on with that, {advice}")
    if state["images_per_step"] != images_per_step:
        raise BadValue(
            "batch_size",
            arguments.batch_size,
            f"batch_size × gradient_accumulation_steps × processes is {images_per_step}, and this run was started "
            f"with {state['images_per_step']}; go on with that, {advice}",
        )
