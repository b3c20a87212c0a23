"""Rotation: exact turns, their labels, and no way to read them off a border."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.losses.cross_entropy import cross_entropy
from methods.rotation import Rotation, RotationConfig
from methods.views.draws import Draws
from methods.views.policy import Augment


def build(**changes):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm="group"))
    return Rotation(encoder, RotationConfig(**changes), classes=0, images=0)


def draws(rows, seed=0):
    return Draws.of(seed, 0, torch.arange(rows))


def random(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def turn(images, quarters):
    """Turned by the task itself: (B, 3, H, H)."""
    views, _ = build().task.puzzle(images, draws(len(images)))
    return views.unflatten(0, (4, -1))[quarters]


class TestTurns:
    def test_two_by_two_by_hand(self):
        image = torch.tensor([[1.0, 2], [3, 4]]).expand(1, 3, 2, 2)
        expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
        views, quarters = build().task.puzzle(image, draws(1))
        assert quarters.tolist() == [0, 1, 2, 3]
        assert all((views[:, channel] == torch.tensor(expected)).all() for channel in range(3))

    @given(seed=st.integers(0, 2**31), side=st.integers(1, 9))
    @settings(max_examples=20, deadline=None)
    def test_four_quarters_are_the_identity_bit_for_bit(self, seed, side):
        turned = images = random(seed, 2, 3, side, side)
        for _ in range(4):
            turned = turn(turned, 1)
        assert torch.equal(turned, images) and torch.equal(turn(images, 0), images)

    @given(seed=st.integers(0, 2**31))
    @settings(max_examples=20, deadline=None)
    def test_a_flip_keeps_the_label_only_before_turning_and_a_vertical_one_is_a_half_turn(self, seed):
        images = random(seed, 2, 3, 6, 6)
        assert torch.equal(turn(images, 1).flip(3), turn(images.flip(3), 3))
        assert not torch.equal(turn(images, 1).flip(3), turn(images.flip(3), 1))
        assert torch.equal(images.flip(2), turn(images.flip(3), 2))

    @given(seed=st.integers(0, 2**31), rows=st.integers(1, 6))
    @settings(max_examples=20, deadline=None)
    def test_every_label_comes_once_an_image_and_the_turns_have_the_same_pixels(self, seed, rows):
        images = random(seed, rows, 3, 7, 7)
        views, quarters = build().task.puzzle(images, draws(rows))
        assert torch.bincount(quarters).tolist() == [rows] * 4
        values = views.unflatten(0, (4, rows)).flatten(3).sort(dim=3).values
        assert all(torch.equal(values[quarter], values[0]) for quarter in range(4))

    def test_one_turn_an_image_is_drawn_for_it_and_all_are_equally_frequent(self):
        task = build(turns="one").task
        images = random(0, 4000, 3, 3, 3)
        views, quarters = task.puzzle(images, draws(4000))
        assert views.shape == images.shape
        for quarter in range(4):
            assert torch.equal(views[quarters == quarter], images[quarters == quarter].rot90(quarter, (2, 3)))
            assert (quarters == quarter).float().mean().item() == pytest.approx(0.25, abs=0.03)
        order = torch.randperm(4000)
        assert torch.equal(task.puzzle(images[order], draws(4000)[order])[1], quarters[order])

    def test_images_that_are_not_square_are_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 3, 4, 6\): rotation needs square"):
            build().task.puzzle(torch.rand(2, 3, 4, 6), draws(2))


class TestLoss:
    def test_equal_logits_cost_ln_4(self):
        method = build()
        torch.nn.init.zeros_(method.task.head.weight)
        torch.nn.init.zeros_(method.task.head.bias)
        losses = method.task(method.encoder, torch.rand(3, 3, 16, 16), draws(3))
        assert losses["loss"].item() == pytest.approx(1.386294, abs=1e-6) and method.task.chance_loss == math.log(4)

    @pytest.mark.parametrize(("label", "expected"), [(0, 0.440190), (3, 3.440190)])
    def test_logits_by_hand(self, label, expected):
        loss = cross_entropy(torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([label]))
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("turns", ["all", "one"])
    def test_the_loss_is_the_mean_over_the_views_of_their_surprise(self, turns):
        method = build(turns=turns)
        images = torch.rand(5, 3, 16, 16)
        losses = method.task(method.encoder, images, draws(5))
        views, quarters = method.task.puzzle(images, draws(5))
        p = method.task.head(method.encoder(views)).softmax(dim=1)
        expected = sum(-math.log(row[quarter]) for row, quarter in zip(p.tolist(), quarters.tolist(), strict=True))
        assert losses["loss"].item() == pytest.approx(expected / len(views), abs=1e-5)
        assert losses["rotation_accuracy"] == (p.argmax(dim=1) == quarters).float().mean()

    @pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (0.9, 0.1, 0.5)])
    def test_an_image_of_one_colour_has_four_equal_answers_and_a_quarter_of_them_right(self, colour):
        method = build()
        images = torch.tensor(colour)[:, None, None].expand(3, 3, 16, 16)
        losses = method.task(method.encoder, images, draws(3))
        logits = method.task.head(method.encoder(method.task.puzzle(images, draws(3))[0]))
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))
        assert losses["rotation_accuracy"] == 0.25


def frame_accuracy(images):
    """What a network of the outermost pixels alone learns, on noise images (N, 3, H, H): test accuracy of two layers.

    Products of neighbours would show a smoothing or a seam, so they are inputs too.
    """
    views, quarters = build().task.puzzle(images, draws(len(images)))
    ring = torch.cat([views[:, :, 0, :], views[:, :, -1, :], views[:, :, :, 0], views[:, :, :, -1]], dim=2) - 0.5
    inputs = torch.cat([ring, (ring - ring.roll(1, dims=2)).abs()], dim=2).flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    image = torch.arange(len(images)).repeat(4)
    seen = torch.isin(image, order[: len(images) // 2])
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(inputs.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[seen]), quarters[seen]).backward()
        optimizer.step()
    return (net(inputs[~seen]).argmax(dim=1) == quarters[~seen]).float().mean().item()


class TestBorders:
    noise = torch.randint(256, (3000, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)

    def test_the_outermost_pixels_of_noise_tell_nothing_after_the_whole_pipeline(self):
        view = build().views(12)[0]
        assert frame_accuracy(view.transform(self.noise, draws(len(self.noise), 2))) < 0.28

    def test_the_same_reader_finds_a_border_that_was_there_before_turning(self):
        padded = F.pad(self.noise[:, :, 1:] / 255, (0, 0, 1, 0))  # zeros in a fixed place
        assert frame_accuracy(padded) > 0.9


def test_the_pipeline_flips_before_turning_and_its_labels_hold_for_flipped_images():
    method = build(augment=Augment(padding=0))
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    upright = method.views(8)[0].transform(images, draws(40))
    same = (upright == images / 255).flatten(1).all(dim=1)
    mirrored = (upright == images.flip(3) / 255).flatten(1).all(dim=1)
    assert (same ^ mirrored).all() and same.any() and mirrored.any()  # never upside down
    views, quarters = method.task.puzzle(upright, draws(40))
    undone = torch.stack([view.rot90(-quarter, (1, 2)) for view, quarter in zip(views, quarters.tolist(), strict=True)])
    assert torch.equal(undone, upright.repeat(4, 1, 1, 1))


def test_an_unknown_choice_of_turns_is_named():
    with pytest.raises(ValueError, match="turns = two: must be all or one"):
        RotationConfig(turns="two")
