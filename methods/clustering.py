"""k-means: Lloyd 1982, "Least squares quantization in PCM"; seeds by Arthur and Vassilvitskii 2007, "k-means++".

Its labels teach ClusterFit (Yan et al. 2020, arXiv:1912.03330) and knowledge transfer (Noroozi et al. 2018,
arXiv:1805.00385). Rows may be spread over workers, each with its own, in rank order: sums, counts and seeds are of all,
and the labels are those of one process.

For that no sum may depend on its order. Features are rounded to a grid so fine that float32 seldom notices, and so
coarse that float64 sums of all of them are exact. And no label may depend on how a matrix product rounds: rows whose
two nearest centroids are closer to a tie than float32 can tell are decided in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.collectives import all_reduce, gather_uneven, own_rows
from methods.precision import full_precision
from methods.views.draws import Draws

Precision = Literal["auto", "float32", "bf16"]
EPSILON = 1e-5  # of `normalise_rows`, as in the published tools
COARSE = 1e-3  # an iteration that lowers the inertia by a smaller share than this needs float32 distances
SAME = 1e-9  # a restart is better by more than this share, or by chance of rounding
TIE = 2.0**-45  # of the scale of the distances: what float64 cannot tell apart
PROPOSALS = 2048  # seeds drawn at a time; the memory is its square
ROWS = 2048  # at a time on a CPU, where they should fit its cache
SCORES = {"cpu": 2**21, "cuda": 2**26}  # distances held at a time: rows times centroids


@dataclass(frozen=True)
class Clustering:
    """K' <= K clusters, none empty, numbered without gaps.

    Attributes:
        labels: (n,) int64, of this worker's rows.
        centroids: (K', D) float32; each row's label is its nearest.
        inertia: Σ squared distance to the nearest centroid, over all workers' rows, at each assignment.
        refilled: clusters that had become empty and got the row farthest from its own centroid.
    """

    labels: Tensor
    centroids: Tensor
    inertia: tuple[float, ...]
    refilled: int


def normalise_rows(features: Tensor) -> Tensor:
    """Rows (N, D) as f / (|f| + 1e-5), float32: a row of zeros stays one. (3, 4) gives about (0.6, 0.8)."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def auto_precision(device: torch.device) -> Precision:
    """bf16 where `device` multiplies it natively."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


@torch.no_grad()
@full_precision
def kmeans(
    features: Tensor, clusters: int, *, draws: Draws, iterations: int = 25, restarts: int = 3,
    precision: Precision = "auto",
) -> Clustering:  # fmt: skip
    """The best of some k-means clusterings, by inertia.

    Args:
        features: (n, D), this worker's rows; how they are divided changes nothing.
        clusters: K, from 1 to the number N of all rows.
        draws: one key, the same for all workers.
        iterations: Lloyd's steps, at most; fewer where no label changes any more.
        restarts: clusterings from other seeds.
        precision: of the distances. "bf16" is for the first iterations, as long as each lowers the inertia by a
            thousandth: a mistaken label among near centroids hardly moves them. Then float32, and so the answer. "auto"
            is bf16 where the processor has it, which is about twice as fast.
    Returns:
        A clustering of K, or of as many clusters as there are different rows.
    Raises:
        ValueError: K is not in 1 .. N, or a feature is not finite.
    """
    if min(iterations, restarts) < 1:
        raise ValueError(f"iterations = {iterations}, restarts = {restarts}: must be >= 1")
    points = _Points.of(features)
    if not 1 <= clusters <= points.total:
        raise ValueError(f"clusters = {clusters}: must be in 1 .. {points.total}, the number of rows")
    found = [
        _lloyd(points, _seed(points, clusters, draws[:1].fork(number)), iterations, precision)
        for number in range(restarts)
    ]
    best = found[0]
    for other in found[1:]:
        best = other if other.inertia[-1] < best.inertia[-1] * (1 - SAME) else best
    return best


@torch.no_grad()
@full_precision
def lloyd(features: Tensor, centroids: Tensor, *, iterations: int, precision: Precision = "auto") -> Clustering:
    """`kmeans` from given centroids (K, D). Points 0, 1, 9, 10 from centroids 0 and 1: inertia 145, 17.555556, 1."""
    points = _Points.of(features)
    return _lloyd(points, (centroids.double() / points.unit - points.mean).float(), iterations, precision)


@torch.no_grad()
@full_precision
def nearest(rows: Tensor, centroids: Tensor, *, low: bool = False) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row, and the squared distance to it.

    Args:
        rows: (N, D). centroids: (K, D).
        low: compare in bf16: only what differs by more than about 1 % is told apart.
    Returns:
        labels (N,) int64, ties to the lowest, and squared distances (N,) float32, 0 for equal rows.
    """
    rows, centroids = rows.float(), centroids.float()
    exact = centroids.double()
    half = exact.square().sum(dim=1) / 2  # |x - c|² / 2 is this - x·c, up to what all centroids share
    narrow, wide, coarse = centroids.bfloat16().T, half.float(), half.bfloat16()
    reach = float(half.max().mul(2).sqrt())  # |c| at most
    slack = 2 * (rows.shape[1] + 4) * torch.finfo(torch.float32).eps / 2  # of two rounded scores, relative
    labels, distances = [], []
    for part in rows.split(_chunk(rows.device, len(centroids))):
        if low:
            score = torch.addmm(coarse, part.bfloat16(), narrow, alpha=-1)
            label = score.min(dim=1).indices  # argmin takes four times as long
        else:
            score = torch.addmm(wide, part, centroids.T, alpha=-1)
            least, label = score.min(dim=1)
            second = score.scatter_(1, label[:, None], torch.inf).amin(dim=1)
            scale = reach * (torch.linalg.vector_norm(part, dim=1) + reach)
            close = (second - least <= slack * scale).nonzero()[:, 0]
            if len(close):
                decided = torch.addmm(half, part[close].double(), exact.T, alpha=-1)
                bound = decided.amin(dim=1) + TIE * scale[close].double()
                label[close] = (decided <= bound[:, None]).to(torch.uint8).argmax(dim=1)
        labels.append(label)
        distances.append((part - centroids[label]).square().sum(dim=1))
    return torch.cat(labels), torch.cat(distances)


def _chunk(device: torch.device, clusters: int) -> int:
    rows = max(1, SCORES.get(device.type, SCORES["cuda"]) // clusters)
    return min(ROWS, rows) if device.type == "cpu" else rows


@dataclass(frozen=True)
class _Points:
    """This worker's rows (n, D), float32, on the grid, about the mean of all, where products round least, and at most
    about 1, where no square over- or underflows."""

    rows: Tensor
    mean: Tensor  # (D,) float64
    unit: float  # a feature is (row + mean) * unit
    own: slice  # where `rows` are among all workers'
    total: int

    @staticmethod
    def of(features: Tensor) -> _Points:
        features = features.float()
        counts = gather_uneven(torch.tensor([len(features)], device=features.device))
        begin, total = int(counts[: own_rows(1).start].sum()), int(counts.sum())
        largest = features.abs().max() if len(features) else features.new_zeros(())
        largest = torch.where(largest.isfinite(), largest, torch.inf)  # a worker alone in failing leaves the others
        limit = float(all_reduce(largest, largest=True))
        if not math.isfinite(limit):
            raise ValueError("kmeans: a feature is nan or infinite; was the teacher's training stable?")
        unit = 2.0 ** math.ceil(math.log2(limit)) if limit else 1.0
        grid = 2.0 ** (math.ceil(math.log2(2 * total)) - 52)

        def on_grid(value: Tensor) -> Tensor:
            return (value / grid).round() * grid

        parts = features.split(_chunk(features.device, features.shape[1]))
        summed = sum(
            (on_grid(part.double() / unit).sum(dim=0) for part in parts), torch.zeros_like(features[:1]).sum(0).double()
        )
        mean = on_grid(all_reduce(summed) / total)
        rows = torch.cat([(on_grid(part.double() / unit) - mean).float() for part in parts])
        return _Points(rows, mean, unit, slice(begin, begin + len(rows)), total)

    def at(self, index: Tensor) -> Tensor:
        """The rows (M, D) of these numbers among all workers' rows."""
        found = self.rows.new_zeros(len(index), self.rows.shape[1])
        mine = (index >= self.own.start) & (index < self.own.stop)
        found[mine] = self.rows[index[mine] - self.own.start]
        return all_reduce(found)

    def sums(self, label: Tensor, clusters: int) -> Tensor:
        """(K, D) float64, exact: the sum of all workers' rows of each cluster."""
        found = torch.zeros(clusters, self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        size = _chunk(self.rows.device, self.rows.shape[1])
        for part, rows in zip(label.split(size), self.rows.split(size), strict=True):
            found.index_add_(0, part, rows.double())
        return all_reduce(found)


def _uniform(draws: Draws, count: int) -> Tensor:
    """(count,) float64 in [0, 1), on a finer grid than there are rows."""
    return (draws.bits(count)[0] & (2**53 - 1)).double() * 2.0**-53


def _seed(points: _Points, clusters: int, draws: Draws) -> Tensor:
    """k-means++: each seed is a row drawn by its squared distance to the nearest seed before. (K', D), K' <= K.

    Many are drawn at once from the distances of one pass, and each is kept with the chance by which its distance has
    shrunk since, which gives the same distribution; all passes together cost one iteration.
    """
    device = points.rows.device
    centroids = points.at((_uniform(draws.fork(0), 1) * points.total).long().to(device))
    shortest = nearest(points.rows, centroids)[1]
    block = 0
    while len(centroids) < clusters:
        distance = gather_uneven(shortest).cpu().double()
        cumulated = distance.cumsum(dim=0)
        if cumulated[-1] == 0:  # every row is a seed
            break
        count, block = min(PROPOSALS, max(64, 2 * len(centroids))), block + 1
        place, chance = _uniform(draws.fork(block).to("cpu"), 2 * count).chunk(2)
        below = torch.nextafter(cumulated[-1], torch.zeros_like(cumulated[-1]))
        row = torch.searchsorted(cumulated, (place * cumulated[-1]).clamp(max=below), right=True)
        rows = points.at(row.to(device))
        kept = _kept(rows.cpu().double(), distance[row], chance, clusters - len(centroids))
        centroids = torch.cat([centroids, rows[kept]])
        shortest = torch.minimum(shortest, nearest(points.rows, rows[kept])[1])
    return centroids


def _kept(rows: Tensor, distance: Tensor, chance: Tensor, wanted: int) -> list[int]:
    """Which proposals (M, D) become seeds, at most `wanted`, given their squared distances (M,) before any did."""
    norm = rows.square().sum(dim=1)
    between = (norm[:, None] + norm - 2 * rows @ rows.T).clamp(min=0)
    now, needed = distance.clone(), (chance * distance).tolist()
    kept: list[int] = []
    for number, threshold in enumerate(needed):
        if len(kept) < wanted and threshold < float(now[number]):
            kept.append(number)
            torch.minimum(now, between[number], out=now)
    return kept


def _lloyd(points: _Points, centroids: Tensor, iterations: int, precision: Precision) -> Clustering:
    clusters = len(centroids)
    low = (auto_precision(points.rows.device) if precision == "auto" else precision) == "bf16"
    inertia: list[float] = []
    before: Tensor | None = None
    refilled = 0
    for step in range(iterations + 1):
        low = low and step < iterations
        label, distance = nearest(points.rows, centroids, low=low)
        found = float(all_reduce(distance.double().sum()))
        if low and inertia and found > (1 - COARSE) * inertia[-1]:
            low = False
            label, distance = nearest(points.rows, centroids)
            found = float(all_reduce(distance.double().sum()))
        inertia.append(found)
        counts = all_reduce(torch.bincount(label, minlength=clusters))
        settled = before is not None and not int(all_reduce((label != before).sum()))
        if step == iterations or (settled and not low):
            break
        if not counts.all():
            label, counts, moved = _refill(points, label, distance, counts)
            refilled += moved
        mean = (points.sums(label, clusters) / counts[:, None]).float()
        centroids = torch.where(counts[:, None] > 0, mean, centroids)
        before = label
    used = counts > 0
    centroids = ((centroids[used].double() + points.mean) * points.unit).float()
    inertia = [value * points.unit**2 for value in inertia]
    return Clustering((used.cumsum(dim=0) - 1)[label], centroids, tuple(inertia), refilled)


def _refill(points: _Points, label: Tensor, distance: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Give each empty cluster the row farthest from its centroid, of a cluster that keeps another.

    Returns:
        labels (n,), counts (K,), and how many clusters were refilled: all, or as many as rows lie off their centroid.
    """
    # at most one row a cluster is passed over, its last; so of all clusters together as many rows as these are enough
    order = distance.argsort(descending=True, stable=True)[: len(counts)]
    far, of = gather_uneven(distance[order]), gather_uneven(label[order])
    row = gather_uneven(order + points.own.start)
    size, label = counts.tolist(), label.clone()
    empty = [number for number, count in enumerate(size) if count == 0]
    moved = 0
    for place in far.argsort(descending=True, stable=True).tolist():
        old = int(of[place])
        if moved == len(empty) or far[place] <= 0:
            break
        if size[old] > 1:
            new, number = empty[moved], int(row[place])
            size[old], size[new], moved = size[old] - 1, 1, moved + 1
            if points.own.start <= number < points.own.stop:
                label[number - points.own.start] = new
    return label, torch.tensor(size, device=counts.device), moved
