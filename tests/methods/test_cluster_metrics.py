"""Scores of clusterings, retrieval and rankings: closed forms, invariants, and scikit-learn and scipy beside them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from methods.metrics import (
    ari,
    assignment,
    average_precision,
    hungarian_accuracy,
    mean_average_precision,
    nmi,
    purity,
    retrieval_map,
    retrieval_precision,
)

SCORES = (purity, nmi, ari, hungarian_accuracy)


def rows(text):
    return torch.tensor([int(letter) for letter in text])


@st.composite
def partitions(draw):
    count = draw(st.integers(2, 40))
    return tuple(torch.tensor(draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))) for _ in range(2))


class TestClusterings:
    def test_six_rows_by_hand(self):
        label, cluster = rows("000111"), rows("001111")
        assert nmi(label, cluster) == pytest.approx(2 * 0.318257 / (0.693147 + 0.636514), abs=1e-6)
        assert nmi(label, cluster) == pytest.approx(0.478704, abs=1e-6)
        assert ari(label, cluster) == pytest.approx(0.324324, abs=1e-6)
        assert purity(label, cluster) == pytest.approx(0.833333, abs=1e-6)
        assert hungarian_accuracy(label, cluster) == pytest.approx(0.833333, abs=1e-6)

    def test_independent_partitions_by_hand(self):
        label, cluster = rows("0011"), rows("0101")
        assert nmi(label, cluster) == pytest.approx(0, abs=1e-12)
        assert ari(label, cluster) == pytest.approx(-0.5) and purity(label, cluster) == 0.5

    def test_one_cluster_for_all_says_nothing(self):
        label, cluster = rows("0011222"), rows("0000000")
        assert nmi(label, cluster) == 0 and ari(label, cluster) == pytest.approx(0)
        assert nmi(cluster, cluster) == 0  # 0 / 0

    def test_more_clusters_than_labels_use_one_each(self):
        assert hungarian_accuracy(rows("000011"), rows("012345")) == pytest.approx(2 / 6)
        assert hungarian_accuracy(rows("012345"), rows("000011")) == pytest.approx(2 / 6)

    @pytest.mark.parametrize("score", SCORES)
    def test_rows_that_do_not_match_are_refused(self, score):
        with pytest.raises(ValueError, match="need equal"):
            score(rows("001"), rows("01"))
        with pytest.raises(ValueError, match="N >= 1"):
            score(rows(""), rows(""))

    @settings(deadline=None)
    @given(pair=partitions(), shift=st.integers(-100, 100))
    def test_the_numbers_of_clusters_do_not_matter(self, pair, shift):
        label, cluster = pair
        renamed = torch.tensor([3, 0, 5, 1, 4, 2])[cluster] * 7 + shift
        for score in SCORES:
            assert score(label, renamed) == pytest.approx(score(label, cluster), abs=1e-12)

    @settings(deadline=None)
    @given(pair=partitions())
    def test_equal_partitions_have_one(self, pair):
        assume(len(pair[0].unique()) > 1)  # one cluster for all: 0 / 0
        for score in SCORES:
            assert score(pair[0], 9 - pair[0]) == pytest.approx(1)

    @settings(deadline=None)
    @given(pair=partitions(), seed=st.integers(0, 2**31))
    def test_splitting_a_cluster_never_lowers_the_purity(self, pair, seed):
        label, cluster = pair
        part = torch.randint(2, cluster.shape, generator=torch.Generator().manual_seed(seed))
        assert purity(label, torch.where(cluster == cluster[0], 10 + part, cluster)) >= purity(label, cluster)

    @settings(deadline=None)
    @given(pair=partitions())
    def test_both_are_of_the_same_rank_but_for_purity(self, pair):
        for score in (nmi, ari, hungarian_accuracy):
            assert score(*pair) == pytest.approx(score(*pair[::-1]), abs=1e-12)

    @settings(deadline=None)
    @given(pair=partitions())
    def test_they_are_scikit_learns(self, pair):
        label, cluster = (part.numpy() for part in pair)
        assert ari(*pair) == pytest.approx(adjusted_rand_score(label, cluster), abs=1e-9)
        if len(np.unique(label)) > 1 or len(np.unique(cluster)) > 1:  # of two whole sets it says 1
            assert nmi(*pair) == pytest.approx(normalized_mutual_info_score(label, cluster), abs=1e-9)

    @settings(deadline=None)
    @given(pair=partitions())
    def test_one_label_a_cluster_is_never_better_than_the_most_frequent(self, pair):
        assert hungarian_accuracy(*pair) <= purity(*pair) + 1e-12


class TestAssignment:
    def test_two_by_two_by_hand(self):
        assert assignment(torch.tensor([[4, 1], [2, 3]])).tolist() == [1, 0]
        assert assignment(torch.tensor([[4, 1, 0], [2, 3, 0]])).tolist() in ([2, 0], [1, 2])  # costs 2 and 1
        assert assignment(torch.tensor([[4.0], [1.0], [2.0]])).tolist() == [-1, 0, -1]

    @settings(max_examples=100, deadline=None)
    @given(seed=st.integers(0, 2**31), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), whole=st.booleans())
    def test_its_cost_is_scipys(self, seed, shape, whole):
        cost = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
        cost = cost.round() if whole else cost  # with ties, and below 0
        found = assignment(cost)
        used = (found >= 0).nonzero()[:, 0]
        assert len(used) == min(shape) == len(found[used].unique())
        ours, (a, b) = float(cost[used, found[used]].sum()), linear_sum_assignment(cost.numpy())
        assert ours == pytest.approx(float(cost.numpy()[a, b].sum()), abs=1e-9)

    def test_a_hundred_labels_and_clusters_are_exact(self):
        cost = torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        a, b = linear_sum_assignment(cost.numpy())
        assert assignment(cost).tolist() == b.tolist()


def angles(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


class TestRetrieval:
    FEATURES, LABEL = angles(0, 10, 25, 90), torch.tensor([0, 1, 0, 1])

    def test_four_rows_by_hand(self):
        assert retrieval_precision(self.FEATURES, self.LABEL, k=1).mean() == 0
        assert retrieval_precision(self.FEATURES, self.LABEL, k=2).mean().item() == pytest.approx(0.375)
        assert retrieval_precision(self.FEATURES, self.LABEL, k=99).mean().item() == pytest.approx(1 / 3)
        assert retrieval_map(self.FEATURES, self.LABEL).mean().item() == pytest.approx(
            (1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4
        )

    def test_nobody_finds_themselves(self):
        label = torch.tensor([0, 1, 2, 3])  # all alone: only themselves would be right
        assert retrieval_precision(self.FEATURES, label, k=1).mean() == 0
        assert retrieval_map(self.FEATURES, label).isnan().all()

    def test_frames_of_ones_own_clip_are_not_found(self):
        features, label = angles(0, 1, 2, 80), torch.tensor([0, 0, 1, 0])
        assert retrieval_precision(features, label, k=1).mean().item() == pytest.approx(1 / 4 * (1 + 1 + 0 + 0))
        found = retrieval_precision(features, label, k=1, clip=torch.tensor([0, 0, 1, 2])).mean().item()
        assert found == pytest.approx(0)
        assert retrieval_precision(features, label, k=1, clip=torch.zeros(4)).isnan().all()

    def test_ties_go_to_the_lowest_index(self):
        features = torch.ones(5, 7) / 3  # of nothing but ties
        label = torch.tensor([0, 1, 0, 1, 0])
        assert retrieval_precision(features, label, k=1).mean().item() == pytest.approx(
            2 / 5
        )  # rows 2 and 4 find row 0
        precision = [(1 / 2 + 2 / 4) / 2, 1 / 3, (1 + 2 / 4) / 2, 1 / 2, (1 + 2 / 3) / 2]
        assert retrieval_map(features, label).mean().item() == pytest.approx(sum(precision) / 5)

    def test_perfect_features_have_one_and_need_a_k(self):
        label = torch.arange(12) % 3
        features = torch.eye(3)[label]
        assert retrieval_precision(features, label, k=3).eq(1).all() and retrieval_map(features, label).eq(1).all()
        with pytest.raises(ValueError, match="k = 0"):
            retrieval_precision(features, label, k=0)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**31), count=st.integers(3, 30), k=st.integers(1, 9), chunk=st.integers(1, 31))
    def test_lengths_and_chunks_change_nothing(self, seed, count, k, chunk):
        rng = torch.Generator().manual_seed(seed)
        features, label = torch.randn(count, 6, generator=rng), torch.arange(count) % 2
        longer = features * (0.1 + torch.rand(count, 1, generator=rng))
        for score in (lambda *a, **b: retrieval_precision(*a, k=k, **b), retrieval_map):
            torch.testing.assert_close(score(longer, label, chunk=chunk), score(features, label), equal_nan=True)

    def test_the_mean_precision_is_a_slow_references(self):
        rng = torch.Generator().manual_seed(0)
        features, label = torch.randn(25, 4, generator=rng), torch.arange(25) % 4
        unit = torch.nn.functional.normalize(features, dim=1)
        expected = []
        for query in range(25):
            others = sorted((i for i in range(25) if i != query), key=lambda i: -float(unit[query] @ unit[i]))
            right = [bool(label[i] == label[query]) for i in others]
            expected.append(sum(sum(right[: r + 1]) / (r + 1) for r in range(24) if right[r]) / sum(right))
        assert retrieval_map(features, label).mean().item() == pytest.approx(sum(expected) / 25, abs=1e-6)


def slow_average_precision(scores, positive):
    """Σ over distinct thresholds of the recall gained times the best precision from there on."""
    at = [(sum(p for s, p in zip(scores, positive, strict=True) if s >= t), sum(s >= t for s in scores))
          for t in sorted(set(scores), reverse=True)]  # fmt: skip
    recall, precision = [h / sum(positive) for h, _ in at], [h / n for h, n in at]
    return sum((recall[i] - (recall[i - 1] if i else 0)) * max(precision[i:]) for i in range(len(at)))


class TestAveragePrecision:
    def test_by_hand(self):
        falling = torch.tensor([4.0, 3.0, 2.0, 1.0])
        assert average_precision(falling, rows("1001")) == pytest.approx(0.75)
        assert average_precision(falling, rows("0101")) == pytest.approx(0.5)
        # recalls 1/3, 2/3, 1 at precisions 1/2, 2/3, 3/4: the envelope is 3/4 throughout, not what the ranks give
        assert average_precision(falling, rows("0111")) == pytest.approx(0.75)
        assert average_precision(falling, rows("1111")) == 1

    @settings(deadline=None)
    @given(seed=st.integers(0, 2**31), count=st.integers(2, 50))
    def test_a_perfect_ranking_has_one_and_the_worst_its_share(self, seed, count):
        scores = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        positive = scores >= scores.median()
        assert average_precision(scores, positive) == pytest.approx(1)
        lowest = scores == scores.min()
        assert average_precision(scores, lowest) == pytest.approx(float(lowest.float().mean()))

    @settings(deadline=None)
    @given(seed=st.integers(0, 2**31), count=st.integers(2, 30))
    def test_only_the_order_of_the_scores_matters(self, seed, count):
        rng = torch.Generator().manual_seed(seed)
        scores, positive = torch.randint(-9, 9, (count,), generator=rng).double(), torch.arange(count) % 3 == 0
        expected = average_precision(scores, positive)
        for other in (scores**3, scores.exp(), 5 * scores - 2):
            assert average_precision(other, positive) == pytest.approx(expected)
        order = torch.randperm(count, generator=rng)
        assert average_precision(scores[order], positive[order]) == pytest.approx(expected)

    @settings(deadline=None)
    @given(scores=st.lists(st.integers(0, 6), min_size=1, max_size=25), seed=st.integers(0, 2**31))
    def test_it_is_the_area_under_the_envelope(self, scores, seed):
        positive = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < 0.4
        positive[0] = True
        found = average_precision(torch.tensor(scores, dtype=torch.float32), positive)
        assert found == pytest.approx(slow_average_precision(scores, positive.tolist()), abs=1e-9)

    def test_a_constant_score_has_the_share_of_positives_whatever_their_order(self):
        assert average_precision(torch.zeros(8), rows("11000000")) == pytest.approx(0.25)

    def test_without_positives_there_is_nothing_to_say(self):
        with pytest.raises(ValueError, match="no positive among 3 rows"):
            average_precision(torch.rand(3), rows("000"))
        with pytest.raises(ValueError, match="need equal"):
            average_precision(torch.rand(3), rows("01"))

    def test_difficult_rows_and_classes_without_positives_are_left_out(self):
        scores = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0], [6.0, 4.0]])
        targets = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 0]])
        assert mean_average_precision(scores, targets) == (1.0, [1.0, None])
        assert mean_average_precision(scores, targets.abs())[1] == pytest.approx([1.0, 0.5])
        with pytest.raises(ValueError, match="none of 2 classes"):
            mean_average_precision(scores, -targets.abs())
