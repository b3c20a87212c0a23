"""Which pseudo-labels a student learns from: Noisy Student's filter and balance, Xie et al. 2020, section 3.1.

Works on the whole set at once: filtering a shard by itself would give each shard another threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.views.draws import Draws

REASONS = ("kept", "below confidence", "over class limit")


@dataclass(frozen=True)
class Selection:
    """`copies` (N,) int64, how often each image is learned from in an epoch, 0 for those left out; `reason` (N,) int64
    into REASONS."""

    copies: Tensor
    reason: Tensor


def even_limit(count: Tensor, share: float) -> int:
    """The most images a class may keep, of the `count` (K,) that each has, for none to hold more than `share` of all.

    980, 5, 5, 5, 5 at 0.8 give 80. Where there are too few classes for that share, as many of each as the rarest has;
    of a single class no limit helps, and its count comes back.
    """
    low, high = 1, int(count.max())
    present = int((count > 0).sum())
    if present < 2:
        return high
    share = max(share, 1 / present + 1e-9)
    while low < high:  # the share of the largest class rises with the limit
        middle = (low + high + 1) // 2
        fits = middle <= share * int(count.clamp(max=middle).sum())
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def select(
    confidence: Tensor, label: Tensor, *, min_confidence: float, per_class: int | None,
    balance: Literal["none", "limit", "replicate"], draws: Draws,
) -> Selection:  # fmt: skip
    """Keep confident images, then at most (limit) or exactly (replicate) `per_class` of each predicted class.

    Args:
        confidence: (N,) the largest probability of the teacher's distributions, not softened. label: (N,) its class.
        min_confidence: the largest probability an image needs.
        per_class: n_c; None takes the mean number of confident images a class.
        balance: "none" keeps all confident images once; "limit" the most confident n_c of each class; "replicate"
            also repeats the images of a class with fewer: n_c / count times each, the fraction by a draw.
        draws: the N images' draws, for the fraction.
    Returns:
        Confidences .9 .8 .7 .4 .35 .2 at threshold .3 and n_c = 3 keep the first three once; .6 and .31 are each kept
        1.5 times in expectation. Ties go to the lower row.
    """
    confident = confidence >= min_confidence
    copies = confident.long()
    reason = torch.where(confident, 0, 1)
    if balance == "none" or not confident.any():
        return Selection(copies, reason)
    count = torch.bincount(label[confident])
    target = per_class if per_class is not None else max(1, round(int(confident.sum()) / int((count > 0).sum())))
    for k in range(len(count)):
        rows = (confident & (label == k)).nonzero()[:, 0]
        if len(rows) > target:
            order = confidence[rows].argsort(descending=True, stable=True)
            copies[rows[order[target:]]], reason[rows[order[target:]]] = 0, 2
        elif len(rows) and balance == "replicate":
            whole, rest = divmod(target, len(rows))
            copies[rows] = whole + draws[rows].chance(rest / len(rows)).long()
    return Selection(copies, reason)
