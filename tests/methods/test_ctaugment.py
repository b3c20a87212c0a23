"""CTAugment: its weights by hand, its draws by their frequencies, its operations beside PIL's and plain loops."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from methods.views.crop import pad_crop
from methods.views.ctaugment import (
    BINS,
    FILTERS,
    OPS,
    TOTAL,
    CTAugment,
    CTAugmentConfig,
    apply,
    apply_policy_,
    recognised,
    rescale,
    used_bins,
)
from methods.views.draws import Draws
from tests.methods.test_strong import pictures

LEVELS = [0.0, 0.03, 0.2, 0.37, 0.5, 0.61, 0.8, 0.95, 0.999]
POSTERIZE = 2 * OPS.index("posterize")  # its row of `rates`


def start(op, parameter=0):
    """Where the weights of an operation's parameter begin, by counting."""
    before = [bins for name in OPS[: OPS.index(op)] for bins in BINS[name]]
    return sum(before) + sum(BINS[op][:parameter])


def policy(**changes):
    return CTAugment(CTAugmentConfig(**changes))


def draws_of(count, seed=0):
    return Draws.of(seed, 0, torch.arange(count))


def at(op, level, second=0.0, images=None):
    """One operation at one level on some pictures."""
    images = pictures() if images is None else images
    levels = torch.tensor([[level, second]], dtype=torch.float64).expand(len(images), 2)
    return apply(op, images, levels, draws_of(len(images)))


# weights


def test_there_are_nineteen_operations_and_303_weights_all_one():
    assert len(OPS) == 19 and TOTAL == 16 * 17 + 8 + 17 + 6
    weights = policy().state_dict()["weights"]
    assert weights.shape == (303,) and (weights == 1).all()
    assert BINS["identity"] == () and BINS["posterize"] == (8,) and BINS["rescale"] == (17, 6)


def test_the_rates_by_hand():
    cta = policy()
    cta.weights[start("posterize") : start("posterize") + 8] = torch.tensor([1, 0.9, 0.7, 0.85, 0, 0, 0, 0])
    expected = [0.363309, 0.327338, 0, 0.309353, 0, 0, 0, 0]
    assert cta.rates()[POSTERIZE, :8].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_threshold_is_relative_to_the_largest_weight():
    """All weights times the same leave the rates almost as they are; unnormalised ones would all be below."""
    cta = policy()
    cta.weights *= 0.5
    assert (cta.rates()[POSTERIZE, :8] == 1 / 8).all()


def test_fresh_bins_are_equally_likely_and_what_is_no_bin_is_never_drawn():
    rates = policy().rates()
    for number, bins in enumerate(BINS.values()):
        for parameter in range(2):
            row = rates[2 * number + parameter].tolist()
            size = bins[parameter] if parameter < len(bins) else 0
            assert row[:size] == pytest.approx([1 / max(1, size)] * size) and not any(row[size:])


def test_three_updates_of_one_bin_by_hand():
    cta = policy()
    record = torch.full((3, 4), TOTAL)
    record[:, 2] = 40
    cta.update(record, torch.tensor([0.4, 0.4, 1.0]))
    assert cta.weights[40].item() == pytest.approx(0.988179, abs=1e-6)
    assert (cta.weights[torch.arange(TOTAL) != 40] == 1).all()
    one = policy()
    for expected, match in ((0.994, 0.4), (0.98806, 0.4), (0.988179, 1.0)):
        one.update(record[:1], torch.tensor([match]))
        assert one.weights[40].item() == pytest.approx(expected, abs=1e-6)


def test_a_bin_that_is_seldom_recognised_is_no_longer_drawn_after_34_updates():
    cta = policy()
    record = torch.full((1, 4), TOTAL)
    record[0, 0] = start("posterize") + 5
    for number in range(1, 40):
        cta.update(record, torch.tensor([0.3]))
        assert (cta.rates()[POSTERIZE, 5] == 0) == (number >= 34)


@given(seed=st.integers(0, 2**31), images=st.integers(0, 60), depth=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_an_update_is_that_of_one_image_after_the_other(seed, images, depth):
    rng = np.random.default_rng(seed)
    record = rng.choice([*range(6), TOTAL], (images, 2 * depth))  # few bins, so that most are met again
    match = rng.random(images).astype(np.float32)
    expected = np.ones(TOTAL, np.float32)
    for row, value in zip(record, match, strict=True):
        for place in row:
            if place < TOTAL:
                expected[place] = np.float32(0.99) * expected[place] + np.float32(np.float32(1 - 0.99) * value)
    cta = policy()
    cta.update(torch.from_numpy(record), torch.from_numpy(match))
    np.testing.assert_allclose(cta.weights.numpy(), expected, rtol=3e-7)


def test_an_update_of_no_parameter_changes_nothing():
    cta = policy()
    cta.update(torch.full((5, 4), TOTAL), torch.zeros(5))
    assert (cta.weights == 1).all()


def test_what_is_recognised_by_hand():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert recognised(probability, torch.tensor([0, 2, 1, 1])).tolist() == pytest.approx([0.7, 0.1, 1.0, 1 / 3])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.integers(0, 7))
def test_what_is_recognised_is_the_labels_probability_and_not_whether_it_is_the_largest(weights, label):
    probability = torch.tensor([weights], dtype=torch.float64)
    probability /= probability.sum()
    label %= len(weights)
    found = recognised(probability, torch.tensor([label]))
    torch.testing.assert_close(found, probability[:, label])


@pytest.mark.parametrize(("level", "index"), [(0.37, 6), (1.0, 16), (0.0, 0), (0.999999, 16), (1 / 17, 0), (0.06, 1)])
def test_the_bin_of_a_level_by_hand(level, index):
    op = torch.tensor([[OPS.index("rotate"), OPS.index("autocontrast")]])
    found = used_bins(op, torch.tensor([[[level, 0.5], [level, 0.5]]]))
    assert found.tolist() == [[start("rotate") + index, TOTAL, start("autocontrast") + index, TOTAL]]


def test_both_parameters_of_rescale_are_used_and_none_of_identity():
    op = torch.tensor([[OPS.index("rescale"), OPS.index("identity")]])
    found = used_bins(op, torch.tensor([[[0.37, 0.99], [0.1, 0.2]]], dtype=torch.float64))
    assert found.tolist() == [[start("rescale") + 6, start("rescale", 1) + 5, TOTAL, TOTAL]]


# draws


def levels_of(cta, op, count=20000):
    code = torch.full((count, 1), OPS.index(op))
    unit = draws_of(count).uniform(4).double().view(count, 1, 2, 2)
    return cta.levels(code, unit)[:, 0]


def test_levels_follow_the_rates_and_are_uniform_within_a_bin():
    cta = policy()
    cta.weights[start("posterize") : start("posterize") + 8] = torch.tensor([1, 0.9, 0.7, 0.85, 0, 0, 0, 0])
    level = levels_of(cta, "posterize")[:, 0]
    count = len(level)
    share = torch.bincount((level * 8).long(), minlength=8) / count
    for found, expected in zip(share.tolist(), [0.363309, 0.327338, 0, 0.309353, 0, 0, 0, 0], strict=True):
        assert found == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / count) + 1e-12)
    inside = (level * 8).frac()
    assert inside.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * count))
    assert inside.min() < 0.01 and inside.max() > 0.99


def test_fresh_levels_are_uniform_for_both_parameters():
    level = levels_of(policy(), "rescale")
    for column in level.T:
        assert column.min() >= 0 and column.max() < 1
        share = torch.histc(column.float(), 10, 0, 1) / len(column)
        assert (share - 0.1).abs().max() < 5 * math.sqrt(0.09 / len(column))


def test_the_largest_draw_gives_a_level_below_one():
    unit = torch.full((1, 1, 2, 2), 1 - 2.0**-24, dtype=torch.float64)
    for number in range(len(OPS)):
        assert policy().levels(torch.tensor([[number]]), unit).max() < 1


def test_probes_draw_all_operations_and_uniform_levels_whatever_the_weights():
    count = 19 * 600
    images = torch.zeros(count, 3, 1, 1)
    fresh, spent = policy(), policy()
    spent.weights[::2] = 0.0
    record = fresh.probe(images, draws_of(count))[1]
    assert torch.equal(record, spent.probe(images, draws_of(count))[1])
    hits = torch.bincount(record.flatten(), minlength=TOTAL + 1)[:TOTAL].double()
    for op, bins in BINS.items():
        for parameter, size in enumerate(bins):
            first = start(op, parameter)
            expected = count * 2 / 19 / size
            own = hits[first : first + size]
            assert own.sum().item() == pytest.approx(count * 2 / 19, abs=5 * math.sqrt(count * 2 / 19))
            assert (own - expected).abs().max() < 5.5 * math.sqrt(expected), op
    none = (record == TOTAL).view(count, 2, 2).all(dim=2).double().mean().item()
    assert none == pytest.approx(1 / 19, abs=5 * math.sqrt(1 / 19 / count / 2))  # identity


def test_a_probe_is_the_recorded_operations_and_has_no_cutout_at_its_end():
    images = pictures()[:9].float() / 255
    cta, draws = policy(), draws_of(9)
    probes, record = cta.probe(images, draws)
    drawn = draws.fork(1)
    op, level = drawn.integers(2, len(OPS)), drawn.fork(0).uniform(4).view(9, 2, 2)
    assert torch.equal(record, used_bins(op, level))
    expected = (images * 255).round().to(torch.uint8)
    apply_policy_(expected, op, level.double(), draws.fork(2), fill=128)
    assert torch.equal(probes, expected.float() / 255) and probes.dtype == torch.float32
    assert torch.equal(images, pictures()[:9].float() / 255)


def test_a_strong_view_is_its_own_crop_then_operations_then_a_cutout_of_level_one():
    images = pictures()
    cta, draws = policy(), draws_of(len(images))
    uncut = policy(cutout=0.0).strong(32)(images, draws)
    view = cta.strong(32)(images, draws)
    grey = (view - 128 / 255).abs() < 1e-6
    assert torch.equal(view[~grey], uncut[~grey])
    for square in grey[:3].all(dim=1):  # noise
        assert square.sum() >= 64 and square.any(dim=1).sum() >= 8
    drawn = draws.fork(1)
    op = drawn.integers(2, len(OPS))
    level = cta.levels(op, drawn.fork(0).uniform(8).view(-1, 2, 2, 2).double())
    expected = pad_crop(images, draws.fork(0), padding=4, flip=True)
    apply_policy_(expected, op, level, draws.fork(2), fill=128)
    assert torch.equal((uncut * 255).round().to(torch.uint8), expected)


def test_a_strong_view_is_drawn_by_the_weights_of_the_moment():
    cta = policy()
    augment, images, draws = cta.strong(32), pictures(), draws_of(len(pictures()))
    before = augment(images, draws)
    assert torch.equal(augment(images, draws), before)
    for op in OPS:  # nothing but the last bin
        for parameter, size in enumerate(BINS[op]):
            cta.weights[start(op, parameter) : start(op, parameter) + size - 1] = 0.0
    after = augment(images, draws)
    assert not torch.equal(after, before)
    level = cta.levels(torch.tensor([[OPS.index("color")]]), torch.rand(1, 1, 2, 2, dtype=torch.float64))
    assert 16 / 17 <= level[0, 0, 0] < 1


def test_saved_weights_draw_bit_equal_views():
    cta, other = policy(), policy()
    images, draws = pictures(), draws_of(len(pictures()))
    _, record = cta.probe(images.float() / 255, draws)
    cta.update(record, torch.linspace(0, 1, len(images)))
    other.load_state_dict(cta.state_dict())
    assert torch.equal(other.strong(32)(images, draws), cta.strong(32)(images, draws))
    for each in (cta, other):
        each.update(each.probe(images.float() / 255, draws)[1], torch.linspace(1, 0, len(images)))
    assert torch.equal(other.weights, cta.weights)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 30), height=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_a_rows_view_and_probe_do_not_depend_on_its_batch(seed, count, height):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, height), generator=rng, dtype=torch.uint8)
    draws, order, cta = draws_of(count, seed), torch.randperm(count, generator=rng), policy()
    augment = cta.strong(height)
    whole, probes = augment(images, draws), cta.probe(images / 255, draws)
    torch.testing.assert_close(augment(images[order], draws[order]), whole[order], atol=1.01 / 255, rtol=0)
    torch.testing.assert_close(augment(images[:1], draws[:1]), whole[:1], atol=1.01 / 255, rtol=0)
    shuffled = cta.probe(images[order] / 255, draws[order])
    torch.testing.assert_close(shuffled[0], probes[0][order], atol=1.01 / 255, rtol=0)
    assert torch.equal(shuffled[1], probes[1][order])


# operations


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


MIXED = {
    "autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert,
    "blur": lambda image: image.filter(ImageFilter.BLUR), "smooth": lambda image: image.filter(ImageFilter.SMOOTH),
}  # fmt: skip
ENHANCED = {
    "brightness": ImageEnhance.Brightness, "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", MIXED)
def test_mixed_operations_are_pils_to_one_grey_level(op, level):
    images = pictures()
    for image, result in zip(images, at(op, level), strict=True):
        expected = tensor(Image.blend(pil(image), MIXED[op](pil(image)), level))
        assert (result.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", ENHANCED)
def test_enhancers_have_the_factor_from_a_tenth_to_two(op, level):
    factor = 0.1 + 1.9 * level
    images = pictures()
    function = {"brightness": F.adjust_brightness, "color": F.adjust_saturation, "contrast": F.adjust_contrast,
                "sharpness": F.adjust_sharpness}[op]  # fmt: skip
    for image, result in zip(images, at(op, level), strict=True):
        assert torch.equal(result, function(image, factor))
        expected = tensor(ENHANCED[op](pil(image)).enhance(factor))  # which rounds greys and means elsewhere
        assert (result.int() - expected.int()).abs().max() <= 3


@pytest.mark.parametrize("level", LEVELS)
def test_posterize_and_solarize_are_pils(level):
    images = pictures()
    bits = 1 + int(7.999 * level)
    for image, few, sun in zip(images, at("posterize", level), at("solarize", level), strict=True):
        assert torch.equal(few, tensor(ImageOps.posterize(pil(image), bits)))
        assert torch.equal(sun, tensor(ImageOps.solarize(pil(image), int(255.999 * level))))


def moved_by_hand(op, image, level):
    """Plain loops over pixels: each reads the nearest one of where the inverse map leads, grey outside."""
    height, width = image.shape[1:]
    result = torch.full_like(image, 128)
    amount = 2 * level - 1
    for row in range(height):
        for column in range(width):
            y, x = row + 0.5, column + 0.5
            if op == "rotate":
                angle = math.radians(45 * amount)
                dy, dx = y - height / 2, x - width / 2
                y = math.sin(angle) * dx + math.cos(angle) * dy + height / 2
                x = math.cos(angle) * dx - math.sin(angle) * dy + width / 2
            else:
                kind, axis = op.split("_")
                step = amount * 0.3 * ((y if axis == "x" else x) if kind == "shear" else
                                       (width if axis == "x" else height))  # fmt: skip
                x, y = (x + step, y) if axis == "x" else (x, y + step)
            if 0 <= math.floor(y) < height and 0 <= math.floor(x) < width:
                result[:, row, column] = image[:, math.floor(y), math.floor(x)]
    return result


@pytest.mark.parametrize("level", [0.0, 0.07, 0.37, 0.5, 0.81, 0.999])
@pytest.mark.parametrize("op", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("size", [(16, 16), (7, 12), (1, 1)])
def test_geometric_operations_read_the_nearest_pixel(op, level, size):
    images = pictures(*size)[2:4]
    result = at(op, level, images=images)
    for image, moved in zip(images, result, strict=True):
        assert (moved != moved_by_hand(op, image, level)).any(dim=0).sum() <= 1  # a sine's last digit at a border
    assert level != 0.5 or torch.equal(result, images)


@pytest.mark.parametrize("level", [0.0, 0.07, 0.37, 0.81, 0.999])
def test_geometric_operations_are_pils_up_to_its_rounding_of_coordinates(level):
    amount = 2 * level - 1
    step = 0.3 * amount
    matrices = {
        "shear_x": (1, step, 0, 0, 1, 0), "shear_y": (1, 0, 0, step, 1, 0),
        "translate_x": (1, 0, 32 * step, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, 32 * step),
    }  # fmt: skip
    image = pictures()[:1]
    for op, matrix in matrices.items():
        expected = pil(image[0]).transform((32, 32), Image.Transform.AFFINE, matrix, fillcolor=(128, 128, 128))
        assert (at(op, level, images=image)[0] != tensor(expected)).any(dim=0).double().mean() < 0.02, op
    turned = pil(image[0]).rotate(45 * amount, fillcolor=(128, 128, 128))
    assert (at("rotate", level, images=image)[0] != tensor(turned)).any(dim=0).double().mean() < 0.02


def test_translation_is_by_a_fraction_of_the_side():
    images = pictures(10, 20)[:3]
    left = at("translate_x", 0.75, images=images)  # 0.15 of 20 pixels
    assert torch.equal(left[..., :-3], images[..., 3:]) and (left[..., -3:] == 128).all()
    up = at("translate_y", 2 / 3, images=images)  # 0.1 of 10 pixels
    assert torch.equal(up[:, :, :-1], images[:, :, 1:]) and (up[:, :, -1:] == 128).all()


@pytest.mark.parametrize(("level", "side"), [(0.0, 1), (0.5, 8), (0.999, 16), (1.0, 16)])
def test_the_side_of_a_cutout_by_hand(level, side):
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    covered = (at("cutout", level, images=images) == 128).all(dim=1)
    assert covered.sum(dim=(1, 2)).max() == side**2
    assert covered.any(dim=1).sum(dim=1).max() == side


def test_each_row_has_its_own_cutout():
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    level = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None].expand(-1, 2)
    rows = (apply("cutout", images, level, draws_of(300)) == 128).all(dim=1).any(dim=2).sum(dim=1)
    side = 1 + (0.499 * 32 * level[:, 0]).long()
    assert (rows <= side).all() and (rows == side).double().mean() > 0.5  # the others are at the border


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 1)])
def test_rescaling_is_pils_crop_and_resize_to_one_grey_level(name, level, size):
    images = pictures(*size)
    height, width = size
    margin = 0.25 * level
    box = (margin * width, margin * height, width - margin * width, height - margin * height)
    result = at("rescale", level, second=(FILTERS.index(name) + 0.5) / 6, images=images)
    for image, found in zip(images, result, strict=True):
        expected = pil(image).crop(tuple(map(round, box))).resize((width, height), Image.Resampling[name.upper()])
        difference = (found.int() - tensor(expected).int()).abs()
        if name in ("box", "nearest"):  # ties between two pixels go either way
            assert (difference > 0).any(dim=0).double().mean() < 0.2
        else:
            assert difference.max() <= 1


def test_rescaling_by_no_margin_changes_nothing():
    images = pictures()
    for number in range(len(FILTERS)):
        count = len(images)
        found = rescale(images, torch.zeros(count, dtype=torch.float64), torch.full((count,), number))
        assert torch.equal(found, images)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [(32, 32), (9, 14), (4, 3), (2, 5), (1, 1)])
def test_rows_at_their_own_levels_are_those_of_one_level_at_a_time(op, size):
    images = pictures(*size)
    rng = torch.Generator().manual_seed(0)
    level = torch.rand(len(images), 2, generator=rng, dtype=torch.float64)
    draws = draws_of(len(images))
    before = images.clone()
    whole = apply(op, images, level, draws)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape and torch.equal(images, before)
    for i in range(len(images)):
        alone = apply(op, images[i : i + 1], level[i : i + 1], draws[i : i + 1])[0]
        assert (alone.int() - whole[i].int()).abs().max() <= (1 if op == "rescale" else 0)  # sums of products


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth = 0: must be >= 1 operation"),
        ({"decay": 1.0}, r"decay = 1.0: must be in \[0, 1\)"),
        ({"threshold": 1.5}, r"threshold = 1.5: must be in \[0, 1\]"),
        ({"padding": -1}, "padding = -1: must be >= 0 pixels"),
        ({"cutout": 1.5}, "cutout = 1.5: must be in"),
        ({"fill": -1}, "fill = -1: must be in"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CTAugmentConfig(**changes)
