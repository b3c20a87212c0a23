"""A teacher labels the unlabelled images without noise; the confident ones are kept: one round of the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from methods.selection import REASONS, Selection, select
from orchestrator.artifacts import Checkpoint, Labels
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, StopRound, Wiring, foreign


@dataclass(frozen=True, kw_only=True)
class PseudoLabel(Stage):
    """Noisy Student's step 2: Xie et al. 2020, arXiv:1911.04252, section 3.1.

    Guards: with fewer than `min_kept` images kept, or one class holding more than `max_class_share` of them, the most
    confident images of every predicted class are taken instead (`guard: adapt`), or the rounds end (`guard: stop`).
    """

    min_confidence: float = 0.3  # the paper's threshold for soft labels; 0.8 and more suits hard ones
    balance: Literal["none", "limit", "replicate"] = "replicate"  # the paper's
    per_class: int | None = None  # n_c; None: the mean number of confident images a class
    min_kept: int = 1  # images
    max_class_share: float = 0.8  # of the kept images; with two classes or fewer only 1 is too much
    adapt_share: float = 0.2  # of each predicted class's images, taken by the guard
    guard: Literal["adapt", "stop"] = "adapt"

    def __post_init__(self) -> None:
        for name in ("min_confidence", "max_class_share", "adapt_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")
        if self.per_class is not None and self.per_class <= 0:
            raise ValueError(f"per_class = {self.per_class}: must be > 0")
        if self.min_kept < 1:
            raise ValueError(f"min_kept = {self.min_kept}: must be > 0, a student cannot learn from nothing")

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        if any(len(images) == 0 for images in wiring.images.get("images", ())):
            return [("inputs.images", "has no images: there is nothing to label")]
        return foreign(wiring, "teacher")

    def work(self, wiring: Wiring) -> dict[str, Any]:
        return {"images": sum(len(images) for images in wiring.images["images"])}

    def run(
        self, context: Context, *, teacher: Checkpoint, images: Images, previous: Labels | None = None,
        holdout: Images | None = None,
    ) -> Labels:  # fmt: skip
        probability = context.predict(teacher, images)
        facts: dict[str, Any] = {"images": len(images), "teacher": teacher.key}
        chosen = select(
            probability, min_confidence=self.min_confidence, per_class=self.per_class, balance=self.balance,
            draws=context.draws(1, len(images)),
        )  # fmt: skip
        trouble = self._trouble(chosen, probability)
        facts["guard"] = trouble
        if trouble and self.guard == "stop":
            raise StopRound(f"{trouble}; lower min_confidence, train the teacher longer, or set guard: adapt")
        if trouble:
            context.notice(
                f"{trouble}: took the most confident {self.adapt_share:.0%} of every predicted class instead"
            )
            chosen = self._most_confident(probability)
        facts |= self._health(probability, chosen)
        if holdout is not None:
            facts |= self._precision(context.predict(teacher, holdout), holdout)
        return Labels.write(
            context.output, self._rows(context, teacher, images, probability, chosen, previous, facts), facts
        )

    def _trouble(self, chosen: Selection, probability: Tensor) -> str | None:
        kept = chosen.copies > 0
        if int(kept.sum()) < self.min_kept:
            top = probability.max(dim=1).values
            return (f"only {int(kept.sum())} of {len(kept)} images reach min_confidence {self.min_confidence} (the "
                    f"most confident has {float(top.max()):.2f}), min_kept is {self.min_kept}")  # fmt: skip
        share = torch.bincount(probability.argmax(dim=1)[kept], minlength=probability.shape[1]).max() / kept.sum()
        limit = self.max_class_share if probability.shape[1] > 2 else 0.999
        return (
            f"one class holds {float(share):.0%} of the kept images, more than {limit:.0%}" if share > limit else None
        )

    def _most_confident(self, probability: Tensor) -> Selection:
        confidence, label = probability.max(dim=1)
        copies = torch.zeros(len(label), dtype=torch.long)
        for k in label.unique().tolist():
            rows = (label == k).nonzero()[:, 0]
            order = confidence[rows].argsort(descending=True, stable=True)
            copies[rows[order[: max(1, round(len(rows) * self.adapt_share))]]] = 1
        return Selection(copies, torch.where(copies > 0, 0, 2))

    def _health(self, probability: Tensor, chosen: Selection) -> dict[str, Any]:
        kept = chosen.copies > 0
        label = probability.argmax(dim=1)
        classes = probability.shape[1]
        return {
            "kept": int(kept.sum()), "kept_share": float(kept.float().mean()), "copies": int(chosen.copies.sum()),
            "mean_confidence": float(probability.max(dim=1).values.mean()),
            "predicted_by_class": torch.bincount(label, minlength=classes).tolist(),
            "kept_by_class": torch.bincount(label[kept], minlength=classes).tolist(),
        }  # fmt: skip

    def _precision(self, probability: Tensor, holdout: Images) -> dict[str, Any]:
        confidence, label = probability.max(dim=1)
        sure = (confidence >= self.min_confidence) & torch.from_numpy(holdout.labelled.copy())
        right = label == torch.from_numpy(holdout.label.copy())
        return {"holdout_accepted": int(sure.sum()),
                "holdout_precision": float(right[sure].float().mean()) if sure.any() else None}  # fmt: skip

    def _rows(
        self, context: Context, teacher: Checkpoint, images: Images, probability: Tensor, chosen: Selection,
        previous: Labels | None, facts: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        top = probability.topk(2, dim=1)
        label = top.indices[:, 0].numpy().astype("int32")
        changed = np.full(len(label), None, dtype=object)
        if previous is not None:
            table = previous.table(["id", "class"])
            before = dict(zip(table["id"].to_pylist(), table["class"].to_pylist(), strict=True))
            changed = np.array([None if before.get(i) is None else before[i] != k for i, k in
                                zip(images.ids.tolist(), label.tolist(), strict=True)], dtype=object)  # fmt: skip
            facts["changed"] = int(sum(bool(value) for value in changed))
        return {
            "id": images.ids.tolist(), "path": [images.where(row) for row in range(len(images))],
            "round": [context.round or 0] * len(label), "teacher": [teacher.key] * len(label), "class": label,
            "name": [images.classes[k] for k in label], "confidence": top.values[:, 0].numpy(),
            "margin": (top.values[:, 0] - top.values[:, 1]).numpy(),
            "entropy": torch.special.entr(probability).sum(dim=1).numpy(), "probabilities": list(probability.numpy()),
            "copies": chosen.copies.numpy().astype("int32"), "reason": [REASONS[r] for r in chosen.reason.tolist()],
            "changed": changed.tolist(),
        }  # fmt: skip
