"""The strong augmentation of FixMatch with RandAugment: Sohn et al. 2020, arXiv:2001.07685, section 2.3, appendix D.

Unlike in Noisy Student's RandAugment (`methods.views.randaugment`) each sample has its own levels, and an operation is
left out half of the time. Each gives what torchvision's function of that name gives, value for value.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from methods.base import Transform
from methods.views.batch import check_images, constant, grouped, resize, to_float
from methods.views.crop import pad_crop
from methods.views.draws import Draws
from methods.views.randaugment import GEOMETRIC_OPS, GREY, cutout, move, moved, take_rows

VALUE_OPS = ("autocontrast", "equalize", "posterize", "solarize", "color", "contrast", "brightness", "sharpness")
OPS = ("identity", *VALUE_OPS, *GEOMETRIC_OPS)
LEVELS = 10  # full strength
_GROUPS = ("identity", *VALUE_OPS, "move")  # what runs together: all geometric operations are one gather


@dataclass(frozen=True, kw_only=True)
class StrongAugment:
    """Crop and flip, then operations at random levels, then cutout: all drawn anew, not those of the weak view.

    The defaults are those of the released code. Images of another size are first resized.
    """

    padding: int = 4  # pixels of reflected border before the crop: an eighth of 32
    flip: bool = True  # off where a mirror image changes the meaning, such as digits
    count: int = 2  # operations in a row, drawn with replacement
    ops: tuple[str, ...] = OPS  # which they are drawn from, such as only geometric ones for digits
    chance: float = 0.5  # of each drawn operation to be applied
    min_level: int = 1  # an operation's level is a whole number, uniform from this
    max_level: int = 9  # to this, of 10
    cutout: float = 0.5  # side of the grey square, fraction of the image's, as described; the code's 16 pixels, at 32
    fill: int = GREY  # grey level of what an operation leaves empty: 0 suits pictures on black

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding = {self.padding}: must be >= 0 pixels")
        if self.count < 0:
            raise ValueError(f"count = {self.count}: must be >= 0 operations; 0 leaves crop, flip and cutout")
        if not self.ops:
            raise ValueError(f"ops = {self.ops}: must name at least one of {', '.join(OPS)}")
        for op in self.ops:
            if op not in OPS:
                near = difflib.get_close_matches(op, OPS, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"ops = {op!r}: must be one of {', '.join(OPS)}{hint}")
        if not 0 <= self.chance <= 1:
            raise ValueError(f"chance = {self.chance}: must be in [0, 1]")
        if not 1 <= self.min_level <= self.max_level <= LEVELS:
            raise ValueError(
                f"min_level = {self.min_level}, max_level = {self.max_level}: must be 1 <= min <= max <= {LEVELS}"
            )
        if not 0 <= self.cutout <= 1:
            raise ValueError(f"cutout = {self.cutout}: must be in [0, 1], a fraction of the side; 0 is off")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill = {self.fill}: must be in [0, 255], a grey level")

    def build(self, pixels: int) -> Transform:
        """A transform uint8 (B, 3, H, W) to float32 (B, 3, pixels, pixels) in [0, 1]."""

        def augment(images: Tensor, draws: Draws) -> Tensor:
            check_images(images, draws)
            images = pad_crop(resize(images, pixels), draws.fork(0), padding=self.padding, flip=self.flip)
            random_operations_(
                images, draws.fork(1), count=self.count, ops=self.ops, chance=self.chance,
                levels=(self.min_level, self.max_level), fill=self.fill,
            )  # fmt: skip
            if self.cutout:
                images = cutout(images, draws.fork(2), side=round(self.cutout * pixels), fill=self.fill)
            return to_float(images)

        return augment


def random_operations_(
    images: Tensor, draws: Draws, *, count: int, ops: Sequence[str], chance: float, levels: tuple[int, int], fill: int
) -> Tensor:
    """`count` operations in a row, in place, each drawn uniformly from `ops`, with replacement, and applied by chance.

    Args:
        images: uint8 (B, 3, H, W), contiguous.
        levels: the least and the largest level, both of which are drawn; see `change_values` and `sources`.
        fill: grey level, 0 to 255, of what geometric operations leave empty.
    Returns:
        images.
    """
    device = images.device
    flat = images.view(len(images), -1)
    group = constant(tuple(_GROUPS.index("move" if op in GEOMETRIC_OPS else op) for op in ops), device)
    geometry = constant(tuple(GEOMETRIC_OPS.index(op) if op in GEOMETRIC_OPS else 0 for op in ops), device)
    highs = constant((len(ops), 2, levels[1] - levels[0] + 1), device)
    for layer in range(count):
        unit = draws.fork(layer).uniform(4)
        op, sign, level = (unit[:, :3].double() * highs).long().unbind(dim=1)
        level = level + levels[0]
        rows, bounds = grouped(torch.where(unit[:, 3] < chance, group[op], 0), len(_GROUPS))
        for name, (first, last) in zip(_GROUPS, itertools.pairwise(bounds), strict=True):
            if name == "identity" or first == last:
                continue
            row = rows[first:last]
            chosen = take_rows(images, row)
            if name == "move":
                table = sources(images.shape[2], images.shape[3], device)
                place = (2 * geometry[op[row]] + sign[row]) * (LEVELS + 1) + level[row]
                chosen = move(chosen, table.index_select(0, place).long(), fill)
            else:
                chosen = change_values(name, chosen, level[row])
            flat.index_copy_(0, row, chosen.flatten(1))
    return images


def change_values(op: str, images: Tensor, level: Tensor) -> Tensor:
    """One operation that is not geometric, on uint8 (B, 3, H, W), each row at its own level l, (B,) int64 in 0 .. 10.

    Posterize keeps 4 - int(0.4 l) bits; solarize inverts from 256 - int(25.6 l) up; color, contrast, brightness and
    sharpness have the factor 0.1 + 0.18 l, 1 at l = 5; autocontrast and equalize have no strength.
    """
    match op:
        case "autocontrast":
            return F.autocontrast(images)
        case "equalize":
            return F.equalize(images)
        case "posterize":
            return posterize(images, 4 - (0.4 * level.double()).long())
        case "solarize":
            return solarize(images, 256 - (25.6 * level.double()).long())
        case "color" | "contrast" | "brightness" | "sharpness":
            return enhance(op, images, 0.1 + 0.18 * level.double())
    raise ValueError(f"{op!r}: must be one of {', '.join(VALUE_OPS)}")


@lru_cache(maxsize=4)
def sources(height: int, width: int, device: torch.device) -> Tensor:
    """Where geometric operations read: rotate by 3 l degrees, shear by 0.03 l about the top left corner, translate
    by l pixels.

    Returns:
        (5 · 2 · 11, height · width) int32, of each operation, direction and level l in 0 .. 10, as of `moved`.
    """
    step = {"rotate": 3.0, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 1.0, "translate_y": 1.0}
    found = [
        moved(op, sign * step[op] * level, height, width)
        for op in GEOMETRIC_OPS for sign in (1, -1) for level in range(LEVELS + 1)
    ]  # fmt: skip
    return torch.stack(found).int().to(device)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The `bits` (B,) int64, 0 .. 8, most significant bits of each value of uint8 (B, 3, H, W)."""
    return images & (256 - (1 << (8 - bits))).to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) with the values from `threshold` (B,) int64, 0 .. 255, up inverted."""
    return torch.where(images >= threshold.to(torch.uint8)[:, None, None, None], 255 - images, images)


def enhance(op: str, images: Tensor, factor: Tensor) -> Tensor:
    """Color, contrast, brightness or sharpness of uint8 (B, 3, H, W) by a `factor` >= 0 for each, (B,) float64.

    0 is grey, one grey, black or smooth; 1 changes nothing; more exaggerates.
    """
    match op:
        case "color":
            return blend(images, F.rgb_to_grayscale(images), factor)
        case "contrast":
            grey = F.rgb_to_grayscale(images).to(torch.float32)
            return blend(images, grey.mean(dim=(1, 2, 3), keepdim=True), factor)
        case "brightness":
            return images.mul(factor.float()[:, None, None, None]).clamp_(0, 255).to(torch.uint8)
        case "sharpness":
            inner = images[..., 1:-1, 1:-1].to(torch.float32)
            changed = images.clone()
            changed[..., 1:-1, 1:-1] = _plus(inner, smooth(images) - inner, 1 - factor)
            return changed
    raise ValueError(f"{op!r}: must be color, contrast, brightness or sharpness")


def blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share · images + (1 - share) · other, cut off to whole values, as torchvision blends.

    Args:
        images: uint8 (B, 3, H, W). other: of a shape that expands to it.
        share: (B,) float64, may exceed 1.
    """
    return _plus(images.mul(share.float()[:, None, None, None]), other, 1 - share)


def _plus(values: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """values + factor · other, to uint8, with one rounding as torch's own fused `add(other, alpha)`, which takes no
    tensor: a product of float32 is exact in float64."""
    product = factor.float().double()[:, None, None, None] * other
    return product.add(values).float().clamp_(0, 255).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """The mean of 3 by 3 pixels, the middle one weighing 5: whole values, float32 (B, 3, H - 2, W - 2)."""
    pixels = images.to(torch.float32)
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    mean = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    # thirteenths are never halfway, so rounding errors cannot show
    return mean.add_(pixels[..., 1:-1, 1:-1], alpha=4).div_(13).round_()
