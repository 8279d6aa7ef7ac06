"""Kendall correlation against a count of pairs, on similarities computed one pair of tokens at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from dtem_hf import BadValue, DTEMConfig, ToMeConfig, attach
from dtem_hf.evaluation.correlation import block_ranges, correlation_table, similarity_correlations


def slow_tau(x, y):
    """τ-b: concordant minus discordant pairs, over the geometric mean of the pairs that are not tied in x, in y."""
    score, untied_x, untied_y = 0, 0, 0
    for i in range(len(x)):
        for j in range(i):
            a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
            score += a * b
            untied_x += a != 0
            untied_y += b != 0
    return score / np.sqrt(untied_x * untied_y)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_tau_of_every_layer_and_image_is_that_of_a_count(make_classifier, pixels):
    """17 tokens: 8 odd positions and 8 even ones behind CLS; the model's own keys are read from hooks."""
    model = make_classifier(patch_size=8, num_hidden_layers=2)
    keys, inputs = [], []

    def note(module, arguments, output):
        inputs.append(arguments[0])
        keys.append(output)

    hooks = [layer.attention.k_proj.register_forward_hook(note) for layer in model.vit.layers]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    attach(model, DTEMConfig(r=3, init="random")).requires_grad_(False)
    embedding = model.vit.merge_embedding
    expected = np.zeros((2, 3))
    for layer in range(2):
        metric = keys[layer].double().unflatten(-1, (4, 8)).mean(dim=2)
        projection = embedding.projections[layer].double()
        learned = nn.functional.linear(inputs[layer].double(), projection.weight, projection.bias)
        projection.float()
        for image in range(3):
            pairs = [(i, j) for i in range(2, 17, 2) for j in range(1, 17, 2)]
            by_keys = [cosine(metric[image, i], metric[image, j]) for i, j in pairs]
            by_embedding = [cosine(learned[image, i], learned[image, j]) for i, j in pairs]
            expected[layer, image] = slow_tau(by_keys, by_embedding)
    # Two similarities that differ in the eighth digit may change places in float32: one pair of 2016.
    np.testing.assert_allclose(similarity_correlations(model, pixels), expected, atol=2 / 2016)
    assert np.abs(expected).max() < 0.9


def test_an_untrained_embedding_ranks_like_the_keys_and_the_model_stays_as_it_was(make_classifier, pixels):
    model = attach(make_classifier(), DTEMConfig(r=5)).train()
    merging, hooks = model.vit.merging, [len(m._forward_hooks) for m in model.modules()]
    taus = similarity_correlations(model, pixels)
    assert taus.shape == (4, 3)
    np.testing.assert_allclose(taus, 1, atol=1e-3)
    assert model.merge_config.r == 5 and model.training and model.vit.merging is merging
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_without_an_embedding_there_is_nothing_to_correlate(make_classifier, pixels):
    for model in (make_classifier(), attach(make_classifier(), ToMeConfig(r=2))):
        with pytest.raises(BadValue, match="a learned embedding"):
            similarity_correlations(model, pixels)


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [(12, [(1, 4), (5, 8), (9, 12)]), (24, [(1, 8), (9, 16), (17, 24)]), (4, [(1, 2), (3, 3), (4, 4)])],
)
def test_blocks_in_three_ranges(layers, ranges):
    assert block_ranges(layers) == ranges


def test_fewer_layers_than_ranges():
    assert block_ranges(2) == [(1, 1), (2, 2)]


def test_table_is_the_mean_over_layers_and_images():
    draw = np.random.default_rng(0)
    before, after = draw.random((6, 5)), draw.random((6, 5))
    rows = correlation_table({"before": before, "after": after})
    assert [row["blocks"] for row in rows] == ["1–2", "3–4", "5–6"]
    for i, row in enumerate(rows):
        values = [after[layer, image] for layer in (2 * i, 2 * i + 1) for image in range(5)]
        assert row["after"] == pytest.approx(sum(values) / 10)
        means = [(after[2 * i, image] + after[2 * i + 1, image]) / 2 for image in range(5)]
        assert row["after_std"] == pytest.approx(np.sqrt(np.mean((np.array(means) - np.mean(means)) ** 2)))
    with pytest.raises(BadValue, match="same number of layers"):
        correlation_table({"before": before, "after": after[:3]})
