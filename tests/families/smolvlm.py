"""SmolVLM's vision tower."""

from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from tests.support.family_case import FamilyCase, Row
from tests.support.padded_patches import UNEVEN_RANGE, masked_images, padded_images, padded_tower


CASE = FamilyCase(
    "smolvlm",
    encoder=SmolVLMVisionTransformer,
    rows=(Row(SmolVLMVisionTransformer, padded_tower(), "last_hidden_state"),),
    inputs=masked_images,
    uneven=padded_images,
    lacking={"onnx": UNEVEN_RANGE},
)
