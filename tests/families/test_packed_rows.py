"""Encoders whose images come as rows: each image alone and among others, softly and hard, and in prompts."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import dtem_hf
from dtem_hf import BadValue, DTEMConfig, ToMeConfig, UnsupportedModelError, attach, detach
from tests.support import slow_model
from tests.support.families import CASES
from tests.support.family_case import PATCH, FamilyCase
from tests.support.packed_rows import SQUARE, Grids, rows_of
from tests.support.slow_parts import Weights
from tests.support.slow_steps import Reduction, in_place
from tests.support.unmerging import tensors


MODELS = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
by_case = pytest.mark.parametrize("case", [CASES[name] for name in MODELS], ids=str)


@by_case
def test_sizes_are_rounded_as_the_processor_does(case: FamilyCase) -> None:
    """A plan is for the image that the processor makes."""
    model, side = attach(case.make(case.encoder), ToMeConfig(r=3)), PATCH * SQUARE
    for size in ((32, 32), (33, 27), (45, 51), (5, 60)):
        height, width = smart_resize(*size, factor=side, min_pixels=1, max_pixels=10**6)
        assert model.merge_plan(size).num_tokens == height * width // PATCH**2, size


MIXED: Grids = [(1, 8, 8), (1, 4, 6), (3, 4, 6), (1, 6, 4), (1, 2, 2)]


def segments(grids: Grids) -> list[tuple[int, tuple[int, int, int]]]:
    """Every image and every frame: its first row, and its grid as if it were alone."""
    found, start = [], 0
    for frames, height, width in grids:
        for _ in range(frames):
            found.append((start, (1, height, width)))
            start += height * width
    return found


def weights_of(model: Any) -> Weights:
    return {
        name.replace("merge_embedding.projections.", "merge_embedding.layers."): value.double()
        for name, value in model.state_dict().items()
    }


@by_case
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_images_of_several_sizes_equal_the_slow_reference(case: FamilyCase, attention: str) -> None:
    """Images of several sizes and the frames of a video in one pass, each by loops over its own tokens.

    A layer that has fewer tokens merges half of them. `tap`, in the file of a family whose models return that, too, is
    what is made of the tokens behind layer i.
    """
    row, inputs, tap = case.rows[0], rows_of(MIXED), getattr(import_module(f"tests.families.{case}"), "tap", None)
    model = attach(row.make(attention), DTEMConfig(r=[0, 5, 9, 2]))
    draw = torch.Generator().manual_seed(3)
    for parameter in model.merge_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    output, weights = model(**inputs), weights_of(model)
    for start, grid in segments(MIXED):
        count = math.prod(grid)
        alone = {"hidden_states": inputs["hidden_states"][start : start + count].double()}
        alone["grid_thw"] = torch.tensor([grid])
        reductions, left = [], count
        for r in (0, 5, 9, 2):
            reductions.append(min(r, left // 2))
            left -= reductions[-1]
        expected, trail = slow_model.run(weights, row.anatomy, alone, Reduction(r=reductions))
        found = {"last_hidden_state": output.last_hidden_state[start : start + count]}
        squares = slice(start // SQUARE**2, (start + count) // SQUARE**2)
        found["pooler_output"] = output.pooler_output[squares]
        for index, features in enumerate(getattr(output, "deepstack_features", ())):
            found[f"tap {index}"] = features[squares]
            assert tap is not None
            expected[f"tap {index}"] = tap(weights, index, in_place(trail[index]))
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name].double(), expected[name], atol=2e-5, rtol=1e-5)


@by_case
@torch.no_grad()
def test_an_image_alone_is_the_same_among_others(case: FamilyCase) -> None:
    """Also a frame of a video, as frames attend to themselves alone."""
    inputs, model = rows_of(MIXED), attach(case.make(case.encoder), ToMeConfig(r=4))
    together = model(**inputs).last_hidden_state
    for start, grid in segments(MIXED):
        rows = slice(start, start + math.prod(grid))
        alone = model(inputs["hidden_states"][rows], grid_thw=torch.tensor([grid])).last_hidden_state
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


@by_case
@torch.no_grad()
def test_sizes_that_differ_are_the_plain_model_where_nothing_merges(case: FamilyCase) -> None:
    inputs, plain = rows_of(MIXED), case.make(case.encoder)
    expected = tensors(plain(**inputs))
    model = attach(plain, DTEMConfig(r=0))
    assert all(map(torch.equal, tensors(model(**inputs)), expected))
    model.set_reduction(5)
    assert not torch.equal(model(**inputs).pooler_output, expected[1])
    with model.unmerged():
        assert all(map(torch.equal, tensors(model(**inputs)), expected))
    assert all(map(torch.equal, tensors(detach(model)(**inputs)), expected))


@by_case
def test_merged_tokens_and_mixed_traces_are_refused(case: FamilyCase) -> None:
    """The merger needs all rows; a trace holds images of one length."""
    with pytest.raises(BadValue, match=r"unmerge=False: None or True: \w+ reads all tokens, in place"):
        attach(case.make(case.encoder), ToMeConfig(r=4), unmerge=False)
    model = attach(case.make(case.encoder), ToMeConfig(r=4))
    with (
        model.trace_merging(),
        pytest.raises(UnsupportedModelError, match=r"images with the same number of tokens.* 64, 24, 4"),
    ):
        model(**rows_of(MIXED))
    with pytest.raises(UnsupportedModelError, match="takes rows of patches and grid_thw, not images of pixels"):
        model.set_reduction(target_speedup=1.2)
    with pytest.raises(
        UnsupportedModelError, match="head width 4: positions can be computed from rotations from 8 on"
    ):
        attach(case.make(case.encoder, num_attention_heads=8), ToMeConfig(r=9))


IMAGE, VIDEO, BEGIN, END = 5, 6, 3, 4
PROMPTS: dict[str, tuple[Grids, Grids]] = {
    "image": ([(1, 8, 8)], []),
    "images": ([(1, 8, 8), (1, 4, 6)], []),
    "video": ([], [(3, 4, 6)]),
    "mixed": ([(1, 8, 8), (1, 4, 6)], [(2, 4, 6)]),
}


def asked(images: Grids, videos: Grids, frame_by_frame: bool) -> dict[str, Any]:
    """A prompt with placeholders; a video is one run of them, or one for each frame."""
    runs = [(IMAGE, math.prod(grid)) for grid in images]
    for frames, height, width in videos:
        runs += [(VIDEO, height * width)] * frames if frame_by_frame else [(VIDEO, frames * height * width)]
    ids = [7, *(t for token, n in runs for t in (BEGIN, *[token] * (n // SQUARE**2), END)), 8, 9]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    inputs["mm_token_type_ids"] = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]])
    for grids, rows, sizes in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids:
            made = rows_of(grids)
            inputs |= {rows: made["hidden_states"], sizes: made["grid_thw"]}
    return inputs


@by_case
@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_generates(case: FamilyCase, prompt: str, tmp_path: Path) -> None:
    """What the plain model generates whose tower returns what the merged one makes of each image alone.

    The same from a folder; and with nothing merged, the plain model's own.
    """
    model_class: Any = MODELS[case.family]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 60}
    text |= {"num_hidden_layers": 2, "intermediate_size": 48, "rope_parameters": rope, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 59, "initializer_range": 0.3}
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": BEGIN,
        "vision_end_token_id": END,
    }
    config = model_class.config_class(
        vision_config=case.make(case.encoder).config.to_dict(), text_config=text, **tokens
    )
    torch.manual_seed(0)
    plain = model_class(config).eval()
    plain.model.visual.load_state_dict(case.make(case.encoder).state_dict())
    inputs = asked(*PROMPTS[prompt], frame_by_frame=case.family == "qwen3_vl")
    plain.save_pretrained(tmp_path / "plain")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def logits(model: Any) -> Tensor:
        return torch.stack(model.generate(**inputs, **options).logits)

    own = logits(plain)
    merged = dtem_hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", merge=ToMeConfig(r=5)).eval()
    assert merged.merge_config.part == "model.visual" and type(merged).__name__ == model_class.__name__
    found = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = dtem_hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert again.merge_config == merged.merge_config
    torch.testing.assert_close(logits(again), found, atol=1e-6, rtol=1e-6)

    tower = attach(case.make(case.encoder), ToMeConfig(r=5))

    def image_by_image(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        grids = [tuple(grid) for grid in kwargs["grid_thw"].tolist()]
        parts = [
            tower(args[0][start : start + math.prod(grid)], grid_thw=torch.tensor([grid]))
            for start, grid in segments(grids)
        ]
        output.pooler_output = torch.cat([part.pooler_output for part in parts])
        if "deepstack_features" in output:
            layers = zip(*(part.deepstack_features for part in parts), strict=True)
            output.deepstack_features = [torch.cat(layer) for layer in layers]
        return output

    handle = plain.model.visual.register_forward_hook(image_by_image, with_kwargs=True)
    torch.testing.assert_close(found, logits(plain), atol=1e-4, rtol=1e-4)
    handle.remove()
    assert not torch.allclose(found, own, atol=1e-3)
    merged.set_reduction(0)
    assert torch.equal(logits(merged), own)
    assert torch.equal(logits(attach(plain, ToMeConfig(r=0))), own)
