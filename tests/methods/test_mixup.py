"""MixUp by hand, and its coefficients against scipy's Beta distribution."""

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.mixup import beta, blend, mix_up, pool_draws
from methods.views.draws import Draws


def draws(rows, seed=0):
    return Draws.of(seed, 0, torch.arange(rows))


@pytest.mark.parametrize("coefficient", [0.3, 0.7])
def test_the_larger_share_is_the_images_own_and_labels_mix_as_images_do(coefficient):
    images = torch.tensor([1.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1)
    target = torch.tensor([[1, 0, 0], [0.2, 0.5, 0.3]], dtype=torch.float64)
    other, share = torch.tensor([1, 0]), torch.full((2,), coefficient, dtype=torch.float64)
    mixed, labels = blend(images, target, order=other, coefficient=share)
    assert mixed.flatten().tolist() == pytest.approx([2.2, 3.8], abs=1e-9)
    assert labels[0].tolist() == pytest.approx([0.76, 0.15, 0.09], abs=1e-9)
    assert labels[1].tolist() == pytest.approx([0.44, 0.35, 0.21], abs=1e-9)


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, 0.8183), (0.75, 0.7784)])
def test_the_mean_share_is_that_of_the_folded_beta_distribution(alpha, expected):
    parts = [beta(draws(20_000, seed), alpha) for seed in range(100)]
    share = torch.cat([torch.maximum(part, 1 - part) for part in parts])
    assert share.mean().item() == pytest.approx(expected, abs=1e-3) and share.min() >= 0.5


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75, 1.0, 4.0])
def test_coefficients_have_the_beta_distribution(alpha):
    rows, exact = 100_000, scipy.stats.beta(alpha, alpha)
    sample = beta(draws(rows), alpha)
    lower = sample[sample < 0.5].numpy()  # the upper half mirrors it, but float64 has fewer numbers near 1 than near 0
    assert len(lower) / rows == pytest.approx(0.5, abs=0.006)
    assert scipy.stats.kstest(lower, lambda x: 2 * exact.cdf(x)).statistic < 0.009  # 0.0087 at p = 0.001


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e6])
def test_coefficients_are_numbers_in_range_at_extreme_parameters(alpha):
    sample = beta(draws(10_000), alpha)
    assert sample.isfinite().all() and 0 <= sample.min() and sample.max() <= 1
    assert sample.mean().item() == pytest.approx(0.5, abs=0.02)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), alpha=st.floats(0.05, 4))
def test_mixed_targets_are_distributions_and_each_row_keeps_at_least_half_of_itself(seed, rows, alpha):
    images = torch.eye(rows)[:, :, None, None]  # channel i is how much of image i a mixture has
    target = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
    mixed, labels = mix_up(images, target, draws(rows, seed), alpha=alpha)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(rows))
    share = mixed[:, :, 0, 0]
    assert share.diagonal().min() >= 0.5 - 1e-6
    torch.testing.assert_close(labels, share @ target)


def test_every_row_is_somebodys_partner_once_and_any_row_may_be():
    rows, runs = 6, 3000
    partners = torch.zeros(rows, rows)
    for seed in range(runs):
        order = draws(rows, seed).fork(0).bits(1)[:, 0].argsort(stable=True)
        assert order.sort().values.tolist() == list(range(rows))
        partners[torch.arange(rows), order] += 1
    assert (partners / runs - 1 / rows).abs().max() < 0.03  # 4.4 standard errors


def test_equal_draws_mix_equally_and_torchs_generator_is_not_asked():
    images, target = torch.rand(5, 3, 2, 2), torch.rand(5, 3).softmax(dim=1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(mix_up(images, target, draws(5), alpha=0.75))
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], mix_up(images, target, draws(5, seed=1), alpha=0.75)[0])


def test_an_image_in_both_streams_is_mixed_by_different_numbers_in_each_view():
    batch = {"labelled.key": draws(3).key, "unlabelled.key": draws(5).key}
    keys = pool_draws(batch, views=2).key
    assert torch.equal(batch["labelled.key"], batch["unlabelled.key"][:3]) and len(keys.unique()) == 3 + 2 * 5
