"""Segmenter with a mask transformer, which transformers lacks (docs/method.md section 9).

Encoder and decoder have transformers' own ViT layers. Default sizes are those of Seg-S-Mask/16.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils.generic import can_return_tuple


class SegmenterConfig(ViTConfig):
    """The decoder has `num_decoder_layers` layers of the encoder's sizes; `semantic_loss_ignore_index` is no class."""

    model_type = "segmenter"

    hidden_size: int = 384
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    layer_norm_eps: float = 1e-5
    image_size: int | list[int] | tuple[int, int] = 512
    num_decoder_layers: int = 2
    semantic_loss_ignore_index: int = 255


class SegmenterModel(ViTModel):
    """The encoder: ViT without a pooler."""

    config_class = SegmenterConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)


class SegmenterDecoder(nn.Module):
    """The mask transformer: patch tokens and class embeddings attend to each other, and give one mask per class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.projection = nn.Linear(width, width)
        self.class_embeddings = nn.Parameter(torch.zeros(1, config.num_labels, width))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_decoder_layers))
        self.layernorm = nn.LayerNorm(width, eps=eps)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=eps)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, n, D] -> masks [B, n, classes]; `attention_mask` is additive, over tokens and then classes."""
        number = tokens.shape[1]
        x = torch.cat([self.projection(tokens), self.class_embeddings.expand(tokens.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x, attention_mask)
        x = self.layernorm(x)
        patches = F.normalize(self.patch_projection(x[:, :number]), dim=-1)
        classes = F.normalize(self.class_projection(x[:, number:]), dim=-1)
        masks: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks


class SegmenterForSemanticSegmentation(ViTPreTrainedModel):
    """Segmentation: the masks of all patches, enlarged to the size of the image."""

    config_class = SegmenterConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vit = SegmenterModel(config)
        self.decoder = SegmenterDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SegmenterDecoder):
            init.trunc_normal_(module.class_embeddings, mean=0.0, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Pixels [B, C, h, w] -> logits [B, classes, h, w]; labels [B, h, w] make a loss."""
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        masks = self.decoder(outputs.last_hidden_state[:, 1:])  # [B, N, classes]
        sides, patch = pixel_values.shape[-2:], self.vit.embeddings.patch_embeddings.patch_size
        maps = masks.transpose(1, 2).unflatten(2, [sides[0] // patch[0], sides[1] // patch[1]])
        logits = F.interpolate(maps, size=sides, mode="bilinear", align_corners=False)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
