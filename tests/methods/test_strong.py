"""FixMatch's strong augmentation, level by level, beside torchvision's functions and the spec's arguments."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.crop import pad_crop
from methods.views.draws import Draws
from methods.views.randaugment import GEOMETRIC_OPS, move
from methods.views.strong import (
    OPS,
    VALUE_OPS,
    StrongAugment,
    blend,
    change_values,
    enhance,
    posterize,
    random_operations_,
    solarize,
    sources,
)

GREY = [128.0] * 3
LEVELS = range(1, 10)
DEFAULTS = {"count": 2, "ops": OPS, "chance": 0.5, "levels": (1, 9), "fill": 128}


def pictures(height=32, width=32, seed=0):
    """Noise, smooth noise, greys (where a blend meets itself), a narrow range of values, one value, black, white."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, 3, height, width), generator=rng, dtype=torch.uint8)
    smooth = F.resize(noise[:, :, :4, :4], [height, width], antialias=True)
    grey = noise[:1, :1].expand(-1, 3, -1, -1)
    flat = [torch.full((1, 3, height, width), value, dtype=torch.uint8) for value in (0, 128, 255)]
    return torch.cat([noise, smooth, grey, noise[:1] // 16 + 100, *flat])


def no_draws(images):
    return Draws.of(0, 0, torch.arange(len(images)))


def reference(op, image, level, sign=1):
    """The spec's table at level l of 10, an image at a time."""
    corner = dict(fill=GREY, center=[0.0, 0.0])
    angle = math.degrees(math.atan(sign * 0.03 * level))
    factor = 0.1 + 0.18 * level
    return {
        "identity": lambda: image,
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "posterize": lambda: F.posterize(image, 4 - int(0.4 * level)),
        "solarize": lambda: F.solarize(image, 256 - int(25.6 * level)),
        "color": lambda: F.adjust_saturation(image, factor),
        "contrast": lambda: F.adjust_contrast(image, factor),
        "brightness": lambda: F.adjust_brightness(image, factor),
        "sharpness": lambda: F.adjust_sharpness(image, factor),
        "rotate": lambda: F.rotate(image, sign * int(3 * level), fill=GREY),
        "shear_x": lambda: F.affine(image, 0, [0, 0], 1.0, [angle, 0.0], **corner),
        "shear_y": lambda: F.affine(image, 0, [0, 0], 1.0, [0.0, angle], **corner),
        "translate_x": lambda: F.affine(image, 0, [sign * level, 0], 1.0, [0.0, 0.0], fill=GREY),
        "translate_y": lambda: F.affine(image, 0, [0, sign * level], 1.0, [0.0, 0.0], fill=GREY),
    }[op]()


@pytest.mark.parametrize("op", VALUE_OPS)
@pytest.mark.parametrize("size", [(32, 32), (7, 12), (2, 5), (1, 1)])
def test_value_operations_of_mixed_levels_equal_torchvision_exactly(op, size):
    images = pictures(*size).repeat_interleave(len(LEVELS), dim=0)
    level = torch.tensor(LEVELS).repeat(len(images) // len(LEVELS))
    before = images.clone()
    changed = change_values(op, images, level)
    assert changed.dtype == torch.uint8 and torch.equal(images, before)
    for image, result, value in zip(images, changed, level.tolist(), strict=True):
        assert torch.equal(result, reference(op, image, value)), value


@pytest.mark.parametrize("op", GEOMETRIC_OPS)
@pytest.mark.parametrize("size", [(32, 32), (7, 12), (1, 1)])
def test_geometric_operations_of_every_level_and_direction_equal_torchvision_exactly(op, size):
    images, table = pictures(*size), sources(*size, torch.device("cpu")).unflatten(0, (len(GEOMETRIC_OPS), 2, 11))
    for sign in (0, 1):
        for level in LEVELS:
            source = table[GEOMETRIC_OPS.index(op), sign, level].long()
            for image, result in zip(images, move(images, source.expand(len(images), -1)), strict=True):
                assert torch.equal(result, reference(op, image, level, (-1) ** sign)), level


def test_arguments_by_hand():
    images = pictures()

    def at(op, level):
        return change_values(op, images, torch.full((len(images),), level))

    assert torch.equal(at("posterize", 9), images & 0b10000000)  # 4 - int(3.6) = 1 bit
    assert torch.equal(at("posterize", 2), images & 0b11110000) and torch.equal(at("posterize", 5), images & 0b11000000)
    assert torch.equal(at("solarize", 9), torch.where(images >= 26, 255 - images, images))  # 256 - int(230.4)
    assert torch.equal(at("solarize", 1), torch.where(images >= 231, 255 - images, images))
    for op in ("color", "contrast", "brightness", "sharpness"):
        assert torch.equal(at(op, 5), images)  # factor 0.1 + 0.9
    table = sources(32, 32, torch.device("cpu")).unflatten(0, (len(GEOMETRIC_OPS), 2, 11))
    right = move(images, table[GEOMETRIC_OPS.index("translate_x"), 0, 7].long().expand(len(images), -1))
    assert torch.equal(right[..., 7:], images[..., :-7]) and (right[..., :7] == 128).all()


@given(seed=st.integers(0, 2**31), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_enhancing_by_any_factors_equals_torchvision_exactly(seed, height, width):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 3, height, width), generator=rng, dtype=torch.uint8)
    factor = 3 * torch.rand(6, generator=rng, dtype=torch.float64)
    for op, function in {
        "color": F.adjust_saturation, "contrast": F.adjust_contrast, "brightness": F.adjust_brightness,
        "sharpness": F.adjust_sharpness,
    }.items():  # fmt: skip
        for image, value, result in zip(images, factor.tolist(), enhance(op, images, factor), strict=True):
            assert torch.equal(result, function(image, value)), (op, value)


def test_a_blend_of_an_image_with_itself_or_of_all_of_it_is_the_image():
    images = pictures()
    share = torch.linspace(0, 1, len(images), dtype=torch.float64)
    assert (blend(images, images, share).int() - images.int()).abs().max() <= 1  # whole values are cut off
    assert torch.equal(blend(images, 255 - images, torch.ones(len(images), dtype=torch.float64)), images)
    assert torch.equal(blend(images, 255 - images, torch.zeros(len(images), dtype=torch.float64)), 255 - images)


def test_posterize_and_solarize_reach_their_ends():
    images = pictures()
    every = torch.ones(len(images), dtype=torch.int64)
    assert torch.equal(posterize(images, 8 * every), images) and not posterize(images, 0 * every).any()
    assert torch.equal(solarize(images, 0 * every), 255 - images)
    assert torch.equal(solarize(images, 255 * every), torch.where(images == 255, 0, images))


@pytest.mark.parametrize("ops", [OPS, GEOMETRIC_OPS, ("identity",), ("posterize", "shear_y")])
@pytest.mark.parametrize("count, chance", [(2, 0.5), (3, 1.0), (1, 0.0)])
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_a_batch_equals_the_operations_one_image_at_a_time(ops, count, chance, size):
    images = pictures(*size).repeat(9, 1, 1, 1)
    draws = no_draws(images)
    results = random_operations_(images.clone(), draws, count=count, ops=ops, chance=chance, levels=(1, 9), fill=128)
    applied = 0
    for i in range(len(images)):
        expected = images[i]
        for layer in range(count):
            unit = draws[i : i + 1].fork(layer).uniform(4)[0].double()
            op, level = ops[int(unit[0] * len(ops))], 1 + int(unit[2] * 9)
            if unit[3] < chance:
                expected = reference(op, expected, level, (-1) ** int(unit[1] * 2))
                applied += 1
        assert torch.equal(results[i], expected)
    assert chance not in (0.0, 1.0) or applied == chance * count * len(images)


def test_a_view_is_its_own_crop_then_operations_then_cutout():
    images = pictures()
    draws = no_draws(images)
    view = StrongAugment(cutout=0.5).build(32)(images, draws)
    uncut = StrongAugment(cutout=0.0).build(32)(images, draws)
    cropped = pad_crop(images, draws.fork(0), padding=4, flip=True)
    by_hand = random_operations_(cropped.clone(), draws.fork(1), **DEFAULTS)
    assert torch.equal((uncut * 255).round().to(torch.uint8), by_hand)
    grey = (view - 128 / 255).abs() < 1e-6
    assert torch.equal(view[~grey], uncut[~grey])  # nothing comes after the square
    for square in grey[:3].all(dim=1):  # noise
        rows, columns = square.any(dim=1).sum().item(), square.any(dim=0).sum().item()
        assert 8 <= rows <= 32 and 8 <= columns <= 32 and square.sum() >= 64
    plain = StrongAugment(count=0, cutout=0.0).build(32)(images, draws)
    assert torch.equal((plain * 255).round().to(torch.uint8), cropped)
    still = StrongAugment(count=0, cutout=0.0, padding=0, flip=False).build(32)(images, draws)
    assert torch.equal((still * 255).round().to(torch.uint8), images)


@pytest.mark.parametrize("pixels", [16, 32, 33, 96])
def test_the_square_is_half_the_image_at_any_size(pixels):
    images = torch.zeros(40, 3, pixels, pixels, dtype=torch.uint8)
    view = StrongAugment(count=0, fill=255).build(pixels)(images, no_draws(images))
    assert view.sum(dim=(2, 3)).max() == round(pixels / 2) ** 2


def test_operations_levels_and_directions_are_equally_frequent_and_half_are_left_out():
    count = 20000
    images = torch.zeros(count, 3, 1, 24, dtype=torch.uint8)
    images[..., 12] = 200  # where it lands tells operation, level and sign
    ops = ("translate_x", "identity")
    moved = random_operations_(images, no_draws(images), **(DEFAULTS | {"count": 1, "ops": ops}))
    place = (moved[:, 0, 0] == 200).double()
    assert place.sum(dim=1).eq(1).all()
    share = place.mean(dim=0)
    assert share[12].item() == pytest.approx(3 / 4, abs=5 * math.sqrt(3 / 16 / count))
    for shift in LEVELS:
        for sign in (1, -1):
            assert share[12 + sign * shift].item() == pytest.approx(1 / 72, abs=5 * math.sqrt(1 / 72 / count))
    assert share[2] == 0 and share[22] == 0


@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), height=st.integers(1, 20), width=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_a_rows_view_does_not_depend_on_its_batch(seed, count, height, width):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)
    draws = Draws.of(seed, 0, torch.arange(count))
    order = torch.randperm(count, generator=rng)
    augment = StrongAugment().build(height)
    whole = augment(images, draws)
    assert torch.equal(augment(images[order], draws[order]), whole[order])
    assert torch.equal(augment(images[:1], draws[:1]), whole[:1])


def test_the_strong_view_of_an_image_differs_from_its_weak_view_and_keeps_the_source():
    images = pictures()[:3]
    before = images.clone()
    augment = StrongAugment().build(32)
    first, second = (augment(images, Draws.of(0, 0, torch.arange(3), view)) for view in (0, 1))
    assert not torch.equal(first, second) and torch.equal(images, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": -1}, "padding = -1: must be >= 0 pixels"),
        ({"count": -1}, "count = -1: must be >= 0 operations"),
        ({"ops": ()}, "must name at least one of identity, autocontrast"),
        ({"ops": ("rotat",)}, "ops = 'rotat': must be one of .*; did you mean rotate?"),
        ({"chance": 1.5}, "chance = 1.5: must be in"),
        ({"min_level": 0}, "min_level = 0, max_level = 9: must be 1 <= min <= max <= 10"),
        ({"min_level": 7, "max_level": 3}, "min_level = 7, max_level = 3"),
        ({"max_level": 11}, "max_level = 11"),
        ({"cutout": 2.0}, "cutout = 2.0: must be in"),
        ({"fill": 256}, "fill = 256: must be in"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StrongAugment(**changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_geometry():
    images = pictures().repeat(9, 1, 1, 1)
    augment = StrongAugment(ops=(*GEOMETRIC_OPS, "posterize", "solarize"), chance=1.0).build(32)
    there = augment(images.cuda(), no_draws(images).to("cuda")).cpu()
    assert torch.equal(there, augment(images, no_draws(images)))
