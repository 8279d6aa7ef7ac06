"""Measure what a training step costs, as a ratio to the unmerged backbone's forward and backward pass.

python recipes/benchmark_training.py --model facebook/deit-tiny-patch16-224 --batch_size 32
python recipes/benchmark_training.py --model facebook/deit-small-patch16-224 --autocast bfloat16    # CUDA

`plain` is the backbone without merging, forward and backward to its input. The other rows are whole training steps of
the embedding, optimiser included. `classification`, `distillation` (with its teacher), `straight_through` and `fisher`
are steps of the training program. `definition` is `classification` with soft grouping as docs/method.md section 4
defines it: r rounds over all kept entries, recorded for the backward pass. Every round runs every row once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from dtem_hf.benchmark.efficiency import peak_memory, spread
from dtem_hf.configuration import DTEMConfig
from dtem_hf.files import write_json
from dtem_hf.models.attach import attach
from dtem_hf.models.install import set_merge_config
from dtem_hf.models.timing import time_interleaved
from dtem_hf.models.vision import image_shape
from dtem_hf.ops import relaxation
from dtem_hf.programs.arguments import ModelArguments, at_least, option, parse_arguments, read_config, run_script
from dtem_hf.programs.conditions import conditions
from dtem_hf.programs.lock import only_run_in
from dtem_hf.progress import tqdm
from dtem_hf.report.tables import print_rows
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import freeze_backbone, relax
from dtem_hf.training.tasks import make_task


@dataclass(kw_only=True)
class TrainingStepArguments(ModelArguments):
    """Measure time and memory of training steps on noise: the content of images does not change the cost."""

    random_weights: bool = option("read the model's config alone, which is enough to time it", default=False)
    r: int = option("tokens merged per layer", default=16)
    batch_size: int = option("images per step", default=32)
    rounds: int = option("how often every row runs", default=10)
    autocast: Literal["no", "bfloat16", "float16"] = option("number format of the forward pass", default="no")
    output_dir: str = option("folder for training_step.json", default="runs/benchmark-training")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "rounds", "r")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and print the table."""
    arguments = parse_arguments(TrainingStepArguments, argv, __doc__ or "")
    with only_run_in(arguments.output_dir) as folder:
        path = folder / "training_step.json"
        record = measure_training_step(arguments)
        write_json(path, record)
        lines = []
        for row in record["rows"]:
            medians = [row[name]["median"] for name in ("seconds", "ratio_to_plain", "ratio_to_definition")]
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            lines.append([row["step"], *(f"{median:.3f}" for median in medians), peak])
        title = f"{arguments.model}, batch {arguments.batch_size}, r = {arguments.r}, {record['hardware']}"
        print_rows(title, ("step", "seconds", "to plain", "to definition", "peak MiB"), lines)
        print(f"written: {path}")


def measure_training_step(arguments: TrainingStepArguments) -> dict[str, Any]:
    """Run all rows in turn, `rounds` times. Returns the content of `training_step.json`."""
    a, device = arguments, arguments.choose_device()
    config = read_config(a.model)
    if a.random_weights:
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = AutoModelForImageClassification.from_pretrained(a.model)
    model = attach(model.to(device), DTEMConfig(r=a.r))
    freeze_backbone(model)
    torch.manual_seed(0)
    pixels = torch.randn(a.batch_size, *image_shape(model), device=device)
    runs = _Steps(model, pixels, a).rows()
    with tqdm(total=len(runs) * (a.rounds + 2), desc="benchmark", unit="step") as progress:
        seconds = time_interleaved(list(runs.values()), device, a.rounds, warmup=2, advance=progress.update)
    names = list(runs)
    plain, definition = names.index("plain"), names.index("definition")
    rows = [
        {
            "step": name,
            "seconds": spread(seconds[:, i]),
            "ratio_to_plain": spread(seconds[:, i] / seconds[:, plain]),
            "ratio_to_definition": spread(seconds[:, i] / seconds[:, definition]),
            "peak_bytes": peak_memory(run, device),
        }
        for i, (name, run) in enumerate(runs.items())
    ]
    return {**conditions(device), "arguments": asdict(a), "rows": rows}


class _Steps:
    def __init__(self, model: Any, pixels: Tensor, arguments: TrainingStepArguments) -> None:
        self.model, self.autocast, self.config = model, arguments.autocast, model.merge_config
        options = TrainArguments(model=arguments.model, data="noise", r=str(arguments.r))
        self.tasks = {name: make_task(name, options) for name in ("classification", "distillation", "fisher")}
        self.optimizer = torch.optim.AdamW(model.merge_parameters(), lr=1e-4)
        numbers = torch.arange(len(pixels), device=pixels.device)
        labels = torch.randint(model.config.num_labels, (len(pixels),), device=pixels.device)
        self.batch = {"pixel_values": pixels, "labels": labels, "index": numbers, "epoch": torch.zeros_like(numbers)}

    def rows(self) -> dict[str, Callable[[], None]]:
        """The steps by name."""
        straight_through = replace(self.config, relaxation="straight_through")
        return {
            "plain": self._plain,
            "classification": partial(self._learn, "classification"),
            "distillation": partial(self._learn, "distillation"),
            "straight_through": partial(self._learn, "classification", straight_through),
            "fisher": partial(self._learn, "fisher"),
            "definition": self._definition,
        }

    def _plain(self) -> None:
        pixels = self.batch["pixel_values"].clone().requires_grad_(True)
        with self.model.unmerged(), self._precision():
            loss = F.cross_entropy(self.model(pixel_values=pixels).logits.float(), self.batch["labels"])
        loss.backward()

    def _learn(self, name: str, config: Any = None) -> None:
        task = self.tasks[name]
        set_merge_config(self.model, config or self.config)
        relax(self.model, task.soft)
        with self._precision():
            loss = task.loss(self.model, self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _definition(self) -> None:
        with patch.object(relaxation, "soft_grouping", grouping_by_definition):
            self._learn("classification")

    def _precision(self) -> Any:
        if self.autocast == "no":
            return nullcontext()
        device = self.batch["pixel_values"].device
        return torch.autocast(device.type, dtype=getattr(torch, self.autocast))


def grouping_by_definition(
    scores: Tensor, r: int, top_k: int = 3, score_temperature: float = 0.1, assignment_temperature: float = 0.1
) -> Tensor:
    """Soft grouping by its definition (docs/method.md section 4), entry by entry: [B, A, B'] -> [B, A, B']."""
    kept = torch.full_like(scores, -torch.inf).scatter(-1, *reversed(scores.topk(min(top_k, scores.shape[-1]))))
    x = kept / score_temperature
    chosen = torch.zeros_like(scores)
    smallest = torch.finfo(torch.float32).eps
    for _ in range(r):
        p = (x / assignment_temperature).flatten(1).softmax(dim=-1).view_as(x)
        chosen = chosen + p
        x = x + torch.log((1 - p.sum(dim=-1, keepdim=True)).clamp(min=smallest))
    return chosen / chosen.sum(dim=-1, keepdim=True).detach().clamp(min=1)


if __name__ == "__main__":
    run_script(main)
