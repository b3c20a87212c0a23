"""Signals of features, on cases that can be worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.representation import alignment, effective_rank, uniformity


def test_views_that_agree_are_aligned_and_orthogonal_ones_are_two_apart():
    x = torch.randn(6, 4)
    assert alignment(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item() == pytest.approx(2)
    assert alignment(x, -x).item() == pytest.approx(4)


def test_a_collapsed_encoder_has_uniformity_0_and_two_opposite_features_minus_8():
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(-8)


def test_uniformity_is_the_log_of_the_mean_over_pairs():
    unit = torch.nn.functional.normalize(torch.randn(7, 3), dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(7) for j in range(i)]
    assert uniformity(unit).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equal_spread_over_k_directions_has_rank_k(rank):
    rows = torch.cat([torch.eye(rank, 8), -torch.eye(rank, 8)])
    assert effective_rank(rows).item() == pytest.approx(rank, abs=1e-4)


def test_one_point_has_rank_1():
    assert effective_rank(torch.ones(4, 3)).item() == pytest.approx(1)


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_no_signal_depends_on_the_length_of_all_features(seed, scale):
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    for signal in (uniformity, effective_rank):
        torch.testing.assert_close(signal(scale * x), signal(x), atol=1e-3, rtol=1e-3)
