"""Crops: random resized (Szegedy et al. 2014, arXiv:1409.4842, section 6) and padded (He et al. 2015, arXiv:1512.03385,
section 4.2).

Crop, resize, mirror and blur of an image are linear and separable, so a random resized crop of a batch is two batched
matrix products, out = Wy · image · Wxᵀ, with weights per sample. In float32 it equals torchvision's `resized_crop` with
bilinear interpolation and antialias=True (which acts where a crop shrinks). `grid_sample` would not: it reads past the
crop's edge and does not average where it shrinks.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from methods.views.batch import chunks
from methods.views.draws import Draws

_TRIES = 10  # torchvision's: how many boxes are proposed before the central one is taken
_BLUR_FLOOR = 2e-11  # smaller weights change no float32 sum, and as denormal numbers would slow the product


@dataclass(frozen=True)
class Boxes:
    """One crop an image, in pixels of the source: four (B,) float32 of whole numbers."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(
    draws: Draws, height: int, width: int, *, min_area: float = 0.08, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Boxes:
    """Boxes of torchvision's `RandomResizedCrop`, for images `height` by `width`.

    Args:
        min_area: the area is uniform in [min_area, 1] of the image.
        ratio: width over height is log-uniform in it.
    Returns:
        The first of ten proposals that lies within the image; if none does, as for long strips, the largest central
        box whose ratio is allowed.
    """
    unit = draws.uniform(2 * _TRIES + 2)
    area = height * width * (min_area + (1 - min_area) * unit[:, :_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * unit[:, _TRIES : 2 * _TRIES])
    proposed_width, proposed_height = (area * aspect).sqrt_().round_(), (area / aspect).sqrt_().round_()
    fits = (proposed_width > 0) & (proposed_width <= width) & (proposed_height > 0) & (proposed_height <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    none = ~fits.any(dim=1)
    central_height = min(height, max(1, round(width / ratio[0])))
    central_width = min(width, max(1, round(height * ratio[1])))
    box_height = proposed_height.gather(1, first)[:, 0].masked_fill(none, central_height)
    box_width = proposed_width.gather(1, first)[:, 0].masked_fill(none, central_width)
    top = (unit[:, -2] * (height - box_height + 1)).floor_().masked_fill(none, (height - central_height) // 2)
    left = (unit[:, -1] * (width - box_width + 1)).floor_().masked_fill(none, (width - central_width) // 2)
    return Boxes(top, left, box_height, box_width)


@dataclass(frozen=True)
class Triangles:
    """How stretches of lines are resized, by antialiased bilinear interpolation, a stretch a sample.

    Each output pixel weights the source pixels by a triangle around its centre, as wide as two output pixels, but never
    narrower than two source pixels. Lengths are in halves of that width.

    Args:
        position: (B, source) float32, of the source pixels; infinite outside the stretch.
        centre: (B, pixels) float32, of the output pixels.
    """

    position: Tensor
    centre: Tensor

    @staticmethod
    def of(start: Tensor, length: Tensor, source: int, pixels: int, mirror: Tensor | None = None) -> Triangles:
        """Of the stretch from `start`, `length` long, both (B,) in pixels, of a line of `source` pixels, resized to
        `pixels`; backwards where `mirror` (B,) is true."""
        start, length = start[:, None], length[:, None]
        place = torch.arange(pixels, dtype=torch.float32, device=start.device)
        if mirror is not None:
            place = torch.where(mirror[:, None], pixels - 1 - place, place)
        centre = start + (place + 0.5) * (length / pixels) - 0.5
        position = torch.arange(source, dtype=torch.float32, device=start.device)
        outside = (position < start) | (position >= start + length)
        half = (length / pixels).clamp(min=1)
        return Triangles(position.masked_fill(outside, torch.inf) / half, centre / half)

    def weights(self, rows: Tensor, first: Tensor, count: int) -> Tensor:
        """Each output pixel's weights, which sum to 1, of a part of the source that holds the stretch.

        Args:
            rows: (N,) int64, the samples.
            first: (N,) int64, the part's first source pixel.
        Returns:
            (N, pixels, count) float32.
        """
        position = stretches(self.position.flatten(), rows * self.position.shape[1] + first, count)
        weights = (position[:, None] - self.centre[rows, :, None]).abs_().sub_(1).clamp_(max=0)
        return weights.div_(weights.sum(dim=2, keepdim=True))


def blur_radius(pixels: int) -> int:
    """SimCLR's kernel, 10 % of the side: 224 gives 11, a width of 23; below 20 pixels it is 0, which blurs nothing."""
    return pixels // 10 // 2


@lru_cache(maxsize=8)
def _blur_taps(pixels: int, device: torch.device) -> Tensor:
    """(2 radius + 1, pixels²): tap d adds input pixel reflect(i + d) to output pixel i."""
    radius = blur_radius(pixels)
    offset = torch.arange(-radius, radius + 1, device=device)
    source = (torch.arange(pixels, device=device)[None] + offset[:, None]).abs()
    source = (pixels - 1) - ((pixels - 1) - source).abs()
    return torch.nn.functional.one_hot(source, pixels).to(torch.float32).flatten(1)


def blur_weights(sigma: Tensor, pixels: int) -> Tensor:
    """Gaussian blur of a line with reflected ends, as torchvision's `gaussian_blur` with SimCLR's kernel size.

    Args:
        sigma: (B,) standard deviation in output pixels, > 0.
    Returns:
        (B, pixels, pixels) float32; each row sums to 1.
    """
    radius = blur_radius(pixels)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=sigma.device)
    taps = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    taps = torch.where(taps > _BLUR_FLOOR, taps, 0)
    taps = taps / taps.sum(dim=1, keepdim=True)
    return (taps @ _blur_taps(pixels, sigma.device)).unflatten(1, (pixels, pixels))


def crop_resize(
    images: Tensor, boxes: Boxes, pixels: int, *, mirror: Tensor | None = None, sigma: Tensor | None = None
) -> Tensor:
    """Each image's box, resized to `pixels` by `pixels`, mirrored and blurred.

    Args:
        images: uint8 (B, 3, H, W).
        mirror: (B,) bool, which are mirrored left to right.
        sigma: (B,) float32, standard deviation of a Gaussian blur in output pixels; 0 leaves a row sharp.
    Returns:
        (B, 3, pixels, pixels) float32 in [0, 1].
    """
    count, _, height, width = images.shape
    device = images.device
    down = Triangles.of(boxes.top, boxes.height, height, pixels)
    across = Triangles.of(boxes.left, boxes.width, width, pixels, mirror)
    # sharp ones first, then by height, so that a chunk's products run over little more than its boxes
    key = boxes.height if sigma is None else boxes.height + (height + 1) * (sigma > 0)
    key, order = key.sort()
    tall, wide = torch.stack([boxes.height, boxes.width])[:, order].int().tolist()
    sharp = count if sigma is None else bisect.bisect(key.tolist(), height)
    out = torch.empty(count, 3, pixels, pixels, device=device)
    source = images.flatten()
    elements = 3 * max(height, pixels) * max(width, pixels)
    for begin, end in ((0, sharp), (sharp, count)):
        for part in chunks(begin, end, elements, device):
            row, tallest, widest = order[part], max(tall[part]), max(wide[part])
            top = boxes.top[row].long().clamp_(max=height - tallest)
            left = boxes.left[row].long().clamp_(max=width - widest)
            vertical, horizontal = down.weights(row, top, tallest), across.weights(row, left, widest)
            if sigma is not None and begin == sharp:
                kernel = blur_weights(sigma[row], pixels)
                vertical, horizontal = kernel @ vertical, kernel @ horizontal
            vertical.div_(255)  # 0 .. 255 to [0, 1], in the smallest factor
            line = 3 * row[:, None] + torch.arange(3, device=device)
            line = (line * height + top[:, None])[..., None] + torch.arange(tallest, device=device)
            box = stretches(source, (line * width + left[:, None, None]).flatten(), widest)
            rows = torch.bmm(box.to(torch.float32).view(len(row), -1, widest), horizontal.transpose(1, 2))
            view = torch.matmul(vertical[:, None], rows.unflatten(1, (3, tallest)))
            out.index_copy_(0, row, view.clamp_(0, 1))  # weights sum to 1 only up to rounding
    return out


def stretches(line: Tensor, start: Tensor, length: int) -> Tensor:
    """Of a line (M,) the stretches from `start` (N,) int64 on: (N, length). They are copied whole, unlike by gather."""
    return line.unfold(0, length, 1).index_select(0, start)


def pad_crop(images: Tensor, draws: Draws, *, padding: int, flip: bool) -> Tensor:
    """Pads by reflection, crops back at a random offset and mirrors half of the images: one gather.

    Args:
        images: uint8 (B, 3, H, W).
        padding: pixels on each side, so offsets are uniform in -padding .. padding. May exceed the image, which is then
            reflected repeatedly, as in numpy's `pad`.
    Returns:
        uint8 (B, 3, H, W).
    """
    count, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(count, height)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip:
        columns = torch.where(draws.fork(0).chance(0.5)[:, None], width - 1 - columns, columns)
    if padding:
        offset = draws.fork(1).integers(2, 2 * padding + 1) - padding
        rows, columns = _reflect(rows + offset[:, :1], height), _reflect(columns + offset[:, 1:], width)
    index = (rows[:, :, None] * width + columns[:, None]).flatten(1)
    return images.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).view_as(images)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions on the whole line to 0 .. size - 1, mirrored at both ends without repeating the end pixels."""
    if size == 1:
        return torch.zeros_like(position)
    position = position.remainder(2 * (size - 1))
    return torch.minimum(position, 2 * (size - 1) - position)
