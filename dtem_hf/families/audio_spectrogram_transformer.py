"""AST: a ViT on spectrograms with overlapping patches; CLS and distillation token, then the patches."""

from __future__ import annotations

from typing import Any

from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import (
    ASTForAudioClassification,
    ASTModel,
)

from ..errors import BadValue
from .family import Family
from .vit import VIT_LAYER


class SpectrogramFamily(Family):
    """Spectrograms have one size, which the position embeddings fix."""

    def input_shape(self, encoder: Any, image_size: Any = None) -> tuple[int, ...]:
        if image_size is not None:
            raise BadValue("image_size", image_size, "none: the config's max_length and num_mel_bins set the size")
        return encoder.config.max_length, encoder.config.num_mel_bins

    def num_tokens(self, encoder: Any, image_size: Any = None) -> int:
        (time, frequency), config = self.input_shape(encoder, image_size), encoder.config
        rows = (frequency - config.patch_size) // config.frequency_stride + 1
        columns = (time - config.patch_size) // config.time_stride + 1
        return rows * columns + self.num_prefix_tokens


FAMILY = SpectrogramFamily(
    encoders={ASTModel: "layers"},
    anatomy=VIT_LAYER,
    models={ASTModel: "tokens", ASTForAudioClassification: "tokens"},
    num_prefix_tokens=2,
)
