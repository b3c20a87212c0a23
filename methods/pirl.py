"""PIRL: Misra and van der Maaten 2019, arXiv:1912.01991. An image and its transform look alike, other images do not.

The transform is a jigsaw, a rotation or both. What both are compared with is a memory bank of images as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from methods.bank import BankContrast, Form, Negatives, check_contrast
from methods.base import Batch, Losses, Method, MethodConfig, Transform, View
from methods.encoders import Encoder
from methods.losses.nce import mean_cosine
from methods.precision import full_precision
from methods.views.batch import check_images
from methods.views.colour import jitter_exact_, jitter_linear_, random_jitter
from methods.views.crop import crop_resize, random_boxes
from methods.views.draws import Draws
from methods.views.simclr import simclr_augment
from methods.views.tiles import cut_tiles, turn

NEGATIVES, TURN, CUT, ORDER, COLOUR = range(5)  # streams of an image's draws


@dataclass(frozen=True, kw_only=True)
class PIRLConfig(MethodConfig):
    transform: Literal["jigsaw", "rotation", "both"] = "jigsaw"  # the paper's first; rotation: section 4.4
    composed: bool = False  # both as one view, turned and then cut; otherwise two views with a head each, averaged
    form: Form = "softmax_nce"  # eq. 4 and 5; the released code has constant_z
    weight: float = 0.5  # λ of the transformed view's loss; the image's own has 1 - λ, eq. 5
    temperature: float = 0.1  # τ; the paper's 0.07 is for 32,000 negatives
    negatives: Negatives = "shared"  # one set a batch; own, a set an image, is the paper's and slow (`BankContrast`)
    negative_count: int = 1024  # 32,000 in the paper; at most the other images
    momentum: float = 0.5  # share of the old row in the bank, section 3.2
    out_dim: int = 128  # section 3.2
    grid: int = 2  # cells a side; 3 in the paper, of images of 224 pixels
    cell: int = 16  # pixels, after scaling the view to grid x cell; 85 in the released code
    tile: int = 14  # pixels, at a random place of the cell: edges must not continue; 64 in the released code
    min_area: float = 0.08  # smallest crop of the image, and of the turned one, fraction; the released code
    puzzle_min_area: float = 0.3  # smallest crop that is cut into tiles; 0.6 in the released code
    jitter: float = 0.5  # colour strength: 0.4, 0.4, 0.4, hue 0.1 (0.2 in the released code), on each tile on its own
    flip: bool = True  # before cutting; off where a mirror image changes the meaning
    colour: Literal["exact", "linear"] = "exact"  # linear folds the jitter into one matrix: faster, without clamps

    def __post_init__(self) -> None:
        check_contrast(
            form=self.form, temperature=self.temperature, negatives=self.negatives, count=self.negative_count,
            momentum=self.momentum,
        )  # fmt: skip
        if self.transform not in ("jigsaw", "rotation", "both"):
            raise ValueError(f"transform = {self.transform}: must be jigsaw, rotation or both")
        if self.composed and self.transform != "both":
            raise ValueError(f"composed = true: composes jigsaw and rotation, but transform = {self.transform}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight = {self.weight}: must be in [0, 1], the transformed view's share of the loss")
        if self.out_dim < 1:
            raise ValueError(f"out_dim = {self.out_dim}: must be >= 1")
        if self.grid < 2:
            raise ValueError(f"grid = {self.grid}: must be >= 2, one tile is no puzzle")
        if not 1 <= self.tile <= self.cell:
            raise ValueError(f"tile = {self.tile}: must be in [1, cell = {self.cell}] pixels")
        for name in ("min_area", "puzzle_min_area"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in (0, 1]")
        if not 0 <= self.jitter <= 1.25:
            raise ValueError(f"jitter = {self.jitter}: must be in [0, 1.25]")


class PIRL(Method):
    """An encoder, a head f for images and one g a transform; their outputs are compared with the bank of f's."""

    Config = PIRLConfig
    clean_norm = True  # half of what batch norm sees are tiles or turned

    def __init__(self, encoder: Encoder, config: PIRLConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.image_head = nn.Linear(encoder.dim, config.out_dim)
        self.heads = nn.ModuleDict()
        if config.transform != "rotation":
            self.heads["jigsaw"] = TilesHead(encoder.dim, config.out_dim, config.grid**2)
        if config.transform == "rotation" or (config.transform == "both" and not config.composed):
            self.heads["rotation"] = nn.Linear(encoder.dim, config.out_dim)
        self.contrast = BankContrast(
            images, config.out_dim, form=config.form, temperature=config.temperature, negatives=config.negatives,
            count=config.negative_count, momentum=config.momentum,
        )  # fmt: skip

    def views(self, pixels: int) -> tuple[View, ...]:
        c = self.config
        augment = simclr_augment(pixels, jitter=c.jitter, min_area=c.min_area, flip=c.flip, colour=c.colour)
        transformed = {
            "jigsaw": random_crop(pixels, min_area=c.puzzle_min_area, flip=c.flip), "rotation": augment
        }  # fmt: skip
        return View("image", augment), *(View(name, transformed[name]) for name in self.heads)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        index, draws = batch["unlabelled.index"], Draws(batch["unlabelled.key"])
        whole = [batch["image"]]
        if "rotation" in self.heads:
            whole.append(turn(batch["rotation"], draws.fork(TURN).integers(1, 4)[:, 0]))
        features = self.encoder(torch.cat(whole)).split(len(index))  # one pass: batch norm sees both views
        image = self.image_head(features[0])
        transformed = {}
        if "jigsaw" in self.heads:
            transformed["jigsaw"] = self.heads["jigsaw"](self.encoder(self.tiles(batch["jigsaw"], draws)))
        if "rotation" in self.heads:
            transformed["rotation"] = self.heads["rotation"](features[1])
        losses = self.contrast(torch.stack([image, *transformed.values()]), index, draws.fork(NEGATIVES))
        self.contrast.remember(index, image)  # of images as they are only: they are what a transform should not change
        weight = self.config.weight
        return {
            "loss": (1 - weight) * losses[0] + weight * losses[1:].mean(), "image_loss": losses[0].detach(),
            **{f"{name}_loss": loss.detach() for name, loss in zip(transformed, losses[1:], strict=True)},
            "mean_cosine": mean_cosine(image),
        }  # fmt: skip

    @full_precision
    def tiles(self, images: Tensor, draws: Draws) -> Tensor:
        """Tiles (B · grid², 3, tile, tile) in [0, 1] of images (B, 3, H, W), an image's together, in random order."""
        c = self.config
        if c.composed:
            images = turn(images, draws.fork(TURN).integers(1, 4)[:, 0])
        side = (c.grid * c.cell, c.grid * c.cell)
        if images.shape[2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True).clamp(0, 1)
        tiles = cut_tiles(images, draws.fork(CUT), grid=c.grid, tile=c.tile)
        order = draws.fork(ORDER).permutation(c.grid**2)  # any order: nobody has to name it
        tiles = tiles.gather(1, order[:, :, None, None, None].expand_as(tiles)).flatten(0, 1)
        jitter = random_jitter(
            draws.fork(COLOUR).parts(c.grid**2), brightness=0.8 * c.jitter, contrast=0.8 * c.jitter,
            saturation=0.8 * c.jitter, hue=0.2 * c.jitter,
        )  # fmt: skip
        distort = {"exact": jitter_exact_, "linear": jitter_linear_}[c.colour]
        return distort(tiles.to(torch.float32, memory_format=torch.contiguous_format), jitter)

    def on_step_end(self, progress: float) -> None:
        self.contrast.update()

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


class TilesHead(nn.Module):
    """A linear map of each tile's feature, and one of all in a row (section 3.2): (B · tiles, dim) to (B, out)."""

    def __init__(self, dim: int, out: int, tiles: int) -> None:
        super().__init__()
        self.tiles = tiles
        self.each = nn.Linear(dim, out)
        self.all = nn.Linear(tiles * out, out)

    def forward(self, features: Tensor) -> Tensor:
        return self.all(rearrange(self.each(features), "(b t) d -> b (t d)", t=self.tiles))


def random_crop(pixels: int, *, min_area: float, flip: bool) -> Transform:
    """Random resized crop and flip with chance 0.5, colours as they are."""

    def view(images: Tensor, draws: Draws) -> Tensor:
        check_images(images, draws)
        boxes = random_boxes(draws.fork(0), images.shape[2], images.shape[3], min_area=min_area)
        return crop_resize(images, boxes, pixels, mirror=draws.fork(1).chance(0.5) if flip else None)

    return view
