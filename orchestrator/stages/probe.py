"""How good are a checkpoint's features? Linear and k-NN probes on the frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.metrics import knn_predict, linear_probe, wilson_interval
from methods.views.draws import Draws
from orchestrator.artifacts import Checkpoint, Scores
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage

WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class Probe(Stage):
    """Score frozen features by probes fitted on `labelled`, on other images or by leaving out.

    Without `images` each labelled image is judged by the others: k-NN leaves the image itself out, the linear probe is
    cross-validated in five folds. Images without a label are not used; every score says how many it rests on.
    """

    protocols: tuple[Literal["linear", "knn"], ...] = ("knn", "linear")
    k: int = 20  # neighbours, at most as many as a class has labels on average; 200 for large sets (Wu et al. 2018)
    temperature: float = 0.07  # τ of the k-NN vote, same source

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k = {self.k}: must be > 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0")

    def run(self, context: Context, *, model: Checkpoint, labelled: Images, images: Images | None = None) -> Scores:
        train, label = _known(context.extract(model, labelled), labelled)
        queries = None if images is None else _known(context.extract(model, images), images)
        classes = len(labelled.classes)
        scores: list[dict[str, Any]] = []
        with context.compute():
            for protocol in self.protocols:
                judge = self._knn if protocol == "knn" else self._linear
                right = judge(train, label, queries, classes)
                low, high = wilson_interval(int(right.sum()), len(right))
                scores.append({"protocol": protocol, "metric": "accuracy", "value": float(right.float().mean()),
                               "low": low, "high": high, "n": len(right), "labelled": len(label)})  # fmt: skip
        return Scores.write(context.output, scores)

    def _knn(self, train: Tensor, label: Tensor, queries: tuple[Tensor, Tensor] | None, classes: int) -> Tensor:
        k = max(1, min(self.k, len(train) // classes - (queries is None)))
        if queries is not None:
            shares = knn_predict(train, label, queries[0], k=k, temperature=self.temperature, classes=classes)
            return shares.argmax(dim=1) == queries[1]
        similarity = F.normalize(train, dim=1) @ F.normalize(train, dim=1).T
        similarity.fill_diagonal_(-torch.inf)  # nobody votes for themselves
        close, neighbour = similarity.topk(k, dim=1)
        votes = torch.zeros(len(train), classes)
        votes.scatter_add_(1, label[neighbour], (close / self.temperature).softmax(dim=1))
        return votes.argmax(dim=1) == label

    def _linear(self, train: Tensor, label: Tensor, queries: tuple[Tensor, Tensor] | None, classes: int) -> Tensor:
        fold = Draws.of(0, 0, torch.arange(1)).permutation(len(train))[0] % 5
        held = {decay: self._held_out(train, label, fold, classes, decay) for decay in WEIGHT_DECAYS}
        best = max(
            WEIGHT_DECAYS, key=lambda decay: float(held[decay].float().mean())
        )  # chosen on labelled, never on test
        if queries is None:
            return held[best]
        return _predict(linear_probe(train, label, classes=classes, weight_decay=best), queries[0]) == queries[1]

    def _held_out(self, train: Tensor, label: Tensor, fold: Tensor, classes: int, decay: float) -> Tensor:
        right = torch.zeros(len(train), dtype=torch.bool)
        for held in range(5):
            inside = fold != held
            if inside.any() and not inside.all():
                fitted = linear_probe(train[inside], label[inside], classes=classes, weight_decay=decay)
                right[~inside] = _predict(fitted, train[~inside]) == label[~inside]
        return right


def _predict(fitted: tuple[Tensor, Tensor, Tensor, Tensor], features: Tensor) -> Tensor:
    weight, bias, mean, deviation = fitted
    return F.linear((features - mean) / deviation, weight, bias).argmax(dim=1)


def _known(features: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    known = torch.from_numpy(images.labelled.copy())
    return features[known], torch.from_numpy(images.label.copy())[known]
