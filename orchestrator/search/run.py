"""A search from its question to its result: what `orchestrator tune` and any script calls.

Trials, then the best and the recipe's default on seeds that the search did not use, then, once, the best on the test
images. Everything that ended is in the search's folder and in the store: the same call goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orchestrator.artifacts import write_json
from orchestrator.context import Interrupted, Workers
from orchestrator.data.splits import Data, open_data
from orchestrator.errors import UserError
from orchestrator.pipeline import PIPELINE, Outcome, Setting, cores, run_plan
from orchestrator.plan import Plan, make_plan
from orchestrator.recipe import Recipe, Resources, parse, report
from orchestrator.records import Recorder, Status
from orchestrator.report.html import write_report
from orchestrator.run import SEND_SECONDS, batches_of, load_for_registry
from orchestrator.runs import read_head, update_head
from orchestrator.search.question import (
    HOLDOUT,
    TEST,
    Budget,
    Metric,
    Search,
    identity,
    listed_points,
    metrics_of,
    pruned,
    seen_accuracy,
    touched,
)
from orchestrator.search.trials import (
    SEARCH,
    UNDONE,
    Trial,
    best_of,
    conclusion,
    confirm_gain,
    counts,
    read_trials,
    trial_file,
)
from orchestrator.store import Store, replace_file
from orchestrator.tracking import Sender, tracking_uri
from orchestrator.training.health import LOOKS

ENOUGH = 200  # held-out images below which a person is told how little they tell
FAILURES = 3  # trials that fail before any other ends: then it is not the values


@dataclass(frozen=True)
class Room:
    """How trials share the machine: `concurrent` of them with `threads` for each of `workers` processes."""

    concurrent: int
    threads: int
    workers: int
    gpus: float  # for each worker

    def line(self, cpus: float) -> str:
        """In words."""
        each = f"{self.workers} workers of " if self.workers > 1 else ""
        gpu = f" and {self.gpus:g} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.concurrent} at once, {each}{threads}{gpu} each, of {cpus:g} cores"


def make_room(resources: Resources, asked: int | None, trials: int, cpus: float, gpus: float) -> Room:
    """Add up what trials need at once. On a machine with GPUs a trial takes one, unless the recipe says otherwise.

    Args:
        asked: trials at once; None: as many as there is room for.
    Raises:
        UserError: it can never fit, with the numbers.
    """
    workers = resources.workers
    each_gpu = resources.gpus or (1.0 if gpus else 0.0)
    if each_gpu * workers > gpus:
        raise UserError(f"resources.gpus: a trial needs {each_gpu * workers:g} GPUs, there are {gpus:g}; lower it")
    by_gpu = int(gpus // (each_gpu * workers)) if each_gpu else trials
    threads = resources.threads or 1
    if threads * workers > cpus:
        raise UserError(f"resources: a trial needs {threads * workers} cores for {workers} worker"
                        f"{'s' if workers > 1 else ''} with {threads} threads, there are {cpus:g}; lower "
                        f"resources.{'workers' if workers > 1 else 'threads'}")  # fmt: skip
    most = max(1, min(int(cpus // (threads * workers)), by_gpu))
    if asked is not None and asked > most:
        need = f"{asked * threads * workers:g} cores" + (
            f" and {asked * each_gpu * workers:g} GPUs" if each_gpu else ""
        )
        have = f"{cpus:g}" + (f" cores and {gpus:g} GPUs" if each_gpu else "")
        raise UserError(f"--concurrent {asked}: needs {need}, there are {have}; use --concurrent {most}")
    concurrent = asked or min(most, trials)
    return Room(concurrent, resources.threads or max(1, int(cpus // (concurrent * workers))), workers, each_gpu)


@dataclass(frozen=True)
class PreparedSearch:
    """A search on its data: the plan of the recipe's own values, and how much runs at once."""

    search: Search
    recipe: Recipe  # of a trial with the recipe's own values
    store: Store
    data: Data
    plan: Plan  # what the metric needs of it
    budget: Budget
    room: Room
    cpus: float
    confirm: int  # seeds
    name: str
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the search keeps what it says."""
        return self.store.root / "runs" / self.name

    def shared(self) -> tuple[list[str], list[str]]:
        """The stages that are computed once for all trials, and those of each trial."""
        places = [place for parameter in self.search.parameters for place in parameter.places]
        varying = touched(self.recipe, places)
        names = [stage.name for stage in self.plan.stages]
        return [name for name in names if name not in varying], [name for name in names if name in varying]

    def about(self) -> dict[str, Any]:
        """What is searched, for the head of its folder: plain values that are read without Ray."""
        search, budget, (once, each) = self.search, self.budget, self.shared()
        return {
            "metric": str(search.metric), "share": search.metric.accuracy, "mode": search.mode,
            "algorithm": search.algorithm, "stop": search.stop, "looks": search.looks,
            "parameters": [parameter.json() for parameter in search.parameters], "trials": budget.trials,
            "budget_seconds": budget.seconds, "budget_gpu_hours": budget.gpu_hours,
            "concurrent": self.room.concurrent, "threads": self.room.threads, "once": once, "each": each,
            "held_out": int(self.data.splits[HOLDOUT].labelled.sum()),
        }  # fmt: skip

    def json(self) -> dict[str, Any]:
        """The object that `tune --dry-run --json` prints."""
        return {
            "search": self.name, "store": str(self.store.root), "question": self.about(), "notes": list(self.notes)
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What will be searched, in plain words."""
        search, (once, each) = self.search, self.shared()
        lines = [f"search {self.name}"]
        for parameter in search.parameters:
            where = ", ".join(place for place in parameter.places)
            default = json.dumps(parameter.default)
            lines.append(f"  {parameter.name}: {parameter.text}, now {default}  ({where})")
        held = self.data.splits[HOLDOUT]
        n = int(held.labelled.sum())
        lines.append(
            f"  {search.mode} of {search.metric} on {n:,} held-out images; the test images are read once, at the end"
        )
        if n < ENOUGH and search.metric.accuracy:
            lines.append(f"  so few tell little: an accuracy of 50 % has an interval of ±{98 / n**0.5:.0f} points; "
                         f"more with data.{HOLDOUT}=...")  # fmt: skip
        done = len(read_trials(self.folder))
        kept = f", {done} of them begun" if done else ""
        stop = "early stopping by ASHA" if search.stop == "asha" else "no early stopping"
        lines.append(
            f"  up to {self.budget.trials} trials{kept} by {search.algorithm}, {stop}; {self.room.line(self.cpus)}"
        )
        limit = (
            self.budget.seconds
            and f"{self.budget.seconds:g} s"
            or self.budget.gpu_hours
            and f"{self.budget.gpu_hours:g} GPU-hours"
        )
        if limit:
            lines.append(f"  budget {limit} for the trials; confirming the best comes after it")
        if once:
            lines.append(f"  once for all: {', '.join(once)}")
        lines.append(f"  each trial: {', '.join(each)}")
        return lines + [f"  {note}" for note in self.notes]


def prepare_search(
    recipe: Recipe, root: Path, search: Search, *, budget: Budget, concurrent: int | None = None, confirm: int = 3,
    notes: tuple[str, ...] = (), progress: Callable[[str, int, int], None] | None = None,
) -> PreparedSearch:  # fmt: skip
    """Open the store, catalogue the data, plan the recipe's own values, and add up what runs at once.

    Raises:
        UserError: with every problem found, before anything is trained.
    """
    from orchestrator.cluster.connect import connect, joined, preflight

    store = Store.open(root)
    held = search.recipe({})
    if search.algorithm != "tpe":  # a grid may need more trials than there are
        budget = replace(budget, trials=len(listed_points(search, budget.trials, held.seed)))
    if joined():
        there = connect(held.resources, dashboard=True)
        cpus, gpus = there["cpus"], there["gpus"]
    else:
        cpus, gpus = float(cores()), float(torch.cuda.device_count())
    room = make_room(held.resources, concurrent, budget.trials, cpus, gpus)
    data = open_data(held.data, store.root / "data", seed=held.seed, threads=room.threads, progress=progress)
    plan = pruned(make_plan(held, data, 0, search.label), held, search.metric.stage)
    if problems := preflight(replace(held.resources, threads=room.threads, labellers=0), batches_of(plan)):
        raise report(search.label, problems)
    return PreparedSearch(
        search, held, store, data, plan, budget, room, cpus, confirm, search.name(plan), notes
    )  # fmt: skip


# One trial ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What runs a trial besides its file; travels to its process."""

    search: Search
    root: Path
    folder: Path
    room: Room
    test: Metric | None = None  # what is read of the test images


def run_trial(
    trial: Trial, job: Job, *, workers: Workers | None = None,
    tell: Callable[[int, float], None] = lambda look, accuracy: None,
) -> str | None:  # fmt: skip
    """Run a trial in this process from where it was, keeping its file up to date.

    Args:
        tell: of each look at the hold-out during training (look, accuracy); an exception from it ends the trial early.
    Returns:
        What must end the whole search, such as a full disk; else None, whatever became of the trial.
    """
    search, begin, before = job.search, time.monotonic(), trial.seconds
    trial.state, trial.note, trial.stages = "running", "", []
    trial.write(job.folder)
    recorder, trouble, status = Recorder(job.folder), None, "FAILED"
    metric = job.test if trial.role == TEST and job.test is not None else search.metric

    def keep() -> None:
        trial.seconds = before + time.monotonic() - begin
        trial.write(job.folder)

    def done(outcome: Outcome) -> None:
        trial.stages.append(
            {
                "name": outcome.name.partition("/")[2],
                "key": outcome.key,
                "state": outcome.state,
                "seconds": outcome.seconds,
            }
        )
        keep()

    def seen(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        accuracy = seen_accuracy(values)
        if accuracy is None or stage not in search.watched:
            return
        look = LOOKS * search.watched.index(stage) + round(LOOKS * step / total)
        trial.looks.append([look, accuracy])
        keep()
        recorder.metrics(trial.run, {"holdout_accuracy": accuracy}, step=look)
        tell(look, accuracy)

    def note(line: str) -> None:
        trial.note = line

    try:
        trial.objective, trial.state = _answer(trial, job, metric, recorder, workers, seen, done, note), "finished"
        recorder.metrics(trial.run, {str(metric): trial.objective, "objective": trial.objective}, step=0)
        status = "FINISHED"
    except Interrupted:
        trial.state, status = "interrupted", "KILLED"
    except SystemExit:
        trial.state, status = "stopped early", "KILLED"
        raise
    except (UserError, FloatingPointError) as error:
        trial.state, trial.note = "failed", str(error)
        if isinstance(error.__cause__, OSError):  # the disk, not the values: it is tried again
            trial.state, trouble = "interrupted", str(error)
    except Exception as error:
        trial.state, trial.note = "failed", f"{type(error).__name__}: {error}"
        (job.folder / trial.file).with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        keep()
        recorder.tags(trial.run, {"state": trial.state, **({"note": trial.note} if trial.note else {})})
        recorder.end(trial.run, status)  # type: ignore[arg-type]
        recorder.close()
    return trouble


def _answer(
    trial: Trial, job: Job, metric: Metric, recorder: Recorder, workers: Workers | None, seen: Callable[..., None],
    done: Callable[[Outcome], None], note: Callable[[str], None],
) -> float:  # fmt: skip
    """The metric of a trial's recipe."""
    search = job.search
    store = Store.open(job.root)
    recipe = search.recipe(trial.values, test=trial.role == TEST, seed=trial.seed)
    shown = {parameter.name: json.dumps(trial.values[parameter.name]) for parameter in search.parameters}
    recorder.start(
        trial.run, parent=PIPELINE, name=trial.run.replace("-", " "), params={**shown, "seed": recipe.seed},
        tags={"stage": "trial", "role": trial.role},
    )  # fmt: skip
    resources = replace(recipe.resources, threads=job.room.threads, labellers=0)
    data = open_data(recipe.data, store.root / "data", seed=recipe.seed, threads=job.room.threads)
    plan = pruned(make_plan(recipe, data, 0, search.label), recipe, metric.stage)
    watcher = seen if search.watched and workers is None and trial.role == "search" else None
    setting = Setting(store, job.folder, resources, recorder, f"{trial.run}/", trial.run, watcher)
    outcomes = run_plan(plan, setting, workers=workers, notice=note, finished=done)
    last = next(outcome for outcome in outcomes if outcome.name == f"{trial.run}/{metric.stage}")
    if last.state == "skipped":
        raise UserError(f"{metric.stage} was skipped: {last.note}")
    return metric.read(last.facts)


# The whole search -----------------------------------------------------------------------------------------------------


class Spent:
    """What the trials of a search took, kept in its folder: a search that goes on has spent before."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spent.json"
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.seconds, self.gpu_hours = known.get("seconds", 0.0), known.get("gpu_hours", 0.0)

    def add(self, seconds: float, gpus: float) -> None:
        """Time that passed while so many GPUs were in use."""
        self.seconds += seconds
        self.gpu_hours += seconds * gpus / 3600

    def over(self, budget: Budget) -> str | None:
        """Which limit is reached, in words."""
        if budget.seconds is not None and self.seconds >= budget.seconds:
            return f"{budget.seconds:g} s"
        if budget.gpu_hours is not None and self.gpu_hours >= budget.gpu_hours:
            return f"{budget.gpu_hours:g} GPU-hours"
        return None

    def keep(self) -> None:
        """Write it, by one rename."""
        line = {"seconds": self.seconds, "gpu_hours": self.gpu_hours}
        replace_file(self.path, lambda part: write_json(part, line))


def execute_search(
    prepared: PreparedSearch, *, use_ray: bool = True, notice: Callable[[str], None] = lambda line: None,
    finished: Callable[[Trial], None] = lambda trial: None,
) -> dict[str, Any]:  # fmt: skip
    """Run trials until the budget is spent, confirm the best, read the test images once, and report.

    Args:
        use_ray: False runs the listed points of a random or grid search in this process, one after the other.
    Returns:
        The search's result, as its head keeps it.
    Raises:
        Interrupted: the user asked to stop; everything done is kept. UserError: something the user can mend.
    """
    store, folder, search = prepared.store, prepared.folder, prepared.search
    folder.mkdir(parents=True, exist_ok=True)
    stop = folder / "stop"
    stop.unlink(missing_ok=True)
    uri = tracking_uri(store.root)
    recorder = Recorder(folder)
    sender = Sender(
        folder, uri=uri, experiment=prepared.recipe.name, load_model=lambda key: load_for_registry(store, key)
    )
    _write_head(prepared)
    _record_head(prepared, recorder)
    run_trials: Callable[..., str | None] = _in_process
    importance: Callable[..., dict[str, float]] = _untold
    if use_ray:
        from orchestrator.cluster import search as cluster
        from orchestrator.cluster.connect import connect

        connect(prepared.recipe.resources, dashboard=True)
        run_trials, importance = cluster.run_trials, cluster.importance
    sender.start()
    status: Status = "FAILED"
    try:
        job = Job(search, store.root, folder, prepared.room, final_metric(search))
        limit = run_trials(prepared, job, _undone(folder), notice, finished)
        if limit is None and stop.exists():
            raise Interrupted
        stop.unlink(missing_ok=True)
        result = _conclude(prepared, job, run_trials, importance, limit, notice, finished)
        status = "FINISHED"
        update_head(folder, result=result, status=status, finished=datetime.now(UTC).isoformat(timespec="seconds"))
        write_report(store, folder)
        _record_result(prepared, result, recorder)
        return result
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        shutil.rmtree(store.root / "features", ignore_errors=True)
        recorder.end(PIPELINE, status)
        recorder.close()
        late = sender.finish(SEND_SECONDS if status == "FINISHED" else 2.0)
        if late:
            notice(late)
        update_head(folder, status=status)


def _untold(search: Search, trials: list[Trial]) -> dict[str, float]:
    """Without Optuna nothing is said of importance."""
    return {}


def _undone(folder: Path) -> list[Trial]:
    """Trials that were begun and did not end: they come first."""
    return [trial for trial in read_trials(folder) if trial.state in UNDONE]


def _in_process(
    prepared: PreparedSearch, job: Job, first: list[Trial], notice: Callable[[str], None],
    finished: Callable[[Trial], None], *, more: bool = True,
) -> str | None:  # fmt: skip
    """The trials one after the other, without Ray: see `orchestrator.cluster.search.run_trials`."""
    search, budget, spent = prepared.search, prepared.budget, Spent(job.folder)
    if search.algorithm == "tpe" and more:
        raise ValueError("TPE needs use_ray=True")
    queue = list(first)
    if more:
        known = {trial.number for trial in read_trials(job.folder)}
        points = listed_points(search, budget.trials, prepared.recipe.seed)
        queue += [Trial(n, p, file=trial_file(n)) for n, p in enumerate(points) if n not in known]
    for trial in queue:
        if (job.folder / "stop").exists():
            return None
        if more and (limit := spent.over(budget)):
            return limit
        begin = time.monotonic()
        trouble = run_trial(trial, job)
        spent.add(time.monotonic() - begin, 0.0)
        spent.keep()
        finished(trial)
        if trouble:
            raise UserError(trouble)
        if more:
            check_failures(read_trials(job.folder))
    return None


def check_failures(trials: list[Trial]) -> None:
    """Give up when the first trials all failed. Raises UserError with what the first one said."""
    ended = [trial for trial in trials if trial.state in ("finished", "stopped early", "failed")]
    if len(ended) >= FAILURES and all(trial.state == "failed" for trial in ended):
        raise UserError(f"the first {len(ended)} trials failed, the first with: {ended[0].note}")


def final_metric(search: Search) -> Metric | None:
    """What tells how good the best recipe is on the test images; None where nothing reads them.

    The search's own metric where it does, or that of the last Judge or Probe.
    """
    recipe = parse(search.base, label=search.label)
    readers = [
        node for node in recipe.nodes if any(TEST in targets for targets in node.inputs.values()) and metrics_of(node)
    ]
    own = next((node for node in readers if node.name == search.metric.stage), None)
    if own is not None:
        return search.metric
    return Metric(readers[-1].name, metrics_of(readers[-1])[0]) if readers else None


def _conclude(
    prepared: PreparedSearch, job: Job, run_trials: Callable[..., str | None],
    importance: Callable[..., dict[str, float]], limit: str | None, notice: Callable[[str], None],
    finished: Callable[[Trial], None],
) -> dict[str, Any]:  # fmt: skip
    """Choose, confirm, and read the test images."""
    search, folder = prepared.search, prepared.folder
    trials = read_trials(folder)
    best = best_of(trials, search.mode)
    if best is None:
        said = next((trial.note for trial in trials if trial.note), "none was begun")
        raise UserError(f"no trial of {prepared.name} ended in a result: {said}; give it a larger --budget or --trials")
    default, same = search.default(), best.values == search.default()
    head = f"# the best of {len(trials)} trials of {prepared.name}, by {search.metric} on the hold-out\n"
    text = head + search.text(best.values, test=True)
    replace_file(folder / "best.yaml", lambda part: part.write_text(text, encoding="utf-8"))
    ended = ", ".join(f"{count} {state}" for state, count in counts(trials).items())
    notice(f"{'the budget of ' + limit + ' is spent: ' if limit else ''}{len(trials)} trials, {ended}; the best is "
           f"trial {best.number}")  # fmt: skip
    seeds = [prepared.recipe.seed + 1 + k for k in range(0 if same else prepared.confirm)]
    asked = [
        _after(role, values, seed) for seed in seeds for role, values in (("default", default), ("best", best.values))
    ]
    if job.test is not None:
        asked.append(_after(TEST, best.values, prepared.recipe.seed))
    known = {trial.file: trial for trial in read_trials(folder, "confirm") if trial.state == "finished"}
    todo = [trial for trial in asked if trial.file not in known]
    if todo:
        run_trials(prepared, job, todo, notice, finished, more=False)
    if (folder / "stop").exists():
        raise Interrupted
    after = {trial.file: trial for trial in read_trials(folder, "confirm")}
    ends = [after[trial.file] for trial in asked]
    if failed := [trial for trial in ends if trial.objective is None]:
        raise UserError(f"{failed[0].run}: {failed[0].note or failed[0].state}; the same command tries it again")
    scores = {role: [t.objective or 0.0 for t in ends if t.role == role] for role in ("best", "default", TEST)}
    result: dict[str, Any] = {
        "best": {"number": best.number, "values": best.values, "objective": best.objective},
        "default": next((t.objective for t in trials if t.values == default and t.state == "finished"), None),
        "same": same, "gain": confirm_gain(scores["best"], scores["default"], search.mode) if seeds else None,
        "seeds": seeds, "test": {"metric": str(job.test), "value": scores[TEST][0]} if job.test else None,
        "test_reads": sum(trial.role == TEST for trial in after.values()), "importance": importance(search, trials),
        "trials": counts(trials), "limit": limit, "seconds": Spent(folder).seconds,
    }  # fmt: skip
    result["sentence"] = conclusion(result, str(search.metric), share=search.metric.accuracy)
    return result


def _after(role: str, values: Mapping[str, Any], seed: int) -> Trial:
    """A run after the search: its file says what it is of, so that another best gets another."""
    short = hashlib.sha256(identity(values).encode()).hexdigest()[:8]
    return Trial(0, dict(values), role=role, seed=seed, file=f"confirm/{role}-seed-{seed}-{short}.json")


def _write_head(prepared: PreparedSearch) -> None:
    search, folder = prepared.search, prepared.folder
    replace_file(folder / "recipe.yaml", lambda part: part.write_text(search.base, encoding="utf-8"))
    replace_file(folder / "data.json", lambda part: write_json(part, [prepared.data.describe()]))
    started = (
        read_head(folder)["started"]
        if (folder / "run.json").exists()
        else datetime.now(UTC).isoformat(timespec="seconds")
    )
    update_head(
        folder, run=prepared.name, kind=SEARCH, recipe=prepared.recipe.name, description=prepared.recipe.description,
        seeds=[prepared.recipe.seed], classes=list(prepared.plan.classes), pixels=prepared.recipe.data.pixels,
        stages=[],
        started=started, status="RUNNING", result=None,
        search=prepared.about(),
    )  # fmt: skip


def _record_head(prepared: PreparedSearch, recorder: Recorder) -> None:
    search = prepared.search
    recorder.start(
        PIPELINE, parent=None, name=prepared.name,
        tags={"recipe": prepared.recipe.name, "stage": "search", "metric": str(search.metric), "mode": search.mode},
        params={"seed": prepared.recipe.seed, "algorithm": search.algorithm, "stop": search.stop,
                **{f"range.{p.name}": p.text for p in search.parameters}},
    )  # fmt: skip
    for name, images in prepared.plan.images.items():
        recorder.data(PIPELINE, name, images.fingerprint, prepared.recipe.data.splits[name].source, name)
    recorder.artifact(PIPELINE, prepared.folder / "recipe.yaml", "recipe.yaml")


def _record_result(prepared: PreparedSearch, result: Mapping[str, Any], recorder: Recorder) -> None:
    values = {"best": float(result["best"]["objective"])}
    if result["gain"]:
        values |= {f"gain.{k}": float(v) for k, v in result["gain"].items() if isinstance(v, float)}
    if result["test"]:
        values["test"] = float(result["test"]["value"])
    recorder.metrics(PIPELINE, values, step=0)
    recorder.tags(PIPELINE, {"mlflow.note.content": result["sentence"], "best": str(result["best"]["number"])})
    for name in ("best.yaml", "report.html"):
        recorder.artifact(PIPELINE, prepared.folder / name, name)
