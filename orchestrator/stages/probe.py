"""How good are a checkpoint's features? Probes on the frozen encoder, after Goyal et al. 2019, arXiv:1905.01235."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.metrics import knn_predict, linear_probe, wilson_interval
from methods.views.draws import Draws
from orchestrator.artifacts import Checkpoint, Scores
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, Wiring, foreign

Protocol = Literal["classifier", "knn", "linear", "layers"]
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 5
ENOUGH = 2000  # labelled images from which one fold judges the weight decays as well as five


@dataclass(frozen=True, kw_only=True)
class Probe(Stage):
    """Score frozen features by probes fitted on `labelled`, on other images or by leaving out.

    Protocols: `knn`, the weighted vote of the nearest labelled images; `linear`, a linear classifier on the feature;
    `layers`, one on every tap of the encoder; `classifier`, the model's own head, where it tells the data's classes
    apart. Without `images` each labelled image is judged by the others: k-NN leaves the image itself out, linear
    probes are cross-validated in five folds. A probe's weight decay is chosen on a part of `labelled`, never on
    `images`. Images without a label are not used; every score says how many it rests on.
    """

    protocols: tuple[Protocol, ...] = ("knn", "linear")
    k: int = 20  # neighbours, at most as many as a class has labels on average; 200 for large sets (Wu et al. 2018)
    temperature: float = 0.07  # τ of the k-NN vote, same source

    scores_test: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.protocols:
            raise ValueError("protocols = []: name at least one, such as [knn, linear]")
        if not self.k > 0:
            raise ValueError(f"k = {self.k}: must be > 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0")

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        if "classifier" not in self.protocols:
            return []
        if "images" not in wiring.images:
            return [("inputs.images", "missing: a classifier learned from `labelled`, so judge it by other images")]
        return foreign(wiring, "model")

    def run(self, context: Context, *, model: Checkpoint, labelled: Images, images: Images | None = None) -> Scores:
        classes = len(labelled.classes)
        scores: list[dict[str, Any]] = []

        def add(protocol: str, right: Tensor, rows: int, tap: str | None = None) -> None:
            low, high = wilson_interval(int(right.sum()), len(right))
            score = {"protocol": protocol, "metric": "accuracy", "value": float(right.float().mean()), "low": low,
                     "high": high, "n": len(right), "labelled": rows}  # fmt: skip
            scores.append(score if tap is None else {**score, "tap": tap})

        for protocol in self.protocols:
            if protocol == "classifier":
                assert images is not None
                predicted, label = _known(context.predict(model, images), images)
                add(protocol, predicted.argmax(dim=1) == label, 0)
                continue
            found = self._features(context, model, labelled, protocol)
            asked = None if images is None else self._features(context, model, images, protocol)
            for tap, train in found.items():
                features, label = _known(train, labelled)
                queries = None if asked is None or images is None else _known(asked[tap], images)
                judge: Callable[..., Tensor] = self._knn if protocol == "knn" else self._linear
                with context.compute():
                    right = judge(features, label, queries, classes)
                add(protocol, right, len(label), tap if protocol == "layers" else None)
        return Scores.write(context.output, scores)

    def _features(self, context: Context, model: Checkpoint, images: Images, protocol: str) -> dict[str, Tensor]:
        return context.extract_taps(model, images) if protocol == "layers" else {"gap": context.extract(model, images)}

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
        fold = Draws.of(0, 0, torch.arange(1)).permutation(len(train))[0] % FOLDS
        folds = 1 if queries is not None and len(train) >= ENOUGH else FOLDS
        held = {decay: self._held_out(train, label, fold, folds, classes, decay) for decay in WEIGHT_DECAYS}
        best = max(WEIGHT_DECAYS, key=lambda decay: float(held[decay].float().mean()))
        if queries is None:
            return held[best]
        return _predict(linear_probe(train, label, classes=classes, weight_decay=best), queries[0]) == queries[1]

    def _held_out(self, train: Tensor, label: Tensor, fold: Tensor, folds: int, classes: int, decay: float) -> Tensor:
        """Whether each image of the first `folds` folds is told right by a probe that learned from the other folds."""
        right = torch.zeros(len(train), dtype=torch.bool)
        for held in range(folds):
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
