"""Scores and their intervals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion, Wilson 1927: sensible at 0 and 1. wilson_interval(5, 10) is (0.2366, 0.7634)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(better: Tensor, worse: Tensor, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of mean(better) - mean(worse) over images, resampled in pairs (Efron 1979).

    Args:
        better, worse: (N,) scores of the same N images, such as 0 and 1 for wrong and right.
    """
    difference = (better - worse).double()
    generator = torch.Generator().manual_seed(seed)
    n = len(difference)
    part = max(1, 4_000_000 // n)  # resamples at a time, for the memory's sake
    parts = [part] * (resamples // part) + [resamples % part]
    means = torch.cat([
        difference[torch.randint(n, (part, n), generator=generator)].mean(dim=1) for part in parts if part
    ])  # fmt: skip
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Σ_b (n_b / N) |accuracy_b - confidence_b| over equal-width bins, Guo et al. 2017, arXiv:1706.04599, eq. 3."""
    which = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct.double() - confidence.double())
    return float(gap.abs().sum() / max(1, len(confidence)))


def knn_predict(
    train: Tensor, label: Tensor, query: Tensor, *, k: int, temperature: float, classes: int, chunk: int = 1024
) -> Tensor:
    """Weighted k-NN of Wu et al. 2018, arXiv:1805.01978, section 3.4: class shares (Q, K) of the queries.

    Args:
        train: (N, D) features of any length, normalised here; label: (N,). query: (Q, D).
        k: neighbours, at most N are used. temperature: τ in the weight exp(similarity / τ).
    Returns:
        Neighbours of cosine 0.9 (class 0), 0.8 and 0.75 (class 1) give class 0 the share 0.7369 at τ = 0.07.
    """
    train, k = F.normalize(train.float(), dim=1), min(k, len(train))
    shares = []
    for rows in query.split(chunk):
        similarity, neighbour = (F.normalize(rows.float(), dim=1) @ train.T).topk(k, dim=1)
        weight = (similarity / temperature).softmax(dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        shares.append(votes.scatter_add_(1, label[neighbour], weight))
    return torch.cat(shares)


def linear_probe(
    train: Tensor, label: Tensor, *, classes: int, weight_decay: float, iterations: int = 100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A linear classifier on frozen features by L-BFGS, on features standardised with training statistics.

    Args:
        train: (N, D); label: (N,). weight_decay: λ in the mean cross-entropy + λ / 2 |W|².
    Returns:
        weight (K, D), bias (K,), and the mean and deviation (D,): logits are ((x - mean) / deviation) Wᵀ + b.
    """
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-6)
    x = (train - mean) / deviation
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), label) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach(), mean, deviation
