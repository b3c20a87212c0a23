"""Does the student replace its teacher? Decided on the hold-out, never on test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from methods.metrics import wilson_interval
from orchestrator.artifacts import Checkpoint, Decision
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, Wiring, foreign, unlabelled


@dataclass(frozen=True, kw_only=True)
class Gate(Stage):
    """Promote the student when its hold-out accuracy is at least the teacher's less `tolerance`.

    Without a hold-out the student is promoted unmeasured, and the decision says so.
    """

    tolerance: float = 0.0  # fraction of accuracy a student may lose and still be promoted; a small hold-out is noisy
    otherwise: Literal["keep", "stop"] = "keep"  # go on with the old teacher, or end the rounds

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance = {self.tolerance}: must be in [0, 1)")

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        return foreign(wiring, "teacher", "student") + unlabelled(wiring, "images")

    def run(
        self, context: Context, *, teacher: Checkpoint, student: Checkpoint, images: Images | None = None
    ) -> Decision:
        if images is None or not images.labelled.any():
            facts = {
                "action": "promoted", "promoted": student.key, "teacher": {"key": teacher.key},
                "student": {"key": student.key}, "reason": "there is no hold-out: promoted unmeasured",
            }  # fmt: skip
            return Decision.write(context.output, facts)
        scores = {"teacher": self._score(context, teacher, images), "student": self._score(context, student, images)}
        old, new = scores["teacher"]["accuracy"], scores["student"]["accuracy"]
        better = new >= old - self.tolerance
        action = "promoted" if better else {"keep": "kept", "stop": "stopped"}[self.otherwise]
        reason = f"hold-out accuracy {new:.1%} against the teacher's {old:.1%} on {scores['student']['n']} images"
        facts = {"action": action, "promoted": (student if better else teacher).key, "reason": reason, **scores}
        return Decision.write(context.output, facts)

    def _score(self, context: Context, model: Checkpoint, images: Images) -> dict[str, Any]:
        known = torch.from_numpy(images.labelled.copy())
        right = (context.predict(model, images).argmax(dim=1) == torch.from_numpy(images.label.copy()))[known]
        low, high = wilson_interval(int(right.sum()), len(right))
        return {"key": model.key, "accuracy": float(right.float().mean()), "low": low, "high": high, "n": len(right)}
