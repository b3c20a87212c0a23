"""sRGB and CIE Lab under the illuminant D65: IEC 61966-2-1 (the gamma), CIE 15 (Lab), batched, on floats.

Eight-bit Lab, as some libraries give it, is off by up to a unit of a and b. No matrix product is used: in TF32 it would
cost as much.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from methods.precision import full_precision

TO_XYZ = (  # ITU-R BT.709 primaries, in the six digits of Poynton's colour FAQ
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65, 2 degree observer
TO_RELATIVE = tuple(tuple(value / white for value in row) for row, white in zip(TO_XYZ, WHITE, strict=True))
REACH = 110  # no sRGB colour has |a| or |b| above 107.9, blue's b
LIGHTNESS_STEPS = 1000  # at which L a bin may be in gamut: 0, 0.1, .. 100
_KNEE = 6 / 29  # where CIE's cube root goes over into a line


@full_precision
def rgb_to_lab(images: Tensor) -> Tensor:
    """CIE Lab of sRGB images.

    Args:
        images: (B, 3, H, W) in [0, 1].
    Returns:
        (B, 3, H, W): L in [0, 100], a in [-86.2, 98.3], b in [-107.9, 94.5]. Red is (53.2406, 80.0923, 67.2028); greys
        have |a|, |b| < 0.01, which is what the digits of the constants leave.
    """
    linear = torch.where(images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92)
    t = _times(TO_RELATIVE, linear)
    x, y, z = torch.where(t > _KNEE**3, t.clamp(min=_KNEE**3) ** (1 / 3), t / (3 * _KNEE**2) + 4 / 29).unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


@full_precision
def lab_to_rgb(lab: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] of Lab (B, 3, H, W); colours outside the gamut are clamped, channel by channel."""
    linear = lab_to_linear(lab).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)


@full_precision
def lab_to_linear(lab: Tensor) -> Tensor:
    """Linear RGB (B, 3, H, W) of Lab (B, 3, H, W): in [0, 1] in all channels where sRGB has the colour."""
    lightness, a, b = lab.unbind(dim=1)
    y = (lightness + 16) / 116
    t = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    return _times(_to_linear(), torch.where(t > _KNEE, t**3, 3 * _KNEE**2 * (t - 4 / 29)))


def _times(matrix: tuple[tuple[float, ...], ...], images: Tensor) -> Tensor:
    first, second, third = images.unbind(dim=1)
    return torch.stack([p * first + q * second + r * third for p, q, r in matrix], dim=1)


@lru_cache(maxsize=1)
def _to_linear() -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, torch.linalg.inv(torch.tensor(TO_RELATIVE, dtype=torch.float64, device="cpu")).tolist()))


@lru_cache(maxsize=16)
def gamut_bins(pitch: int) -> tuple[tuple[float, float], ...]:
    """Centres (a, b) of a grid through (0, 0) that are sRGB colours at some lightness, in order of a, then b.

    They depend on the pitch alone and not on any images, and with them the size of a head. Zhang et al. 2016,
    arXiv:1603.08511, count 313 at pitch 10 by what ImageNet's pixels fall into, borders included.

    Returns:
        Q pairs: 229 at pitch 10, 59 at 20, 37 at 25. A colour is at most 18.3 from the nearest of the 59.
    """
    device = torch.device("cpu")  # also where modules are being built on "meta"
    line = torch.arange(-(REACH // pitch) * pitch, REACH + 1, pitch, dtype=torch.float64, device=device)
    centres = torch.cartesian_prod(line, line)
    lightness = torch.linspace(0, 100, LIGHTNESS_STEPS + 1, dtype=torch.float64, device=device)
    lab = torch.stack(torch.broadcast_tensors(lightness[None], centres[:, :1], centres[:, 1:]), dim=1)
    linear = lab_to_linear(lab[..., None])
    inside = ((linear >= 0) & (linear <= 1)).all(dim=1).any(dim=(1, 2))
    return tuple((a, b) for a, b in centres[inside].tolist())
