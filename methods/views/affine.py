"""Random affine maps: rotation, shift, scale and shear in one interpolation, as torchvision's `RandomAffine`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.views.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Affine:
    """How far each image is moved, drawn uniformly for each. Kind to small pictures: RandAugment's operations take the
    nearest pixel, which at 16 pixels tears strokes apart."""

    degrees: float = 15.0  # rotation within ± this
    translate: float = 0.1  # shift within ± this fraction of the side, each way
    scale: float = 0.15  # size within 1 ± this
    shear: float = 0.0  # degrees, within ± this, along x

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees = {self.degrees}: must be in [0, 180]")
        if not 0 <= self.translate < 1:
            raise ValueError(f"translate = {self.translate}: must be in [0, 1), a fraction of the side")
        if not 0 <= self.scale < 1:
            raise ValueError(f"scale = {self.scale}: must be in [0, 1), sizes are 1 ± scale")
        if not 0 <= self.shear < 90:
            raise ValueError(f"shear = {self.shear}: must be in [0, 90) degrees")


def random_affine(images: Tensor, draws: Draws, limits: Affine, *, fill: int) -> Tensor:
    """Each image by its own map.

    Args:
        images: uint8 (B, 3, H, W).
        fill: grey level of what comes from outside.
    Returns:
        uint8 (B, 3, H, W).
    """
    unit = draws.uniform(5) * 2 - 1
    radians = unit[:, :2] * torch.tensor([limits.degrees, limits.shear], device=unit.device) * (math.pi / 180)
    size = 1 + limits.scale * unit[:, 4]
    return affine(images, radians[:, 0], size, radians[:, 1], limits.translate * unit[:, 2:4], fill=fill)


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor, *, fill: int) -> Tensor:
    """Rotated by `angle` counter-clockwise, scaled, sheared along x and shifted, about the centre; bilinear.

    Args:
        images: uint8 (B, 3, H, W).
        angle, shear: (B,) radians. scale: (B,). shift: (B, 2), right and down, fractions of width and height.
    """
    height, width = images.shape[2:]
    sine, cosine = angle.sin(), angle.cos()
    # of the inverse map, output to source pixels: unshift, unrotate, unshear, unscale
    a, b, c, d = cosine, -sine, sine, cosine
    a, b = a + shear.tan() * c, b + shear.tan() * d
    down, across = shift[:, 1] * height, shift[:, 0] * width
    rows = [
        torch.stack([a, b * height / width, -(a * across + b * down) * 2 / width], dim=1),
        torch.stack([c * width / height, d, -(c * across + d * down) * 2 / height], dim=1),
    ]
    matrix = torch.stack(rows, dim=1) / scale[:, None, None]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float() - fill, grid, align_corners=False)  # outside is 0, which is the fill
    return (moved + fill).round_().clamp_(0, 255).to(torch.uint8)
