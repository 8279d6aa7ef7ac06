"""transformers' pipelines on merged models that see more than an image's class: what the model answers by hand.

`tests/families/test_registered.py` runs the pipelines of every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor

import dtem_hf
from dtem_hf import ToMeConfig, attach
from tests.families.test_registered import tokenizer
from tests.models.test_processor import saved_processor
from tests.support.containers import built, depth_anything, llava, upernet
from tests.support.families import CASES


SIZE = {"height": 64, "width": 64}
LABELS = ["cat", "dog", "hen"]
TEXT = "<image> what is this"
WRITING = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}  # 8 other words


@dataclass(frozen=True)
class Piped:
    """A pipeline's task and model, the keyword and the class of its processor, and its arguments beside the image.

    `answer` computes a tensor with the model and the processor by hand; `found` reads it off the pipeline's answer.
    """

    task: str
    build: Callable[[], Any]
    processor: Callable[[], Any]
    answer: Callable[[Any, Any, Image.Image], Tensor]
    found: Callable[[Any], Tensor]
    asked: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[], dict[str, Any]] = dict


def of_family(family: str, name: str, **vision: Any) -> Callable[[], Any]:
    return lambda: CASES[family].make(getattr(tf, name), **vision)


def container(build: Callable[[], Any], std: float = 0.2) -> Any:
    """With weights that are large all the way, so that its answers differ."""
    model, _ = built(build)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def depth(model: Any, processor: Any, image: Image.Image) -> Tensor:
    output = model(**processor(image, return_tensors="pt"))
    return processor.post_process_depth_estimation(output, [image.size[::-1]])[0]["predicted_depth"]


def segments(model: Any, processor: Any, image: Image.Image) -> Tensor:
    """The class of every pixel."""
    logits = model(**processor(image, return_tensors="pt")).logits
    whole = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)
    return whole[0].argmax(0)


def from_masks(masks: list[dict[str, Any]]) -> Tensor:
    """Class i of `LABEL_i`, where its mask is white."""
    classes = {int(mask["label"].rpartition("_")[2]): torch.from_numpy(np.array(mask["mask"])) for mask in masks}
    assert (sum((mask > 0).int() for mask in classes.values()) == 1).all()
    return sum((mask > 0).long() * index for index, mask in classes.items())


def boxes(model: Any, processor: Any, image: Image.Image) -> Tensor:
    """Score, label and corners of every patch's box for each label, the best first."""
    rows = []
    for label, text in enumerate(LABELS):
        words = tokenizer()(text, return_tensors="pt")
        output = model(**processor(image, return_tensors="pt"), **words)
        x, y, w, h = output.pred_boxes[0].unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1) * torch.tensor(image.size * 2)
        scores = output.logits[0, :, :1].sigmoid()
        rows += torch.cat([scores, torch.full_like(scores, label), corners.trunc()], dim=-1).tolist()
    return torch.tensor(sorted(rows, reverse=True))


def from_boxes(found: list[dict[str, Any]]) -> Tensor:
    names = ("xmin", "ymin", "xmax", "ymax")
    rows = [[x["score"], LABELS.index(x["label"]), *(x["box"][name] for name in names)] for x in found]
    return torch.tensor(sorted(rows, reverse=True))


def written(model: Any, processor: Any, image: Image.Image) -> Tensor:
    inputs = processor(images=image, text=TEXT, return_tensors="pt")
    tokens = model.generate(**inputs, **WRITING)
    return tokens[0, inputs["input_ids"].shape[1] :]


PIPED = {
    "depth_anything": Piped(
        "depth-estimation",
        lambda: container(depth_anything),
        lambda: tf.DPTImageProcessorPil(size=SIZE),
        depth,
        lambda answer: answer["predicted_depth"],
    ),
    "dpt": Piped(
        "depth-estimation",
        of_family("dpt", "DPTForDepthEstimation"),
        lambda: tf.DPTImageProcessorPil(size={"height": 32, "width": 32}),
        depth,
        lambda answer: answer["predicted_depth"],
    ),
    "beit": Piped(
        "image-segmentation",
        of_family("beit", "BeitForSemanticSegmentation", out_indices=[1, 2, 3, 4]),
        lambda: tf.BeitImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        segments,
        from_masks,
    ),
    "upernet": Piped(
        "image-segmentation",
        lambda: container(upernet),
        lambda: tf.BeitImageProcessorPil(size=SIZE, do_center_crop=False),
        segments,
        from_masks,
    ),
    "owlvit": Piped(
        "zero-shot-object-detection",
        of_family("owlvit", "OwlViTForObjectDetection"),
        lambda: tf.OwlViTImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        boxes,
        from_boxes,
        {"candidate_labels": LABELS, "threshold": 0.0},
        lambda: {"tokenizer": tokenizer()},
    ),
}


@pytest.fixture
def registered() -> Iterator[None]:
    dtem_hf.register()
    yield
    dtem_hf.unregister()


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 50))


@torch.no_grad()
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", PIPED)
def test_a_pipeline_answers_what_the_merged_model_answers_by_hand(
    name: str, picture: Image.Image, tmp_path: Path
) -> None:
    """Of a merged model that was saved, loaded by the pipeline; the plain model answers otherwise."""
    piped = PIPED[name]
    model, processor = piped.build(), piped.processor()
    plain = piped.answer(model, processor, picture)
    attach(model, ToMeConfig(r=12)).save_pretrained(tmp_path)
    pipe = tf.pipeline(piped.task, model=str(tmp_path), image_processor=processor, device="cpu", **piped.parts())
    found = piped.found(pipe(picture, **piped.asked))
    torch.testing.assert_close(found, piped.answer(model, processor, picture), atol=1e-5, rtol=1e-5)
    assert found.shape != plain.shape or not torch.allclose(found, plain, atol=1e-3)


@torch.no_grad()
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("unmerge", [None, False], ids=["all tokens", "merged tokens"])
def test_a_pipeline_writes_what_a_merged_llava_writes(
    unmerge: bool | None, picture: Image.Image, tmp_path: Path
) -> None:
    """Where the language model gets merged tokens, with the processor that writes as many placeholders."""
    model = container(llava, std=0.5)
    saved_processor(tmp_path, "llava")
    plain = written(model, tf.AutoProcessor.from_pretrained(tmp_path), picture)
    attach(model, ToMeConfig(r=12), unmerge=unmerge).save_pretrained(tmp_path)
    loaded = dtem_hf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = dtem_hf.AutoProcessor.from_pretrained(tmp_path, merge=loaded)
    pipe = tf.pipeline("image-text-to-text", model=loaded, processor=processor, device="cpu")
    found = pipe(images=picture, text=TEXT, return_tensors=True, generate_kwargs=WRITING)[0]["generated_token_ids"]
    tokens = written(model, dtem_hf.AutoProcessor.from_pretrained(tmp_path, merge=model), picture)
    assert torch.as_tensor(found)[-8:].tolist() == tokens.tolist()
    assert tokens.tolist() != plain.tolist()


@torch.no_grad()
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family, name", [("videomae", "VideoMAE"), ("vivit", "Vivit")])
def test_a_pipeline_classifies_a_video_as_the_merged_model_does(family: str, name: str, tmp_path: Path) -> None:
    """The pipeline takes files alone, which PyAV decodes."""
    if find_spec("av") is None:
        pytest.skip("transformers' pipeline decodes videos with PyAV, which is not installed")
    import av

    model = CASES[family].make(getattr(tf, f"{name}ForVideoClassification"))
    noise = np.random.default_rng(0).integers(0, 256, size=(model.config.num_frames, 32, 32, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=8, width=32, height=32, pix_fmt="bgr0")
        for frame in noise:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    processor = tf.VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    inputs = processor(list(noise), return_tensors="pt")
    plain = model(**inputs).logits[0].softmax(-1)
    attach(model, ToMeConfig(r=9)).save_pretrained(tmp_path / "model")
    expected = model(**inputs).logits[0].softmax(-1)
    pipe = tf.pipeline("video-classification", model=str(tmp_path / "model"), image_processor=processor, device="cpu")
    found = {each["label"]: each["score"] for each in pipe(str(tmp_path / "clip.mkv"), top_k=10)}
    scores = torch.tensor([found[model.config.id2label[index]] for index in range(10)])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores, plain, atol=1e-4)
