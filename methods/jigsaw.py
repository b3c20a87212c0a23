"""Jigsaw puzzles: Noroozi and Favaro 2016, arXiv:1603.09246. In which of P known orders are an image's tiles?

Jigsaw++: Noroozi et al. 2018, arXiv:1805.00385. The same with some tiles of another image among them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, PretextTask, View
from methods.encoders import Encoder
from methods.losses.cross_entropy import cross_entropy
from methods.permutations import Rule, permutation_set, separation
from methods.precision import full_precision
from methods.views.draws import Draws
from methods.views.policy import Augment
from methods.views.tiles import cut_tiles, greyscale, standardise, without_green_magenta

LABEL, CUT, CHANNELS, GREY, PROJECT, COUNT, SLOTS, OTHERS = range(8)  # streams of an image's draws


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(MethodConfig):
    # a flip: in noise, 2 x 2 tiles of 21 in cells of 24 are right in 25 % as they are, chance, in 43 % with 4 pixels of
    # reflected border, which shows the edge, in 66 % with crops enlarged from 0.6 of the area, which smear across gaps
    augment: Augment = Augment(padding=0)
    grid: int = 3  # cells a side; with 2 there are 24 orders
    cell: int = 16  # pixels, after scaling the image to grid x cell; 85 in the released code
    tile: int = 14  # pixels, at a random place of its cell; 64 in the released code
    gap: int = 0  # least pixels between tiles, 1 in the released code. On average cell - tile, here 2: from 32 to 48
    # pixels the interpolation repeats every 3, and only with 3 equally frequent places does it not tell the cell
    channel_shift: int = 0  # most pixels between a tile's colours; 2 in the released code, less than half of one here
    permutations: int = 30  # P; 1000 in the paper: harder is not better
    rule: Rule = "max-min"  # least distance 7 for 30; the published sets are max-avg, with least distance 2
    grey: float = 0.3  # chance of an image to lose its colours; 0.66 with a ResNet-50, 0.5 or 0.7 in jigsaw++
    projected: float = 0.0  # chance of a coloured one to lose green-magenta; 0.5 in jigsaw++'s code
    tile_dim: int = 64  # numbers a tile has in the head; 512 in the paper's figure, 1024 in its code
    hidden: int = 256  # between all tiles and the answer; 4096 in the paper
    max_occluded: int = 0  # most tiles of another image; 0 is jigsaw

    def __post_init__(self) -> None:
        if self.grid not in (2, 3):
            raise ValueError(f"grid = {self.grid}: must be 2 or 3, of 16 tiles no set of orders can be searched")
        if self.tile < 1 or self.gap < 0 or self.channel_shift < 0:
            raise ValueError(
                f"tile = {self.tile}, gap = {self.gap}, channel_shift = {self.channel_shift}: "
                "must be at least 1, 0 and 0 pixels"
            )
        if self.tile + self.gap + self.channel_shift > self.cell:
            raise ValueError(
                f"tile + gap + channel_shift = {self.tile + self.gap + self.channel_shift}: "
                f"must be <= cell = {self.cell} pixels"
            )
        tiles = self.grid**2
        if not 2 <= self.permutations <= math.factorial(tiles):
            raise ValueError(f"permutations = {self.permutations}: must be in [2, {math.factorial(tiles)}]")
        if self.rule not in ("max-avg", "max-min"):
            raise ValueError(f"rule = {self.rule}: must be max-avg or max-min")
        for name in ("grey", "projected"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1], a chance")
        for name in ("tile_dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be >= 1")
        if self.max_occluded < 0:
            raise ValueError(f"max_occluded = {self.max_occluded}: must be >= 0")
        if self.max_occluded:
            _, least = separation(permutation_set(tiles, self.permutations, self.rule))
            if least <= self.max_occluded:
                raise ValueError(
                    f"max_occluded = {self.max_occluded}: must be < {least}, the least distance of the "
                    f"{self.permutations} permutations ({self.rule}), or two of them look alike"
                )


@dataclass(frozen=True, kw_only=True)
class JigsawPlusConfig(JigsawConfig):
    max_occluded: int = 2  # the released code; 3 in the paper


class JigsawTask(PretextTask):
    """Tiles meet only after the encoder: a layer for each, then two for all in a row.

    `permutations` (P, tiles) is the set: the tile in slot s of puzzle p is tile permutations[p, s].
    """

    permutations: Tensor

    def __init__(self, encoder: Encoder, config: JigsawConfig) -> None:
        super().__init__()
        self.config = config
        self.chance_loss = math.log(config.permutations)
        tiles = config.grid**2
        self.register_buffer("permutations", torch.tensor(permutation_set(tiles, config.permutations, config.rule)))
        self.each = nn.Sequential(nn.Linear(encoder.dim, config.tile_dim), nn.ReLU())
        self.all = nn.Sequential(
            nn.Linear(tiles * config.tile_dim, config.hidden), nn.ReLU(),
            nn.Linear(config.hidden, config.permutations),
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """sha256 of the set, to be recorded: labels mean something only together with it."""
        return hashlib.sha256(bytes(self.permutations.flatten().tolist())).hexdigest()

    def forward(self, encoder: Encoder, images: Tensor, draws: Draws) -> Losses:
        """As `PretextTask.forward`, images only with others if tiles are occluded; also "jigsaw_accuracy", a fraction.

        Raises:
            ValueError: tiles are to be occluded, and the batch has no other image to take them from.
        """
        tiles, label = self.puzzle(images, draws)
        logits = self.logits(encoder, tiles)
        accuracy = (logits.argmax(dim=1) == label).float().mean()
        return {"loss": cross_entropy(logits, label), "jigsaw_accuracy": accuracy}

    def logits(self, encoder: Encoder, tiles: Tensor) -> Tensor:
        """(B, P) of tiles (B, grid², 3, tile, tile) as `puzzle` gives them."""
        features = self.each(encoder(tiles.flatten(0, 1), normalised=True))
        return self.all(rearrange(features, "(b t) d -> b (t d)", t=tiles.shape[1]))

    @full_precision
    def puzzle(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Puzzles and answers of images (B, 3, H, W).

        Returns:
            Tiles (B, grid², 3, tile, tile), slot by slot, with mean 0 and deviation 1 each: the image's light would
            tell where they are from. And the permutation each image was put in, (B,) int64.
        """
        c = self.config
        label = draws.fork(LABEL).integers(1, len(self.permutations))[:, 0]
        own = self.cut(images, draws)
        tiles = shuffle(own, self.permutations[label])
        if c.max_occluded:
            if len(images) < 2:
                raise ValueError("a batch of 1 image: jigsaw++ takes tiles from another image, it needs at least 2")
            tiles, _ = occlude(tiles, own.roll(-1, dims=0), draws, most=c.max_occluded)
        # after occluding, as the image decides: strangers of another colour would be seen at once
        number = tiles.shape[1]
        grey = draws.fork(GREY).chance(c.grey).repeat_interleave(number)
        projected = draws.fork(PROJECT).chance(c.projected).repeat_interleave(number)
        tiles = greyscale(without_green_magenta(tiles.flatten(0, 1), projected & ~grey), grey)
        return standardise(tiles).unflatten(0, (-1, number)), label

    def cut(self, images: Tensor, draws: Draws) -> Tensor:
        """Tiles (B, grid², 3, tile, tile) of images (B, 3, H, W), cells row by row."""
        c = self.config
        side = (c.grid * c.cell, c.grid * c.cell)
        if images.shape[2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True).clamp(0, 1)
        tiles = cut_tiles(images, draws.fork(CUT), grid=c.grid, tile=c.tile + c.channel_shift, gap=c.gap)
        if not c.channel_shift:
            return tiles
        # colours that a lens has parted would tell where a tile is from; a shift of each hides it
        channels = rearrange(tiles, "b t c h w -> (b t c) 1 h w")
        shifted = cut_tiles(channels, draws.fork(CHANNELS).parts(3 * tiles.shape[1]), grid=1, tile=c.tile)
        return rearrange(shifted, "(b t c) 1 1 h w -> b t c h w", t=tiles.shape[1], c=3)


def shuffle(tiles: Tensor, order: Tensor) -> Tensor:
    """Slot s of (B, T, C, h, w) filled with tile order[s], of an order (B, T) for each; order.argsort() undoes it."""
    return tiles.gather(1, order[:, :, None, None, None].expand_as(tiles))


def occlude(tiles: Tensor, others: Tensor, draws: Draws, *, most: int) -> tuple[Tensor, Tensor]:
    """Some slots filled with tiles of another image, drawn from `draws`.

    Args:
        tiles, others: (B, T, C, h, w), of an image and of another one. most: n, in 0 .. T.
    Returns:
        Tiles (B, T, C, h, w) of which 0 .. n, each number equally often, are different tiles of the other image, and
        which slots these are, (B, T) bool.
    """
    number = tiles.shape[1]
    count = draws.fork(COUNT).integers(1, most + 1)
    occluded = draws.fork(SLOTS).permutation(number) < count
    strangers = shuffle(others, draws.fork(OTHERS).permutation(number))
    return torch.where(occluded[:, :, None, None, None], strangers, tiles), occluded


class Jigsaw(Method):
    """An encoder of tiles, trained to tell their order. Its end is made for puzzles, what precedes it transfers."""

    Config = JigsawConfig
    clean_norm = True  # trains on tiles

    def __init__(self, encoder: Encoder, config: JigsawConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = JigsawTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


class JigsawPlus(Method):
    """Jigsaw with tiles of the next image of the batch among an image's own, so that two tiles do not give it away."""

    Config = JigsawPlusConfig
    needs_distinct = True  # an image's own tiles are no strangers
    clean_norm = True  # trains on tiles

    def __init__(self, encoder: Encoder, config: JigsawPlusConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.task = JigsawTask(encoder, config)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("image", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        return self.task(self.encoder, batch["image"], Draws(batch["unlabelled.key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)
