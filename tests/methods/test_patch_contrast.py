"""Contrastive patches: who is near, who is far, what a context sees, and two workers against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import methods.patch_contrast
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.losses.nce import info_nce
from methods.patch_contrast import (
    FLIP,
    InstanceDiscrimination,
    InstanceDiscriminationConfig,
    NearbyPatches,
    NearbyPatchesConfig,
    PredictivePatches,
    PredictivePatchesConfig,
    RowsAbove,
    cell_distance,
    draw_patches,
    nearby_loss,
    predictive_loss,
    proximity,
    vary,
)
from methods.views.draws import Draws
from methods.views.policy import Augment

ROWS, WORKERS, PIXELS = 6, 2, 32


def build(cls, images=ROWS, **changes):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm="group"))
    return cls(encoder, cls.Config(**changes), classes=0, images=images)


def batch_of(method, rows=slice(None), seed=0):
    index = torch.arange(ROWS)
    images = torch.randint(
        256, (ROWS, 3, PIXELS, PIXELS), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    batch = {v.name: v.transform(images, Draws.of(seed, 0, index, n))[rows] for n, v in enumerate(method.views(PIXELS))}
    return {**batch, "unlabelled.index": index[rows], "unlabelled.key": Draws.of(seed, 0, index, -1).key[rows]}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestNearby:
    def test_distance_is_chebyshevs(self):
        distance = cell_distance(7)
        assert distance.shape == (49, 49) and torch.equal(distance, distance.T)
        assert distance[0].view(7, 7).tolist() == [[max(i, j) for j in range(7)] for i in range(7)]
        assert (distance[24].view(7, 7) == 1).sum() == 8  # around the centre

    def test_patches_share_no_pixel_and_each_stays_in_its_cell(self):
        method = build(NearbyPatches, grey=0.0, augment=Augment(flip=False))
        draws = Draws.of(0, 0, torch.arange(2))
        number = torch.arange(2 * 32 * 32.0).view(2, 1, 32, 32).expand(-1, 3, -1, -1) / 2048  # each pixel its own
        patches = method.patches(number, draws)
        pixel = (patches[:, 0] * 2048).round().long().view(2, 16, -1)
        assert patches.shape == (32, 3, 7, 7) and len(pixel.unique()) == pixel.numel()
        image, row, column = pixel // 1024, pixel % 1024 // 32, pixel % 32
        cell = (row // 8) * 4 + column // 8
        assert (image == torch.arange(2)[:, None, None]).all() and (cell == torch.arange(16)[:, None]).all()

    def test_equal_patches_give_ln_of_the_candidates(self):
        distance = cell_distance(4)
        patches, negatives = torch.ones(2, 16, 3, dtype=torch.float64), torch.ones(10, 3, dtype=torch.float64)
        image = torch.tensor([0, 0, 0, 0, 2, 3, 4, 5, 6, 7])
        loss = nearby_loss(
            patches, negatives, positive=torch.ones(2, 16, dtype=torch.int64), far=distance >= 2, image=image, first=0,
            temperature=0.1,
        )  # fmt: skip
        far = (distance >= 2).scatter(1, torch.ones(16, 1, dtype=torch.int64), True).sum(dim=1)
        expected = sum(math.log(n + outside) for n in far.tolist() for outside in (6, 10)) / 32
        assert loss.item() == pytest.approx(expected, abs=1e-9)

    def test_the_loss_is_that_of_the_candidates_listed_one_by_one(self):
        distance, temperature = cell_distance(3), 0.5
        patches, negatives = random(0, 2, 9, 4), random(1, 5, 4)
        image, positive = torch.tensor([4, 5, 6, 4, 9]), torch.randint(9, (2, 9))
        positive = torch.where(distance[torch.arange(9), positive] == 1, positive, (torch.arange(9) + 3) % 9)
        found = nearby_loss(
            patches, negatives, positive=positive, far=distance >= 2, image=image, first=4, temperature=temperature
        )
        z, n = F.normalize(patches, dim=2), F.normalize(negatives, dim=1)
        losses = []
        for b in range(2):
            for p in range(9):
                chosen = positive[b, p].item()
                far = [z[b, q] for q in range(9) if distance[p, q] >= 2 and q != chosen]
                others = [n[k] for k in range(5) if image[k] != b + 4]
                scores = torch.stack([z[b, chosen], *far, *others]) @ z[b, p] / temperature
                losses.append(info_nce(scores[None], torch.tensor([0])))
        torch.testing.assert_close(found, torch.stack(losses).mean())

    def test_positives_are_neighbours_and_all_of_them_equally_often(self, monkeypatch):
        seen = {}
        monkeypatch.setattr(
            methods.patch_contrast, "nearby_loss", lambda *a, **k: seen.update(k) or nearby_loss(*a, **k)
        )
        method = build(NearbyPatches)
        count = torch.zeros(16, 16)
        for seed in range(60):
            method(batch_of(method, seed=seed), 0.0)
            count += F.one_hot(seen["positive"], 16).sum(dim=0)
        distance = cell_distance(4)
        assert (count[distance != 1] == 0).all() and (count[distance == 1] > 0).all()
        expected = count.sum(dim=1, keepdim=True) / (distance == 1).sum(dim=1, keepdim=True)
        chi = ((count - expected) ** 2 / expected)[distance == 1].sum()
        assert chi < 120  # 84 neighbours less 16 rows: 68 degrees, p = 1e-4

    def test_an_image_alone_still_has_its_far_patches_as_negatives(self):
        method = build(NearbyPatches)
        batch = {name: value[:1] for name, value in batch_of(method).items()}
        loss = method(batch, 0.0)["loss"]
        assert loss.isfinite() and loss > 0.1


class TestPredictive:
    def test_seven_patches_a_side_at_both_sizes(self):
        assert PredictivePatchesConfig(side=256, patch=64, stride=32).grid == 7
        assert PredictivePatchesConfig(side=32, patch=8, stride=4).grid == 7

    @given(seed=st.integers(0, 2**31), row=st.integers(0, 6))
    @settings(max_examples=20, deadline=None)
    def test_a_context_sees_the_rows_above_only(self, seed, row):
        torch.manual_seed(0)
        above = RowsAbove(4, 3).double()
        patches = random(seed, 2, 4, 7, 7)
        changed = patches.clone()
        changed[:, :, row:] = random(seed + 1, 2, 4, 7 - row, 7)
        before, after = above(patches), above(changed)
        assert torch.equal(before[:, :, : row + 1], after[:, :, : row + 1])
        if row < 6:
            assert not torch.equal(before[:, :, row + 1], after[:, :, row + 1])

    @pytest.mark.parametrize("row", [0, 2, 5])
    def test_a_pixel_below_a_row_of_patches_or_in_what_it_predicts_changes_no_context(self, row):
        method = build(PredictivePatches, grey=0.0).eval()
        draws = Draws.of(0, 0, torch.arange(2))
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        changed = images.clone()
        changed[:, :, 4 * (row + 1) :] = 0.5  # from the first pixel of the next row of patches, which may be predicted
        with torch.no_grad():
            before, after = (method.context(method.embed(x, draws)) for x in (images, changed))
        assert torch.equal(before[:, :, : row + 1], after[:, :, : row + 1])
        assert not torch.equal(before, after) or row == 5

    def test_a_context_and_the_patches_it_predicts_share_no_pixel(self):
        c = PredictivePatchesConfig()
        for i in range(1, c.grid - 1):
            assert c.stride * (i - 1) + c.patch <= c.stride * (i + 1)
        with pytest.raises(ValueError, match="stride = 3: must be >= patch / 2"):
            PredictivePatchesConfig(stride=3)

    def test_each_position_and_offset_is_a_pair_once_with_the_patch_that_far_below(self, monkeypatch):
        seen = {}
        monkeypatch.setattr(
            methods.patch_contrast, "predictive_loss",
            lambda p, t, n, itself: seen.update(p=p, t=t) or predictive_loss(p, t, n, itself=itself),
        )  # fmt: skip
        method = build(PredictivePatches, grey=0.0)
        method.predict = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))
        batch = batch_of(method)
        method(batch, 0.0)
        embedded = method.embed(batch["image"], Draws(batch["unlabelled.key"]))
        contexts = method.context(embedded)
        place = 0
        for k in range(1, 6):
            for i in range(1, 7 - k):
                for j in range(7):
                    torch.testing.assert_close(seen["p"][place : place + ROWS], contexts[:, :, i, j])
                    torch.testing.assert_close(seen["t"][place : place + ROWS], embedded[:, :, i + k, j])
                    place += ROWS
        assert place == len(seen["p"]) == (5 + 4 + 3 + 2 + 1) * 7 * ROWS

    def test_the_positive_among_the_negatives_counts_once(self):
        predicted, target = random(0, 3, 4), random(1, 3, 4)
        others = random(2, 5, 4)
        itself = torch.zeros(3, 6, dtype=torch.bool)
        itself[1, 5] = True
        with_it = predictive_loss(predicted[1:2], target[1:2], torch.cat([others, target[1:2]]), itself=itself[1:2])
        without = predictive_loss(predicted[1:2], target[1:2], others, itself=itself[:1, :5])
        torch.testing.assert_close(with_it, without)

    def test_inner_products_by_hand(self):
        predicted = torch.tensor([[2.0, 0, -1], [1, 3, 0], [0, 0, 0]], dtype=torch.float64)
        one = torch.eye(3, dtype=torch.float64)
        loss = predictive_loss(predicted, one, one, itself=torch.eye(3, dtype=torch.bool))
        assert loss.item() == pytest.approx(0.479435, abs=1e-6)


class TestPatches:
    def test_negatives_are_different_patches(self):
        key = Draws.of(0, 0, torch.arange(1)).key
        assert len(draw_patches(key, 96, 50).unique()) == 50
        assert sorted(draw_patches(key, 96, 256).tolist()) == list(range(96))

    def test_each_is_mirrored_and_greyed_on_its_own(self):
        draws, patches = Draws.of(0, 0, torch.arange(3)), torch.rand(12, 3, 5, 5)
        mirror = draws.fork(FLIP).parts(4).chance(0.5)
        varied = vary(patches, draws, count=4, grey=0.0, flip=True)
        assert torch.equal(varied[mirror], patches[mirror].flip(3)) and torch.equal(varied[~mirror], patches[~mirror])
        assert 0 < mirror.sum() < 12
        assert torch.equal(vary(patches, draws, count=4, grey=0.0, flip=False), patches)
        grey = vary(patches, draws, count=4, grey=0.5, flip=False)
        colourless = (grey[:, 0] == grey[:, 1]).flatten(1).all(dim=1)
        assert 0 < colourless.sum() < 12 and torch.equal(grey[~colourless], patches[~colourless])

    @pytest.mark.parametrize("cls", [NearbyPatches, PredictivePatches])
    def test_collapsed_embeddings_give_ln_of_the_candidates_at_most(self, cls):
        method = build(cls, negative_count=16)
        torch.nn.init.zeros_(method.projector.weight)
        loss = method(batch_of(method), 0.0)["loss"]
        assert loss.item() <= math.log(16 + 16) + 1e-5
        if cls is PredictivePatches:  # all inner products with itself may differ by the predictor only
            torch.nn.init.zeros_(method.projector.bias)
            assert math.log(16) <= method(batch_of(method), 0.0)["loss"].item() <= math.log(17) + 1e-6


class TestInstances:
    def test_with_all_rows_equal_the_loss_is_ln_of_the_images(self):
        method = build(InstanceDiscrimination, images=9)
        method.contrast.bank.rows[:] = F.normalize(torch.ones(128), dim=0)
        assert method(batch_of(method), 0.0)["loss"].item() == pytest.approx(math.log(9), abs=1e-5)

    def test_the_proximal_term_is_the_squared_way_to_the_remembered_row(self):
        assert proximity(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(2)
        assert proximity(torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).item() == pytest.approx(4)
        method, plain = build(InstanceDiscrimination, proximal=0.7), build(InstanceDiscrimination)
        losses, expected = method(batch_of(method), 0.0), plain(batch_of(plain), 0.0)
        torch.testing.assert_close(losses["loss"], expected["loss"] + 0.7 * losses["moved"])

    def test_the_batchs_rows_move_after_the_step_and_no_others(self):
        method = build(InstanceDiscrimination, images=9)
        before = method.contrast.bank.rows.clone()
        method(batch_of(method), 0.0)["loss"].backward()
        assert torch.equal(method.contrast.bank.rows, before) and before.grad is None
        method.on_step_end(0.0)
        moved = (method.contrast.bank.rows != before).any(dim=1)
        assert moved.tolist() == [True] * ROWS + [False] * 3


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (NearbyPatchesConfig, {"temperature": -1.0}, "temperature = -1.0: must be > 0"),
        (NearbyPatchesConfig, {"near": 2}, "near = 2, far = 2"),
        (NearbyPatchesConfig, {"grid": 2}, "grid = 2: must be > far = 2"),
        (NearbyPatchesConfig, {"tile": 9}, "tile = 9: must be in"),
        (PredictivePatchesConfig, {"stride": 5}, "stride = 5: must divide"),
        (PredictivePatchesConfig, {"rows": 6}, "rows = 6: must be in"),
        (PredictivePatchesConfig, {"jitter": 8}, "jitter = 8: must be in"),
        (InstanceDiscriminationConfig, {"proximal": -1.0}, "proximal = -1.0: must be >= 0"),
        (InstanceDiscriminationConfig, {"min_area": 0.0}, "min_area = 0.0: must be in"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_limits(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def double(cls):
    return build(cls, negative_count=20).double()


def double_batch(method, rows):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch_of(method, rows).items()}


def worker(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    share, found = ROWS // WORKERS, []
    for cls in (NearbyPatches, PredictivePatches):
        method = double(cls)
        model = DistributedDataParallel(method)
        loss = model(double_batch(method, slice(rank * share, (rank + 1) * share)), 0.0)["loss"]
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append({"loss": mean / WORKERS, "gradients": [p.grad for p in method.parameters()]})
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def test_two_workers_give_one_processs_loss_and_gradient(tmp_path):
    mp.spawn(worker, (tmp_path / "rendezvous", tmp_path / "results.pt"), nprocs=WORKERS)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for cls, found in zip((NearbyPatches, PredictivePatches), results, strict=True):
        method = double(cls)
        loss = method(double_batch(method, slice(None)), 0.0)["loss"]
        loss.backward()
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
        for ours, theirs in zip(method.parameters(), found["gradients"], strict=True):
            torch.testing.assert_close(ours.grad, theirs, atol=1e-6, rtol=1e-6)
