"""Who needs every token gets every token, in its place: against what source maps say, gathered by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dtem_hf
from dtem_hf import DTEMConfig, EViTConfig, MergeConfig, MergeTrace, ToMeConfig, UnsupportedModelError, attach, detach
from dtem_hf.models.install import merged_layers


Make = Callable[[], Any]
CONFIGS = {
    "tome": ToMeConfig(r=9),
    "tome by layer": ToMeConfig(r=[0, 14, 0, 3]),
    "dtem": DTEMConfig(r=9),
    "soft": DTEMConfig(r=[9, 0, 11, 3], relaxation="soft"),
    "evit": EViTConfig(0.5),
}


def small(config_class: Any, **changes: Any) -> Any:
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    return config_class(**{**values, **changes})


def make(name: str, config_class: Any, **changes: Any) -> Make:
    def made() -> Any:
        torch.manual_seed(1)
        return getattr(transformers, name)(small(config_class, **changes)).eval()

    return made


ENCODERS: dict[str, Make] = {
    "vit": make("ViTModel", transformers.ViTConfig),
    "deit": make("DeiTModel", transformers.DeiTConfig),
    "beit": make("BeitModel", transformers.BeitConfig, use_relative_position_bias=True),
    "data2vec": make("Data2VecVisionModel", transformers.Data2VecVisionConfig, use_shared_relative_position_bias=True),
    "dinov2": make("Dinov2Model", transformers.Dinov2Config),
    "dinov2 with registers": make("Dinov2WithRegistersModel", transformers.Dinov2WithRegistersConfig),
    "dinov3": make("DINOv3ViTModel", transformers.DINOv3ViTConfig, num_register_tokens=2),
    "clip": make("CLIPVisionModel", transformers.CLIPVisionConfig),
    "siglip": make("SiglipVisionModel", transformers.SiglipVisionConfig),
    "blip": make("BlipVisionModel", transformers.BlipVisionConfig),
    "git": make("GitVisionModel", transformers.GitVisionConfig),
}


def put_back(x: Tensor, source: Tensor) -> Tensor:
    """Every original token is the token it ended in, one at a time."""
    return torch.stack([torch.stack([x[image, place] for place in source[image]]) for image in range(len(x))])


def config_for(method: str, encoder: str) -> MergeConfig:
    if encoder == "siglip" and method == "evit":
        pytest.skip("EViT needs a CLS token")
    return CONFIGS[method]


@torch.no_grad()
def traced(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, MergeTrace]:
    with model.trace_merging() as trace:
        output = model(*args, **kwargs)
    return output, trace


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_tokens_come_back_in_place(encoder: str, method: str, pixels: Tensor) -> None:
    """Last and recorded hidden states; everything else is what it is without."""
    config = config_for(method, encoder)
    short, trace = traced(attach(ENCODERS[encoder](), config), pixels, output_hidden_states=True)
    model = attach(ENCODERS[encoder](), config, unmerge=True)
    full, full_trace = traced(model, pixels, output_hidden_states=True)
    torch.testing.assert_close(full.last_hidden_state, put_back(short.last_hidden_state, trace.source_maps[-1]))
    assert len(full.hidden_states) == len(short.hidden_states) == 5
    assert torch.equal(full.hidden_states[0], short.hidden_states[0])
    for i, source in enumerate(trace.source_maps):
        assert torch.equal(source, full_trace.source_maps[i])
        assert torch.equal(full.hidden_states[i + 1], put_back(short.hidden_states[i + 1], source))
    if "pooler_output" in short:
        assert torch.equal(full.pooler_output, short.pooler_output)
    plan = model.merge_plan()
    assert full.last_hidden_state.shape[1] == plan.output_tokens == plan.num_tokens


@pytest.mark.parametrize("method", ["tome", "soft"])
def test_tuples_are_unmerged_as_outputs_are(make_bare: Make, pixels: Tensor, method: str) -> None:
    model = attach(make_bare(), CONFIGS[method], unmerge=True)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        named, plain = model(pixels, **wanted), model(pixels, **wanted, return_dict=False)
    for ours, theirs in zip(plain, named.to_tuple(), strict=True):
        for a, b in zip(*((ours, theirs) if isinstance(ours, tuple) else ((ours,), (theirs,))), strict=True):
            assert torch.equal(a, b)


def test_the_argument_overrides_the_field_and_the_field_says_it_alone(make_bare: Make, pixels: Tensor) -> None:
    for field in (False, True):
        for argument in (None, False, True):
            config = ToMeConfig(r=9, unmerge=field)
            model = attach(make_bare(), config, unmerge=argument)
            unmerged = field if argument is None else argument
            assert model.merge_config.unmerge is model.config.merge["unmerge"] is unmerged
            assert model(pixels).last_hidden_state.shape[1] == (65 if unmerged else 29)
            assert config.unmerge is field  # the user's own object is left alone


def test_it_survives_saving_loading_and_changing_r(make_bare: Make, pixels: Tensor, tmp_path: Path) -> None:
    model = attach(make_bare(), DTEMConfig(r=9), unmerge=True)
    model.save_pretrained(tmp_path / "model")
    model.save_merge_adapter(tmp_path / "adapter")
    make_bare().save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        loaded = dtem_hf.AutoModel.from_pretrained(tmp_path / "model")
        adapted = dtem_hf.AutoModel.from_pretrained(tmp_path / "plain", merge=tmp_path / "adapter")
        assert torch.equal(loaded(pixels).last_hidden_state, expected)
        assert torch.equal(adapted(pixels).last_hidden_state, expected)
        loaded.set_reduction(3)
        assert loaded(pixels).last_hidden_state.shape[1] == 65
        assert attach(loaded, tmp_path / "adapter", unmerge=False)(pixels).last_hidden_state.shape[1] == 29


@pytest.mark.parametrize("training", [False, True])
def test_where_nothing_is_merged_nothing_changes(make_bare: Make, pixels: Tensor, training: bool) -> None:
    plain = make_bare().train(training)
    model = attach(make_bare().train(training), DTEMConfig(r=0), unmerge=True)
    with torch.no_grad():
        expected = plain(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, expected)
        model.set_reduction(9)
        with model.unmerged():
            assert torch.equal(model(pixels).last_hidden_state, expected)
        assert torch.equal(detach(model)(pixels).last_hidden_state, expected)


CLASSIFIERS: dict[str, Make] = {
    "vit": make("ViTForImageClassification", transformers.ViTConfig),
    "beit": make("BeitForImageClassification", transformers.BeitConfig),
    "dinov2": make("Dinov2ForImageClassification", transformers.Dinov2Config),
    "dinov2 with registers": make("Dinov2WithRegistersForImageClassification", transformers.Dinov2WithRegistersConfig),
    "clip": lambda: make_tower("CLIP"),
    "siglip": lambda: make_tower("Siglip"),
}


def make_tower(name: str) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        vision_config=small(getattr(transformers, f"{name}VisionConfig")).to_dict()
    )
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_classifier_sees_no_difference(classifier: str, method: str, pixels: Tensor) -> None:
    """Also one that averages: each patch is there once, or each token is weighed."""
    config = config_for(method, classifier)
    with torch.no_grad():
        short = attach(CLASSIFIERS[classifier](), config)(pixels).logits
        full = attach(CLASSIFIERS[classifier](), config, unmerge=True)(pixels).logits
        plain = CLASSIFIERS[classifier]()(pixels).logits
    torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full, plain, atol=1e-3)


STAGES = {"out_features": ["stem", "stage1", "stage3", "stage4"]}
BACKBONES: dict[str, tuple[Make, int, str | None]] = {
    # How it is made, its prefix tokens, and the norm that its feature maps pass through.
    "dinov2": (make("Dinov2Backbone", transformers.Dinov2Config, **STAGES), 1, "layernorm"),
    "dinov2 with registers": (
        make("Dinov2WithRegistersBackbone", transformers.Dinov2WithRegistersConfig, num_register_tokens=3, **STAGES),
        4,
        "layernorm",
    ),
    "dinov3": (
        make("DINOv3ViTBackbone", transformers.DINOv3ViTConfig, num_register_tokens=2, apply_layernorm=True, **STAGES),
        3,
        "norm",
    ),
    "beit": (make("BeitBackbone", transformers.BeitConfig, use_relative_position_bias=True, **STAGES), 1, None),
}


@torch.no_grad()
def run_recording(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """A pass, and all tokens in place in front of the first layer and behind each, put back by hand."""
    found: list[Tensor] = []
    layers = merged_layers(model)
    handles = [layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))]
    for layer in layers:
        handles.append(
            layer.register_forward_hook(lambda *a: found.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
        )
    output, trace = traced(model, *args, **kwargs)
    for handle in handles:
        handle.remove()
    return output, [found[0], *map(put_back, found[1:], trace.source_maps)]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_feature_maps_lie_on_their_grid(backbone: str, size: tuple[int, int], method: str, tmp_path: Path) -> None:
    """Without anybody asking, as a backbone is for nothing else; loaded by its Auto class."""
    made, prefix, norm = BACKBONES[backbone]
    made().save_pretrained(tmp_path)
    model = dtem_hf.AutoBackbone.from_pretrained(tmp_path, merge=CONFIGS[method])
    assert type(model).__name__ == type(made()).__name__
    images = torch.randn(2, 3, *size)
    output, tokens = run_recording(model, images)
    height, width = size[0] // 4, size[1] // 4
    assert len(output.feature_maps) == 4
    for feature_map, stage in zip(output.feature_maps, (0, 1, 3, 4), strict=True):
        expected = tokens[stage] if norm is None else getattr(model, norm)(tokens[stage])
        assert feature_map.shape == (2, 32, height, width)
        for row in range(height):
            for column in range(width):
                torch.testing.assert_close(
                    feature_map[:, :, row, column], expected[:, prefix + row * width + column], atol=1e-5, rtol=1e-5
                )
    with torch.no_grad():
        plain = made()(images).feature_maps
    assert torch.equal(output.feature_maps[0], plain[0])
    assert not torch.allclose(output.feature_maps[-1], plain[-1], atol=1e-3)
    if method != "soft":
        different = {tuple(patch.tolist()) for patch in output.feature_maps[-1][0].flatten(1).T}
        assert len(different) == model.merge_plan(image_size=size).tokens[-1] - prefix


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_that_merges_nothing_is_the_plain_one(backbone: str, pixels: Tensor) -> None:
    made, _, _ = BACKBONES[backbone]
    with torch.no_grad():
        expected = made()(pixels).feature_maps
        model = attach(made(), ToMeConfig(r=0))
        assert all(map(torch.equal, model(pixels).feature_maps, expected))
        model.set_reduction(9)
        assert not torch.equal(model(pixels).feature_maps[-1], expected[-1])
        assert all(map(torch.equal, detach(model)(pixels).feature_maps, expected))


SEGMENTATION = {"use_mask_token": False, "auxiliary_channels": 8, "num_labels": 5, "pool_scales": [1, 2]}
SEGMENTERS: dict[str, Make] = {
    "beit": make(
        "BeitForSemanticSegmentation",
        transformers.BeitConfig,
        use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
        **SEGMENTATION,
    ),
    "data2vec": make(
        "Data2VecVisionForSemanticSegmentation",
        transformers.Data2VecVisionConfig,
        use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
        **SEGMENTATION,
    ),
}


def decode(name: str, model: Any, tokens: list[Tensor]) -> Tensor:
    """The stock heads on tokens [B, 65, D] of every stage."""
    maps = [x[:, 1:].transpose(1, 2).unflatten(-1, (8, 8)) for x in tokens[:4]]
    if name == "beit":
        return model.decode_head(model.fpn(tuple(maps)))
    necks = (model.fpn1, model.fpn2, model.fpn3, model.fpn4)
    return model.decode_head([neck(x) for neck, x in zip(necks, maps, strict=True)])


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation_sees_the_grid(name: str, method: str, pixels: Tensor, tmp_path: Path) -> None:
    SEGMENTERS[name]().save_pretrained(tmp_path)
    plain = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    model = dtem_hf.AutoModelForSemanticSegmentation.from_pretrained(tmp_path, merge=CONFIGS[method])
    output, tokens = run_recording(model, pixels)
    with torch.no_grad():
        torch.testing.assert_close(output.logits, decode(name, plain, tokens), atol=1e-4, rtol=1e-4)
        unmerged = plain(pixels).logits
        assert output.logits.shape == unmerged.shape
        assert not torch.allclose(output.logits, unmerged, atol=1e-3)
        with model.unmerged():
            assert torch.equal(model(pixels).logits, unmerged)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation_trains_through_soft_merging(name: str, pixels: Tensor) -> None:
    model = attach(SEGMENTERS[name]().requires_grad_(False), DTEMConfig(r=9)).train()
    for parameter in model.merge_parameters():
        parameter.requires_grad_(True)
    labels = torch.randint(0, 5, (3, 32, 32))
    model(pixels, labels=labels).loss.backward()
    gradients = [parameter.grad for parameter in model.merge_parameters()]
    # The heads read what enters the last layer, and not what leaves it.
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients[:-2])


MAE = make(
    "ViTMAEForPreTraining",
    transformers.ViTMAEConfig,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    mask_ratio=0.5,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [ToMeConfig(r=4), DTEMConfig(r=4), EViTConfig(0.5)], ids=["tome", "dtem", "evit"])
def test_maes_decoder_gets_all_visible_tokens(config: MergeConfig, training: bool, pixels: Tensor) -> None:
    """In the shuffled order of its random mask, with the loss of the patches that it left out."""
    plain, model = MAE().train(training), attach(MAE(), config).train(training)
    noise = torch.rand(3, 64)
    output, tokens = run_recording(model, pixels, noise=noise)
    assert model.merge_plan().num_tokens == tokens[-1].shape[1] == 33
    with torch.no_grad():
        unmerged = plain(pixels, noise=noise)
        latent = plain.vit.layernorm(tokens[-1])
        expected = plain.decoder(latent, output.ids_restore).logits
    assert torch.equal(output.mask, unmerged.mask) and torch.equal(output.ids_restore, unmerged.ids_restore)
    torch.testing.assert_close(output.logits, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output.logits, unmerged.logits, atol=1e-3)
    per_patch = (output.logits - plain.patchify(pixels)).square().mean(dim=-1)
    hidden = [per_patch[image, patch] for image, patch in output.mask.nonzero().tolist()]
    torch.testing.assert_close(output.loss, torch.stack(hidden).mean(), atol=1e-5, rtol=1e-5)


def test_maes_encoder_alone_draws_the_same_mask_and_hands_on_fewer_tokens(pixels: Tensor) -> None:
    made = make("ViTMAEModel", transformers.ViTMAEConfig, mask_ratio=0.5)
    plain, model = made().train(), attach(made().train(), ToMeConfig(r=4))
    torch.manual_seed(3)
    expected = plain(pixels)
    torch.manual_seed(3)
    output = model(pixels)
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(output.ids_restore, expected.ids_restore)
    assert (expected.last_hidden_state.shape[1], output.last_hidden_state.shape[1]) == (33, 17)


def test_vitdet_is_refused_with_what_is_known(tmp_path: Path) -> None:
    """Its layers work on windows of a grid, which merged tokens do not form."""
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    model = transformers.VitDetBackbone(config)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"VitDetBackbone cannot be merged; .*Dinov2Backbone"):
        attach(model, ToMeConfig(r=4))
    assert [type(module) for module in model.modules()] == classes
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"AutoBackbone for model type 'vitdet' .*BeitBackbone"):
        dtem_hf.AutoBackbone.from_pretrained(tmp_path, merge=ToMeConfig(r=4))


def test_a_copy_and_a_compiled_model_are_unmerged_as_well(make_bare: Make, pixels: Tensor) -> None:
    model = attach(make_bare(), ToMeConfig(r=9), unmerge=True)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(pixels).last_hidden_state, expected)
        compiled: nn.Module = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
