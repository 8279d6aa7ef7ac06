"""The training program: arguments in, an adapter folder out.

accelerate launch recipes/train.py --config recipes/configs/deit_small_imagenet1k.yaml
python recipes/train.py --model facebook/deit-tiny-patch16-224 --data path/to/images --steps 200   # a laptop's CPU
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..programs.arguments import parse_arguments, read_config
from ..programs.lock import only_run_in
from .arguments import TrainArguments
from .interruption import Interruption
from .run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse_arguments(TrainArguments, argv, __doc__ or ""))


def train(arguments: TrainArguments) -> dict[str, Any]:
    """Train, and return the content of `training.json`: best step, its validation figures, conditions.

    After SIGTERM or SIGINT it writes a checkpoint and raises SystemExit(0); the same arguments then resume. Raises
    ValueError if another run uses the output folder.
    """
    with only_run_in(arguments.output_dir), Interruption() as interruption:
        read_config(arguments.model)  # raises early if the model does not exist
        return Run(arguments, interruption).train()
