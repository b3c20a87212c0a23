"""One run of a recipe, from its text to its verdict: what `orchestrator run` and any script call."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from orchestrator import comparison
from orchestrator.artifacts import Checkpoint, write_json
from orchestrator.context import Interrupted
from orchestrator.data.splits import Data, open_data
from orchestrator.pipeline import PIPELINE, Outcome, Setting, run_plan, threads_of
from orchestrator.plan import Plan, make_plan
from orchestrator.recipe import Recipe, report
from orchestrator.records import Recorder, Status
from orchestrator.report.html import write_report
from orchestrator.runs import read_head, read_outcomes, update_head
from orchestrator.stages.judge import combine
from orchestrator.stages.train import Train
from orchestrator.store import Store, replace_file
from orchestrator.tracking import Sender, tracking_uri

SEND_SECONDS = 20.0  # how long the end of a run waits for the tracking server


@dataclass(frozen=True)
class Prepared:
    """A recipe on its data: a plan for each seed, and what was noticed on the way."""

    recipe: Recipe
    label: str
    store: Store
    plans: tuple[Plan, ...]
    data: tuple[Data, ...]

    @property
    def name(self) -> str:
        """The run's name: the same for the same questions, so that the same command goes on where it was."""
        keys = [stage.key for plan in self.plans for stage in plan.stages]
        return f"{self.recipe.name}-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]}"

    @property
    def folder(self) -> Path:
        """Where the run keeps what it says."""
        return self.store.root / "runs" / self.name

    def prefix(self, plan: Plan) -> str:
        """Before stage names, where a run has several seeds."""
        return f"seed-{plan.seed}/" if len(self.plans) > 1 else ""

    def stage_names(self) -> list[str]:
        """All stages of all seeds, in order."""
        return [self.prefix(plan) + stage.name for plan in self.plans for stage in plan.stages]


@dataclass
class RunResult:
    """How a run ended."""

    run: str
    store: str
    report: str | None
    verdict: dict[str, Any] | None
    stages: list[dict[str, Any]]
    comparison: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The object that `run --json` prints."""
        brief = ("baseline", "final", "gain", "low", "high", "sentence")
        shown = ("name", "key", "digest", "state", "seconds")
        return {
            "run": self.run, "store": self.store, "report": self.report,
            "verdict": {name: self.verdict[name] for name in brief} if self.verdict else None,
            "stages": [{name: stage[name] for name in shown} for stage in self.stages],
            **({"comparison": self.comparison} if self.comparison else {}),
        }  # fmt: skip


def prepare(
    recipe: Recipe, root: Path, *, label: str, progress: Callable[[str, int, int], None] | None = None
) -> Prepared:
    """Open the store, catalogue the data, and plan every seed.

    Raises:
        UserError: with every problem found, before anything is trained.
    """
    store = Store.open(root)
    threads = threads_of(recipe.resources)
    data, plans = [], []
    for offset in range(recipe.seeds):
        opened = open_data(
            recipe.data, store.root / "data", seed=recipe.seed + offset, threads=threads, progress=progress
        )
        data.append(opened)
        plans.append(make_plan(recipe, opened, offset, label))
    return Prepared(recipe, label, store, tuple(plans), tuple(data))


def batches_of(plan: Plan) -> dict[str, int]:
    """Field to the images that the workers of a training share at a time: a step's, or those of a part of it."""
    trainings = ((s.name, s.stage) for s in plan.stages if isinstance(s.stage, Train))
    return {f"stages.{name}.batch": stage.batch // stage.accumulate for name, stage in trainings}


def execute(
    prepared: Prepared, *, started: float | None = None, use_ray: bool = True,
    notice: Callable[[str], None] = lambda line: None, finished: Callable[[Outcome], None] = lambda outcome: None,
) -> RunResult:  # fmt: skip
    """Run all plans, judge, report.

    Args:
        started: `time.perf_counter()` at the start of the process, for the bookkeeping of overhead.
        use_ray: False runs everything in this process, rounds too; answers are the same.
    Raises:
        Interrupted: the user asked to stop; everything done is kept. UserError: something the user can mend.
    """
    begin = started if started is not None else time.perf_counter()
    store, folder, recipe = prepared.store, prepared.folder, prepared.recipe
    (folder / "stop").unlink(missing_ok=True)  # an earlier run's; who asks while Ray starts is heard at the first stage
    todo = [stage for plan in prepared.plans for stage in plan.stages if not store.has(stage.key)]
    if todo and use_ray:
        from orchestrator.cluster.connect import connect, joined, preflight

        problems = [problem for plan in prepared.plans for problem in preflight(recipe.resources, batches_of(plan))]
        if not problems:
            connect(recipe.resources)
            if joined():
                from orchestrator.cluster.nodes import check_nodes

                problems = check_nodes(recipe.resources, store.root)
        if problems:
            raise report(prepared.label, problems)
    folder.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(store.root)
    recorder = Recorder(folder)
    sender = Sender(folder, uri=uri, experiment=recipe.name, load_model=lambda key: load_for_registry(store, key))
    _write_head(prepared)
    workers: Any = None
    rounds: dict[str, Any] = {}
    together: dict[str, Any] | None = None
    if todo and use_ray:
        from orchestrator.cluster.coordinator import at_a_time, coordinated
        from orchestrator.cluster.fit import RayWorkers

        workers, rounds = RayWorkers(recipe.resources), {"rounds": coordinated}
        together = at_a_time(recipe.resources)
    up = time.perf_counter()
    _record_head(prepared, recorder)
    sender.start()
    outcomes: list[Outcome] = []
    status: Status = "FAILED"
    result: RunResult | None = None

    def clock() -> dict[str, float]:
        wall, computing = time.perf_counter() - begin, sum(outcome.computing for outcome in outcomes)
        start_up = up - begin
        return {"total": wall, "start_up": start_up, "computing": computing, "overhead": wall - start_up - computing}

    try:
        plans = [
            (plan, Setting(store, folder, recipe.resources, recorder, prepared.prefix(plan)))
            for plan in prepared.plans
        ]  # fmt: skip
        if together is not None:
            from orchestrator.cluster.coordinator import run_together

            outcomes += run_together(plans, **together, notice=notice, finished=finished)
        else:
            for plan, setting in plans:
                outcomes += run_plan(plan, setting, workers=workers, notice=notice, finished=finished, **rounds)
        status = "FINISHED"
        update_head(
            folder, verdict=_verdict(outcomes), comparison=_comparison(outcomes, prepared.plans), seconds=clock(),
            status=status,
        )  # fmt: skip
        result = _result(prepared, write_report(store, folder))
        _record_result(prepared, result, recorder)
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        if status == "FINISHED":
            shutil.rmtree(store.root / "features", ignore_errors=True)
        recorder.end(PIPELINE, status)
        recorder.close()
        late = sender.finish(SEND_SECONDS if status == "FINISHED" else 2.0)
        if late:
            notice(late)
        seconds = clock()
        with contextlib.suppress(OSError):  # the disk may be what ended the run
            update_head(
                folder, seconds=seconds, status=status, finished=datetime.now(UTC).isoformat(timespec="seconds")
            )
    result.seconds = seconds
    return result


def load_for_registry(store: Store, key: str) -> tuple[nn.Module, np.ndarray]:
    """A stored classifier as images in [0, 1] to logits, with an example batch, for a model registry."""
    checkpoint = store.open_artifact(key)
    assert isinstance(checkpoint, Checkpoint)
    pixels = checkpoint.model["pixels"]
    return _Classifier(checkpoint.build()).eval(), np.zeros((2, 3, pixels, pixels), np.float32)


class _Classifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to logits (B, K)."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Any) -> Any:
        return self.method.logits(images)


def _write_head(prepared: Prepared) -> None:
    folder = prepared.folder
    replace_file(folder / "recipe.yaml", lambda part: part.write_text(prepared.recipe.text, encoding="utf-8"))
    replace_file(folder / "data.json", lambda part: write_json(part, [data.describe() for data in prepared.data]))
    stages = [
        {"name": prepared.prefix(plan) + s.name, "kind": s.kind, "key": s.key, "round": s.round, "group": s.group,
         "work": dict(s.work), "seed": plan.seed}
        for plan in prepared.plans for s in plan.stages
    ]  # fmt: skip
    update_head(folder, run=prepared.name, recipe=prepared.recipe.name, description=prepared.recipe.description,
                 seeds=[plan.seed for plan in prepared.plans], classes=list(prepared.plans[0].classes),
                 pixels=prepared.recipe.data.pixels, stages=stages,
                 started=datetime.now(UTC).isoformat(timespec="seconds"), status="RUNNING")  # fmt: skip


def _record_head(prepared: Prepared, recorder: Recorder) -> None:
    recipe, plan = prepared.recipe, prepared.plans[0]
    fingerprints = {f"data.{name}": images.fingerprint[:16] for name, images in plan.images.items()}
    recorder.start(PIPELINE, parent=None, name=prepared.name, tags={"recipe": recipe.name, **fingerprints},
                   params={"seed": recipe.seed, "seeds": recipe.seeds, "pixels": recipe.data.pixels})  # fmt: skip
    for name, images in plan.images.items():
        recorder.data(PIPELINE, name, images.fingerprint, recipe.data.splits[name].source, name)
    recorder.artifact(PIPELINE, prepared.folder / "recipe.yaml", "recipe.yaml")


def _verdict(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """The last judge's verdict, over all seeds."""
    judges = [outcome for outcome in outcomes if outcome.kind == "Judge" and outcome.facts]
    return combine([outcome.facts for outcome in judges if _stage(outcome) == _stage(judges[-1])]) if judges else None


def _comparison(outcomes: Sequence[Outcome], plans: Sequence[Plan]) -> dict[str, Any] | None:
    """The last comparison, over all seeds."""
    found = [outcome for outcome in outcomes if outcome.kind == "Compare" and outcome.facts]
    if not found:
        return None
    last = [outcome for outcome in found if _stage(outcome) == _stage(found[-1])]
    names = [{stage.key: stage.name for stage in plan.stages} for plan in plans]
    return comparison.combine([(o.facts, n) for o, n in zip(last, names, strict=True)]).json()


def _stage(outcome: Outcome) -> str:
    return outcome.name.rpartition("/")[2]


def _result(prepared: Prepared, report_path: Path) -> RunResult:
    stages = [dict(line) for line in read_outcomes(prepared.folder, prepared.stage_names())]
    head = read_head(prepared.folder)
    return RunResult(
        prepared.name, str(prepared.store.root), str(report_path), head["verdict"], stages, head["comparison"]
    )


def _record_result(prepared: Prepared, result: RunResult, recorder: Recorder) -> None:
    recorder.artifact(PIPELINE, prepared.folder / "report.html", "report.html")
    if result.comparison:
        means = {
            f"comparison.{s['arm']}": float(s["mean"]) for s in result.comparison["arms"]
            if s["protocol"] == result.comparison["protocol"] and s["tap"] is None
        }  # fmt: skip
        recorder.metrics(PIPELINE, means, step=0)
    if result.verdict is None:
        return
    values = {f"verdict.{k}": float(result.verdict[k]) for k in ("baseline", "final", "gain", "low", "high")}
    recorder.metrics(PIPELINE, values, step=0)
    recorder.tags(PIPELINE, {"mlflow.note.content": result.verdict["sentence"]})
    best = result.verdict.get("scores", {}).get("final", {}).get("key")
    if best:
        recorder.model(PIPELINE, key=best, registered_name=prepared.recipe.name, alias="champion")
