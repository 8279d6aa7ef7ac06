"""One run of the training program, in each of its processes."""

from __future__ import annotations

import errno
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from torch.distributed.tensor import DTensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ..errors import BadValue
from ..files import WRITE_ERRORS, full_disk, remove_leftovers
from ..hub.adapter import MergeAdapter, mean_adapter
from ..models.install import load_embedding, merging_of, recorded_states, set_merge_config
from ..programs.conditions import hardware
from ..programs.identity import weights_digest
from ..progress import tqdm
from . import checkpoints
from .arguments import TrainArguments
from .feed import IndexedFeed, StreamedFeed, loader
from .interruption import Interruption
from .parameters import choose_learned, drawn_for, optimizer_groups, relax
from .publication import Publication
from .results import Results
from .step_outcome import gather_outcome, raise_not_finite
from .tasks import make_task
from .threads import use_threads
from .trackers import LOGS_NAME, Metrics, wanted_trackers
from .unreadable_images import UNREADABLE
from .validation import Stopped, Validation


class Run:
    """A run. The constructor loads model and data; `train` resumes from the newest checkpoint, if there is one."""

    def __init__(self, arguments: TrainArguments, interruption: Interruption | None = None) -> None:
        self.arguments = a = replace(arguments)
        self.interruption = interruption or Interruption()
        self.output, self.checkpoints = Path(a.output_dir), Path(a.output_dir, "checkpoints")
        self.accelerator = Accelerator(
            # Accumulation goes by the number of batches: they are read ahead, so the end of the data is no step's end.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=a.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=a.mixed_precision,
            log_with=wanted_trackers(a.report_to) or None,
            project_config=ProjectConfiguration(str(self.output), str(self.output / LOGS_NAME)),
        )
        use_threads(a.num_threads, self.accelerator.device)
        self.publication = Publication(a, self.output / "adapter", self.accelerator.print)
        if self.accelerator.is_main_process:
            self.publication.prepare()
        self.metrics = Metrics(self.accelerator, self.output)
        self.task = make_task(a.task, a)
        self.results = Results(a, self.accelerator, self.task)
        set_seed(a.seed)
        self.model = self.task.load_model()
        plain = {name: value for name, value in self.model.state_dict().items() if "merge_embedding" not in name}
        self.identity = {"model": weights_digest(plain)}
        if a.start_from:
            adapter = mean_adapter([MergeAdapter.from_reference(each) for each in a.start_from])
            load_embedding(self.model, adapter)
            self.identity["start_from"] = weights_digest(adapter.tensors)
        if a.train_backbone:
            self.task.keep_teacher(self.model)
            # The adapter belongs to the trained backbone, and not to the one that training began with.
            self.model.name_or_path = str(self.results.model)
        choose_learned(self.model, a.train_backbone)
        relax(self.model, self.task.soft, a.train_backbone)
        if a.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.data = self.task.load_data(self.model)
        self.identity |= self.data.identity
        self._count_steps()
        feed = IndexedFeed if self.data.rows is None else StreamedFeed
        self.feed = feed(a, self.accelerator, self.data)
        held_out = loader(a, self.data, self.data.validation, batch_size=a.batch_size)
        self.validation = Validation(self.accelerator, held_out, self.task, self._stopping)
        self._prepare()
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {}
        self.unreadable: list[str] = []
        self.position: Any = None
        self.validation_due = True

    @property
    def images_per_step(self) -> int:
        """Images of one optimiser step, over all processes."""
        a = self.arguments
        return a.batch_size * a.gradient_accumulation_steps * self.accelerator.num_processes

    def _count_steps(self) -> None:
        a = self.arguments
        if a.epochs is None:
            return
        if self.data.num_images is None:
            raise BadValue("epochs", a.epochs, "steps instead: the number of images in this stream is not known")
        a.steps = max(1, round(a.epochs * self.data.num_images / self.images_per_step))

    def _prepare(self) -> None:
        a = self.arguments
        optimizer = torch.optim.AdamW(optimizer_groups(self.model, a), lr=a.lr, weight_decay=a.weight_decay)
        self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=a.warmup_steps,
            num_training_steps=a.steps,
            min_lr_rate=min(a.min_lr / a.lr, 1.0) if a.lr else 0.0,
        )
        # Some parameters may get no gradient: the embedding of a layer that merges nothing, a head that the task does
        # not use, the projections under a hard merge, and the first layer's exponents.
        unused = a.train_backbone or a.relaxation == "hard" or a.learn_exponents
        drawn = any(not isinstance(r, int) or r == 0 for r in a.sample_r)  # some layers may merge nothing
        if unused or drawn or 0 in self.model.merge_plan().reductions:
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.accelerator.state.deepspeed_plugin is not None:
            # DeepSpeed clips gradients itself, and has no DataLoader from which to read the batch size.
            sizes = {"train_micro_batch_size_per_gpu": a.batch_size, "gradient_clipping": a.max_grad_norm}
            self.accelerator.state.deepspeed_plugin.deepspeed_config |= sizes
        self.results.prepare(self.model)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        # The scheduler is not prepared: accelerate would step it once per process.
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.accelerator.register_save_state_pre_hook(checkpoints.keep_only_learned)

    def train(self) -> dict[str, Any]:
        """Train to the last step, and return the content of `training.json`.

        After an interruption it writes a checkpoint and raises SystemExit(0).
        """
        self._enter_output()
        a, learned = self.arguments, self.model.num_parameters(only_trainable=True)
        self.accelerator.print(
            f"{learned:,} parameters learn for {a.steps} steps of {self.images_per_step} images: "
            f"{self.accelerator.num_processes} × {hardware(self.accelerator.device)}, "
            f"precision {self.accelerator.mixed_precision}"
        )
        try:
            for _ in self._steps():
                if self.step % a.checkpoint_every == 0 or self.step == a.steps:
                    self._checkpoint()
                if self.accelerator.is_main_process:
                    self.publication.push_so_far(self.step, self.best["step"])
            return self._finish()
        except Stopped:
            self._stop()
        except WRITE_ERRORS as error:
            if not full_disk(error):
                raise
            kept = checkpoints.last_good(self.checkpoints)
            raise OSError(
                errno.ENOSPC,
                f"no space left under {self.output}; {kept}. Free some space and run the same command again",
            ) from error

    def _steps(self) -> Iterator[None]:
        """Take the remaining steps, with the validations that are due. Raises Stopped after an interruption."""
        a = self.arguments
        if self._stopping():
            raise Stopped
        if self.validation_due:
            self._validate()
        progress = tqdm(
            total=a.steps, initial=self.step, desc="train", unit="step", disable=not self.accelerator.is_main_process
        )
        began = time.perf_counter()
        losses: list[torch.Tensor] = []
        batches: list[dict[str, Any]] = []
        for batch, share in self.feed.with_shares(self.feed.batches(self.step, self.position), self.task.num_terms):
            set_merge_config(self.model, a.config_at(self.step))
            loss, norm = self._backward(batch, share)
            losses.append(loss)
            batches.append(batch)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            figures, stop = self._gather(losses, norm, batches)
            losses, batches = [], []
            took = time.perf_counter() - began
            self.seconds, began = self.seconds + took, began + took
            rate = self.images_per_step / took
            progress.update()
            progress.set_postfix(loss=f"{figures['loss']:.4f}", images_per_s=f"{rate:.1f}")
            if a.glance_every and self.step % a.glance_every == 0:
                figures.update(self._glance())
            self.metrics.log(self.step, figures, {"images_per_second": rate})
            self.validation_due = self.step % a.validate_every == 0 or self.step == a.steps
            if stop and self.step < a.steps:
                raise Stopped
            if self.validation_due:
                self._validate()
            yield
        progress.close()

    def _backward(self, batch: dict[str, Any], share: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch; returns its share of the loss, and the gradient norm before clipping (0 within a step)."""
        norm = torch.zeros(())
        with self.accelerator.accumulate(self.wrapped):
            with self.accelerator.autocast(), drawn_for(batch, self.arguments), recorded_states(self.model) as states:
                loss = self.task.loss(self.wrapped, self.model, batch)
                terms = [merging_of(self.model).method.loss_term(state) for state in states]
                loss = share * sum((term for term in terms if term is not None), start=loss)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                # Pass all parameters: FSDP cannot clip a part of them. Frozen parameters have no gradient.
                norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.arguments.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.scheduler.step()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return loss.detach(), torch.as_tensor(0.0 if norm is None else norm).detach()

    def _gather(
        self, losses: list[torch.Tensor], norm: torch.Tensor, batches: list[dict[str, Any]]
    ) -> tuple[dict[str, float], bool]:
        """The figures of a step over all processes, and whether a process was interrupted."""
        unreadable = [reason for batch in batches for reason in batch.get(UNREADABLE, ())]
        outcome = gather_outcome(self.accelerator, losses, norm, self.interruption.reason is not None, len(unreadable))
        # Scaled float16 gradients may overflow: the scaler skips such a step and lowers the scale.
        if not outcome.losses_are_finite or (self.accelerator.scaler is None and not math.isfinite(outcome.norm)):
            names = [self.feed.names(batch) for batch in batches]
            raise_not_finite(self.accelerator, outcome, self.step, names, self.checkpoints)
        if outcome.unreadable:
            self._report_unreadable(unreadable)
        figures = {"loss": outcome.loss, "lr": self.scheduler.get_last_lr()[0]}
        if math.isfinite(outcome.norm):
            figures["grad_norm"] = outcome.norm
        return figures, outcome.stop

    def _report_unreadable(self, reasons: list[str]) -> None:
        found = set(gather_object(reasons)) - set(self.unreadable)
        self.unreadable = sorted({*self.unreadable, *found})
        for reason in sorted(found):
            self.accelerator.print(f"step {self.step}: left out: {reason} ({len(self.unreadable)} so far)")

    def _glance(self) -> dict[str, Any]:
        set_merge_config(self.model, self.arguments.merge_config())
        figures = self.validation.glance(self.model, lambda soft: relax(self.model, soft))
        relax(self.model, self.task.soft, self.arguments.train_backbone)
        return figures

    def _validate(self) -> None:
        relax(self.model, False)
        set_merge_config(self.model, self.arguments.merge_config())
        try:
            figures = self.validation(self.model)
        finally:
            relax(self.model, self.task.soft, self.arguments.train_backbone)
        if self.task.ranked_by not in figures:
            raise BadValue("task", self.task.name, "validation images with labels")
        self.metrics.log(self.step, {"validation": figures})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.accelerator.print(f"step {self.step}: hard model on {len(self.data.validation)} items: {shown}")
        if not self.best or figures[self.task.ranked_by] < self.best["validation"][self.task.ranked_by]:
            self.best = {"step": self.step, "validation": figures}
            self.results.save(self.wrapped, self.model, self._record())
        self.validation_due = False

    def _state(self) -> dict[str, Any]:
        """The values, beside weights and optimiser, that change from step to step."""
        names = ("step", "seconds", "best", "validation_due", "unreadable")
        return {name: getattr(self, name) for name in names}

    def _checkpoint(self) -> None:
        state = {
            **self._state(),
            "position": self.feed.state_after(self.step),
            "images_per_step": self.images_per_step,
            "run_id": self.metrics.run_id,
            "arguments": asdict(self.arguments),
            "identity": self.identity,
        }
        checkpoints.save(self.accelerator, self.checkpoints, self.step, state, self.arguments.keep_checkpoints)

    def _stopping(self) -> bool:
        """Whether any process was interrupted; every process must call it."""
        flag = torch.tensor([self.interruption.reason is not None], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _stop(self) -> NoReturn:
        """Write a checkpoint, unless this step has one, and end the process with exit status 0."""
        newest = self.checkpoints / f"step-{self.step:08d}"
        if self.step and newest not in checkpoints.complete(self.checkpoints):
            self._checkpoint()
        reason = next((reason for reason in gather_object([self.interruption.reason]) if reason), "a signal")
        where = f"the checkpoint is {newest}" if self.step else "nothing was learned yet"
        self.accelerator.print(
            f"stopped by {reason} after step {self.step} of {self.arguments.steps}; {where}. "
            "The same command resumes from there."
        )
        self.accelerator.end_training()
        raise SystemExit(0)

    def _enter_output(self) -> None:
        if self.accelerator.is_main_process:
            for folder in (self.output, self.results.adapter):
                remove_leftovers(folder)
            if self.arguments.resume == "never":
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        found = checkpoints.complete(self.checkpoints)
        if found:
            state = checkpoints.load(self.accelerator, found[-1])
            checkpoints.check_same_run(self.arguments, self.images_per_step, self.identity, state)
            for name in (*self._state(), "position"):
                setattr(self, name, state[name])
            self.metrics.run_id = state.get("run_id", self.metrics.run_id)
            self.accelerator.print(f"resuming from {found[-1]} (step {self.step} of {self.arguments.steps})")
        self.metrics.start(asdict(self.arguments), self.step)

    def _record(self) -> dict[str, Any]:
        return self.results.record(self.data.num_images, self.images_per_step, self._state())

    def _finish(self) -> dict[str, Any]:
        record, skipped = self.results.write_record(self._record()), len(self.unreadable)
        self.accelerator.print(
            f"best step {self.best['step']}: {self.task.ranked_by} "
            f"{self.best['validation'][self.task.ranked_by]:.4g}; adapter in {self.results.adapter}"
            + (f", the whole model in {self.results.model}" if self.arguments.train_backbone else "")
            + (f"; {skipped} unreadable images were left out" if skipped else "")
        )
        if self.best["step"] == 0:
            self.accelerator.print(
                "Training did not help: no step was better than the start, so the adapter holds the start. Try more "
                "steps, or a lower --lr."
            )
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self.publication.push(self.best["step"])
        return record
