"""Crops: random resized (Szegedy et al. 2014, arXiv:1409.4842, section 6) and padded (He et al. 2015, arXiv:1512.03385,
section 4.2).

A random resized crop equals torchvision's `resized_crop` with bilinear interpolation and antialias=True. A box that is
not shrunk is sampled: one pass, which reads nothing past the box's edge since places outside are moved onto it. One
that is shrunk is averaged, which is linear and separable: two batched matrix products, out = Wy · image · Wxᵀ, with
weights per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.views.batch import chunks
from methods.views.draws import Draws

_TRIES = 10  # torchvision's: how many boxes are proposed before the central one is taken
_BLUR_FLOOR = 2e-11  # smaller weights change no float32 sum, and as denormal numbers would slow it
_LARGE = 4  # times the result's pixels: a source with more is cut to its boxes before it is read


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
        centre = start + (_line(pixels, mirror, start.device) + 0.5) * (length / pixels) - 0.5
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


def blur_weights(sigma: Tensor, pixels: int) -> Tensor:
    """SimCLR's kernel, (B, radius + 1): the weight of the middle, and of the pixels at each distance on both sides.

    Args:
        sigma: (B,) standard deviation in output pixels, > 0.
    """
    offset = torch.arange(blur_radius(pixels) + 1, dtype=torch.float32, device=sigma.device)
    weights = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    weights = torch.where(weights > _BLUR_FLOOR, weights, 0)
    return weights / (2 * weights.sum(dim=1, keepdim=True) - weights[:, :1])


def blur_(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with reflected edges in place, as torchvision's `gaussian_blur` with SimCLR's kernel size.

    Args:
        views: (B, 3, pixels, pixels) float32 in [0, 1].
        sigma: (B,) standard deviation in pixels; 0 leaves a row sharp.
    """
    pixels = views.shape[3]
    order = sigma.argsort()  # a chunk needs no more pixels than its widest blur
    rows = order[int((sigma <= 0).sum()) :]
    weights = blur_weights(sigma[rows], pixels)
    reach = (weights > 0).sum(dim=1).tolist()
    for part in chunks(0, len(rows), pixels * pixels, views.device):
        row, weight = rows[part], weights[part].T[..., None, None, None]
        radius = reach[part][-1] - 1
        view = views.index_select(0, row)
        for axis, sides in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
            padded = F.pad(view, sides, mode="reflect")
            view = padded.narrow(axis, radius, pixels) * weight[0]
            for offset in range(1, radius + 1):
                both = padded.narrow(axis, radius - offset, pixels) + padded.narrow(axis, radius + offset, pixels)
                view.addcmul_(both, weight[offset])
        views.index_copy_(0, row, view.clamp_(max=1))  # weights sum to 1 only up to rounding
    return views


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
    height, width = images.shape[2:]
    if height * width > _LARGE * pixels * pixels:
        views = _averaged(images, boxes, pixels, mirror)
    elif max(height, width) <= pixels:
        views = _sampled(images, boxes, pixels, mirror)
    else:
        views = torch.empty(len(images), 3, pixels, pixels, device=images.device)
        shrinks = (boxes.height > pixels) | (boxes.width > pixels)
        for resized, mine in ((_averaged, shrinks), (_sampled, ~shrinks)):
            rows = mine.nonzero()[:, 0]
            if len(rows):
                own = Boxes(boxes.top[rows], boxes.left[rows], boxes.height[rows], boxes.width[rows])
                views[rows] = resized(images[rows], own, pixels, None if mirror is None else mirror[rows])
    return views if sigma is None else blur_(views, sigma)


def _sampled(images: Tensor, boxes: Boxes, pixels: int, mirror: Tensor | None) -> Tensor:
    """`crop_resize` of boxes that do not shrink."""
    count, _, height, width = images.shape
    # a float holds the places of whole pixels exactly if the side is a power of two, so edges stay where they are
    tall, wide = 1 << (height - 1).bit_length(), 1 << (width - 1).bit_length()
    down = (_places(boxes.top, boxes.height, pixels) * 2 + 1) / tall - 1
    across = (_places(boxes.left, boxes.width, pixels, mirror) * 2 + 1) / wide - 1
    out = torch.empty(count, 3, pixels, pixels, device=images.device)
    parts = list(chunks(0, count, max(tall * wide, pixels * pixels), images.device))
    source = torch.zeros(parts[0].stop, 3, tall, wide, device=images.device)  # no NaN beside an edge, even times 0
    for part in parts:
        number = part.stop - part.start
        torch.div(images[part], 255, out=source[:number, :, :height, :width])
        grid = torch.view_as_real(torch.complex(across[part, None], down[part, :, None]))  # pairs, faster than a stack
        view = F.grid_sample(source[:number], grid, align_corners=False)
        torch.clamp(view, max=1, out=out[part])  # weights sum to 1 only up to rounding
    return out


def _places(start: Tensor, length: Tensor, pixels: int, mirror: Tensor | None = None) -> Tensor:
    """(B, pixels) float32: where in a line the output pixels of a stretch lie, in source pixels, none outside of it."""
    start, length = start[:, None], length[:, None]
    centre = start + (_line(pixels, mirror, start.device) + 0.5) * (length / pixels) - 0.5
    return torch.minimum(torch.maximum(centre, start), start + length - 1)


def _line(pixels: int, mirror: Tensor | None, device: torch.device) -> Tensor:
    """0 .. pixels - 1 as float32, backwards in the rows where `mirror` (B,) is true: (pixels,) or (B, pixels)."""
    place = torch.arange(pixels, dtype=torch.float32, device=device)
    return place if mirror is None else torch.where(mirror[:, None], pixels - 1 - place, place)


def _averaged(images: Tensor, boxes: Boxes, pixels: int, mirror: Tensor | None) -> Tensor:
    """`crop_resize` of any boxes, of which only what they hold is read."""
    count, _, height, width = images.shape
    device = images.device
    down = Triangles.of(boxes.top, boxes.height, height, pixels)
    across = Triangles.of(boxes.left, boxes.width, width, pixels, mirror)
    order = boxes.height.argsort()  # so that a chunk's products run over little more than its boxes
    tall, wide = torch.stack([boxes.height, boxes.width])[:, order].int().tolist()
    out = torch.empty(count, 3, pixels, pixels, device=device)
    source = images.flatten()
    for part in chunks(0, count, 3 * max(height, pixels) * max(width, pixels), device):
        row, tallest, widest = order[part], max(tall[part]), max(wide[part])
        top = boxes.top[row].long().clamp_(max=height - tallest)
        left = boxes.left[row].long().clamp_(max=width - widest)
        vertical, horizontal = down.weights(row, top, tallest), across.weights(row, left, widest)
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
