"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as Noisy Student uses it (Xie et al. 2020, arXiv:1911.04252), and
cutout (DeVries and Taylor 2017, arXiv:1708.04552), on uint8, per sample.

Each operation gives what torchvision's function of that name gives, value for value. One magnitude serves the whole
batch, so samples are grouped by operation and sign, and a group runs with one set of constants: a value operation is a
few passes over bytes, a geometric one a gather through an index that is computed once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from methods.views.batch import constant, grouped
from methods.views.draws import Draws

VALUE_OPS = (
    "autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add",
    "color", "contrast", "brightness", "sharpness",
)  # fmt: skip
GEOMETRIC_OPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # each with a random sign
OPS = (*VALUE_OPS, *GEOMETRIC_OPS, "cutout")
GREY = 128  # what fills, by default, what an operation leaves empty


def rand_augment(
    images: Tensor, draws: Draws, *, magnitude: float, count: int = 2, ops: Sequence[str] = OPS, fill: int = GREY
) -> Tensor:
    """`count` operations in a row, each drawn uniformly from `ops`, with replacement, and always applied.

    Args:
        images: uint8 (B, 3, H, W).
        magnitude: M on a scale of 10, > 0, may exceed it. With m = M / 10: rotate ±30 m degrees; shear ±0.3 m about the
            top left corner; translate ±m / 8 of the side, the authors' 4 m pixels for 32 (for ImageNet they have 100 m
            of some 300 to 600); cutout half-side int(m / 8 · side); color, contrast, brightness, sharpness factor
            0.1 + 1.8 m; solarize_add int(110 m) below 128. Larger is weaker, as in the released code, for posterize,
            which keeps int(4 m) bits (none below M = 2.5: black), and solarize, which inverts from int(256 m) up.
        ops: names out of `OPS`.
        fill: grey level, 0 to 255, of what geometric operations and cutout leave empty.
    Returns:
        uint8 (B, 3, H, W).
    """
    level = magnitude / 10
    geometric = constant(tuple(op in GEOMETRIC_OPS for op in ops), images.device)
    sources = _sources(tuple(ops), level, images.shape[2], images.shape[3], images.device)
    for layer in range(count):
        layer_draws = draws.fork(layer)
        choice = layer_draws.integers(1, 2 * len(ops))[:, 0]  # twice the operation, plus 1 for the negative sign
        rows, bounds = grouped(torch.where(geometric[choice // 2], len(ops), choice // 2), len(ops) + 1)
        images = take_rows(images, rows)
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        changed = [
            change_values(op, images[part], level, layer_draws[rows[part]], fill)
            for op, part in zip(ops, parts, strict=False) if part.start < part.stop
        ]  # fmt: skip
        changed.append(move(images[parts[-1]], take_rows(sources, choice[rows[parts[-1]]]), fill))
        images = take_rows(torch.cat(changed), rows.argsort())
    return images


def change_values(op: str, images: Tensor, level: float, draws: Draws, fill: int = GREY) -> Tensor:
    """One operation that is not geometric, on uint8 (B, 3, H, W), at level m = M / 10; draws (B,) place a cutout."""
    blend = 0.1 + 1.8 * level
    match op:
        case "autocontrast":
            return F.autocontrast(images)
        case "equalize":
            return F.equalize(images)
        case "invert":
            return F.invert(images)
        case "posterize":
            return F.posterize(images, min(int(4 * level), 8))
        case "solarize":
            threshold = int(256 * level)
            return F.solarize(images, threshold) if threshold <= 255 else images
        case "solarize_add":
            addition = min(int(110 * level), 255)
            return torch.where(images < 128, images.clamp(max=255 - addition) + addition, images)
        case "color":
            return F.adjust_saturation(images, blend)
        case "contrast":
            return F.adjust_contrast(images, blend)
        case "brightness":
            return F.adjust_brightness(images, blend)
        case "sharpness":
            return adjust_sharpness(images, blend)
        case "cutout":
            return cutout(images, draws.fork(0), side=2 * int(level / 8 * min(images.shape[2:])), fill=fill)
    raise ValueError(f"{op!r}: must be one of {', '.join(VALUE_OPS)}, cutout")


def move(images: Tensor, source: Tensor, fill: int = GREY) -> Tensor:
    """Moves pixels: each is read from the place that `source` says, `fill` where that is outside.

    Args:
        images: uint8 (B, 3, H, W).
        source: (B, H · W) int64, as from `source_index`.
    Returns:
        uint8 (B, 3, H, W).
    """
    outside = torch.full((len(images), 3, 1), fill, dtype=torch.uint8, device=images.device)
    pixels = torch.cat([images.flatten(2), outside], dim=2)
    return pixels.gather(2, source[:, None].expand(-1, 3, -1)).view_as(images)


def source_index(op: str, level: float, height: int, width: int) -> Tensor:
    """Where a geometric operation reads each pixel, at level m = M / 10, negative for the other direction: see `moved`.

    Returns:
        (height · width,) int64.
    """
    full = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": width / 8, "translate_y": height / 8}
    return moved(op, full[op] * level, height, width)


def moved(op: str, amount: float, height: int, width: int) -> Tensor:
    """Where each pixel is read from, turned by `amount` degrees, sheared by it, or shifted by it in pixels.

    torchvision's own transform of an image of coordinates, by the nearest neighbour, hence exact.

    Returns:
        (height · width,) int64: row · width + column of the source, height · width where it is outside.
    """
    place = torch.stack(torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij"))
    fill, nearest = [float(height), 0.0], InterpolationMode.NEAREST
    if op == "rotate":
        pixels = F.rotate(place, amount, nearest, fill=fill)
    else:
        angle = math.degrees(math.atan(amount))
        translate, shear = {
            "shear_x": ([0.0, 0.0], [angle, 0.0]),
            "shear_y": ([0.0, 0.0], [0.0, angle]),
            "translate_x": ([amount, 0.0], [0.0, 0.0]),
            "translate_y": ([0.0, amount], [0.0, 0.0]),
        }[op]
        pixels = F.affine(place, 0.0, translate, 1.0, shear, nearest, fill=fill, center=[0.0, 0.0])
    row, column = pixels.to(torch.int64)
    return (row * width + column).flatten()


@lru_cache(maxsize=16)
def _sources(ops: tuple[str, ...], level: float, height: int, width: int, device: torch.device) -> Tensor:
    """(2 · operations, height · width) int64: sources of each operation in both directions, zeros where it has none."""
    sources = torch.zeros(2 * len(ops), height * width, dtype=torch.int64)
    for k, op in enumerate(ops):
        if op in GEOMETRIC_OPS:
            for sign in (0, 1):
                sources[2 * k + sign] = source_index(op, (-1) ** sign * level, height, width)
    return sources.to(device)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], several times faster."""
    return values.flatten(1).index_select(0, rows).unflatten(1, values.shape[1:])


def adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_sharpness`, with its 3 by 3 kernel as sums of shifted planes: several times faster.

    Args:
        images: uint8 (B, 3, H, W).
        factor: 0 smooths, 1 changes nothing, more sharpens. The outermost pixels stay as they are.
    Returns:
        uint8 (B, 3, H, W).
    """
    pixels = images.to(torch.float32)
    inner = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth.add_(inner, alpha=4).div_(13).round_()  # thirteenths are never halfway, so rounding errors cannot show
    inner.add_(smooth.sub_(inner), alpha=1 - factor)
    return pixels.clamp_(0, 255).to(torch.uint8)


def cutout(images: Tensor, draws: Draws, *, side: int | Tensor, fill: int = GREY) -> Tensor:
    """Paints a grey square around a random pixel; what falls outside the image is lost.

    Args:
        images: uint8 (B, 3, H, W).
        side: of the square, in pixels, of all or (B,) int64 of each: rows and columns centre - side // 2 ..
            centre - side // 2 + side - 1.
    Returns:
        uint8 (B, 3, H, W).
    """
    height, width = images.shape[2:]
    unit = draws.uniform(2)
    side = side[:, None] if isinstance(side, Tensor) else side
    covered = []
    for size, chance in ((height, unit[:, :1]), (width, unit[:, 1:])):
        first = (chance * size).floor_() - side // 2
        place = torch.arange(size, device=images.device)
        covered.append((place >= first) & (place < first + side))
    square = (covered[0][:, :, None] & covered[1][:, None])[:, None].to(torch.uint8)
    return (images & (square - 1)) | (square * fill)  # bytes at a time, unlike masked_fill: several times faster
