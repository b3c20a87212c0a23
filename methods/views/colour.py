"""Colour distortion of SimCLR: Chen et al. 2020, arXiv:2002.05709, appendix A, per sample.

The exact form applies torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and `adjust_hue` on
floats, with their clamps, in each sample's own order. The linear form folds them into one 3 by 4 matrix a sample: no
clamp between the steps, and hue as a rotation in YIQ instead of a turn of HSV.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from methods.views.batch import chunks, constant, grouped
from methods.views.draws import Draws

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # torchvision's greyscale weights
_ORDERS = tuple(itertools.permutations(range(4)))
_SORTED = tuple(sorted(_ORDERS, key=lambda order: (order.index(HUE), order.index(SATURATION))))
_DIGITS = (64, 16, 4, 1)  # an order as a number below 256
_NUMBERS = tuple(sum(map(operator.mul, order, _DIGITS)) for order in _SORTED)
_PLACES = tuple(_NUMBERS.index(number) if number in _NUMBERS else 0 for number in range(256))  # of it in _SORTED
_TENTS = ((0, 1), (-1, -1), (1, -1))  # centre and sign of each channel's, half a turn from red; red's is a valley
_TINY = 1e-12  # a chroma of grey to divide by, far below a float's step at any other
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
    low = constant((*(max(0.0, 1.0 - blend) for blend in blends), -hue), device)
    high = constant((*(1.0 + blend for blend in blends), hue), device)
    unit = draws.uniform(7)
    order = constant(_ORDERS, device)[(unit[:, 4] * len(_ORDERS)).long()]
    factor = torch.lerp(low, high, unit[:, :4])
    return Jitter(order, factor, unit[:, 5] < jitter_chance, unit[:, 6] < grey_chance)


def jitter_exact_(images: Tensor, jitter: Jitter) -> Tensor:
    """Distorts the colours in place, within 1e-5 of torchvision's operations on the same factors and order.

    Samples are sorted by order, those with the hue at the same place together: its many passes run over whole chunks,
    and what only one operation needs, a mean or a grey, over its own stretch of them.

    Args:
        images: (B, 3, H, W) float32 in [0, 1], contiguous.
    Returns:
        images.
    """
    flat = images.view(3 * len(images), -1)
    factor = jitter.factor.gather(1, jitter.order)
    number = (jitter.order * constant(_DIGITS, images.device)).sum(dim=1)
    place = constant(_PLACES, images.device)[number].masked_fill(~jitter.jittered, len(_SORTED))
    rows, bounds = grouped(place, len(_SORTED) + 1)
    channel = torch.arange(3, device=images.device)[:, None]
    for first in range(0, len(_SORTED), 6):  # six orders have the hue at the same place
        for part in chunks(bounds[first], bounds[first + 6], flat.shape[1] // 2, images.device):  # planes fit the cache
            index = (3 * rows[part] + channel).flatten()  # all reds, all greens, all blues: planes are passed over fast
            x = flat.index_select(0, index).unflatten(0, (3, -1))
            factors = factor[rows[part]]
            rests = 1 - factors
            for step in range(4):
                if _SORTED[first][step] == HUE:
                    turn_hue_(x, factors[:, step])
                    continue
                for operation, stretch in _stretches(bounds, first, step, part):
                    mine, by, rest = x[:, stretch], factors[stretch, step, None], rests[stretch, step, None]
                    if operation == BRIGHTNESS:  # towards black, which adds nothing
                        mine.mul_(by)
                    elif operation == CONTRAST:
                        grey = _grey(mine.mean(dim=2, keepdim=True)).mul_(rest)
                        mine.mul_(by).add_(grey)
                    else:
                        torch.addcmul(_grey(mine).mul_(rest), mine, by, out=mine)
                x.clamp_(0, 1)
            flat.index_copy_(0, index, x.flatten(0, 1))
    grey = jitter.grey.nonzero()[:, 0]
    index = 3 * grey + channel
    luma = torch.stack([flat.index_select(0, index[c]) for c in range(3)])
    flat.index_copy_(0, index.flatten(), _grey(luma).expand(3, -1, -1).flatten(0, 1))
    return images


def _stretches(bounds: list[int], first: int, step: int, part: slice) -> Iterator[tuple[int, slice]]:
    """What is done in a step of the orders first .. first + 5 to which rows, counted from part.start."""
    for operation, codes in itertools.groupby(range(first, first + 6), lambda code: _SORTED[code][step]):
        number = list(codes)
        begin, end = max(bounds[number[0]], part.start), min(bounds[number[-1] + 1], part.stop)
        if begin < end:
            yield operation, slice(begin - part.start, end - part.start)


def _grey(x: Tensor) -> Tensor:
    """(3, B, N) to (B, N)."""
    red, green, blue = x.unbind()
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


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


def turn_hue_(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of HSV in place, keeping value and saturation.

    A colour with least component m and chroma c is m + c (r, g, b), where one of r, g, b is 1 and another 0. On that
    hexagon its distance from red is 1 + g + b - r sixths of a turn, on the side of the greater of g and b; and the way
    back is m + c · tent(hue), with tents of width 4 around red 0, green 2 and blue 4. No case is needed either way.
    With t = |hue - centre| held in [1, 2] a tent is 2 - t, and red's, a valley on the other side of the wheel, t - 1.

    Args:
        pixels: (3, B, N) float32 in [0, 1], red, green, blue.
        turn: (B,) full turns, in [-0.5, 0.5].
    Returns:
        pixels; a turn of 1/3 takes red to green.
    """
    red, green, blue = pixels.unbind()
    low = torch.minimum(red, green).clamp_(max=blue)
    chroma = torch.maximum(red, green).clamp_(min=blue).sub_(low).add_(_TINY)
    hue = (green + blue).sub_(red).sub_(low)
    torch.addcdiv(constant((1.0,), hue.device), hue, chroma, out=hue)
    hue.copysign_(green.sub_(blue)).add_((6 * turn)[:, None])
    hue.sub_(torch.copysign(constant((3.0,), hue.device), hue))  # in [-3, 3], from the colour opposite to red
    valley, tent = low - chroma, low.add_(chroma, alpha=2)
    for channel, (centre, sign) in zip(pixels, _TENTS, strict=True):
        torch.sub(hue, centre, out=channel)
        channel.abs_().clamp_(1, 2)
        torch.addcmul(valley if sign > 0 else tent, chroma, channel, value=sign, out=channel)
    return pixels
