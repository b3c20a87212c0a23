"""What features are like, without labels: signals to watch while an encoder is pretrained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of two views' normalised features, Wang and Isola 2020, arXiv:2005.10242, section 4.1.1.

    Args:
        first, second: (B, D), of any length; row i of both comes from image i.
    Returns:
        0-d in [0, 4]: 0 where views agree, 2 where they are orthogonal.
    """
    return (F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)).square().sum(dim=1).mean()


def uniformity(features: Tensor, *, scale: float = 2.0) -> Tensor:
    """ln of the mean of exp(-t |x - y|²) over pairs of normalised features, same source, section 4.1.2, t = 2.

    Args:
        features: (B, D) with B >= 2, of any length.
    Returns:
        0-d in [-4 t, 0]: 0 where all features are one; the lower, the more evenly they cover the sphere. Two opposite
        features give -8.
    """
    unit = F.normalize(features.float(), dim=1)
    distance = torch.pdist(unit).square()
    return torch.logsumexp(-scale * distance, dim=0) - torch.log(torch.tensor(float(len(distance))))


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of centred features: Roy and Vetterli 2007, "The effective
    rank: a measure of effective dimensionality", section 2.

    Args:
        features: (B, D).
    Returns:
        0-d in [1, min(B, D)]: how many directions the features use; equal spread over k of them gives k, and a single
        point 1.
    """
    value = torch.linalg.svdvals((features - features.mean(dim=0)).float())
    share = value / value.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()
