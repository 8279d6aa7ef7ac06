"""Whether a deployed model says what the model in memory says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadValue
from .graph import ImageGraph


Runner = Callable[[Tensor], Sequence[Tensor]]

# What torch and another runtime may differ by in float32.
TOLERANCE = 1e-4
# In half precision a rounding may decide whom a token is merged with, and no two runtimes round alike. What can be
# asked is that a file be no further from float32 than this many times what eager is in the same dtype.
HALF_FACTOR = 2.0
_BATCHES = (1, 2, 5)


@torch.inference_mode()
def check_parity(
    model: nn.Module,
    run: Runner,
    names: Sequence[str],
    shape: tuple[int, int, int],
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a runner with the eager model on noise of [C, H, W] in batches of 1, 2 and 5.

    In float32 no number may differ by more than `tolerance`, absolute or relative, whichever is more. In half
    precision, the root mean square of the difference from float32 (same weights) may be HALF_FACTOR times eager's,
    and `tolerance` of the values' own. Returns a record; raises ValueError with the figures where more is between.
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
            allowed = HALF_FACTOR * record["eager_rms_from_float32"] + tolerance * _rms(exact[i])
            fits = record["rms_from_float32"] <= allowed
        if not fits:
            raise BadValue(
                "tolerance", tolerance, f"the written model's {name} is further than that from eager: {record}"
            )
        outputs[name] = record
    return {"batches": list(_BATCHES), "seed": seed, "tolerance": tolerance, "outputs": outputs}


def _outputs(run: Runner, batches: Sequence[Tensor]) -> list[Tensor]:
    """Every output over all batches, flat: the number of tokens is the same for all, that of images is not."""
    runs = [[value.float().cpu().flatten() for value in run(pixels)] for pixels in batches]
    return [torch.cat(values) for values in zip(*runs, strict=True)]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
