"""Did the unlabelled images help? The one stage that reads the test images, once, at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from methods.metrics import expected_calibration_error, paired_bootstrap, wilson_interval
from orchestrator.artifacts import Checkpoint, Verdict
from orchestrator.comparison import t_interval
from orchestrator.context import Context
from orchestrator.data.images import Images
from orchestrator.stage import Stage, Wiring, foreign, unlabelled
from orchestrator.stages.train import Train


@dataclass(frozen=True, kw_only=True)
class Judge(Stage):
    """Compare the final model with the supervised baseline on the same test images.

    The baseline has the final model's encoder and optimiser steps; another comparison is refused. `arms` are further
    models scored beside them, such as the teacher and each round's student.
    """

    resamples: int = 10_000  # of the paired bootstrap

    scores_test: ClassVar[bool] = True

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        if wrong := foreign(wiring, "baseline", "final", "arms") + unlabelled(wiring, "images"):
            return wrong
        baseline = next((s for s in wiring.stages["baseline"] if isinstance(s, Train)), None)
        finals = [s for s in wiring.stages["final"] if isinstance(s, Train)]
        if baseline is None or not finals:
            return []
        final = finals[-1]
        found = []
        if baseline.encoder != final.encoder:
            found.append((
                "inputs.baseline", f"its encoder {_short(baseline)} is not the final model's {_short(final)}: the gain "
                "would be the encoder's; give the baseline the last round's encoder",
            ))  # fmt: skip
        if (baseline.steps, baseline.epochs) != (final.steps, final.epochs) or baseline.steps is None:
            found.append(("inputs.baseline", f"trains for {_length(baseline)}, the final model for {_length(final)}: "
                                             "give both the same `steps`"))  # fmt: skip
        return found

    def run(
        self, context: Context, *, baseline: Checkpoint, final: Checkpoint, images: Images,
        arms: tuple[Checkpoint, ...] = (),
    ) -> Verdict:  # fmt: skip
        known = torch.from_numpy(images.labelled.copy())
        label = torch.from_numpy(images.label.copy())
        models = {"baseline": baseline, "final": final, **{f"arm{i}": arm for i, arm in enumerate(arms)}}
        answers: dict[str, Tensor] = {}  # by checkpoint: the final model is one of the rounds' too
        for model in models.values():
            if model.key not in answers:
                answers[model.key] = context.predict(model, images)
        right = {key: (p.argmax(dim=1) == label)[known] for key, p in answers.items()}
        n = int(known.sum())
        scores = {name: self._score(answers[m.key][known], right[m.key], m.key) for name, m in models.items()}
        gain = scores["final"]["accuracy"] - scores["baseline"]["accuracy"]
        low, high = paired_bootstrap(
            right[final.key].float(), right[baseline.key].float(), resamples=self.resamples, seed=context.seed
        )
        facts: dict[str, Any] = {
            "baseline": scores["baseline"]["accuracy"], "final": scores["final"]["accuracy"], "gain": gain, "low": low,
            "high": high, "n": n, "classes": list(images.classes), "scores": scores,
        }  # fmt: skip
        facts["sentence"] = sentence(facts)
        return Verdict.write(context.output, facts, self._table(models, answers, images))

    def _score(self, probability: Tensor, right: Tensor, key: str) -> dict[str, Any]:
        low, high = wilson_interval(int(right.sum()), len(right))
        confidence = probability.max(dim=1).values
        return {"key": key, "accuracy": float(right.float().mean()), "low": low, "high": high, "n": len(right),
                "calibration_error": expected_calibration_error(confidence, right)}  # fmt: skip

    def _table(self, models: dict[str, Checkpoint], answers: dict[str, Tensor], images: Images) -> pa.Table:
        paths = [images.where(row) for row in range(len(images))]
        label = np.where(images.labelled, images.label, -1)
        tables = []
        for name, model in models.items():
            probability = answers[model.key]
            confidence, predicted = probability.max(dim=1)
            columns = [
                [name] * len(paths), images.ids.tolist(), paths,
                pa.array(label.astype("int32"), mask=~images.labelled), predicted.numpy().astype("int32"),
                confidence.numpy(), list(probability.numpy()),
            ]  # fmt: skip
            tables.append(pa.table(columns, schema=Verdict.SCHEMA))
        return pa.concat_tables(tables)


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict in plain words: it helped, it did not, or these test images cannot tell."""
    gain, low, high = (100 * verdict[name] for name in ("gain", "low", "high"))
    numbers = (
        f"{100 * verdict['baseline']:.1f} % with labels alone, {100 * verdict['final']:.1f} % with unlabelled images: "
        f"{gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {verdict['n']} test images"
    )
    if low > 0:
        return f"The unlabelled images helped ({numbers})."
    if high < 0:
        return f"The unlabelled images did not help, they did harm ({numbers})."
    return f"The unlabelled images did not help measurably ({numbers}; the interval contains 0)."


def combine(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One verdict over seeds: means, and a t interval of the gain over seeds; a single seed's is its own bootstrap."""
    first = dict(verdicts[0])
    if len(verdicts) == 1:
        return {**first, "seeds": 1}
    gains = [v["gain"] for v in verdicts]
    n, (low, high) = len(gains), t_interval(gains)
    found = {
        **first, "baseline": statistics.fmean(v["baseline"] for v in verdicts), "seeds": n,
        "final": statistics.fmean(v["final"] for v in verdicts), "gain": statistics.fmean(gains), "low": low,
        "high": high, "each": [{k: v[k] for k in ("baseline", "final", "gain", "low", "high")} for v in verdicts],
    }  # fmt: skip
    found["sentence"] = sentence(found).replace("test images", f"test images, {n} seeds")
    return found


def _short(stage: Train) -> str:
    return str(stage.encoder.to_json())


def _length(stage: Train) -> str:
    return f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs} epochs"
