"""The Q-Formers of BLIP-2 and InstructBLIP on merged tokens, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtem_hf import MergeConfig, attach
from tests.support import slow_reference as slow
from tests.support.family_case import FamilyCase, Inputs
from tests.support.slow_parts import Weights, gelu, layer_norm, linear
from tests.support.unmerging import put_back, traced


QUERIES, IMAGE = 4, 14
WORDS = torch.tensor([[IMAGE] * QUERIES + [2, 7, 8, 3], [IMAGE] * QUERIES + [2, 9, 5, 3]])
WHOLE = {
    "num_query_tokens": QUERIES,
    "image_token_index": IMAGE,
    "image_text_hidden_size": 16,
    "qformer_config": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 14,
        "max_position_embeddings": 16,
        "pad_token_id": None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "use_qformer_text_input": True,
    },
}
# OPT; its padding row of a checkpoint is set to zero.
TEXT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": 15, "pad_token_id": None}


def asked(case: FamilyCase) -> Inputs:
    """Two images with a text each, in which tokens stand for the queries."""
    return {**case.inputs(2), "input_ids": WORDS}


def made(case: FamilyCase, model_class: Any, merge: MergeConfig | None = None) -> Any:
    """A model whose queries differ and see differences between tokens."""
    model = case.make(model_class)
    model.query_tokens.data.normal_(generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if "crossattention.attention.key.weight" in name or "crossattention.attention.query.weight" in name:
            parameter.data *= 3
    return model if merge is None else attach(model, merge)


def queried(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
    """What the Q-Former of a merged model says [B, Q, E], the tokens that it saw [B, n, D], and the trace."""
    seen: list[Any] = []
    handle = model.qformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs["encoder_hidden_states"], output[0])), with_kwargs=True
    )
    _, trace = traced(model, **inputs)
    handle.remove()
    ((tokens, output),) = seen
    return output[:, :QUERIES], tokens, trace


def assert_the_qformer_sees_each_token_as_often_as_it_counts(
    case: FamilyCase, model_class: Any, merge: MergeConfig, inputs: Inputs
) -> None:
    """Its output is that of the plain model whose tower returns the tokens put back in place; uncounted, it is not."""
    plain, model = made(case, model_class), made(case, model_class, merge)
    output, tokens, trace = queried(model, inputs)
    assert tokens.shape[1] == model.merge_plan().output_tokens < model.merge_plan().num_tokens

    def plainly(given: Tensor) -> Tensor:
        found: list[Tensor] = []

        def hand_on(module: Any, args: Any, result: Any) -> Any:
            result.last_hidden_state = given
            return result

        handles = [
            plain.vision_model.register_forward_hook(hand_on),
            plain.qformer.register_forward_hook(lambda _, args, result: found.append(result[0][:, :QUERIES])),
        ]
        with torch.no_grad():
            plain(**inputs)
        for handle in handles:
            handle.remove()
        return found[0]

    torch.testing.assert_close(output, plainly(put_back(tokens, trace.source_maps[-1])), atol=1e-5, rtol=1e-5)
    assert (plainly(tokens) - output).abs().max() > 1e-3


def slow_qformer(weights: Weights, tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """BLIP-2's Q-Former for the tokens of one image [n, D], without text: [Q, E]."""
    x = layer_norm(weights, "qformer.layernorm", weights["query_tokens"][0], 1e-12)
    for index in range(WHOLE["qformer_config"]["num_hidden_layers"]):  # type: ignore[index]
        root = f"qformer.encoder.layer.{index}."
        blocks = [("attention", x, None), ("crossattention", tokens, sizes)]
        for name, _, counted in blocks[: 1 if index % 2 else 2]:  # every other layer looks at the image
            keys = x if name == "attention" else tokens
            q, k, v = (
                linear(weights, f"{root}{name}.attention.{part}", y)
                for part, y in (("query", x), ("key", keys), ("value", keys))
            )
            mixed = slow.attention(q, k, v, 2, 12**-0.5, counted)
            mixed = linear(weights, f"{root}{name}.output.dense", mixed)
            x = layer_norm(weights, f"{root}{name}.output.LayerNorm", x + mixed, 1e-12)
        grown = linear(
            weights, root + "output_query.dense", gelu(linear(weights, root + "intermediate_query.dense", x))
        )
        x = layer_norm(weights, root + "output_query.LayerNorm", x + grown, 1e-12)
    return x
