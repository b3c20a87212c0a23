"""SimCLR's augmentation: Chen et al. 2020, arXiv:2002.05709, appendix A: crop, flip, colour, blur."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from methods.base import Transform
from methods.views.batch import check_images
from methods.views.colour import jitter_exact_, jitter_linear_, random_jitter
from methods.views.crop import crop_resize, random_boxes
from methods.views.draws import Draws


def simclr_augment(
    pixels: int, *, jitter: float = 0.5, blur: bool = False, min_area: float = 0.08, flip: bool = True,
    colour: Literal["exact", "linear"] = "exact",
) -> Transform:  # fmt: skip
    """Random resized crop, flip with chance 0.5, colour jitter with 0.8, greyscale with 0.2, blur with 0.5.

    The blur comes before the colours, not after as in the paper: there it costs no pass of its own. Colour operations
    are almost linear, so this hardly shows: at 96 pixels, jitter 1, a blur of 1.5 pixels, by 0.0014 on average.

    Args:
        pixels: side of the result.
        jitter: colour strength s: brightness, contrast and saturation 0.8 s, hue 0.2 s; 0.5 for CIFAR, 1 for ImageNet.
        blur: Gaussian, standard deviation uniform in [0.1, 2] pixels, kernel 10 % of the side.
        min_area: smallest crop, fraction of the image.
        flip: off where a mirror image changes the meaning.
        colour: "exact" as torchvision's operations; "linear" as one matrix a sample, faster (`methods.views.colour`).
    Returns:
        A transform uint8 (B, 3, H, W) to float32 (B, 3, pixels, pixels) in [0, 1].
    """
    distort = {"exact": jitter_exact_, "linear": jitter_linear_}[colour]

    def augment(images: Tensor, draws: Draws) -> Tensor:
        check_images(images, draws)
        boxes = random_boxes(draws.fork(0), images.shape[2], images.shape[3], min_area=min_area)
        mirror = draws.fork(1).chance(0.5) if flip else None
        sigma = None
        if blur:
            unit = draws.fork(3).uniform(2)
            sigma = torch.where(unit[:, 0] < 0.5, 0.1 + 1.9 * unit[:, 1], 0)
        view = crop_resize(images, boxes, pixels, mirror=mirror, sigma=sigma)
        return distort(
            view, random_jitter(
                draws.fork(2), brightness=0.8 * jitter, contrast=0.8 * jitter, saturation=0.8 * jitter, hue=0.2 * jitter
            ),
        )  # fmt: skip

    return augment
