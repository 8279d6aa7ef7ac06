"""The Fisher tasks: their loss by hand, what it reaches, that it falls, and what is drawn."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dtem_hf import BadValue
from dtem_hf.models.install import recorded_steps
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.fisher import sampled_log_probability, sampled_projection, sampled_words
from dtem_hf.training.parameters import relax
from dtem_hf.training.program import train
from tests.support.training_processes import logged


def batch_of(run, count=3):
    return run.data.collate([run.data.train[0, i] for i in range(count)])


def test_loss_by_hand(options, make_run):
    """Edge by edge, with the derivative along each merge; r = 1, so that soft grouping is one softmax."""
    run = make_run({**options, "task": "fisher", "r": "1", "top_k": 99, "fisher_similarity": 2.0, "seed": 5})
    batch = batch_of(run)
    loss = run.task.loss(run.model, run.model, batch)

    with recorded_steps(run.model) as steps:
        logits = run.model(pixel_values=batch["pixel_values"]).logits
    log_p = logits.log_softmax(-1)
    drawn = []
    for epoch, index, row in zip(batch["epoch"].tolist(), batch["index"].tolist(), log_p.exp().tolist(), strict=True):
        u = np.random.default_rng((5, 0, epoch, index)).random()
        drawn.append(next(y for y in range(len(row)) if sum(row[: y + 1]) >= u))
    output = sum(log_p[i, y] for i, y in enumerate(drawn))
    gradients = torch.autograd.grad(output, [step.x for step in steps], allow_unused=True)
    losses = []
    for step, g in zip(steps, gradients, strict=True):
        x, n = step.x.detach(), step.x.shape[1]
        g = torch.zeros_like(x) if g is None else g
        sizes = torch.ones(x.shape[:2]) if step.sizes is None else step.sizes
        edges = [(i, j) for i in range(2, n, 2) for j in range(1, n, 2)]
        for image in range(len(x)):
            damage, exponents = [], []
            for i, j in edges:
                mean = (sizes[image, i] * x[image, i] + sizes[image, j] * x[image, j]) / sizes[image, [i, j]].sum()
                change = g[image, i] @ (mean - x[image, i]) + g[image, j] @ (mean - x[image, j])
                damage.append(change.item() ** 2)
                keys = F.cosine_similarity(step.keys[image, i], step.keys[image, j], dim=0).item()
                exponents.append(math.exp(2.0 * (1 - keys)))
            cosines = [
                F.cosine_similarity(step.metric[image, i], step.metric[image, j], dim=0).item() for i, j in edges
            ]
            top = max(cosines)
            raw = [math.exp((c - top) / 0.01) for c in cosines]
            mean = sum(damage) / len(damage) + 1e-20
            cost = [(d / mean + 1e-3) * e for d, e in zip(damage, exponents, strict=True)]
            expected = sum(w / sum(raw) * c for w, c in zip(raw, cost, strict=True))
            losses.append(expected / (sum(cost) / len(cost)))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("task", ["fisher", "feature_fisher"])
def test_gradients_reach_all_embeddings_and_nothing_else(task, options, make_run, clip_folder):
    model = {"model": str(clip_folder)} if task == "feature_fisher" else {}
    run = make_run({**options, **model, "task": task})
    run.task.loss(run.model, run.model, batch_of(run)).backward()
    for name, parameter in run.model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("merge_embedding" in name), name


def test_tokens_are_really_removed_while_it_trains(options, make_run):
    run = make_run({**options, "task": "fisher"})
    relax(run.model, run.task.soft)
    with run.model.trace_merging() as trace:
        run.task.loss(run.model, run.model, batch_of(run))
    assert [size.shape[1] for size in trace.sizes] == [15, 13, 11, 9]


@pytest.mark.parametrize("task", ["fisher", "feature_fisher"])
def test_loss_falls(task, options, clip_folder):
    model = {"model": str(clip_folder)} if task == "feature_fisher" else {}
    run = {**options, **model, "steps": 60, "task": task, "init": "random", "lr": 0.02, "validate_every": 60}
    train(TrainArguments(**{**run, "validation_size": 4}))
    losses = logged(options["output_dir"], "loss")
    assert len(losses) == 60 and sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_draws_belong_to_images_and_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, -1)
    batch = {"epoch": torch.zeros(4000, dtype=torch.long), "index": torch.arange(4000)}
    leaf = logits.clone().requires_grad_()
    sampled_log_probability(leaf, batch, seed=0, sample=0).backward()
    drawn = (leaf.grad + logits.softmax(-1)).round()  # the gradient of log p(y) is one-hot(y) - p
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(-1), atol=0.03, rtol=0)

    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1000), slice(1000, None))]
    for sampler in (sampled_log_probability, sampled_projection):
        whole = sampler(logits, batch, 0, 0)
        parts = sampler(logits[:1000], halves[0], 0, 0) + sampler(logits[1000:], halves[1], 0, 0)
        torch.testing.assert_close(parts, whole)
        assert not torch.equal(sampler(logits, batch, 0, 1), whole)


def test_mean_square_of_a_projection_is_the_squared_distance():
    reference, moved = torch.randn(1, 6), torch.randn(1, 6)
    batch = {"epoch": torch.zeros(1, dtype=torch.long), "index": torch.zeros(1, dtype=torch.long)}
    squares = [
        (sampled_projection(moved, batch, 0, s) - sampled_projection(reference, batch, 0, s)).square().item()
        for s in range(4000)
    ]
    distance = (F.normalize(moved, dim=-1) - F.normalize(reference, dim=-1)).square().sum().item()
    assert np.mean(squares) == pytest.approx(distance, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_backbone": True}, "train_backbone=True"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
        ({"straight_through_from": 0}, "straight_through_from=0"),
        ({"fisher_samples": 0}, "fisher_samples=0"),
        ({"fisher_floor": -1.0}, r"fisher_floor=-1\.0"),
    ],
)
def test_refusals(change, message, options, make_run):
    with pytest.raises(BadValue, match=message):
        make_run({**options, "task": "fisher", **change})


def test_words_are_drawn_as_likely_as_they_are_and_none_at_padding():
    """Three visual tokens in front; the first caption has two words to predict, the second one."""
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    logits = torch.randn(2, 6, 3)
    logits[:, 3:] = probabilities.log()
    batch = {"labels": torch.tensor([[0, 1, 2], [0, 1, -100]])}
    counts = torch.zeros(3)
    for epoch in range(200):
        batch |= {"epoch": torch.full((2,), epoch), "index": torch.arange(2)}
        words = logits.clone().requires_grad_()
        sampled_words(words, batch, seed=0, sample=0).backward()
        # The gradient of log p(y) is one-hot(y) - p where a word is drawn, and nothing elsewhere.
        drawn = words.grad.abs().sum(-1) > 0
        assert drawn.tolist() == [[False, False, False, True, True, False], [False, False, False, True, False, False]]
        for place in words.grad[drawn]:
            counts[place.argmax()] += 1
            torch.testing.assert_close(place, torch.eye(3)[place.argmax()] - probabilities)
    expected = 600 * probabilities
    assert ((counts - expected).abs() < 4 * (expected * (1 - probabilities)).sqrt()).all()
