"""A recipe: YAML to frozen, checked stages. Every mistake is reported at once, with the nearest right name."""

from __future__ import annotations

import copy
import importlib.resources
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.artifacts import Checkpoint
from orchestrator.component import ConfigError, dataclass_fields, resolve, validate
from orchestrator.data.images import Images
from orchestrator.data.splits import DataConfig, Split
from orchestrator.errors import UserError, nearest
from orchestrator.stage import Stage, answer_of, inputs_of

TOP = ("name", "description", "seed", "seeds", "data", "stages", "resources")
ROUNDS = ("rounds", "carry", "ladder", "gate", "stages")
ARMS = ("each", "only", "stages")
NAME_LENGTH = 100
NAME_BYTES = 200  # a run's folder is called by the recipe's name and a little more; file systems end names at 255 bytes


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What only changes the speed; enters no key."""

    workers: int = 1  # data-parallel training processes; 1 trains in the process that is there, or on a cluster's node
    min_workers: int | None = None  # that training goes on with when others are lost, until they are back; None: all
    parallel: int | None = None  # stages at a time that do not wait for each other; None: 1, on a cluster all that fit
    threads: int | None = None  # a process may use; None: the machine's cores, shared by all; on a cluster 1
    labellers: int = 0  # labelling processes; 0: one process labels, better below about 100 thousand images
    gpus: float = 0  # for each worker, and for each labeller
    save_seconds: float = 30.0  # between checkpoints of a training

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers = {self.workers}: must be at least 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: must be from 1 to workers = {self.workers}")
        for name in ("threads", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.labellers < 0 or self.gpus < 0 or self.save_seconds < 0:
            raise ValueError("labellers, gpus, save_seconds: must be at least 0")


@dataclass(frozen=True)
class Node:
    """One stage in its place. `inputs` map the keywords of `run` to names of splits, nodes or rounds."""

    name: str
    where: str  # its path in the YAML, for messages
    stage: Stage
    inputs: Mapping[str, tuple[str, ...]]
    round: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Rounds:
    """A laid-out group of rounds: its first teacher and its gates, in order."""

    name: str
    first: str
    gates: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. `text` is the YAML after overrides: what a run keeps, and what runs again."""

    name: str
    description: str
    seed: int
    seeds: int
    data: DataConfig
    resources: Resources
    nodes: tuple[Node, ...]
    rounds: Mapping[str, Rounds]
    text: str = field(repr=False)

    def node(self, name: str) -> Node:
        """The node of a name."""
        return next(node for node in self.nodes if node.name == name)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
        if name in seen and key.tag != "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(None, None, f"{name} is written twice", key.start_mark)
        seen.add(name)
    loader.flatten_mapping(node)  # what `<<` brings comes first, so that the keys written here win
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def shipped() -> dict[str, str]:
    """The recipes in the package: name to YAML text."""
    folder = importlib.resources.files("orchestrator") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def read_source(source: str) -> tuple[str, str]:
    """(label, YAML text) of a shipped recipe's name or of a YAML file. Raises UserError."""
    known = shipped()
    if source in known:
        return f"{source}.yaml", known[source]
    path = Path(source)
    if path.is_file():
        try:
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {source}: cannot be read as UTF-8 text ({error})") from error
    hint = nearest(source, known) or f"; shipped are {', '.join(known)}"
    raise UserError(f"recipe {source}: neither a file nor a shipped recipe{hint}")


def load(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe by name or path, with KEY=VALUE overrides. Raises UserError with every problem."""
    label, text = read_source(source)
    return parse(text, label=label, overrides=overrides)


def parse(text: str, *, label: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Check a recipe's YAML text. Raises UserError with every problem found, each on its line."""
    try:
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506, a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that no calendar has
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{label}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{label}: must be a mapping with name, data and stages")
    problems: list[tuple[str, str]] = []
    raw = _unshared(raw)
    _numbers_to_text(raw)
    for override in overrides:
        _override(raw, override, problems)
        _numbers_to_text(raw)
    recipe = _build(raw, problems)
    if problems or recipe is None:
        raise report(label, problems)
    return recipe


def report(label: str, problems: list[tuple[str, str]]) -> UserError:
    """All problems as one error: a line each, aligned."""
    unique = list(dict.fromkeys(problems))
    width = min(44, max(len(path) for path, _ in unique))
    lines = "\n".join(f"  {path:{width}}  {message}" for path, message in unique)
    return UserError(f"{label}: {len(unique)} error{'s' if len(unique) > 1 else ''}, nothing was run\n{lines}")


def _override(raw: dict[str, Any], text: str, problems: list[tuple[str, str]]) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        problems.append((text, "an override is KEY=VALUE, such as stages.teacher.steps=200"))
        return
    place: Any = raw
    *parents, last = path.split(".")
    if parents[:1] == ["stages"] and parents[2:3] == ["each"] and len(parents) > 4:
        parents, last = _in_arm(raw, [*parents, last])
    for number, part in enumerate(parents):
        here = place.get(part)
        if here is None:
            if (number == 0 and part not in TOP) or (number and parents[number - 1] == "stages"):
                problems.append((path, f"{part} is not in the recipe{nearest(part, map(str, place))}"))
                return
            here = place[part] = {}
        elif isinstance(here, str) and parents[0] == "data":
            here = place[part] = {"from": here}
        if not isinstance(here, dict):
            problems.append((path, f"{part} is {here!r}, it has no fields"))
            return
        place = here
    try:
        place[last] = yaml.safe_load(value) if value else None
    except (yaml.YAMLError, ValueError):
        problems.append((path, f"{value!r} is not YAML; quote it"))


def _in_arm(raw: dict[str, Any], parts: list[str]) -> tuple[list[str], str]:
    """Where an override of an arm's own field goes: an arm's keys are paths themselves, so model.method.ramp is looked
    for in what the arm gives as model.method, and is a key of its own if the arm gives no such thing."""
    arm, own = parts[:4], parts[4:]
    place: Any = raw
    for part in arm:
        place = place.get(part) if isinstance(place, dict) else None
    for size in range(len(own) - 1, 0, -1):
        key = ".".join(own[:size])
        if isinstance(place, dict) and isinstance(place.get(key), dict):
            return [*arm, key, *own[size:-1]], own[-1]
    return arm, ".".join(own)


def _unshared(value: Any) -> Any:
    """A copy in which what YAML anchors shared is separate, so that an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _text(name: Any) -> Any:
    """A whole number that stands for a name, as text; anything else as it is."""
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def _numbers_to_text(raw: dict[str, Any]) -> None:
    """Names that are whole numbers become text, wherever they stand: `each: {50: {}, 100: {}}` is a sweep like any."""

    def renamed(value: Any) -> Any:
        return {_text(key): item for key, item in value.items()} if isinstance(value, dict) else value

    if not isinstance(raw.get("stages"), dict):
        return
    raw["stages"] = renamed(raw["stages"])
    for value in raw["stages"].values():
        if not isinstance(value, dict):
            continue
        for part in _named_parts(value):
            value[part] = renamed(value[part])
        if "each" in value and isinstance(value.get("only"), list):
            value["only"] = [_text(arm) for arm in value["only"]]
        if isinstance(value.get("claims"), list):
            value["claims"] = [[_text(a) for a in c] if isinstance(c, list) else c for c in value["claims"]]


def _named_parts(group: Mapping[str, Any]) -> list[str]:
    """The fields of arms or rounds whose keys are names; of a plain stage none."""
    return [part for part in ("each", "stages") if part in group] if "each" in group or "rounds" in group else []


def _check_names(stages: Mapping[Any, Any], problems: list[tuple[str, str]]) -> None:
    """Names of stages, groups and arms are joined by dots and stand in paths, so they have neither dots nor slashes."""
    places = {"stages": stages}
    for name, value in stages.items():
        if isinstance(value, dict):
            places |= {f"stages.{name}.{part}": value[part] for part in _named_parts(value)}
    for place, names in places.items():
        for name in names if isinstance(names, dict) else ():
            told = f"{name}" if isinstance(name, str) and name.isprintable() and name.strip() else f"{name!r}"
            if isinstance(name, float) or (isinstance(name, str) and re.search(r"[./]", name)):
                other = re.sub(r"[./]+", "_", str(name)).strip("_") or "a"
                other = other if other[0].isalpha() else f"v{other}"
                problems.append((place, f"{told}: a name has no `.` and no `/`, they divide names; call it {other}"))
            elif not isinstance(name, str):
                problems.append((place, f"{name}: is no text to YAML, as yes, no, on, off, null and dates are none; "
                                 "put the name in quotes"))  # fmt: skip
            elif not name.strip() or not name.isprintable():
                problems.append((place, f"{told}: a name must be plain text, such as lr0_1"))


def _check_recipe_name(name: Any, problems: list[tuple[str, str]]) -> None:
    """It begins the name of the run's folder, so it must be neither a path nor longer than a file's name may be."""
    if not isinstance(name, str):
        problems.append(("name", f"{name!r}: must be text; put it in quotes"))
        return
    allowed = [c.isalnum() or c in " ._-" or unicodedata.category(c)[0] == "M" for c in name]  # M: vowels, accents
    if not name or not all(allowed) or not name[0].isalnum():
        fit = "".join(c if good else "-" for c, good in zip(name, allowed, strict=True)).strip(" ._-") or "my-recipe"
        fit = fit if fit[0].isalnum() else f"a{fit}"
        problems.append(("name", f"{name!r}: must be letters, digits, spaces, `.`, `_` and `-`, a letter or digit "
                         f"first, such as {fit[:NAME_LENGTH]}"))  # fmt: skip
    elif len(name) > NAME_LENGTH or len(name.encode()) > NAME_BYTES:
        problems.append(("name", f"{name[:20]}...: has {len(name)} characters, {len(name.encode())} bytes; must be at "
                         f"most {NAME_LENGTH} characters and {NAME_BYTES} bytes; shorten it"))  # fmt: skip


def _build(raw: dict[str, Any], problems: list[tuple[str, str]]) -> Recipe | None:
    for key in raw:
        if key not in TOP:
            problems.append((str(key), f"unknown{nearest(str(key), TOP) or '; a recipe has ' + ', '.join(TOP)}"))
    _check_recipe_name(raw.get("name", "recipe"), problems)
    data = _data(raw.get("data"), problems)
    resources = _validated(Resources, raw.get("resources") or {}, "resources", problems)
    for key, least in (("seed", 0), ("seeds", 1)):
        value = raw.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append((key, f"{value!r}: must be an integer of at least {least}"))
    splits = tuple(map(str, raw["data"])) if isinstance(raw.get("data"), dict) else ()
    laid, rounds, arms = _lay_out(raw.get("stages"), problems)
    nodes = [_node(entry, arms, problems) for entry in laid]
    built = [node for node in nodes if node is not None]
    broken = {entry.name for entry, node in zip(laid, nodes, strict=True) if node is None}
    if isinstance(raw.get("stages"), dict):  # groups that were refused as a whole: told once, not by every reader
        broken |= {str(name) for name in raw["stages"]} - {entry.name.partition(".")[0] for entry in laid}
    _check_wires(built, broken, data.splits if data else dict.fromkeys(splits), rounds, problems)
    if problems or data is None or resources is None:
        return None
    text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    return Recipe(raw.get("name", "recipe"), str(raw.get("description", "")).strip(), raw.get("seed", 0),
                  raw.get("seeds", 1), data, resources, tuple(built), rounds, text)  # fmt: skip


def _validated(cls: type, values: Any, where: str, problems: list[tuple[str, str]]) -> Any:
    if not isinstance(values, dict):
        problems.append((where, f"{values!r}: must be a mapping"))
        return None
    try:
        return validate(cls, values)
    except ConfigError as error:
        problems += [(f"{where}.{path}" if path else where, message) for path, message in error.problems]
        return None


def _data(raw: Any, problems: list[tuple[str, str]]) -> DataConfig | None:
    if not isinstance(raw, dict):
        problems.append(("data", "missing: say where the images are, such as data: {pixels: 32, labelled: PATH}"))
        return None
    before = len(problems)
    options = [name for name in dataclass_fields(DataConfig) if name != "splits"]
    splits: dict[str, Split] = {}
    for name, value in raw.items():
        if name in options:
            continue
        if value is None:
            flag = f" or --{name} PATH" if name in ("labelled", "unlabelled", "test") else ""
            problems.append((f"data.{name}", f"no images given: add data.{name}=PATH{flag}"))
            continue
        value = {"from": value} if isinstance(value, str) else value
        if isinstance(value, dict):
            value = {("source" if key == "from" else key): item for key, item in value.items()}
            if isinstance(value.get("without"), str):
                value["without"] = [value["without"]]
        if isinstance(value, dict) and value.get("source") is None:
            problems.append(
                (f"data.{name}", f"no images given: add data.{name}=PATH, or {{from: SPLIT, fraction: 0.1}}")
            )
            continue
        wrong: list[tuple[str, str]] = []
        built = _validated(Split, value, f"data.{name}", wrong)
        problems += [
            (re.sub(r"\.source$", ".from", path),
             re.sub(r"^source = ", "from = ", message.replace("Split has source,", "a split has from,")))
            for path, message in wrong
        ]  # fmt: skip
        if built is not None:
            splits[str(name)] = built
    for name, split in splits.items():
        for other in split.without:
            if other not in {str(known) for known in raw}:
                problems.append((f"data.{name}.without", f"{other} is no split{nearest(other, splits)}"))
    known, wrong = len(problems) > before, []
    config = _validated(
        DataConfig, {**{name: raw[name] for name in options if name in raw}, "splits": splits}, "data", wrong
    )
    for path, message in wrong:
        if not message.startswith("splits"):
            problems.append((path, message))
        elif not known:  # else it may be about a split that was told already
            problems.append(_of_split(message))
    return config if len(problems) == before else None


def _of_split(message: str) -> tuple[str, str]:
    """What DataConfig says of `splits`, which a recipe writes as fields of `data`."""
    found = re.match(r"splits\.(.+?\.\w+) = (.*)", message, re.DOTALL)
    return (f"data.{found[1]}", found[2]) if found else ("data", message.removeprefix("splits = ").removeprefix("{}: "))


@dataclass(frozen=True)
class _Entry:
    name: str
    where: str
    raw: dict[str, Any]
    round: int | None = None
    group: str | None = None


def _lay_out(
    raw: Any, problems: list[tuple[str, str]]
) -> tuple[list[_Entry], dict[str, Rounds], dict[str, tuple[str, ...]]]:
    """The stages in order, the rounds by name, and of arms: group.stage to the names of that stage in every arm."""
    entries: list[_Entry] = []
    rounds: dict[str, Rounds] = {}
    arms: dict[str, tuple[str, ...]] = {}
    if not isinstance(raw, dict) or not raw:
        problems.append(("stages", "missing: a recipe needs at least one stage"))
        return entries, rounds, arms
    _check_names(raw, problems)
    for name, value in raw.items():
        if not isinstance(value, dict):
            problems.append(
                (f"stages.{name}", f"{value!r}: must be a mapping with `use:`, with `rounds:` or with `each:`")
            )
        elif "each" in value:
            found, dropped = _arms(str(name), value, problems)
            entries += found
            _forget(raw, str(name), dropped)
            for stage in value["stages"] if found else ():
                arms[f"{name}.{stage}"] = tuple(e.name for e in found if e.name.endswith(f".{stage}"))
        elif "rounds" in value:
            laid = _rounds(str(name), value, problems)
            if laid is not None:
                entries += laid[0]
                rounds[str(name)] = laid[1]
        else:
            entries.append(_Entry(str(name), f"stages.{name}", value))
    return entries, rounds, arms


def _arms(name: str, raw: dict[str, Any], problems: list[tuple[str, str]]) -> tuple[list[_Entry], set[str]]:
    """The stages of every arm of a comparison, the same ones with each arm's overrides, and the arms left out."""
    where, before = f"stages.{name}", len(problems)
    for key in raw:
        if key not in ARMS:
            problems.append((f"{where}.{key}", f"unknown{nearest(key, ARMS) or '; arms have ' + ', '.join(ARMS)}"))
    each, stages, only = raw["each"], raw.get("stages"), raw.get("only")
    if not isinstance(each, dict) or not each or not all(isinstance(v, dict | None) for v in each.values()):
        problems.append((f"{where}.each", "must map the name of each arm to its overrides, such as "
                         "{rotation: {pretrain.method: {use: methods.rotation.Rotation}}}"))  # fmt: skip
    if not isinstance(stages, dict) or not stages:
        problems.append((f"{where}.stages", "missing: the stages of one arm"))
    if only is not None and not (isinstance(only, list) and only and isinstance(each, dict)):
        problems.append((f"{where}.only", f"{only!r}: must be a list of arms, such as [rotation, simclr]"))
    if len(problems) > before:
        return [], set()
    arms = {str(arm): overrides for arm, overrides in each.items()}
    asked = [str(arm) for arm in only or arms]
    for arm in asked:
        if arm not in arms:
            hint = nearest(arm, arms) or f"; arms are {', '.join(arms)}"
            problems.append((f"{where}.only", f"{arm} is no arm{hint}"))
    dropped = {arm for arm, overrides in arms.items() if overrides is None or arm not in asked}
    if len(problems) == before and len(dropped) == len(arms):
        problems.append((f"{where}.each", "no arm is left; null leaves an arm out, {} runs the stages as they are"))
    entries: list[_Entry] = []
    assert isinstance(stages, dict)
    for arm, overrides in arms.items():
        if arm in dropped:
            continue
        own = _overridden(stages, overrides, f"{where}.each.{arm}", problems)
        known = {stage: f"{name}.{arm}.{stage}" for stage in own}
        for stage, value in own.items():
            if isinstance(value, dict) and isinstance(value.get("inputs"), dict):
                value["inputs"] = {k: _rewire(v, known) for k, v in value["inputs"].items()}
            entries.append(_Entry(known[stage], f"{where}.each.{arm}.{stage}", value))
    return entries, dropped


def _forget(stages: dict[str, Any], group: str, dropped: set[str]) -> None:
    """Take the arms that nobody asked for out of the inputs and the claims of later stages."""
    names = dropped | {f"{group}.{arm}" for arm in dropped}  # as claims say them, if two groups have such an arm
    for value in stages.values():
        if not isinstance(value, dict) or not dropped:
            continue
        inputs = value.get("inputs")
        if isinstance(inputs, dict):
            read = [t for target in inputs.values() for t in (target if isinstance(target, list) else [target])]
            if isinstance(value.get("claims"), list) and any(str(t).startswith(f"{group}.") for t in read):
                value["claims"] = [
                    c for c in value["claims"] if not (isinstance(c, list) and names & {str(arm) for arm in c})
                ]  # fmt: skip
            for name, target in inputs.items():
                gone = isinstance(target, str) and any(target.startswith(f"{group}.{arm}.") for arm in dropped)
                inputs[name] = None if gone else target


def _overridden(
    stages: Mapping[str, Any], overrides: Mapping[str, Any], where: str, problems: list[tuple[str, str]]
) -> dict[str, Any]:
    """A copy of some stages with values put in by their dotted paths."""
    changed = copy.deepcopy(dict(stages))
    for key, value in overrides.items():
        *path, last = str(key).split(".")
        place: Any = changed
        for depth, part in enumerate(path):
            if depth and isinstance(place, dict) and place.get(part) is None:
                place[part] = {}  # options that are all left to their defaults
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or not path:
            problems.append((where, f"{key} leads nowhere in stages{nearest(path[0] if path else key, changed)}"))
            continue
        place[last] = copy.deepcopy(value)
    return changed


@dataclass(frozen=True)
class _Group:
    """What `rounds:` says, checked."""

    count: int
    first: str  # the teacher of the first round
    aliases: dict[str, str]  # name in a round to the stage that hands it on; the first of them is the teacher
    ladder: list[dict[str, Any]]  # overrides, one a round; the last one holds for the rounds after it
    gate: dict[str, Any]
    stages: dict[str, Any]


def _group(where: str, raw: dict[str, Any], problems: list[tuple[str, str]]) -> _Group | None:
    before = len(problems)
    for key in raw:
        if key not in ROUNDS:
            problems.append(
                (f"{where}.{key}", f"unknown{nearest(key, ROUNDS) or '; rounds have ' + ', '.join(ROUNDS)}")
            )
    count: Any = raw.get("rounds")
    carry: Any = raw.get("carry")
    stages: Any = raw.get("stages")
    ladder: Any = raw.get("ladder") or [{}]
    gate: Any = raw.get("gate") or {}
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        problems.append((f"{where}.rounds", f"{count!r}: must be an integer of at least 1"))
    if not isinstance(stages, dict) or not stages:
        problems.append((f"{where}.stages", "missing: the stages of one round"))
    if not isinstance(carry, dict) or "first" not in carry or len(carry) < 2:
        problems.append(
            (f"{where}.carry", "must say what a round hands on, such as {teacher: student, first: teacher}")
        )
    if not isinstance(ladder, list) or not all(isinstance(rung, dict) for rung in ladder):
        problems.append(
            (f"{where}.ladder", "must be a list of overrides, one a round, such as {student.encoder.width: 1.5}")
        )
    if not isinstance(gate, dict):
        problems.append((f"{where}.gate", f"{gate!r}: must be a mapping"))
    for alias, stage in carry.items() if isinstance(carry, dict) else ():
        if not isinstance(_text(stage), str):
            problems.append((f"{where}.carry.{alias}", f"{stage!r}: must be the name of a stage"))
    if len(problems) > before:
        return None
    aliases = {str(alias): str(stage) for alias, stage in carry.items() if alias != "first"}
    for alias, stage in aliases.items():
        if stage not in map(str, stages):
            problems.append((f"{where}.carry.{alias}", f"{stage} is no stage of a round{nearest(stage, stages)}"))
    return _Group(count, str(carry["first"]), aliases, ladder, gate, stages) if len(problems) == before else None


def _rounds(name: str, raw: dict[str, Any], problems: list[tuple[str, str]]) -> tuple[list[_Entry], Rounds] | None:
    where = f"stages.{name}"
    group = _group(where, raw, problems)
    if group is None:
        return None
    (teacher_alias, judged), *others = group.aliases.items()  # the gate judges the stage that hands on the teacher
    entries: list[_Entry] = []
    gates: list[str] = []
    teacher = group.first
    for number in range(group.count):
        rung = group.ladder[min(number, len(group.ladder) - 1)]
        stages = _overridden(group.stages, rung, f"{where}.ladder", problems)
        names = {stage: f"{name}.{number}.{stage}" for stage in stages}
        earlier = {alias: f"{name}.{number - 1}.{stage}" for alias, stage in others} if number else {}
        known = {**names, teacher_alias: teacher, **earlier}
        absent = set() if number else {alias for alias, _ in others}  # nothing came before the first round
        for stage, value in stages.items():
            if isinstance(value, dict) and isinstance(value.get("inputs"), dict):
                given = value["inputs"].items()
                value["inputs"] = {k: _rewire(v, known) for k, v in given if not (isinstance(v, str) and v in absent)}
            entries.append(_Entry(names[stage], f"{where}.stages.{stage}", value, number, name))
        wires = {"teacher": teacher, "student": names[judged]}
        options = dict(group.gate)
        if options.get("images"):
            wires["images"] = options.pop("images")
        teacher = f"{name}.{number}.gate"
        gate = {"use": "orchestrator.stages.gate.Gate", "inputs": wires, **options}
        entries.append(_Entry(teacher, f"{where}.gate", gate, number, name))
        gates.append(teacher)
    return entries, Rounds(name, group.first, tuple(gates), tuple(entry.name for entry in entries))


def _rewire(target: Any, known: Mapping[str, str]) -> Any:
    if isinstance(target, list):
        return [_rewire(item, known) for item in target]
    return known.get(_text(target), target) if isinstance(_text(target), str) else target


def _node(entry: _Entry, arms: Mapping[str, tuple[str, ...]], problems: list[tuple[str, str]]) -> Node | None:
    before = len(problems)
    raw = entry.raw if isinstance(entry.raw, dict) else {}
    if "use" not in raw:
        problems.append((f"{entry.where}.use", "missing: the stage's class, such as orchestrator.stages.train.Train"))
        return None
    try:
        cls = resolve(str(raw["use"]), (Stage,))
    except ConfigError as error:
        problems += [(f"{entry.where}.{path}", message) for path, message in error.problems]
        return None
    stage = _validated(cls, {k: v for k, v in raw.items() if k not in ("use", "inputs")}, entry.where, problems)
    wanted = inputs_of(cls)
    inputs: dict[str, tuple[str, ...]] = {}
    given = raw.get("inputs") or {}
    if not isinstance(given, dict):
        problems.append((f"{entry.where}.inputs", f"{given!r}: must map inputs to splits or stages"))
        return None
    for name, target in given.items():
        if name not in wanted:
            problems.append((f"{entry.where}.inputs.{name}",
                             f"unknown{nearest(name, wanted)} {cls.__name__} reads {', '.join(wanted)}"))  # fmt: skip
        elif target is not None:
            targets = [_text(t) for t in target] if isinstance(target, list) else [_text(target)]
            if targets and all(isinstance(t, str) for t in targets):
                inputs[name] = tuple(place for t in targets for place in arms.get(t, (t,)))
            else:
                problems.append((f"{entry.where}.inputs.{name}",
                                 f"{target!r}: must be the name of a split or stage, or a list of names"))  # fmt: skip
    for name, known in wanted.items():
        if given.get(name) is None and not known.optional:
            problems.append((f"{entry.where}.inputs.{name}", f"missing: {cls.__name__} needs {known.name}"))
    if stage is None or len(problems) > before:
        return None
    return Node(entry.name, entry.where, stage, inputs, entry.round, entry.group)


def _check_wires(
    nodes: list[Node], broken: set[str], splits: Mapping[str, Any], rounds: Mapping[str, Rounds],
    problems: list[tuple[str, str]],
) -> None:  # fmt: skip
    answers: dict[str, type] = {}
    for node in nodes:
        place = node.where
        for name, targets in node.inputs.items():
            known = inputs_of(type(node.stage))[name]
            for target in targets:
                kind = _kind(target, answers, splits, rounds)
                path = f"{place}.inputs.{name}"
                if kind is None:
                    if not broken & {target, target.partition(".")[0]} and target not in rounds:
                        later = target in {n.name for n in nodes}
                        names = [*splits, *answers, *rounds]
                        hint = nearest(target, names) or f"; known are {', '.join(names)}"
                        problems.append((path, f"{target} comes later; a stage reads what is above it" if later else
                                         f"{target} is no split or stage{hint}"))  # fmt: skip
                elif not known.takes(kind):
                    example = next((n for n, k in answers.items() if known.takes(k)), None)
                    hint = f", such as {example}" if example else ""
                    problems.append(
                        (path, f"{target} gives {kind.__name__}, {type(node.stage).__name__} needs {known.name}{hint}")
                    )
                elif target == "test" and not node.stage.scores_test:
                    problems.append((path, f"test is for Judge and Probe, whose scores nothing learns from; "
                                     f"{type(node.stage).__name__} must not see it, use holdout"))  # fmt: skip
            if len(targets) > 1 and not known.several and not issubclass(Images, known.kinds):
                problems.append((f"{place}.inputs.{name}", f"takes one {known.name}, found {len(targets)}"))
        answers[node.name] = answer_of(type(node.stage))


def _kind(
    target: str, answers: Mapping[str, type], splits: Mapping[str, Any], rounds: Mapping[str, Rounds]
) -> type | None:
    if target in splits:
        return Images
    if target in rounds:
        return Checkpoint if rounds[target].gates[-1] in answers else None
    return answers.get(target)
