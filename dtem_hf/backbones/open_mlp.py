"""An MLP whose two linear maps run by whatever is fastest on the tokens that a merge left.

The module of transformers is what it was: its own forward pass runs where nothing was merged, where its parts are more
than linear maps of their weights (LoRA, quantised or offloaded weights), and where a hook watches one of them.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from .bare_modules import as_product, gelu_of, is_hooked, multiplies_faster


class OpenMLP:
    """Mixed into an MLP that is `fc2(activation_fn(fc1(x)))`, and nothing else."""

    def forward(self: Any, hidden_states: Tensor, merged: bool = False) -> Tensor:
        fc1, fc2, activation = self.fc1, self.fc2, self.activation_fn
        if not merged or self.training or not multiplies_faster(hidden_states, fc1, fc2) or is_hooked(activation):
            return super().forward(hidden_states)  # type: ignore[misc]
        gelu = gelu_of(activation)
        grown = as_product(fc1, gelu)(hidden_states)
        return as_product(fc2)(grown if gelu else activation(grown))


def opens_mlp(mlp: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module is an MLP that transformers wrote, of the parts that `OpenMLP` runs and no others."""
    if mlp is None or not type(mlp).__module__.startswith("transformers.models."):
        return False
    return {name for name, _ in mlp.named_children()} == {"fc1", "fc2", "activation_fn"}
