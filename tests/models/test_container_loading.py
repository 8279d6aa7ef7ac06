"""Models and towers that come from a folder: found by their config alone, or saved without their container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import dtem_hf
from dtem_hf import DTEMConfig, ToMeConfig, attach
from tests.support.containers import TEXT, VIT, built, images, llava


def matting() -> Any:
    backbone = tf.Dinov2Config(
        **{**VIT, "image_size": 64, "patch_size": 16, "mlp_ratio": 2}, num_channels=4, out_features=["stage4"]
    )
    narrow: dict[str, Any] = {"hidden_size": 32, "convstream_hidden_sizes": [8] * 3, "fusion_hidden_sizes": [8] * 4}
    return tf.VitMatteForImageMatting(tf.VitMatteConfig(backbone_config=backbone, **narrow))


def speech() -> Any:
    sound = {"num_mel_bins": 16, "max_length": 32, "frequency_stride": 4, "time_stride": 4}
    decoder = tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(tf.ASTConfig(**{**VIT, **sound}), decoder)
    return tf.SpeechEncoderDecoderModel(config)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, build, inputs",
    [
        ("AutoModelForImageMatting", matting, {"pixel_values": torch.randn(1, 4, 64, 64)}),
        (
            "AutoModelForSpeechSeq2Seq",
            speech,
            {"input_values": torch.randn(1, 32, 16), "decoder_input_ids": torch.tensor([[1, 2]])},
        ),
    ],
)
def test_models_that_hold_an_encoder_only_by_their_config_load_by_their_auto_class(
    name: str, build: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    model = build().eval()
    plain = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    merged = getattr(dtem_hf, name).from_pretrained(tmp_path, merge=ToMeConfig(r=2)).eval()
    with merged.trace_merging() as trace:
        merged(**inputs)
    assert [sizes.shape[1] for sizes in trace.sizes] == list(merged.merge_plan().tokens)
    merged.set_reduction(0)
    torch.testing.assert_close(merged(**inputs)[0], plain, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_tower_that_is_saved_without_its_container_stays_merged(tmp_path: Path) -> None:
    model, _ = built(llava)
    tower = attach(model, DTEMConfig(r=6, init="random")).model.vision_tower
    expected = tower(images()).last_hidden_state
    tower.save_pretrained(tmp_path)
    assert not hasattr(tower.config, "merge")
    loaded = dtem_hf.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images()).last_hidden_state, expected)
    assert loaded.merge_config.r == 6
