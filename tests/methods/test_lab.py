"""Lab against published values, an independent float64 conversion, and its own inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.views.lab import gamut_bins, lab_to_linear, lab_to_rgb, rgb_to_lab


def pixels(*colours, dtype=torch.float32):
    return torch.tensor(colours, dtype=dtype)[:, :, None, None]


XY = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])  # BT.709's chromaticities: the matrix follows from them
PRIMARIES = np.stack([XY[:, 0] / XY[:, 1], np.ones(3), (1 - XY.sum(axis=1)) / XY[:, 1]])
WHITE = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
MATRIX = PRIMARIES * np.linalg.solve(PRIMARIES, WHITE)


def reference_lab(rgb):
    """Lab (N, 3) of sRGB (N, 3), float64."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    t = linear @ MATRIX.T / WHITE
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def reference_linear(lab):
    """Linear RGB (..., 3) of Lab (..., 3), float64."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    t = np.where(f**3 > 216 / 24389, f**3, (116 * f - 16) * 27 / 24389)
    return t * WHITE @ np.linalg.inv(MATRIX).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_primaries_have_their_published_lab(dtype):
    lab = rgb_to_lab(pixels((1, 0, 0), (0, 1, 0), (0, 0, 1), dtype=dtype)).flatten(1)
    expected = [(53.2406, 80.0923, 67.2028), (87.7351, -86.1830, 83.1797), (32.2957, 79.1856, -107.8573)]
    torch.testing.assert_close(lab, torch.tensor(expected, dtype=dtype), atol=1e-4, rtol=0)


def test_grey_has_no_colour_and_lightness_from_0_to_100():
    level = torch.linspace(0, 1, 256)
    lab = rgb_to_lab(pixels(*([v, v, v] for v in level.tolist()))).flatten(1)
    assert lab[:, 1:].abs().max() < 0.01
    assert lab[0, 0] == pytest.approx(0, abs=1e-5) and lab[-1, 0] == pytest.approx(100, abs=1e-3)
    assert (lab[:, 0].diff() > 0).all()


@given(seed=st.integers(0, 2**31))
def test_an_independent_conversion_agrees(seed):
    rgb = np.random.default_rng(seed).random((64, 3))
    lab = rgb_to_lab(torch.tensor(rgb)[:, :, None, None]).flatten(1).numpy()
    np.testing.assert_allclose(lab, reference_lab(rgb), atol=0.03)  # its white has other digits


@given(seed=st.integers(0, 2**31), dark=st.floats(0.001, 1))
def test_there_and_back_is_the_same_image(seed, dark):
    images = dark * torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(images)), images, atol=2e-5, rtol=0)


def test_autocast_costs_no_digit():
    images = torch.rand(2, 3, 8, 8)
    exact = rgb_to_lab(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rgb_to_lab(images), exact)


def test_a_colour_outside_the_gamut_is_clamped():
    assert lab_to_linear(pixels((50.0, 120.0, 0.0))).min() < 0
    rgb = lab_to_rgb(pixels((50.0, 120.0, 0.0), (100.0, 0.0, 100.0)))
    assert rgb.min() >= 0 and rgb.max() <= 1 and rgb.isfinite().all()


@pytest.mark.parametrize(("pitch", "count"), [(10, 229), (20, 59), (25, 37)])
def test_the_bins_of_a_pitch_are_the_same_everywhere(pitch, count):
    gamut_bins.cache_clear()
    bins = gamut_bins(pitch)
    gamut_bins.cache_clear()
    with torch.device("meta"):
        assert gamut_bins(pitch) == bins
    assert len(bins) == len(set(bins)) == count and (0.0, 0.0) in bins and list(bins) == sorted(bins)
    assert all(value % pitch == 0 for centre in bins for value in centre)


@pytest.mark.parametrize("pitch", [10, 20, 25])
def test_the_bins_are_the_colours_in_gamut_at_some_lightness(pitch):
    reach = 130 // pitch * pitch
    a, b, lightness = np.meshgrid(
        np.arange(-reach, reach + 1, pitch),
        np.arange(-reach, reach + 1, pitch),
        np.linspace(0, 100, 1001),
        indexing="ij",
    )
    linear = reference_linear(np.stack([lightness, a, b], axis=-1))
    outside = np.maximum(-linear, linear - 1).max(axis=-1).min(axis=-1)  # by how much, at the best lightness
    found = {(float(a[i, j, 0]), float(b[i, j, 0])) for i, j in np.argwhere(outside <= 0.0005)}
    assert found == set(gamut_bins(pitch))


def test_every_colour_has_a_bin_within_a_cell():
    solid = torch.cartesian_prod(*[torch.linspace(0, 1, 25)] * 3)[:, :, None, None]
    colours = rgb_to_lab(solid)[:, 1:, 0, 0]
    nearest = torch.cdist(colours, torch.tensor(gamut_bins(20))).amin(dim=1)
    assert nearest.max() < 18.3 and nearest.median() < 20 / 2**0.5
