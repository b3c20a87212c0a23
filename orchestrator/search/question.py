"""What a search asks: which fields of a recipe vary, and by which number trials are compared.

A trial is the recipe with some values put in, run as any plan on the same store. Nothing of a search reads the test
images: wherever the recipe reads `test`, a trial reads `holdout`, labelled images that nothing learns from.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from methods.base import is_classifier
from orchestrator.component import Component
from orchestrator.errors import UserError, nearest
from orchestrator.pipeline import flat
from orchestrator.plan import Plan
from orchestrator.recipe import Node, Recipe, parse
from orchestrator.stages.cluster import Cluster
from orchestrator.stages.judge import Judge
from orchestrator.stages.probe import Probe
from orchestrator.stages.train import Train
from orchestrator.training.health import LOOKS, PREFIX

TEST, HOLDOUT = "test", "holdout"
Mode = Literal["max", "min"]
LADDER = "Rounds.ladder"
# what the protocols of Probe measure; the others measure accuracy
MEASURES = {"retrieval": ("precision@10", "mAP"), "clusters": ("NMI", "ARI", "purity"), "svm": ("mAP",)}
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Parameter:
    """One value that varies, put into every one of its places.

    Args:
        name: what people read; unique in a search.
        places: dotted paths in the recipe: stages.model.optim.lr, and of an arm stages.arms.each.simclr.model.x.
        default: what the recipe has there.
        domain: its range, an object of ray.tune.
        student: of a ladder, the stage of a round that its fields belong to.
    """

    name: str
    places: tuple[str, ...]
    default: Any
    domain: Any
    student: str = ""

    @property
    def text(self) -> str:
        """The range as it is written."""
        return _ranges().describe(self.domain)

    def value(self, value: Any) -> Any:
        """What is written into the recipe for a value of the range."""
        if not self.student:
            return value
        return [{f"{self.student}.{field}": v for field, v in rung.items()} for rung in value] or None

    def json(self) -> dict[str, Any]:
        """For the head of a search, which reports read without Ray."""
        space = _ranges()
        scale = {} if space.options(self.domain) else dict(zip(("low", "high"), space.limits(self.domain), strict=True))
        return {"name": self.name, "places": list(self.places), "default": self.default, "range": self.text,
                "options": space.options(self.domain), "log": space.is_log(self.domain), **scale}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A number of a stage's answer, such as verdict.final."""

    stage: str
    fact: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.fact}"

    @property
    def accuracy(self) -> bool:
        """Whether it is a classifier's accuracy, so that the accuracy during training tells of it."""
        return self.fact in ("final", "health.live.accuracy", "health.average.accuracy") or self.fact.endswith(
            ("_accuracy", "accuracy")
        )

    def read(self, facts: Mapping[str, Any]) -> float:
        """Its value among a stage's facts. Raises UserError when the stage did not measure it."""
        found = flat(facts)
        if not isinstance(found.get(self.fact), int | float):
            numbers = [name for name, value in found.items() if isinstance(value, int | float)]
            raise UserError(f"metric {self}: {self.stage} measured {', '.join(numbers)}")
        return float(found[self.fact])


@dataclass(frozen=True)
class Search:
    """A search: what a trial's recipe is made of, what varies, and what counts.

    Args:
        base: the recipe's YAML after overrides, which reads the test images.
        trial: the same for trials: with the hold-out in place of the test images.
        watched: trainings whose hold-out accuracy by step tells of the metric, in order.
    """

    label: str
    base: str
    trial: str
    parameters: tuple[Parameter, ...]
    metric: Metric
    mode: Mode
    algorithm: Literal["tpe", "random", "grid"]
    stop: Literal["asha", "none"]
    watched: tuple[str, ...]

    def default(self) -> dict[str, Any]:
        """The recipe's own values, by parameter."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def text(self, values: Mapping[str, Any], *, test: bool = False, seed: int | None = None) -> str:
        """The recipe's YAML with some values put in; of `test`, the one that reads the test images."""
        raw = yaml.safe_load(self.base if test else self.trial)
        for parameter in self.parameters:
            if parameter.name in values and values[parameter.name] != parameter.default:
                for place in parameter.places:
                    put(raw, place, parameter.value(values[parameter.name]))
        if seed is not None:
            raw |= {"seed": seed, "seeds": 1}
        return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)

    def recipe(self, values: Mapping[str, Any], *, test: bool = False, seed: int | None = None) -> Recipe:
        """The recipe of a trial, checked. Raises UserError."""
        return parse(self.text(values, test=test, seed=seed), label=self.label)

    def name(self, plan: Plan) -> str:
        """The search's name: the same for the same question, so that the same command goes on where it was.

        Args:
            plan: of the recipe's own values.
        """
        asked = [
            [stage.key for stage in plan.stages], [[p.name, p.places, p.text] for p in self.parameters],
            str(self.metric), self.mode, self.algorithm, self.stop,
        ]  # fmt: skip
        return f"{plan.recipe}-search-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"

    @property
    def looks(self) -> int:
        """How often a trial reports during training."""
        return LOOKS * len(self.watched)


def identity(values: Mapping[str, Any]) -> str:
    """A trial's values as text: equal for equal values."""
    return json.dumps(values, sort_keys=True)


# The recipe of a trial ------------------------------------------------------------------------------------------------


def put(raw: dict[str, Any], place: str, value: Any) -> None:
    """Put a value at a dotted path; of an arm it becomes one more of the arm's overrides."""
    parts = place.split(".")
    if len(parts) > 4 and parts[2] == "each":
        group = raw["stages"][parts[1]]["each"]
        group[parts[3]] = {**(group[parts[3]] or {}), ".".join(parts[4:]): value}
        return
    *parents, last = parts
    inside: Any = raw
    for part in parents:
        inside = inside.setdefault(part, {}) if isinstance(inside.get(part, {}), dict) else {}
    inside[last] = value


def hold_out(text: str, label: str, fraction: float) -> str:
    """The recipe's YAML with the hold-out in place of the test images, and with one seed.

    Args:
        fraction: of the labelled images, for a recipe without a hold-out of its own.
    """
    raw = yaml.safe_load(text)
    data: dict[str, Any] = raw["data"]
    if HOLDOUT not in data:
        if data.get("labelled") is None:
            raise UserError(f"{label}: data.{HOLDOUT} is missing, and there is no split `labelled` to take it from, so "
                            f"trials cannot be compared; give data.{HOLDOUT}=...")  # fmt: skip
        data[HOLDOUT] = {"from": "labelled", "fraction": fraction}
    raw["stages"] = _swap(raw["stages"], False)
    own = data.get(TEST)
    source = own.get("from", own.get("source")) if isinstance(own, dict) else own
    named = [
        n
        for n, split in data.items()
        if isinstance(split, dict)
        and TEST
        in (
            split.get("from"),
            *([split["without"]] if isinstance(split.get("without"), str) else split.get("without", ())),
        )
    ]
    if own is not None and not named and (source == TEST or source not in data):
        del data[TEST]  # a part of other images it stays: taken out of what is learned from, and read by nobody
    raw["seeds"] = 1
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _swap(value: Any, inside: bool) -> Any:
    """`test` among the inputs of stages becomes `holdout`."""
    if isinstance(value, dict):
        return {
            key: _swap(item, inside or str(key) in ("inputs", "gate") or ".inputs" in str(key))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_swap(item, inside) for item in value]
    return HOLDOUT if inside and value == TEST else value


def needed(recipe: Recipe, name: str) -> set[str]:
    """The stages whose answers a stage needs, itself among them."""
    found: set[str] = set()
    todo = [name]
    nodes = {node.name: node for node in recipe.nodes}
    while todo:
        one = todo.pop()
        if one in recipe.rounds:
            todo += [*recipe.rounds[one].nodes, recipe.rounds[one].first]
        elif one in nodes and one not in found:
            found.add(one)
            todo += [target for targets in nodes[one].inputs.values() for target in targets]
            if nodes[one].group is not None:  # rounds are run whole
                todo.append(str(nodes[one].group))
    return found


def pruned(plan: Plan, recipe: Recipe, name: str) -> Plan:
    """The part of a plan that a stage's answer needs."""
    wanted = needed(recipe, name)
    rounds = {group: rounds for group, rounds in plan.rounds.items() if wanted & set(rounds.nodes)}
    return replace(plan, stages=tuple(s for s in plan.stages if s.name in wanted), rounds=rounds)


def touched(recipe: Recipe, places: Iterable[str]) -> set[str]:
    """The stages whose answers change with values at these places."""
    at = tuple(places)
    own = {node.name for node in recipe.nodes if any(place.startswith(f"{node.where}.") for place in at)}
    own |= {name for group, rounds in recipe.rounds.items() for name in rounds.nodes
            if any(place == f"stages.{group}.ladder" for place in at)}  # fmt: skip
    return {node.name for node in recipe.nodes if own & needed(recipe, node.name)}


# Parameters -----------------------------------------------------------------------------------------------------------


def _ranges() -> Any:
    return importlib.import_module("tune_spaces.space")


def spaces() -> dict[str, Any]:
    """Every shipped space by its name."""
    folder = importlib.import_module("tune_spaces").__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder) if module.name != "space")
    return {name: importlib.import_module(f"tune_spaces.{name}").SPACE for name in names}


def bind(space: Any, recipe: Recipe) -> list[Parameter]:
    """The parameters of a space in a recipe; none where it does not fit.

    Places that have the same value now vary together, others on their own. A place that is switched off, by null or by
    0 on a logarithmic scale, stays off; what a ladder changes from round to round stays as it is.
    """
    ranges, found = _ranges(), []
    methods = set(space.methods)
    if methods and not any(_method(node) in methods for node in recipe.nodes):
        return []
    for field, domain in space.params.items():
        kind, _, rest = field.partition(".")
        by_value: dict[str, list[tuple[str, Any, str]]] = {}
        if field == LADDER:
            for place, student in _without_ladder(recipe, methods):
                by_value.setdefault("[]", []).append((place, [], student))
        else:
            for node in recipe.nodes:
                relative = rest if kind[:1].isupper() else field
                fits = type(node.stage).__name__ == kind if kind[:1].isupper() else (
                    isinstance(node.stage, Train) and (not methods or _method(node) in methods)
                )  # fmt: skip
                has, value = field_of(node, relative) if fits else (False, None)
                if (
                    not has
                    or value is None
                    or (value == 0 and ranges.options(domain) is None and ranges.is_log(domain))
                ):
                    continue
                entry = (f"{node.where}.{relative}", value, "")
                known = by_value.setdefault(json.dumps(value), [])
                if entry not in known:  # the stages of all rounds are written once
                    known.append(entry)
        seen = [place for places in by_value.values() for place, _, _ in places]
        by_value = {value: kept for value, places in by_value.items()
                    if (kept := [entry for entry in places if seen.count(entry[0]) == 1])}  # fmt: skip
        for places in by_value.values():
            short = field.removeprefix("method.") if kind == "method" else field
            where = "+".join(dict.fromkeys(_stage_in(place, field) for place, _, _ in places))
            name = short if len(by_value) == 1 else f"{where}.{short}"
            found.append(Parameter(name, tuple(p for p, _, _ in places), places[0][1], domain, places[0][2]))
    return found


def _method(node: Node) -> str:
    method = getattr(node.stage, "method", None)
    return method.use if isinstance(method, Component) else ""


def _stage_in(place: str, field: str) -> str:
    """A stage's short name: students.student of stages.students.stages.student.optim.lr."""
    parts = place.removeprefix("stages.").removesuffix("." + field).split(".")
    return ".".join(part for part in parts if part not in ("stages", "each"))


def _without_ladder(recipe: Recipe, methods: set[str]) -> list[tuple[str, str]]:
    """(place, student) of the rounds without a ladder whose student learns by one of the methods."""
    stages = yaml.safe_load(recipe.text)["stages"]
    found = []
    for name, group in recipe.rounds.items():
        raw = stages.get(name, {})
        student = next((stage for alias, stage in raw.get("carry", {}).items() if alias != "first"), "")
        nodes = [node for node in recipe.nodes if node.name in group.nodes and node.name.endswith(f".{student}")]
        if not raw.get("ladder") and nodes and (not methods or _method(nodes[0]) in methods):
            found.append((f"stages.{name}.ladder", str(student)))
    return found


def field_of(node: Node, path: str) -> tuple[bool, Any]:
    """(whether a stage has a field, its value), options of methods and encoders included."""
    value: Any = node.stage
    for part in path.split("."):
        value = value.config if isinstance(value, Component) else value
        if isinstance(value, Mapping):
            return part in value, value.get(part)
        if not hasattr(value, "__dataclass_fields__") or part not in value.__dataclass_fields__:
            return False, None
        value = getattr(value, part)
    return True, value


def given(text: str, recipe: Recipe) -> Parameter:
    """A parameter as a user writes it: stages.model.optim.lr=loguniform(0.01,1).

    Raises:
        UserError: no such field, or no range.
    """
    place, equals, written = text.partition("=")
    place = place.strip()
    where = f"--param {text}"
    if not equals or not place or not written:
        raise UserError(f"{where}: write PATH=RANGE, such as stages.model.optim.lr='loguniform(0.01, 1)'")
    if not place.startswith("stages."):
        raise UserError(f"{where}: only fields under stages. can be searched: data and seed decide what a trial is "
                        "judged by, and resources change no answer")  # fmt: skip
    try:
        domain = _ranges().parse(written)
    except ValueError as error:
        raise UserError(f"--param {place}: {error}") from None
    nodes = [node for node in recipe.nodes if place.startswith(f"{node.where}.")]
    if not nodes:
        known = list(dict.fromkeys(node.where for node in recipe.nodes))
        hint = nearest(".".join(place.split(".")[: len(known[0].split("."))]), known)
        raise UserError(f"{where}: no stage lies there{hint or '; stages are ' + ', '.join(known)}")
    relative = place.removeprefix(f"{nodes[0].where}.")
    has, value = field_of(nodes[0], relative)
    if not has:
        fields = _fields(nodes[0], relative)
        raise UserError(f"{where}: {nodes[0].where} has no {relative}{nearest(relative, fields)}; it has "
                        f"{', '.join(fields)}")  # fmt: skip
    short = _stage_in(place, relative) + "." + relative
    return Parameter(short, (place,), value, domain)


def _fields(node: Node, relative: str) -> list[str]:
    """The fields beside the last one of a path that exists."""
    parts = relative.split(".")
    for end in range(len(parts) - 1, -1, -1):
        has, value = field_of(node, ".".join(parts[:end])) if end else (True, node.stage)
        value = value.config if isinstance(value, Component) else value
        if has and hasattr(value, "__dataclass_fields__"):
            return [".".join([*parts[:end], name]) for name in value.__dataclass_fields__]
    return []


def choose_parameters(recipe: Recipe, names: Sequence[str], params: Sequence[str]) -> list[Parameter]:
    """What varies: the named spaces and the given ranges; left out, the spaces of the recipe's pipeline or methods.

    Raises:
        UserError: a space that is not there or does not fit, a field twice, nothing to search.
    """
    known = spaces()
    fitting = {name: found for name, space in known.items() if (found := bind(space, recipe))}
    for name in names:
        if name not in known:
            raise UserError(
                f"--space {name}: no such space{nearest(name, known)}; fitting here are {', '.join(fitting)}"
            )
        if name not in fitting:
            raise UserError(
                f"--space {name}: no stage of {recipe.name} is of its kind; fitting are {', '.join(fitting)}"
            )
    chosen = list(names)
    if not names and not params:
        special = [name for name in fitting if name not in ("optimiser", "supervised")]
        pipelines = [n for n in special if any(field[:1].isupper() for field in known[n].params)]
        chosen = pipelines or special[-1:] or list(fitting)[:1]
        if not chosen:
            raise UserError(f"{recipe.name}: no shipped space fits it; give --param stages.STAGE.FIELD=RANGE")
    found = [p for name in dict.fromkeys(chosen) for p in fitting[name]]
    found += [given(text, recipe) for text in params]
    taken: dict[str, str] = {}
    for parameter in found:
        for place in parameter.places:
            if place in taken:
                raise UserError(f"{place}: varies twice, as {taken[place]} and as {parameter.name}; leave one out")
            taken[place] = parameter.name
    names_of = [p.name for p in found]
    return [replace(p, name=p.places[0].removeprefix("stages.")) if names_of.count(p.name) > 1 else p for p in found]


# The metric -----------------------------------------------------------------------------------------------------------


def metrics_of(node: Node) -> list[str]:
    """What a stage measures, by the names of its facts, the most telling first."""
    stage = node.stage
    if isinstance(stage, Judge):
        return ["final", "gain", "baseline"]
    if isinstance(stage, Probe):
        names = []
        for protocol in stage.protocols:
            if protocol != "layers":  # one for each tap of the encoder
                names += [f"{protocol}_{measure}" for measure in MEASURES.get(protocol, ("accuracy",))]
        return names
    if isinstance(stage, Train) and "holdout" in node.inputs and is_classifier(stage.method.cls):
        return [*(["health.average.accuracy"] if stage.ema else []), "health.live.accuracy"]
    return []


def choose_metric(recipe: Recipe, asked: str | None, places: Iterable[str]) -> Metric:
    """The metric asked for, or the last Judge's accuracy, or the first score of the last Probe, that a trial changes.

    Raises:
        UserError: it is not there, or nothing that is measured depends on what varies.
    """
    affected = touched(recipe, places)
    found = {node.name: names for node in recipe.nodes if (names := metrics_of(node))}
    every = [f"{name}.{fact}" for name, facts in found.items() for fact in facts]
    if asked is not None:
        stage = next((n for n in sorted(found, key=len, reverse=True) if asked == n or asked.startswith(f"{n}.")), None)
        fact = "" if stage is None else asked.removeprefix(stage).removeprefix(".") or found[stage][0]
        layer = stage is not None and re.fullmatch(r"layers_.+_accuracy", fact)
        if stage is None or not (fact in found[stage] or layer):
            raise UserError(f"--metric {asked}: not measured{nearest(asked, every)}; there are {', '.join(every)}")
        if stage not in affected:
            raise UserError(f"--metric {asked}: does not depend on what varies; of what does there are "
                            f"{', '.join(m for m in every if m.rpartition('.')[0] in affected) or 'none'}")  # fmt: skip
        return Metric(stage, fact)
    nodes = [node for node in recipe.nodes if node.name in affected and node.name in found]
    for kind in (Judge, Probe, Train):
        last = [node for node in nodes if isinstance(node.stage, kind)]
        if last:
            return Metric(last[-1].name, found[last[-1].name][0])
    other = f", or search another: measured are {', '.join(every)}" if every else ""
    raise UserError(f"{recipe.name}: no Judge or Probe depends on what varies, so trials cannot be compared; add a "
                    f"Probe of the stage that is searched{other}")  # fmt: skip


def watched_trainings(recipe: Recipe, metric: Metric, places: Iterable[str]) -> list[Node]:
    """The trainings that tell the data's classes apart, change with what varies, and that the metric needs."""
    wanted = needed(recipe, metric.stage) & touched(recipe, places)
    clusters = {node.name for node in recipe.nodes if isinstance(node.stage, Cluster)}
    return [
        node for node in recipe.nodes
        if node.name in wanted and isinstance(node.stage, Train) and is_classifier(node.stage.method.cls)
        and not clusters & set(node.inputs.get("labels", ()))
    ]  # fmt: skip


def _telling(
    recipe: Recipe, metric: Metric, parameters: Sequence[Parameter], asked: set[str]
) -> tuple[list[Parameter], list[str]]:
    """The parameters, and all their places, that the metric depends on.

    Raises:
        UserError: it does not depend on a place in `asked`.
    """
    found = []
    for parameter in parameters:
        kept = tuple(place for place in parameter.places if metric.stage in touched(recipe, [place]))
        if not kept and asked & set(parameter.places):
            raise UserError(f"--param {parameter.places[0]}: {metric} does not depend on it; leave it out, or give "
                            "another --metric")  # fmt: skip
        found += [replace(parameter, places=kept)] if kept else []
    return found, [place for parameter in found for place in parameter.places]


def _buildable(
    text: str, label: str, parameters: Sequence[Parameter], asked: set[str]
) -> tuple[list[Parameter], list[str]]:
    """The parameters at the places where at least two of their values give a recipe, and lines on what is left out.

    Some values may fit only beside some of others; a trial of two that do not fails, and says why.

    Raises:
        UserError: a place in `asked` is among those left out, or nothing is left.
    """
    ranges, found, lines = _ranges(), [], []
    for parameter in parameters:
        kept = []
        for place in parameter.places:
            built, said = 0, ""
            for value in ranges.cut(parameter.domain, 2):
                raw = yaml.safe_load(text)
                put(raw, place, parameter.value(value))
                try:
                    parse(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), label=label)
                    built += 1
                except UserError as error:
                    said = str(error).splitlines()[-1].strip()
            if built > 1:
                kept.append(place)
            elif place in asked:
                raise UserError(f"--param {place}={parameter.text}: fewer than two of its values fit: {said}")
            else:
                lines.append(f"left as it is: {said}")
        found += [replace(parameter, places=tuple(kept))] if kept else []
    if not found:
        raise UserError(f"{label}: nothing is left to search: {'; '.join(lines)}")
    return found, lines


def seen_accuracy(values: Mapping[str, float]) -> float | None:
    """The hold-out accuracy that a look saw: of the averaged weights where there are such, the answer's."""
    live = values.get(f"{PREFIX}holdout_accuracy")
    return values.get(f"{PREFIX}holdout_accuracy_of_average", live)


def make_search(
    recipe: Recipe, *, label: str, names: Sequence[str] = (), params: Sequence[str] = (), metric: str | None = None,
    mode: Mode = "max", algorithm: Literal["tpe", "random", "grid"] = "tpe", stop: Literal["asha", "none"] = "asha",
    fraction: float = 0.2,
) -> tuple[Search, list[str]]:  # fmt: skip
    """A search over a recipe, and lines for people on what was chosen.

    Raises:
        UserError: with what is wrong, before anything runs.
    """
    parameters = choose_parameters(recipe, names, params)
    places = [place for parameter in parameters for place in parameter.places]
    text = hold_out(recipe.text, label, fraction)
    held = parse(text, label=label)
    chosen = choose_metric(held, metric, places)
    asked = {text.partition("=")[0].strip() for text in params}
    parameters, _ = _telling(held, chosen, parameters, asked)
    parameters, lines = _buildable(text, label, parameters, asked)
    places = [place for parameter in parameters for place in parameter.places]
    trainings = watched_trainings(held, chosen, places)
    if stop == "asha":
        why = None
        if mode != "max" or not chosen.accuracy:
            why = f"{chosen} is no accuracy, and that of the hold-out is what is known during training"
        elif not trainings:
            why = "no training that changes tells the classes apart, so nothing is known of a trial before its end"
        elif recipe.resources.workers > 1:
            why = f"a training of {recipe.resources.workers} workers does not report to the search"
        if why:
            stop = "none"
            lines.append(f"no early stopping: {why}")
        else:
            raw = yaml.safe_load(text)
            for node in trainings:
                if "holdout" not in node.inputs:
                    put(raw, f"{node.where}.inputs.holdout", HOLDOUT)
            text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    watched = tuple(node.name for node in trainings) if stop == "asha" else ()
    return Search(label, recipe.text, text, tuple(parameters), chosen, mode, algorithm, stop, watched), lines


# Budgets and points ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a search may spend; None is no limit."""

    trials: int
    seconds: float | None = None
    gpu_hours: float | None = None


def read_budget(trials: int, text: str | None) -> Budget:
    """Of "90s", "30m", "2h" or "4gpuh". Raises UserError."""
    if text is None:
        return Budget(trials)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|gpuh)\s*", text)
    if not found or float(found[1]) <= 0:
        raise UserError(f"--budget {text}: write a time as 90s, 30m or 2h, or GPU-hours as 4gpuh")
    amount = float(found[1])
    if found[2] == "gpuh":
        return Budget(trials, gpu_hours=amount)
    return Budget(trials, seconds=amount * UNITS[found[2]])


def listed_points(search: Search, trials: int, seed: int) -> list[dict[str, Any]]:
    """The values of every trial of a random or a grid search, the recipe's own first.

    A grid has every combination: all options of a choice, and as many values of each range as `trials` allow.

    Raises:
        UserError: `trials` are too few for a grid.
    """
    ranges = _ranges()
    if search.algorithm == "random":
        return [search.default()] + [
            {p.name: ranges.draw(p.domain, seed, number, place) for place, p in enumerate(search.parameters)}
            for number in range(1, trials)
        ]
    wide = [p for p in search.parameters if ranges.options(p.domain) is None]
    count = max(1, trials)
    for parameter in search.parameters:
        count = count // len(ranges.options(parameter.domain) or [None])
    each = 2
    while wide and (each + 1) ** len(wide) <= count:
        each += 1
    columns = [ranges.cut(p.domain, each) for p in search.parameters]
    points: list[dict[str, Any]] = [{}]
    for parameter, values in zip(search.parameters, columns, strict=True):
        points = [{**point, parameter.name: value} for point in points for value in values]
    if len(points) > trials:
        sizes = " x ".join(str(len(values)) for values in columns)
        raise UserError(f"--trials {trials}: a grid over {len(columns)} parameters has at least {sizes} = "
                        f"{len(points)} trials; use --trials {len(points)}, or --search tpe")  # fmt: skip
    return points
