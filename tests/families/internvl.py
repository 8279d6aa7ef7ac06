"""InternVL's vision tower."""

import pytest
from transformers import InternVLVisionModel

from dtem_hf import ToMeConfig, UnsupportedModelError, attach
from tests.support.family_case import FamilyCase, Row
from tests.support.slow_anatomies import LAYER_SCALES, normed_tokens, vit_like


CASE = FamilyCase(
    "internvl",
    encoder=InternVLVisionModel,
    rows=(
        Row(
            InternVLVisionModel,
            vit_like(
                "",
                normed_tokens("layernorm", 1e-6),
                layer="encoder.layer.{}.",
                out="attention.projection_layer",
                scales=LAYER_SCALES,
                eps=1e-6,
            ),
            "last_hidden_state",
        ),
    ),
    vision={"use_absolute_position_embeddings": True, "use_mean_pooling": False},
)


def test_normalised_keys_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="use_qk_norm=True"):
        attach(CASE.make(InternVLVisionModel, use_qk_norm=True), ToMeConfig(r=9))
