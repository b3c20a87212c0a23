"""k-means: the iterations by hand, its invariants, what may go wrong, and one answer whatever the workers."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import clustering
from methods.clustering import kmeans, lloyd, nearest, normalise_rows
from methods.collectives import all_reduce, gather_uneven
from methods.losses.cross_entropy import cross_entropy
from methods.metrics import purity
from methods.views.draws import Draws

LINE = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
SIZES = st.tuples(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 6))


def draws(seed=0):
    return Draws.of(seed, 0, torch.arange(1))


def points(seed, rows, dim, blobs=0):
    rng = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, dim, generator=rng)
    return found if not blobs else found + 20 * torch.randn(blobs, dim, generator=rng)[torch.arange(rows) % blobs]


def same_partition(a, b):
    return torch.equal(a[:, None] == a, b[:, None] == b)


class TestByHand:
    @pytest.mark.parametrize(
        ("iterations", "labels", "centroids"),
        [
            (1, [0, 0, 1, 1], [0, 20 / 3]),
            (2, [0, 0, 1, 1], [0.5, 9.5]),
            (25, [0, 0, 1, 1], [0.5, 9.5]),
        ],
    )
    def test_four_points_on_a_line(self, iterations, labels, centroids):
        found = lloyd(LINE, torch.tensor([[0.0], [1.0]]), iterations=iterations, precision="float32")
        assert found.labels.tolist() == labels and found.refilled == 0
        assert found.centroids[:, 0].tolist() == pytest.approx(centroids, abs=1e-5)
        assert found.inertia == pytest.approx([145, 17.555556, 1.0][: iterations + 1], abs=1e-5)

    def test_the_first_assignment_of_the_line(self):
        labels, distance = nearest(LINE, torch.tensor([[0.0], [1.0]]))
        assert labels.tolist() == [0, 1, 1, 1] and distance.tolist() == [0, 0, 64, 81]

    def test_a_row_has_almost_length_one_and_a_row_of_zeros_stays_one(self):
        found = normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor([[3 / 5.00001, 4 / 5.00001], [0, 0]]))

    def test_ties_go_to_the_lowest_index(self):
        centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
        rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [-2.0, -2.0]])
        assert nearest(rows, centroids)[0].tolist() == [0, 0, 0, 3]

    @pytest.mark.parametrize("clusters", [500, 1000, 2000, 5000, 10000, 16000])
    def test_a_head_of_zeros_costs_the_logarithm_of_the_clusters(self, clusters):
        loss = cross_entropy(torch.zeros(3, clusters), torch.tensor([0, 7, clusters - 1]))
        assert loss.item() == pytest.approx(math.log(clusters), abs=1e-5)


class TestInvariants:
    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES, clusters=st.integers(1, 8), precision=st.sampled_from(["float32", "bf16"]))
    def test_the_inertia_never_rises_and_no_cluster_is_empty(self, sizes, clusters, precision):
        seed, rows, dim = sizes
        found = kmeans(points(seed, rows, dim), min(clusters, rows), draws=draws(seed), precision=precision)
        for before, after in itertools.pairwise(found.inertia):
            assert after <= before * (1 + 1e-6) + 1e-9
        assert sorted(set(found.labels.tolist())) == list(range(len(found.centroids)))
        assert found.centroids.isfinite().all()

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES, precision=st.sampled_from(["float32", "bf16"]))
    def test_each_label_is_the_nearest_centroid_and_the_inertia_their_distance(self, sizes, precision):
        seed, rows, dim = sizes
        x = points(seed, rows, dim)
        found = kmeans(x, 1 + rows // 4, draws=draws(seed), precision=precision)
        distance = torch.cdist(x.double(), found.centroids.double()).square()
        own = distance.gather(1, found.labels[:, None])[:, 0]
        assert (own <= distance.amin(dim=1) + 1e-5).all()
        assert found.inertia[-1] == pytest.approx(float(own.sum()), rel=1e-4, abs=1e-4)

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES)
    def test_every_point_twice_leaves_the_centroids(self, sizes):
        x = points(*sizes)
        start = x[: 1 + len(x) // 5]
        once = lloyd(x, start, iterations=10, precision="float32")
        twice = lloyd(x.repeat(2, 1), start, iterations=10, precision="float32")
        torch.testing.assert_close(twice.centroids, once.centroids, atol=1e-5, rtol=1e-5)
        assert torch.equal(twice.labels, once.labels.repeat(2))

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES)
    def test_as_many_clusters_as_points_leave_no_inertia(self, sizes):
        x = points(*sizes)
        found = kmeans(x, len(x), draws=draws(), restarts=1)
        assert found.inertia[-1] == 0 and len(found.labels.unique()) == len(x)

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES, shift=st.integers(-64, 64))
    def test_moving_all_points_leaves_the_labels(self, sizes, shift):
        x = (points(*sizes) * 64).round() / 64  # so that moving rounds nothing
        start = x[: 1 + len(x) // 5]
        here, there = (lloyd(x + by, start + by, iterations=10) for by in (0, shift))
        assert torch.equal(here.labels, there.labels)
        torch.testing.assert_close(here.centroids + shift, there.centroids)

    def test_far_from_the_origin_the_labels_are_those_of_near_it(self):
        x = (points(0, 300, 16) * 64).round() / 64
        here, there = (kmeans(x + by, 10, draws=draws()) for by in (0, 1024))
        assert torch.equal(here.labels, there.labels)

    @settings(max_examples=20, deadline=None)
    @given(sizes=SIZES, clusters=st.integers(1, 8))
    def test_the_same_draws_give_the_same_answer(self, sizes, clusters):
        x = points(*sizes)
        one, two = (kmeans(x, min(clusters, len(x)), draws=draws(3)) for _ in range(2))
        assert torch.equal(one.labels, two.labels) and torch.equal(one.centroids, two.centroids)

    def test_the_memory_for_distances_changes_nothing(self, monkeypatch):
        x = normalise_rows(points(0, 120, 12))
        whole = kmeans(x, 20, draws=draws(), precision="float32")
        monkeypatch.setitem(clustering.SCORES, "cpu", 600)
        parts = kmeans(x, 20, draws=draws(), precision="float32")
        assert torch.equal(whole.labels, parts.labels) and torch.equal(whole.centroids, parts.centroids)
        assert whole.inertia == pytest.approx(parts.inertia)


def scikit_learns(*arguments, **settings):
    from sklearn.cluster import KMeans  # here, since each worker process reads this module anew

    return KMeans(*arguments, **settings)


class TestAgainstOthers:
    def test_well_separated_blobs_are_found(self):
        x = points(0, 600, 8, blobs=12)
        found = kmeans(x, 12, draws=draws())
        assert same_partition(found.labels, torch.arange(600) % 12)

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_the_inertia_is_within_two_per_cent_of_scikit_learns(self, precision):
        x = normalise_rows(points(1, 1500, 16) + points(2, 1500, 16, blobs=30) / 10)
        ours = kmeans(x, 40, draws=draws(), iterations=50, precision=precision).inertia[-1]
        theirs = scikit_learns(40, n_init=3, max_iter=50, random_state=0).fit(x.numpy()).inertia_
        assert ours < 1.02 * theirs

    def test_the_iterations_are_scikit_learns(self):
        x = points(3, 400, 5)
        theirs = scikit_learns(7, init=x[:7].numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
        found = lloyd(x, x[:7], iterations=300, precision="float32")
        assert found.labels.tolist() == theirs.labels_.tolist()
        assert found.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-5)

    def test_a_seed_is_drawn_by_its_squared_distance(self):
        """Of points 0, 1 and 3 two seeds: the pairs by hand, each first point 1/3. Many at once change no chance."""
        x = torch.tensor([[0.0], [1.0], [3.0]])
        shares = {(0, 1): 1 / 3 * (1 / 10 + 1 / 5), (0, 2): 1 / 3 * (9 / 10 + 9 / 13), (1, 2): 1 / 3 * (4 / 5 + 4 / 13)}
        held = clustering._Points.of(x)
        count = dict.fromkeys(shares, 0)
        for seed in range(600):
            seeds = (clustering._seed(held, 2, draws(seed)).double() + held.mean) * held.unit
            count[tuple(sorted([0, 1, 3].index(round(v)) for v in seeds[:, 0].tolist()))] += 1
        for pair, share in shares.items():
            assert count[pair] / 600 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 600))

    def test_a_third_seed_of_the_same_block_counts_the_second(self):
        """From 0 to 5, 5.1 and -3: once 5 is a seed, 5.1 is hardly at any distance and -3 is where it was."""
        held = torch.tensor([[5.0], [5.1], [-3.0]], dtype=torch.float64)
        distance, chance = torch.tensor([25.0, 26.01, 9.0], dtype=torch.float64), torch.full((3,), 0.5).double()
        assert clustering._kept(held, distance, chance, 3) == [0, 2]
        assert clustering._kept(held, distance, chance, 1) == [0]

    def test_labels_are_those_of_float64_where_float32_cannot_tell(self):
        rng = torch.Generator().manual_seed(0)
        rows = torch.randn(200, 64, generator=rng)
        one = torch.randn(1, 64, generator=rng)
        centroids = one + 1e-6 * torch.randn(50, 64, generator=rng)
        exact = torch.cdist(rows.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(nearest(rows, centroids)[0], exact.argmin(dim=1))


class TestFaults:
    def test_more_clusters_than_points_are_refused_with_both_numbers(self):
        with pytest.raises(ValueError, match=r"clusters = 5: must be in 1 .. 4"):
            kmeans(LINE, 5, draws=draws())
        with pytest.raises(ValueError, match=r"clusters = 0"):
            kmeans(LINE, 0, draws=draws())
        with pytest.raises(ValueError, match=r"iterations = 0"):
            kmeans(LINE, 2, draws=draws(), iterations=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_feature_that_is_no_number_is_refused(self, bad):
        with pytest.raises(ValueError, match="nan or infinite"):
            kmeans(torch.tensor([[0.0], [bad], [2.0]]), 2, draws=draws())

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES, copies=st.integers(1, 4), clusters=st.integers(1, 60))
    def test_fewer_different_points_than_clusters_leave_as_many_clusters_without_gaps(self, sizes, copies, clusters):
        x = points(*sizes)
        many = x.repeat(copies, 1)
        found = kmeans(many, min(clusters, len(many)), draws=draws(), restarts=1)
        assert len(found.centroids) == min(clusters, len(x))
        assert torch.equal(found.labels.unique(), torch.arange(len(found.centroids)))

    def test_all_points_equal_are_one_cluster(self):
        found = kmeans(torch.full((6, 3), 0.7), 4, draws=draws())
        assert found.labels.tolist() == [0] * 6 and found.inertia[-1] == 0
        torch.testing.assert_close(found.centroids, torch.full((1, 3), 0.7))
        assert kmeans(torch.zeros(6, 3), 4, draws=draws()).labels.tolist() == [0] * 6

    def test_an_empty_cluster_gets_the_farthest_point(self):
        found = lloyd(LINE, torch.tensor([[0.0], [1e6]]), iterations=25, precision="float32")
        assert found.refilled == 1 and found.labels.tolist() == [0, 0, 1, 1]
        assert found.centroids[:, 0].tolist() == pytest.approx([0.5, 9.5], abs=1e-5)

    @settings(max_examples=30, deadline=None)
    @given(sizes=SIZES, lost=st.integers(1, 5))
    def test_no_cluster_stays_empty_however_many_start_out_of_reach(self, sizes, lost):
        x = points(*sizes)
        clusters = min(len(x), lost + 1)
        start = torch.cat([x[:1], torch.full((clusters - 1, x.shape[1]), 1e6)])
        found = lloyd(x, start, iterations=25)
        assert found.refilled >= clusters - 1 and len(found.centroids) == clusters
        assert found.centroids.isfinite().all() and len(found.labels.unique()) == clusters

    def test_refilling_never_empties_another_cluster(self):
        x = torch.tensor([[0.0], [4.0], [100.0], [104.0]])  # two pairs, each point 2 from its centroid; three are lost
        held = clustering._Points.of(x)
        label, counts, moved = clustering._refill(
            held, torch.tensor([0, 0, 1, 1]), torch.full((4,), 4.0), torch.tensor([2, 2, 0, 0, 0])
        )
        assert moved == 2 and counts.tolist() == [1, 1, 1, 1, 0] and label.tolist() == [2, 0, 3, 1]

    def test_points_on_their_centroids_refill_nothing(self):
        held = clustering._Points.of(torch.zeros(4, 1))
        label, counts, moved = clustering._refill(
            held, torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.tensor([4, 0])
        )
        assert moved == 0 and counts.tolist() == [4, 0] and label.tolist() == [0] * 4

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
    def test_the_unit_of_the_features_does_not_matter(self, scale):
        x = points(0, 200, 4, blobs=6)
        assert same_partition(kmeans(x * scale, 6, draws=draws()).labels, torch.arange(200) % 6)

    def test_it_reads_under_autocast_what_it_reads_without(self):
        x = normalise_rows(points(0, 300, 16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = kmeans(x, 10, draws=draws(), precision="float32")
        assert torch.equal(inside.labels, kmeans(x, 10, draws=draws(), precision="float32").labels)

    def test_a_teacher_that_knows_the_classes_gives_them_up_to_their_numbers(self):
        label = torch.arange(60) % 5
        found = kmeans(torch.eye(5)[label], 5, draws=draws())
        assert same_partition(found.labels, label) and purity(label, found.labels) == 1


SHARED = dict(clusters=24, iterations=12, restarts=2)


def shared_rows():
    x = normalise_rows(points(5, 403, 32) + points(6, 403, 32, blobs=15) / 8)
    return torch.cat([x, x[:20]])  # equal rows lie on different workers


def worker(rank, workers, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    x = shared_rows()
    cuts = [0, *(round(len(x) * part / workers) + part for part in range(1, workers)), len(x)]
    own = x[cuts[rank] : cuts[rank + 1]]
    found = {p: kmeans(own, draws=draws(), precision=p, **SHARED) for p in ("float32", "bf16")}
    forced = lloyd(own, torch.cat([x[:3], torch.full((3, 32), 1e6)]), iterations=12, precision="float32")
    answer = {p: (gather_uneven(f.labels), f.centroids, f.inertia) for p, f in found.items()}
    uneven = gather_uneven(torch.full((rank, 2), float(rank)))
    largest = all_reduce(torch.tensor([rank, -rank]), largest=True)
    refused = ""
    try:
        kmeans(own.masked_fill(own == own.max() if rank == 0 else own > 9, torch.nan), draws=draws(), **SHARED)
    except ValueError as error:
        refused = str(error)
    everyone = gather_uneven(torch.tensor([float("infinite" in refused)]))
    forced_labels = gather_uneven(forced.labels)
    if rank == 0:
        torch.save({**answer, "forced": (forced_labels, forced.refilled), "uneven": uneven, "largest": largest,
                    "refused": everyone}, results)  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_that_share_the_rows_give_the_labels_of_one(workers, tmp_path):
    mp.spawn(worker, (workers, tmp_path / "rendezvous", tmp_path / "results.pt"), nprocs=workers)
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    x = shared_rows()
    for precision in ("float32", "bf16"):
        labels, centroids, inertia = found[precision]
        alone = kmeans(x, draws=draws(), precision=precision, **SHARED)
        assert torch.equal(labels, alone.labels) and torch.equal(centroids, alone.centroids)
        assert inertia == pytest.approx(alone.inertia, rel=1e-9)
    forced = lloyd(x, torch.cat([x[:3], torch.full((3, 32), 1e6)]), iterations=12, precision="float32")
    assert torch.equal(found["forced"][0], forced.labels) and found["forced"][1] == forced.refilled >= 3
    assert found["uneven"].tolist() == [[float(rank)] * 2 for rank in range(workers) for _ in range(rank)]
    assert found["largest"].tolist() == [workers - 1, 0]
    assert found["refused"].tolist() == [1.0] * workers  # one worker's nan ends all, instead of leaving them waiting


def test_alone_the_collectives_change_nothing():
    rows = torch.rand(3, 2)
    assert all_reduce(rows) is rows and gather_uneven(rows) is rows
