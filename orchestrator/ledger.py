"""The ledger of pseudo-labels: ask a run's rounds, hold them against each other, export for review, take corrections
back."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from torchvision.io import encode_png

from orchestrator import corrections
from orchestrator.artifacts import Decision, Labels
from orchestrator.corrections import Corrections
from orchestrator.data.splits import open_data
from orchestrator.errors import UserError, nearest
from orchestrator.recipe import Recipe, parse
from orchestrator.runs import read_head, update_head
from orchestrator.store import Store, replace_file

MATRIX_CLASSES = 12  # more columns fit no terminal
SHOWN = 20  # moves between classes, where there is no matrix
LONGEST_FOLDER = 200  # bytes of a class's name; file systems end at 255
PROBLEMS = 100  # of a reviewed file that are told one by one


@dataclass(frozen=True)
class Ledger:
    """The rounds of one PseudoLabel stage of a run. Outside of rounds there is one, number 0."""

    store: Store
    folder: Path  # of the run
    name: str  # of the stage without its round, such as students.pseudo
    keys: Mapping[int, str]  # round to the key of its stored answer
    planned: int  # rounds that the recipe has
    group: str | None
    others: tuple[str, ...] = ()  # other such stages of the run

    def number(self, asked: int | None) -> int:
        """A round that is stored: the last, unless one is asked for. Raises UserError."""
        number = max(self.keys) if asked is None else asked
        if number not in self.keys:
            raise UserError(f"round {number}: not in {self.folder.name}, which has {_listed(self.keys)}")
        return number

    def before(self, number: int, asked: int | None) -> int:
        """The round to hold `number` against: the one before it, unless another is asked for. Raises UserError."""
        if asked is None and not any(other < number for other in self.keys):
            raise UserError(f"round {number}: there is none before it to compare it with")
        return max(other for other in self.keys if other < number) if asked is None else self.number(asked)

    def labels(self, number: int) -> Labels:
        """The answer of a round."""
        artifact = self.store.open_artifact(self.keys[number])
        assert isinstance(artifact, Labels)
        return artifact

    def tables(self) -> dict[int, pa.Table]:
        """What `flipped` reads of every round."""
        columns = ["id", "name", "confidence", "copies", "source"]
        return {number: self.labels(number).table(columns) for number in sorted(self.keys)}

    def title(self, number: int) -> str:
        """The round in words, with the stage where a run has several."""
        return f"round {number}" + (f" of {self.name}" if self.others else "")


def _listed(numbers: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def open_ledger(store: Store, folder: Path, stage: str | None = None) -> Ledger:
    """A run's ledger. Of several PseudoLabel stages, and of several seeds, the first seed's last one unless `stage`
    names another, such as students.pseudo or seed-1/students.pseudo. Raises UserError when there is none."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for planned in read_head(folder)["stages"]:
        if planned["kind"] == "PseudoLabel":
            number, group = planned["round"], planned["group"]
            name = planned["name"]
            name = name if group is None else name.replace(f"{group}.{number}.", f"{group}.", 1)
            found.setdefault(name, {})[number or 0] = planned
    stored = [name for name, rounds in found.items() if any(store.has(s["key"]) for s in rounds.values())]
    if not stored:
        raise UserError(f"run {folder.name}: has no pseudo-labels yet; `orchestrator status {folder.name}`")
    if stage is not None and stage not in stored:
        raise UserError(
            f"--stage {stage}: has no pseudo-labels{nearest(stage, stored) or '; there are ' + ', '.join(stored)}"
        )
    seed = stored[0].rpartition("/")[0]
    name = stage or [name for name in stored if name.rpartition("/")[0] == seed][-1]
    keys = {number: s["key"] for number, s in found[name].items() if store.has(s["key"])}
    group = next(iter(found[name].values()))["group"]
    return Ledger(store, folder, name, keys, len(found[name]), group, tuple(n for n in stored if n != name))


def filter_rows(
    table: pa.Table,
    *,
    name: str | None = None,
    uncertain: int | None = None,
    kept: bool | None = None,
    before: pa.Table | None = None,
) -> pa.Table:
    """Rows of a class, kept or left out, of another class than in the round `before`, and of these the `uncertain`
    least confident. Raises UserError."""
    if name is not None:
        names = pc.unique(table["name"]).to_pylist()
        if name not in names:
            raise UserError(
                f"--class {name}: no image is taken for it{nearest(name, names) or '; there are ' + ', '.join(names)}"
            )
        table = table.filter(pc.equal(table["name"], name))
    if kept is not None:
        table = table.filter(pc.equal(pc.greater(table["copies"], 0), kept))
    if before is not None:
        table = table.filter(pa.array(_moved(_named(before, table), _names(table))))
    if uncertain is not None:
        table = table.take(
            pc.sort_indices(table, sort_keys=[("confidence", "ascending"), ("id", "ascending")])[:uncertain]
        )
    return table


def lines(table: pa.Table, title: str) -> Iterator[str]:
    """The rows for people: a summary by class when there are many, else one line an image."""
    count = len(table)
    kept = pc.sum(pc.greater(table["copies"], 0)).as_py() or 0
    yield f"{title}: {count} images, {kept} kept"
    if count > 50:
        by_class, by_reason = Counter(table["name"].to_pylist()), Counter(table["reason"].to_pylist())
        for reason, amount in by_reason.most_common():
            yield f"  {amount:7,}  {reason}"
        for source in pc.unique(table["source"]).to_pylist():
            if source != "teacher":
                yield f"by hand: {source}.csv"
        yield "by predicted class:"
        for name, amount in sorted(by_class.items()):
            yield f"  {amount:7,}  {name}"
        yield ("narrow it with --class, --uncertain N, --flips N, --kept, --left-out, --changed; --export DIR writes "
               "the images; --diff shows what changed")  # fmt: skip
        return
    for row in table.select(["path", "name", "confidence", "margin", "reason", "source"]).to_pylist():
        by_hand = "" if row["source"] == "teacher" else f" ({row['source'][:8]})"
        yield f"  {row['confidence']:.3f}  {row['name']:16}  {row['reason'] + by_hand:16}  {row['path']}"


# ---- rounds against each other


@dataclass(frozen=True)
class Difference:
    """What changed from one round to another, over the images that are in both."""

    images: int
    changed: int  # of another class
    newly_kept: int
    newly_left_out: int
    moves: Mapping[tuple[str, str], int]  # class before and after to images; equal pairs are those that stayed

    @property
    def classes(self) -> list[str]:
        """Every class that is left or entered, by name."""
        return sorted({name for pair in self.moves for name in pair})

    def json(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        moves = [{"from": old, "to": new, "images": count} for (old, new), count in sorted(self.moves.items())]
        return {**asdict(self), "moves": moves}


def compare(before: pa.Table, after: pa.Table) -> Difference:
    """Hold two rounds of one ledger against each other, image by image.

    Args:
        before, after: tables with the columns id, name and copies.
    """
    place = _places(before, after)
    here = place >= 0
    old, new = _names(before)[place[here]], _names(after)[here]
    was, now = (before["copies"].to_numpy() > 0)[place[here]], (after["copies"].to_numpy() > 0)[here]
    moves = Counter(zip(old.tolist(), new.tolist(), strict=True))
    return Difference(int(here.sum()), int((old != new).sum()), int((~was & now).sum()), int((was & ~now).sum()), moves)


def _places(table: pa.Table, of: pa.Table) -> np.ndarray:
    """(N,) int64: the row in `table` of each image of `of`, -1 where it has none."""
    found = pc.index_in(of["id"], value_set=table["id"].combine_chunks())
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _names(table: pa.Table) -> np.ndarray:
    return np.array(table["name"].to_pylist(), dtype=object)


def _named(table: pa.Table, of: pa.Table) -> np.ndarray:
    """(N,): the class in `table` of each image of `of`, None where it has none."""
    return np.array([*table["name"].to_pylist(), None], dtype=object)[_places(table, of)]


def _moved(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """(N,) bool: of another class, where both are known."""
    return ((old != new) & (old != None) & (new != None)).astype(bool)  # noqa: E711, element by element


def difference_lines(found: Difference, title: str, before: int) -> Iterator[str]:
    """What changed, for people: a matrix of few classes, or the most frequent moves of many."""
    share = f" ({found.changed / found.images:.1%})" if found.images else ""
    yield f"{title} against round {before}: {found.images} images, {found.changed} of another class{share}"
    yield f"  {found.newly_kept:7,}  left out → kept"
    yield f"  {found.newly_left_out:7,}  kept → left out"
    names = found.classes
    if len(names) <= MATRIX_CLASSES:
        width = max([len(f"round {before}"), *map(len, names)])
        columns = [max(len(name), 5) for name in names]
        yield f"rows: class in round {before}; columns: class in {title}"
        yield "  " + " " * width + "".join(f"  {name:>{w}}" for name, w in zip(names, columns, strict=True))
        for old in names:
            counts = (f"  {found.moves.get((old, new), 0):>{w},}" for new, w in zip(names, columns, strict=True))
            yield f"  {old:{width}}" + "".join(counts)
        return
    moves = sorted(((n, *pair) for pair, n in found.moves.items() if pair[0] != pair[1]), key=lambda m: (-m[0], *m[1:]))
    for count, old, new in moves[:SHOWN]:
        yield f"  {count:7,}  {old} → {new}"
    if len(moves) > SHOWN:
        yield f"  and {len(moves) - SHOWN:,} other moves; --json has all"


def flips(tables: Mapping[int, pa.Table], of: pa.Table) -> np.ndarray:
    """(N,) int64: in how many rounds each image of `of` got another class than in the round before."""
    named = [_named(tables[number], of) for number in sorted(tables)]
    changes = [_moved(old, new) for old, new in zip(named[:-1], named[1:], strict=True)]
    return np.array([np.zeros(len(of), np.int64), *changes]).sum(axis=0)


def flipped(tables: Mapping[int, pa.Table], of: pa.Table, count: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The `count` images of `of` that changed their class in the most rounds, the less sure ones first among equals.

    Returns:
        Their rows, and for each {flips, history: [{round, class, confidence, kept, source}]}.
    """
    number = flips(tables, of)
    order = np.lexsort((np.array(of["id"].to_pylist(), dtype=object).astype(str), of["confidence"].to_numpy(), -number))
    rows = order[number[order] > 0][:count]
    chosen = of.take(pa.array(rows, pa.int64()))
    found: list[dict[str, Any]] = [{"flips": flips, "history": []} for flips in number[rows].tolist()]
    for one in sorted(tables):
        place = _places(tables[one], chosen)
        for entry, row in zip(found, place.tolist(), strict=True):
            if row >= 0:
                (known,) = tables[one].slice(row, 1).to_pylist()
                entry["history"].append({"round": one, "class": known["name"], "confidence": known["confidence"],
                                         "kept": known["copies"] > 0, "source": known["source"]})  # fmt: skip
    return chosen, found


def flip_lines(table: pa.Table, found: Sequence[Mapping[str, Any]], title: str) -> Iterator[str]:
    """The images that flip most, with their history."""
    yield f"{title}: the {len(found)} images whose class changed in the most rounds"
    for row, entry in zip(table.select(["path", "confidence"]).to_pylist(), found, strict=True):
        history = " → ".join(step["class"] for step in entry["history"])
        yield f"  {entry['flips']:3}  {row['confidence']:.3f}  {history}  {row['path']}"


# ---- review


def _recipe(folder: Path) -> Recipe:
    return parse((folder / "recipe.yaml").read_text(encoding="utf-8"), label=f"{folder.name}/recipe.yaml")


def _folders(names: Iterable[str]) -> dict[str, str]:
    """Class name to a folder's name, for each another: the class itself, unless no folder can be called so or it would
    lie elsewhere, such as T-shirt/top."""

    def safe(name: str) -> str:
        short = re.sub(r"[/\\\0]", "_", name).encode()[:LONGEST_FOLDER].decode(errors="ignore")
        return short if short.strip(".") else f"_{short}"

    found: dict[str, str] = {}
    taken = {"labels.csv"}
    for name in sorted(set(names), key=lambda name: (safe(name) != name, name)):  # a name that is safe stays as it is
        folder, number = safe(name), 1
        while folder in taken:
            number += 1
            folder = f"{safe(name)}-{number}"
        taken.add(folder)
        found[name] = folder
    return found


def export(store: Store, folder: Path, labels: Labels, table: pa.Table, target: Path) -> int:
    """Write images of `labels`, the rows of `table`, into `target`, a folder a class, with labels.csv for review.

    Raises:
        UserError: the folder exists and holds files, or images of `table` are gone from the recipe's data.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; give a new folder")
    recipe = _recipe(folder)
    seed = next(s["seed"] for s in read_head(folder)["stages"] if s["key"] == labels.key)  # each draws its own
    data = open_data(recipe.data, store.root / "data", seed=seed)
    place = {key: (images, row) for images in data.splits.values() for row, key in enumerate(images.ids.tolist())}
    gone = [row for row in table.select(["id", "path"]).to_pylist() if row["id"] not in place]
    if gone:
        raise UserError(f"{len(gone):,} of {len(table):,} images are no longer in the data of run {folder.name}, such "
                        f"as {gone[0]['path']}: put the files back; nothing was exported")  # fmt: skip
    folders = _folders(table["name"].to_pylist())
    target.mkdir(parents=True, exist_ok=True)
    with (target / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "round", "id", "class", "confidence", "margin", "reason", "path", "corrected"])
        for row in table.to_pylist():
            images, number = place[row["id"]]
            name = f"{folders[row['name']]}/{row['confidence']:.3f}-{row['id'][:12]}.png"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            encode = encode_png(images.batch(torch.tensor([number]))[0])
            (target / name).write_bytes(encode.numpy().tobytes())
            writer.writerow([name, row["round"], row["id"], row["name"], f"{row['confidence']:.4f}",
                             f"{row['margin']:.4f}", row["reason"], row["path"], ""])  # fmt: skip
    return len(table)


@dataclass(frozen=True)
class Review:
    """A review that was taken back: what it says, where it is kept, and the command that uses it."""

    stage: str
    rounds: list[int]  # whose labels were looked at
    images: int  # of the run
    reviewed: int
    renamed: int  # got another class than the teacher's
    confirmed: int
    dropped: int
    earlier: int  # rows of earlier reviews that still hold
    digest: str
    file: str
    command: list[str]
    note: str

    def json(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return asdict(self)

    @property
    def lines(self) -> Iterator[str]:
        """Plain text, one line an element."""
        of = f"round{'s' if len(self.rounds) > 1 else ''} {', '.join(map(str, self.rounds))}"
        yield (f"{self.reviewed} of {self.images} images of {of} are reviewed: {self.renamed} get another class, "
               f"{self.confirmed} are confirmed, {self.dropped} are left out")  # fmt: skip
        if self.earlier:
            yield f"{self.earlier} corrections of earlier reviews go on to hold"
        yield f"kept as {self.file}"
        if self.note:
            yield self.note
        yield "the next round uses them; what is stored of the rounds before is not run again:"
        yield f"  {shlex.join(self.command)}"


def _earlier(ledger: Ledger, classes: Sequence[str]) -> Corrections:
    """What was said before: to the run's recipe, and in reviews of this run that no round has read yet."""
    head = read_head(ledger.folder)
    stage: Any = _recipe(ledger.folder).node(_node_name(ledger, min(ledger.keys))).stage
    paths = [stage.corrections, _kept(ledger.store, head.get("corrections", {}).get(ledger.name, ""))]
    contents = [ledger.labels(max(ledger.keys)).corrections()]  # holds what the recipe said when the store was moved
    contents += [Path(path).read_bytes() for path in paths if path and Path(path).is_file()]
    known = Corrections({}, tuple(classes))
    for content in contents:
        known |= corrections.read({"": content or b""}, classes)[0]
    return known


def _kept(store: Store, digest: str) -> Path:
    return store.root / "corrections" / f"{digest}.csv"


def _node_name(ledger: Ledger, number: int) -> str:
    name = ledger.name.rpartition("/")[2]
    return name if ledger.group is None else name.replace(f"{ledger.group}.", f"{ledger.group}.{number}.", 1)


def take_back(ledger: Ledger, files: Sequence[Path], number: int | None) -> Review:
    """Check reviewed files against a ledger and keep what they say, with what earlier reviews said.

    The recipe is given the whole of it: each row has its round, and a round uses what was said of those before it.

    Args:
        number: the round that was looked at, for files that do not say.
    Raises:
        UserError: with a line for every problem; nothing is kept.
    """
    ids = {n: set(ledger.labels(n).table(["id"])["id"].to_pylist()) for n in ledger.keys}
    classes: list[str] = read_head(ledger.folder)["classes"]
    contents = {}
    for file in files:
        try:
            contents[str(file)] = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    found, problems = corrections.read(contents, classes, number=ledger.number(number), known=ids)
    rounds = sorted({row for row, _ in found.rows})
    if number is not None and not problems and rounds not in ([number], []):
        problems = [f"--round {number}, but the files speak of round {', '.join(map(str, rounds))}"]
    if not problems and not found.rows:
        problems = ["no image is reviewed: the column corrected is empty; write a class there, or ? to leave one out"]
    if problems:
        more = f"\n  and {len(problems) - PROBLEMS:,} more" if len(problems) > PROBLEMS else ""
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, nothing was taken back"
        raise UserError(f"--corrections: {count}\n  " + "\n  ".join(problems[:PROBLEMS]) + more)
    taught = {
        (n, row["id"]): row["name"] for n in rounds for row in ledger.labels(n).table(["id", "name"]).to_pylist()
    }  # fmt: skip
    given = {place: name for place, name in found.rows.items() if name is not None}
    renamed = sum(taught[place] != name for place, name in given.items())
    before = _earlier(ledger, classes)
    whole = before | found
    path = _kept(ledger.store, whole.digest)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda part: part.write_bytes(whole.text.encode()))
    known = read_head(ledger.folder).get("corrections", {})
    update_head(ledger.folder, corrections={**known, ledger.name: whole.digest})
    return Review(
        ledger.name, rounds, len(ids[rounds[-1]]), len(found.rows), renamed, len(given) - renamed,
        len(found.rows) - len(given), len(before.rows.keys() - found.rows.keys()), whole.digest, str(path),
        _command(ledger, path, rounds[-1]), _note(ledger, rounds[-1]),
    )  # fmt: skip


def _command(ledger: Ledger, path: Path, number: int) -> list[str]:
    """What runs the recipe with corrections of round `number`, with a round more where that was the last one."""
    where = re.sub(
        r"\.each\.[^.]+\.", ".stages.", _recipe(ledger.folder).node(_node_name(ledger, min(ledger.keys))).where
    )
    value = str(path) if yaml.safe_load(str(path)) == str(path) else json.dumps(str(path), ensure_ascii=False)
    command = ["orchestrator", "run", str(ledger.folder.absolute() / "recipe.yaml"), f"{where}.corrections={value}"]
    if ledger.group is not None and ledger.planned < number + 2:
        command.append(f"stages.{ledger.group}.rounds={number + 2}")
    return [*command, "--store", str(ledger.store.root)]


def _note(ledger: Ledger, number: int) -> str:
    """Why no round after `number` will come, where a gate has ended the rounds."""
    if ledger.group is None:
        return ""
    seed = ledger.name.rpartition("/")[0]
    for stage in read_head(ledger.folder)["stages"]:
        gate = stage["kind"] == "Gate" and stage["group"] == ledger.group and stage["name"].rpartition("/")[0] == seed
        if gate and stage["round"] <= number and ledger.store.has(stage["key"]):
            answer = ledger.store.open_artifact(stage["key"])
            if isinstance(answer, Decision) and answer.facts["action"] == "stopped":
                return (
                    f"! {stage['name']} ended the rounds, so none will read them: with stages.{ledger.group}.gate."
                    "otherwise=keep they go on, and those after it run anew"
                )
    return ""
