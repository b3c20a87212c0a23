"""The ledger remembers: rounds against each other, images that flip, labels that people correct for the next round."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from methods.views.draws import Draws
from orchestrator import ledger
from orchestrator.artifacts import Checkpoint, Decision, Labels
from orchestrator.corrections import Corrections, read
from orchestrator.data.splits import open_data
from orchestrator.errors import UserError
from orchestrator.recipe import load, parse
from orchestrator.run import execute, prepare
from orchestrator.runs import read_head, update_head
from orchestrator.stages.pseudo_label import PseudoLabel
from orchestrator.store import Store
from tests.conftest import SMALL
from tests.orchestrator.test_report import read_page

pytestmark = pytest.mark.usefixtures("untracked")

CLASSES = ("cat", "dog", "fox")


def key_of(letter):
    return letter * 32


def table_of(classes, kept=None, confidence=None, source=None):
    """A ledger's table of images a, b, c ... with classes by their first letters: "cdf" is cat, dog, fox."""
    names = {name[0]: name for name in CLASSES}
    count = len(classes)
    kept = [1] * count if kept is None else kept
    confidence = np.linspace(0.9, 0.5, count) if confidence is None else confidence
    return pa.table({
        "id": [key_of(chr(ord("a") + n)) for n in range(count)], "path": [f"{n}.png" for n in range(count)],
        "round": [0] * count, "teacher": ["t"] * count, "class": ["cdf".index(letter) for letter in classes],
        "name": [names[letter] for letter in classes], "confidence": confidence, "margin": [0.1] * count,
        "entropy": [0.1] * count, "probabilities": [[1.0, 0.0, 0.0]] * count, "copies": kept,
        "reason": ["kept" if copies else "below confidence" for copies in kept], "changed": [None] * count,
        "source": source or ["teacher"] * count,
    }, schema=Labels.SCHEMA)  # fmt: skip


# ---- rounds against each other


def test_a_difference_counts_moves_and_those_kept_and_left_out():
    before, after = table_of("ccddf", [1, 1, 0, 0, 1]), table_of("cdddc", [1, 0, 1, 0, 2])
    found = ledger.compare(before, after)
    assert (found.images, found.changed, found.newly_kept, found.newly_left_out) == (5, 2, 1, 1)
    assert found.moves == {("cat", "cat"): 1, ("cat", "dog"): 1, ("dog", "dog"): 2, ("fox", "cat"): 1}
    assert {"from": "fox", "to": "cat", "images": 1} in found.json()["moves"]


def test_images_are_matched_by_id_and_those_of_one_round_alone_are_not_counted():
    before, after = table_of("cdf"), table_of("cdfc").take([3, 2, 1])
    found = ledger.compare(before, after)
    assert (found.images, found.changed) == (2, 0)
    assert ledger.flips({0: before, 1: after}, after).tolist() == [0, 0, 0]


def test_flips_are_the_rounds_in_which_a_class_changed():
    tables = {0: table_of("cccc"), 1: table_of("cdcd"), 2: table_of("cccd"), 3: table_of("cddd")}
    assert ledger.flips(tables, tables[3]).tolist() == [0, 3, 1, 1]
    rows, found = ledger.flipped(tables, tables[3], 2)
    assert rows["id"].to_pylist() == [key_of("b"), key_of("d")]  # d is less sure than c
    assert found[0]["flips"] == 3
    assert [step["class"] for step in found[0]["history"]] == ["cat", "dog", "cat", "dog"]
    assert len(ledger.flipped(tables, tables[3], 99)[0]) == 3
    assert ledger.flips({0: tables[0]}, tables[0]).tolist() == [0] * 4


def test_few_classes_are_a_matrix_and_many_are_the_most_frequent_moves():
    before, after = table_of("ccddf"), table_of("cdddc")
    lines = list(ledger.difference_lines(ledger.compare(before, after), "round 1", 0))
    assert lines[0] == "round 1 against round 0: 5 images, 2 of another class (40.0%)"
    assert [line.split() for line in lines[4:]] == [["cat", "dog", "fox"], ["cat", "1", "1", "0"],
                                                    ["dog", "0", "2", "0"], ["fox", "1", "0", "0"]]  # fmt: skip
    many = ledger.Difference(300, 276, 0, 0, {(f"a{n:02}", f"b{n:02}"): n for n in range(1, 24)})
    lines = list(ledger.difference_lines(many, "round 1", 0))
    assert lines[3].split() == ["23", "a23", "→", "b23"] and lines[-1] == "  and 3 other moves; --json has all"


def test_a_ledger_written_before_there_were_corrections_is_the_teachers(tmp_path):
    old = table_of("cd").drop_columns(["source"])
    pq.write_table(old, tmp_path / "labels.parquet")
    labels = Labels(tmp_path)
    assert labels.table()["source"].to_pylist() == ["teacher"] * 2 and labels.table().schema == Labels.SCHEMA
    assert labels.table(["source", "id"]).column_names == ["source", "id"] and labels.corrections() is None


# ---- the commands, on a run whose ledgers are written by hand

RECIPE = SMALL.replace("name: small", "name: written")


@pytest.fixture
def written(tmp_path):
    """A store with a run of two seeds and three rounds, of which two are stored."""
    store = Store.open(tmp_path / "a store")
    folder = store.root / "runs" / "written-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    stages = []
    for seed, rounds in ((0, ("ccddf", "cdddc")), (1, ("fffff", "ccccc"))):
        for number in range(3):
            key = f"{seed}{number}" * 16
            stages.append({"name": f"seed-{seed}/students.{number}.pseudo", "kind": "PseudoLabel", "key": key,
                           "round": number, "group": "students", "seed": seed, "work": {}})  # fmt: skip
            if number < 2:
                table = table_of(rounds[number], [1, 1, 0, 0, 1] if number == 0 else [1, 0, 1, 0, 2])
                columns = {**{name: table[name] for name in table.column_names}, "round": [number] * 5}
                store.commit(key, Labels.write(store.output(key), [columns], {}), {})
    update_head(folder, run="written-1", recipe="written", seeds=[0, 1], classes=list(CLASSES), stages=stages,
                status="FINISHED", pixels=16)  # fmt: skip
    return store


def ask(orchestrator, store, *arguments):
    code, out, err = orchestrator("labels", "--store", store.root, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def refuse(orchestrator, store, *arguments):
    code, out, err = orchestrator("labels", "--store", store.root, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ")
    return err.removeprefix("error: ")


def test_diff_holds_the_last_round_against_the_one_before_it(orchestrator, written):
    found = ask(orchestrator, written, "--diff")
    counts = {"round": 1, "against": 0, "images": 5, "changed": 2, "newly_kept": 1, "newly_left_out": 1}
    assert {name: found[name] for name in counts} == counts
    assert sum(move["images"] for move in found["moves"]) == 5
    code, text, _ = orchestrator("labels", "--store", written.root, "--diff")
    assert code == 0 and text.startswith("round 1 of seed-0/students.pseudo against round 0: 5 images, 2 of another")


def test_a_round_can_be_held_against_any_other(orchestrator, written):
    found = ask(orchestrator, written, "--round", "0", "--diff", "--against", "1")
    assert (found["round"], found["against"], found["newly_kept"]) == (0, 1, 1)
    assert {"from": "cat", "to": "fox", "images": 1} in found["moves"]
    assert ask(orchestrator, written, "--diff", "--class", "cat")["images"] == 2


def test_changed_compares_although_no_round_was_wired_to_the_one_before(orchestrator, written):
    assert [row["path"] for row in ask(orchestrator, written, "--changed")["rows"]] == ["1.png", "4.png"]
    assert ask(orchestrator, written, "--changed", "--against", "1")["rows"] == []
    assert [row["path"] for row in ask(orchestrator, written, "--changed", "--kept")["rows"]] == ["4.png"]


def test_flips_give_each_image_its_history(orchestrator, written):
    rows = ask(orchestrator, written, "--flips", "1")["rows"]
    assert [(row["path"], row["flips"]) for row in rows] == [("4.png", 1)]
    assert [(step["round"], step["class"], step["kept"]) for step in rows[0]["history"]] == [
        (0, "fox", True), (1, "cat", True)]  # fmt: skip
    code, text, _ = orchestrator("labels", "--store", written.root, "--flips", "9")
    assert code == 0 and "fox → cat  4.png" in text and "the 2 images" in text


def test_of_several_seeds_the_first_is_shown_unless_another_is_named(orchestrator, written):
    assert [row["name"] for row in ask(orchestrator, written)["rows"]] == ["cat", "dog", "dog", "dog", "cat"]
    rows = ask(orchestrator, written, "--stage", "seed-1/students.pseudo")["rows"]
    assert {row["name"] for row in rows} == {"cat"}
    message = refuse(orchestrator, written, "--stage", "seed-1/student.pseudo")
    assert "did you mean seed-1/students.pseudo?" in message


IN_VAIN = [
    (["--round", "0", "--diff"], ["round 0", "none before it"]),
    (["--diff", "--against", "2"], ["round 2", "0, 1"]),
    (["--round", "0", "--changed"], ["round 0", "none before it"]),
    (["--against", "0"], ["add --diff or --changed"]),
    (["--diff", "--export", "x"], ["--diff and --export", "give one of them"]),
    (["--corrections", "no-such.csv"], ["no-such.csv", "No such file"]),
    (["--corrections", "."], ["cannot be read"]),
]


@pytest.mark.parametrize(("arguments", "expected"), IN_VAIN)
def test_what_cannot_be_shown_is_told_with_what_can(orchestrator, written, arguments, expected):
    message = refuse(orchestrator, written, *arguments)
    assert all(part in message for part in expected) and message.count("\n") == 1


# ---- corrections of a run


def review(path, *rows, header="round,id,corrected"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


A, B, C = key_of("a"), key_of("b"), key_of("c")


def test_a_review_is_kept_under_its_digest_with_the_command_that_uses_it(orchestrator, written, tmp_path):
    file = review(tmp_path / "labels.csv", (0, A, "dog"), (0, B, "cat"), (0, C, "?"), (0, key_of("d"), ""))
    found = ask(orchestrator, written, "--corrections", file)
    kept = Path(found["file"])
    assert kept == written.root / "corrections" / f"{found['digest']}.csv"
    expected = Corrections({(0, A): "dog", (0, B): "cat", (0, C): None}, CLASSES)
    assert kept.read_text(encoding="utf-8") == expected.text and found["digest"] == expected.digest
    counts = {name: found[name] for name in ("rounds", "images", "reviewed", "renamed", "confirmed", "dropped")}
    assert counts == {"rounds": [0], "images": 5, "reviewed": 3, "renamed": 1, "confirmed": 1, "dropped": 1}
    assert found["command"] == [
        "orchestrator", "run", str(written.root / "runs" / "written-1" / "recipe.yaml"),
        f"stages.students.stages.pseudo.corrections={kept}", "--store", str(written.root),
    ]  # fmt: skip
    code, text, _ = orchestrator("labels", "--store", written.root, "--corrections", file)
    assert code == 0 and shlex.split(text.splitlines()[-1]) == found["command"]
    assert "3 of 5 images of round 0 are reviewed: 1 get another class, 1 are confirmed, 1 are left out" in text


def test_a_review_of_the_last_round_asks_for_one_more(orchestrator, written, tmp_path):
    folder = written.root / "runs" / "written-1"
    stages = [stage for stage in read_head(folder)["stages"] if stage["round"] < 2]
    update_head(folder, stages=stages)
    command = ask(orchestrator, written, "--corrections", review(tmp_path / "l.csv", (1, A, "dog")))["command"]
    assert "stages.students.rounds=3" in command
    earlier = ask(orchestrator, written, "--corrections", review(tmp_path / "l.csv", (0, A, "dog")))["command"]
    assert not any("rounds=" in word for word in earlier)


def test_reviews_add_up_and_a_new_answer_takes_the_old_ones_place(orchestrator, written, tmp_path):
    ask(orchestrator, written, "--corrections", review(tmp_path / "l.csv", (0, A, "dog"), (0, B, "fox")))
    found = ask(orchestrator, written, "--corrections", review(tmp_path / "m.csv", (0, B, "?"), (1, C, "cat")))
    kept = read({"kept": Path(found["file"]).read_bytes()}, CLASSES)[0]
    assert kept.rows == {(0, A): "dog", (0, B): None, (1, C): "cat"}
    assert found["earlier"] == 1 and found["rounds"] == [0, 1]
    other = ask(orchestrator, written, "--stage", "seed-1/students.pseudo", "--corrections", tmp_path / "l.csv")
    assert other["earlier"] == 0


def test_several_files_are_taken_back_together(orchestrator, written, tmp_path):
    first, second = review(tmp_path / "l.csv", (0, A, "dog")), review(tmp_path / "m.csv", (0, B, "fox"))
    assert ask(orchestrator, written, "--corrections", first, "--corrections", second)["reviewed"] == 2


def test_a_file_without_rounds_is_of_the_round_that_is_asked_for(orchestrator, written, tmp_path):
    file = review(tmp_path / "l.csv", (A, "dog"), header="id,corrected")
    assert ask(orchestrator, written, "--round", "0", "--corrections", file)["rounds"] == [0]
    other = review(tmp_path / "m.csv", (1, A, "dog"))
    message = refuse(orchestrator, written, "--round", "0", "--corrections", other)
    assert "--round 0, but the files speak of round 1" in message


def test_every_problem_of_a_review_is_a_line_and_nothing_is_kept(orchestrator, written, tmp_path):
    file = review(tmp_path / "labels.csv", (0, A, "dgo"), (0, "x", "cat"), (0, B, "cat"), (0, B, "dog"), (5, C, "cat"))
    before = file.read_bytes()
    message = refuse(orchestrator, written, "--corrections", file)
    assert "4 problems, nothing was taken back" in message
    for line, part in ((2, "did you mean dog?"), (3, "unknown id x"), (5, "is dog here and cat in"), (6, "round 5")):
        assert sum(f"line {line}: " in told and part in told for told in message.splitlines()) == 1, message
    assert not (written.root / "corrections").exists() and file.read_bytes() == before


def test_a_review_of_nothing_says_what_to_write(orchestrator, written, tmp_path):
    file = review(tmp_path / "labels.csv", (0, A, ""))
    assert "the column corrected is empty" in refuse(orchestrator, written, "--corrections", file)


def test_a_gate_that_ended_the_rounds_is_named_since_no_round_will_come(orchestrator, written, tmp_path):
    folder = written.root / "runs" / "written-1"
    stages = read_head(folder)["stages"]
    gate = {"name": "seed-0/students.1.gate", "kind": "Gate", "key": "9" * 32, "round": 1, "group": "students",
            "seed": 0, "work": {}}  # fmt: skip
    facts = {"action": "stopped", "promoted": "0" * 32, "reason": "hold-out accuracy"}
    written.commit("9" * 32, Decision.write(written.output("9" * 32), facts), {})
    update_head(folder, stages=[*stages, gate])
    found = ask(orchestrator, written, "--corrections", review(tmp_path / "l.csv", (1, A, "dog")))
    assert found["note"].startswith("! seed-0/students.1.gate ended the rounds") and "otherwise=keep" in found["note"]
    assert ask(orchestrator, written, "--corrections", review(tmp_path / "l.csv", (0, A, "dog")))["note"] == ""


def test_arms_of_a_comparison_are_corrected_in_the_stage_they_share(written):
    arms = RECIPE.replace(
        "  verdict:",
        """  compared:
    each: {one: {}, two: {}}
    stages:
      soft: {use: orchestrator.stages.pseudo_label.PseudoLabel, inputs: {teacher: teacher, images: unlabelled}}
  verdict:""",
    )
    folder = written.root / "runs" / "written-1"
    (folder / "recipe.yaml").write_text(arms, encoding="utf-8")
    stage = {"name": "compared.two.soft", "kind": "PseudoLabel", "key": "00" * 16, "round": None, "group": None}
    update_head(folder, stages=[stage])
    book = ledger.open_ledger(written, folder)
    assert (book.name, book.number(None), book.planned) == ("compared.two.soft", 0, 1)
    command = ledger._command(book, Path("/s/c.csv"), 0)
    assert "stages.compared.stages.soft.corrections=/s/c.csv" in command
    assert not any("rounds=" in word for word in command) and parse(arms, overrides=[command[3]]).nodes


def test_a_path_that_yaml_would_read_otherwise_is_quoted(written):
    book = ledger.open_ledger(written, written.root / "runs" / "written-1")
    path = Path("/s/a: b #1/c.csv")
    recipe = parse(RECIPE, overrides=[ledger._command(book, path, 0)[3]])
    assert recipe.node("students.1.pseudo").stage.corrections == str(path)


# ---- images to review


def exported(orchestrator, store, target, *arguments):
    """The rows of labels.csv, each of an image that is there."""
    ask(orchestrator, store, "--export", target, *arguments)
    with (target / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((target / row["file"]).resolve().is_relative_to(target.resolve()) for row in rows)
    assert {target / row["file"] for row in rows} == set(target.rglob("*.png"))
    return rows


def shown(store, names, ids, seed=0):
    """Make the last stored round of a seed's ledger one of these images, with a class each."""
    head = read_head(store.root / "runs" / "written-1")
    table = table_of("c" * len(names))
    columns = {name: table[name] for name in table.column_names}
    columns |= {"id": ids, "name": names, "round": [1] * len(names)}
    key = f"{seed}5" * 16
    stages = [{**s, "key": key} if (s["seed"], s["round"]) == (seed, 1) else s for s in head["stages"]]
    store.commit(key, Labels.write(store.output(key), [columns], {}), {})
    update_head(store.root / "runs" / "written-1", stages=stages, classes=list(dict.fromkeys(names)))


AWKWARD_CLASSES = [
    ("T-shirt/top", "T-shirt_top-2"), ("T-shirt_top", "T-shirt_top"), ("T-shirt\\top", "T-shirt_top-3"),
    ("/m/01g317", "_m_01g317"), ("../../esc", ".._.._esc"), ("..", "_.."), (".", "_."), ("labels.csv", "labels.csv-2"),
    ("a\0b", "a_b"), ("größe", "größe"), ("ö" * 200, "ö" * 100),
]  # fmt: skip


def test_a_class_of_any_name_has_a_folder_of_its_own_in_the_export_and_comes_back(orchestrator, written, tmp_path):
    names = [name for name, _ in AWKWARD_CLASSES]
    ids = open_data(parse(RECIPE).data, tmp_path / "data", seed=0).splits["unlabelled"].ids.tolist()[: len(names)]
    shown(written, names, ids)
    target = tmp_path / "deep" / "review"
    rows = exported(orchestrator, written, target)
    assert [row["class"] for row in rows] == names
    assert [(row["class"], row["file"].rpartition("/")[0]) for row in rows] == AWKWARD_CLASSES
    for row, answer in zip(rows, names[1:], strict=False):
        row["corrected"] = answer
    with (target / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = ask(orchestrator, written, "--corrections", target / "labels.csv")
    kept = read({"kept": Path(found["file"]).read_bytes()}, names)[0]
    assert kept.rows == {(1, key): name for key, name in zip(ids, names[1:], strict=False)}


def test_images_of_a_later_seed_are_exported_from_what_that_seed_drew(orchestrator, written, tmp_path):
    recipe = RECIPE.replace("labels: false}", "labels: false, count: 40}")
    (written.root / "runs" / "written-1" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for seed in (0, 1):
        data = open_data(parse(recipe).data, tmp_path / "data", seed=seed)
        ids = data.splits["unlabelled"].ids.tolist()
        shown(written, ["cat"] * len(ids), ids, seed)
        rows = exported(orchestrator, written, tmp_path / f"{seed}", "--stage", f"seed-{seed}/students.pseudo")
        assert [row["id"] for row in rows] == ids


def test_images_that_are_gone_are_counted_and_nothing_is_exported(orchestrator, written, tmp_path):
    message = refuse(orchestrator, written, "--export", tmp_path / "review")
    assert "5 of 5 images are no longer in the data of run written-1, such as 0.png" in message
    assert not (tmp_path / "review").exists()


# ---- what the stage does with them


class Pictures:
    """What PseudoLabel asks of images: ids a, b, c ..."""

    classes = CLASSES

    def __init__(self, count):
        self.ids = np.array([key_of(chr(ord("a") + n)) for n in range(count)])

    def __len__(self):
        return len(self.ids)

    def where(self, row):
        return f"{row}.png"


class Setting:
    """A context whose teacher says what it is told to."""

    def __init__(self, place, probability, number):
        self.output, self.probability, self.round = place, torch.tensor(probability), number
        self.classes, self.said, self.notice = CLASSES, [], lambda line: self.said.append(line)
        place.mkdir()

    def predict(self, checkpoint, images):
        return self.probability

    def logits(self, checkpoint, images):
        return self.probability.log()

    def draws(self, purpose, rows):
        return Draws.of(0, 0, torch.arange(rows)).fork(purpose)


SAID = [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [1.0, 0.0, 0.0], [0.4, 0.35, 0.25], [0.0, 0.3, 0.7]]


@pytest.fixture
def label(tmp_path):
    """Label the five images of SAID in a round, with rows of corrections; gives the answer."""
    count = iter(range(99))

    def run(*rows, number=1, said=SAID, previous=None, **options):
        place = tmp_path / str(next(count))
        if rows:
            options["corrections"] = str(review(tmp_path / "given.csv", *rows))
        setting = Setting(place, said, number)
        stage = PseudoLabel(**{"balance": "none", "min_confidence": 0.5, **options})
        labels = stage.run(setting, teacher=Checkpoint(place, {}, "t"), images=Pictures(len(said)), previous=previous)
        return labels, labels.table().to_pylist(), setting.said

    return run


def test_a_corrected_image_has_its_class_with_probability_one_and_is_kept(label):
    _, rows, _ = label((0, key_of("d"), "fox"))
    assert rows[3]["probabilities"] == [0, 0, 1]
    told = {name: rows[3][name] for name in ("name", "class", "confidence", "margin", "entropy", "copies", "reason")}
    assert told == {"name": "fox", "class": 2, "confidence": 1, "margin": 1, "entropy": 0, "copies": 1,
                    "reason": "corrected by hand"}  # fmt: skip


def test_a_dropped_image_is_not_kept_and_the_teachers_word_stays_readable(label):
    _, rows, _ = label((0, A, "?"))
    assert (rows[0]["copies"], rows[0]["reason"], rows[0]["name"]) == (0, "dropped by hand", "cat")
    assert rows[0]["confidence"] == pytest.approx(0.9)


def test_every_other_row_is_as_without_corrections(label):
    _, plain, _ = label()
    _, rows, _ = label((0, A, "?"), (0, B, "fox"))
    assert rows[2:] == plain[2:]


def test_the_source_of_a_label_is_the_teacher_or_the_digest_of_the_file_beside_the_table(label):
    labels, rows, _ = label((0, A, "?"), (0, B, "fox"))
    digest = labels.facts["corrections"]
    assert [row["source"] for row in rows] == [digest, digest, "teacher", "teacher", "teacher"]
    assert labels.corrections().decode() == f"round,id,corrected\n0,{A},?\n0,{B},fox\n"
    assert read({"": labels.corrections()}, CLASSES)[0].digest == digest


def test_a_round_ignores_what_was_said_of_itself_and_later_ones(label):
    labels, rows, _ = label((0, A, "dog"), (1, B, "fox"), (2, C, "fox"), number=1)
    assert [row["reason"] for row in rows[:3]] == ["corrected by hand", "kept", "kept"]
    assert labels.corrections().decode().count("\n") == 2
    labels, rows, _ = label((1, B, "fox"), number=1)
    assert "corrections" not in labels.facts and labels.corrections() is None


def test_outside_of_rounds_everything_is_used(label):
    _, rows, _ = label((0, A, "dog"), (7, B, "fox"), number=None)
    assert [row["name"] for row in rows[:2]] == ["dog", "fox"]


@pytest.mark.parametrize("balance", ["limit", "replicate"])
def test_no_limit_of_a_class_drops_a_corrected_image(label, balance):
    _, rows, _ = label((0, key_of("e"), "cat"), balance=balance, per_class=1)
    assert [row["copies"] for row in rows] == [0, 1, 0, 0, 1]  # image c has confidence 1 and comes first
    _, rows, _ = label((0, A, "cat"), (0, key_of("e"), "cat"), balance=balance, per_class=1)
    assert (rows[0]["copies"], rows[2]["copies"], rows[4]["copies"]) == (1, 0, 1)


def test_a_dropped_image_takes_no_place_of_its_class(label):
    _, rows, _ = label((0, C, "?"), balance="limit", per_class=1, min_confidence=0.0)
    assert [row["copies"] for row in rows] == [1, 1, 0, 0, 1]


def test_the_guard_too_keeps_the_corrected_and_leaves_out_the_dropped(label):
    labels, rows, _ = label((0, C, "?"), (0, key_of("d"), "fox"), min_confidence=0.99, min_kept=2, adapt_share=0.5)
    assert "only 1 of 5 images reach min_confidence 0.99 (the most confident has 1.00)" in labels.facts["guard"]
    assert [row["copies"] for row in rows] == [1, 1, 0, 1, 0]


CATS = [[0.9, 0.1, 0.0]] * 90 + [[0.0, 0.9, 0.1]] * 3 + [[0.0, 0.0, 1.0]] * 2


@pytest.mark.parametrize(("balance", "copies"), [("none", (12, 3, 2)), ("limit", (12, 3, 2)), ("replicate", (12,) * 3)])
def test_the_guard_keeps_no_more_of_one_class_than_its_limit(label, balance, copies):
    labels, rows, said = label(said=CATS, balance=balance, max_class_share=0.706, per_class=90)
    assert "one class holds 95% of the kept images, more than 71%: kept only the most confident of it" in said[0]
    assert tuple(sum(row["copies"] for row in rows if row["class"] == k) for k in range(3)) == copies
    assert max(labels.facts["kept_by_class"]) / labels.facts["kept"] <= 0.706


def test_the_guard_looks_below_the_threshold_where_one_class_alone_is_above_it(label):
    said = CATS[:90] + [[0.3, 0.4, 0.3]] * 10 + [[0.3, 0.3, 0.4]] * 10
    labels, _, (told, *_) = label(said=said, balance="replicate", max_class_share=0.5)
    assert "took the most confident 20% of every predicted class instead" in told
    assert labels.facts["kept_by_class"] == [4, 2, 2] and labels.facts["copies"] == 8


def test_dropping_every_image_leaves_a_ledger_that_keeps_none(label):
    labels, rows, _ = label(*((0, key_of(letter), "?") for letter in "abcde"))
    assert labels.facts["kept"] == 0 and {row["reason"] for row in rows} == {"dropped by hand"}


def test_the_facts_count_what_was_said_and_how_often_the_teacher_agrees(label):
    labels, _, said = label((0, A, "cat"), (0, B, "fox"), (0, C, "?"), (0, key_of("z"), "dog"))
    expected = {"corrected": 2, "dropped": 1, "teacher_agrees": 1, "corrections_absent": 1}
    assert {name: labels.facts[name] for name in expected} == expected
    assert said == ["1 of the corrected images are not among these images"]
    plain, _, _ = label()
    assert not expected.keys() & plain.facts.keys()
    assert labels.facts["mean_confidence"] == plain.facts["mean_confidence"]


def test_a_correction_is_a_change_from_the_round_before(label):
    before, _, _ = label(number=0)
    labels, rows, _ = label((0, A, "dog"), previous=before)
    assert [row["changed"] for row in rows] == [True, False, False, False, False] and labels.facts["changed"] == 1


# ---- keys


def plan_of(root, *overrides):
    return prepare(parse(SMALL, overrides=overrides), root, label="small").plans[0]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A store, the plan of the small recipe in it, and the ids of its unlabelled images."""
    root = tmp_path_factory.mktemp("plan") / "s"
    plan = plan_of(root)
    return root, {stage.name: stage.key for stage in plan.stages}, plan.images["unlabelled"].ids.tolist()


OPTION = "stages.students.stages.pseudo.corrections"


def keys_with(root, file):
    return {stage.name: stage.key for stage in plan_of(root, f"{OPTION}={file}").stages}


def test_a_review_changes_the_keys_of_the_rounds_after_it_alone(planned, tmp_path):
    root, plain, ids = planned
    found = keys_with(root, review(tmp_path / "l.csv", (0, ids[0], 3)))
    same = {name for name in plain if found[name] == plain[name]}
    assert same == {"pretrain", "probe", "teacher", "students.0.pseudo", "students.0.student", "students.0.gate"}
    assert keys_with(root, review(tmp_path / "m.csv", (1, ids[0], 3))) == plain
    assert keys_with(root, review(tmp_path / "n.csv", (0, ids[0], ""))) == plain


def test_a_key_holds_what_the_file_says_and_not_how_or_where(planned, tmp_path):
    root, _, ids = planned
    first = keys_with(root, review(tmp_path / "l.csv", (0, ids[0], 3), (0, ids[1], "?")))
    other = review(
        tmp_path / "elsewhere.csv", ("x", "drop", ids[1], 0), ("y", 3, ids[0], 0), header="n,corrected,id,round"
    )
    assert keys_with(root, other) == first
    assert keys_with(root, review(tmp_path / "l.csv", (0, ids[0], 4), (0, ids[1], "?"))) != first


def test_a_later_review_leaves_the_key_of_a_round_that_used_an_earlier_one(planned, tmp_path):
    root, _, ids = planned
    first = keys_with(root, review(tmp_path / "l.csv", (0, ids[0], 3)))
    assert keys_with(root, review(tmp_path / "m.csv", (0, ids[0], 3), (1, ids[0], 4))) == first


def test_the_question_of_a_stage_names_the_digest_and_no_path(planned, tmp_path):
    root, _, ids = planned
    file = review(tmp_path / "l.csv", (0, ids[0], 3))
    configs = {s.name: s.question["config"] for s in plan_of(root, f"{OPTION}={file}").stages}
    assert configs["students.0.pseudo"]["corrections"] is None
    assert re.fullmatch("[0-9a-f]{32}", configs["students.1.pseudo"]["corrections"])


def test_a_file_that_changes_after_planning_changes_nothing(planned, tmp_path):
    root, _, ids = planned
    file = review(tmp_path / "l.csv", (0, ids[0], 3))
    stage = next(s.stage for s in plan_of(root, f"{OPTION}={file}").stages if s.name == "students.1.pseudo")
    digest = stage._given(tuple("0123456789"), 1).digest
    file.unlink()
    assert stage._given(tuple("0123456789"), 1).digest == digest


def test_a_file_with_mistakes_is_told_before_anything_runs(planned, tmp_path):
    root, _, ids = planned
    file = review(tmp_path / "l.csv", (0, ids[0], "three"), (0, ids[1], "33"))
    with pytest.raises(UserError, match="2 errors, nothing was run") as error:
        plan_of(root, f"{OPTION}={file}")
    assert "line 2: unknown class three" in str(error.value) and "line 3: unknown class 33" in str(error.value)
    with pytest.raises(UserError, match="gone.csv: cannot be read .No such file"):
        plan_of(root, f"{OPTION}={tmp_path / 'gone.csv'}")
    with pytest.raises(UserError, match="none of its 1 images is among the unlabelled ones"):
        plan_of(root, f"{OPTION}={review(tmp_path / 'm.csv', (0, 'f' * 32, 3))}")


# ---- from the first round to the third


@pytest.mark.slow
def test_corrected_labels_are_learned_from_in_the_next_round_and_no_stored_round_runs_again(orchestrator, tmp_path):
    root = tmp_path / "größe"
    prepared = prepare(parse(SMALL), root, label="small")
    ids = prepared.plans[0].images["unlabelled"].ids.tolist()
    execute(prepared, use_ray=False)

    def again(command):
        """What the command that was printed does, in this process; gives states, tables of pseudo-labels, the page."""
        assert command[:2] == ["orchestrator", "run"] and command[-2:] == ["--store", str(root)]
        ready = prepare(load(command[2], command[3:-2]), root, label="again")
        result = execute(ready, use_ray=False)
        book = ledger.open_ledger(ready.store, ready.folder)
        tables = {number: book.labels(number).table() for number in sorted(book.keys)}
        return {s["name"]: s["state"] for s in result.stages}, tables, read_page(ready.folder)

    def by_hand(number, answers):
        target = tmp_path / f"round {number}"
        code, _, err = orchestrator("labels", "--store", root, "--round", number, "--uncertain", 8, "--export", target)
        assert code == 0, err
        with (target / "labels.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row, answer in zip(rows, answers, strict=False):
            row["corrected"] = answer
        with (target / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        code, out, err = orchestrator("labels", "--store", root, "--corrections", target / "labels.csv", "--json")
        assert code == 0, err
        return [row["id"] for row in rows], json.loads(out)

    asked, taken = by_hand(0, ["7", "?", "3"])
    states, tables, page = again(taken["command"])
    before = {"pretrain", "probe", "teacher", "students.0.pseudo", "students.0.student", "students.0.gate"}
    assert {name for name, state in states.items() if state == "stored"} == before
    rows = {row["id"]: row for row in tables[1].to_pylist()}
    assert list(rows) == ids and {row["source"] for row in rows.values()} == {"teacher", taken["digest"]}
    assert [rows[key]["name"] for key in asked[:3:2]] == ["7", "3"]
    assert {rows[key]["reason"] for key in asked[:3:2]} == {"corrected by hand"}
    assert rows[asked[1]]["copies"] == 0 and rows[asked[0]]["copies"] > 0
    assert (
        "corrected by hand" in page.said["rounds"] and "2 pseudo-labels were corrected by hand" in page.said["verdict"]
    )

    second, taken = by_hand(1, ["5"])  # of the run that used the first review, whose last round it was
    assert "stages.students.rounds=3" in taken["command"] and taken["earlier"] == 3
    states, tables, page = again(taken["command"])
    assert {name for name, state in states.items() if state == "ran"} == {
        "students.2.pseudo", "students.2.student", "students.2.gate", "verdict"}  # fmt: skip
    rows = {row["id"]: row for row in tables[2].to_pylist()}
    assert rows[second[0]]["name"] == "5" and rows[asked[0]]["name"] == "7"
    assert {rows[key]["source"] for key in (second[0], asked[0], asked[1])} == {taken["digest"]}
    table = page.table("rounds", "pseudo-labels")
    change = ledger.compare(tables[1], tables[2])
    assert table[2][:2] == ["round 2", f"{len(ids):,}"] and table[2][2].startswith(f"{change.changed:,} (")
    assert table[2][3:5] == [f"{change.newly_kept:,}", f"{change.newly_left_out:,}"]
    assert (table[0][5:], table[1][5], table[2][5], table[2][7]) == (["", "", ""], "2", "3", "1")

    moved = tmp_path / "moved"
    shutil.move(root, moved)
    book = ledger.open_ledger(Store.open(moved), next((moved / "runs").glob("small-*")))
    file = review(tmp_path / "third.csv", (0, asked[3], "1"))
    assert ledger.take_back(book, [file], None).file.startswith(str(moved))
