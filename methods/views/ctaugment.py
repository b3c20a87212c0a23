"""CTAugment, an augmentation that learns how strong it may be: Berthelot et al. 2019, arXiv:1911.09785, section 3.2.2.

The level of an operation is drawn from bins. A bin's weight follows how well the network's average still recognises
labelled images that were augmented at levels of that bin; bins below a threshold are not drawn. Operations and level
maps are those of the code released with FixMatch (Sohn et al. 2020, arXiv:2001.07685), with two departures: translation
is by a fraction of the side, where the code passes the fraction as pixels, and what is empty is grey, not black.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torchvision.transforms.v2.functional as F
from einops import rearrange
from torch import Tensor, nn

from methods.base import Transform
from methods.collectives import all_gather
from methods.precision import full_precision
from methods.views.batch import check_images, constant, grouped, resize, to_float
from methods.views.crop import pad_crop
from methods.views.draws import Draws
from methods.views.randaugment import GREY, cutout, move, take_rows
from methods.views.strong import blend, enhance, posterize, smooth, solarize

BINS = {  # of each parameter of an operation
    "autocontrast": (17,), "blur": (17,), "brightness": (17,), "color": (17,), "contrast": (17,), "cutout": (17,),
    "equalize": (17,), "invert": (17,), "identity": (), "posterize": (8,), "rescale": (17, 6), "rotate": (17,),
    "sharpness": (17,), "shear_x": (17,), "shear_y": (17,), "smooth": (17,), "solarize": (17,), "translate_x": (17,),
    "translate_y": (17,),
}  # fmt: skip
OPS = tuple(BINS)
PARAMETERS = 2  # the most that an operation has
FILTERS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest")  # of rescale, in the order of its bins
_SLOTS = tuple((*bins, *(0,) * (PARAMETERS - len(bins))) for bins in BINS.values())
_STARTS = tuple(itertools.accumulate((bins for slots in _SLOTS for bins in slots), initial=0))
TOTAL = _STARTS[-1]  # 303 weights: no slot's index, so that it stands for "no parameter"
_WIDEST = max(bins for slots in _SLOTS for bins in slots)
_PLACES = tuple(  # (38, 17): of each slot's bins among the weights
    tuple(start + k if k < bins else TOTAL for k in range(_WIDEST))
    for start, bins in zip(_STARTS, (bins for slots in _SLOTS for bins in slots), strict=False)
)


@dataclass(frozen=True, kw_only=True)
class CTAugmentConfig:
    """How CTAugment draws and learns."""

    depth: int = 2  # operations in a row, drawn with replacement; section 3.2.2
    decay: float = 0.99  # ρ, section 3.2.2
    threshold: float = 0.8  # θ, FixMatch's command; 0.85 in the class of the same code, 0.8 in ReMixMatch's paper
    padding: int = 4  # pixels of reflected border before the crop: an eighth of 32
    flip: bool = True  # off where a mirror image changes the meaning, such as digits
    cutout: float = 1.0  # level of the cutout that ends a strong view; 1 is half the side, 0 is off
    fill: int = GREY  # grey level of what an operation leaves empty: 0 suits pictures on black

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth = {self.depth}: must be >= 1 operation")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay}: must be in [0, 1)")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: must be in [0, 1], relative to the largest weight")
        if self.padding < 0:
            raise ValueError(f"padding = {self.padding}: must be >= 0 pixels")
        if not 0 <= self.cutout <= 1:
            raise ValueError(f"cutout = {self.cutout}: must be in [0, 1], a level; 0 is off")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill = {self.fill}: must be in [0, 255], a grey level")


class CTAugment(nn.Module):
    """The weights of all bins, the views that are drawn by them, and their update.

    A training step that has computed its loss makes a probe of its labelled images, asks the average for `match`, and
    gives both to `update` after the optimiser's step. The views of the next step are drawn by the new weights.
    """

    Config: ClassVar[type[CTAugmentConfig]] = CTAugmentConfig
    weights: Tensor

    def __init__(self, config: CTAugmentConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.ones(TOTAL))

    def strong(self, pixels: int) -> Transform:
        """A transform uint8 (B, 3, H, W) to float32 (B, 3, pixels, pixels) in [0, 1], by the weights of the moment."""
        c = self.config

        def augment(images: Tensor, draws: Draws) -> Tensor:
            check_images(images, draws)
            images = pad_crop(resize(images, pixels), draws.fork(0), padding=c.padding, flip=c.flip)
            policy = draws.fork(1)
            op = policy.integers(c.depth, len(OPS))
            unit = rearrange(policy.fork(0).uniform(2 * PARAMETERS * c.depth), "b (d p u) -> b d p u", d=c.depth, u=2)
            apply_policy_(images, op, self.levels(op, unit.double()), draws.fork(2), fill=c.fill)
            if c.cutout:
                side = int(cutout_side(torch.tensor(c.cutout, dtype=torch.float64), pixels))
                images = cutout(images, draws.fork(3), side=side, fill=c.fill)
            return to_float(images)

        return augment

    def probe(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images under operations at levels drawn uniformly, whatever the weights.

        Args:
            images: float (B, 3, H, W) in [0, 1], weakly augmented; rounded to whole values of 255.
        Returns:
            The probes, as the images; and a record for `update`, (B, depth · 2) int64, of the bins that were used.
        """
        c = self.config
        pixels = (images * 255).round().to(torch.uint8).contiguous()
        policy = draws.fork(1)
        op = policy.integers(c.depth, len(OPS))
        unit = rearrange(policy.fork(0).uniform(PARAMETERS * c.depth), "b (d p) -> b d p", d=c.depth)
        apply_policy_(pixels, op, unit.double(), draws.fork(2), fill=c.fill)
        return to_float(pixels).to(images.dtype), used_bins(op, unit)

    @torch.no_grad()
    def update(self, record: Tensor, match: Tensor) -> None:
        """m <- ρ m + (1 - ρ) ω for each bin of a probe, one image after the other in the order of the whole batch.

        Weights 1 with ω = 0.4, 0.4, 1 become 0.994, 0.98806, 0.988179. Several workers gather all their images first.

        Args:
            record: (B, depth · 2) of `probe`. match: ω (B,) in [0, 1], of `recognised`.
        """
        record, match = all_gather(record), all_gather(match)
        image, slot = (record < TOTAL).nonzero(as_tuple=True)
        bins, order = record[image, slot].sort(stable=True)
        share = (1 - self.config.decay) * match[image[order]].to(self.weights.dtype)
        visit = torch.arange(len(bins), device=bins.device) - torch.searchsorted(bins, bins)  # which of its bin's
        for number in range(int(visit.max()) + 1 if len(bins) else 0):
            now = visit == number  # no bin is among these twice
            self.weights[bins[now]] = self.config.decay * self.weights[bins[now]] + share[now]

    def rates(self) -> Tensor:
        """How likely each bin is drawn: (38, 17) float64, two rows an operation; zeros in those without a parameter.

        Weights (1, 0.9, 0.7, 0.85) give, with ρ = 0.99 and θ = 0.8, (0.363309, 0.327338, 0, 0.309353).
        """
        rest = 1 - self.config.decay
        padded = torch.cat([self.weights.double() + rest, self.weights.new_zeros(1, dtype=torch.float64)])
        places = constant(_PLACES, self.weights.device)
        kept = padded[places]
        kept = kept / kept.amax(dim=1, keepdim=True).clamp_min(rest)
        kept = kept.masked_fill(kept < self.config.threshold, 0)
        return kept / kept.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def levels(self, op: Tensor, unit: Tensor) -> Tensor:
        """Levels (..., 2) in [0, 1) of operations (...) int64, from float64 `unit` (..., 2, 2): for each parameter one
        number that chooses the bin and one that chooses the place in it."""
        cumulated = rearrange(self.rates(), "(o p) k -> o p k", p=PARAMETERS).cumsum(dim=2)[op]
        bins = constant(_SLOTS, op.device)[op].clamp_min(1)
        chosen = (cumulated <= unit[..., :1] * cumulated[..., -1:]).sum(dim=-1).minimum(bins - 1)
        return (chosen + unit[..., 1]) / bins


@full_precision
def recognised(probability: Tensor, label: Tensor) -> Tensor:
    """ω = 1 - ½ Σ_k |p_k - 1[k = y]| of distributions (B, K) and labels (B,): (0.7, 0.2, 0.1) with label 0 gives 0.7.

    The released code's; the paper has 1 / 2L in place of ½, for L labels.
    """
    wanted = nn.functional.one_hot(label, probability.shape[1])
    return 1 - (probability - wanted).abs().sum(dim=1) / 2


def used_bins(op: Tensor, level: Tensor) -> Tensor:
    """The bins int(0.999 v bins) of operations (B, depth) at levels v (B, depth, 2), as indices of all weights.

    Returns:
        (B, depth · 2) int64; `TOTAL` where an operation has no such parameter.
    """
    bins = constant(_SLOTS, op.device)[op]
    start = constant(_STARTS[:-1], op.device).view(-1, PARAMETERS)[op]
    index = start + (level.double() * bins * 0.999).long()
    return torch.where(bins > 0, index, TOTAL).flatten(1)


def apply_policy_(images: Tensor, op: Tensor, level: Tensor, draws: Draws, *, fill: int) -> Tensor:
    """Operations in a row, in place.

    Args:
        images: uint8 (B, 3, H, W), contiguous.
        op: (B, depth) int64, of `OPS`. level: (B, depth, 2) float64 in [0, 1].
    """
    flat = images.view(len(images), -1)
    for layer in range(op.shape[1]):
        rows, bounds = grouped(op[:, layer], len(OPS))
        place = draws.fork(layer)
        for name, (first, last) in zip(OPS, itertools.pairwise(bounds), strict=True):
            if first < last and name != "identity":
                row = rows[first:last]
                changed = apply(name, take_rows(images, row), level[row, layer], place[row], fill)
                flat.index_copy_(0, row, changed.flatten(1))
    return images


def apply(op: str, images: Tensor, level: Tensor, draws: Draws, fill: int = GREY) -> Tensor:
    """One operation on uint8 (B, 3, H, W), each row at its own levels.

    Args:
        level: (B, 2) float64 in [0, 1], v and of rescale the filter. autocontrast, blur, equalize, invert and smooth
            are mixed with the image, v of them; brightness, color, contrast, sharpness have the factor 0.1 + 1.9 v;
            cutout the side 1 + int(0.499 v side); posterize 1 + int(7.999 v) bits; rescale enlarges what is left
            without a margin of v / 4 on each side; rotate turns by (2 v - 1) 45 degrees to the left; shear by
            (2 v - 1) 0.3; solarize inverts from int(255.999 v) up; translate reads from (2 v - 1) 0.3 of the side away.
        draws: (B,), place a cutout.
    """
    v = level[:, 0]
    match op:
        case "identity":
            return images
        case "autocontrast" | "equalize" | "invert":
            return blend(getattr(F, op)(images), images, v)
        case "blur" | "smooth":
            return blend(_filtered(images, op), images, v)
        case "brightness" | "color" | "contrast" | "sharpness":
            return enhance(op, images, 0.1 + 1.9 * v)
        case "cutout":
            return cutout(images, draws.fork(0), side=cutout_side(v, min(images.shape[2:])), fill=fill)
        case "posterize":
            return posterize(images, 1 + (7.999 * v).long())
        case "solarize":
            return solarize(images, (255.999 * v).long())
        case "rescale":
            return rescale(images, v / 4, (level[:, 1] * len(FILTERS)).long().clamp_(max=len(FILTERS) - 1))
        case "rotate" | "shear_x" | "shear_y" | "translate_x" | "translate_y":
            return move(images, sources(op, 2 * v - 1, *images.shape[2:]), fill)
    raise ValueError(f"{op!r}: must be one of {', '.join(OPS)}")


def cutout_side(level: Tensor, pixels: int) -> Tensor:
    """1 + int(0.499 v side): 16 of 32 pixels at level 1."""
    return 1 + (0.499 * level * pixels).long()


def _filtered(images: Tensor, op: str) -> Tensor:
    """PIL's 3 by 3 SMOOTH or 5 by 5 BLUR, a ring of ones, of uint8 (B, 3, H, W); the border stays as it is."""
    changed = images.clone()
    if op == "smooth":
        changed[..., 1:-1, 1:-1] = smooth(images).to(torch.uint8)
    elif min(images.shape[2:]) >= 5:
        values = images.to(torch.int16)
        ring = _sums(values, 5) - _sums(values[..., 1:-1, 1:-1], 3)
        changed[..., 2:-2, 2:-2] = (ring + 8) >> 4
    return changed


def _sums(values: Tensor, side: int) -> Tensor:
    """Of the squares of `side` pixels in (B, 3, H, W): (B, 3, H - side + 1, W - side + 1)."""
    for axis in (2, 3):
        values = torch.stack([values.narrow(axis, k, values.shape[axis] - side + 1) for k in range(side)]).sum(
            dim=0, dtype=values.dtype
        )
    return values


def sources(op: str, amount: Tensor, height: int, width: int) -> Tensor:
    """Where each image's pixels are read from, by the nearest neighbour, as of `methods.views.randaugment.move`.

    Args:
        amount: (B,) float64 in [-1, 1]: of 45 degrees to the left about the centre, of a shear by 0.3 about the top
            left corner, of 0.3 of the side that the picture moves to the left or up.
    Returns:
        (B, height · width) int64.
    """
    down = torch.arange(height, device=amount.device, dtype=torch.float64)[:, None] + 0.5
    across = torch.arange(width, device=amount.device, dtype=torch.float64) + 0.5
    amount = amount[:, None, None]
    y, x = down.expand(height, width), across.expand(height, width)
    match op:
        case "rotate":
            sine, cosine = (amount * math.pi / 4).sin(), (amount * math.pi / 4).cos()
            from_centre = down - height / 2, across - width / 2
            y = sine * from_centre[1] + cosine * from_centre[0] + height / 2
            x = cosine * from_centre[1] - sine * from_centre[0] + width / 2
        case "shear_x":
            x = across + 0.3 * amount * down
        case "shear_y":
            y = down + 0.3 * amount * across
        case "translate_x":
            x = across + 0.3 * amount * width
        case "translate_y":
            y = down + 0.3 * amount * height
    row, column = y.floor(), x.floor()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, height * width).long().flatten(1)


def rescale(images: Tensor, margin: Tensor, which: Tensor) -> Tensor:
    """What is left of uint8 (B, 3, H, W) without a margin on each side, enlarged to the old size.

    Crop and filters as PIL's, to one grey level: whole pixels are cut off, and each pass, first along the rows, is
    rounded. Nearest neighbour is box, which it equals when enlarging.

    Args:
        margin: (B,) float64 in [0, 0.25], fraction of the side. which: (B,) int64, of `FILTERS`.
    """
    height, width = images.shape[2:]
    across = _filter_weights(margin, which, width)
    down = across if height == width else _filter_weights(margin, which, height)
    rows = torch.einsum("bchw,bvw->bchv", images.float(), across).add_(0.5).floor_().clamp_(0, 255)
    both = torch.einsum("buh,bchv->bcuv", down, rows).add_(0.5).floor_().clamp_(0, 255)
    return both.to(torch.uint8)


def _filter_weights(margin: Tensor, which: Tensor, size: int) -> Tensor:
    """(B, size, size) float32: the weight of each source pixel for each pixel of the result; rows sum to 1."""
    margin = margin[:, None, None]
    first, end = (margin * size).round(), (size - margin * size).round()
    place = torch.arange(size, device=margin.device, dtype=torch.float64)
    distance = place + 0.5 - first - (place[:, None] + 0.5) * (end - first) / size
    weights = torch.empty_like(distance)
    rows, bounds = grouped(which, len(FILTERS))
    for name, (begin, after) in zip(FILTERS, itertools.pairwise(bounds), strict=True):
        weights[rows[begin:after]] = _filter(name, distance[rows[begin:after]])
    weights = weights * ((place >= first) & (place < end))
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def _filter(name: str, distance: Tensor) -> Tensor:
    """The weight at a distance in pixels, before the weights are made to sum to 1."""
    t = distance.abs()
    match name:
        case "lanczos":
            return torch.sinc(t) * torch.sinc(t / 3) * (t < 3)
        case "bicubic":
            near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
            return torch.where(t < 1, near, far) * (t < 2)
        case "bilinear":
            return (1 - t).clamp_min(0)
        case "hamming":
            return torch.sinc(t) * (0.54 + 0.46 * (math.pi * t).cos()) * (t < 1)
        case _:
            return ((distance > -0.5) & (distance <= 0.5)).double()
