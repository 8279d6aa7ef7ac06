"""The training program: arguments in, an adapter folder out.

accelerate launch recipes/train.py --config recipes/configs/deit_small_imagenet1k.yaml
python recipes/train.py --model facebook/deit-tiny-patch16-224 --data path/to/images --steps 200   # a laptop's CPU
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ..adapter import MergeAdapter
from ..arguments import parse_arguments
from ..card import TRAINING_NAME, refreshed_card
from ..conditions import command, data_name, hardware, versions
from ..errors import BadValue
from ..files import replacing_folder, write_json, write_text
from ..modeling import load_embedding
from . import checkpoints
from .arguments import TrainArguments
from .curriculum import Curriculum
from .parameters import choose_learned, dropout_drawn_for, learned_parameters, optimizer_groups, relax
from .publication import Publication
from .stream import ImageStream
from .tasks import make_task
from .validation import Validation


# Options that change how a run is carried out and not what comes out of it.
_NOT_PART_OF_A_RUN = {
    "resume",
    "num_workers",
    "keep_checkpoints",
    "checkpoint_every",
    "gradient_checkpointing",
    "output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "push_every",
    "hub_branch",
    "overwrite_card",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    train(parse_arguments(TrainArguments, argv, __doc__ or ""))


def train(arguments: TrainArguments) -> dict[str, Any]:
    """Train, and return what is written to `training.json`: best step, its validation figures, conditions."""
    return _Run(arguments).train()


class _Run:
    def __init__(self, arguments: TrainArguments) -> None:
        self.arguments = arguments
        self.output = Path(arguments.output_dir)
        self.accelerator = Accelerator(gradient_accumulation_steps=arguments.gradient_accumulation_steps)
        self.publication = Publication(arguments, self.output / "adapter", self.accelerator.print)
        if self.accelerator.is_main_process:
            self.publication.prepare()
        self.task, self.curriculum = make_task(arguments), Curriculum(arguments)
        set_seed(arguments.seed)
        self.model = self.task.load_model()
        if arguments.start_from:
            load_embedding(self.model, MergeAdapter.from_reference(arguments.start_from))
        if arguments.train_backbone:
            self.task.keep_teacher(self.model)
            # What the adapter belongs to is no longer the backbone that training began with.
            self.model.name_or_path = str(self.output / "model")
        choose_learned(self.model, arguments.train_backbone)
        relax(self.model, self.task.soft, arguments.train_backbone)
        if arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.data = self.task.load_data(self.model)
        held_out = self._loader(self.data.validation, batch_size=arguments.batch_size)
        self.validation = Validation(self.accelerator, held_out, self.task)
        self._prepare()
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {}

    def _prepare(self) -> None:
        a = self.arguments
        optimizer = torch.optim.AdamW(optimizer_groups(self.model, a), lr=a.lr, weight_decay=a.weight_decay)
        self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, num_warmup_steps=a.warmup_steps, num_training_steps=a.steps, min_lr=min(a.min_lr, a.lr)
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        # Not prepared: accelerate would step it once per process.
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.accelerator.register_save_state_pre_hook(checkpoints.keep_only_learned)

    def train(self) -> dict[str, Any]:
        self._enter_output()
        a = self.arguments
        if self.step == 0 and not self.best:
            self._validate()
        started, before = time.perf_counter(), self.seconds
        progress = tqdm(
            total=a.steps, initial=self.step, desc="train", unit="step", disable=not self.accelerator.is_main_process
        )
        losses: list[torch.Tensor] = []
        for batch in self._batches():
            self.curriculum.enter(self.model, self.step)
            losses.append(self._backward(batch))
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            loss = self._finite_mean(losses, batch)
            losses = []
            images = self.step * a.batch_size * a.gradient_accumulation_steps * self.accelerator.num_processes
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{images / self.seconds:.1f}")
            self._log({"step": self.step, "loss": loss, "lr": self.scheduler.get_last_lr()[0]})
            if self.step % a.validate_every == 0 or self.step == a.steps:
                self._validate()
            if self.step % a.checkpoint_every == 0 or self.step == a.steps:
                self._checkpoint()
            if self.accelerator.is_main_process:
                self.publication.push_so_far(self.step, self.best["step"])
        progress.close()
        return self._finish()

    def _batches(self) -> Any:
        a = self.arguments
        per_step = a.gradient_accumulation_steps * self.accelerator.num_processes
        stream = ImageStream(len(self.data.train), a.batch_size, self.step * per_step, a.steps * per_step, a.seed)
        return self.accelerator.prepare_data_loader(self._loader(self.data.train, batch_sampler=stream))

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, collate_fn=self.data.collate, num_workers=self.arguments.num_workers, **options)

    def _backward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.accelerator.accumulate(self.wrapped):
            with self.accelerator.autocast(), dropout_drawn_for(batch, self.arguments):
                loss = self.task.loss(self.wrapped, self.model, batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(learned_parameters(self.model), self.arguments.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.scheduler.step()
        return loss.detach()

    def _finite_mean(self, losses: list[torch.Tensor], batch: dict[str, torch.Tensor]) -> float:
        loss = self.accelerator.gather(torch.stack(losses)).mean().item()
        if not math.isfinite(loss):
            kept = checkpoints.complete(self.output / "checkpoints")
            raise FloatingPointError(
                f"loss is {loss} at step {self.step}, images {batch['index'].tolist()}; "
                f"last good checkpoint: {kept[-1].name if kept else 'none'}. Lower lr, or start from init='keys'."
            )
        return loss

    def _validate(self) -> None:
        relax(self.model, False)
        self.curriculum.leave(self.model)
        figures = self.validation(self.model)
        relax(self.model, self.task.soft, self.arguments.train_backbone)
        if self.task.ranked_by not in figures:
            raise BadValue("task", self.task.name, "validation images with labels")
        self._log({"step": self.step, "validation": figures})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.accelerator.print(f"step {self.step}: hard model on {len(self.data.validation)} items: {shown}")
        if not self.best or figures[self.task.ranked_by] < self.best["validation"][self.task.ranked_by]:
            self.best = {"step": self.step, "validation": figures}
            self._save_adapter()

    def _save_adapter(self) -> None:
        if self.accelerator.is_main_process:
            if self.arguments.train_backbone:
                with replacing_folder(self.output / "model") as folder:
                    self.task.save_model(self.model, folder)
            with refreshed_card(self.output / "adapter") as folder:
                self.model.save_merge_adapter(folder, base_model=self.arguments.base_model)
                write_json(folder / TRAINING_NAME, self._summary())

    def _checkpoint(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "best": self.best, "arguments": asdict(self.arguments)}
        checkpoints.save(
            self.accelerator, self.output / "checkpoints", self.step, state, self.arguments.keep_checkpoints
        )

    def _enter_output(self) -> None:
        folder = self.output / "checkpoints"
        if self.arguments.resume == "never":
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                (self.output / "metrics.jsonl").unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        found = checkpoints.complete(folder)
        if not found:
            if self.accelerator.is_main_process:
                (self.output / "metrics.jsonl").unlink(missing_ok=True)
            return
        state = checkpoints.load(self.accelerator, found[-1])
        self._check_same_run(state["arguments"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self._forget_metrics_after(self.step)
        self.accelerator.print(f"going on from {found[-1]} (step {self.step} of {self.arguments.steps})")

    def _check_same_run(self, before: dict[str, Any]) -> None:
        for name, value in asdict(self.arguments).items():
            if name not in _NOT_PART_OF_A_RUN and before.get(name, value) != value:
                raise BadValue(
                    name,
                    value,
                    f"the run in {self.output} was started with {before[name]!r}; go on with that, choose another "
                    "output_dir, or pass --resume never to start over",
                )

    def _forget_metrics_after(self, step: int) -> None:
        path = self.output / "metrics.jsonl"
        if self.accelerator.is_main_process and path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in lines))

    def _log(self, figures: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

    def _summary(self) -> dict[str, Any]:
        a = self.arguments
        processes = self.accelerator.num_processes
        return {
            "command": command(),
            "arguments": asdict(a),
            "data": {"name": data_name(a.data), "num_images": len(self.data.train)},
            "steps": self.step,
            "images_seen": self.step * a.batch_size * a.gradient_accumulation_steps * processes,
            "seconds": round(self.seconds, 1),
            "best_step": self.best["step"],
            "best_validation": self.best["validation"],
            "seed": a.seed,
            "versions": versions(),
            "hardware": f"{processes} × {hardware(self.accelerator.device)}",
        }

    def _finish(self) -> dict[str, Any]:
        summary = self._summary()
        if self.accelerator.is_main_process:
            with refreshed_card(self.output / "adapter") as folder:
                write_json(folder / TRAINING_NAME, summary)
        self.accelerator.print(
            f"best step {self.best['step']}: {self.task.ranked_by} "
            f"{self.best['validation'][self.task.ranked_by]:.4f}; "
            f"adapter in {self.output / 'adapter'}"
            + (f", the whole model in {self.output / 'model'}" if self.arguments.train_backbone else "")
        )
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self.publication.push(self.best["step"])
        return summary
