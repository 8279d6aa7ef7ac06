"""LV-ViT, which transformers lacks (docs/method.md section 9): ViT with a convolutional stem and a head per patch.

The layers are transformers' own. Default sizes are those of LV-ViT-S.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple


class LVViTConfig(ViTConfig):
    """`residual_scale` multiplies the outputs of attention and MLP; the stem has `stem_width` channels."""

    model_type = "lv_vit"

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    layer_norm_eps: float = 1e-5
    qkv_bias: bool = False
    residual_scale: float = 0.5
    stem_width: int = 64


class FixedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm with fixed statistics: a frozen backbone must not update them in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ScaledDropout(nn.Dropout):
    """Dropout times a factor. It replaces the dropout in front of a layer's residual sums."""

    def __init__(self, p: float, scale: float) -> None:
        super().__init__(p)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class LVViTPatchEmbeddings(nn.Module):
    """Three convolutions at half the resolution, then patches: [B, C, h, w] -> [B, N, D]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, side = config.stem_width, config.patch_size // 2
        parts: list[nn.Module] = []
        for channels, size, stride in ((config.num_channels, 7, 2), (width, 3, 1), (width, 3, 1)):
            convolution = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
            parts += [convolution, FixedBatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Sequential(*parts)
        self.projection = nn.Conv2d(width, config.hidden_size, side, side)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.stem(pixel_values)).flatten(2).transpose(1, 2)


class LVViTModel(ViTModel):
    """ViT with LV-ViT's stem and scaled residuals, without a pooler."""

    config_class = LVViTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)
        embeddings: Any = self.embeddings
        embeddings.patch_embeddings = LVViTPatchEmbeddings(config)
        for layer in self.layers:
            layer.dropout = ScaledDropout(config.hidden_dropout_prob, config.residual_scale)
        self.post_init()


class LVViTForImageClassification(ViTPreTrainedModel):
    """A classifier: the logits of the CLS token, plus half of each class's largest logit among the patches."""

    config_class = LVViTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = LVViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.token_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Pixels [B, C, h, w] -> logits [B, classes]; labels [B] make a loss."""
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        tokens = outputs.last_hidden_state
        logits = self.classifier(tokens[:, 0]) + 0.5 * self.token_classifier(tokens[:, 1:]).amax(dim=1)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
