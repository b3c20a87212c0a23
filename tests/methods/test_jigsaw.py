"""Jigsaw and jigsaw++: the set of permutations, how tiles come into their slots, and what occludes them."""

import hashlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.jigsaw import COUNT, Jigsaw, JigsawConfig, JigsawPlus, JigsawPlusConfig, occlude, shuffle
from methods.losses.cross_entropy import cross_entropy
from methods.permutations import all_permutations, permutation_set, separation
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import standardise

RULES = ("max-avg", "max-min")


def build(cls=Jigsaw, norm="group", **changes):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm=norm))
    return cls(encoder, cls.Config(**changes), classes=0, images=0)


def draws(rows, seed=0):
    return Draws.of(seed, 0, torch.arange(rows))


def random(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def words(permutations):
    return " ".join("".join(map(str, row)) for row in permutations)


class TestPermutations:
    def test_nine_tiles_have_their_permutations_in_lexicographic_order_at_a_mean_distance_of_8(self):
        every = all_permutations(9)
        assert len(every) == 362880
        distance = (every != every[0]).sum(dim=1)
        assert torch.bincount(distance).tolist() == [1, 0, 36, 168, 1134, 5544, 22260, 66744, 133497, 133496]
        assert distance.sum().item() == 8 * 362880
        assert [tuple(row) for row in all_permutations(5).tolist()] == list(itertools.permutations(range(5)))

    @pytest.mark.parametrize("rule", RULES)
    def test_the_first_nine_are_all_at_distance_9_and_no_more_can_be(self, rule):
        chosen = permutation_set(9, 10, rule)
        assert words(chosen[:5]) == "012345678 103254786 230167845 321078564 456780123"
        assert separation(chosen[:9]) == (9.0, 9)
        assert len({row[0] for row in chosen[:9]}) == 9  # a tenth has the first tile of one of them in slot 0
        assert separation(chosen)[1] < 9

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("max-avg", {10: (8.8, 2), 30: (8.255172, 2), 100: (8.08, 2), 701: (8.011412, 2), 1000: (8.008, 2)}),
            ("max-min", {10: (8.8, 8), 30: (7.993103, 7), 100: (8.026869, 6), 701: (7.878794, 5), 1000: (7.909666, 5)}),
        ],
    )
    def test_sets_of_nine_tiles_have_their_mean_and_least_distances(self, rule, expected):
        chosen = permutation_set(9, 1000, rule)
        for count, (mean, least) in expected.items():
            found = separation(chosen[:count])
            assert found[0] == pytest.approx(mean, abs=1e-6) and found[1] == least
        assert chosen[:30] == permutation_set(9, 30, rule)

    def test_sets_of_four_tiles(self):
        assert words(permutation_set(4, 4, "max-min")) == "0123 1032 2301 3210"
        assert separation(permutation_set(4, 4, "max-min")) == (4.0, 4)
        assert words(permutation_set(4, 8, "max-min")) == "0123 1032 2301 3210 0231 0312 1203 1320"
        assert separation(permutation_set(4, 8, "max-min"))[1] == 3
        assert separation(permutation_set(4, 12, "max-min"))[1] == 3
        for rule in RULES:
            mean, least = separation(permutation_set(4, 24, rule))
            assert mean == pytest.approx(3.130435, abs=1e-6) and least == 2

    @given(tiles=st.integers(2, 5), rule=st.sampled_from(RULES), data=st.data())
    @settings(max_examples=20, deadline=None)
    def test_a_set_is_what_a_slow_search_over_pairs_gives(self, tiles, rule, data):
        every = list(itertools.permutations(range(tiles)))
        count = data.draw(st.integers(1, min(24, len(every))))
        chosen = [every[0]]
        while len(chosen) < count:
            scores = {}
            for row in every:
                distances = [sum(a != b for a, b in zip(row, other, strict=True)) for other in chosen]
                scores[row] = sum(distances) if rule == "max-avg" else min(distances)
            left = [row for row in every if row not in chosen]
            best = max(scores[row] for row in left)
            chosen.append(next(row for row in left if scores[row] == best))
        assert permutation_set(tiles, count, rule) == tuple(chosen)

    def test_more_than_there_are_and_more_tiles_than_can_be_searched_are_refused(self):
        with pytest.raises(ValueError, match=r"count = 25: must be in \[1, 24\]"):
            permutation_set(4, 25, "max-min")
        with pytest.raises(ValueError, match="tiles = 10: must be in"):
            permutation_set(10, 25, "max-min")

    def test_the_set_travels_with_the_state_and_its_digest_follows_it(self):
        task = build().task
        rows = permutation_set(9, 30, "max-min")
        assert task.state_dict()["permutations"].tolist() == [list(row) for row in rows]
        assert task.digest == hashlib.sha256(bytes(tile for row in rows for tile in row)).hexdigest()
        other = build(rule="max-avg").task
        assert other.digest != task.digest
        other.load_state_dict(task.state_dict())
        assert other.digest == task.digest

    def test_a_puzzle_can_be_built_without_memory(self):
        permutation_set.cache_clear()
        with torch.device("meta"):
            method = build(JigsawPlus)
        assert method.task.permutations.is_meta and method.task.permutations.shape == (30, 9)


class TestPuzzle:
    @pytest.mark.parametrize("grid", [2, 3])
    def test_the_tile_in_slot_s_is_the_one_its_permutation_names(self, grid):
        task = build(grid=grid, permutations=24, grey=0.0).task
        images = random(0, 60, 3, 32, 32)
        tiles, label = task.puzzle(images, draws(60))
        cut = task.cut(images, draws(60))
        assert len(label.unique()) > 10
        for b in range(60):
            for slot, tile in enumerate(permutation_set(grid**2, 24, "max-min")[label[b]]):
                torch.testing.assert_close(tiles[b, slot], standardise(cut[b, tile]))

    def test_every_permutation_is_undone_by_its_inverse_and_not_by_itself(self):
        order = torch.tensor(permutation_set(9, 100, "max-min"))
        tiles = torch.arange(9.0)[:, None, None, None].expand(100, 9, 3, 2, 2)  # each of a colour of its own
        shuffled = shuffle(tiles, order)
        assert torch.equal(shuffled[:, :, 0, 0, 0].long(), order)
        assert torch.equal(shuffle(shuffled, order.argsort(dim=1)), tiles)
        inverse = (order.argsort(dim=1) == order).all(dim=1)
        assert not inverse.all()
        assert not (shuffle(shuffled, order) == tiles).flatten(1).all(dim=1)[~inverse].any()

    def test_every_permutation_is_equally_frequent_and_drawn_for_the_image(self):
        task, images = build(grid=2, permutations=12).task, random(0, 3000, 3, 1, 1)
        _, label = task.puzzle(images, draws(3000))
        assert (torch.bincount(label, minlength=12) / 3000 - 1 / 12).abs().max() < 0.02
        order = torch.randperm(3000)
        assert torch.equal(task.puzzle(images[order], draws(3000)[order])[1], label[order])

    @given(seed=st.integers(0, 2**31), a=st.floats(0.2, 0.8), share=st.floats(0, 1))
    @settings(max_examples=15, deadline=None)
    def test_a_tile_has_mean_0_and_deviation_1_and_sees_neither_light_nor_contrast(self, seed, a, share):
        task, images = build().task, random(seed, 2, 3, 32, 32)
        tiles, _ = task.puzzle(images, draws(2))
        assert tiles.shape == (2, 9, 3, 14, 14)
        assert tiles.mean(dim=(2, 3, 4)).abs().max() < 1e-5
        assert (tiles.std(dim=(2, 3, 4), correction=0) - 1).abs().max() < 1e-4
        lit, _ = task.puzzle(a * images + share * (1 - a), draws(2))
        torch.testing.assert_close(lit, tiles, atol=1e-3, rtol=0)

    def test_grey_is_all_tiles_of_an_image_or_none_at_its_chance(self):
        tiles, _ = build(grid=2, permutations=24).task.puzzle(random(0, 1000, 3, 4, 4), draws(1000))
        grey = (tiles[:, :, 0] - tiles[:, :, 1]).abs().flatten(2).amax(dim=2) < 1e-5
        assert torch.equal(grey.all(dim=1), grey.any(dim=1))
        assert grey.float().mean().item() == pytest.approx(0.3, abs=0.04)

    def test_only_coloured_images_are_projected(self):
        task = build(grid=2, permutations=24, grey=0.5, projected=0.5).task
        tiles, _ = task.puzzle(random(0, 1000, 3, 4, 4), draws(1000))
        across = (tiles * torch.tensor([-1.0, 2, -1])[:, None, None]).sum(dim=2)  # of the mean too, which is 0 in all
        across = across - across.mean(dim=(2, 3), keepdim=True)
        flat = across.abs().flatten(1).amax(dim=1) < 1e-4
        grey = (tiles[:, :, 0] - tiles[:, :, 1]).abs().flatten(1).amax(dim=1) < 1e-4
        assert grey.float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert (flat & ~grey).float().mean().item() == pytest.approx(0.25, abs=0.05)
        images = random(0, 5, 3, 8, 8)
        both, grey_only = (build(grey=1.0, projected=p).task.puzzle(images, draws(5))[0] for p in (1.0, 0.0))
        assert torch.equal(both, grey_only)

    def test_colours_are_shifted_on_their_own_within_the_published_cell(self):
        task = build(cell=85, tile=64, gap=1, channel_shift=2).task
        place = torch.stack(torch.meshgrid(torch.arange(255.0), torch.arange(255.0), indexing="ij"))
        found = []
        for axis in (0, 1):  # all channels hold the pixel's row, or its column
            corner = task.cut(place[axis].div(255).expand(60, 3, -1, -1), draws(60))[..., 0, 0].mul(255).round()
            cell = torch.arange(9) // 3 if axis == 0 else torch.arange(9) % 3
            found.append(corner - 85 * cell[:, None])
        corner = torch.stack(found)
        assert corner.min() == 0 and corner.max() == 20
        apart = corner[..., 0] - corner[..., 1]
        assert apart.abs().max() == 2 and len(apart.unique()) == 5
        assert build(channel_shift=1).task.puzzle(torch.rand(2, 3, 32, 32), draws(2))[0].shape == (2, 9, 3, 14, 14)

    def test_the_interpolation_of_32_pixels_does_not_tell_a_tiles_cell(self):
        rise = F.interpolate(torch.eye(32)[None, None], (48, 32), mode="bilinear", antialias=True)[0, 0]
        smooth = rise.square().sum(dim=1)  # what is left of white noise, by place
        smooth[0] = smooth[3]
        smooth[-1] = smooth[-4]  # outermost pixels have nothing beyond them to be mixed with
        c = JigsawConfig()
        places = range(c.cell - c.tile - c.gap + 1)
        starts = c.cell * torch.arange(3)[:, None] + torch.tensor(places)
        profile = smooth[starts[..., None] + torch.arange(c.tile)].mean(dim=1)  # (cell, pixel)
        torch.testing.assert_close(profile, profile[:1].expand_as(profile), atol=1e-5, rtol=0)
        assert len(places) == 3


@pytest.mark.slow
def test_noise_stays_at_chance_and_smeared_over_the_gaps_it_would_be_learned():
    accuracy = {}
    for augment in (JigsawConfig().augment, Augment(min_area=0.6)):
        torch.manual_seed(0)
        config = JigsawConfig(augment=augment, grid=2, cell=24, tile=21, permutations=4, grey=0.0)
        method = Jigsaw(SmallCNN(SmallCNNConfig(width=0.25)), config, classes=0, images=0)
        optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
        (view,), found = method.views(32), []
        for step in range(220):
            index = torch.arange(64 * step, 64 * (step + 1))
            images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
            image, key = view.transform(images, Draws.of(0, 0, index)), Draws.of(0, 0, index, -1).key
            losses = method({"image": image, "unlabelled.key": key}, 0.0)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            found.append(losses["jigsaw_accuracy"].item())
        accuracy[augment.min_area] = sum(found[-50:]) / 50
    assert accuracy[1.0] < 0.28 and accuracy[0.6] > 0.4


def jpeg_noise(rows):
    """White noise as JPEG gives it back: whatever tells a tile's place is of the format."""
    rng, found = np.random.default_rng(0), []
    for _ in range(rows):
        file = io.BytesIO()
        Image.fromarray(rng.normal(128, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
        found.append(np.asarray(Image.open(file).convert("RGB")))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.slow
def test_the_blocks_of_jpeg_tell_enlarged_tiles_apart_but_not_native_ones_of_two_blocks():
    images, accuracy = jpeg_noise(512), {}
    for grid, tile, permutations in ((3, 14, 9), (2, 12, 24)):
        torch.manual_seed(0)
        config = JigsawConfig(grid=grid, tile=tile, permutations=permutations)
        method = Jigsaw(SmallCNN(SmallCNNConfig(width=0.25)), config, classes=0, images=0)
        optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
        (view,), found = method.views(32), []
        for step in range(300):
            index = torch.arange(64) + 64 * (step % 8)
            image, key = view.transform(images[index], Draws.of(1, step, index)), Draws.of(1, step, index, -1).key
            losses = method({"image": image, "unlabelled.key": key}, 0.0)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            found.append(losses["jigsaw_accuracy"].item())
        accuracy[grid] = sum(found[-20:]) / 20
    assert accuracy[3] > 0.4 and accuracy[2] < 0.1  # chance is 0.11 and 0.04


class TestHead:
    def test_each_rows_features_are_those_of_one_images_tiles_slot_by_slot(self):
        task = build().task
        task.each = task.all = torch.nn.Identity()
        tiles = torch.zeros(4, 9, 3, 2, 2)
        for b, t in itertools.product(range(4), range(9)):
            tiles[b, t] = torch.tensor([b, t, 1.0])[:, None, None]
        logits = task.logits(lambda x, normalised: x.mean(dim=(2, 3)) * normalised, tiles)
        for b, t in itertools.product(range(4), range(9)):
            assert logits[b, 3 * t : 3 * t + 3].tolist() == [b, t, 1]

    @pytest.mark.parametrize(
        ("count", "expected"), [(100, 4.605170), (701, 6.552508), (1000, 6.907755), (2000, 7.600902)]
    )
    def test_equal_logits_cost_ln_of_the_permutations(self, count, expected):
        loss = cross_entropy(torch.zeros(3, count), torch.tensor([0, 1, count - 1]))
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        if count == 100:
            method = build(permutations=count)
            torch.nn.init.zeros_(method.task.all[-1].weight)
            torch.nn.init.zeros_(method.task.all[-1].bias)
            loss = method.task(method.encoder, torch.rand(3, 3, 32, 32), draws(3))["loss"]
            assert loss.item() == pytest.approx(expected, abs=1e-5)
            assert method.task.chance_loss == pytest.approx(expected, abs=1e-6)

    def test_the_loss_is_the_mean_surprise_by_the_right_permutation(self):
        method, images = build(), random(0, 5, 3, 32, 32)
        losses = method.task(method.encoder, images, draws(5))
        tiles, label = method.task.puzzle(images, draws(5))
        p = method.task.logits(method.encoder, tiles).softmax(dim=1)
        expected = -sum(math.log(row[answer]) for row, answer in zip(p.tolist(), label.tolist(), strict=True)) / 5
        assert losses["loss"].item() == pytest.approx(expected, abs=1e-5)
        assert losses["jigsaw_accuracy"] == (p.argmax(dim=1) == label).float().mean()

    def test_an_image_of_one_colour_is_right_for_one_permutation_of_all(self):
        method = build(permutations=30)
        own = method.task.cut(torch.full((1, 3, 32, 32), 0.6), draws(1))
        every = shuffle(own.expand(30, -1, -1, -1, -1), method.task.permutations)
        assert torch.equal(every, own.expand_as(every))
        logits = method.task.logits(method.encoder, standardise(every))
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))
        assert (logits.argmax(dim=1) == torch.arange(30)).float().mean().item() == pytest.approx(1 / 30)

    def test_both_set_their_batch_norm_on_clean_images(self):
        assert Jigsaw.clean_norm and JigsawPlus.clean_norm and JigsawPlus.needs_distinct


class TestOcclusion:
    @given(seed=st.integers(0, 2**31), most=st.integers(0, 9), number=st.sampled_from([9, 12]))
    @settings(max_examples=40, deadline=None)
    def test_so_many_slots_are_different_tiles_of_the_other_image_and_the_rest_are_as_they_were(
        self, seed, most, number
    ):
        rows = 8
        tiles = torch.arange(float(rows * number)).view(rows, number, 1, 1, 1)
        others = -1 - tiles
        found, occluded = occlude(tiles, others, draws(rows, seed), most=most)
        count = draws(rows, seed).fork(COUNT).integers(1, most + 1)[:, 0]
        assert torch.equal(occluded.sum(dim=1), count) and count.max() <= most
        assert torch.equal((found != tiles).flatten(2).any(dim=2), occluded)
        for b in range(rows):
            strangers = found[b][occluded[b]].flatten()
            assert len(strangers.unique()) == len(strangers)
            assert torch.isin(strangers, others[b].flatten()).all()

    def test_numbers_slots_and_strangers_are_equally_frequent_up_to_the_most(self):
        rows = 6000
        tiles = torch.full((rows, 9, 1, 1, 1), -1.0)
        others = torch.arange(9.0)[:, None, None, None].expand(rows, 9, 1, 1, 1)
        found, occluded = occlude(tiles, others, draws(rows), most=2)
        assert (torch.bincount(occluded.sum(dim=1)) / rows - 1 / 3).abs().max() < 0.02
        assert (occluded.float().mean(dim=0) - 1 / 9).abs().max() < 0.02
        share = torch.bincount(found[occluded].flatten().long(), minlength=9) / occluded.sum()
        assert (share - 1 / 9).abs().max() < 0.02

    def test_without_occluded_tiles_it_is_jigsaw_bit_for_bit(self):
        images = random(0, 30, 3, 32, 32)
        tiles, label = build(Jigsaw).task.puzzle(images, draws(30))
        none, same = build(JigsawPlus, max_occluded=0).task.puzzle(images, draws(30))
        assert torch.equal(none, tiles) and torch.equal(same, label)
        some, same = build(JigsawPlus).task.puzzle(images, draws(30))
        assert torch.equal(same, label)
        differ = (some != tiles).flatten(2).any(dim=2).sum(dim=1)
        assert torch.equal(differ, draws(30).fork(COUNT).integers(1, 3)[:, 0]) and differ.unique().tolist() == [0, 1, 2]

    def test_strangers_are_the_next_images_tiles_of_the_batch_never_the_images_own(self):
        task = build(JigsawPlus, grey=0.0).task
        images = random(0, 12, 3, 32, 32)
        tiles, label = task.puzzle(images, draws(12))
        cut = standardise(task.cut(images, draws(12)))
        expected = shuffle(cut, task.permutations[label])
        for b in range(12):
            for slot in range(9):
                if not torch.equal(tiles[b, slot], expected[b, slot]):
                    assert any(torch.equal(tiles[b, slot], tile) for tile in cut[(b + 1) % 12])

    def test_strangers_are_grey_or_projected_as_the_image_they_are_put_into(self):
        task = build(JigsawPlus, grid=2, permutations=8, grey=0.5, projected=0.5).task
        tiles, _ = task.puzzle(random(0, 400, 3, 4, 4), draws(400))
        grey = (tiles[:, :, 0] - tiles[:, :, 1]).abs().flatten(2).amax(dim=2) < 1e-4
        across = (tiles * torch.tensor([-1.0, 2, -1])[:, None, None]).sum(dim=2)
        flat = (across - across.mean(dim=(2, 3), keepdim=True)).abs().flatten(2).amax(dim=2) < 1e-4
        for kind in (grey, flat):
            assert torch.equal(kind.all(dim=1), kind.any(dim=1)) and kind.any() and not kind.all()

    def test_a_set_whose_permutations_can_look_alike_is_refused_with_its_least_distance(self):
        with pytest.raises(ValueError, match=r"max_occluded = 2: must be < 2, the least distance of the 30 .*max-avg"):
            JigsawPlusConfig(rule="max-avg")
        with pytest.raises(ValueError, match="max_occluded = 7: must be < 7"):
            JigsawPlusConfig(max_occluded=7)
        with pytest.raises(ValueError, match="max_occluded = 2: must be < 2"):
            JigsawConfig(grid=2, permutations=24, max_occluded=2)
        assert JigsawPlusConfig(permutations=701, max_occluded=4).permutations == 701
        assert JigsawPlusConfig(grid=2, permutations=8).max_occluded == 2

    def test_thirty_permutations_differ_in_what_any_two_occluded_slots_leave(self):
        chosen = permutation_set(9, 30, "max-min")
        for hidden in itertools.combinations(range(9), 2):
            visible = {tuple(tile for slot, tile in enumerate(row) if slot not in hidden) for row in chosen}
            assert len(visible) == 30

    @given(tiles=st.sampled_from([3, 4]), rule=st.sampled_from(RULES), data=st.data())
    @settings(max_examples=20, deadline=None)
    def test_permutations_stay_apart_under_every_choice_of_slots_exactly_below_the_least_distance(
        self, tiles, rule, data
    ):
        chosen = permutation_set(tiles, data.draw(st.integers(2, math.factorial(tiles))), rule)
        for count in range(tiles + 1):
            apart = all(
                len({tuple(row[slot] for slot in seen) for row in chosen}) == len(chosen)
                for seen in itertools.combinations(range(tiles), tiles - count)
            )
            assert apart == (separation(chosen)[1] > count)

    def test_a_batch_of_one_has_no_stranger_and_is_refused(self):
        with pytest.raises(ValueError, match="a batch of 1 image"):
            build(JigsawPlus).task.puzzle(torch.rand(1, 3, 32, 32), draws(1))
        assert build(Jigsaw).task.puzzle(torch.rand(1, 3, 32, 32), draws(1))[0].shape == (1, 9, 3, 14, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 4}, "grid = 4: must be 2 or 3"),
        ({"tile": 0}, "tile = 0, gap = 0, channel_shift = 0: must be at least 1, 0 and 0"),
        ({"tile": 15, "gap": 2}, r"tile \+ gap \+ channel_shift = 17: must be <= cell = 16"),
        ({"grid": 2}, r"permutations = 30: must be in \[2, 24\]"),
        ({"permutations": 1}, "permutations = 1: must be in"),
        ({"rule": "max"}, "rule = max: must be max-avg or max-min"),
        ({"grey": -0.1}, "grey = -0.1: must be in"),
        ({"projected": 2.0}, "projected = 2.0: must be in"),
        ({"tile_dim": 0}, "tile_dim = 0: must be >= 1"),
        ({"max_occluded": -1}, "max_occluded = -1: must be >= 0"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_limits(changes, message):
    with pytest.raises(ValueError, match=message):
        JigsawConfig(**changes)
