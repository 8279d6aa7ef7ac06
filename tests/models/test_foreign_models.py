"""A merged encoder inside a model of transformers that knows nothing of merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TrOCRConfig, TrOCRForCausalLM, VisionEncoderDecoderModel

from dtem_hf import DTEMConfig, attach
from tests.families.test_slow_reference import weights_of
from tests.support import slow_model
from tests.support.families import row_of
from tests.support.slow_steps import Reduction


R = [7, 0, 6, 5]
BARE = row_of("vit-bare")
WORDS = torch.tensor([[2, 7, 8, 9, 3], [2, 5, 5, 6, 3]])


def captioner(tokens: list[int], **config: object) -> VisionEncoderDecoderModel:
    """A reader of text lines: ViT, merged as the config says, and TrOCR's decoder. `tokens` notes what it sees."""
    torch.manual_seed(1)
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=14,
            cross_attention_hidden_size=32, init_std=0.2, dropout=0.0,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=BARE.make(), decoder=decoder)
    attach(model.encoder, DTEMConfig(r=R, score_temperature=0.5, assignment_temperature=1.0, top_k=8, **config))
    for layer in decoder.model.decoder.layers:
        layer.encoder_attn.k_proj.register_forward_hook(
            lambda module, arguments, output: tokens.append(output.shape[1])
        )
    return model


@pytest.mark.parametrize("config, training", [({}, True), ({"relaxation": "soft"}, False)], ids=["train", "soft"])
def test_cross_attention_reads_no_token_that_was_softly_merged_away(config: dict[str, str], training: bool) -> None:
    """The decoder sees as many tokens as hard merging leaves, and what it says is what it says of the slow ones."""
    tokens: list[int] = []
    model = captioner(tokens, **config).train(training)
    pixels = BARE.inputs(2)["pixel_values"]
    logits = model(pixel_values=pixels, decoder_input_ids=WORDS).logits
    assert tokens == [65 - sum(R)] * 2
    weights = weights_of(model.encoder)
    reduction = Reduction(r=R, soft=True, relaxation={"t1": 0.5, "t2": 1.0, "top_k": 8})
    for image in range(2):
        _, trail = slow_model.run(weights, BARE.anatomy, {"pixel_values": pixels[image].double()}, reduction)
        live: Tensor = BARE.anatomy.head(weights, trail[-1].x, trail[-1].sizes)["last_hidden_state"][: 65 - sum(R)]
        slow = model.decoder(WORDS[image : image + 1], encoder_hidden_states=live.float()[None]).logits
        torch.testing.assert_close(logits[image : image + 1], slow, atol=1e-4, rtol=1e-4)


def test_a_caption_teaches_what_to_merge() -> None:
    """Every layer whose choice reaches the decoder learns by its loss, and so do those that merge nothing, with 0."""
    model = captioner([]).train()
    model(pixel_values=BARE.inputs(2)["pixel_values"], decoder_input_ids=WORDS, labels=WORDS).loss.backward()
    learned = [layer.weight.grad.any().item() for layer in model.encoder.merge_embedding.projections]
    assert learned == [True, False, True, True]
