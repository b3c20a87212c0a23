"""The augmentation that a recipe writes down for supervised and noisy-student training, and the view for evaluation."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from torch import Tensor

from methods.base import Transform
from methods.views.affine import Affine, random_affine
from methods.views.batch import check_images, resize, to_float
from methods.views.crop import crop_resize, pad_crop, random_boxes
from methods.views.draws import Draws
from methods.views.randaugment import GREY, OPS, cutout, rand_augment


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Affine map, RandAugment, cutout, crop, flip, in this order, as in Noisy Student's released code for 32 pixels.

    The defaults are those of He et al. 2015, arXiv:1512.03385, section 4.2. Images of another size are first resized.
    """

    padding: int = 4  # pixels of reflected border before the crop
    min_area: float = 1.0  # below 1: a random resized crop of at least this fraction, Szegedy et al. 2014, not padded
    flip: bool = True  # off where a mirror image changes the meaning, such as digits
    affine: Affine | None = None  # rotation, shift and scale within limits, for small pictures
    randaugment: float = 0.0  # magnitude M on a scale of 10, may exceed it; 0 is off
    randaugment_ops: int = 2  # operations in a row, N
    ops: tuple[str, ...] = OPS  # which RandAugment draws from, such as only geometric ones for digits
    fill: int = GREY  # grey level of what an operation leaves empty: 0 suits pictures on black
    cutout: float = 0.0  # side of the grey square, fraction of the image's; 0 is off, 0.5 in the released code

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding = {self.padding}: must be >= 0 pixels")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area = {self.min_area}: must be in (0, 1], 1 is off")
        if not (math.isfinite(self.randaugment) and self.randaugment >= 0):
            raise ValueError(f"randaugment = {self.randaugment}: must be a magnitude >= 0, 10 is full scale, 0 is off")
        if self.randaugment_ops < 1:
            raise ValueError(f"randaugment_ops = {self.randaugment_ops}: must be >= 1; randaugment = 0 turns it off")
        if not self.ops:
            raise ValueError(f"ops = {self.ops}: must name at least one of {', '.join(OPS)}")
        for op in self.ops:
            if op not in OPS:
                near = difflib.get_close_matches(op, OPS, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"ops = {op!r}: must be one of {', '.join(OPS)}{hint}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill = {self.fill}: must be in [0, 255], a grey level")
        if not 0 <= self.cutout <= 1:
            raise ValueError(f"cutout = {self.cutout}: must be in [0, 1], a fraction of the side")

    def build(self, pixels: int) -> Transform:
        """A transform uint8 (B, 3, H, W) to float32 (B, 3, pixels, pixels) in [0, 1]."""

        def augment(images: Tensor, draws: Draws) -> Tensor:
            check_images(images, draws)
            images = resize(images, pixels)
            if self.affine is not None:
                images = random_affine(images, draws.fork(4), self.affine, fill=self.fill)
            if self.randaugment:
                images = rand_augment(
                    images,
                    draws.fork(0),
                    magnitude=self.randaugment,
                    count=self.randaugment_ops,
                    ops=self.ops,
                    fill=self.fill,
                )
            if self.cutout:
                images = cutout(images, draws.fork(1), side=round(self.cutout * pixels), fill=self.fill)
            if self.min_area < 1:
                boxes = random_boxes(draws.fork(2), pixels, pixels, min_area=self.min_area)
                return crop_resize(images, boxes, pixels, mirror=draws.fork(3).chance(0.5) if self.flip else None)
            if self.padding or self.flip:
                images = pad_crop(images, draws.fork(2), padding=self.padding, flip=self.flip)
            return to_float(images)

        return augment


def evaluate(pixels: int) -> Transform:
    """The view without noise: uint8 (B, 3, H, W) to float32 (B, 3, pixels, pixels) in [0, 1], resized if need be."""

    def view(images: Tensor, draws: Draws) -> Tensor:
        check_images(images, draws)
        return to_float(resize(images, pixels))

    return view
