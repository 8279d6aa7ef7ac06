"""Choose which parameters learn, their learning rates, and the mode (soft or hard, dropout) of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..data.augmentation import drawn_from
from ..families import find_encoder
from ..models.install import merged_layers
from .arguments import TrainArguments


def freeze_backbone(model: Any) -> None:
    """Train only the embedding, with soft merging; the backbone's dropout stays off."""
    choose_learned(model, train_backbone=False)
    relax(model, True)


def choose_learned(model: Any, train_backbone: bool) -> None:
    """Set which parameters get gradients: the embedding's, and with `train_backbone` the backbone's."""
    model.requires_grad_(train_backbone)
    for parameter in model.merge_parameters():
        parameter.requires_grad_(True)


def learned_parameters(model: Any) -> Iterator[nn.Parameter]:
    """The parameters that get gradients."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def relax(model: Any, soft: bool, train_backbone: bool = False) -> None:
    """Make a model merge softly or hard. Dropout and drop path are on only with `soft` and `train_backbone`."""
    model.train(soft and train_backbone)
    for layer in merged_layers(model):
        layer.training = soft


@contextmanager
def drawn_for(batch: Mapping[str, Any], arguments: TrainArguments) -> Iterator[None]:
    """Inside the block, dropout and dTPS's draws depend only on the seed and the batch's first item.

    So a resumed run repeats them.
    """
    with drawn_from((arguments.seed, int(batch["epoch"][0]), int(batch["index"][0]), 2)):
        yield


def optimizer_groups(model: Any, arguments: TrainArguments) -> list[dict[str, Any]]:
    """The optimiser's parameter groups, each with its learning rate.

    Projections have `lr`, exponents and norms `aggregation_lr`, shifts `shift_lr`, and a backbone that learns
    `backbone_lr`. With `layer_decay` d, layer i of L (from 1) has d^(L + 1 - i) of the backbone's rate, patch and
    position embeddings d^(L + 1), and modules behind the layers all of it (BEiT, arXiv 2106.08254). Weights of linear
    maps and convolutions decay; biases, norms and positions do not.
    """
    a = arguments
    embedding = list(model.merge_parameters())
    learned = find_encoder(model)[1].merge_embedding
    aggregation, shifts = list(learned.aggregation_parameters()), list(learned.shifts.parameters())
    others = {id(parameter) for parameter in (*aggregation, *shifts)}
    projections = [parameter for parameter in embedding if id(parameter) not in others]
    result = [{"name": "embedding", "params": projections, "lr": a.lr, "weight_decay": a.weight_decay}]
    if aggregation:
        result.append({"name": "aggregation", "params": aggregation, "lr": a.aggregation_lr, "weight_decay": 0.0})
    if shifts:
        result.append({"name": "shifts", "params": shifts, "lr": a.shift_lr, "weight_decay": 0.0})
    if not a.train_backbone:
        return result
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    own = {id(parameter) for parameter in embedding}
    depths, deepest = _depths(model)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for parameter in learned_parameters(model):
        if id(parameter) in own:
            continue
        depth, decayed = depths.get(id(parameter), deepest), id(parameter) in matrices
        group = {
            "name": f"backbone {depth}{' decayed' if decayed else ''}",
            "params": [],
            "lr": a.backbone_lr * a.layer_decay ** (deepest - depth),
            "weight_decay": a.backbone_weight_decay if decayed else 0.0,
        }
        groups.setdefault((depth, decayed), group)["params"].append(parameter)
    return result + [groups[key] for key in sorted(groups)]


def _depths(model: Any) -> tuple[dict[int, int], int]:
    """Depth by id of a parameter (0 for embeddings, i for layer i from 1), and the depth of all others."""
    _, encoder = find_encoder(model)
    layers = merged_layers(model)
    depths = {id(p): 0 for name, p in encoder.named_parameters() if "embeddings" in name.split(".")}
    for number, layer in enumerate(layers, start=1):
        depths.update({id(parameter): number for parameter in layer.parameters()})
    return depths, len(layers) + 1
