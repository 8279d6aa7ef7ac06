"""The captioning task: the model's own loss, each caption's loss, and what is said of captions without images."""

import math

import pytest
import torch
from transformers import BlipForConditionalGeneration, GitForCausalLM

from dtem_hf import BadValue, MergeAdapter
from dtem_hf.models.distances import caption_losses
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from dtem_hf.training.tasks.captioning import word_divergence
from tests.support.containers import built, llava
from tests.support.training_processes import logged


CLASSES = {"git_folder": GitForCausalLM, "blip_folder": BlipForConditionalGeneration}


@pytest.fixture(params=CLASSES)
def captioner(request, caption_options, make_run):
    """A run that merges nothing, a batch of its data, and the stock model."""
    folder = str(request.getfixturevalue(request.param))
    run = make_run({**caption_options, "model": folder, "task": "captioning", "r": "0"})
    batch = run.data.collate([run.data.train[0, i] for i in range(5)])
    return run, batch, CLASSES[request.param].from_pretrained(folder).eval()


@torch.no_grad()
def test_loss_without_merging_is_the_stock_models_own(captioner):
    run, batch, stock = captioner
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    torch.testing.assert_close(run.task.loss(run.model, run.model, batch), stock(**inputs, labels=labels).loss)


@torch.no_grad()
def test_loss_of_a_caption_is_what_the_stock_model_says_of_it_alone(captioner):
    """One by one and without padding, so that nothing of a neighbour can enter."""
    run, batch, stock = captioner
    figures = run.task.figures(run.model, batch, run.task.reference(run.model, batch))
    for i, own in enumerate(figures["loss"]):
        length = int(batch["attention_mask"][i].sum())
        ids = batch["input_ids"][i : i + 1, :length]
        alone = stock(pixel_values=batch["pixel_values"][i : i + 1], input_ids=ids, labels=ids).loss
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures["unmerged_loss"], figures["loss"], rtol=1e-4, atol=1e-5)


def test_divergence_by_plain_loops():
    target, logits = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    labels = torch.tensor([[1, 2, 3], [1, 0, -100]])
    terms = []
    for b, t in ((0, 0), (0, 1), (1, 0)):  # the words that are predicted, three visual tokens in front
        p, q = (x[b, 3 + t].softmax(-1).tolist() for x in (target, logits))
        terms.append(sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)))
    assert word_divergence(target, logits, labels).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_caption_without_a_second_token_has_no_loss():
    labels = torch.tensor([[5, 6], [5, -100]])
    losses = caption_losses(torch.zeros(2, 9, 7), labels)
    assert losses[0] == pytest.approx(torch.tensor(7.0).log()) and losses[1].isnan()


def test_ratio_is_that_of_the_means(caption_options, git_folder, tmp_path):
    changes = {"model": str(git_folder), "task": "captioning", "r": "4", "steps": 2, "validate_every": 2}
    summary = train(TrainArguments(**{**caption_options, **changes}))
    validations = logged(tmp_path / "run", "validation")
    assert len(validations) == 2 and summary["best_validation"] in validations
    for figures in validations:
        assert figures["ratio"] == pytest.approx(figures["loss"] / figures["unmerged_loss"], rel=1e-12)
        assert figures["loss"] != figures["unmerged_loss"]
    assert MergeAdapter.from_pretrained(tmp_path / "run" / "adapter").backbone.num_layers == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": None}, "captions=None: COCO"),
        ({"captions": "nowhere.json"}, "nowhere.json"),
        ({"validation_size": 24}, "validation_size=24: fewer than the 24"),
        ({"data": "."}, r"16 of 16 images are not in \.: \d+.png"),
        ({"max_caption_tokens": 1}, "max_caption_tokens=1: 2 or more"),
    ],
)
def test_bad_data_is_named(caption_options, git_folder, change, message, make_run):
    with pytest.raises((BadValue, FileNotFoundError), match=message):
        make_run({**caption_options, "model": str(git_folder), "task": "captioning", **change})


def test_model_that_writes_nothing_is_refused(caption_options, clip_folder, make_run):
    with pytest.raises(BadValue, match="a model that writes captions"):
        make_run({**caption_options, "model": str(clip_folder), "task": "captioning"})


def test_a_model_around_a_tower_is_refused_with_what_trains_it(caption_options, tmp_path, make_run):
    built(llava)[0].save_pretrained(tmp_path / "llava")
    with pytest.raises(BadValue, match=r"not LlavaForConditionalGeneration; .*examples/train_llava.py"):
        make_run({**caption_options, "model": str(tmp_path / "llava"), "task": "captioning"})
