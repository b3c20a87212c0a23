"""Colour distortion beside torchvision's operations, with the same factors in the same order."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import ColorJitter

from methods.views.colour import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Jitter,
    jitter_exact_,
    jitter_linear_,
    random_jitter,
    turn_hue_,
)
from methods.views.draws import Draws

ADJUST = {
    BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation, HUE: F.adjust_hue,
}  # fmt: skip
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def pictures(count, height=9, width=7, seed=0):
    """Random colours, with rows of black, white, grey and pure colours among them."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    images[:, :, 0] = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    ).T
    return images


def torchvisions(image, jitter, i):
    if jitter.jittered[i]:
        for operation in jitter.order[i].tolist():
            image = ADJUST[operation](image, jitter.factor[i, operation].item())
    return F.rgb_to_grayscale(image, num_output_channels=3) if jitter.grey[i] else image


@pytest.mark.parametrize("strength, hue", [(0.4, 0.1), (0.8, 0.2), (1.0, 0.5)])
def test_exact_colour_equals_torchvision_in_every_order(strength, hue):
    images = pictures(96)
    jitter = random_jitter(
        Draws.of(0, 0, torch.arange(96)), brightness=strength, contrast=strength, saturation=strength, hue=hue
    )
    jitter = Jitter(ORDERS.repeat(4, 1), jitter.factor, jitter.jittered, jitter.grey)
    assert 0 < jitter.grey.sum() < 96 and 0 < jitter.jittered.sum() < 96
    expected = torch.stack([torchvisions(images[i], jitter, i) for i in range(96)])
    torch.testing.assert_close(jitter_exact_(images, jitter), expected, atol=1e-5, rtol=0)


@given(seed=st.integers(0, 2**31), height=st.integers(1, 12), width=st.integers(1, 12))
@settings(deadline=None)
def test_exact_colour_equals_torchvision_on_any_size(seed, height, width):
    images = torch.rand(8, 3, height, width, generator=torch.Generator().manual_seed(seed))
    jitter = random_jitter(Draws.of(seed, 0, torch.arange(8)), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    expected = torch.stack([torchvisions(images[i], jitter, i) for i in range(8)])
    torch.testing.assert_close(jitter_exact_(images, jitter), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 1e-4, 0.25, 1 / 3, 0.5])
def test_hue_turns_as_torchvisions_on_a_grid_of_all_colours(turn):
    levels = torch.linspace(0, 1, 12)
    colours = torch.cartesian_prod(levels, levels, levels).T[None]  # (1, 3, 1728), edges and greys included
    expected = F.adjust_hue(colours[..., None], turn)[..., 0]
    turned = turn_hue_(colours.transpose(0, 1).clone(), torch.tensor([turn])).transpose(0, 1)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_a_third_of_a_turn_takes_red_to_green_and_leaves_grey():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.3]]).T[:, None]
    expected = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0], [0.3, 0.3, 0.3]]).T[:, None]
    torch.testing.assert_close(turn_hue_(colours, torch.tensor([1 / 3])), expected, atol=1e-6, rtol=0)


def test_factors_have_color_jitters_range_and_orders_are_equally_frequent():
    count = 24_000
    jitter = random_jitter(Draws.of(2, 0, torch.arange(count)), brightness=0.4, contrast=1.2, saturation=0.8, hue=0.1)
    theirs = ColorJitter(0.4, 1.2, 0.8, 0.1)
    limits = torch.tensor([theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue])
    low, high = limits.unbind(dim=1)
    assert (jitter.factor >= low).all() and (jitter.factor <= high + 1e-6).all()
    torch.testing.assert_close(jitter.factor.mean(dim=0), (low + high) / 2, atol=0.02, rtol=0)
    torch.testing.assert_close(jitter.factor.std(dim=0), (high - low) / 12**0.5, atol=0.02, rtol=0)
    frequency = torch.bincount((jitter.order * torch.tensor([64, 16, 4, 1])).sum(dim=1)).double()
    frequency = frequency[frequency > 0]
    assert len(frequency) == 24 and (frequency - 1000).abs().max() < 5 * 1000**0.5
    assert jitter.jittered.double().mean().item() == pytest.approx(0.8, abs=0.013)  # 5 s.e.
    assert jitter.grey.double().mean().item() == pytest.approx(0.2, abs=0.013)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_without_clamps_and_hue_the_linear_form_equals_the_exact_one(seed):
    count = 10
    images = 0.4 + 0.2 * torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    jitter = random_jitter(
        Draws.of(seed, 0, torch.arange(count)), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0
    )
    exact = jitter_exact_(images.clone(), jitter)
    torch.testing.assert_close(jitter_linear_(images, jitter), exact, atol=3e-4, rtol=0)  # torchvision's luma: 0.2989


def test_the_linear_hue_keeps_luma_and_returns_after_a_whole_turn():
    images = 0.3 + 0.1 * torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    order = torch.arange(4).expand(3, 4)
    factor = torch.tensor([[1.0, 1, 1, 0.5], [1, 1, 1, -0.5], [1, 1, 1, 0]])
    jitter = Jitter(order, factor, torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    turned = jitter_linear_(images.clone(), jitter)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((turned * luma).sum(dim=1), (images * luma).sum(dim=1), atol=1e-4, rtol=0)
    assert (turned[0] - images[0]).abs().max() > 0.01
    torch.testing.assert_close(turned[2], images[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(jitter_linear_(turned, jitter)[:2], images[:2], atol=1e-4, rtol=0)  # half turns twice


def test_the_linear_form_equals_its_four_steps_in_any_order():
    count = 48
    images = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    jitter = random_jitter(Draws.of(1, 0, torch.arange(count)), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    jitter = Jitter(ORDERS.repeat(2, 1), jitter.factor, jitter.jittered, jitter.grey)
    luma = torch.tensor([0.299, 0.587, 0.114])
    yiq = torch.stack([luma, torch.tensor([0.5959, -0.2746, -0.3213]), torch.tensor([0.2115, -0.5227, 0.3112])])
    expected = images.flatten(2).clone()
    for i, (order, factor) in enumerate(zip(jitter.order.tolist(), jitter.factor.tolist(), strict=True)):
        x = expected[i]
        for step in order if jitter.jittered[i] else ():
            f = factor[step]
            cos, sin = math.cos(2 * math.pi * f), math.sin(2 * math.pi * f)
            x = {
                BRIGHTNESS: lambda x, f=f: f * x,
                CONTRAST: lambda x, f=f: f * x + (1 - f) * (luma @ x).mean(),
                SATURATION: lambda x, f=f: f * x + (1 - f) * (luma @ x),
                HUE: lambda x, cos=cos, sin=sin: (
                    yiq.inverse() @ torch.tensor([[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ yiq @ x
                ),
            }[step](x)
        expected[i] = (luma @ x if jitter.grey[i] else x).clamp(0, 1)
    torch.testing.assert_close(jitter_linear_(images, jitter).flatten(2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("distort", [jitter_exact_, jitter_linear_])
def test_grey_pictures_stay_grey_and_untouched_rows_stay_as_they_are(distort):
    images = pictures(40)
    images[:20] = images[:20, :1]
    jitter = random_jitter(Draws.of(0, 0, torch.arange(40)), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    untouched = ~jitter.jittered & ~jitter.grey
    before = images[untouched]
    result = distort(images, jitter)
    assert result is images and result.min() >= 0 and result.max() <= 1
    torch.testing.assert_close(result[:20], result[:20, :1].expand(20, 3, 9, 7), atol=1e-4, rtol=0)
    assert untouched.any()
    torch.testing.assert_close(result[untouched], before, atol=1e-6, rtol=0)
