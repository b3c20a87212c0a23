"""Colour distortion of SimCLR: Chen et al. 2020, arXiv:2002.05709, appendix A, per sample.

The exact form applies torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and `adjust_hue` on
floats, with their clamps, in each sample's own order. The linear form folds them into one 3 by 4 matrix a sample: no
clamp between the steps, and hue as a rotation in YIQ instead of a turn of HSV.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from methods.views.batch import chunks, constant, grouped
from methods.views.draws import Draws

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # torchvision's greyscale weights
_ORDERS = tuple(itertools.permutations(range(4)))
_TENTS = ((3.0, 2.0, 4.0), (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0))  # offset + sign · |hue - centre|, a column a channel
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Jitter:
    """What happens to the colours of each sample.

    Args:
        order: (B, 4) int64, a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE: what comes first, second, ...
        factor: (B, 4) float32, indexed by the constants: three blend factors, 1 the identity, and the turn of the hue
            in [-0.5, 0.5] full turns.
        jittered, grey: (B,) bool, whether these are applied, and whether the result becomes grey.
    """

    order: Tensor
    factor: Tensor
    jittered: Tensor
    grey: Tensor


def random_jitter(
    draws: Draws, *, brightness: float, contrast: float, saturation: float, hue: float,
    jitter_chance: float = 0.8, grey_chance: float = 0.2,
) -> Jitter:  # fmt: skip
    """Factors of torchvision's `ColorJitter` in random order, and `RandomGrayscale`.

    Args:
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - x), 1 + x].
        hue: the turn is uniform in [-hue, hue], at most 0.5.
    """
    device = draws.key.device
    blends = (brightness, contrast, saturation)
    low = constant((*(max(0.0, 1 - blend) for blend in blends), -hue), device)
    high = constant((*(1.0 + blend for blend in blends), hue), device)
    unit = draws.uniform(7)
    order = constant(_ORDERS, device)[(unit[:, 4] * len(_ORDERS)).long()]
    factor = torch.lerp(low, high, unit[:, :4])
    return Jitter(order, factor, unit[:, 5] < jitter_chance, unit[:, 6] < grey_chance)


def jitter_exact_(images: Tensor, jitter: Jitter) -> Tensor:
    """Distorts the colours in place, within 1e-5 of torchvision's operations on the same factors and order.

    Samples are sorted by the place of the hue in their order, so that each group is a few passes over contiguous
    memory: brightness, contrast and saturation are all x → clamp(M x + t) and need no groups of their own.

    Args:
        images: (B, 3, H, W) float32 in [0, 1], contiguous.
    Returns:
        images.
    """
    flat = images.view(len(images), 3, -1)
    matrix, towards_mean = _blends(jitter)
    hue_place = (jitter.order == HUE).to(torch.uint8).argmax(dim=1)
    rows, bounds = grouped(torch.where(jitter.jittered, hue_place, 4), 5)
    luma = constant(LUMA, images.device)
    for place in range(4):
        for part in chunks(bounds[place], bounds[place + 1], flat[0].numel(), images.device):
            row = rows[part]
            x = flat.index_select(0, row)
            turn, m, k = jitter.factor[row, HUE], matrix[row], towards_mean[row]
            for step in range(4):
                if step == place:
                    x = turn_hue(x, turn)
                else:
                    offset = (x.mean(dim=2) @ luma) * k[:, step]
                    x = torch.baddbmm(offset[:, None, None], m[:, step], x).clamp_(0, 1)
            flat.index_copy_(0, row, x)
    grey = jitter.grey.nonzero()[:, 0]
    flat.index_copy_(0, grey, (luma @ flat.index_select(0, grey))[:, None].expand(-1, 3, -1))
    return images


def jitter_linear_(images: Tensor, jitter: Jitter) -> Tensor:
    """The linear form, in place: one matrix a sample and one clamp at the end. Arguments as for `jitter_exact_`.

    Contrast, saturation and hue keep the luma of the mean, and brightness scales it, so without clamps the four commute
    and `jitter.order` has no effect. With b, c, s their factors, μ the mean's luma, L and (C, S) the parts of the turn
    that keep luma and rotate colour: x → b c (L + s cos θ C + s sin θ S) x + b (1 - c) μ. Grey is s = 0.
    """
    flat = images.view(len(images), 3, -1)
    brightness, contrast, saturation, turn = torch.where(
        jitter.jittered[:, None], jitter.factor, constant((1.0, 1.0, 1.0, 0.0), images.device)
    ).unbind(dim=1)
    saturation = saturation.masked_fill(jitter.grey, 0)
    angle = 2 * math.pi * turn
    parts = torch.stack([torch.ones_like(angle), saturation * angle.cos(), saturation * angle.sin()], dim=1)
    matrix = ((brightness * contrast)[:, None] * parts @ _turn_parts(images.device)).unflatten(1, (3, 3))
    offset = brightness * (1 - contrast) * (flat.mean(dim=2) @ constant(_RGB_TO_YIQ[0], images.device))
    for part in chunks(0, len(flat), flat[0].numel(), images.device):
        flat[part] = torch.baddbmm(offset[part, None, None], matrix[part], flat[part]).clamp_(0, 1)
    return images


@lru_cache(maxsize=8)
def _turn_parts(device: torch.device) -> Tensor:
    """(3, 9): the 3 by 3 matrices L, C, S whose sum L + cos θ C + sin θ S turns the two colour axes of YIQ by θ."""
    yiq = torch.tensor(_RGB_TO_YIQ)
    rgb = torch.linalg.inv(yiq)
    keep, cos = rgb[:, :1] @ yiq[:1], rgb[:, 1:] @ yiq[1:]
    sin = rgb[:, 2:] @ yiq[1:2] - rgb[:, 1:2] @ yiq[2:]
    return torch.stack([keep, cos, sin]).flatten(1).to(device)


def _blends(jitter: Jitter) -> tuple[Tensor, Tensor]:
    """Brightness, contrast and saturation as x → M x + k · (mean grey): M (B, 4, 3, 3) and k (B, 4), by step.

    All three blend with factor f: f x + (1 - f) base, with base black, the mean grey, or the pixel's grey.
    """
    factor = jitter.factor.gather(1, jitter.order)
    rest = 1 - factor
    identity, grey = torch.eye(3, device=factor.device), constant(LUMA, factor.device).expand(3, 3)
    matrix = factor[:, :, None, None] * identity + (rest * (jitter.order == SATURATION))[:, :, None, None] * grey
    return matrix, rest * (jitter.order == CONTRAST)


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of HSV, keeping value and saturation.

    A colour with least component m and chroma c is m + c (r, g, b), where one of r, g, b is 1 and another 0. On that
    hexagon its distance from red is 1 + g + b - r sixths of a turn, on the side of the greater of g and b; and the way
    back is m + c · tent(hue), with tents of width 4 around red 0, green 2 and blue 4. No case is needed either way.

    Args:
        pixels: (B, 3, N) float32 in [0, 1].
        turn: (B,) full turns, in [-0.5, 0.5].
    Returns:
        (B, 3, N) float32; a turn of 1/3 takes red to green.
    """
    red, green, blue = pixels.unbind(dim=1)
    low = torch.minimum(red, green).clamp_(max=blue)
    chroma = torch.maximum(red, green).clamp_(min=blue).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue.copysign_(green - blue).add_((6 * turn)[:, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # in [0, 6]
    centre, sign, offset = constant(_TENTS, pixels.device)[:, :, None]  # red's, around 0 and 6, is a valley around 3
    tent = torch.addcmul(offset, (hue[:, None] - centre).abs_(), sign).clamp_(0, 1)
    return torch.addcmul(low[:, None], tent, chroma[:, None])
