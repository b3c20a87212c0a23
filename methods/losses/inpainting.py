"""Losses of context encoders: Pathak et al. 2016, arXiv:1604.07379, section 3.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.precision import full_precision


@full_precision
def masked_l2(predicted: Tensor, images: Tensor, weight: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Mean over the predicted pixels of ω times the squared error, eq. 1.

    Args:
        predicted, images: (B, C, h, w). The squared error of a pixel is the mean over its C channels, as released.
        weight: ω >= 0, (B, 1, h, w) or (1, 1, h, w): 0 where nothing is predicted, and such pixels do not count.
        counted: by how many pixels to divide; None is how many are predicted. Under data parallelism give the mean of
            that over the workers: the mean of their losses is then that of all images.
    Returns:
        0-d float32, in squared units of the images. An error of 1 everywhere on 16 by 16 pixels, with ω = 10 on a
        border of 1 and 1 inside, gives (10 · 60 + 196) / 256 = 3.109375.
    """
    error = (predicted - images).square().mean(dim=1, keepdim=True)
    weight = weight.expand_as(error)
    counted = (weight > 0).sum().clamp(min=1) if counted is None else counted
    return (weight * error).sum() / counted


@full_precision
def fooling_loss(fake: Tensor) -> Tensor:
    """What the generator pays: mean of -ln D(fake), the non-saturating form of eq. 2.

    Args:
        fake: the discriminator's logits (B,) of generated images.
    Returns:
        0-d float32 in nats: D = 0.3 gives 1.203973, equal odds ln 2.
    """
    return F.softplus(-fake).mean()


@full_precision
def telling_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator pays: mean of -ln D(real) - ln(1 - D(fake)).

    Args:
        real, fake: its logits (B,).
    Returns:
        0-d float32 in nats: D = 0.8 and 0.3 give 0.579818, equal odds 2 ln 2.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def overlap_weight(side: int, *, overlap: int, strength: float, device: torch.device | None = None) -> Tensor:
    """ω of a square prediction that reaches over its hole's edge: `strength` on the border, 1 in the hole.

    Args:
        side: of the prediction, in pixels. overlap: width of the border, less than half of that.
    Returns:
        (1, 1, side, side) float32; its mean is 3.109375 for 64 pixels, a border of 4 and strength 10.
    Raises:
        ValueError: the border leaves no hole.
    """
    if not 0 <= 2 * overlap < side:
        raise ValueError(f"overlap = {overlap}: must leave a hole in a prediction of {side} x {side} pixels")
    weight = torch.full((1, 1, side, side), float(strength), device=device)
    weight[..., overlap : side - overlap, overlap : side - overlap] = 1
    return weight
