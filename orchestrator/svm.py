"""One linear SVM a class on frozen features: VOC07 classification as Goyal et al. 2019, arXiv:1905.01235, B.2."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor

from methods.clustering import normalise_rows
from methods.metrics import average_precision, mean_average_precision

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)  # VISSL; the earlier benchmark: 1e-7 to 1e2
FOLDS = 3  # same source, as all settings below
RESAMPLES = 100  # of the bootstrap
COST = 1.0  # where a class has too few positives to choose


def svm_map(
    train: Tensor, targets: Tensor, test: Tensor, test_targets: Tensor, *, costs: tuple[float, ...] = COSTS
) -> dict[str, Any]:
    """Mean AP of one-vs-rest linear SVMs; each class's cost C by cross-validated AP on the training rows.

    Args:
        train, test: features (N, D) and (M, D), of any length: divided by it here.
        targets, test_targets: (N, K) and (M, K) in {1 present, 0 absent, -1 difficult}. A difficult object counts as
            absent in training and not at all in the test, as in the published code.
        costs: C to choose from; ties go to the first.
    Returns:
        A record {protocol, metric, value, low, high, n, labelled, by_class, costs}: `low` and `high` are a 95 %
        bootstrap interval over the test rows, `by_class` has K values of AP in [0, 1],
        `costs` the K of C, both None for a class without a positive or a negative to learn from, or none to find.
    Raises:
        ValueError: shapes do not fit, a target is no such number, or no class has positives in both.
    """
    for name, rows, wanted in (("train", train, targets), ("test", test, test_targets)):
        if wanted.ndim != 2 or len(rows) != len(wanted) or wanted.shape[1] != targets.shape[1]:
            raise ValueError(
                f"{name}: features {tuple(rows.shape)}, targets {tuple(wanted.shape)}: need (N, D), (N, K)"
            )
        if not torch.isin(wanted, torch.tensor([1, 0, -1])).all():
            raise ValueError(f"{name}: targets must be 1 (present), 0 (absent) or -1 (difficult)")
    features, asked = normalise_rows(train).numpy(), normalise_rows(test).numpy()
    scores = torch.zeros(test_targets.shape, dtype=torch.float64)
    chosen: list[float | None] = []
    known = test_targets.clone()
    for number in range(targets.shape[1]):
        present = (targets[:, number] == 1).numpy()
        if not present.any() or present.all() or not (test_targets[:, number] == 1).any():
            known[:, number] = -1
            chosen.append(None)
            continue
        cost = _cost(features, present, costs)
        scores[:, number] = torch.from_numpy(_fit(features, present, cost).decision_function(asked))
        chosen.append(cost)
    value, by_class = mean_average_precision(scores, known)
    low, high = _interval(scores, known)
    return {"protocol": "svm", "metric": "mAP", "value": value, "low": low, "high": high, "n": len(test),
            "labelled": len(train), "by_class": by_class, "costs": chosen}  # fmt: skip


def _interval(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """95 % percentile interval of the mean AP over resampled rows; those without any positive are drawn again."""
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    while len(found) < RESAMPLES:
        rows = torch.randint(len(scores), (len(scores),), generator=generator)
        if (targets[rows] == 1).any():
            found.append(mean_average_precision(scores[rows], targets[rows])[0])
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _fit(features: np.ndarray, present: np.ndarray, cost: float) -> LinearSVC:
    svm = LinearSVC(
        C=cost, penalty="l2", loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000, intercept_scaling=1.0,
        class_weight={True: 2, False: 1}, random_state=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the large costs 2,000 passes are the protocol's end
        return svm.fit(features, present)


def _cost(features: np.ndarray, present: np.ndarray, costs: tuple[float, ...]) -> float:
    folds = min(FOLDS, int(present.sum()), int((~present).sum()))
    if folds < 2:
        return COST
    parts = list(StratifiedKFold(folds).split(features, present))

    def score(cost: float) -> float:
        return sum(
            average_precision(
                torch.from_numpy(_fit(features[fit], present[fit], cost).decision_function(features[held])),
                torch.from_numpy(present[held]),
            )
            for fit, held in parts
        )

    return max(costs, key=score)
