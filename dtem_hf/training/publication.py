"""Publish a run on the Hub: the best adapter so far on a branch, and the final adapter with its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..hub.client import clear_errors, make_repository
from ..hub.publishing import publish_folder
from .arguments import TrainArguments


class Publication:
    """The Hub repository of a run, for the main process only. Without `push_to_hub`, all methods do nothing."""

    def __init__(self, arguments: TrainArguments, folder: Path, say: Callable[[str], Any]) -> None:
        self.arguments = arguments
        self.repo_id = arguments.hub_model_id or ""
        self.folder = folder
        self.say = say

    def prepare(self) -> None:
        """Make the repository, and the branch if it is needed, so that access errors appear before training.

        Raises PermissionError, ConnectionError, or ValueError if a private repository is wanted and it is public.
        """
        a = self.arguments
        if a.push_to_hub:
            with clear_errors(self.repo_id, publishing=True):
                make_repository(
                    HfApi(), self.repo_id, a.hub_private_repo or None, a.hub_branch if a.push_every else None
                )

    def push_so_far(self, step: int, best_step: int) -> None:
        """Publish the best adapter so far, every `push_every` steps. An unreachable Hub does not end the run."""
        a = self.arguments
        if not a.push_to_hub or not a.push_every or step % a.push_every or step == a.steps:
            return
        try:
            self._push(f"Step {step}: best adapter so far, step {best_step}", branch=a.hub_branch, with_card=False)
        except OSError as error:
            self.say(f"step {step}: not published; training continues: {error}")

    def push(self, best_step: int) -> None:
        """Publish the final adapter with its card and, if the backbone was trained, the whole model beside it."""
        a = self.arguments
        if not a.push_to_hub:
            return
        commit = self._push(f"Adapter of step {best_step} of {a.steps}", overwrite_card=a.overwrite_card)
        if a.train_backbone:
            with clear_errors(self.repo_id, publishing=True):
                commit = HfApi().upload_folder(
                    repo_id=self.repo_id,
                    folder_path=self.folder.with_name("model"),
                    commit_message=f"Model of step {best_step} of {a.steps}",
                )
        self.say(f"published: {commit}")

    def _push(self, message: str, **options: Any) -> Any:
        private = self.arguments.hub_private_repo or None
        return publish_folder(self.folder, self.repo_id, commit_message=message, private=private, **options)
