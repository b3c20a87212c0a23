"""Relative patch position: Doersch et al. 2015, arXiv:1505.05192. Where is one patch of an image, seen from another?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.encoders import Encoder
from methods.losses.cross_entropy import cross_entropy
from methods.precision import full_precision
from methods.views.batch import constant
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import greyscale, without_green_magenta

ORIGIN, JITTER, COARSE, KEEP, NOISE, FIRST = range(6)  # streams of an image's draws
NOISE_LEVEL = 0.5 / 255  # uniform within one grey level, the released code


@dataclass(frozen=True, kw_only=True)
class RelativePatchConfig(MethodConfig):
    augment: Augment = Augment(
        padding=0
    )  # a flip: the grid's place is the crop, and reflected borders would tell edges
    side: int = 96  # pixels the image is scaled to, 3 x 32; the paper scales to 150,000 to 450,000 pixels
    grid: int = 3  # patches a side
    patch: int = 20  # pixels; 96 in the paper. 24 would leave no room to move the grid
    gap: int = 10  # pixels between patches, half of one; 48 in the paper. patch + gap is a multiple of the enlargement,
    # 3 for 32 pixels, so that the interpolation, which repeats with it, does not tell the place
    jitter: int = 2  # most pixels a patch is off its place, each on its own and along each axis; 7 in the paper
    colour: Literal["drop", "project", "grey", "keep"] = "drop"  # keep lets lenses' colour fringes tell the place
    coarse: float = 1 / 3  # chance of a patch to be shrunk and enlarged again, the released code
    coarsest: int = 2  # least pixels it is shrunk to, 10 of 96 in the released code
    scale: float = 1.0  # root mean square of a patch; 50 in the released code, whose network knows pixels to 255
    both_orders: bool = True  # of each pair; otherwise one of them, drawn
    hidden: int = 256  # between two patches and the answer; 4096 twice in the paper

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise ValueError(f"grid = {self.grid}: must be >= 2, one patch has no neighbours")
        if self.patch < 2 or self.jitter < 0:
            raise ValueError(f"patch = {self.patch}, jitter = {self.jitter}: must be >= 2 and >= 0 pixels")
        if self.gap < 2 * self.jitter:
            raise ValueError(f"gap = {self.gap}: must be >= 2 x jitter = {2 * self.jitter}, or patches may overlap")
        if self.span > self.side:
            raise ValueError(f"side = {self.side}: must be >= {self.span} pixels, what the patches and jitter span")
        if self.colour not in ("drop", "project", "grey", "keep"):
            raise ValueError(f"colour = {self.colour}: must be drop, project, grey or keep")
        if not 0 <= self.coarse <= 1:
            raise ValueError(f"coarse = {self.coarse}: must be in [0, 1], a chance")
        if not 1 <= self.coarsest < self.patch:
            raise ValueError(f"coarsest = {self.coarsest}: must be in [1, patch = {self.patch}) pixels")
        if not self.scale > 0:
            raise ValueError(f"scale = {self.scale}: must be > 0")
        if self.hidden < 1:
            raise ValueError(f"hidden = {self.hidden}: must be >= 1")

    @property
    def span(self) -> int:
        """Pixels from the first patch's first place to the last one's last."""
        return self.grid * self.patch + (self.grid - 1) * self.gap + 2 * self.jitter


class RelativePatchTask(PretextTask):
    """Two layers on the features of two patches, which meet only there: earlier, pixels could be compared.

    Straight neighbours are more than diagonal ones: always naming one of them is right in 15 % of a 3 by 3 grid.
    """

    chance_loss = math.log(8)

    def __init__(self, encoder: Encoder, config: RelativePatchConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Sequential(nn.Linear(2 * encoder.dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 8))

    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """As `PretextTask.forward`, the mean over all pairs; also "position_accuracy", a fraction."""
        patches = self.patches(images, draws)
        features = encoder(patches.flatten(0, 1), normalised=True).unflatten(0, patches.shape[:2])
        first, second, label = self.pairs(draws)
        row = torch.arange(len(images), device=images.device)[:, None]
        logits = self.head(torch.cat([features[row, first], features[row, second]], dim=2)).flatten(0, 1)
        label = label.flatten()
        accuracy = (logits.argmax(dim=1) == label).float().mean()
        return {"loss": cross_entropy(logits, label), "position_accuracy": accuracy}

    def pairs(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """First and second patch and the answer of every pair of neighbours, (B, pairs) int64 each."""
        table = constant(neighbours(self.config.grid, self.config.grid), draws.key.device)
        if self.config.both_orders:
            first, second, label = table.T[:, None].expand(-1, len(draws), -1)
            return first, second, label
        forward = table[table[:, 2] > 3]  # each pair once
        backward = torch.stack([forward[:, 1], forward[:, 0], 7 - forward[:, 2]], dim=1)
        turned = draws.fork(FIRST).uniform(len(forward)) < 0.5
        first, second, label = torch.where(turned[:, :, None], backward, forward).unbind(dim=2)
        return first, second, label

    @full_precision
    def patches(self, images: Tensor, draws: Draws) -> Tensor:
        """Patches (B, grid², 3, patch, patch) of images (B, 3, H, W), row by row, ready for the encoder."""
        c = self.config
        if images.shape[2:] != (c.side, c.side):
            images = F.interpolate(images, (c.side, c.side), mode="bilinear", antialias=True).clamp(0, 1)
        patches = cut_patches(images, self.corners(draws), patch=c.patch).flatten(0, 1)
        parts = draws.parts(c.grid**2)
        if c.coarse:  # before the colours, unlike the paper: the noise then stays as it is and the mean exactly 0
            patches = coarsened(patches, parts.fork(COARSE), chance=c.coarse, least=c.coarsest)
        if c.colour == "drop":
            patches = keep_channel(patches, parts.fork(KEEP).integers(1, 3)[:, 0], parts.fork(NOISE))
        else:
            every = torch.ones(len(patches), dtype=torch.bool, device=patches.device)
            treat = {"project": without_green_magenta, "grey": greyscale}.get(c.colour)
            patches = patches if treat is None else treat(patches, every)
            patches = patches - patches.mean(dim=(1, 2, 3), keepdim=True)
        return (c.scale * unit_power(patches)).unflatten(0, (-1, c.grid**2))

    def corners(self, draws: Draws) -> Tensor:
        """First row and first column of each patch, (B, grid², 2) int64: a grid at a random place, jittered."""
        c = self.config
        origin = draws.fork(ORIGIN).integers(2, c.side - c.span + 1)
        jitter = draws.fork(JITTER).integers(2 * c.grid**2, 2 * c.jitter + 1).unflatten(1, (-1, 2))
        step = (c.patch + c.gap) * torch.arange(c.grid, device=draws.key.device)
        return origin[:, None] + torch.cartesian_prod(step, step) + jitter


class RelativePatch(Method):
    """An encoder of patches, trained to tell in which of 8 directions one lies from another."""

    Config = RelativePatchConfig
    clean_norm = True  # trains on patches

    def __init__(self, encoder: Encoder, config: RelativePatchConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = RelativePatchTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def neighbours(height: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """Ordered pairs of neighbours, diagonal ones too, in a grid: (first, second, where the second is), row by row.

    Directions 0 .. 7 go row by row around the first, 0 up left, 1 up, 7 down right; the reverse of d is 7 - d. A grid
    of 3 by 3 has 40 pairs, one of h by w 2 [w(h-1) + h(w-1) + 2(h-1)(w-1)].
    """
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    return tuple(
        (y * width + x, (y + dy) * width + x + dx, label)
        for y in range(height)
        for x in range(width)
        for label, (dy, dx) in enumerate(around)
        if 0 <= y + dy < height and 0 <= x + dx < width
    )


def cut_patches(images: Tensor, corners: Tensor, *, patch: int) -> Tensor:
    """Patches (B, N, C, patch, patch) of images (B, C, H, W) at corners (B, N, 2), first row and first column."""
    place = corners[..., None] + torch.arange(patch, device=images.device)
    index = place[:, :, 0, :, None] * images.shape[3] + place[:, :, 1, None, :]
    picked = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return rearrange(picked, "b c (n h w) -> b n c h w", h=patch, w=patch)


def coarsened(patches: Tensor, draws: Draws, *, chance: float, least: int) -> Tensor:
    """Some patches (N, C, h, h) shrunk to a side drawn from least .. h - 1, and enlarged again."""
    which = draws.fork(0).chance(chance)
    table = _through(patches.shape[2], least, patches.device)
    matrix = table[draws.fork(1).integers(1, len(table))[:, 0]].to(patches.dtype)
    blurred = matrix[:, None] @ patches @ matrix.mT[:, None]
    return torch.where(which[:, None, None, None], blurred, patches)


@lru_cache(maxsize=16)
def _through(side: int, least: int, device: torch.device) -> Tensor:
    """What shrinking to each of least .. side - 1 pixels and enlarging again does to an axis: (sides, side, side)."""
    axis = torch.eye(side, device=device)[None, None]
    down = (F.interpolate(axis, (s, side), mode="bilinear", antialias=True) for s in range(least, side))
    return torch.cat([F.interpolate(small, (side, side), mode="bilinear") for small in down])[:, 0]


def keep_channel(patches: Tensor, channel: Tensor, draws: Draws) -> Tensor:
    """Patches (N, 3, h, w) with the `channel` (N,), less its mean, and weak noise in place of the two others."""
    noise = draws.uniform(patches[0].numel(), -NOISE_LEVEL, NOISE_LEVEL).view_as(patches)
    kept = torch.arange(3, device=patches.device) == channel[:, None]
    return torch.where(kept[:, :, None, None], patches - patches.mean(dim=(2, 3), keepdim=True), noise)


def unit_power(patches: Tensor, *, floor: float = 1e-4) -> Tensor:
    """Patches (N, C, h, w) with root mean square 1; what is below `floor`, less than the noise has, counts as it."""
    return patches / patches.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=floor)
