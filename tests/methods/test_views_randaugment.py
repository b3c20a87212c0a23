"""RandAugment and cutout, operation by operation, beside torchvision's functions and the spec's arguments."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.draws import Draws
from methods.views.randaugment import (
    GEOMETRIC_OPS,
    OPS,
    VALUE_OPS,
    adjust_sharpness,
    change_values,
    cutout,
    move,
    rand_augment,
    source_index,
)

MAGNITUDES = [0.5, 1, 2.5, 4, 5, 7, 9, 9.9, 10, 12, 15, 27]
GREY = [128.0] * 3


def pictures(height=32, width=32):
    """Noise, smooth noise, a narrow range of values, one value, black, white."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 3, height, width), generator=rng, dtype=torch.uint8)
    smooth = F.resize(noise[:, :, :4, :4], [height, width], antialias=True)
    narrow = noise[:1] // 16 + 100
    flat = [torch.full((1, 3, height, width), value, dtype=torch.uint8) for value in (0, 128, 255)]
    return torch.cat([noise, smooth, narrow, *flat])


def no_draws(images):
    return Draws.of(0, 0, torch.arange(len(images)))


def solarize_add(image, addition):
    values = image.numpy().astype(int)
    return torch.from_numpy(np.where(values < 128, np.clip(values + addition, 0, 255), values).astype(np.uint8))


def reference(op, image, m):
    """The table of Noisy Student's RandAugment at m = M / 10 (negative: the other sign), an image at a time."""
    height, width = image.shape[1:]
    corner = dict(fill=GREY, center=[0.0, 0.0])
    return {
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "invert": lambda: F.invert(image),
        "posterize": lambda: F.posterize(image, min(int(4 * m), 8)),
        "solarize": lambda: F.solarize(image, int(256 * m)) if int(256 * m) < 256 else image,
        "solarize_add": lambda: solarize_add(image, int(110 * m)),
        "color": lambda: F.adjust_saturation(image, 0.1 + 1.8 * m),
        "contrast": lambda: F.adjust_contrast(image, 0.1 + 1.8 * m),
        "brightness": lambda: F.adjust_brightness(image, 0.1 + 1.8 * m),
        "sharpness": lambda: F.adjust_sharpness(image, 0.1 + 1.8 * m),
        "rotate": lambda: F.rotate(image, 30 * m, fill=GREY),
        "shear_x": lambda: F.affine(image, 0, [0, 0], 1.0, [math.degrees(math.atan(0.3 * m)), 0.0], **corner),
        "shear_y": lambda: F.affine(image, 0, [0, 0], 1.0, [0.0, math.degrees(math.atan(0.3 * m))], **corner),
        "translate_x": lambda: F.affine(image, 0, [m / 8 * width, 0], 1.0, [0.0, 0.0], fill=GREY),
        "translate_y": lambda: F.affine(image, 0, [0, m / 8 * height], 1.0, [0.0, 0.0], fill=GREY),
    }[op]()


def cut(image, row, column, side):
    result = image.clone()
    top, left = row - side // 2, column - side // 2
    result[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 128
    return result


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("op", VALUE_OPS)
@pytest.mark.parametrize("size", [(32, 32), (7, 12), (2, 5), (1, 1)])
def test_value_operations_equal_torchvision_exactly(op, magnitude, size):
    images = pictures(*size)
    changed = change_values(op, images, magnitude / 10, no_draws(images))
    assert changed.dtype == torch.uint8
    for image, result in zip(images, changed, strict=True):
        assert torch.equal(result, reference(op, image, magnitude / 10))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("op", GEOMETRIC_OPS)
@pytest.mark.parametrize("size", [(32, 32), (7, 12), (1, 1)])
def test_geometric_operations_equal_torchvision_exactly_in_both_directions(op, magnitude, size):
    images = pictures(*size)
    for m in (magnitude / 10, -magnitude / 10):
        moved = move(images, source_index(op, m, *size).expand(len(images), -1))
        for image, result in zip(images, moved, strict=True):
            assert torch.equal(result, reference(op, image, m))


def test_magnitude_ten_is_the_papers_table_and_five_its_identity():
    images = pictures()
    draws = no_draws(images)
    full = {op: change_values(op, images, 1.0, draws) for op in VALUE_OPS}
    assert torch.equal(full["brightness"], F.adjust_brightness(images, 1.9))
    assert torch.equal(full["posterize"], images & 0b11110000)
    assert torch.equal(full["solarize"], images)  # larger is weaker: the threshold is above every value
    assert torch.equal(
        full["solarize_add"], torch.where(images < 128, images.int() + 110, images.int()).to(torch.uint8)
    )
    assert torch.equal(change_values("solarize", images, 0.0, draws), 255 - images)
    for op in ("color", "contrast", "brightness", "sharpness"):
        assert torch.equal(change_values(op, images, 0.5, draws), images)
    shifted = move(
        images, source_index("translate_x", 1.0, 32, 32).expand(len(images), -1)
    )  # 4 of 32 pixels to the right
    assert torch.equal(shifted[..., 4:], images[..., :-4]) and (shifted[..., :4] == 128).all()
    shifted = move(images, source_index("translate_y", -1.0, 32, 32).expand(len(images), -1))
    assert torch.equal(shifted[:, :, :-4], images[:, :, 4:]) and (shifted[:, :, -4:] == 128).all()


@given(seed=st.integers(0, 2**31), factor=st.floats(0, 6), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(deadline=None)
def test_sharpness_equals_torchvision_for_any_factor(seed, factor, height, width):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, height, width), generator=rng, dtype=torch.uint8)
    before = images.clone()
    assert torch.equal(adjust_sharpness(images, factor), F.adjust_sharpness(images, factor))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "height, width, side", [(32, 32, 16), (32, 32, 15), (9, 20, 6), (8, 8, 1), (8, 8, 40), (8, 8, 0)]
)
def test_cutout_is_a_grey_square_around_a_random_pixel(height, width, side):
    images = pictures(height, width)[:1].expand(200, 3, height, width)
    draws = no_draws(images)
    centre = (draws.uniform(2) * torch.tensor([height, width])).long()
    covered = cutout(images, draws, side=side)
    for i in range(200):
        assert torch.equal(covered[i], cut(images[i], *centre[i].tolist(), side))
    assert centre.min() == 0 and (centre.max(dim=0).values == torch.tensor([height - 1, width - 1])).all()


@pytest.mark.parametrize("ops", [OPS, GEOMETRIC_OPS, VALUE_OPS, ("cutout", "rotate"), ("invert",), ("shear_x",)])
@pytest.mark.parametrize("magnitude, count", [(9, 2), (27, 1), (3, 4)])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_a_batch_equals_the_operations_one_image_at_a_time(ops, magnitude, count, size):
    images = pictures(*size).repeat(9, 1, 1, 1)
    draws = no_draws(images)
    results = rand_augment(images, draws, magnitude=magnitude, count=count, ops=ops)
    assert results.dtype == torch.uint8 and results.shape == images.shape
    for i in range(len(images)):
        expected = images[i]
        for layer in range(count):
            own = draws[i : i + 1].fork(layer)
            choice = own.integers(1, 2 * len(ops)).item()
            op, sign = ops[choice // 2], (-1) ** (choice % 2)
            if op == "cutout":
                row, column = (own.fork(0).uniform(2)[0] * torch.tensor(size)).long().tolist()
                expected = cut(expected, row, column, 2 * int(magnitude / 80 * min(size)))
            else:
                expected = reference(op, expected, magnitude / 10 * (sign if op in GEOMETRIC_OPS else 1))
        assert torch.equal(results[i], expected)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), height=st.integers(1, 20), width=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_a_rows_view_does_not_depend_on_its_batch(seed, count, height, width):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)
    draws = Draws.of(seed, 0, torch.arange(count))
    order = torch.randperm(count, generator=rng)
    whole = rand_augment(images, draws, magnitude=9)
    assert torch.equal(rand_augment(images[order], draws[order], magnitude=9), whole[order])
    assert torch.equal(rand_augment(images[:1], draws[:1], magnitude=9), whole[:1])


def test_operations_and_signs_are_equally_frequent():
    count = 6000
    marked = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    marked[:, :, 4, 4] = 200  # where it lands tells the operation and the sign
    ops = ("translate_x", "translate_y", "invert")
    results = rand_augment(marked, no_draws(marked), magnitude=10, count=1, ops=ops)
    place = [(results[:, 0, 4 + y, 4 + x] == 200).double().mean().item() for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    for share in place:
        assert share == pytest.approx(1 / 6, abs=5 * math.sqrt(5 / 36 / count))
    inverted = (results[:, 0, 4, 4] == 55).double().mean().item()
    assert inverted == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_geometry():
    images = pictures().repeat(9, 1, 1, 1)
    ops = (*GEOMETRIC_OPS, "invert", "cutout", "solarize")  # whole numbers only: blends may round differently
    there = rand_augment(images.cuda(), no_draws(images).to("cuda"), magnitude=9, ops=ops).cpu()
    assert torch.equal(there, rand_augment(images, no_draws(images), magnitude=9, ops=ops))
