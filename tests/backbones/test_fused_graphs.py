"""Layers that run as one call, in the graphs of torch.compile: as many as in eager, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_table import FAMILIES, inputs_of, make
from fused_vit import SMALL, by_modules, close, needs_fused_layers
from packaging.version import Version
from torch import Tensor, nn

from dtem_hf import DTEMConfig, EViTConfig, ToMeConfig, attach
from dtem_hf.backbones.fused_layers import weights_of
from dtem_hf.ops import fused_layer
from dtem_hf.ops.fused_layer import Affine, MergePart


pytestmark = [
    needs_fused_layers,
    pytest.mark.skipif(
        Version(torch.__version__) < Version("2.13"), reason="older compilers say that they export, and graphs have to"
    ),
]
FUSED = [
    "vit",
    "deit-teacher",
    "vit_msn",
    "vit_mae",
    "ijepa",
    "dinov2",
    "dinov2_with_registers",
    "clip",
    "siglip",
    "git",
]
METHODS = {
    "tome": lambda: ToMeConfig(r=9),
    "tome, no sizes": lambda: ToMeConfig(r=9, proportional_attention=False),
    "dtem, aggregation": lambda: DTEMConfig(r=9, learn_exponents=True, learn_norms=True),
}


def compiled(model: Any) -> tuple[Any, list[int]]:
    """A compiled model, and how many layers every graph of it runs as one call."""
    torch._dynamo.reset()
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        operation = torch.ops.dtem_hf.fused_layer.default
        counts.append(sum(node.target in (operation, fused_layer._operation) for node in graph.graph.nodes))
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_every_family_gives_what_its_modules_give(family: str, method: str) -> None:
    model = attach(make(family), METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.merge_parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = by_modules(lambda: model(**inputs_of(family, 2)))[FAMILIES[family].output]
    graph, counts = compiled(model)
    close(graph(**inputs_of(family, 2))[FAMILIES[family].output], expected)
    assert len(counts) == 1 and counts[0] > 1


@torch.inference_mode()
def test_weights_are_those_of_now_and_hooks_are_called(small_vit: Any, small_pixels: Tensor) -> None:
    model = attach(small_vit, DTEMConfig(r=9))
    graph, counts = compiled(model)
    before = graph(small_pixels).logits
    model.vit.layers[1].mlp.fc1.weight.data.mul_(1.5)
    after = graph(small_pixels).logits
    assert counts == [3] and not torch.allclose(before, after, atol=1e-3)
    close(after, by_modules(lambda: model(small_pixels).logits))
    seen: list[nn.Module] = []
    model.vit.layers[1].mlp.register_forward_hook(lambda module, *_: seen.append(module))
    graph, counts = compiled(model)
    close(graph(small_pixels).logits, after)
    assert counts == [2] and len(seen) == 1


def test_evit_gradients_and_autocast_are_left_to_modules(small_vit: Any, small_pixels: Tensor) -> None:
    model = attach(small_vit, ToMeConfig(r=9))
    graph, counts = compiled(model)
    graph(small_pixels).logits.sum().backward()
    assert model.vit.layers[1].mlp.fc1.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        graph(small_pixels)
    assert counts == [0, 0]
    with torch.no_grad():
        graph, counts = compiled(attach(small_vit, EViTConfig(keep_rate=0.7, layers=[1])))
        graph(small_pixels)
    assert counts == [1]  # nothing was merged in front of the layer that prunes


@torch.no_grad()
def test_traces_of_an_unmerging_model(small_vit: Any, small_pixels: Tensor) -> None:
    """Its source maps are made from the matching, which the call hands out."""
    model = attach(small_vit.vit, ToMeConfig(r=9), unmerge=True)
    expected = by_modules(lambda: model(small_pixels).last_hidden_state)
    graph, counts = compiled(model)
    found = graph(small_pixels).last_hidden_state
    assert counts == [3] and found.shape[1] == 65
    close(found, expected)


@torch.no_grad()
def test_a_graph_of_one_image_that_is_mapped_over(small_vit: Any, small_pixels: Tensor) -> None:
    model = attach(small_vit, DTEMConfig(r=9, learn_norms=True))
    mapped = torch.vmap(lambda image: model(image.unsqueeze(0)).logits.squeeze(0))
    torch._dynamo.reset()
    found = torch.compile(mapped, fullgraph=True, backend="aot_eager")(small_pixels)
    close(found, model(small_pixels).logits)


@pytest.mark.parametrize("merges", [True, False])
@torch.no_grad()
def test_the_operation_is_registered_as_torch_wants_it(merges: bool, small_vit: Any) -> None:
    """Shapes of what it returns, no aliases of its arguments, nothing that it overwrites."""
    model, x = attach(small_vit, DTEMConfig(r=9)), torch.randn(2, 65, SMALL["hidden_size"])
    weights = weights_of(model.vit.layers[0].fused_parts(), x.shape[2])
    embedding = Affine(*model.vit.merge_embedding.layers[0].parameters())
    sizes, bias = torch.rand(2, 65) + 1, torch.rand(2, 1, 1, 65)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_layer, "_operation", lambda *arguments: calls.append(arguments))
        if merges:
            fused_layer._run_in_graph(x, weights, sizes, bias, MergePart(9, 1, embedding), 56)
        else:
            fused_layer._run_in_graph(x, weights, None, None, None, 65)
    torch.library.opcheck(fused_layer._operation, *calls)
