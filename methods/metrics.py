"""Scores and their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator

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


def contingency(label: Tensor, cluster: Tensor) -> Tensor:
    """How many rows each pair of a label and a cluster shares: (L, K) float64, of those that occur, in their order.

    Args:
        label, cluster: (N,) integers, N >= 1.
    """
    if label.shape != cluster.shape or label.ndim != 1 or len(label) == 0:
        raise ValueError(f"label {tuple(label.shape)}, cluster {tuple(cluster.shape)}: need equal (N,), N >= 1")
    labels, row = label.unique(return_inverse=True)
    clusters, column = cluster.unique(return_inverse=True)
    counts = torch.bincount(row * len(clusters) + column, minlength=len(labels) * len(clusters))
    return counts.double().unflatten(0, (len(labels), len(clusters)))


def purity(label: Tensor, cluster: Tensor) -> float:
    """Share of rows that are of their cluster's most frequent label.

    Splitting a cluster never lowers it, so it compares clusterings of one K only. Labels 000111 in clusters 001111 have
    0.833333, 0011 in 0101 have 0.5.
    """
    return float(contingency(label, cluster).amax(dim=0).sum() / len(label))


def nmi(label: Tensor, cluster: Tensor) -> float:
    """Mutual information over the arithmetic mean of both entropies, 2 I / (H_y + H_c), in [0, 1]; 0 / 0 is 0.

    Labels 000111 in clusters 001111 have 0.478704, 0011 in 0101 have 0.
    """
    joint = contingency(label, cluster) / len(label)
    entropies = [torch.special.entr(joint.sum(dim=dim)).sum() for dim in (0, 1)]
    total = float(entropies[0] + entropies[1])
    information = total - float(torch.special.entr(joint).sum())
    return min(1.0, max(0.0, 2 * information / total)) if total > 0 else 0.0


def ari(label: Tensor, cluster: Tensor) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985): 1 for equal partitions, 0 on average for random ones.

    Labels 000111 in clusters 001111 have 0.324324, 0011 in 0101 have -0.5. It is 0 / 0 only for two equal partitions,
    into one cluster or into single rows, and 1 then.
    """
    counts = contingency(label, cluster)

    def pairs(sizes: Tensor) -> float:
        return float((sizes * (sizes - 1) / 2).sum())

    together, labels, clusters = pairs(counts), pairs(counts.sum(dim=1)), pairs(counts.sum(dim=0))
    expected = labels * clusters / max(1.0, pairs(counts.sum()[None]))
    largest = (labels + clusters) / 2
    return (together - expected) / (largest - expected) if largest > expected else 1.0


def hungarian_accuracy(label: Tensor, cluster: Tensor) -> float:
    """Share of rows that are right when each cluster stands for at most one label, in the best of all such ways.

    Labels 000111 in clusters 001111 have 0.833333. Exact; about a second at 300 labels and as many clusters.
    """
    counts = contingency(label, cluster)
    chosen = assignment(-counts)
    rows = (chosen >= 0).nonzero()[:, 0]
    return float(counts[rows, chosen[rows]].sum() / len(label))


def assignment(cost: Tensor) -> Tensor:
    """The column of each row that makes Σ cost least, each column used once: (R, C) to (R,) int64, -1 for left out.

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987), in min(R, C)² max(R, C): of the
    rows when there are no more of them than columns, else of the columns. [[4, 1], [2, 3]] gives [1, 0].
    """
    if len(cost) > cost.shape[1]:
        taken = assignment(cost.T)
        found = torch.full((len(cost),), -1, dtype=torch.int64)
        found[taken] = torch.arange(len(taken))
        return found
    cost = cost.double().cpu()
    rows, columns = cost.shape
    row_price, column_price = torch.zeros(rows, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
    owner = [-1] * columns  # row of each column
    for start in range(rows):
        # Dijkstra's search over columns: `length` of the best path so far to each, `via` the column before it
        length = torch.full((columns,), torch.inf, dtype=torch.float64)
        via = torch.full((columns,), -1, dtype=torch.int64)
        done = torch.zeros(columns, dtype=torch.bool)
        tree: list[tuple[int, float]] = []  # settled columns with the length of their path
        row, column, reached = start, -1, 0.0
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < length)
            length = torch.where(shorter, through, length)
            via = torch.where(shorter, column, via)
            column = int(torch.where(done, torch.inf, length).argmin())
            reached = float(length[column])
            if owner[column] < 0:
                break
            done[column] = True
            tree.append((column, reached))
            row = owner[column]
        row_price[start] += reached
        for settled, least in tree:
            row_price[owner[settled]] += reached - least
            column_price[settled] -= reached - least
        while column >= 0:
            before = int(via[column])
            owner[column] = owner[before] if before >= 0 else start
            column = before
    found = torch.full((rows,), -1, dtype=torch.int64)
    for column, row in enumerate(owner):
        if row >= 0:
            found[row] = column
    return found


def _ranked(features: Tensor, label: Tensor, clip: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For some queries at a time: whether each other row is of their label, and whether it may be found, (Q, N) bool in
    the order of falling cosine, ties by index."""
    unit = F.normalize(features.double(), dim=1)
    number = torch.arange(len(unit), device=unit.device)
    clip = number if clip is None else clip
    for rows in number.split(chunk):
        # on a grid that is coarser than what rounding does to equal cosines
        similarity = (unit[rows] @ unit.T * 2.0**40).round()
        similarity.masked_fill_(clip[rows, None] == clip, -torch.inf)
        order = similarity.argsort(dim=1, descending=True, stable=True)
        allowed = similarity.gather(1, order) > -torch.inf
        yield (label[rows, None] == label[order]) & allowed, allowed


def retrieval_precision(
    features: Tensor, label: Tensor, *, k: int, clip: Tensor | None = None, chunk: int = 512
) -> Tensor:
    """Share, for each row as a query, of its k nearest others by cosine that are of its label.

    Args:
        features: (N, D), N >= 2, of any length. label: (N,).
        k: neighbours; where there are fewer others, these.
        clip: (N,) integers: rows of the query's own clip are not found, as frames of one video. Default: only the query
            itself is not.
    Returns:
        (N,) float64 in [0, 1], nan for a row with no other to find. Rows at angles 0, 10, 25, 90 degrees with labels
        0, 1, 0, 1 have the mean 0.375 at k = 2.
    """
    if not k > 0:
        raise ValueError(f"k = {k}: must be > 0")
    shares = [
        right[:, :k].sum(dim=1) / allowed[:, :k].sum(dim=1) for right, allowed in _ranked(features, label, clip, chunk)
    ]
    return torch.cat(shares).double()


def retrieval_map(features: Tensor, label: Tensor, *, clip: Tensor | None = None, chunk: int = 512) -> Tensor:
    """Mean precision, for each row as a query, at the ranks of the rows of its label: `retrieval_precision` at every
    depth.

    Returns:
        (N,) float64 in [0, 1], nan for a row that is alone with its label. The example of `retrieval_precision` has
        1/2, 1/3, 1/2, 1/2.
    """
    found = []
    for right, _ in _ranked(features, label, clip, chunk):
        rank = torch.arange(1, right.shape[1] + 1, device=right.device)
        precision = right.cumsum(dim=1) / rank
        found.append((precision * right).sum(dim=1) / right.sum(dim=1))
    return torch.cat(found).double()


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Area under the interpolated precision envelope, as VOC from 2010 (not the 11 points before): Σ Δrecall times the
    best precision at that recall or more.

    Equal scores are one threshold, so the order of the rows cannot help; by index, as elsewhere, rows sorted by class
    would give a constant score the value 1.

    Args:
        scores: (N,), higher is surer; only their order matters. positive: (N,) bool, at least one.
    Returns:
        In (0, 1], 1 for a perfect ranking. Positives at ranks 1 and 4 of 4 give 0.75; a constant score gives the share
        of positives.
    """
    positive = positive.bool()
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(f"scores {tuple(scores.shape)}, positive {tuple(positive.shape)}: need equal (N,)")
    if not positive.any():
        raise ValueError(f"average_precision: no positive among {len(positive)} rows, so there is no recall")
    order = scores.argsort(descending=True, stable=True)
    score, hit = scores[order], positive[order].double()
    last = torch.ones(len(score), dtype=torch.bool, device=score.device)
    last[:-1] = score[1:] != score[:-1]
    rank = torch.arange(1, len(score) + 1, device=score.device)
    found = hit.cumsum(dim=0)
    recall, precision = (found / found[-1])[last], (found / rank)[last]
    envelope = precision.flip(0).cummax(dim=0).values.flip(0)
    return float((torch.diff(recall, prepend=recall.new_zeros(1)) * envelope).sum())


def mean_average_precision(scores: Tensor, targets: Tensor) -> tuple[float, list[float | None]]:
    """Mean of `average_precision` over the classes that have a positive, and each class's, None without one.

    Args:
        scores: (N, K). targets: (N, K) in {1 present, 0 absent, -1 difficult}; difficult ones are left out.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(f"scores {tuple(scores.shape)}, targets {tuple(targets.shape)}: need equal (N, K)")
    found: list[float | None] = []
    for score, target in zip(scores.T, targets.T, strict=True):
        known = target >= 0
        some = bool((target == 1).any())
        found.append(average_precision(score[known], target[known] == 1) if some else None)
    values = [value for value in found if value is not None]
    if not values:
        raise ValueError(f"mean_average_precision: none of {targets.shape[1]} classes has a positive")
    return sum(values) / len(values), found
