"""The commands as a user types them: what they print for people and machines, exit codes, mistakes in one line."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli import _load
from orchestrator.recipe import load, parse, shipped
from orchestrator.run import execute, prepare
from tests.conftest import SMALL

pytestmark = pytest.mark.usefixtures("untracked")

OWN = """
name: own
data:
  pixels: 16
  labelled: null
  holdout: {from: labelled, per_class: 2}
  unlabelled: null
  test: {from: labelled, per_class: 2}
resources: {threads: 1}
""" + SMALL[SMALL.index("stages:") :]
CLASSES = ("cat", "dog", "größe")
BROKEN = {"empty.jpg": b"", "text file.jpg": b"no image at all", "half.png": None}


def strict(text):
    """JSON as every parser takes it: NaN and Infinity are none."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def picture(path, seed, hue=None):
    """A small picture, another one for each seed; one class is brighter than the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = 0 if hue is None else 70 * hue
    Image.fromarray(np.random.default_rng(seed).integers(low, low + 80, (20, 24, 3), dtype=np.uint8)).save(path, "PNG")
    return path


class World:
    """A user's folder: recipe, images, a store with one finished run."""

    def __init__(self, place):
        self.place = place
        self.labelled, self.unlabelled = place / "labelled images", place / "unbeschriftet 図"
        self.recipe, self.store = place / "own.yaml", place / "store"
        self.recipe.write_text(OWN, encoding="utf-8")
        for number, name in enumerate(CLASSES):
            for seed in range(8):
                picture(self.labelled / name / f"{seed}.png", 100 * number + seed, number)
        for seed in range(60):
            picture(self.unlabelled / f"{seed} ü.png", 1000 + seed, seed % 3)
        for name, content in BROKEN.items():
            whole = (self.unlabelled / "0 ü.png").read_bytes()
            (self.unlabelled / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        self.arguments = [self.recipe, "--labelled", self.labelled, "--unlabelled", self.unlabelled]


@pytest.fixture(scope="module")
def world(untracked, tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"))
    flags = [f"data.{name}={json.dumps(str(getattr(made, name)))}" for name in ("labelled", "unlabelled")]
    execute(prepare(load(str(made.recipe), flags), made.store, label="own.yaml"), use_ray=False)
    return made


# ---- what the commands print


def test_help_names_every_command_and_each_has_help_of_its_own(orchestrator):
    code, text, _ = orchestrator("--help")
    assert code == 0
    for name in ("run", "plan", "status", "show", "labels", "predict", "doctor", "recipes", "methods", "ui", "sync"):
        assert f" {name} " in text
        code, own, _ = orchestrator(name, "--help")
        assert code == 0 and own.startswith("Usage: ") and f" {name} " in own


def test_the_installed_command_answers_and_its_exit_code_is_the_shells(tmp_path):
    script = Path(sys.executable).with_name("orchestrator")
    good = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.startswith("Usage: orchestrator ")
    bad = subprocess.run([script, "run", "quikstart"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1 and "did you mean quickstart?" in bad.stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_leaves_no_traceback():
    script = Path(sys.executable).with_name("orchestrator")
    run = subprocess.Popen([script, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert b"Traceback" not in run.stderr.read()
    run.stderr.close()
    run.wait()


def test_run_as_json_is_one_object_alone_on_stdout(orchestrator, world):
    code, out, err = orchestrator("run", *world.arguments, "--store", world.store, "--json")
    assert code == 0 and out.count("\n") == 1
    found = strict(out)
    assert set(found) == {"run", "store", "report", "verdict", "stages"}
    assert found["store"] == str(world.store) and Path(found["report"]).is_file()
    assert set(found["verdict"]) == {"baseline", "final", "gain", "low", "high", "sentence"}
    assert {stage["state"] for stage in found["stages"]} == {"stored"}
    for stage in found["stages"]:
        assert set(stage) == {"name", "key", "digest", "state", "seconds"}
        manifest = strict((world.store / "artifacts" / stage["key"] / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["digest"] == stage["digest"]
    assert "3 images cannot be used and are left out" in err


def test_run_for_people_ends_with_verdict_report_and_next_command(orchestrator, world):
    code, out, err = orchestrator("run", *world.arguments, "--store", world.store)
    assert (code, err) == (0, "")
    verdict = strict(orchestrator("show", "--store", world.store, "--json")[1])["verdict"]
    assert verdict["sentence"] in out
    assert str(world.store) in out and "report.html" in out and "orchestrator show own-" in out


def test_plan_as_json_says_what_is_stored_and_what_will_run(orchestrator, world, tmp_path):
    everything = strict(orchestrator("plan", *world.arguments, "--store", world.store, "--json")[1])
    assert {stage["state"] for stage in everything["stages"]} == {"stored"}
    change = "stages.students.stages.student.optim.lr=0.06"
    code, out, _ = orchestrator("plan", *world.arguments, change, "--store", world.store, "--json")
    assert code == 0
    found = strict(out)
    assert {"recipe", "run", "store", "stages", "data"} <= set(found) and found["recipe"] == "own"
    states = {stage["name"]: stage["state"] for stage in found["stages"]}
    assert states["students.0.pseudo"] == "stored" and states["students.0.student"] == "to run"
    student = next(stage for stage in found["stages"] if stage["name"] == "students.0.student")
    assert student["steps"] == 8 and "optim.lr 0.05 → 0.06" in student["why"]
    assert found["data"]["splits"]["unlabelled"]["images"] == 60
    assert {Path(bad["path"]).name for bad in found["data"]["quarantine"]} == set(BROKEN)
    assert all(bad["reason"] for bad in found["data"]["quarantine"])


def test_how_often_each_image_will_be_seen_is_told_before_anything_runs(orchestrator, world, tmp_path):
    change = "stages.students.stages.student.optim.lr=0.06"
    _, out, _ = orchestrator("plan", *world.arguments, change, "--store", world.store)
    lines = [line.strip() for line in out.splitlines() if "is seen" in line]
    assert lines == [
        "students.0.student, students.1.student: 8 steps of 8 labelled + 16 unlabelled images: "
        "each of 12 labelled is seen 5.3 times, each of 60 unlabelled 2.1 times"
    ]  # what is stored already is not told


def test_a_ramp_that_is_over_before_the_network_knows_anything_is_told_before_anything_runs(orchestrator, world):
    student = "stages.students.stages.student"
    mixed = [f"{student}.method={{use: methods.mixmatch.MixMatch}}", f"{student}.inputs.labels=null"]
    _, out, err = orchestrator("plan", *world.arguments, *mixed, "--store", world.store)
    assert not err
    told = "! students.0.student, students.1.student: ramp = 0.015625 of 8 steps is over after 0"
    assert told in " ".join(out.split())
    _, out, _ = orchestrator("plan", *world.arguments, *mixed, f"{student}.method.ramp=0", "--store", world.store)
    assert "ramp =" not in out


def test_plan_trains_nothing(orchestrator, world, tmp_path):
    code, out, _ = orchestrator("plan", *world.arguments, "--store", tmp_path / "new")
    assert code == 0 and "pretrain" in out and "to run" in out
    assert not list((tmp_path / "new" / "artifacts").iterdir()) and not list((tmp_path / "new" / "runs").iterdir())


def test_show_and_status_agree_with_the_run(orchestrator, world):
    shown = strict(orchestrator("show", "latest", "--store", world.store, "--json")[1])
    run = strict(orchestrator("run", *world.arguments, "--store", world.store, "--json")[1])
    assert {**shown, "stages": None} == {**run, "stages": None}
    assert [stage["digest"] for stage in shown["stages"]] == [stage["digest"] for stage in run["stages"]]
    (head,) = strict(orchestrator("status", "--store", world.store, "--json")[1])
    assert (head["run"], head["status"]) == (run["run"], "FINISHED")
    code, text, _ = orchestrator("status", run["run"][:6], "--store", world.store)
    assert code == 0 and "finished" in text and "students.1.gate" in text
    code, text, _ = orchestrator("show", "--store", world.store)
    assert code == 0 and run["verdict"]["sentence"] in text


def test_status_of_an_empty_store_says_how_to_start(orchestrator, tmp_path):
    code, text, _ = orchestrator("status", "--store", tmp_path / "nothing")
    assert code == 0 and "no runs" in text and "orchestrator run quickstart" in text
    assert strict(orchestrator("status", "--store", tmp_path / "nothing", "--json")[1]) == []
    assert not (tmp_path / "nothing").exists()


def test_doctor_as_json_counts_what_is_there_and_names_what_is_broken(orchestrator, world):
    code, out, _ = orchestrator("doctor", world.labelled, world.unlabelled, "--json")
    assert code == 0
    found = strict(out)
    labelled, unlabelled = found["sources"]
    assert labelled["classes"] == dict.fromkeys(CLASSES, 8) and labelled["usable"] == 24
    assert (unlabelled["images"], unlabelled["usable"], unlabelled["labelled"]) == (63, 60, 0)
    assert {Path(path).name for path, _ in unlabelled["bad"]} == set(BROKEN)
    code, text, _ = orchestrator("doctor", world.labelled, world.unlabelled)
    assert code == 0 and all(name in text for name in BROKEN)


def test_methods_and_recipes_list_what_a_recipe_may_use(orchestrator):
    found = strict(orchestrator("methods", "--json")[1])
    assert {"SimCLR", "NoisyStudent", "Supervised"} <= {component["name"] for component in found}
    for component in found:
        assert {"name", "kind", "use", "source", "options"} <= set(component)
        assert component["source"], component["name"]
        assert all({"name", "type", "default", "doc"} <= set(option) for option in component["options"])
    code, text, _ = orchestrator("methods", "simclr")
    assert code == 0 and "2002.05709" in text and "temperature" in text and "NoisyStudent" not in text
    listed = strict(orchestrator("recipes", "--json")[1])
    assert [recipe["name"] for recipe in listed] == list(shipped()) and all(recipe["description"] for recipe in listed)
    code, text, _ = orchestrator("recipes", "quickstart")
    assert code == 0 and text == shipped()["quickstart"]


# ---- the ledger and the model


def test_labels_are_filtered_by_class_confidence_and_choice(orchestrator, world):
    def rows(*options):
        code, out, _ = orchestrator("labels", "--store", world.store, "--json", *options)
        assert code == 0
        return strict(out)["rows"]

    everything = rows()
    assert len(everything) == 60
    name = everything[0]["name"]
    assert {row["id"] for row in rows("--class", name)} == {row["id"] for row in everything if row["name"] == name}
    kept, left = rows("--kept"), rows("--left-out")
    assert len(kept) + len(left) == 60 and all(row["copies"] > 0 for row in kept)
    least = sorted(row["confidence"] for row in everything)[:5]
    assert [row["confidence"] for row in rows("--uncertain", "5")] == least
    assert all(row["changed"] for row in rows("--changed"))
    assert strict(orchestrator("labels", "--store", world.store, "--round", "0", "--json")[1])["round"] == 0
    code, text, _ = orchestrator("labels", "--store", world.store, "--uncertain", "3")
    assert code == 0 and text.count(".png") == 3


def test_exported_labels_are_images_in_folders_of_their_class(orchestrator, world, tmp_path):
    target = tmp_path / "zu prüfen"
    code, text, _ = orchestrator("labels", "--store", world.store, "--uncertain", "7", "--export", target)
    assert code == 0 and "7 images" in text
    with (target / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and len(list(target.rglob("*.png"))) == 7
    for row in rows:
        assert row["file"].startswith(f"{row['class']}/") and Image.open(target / row["file"]).size == (16, 16)
        assert Path(row["path"]).is_file()
    code, _, err = orchestrator("labels", "--store", world.store, "--export", target)
    assert code == 2 and "not empty" in err and len(list(target.rglob("*.png"))) == 7


def test_predict_names_the_class_of_every_image_and_the_reason_where_there_is_none(orchestrator, world):
    good, bad = world.labelled / "größe" / "0.png", world.unlabelled / "half.png"
    code, out, err = orchestrator("predict", "latest", good, bad, "--store", world.store)
    assert (code, err) == (1, "")
    rows = list(csv.reader(out.splitlines(), delimiter="\t"))
    assert [row[0] for row in rows] == [str(good), str(bad)]
    assert rows[0][1] in CLASSES and 0 <= float(rows[0][2]) <= 1
    assert rows[1][1] == "" and rows[1][2]
    code, out, _ = orchestrator("predict", "latest", good, bad, "--store", world.store, "--json")
    found = strict(out)
    assert code == 1 and sum(found[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert set(found[0]["probabilities"]) == set(CLASSES) and set(found[1]) == {"path", "error"}
    code, out, _ = orchestrator("predict", "latest", world.labelled, "--stage", "teacher", "--store", world.store)
    assert code == 0 and out.count("\n") == 24


def test_predict_takes_from_a_folder_the_images_that_a_recipe_would(orchestrator, world, tmp_path):
    folder = tmp_path / "folder"
    picture(folder / "a.png", 1)
    picture(tmp_path / "far" / "b.png", 2)
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "c.png").symlink_to(tmp_path / "gone.png")
    for junk in (".DS_Store", "._1.png", "Thumbs.db", "notes.txt"):
        (folder / junk).write_bytes(b"x")
    code, out, err = orchestrator("predict", "latest", folder, "--store", world.store, "--json")
    first, bad, linked = rows = strict(out)
    assert [row["path"] for row in rows] == [str(folder / name) for name in ("a.png", "c.png", "far/b.png")]
    assert code == 1 and "link to nothing" in bad["error"] and first["class"] in CLASSES and linked["class"] in CLASSES
    assert "skipped 1 .txt files (such as notes.txt)" in err and "skipped 3 hidden or system files" in err
    (folder / "c.png").unlink()
    assert orchestrator("predict", "latest", folder, "--store", world.store)[0] == 0
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("x")
    message = mistake(orchestrator, "predict", "latest", tmp_path / "none", "--store", world.store)
    assert str(tmp_path / "none") in message and "holds no images, but 1 .txt files" in message


def test_a_run_that_ends_in_pretraining_has_no_classifier_and_the_stage_is_named(orchestrator, tmp_path):
    brief = SMALL[: SMALL.index("  probe:")]
    execute(prepare(parse(brief), tmp_path / "store", label="brief"), use_ray=False)
    picture(tmp_path / "one.png", 1)
    message = mistake(orchestrator, "predict", "latest", tmp_path / "one.png", "--store", tmp_path / "store")
    assert message.startswith("stage pretrain: is no classifier") and "--stage" in message


def test_every_awkward_file_is_an_answer_or_a_reason(orchestrator, world, data_folder):
    folder = data_folder / "awkward"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    stills = {name: known for name, known in expected.items() if "/" not in name}
    paths = [folder / name for name in stills]
    code, out, _ = orchestrator("predict", "latest", *paths, "--store", world.store, "--json")
    found = {Path(row["path"]).name: row for row in strict(out)}
    assert code == 1 and set(found) == set(stills)
    assert {name for name, row in found.items() if "class" in row} == {n for n, k in stills.items() if k["decodes"]}
    assert all(row.get("class") or row["error"] for row in found.values())


def test_awkward_files_among_the_unlabelled_are_quarantined_and_counted(orchestrator, world, data_folder, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(data_folder / "awkward", mixed, ignore=shutil.ignore_patterns("video", "*.json", "*.md"))
    expected = json.loads((data_folder / "awkward" / "expected.json").read_text(encoding="utf-8"))
    broken = {name for name, known in expected.items() if not known["decodes"] and "/" not in name}
    arguments = [world.recipe, "--labelled", world.labelled, "--unlabelled", mixed, "--store", tmp_path / "store"]
    code, out, err = orchestrator("plan", *arguments)
    assert (code, out) == (2, "") and f"{len(broken)} of 33 images" in err and "max_bad_share" in err
    code, out, _ = orchestrator("plan", *arguments, "data.max_bad_share=0.5", "--json")
    assert code == 0
    assert {Path(bad["path"]).name for bad in strict(out)["data"]["quarantine"]} == broken


AWKWARD_PATHS = [
    "/tmp/p😀", "/tmp/it's \"quoted\"", "C:\\data\\new", "a: b #c", "[list", "{a: b", "*alias", "null", "007", "- x",
    " spaces ", "line\nfeed", "\x7f\x85\u2028", "e\u0301 ﬁ", os.fsdecode(b"caf\xe9"),
]  # fmt: skip


@pytest.mark.parametrize("path", AWKWARD_PATHS)
def test_any_path_arrives_in_the_recipe_as_it_was_typed(path):
    recipe = _load("noisy-student", None, path, "/unlabelled", f"{path}/test")
    again = parse(recipe.text)
    for found in (recipe, again):
        assert (found.data.splits["labelled"].source, found.data.splits["test"].source) == (path, f"{path}/test")


# ---- mistakes


def mistake(orchestrator, *arguments):
    """The message of a command that must end with code 2, at the place of its answer."""
    code, _, err = orchestrator(*arguments)
    assert code == 2 and err.startswith("error: "), err
    return err.removeprefix("error: ")


def images(place, counts, first=0):
    for number, (name, count) in enumerate(counts.items()):
        for seed in range(count):
            picture(place / name / f"{seed}.png", 5000 + first + 100 * number + seed)
    return place


def empty_folder(place):
    (place / "empty").mkdir()
    return ["--unlabelled", place / "empty"]


def one_class(place):
    return ["--labelled", images(place / "only", {"cat": 9})]


def too_few_of_a_class(place):
    return ["--labelled", images(place / "few", {"cat": 9, "dog": 5}), "data.labelled.per_class=7"]


def fewer_than_a_batch(place):
    return ["--unlabelled", images(place / "five", {".": 5})]


def unknown_class_in_test(place):
    return ["--test", images(place / "test", {"cat": 3, "dog": 3, "größe": 3, "wolf": 3}, first=50)]


MISTAKES = [
    (empty_folder, ["empty", "no image"]),
    (one_class, ["one class only (cat)", "at least two"]),
    (too_few_of_a_class, ["labelled: per_class is 7", "dog has 5"]),
    (fewer_than_a_batch, ["stages.pretrain.batch", "16 images a step", "5"]),
    (unknown_class_in_test, ["wolf"]),
    (lambda place: ["--labelled", place / "labeled images"], ["labeled images"]),
    (lambda place: ["--labelled", place / "own.yaml"], ["own.yaml"]),
    (lambda place: ["stages.teacher.stepz=3"], ["stages.teacher.stepz", "did you mean steps?"]),
    (lambda place: ["stages.teacher.steps=many"], ["stages.teacher.steps", "many"]),
    (lambda place: ["stages.teacher.steps"], ["KEY=VALUE"]),
    (lambda place: ["stages.techer.steps=3"], ["techer", "did you mean teacher?"]),
    (lambda place: ["resources.workers=999"], ["resources.workers", "999"]),
    (lambda place: ["resources.labellers=999"], ["resources.labellers", "999"]),
    (lambda place: ["resources.workers=2", "stages.teacher.batch=9"], ["stages.teacher.batch", "9"]),
    (
        lambda place: ["resources.workers=2", "stages.teacher.batch=4", "stages.teacher.accumulate=4"],
        ["stages.teacher.batch", "1 images at a time"],
    ),
    (lambda place: ["resources.workers=2", "resources.threads=99"], ["resources.threads", "198 cores"]),
    (lambda place: ["stages.teacher.optim.lr=[1"], ["stages.teacher.optim.lr"]),
]


@pytest.mark.parametrize(("change", "expected"), MISTAKES)
def test_a_mistake_is_told_before_anything_runs(orchestrator, world, tmp_path, change, expected):
    (tmp_path / "own.yaml").write_text(OWN, encoding="utf-8")
    changes = change(tmp_path)
    options = dict(zip(world.arguments[1::2], world.arguments[2::2], strict=True))
    flags = [word for name, value in options.items() if name not in changes for word in (name, value)]
    message = mistake(orchestrator, "run", world.recipe, *flags, *changes, "--store", tmp_path / "store")
    for part in expected:
        assert part in message
    assert not [*(tmp_path / "store").glob("artifacts/*"), *(tmp_path / "store").glob("runs/*")]


def test_a_test_set_without_a_class_is_judged_on_those_it_has_and_says_so(orchestrator, world, tmp_path):
    test = images(tmp_path / "test", {"cat": 3, "dog": 3}, first=50)
    code, out, _ = orchestrator("plan", *world.arguments, "--test", test, "--store", tmp_path / "store")
    assert code == 0
    assert any("größe" in line and "test" in line for line in out.splitlines())


FIVE = """
name: five
data: {pixels: 16, labelled: {from: digits/train, per_clas: 2}, test: digits/test}
stages:
  teacher:
    use: orchestrator.stages.train.Train
    inputs: {labeled: labelled}
    encoder: {use: methods.encoders.SmallCN}
    method: {use: methods.supervised.Supervised, dropout: 2}
    optim: {lr: -1}
    steps: 8
    batch: 8
"""


def test_five_mistakes_of_a_recipe_are_told_together(orchestrator, tmp_path):
    (tmp_path / "five.yaml").write_text(FIVE)
    message = mistake(orchestrator, "run", tmp_path / "five.yaml", "--store", tmp_path / "store")
    assert "five.yaml: 5 errors, nothing was run" in message
    for mistake_of in ("per_clas ", "inputs.labeled ", "SmallCN:", "dropout = 2", "lr = -1"):
        assert sum(mistake_of in line for line in message.splitlines()) == 1, message
    assert not (tmp_path / "store").exists()


RECIPES = [
    (b"stages: [1, 2", ["line 1"]),
    (b"- a list\n", ["must be a mapping"]),
    (b"", ["must be a mapping"]),
    (b"\x89PNG\r\n\x1a\n\x00\xff", ["recipe.yaml"]),
    (b"name: a\nname: b\n", ["name is written twice"]),
]


@pytest.mark.parametrize(("content", "expected"), RECIPES)
def test_a_file_that_is_no_recipe_is_named(orchestrator, tmp_path, content, expected):
    (tmp_path / "recipe.yaml").write_bytes(content)
    message = mistake(orchestrator, "run", tmp_path / "recipe.yaml", "--store", tmp_path / "store")
    assert all(part in message for part in ["recipe.yaml", *expected])


def test_a_folder_is_no_recipe(orchestrator, tmp_path):
    assert str(tmp_path) in mistake(orchestrator, "run", tmp_path, "--store", tmp_path / "store")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_store_that_cannot_be_written_is_named(orchestrator, world, tmp_path, command):
    (tmp_path / "file").write_text("not a folder")
    for store in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(store) in mistake(orchestrator, command, *world.arguments, "--store", store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "holds other files" in mistake(orchestrator, command, *world.arguments, "--store", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_read_only_folder_is_no_store(orchestrator, world, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    message = mistake(orchestrator, "run", *world.arguments, "--store", tmp_path / "locked" / "store")
    assert "cannot be written (Permission denied)" in message


ASKED_IN_VAIN = [
    (["show", "nonsense"], ["nonsense", "own-"]),
    (["status", "nonsense"], ["nonsense", "own-"]),
    (["labels", "nonsense"], ["nonsense", "own-"]),
    (["labels", "--round", "9"], ["round 9", "0, 1"]),
    (["labels", "--class", "cta"], ["cta"]),
    (["predict", "latest", "no-such-file.png"], ["no-such-file.png"]),
    (["predict", "latest", ".", "--stage", "techer"], ["techer", "did you mean teacher?"]),
    (["predict", "latest", ".", "--stage", "pretrain"], ["pretrain", "no classifier"]),
    (["methods", "SimCRL"], ["did you mean SimCLR?"]),
]


@pytest.mark.parametrize(("arguments", "expected"), ASKED_IN_VAIN)
def test_what_is_not_there_is_named_with_what_is(orchestrator, world, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "one.png", 1)
    store = [] if arguments[0] == "methods" else ["--store", world.store]
    message = mistake(orchestrator, *arguments, *store)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("arguments", [["show"], ["labels"], ["predict", "latest", "."]])
def test_looking_into_a_store_that_is_not_there_makes_none(orchestrator, tmp_path, arguments):
    message = mistake(orchestrator, *arguments, "--store", tmp_path / "typo")
    assert "typo" in message and "no runs" in message
    assert not (tmp_path / "typo").exists()


def test_doctor_of_a_missing_folder_names_it_and_looks_at_the_others(orchestrator, world):
    code, out, _ = orchestrator("doctor", world.place / "missing", world.labelled)
    assert code == 2 and "missing" in out and "24" in out


def test_a_cluster_that_does_not_answer_is_named(orchestrator, world, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        message = mistake(orchestrator, "run", *world.arguments, "--store", tmp_path / "store")
    assert "RAY_ADDRESS" in message and f"{address}: nothing answers there (Connection refused)" in message


def test_a_taken_port_is_named(orchestrator, world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in mistake(orchestrator, "ui", "--store", world.store, "--port", port)
