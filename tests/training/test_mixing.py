"""Mixup and cutmix: pixels and targets by hand, and draws that depend on the key alone."""

import pytest
import torch
from scipy.stats import beta, kstest

from dtem_hf.training.mixing import mix, soft_targets


@pytest.fixture
def batch():
    return torch.randn(6, 3, 20, 24)


def test_mixup_is_a_weighted_mean_of_two_images(batch):
    for k in range(10):
        mixed = mix(batch, 0.8, 0.0, (0, k))
        for i in range(6):
            share, partner = mixed.share[i].item(), int(mixed.partner[i])
            expected = (1 - share) * batch[i] + share * batch[partner]
            torch.testing.assert_close(mixed.pixel_values[i], expected)
        assert len(set(mixed.share.tolist())) == 1 and sorted(mixed.partner.tolist()) == list(range(6))


def test_cutmix_is_a_rectangle_of_another_image_whose_area_is_the_share(batch):
    seen = 0
    for k in range(10):
        mixed = mix(batch, 0.0, 1.0, (0, k))
        for i in range(6):
            partner = int(mixed.partner[i])
            if partner == i:
                continue
            seen += 1
            foreign = (mixed.pixel_values[i] == batch[partner]).all(0)
            own = (mixed.pixel_values[i] == batch[i]).all(0)
            assert (foreign ^ own).all()
            rows, columns = foreign.any(1).sum(), foreign.any(0).sum()
            assert foreign.sum() == rows * columns
            assert mixed.share[i].item() == pytest.approx(foreign.float().mean().item(), abs=1e-6)
    assert seen > 30


def test_soft_targets_by_hand(batch):
    labels = torch.tensor([4, 0, 2, 2, 1, 3])
    mixed = mix(batch, 0.8, 1.0, (1, 2, 3))
    targets = soft_targets(labels, mixed, 5)
    for i in range(6):
        row = [0.0] * 5
        row[labels[i]] += 1 - mixed.share[i].item()
        row[labels[mixed.partner[i]]] += mixed.share[i].item()
        assert targets[i].tolist() == pytest.approx(row, abs=1e-6)


def test_shares_are_drawn_from_the_beta_that_was_asked_for():
    pixels = torch.zeros(2, 1, 2, 2)
    shares = [mix(pixels, 0.8, 0.0, (5, k)).share[0].item() for k in range(300)]
    assert kstest(shares, beta(0.8, 0.8).cdf).pvalue > 0.01
    assert kstest(shares, beta(3.0, 3.0).cdf).pvalue < 0.01


def test_both_are_drawn_half_and_half(batch):
    count = 0
    for k in range(200):
        mixed = mix(batch, 0.8, 1.0, (9, k))
        pixels, partners = mixed.pixel_values, batch[mixed.partner]
        count += bool(((pixels == batch) | (pixels == partners)).all())  # cut, not blended
    assert 70 < count < 130  # four standard deviations


def test_draw_depends_on_the_key_alone(batch):
    first = mix(batch, 0.8, 1.0, (0, 1, 2))
    torch.rand(5)
    before = torch.get_rng_state()
    again = mix(batch, 0.8, 1.0, (0, 1, 2))
    assert torch.equal(first.pixel_values, again.pixel_values) and torch.equal(first.share, again.share)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(mix(batch, 0.8, 1.0, (0, 1, 3)).pixel_values, first.pixel_values)


def test_nothing_is_mixed_unless_asked(batch):
    mixed = mix(batch, 0.0, 0.0, ())
    assert mixed.pixel_values is batch
    labels = torch.arange(6)
    assert torch.equal(soft_targets(labels, mixed, 6), torch.eye(6))
