"""Relative patch position: which pairs there are, where patches lie, and what cannot give their place away."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.relative_patch import (
    NOISE_LEVEL,
    RelativePatch,
    RelativePatchConfig,
    RelativePatchTask,
    coarsened,
    cut_patches,
    keep_channel,
    neighbours,
)
from methods.views.draws import Draws

PUBLISHED = {"side": 430, "patch": 96, "gap": 48, "jitter": 7, "coarsest": 10}


def build(norm="group", **changes):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm=norm))
    return RelativePatch(encoder, RelativePatchConfig(**changes), classes=0, images=0)


def draws(rows, seed=0):
    return Draws.of(seed, 0, torch.arange(rows))


def random(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class TestPairs:
    @pytest.mark.parametrize(("height", "width", "count"), [(3, 3, 40), (2, 2, 12), (4, 5, 110)])
    def test_a_grid_has_its_pairs_and_opposite_directions_are_equally_frequent(self, height, width, count):
        pairs = neighbours(height, width)
        labels = [label for _, _, label in pairs]
        assert len(pairs) == len(set(pairs)) == count and set(labels) == set(range(8))
        assert all(labels.count(label) == labels.count(7 - label) for label in range(8))

    @given(height=st.integers(1, 5), width=st.integers(1, 5))
    @settings(max_examples=25, deadline=None)
    def test_the_other_order_is_seven_minus_the_label_and_labels_go_row_by_row(self, height, width):
        pairs = set(neighbours(height, width))
        assert len(pairs) == 2 * (width * (height - 1) + height * (width - 1) + 2 * (height - 1) * (width - 1))
        offsets = [(-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]  # (dx, dy)
        for first, second, label in pairs:
            assert (second, first, 7 - label) in pairs
            dx, dy = offsets[label]
            assert second == first + width * dy + dx and second % width - first % width == dx

    def test_with_one_order_each_pair_comes_once_and_both_ways_and_all_labels_are_met(self):
        first, second, label = build(both_orders=False).task.pairs(draws(500))
        every = set(neighbours(3, 3))
        assert first.shape == (500, 20)
        for row in zip(first.tolist(), second.tolist(), label.tolist(), strict=True):
            pairs = set(zip(*row, strict=True))
            assert pairs <= every and len({frozenset(pair[:2]) for pair in pairs}) == 20
        assert (label > 3).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert torch.bincount(label.flatten(), minlength=8).min() > 0

    @pytest.mark.parametrize("both_orders", [True, False])
    def test_a_label_says_where_the_second_patch_lies_in_the_image(self, both_orders):
        task = build(both_orders=both_orders, jitter=0).task
        corner = task.corners(draws(20))
        first, second, label = task.pairs(draws(20))
        row = torch.arange(20)[:, None]
        dy, dx = (corner[row, second] - corner[row, first]).sign().unbind(dim=2)
        number = 3 * (dy + 1) + dx + 1  # of nine, the centre counted
        assert torch.equal(label, number - (number > 4).long())


class TestPlaces:
    @pytest.mark.parametrize("config", [{}, PUBLISHED, {"grid": 2}, {"gap": 4}, {"side": 84}])
    def test_patches_stay_in_the_frame_and_keep_the_gap_less_twice_the_jitter(self, config):
        task = build(**config).task
        c = task.config
        corner = task.corners(draws(300))
        assert corner.min() >= 0 and (corner + c.patch).max() <= c.side
        least = 10**6
        for i, j in itertools.combinations(range(c.grid**2), 2):
            apart = (corner[:, i] - corner[:, j]).abs().amax(dim=1) - c.patch
            least = min(least, apart.min().item())
        assert least == c.gap - 2 * c.jitter
        if config is PUBLISHED:
            assert least == 34

    def test_the_grids_origin_is_drawn_evenly_over_the_frame(self):
        task = build(jitter=0).task
        origin = task.corners(draws(4000))[:, 0]
        room = 96 - task.config.span
        assert origin.min() == 0 and origin.max() == room == 16
        share = F.one_hot(origin.flatten()).float().mean(dim=0)
        assert (share - 1 / (room + 1)).abs().max() < 0.01

    def test_each_patch_and_axis_is_jittered_on_its_own_and_evenly(self):
        task = build(side=84).task  # no room for the origin to move
        assert task.config.span == 84
        jitter = (task.corners(draws(4000)) - task.corners(draws(4000)).amin(dim=0)).flatten(1)
        assert jitter.max() == 4
        share = torch.stack([(jitter == value).float().mean(dim=0) for value in range(5)])
        assert (share - 0.2).abs().max() < 0.03
        assert torch.corrcoef(jitter.T.float()).fill_diagonal_(0).abs().max() < 0.08

    def test_patches_are_the_images_pixels_at_their_corners(self):
        images = torch.rand(3, 2, 12, 15)
        corner = torch.tensor([[0, 0], [7, 10], [3, 4], [8, 11]]).expand(3, -1, -1)
        patches = cut_patches(images, corner, patch=4)
        for number, (y, x) in enumerate(corner[0].tolist()):
            assert torch.equal(patches[:, number], images[:, :, y : y + 4, x : x + 4])

    def test_neighbours_share_no_pixel_of_a_32_pixel_image_and_are_interpolated_alike(self):
        task = build(colour="keep", coarse=0.0).task
        c = task.config
        assert (c.patch + c.gap) % (c.side // 32) == 0
        rise = F.interpolate(torch.eye(32)[None, None], (96, 32), mode="bilinear", antialias=True)[0, 0]
        for seed in range(200):
            corner = task.corners(draws(1, seed))[0]
            source = []
            for y, x in corner.tolist():
                rows, columns = ((rise[a : a + c.patch] != 0).any(dim=0) for a in (y, x))
                source.append(rows[:, None] & columns)
            assert torch.stack(source).sum(dim=0).max() == 1


class TestColours:
    @pytest.mark.parametrize("colour", ["drop", "project", "grey", "keep"])
    def test_a_patch_has_root_mean_square_50_with_the_published_scale(self, colour):
        task = build(colour=colour, scale=50.0).task
        patches = task.patches(random(0, 4, 3, 32, 32), draws(4))
        assert (patches.square().mean(dim=(2, 3, 4)).sqrt() - 50).abs().max() < 1e-3

    @given(seed=st.integers(0, 2**31), a=st.floats(0.2, 0.8), share=st.floats(0, 1))
    @settings(max_examples=15, deadline=None)
    @pytest.mark.parametrize("colour", ["project", "grey"])
    def test_patches_have_mean_0_and_do_not_see_light_and_contrast(self, colour, seed, a, share):
        task, images = build(colour=colour).task, random(seed, 2, 3, 32, 32)
        patches = task.patches(images, draws(2))
        assert patches.mean(dim=(2, 3, 4)).abs().max() < 1e-5
        torch.testing.assert_close(task.patches(a * images + share * (1 - a), draws(2)), patches, atol=1e-4, rtol=0)

    def test_light_that_changes_from_patch_to_patch_is_taken_away(self):
        task = build(colour="grey", coarse=0.0, side=96).task
        ramp = torch.linspace(0, 0.5, 96)
        flat = 0.25 * random(0, 2, 3, 96, 96)
        patches, lit = task.patches(flat, draws(2)), task.patches(flat + ramp, draws(2))
        means = cut_patches(flat + ramp, task.corners(draws(2)), patch=20).mean(dim=(2, 3, 4)).unflatten(1, (3, 3))
        assert (means[:, :, 2] - means[:, :, 0]).min() > 0.2  # visible before
        assert lit.mean(dim=(2, 3, 4)).abs().max() < 1e-5 and not torch.equal(lit, patches)

    def test_dropping_leaves_one_channel_without_its_mean_and_noise_of_half_a_grey_level(self):
        patches = random(0, 3000, 3, 4, 4)
        channel = draws(3000, 1).integers(1, 3)[:, 0]
        assert (torch.bincount(channel) / 3000 - 1 / 3).abs().max() < 0.03
        kept = keep_channel(patches, channel, draws(3000))
        row = torch.arange(3000)
        expected = patches[row, channel] - patches[row, channel].mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(kept[row, channel], expected)
        others = torch.arange(3) != channel[:, None]
        noise = kept[others]
        assert noise.abs().max() <= NOISE_LEVEL == 0.5 / 255
        assert noise.std().item() == pytest.approx(NOISE_LEVEL / math.sqrt(3), rel=0.02)
        assert abs(noise.mean().item()) < NOISE_LEVEL / 50

    def test_each_patch_keeps_a_channel_of_its_own_and_sees_nothing_of_the_others(self):
        task, images = build(coarse=0.0).task, random(0, 6, 3, 32, 32)
        patches = task.patches(images, draws(6))
        strength = patches.square().mean(dim=(3, 4))
        kept = strength.argmax(dim=2)
        assert all(len(row.unique()) > 1 for row in kept)
        for channel in range(3):
            fringed = images.clone()
            others = [c for c in range(3) if c != channel]
            fringed[:, others] = random(1, 6, 2, 32, 32)  # whatever a lens does to the others
            same = task.patches(fringed, draws(6)) == patches
            assert same.flatten(2).all(dim=2)[kept == channel].all()

    def test_projecting_sees_nothing_along_green_magenta(self):
        task, images = build(colour="project").task, 0.4 + 0.2 * random(0, 3, 3, 32, 32)
        fringe = 0.1 * random(1, 3, 1, 32, 32) * torch.tensor([-1.0, 2, -1])[:, None, None]
        patches = task.patches(images, draws(3))
        torch.testing.assert_close(task.patches(images + fringe, draws(3)), patches, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("colour", ["drop", "project", "grey", "keep"])
    def test_an_image_of_one_colour_stays_finite(self, colour):
        task = build(colour=colour).task
        patches = task.patches(torch.full((2, 3, 32, 32), 0.7), draws(2))
        assert patches.isfinite().all()
        if colour == "drop":  # only noise is left, and has its full strength
            assert (patches.square().mean(dim=(2, 3, 4)).sqrt() - 1).abs().max() < 1e-4
        else:
            assert patches.abs().max() < 0.01


class TestSharpness:
    def test_a_third_of_the_patches_are_shrunk_and_enlarged_and_the_others_stay_bit_for_bit(self):
        patches = random(0, 2000, 3, 20, 20)
        coarse = coarsened(patches, draws(2000), chance=1 / 3, least=2)
        changed = (coarse != patches).flatten(1).any(dim=1)
        assert changed.float().mean().item() == pytest.approx(1 / 3, abs=0.04)
        assert torch.equal(coarse[~changed], patches[~changed])

    def test_each_is_what_interpolating_there_and_back_gives(self):
        patches = random(0, 40, 3, 12, 12)
        coarse = coarsened(patches, draws(40), chance=1.0, least=4)
        met = set()
        for patch, found in zip(patches, coarse, strict=True):
            errors = []
            for side in range(4, 12):
                small = F.interpolate(patch[None], (side, side), mode="bilinear", antialias=True)
                errors.append((F.interpolate(small, (12, 12), mode="bilinear")[0] - found).abs().max().item())
            assert min(errors) < 1e-5
            met.add(4 + errors.index(min(errors)))
        assert met == set(range(4, 12))


class Recorder(nn.Module):
    """An encoder that remembers what it was given, and answers with a patch's mean square and first pixel."""

    def __init__(self):
        super().__init__()
        self.dim, self.weight, self.seen = 2, nn.Parameter(torch.ones(())), []

    def forward(self, images, *, normalised=False):
        self.seen.append((images.shape, normalised))
        return self.weight * torch.stack([images.abs().mean(dim=(1, 2, 3)), images[:, 0, 0, 0]], dim=1)


class TestLoss:
    def test_equal_logits_cost_ln_8(self):
        method = build()
        torch.nn.init.zeros_(method.task.head[-1].weight)
        torch.nn.init.zeros_(method.task.head[-1].bias)
        losses = method.task(method.encoder, torch.rand(3, 3, 32, 32), draws(3))
        assert losses["loss"].item() == pytest.approx(2.079442, abs=1e-6) and method.task.chance_loss == math.log(8)

    @pytest.mark.parametrize("both_orders", [True, False])
    def test_the_loss_is_the_mean_over_pairs_of_features_side_by_side(self, both_orders):
        method = build(both_orders=both_orders)
        images = random(0, 3, 3, 32, 32)
        losses = method.task(method.encoder, images, draws(3))
        patches = method.task.patches(images, draws(3))
        surprise, right = [], []
        with torch.no_grad():
            features = [method.encoder(image, normalised=True) for image in patches]
            for image, pairs in zip(features, zip(*method.task.pairs(draws(3)), strict=True), strict=True):
                for first, second, label in zip(*(part.tolist() for part in pairs), strict=True):
                    logits = method.task.head(torch.cat([image[first], image[second]]))
                    surprise.append(-logits.log_softmax(dim=0)[label].item())
                    right.append(logits.argmax().item() == label)
        assert len(surprise) == 3 * (40 if both_orders else 20)
        assert losses["loss"].item() == pytest.approx(sum(surprise) / len(surprise), abs=1e-5)
        assert losses["position_accuracy"].item() == pytest.approx(sum(right) / len(right))

    def test_both_patches_of_all_pairs_go_through_one_encoder_in_one_pass_and_meet_after_it(self):
        encoder = Recorder()
        task = RelativePatchTask(encoder, RelativePatchConfig())
        task(encoder, torch.rand(3, 3, 32, 32), draws(3))["loss"].backward()
        assert encoder.seen == [((27, 3, 20, 20), True)]  # single patches of three channels, never two as one
        assert encoder.weight.grad is not None
        assert not any(isinstance(module, (nn.Conv2d, Recorder)) for module in task.modules())

    def test_a_step_through_the_first_patch_alone_changes_the_second_ones_feature(self):
        method = build()
        patches = method.task.patches(random(0, 1, 3, 32, 32), draws(1))[0]
        before = method.encoder(patches[1:2], normalised=True).detach()
        method.encoder(patches[:1], normalised=True).square().sum().backward()
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter -= 0.1 * parameter.grad
        assert not torch.equal(method.encoder(patches[1:2], normalised=True), before)

    def test_where_an_image_sits_in_the_batch_changes_none_of_its_patches(self):
        task, images, order = build(both_orders=False).task, random(0, 6, 3, 32, 32), torch.randperm(6)
        torch.testing.assert_close(task.patches(images[order], draws(6)[order]), task.patches(images, draws(6))[order])
        for moved, placed in zip(task.pairs(draws(6)[order]), task.pairs(draws(6)), strict=True):
            assert torch.equal(moved, placed[order])


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        method = build()
    assert all(parameter.is_meta for parameter in method.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 1}, "grid = 1: must be >= 2"),
        ({"patch": 1}, "patch = 1, jitter = 2: must be >= 2"),
        ({"gap": 3}, "gap = 3: must be >= 2 x jitter = 4"),
        ({"patch": 24, "gap": 12}, "side = 96: must be >= 100 pixels"),
        ({"colour": "sepia"}, "colour = sepia: must be drop, project, grey or keep"),
        ({"coarse": 1.5}, "coarse = 1.5: must be in"),
        ({"coarsest": 20}, "coarsest = 20: must be in"),
        ({"scale": 0.0}, "scale = 0.0: must be > 0"),
        ({"hidden": 0}, "hidden = 0: must be >= 1"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_limits(changes, message):
    with pytest.raises(ValueError, match=message):
        RelativePatchConfig(**changes)
