"""Compare the outputs of an exported model with those of the model in memory."""

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

# The largest allowed difference between torch and another runtime in float32.
TOLERANCE = 1e-4
# In half precision, rounding may decide which tokens merge, and runtimes round differently. Another pair changes the
# outputs by some hundredths of their size; a wrong graph changes them completely.
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

    In float32 no number may differ by more than `tolerance`, absolute plus relative. In half precision, the root mean
    square of the difference from float32 (same weights) may be twice that of eager, or HALF_TOLERANCE of the values'
    own root mean square, whichever is larger. Returns a record. Raises ValueError with the figures if an output
    differs by more.
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
                f"{name} of the exported model differs more from eager: {record}",
            )
        outputs[name] = record
    return {"batches": list(_BATCHES), "seed": seed, "tolerance": tolerance, "outputs": outputs}


@torch.inference_mode()
def measure_change(model: nn.Module, run: Runner, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Any]:
    """Compare a quantised model with eager on images, in batches of pixels [B, C, H, W]. Returns a record.

    It holds for every output the largest difference and the root mean square of the difference; for `logits` also the
    share of the images with the same class, in percent, and the KL in nats.
    """
    expected, found = _outputs(ImageGraph(model), batches), _outputs(run, batches)
    count = sum(len(pixels) for pixels in batches)
    outputs = {}
    for name, eager, quantised in zip(names, expected, found, strict=True):
        record = {
            "largest_difference": float((quantised - eager).abs().max()),
            "rms_from_float32": _rms(quantised - eager),
            "float32_rms": _rms(eager),
        }
        if name == "logits" and eager.numel() % count == 0:
            quantised, eager = quantised.view(count, -1), eager.view(count, -1)
            record["agreement"] = 100 * float((quantised.argmax(-1) == eager.argmax(-1)).double().mean())
            record["kl"] = float(kl_to(eager, quantised).mean())
        outputs[name] = record
    return {"images": count, "outputs": outputs}


def _outputs(run: Runner, batches: Sequence[Tensor]) -> list[Tensor]:
    """Every output, flattened and concatenated over all batches."""
    runs = [[value.float().cpu().flatten() for value in run(pixels)] for pixels in batches]
    return [torch.cat(values) for values in zip(*runs, strict=True)]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
