"""Small random models around an encoder, one of each type of container, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 4,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
GEMMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
IMAGE = 5  # the placeholder's token id


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prompt(num_image_tokens: int, count: int = 2) -> dict[str, Tensor]:
    ids = torch.tensor([[7, *[IMAGE] * num_image_tokens, 8, 9]] * count)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(count)}


def trocr() -> tuple[Any, dict[str, Tensor]]:
    decoder = tf.TrOCRConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=60
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VIT), decoder)
    ids = torch.tensor([[2, 9, 11, 12]] * 2)
    return tf.VisionEncoderDecoderModel(config), {"pixel_values": images(), "decoder_input_ids": ids}


def dual_encoder() -> tuple[Any, dict[str, Tensor]]:
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(tf.ViTConfig(**VIT), tf.BertConfig(**TEXT))
    ids = torch.tensor([[1, 2, 3]] * 2)
    return tf.VisionTextDualEncoderModel(config), {"pixel_values": images(), "input_ids": ids}


def dinov2_backbone() -> Any:
    return tf.Dinov2Config(
        **{**VIT, "image_size": 64, "patch_size": 8, "mlp_ratio": 2},
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )


def depth_anything(model_class: Any = tf.DepthAnythingForDepthEstimation) -> tuple[Any, dict[str, Tensor]]:
    config = model_class.config_class(
        backbone_config=dinov2_backbone(),
        patch_size=8,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return model_class(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def prompt_depth_anything() -> tuple[Any, dict[str, Tensor]]:
    return depth_anything(tf.PromptDepthAnythingForDepthEstimation)


def dpt() -> tuple[Any, dict[str, Tensor]]:
    backbone = dinov2_backbone()
    config = tf.DPTConfig(
        backbone_config=backbone,
        hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        patch_size=8,
        image_size=64,
        backbone_out_indices=[1, 2, 3, 4],
        readout_type="ignore",
    )
    return tf.DPTForDepthEstimation(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def upernet() -> tuple[Any, dict[str, Tensor]]:
    backbone = tf.BeitConfig(**{**VIT, "image_size": 64, "patch_size": 8}, out_indices=[1, 2, 3, 4], add_fpn=False)
    config = tf.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=5,
        auxiliary_in_channels=32,
    )
    return tf.UperNetForSemanticSegmentation(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def llava(model_class: Any = tf.LlavaForConditionalGeneration, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    config = model_class.config_class(
        vision_config={"model_type": "clip_vision_model", **VIT},
        text_config=LLAMA,
        image_token_index=IMAGE,
        **changes,
    )
    return model_class(config), prompt(64)


def vipllava() -> tuple[Any, dict[str, Tensor]]:
    return llava(tf.VipLlavaForConditionalGeneration, vision_feature_layers=[-2, -3])


def paligemma() -> tuple[Any, dict[str, Tensor]]:
    config = tf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VIT, "projection_dim": 32, "vision_use_head": False},
        text_config={"model_type": "gemma", **GEMMA},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config), prompt(64)


def gemma3() -> tuple[Any, dict[str, Tensor]]:
    config = tf.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        text_config=GEMMA,
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    return tf.Gemma3ForConditionalGeneration(config), prompt(16)


def zoedepth() -> tuple[Any, dict[str, Tensor]]:
    backbone = tf.BeitConfig(
        **{**VIT, "image_size": 64, "patch_size": 8},
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = tf.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_relative_features=8,
        reassemble_factors=[4, 2, 1, 0.5],
        bin_embedding_dim=8,
    )
    return tf.ZoeDepthForDepthEstimation(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def vitpose() -> tuple[Any, dict[str, Tensor]]:
    """Patches of more than 4 pixels: images are padded by 2 on every side."""
    backbone = tf.VitPoseBackboneConfig(
        **{**VIT, "image_size": [64, 48], "patch_size": [8, 8], "mlp_ratio": 2}, out_indices=[4]
    )
    model = tf.VitPoseForPoseEstimation(tf.VitPoseConfig(backbone_config=backbone, num_labels=5))
    return model, {"pixel_values": torch.randn(2, 3, 64, 48)}


def tiled(model_class: Any, num_image_tokens: int, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """An image of 64 x 64 pixels in four tiles and one view of the whole."""
    model, _ = llava(model_class, image_grid_pinpoints=[[64, 64]], **changes)
    inputs = prompt(num_image_tokens)
    inputs["pixel_values"] = torch.randn(2, 5, 3, 32, 32)
    return model, {**inputs, "image_sizes": torch.tensor([[64, 64]] * 2)}


def llava_next() -> tuple[Any, dict[str, Tensor]]:
    return tiled(tf.LlavaNextForConditionalGeneration, 64 + 16 * 17)


def llava_onevision() -> tuple[Any, dict[str, Tensor]]:
    return tiled(tf.LlavaOnevisionForConditionalGeneration, 64 + 16 * 17, vision_feature_select_strategy="default")


def internvl() -> tuple[Any, dict[str, Tensor]]:
    vision = {**VIT, "model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        vision_config=vision, text_config=LLAMA, image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
    )
    return tf.InternVLForConditionalGeneration(config), prompt(16)


def idefics3(model_class: Any = tf.Idefics3ForConditionalGeneration) -> tuple[Any, dict[str, Tensor]]:
    config = model_class.config_class(
        vision_config=VIT, text_config=LLAMA, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return model_class(config), several(prompt(16))


def smolvlm() -> tuple[Any, dict[str, Tensor]]:
    return idefics3(tf.SmolVLMForConditionalGeneration)


def idefics2() -> tuple[Any, dict[str, Tensor]]:
    resampler = {
        "hidden_size": 32,
        "resampler_n_latents": 8,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    config = tf.Idefics2Config(
        vision_config=VIT,
        text_config={**LLAMA, "model_type": "mistral", "head_dim": 16},
        image_token_id=IMAGE,
        perceiver_config=resampler,
    )
    return tf.Idefics2ForConditionalGeneration(config), several(prompt(8))


def several(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For models that take several images in a prompt."""
    return {**inputs, "pixel_values": inputs["pixel_values"].unsqueeze(1)}


def qwen(model_class: Any, **vision: Any) -> tuple[Any, dict[str, Tensor]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = model_class.config_class(
        vision_config={"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 4, **vision},
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "pad_token_id": 0},
        image_token_id=IMAGE,
    )
    config.text_config.bos_token_id = config.text_config.eos_token_id = None
    inputs = {**prompt(16), "image_grid_thw": torch.tensor([[1, 8, 8]] * 2)}
    inputs["pixel_values"] = torch.randn(2 * 64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return model_class(config), inputs


def qwen2_vl() -> tuple[Any, dict[str, Tensor]]:
    return qwen(tf.Qwen2VLForConditionalGeneration, embed_dim=32, mlp_ratio=2)


def qwen3_vl() -> tuple[Any, dict[str, Tensor]]:
    vision = {"out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 16}
    return qwen(tf.Qwen3VLForConditionalGeneration, deepstack_visual_indexes=[1, 2], **vision)


def aya_vision() -> tuple[Any, dict[str, Tensor]]:
    config = tf.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        text_config={**TEXT, "model_type": "cohere2", "num_key_value_heads": 2},
        image_token_index=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.AyaVisionForConditionalGeneration(config), prompt(16)


def janus() -> tuple[Any, dict[str, Tensor]]:
    """With the part that writes images, which takes nothing from the vision tower."""
    painter = {"embed_dim": 4, "num_embeddings": 16, "latent_channels": 8, "channel_multiplier": [1, 1]}
    config = tf.JanusConfig(
        vision_config={**VIT, "mlp_ratio": 2.0, "projection_dim": 32},
        text_config=LLAMA,
        vq_config={**painter, "base_channels": 32, "num_res_blocks": 1, "projection_dim": 32},
        image_token_id=IMAGE,
    )
    return tf.JanusForConditionalGeneration(config), prompt(64)


CONTAINERS = [
    trocr,
    dual_encoder,
    depth_anything,
    prompt_depth_anything,
    dpt,
    upernet,
    zoedepth,
    vitpose,
    llava,
    vipllava,
    llava_next,
    llava_onevision,
    paligemma,
    gemma3,
    internvl,
    idefics2,
    idefics3,
    smolvlm,
    aya_vision,
    janus,
    qwen2_vl,
    qwen3_vl,
]
SEEING = ("vision", "encoder", "backbone", "projector", "connector", "visual")  # in the names of what sees
Build = Callable[[], tuple[Any, dict[str, Tensor]]]


def built(build: Build) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():  # so that tokens differ in what they are merged by
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(part in name for part in SEEING):
                parameter.normal_(std=0.2)
    return model.eval(), inputs
