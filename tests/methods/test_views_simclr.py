"""SimCLR's augmentation: its parts in their order, and a row's independence of its batch."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.colour import jitter_exact_, jitter_linear_, random_jitter
from methods.views.crop import blur_radius, crop_resize, random_boxes
from methods.views.draws import Draws
from methods.views.simclr import simclr_augment

EXTREME = [(1, 1), (1, 40), (40, 1), (5000, 10), (10, 5000), (31, 57)]


def batch(count, height=32, width=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


@given(
    seed=st.integers(0, 2**31), count=st.integers(1, 70), height=st.integers(1, 40), width=st.integers(1, 40),
    blur=st.booleans(), colour=st.sampled_from(["exact", "linear"]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_rows_view_does_not_depend_on_its_batch(seed, count, height, width, blur, colour):
    augment = simclr_augment(24, blur=blur, colour=colour)
    images, draws = batch(count, height, width, seed), Draws.of(seed, 0, torch.arange(count))
    views = augment(images, draws)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    part = order[: (count + 1) // 2]
    # the parameters are equal bit by bit; a product may round by its batch's size, and three factors of 1.4 enlarge it
    close = dict(atol=1e-6 * 1.4**3, rtol=0)
    torch.testing.assert_close(augment(images[order], draws[order]), views[order], **close)
    torch.testing.assert_close(augment(images[part], draws[part]), views[part], **close)
    assert torch.equal(augment(images, draws), views)


@pytest.mark.parametrize("colour, distort", [("exact", jitter_exact_), ("linear", jitter_linear_)])
def test_the_view_is_crop_flip_blur_then_colour_with_a_fork_of_the_draws_each(colour, distort):
    images, draws = batch(50, 48, 40), Draws.of(4, 1, torch.arange(50))
    unit = draws.fork(3).uniform(2)
    views = crop_resize(
        images, random_boxes(draws.fork(0), 48, 40, min_area=0.3), 32, mirror=draws.fork(1).chance(0.5),
        sigma=torch.where(unit[:, 0] < 0.5, 0.1 + 1.9 * unit[:, 1], 0),
    )  # fmt: skip
    jitter = random_jitter(draws.fork(2), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    expected = distort(views, jitter)
    augment = simclr_augment(32, jitter=1.0, blur=True, min_area=0.3, colour=colour)
    assert torch.equal(augment(images, draws), expected)


def test_a_whole_view_equals_torchvisions_functions_on_one_image():
    images, draws = batch(40), Draws.of(0, 0, torch.arange(40))
    views = simclr_augment(32, jitter=0.0, blur=True)(images, draws)
    boxes, mirror = random_boxes(draws.fork(0), 32, 32), draws.fork(1).chance(0.5)
    unit = draws.fork(3).uniform(2)
    grey = random_jitter(draws.fork(2), brightness=0, contrast=0, saturation=0, hue=0).grey
    kernel = [2 * blur_radius(32) + 1] * 2
    for i in range(40):
        box = [int(side[i]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        view = F.resized_crop(images[i].float() / 255, *box, [32, 32], antialias=True)
        view = F.horizontal_flip(view) if mirror[i] else view
        if unit[i, 0] < 0.5:
            view = F.gaussian_blur(view, kernel, [0.1 + 1.9 * unit[i, 1].item()] * 2)
        view = F.rgb_to_grayscale(view, num_output_channels=3) if grey[i] else view
        torch.testing.assert_close(views[i], view, atol=2e-5, rtol=0)


@pytest.mark.parametrize("height, width", EXTREME)
@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("colour", ["exact", "linear"])
def test_any_shape_gives_a_view_in_range(height, width, blur, colour):
    images = batch(3, height, width)
    views = simclr_augment(32, jitter=1.25, blur=blur, colour=colour)(images, Draws.of(0, 0, torch.arange(3)))
    assert views.shape == (3, 3, 32, 32) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_grey_image_gives_a_constant_view(value):
    images = torch.full((60, 3, 20, 30), value, dtype=torch.uint8)
    views = simclr_augment(16, blur=True)(images, Draws.of(0, 0, torch.arange(60)))
    torch.testing.assert_close(views, views[:, :1, :1, :1].expand_as(views), atol=1e-5, rtol=0)
    assert views.max() <= 1


def test_views_epochs_and_seeds_differ():
    images, index = batch(8), torch.arange(8)
    augment = simclr_augment(32)
    looks = [augment(images, Draws.of(*key)) for key in ((0, 0, index), (0, 0, index, 1), (0, 1, index), (1, 0, index))]
    for i in range(4):
        for j in range(i):
            assert ((looks[i] - looks[j]).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_without_flip_the_left_stays_left():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200, 3, 32, 32).contiguous()
    draws = Draws.of(0, 0, torch.arange(200))
    rising = [(view[:, :, :, -1] > view[:, :, :, 0]).all(dim=(1, 2)) for view in (
        simclr_augment(32, jitter=0.0, flip=False)(ramp, draws), simclr_augment(32, jitter=0.0)(ramp, draws)
    )]  # fmt: skip
    assert rising[0].all() and 60 < rising[1].sum() < 140


@pytest.mark.parametrize("images, draws, message", [
    (torch.zeros(2, 3, 4, 4), 2, r"float32 \(2, 3, 4, 4\)"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 2, r"\(2, 1, 4, 4\)"),
    (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), 0, r"\(0, 3, 4, 4\)"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 3, "3 draws for 2 images"),
])  # fmt: skip
def test_what_is_no_batch_of_images_is_refused(images, draws, message):
    with pytest.raises(ValueError, match=message):
        simclr_augment(8)(images, Draws.of(0, 0, torch.arange(draws)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("colour", ["exact", "linear"])
def test_a_gpu_gives_the_same_views(colour):
    images, draws = batch(50, 40, 48), Draws.of(0, 0, torch.arange(50))
    augment = simclr_augment(32, blur=True, colour=colour)
    there = augment(images.cuda(), draws.to("cuda")).cpu()
    torch.testing.assert_close(there, augment(images, draws), atol=1e-4, rtol=0)
