"""The coordinator: a named actor that drives a unit of a plan, and answers while it works.

A unit is the teacher-to-student rounds of a group or, where stages run at the same time, a stage. The coordinator's
state is the store's. Killed, it comes back and goes on where the store says it was; a driver that dies and is started
again finds it by its name.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.connect import NAMESPACE, joined
from orchestrator.cluster.fit import RayWorkers
from orchestrator.context import Interrupted, Workers
from orchestrator.errors import UserError
from orchestrator.pipeline import Outcome, Setting, run_unit, threads_of
from orchestrator.plan import Plan, Unit, units
from orchestrator.recipe import Resources, parse
from orchestrator.records import Recorder
from orchestrator.run import prepare
from orchestrator.runs import read_outcomes
from orchestrator.store import Store

POLL_SECONDS = 0.5


class Coordinator:
    """Runs one unit."""

    def __init__(self, unit: str, root: Path, run: str, seed: int, threads: int | None = None) -> None:
        """Everything is read from the store: what Ray keeps of the arguments is small enough to survive the driver."""
        store = Store.open(root)
        folder = store.root / "runs" / run
        recipe = parse((folder / "recipe.yaml").read_text(encoding="utf-8"), label=run)
        prepared = prepare(recipe, store.root, label=run)
        self.plan = next(plan for plan in prepared.plans if plan.seed == seed)
        self.unit = next(one for one in units(self.plan) if one.name == unit)
        resources = replace(recipe.resources, threads=threads or recipe.resources.threads)
        self.setting = Setting(store, folder, resources, Recorder(folder), prepared.prefix(self.plan))
        self.life = uuid.uuid4().hex  # another one after a restart
        self.said: list[str | Outcome] = []  # notices and outcomes, in the order in which they came

    def run(self) -> dict[str, Any]:
        """The outcomes, and how it ended: {"outcomes", "interrupted", "error"}. An exception would be an accident."""
        try:
            workers = RayWorkers(self.setting.resources)
            outcomes = run_unit(self.unit, self.plan, self.setting, workers, self.said.append, self.said.append)
            return {"outcomes": outcomes, "interrupted": False, "error": None}
        except Interrupted:
            return {"outcomes": [], "interrupted": True, "error": None}
        except UserError as error:
            return {"outcomes": [], "interrupted": False, "error": str(error)}
        finally:
            if self.setting.recorder is not None:
                self.setting.recorder.flush()

    def status(self, life: str = "", seen: int = 0) -> dict[str, Any]:
        """Where it stands, at any moment: the stages' outcomes, and what it said after the first `seen` of this `life`;
        all of it to whoever knows it from before a restart, or not yet."""
        names = [self.setting.prefix + stage.name for stage in self.unit.stages]
        said = self.said[seen if life == self.life else 0 :]
        return {"stages": read_outcomes(self.setting.folder, names), "said": said, "life": self.life}


CoordinatorActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)(Coordinator)


def coordinator_name(unit: Unit, setting: Setting) -> str:
    """The actor's name: the same for the same unit of the same run in the same store."""
    question = f"{setting.store.root}|{setting.folder.name}|{setting.prefix}{unit.name}|{unit.stages[-1].key}"
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    return f"unit-{setting.folder.name}-{setting.prefix}{unit.name}-{digest}"


@dataclass
class _Coordinated:
    """A unit in its coordinator."""

    unit: Unit
    plan: Plan
    setting: Setting
    actor: Any
    pending: ray.ObjectRef
    notice: Callable[[str], None]
    finished: Callable[[Outcome], None]
    life: str = ""
    heard: int = 0  # of that life
    told: set[str] = field(default_factory=set)  # stages: one that was killed comes to them again

    @staticmethod
    def start(
        unit: Unit, plan: Plan, setting: Setting, notice: Callable[[str], None], finished: Callable[[Outcome], None],
        threads: int | None = None, **resources: float,
    ) -> _Coordinated:  # fmt: skip
        """Start it, or find it at work."""
        name = coordinator_name(unit, setting)
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor = CoordinatorActor.options(**options, **resources).remote(
            unit.name, setting.store.root, setting.folder.name, plan.seed, threads
        )
        return _Coordinated(unit, plan, setting, actor, actor.run.remote(), notice, finished)

    def listen(self) -> None:
        """Pass on what it has said since."""
        try:
            status = ray.get(self.actor.status.remote(self.life, self.heard), timeout=5)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return  # it is busy, or being restarted
        if status["life"] != self.life:
            self.life, self.heard = status["life"], 0
        self.heard += len(status["said"])
        for item in status["said"]:
            if isinstance(item, Outcome):
                self._tell(item)
            else:
                self.notice(item)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.name not in self.told:
            self.told.add(outcome.name)
            self.finished(outcome)

    def end(self) -> list[Outcome]:
        """What came of it.

        Raises:
            Interrupted: the user asked to stop. UserError: something the user can mend.
        """
        try:
            end = ray.get(self.pending)
        except ray.exceptions.RayError:  # a program's fault: the next coordinator imports the mended code
            ray.kill(self.actor)
            raise
        self.listen()
        ray.kill(self.actor)
        if end["interrupted"]:
            raise Interrupted
        if end["error"]:
            raise UserError(end["error"])
        for outcome in end["outcomes"]:
            self._tell(outcome)
        return end["outcomes"]


def coordinated(
    unit: Unit, plan: Plan, setting: Setting, workers: Workers | None, notice: Callable[[str], None],
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Run a unit in its coordinator, passing on what it says. The same contract as `run_unit`."""
    running = _Coordinated.start(unit, plan, setting, notice, finished)
    while not ray.wait([running.pending], timeout=POLL_SECONDS)[0]:
        running.listen()
    return running.end()


def run_together(
    plans: Sequence[tuple[Plan, Setting]], limit: int, *, threads: int, each: Mapping[str, float],
    notice: Callable[[str], None], finished: Callable[[Outcome], None],
) -> list[Outcome]:  # fmt: skip
    """The units of all plans, each in a coordinator as soon as what it reads is there, at most `limit` at a time.

    Args:
        threads: that a process of a unit uses.
        each: what Ray sets aside for a coordinator, such as {"num_cpus": 2}: nothing where its workers have their own.
    Raises:
        Interrupted: the user asked to stop. UserError: something the user can mend; the other units stopped after their
            step, and all is kept.
    """
    waiting = [(plan, setting, unit) for plan, setting in plans for unit in units(plan)]
    order = {setting.prefix + stage.name: n for n, (setting, stage) in enumerate(
        (setting, stage) for _, setting, unit in waiting for stage in unit.stages)}  # fmt: skip
    running: dict[ray.ObjectRef, _Coordinated] = {}
    answered: set[str] = set()
    outcomes: list[Outcome] = []
    broken: UserError | Interrupted | None = None

    def ended(setting: Setting, unit: Unit, found: list[Outcome]) -> None:
        answered.add(setting.prefix + unit.name)
        outcomes.extend(found)

    while running or (waiting and broken is None):
        for item in [] if broken else list(waiting):
            plan, setting, unit = item
            ready = all(setting.prefix + name in answered for name in unit.after)
            shared = any(unit.keys & other.unit.keys for other in running.values())  # would wait for its lock
            if not ready or shared:
                continue
            if all(setting.store.has(key) for key in unit.keys):
                ended(setting, unit, run_unit(unit, plan, setting, None, notice, finished))
            elif len(running) < limit:
                started = _Coordinated.start(unit, plan, setting, notice, finished, threads, **each)
                running[started.pending] = started
            else:
                continue
            waiting.remove(item)
        if not running:
            continue
        done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        for one in running.values():
            one.listen()
        for pending in done:
            one = running.pop(pending)
            try:
                ended(one.setting, one.unit, one.end())
            except (UserError, Interrupted) as stop:
                broken = stop if broken is None or isinstance(stop, UserError) else broken
                (one.setting.folder / "stop").touch()  # the others stop after their step
    if broken is not None:
        raise broken
    return sorted(outcomes, key=lambda outcome: order[outcome.name])


def at_a_time(resources: Resources) -> dict[str, Any] | None:
    """What `run_together` is told of how many units fit; None: one after the other, in the driver.

    On a cluster a unit always has a process of its own, since the driver's machine may have neither cores nor GPUs.
    """
    if not joined() and (resources.parallel or 1) == 1:
        return None
    threads = resources.threads or (1 if joined() else threads_of(resources))
    fits, each = room(resources, threads, ray.cluster_resources())
    return {"limit": max(1, min(resources.parallel or fits, fits)), "threads": threads, "each": each}


def room(resources: Resources, threads: int, total: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """How many units fit into `total`, Ray's resources by name, and what Ray sets aside for the coordinator of each.

    With one worker a unit's process trains itself; several workers bring resources of their own, and so do labellers.
    """
    processes = resources.workers + resources.labellers
    need = {"CPU": resources.workers * threads + resources.labellers, "GPU": processes * resources.gpus}
    fits = min(int(total.get(name, 0) // amount) for name, amount in need.items() if amount)
    own: dict[str, float] = {"num_cpus": 0}
    if resources.workers == 1:
        own = {"num_cpus": threads, "num_gpus": resources.gpus}
    return fits, own
