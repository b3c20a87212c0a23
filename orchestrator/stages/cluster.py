"""A teacher's features, clustered into labels: step 1 of ClusterFit, Yan et al. 2020, arXiv:1912.03330, and of
Noroozi et al. 2018, arXiv:1805.00385."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.clustering import Precision, auto_precision, kmeans, normalise_rows
from methods.selection import REASONS
from orchestrator.artifacts import Checkpoint, Labels
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, Wiring
from orchestrator.training.precision import device


@dataclass(frozen=True, kw_only=True)
class Cluster(Stage):
    """Label each image with its cluster among the teacher's features of all: k-means, the best of some restarts.

    A student of these labels starts from fresh weights. Its head has as many outputs as there are clusters in the end:
    fewer than `clusters` where fewer features differ.
    """

    clusters: int
    iterations: int = 25  # small; 50 at 1.28 million images in the paper
    restarts: int = 3  # same
    normalise: bool = True  # features by their length, as the published code
    precision: Precision = "auto"  # of the first iterations' distances

    takes_several: ClassVar[frozenset[str]] = frozenset({"images"})  # reads no labels

    def __post_init__(self) -> None:
        for name in ("clusters", "iterations", "restarts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be > 0")

    def vocabulary(self, wiring: Wiring) -> tuple[str, ...]:
        return tuple(f"cluster {number}" for number in range(self.clusters))

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        images = sum(len(images) for images in wiring.images.get("images", ()))
        if self.clusters > images:
            return [("clusters", f"{self.clusters} of {images} images: give at most {images}, or more images; "
                     "50 images a cluster and more make good labels")]  # fmt: skip
        return []

    def resolved(self, wiring: Wiring) -> dict[str, Any]:
        return {"precision": auto_precision(device()) if self.precision == "auto" else self.precision}

    def work(self, wiring: Wiring) -> dict[str, Any]:
        return {"images": sum(len(images) for images in wiring.images["images"])}

    def run(self, context: Context, *, teacher: Checkpoint, images: Images) -> Labels:
        features = context.extract(teacher, images)
        with context.compute():
            rows = (normalise_rows(features) if self.normalise else features).to(device())
            found = kmeans(
                rows, self.clusters, draws=context.draws(1, 1).to(rows.device), iterations=self.iterations,
                restarts=self.restarts, precision=self.precision,
            )  # fmt: skip
        for step, value in enumerate(found.inertia):
            context.log(step, {"inertia": value})
        label = found.labels.cpu()
        clusters = len(found.centroids)
        if clusters < self.clusters:
            context.notice(f"{clusters} clusters instead of {self.clusters}: no more of the features differ")
        sizes = torch.bincount(label, minlength=clusters).sort().values
        facts = {
            "images": len(images), "teacher": teacher.key, "clusters": clusters, "inertia": found.inertia[-1],
            "refilled": found.refilled, "sizes_min": int(sizes[0]),
            "sizes_median": float(sizes.double().quantile(0.5)), "sizes_max": int(sizes[-1]),
        }  # fmt: skip
        return Labels.write(context.output, [self._rows(context, teacher, images, label)], facts)

    def _rows(self, context: Context, teacher: Checkpoint, images: Images, label: Tensor) -> dict[str, Any]:
        count = len(label)
        return {
            "id": images.ids.tolist(), "path": [images.where(row) for row in range(count)],
            "round": [context.round or 0] * count, "teacher": [teacher.key] * count,
            "class": label.numpy().astype("int32"), "name": [f"cluster {k}" for k in label.tolist()],
            "confidence": [1.0] * count, "margin": [None] * count, "entropy": [None] * count,
            "probabilities": [None] * count, "copies": [1] * count, "reason": [REASONS[0]] * count,
            "changed": [None] * count, "source": ["teacher"] * count,
        }  # fmt: skip
