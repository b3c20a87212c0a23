"""How good are a checkpoint's features? Probes on the frozen encoder, after Goyal et al. 2019, arXiv:1905.01235."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.clustering import kmeans, normalise_rows
from methods.metrics import (
    ari,
    knn_predict,
    linear_probe,
    nmi,
    purity,
    retrieval_map,
    retrieval_precision,
    wilson_interval,
)
from methods.views.draws import Draws
from orchestrator.artifacts import Checkpoint, Scores
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, Wiring, foreign, unlabelled
from orchestrator.svm import svm_map

Protocol = Literal["classifier", "knn", "linear", "layers", "retrieval", "clusters", "svm"]
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 5
QUERIES = 2000  # images that look for their neighbours among each other
DEPTH = 10  # neighbours that a query's precision is of
SHOWN = 6  # queries in the figure, and neighbours of each
RESAMPLES = 200  # of the bootstrap over images, for scores that are no means over images
ENOUGH = 2000  # labelled images from which one fold judges the weight decays as well as five


@dataclass(frozen=True, kw_only=True)
class Probe(Stage):
    """Score frozen features by probes fitted on `labelled`, on other images or by leaving out.

    Protocols: `knn`, the weighted vote of the nearest labelled images; `linear`, a linear classifier on the feature;
    `layers`, one on every tap of the encoder; `classifier`, the model's own head, where it tells the data's classes
    apart; `retrieval`, how many of an image's nearest neighbours are of its class; `clusters`, how well k-means with as
    many clusters as classes finds the classes; `svm`, mean AP of a linear SVM a class, as on VOC07, also where an image
    has several labels.

    Retrieval and clusters learn nothing and are of `images`, or of `labelled` without them. Of the others, without
    `images` each labelled image is judged by the others: k-NN leaves the image itself out, linear probes are
    cross-validated in five folds. A probe's weight decay is chosen on a part of `labelled`, never on `images`. Images
    without a label are not used; every score says how many it rests on.
    """

    protocols: tuple[Protocol, ...] = ("knn", "linear")
    k: int = 20  # neighbours, at most as many as a class has labels on average; 200 for large sets (Wu et al. 2018)
    temperature: float = 0.07  # τ of the k-NN vote, same source

    scores_test: ClassVar[bool] = True
    takes_several: ClassVar[frozenset[str]] = frozenset({"labelled", "images"})  # by svm

    def __post_init__(self) -> None:
        if not self.protocols:
            raise ValueError("protocols = []: name at least one, such as [knn, linear]")
        if not self.k > 0:
            raise ValueError(f"k = {self.k}: must be > 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be > 0")

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        if "images" not in wiring.images:
            return unlabelled(wiring, "labelled") + [
                ("inputs.images", f"missing: {protocol} needs other images than `labelled` to be judged by")
                for protocol in ("classifier", "svm") if protocol in self.protocols
            ]  # fmt: skip
        if wrong := unlabelled(wiring, "labelled", "images") or self._several(wiring):
            return wrong
        return foreign(wiring, "model") if "classifier" in self.protocols else []

    def _several(self, wiring: Wiring) -> list[tuple[str, str]]:
        """What is wrong where images have several labels."""
        parts = {target: part for name in ("labelled", "images") if name in wiring.images
                 for target, part in zip(wiring.targets[name], wiring.images[name], strict=True)}  # fmt: skip
        several = [target for target, part in parts.items() if part.several]
        if not several:
            return []
        others = [protocol for protocol in self.protocols if protocol != "svm"]
        if others:
            return [("protocols", f"{several[0]} has several labels an image, and {', '.join(others)} needs one class: "
                                  "use protocols: [svm]")]  # fmt: skip
        one = [target for target in parts if target not in several]
        if one:
            return [("protocols", f"{several[0]} has several labels an image and {one[0]} has not: whether an image of "
                                  f"{one[0]} shows other classes too is not known")]  # fmt: skip
        train, test = (
            np.concatenate([part.targets[part.labelled] for part in wiring.images[name] if part.targets is not None])
            for name in ("labelled", "images")
        )
        if not (train.any(axis=0) & ~train.all(axis=0) & test.any(axis=0)).any():
            return [("inputs.images", f"no class of {wiring.targets['images'][0]} can be judged: svm needs images with "
                     f"and without it in {wiring.targets['labelled'][0]}")]  # fmt: skip
        return []

    def run(self, context: Context, *, model: Checkpoint, labelled: Images, images: Images | None = None) -> Scores:
        classes = len(labelled.classes)
        scores: list[dict[str, Any]] = []

        def add(protocol: str, right: Tensor, rows: int, tap: str | None = None) -> None:
            low, high = wilson_interval(int(right.sum()), len(right))
            score = {"protocol": protocol, "metric": "accuracy", "value": float(right.float().mean()), "low": low,
                     "high": high, "n": len(right), "labelled": rows}  # fmt: skip
            scores.append(score if tap is None else {**score, "tap": tap})

        neighbours: list[dict[str, Any]] = []
        judged = labelled if images is None else images
        for protocol in self.protocols:
            if protocol in ("retrieval", "clusters"):
                features, label = _known(context.extract(model, judged), judged)
                with context.compute():
                    scores += self._retrieval(features, label) if protocol == "retrieval" else self._clusters(
                        features, label, classes
                    )  # fmt: skip
                    neighbours += _neighbours(features, label, judged) if protocol == "retrieval" else []
                continue
            if protocol == "svm":
                assert images is not None
                (train, targets), (asked, truths) = (
                    _shown(context.extract(model, part), part) for part in (labelled, images)
                )
                with context.compute():
                    score = svm_map(train, targets, asked, truths)
                if images.several:  # names, since no table of accuracies by class stands beside them
                    score |= {"classes": list(images.classes), "shown": truths.sum(dim=0).tolist()}
                scores.append(score)
                continue
            if protocol == "classifier":
                assert images is not None
                predicted, label = _known(context.predict(model, images), images)
                add(protocol, predicted.argmax(dim=1) == label, 0)
                continue
            found = self._features(context, model, labelled, protocol)
            other = None if images is None else self._features(context, model, images, protocol)
            for tap, train in found.items():
                features, label = _known(train, labelled)
                queries = None if other is None or images is None else _known(other[tap], images)
                judge: Callable[..., Tensor] = self._knn if protocol == "knn" else self._linear
                with context.compute():
                    right = judge(features, label, queries, classes)
                add(protocol, right, len(label), tap if protocol == "layers" else None)
        return Scores.write(context.output, scores, neighbours)

    def _features(self, context: Context, model: Checkpoint, images: Images, protocol: str) -> dict[str, Tensor]:
        return context.extract_taps(model, images) if protocol == "layers" else {"gap": context.extract(model, images)}

    def _retrieval(self, features: Tensor, label: Tensor) -> list[dict[str, Any]]:
        rows = _some(len(label), QUERIES)
        found = {
            f"precision@{DEPTH}": retrieval_precision(features[rows], label[rows], k=DEPTH),
            "mAP": retrieval_map(features[rows], label[rows]),
        }  # fmt: skip
        scores = []
        for metric, each in found.items():
            each = each[~each.isnan()]
            half = 1.959964 * float(each.std()) / len(each) ** 0.5
            mean = float(each.mean())
            scores.append({"protocol": "retrieval", "metric": metric, "value": mean, "low": max(0.0, mean - half),
                           "high": min(1.0, mean + half), "n": len(each), "labelled": 0})  # fmt: skip
        return scores

    def _clusters(self, features: Tensor, label: Tensor, classes: int) -> list[dict[str, Any]]:
        draws = Draws.of(0, 0, torch.arange(1))
        found = kmeans(normalise_rows(features), min(classes, len(features)), draws=draws).labels
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(len(label), (len(label),), generator=generator) for _ in range(RESAMPLES)]
        scores = []
        for metric, measure in (("NMI", nmi), ("ARI", ari), ("purity", purity)):
            spread = torch.tensor([measure(label[rows], found[rows]) for rows in drawn])
            low, high = spread.quantile(torch.tensor([0.025, 0.975])).tolist()
            scores.append({"protocol": "clusters", "metric": metric, "value": measure(label, found), "low": low,
                           "high": high, "n": len(label), "labelled": 0})  # fmt: skip
        return scores

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


def _some(count: int, most: int) -> Tensor:
    """At most `most` of `count` rows, always the same ones."""
    return Draws.of(0, 0, torch.arange(1)).permutation(count)[0, :most]


def _neighbours(features: Tensor, label: Tensor, images: Images) -> list[dict[str, Any]]:
    """A few queries with the images that lie nearest to them, as {row, label} of rows of `images`."""
    rows = _some(len(label), SHOWN)
    unit = F.normalize(features, dim=1)
    similarity = unit[rows] @ unit.T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    nearest = similarity.topk(min(SHOWN, len(label) - 1), dim=1).indices
    place = torch.from_numpy(images.labelled.copy()).nonzero()[:, 0]

    def shown(row: int) -> dict[str, Any]:
        at = int(place[row])
        return {"id": str(images.ids[at]), "path": images.where(at), "label": images.classes[int(label[row])]}

    return [
        {"query": shown(row), "nearest": [shown(other) for other in found]}
        for row, found in zip(rows.tolist(), nearest.tolist(), strict=True)
    ]


def _predict(fitted: tuple[Tensor, Tensor, Tensor, Tensor], features: Tensor) -> Tensor:
    weight, bias, mean, deviation = fitted
    return F.linear((features - mean) / deviation, weight, bias).argmax(dim=1)


def _known(features: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    known = torch.from_numpy(images.labelled.copy())
    return features[known], torch.from_numpy(images.label.copy())[known]


def _shown(features: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """The features of images with a label, and which classes each shows, (N, K) of 1 and 0."""
    if images.targets is None:
        features, label = _known(features, images)
        return features, F.one_hot(label, len(images.classes))
    known = torch.from_numpy(images.labelled.copy())
    return features[known], torch.from_numpy(images.targets).long()[known]
