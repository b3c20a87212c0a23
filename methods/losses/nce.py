"""Noise-contrastive losses: pick the right candidate among many.

InfoNCE: van den Oord et al. 2018, arXiv:1807.03748, eq. 4. Softmax NCE: Misra and van der Maaten 2019 (PIRL),
arXiv:1912.01991, eq. 4. NCE with a constant normaliser: Wu et al. 2018, arXiv:1805.01978, eq. 4 to 8.

All read scores (A, C), similarities divided by the temperature: a row an anchor, a column a candidate. `positive` (A,)
int64 is the column of each anchor's own candidate, all others are its negatives; -inf marks what is no candidate. Each
anchor needs a negative. The values below are of similarities 0.6 (the positive), 0.8, 0.28, -0.6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.precision import full_precision


@full_precision
def info_nce(scores: Tensor, positive: Tensor) -> Tensor:
    """Mean of -ln p of the positive under a softmax over the candidates.

    Returns:
        0-d float32 in nats: 1.134570 at temperature 0.5; equal scores of n candidates give ln n. The mutual information
        of anchor and candidate is at least ln n minus this.
    """
    return F.cross_entropy(scores, positive)


@full_precision
def softmax_nce(scores: Tensor, positive: Tensor) -> Tensor:
    """Mean of -ln p_0 - Σ_j ln(1 - p_j), with p the softmax over the candidates and j running over the negatives.

    Only the greatest p can come near 1, and its 1 - p is taken from the log-sum-exp of the others, so nothing rounds
    to ln 0.

    Returns:
        0-d float32 in nats, a sum over negatives: 2.003343 at temperature 0.5; equal scores of a positive and K
        negatives give ln(1 + K) + K ln((1 + K) / K).
    """
    total = scores.logsumexp(dim=1)
    top, positive = scores.argmax(dim=1, keepdim=True), positive[:, None]
    others = scores.scatter(1, top, -torch.inf)
    of_top = others.logsumexp(dim=1) - total
    of_others = torch.log1p(-(others.scatter(1, positive, -torch.inf) - total[:, None]).exp()).sum(dim=1)
    missed = of_others + torch.where((top == positive)[:, 0], 0, of_top)
    return (total - scores.gather(1, positive)[:, 0] - missed).mean()


@full_precision
def constant_z_nce(scores: Tensor, positive: Tensor, *, log_normaliser: Tensor, images: int) -> Tensor:
    """Mean of -ln[P_0 / (P_0 + K/N)] - Σ_j ln[(K/N) / (P_j + K/N)], P = exp(score) / Z: is it data, or uniform noise?

    Args:
        scores: (A, 1 + K), all finite.
        log_normaliser: ln Z, 0-d, as from `log_partition` of the first batch and then kept: estimated anew at each step
            it would let the scores drift.
        images: N, what the noise is drawn from.
    Returns:
        0-d float32 in nats: 1.940123 at temperature 0.5, N = 100 and Z of this row alone; equal scores with their own Z
        give what `softmax_nce` gives.
    """
    logit = scores - log_normaliser - math.log((scores.shape[1] - 1) / images)
    data = F.softplus(-logit.gather(1, positive[:, None]))[:, 0]
    noise = F.softplus(logit.scatter(1, positive[:, None], -torch.inf)).sum(dim=1)
    return (data + noise).mean()


@full_precision
def log_partition(scores: Tensor, *, images: int) -> Tensor:
    """ln Z, 0-d: N times the mean of exp(score) over all scores. Z is 258.125401 at temperature 0.5 and N = 100."""
    return scores.flatten().logsumexp(dim=0) - math.log(scores.numel() / images)


@full_precision
def nonparametric_softmax(embedding: Tensor, rows: Tensor, index: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE against every row of a bank: each image is a class of its own (Wu et al. 2018, eq. 2).

    Args:
        embedding: (B, D), of any length: normalised here. rows: (N, D) unit vectors. index: (B,) int64, the own rows.
    Returns:
        0-d float32 in nats; equal similarities give ln N.
    """
    return info_nce(F.normalize(embedding, dim=1) @ rows.T / temperature, index)


@torch.no_grad()
@full_precision
def mean_cosine(rows: Tensor) -> Tensor:
    """Mean cosine of pairs of different rows (B, D), 0-d: near 1 where an encoder has collapsed; 0 for a single row."""
    unit = F.normalize(rows, dim=1)
    return (unit.sum(dim=0).square().sum() - len(rows)) / max(1, len(rows) * (len(rows) - 1))
