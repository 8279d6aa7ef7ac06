"""Whether a deployed model gives the outputs of the model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..models.distances import kl_to
from .graph import ImageGraph


Runner = Callable[[Tensor], Sequence[Tensor]]

# The largest difference between torch and another runtime in float32.
TOLERANCE = 1e-4
# In half precision, rounding may decide which tokens are merged, and runtimes round differently: another pair moves
# the outputs by some hundredths of their size, a wrong graph by all of it.
HALF_TOLERANCE = 0.05
_BATCHES = (1, 2, 5)


@torch.inference_mode()
def check_parity(
    model: nn.Module,
    run: Runner,
    names: Sequence[str],
    shape: tuple[int, ...],
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a runner with the eager model on noise of [C, H, W] in batches of 1, 2 and 5.

    In float32 no number may differ by more than `tolerance`, absolute or relative, whichever is more. In half
    precision, the root mean square of the difference from float32 (same weights) may be twice that of eager, or
    HALF_TOLERANCE of the values' own, whichever is more. Returns a record; raises ValueError with the figures where
    an output is further away.
    """
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(seed)
    batches = [torch.randn(count, *shape, generator=draw).to(parameter.device) for count in _BATCHES]
    expected, found = _outputs(ImageGraph(model), batches), _outputs(run, batches)
    exact = None
    if parameter.dtype != torch.float32:
        exact = _outputs(ImageGraph(copy.deepcopy(model).float()), batches)
    outputs = {}
    for i, name in enumerate(names):
        record = {"largest_difference": float((found[i] - expected[i]).abs().max())}
        if exact is None:
            fits = torch.allclose(found[i], expected[i], rtol=tolerance, atol=tolerance)
        else:
            record["rms_from_float32"] = _rms(found[i] - exact[i])
            record["eager_rms_from_float32"] = _rms(expected[i] - exact[i])
            record["float32_rms"] = _rms(exact[i])
            allowed = max(2 * record["eager_rms_from_float32"], HALF_TOLERANCE * record["float32_rms"])
            fits = record["rms_from_float32"] <= allowed
        if not fits:
            raise BadValue(
                "tolerance",
                tolerance,
                f"{name} of the exported model is further from eager than that: {record}",
            )
        outputs[name] = record
    return {"batches": list(_BATCHES), "seed": seed, "tolerance": tolerance, "outputs": outputs}


@torch.inference_mode()
def measure_change(model: nn.Module, run: Runner, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Any]:
    """How far a quantised model is from eager on images, in batches of pixels [B, C, H, W]: a record.

    Of every output the largest difference and its root mean square; of `logits` also in how many per cent of the
    images both name the same class, and the KL in nats.
    """
    expected, found = _outputs(ImageGraph(model), batches), _outputs(run, batches)
    count = sum(len(pixels) for pixels in batches)
    outputs = {}
    for name, right, ours in zip(names, expected, found, strict=True):
        record = {
            "largest_difference": float((ours - right).abs().max()),
            "rms_from_float32": _rms(ours - right),
            "float32_rms": _rms(right),
        }
        if name == "logits" and right.numel() % count == 0:
            ours, right = ours.view(count, -1), right.view(count, -1)
            record["agreement"] = 100 * float((ours.argmax(-1) == right.argmax(-1)).double().mean())
            record["kl"] = float(kl_to(right, ours).mean())
        outputs[name] = record
    return {"images": count, "outputs": outputs}


def _outputs(run: Runner, batches: Sequence[Tensor]) -> list[Tensor]:
    """Every output over all batches, flat."""
    runs = [[value.float().cpu().flatten() for value in run(pixels)] for pixels in batches]
    return [torch.cat(values) for values in zip(*runs, strict=True)]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
