"""The contrastive task: CLIP's and SigLIP's own losses, by plain loops and by the stock model; texts computed once."""

import math

import pytest
import torch
from transformers import CLIPModel, SiglipModel

from dtem_hf import BadValue
from dtem_hf.training.parameters import relax
from dtem_hf.training.tasks.contrastive import contrastive_losses, similarity_divergence


CLASSES = {"clip_folder": CLIPModel, "siglip_folder": SiglipModel}


def softmax(row):
    highest = max(row)
    parts = [math.exp(x - highest) for x in row]
    return [part / sum(parts) for part in parts]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_clip_loss_by_plain_loops():
    s = torch.randn(5, 5) * 3
    rows, columns = s.tolist(), s.T.tolist()
    by_hand = [-(math.log(softmax(rows[i])[i]) + math.log(softmax(columns[i])[i])) / 2 for i in range(5)]
    torch.testing.assert_close(contrastive_losses(s, siglip=False), torch.tensor(by_hand))


def test_siglip_loss_by_plain_loops():
    s = torch.randn(4, 4) * 3
    by_hand = [-sum(math.log(sigmoid(s[i, j].item() * (1 if i == j else -1))) for j in range(4)) for i in range(4)]
    torch.testing.assert_close(contrastive_losses(s, siglip=True), torch.tensor(by_hand))


def test_divergence_by_plain_loops():
    target, s = torch.randn(4, 4), torch.randn(4, 4)

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    clip = [
        (kl(softmax(target.tolist()[i]), softmax(s.tolist()[i]))
         + kl(softmax(target.T.tolist()[i]), softmax(s.T.tolist()[i]))) / 2 for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(similarity_divergence(target, s, siglip=False), torch.tensor(clip))
    pairs = [[(sigmoid(t), sigmoid(x)) for t, x in zip(*rows, strict=True)] for rows in zip(target, s, strict=True)]
    siglip = [sum(kl((p, 1 - p), (q, 1 - q)) for p, q in row) for row in pairs]
    torch.testing.assert_close(similarity_divergence(target, s, siglip=True), torch.tensor(siglip))


@pytest.fixture(params=CLASSES)
def dual(request, caption_options, make_run):
    folder = str(request.getfixturevalue(request.param))
    changes = {"model": folder, "task": "contrastive", "r": "0", "distillation_weight": 0.0}
    run = make_run({**caption_options, **changes})
    batch = run.data.collate([run.data.train[0, i] for i in range(6)])
    return run, batch, CLASSES[request.param].from_pretrained(folder).eval()


@torch.no_grad()
def test_loss_without_merging_is_the_stock_models_own(dual):
    run, batch, stock = dual
    inputs = {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"]}
    if isinstance(stock, CLIPModel):
        inputs["attention_mask"] = batch["attention_mask"]
    expected = stock(**inputs, return_loss=True)
    torch.testing.assert_close(run.task.loss(run.model, run.model, batch), expected.loss)
    relax(run.model, False)
    figures = run.task.figures(run.model, batch, run.task.reference(run.model, batch))
    torch.testing.assert_close(figures["contrastive"].mean(), expected.loss)
    best = expected.logits_per_image.argmax(-1)
    assert torch.equal(figures["recall"], 100.0 * (best == torch.arange(6)))


def test_texts_are_computed_once(dual):
    run, batch, _ = dual
    calls = []
    run.task.whole.text_model.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    first = run.task.loss(run.model, run.model, batch)
    assert torch.equal(run.task.loss(run.model, run.model, batch), first) and calls == [6]
    known = set(batch["caption_id"].tolist())
    later = run.data.collate([run.data.train[1, i] for i in range(6)])
    run.task.loss(run.model, run.model, later)
    assert calls[1:] == [n for n in [len(set(later["caption_id"].tolist()) - known)] if n]


def test_siglip_reads_texts_of_one_length(caption_options, siglip_folder, make_run):
    run = make_run({**caption_options, "model": str(siglip_folder), "task": "contrastive"})
    assert run.data.collate([run.data.train[0, 0]])["input_ids"].shape == (1, 16)


def test_model_without_texts_is_refused(caption_options, vit_folder, make_run):
    with pytest.raises(BadValue, match=r"a dual encoder \(clip, siglip\), not vit"):
        make_run({**caption_options, "model": str(vit_folder), "task": "contrastive"})
