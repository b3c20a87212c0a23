"""The coordinator: a named actor that drives teacher-to-student rounds and answers while it works.

Its state is the store's. Killed, it comes back and goes on where the store says it was; a driver that dies and is
started again finds it by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.connect import NAMESPACE
from orchestrator.cluster.fit import RayWorkers
from orchestrator.context import Interrupted, Workers
from orchestrator.errors import UserError
from orchestrator.pipeline import Outcome, Setting, run_rounds
from orchestrator.plan import Plan
from orchestrator.recipe import parse
from orchestrator.run import prepare
from orchestrator.runs import read_outcomes
from orchestrator.store import Store
from orchestrator.tracking import Recorder

POLL_SECONDS = 0.5


class Coordinator:
    """Runs the rounds of one group."""

    def __init__(self, group: str, root: Path, run: str, seed: int) -> None:
        """Everything is read from the store: what Ray keeps of the arguments is small enough to survive the driver."""
        store = Store.open(root)
        folder = store.root / "runs" / run
        recipe = parse((folder / "recipe.yaml").read_text(encoding="utf-8"), label=run)
        prepared = prepare(recipe, store.root, label=run)
        self.plan = next(plan for plan in prepared.plans if plan.seed == seed)
        self.group = group
        self.setting = Setting(store, folder, recipe.resources, Recorder(folder), prepared.prefix(self.plan))
        self.notices: list[str] = []

    def run(self) -> dict[str, Any]:
        """The outcomes, and how it ended: {"outcomes", "interrupted", "error"}. An exception would be an accident."""
        try:
            workers = RayWorkers(self.setting.resources)
            outcomes = run_rounds(self.group, self.plan, self.setting, workers, self.notices.append)
            return {"outcomes": outcomes, "interrupted": False, "error": None}
        except Interrupted:
            return {"outcomes": [], "interrupted": True, "error": None}
        except UserError as error:
            return {"outcomes": [], "interrupted": False, "error": str(error)}
        finally:
            if self.setting.recorder is not None:
                self.setting.recorder.flush()

    def status(self, seen: int = 0) -> dict[str, Any]:
        """Where the rounds stand, at any moment: the stages' outcomes, the notices after the first `seen`, and how many
        there are: fewer than `seen` after a restart, and then all are new."""
        names = [self.setting.prefix + stage.name for stage in self.plan.stages if stage.group == self.group]
        count = len(self.notices)
        new = self.notices[seen if seen <= count else 0 : count]
        return {"stages": read_outcomes(self.setting.folder, names), "notices": new, "heard": count}


CoordinatorActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)(Coordinator)


def coordinator_name(group: str, plan: Plan, setting: Setting) -> str:
    """The actor's name: the same for the same rounds of the same run in the same store."""
    question = f"{setting.store.root}|{setting.folder.name}|{setting.prefix}{group}|{plan.key(group)}"
    return f"rounds-{setting.folder.name}-{setting.prefix}{group}-{hashlib.sha256(question.encode()).hexdigest()[:8]}"


def coordinated_rounds(
    group: str, plan: Plan, setting: Setting, workers: Workers | None, notice: Callable[[str], None],
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Run a group's rounds in its coordinator, passing on what it says. The same contract as `run_rounds`."""
    name = coordinator_name(group, plan, setting)
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    coordinator = CoordinatorActor.options(**options).remote(group, setting.store.root, setting.folder.name, plan.seed)
    pending, heard = coordinator.run.remote(), 0
    while not ray.wait([pending], timeout=POLL_SECONDS)[0]:
        heard = _listen(coordinator, heard, notice)
    end = ray.get(pending)
    _listen(coordinator, heard, notice)
    ray.kill(coordinator)
    if end["interrupted"]:
        raise Interrupted
    if end["error"]:
        raise UserError(end["error"])
    for outcome in end["outcomes"]:
        finished(outcome)
    return end["outcomes"]


def _listen(coordinator: Any, heard: int, notice: Callable[[str], None]) -> int:
    try:
        status = ray.get(coordinator.status.remote(heard), timeout=5)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return heard  # it is busy, or being restarted
    for line in status["notices"]:
        notice(line)
    return status["heard"]
