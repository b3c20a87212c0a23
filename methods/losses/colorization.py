"""Losses and targets of colorization: Zhang et al. 2016, arXiv:1603.08511, section 2.

Colours are (a, b) of CIE Lab. A mask (B,) leaves out whole images, those without colour: they count in no sum, so they
give exactly no gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from methods.precision import full_precision


def nearest_bins(colours: Tensor, bins: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The nearest bins of each colour, ties by the lower index.

    Args:
        colours: (B, 2, h, w). bins: (Q, 2).
    Returns:
        Squared distances and indices int64, both (B, count, h, w), nearest first.
    """
    a, b = bins.unbind(dim=1)
    distance = (colours[:, :1] - a[:, None, None]).square() + (colours[:, 1:] - b[:, None, None]).square()
    found = []
    for _ in range(count):  # a few minima cost half of sorting all bins, and unlike topk keep the order of equal ones
        nearest, index = distance.min(dim=1, keepdim=True)
        found.append((nearest, index))
        distance.scatter_(1, index, math.inf)
    return torch.cat([nearest for nearest, _ in found], dim=1), torch.cat([index for _, index in found], dim=1)


def soft_encode(colours: Tensor, bins: Tensor, *, neighbours: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The distribution over bins that stands for each colour, Z: a Gaussian over the nearest bins, 0 on all others.

    Args:
        colours: (B, 2, h, w). bins: (Q, 2). sigma: of the Gaussian, in units of a and b.
    Returns:
        Bin indices int64 and their weights, both (B, neighbours, h, w), the greatest weight first; weights sum to 1.
        Bins (0, 0), (10, 0), (0, 10), (10, 10), (-10, 0), (0, -10) with 5 neighbours and sigma 5 stand for (3, 1) with
        0.545655, 0.245178, 0.110166, 0.049501, 0, 0.049501.
    """
    distance, index = nearest_bins(colours, bins, count=neighbours)
    return index, (distance / (-2 * sigma**2)).softmax(dim=1)


def smooth_prior(counts: Tensor, bins: Tensor, *, sigma: float) -> Tensor:
    """How often each bin is met, p̃ (Q,): counts (Q,), spread over the plane by a Gaussian of sigma, normalised."""
    kernel = torch.exp((bins[:, None] - bins).square().sum(dim=2) / (-2 * sigma**2))
    spread = (kernel * counts.to(kernel.dtype)).sum(dim=1)
    return spread / spread.sum()


def rebalance(prior: Tensor, *, uniform: float) -> Tensor:
    """Weights of the bins, w (Q,), in inverse proportion to (1 - λ) p̃ + λ / Q, with Σ p̃ w = 1 (section 2.2).

    Args:
        prior: p̃ (Q,), sums to 1. uniform: λ in (0, 1]; 1 weighs all alike.
    Returns:
        (Q,): prior (0.7, 0.2, 0.1) and λ = 0.5 give (0.754170, 1.461204, 1.798405).
    """
    weight = 1 / ((1 - uniform) * prior + uniform / len(prior))
    return weight / (prior * weight).sum()


@full_precision
def annealed_mean(logits: Tensor, bins: Tensor, *, temperature: float) -> Tensor:
    """The colour of a distribution over bins: the mean of softmax(ln p / T), eq. 5.

    Args:
        logits: (B, Q, h, w). bins: (Q, D), D = 2 for (a, b). temperature: T > 0; 1 is the mean, towards 0 the mode.
    Returns:
        (B, D, h, w) float32: p = (0.6, 0.3, 0.1) over 0, 10, 20 gives 1.531918 at T = 0.38, and 5 at T = 1.
    """
    return einsum((logits / temperature).softmax(dim=1), bins, "b q h w, q d -> b d h w")


@full_precision
def colour_cross_entropy(
    logits: Tensor, index: Tensor, target: Tensor, *, weights: Tensor, mask: Tensor, counted: Tensor | None = None
) -> Tensor:
    """Cross-entropy of bins at each pixel, weighted by the nearest bin: mean of -w_q* Σ_q Z_q ln p_q, eq. 2.

    Args:
        logits: (B, Q, h, w). index, target: Z as `soft_encode` gives it, (B, k, h, w). weights: w (Q,).
        mask: (B,) bool, the images that count. counted: see `masked_mean`.
    Returns:
        0-d float32 in nats; equal logits with weights 1 give ln Q, and no image that counts gives 0. Logits (2, 0, 0)
        at two pixels of bins 0 and 2 give 1.239545 with weights 1, and 2.104133 with those of `rebalance`.
    """
    found = -(target * F.log_softmax(logits, dim=1).gather(1, index)).sum(dim=1)
    return masked_mean(weights[index[:, 0]] * found, mask, counted)


@full_precision
def colour_distance(
    predicted: Tensor, target: Tensor, *, mask: Tensor, huber: float | None = None, counted: Tensor | None = None
) -> Tensor:
    """Half the mean squared distance of colours, the regression that section 2 begins with (eq. 1).

    Args:
        predicted, target: (B, 2, h, w), in units of 110. mask: (B,) bool, the images that count.
        huber: where an error of a or b is beyond this, it costs linearly. None: squares throughout.
        counted: see `masked_mean`.
    Returns:
        0-d float32: an error of (0.3, 0.4) everywhere gives 0.125; with huber = 0.2, 0.04 + 0.06 = 0.1.
    """
    if huber is None:
        each = (predicted - target).square() / 2
    else:
        each = F.huber_loss(predicted, target, reduction="none", delta=huber)
    return masked_mean(each.sum(dim=1), mask, counted)


def masked_mean(values: Tensor, mask: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean of values (B, h, w) over the pixels of the images that count; 0 if none does.

    Args:
        mask: (B,) bool. counted: how many images to divide by; None is mask.sum(). Under data parallelism give the mean
            of that over the workers: the mean of their losses is then that of all images.
    """
    counted = mask.sum() if counted is None else counted
    of_images = torch.where(mask, values.mean(dim=(1, 2)), 0)
    return of_images.sum() / torch.where(counted > 0, counted, 1)
