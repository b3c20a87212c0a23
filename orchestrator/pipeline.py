"""Run a plan: stages in order, stored answers skipped, each new answer committed whole."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orchestrator.artifacts import Artifact, Checkpoint, Decision
from orchestrator.context import Context, Interrupted, Workers
from orchestrator.data.images import Images
from orchestrator.errors import UserError
from orchestrator.plan import Plan, Planned, Unit, units
from orchestrator.recipe import Resources
from orchestrator.records import Recorder, Status
from orchestrator.stage import StopRound, inputs_of
from orchestrator.store import Store, replace_file

PIPELINE = "run"  # the tracking run above all others of a run
PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow")


@dataclass
class Outcome:
    """How a stage went in this run. `seconds` is its whole time, `computing` what was not overhead."""

    name: str
    kind: str
    key: str
    state: str  # waiting, running, ran, stored, resumed, skipped, interrupted, failed
    seconds: float = 0.0
    computing: float = 0.0
    digest: str | None = None
    round: int | None = None
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What running needs besides the plan: where answers go, who works, who is told. Travels to other processes."""

    store: Store
    folder: Path  # of the run
    resources: Resources
    recorder: Recorder | None = None
    prefix: str = ""  # before stage names, where a run has several seeds
    parent: str = PIPELINE  # the tracking run above the stages
    watcher: Callable[..., None] | None = None  # as Context.watcher, told the stage's name before the rest

    def stage_file(self, name: str) -> Path:
        """Where a stage's outcome is kept: one file a stage, so that processes never write the same one."""
        return self.folder / "stages" / f"{name}.json"

    def run_of(self, planned: Planned) -> tuple[str, str]:
        """(tracking run, its parent) of a stage: under the pipeline, or under its round, which is under its rounds."""
        parent = self.parent if planned.group is None else f"{self.prefix}{planned.group}.{planned.round}"
        return f"{self.prefix}{planned.name}", parent

    def tell(self, outcome: Outcome) -> None:
        """Keep an outcome for whoever looks: the table, `status`, the report."""
        path = self.stage_file(outcome.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**asdict(outcome), "time": time.time()}, ensure_ascii=False)
        replace_file(path, lambda part: part.write_text(line, encoding="utf-8"))


def threads_of(resources: Resources) -> int:
    """Threads a process uses: the machine's cores, shared by workers and stages, unless the recipe says."""
    return resources.threads or max(1, cores() // (resources.workers * (resources.parallel or 1)))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_artifact(name: str, plan: Plan, store: Store) -> Artifact:
    """The answer a wire reads. Rounds give the last promoted checkpoint, or the first teacher if none got that far."""
    if name not in plan.rounds:
        return store.open_artifact(plan.key(name))
    group = plan.rounds[name]
    for gate in reversed(group.gates):
        if store.has(plan.key(gate)):
            return store.open_artifact(plan.key(gate))
    return resolve_artifact(group.first, plan, store)


def gather_inputs(planned: Planned, plan: Plan, store: Store) -> dict[str, Any]:
    """The keyword arguments of a stage's `run`."""
    found: dict[str, Any] = {}
    for name, known in inputs_of(type(planned.stage)).items():
        targets = planned.inputs.get(name)
        if not targets:
            continue
        if targets[0] in plan.images:
            images: list[Images] = [plan.images[target] for target in targets]
            found[name] = images[0] if len(images) == 1 else Images.concat(*images)
            continue
        if known.several:  # a round that was never reached has no answer to give
            targets = tuple(target for target in targets if target in plan.rounds or store.has(plan.key(target)))
        values = [resolve_artifact(target, plan, store) for target in targets]
        if Checkpoint in known.kinds:
            values = [store.open_artifact(v.facts["promoted"]) if isinstance(v, Decision) else v for v in values]
        found[name] = tuple(values) if known.several else values[0]
    return found


def run_stage(
    planned: Planned, plan: Plan, setting: Setting, workers: Workers | None, notice: Callable[[str], None]
) -> Outcome:
    """Answer one question, or find its answer.

    Raises:
        Interrupted: the user asked to stop.
        StopRound: a guard refuses to go on.
        UserError: something the user can mend.
    """
    store, begin = setting.store, time.perf_counter()
    outcome = Outcome(setting.prefix + planned.name, planned.kind, planned.key, "running", round=planned.round)
    if (setting.folder / "stop").exists():
        raise Interrupted
    _record_start(planned, setting)
    if store.has(planned.key):
        return _stored(outcome, planned, setting)
    setting.tell(outcome)
    with store.lock(planned.key, lambda: notice(f"{planned.name}: another process works on it; waiting")):
        if store.has(planned.key):
            return _stored(outcome, planned, setting)
        workdir = store.workdir(planned.key)
        resumed = (workdir / "training.pt").exists()
        notes: list[str] = []

        def note(line: str) -> None:
            notes.append(line)
            notice(f"{planned.name}: {line}")

        context = Context(
            workdir, store.output(planned.key), planned.seed, plan.classes, threads=threads_of(setting.resources),
            workers=workers, round=planned.round, stop_file=setting.folder / "stop",
            save_seconds=setting.resources.save_seconds, run=setting.run_of(planned)[0], recorder=setting.recorder,
            notice=note, features=store.root / "features",
            watcher=None if setting.watcher is None else functools.partial(setting.watcher, planned.name),
        )  # fmt: skip
        torch.set_num_threads(context.threads)
        try:
            inputs = gather_inputs(planned, plan, store)
            artifact = planned.stage.run(context, **inputs)  # type: ignore[attr-defined]
            manifest = {
                "stage": planned.question["stage"], "question": dict(planned.question),
                "inputs": {name: _key_of(value) for name, value in inputs.items()}, "round": planned.round,
                "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begin,
                "computing": context.computing, "versions": versions(), "commit": commit(),
                "machine": platform.machine(), "notes": notes,
            }  # fmt: skip
            artifact = store.commit(planned.key, artifact, manifest)
        except (Interrupted, StopRound, SystemExit) as stop:  # the last by a watcher
            outcome.state = "skipped" if isinstance(stop, StopRound) else "interrupted"
            told = {Interrupted: "stopped by you; run the same command to go on", SystemExit: "stopped early"}
            outcome.note = told.get(type(stop), str(stop))
            setting.tell(outcome)
            _record_end(outcome, planned, setting, "KILLED")
            raise
        except Exception as error:
            outcome.state, outcome.note = "failed", str(error)
            with contextlib.suppress(OSError):  # the disk may be what failed
                setting.tell(outcome)
                _record_end(outcome, planned, setting, "FAILED")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise UserError(f"store {store.root}: {planned.name}: {error.strerror}; free some space and run the "
                                f"same command again: it goes on from its last checkpoint") from error  # fmt: skip
            if isinstance(error, FloatingPointError):
                raise UserError(f"{planned.name}: {error}") from error
            raise
    outcome.state = "resumed" if resumed else "ran"
    outcome.seconds, outcome.computing = time.perf_counter() - begin, context.computing
    outcome.facts, outcome.digest = artifact.facts, store.manifest(planned.key)["digest"]
    outcome.note = "; ".join(notes)
    setting.tell(outcome)
    _record_end(outcome, planned, setting, "FINISHED")
    return outcome


def _record_start(planned: Planned, setting: Setting) -> None:
    if setting.recorder is None:
        return
    run, parent = setting.run_of(planned)
    tags = {
        "stage": planned.kind,
        "key": planned.key,
        "method": planned.question["config"].get("method", {}).get("use", ""),
    }
    tags |= {f"input.{name}": ", ".join(keys) for name, keys in planned.question["inputs"].items()}  # lineage
    if planned.round is not None:
        tags["round"] = str(planned.round)
    params = {**flat(planned.question["config"]), "seed": planned.seed}
    setting.recorder.start(run, parent=parent, name=planned.name, tags=tags, params=params)


def _record_end(outcome: Outcome, planned: Planned, setting: Setting, status: Status) -> None:
    if setting.recorder is None:
        return
    run, parent = setting.run_of(planned)
    numbers = {
        k: float(v) for k, v in flat(outcome.facts).items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    if numbers:
        setting.recorder.metrics(run, numbers, step=planned.round or 0)
    if planned.group is not None:
        short = planned.name.rpartition(".")[2]
        setting.recorder.metrics(parent, {f"{short}.{k}": v for k, v in numbers.items()}, step=planned.round or 0)
    words = {k: v for k, v in outcome.facts.items() if isinstance(v, str)}
    setting.recorder.tags(run, {"state": outcome.state, "digest": outcome.digest or "", **words})
    setting.recorder.end(run, status)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists of plain values stay."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}".lstrip(".")).items()}
    return {path: value}


def _stored(outcome: Outcome, planned: Planned, setting: Setting) -> Outcome:
    manifest = setting.store.manifest(outcome.key)
    outcome.state, outcome.digest, outcome.facts = "stored", manifest["digest"], manifest["facts"]
    setting.tell(outcome)
    _record_end(outcome, planned, setting, "FINISHED")
    return outcome


def _key_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_key_of(item) for item in value]
    return f"images:{value.fingerprint}" if isinstance(value, Images) else value.key


def run_unit(
    unit: Unit, plan: Plan, setting: Setting, workers: Workers | None, notice: Callable[[str], None],
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """A stage, or the rounds of a group.

    Raises:
        UserError: a guard outside of rounds refused to go on, or what `run_stage` raises.
    """
    if unit.name in plan.rounds:
        return _run_rounds(unit, plan, setting, workers, notice, finished)
    (planned,) = unit.stages
    try:
        outcome = run_stage(planned, plan, setting, workers, notice)
    except StopRound as stop:
        raise UserError(f"{planned.name}: {stop}") from stop
    finished(outcome)
    return [outcome]


def _run_rounds(
    unit: Unit, plan: Plan, setting: Setting, workers: Workers | None, notice: Callable[[str], None],
    finished: Callable[[Outcome], None],
) -> list[Outcome]:  # fmt: skip
    """The rounds of a group, in order, up to the last or the one a gate or a guard ends. State is the store's alone."""
    outcomes: list[Outcome] = []
    over, group = "", unit.name
    if setting.recorder is not None:
        top = f"{setting.prefix}{group}"
        setting.recorder.start(top, parent=setting.parent, name=group, tags={"stage": "rounds"}, params={})
        for number in sorted({stage.round for stage in unit.stages if stage.round is not None}):
            tags = {"stage": "round", "round": str(number)}
            setting.recorder.start(f"{top}.{number}", parent=top, name=f"{group} {number}", tags=tags, params={})

    def end(status: Status) -> None:
        if setting.recorder is not None:
            for run in {setting.run_of(s)[1] for s in unit.stages} | {f"{setting.prefix}{group}"}:
                setting.recorder.end(run, status)

    try:
        for planned in unit.stages:
            name = setting.prefix + planned.name
            outcome = Outcome(name, planned.kind, planned.key, "skipped", round=planned.round, note=over)
            if not over:
                try:
                    outcome = run_stage(planned, plan, setting, workers, notice)
                    if outcome.facts.get("action") == "stopped":
                        over = f"the rounds ended at {planned.name}: {outcome.facts['reason']}"
                except StopRound as stop:
                    outcome.note = over = f"the rounds ended at {planned.name}: {stop}"
                    notice(over)
            if outcome.state == "skipped":
                setting.tell(outcome)
            outcomes.append(outcome)
            finished(outcome)
    except BaseException as stop:
        with contextlib.suppress(OSError):  # the disk may be what failed
            end("KILLED" if isinstance(stop, Interrupted | SystemExit) else "FAILED")
        raise
    end("FINISHED")
    return outcomes


def run_plan(
    plan: Plan, setting: Setting, *, workers: Workers | None = None,
    rounds: Callable[..., list[Outcome]] = run_unit, notice: Callable[[str], None] = lambda line: None,
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Every unit of a plan in order. `rounds` runs a group: here, or in a coordinator of its own.

    Raises:
        UserError: as `run_unit`.
    """
    outcomes: list[Outcome] = []
    for unit in units(plan):
        run = rounds if unit.name in plan.rounds else run_unit
        outcomes += run(unit, plan, setting, workers, notice, finished)
    return outcomes


def versions() -> dict[str, str]:
    """Versions of what an answer may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of this code where it is a checkout; recorded, not hashed."""
    here = Path(__file__).parent
    asked = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
