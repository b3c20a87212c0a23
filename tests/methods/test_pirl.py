"""PIRL: which head learns from which loss, what the bank holds, and how images become tiles."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from methods.encoders import SmallCNN, SmallCNNConfig
from methods.pirl import COLOUR, CUT, ORDER, PIRL, TURN, PIRLConfig, TilesHead, random_crop
from methods.views.colour import jitter_exact_, random_jitter
from methods.views.draws import Draws
from methods.views.tiles import cut_tiles, turn

IMAGES, PIXELS = 12, 32
KINDS = {
    "jigsaw": {"transform": "jigsaw"}, "rotation": {"transform": "rotation"}, "both": {"transform": "both"},
    "composed": {"transform": "both", "composed": True},
}  # fmt: skip


def build(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm="group"))
    return PIRL(encoder, PIRLConfig(**changes), classes=0, images=IMAGES)


def batch_of(method, index, seed=0):
    index = torch.as_tensor(index)
    colours = torch.rand(IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    images = (255 * F.interpolate(colours, (PIXELS, PIXELS), mode="bilinear")).to(torch.uint8)  # smooth, all different
    batch = {
        v.name: v.transform(images[index], Draws.of(seed, 0, index, n)) for n, v in enumerate(method.views(PIXELS))
    }
    return {**batch, "unlabelled.index": index, "unlabelled.key": Draws.of(seed, 0, index, -1).key}


def gradient_size(module):
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
class TestHeads:
    def test_a_weight_of_zero_leaves_the_transforms_head_and_of_one_the_images_head_without_gradient(self, kind):
        for weight in (0.0, 1.0):
            method = build(weight=weight, **KINDS[kind])
            method(batch_of(method, range(6)), 0.0)["loss"].backward()
            sizes = gradient_size(method.heads), gradient_size(method.image_head)
            silent, learning = sizes if weight == 0 else sizes[::-1]
            assert silent == 0 and learning > 0
            assert gradient_size(method.encoder) > 0

    def test_the_loss_is_the_weighted_mean_of_its_parts(self, kind):
        method = build(weight=0.3, **KINDS[kind])
        losses = method(batch_of(method, range(6)), 0.0)
        parts = [losses[f"{name}_loss"] for name in method.heads]
        expected = 0.7 * losses["image_loss"] + 0.3 * sum(parts) / len(parts)
        torch.testing.assert_close(losses["loss"].detach(), expected)

    def test_a_transform_has_a_view_and_a_head_of_its_own_unless_composed(self, kind):
        method = build(**KINDS[kind])
        expected = {"both": ["jigsaw", "rotation"], "composed": ["jigsaw"]}.get(kind, [kind])
        assert list(method.heads) == expected
        assert [view.name for view in method.views(PIXELS)] == ["image", *expected]
        batch = batch_of(method, range(3))
        assert not any(torch.equal(batch["image"], batch[name]) for name in expected)


def test_two_transforms_give_the_mean_of_their_net_losses():
    method = build(transform="both", weight=0.4)
    losses = method(batch_of(method, range(6)), 0.0)
    net = [0.4 * losses[f"{name}_loss"] + 0.6 * losses["image_loss"] for name in ("jigsaw", "rotation")]
    torch.testing.assert_close(losses["loss"].detach(), (net[0] + net[1]) / 2)


@pytest.mark.parametrize("form", ["softmax_nce", "constant_z", "info_nce"])
def test_with_all_similarities_equal_each_form_has_its_closed_value(form):
    method = build(form=form)
    method.contrast.bank.rows[:] = F.normalize(torch.ones(128), dim=0)
    loss = method(batch_of(method, range(6)), 0.0)["image_loss"].item()
    negatives = IMAGES - 1
    if form == "info_nce":
        assert loss == pytest.approx(math.log(IMAGES), abs=1e-5)
    elif form == "softmax_nce":
        nce = math.log(1 + negatives) + negatives * math.log((1 + negatives) / negatives)
        assert loss == pytest.approx(nce, abs=1e-5)
    else:  # the images' own similarities differ from each other, so only Z is theirs together
        assert math.isfinite(loss)


class TestMemory:
    def test_it_is_written_from_the_images_embedding_and_only_for_the_batch(self):
        method = build()
        before = method.contrast.bank.rows.clone()
        batch = batch_of(method, [7, 2, 3])
        method(batch, 0.0)["loss"].backward()
        assert torch.equal(method.contrast.bank.rows, before)  # scored before it is updated
        with torch.no_grad():
            image = F.normalize(method.image_head(method.encoder(batch["image"])), dim=1)
        method.on_step_end(0.0)
        rows = method.contrast.bank.rows
        torch.testing.assert_close(rows[[7, 2, 3]], F.normalize(0.5 * before[[7, 2, 3]] + 0.5 * image, dim=1))
        others = [i for i in range(IMAGES) if i not in (7, 2, 3)]
        assert torch.equal(rows[others], before[others])
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(IMAGES), atol=1e-6, rtol=0)
        assert rows.grad is None and not rows.requires_grad

    def test_another_transformed_view_writes_the_same_rows(self):
        methods = build(), build()
        for method, seed in zip(methods, (0, 1), strict=True):
            batch = batch_of(method, range(6))
            batch["jigsaw"] = batch_of(method, range(6), seed)["jigsaw"]
            method(batch, 0.0)
            method.on_step_end(0.0)
        assert torch.equal(methods[0].contrast.bank.rows, methods[1].contrast.bank.rows)

    def test_where_an_image_sits_in_the_batch_changes_no_row(self):
        methods = build(), build()
        for method, index in zip(methods, (range(IMAGES), torch.randperm(IMAGES)), strict=True):
            method(batch_of(method, index), 0.0)
            method.on_step_end(0.0)
        here, there = (method.contrast.bank.rows for method in methods)
        torch.testing.assert_close(here, there, atol=1e-6, rtol=0)

    def test_a_step_that_fails_leaves_the_rows_as_they_were(self):
        method = build()
        before = copy.deepcopy(method.state_dict())
        method(batch_of(method, range(4)), 0.0)  # and no further
        assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))


class TestTiles:
    def test_each_is_a_part_of_its_own_image_and_an_images_are_together(self):
        """Images of one colour stay recognisable through cutting and shuffling; a fold by tiles would mix them."""
        method = build(jitter=0.0, grid=3)
        images = torch.rand(5, 3, 1, 1).expand(-1, -1, PIXELS, PIXELS)
        draws = Draws.of(0, 0, torch.arange(5))
        tiles = method.tiles(images, draws).unflatten(0, (5, 9))
        assert tiles.shape == (5, 9, 3, 14, 14)
        grey = random_jitter(draws.fork(COLOUR).parts(9), brightness=0, contrast=0, saturation=0, hue=0).grey
        for image, of_image, greyed in zip(images, tiles, grey.unflatten(0, (5, 9)), strict=True):
            assert (~greyed).any()
            torch.testing.assert_close(of_image[~greyed], image[:, :14, :14].expand_as(of_image[~greyed]))

    def test_each_has_its_own_colours_and_the_drawn_place(self):
        method = build(grid=2)
        images = torch.rand(4, 3, PIXELS, PIXELS)
        draws = Draws.of(0, 0, torch.arange(4))
        cut = cut_tiles(images, draws.fork(CUT), grid=2, tile=14)
        order = draws.fork(ORDER).permutation(4)
        shuffled = torch.stack([tiles[places] for tiles, places in zip(cut, order, strict=True)]).flatten(0, 1)
        jitter = random_jitter(draws.fork(COLOUR).parts(4), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
        assert len({tuple(factor) for factor in jitter.factor.tolist()}) == 16
        torch.testing.assert_close(method.tiles(images, draws), jitter_exact_(shuffled.contiguous(), jitter))

    def test_any_order_occurs_equally_often(self):
        order = Draws.of(0, 0, torch.arange(24 * 200)).fork(ORDER).permutation(4)
        count = (order @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
        assert len(count) == 24 and ((count - 200.0) ** 2 / 200).sum() < 56  # chi², 23 degrees: p = 1e-4

    def test_a_composed_view_is_turned_and_then_cut(self):
        images, draws = torch.rand(6, 3, PIXELS, PIXELS), Draws.of(0, 0, torch.arange(6))
        quarters = draws.fork(TURN).integers(1, 4)[:, 0]
        composed = build(transform="both", composed=True).tiles(images, draws)
        torch.testing.assert_close(composed, build().tiles(turn(images, quarters), draws))

    def test_a_view_of_another_size_is_scaled_to_the_grid(self):
        tiles = build(grid=3).tiles(torch.rand(2, 3, 96, 96), Draws.of(0, 0, torch.arange(2)))
        assert tiles.shape == (18, 3, 14, 14) and 0 <= tiles.min() and tiles.max() <= 1

    def test_under_autocast_they_are_exact(self):
        method, draws = build(), Draws.of(0, 0, torch.arange(3))
        images = torch.rand(3, 3, PIXELS, PIXELS).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            rough = method.tiles(images, draws)
        assert torch.equal(rough, method.tiles(images, draws))

    def test_the_head_reads_an_images_tiles_in_their_order(self):
        head = TilesHead(5, 3, 4)
        features = torch.randn(8, 5)
        expected = torch.stack([head.all(torch.cat([head.each(f) for f in four])) for four in features.split(4)])
        torch.testing.assert_close(head(features), expected)
        assert not torch.allclose(head(features), head(features.flip(0)).flip(0))  # the order matters


def test_a_turn_is_exact_and_four_are_none():
    images = torch.rand(4, 3, 6, 6)
    turned = turn(images, torch.arange(4))
    for quarter in range(4):
        assert torch.equal(turned[quarter], images[quarter].rot90(quarter, (1, 2)))
    one = torch.ones(4, dtype=torch.int64)
    assert torch.equal(turn(turn(turn(turn(images, one), one), one), one), images)


def test_a_crop_of_the_whole_image_is_the_image_or_its_mirror():
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = Draws.of(0, 0, torch.arange(16))
    view = random_crop(8, min_area=1.0, flip=True)(images, draws)
    mirrored = draws.fork(1).chance(0.5)
    square = (view - torch.where(mirrored[:, None, None, None], images.flip(3), images) / 255).abs().amax((1, 2, 3))
    assert (square < 1e-5).sum() > 4 and 0 < mirrored.sum() < 16  # a ratio other than 1 at full area is smaller


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"weight": 1.5}, "weight = 1.5: must be in"),
        ({"momentum": 1.0}, "momentum = 1.0: must be in"),
        ({"composed": True}, "composed = true"),
        ({"tile": 17}, "tile = 17: must be in"),
        ({"grid": 1}, "grid = 1: must be >= 2"),
        ({"negative_count": 0}, "negative_count = 0: must be >= 1"),
        ({"negatives": "mine"}, "negatives = mine: must be one of shared, own"),
        ({"form": "nce"}, "form = nce: must be one of"),
        ({"transform": "flip"}, "transform = flip: must be"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_limits(changes, message):
    with pytest.raises(ValueError, match=message):
        PIRLConfig(**changes)


@pytest.mark.slow
def test_training_brings_an_image_and_its_transform_closer_than_other_images():
    method = build(negative_count=IMAGES)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        method(batch_of(method, range(IMAGES), seed=step), 0.0)["loss"].backward()
        optimizer.step()
        method.on_step_end(0.0)
    batch = batch_of(method, range(IMAGES), seed=1000)
    with torch.no_grad():
        image = F.normalize(method.image_head(method.encoder(batch["image"])), dim=1)
        tiles = method.tiles(batch["jigsaw"], Draws(batch["unlabelled.key"]))
        puzzle = F.normalize(method.heads["jigsaw"](method.encoder(tiles)), dim=1)
    cosine = image @ puzzle.T
    other = (cosine.sum() - cosine.trace()) / (IMAGES * (IMAGES - 1))
    assert cosine.diagonal().mean() > other + 0.1
