"""Seconds and inertia of k-means: `methods.clustering` beside scikit-learn's and faiss's, on the same rows.

    python -m benchmarks.kmeans [--clusters K ...] [--iterations N] [--rounds N] [--only NAME ...] [--json FILE]

One start, seeds included, and exactly as many iterations for all: scikit-learn's Lloyd with its greedy k-means++ and no
tolerance, faiss's Kmeans with its random seeds and no subsampling (as it is, it takes 256 rows a centroid). The inertia
is measured on all rows in one way, against the centroids that each returns. CPU time of the process, by default on one
thread. The contestants take turns within each round, each round from other seeds, and ratios are the median of the
rounds' own, since a shared machine drifts. The rows are of length 1: non-negative mixtures of 200 groups, drawn here.
scikit-learn is a dependency; faiss is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from methods.clustering import kmeans, nearest, normalise_rows
from methods.views.draws import Draws

GROUPS, FACTORS = 200, 64  # of the rows: as many groups, each a direction in so many dimensions
BASELINE = "ours, float32"
WIDTHS = (10, 10, 10, 12, 9, 9)
Contestant = Callable[[int, int], Tensor]  # clusters and seed to centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="features (default 50000)")
    parser.add_argument("--dim", type=int, default=512, help="numbers a feature (default 512)")
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 1000, 5000], metavar="K")
    parser.add_argument("--iterations", type=int, default=25, help="of each contestant (default 25)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is reported (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant (default 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only ours and those so called")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = features(options.rows, options.dim)
    runs, missing = contestants(rows, options.iterations, options.threads)
    if unknown := set(options.only) - runs.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: contestants are {', '.join(runs)}")
    runs = {name: run for name, run in runs.items() if not options.only or name in options.only or "ours" in name}
    print(f"{options.rows:,} x {options.dim}, {options.iterations} iterations, {options.rounds} rounds; CPU time,")
    print(f"threads: {options.threads} of {platform.processor() or platform.machine()}, torch {torch.__version__}")
    for line in missing:
        print(line)
    record: dict[str, Any] = {**vars(options), "json": None, "clusters": {}}
    for clusters in options.clusters:
        record["clusters"][clusters] = compare(rows, runs, clusters, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def features(count: int, dim: int) -> Tensor:
    """(count, dim) float32 of length 1."""
    generator = torch.Generator().manual_seed(0)
    centre, spread = torch.randn(GROUPS, FACTORS, generator=generator), torch.randn(FACTORS, dim, generator=generator)
    group = torch.randint(GROUPS, (count,), generator=generator)
    factor = centre[group] + torch.randn(count, FACTORS, generator=generator)
    return normalise_rows(torch.relu(factor @ spread))


def contestants(rows: Tensor, iterations: int, threads: int) -> tuple[dict[str, Contestant], list[str]]:
    """What is compared, and what is missing."""

    def ours(precision: Any) -> Contestant:
        return lambda clusters, seed: kmeans(
            rows, clusters, draws=Draws.of(seed, 0, torch.arange(1)), iterations=iterations, restarts=1,
            precision=precision,
        ).centroids  # fmt: skip

    def scikit_learn(clusters: int, seed: int) -> Tensor:
        with threadpool_limits(threads):
            model = KMeans(clusters, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", random_state=seed)
            return torch.from_numpy(model.fit(rows.numpy()).cluster_centers_)

    runs = {BASELINE: ours("float32"), "ours, bf16 at first": ours("bf16"), "scikit-learn": scikit_learn}
    try:
        import faiss
    except ImportError as error:
        return runs, [f"faiss is not installed, skipped ({error})"]
    faiss.omp_set_num_threads(threads)

    def of_faiss(clusters: int, seed: int) -> Tensor:
        model = faiss.Kmeans(rows.shape[1], clusters, niter=iterations, nredo=1, seed=seed + 1,
                             min_points_per_centroid=1, max_points_per_centroid=len(rows))  # fmt: skip
        model.train(rows.numpy())
        return torch.from_numpy(model.centroids)

    return {**runs, "faiss": of_faiss}, [f"faiss {faiss.__version__}"]


def compare(rows: Tensor, runs: dict[str, Contestant], clusters: int, rounds: int) -> dict[str, Any]:
    """Every round's seconds and inertia, by contestant; printed as medians, beside ours."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    inertia: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            centroids = run(clusters, number)
            seconds[name].append(time.process_time() - begin)
            inertia[name].append(float(nearest(rows, centroids)[1].double().sum()))
    heads = ("seconds", "lowest", "highest", "inertia", "time", "inertia")
    print(f"\n{f'K = {clusters:,}':22}" + "".join(f"{head:>{w}}" for head, w in zip(heads, WIDTHS, strict=True)))
    for name in runs:
        ratios = [
            statistics.median(a / b for a, b in zip(values[name], values[BASELINE], strict=True))
            for values in (seconds, inertia)
        ]
        print(f"{name:22}{statistics.median(seconds[name]):10.2f}{min(seconds[name]):10.2f}{max(seconds[name]):10.2f}"
              f"{statistics.median(inertia[name]):12,.1f}{ratios[0]:8.2f}x{ratios[1]:8.3f}x", flush=True)  # fmt: skip
    return {"seconds": seconds, "inertia": inertia}


if __name__ == "__main__":
    main()
