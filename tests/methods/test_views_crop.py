"""Crops beside torchvision's, with the same parameters."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from methods.views.batch import resize
from methods.views.crop import Boxes, Triangles, blur_radius, blur_weights, crop_resize, pad_crop, random_boxes
from methods.views.draws import Draws

SHAPES = [
    (32, 32, 32),
    (96, 80, 32),
    (17, 45, 24),
    (32, 32, 96),
    (100, 90, 96),
    (224, 224, 224),
    (1, 1, 8),
    (1, 9, 4),
    (7, 5, 1),
    (5000, 10, 16),
    (10, 5000, 16),
]


def batch(count, height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("height, width, pixels", SHAPES)
@pytest.mark.parametrize("min_area", [0.08, 1.0])
def test_crop_flip_and_blur_equal_torchvision_on_the_same_boxes(height, width, pixels, min_area):
    count = 12
    images, draws = batch(count, height, width), Draws.of(0, 0, torch.arange(count))
    boxes = random_boxes(draws, height, width, min_area=min_area)
    mirror = draws.fork(1).chance(0.5)
    sigma = torch.where(draws.fork(2).chance(0.5), draws.uniform(1, 0.1, 2.0)[:, 0], 0.0)
    views = crop_resize(images, boxes, pixels, mirror=mirror, sigma=sigma)
    assert views.shape == (count, 3, pixels, pixels) and views.dtype == torch.float32
    kernel = 2 * blur_radius(pixels) + 1
    for i in range(count):
        box = [int(side[i]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        expected = F.resized_crop(images[i].float() / 255, *box, [pixels, pixels], antialias=True)
        if mirror[i]:
            expected = F.horizontal_flip(expected)
        if sigma[i] > 0:
            expected = F.gaussian_blur(expected, [kernel, kernel], [float(sigma[i])] * 2)
        torch.testing.assert_close(views[i], expected, atol=2e-5, rtol=0)


@given(height=st.integers(1, 300), width=st.integers(1, 300), min_area=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_boxes_lie_in_the_image_and_have_whole_sides(height, width, min_area, seed):
    boxes = random_boxes(Draws.of(seed, 0, torch.arange(50)), height, width, min_area=min_area)
    for start, length, size in ((boxes.top, boxes.height, height), (boxes.left, boxes.width, width)):
        assert torch.equal(start, start.floor()) and torch.equal(length, length.floor())
        assert start.min() >= 0 and length.min() >= 1 and (start + length).max() <= size


def test_boxes_have_torchvisions_distribution():
    torch.manual_seed(0)
    count, image = 4000, torch.empty(3, 90, 120)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).double()
    boxes = random_boxes(Draws.of(0, 0, torch.arange(count)), 90, 120)
    ours = torch.stack([boxes.top, boxes.left, boxes.height, boxes.width], dim=1).double()
    for moment in (lambda b: b, lambda b: b**2, lambda b: b * b.roll(1, dims=1), lambda b: b * b.roll(2, dims=1)):
        difference = moment(ours).mean(dim=0) - moment(theirs).mean(dim=0)
        error = (moment(ours).var(dim=0) / count + moment(theirs).var(dim=0) / count).sqrt()
        assert ((difference / error).abs() < 4.5).all()


def test_ratios_are_log_uniform_and_every_place_is_equally_likely():
    count = 20_000
    draws = Draws.of(0, 0, torch.arange(count))
    large = random_boxes(draws, 1000, 1000)
    log_ratio = (large.width / large.height).log().double()  # wide and high boxes fit a square equally often
    assert log_ratio.mean().abs() < 5 * log_ratio.std() / math.sqrt(count)
    small = random_boxes(draws, 5, 5)
    for start, length in ((small.top, small.height), (small.left, small.width)):
        places = torch.bincount(start[length == 3].long(), minlength=3).double()
        share = places / places.sum()
        assert len(share) == 3 and (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / places.sum())


@pytest.mark.parametrize("height, width", [(5000, 10), (10, 5000), (1, 9), (9, 1)])
def test_strips_take_torchvisions_central_box(height, width):
    top, left, box_height, box_width = RandomResizedCrop.get_params(
        torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3]
    )
    boxes = random_boxes(Draws.of(0, 0, torch.arange(20)), height, width, min_area=0.9)
    for side, expected in zip(
        (boxes.top, boxes.left, boxes.height, boxes.width), (top, left, box_height, box_width), strict=True
    ):
        assert side.tolist() == [expected] * 20


@given(source=st.integers(1, 60), pixels=st.integers(1, 60), data=st.data())
@settings(deadline=None)
def test_resize_weights_sum_to_one_and_stay_in_the_stretch(source, pixels, data):
    length = data.draw(st.integers(1, source))
    start = data.draw(st.integers(0, source - length))
    triangles = Triangles.of(torch.tensor([float(start)]), torch.tensor([float(length)]), source, pixels)
    weights = triangles.weights(torch.tensor([0]), torch.tensor([0]), source)[0]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(pixels))
    assert weights.min() >= 0 and not weights[:, :start].any() and not weights[:, start + length :].any()


def test_blur_has_simclrs_kernel_and_keeps_the_sum():
    assert [blur_radius(pixels) for pixels in (8, 19, 20, 32, 96, 224)] == [0, 0, 1, 1, 4, 11]
    sigma = torch.tensor([0.1, 0.5, 2.0])
    weights = blur_weights(sigma, 96)
    torch.testing.assert_close(weights[:, 0] + 2 * weights[:, 1:].sum(dim=1), torch.ones(3))
    assert weights[weights > 0].min() > 1e-12  # no denormal numbers, which slow a sum down
    ratio = math.exp(-0.5 / 0.5**2)  # of neighbouring taps at σ = 0.5
    assert (weights[1, 1] / weights[1, 0]).item() == pytest.approx(ratio, rel=1e-5)
    assert torch.equal(blur_weights(sigma, 8), torch.ones(3, 1))  # too small for the kernel: nothing


@pytest.mark.parametrize(
    "height, width, padding", [(32, 32, 4), (5, 9, 4), (4, 3, 4), (1, 1, 4), (2, 7, 11), (8, 8, 0)]
)
def test_pad_crop_equals_numpys_reflection_and_a_slice(height, width, padding):
    count = 40
    images, draws = batch(count, height, width), Draws.of(7, 0, torch.arange(count))
    flip = draws.fork(0).chance(0.5)
    offset = draws.fork(1).integers(2, 2 * padding + 1) - padding
    views = pad_crop(images, draws, padding=padding, flip=True)
    assert views.dtype == torch.uint8
    for i in range(count):
        padded = np.pad(images[i].numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        top, left = (padding + offset[i]).tolist()
        expected = padded[:, top : top + height, left : left + width]
        assert np.array_equal(views[i].numpy(), expected[:, :, ::-1] if flip[i] else expected)
    assert flip.any() and not flip.all()


def test_pad_crop_equals_torchvisions_pad_crop_and_flip():
    images, draws = batch(30, 12, 10), Draws.of(1, 0, torch.arange(30))
    offset = draws.fork(1).integers(2, 9)  # from the padded corner
    assert offset.min() == 0 and offset.max() == 8
    still = pad_crop(images, draws, padding=4, flip=False)
    flipped = pad_crop(images, draws, padding=4, flip=True)
    for i in range(30):
        expected = F.crop(F.pad(images[i], [4], padding_mode="reflect"), *offset[i].tolist(), 12, 10)
        assert torch.equal(still[i], expected)
        assert torch.equal(flipped[i], F.horizontal_flip(expected) if draws.fork(0).chance(0.5)[i] else expected)


@pytest.mark.parametrize(
    "height, width, pixels", [(64, 64, 32), (20, 33, 32), (1, 1, 8), (5000, 10, 16), (10, 5000, 16)]
)
def test_resize_is_torchvisions_rounded(height, width, pixels):
    images = batch(3, height, width)
    expected = F.resize(images.float(), [pixels, pixels], antialias=True).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(resize(images, pixels), expected)


def test_resize_of_the_right_size_copies_nothing():
    images = batch(2, 16, 16)
    assert resize(images, 16) is images


def test_a_box_of_the_whole_image_at_its_own_size_is_the_image():
    images = batch(2, 9, 9)
    whole, zero = torch.full((2,), 9.0), torch.zeros(2)
    torch.testing.assert_close(crop_resize(images, Boxes(zero, zero, whole, whole), 9), images / 255)


def test_a_box_next_to_taller_and_wider_ones_reads_nothing_outside_itself():
    """In a chunk all boxes are cut as large as the largest; what is too much has to count for nothing."""
    images = torch.full((4, 3, 40, 40), 255, dtype=torch.uint8)
    corners = [(0, 0, 7, 9), (33, 31, 7, 9), (12, 5, 9, 7), (0, 0, 40, 40)]
    for image, (top, left, height, width) in zip(images, corners, strict=True):
        image[:, top : top + height, left : left + width] = 100
    boxes = Boxes(*torch.tensor(corners, dtype=torch.float32).T)
    for sigma in (None, torch.tensor([0.0, 1.0, 0.0, 1.0])):
        views = crop_resize(images, boxes, 24, sigma=sigma)
        torch.testing.assert_close(views, torch.full_like(views, 100 / 255), atol=1e-6, rtol=0)
