"""Trials on Ray Tune: a trial of one worker trains in its own process, one of several starts a worker group.

Tune runs and stops; what was tried and what came of it is in the search's folder, so a killed driver loses nothing, and
Tune's own records are thrown away. Optuna is told of the trials that ended before.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.cluster.fit import RayWorkers
from orchestrator.errors import UserError
from orchestrator.search.question import Budget, Parameter, Search, listed_points
from orchestrator.search.run import Job, PreparedSearch, Spent, check_failures, run_trial
from orchestrator.search.trials import Trial, read_trial, read_trials, trial_file
from tune_spaces.space import options, snap

OBJECTIVE, LOOK = "objective", "look"
TRIES = 2  # more, of a trial whose process is lost: it goes on from its last checkpoint
GRACE = 0.3  # of its looks at the hold-out that every trial has; below, accuracies tell little of the end
KEEP = 2  # ASHA lets one in so many go on at each rung
LEARNED_FROM = 10  # trials before TPE, which are drawn at random; a third of them where there are fewer
TOLD = 4  # trials with a result from which the importance of parameters is told
POLL_SECONDS = 0.2

_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: trials save and end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files of Tune's beside ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is stopped has nothing to report
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial that is stopped writes its file before its process is used again
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table of its own even when told to be quiet
}


def _trial(config: dict[str, Any], job: Job) -> dict[str, Any]:
    """One trial, in its own process."""
    trial = read_trial(job.folder / config["file"])

    def tell(look: int, accuracy: float) -> None:
        tune.report({LOOK: look, OBJECTIVE: accuracy})  # does not return when the trial is stopped here

    workers = RayWorkers(_of_workers(job)) if job.room.workers > 1 else None
    trouble = run_trial(trial, job, workers=workers, tell=tell)
    worst = 0.0 if job.search.mode == "max" else float("inf")
    value = trial.objective if trial.state == "finished" else None
    return {LOOK: job.search.looks + 1, OBJECTIVE: worst if value is None else value, "trouble": trouble}


def _of_workers(job: Job) -> Any:
    resources = job.search.recipe({}).resources
    return replace(resources, threads=job.room.threads, gpus=job.room.gpus, labellers=0)


class Points(Searcher):
    """Hands out values: first the trials that did not end, then the recipe's own values, then what the algorithm says.

    Each becomes a file before it starts. Ends when there are enough of them, or when `over` says so.
    """

    def __init__(
        self, search: Search, folder: Path, budget: Budget, seed: int, first: Sequence[Trial], more: bool,
        over: Callable[[], bool], finished: Callable[[Trial], None],
    ) -> None:  # fmt: skip
        super().__init__(metric=OBJECTIVE, mode=search.mode)
        self.search, self.folder, self.finished, self.over = search, folder, finished, over
        self.queue, self.live = list(first), dict[str, str]()
        self.trouble: str | None = None
        done = read_trials(folder) if more else []
        self.number = 1 + max((trial.number for trial in done), default=-1)
        self.most = budget.trials if more else 0
        self.listed = listed_points(search, budget.trials, seed) if more and search.algorithm != "tpe" else None
        self.model: OptunaSearch | None = None
        self.asked: set[str] = set()
        if more and search.algorithm == "tpe":
            startup = min(LEARNED_FROM, max(3, budget.trials // 3))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.TPESampler(  # one that goes on must not repeat its first draws
                    seed=seed + len(done), n_startup_trials=startup, constant_liar=True
                )
            self.model = OptunaSearch(distributions(search.parameters), OBJECTIVE, search.mode, sampler=sampler)
            for trial in done:
                self._learn(trial)

    def __reduce__(self) -> tuple[Any, ...]:
        return Searcher, (OBJECTIVE, self.mode)  # Tune keeps a copy for its own way to go on, which is not used

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.over():
            return Searcher.FINISHED
        if self.queue:
            trial = self.queue.pop(0)
        elif self.number >= self.most:
            return Searcher.FINISHED
        else:
            trial = Trial(self.number, self._next(trial_id), file=trial_file(self.number))
            self.number += 1
        trial.write(self.folder)
        self.live[trial_id] = trial.file
        return {"file": trial.file}

    def _next(self, trial_id: str) -> dict[str, Any]:
        if self.listed is not None:
            return self.listed[self.number]
        if self.number == 0 or self.model is None:
            return self.search.default()
        self.asked.add(trial_id)
        found = self.model.suggest(trial_id) or {}
        return {p.name: decode(p, found[p.name]) for p in self.search.parameters}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna is told of the end alone."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = read_trial(self.folder / self.live.pop(trial_id))
        if error:
            trial.state, trial.note = "failed", f"its process was lost {TRIES + 1} times"
            trial.write(self.folder)
        elif trial.state == "running":
            trial.state = "stopped early"
            trial.write(self.folder)
        self.trouble = (result or {}).get("trouble") or self.trouble
        value = told(trial, self.search.mode)
        if self.model is not None and trial_id in self.asked:
            ended = None if value is None else {OBJECTIVE: value}
            self.model.on_trial_complete(trial_id, ended, error=value is None)
        elif self.model is not None:
            self._learn(trial)
        self.finished(trial)

    def _learn(self, trial: Trial) -> None:
        """Tell Optuna of a trial that it did not propose."""
        value = told(trial, self.search.mode)
        if value is None or self.model is None:
            return
        point = {p.name: encode(p, trial.values[p.name]) for p in self.search.parameters}
        try:
            self.model.add_evaluated_point(point, value)
        except ValueError:  # the recipe's own value may lie outside of a range that the user gave
            return

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the search's folder has it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is ever restored from Tune's records."""


def told(trial: Trial, mode: str) -> float | None:
    """What a searcher learns of a trial: its result, or the accuracy it was stopped at, or the worst of a failure."""
    if trial.state == "finished":
        return trial.objective
    if trial.state == "stopped early":
        return trial.looks[-1][1] if trial.looks else None
    return (0.0 if mode == "max" else None) if trial.state == "failed" else None


def encode(parameter: Parameter, value: Any) -> Any:
    """Optuna knows lists only as words."""
    return value if options(parameter.domain) is None else json.dumps(value)


def decode(parameter: Parameter, value: Any) -> Any:
    """The value of the range that Optuna meant."""
    return snap(parameter.domain, value) if options(parameter.domain) is None else json.loads(value)


def distributions(parameters: Sequence[Parameter]) -> dict[str, optuna.distributions.BaseDistribution]:
    """The ranges as Optuna's, by Ray Tune's own conversion."""
    domains = {}
    for parameter in parameters:
        known = options(parameter.domain)
        domains[parameter.name] = parameter.domain if known is None else tune.choice([json.dumps(v) for v in known])
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)  # steps of a logarithmic range: see `snap`
    return OptunaSearch.convert_search_space(domains)


class Deadline(threading.Thread):
    """Adds up what is spent; at the limit it asks every trial to stop, as Ctrl-C does."""

    def __init__(self, budget: Budget, folder: Path, running: Callable[[], int], gpus: float) -> None:
        super().__init__(daemon=True, name="deadline")
        self.budget, self.folder, self.running, self.gpus = budget, folder, running, gpus
        self.spent = Spent(folder)
        self.limit: str | None = None
        self._end = threading.Event()

    def run(self) -> None:
        last = kept = time.monotonic()
        while not self._end.wait(POLL_SECONDS):
            now = time.monotonic()
            self.spent.add(now - last, self.gpus * self.running())
            last = now
            if now - kept >= 5:
                kept = now
                self.spent.keep()
            if self.limit is None and (limit := self.spent.over(self.budget)):
                self.limit = limit
                (self.folder / "stop").touch()

    def stop(self) -> None:
        """End it, with what was spent on disk."""
        self._end.set()
        self.join()
        self.spent.keep()


def run_trials(
    prepared: PreparedSearch, job: Job, first: list[Trial], notice: Callable[[str], None],
    finished: Callable[[Trial], None], *, more: bool = True,
) -> str | None:  # fmt: skip
    """Run the trials that did not end, and then new ones until there are enough or the budget is spent.

    Args:
        more: False runs `first` alone, whatever was spent.
    Returns:
        The limit that was reached, or None. Whether the user asked to stop is in the file `stop`.
    Raises:
        UserError: something that is no trial's fault, or the first trials all failed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, room, stop = prepared.search, prepared.room, job.folder / "stop"
    wrong: list[UserError] = []

    def ended(trial: Trial) -> None:
        finished(trial)
        try:
            if more:
                check_failures(read_trials(job.folder))
        except UserError as error:
            wrong.append(error)

    points = Points(
        search, job.folder, prepared.budget, prepared.recipe.seed, first, more,
        lambda: stop.exists() or bool(wrong or points.trouble), ended,
    )  # fmt: skip
    unlimited = Budget(prepared.budget.trials)
    deadline = Deadline(
        prepared.budget if more else unlimited, job.folder, lambda: len(points.live), room.gpus * room.workers
    )
    if more and (limit := deadline.spent.over(prepared.budget)):
        return limit
    if not first and points.number >= points.most:
        return None
    scheduler: TrialScheduler | None = None
    if more and search.stop == "asha":
        grace = max(1, round(GRACE * search.looks))
        scheduler = ASHAScheduler(time_attr=LOOK, max_t=search.looks + 2, grace_period=grace, reduction_factor=KEEP)
    records = job.folder / "ray"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, job=job), _resources(prepared)),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE, mode=search.mode, search_alg=points, scheduler=scheduler, num_samples=-1,
            max_concurrent_trials=room.concurrent, reuse_actors=room.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="search", storage_path=str(records), verbose=0, failure_config=tune.FailureConfig(max_failures=TRIES)
        ),
    )  # fmt: skip
    if more:
        deadline.start()
    try:
        tuner.fit()
    finally:
        if more:
            deadline.stop()
        shutil.rmtree(records, ignore_errors=True)
    if points.trouble:
        raise UserError(points.trouble)
    if wrong:
        raise wrong[0]
    return deadline.limit


def _resources(prepared: PreparedSearch) -> Any:
    """What Tune reserves for a trial. One with a worker group needs no more than a place: the group asks for itself."""
    room = prepared.room
    if room.workers > 1:
        return {"node:__internal_head__": 0.01}
    return {"CPU": room.threads, **({"GPU": room.gpus} if room.gpus else {})}


def importance(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """The share of the result's variance that each parameter explains; nothing where too few trials tell.

    fANOVA (Hutter et al. 2014) on the trials that ended, as Optuna has it.
    """
    done = [trial for trial in trials if trial.state == "finished" and trial.objective is not None]
    if len(done) < TOLD or len({trial.objective for trial in done}) < 2:
        return {}
    space = distributions(search.parameters)
    study = optuna.create_study(direction="maximize" if search.mode == "max" else "minimize")
    for trial in done:
        params = {p.name: encode(p, trial.values[p.name]) for p in search.parameters}
        try:
            study.add_trial(optuna.create_trial(params=params, distributions=space, value=trial.objective))
        except ValueError:  # outside of the ranges
            continue
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    except (ValueError, RuntimeError):  # of so few trials none has two values
        return {}
    return {name: float(value) for name, value in found.items()}
