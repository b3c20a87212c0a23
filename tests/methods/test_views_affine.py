"""Affine maps, against torchvision's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine as torchvision_affine

from methods.views.affine import Affine, affine, random_affine
from methods.views.draws import Draws
from methods.views.policy import Augment


def picture(side=20, width=None, count=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, width or side), dtype=torch.uint8, generator=rng)


def one(value):
    return torch.tensor([value])


@settings(max_examples=30, deadline=None)
@given(degrees=st.floats(-180, 180), scale=st.floats(0.6, 1.6), right=st.integers(-5, 5), down=st.integers(-5, 5),
       shear=st.floats(-30, 30), fill=st.sampled_from([0, 128, 255]))  # fmt: skip
def test_it_is_torchvisions_affine_map(degrees, scale, right, down, shear, fill):
    image = picture(20)
    ours = affine(
        image, one(math.radians(degrees)), one(scale), one(math.radians(shear)),
        torch.tensor([[right / 20, down / 20]]),
        fill=fill,
    )  # fmt: skip
    # torchvision turns clockwise, and fills by a mask: it mixes in the fill where ours interpolates with it
    theirs = torchvision_affine(
        image.float(), -degrees, [right, down], scale, [shear, 0.0], interpolation=InterpolationMode.BILINEAR,
        fill=[float(fill)] * 3,
    )  # fmt: skip
    inside = torchvision_affine(torch.ones(1, 1, 20, 20), -degrees, [right, down], scale, [shear, 0.0],
                                interpolation=InterpolationMode.BILINEAR)[:, 0] > 1 - 1e-4  # fmt: skip
    difference = (ours.float() - theirs).abs().amax(dim=1)
    assert difference[inside].max() <= 1.0 if inside.any() else True


def test_no_limits_are_the_identity():
    still = Affine(degrees=0, translate=0, scale=0)
    image = picture(17, 23, count=3)
    assert torch.equal(random_affine(image, Draws.of(0, 0, torch.arange(3)), still, fill=9), image)


def test_a_shift_of_whole_pixels_moves_them_and_fills_the_rest():
    image = picture(8)
    moved = affine(image, one(0.0), one(1.0), one(0.0), torch.tensor([[2 / 8, 0.0]]), fill=7)
    assert torch.equal(moved[..., 2:], image[..., :-2]) and (moved[..., :2] == 7).all()


def test_a_quarter_turn_is_exact_and_to_the_left():
    image = picture(9)
    turned = affine(image, one(math.pi / 2), one(1.0), one(0.0), torch.zeros(1, 2), fill=0)
    assert torch.equal(turned, image.rot90(1, dims=(2, 3)))


def test_each_image_has_its_own_map_whatever_its_place_in_the_batch():
    image = picture(12).expand(4, -1, -1, -1)
    draws = Draws.of(3, 0, torch.arange(4))
    out = random_affine(image, draws, Affine(shear=10), fill=0)
    assert not torch.equal(out[0], out[1])
    assert torch.equal(random_affine(image[2:3], draws[2:3], Affine(shear=10), fill=0), out[2:3])


@pytest.mark.parametrize("wrong", [{"degrees": 200}, {"translate": 1.0}, {"scale": -0.1}, {"shear": 90}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Affine(**wrong)


def test_an_augmentation_with_an_affine_map_and_one_with_a_resized_crop_keep_size_and_range():
    images = picture(14, count=5)
    draws = Draws.of(0, 0, torch.arange(5))
    for augment in (Augment(affine=Affine(), padding=0), Augment(min_area=0.3), Augment(min_area=0.3, flip=False)):
        out = augment.build(16)(images, draws)
        assert out.shape == (5, 3, 16, 16) and 0 <= out.min() and out.max() <= 1
        assert torch.equal(augment.build(16)(images[3:], draws[3:]), out[3:])
    with pytest.raises(ValueError, match="min_area = 0"):
        Augment(min_area=0)
