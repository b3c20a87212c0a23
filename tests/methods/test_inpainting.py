"""Context encoders: losses by hand, holes, and two players who never touch each other's weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.encoders import ResNet, ResNetConfig, SmallCNN, SmallCNNConfig
from methods.inpainting import (
    Inpainting,
    InpaintingConfig,
    InpaintingTask,
    adversarial,
    block_holes,
    center_hole,
    discriminator,
    random_hole,
    region_hole,
)
from methods.losses.inpainting import fooling_loss, masked_l2, overlap_weight, telling_loss
from methods.views.draws import Draws

MODES = ("center", "blocks", "region")


def logit(probability):
    return torch.tensor([math.log(probability / (1 - probability))], dtype=torch.float64)


def draws_of(count, seed=0):
    return Draws.of(seed, 0, torch.arange(count))


def pictures(count, seed=0, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def build(encoder=SmallCNN, norm="batch", **options):
    torch.manual_seed(0)
    trunk = encoder(SmallCNNConfig(width=0.25, norm=norm))
    return trunk, InpaintingTask(trunk, InpaintingConfig(decoder_dim=64, discriminator_dim=8, **options))


class Spy(SmallCNN):
    def trunk(self, images):
        self.seen = images * self.std + self.mean
        return super().trunk(images)


class Blind(SmallCNN):
    """Sees nothing: its maps are the same for all images."""

    def trunk(self, images):
        return super().trunk(torch.zeros_like(images))


# reconstruction


@given(seed=st.integers(0, 2**31))
def test_the_right_answer_in_the_hole_costs_nothing_whatever_lies_outside(seed):
    rng = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(2, 2, 3, 8, 8, generator=rng)
    hole = torch.rand(2, 1, 8, 8, generator=rng) < 0.4
    assert masked_l2(torch.where(hole, images, noise), images, hole.float()) == 0


@pytest.mark.parametrize(
    ("side", "overlap", "expected"), [(64, 4, 3.109375), (16, 1, 3.109375), (16, 2, 4.937500), (16, 0, 1.0)]
)
def test_an_error_of_1_costs_the_mean_weight(side, overlap, expected):
    weight = overlap_weight(side, overlap=overlap, strength=10)
    assert weight.mean().item() == pytest.approx(expected, abs=1e-6)
    images = torch.zeros(2, 3, side, side)
    assert masked_l2(images + 1, images, weight).item() == pytest.approx(expected, abs=1e-5)


def test_the_border_of_16_pixels_has_60_of_weight_10_and_196_inside_of_weight_1():
    weight = overlap_weight(16, overlap=1, strength=10)
    assert (weight == 10).sum() == 60 and (weight == 1).sum() == 196
    assert (weight[..., 0, :] == 10).all() and (weight[..., -1] == 10).all() and weight[0, 0, 1, 1] == 1


@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.9))
def test_the_loss_is_a_mean_over_the_hole_and_not_over_the_image(seed, share):
    rng = torch.Generator().manual_seed(seed)
    hole = torch.rand(2, 1, 8, 8, generator=rng) < share
    hole[0, 0, 0, 0] = True
    images = torch.rand(2, 3, 8, 8, generator=rng)
    assert masked_l2(images + 2, images, hole.float()).item() == pytest.approx(4, rel=1e-5)


def test_workers_with_a_shared_count_average_to_the_loss_of_all_images():
    images, hole = torch.randn(4, 3, 8, 8), (torch.rand(4, 1, 8, 8) < 0.3).float()
    whole = masked_l2(images, 0 * images, hole)
    parts = [masked_l2(images[s], 0 * images[s], hole[s], counted=hole.sum() / 2) for s in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("overlap", [8, 9, -1])
def test_an_overlap_that_leaves_no_hole_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap = {overlap}: must leave a hole in a prediction of 16 x 16"):
        overlap_weight(16, overlap=overlap, strength=10)


# adversarial


def test_joint_and_discriminator_losses_by_hand():
    fooling = fooling_loss(logit(0.3))
    assert fooling.item() == pytest.approx(1.203973, abs=1e-6)
    assert (0.999 * 0.04 + 0.001 * fooling).item() == pytest.approx(0.041164, abs=1e-6)
    assert telling_loss(logit(0.8), logit(0.3)).item() == pytest.approx(0.579818, abs=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_a_certain_discriminator_gives_finite_losses_and_gradients(scale):
    score = torch.tensor([scale, -scale], requires_grad=True)
    (fooling_loss(score) + telling_loss(score, score)).backward()
    assert score.grad.isfinite().all()


def test_the_loss_is_made_of_reconstruction_fooling_and_telling():
    encoder, task = build(lambda_adv=0.25)
    losses = task(encoder, pictures(4), draws_of(4))
    expected = 0.75 * losses["reconstruction"] + 0.25 * losses["adversarial"] + losses["discriminator"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    assert losses["discriminator"].item() == pytest.approx(2 * math.log(2), abs=0.3)  # it cannot tell yet


def test_neither_player_gets_a_gradient_from_the_others_loss():
    torch.manual_seed(0)
    judge = discriminator(8)
    fake = torch.randn(3, 3, 16, 16, requires_grad=True)
    fooling, telling = adversarial(judge, real=torch.randn(3, 3, 16, 16), fake=fake)
    fooling.backward(retain_graph=True)
    assert fake.grad.abs().sum() > 0 and all(weight.grad is None for weight in judge.parameters())
    fake.grad = None
    telling.backward()
    assert fake.grad is None and all(weight.grad.abs().sum() > 0 for weight in judge.parameters())


@pytest.mark.parametrize("mask", MODES)
def test_one_backward_pass_gives_both_players_the_gradients_of_two(mask):
    encoder, task = build(mask=mask, lambda_adv=0.3, norm="group")
    images, draws = pictures(4), draws_of(4)
    task(encoder, images, draws)["loss"].backward()
    generator = [*encoder.parameters(), *task.decoder.parameters()]
    ours = [weight.grad.clone() for weight in (*generator, *task.discriminator.parameters())]

    hole = center_hole(16, 1) if mask == "center" else random_hole(draws, 16, mode=mask, area=0.25, blocks=4)
    window = slice(4, 12) if mask == "center" else slice(None)
    target = 2 * images[..., window, window] - 1
    weight = overlap_weight(8, overlap=1, strength=10) if mask == "center" else hole.float()
    predicted = task.predict(encoder, images, hole)
    fake = predicted if mask == "center" else torch.where(hole, predicted, target)
    of_generator = 0.7 * masked_l2(predicted, target, weight) + 0.3 * fooling_loss(task.discriminator(fake))
    expected = torch.autograd.grad(of_generator, generator)
    of_judge = telling_loss(task.discriminator(target), task.discriminator(fake.detach()))
    expected += torch.autograd.grad(of_judge, list(task.discriminator.parameters()))
    for found, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-4)


def test_the_discriminator_has_no_statistics_that_a_step_could_move():
    assert not list(discriminator(8).buffers())


def test_what_lies_outside_a_region_cannot_tell_fake_from_real():
    encoder, task = build(lambda_adv=0.5)
    seen = []
    task.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    images, draws = pictures(3), draws_of(3)
    task(encoder, images, draws)
    hole = region_hole(draws, 16, area=0.25)
    for shown in seen:
        torch.testing.assert_close(torch.where(hole, 0, shown), torch.where(hole, 0, 2 * images - 1))
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])


def test_without_a_share_of_the_loss_there_is_no_discriminator():
    encoder, task = build()
    assert task.discriminator is None and not any("discriminator" in name for name in task.state_dict())
    assert set(task(encoder, pictures(2), draws_of(2))) == {"loss"}


@pytest.mark.parametrize("mask", MODES)
def test_every_weight_of_both_players_gets_a_finite_gradient(mask):
    encoder, task = build(mask=mask, lambda_adv=0.001)
    task(encoder, pictures(4), draws_of(4))["loss"].backward()
    for name, weight in (*encoder.named_parameters(), *task.named_parameters()):
        assert weight.grad is not None and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("mask", MODES)
def test_autocast_leaves_an_adversarial_loss_float32_and_near(mask):
    encoder, task = build(mask=mask, lambda_adv=0.1)
    exact = task(encoder, pictures(4), draws_of(4))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = task(encoder, pictures(4), draws_of(4))["loss"]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.05)


# what the encoder sees


@pytest.mark.parametrize("mask", MODES)
def test_nothing_in_the_hole_reaches_the_encoder(mask):
    encoder, task = build(Spy, mask=mask)
    draws, images = draws_of(4), pictures(4)
    hole = center_hole(16, 1) if mask == "center" else random_hole(draws, 16, mode=mask, area=0.25, blocks=4)
    task(encoder, images, draws)
    first = encoder.seen
    task(encoder, torch.where(hole, pictures(4, seed=9), images), draws)
    assert torch.equal(first, encoder.seen)
    torch.testing.assert_close(first, torch.where(hole, task.fill[:, None, None], images))


@pytest.mark.parametrize("mask", MODES)
def test_a_pixel_outside_changes_the_loss_through_the_encoder_alone(mask):
    draws, images = draws_of(4), pictures(4)
    if mask == "center":
        predicted = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
        predicted[..., 4:12, 4:12] = True
    else:
        predicted = random_hole(draws, 16, mode=mask, area=0.25, blocks=4)
    changed = torch.where(predicted, images, pictures(4, seed=9))
    for encoder_class, equal in ((Blind, True), (SmallCNN, False)):
        encoder, task = build(encoder_class, mask=mask)
        losses = [task(encoder, x, draws)["loss"] for x in (images, changed)]
        assert torch.equal(*losses) is equal


def test_a_pixel_of_the_overlap_is_seen_and_asked_for():
    encoder, task = build(Blind, mask="center")
    images = pictures(2)
    changed = images.clone()
    changed[:, :, 4, 4] = 1 - changed[:, :, 4, 4]
    assert not center_hole(16, 1)[0, 0, 4, 4]
    assert task(encoder, images, draws_of(2))["loss"] != task(encoder, changed, draws_of(2))["loss"]


def test_holes_are_filled_with_the_mean_colour_of_the_clean_training_images():
    encoder, task = build(Spy)
    images = pictures(50) * torch.tensor([1.0, 0.5, 0.1])[:, None, None]
    task.on_start(images)
    torch.testing.assert_close(task.fill, images.mean(dim=(0, 2, 3)))
    assert "fill" in task.state_dict() and 0 <= task.fill.min() and task.fill.max() <= 1
    task(encoder, images[:2], draws_of(2))
    hole = region_hole(draws_of(2), 16, area=0.25).expand(-1, 3, -1, -1)
    filled = encoder.seen[hole].reshape(2, 3, -1)
    torch.testing.assert_close(filled, task.fill[None, :, None].expand_as(filled))


# holes


@pytest.mark.parametrize(("side", "overlap", "count"), [(32, 0, 256), (32, 1, 196), (128, 4, 3136)])
def test_the_central_hole_is_half_the_side_less_the_overlap(side, overlap, count):
    hole = center_hole(side, overlap)
    assert hole.sum() == count and torch.equal(hole, hole.flip(2)) and torch.equal(hole, hole.transpose(2, 3))


@given(seed=st.integers(0, 2**31), side=st.integers(5, 40), area=st.floats(0.05, 0.5))
def test_a_region_has_exactly_the_asked_area(seed, side, area):
    hole = region_hole(draws_of(3, seed), side, area=area)
    assert hole.shape == (3, 1, side, side)
    assert (hole.sum(dim=(1, 2, 3)) == max(1, round(area * side**2))).all()


@given(seed=st.integers(0, 2**31), side=st.integers(5, 40), area=st.floats(0.05, 0.5), count=st.integers(1, 6))
def test_blocks_cover_something_and_at_most_the_asked_area(seed, side, area, count):
    covered = block_holes(draws_of(3, seed), side, area=area, count=count).sum(dim=(1, 2, 3))
    assert (covered >= 1).all() and (covered <= max(count, area * side**2)).all()  # a block has a pixel at least


@given(seed=st.integers(0, 2**31), side=st.integers(8, 40))
def test_one_block_is_a_rectangle_of_half_to_all_of_the_largest_side(seed, side):
    hole = block_holes(draws_of(4, seed), side, area=0.25, count=1)[:, 0]
    down, across = hole.any(dim=2), hole.any(dim=1)
    assert torch.equal(hole, down[:, :, None] & across[:, None, :])
    for length in (down.sum(dim=1), across.sum(dim=1)):
        assert (length >= (side // 2 + 1) // 2).all() and (length <= side // 2).all()


@pytest.mark.parametrize(("mode", "low", "high"), [("blocks", 0.02, 0.3), ("region", 0.15, 0.35)])
def test_random_holes_leave_no_pixel_out_and_favour_none_much(mode, low, high):
    often = random_hole(draws_of(3000), 16, mode=mode, area=0.25, blocks=4).float().mean(dim=0)
    assert often.min() > low and often.max() < high


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("mode", ["blocks", "region"])
def test_a_hole_depends_on_its_own_draws_alone(mode, seed):
    torch.manual_seed(seed)
    draws = draws_of(6, seed)
    state = torch.get_rng_state()
    holes = random_hole(draws, 16, mode=mode, area=0.25, blocks=4)
    assert torch.equal(torch.get_rng_state(), state)
    rows = torch.tensor([4, 1])
    assert torch.equal(random_hole(draws[rows], 16, mode=mode, area=0.25, blocks=4), holes[rows])
    assert len({tuple(hole.flatten().tolist()) for hole in holes}) > 1


def test_regions_hang_together():
    """Blobs and not specks: most pixels of a region have a neighbour in it to the right."""
    hole = region_hole(draws_of(200), 32, area=0.25)
    assert (hole[..., :-1] & hole[..., 1:]).sum() > 0.7 * hole[..., :-1].sum()


def test_the_default_hole_is_a_random_one_and_norms_are_set_on_whole_images_at_the_end():
    assert InpaintingConfig().mask == "region" and Inpainting.clean_norm


# modules


@pytest.mark.parametrize("side", [16, 28, 32])
@pytest.mark.parametrize("mask", MODES)
def test_the_prediction_has_the_size_of_what_is_asked_and_its_range(mask, side):
    encoder, task = build(mask=mask)
    hole = center_hole(side, 1)
    predicted = task.predict(encoder, pictures(2, side=side), hole)
    asked = side // 2 if mask == "center" else side
    assert predicted.shape == (2, 3, asked, asked) and predicted.abs().max() <= 1
    assert task(encoder, pictures(2, side=side), draws_of(2))["loss"].isfinite()


def test_the_small_decoder_doubles_twice_for_a_central_hole():
    encoder = SmallCNN(SmallCNNConfig())
    task = InpaintingTask(encoder, InpaintingConfig(mask="center"))
    shapes = [tuple(module.weight.shape) for module in task.decoder if hasattr(module, "stride")]
    assert shapes == [(256, 256, 1, 1), (256, 128, 4, 4), (128, 64, 4, 4), (3, 64, 3, 3)]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_decoder_fits_the_encoders_stride(stem):
    encoder = ResNet(ResNetConfig(depth=10, width=0.125, stem=stem))
    task = InpaintingTask(encoder, InpaintingConfig(decoder_dim=32))
    last = encoder.maps(pictures(2, side=64))["layer4"]
    assert task.decoder(last).shape == (2, 3, 64, 64)


def test_it_is_built_on_the_meta_device():
    with torch.device("meta"):
        encoder = SmallCNN(SmallCNNConfig(width=0.25))
        method = Inpainting(encoder, InpaintingConfig(lambda_adv=0.001), classes=0, images=0)
    assert all(value.is_meta for value in method.state_dict().values())


@pytest.mark.parametrize("mask", MODES)
def test_what_surrounds_the_hole_tells_a_plain_images_colour(mask):
    images = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16)
    encoder, task = build(mask=mask)
    task.on_start(images)
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=1e-3)
    losses = []
    for number in range(60):
        optimizer.zero_grad()
        losses.append(task(encoder, images, draws_of(16, seed=number))["loss"])
        losses[-1].backward()
        optimizer.step()
    weight = overlap_weight(8, overlap=1, strength=10).mean() if mask == "center" else 1
    guess = weight * (2 * images).var(dim=0, correction=0).mean()
    assert losses[-1] < 0.3 * guess


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": 0}, "area = 0: must be in"),
        ({"area": 0.6}, "area = 0.6: must be in"),
        ({"blocks": 0}, "blocks = 0: must be >= 1"),
        ({"decoder_dim": 0}, "decoder_dim = 0"),
        ({"overlap": -1}, "overlap = -1: must be >= 0"),
        ({"overlap_weight": 0}, "overlap_weight = 0"),
        ({"lambda_adv": 1}, "lambda_adv = 1: must be in"),
        ({"lambda_adv": -0.1}, "lambda_adv = -0.1"),
        ({"discriminator_dim": 12}, "discriminator_dim = 12: must be a multiple of 8"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        InpaintingConfig(**options)
