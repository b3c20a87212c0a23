"""The noise-contrastive losses against their closed forms, and against a slow reference in double precision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from methods.losses.nce import (
    constant_z_nce,
    info_nce,
    log_partition,
    mean_cosine,
    nonparametric_softmax,
    softmax_nce,
)

U = torch.tensor([0.6, 0.8], dtype=torch.float64)
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64)
SIMILARITY = (ROWS @ U)[None]  # 0.6, the positive, 0.8, 0.28, -0.6
FIRST = torch.zeros(1, dtype=torch.int64)
LOSSES = {
    "info_nce": info_nce,
    "softmax_nce": softmax_nce,
    "constant_z": lambda scores, positive: constant_z_nce(
        scores, positive, log_normaliser=log_partition(scores, images=50), images=50
    ),
}


def random_scores(seed, anchors=4, candidates=6, spread=3.0):
    rng = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(anchors, candidates, generator=rng, dtype=torch.float64)
    return scores, torch.randint(candidates, (anchors,), generator=rng)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 5.817368), (0.5, 2.003343), (1.0, 2.000086)])
def test_softmax_nce_of_four_rows_by_hand(temperature, expected):
    assert softmax_nce(SIMILARITY / temperature, FIRST).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 2.913548), (0.5, 1.134570), (1.0, 1.178269)])
def test_info_nce_of_four_rows_by_hand(temperature, expected):
    assert info_nce(SIMILARITY / temperature, FIRST).item() == pytest.approx(expected, abs=1e-6)
    one_row = nonparametric_softmax(U[None], ROWS, FIRST, temperature=temperature)
    assert one_row.item() == pytest.approx(expected, abs=1e-6)


def test_the_probabilities_of_four_rows_by_hand():
    found = [math.exp(-info_nce(SIMILARITY / 0.5, torch.tensor([j])).item()) for j in range(4)]
    assert found == pytest.approx([0.321560, 0.479712, 0.169556, 0.029171], abs=1e-6)


def test_constant_z_nce_of_four_rows_by_hand():
    log_normaliser = log_partition(SIMILARITY / 0.5, images=100)
    assert log_normaliser.exp().item() == pytest.approx(258.125401, abs=1e-5)
    loss = constant_z_nce(SIMILARITY / 0.5, FIRST, log_normaliser=log_normaliser, images=100)
    assert loss.item() == pytest.approx(1.940123, abs=1e-6)


@pytest.mark.parametrize(
    ("negatives", "expected"), [(1, 1.386294), (2, 1.909543), (3, 2.249341), (10, 3.350997), (4096, 9.317888)]
)
def test_with_equal_similarities_softmax_and_constant_z_nce_coincide(negatives, expected):
    scores = torch.full((2, 1 + negatives), 0.3, dtype=torch.float64)
    positive = torch.tensor([0, 1])
    log_normaliser = log_partition(scores, images=5000)
    constant = constant_z_nce(scores, positive, log_normaliser=log_normaliser, images=5000)
    assert softmax_nce(scores, positive).item() == pytest.approx(expected, abs=1e-6)
    assert constant.item() == pytest.approx(expected, abs=1e-6)


def test_a_score_matrix_with_its_positives_on_the_diagonal_by_hand():
    scores = torch.tensor([[2.0, 0, -1], [1, 3, 0], [0, 0, 0]], dtype=torch.float64)
    rows = [info_nce(scores[i : i + 1], torch.tensor([i])).item() for i in range(3)]
    assert rows == pytest.approx([0.169846, 0.169846, 1.098612], abs=1e-6)
    assert info_nce(scores, torch.arange(3)).item() == pytest.approx(0.479435, abs=1e-6)


@pytest.mark.parametrize(("candidates", "expected"), [(8, 2.079442), (256, 5.545177)])
def test_equal_scores_of_n_candidates_give_ln_n(candidates, expected):
    scores = torch.full((3, candidates), -1.5, dtype=torch.float64)
    assert info_nce(scores, torch.tensor([0, 3, 7])).item() == pytest.approx(expected, abs=1e-6)


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_no_softmax_loss(seed, shift):
    scores, positive = random_scores(seed)
    moved = scores + shift * torch.arange(1, 5, dtype=torch.float64)[:, None] / 4
    for loss in (info_nce, softmax_nce):
        torch.testing.assert_close(loss(moved, positive), loss(scores, positive), atol=1e-10, rtol=1e-9)


@given(seed=st.integers(0, 2**31))
def test_the_bound_on_mutual_information_is_at_most_ln_n(seed):
    scores, positive = random_scores(seed)
    assert math.log(6) - info_nce(scores, positive).item() <= math.log(6)


@given(seed=st.integers(0, 2**31))
def test_candidates_have_no_order_and_the_mean_is_over_anchors(seed):
    scores, positive = random_scores(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for name in ("info_nce", "softmax_nce"):
        loss = LOSSES[name]
        torch.testing.assert_close(loss(scores[:, order], order.argsort()[positive]), loss(scores, positive))
        alone = torch.stack([loss(scores[i : i + 1], positive[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(alone.mean(), loss(scores, positive))


@given(seed=st.integers(0, 2**31), images=st.integers(6, 1000))
def test_all_forms_agree_with_their_formulas_written_out(seed, images):
    scores, positive = random_scores(seed)
    e, k = np.exp(scores.numpy()), 5
    p, normaliser = e / e.sum(axis=1, keepdims=True), images * e.mean()
    own = np.arange(6) == positive.numpy()[:, None]
    softmax = -np.where(own, np.log(p), np.log(1 - p)).sum(axis=1).mean()
    noise, big = k / images, e / normaliser
    constant = -np.where(own, np.log(big / (big + noise)), np.log(noise / (big + noise))).sum(axis=1).mean()
    log_normaliser = log_partition(scores, images=images)
    found = constant_z_nce(scores, positive, log_normaliser=log_normaliser, images=images)
    assert softmax_nce(scores, positive).item() == pytest.approx(softmax, rel=1e-8)
    assert found.item() == pytest.approx(constant, rel=1e-8)


@pytest.mark.parametrize("form", LOSSES)
def test_a_match_among_orthogonal_negatives_costs_less_the_colder_until_nothing(form):
    similarity = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    found = [LOSSES[form](similarity / t, FIRST).item() for t in (1.0, 0.5, 0.1, 0.02)]
    assert found == sorted(found, reverse=True)
    if form != "constant_z":  # its loss at Z of the same row ends at K ln((P + K/N) / (K/N)) > 0
        assert found[-1] == pytest.approx(0, abs=1e-12)


def test_constant_z_ends_at_zero_when_z_leaves_the_match_more_likely_than_noise():
    similarity = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    log_normaliser = torch.tensor(0.5 / 0.02, dtype=torch.float64)
    loss = constant_z_nce(similarity / 0.02, FIRST, log_normaliser=log_normaliser, images=10)
    assert loss.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("right", [True, False])
def test_a_probability_of_one_in_float32_leaves_the_loss_and_gradient_finite(right):
    scores = torch.tensor([[100.0, 0.0, -3.0]], requires_grad=True)
    loss = softmax_nce(scores, torch.tensor([0 if right else 1]))
    loss.backward()
    exact = 0.0 if right else 100 + 100 - math.log1p(math.exp(-3))  # -ln p_0 = 100, -ln(1 - p_1) = 100 - ln(1 + e^-3)
    assert loss.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert scores.grad.isfinite().all()


@given(seed=st.integers(0, 2**31))
def test_what_is_no_candidate_has_no_part_in_loss_or_gradient(seed):
    scores, positive = random_scores(seed)
    wide = torch.cat([scores, torch.full((4, 2), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    for loss in (info_nce, softmax_nce):
        wide.grad = None
        found = loss(wide, positive)
        found.backward()
        torch.testing.assert_close(found.detach(), loss(scores, positive))
        assert (wide.grad[:, 6:] == 0).all() and wide.grad.isfinite().all()


@given(seed=st.integers(0, 2**31))
def test_the_softmax_nce_gradient_is_the_one_of_finite_differences(seed):
    scores, positive = random_scores(seed, anchors=2, candidates=4)
    assert torch.autograd.gradcheck(lambda s: softmax_nce(s, positive), scores.requires_grad_())


@pytest.mark.parametrize("form", LOSSES)
def test_bf16_scores_under_autocast_give_a_finite_float32_loss(form):
    scores = (torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) / 0.01).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[form](scores, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and scores.grad.isfinite().all()


def test_the_negative_terms_are_averaged_over_the_batch():
    scores, positive = random_scores(0)
    for loss in (info_nce, softmax_nce):
        torch.testing.assert_close(loss(scores.repeat(3, 1), positive.repeat(3)), loss(scores, positive))


def test_the_whole_bank_with_equal_rows_gives_ln_of_its_rows_and_length_does_not_matter():
    rows = F.normalize(torch.ones(8, 3, dtype=torch.float64), dim=1)
    embedding = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = nonparametric_softmax(embedding, rows, torch.tensor([0, 5]), temperature=0.07)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-9)
    rows = F.normalize(torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)
    long, short = (nonparametric_softmax(s * embedding, rows, torch.tensor([0, 5]), temperature=0.1) for s in (9, 0.1))
    torch.testing.assert_close(long, short)


def test_mean_cosine_is_one_when_collapsed_and_zero_when_orthogonal_or_alone():
    assert mean_cosine(torch.ones(5, 3)).item() == pytest.approx(1, abs=1e-6)
    assert mean_cosine(3 * torch.eye(4)).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(-1, abs=1e-6)
    assert mean_cosine(torch.ones(1, 3)).item() == pytest.approx(0, abs=1e-6)
