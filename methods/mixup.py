"""MixUp, Zhang et al. 2017, arXiv:1710.09412, in MixMatch's form: Berthelot et al. 2019, arXiv:1905.02249, eq. 8 to 11.

Every image keeps the larger share of its mixture, so that a labelled image stays mostly itself and its loss its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.base import Batch
from methods.views.draws import Draws

MIX = 0  # what of an image's own draws is for mixing: a method's other draws are other forks
ORDER, COEFFICIENT = 0, 1  # what is drawn for a mixture
ATTEMPTS = 8  # each is accepted with a chance above 0.95, so that one row in 3e10 finds none


def pool_draws(batch: Batch, views: int) -> Draws:
    """The draws of a pool of the labelled images and `views` views of the unlabelled ones, one view after the other.

    All are different, though an image may be in both streams with one key.
    """
    labelled, unlabelled = (Draws(batch[f"{stream}.key"]).fork(MIX) for stream in ("labelled", "unlabelled"))
    return Draws(torch.cat([labelled.fork(0).key, *(unlabelled.fork(1 + view).key for view in range(views))]))


def mix_up(images: Tensor, target: Tensor, draws: Draws, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Each row mixed with a row of the same pool in random order, by a coefficient λ ~ Beta(α, α) of its own.

    The pool is this worker's: rows of other workers do not take part.

    Args:
        images: (N, C, H, W). target: distributions (N, K), mixed by the same coefficients.
        draws: of the N rows, all different.
    """
    order = draws.fork(ORDER).bits(1)[:, 0].argsort(stable=True)
    return blend(images, target, order=order, coefficient=beta(draws.fork(COEFFICIENT), alpha))


def blend(images: Tensor, target: Tensor, *, order: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """x' = λ' x + (1 - λ') x[order] and the same of the targets, with λ' = max(λ, 1 - λ), eq. 9.

    Args:
        order: (N,) int64, whom each row is mixed with. coefficient: λ, (N,) in [0, 1].
    Returns:
        Images and targets: 1 and 5 at λ = 0.3 are 0.7 · 1 + 0.3 · 5 = 2.2.
    """
    other = 1 - torch.maximum(coefficient, 1 - coefficient)
    mixed_images = torch.lerp(images, images[order], other.to(images.dtype)[:, None, None, None])
    return mixed_images, torch.lerp(target, target[order], other.to(target.dtype)[:, None])


def beta(draws: Draws, alpha: float) -> Tensor:
    """λ ~ Beta(α, α), (B,) float64 in [0, 1], for any α > 0: X / (X + Y) of two gamma variables.

    Computed from logarithms: at a small α both X and Y may be below the smallest number there is.
    """
    return torch.sigmoid(_log_gamma_variable(draws.fork(0), alpha) - _log_gamma_variable(draws.fork(1), alpha))


def _log_gamma_variable(draws: Draws, shape: float) -> Tensor:
    """ln X of X ~ Gamma(shape, 1), (B,) float64: Marsaglia and Tsang 2000, "A simple method for generating gamma
    variables", algorithm of section 2 at shape + 1, and its note that X_shape = X_(shape + 1) U^(1 / shape)."""
    d = shape + 2 / 3
    normal = draws.fork(0).normal(ATTEMPTS).double()
    uniform = 1 - draws.fork(1).uniform(ATTEMPTS + 1).double()  # in (0, 1]
    v = (1 + normal / (9 * d) ** 0.5) ** 3
    log_v = v.clamp_min(torch.finfo(v.dtype).tiny).log()
    accepted = (v > 0) & (uniform[:, :-1].log() < normal.square() / 2 + d * (1 - v + log_v))
    first = accepted.to(torch.int8).argmax(dim=1, keepdim=True)
    return math.log(d) + log_v.gather(1, first)[:, 0] + uniform[:, -1].log() / shape
