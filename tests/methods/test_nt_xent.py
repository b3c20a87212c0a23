"""NT-Xent against its closed forms and its symmetries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.losses.nt_xent import nt_xent

Z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
Z2 = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 0.430190), (1.0, 0.673577), (0.1, 0.063780)])
def test_four_unit_vectors_by_hand(temperature, expected):
    assert nt_xent(Z1, Z2, temperature=temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_orthogonal_images_with_equal_views(temperature):
    z = torch.eye(8)  # the positive has similarity 1, all 2B - 2 = 14 negatives have 0
    expected = math.log1p(14 * math.exp(-1 / temperature))
    assert nt_xent(z, z, temperature=temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("pairs", "expected"), [(2, 1.098612), (4, 1.945910), (256, 6.236370)])
def test_a_collapsed_encoder_gives_the_log_of_the_other_rows(pairs, expected):
    z = torch.ones(pairs, 3)
    assert nt_xent(z, z, temperature=0.5).item() == pytest.approx(expected, abs=1e-5)


def test_two_pairs_identical_inside_and_orthogonal_or_antipodal_to_each_other():
    orthogonal, antipodal = torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert nt_xent(orthogonal, orthogonal, temperature=0.5).item() == pytest.approx(0.239545, abs=1e-6)
    assert nt_xent(antipodal, antipodal, temperature=0.5).item() == pytest.approx(0.035976, abs=1e-6)


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-2, 1e2), pairs=st.integers(2, 9))
def test_pairs_have_no_order_views_no_side_and_rows_no_length(seed, scale, pairs):
    rng = torch.Generator().manual_seed(seed)
    z1, z2 = torch.randn(2, pairs, 4, generator=rng)
    order = torch.randperm(pairs, generator=rng)
    shuffled = nt_xent(scale * z2[order], z1[order], temperature=0.5)
    torch.testing.assert_close(shuffled, nt_xent(z1, z2, temperature=0.5))


@given(seed=st.integers(0, 2**31))
def test_the_gradient_of_a_row_is_orthogonal_to_it(seed):
    rng = torch.Generator().manual_seed(seed)
    z1 = torch.randn(4, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    nt_xent(z1, z2, temperature=0.3).backward()
    assert (z1.grad * z1.detach()).sum(dim=1).abs().max() < 1e-10


@pytest.mark.parametrize("temperature", [0.005, 0.1, 10.0])
def test_extreme_temperatures_under_bf16_autocast_stay_finite_and_float32(temperature):
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z, z, temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z.grad.isfinite().all()


def test_one_pair_has_no_negatives_and_is_refused():
    with pytest.raises(ValueError, match="B >= 2"):
        nt_xent(torch.ones(1, 4), torch.ones(1, 4), temperature=0.5)


def test_each_anchor_by_hand_and_a_pair_of_them_as_anchors():
    z = torch.cat([Z1, Z2])
    similarity = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    each = similarity.logsumexp(dim=1) - similarity[torch.arange(4), torch.tensor([2, 3, 0, 1])]
    assert each.tolist() == pytest.approx([0.233257, 0.627123, 0.627123, 0.233257], abs=1e-6)
    for pair in (0, 1):
        found = nt_xent(Z1, Z2, temperature=0.5, anchors=slice(pair, pair + 1))
        assert found.item() == pytest.approx(each[[pair, pair + 2]].mean().item(), abs=1e-12)


@given(seed=st.integers(0, 2**31), workers=st.integers(1, 4), share=st.integers(2, 3))
def test_the_mean_over_equal_parts_of_the_anchors_is_the_whole_loss_and_gradient(seed, workers, share):
    rng, pairs = torch.Generator().manual_seed(seed), workers * share
    z1 = torch.randn(pairs, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(pairs, 4, generator=rng, dtype=torch.float64)
    parts = [slice(first, first + share) for first in range(0, pairs, share)]
    mean = sum(nt_xent(z1, z2, temperature=0.3, anchors=part) for part in parts) / len(parts)
    whole = nt_xent(z1, z2, temperature=0.3)
    torch.testing.assert_close(mean, whole)
    for ours, theirs in zip(torch.autograd.grad(mean, z1), torch.autograd.grad(whole, z1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_workers_matrix_is_its_own_anchors_by_all_rows():
    z1, z2 = torch.randn(2, 64, 8, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        nt_xent(z1, z2, temperature=0.5, anchors=slice(16, 24))
    assert max(sizes) == 2 * 8 * 2 * 64
