"""What will run: every stage of a recipe with its key, what is stored already, and why the rest is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.component import chosen, to_plain
from orchestrator.data.images import Images
from orchestrator.data.splits import Data
from orchestrator.recipe import Node, Recipe, Rounds, report
from orchestrator.stage import Stage, Wiring, several_labels
from orchestrator.stages.compare import Compare
from orchestrator.stages.train import Train
from orchestrator.store import Store


@dataclass(frozen=True)
class Planned:
    """One stage, ready to run: its key says everything its answer depends on."""

    name: str
    stage: Stage
    key: str
    seed: int
    inputs: Mapping[str, tuple[str, ...]]  # names of splits, stages or rounds
    question: Mapping[str, Any]  # what the key is a hash of
    work: Mapping[str, Any]
    round: int | None
    group: str | None
    vocabulary: tuple[str, ...]  # the classes its answer speaks of

    @property
    def kind(self) -> str:
        """The stage's class name."""
        return type(self.stage).__name__


@dataclass(frozen=True)
class Plan:
    """A recipe laid out for one seed, on its data."""

    recipe: str
    seed: int
    stages: tuple[Planned, ...]
    rounds: Mapping[str, Rounds]
    images: Mapping[str, Images]
    classes: tuple[str, ...]

    def key(self, name: str) -> str:
        """The key of a stage, or of the last gate of rounds."""
        name = self.rounds[name].gates[-1] if name in self.rounds else name
        return next(stage.key for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Unit:
    """What runs as a whole: a stage, or all rounds of a group."""

    name: str
    stages: tuple[Planned, ...]
    after: frozenset[str]  # the units whose answers it reads

    @property
    def keys(self) -> set[str]:
        """Of its stages."""
        return {stage.key for stage in self.stages}


def units(plan: Plan) -> list[Unit]:
    """A plan's units, in the recipe's order. Those that do not come after each other may run at the same time."""
    names = {stage.name: stage.group or stage.name for stage in plan.stages}
    found = []
    for name in dict.fromkeys(names.values()):
        stages = tuple(stage for stage in plan.stages if names[stage.name] == name)
        read = {target for stage in stages for targets in stage.inputs.values() for target in targets}
        if name in plan.rounds:
            read.add(plan.rounds[name].first)
        after = {names.get(target, target) for target in read if target in names or target in plan.rounds}
        found.append(Unit(name, stages, frozenset(after - {name})))
    return found


def waves(plan: Plan) -> dict[str, int]:
    """Of each stage, the number of units in the longest chain that must be done before it: 0 waits for nothing."""
    depth: dict[str, int] = {}
    for unit in units(plan):
        depth[unit.name] = 1 + max((depth[name] for name in unit.after), default=-1)
    return {stage.name: depth[stage.group or stage.name] for stage in plan.stages}


def stage_seed(seed: int, round_number: int | None, generation: int = 0) -> int:
    """Each round draws anew: a student that follows a refused one is not the same again. Outside of rounds so does each
    `generation` of students, lest one starts from the weights that its teacher started from."""
    return seed + 9176 * generation if round_number is None else seed + 1009 * (round_number + 1)


def make_plan(recipe: Recipe, data: Data, seed: int, label: str) -> Plan:
    """Resolve choices, check each stage among its neighbours, and hash the keys.

    Raises:
        UserError: with every problem found.
    """
    problems: list[tuple[str, str]] = []
    planned: dict[str, Planned] = {}
    generations: dict[str, int] = {}  # of trainings in the line of each stage's inputs; -1 where nothing was trained
    for node in recipe.nodes:
        taught = isinstance(node.stage, Train) and not node.inputs.keys().isdisjoint({"labels", "teacher"})
        fresh = taught and "init" not in node.inputs
        above = [recipe.rounds[target].gates[-1] if target in recipe.rounds else target
                 for targets in node.inputs.values() for target in targets]  # fmt: skip
        generation = max((generations.get(name, -1) for name in above), default=-1) + fresh
        generations[node.name] = max(generation, 0) if isinstance(node.stage, Train) else generation
        wiring = _wiring(node, recipe, data, planned)
        empty = [target for targets in node.inputs.values() for target in targets
                 if target in data.splits and len(data.splits[target]) == 0]  # fmt: skip
        found = [(f"{node.where}.inputs", f"split {name} has no images") for name in empty] if empty else [
            (f"{node.where}.{path}", message)
            for path, message in (*several_labels(node.stage, wiring), *node.stage.problems(wiring))]  # fmt: skip
        found += _of_other_images(node, data, planned)
        problems += found
        if found:
            continue
        drawn_from = stage_seed(recipe.seed + seed, node.round, generations[node.name] if fresh else 0)
        resolved = node.stage.resolved(wiring)
        question = {
            "stage": f"{type(node.stage).__module__}.{type(node.stage).__qualname__}", "version": node.stage.version,
            "config": {**to_plain(node.stage), **resolved}, "seed": drawn_from,
            "inputs": {name: [_identity(target, recipe, data, planned) for target in targets]
                       for name, targets in sorted(node.inputs.items())},
            "classes": list(data.classes), "round": node.round,
        }  # fmt: skip
        asked = {**question, "config": chosen(node.stage, resolved)}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
        planned[node.name] = Planned(node.name, node.stage, key, drawn_from, node.inputs, question,
                                     node.stage.work(wiring), node.round, node.group,
                                     node.stage.vocabulary(wiring))  # fmt: skip
    if not problems:  # else keys may be equal because what they rest on is broken
        for node in recipe.nodes:
            if isinstance(node.stage, Compare):
                same = node.stage.same({name: planned[name].key for name in node.inputs["scores"]})
                problems += [(f"{node.where}.{path}", message) for path, message in same]
    if problems:
        raise report(label, problems)
    return Plan(recipe.name, recipe.seed + seed, tuple(planned.values()), recipe.rounds, data.splits, data.classes)


def _of_other_images(node: Node, data: Data, planned: Mapping[str, Planned]) -> list[tuple[str, str]]:
    """What is wrong with labels of other images, or of the same in another order: they are joined row by row."""
    found, ours = [], node.inputs.get("images", ())
    for name in node.inputs.get("labels", ()):
        theirs = planned[name].inputs.get("images", ()) if name in planned else ()
        one, other = ([data.splits[target].fingerprint for target in part if target in data.splits]
                      for part in (ours, theirs))  # fmt: skip
        if one and other and one != other:
            found.append((f"{node.where}.inputs.images", f"is [{', '.join(ours)}], and {name} has the labels of "
                          f"[{', '.join(theirs)}]: give both the same images in the same order"))  # fmt: skip
    return found


def _wiring(node: Node, recipe: Recipe, data: Data, planned: Mapping[str, Planned]) -> Wiring:
    images: dict[str, tuple[Images, ...]] = {}
    stages: dict[str, tuple[Stage, ...]] = {}
    for name, targets in node.inputs.items():
        if all(target in data.splits for target in targets):
            images[name] = tuple(data.splits[target] for target in targets)
        else:
            stages[name] = tuple(stage for target in targets for stage in _sources(target, recipe, planned))
    spoken = {
        name: tuple(_vocabulary(target, recipe, data, planned) for target in targets)
        for name, targets in node.inputs.items() if name in stages
    }  # fmt: skip
    return Wiring(images, stages, node.inputs, data.classes, recipe.data.pixels, spoken, node.round)


def _vocabulary(target: str, recipe: Recipe, data: Data, planned: Mapping[str, Planned]) -> tuple[str, ...]:
    target = recipe.rounds[target].gates[-1] if target in recipe.rounds else target
    return planned[target].vocabulary if target in planned else data.classes


def _sources(target: str, recipe: Recipe, planned: Mapping[str, Planned]) -> list[Stage]:
    """The stages an answer comes from: of rounds, every student that may have been promoted."""
    if target in recipe.rounds:
        return [stage for gate in recipe.rounds[target].gates for stage in _sources(gate, recipe, planned)]
    found = planned.get(target)
    if found is None:
        return []
    if found.kind == "Gate":
        return _sources(found.inputs["student"][0], recipe, planned)
    return [found.stage]


def _identity(target: str, recipe: Recipe, data: Data, planned: Mapping[str, Planned]) -> str:
    if target in data.splits:
        return f"images:{data.splits[target].fingerprint}"
    name = recipe.rounds[target].gates[-1] if target in recipe.rounds else target
    return planned[name].key if name in planned else "broken"


def why(planned: Planned, store: Store, before: str | None) -> tuple[str, str]:
    """(state, reason) of a stage: stored, started or to run, and what differs from the last run's stage of that name.

    Args:
        before: key of the stage of that name in the last run of this recipe in the store.
    """
    if store.has(planned.key):
        return "stored", f"answered on {store.manifest(planned.key)['created'][:10]}"
    work = store.root / "work" / planned.key
    if (work / "training.pt").exists():
        return "started", "goes on from its last checkpoint"
    if before and before != planned.key and store.has(before):
        changes = difference(store.manifest(before)["question"], planned.question)
        return "to run", ", ".join(changes[:3]) or "changed"
    return "to run", "new"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """What changed between two questions, as "path old → new", keys of inputs as "its input X changed"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in {**old, **new}
            for line in difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    if old == new:
        return []
    if path.startswith("inputs."):
        return [f"its input {path.removeprefix('inputs.')} changed"]
    return [f"{path.removeprefix('config.')} {old} → {new}"]
