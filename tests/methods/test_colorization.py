"""Colorization: its targets, weights and decoding by hand, and that no colour leaks into what the encoder sees."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.colorization import (
    Colorization,
    ColorizationConfig,
    ColorizationTask,
    colour_tap,
    has_colour,
    lightness_and_colours,
)
from methods.encoders import ResNet, ResNetConfig, SmallCNN, SmallCNNConfig
from methods.losses.colorization import (
    annealed_mean,
    colour_cross_entropy,
    colour_distance,
    nearest_bins,
    rebalance,
    smooth_prior,
    soft_encode,
)
from methods.views.draws import Draws
from methods.views.lab import gamut_bins, lab_to_rgb, rgb_to_lab

BINS = torch.tensor([(0, 0), (10, 0), (0, 10), (10, 10), (-10, 0), (0, -10)], dtype=torch.float64)
SHARES = [0.545655, 0.245178, 0.110166, 0.049501, 0, 0.049501]
PRIOR = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
ALL = torch.ones(1, dtype=torch.bool)
DRAWS = Draws(torch.arange(64))


def at(*colours, dtype=torch.float64):
    """Colours as a map (1, 2, 1, n)."""
    return torch.tensor(colours, dtype=dtype).T[None, :, None]


def dense(index, share, count):
    return torch.zeros(index.shape[0], count, *index.shape[2:], dtype=share.dtype).scatter(1, index, share)


def build(form="classification", norm="group", **options):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm=norm))
    return encoder, ColorizationTask(encoder, ColorizationConfig(form=form, **options))


def coloured(count, seed=0, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def grey(count, seed=0, side=16):
    return coloured(count, seed, side)[:, :1].expand(-1, 3, -1, -1)


def gradients(encoder, task):
    return [p.grad.clone() for p in (*encoder.parameters(), *task.parameters())]


def backward(encoder, task, images):
    encoder.zero_grad(), task.zero_grad()
    losses = task(encoder, images, DRAWS[: len(images)])
    losses["loss"].backward()
    return losses["loss"].detach(), gradients(encoder, task)


# targets


def test_five_nearest_bins_share_a_colour_by_hand():
    index, share = soft_encode(at((3, 1)), BINS, neighbours=5, sigma=5)
    encoded = dense(index, share, 6).flatten()
    np.testing.assert_allclose(encoded, SHARES, atol=1e-6)
    np.testing.assert_allclose(encoded @ BINS, (2.946791, 1.101658), atol=1e-6)


def test_of_equally_near_bins_the_lower_index_comes_first():
    distance, index = nearest_bins(at((3, 1), (0, 0), (5, 5)), BINS, count=5)
    assert distance[0, :, 0, 0].tolist() == [10, 50, 90, 130, 130]
    assert index[0, :, 0].T.tolist() == [[0, 1, 2, 3, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]


@given(seed=st.integers(0, 2**31), neighbours=st.integers(1, 10), sigma=st.floats(0.05, 50))
def test_shares_are_a_distribution_led_by_the_nearest_bin(seed, neighbours, sigma):
    rng = torch.Generator().manual_seed(seed)
    colours = 200 * torch.rand(2, 2, 3, 3, generator=rng) - 100
    bins = torch.tensor(gamut_bins(20))
    index, share = soft_encode(colours, bins, neighbours=neighbours, sigma=sigma)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(2, 3, 3))
    assert share.isfinite().all() and (share.diff(dim=1) <= 0).all()
    slow = torch.cdist(colours.permute(0, 2, 3, 1).reshape(-1, 2), bins, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(
        slow.gather(1, index.permute(0, 2, 3, 1).reshape(-1, neighbours)), slow.sort(dim=1).values[:, :neighbours]
    )


# prior and weights


def test_rare_bins_weigh_more_by_hand():
    weights = rebalance(PRIOR, uniform=0.5)
    np.testing.assert_allclose(weights, (0.754170, 1.461204, 1.798405), atol=1e-6)
    assert (PRIOR * weights).sum().item() == pytest.approx(1, abs=1e-12)


@given(seed=st.integers(0, 2**31), uniform=st.floats(0.01, 1))
def test_weights_average_to_1_and_fall_with_the_prior(seed, uniform):
    prior = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(dim=0)
    weights = rebalance(prior, uniform=uniform)
    assert (prior * weights).sum().item() == pytest.approx(1)
    assert (weights[prior.argsort()].diff() <= 1e-12).all()


def test_a_uniform_prior_or_a_whole_uniform_share_weighs_all_alike():
    torch.testing.assert_close(rebalance(torch.full((7,), 1 / 7), uniform=0.5), torch.ones(7))
    torch.testing.assert_close(rebalance(PRIOR, uniform=1.0), torch.ones(3, dtype=torch.float64))


def test_smoothing_moves_counts_to_neighbours_by_the_gaussian():
    spread = smooth_prior(torch.tensor([0, 6, 0, 0, 0, 0]), BINS, sigma=5)
    near, far = math.exp(-100 / 50), math.exp(-200 / 50)  # (10, 0) is 10 from two bins, 14.1 from two, 20 from one
    expected = torch.tensor([near, 1, far, near, math.exp(-400 / 50), far], dtype=torch.float64)
    torch.testing.assert_close(spread, expected / expected.sum())


def test_a_narrow_gaussian_leaves_the_frequencies():
    torch.testing.assert_close(
        smooth_prior(torch.tensor([7, 2, 1, 0, 0, 0]), BINS, sigma=0.5),
        torch.tensor([0.7, 0.2, 0.1, 0, 0, 0], dtype=torch.float64),
    )


def test_the_prior_is_uniform_until_the_clean_training_images_are_counted():
    encoder, task = build()
    torch.testing.assert_close(task.prior, torch.full((59,), 1 / 59))
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(100, 3, 16, 16)  # (80.1, 67.2): nearest is (80, 60)
    blue = torch.tensor([0, 0, 1.0])[:, None, None].expand(50, 3, 16, 16)  # (79.2, -107.9): nearest is (80, -100)
    task.on_start(torch.cat([red, blue, grey(30)]))  # grey images are not in the loss and not in its prior
    bins = [tuple(c) for c in task.bins.tolist()]
    assert task.prior[bins.index((80, 60))].item() == pytest.approx(2 / 3, abs=2e-3)
    assert task.prior[bins.index((80, -100))].item() == pytest.approx(1 / 3, abs=2e-3)
    assert task.prior.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_prior_travels_in_the_state_and_steps_leave_it():
    encoder, task = build()
    task.on_start(coloured(8))
    before = task.prior.clone()
    backward(encoder, task, coloured(4, seed=1))
    assert torch.equal(task.prior, before) and {"prior", "bins"} <= set(task.state_dict())
    fresh = build()[1]
    assert not torch.equal(fresh.prior, before)
    fresh.load_state_dict(task.state_dict())
    assert torch.equal(fresh.prior, before)


def test_grey_images_alone_leave_the_prior_uniform():
    task = build()[1]
    task.on_start(grey(5))
    torch.testing.assert_close(task.prior, torch.full((59,), 1 / 59))


def test_the_weight_of_training_pixels_averages_to_1_without_smoothing():
    task = build(prior_sigma=0.1)[1]
    images = coloured(40)
    images[:, :, :, 8:] *= torch.tensor([0.9, 0.5, 0.2])[:, None, None]
    task.on_start(images)
    _, colours = lightness_and_colours(images)
    _, index = nearest_bins(colours, task.bins, count=1)
    assert rebalance(task.prior, uniform=0.5)[index].mean().item() == pytest.approx(1, abs=1e-5)


# loss


@pytest.mark.parametrize(
    ("weights", "expected"), [(torch.ones(3), 1.239545), (rebalance(PRIOR, uniform=0.5), 2.104133)]
)
def test_two_pixels_by_hand(weights, expected):
    logits = torch.tensor([2.0, 0, 0], dtype=torch.float64)[None, :, None, None].expand(1, 3, 1, 2)
    index, target = torch.tensor([0, 2])[None, None, None], torch.ones(1, 1, 1, 2)
    loss = colour_cross_entropy(logits, index, target, weights=weights, mask=ALL)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("count", "expected"), [(313, 5.746203), (59, math.log(59))])
def test_equal_logits_cost_the_log_of_the_number_of_bins(count, expected):
    index = torch.randint(count, (2, 5, 3, 3))
    target = torch.rand(2, 5, 3, 3).softmax(dim=1)
    loss = colour_cross_entropy(
        torch.zeros(2, count, 3, 3), index, target, weights=torch.ones(count), mask=ALL.expand(2)
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@given(seed=st.integers(0, 2**31))
def test_the_loss_is_that_of_the_dense_distribution(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 2, 2, generator=rng, dtype=torch.float64)
    colours = 20 * torch.randn(3, 2, 2, 2, generator=rng, dtype=torch.float64)
    weights, mask = torch.rand(6, generator=rng, dtype=torch.float64), torch.tensor([True, False, True])
    index, share = soft_encode(colours, BINS, neighbours=4, sigma=5)
    z = dense(index, share, 6)
    each = weights[z.argmax(dim=1)] * -(z * logits.log_softmax(dim=1)).sum(dim=1)
    found = colour_cross_entropy(logits, index, share, weights=weights, mask=mask)
    torch.testing.assert_close(found, each[mask].mean())


def test_regression_by_hand():
    zero, error = torch.zeros(1, 2, 3, 3), torch.tensor([0.3, 0.4])[None, :, None, None].expand(1, 2, 3, 3)
    assert colour_distance(error, zero, mask=ALL).item() == pytest.approx(0.125)
    assert colour_distance(error, zero, mask=ALL, huber=0.2).item() == pytest.approx(0.1)
    assert colour_distance(error, zero, mask=ALL, huber=1.0).item() == pytest.approx(0.125)


def test_huber_costs_less_for_large_errors_only():
    images = coloured(4)
    squares, linear = (backward(*build("regression", huber=huber), images)[0] for huber in (False, True))
    assert linear < squares
    pale = 0.5 + 0.1 * (images - 0.5)
    squares, linear = (backward(*build("regression", huber=h, min_colour=0), pale)[0] for h in (False, True))
    assert linear <= squares


def test_workers_with_a_shared_count_average_to_the_loss_of_all_images():
    rng = torch.Generator().manual_seed(0)
    error, mask = torch.randn(6, 2, 2, 2, generator=rng), torch.tensor([1, 0, 0, 1, 1, 1]).bool()
    whole = colour_distance(error, torch.zeros(6, 2, 2, 2), mask=mask)
    parts = [
        colour_distance(error[s], torch.zeros(3, 2, 2, 2), mask=mask[s], counted=mask.sum() / 2)
        for s in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("form", ["classification", "regression"])
def test_a_grey_image_adds_exactly_nothing_to_loss_and_gradients(form):
    encoder, task = build(form)  # group norm: batch norm would let an image touch the others' features
    task.on_start(coloured(16, seed=5))
    loss, found = backward(encoder, task, grey(4))
    assert loss == 0 and all((gradient == 0).all() for gradient in found)
    alone, expected = backward(encoder, task, coloured(3))
    mixed, found = backward(encoder, task, torch.cat([coloured(3), grey(5)]))
    torch.testing.assert_close(mixed, alone)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("value", "counts"), [(5.0, False), (5.1, True), (-5.1, True)])
def test_an_image_counts_when_any_a_or_b_exceeds_5(value, counts):
    for channel in range(2):
        colours = torch.zeros(1, 2, 4, 4)
        colours[0, channel, 2, 1] = value
        assert has_colour(colours, 5.0).item() is counts


# decoding


@pytest.mark.parametrize(("temperature", "expected"), [(0.38, 1.531918), (1.0, 5.0), (0.01, 0.0)])
def test_the_annealed_mean_by_hand(temperature, expected):
    logits = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()[None, :, None, None]
    bins = torch.tensor([[0.0], [10.0], [20.0]], dtype=torch.float64)
    assert annealed_mean(logits, bins, temperature=temperature).item() == pytest.approx(expected, abs=1e-6)
    if temperature == 0.38:
        shares = [annealed_mean(logits, row[:, None], temperature=0.38).item() for row in torch.eye(3).double()]
        np.testing.assert_allclose(shares, (0.854463, 0.137882, 0.007655), atol=1e-6)


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_decoding_reads_probabilities_and_not_the_level_of_logits(seed, shift):
    logits = torch.randn(1, 6, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        annealed_mean(logits + shift, BINS, temperature=0.38), annealed_mean(logits, BINS, temperature=0.38)
    )


# what the encoder sees


class Spy(SmallCNN):
    def trunk(self, images):
        self.seen = images
        return super().trunk(images)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_images_of_equal_lightness_and_other_colours_look_the_same_to_the_encoder(seed):
    rng = torch.Generator().manual_seed(seed)
    lab = torch.rand(2, 3, 16, 16, generator=rng) * torch.tensor([20.0, 20, 20])[:, None, None] + 40
    lab[:, 1:] -= 50
    other = lab.clone()
    other[:, 1:] = -other[:, 1:]  # all in gamut: |a|, |b| <= 10 at L from 40 to 60
    torch.manual_seed(0)
    encoder = Spy(SmallCNNConfig(width=0.25, norm="group"))
    task = ColorizationTask(encoder, ColorizationConfig(min_colour=0))
    seen = []
    for images in (lab_to_rgb(lab), lab_to_rgb(other)):
        task(encoder, images, DRAWS[:2])
        seen.append(encoder.seen * encoder.std + encoder.mean)
    torch.testing.assert_close(*seen, atol=2e-6, rtol=0)
    torch.testing.assert_close(seen[0][:, 0], seen[0][:, 2], atol=1e-6, rtol=0)  # grey: three equal channels
    torch.testing.assert_close(100 * seen[0][:, 0], lab[:, 0], atol=2e-4, rtol=0)


def test_what_is_seen_is_in_range_and_has_no_colour_of_its_own():
    images = coloured(4)
    images[0], images[1] = 1.0, 0.0
    lightness, colours = lightness_and_colours(images)
    assert lightness.shape == images.shape and 0 <= lightness.min() and lightness.max() <= 1
    assert torch.equal(lightness[:, 0], lightness[:, 1]) and torch.equal(lightness[:, 0], lightness[:, 2])
    torch.testing.assert_close(lightness[:, 0], rgb_to_lab(images)[:, 0] / 100)


def test_colours_are_averaged_over_4_by_4_pixels_and_not_picked():
    images = coloured(2)
    _, colours = lightness_and_colours(images)
    lab = rgb_to_lab(images)[:, 1:]
    torch.testing.assert_close(colours, lab.reshape(2, 2, 4, 4, 4, 4).mean(dim=(3, 5)), atol=1e-4, rtol=1e-5)


def test_colours_between_whole_units_are_kept():
    images = torch.full((1, 3, 16, 16), 0.5)
    images[:, 0] += 0.004
    lab = rgb_to_lab(images)[0, 1:, 0, 0]
    assert ((lab - lab.round()).abs() > 0.05).any()  # an 8-bit Lab would have rounded this away
    torch.testing.assert_close(lightness_and_colours(images)[1][0, :, 0, 0], lab, atol=1e-4, rtol=0)


# the head


@pytest.mark.parametrize(
    ("encoder", "tap", "channels"),
    [
        (SmallCNN(SmallCNNConfig(width=0.25)), "c4", 64),
        (ResNet(ResNetConfig(depth=10, width=0.125, stem="cifar")), "layer4", 64),
        (ResNet(ResNetConfig(depth=10, width=0.125, stem="imagenet")), "layer2", 16),
    ],
)
def test_the_head_reads_the_deepest_map_of_stride_at_most_8(encoder, tap, channels):
    assert colour_tap(encoder) == (tap, channels)
    task = ColorizationTask(encoder, ColorizationConfig())
    assert task.head.weight.shape == (59, channels, 1, 1)


def test_an_encoder_without_a_fine_map_is_refused():
    class Coarse(SmallCNN):
        def trunk(self, images):
            return {"c4": super().trunk(images)["c4"][..., ::2, ::2]}

    with pytest.raises(ValueError, match="c4 are all of stride above 8"):
        colour_tap(Coarse(SmallCNNConfig(width=0.25)))


def test_enlarging_after_the_head_is_enlarging_before_it():
    encoder, task = build()
    map_ = encoder.maps(lightness_and_colours(coloured(2))[0])["c4"]
    before = task.head(torch.nn.functional.interpolate(map_, (4, 4), mode="bilinear"))
    found = task.output(encoder, lightness_and_colours(coloured(2))[0], torch.Size([4, 4]))
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [16, 28, 32])
@pytest.mark.parametrize(("form", "channels"), [("classification", 59), ("regression", 2)])
def test_the_output_is_a_quarter_of_the_images_side(form, channels, side):
    encoder, task = build(form)
    images = coloured(2, side=side)
    grey_, target = lightness_and_colours(images)
    assert target.shape == (2, 2, side // 4, side // 4)
    assert task.output(encoder, grey_, target.shape[2:]).shape == (2, channels, side // 4, side // 4)
    assert task.colours(encoder, images).shape == target.shape


def test_heads_are_of_a_size_that_no_image_changes():
    one, other = build()[1], build()[1]
    one.on_start(coloured(9)), other.on_start(grey(9))
    assert one.head.weight.shape == other.head.weight.shape == (59, 64, 1, 1)


def test_it_is_built_on_the_meta_device():
    with torch.device("meta"):
        encoder = SmallCNN(SmallCNNConfig(width=0.25))
        for form in ("classification", "regression"):
            method = Colorization(encoder, ColorizationConfig(form=form), classes=0, images=0)
            assert all(value.is_meta for value in method.state_dict().values())


def test_chroma_is_the_mean_length_of_the_predicted_colours():
    encoder, task = build()
    losses = task(encoder, coloured(3), DRAWS[:3])
    expected = task.colours(encoder, coloured(3)).square().sum(dim=1).sqrt().mean()
    torch.testing.assert_close(losses["chroma"], expected.detach())
    assert not losses["chroma"].requires_grad


def test_between_two_opposite_colours_the_annealed_mean_is_less_grey_than_the_mean():
    logits = torch.tensor([0.6, 0.4]).log()[None, :, None, None]
    bins = torch.tensor([(60.0, 0.0), (-60.0, 0.0)])
    mean, annealed = (annealed_mean(logits, bins, temperature=t).norm().item() for t in (1.0, 0.38))
    assert mean == pytest.approx(12, abs=1e-4) and annealed > 2 * mean


@pytest.mark.parametrize("form", ["classification", "regression"])
def test_the_colour_that_lightness_tells_is_learned(form):
    images = torch.zeros(16, 3, 16, 16)
    images[::2, 0], images[1::2, 2] = 0.8, 0.8  # red is lighter than blue
    images *= torch.linspace(0.8, 1, 16)[:, None, None, None]
    encoder, task = build(form, norm="batch")
    task.on_start(images)
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        task(encoder, images, DRAWS[:16])["loss"].backward()
        optimizer.step()
    target = lightness_and_colours(images)[1]
    error = (task.colours(encoder, images) - target).norm(dim=1).mean()
    assert error < 0.4 * target.norm(dim=1).mean()


# rebalancing


def test_without_rebalancing_the_common_colour_wins_a_tie_and_with_it_the_rare_one():
    """One pixel in three is rare, nothing tells which: the loss is least at w p̃, whose mode rebalancing turns over."""
    prior = torch.tensor([2 / 3, 1 / 3])
    best = {}
    for uniform in (1.0, 1e-6):
        expected = prior * rebalance(prior, uniform=uniform)
        best[uniform] = expected / expected.sum()
    torch.testing.assert_close(best[1.0], prior)
    torch.testing.assert_close(best[1e-6], torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)


def test_norms_are_set_on_colour_images_at_the_end():
    assert Colorization.clean_norm


def test_the_chance_loss_is_the_log_of_the_bins():
    assert build()[1].chance_loss == pytest.approx(math.log(59))


# configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pitch": 4}, "pitch = 4: must be in"),
        ({"neighbours": 0}, "neighbours = 0: must be in"),
        ({"neighbours": 60}, "pitch 20 has 59 bins"),
        ({"sigma": 0}, "sigma = 0: must be > 0"),
        ({"prior_sigma": -1}, "prior_sigma = -1"),
        ({"temperature": 0}, "temperature = 0"),
        ({"uniform": 0}, "uniform = 0"),
        ({"uniform": 1.5}, "uniform = 1.5"),
        ({"min_colour": -1}, "min_colour = -1"),
        ({"huber": True}, "belongs to form: regression"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        ColorizationConfig(**options)
