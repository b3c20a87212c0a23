"""The recipe's augmentation: its order, its checks, and the view for evaluation."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.crop import pad_crop
from methods.views.draws import Draws
from methods.views.policy import Augment, evaluate
from methods.views.randaugment import GEOMETRIC_OPS, OPS, cutout, rand_augment
from methods.views.simclr import simclr_augment


def batch(count, height=32, width=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


def draws_of(images):
    return Draws.of(0, 0, torch.arange(len(images)))


def test_the_default_is_pad_four_crop_and_flip():
    images = batch(30)
    expected = pad_crop(images, draws_of(images).fork(2), padding=4, flip=True)
    assert torch.equal(Augment().build(32)(images, draws_of(images)), expected / 255)


def test_the_order_is_randaugment_cutout_pad_crop_flip():
    images = batch(60)
    draws = draws_of(images)
    ops = ("rotate", "equalize", "posterize")
    expected = rand_augment(images, draws.fork(0), magnitude=7, count=3, ops=ops)
    expected = pad_crop(cutout(expected, draws.fork(1), side=16), draws.fork(2), padding=2, flip=False)
    augment = Augment(randaugment=7.0, randaugment_ops=3, ops=ops, cutout=0.5, padding=2, flip=False)
    assert torch.equal(augment.build(32)(images, draws), expected / 255)


def test_everything_off_is_evaluation():
    images = batch(5, 20, 30)
    nothing = Augment(padding=0, flip=False).build(16)
    assert torch.equal(nothing(images, draws_of(images)), evaluate(16)(images, draws_of(images)))


def test_evaluation_only_scales_values_where_the_size_is_right():
    images = batch(4)
    assert torch.equal(evaluate(32)(images, draws_of(images)), images / 255)


@pytest.mark.parametrize("height, width", [(1, 1), (5000, 10), (10, 5000), (64, 48)])
def test_other_sizes_are_resized_as_torchvision_does(height, width):
    images = batch(2, height, width)
    expected = F.resize(images.float(), [16, 16], antialias=True).round().clamp(0, 255) / 255
    assert torch.equal(evaluate(16)(images, draws_of(images)), expected)
    noisy = Augment(randaugment=9.0, cutout=0.5).build(16)(images, draws_of(images))
    assert noisy.shape == (2, 3, 16, 16) and noisy.dtype == torch.float32 and 0 <= noisy.min() <= noisy.max() <= 1


@pytest.mark.parametrize("transform", [
    Augment(randaugment=9.0, cutout=0.3).build(24), evaluate(24), evaluate(16), simclr_augment(16, blur=True),
])  # fmt: skip
def test_memory_layout_changes_nothing(transform):
    images = batch(40, 24, 24)
    channels_last = images.to(memory_format=torch.channels_last)  # as decoders give them
    torch.testing.assert_close(
        transform(channels_last, draws_of(images)), transform(images, draws_of(images)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_images_smaller_than_the_padding_work(pixels):
    images = batch(20, pixels, pixels)
    views = Augment(randaugment=5.0, cutout=0.5).build(pixels)(images, draws_of(images))
    assert views.shape == (20, 3, pixels, pixels) and 0 <= views.min() <= views.max() <= 1


@given(
    seed=st.integers(0, 2**31), count=st.integers(1, 30), randaugment=st.sampled_from([0.0, 5.0, 12.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]), padding=st.integers(0, 5), flip=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_rows_view_does_not_depend_on_its_batch(seed, count, randaugment, share, padding, flip):
    augment = Augment(randaugment=randaugment, cutout=share, padding=padding, flip=flip).build(16)
    images, draws = batch(count, 20, 14, seed), Draws.of(seed, 0, torch.arange(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    views = augment(images, draws)
    assert torch.equal(augment(images[order], draws[order]), views[order])
    assert torch.equal(augment(images[:1], draws[:1]), views[:1])


def test_views_differ_between_epochs_and_images_are_not_written_to():
    images = batch(30)
    before = images.clone()
    augment = Augment(randaugment=9.0, ops=GEOMETRIC_OPS).build(32)
    first, second = (augment(images, Draws.of(0, epoch, torch.arange(30))) for epoch in (0, 1))
    assert ((first - second).abs().amax(dim=(1, 2, 3)) > 0).all()
    Augment(randaugment=9.0, cutout=0.5).build(32)(images, draws_of(images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("wrong, message", [
    ({"padding": -1}, r"padding = -1: must be >= 0"),
    ({"randaugment": -2.0}, r"randaugment = -2.0: must be a magnitude >= 0"),
    ({"randaugment": float("nan")}, r"randaugment = nan: must be"),
    ({"randaugment_ops": 0}, r"randaugment_ops = 0: must be >= 1"),
    ({"cutout": 1.5}, r"cutout = 1.5: must be in \[0, 1\]"),
    ({"ops": ()}, r"ops = \(\): must name at least one of autocontrast"),
    ({"ops": ("rotate", "sheer_x")}, r"ops = 'sheer_x': must be one of .*; did you mean shear_x\?"),
    ({"ops": ("colour",)}, r"did you mean color\?"),
])  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Augment(**wrong)


def test_there_are_sixteen_operations():
    assert len(set(OPS)) == len(OPS) == 16 and Augment().ops == OPS
