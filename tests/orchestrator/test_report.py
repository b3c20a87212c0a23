"""The report says what the artifacts say, asks nothing of the network, and survives hostile names and lost images."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from methods.metrics import paired_bootstrap, wilson_interval
from orchestrator.artifacts import Checkpoint, Decision, Labels, Scores, Verdict
from orchestrator.comparison import t_interval
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.report import figures, learning
from orchestrator.report.content import interval, percent, points, points_interval
from orchestrator.report.gallery import Pictures, shown_pixels
from orchestrator.report.html import write_report
from orchestrator.report.reading import arms_of, predictions_of, read_run
from orchestrator.run import combine, execute, prepare
from orchestrator.store import Store

pytestmark = pytest.mark.usefixtures("untracked")

HOSTILE = ("<img src=x onerror=alert(1)>", "'><script>alert(1)<script>", '$x_{1}$ & "déjà" 数字')  # class folders

RECIPE = """
name: hostile
seeds: {seeds}
data:
  pixels: 8
  all: {source}
  labelled: {{from: all, per_class: 4}}
  holdout: {{from: all, per_class: 6}}
  test: {{from: all, per_class: 12}}
  unlabelled: {source}
stages:
  pretrain:
    use: orchestrator.stages.train.Train
    inputs: {{images: unlabelled}}
    encoder: &encoder {{use: methods.encoders.SmallCNN, width: 0.25}}
    method: {{use: methods.simclr.SimCLR, temperature: 0.5, min_area: 0.3, flip: false}}
    optim: {{name: sgd, lr: 0.1}}
    steps: 2
    batch: 16
  probe: {{use: orchestrator.stages.probe.Probe, inputs: {{model: pretrain, labelled: labelled}}}}
  teacher:
    use: orchestrator.stages.train.Train
    inputs: {{labelled: labelled}}
    encoder: *encoder
    method: {{use: methods.supervised.Supervised, augment: &mild {{flip: false, padding: 1}}}}
    optim: &sgd {{name: sgd, lr: 0.05}}
    steps: 22
    batch: 12
  students:
    rounds: 2
    carry: {{teacher: student, previous: pseudo, first: teacher}}
    gate: {{images: holdout, tolerance: 0.5}}
    stages:
      pseudo:
        use: orchestrator.stages.pseudo_label.PseudoLabel
        inputs: {{teacher: teacher, images: unlabelled, previous: previous, holdout: holdout}}
        min_confidence: {confidence}
        guard: {guard}
      student:
        use: orchestrator.stages.train.Train
        inputs: {{labelled: labelled, images: unlabelled, labels: pseudo}}
        encoder: *encoder
        method: {{use: methods.noisy_student.NoisyStudent, augment: *mild}}
        optim: *sgd
        steps: 22
        batch: 12
  verdict:
    use: orchestrator.stages.judge.Judge
    inputs: {{baseline: teacher, final: students, arms: {arms}, images: test}}
    resamples: 500
resources: {{threads: 1}}
"""


def write_images(folder: Path) -> Path:
    """The digits 0, 1 and 2 in folders with hostile names."""
    digits = load_digits(n_class=3)
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / HOSTILE[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / HOSTILE[label] / f"{number:03}.png")
    return folder


def run(root: Path, source: Path, *, seeds: int = 1, confidence: float = 0.3, guard: str = "adapt",
        arms: str = "[students.0.student, students.1.student]") -> tuple[Store, Path]:  # fmt: skip
    text = RECIPE.format(source=json.dumps(str(source)), seeds=seeds, confidence=confidence, guard=guard, arms=arms)
    prepared = prepare(parse(text), root, label="test")
    execute(prepared, use_ray=False)
    return prepared.store, prepared.folder


class Page(HTMLParser):
    """What a browser would make of a report: elements, their attributes, tables, sections."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[list[str]]]] = {}  # by section: tables of rows of cells
        self.sections: list[str] = []
        self.said: dict[str, str] = {}  # by section: all its text
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
            self.tables[self.sections[-1]] = []
        elif tag == "table":
            self.tables[self.sections[-1]].append([])
        elif tag == "tr":
            self.tables[self.sections[-1]][-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self.sections[-1]][-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)
        if self.sections:
            self.said[self.sections[-1]] = self.said.get(self.sections[-1], "") + data

    def table(self, section: str, first_header: str) -> list[list[str]]:
        """The rows, without header, of the first table of a section whose header begins so."""
        return next(table[1:] for table in self.tables[section] if table[0][0] == first_header)


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ran(untracked, tmp_path_factory) -> tuple[Store, Path]:
    root = tmp_path_factory.mktemp("report")
    return run(root / "store", write_images(root / "images"))


def answer(ran: tuple[Store, Path], name: str):
    store, folder = ran
    stages = json.loads((folder / "run.json").read_text())["stages"]
    return store.open_artifact(next(stage["key"] for stage in stages if stage["name"] == name))


def test_every_section_is_there_in_order_and_in_the_contents(ran):
    page = read_page(ran[1])
    assert page.sections == ["verdict", "rounds", "curves", "health", "ledger", "classes", "calibration", "galleries",
                             "probes", "cost", "data", "reproduce"]  # fmt: skip
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{name}" for name in page.sections]


def test_the_verdict_is_the_judges(ran):
    page, verdict = read_page(ran[1]), answer(ran, "verdict")
    facts = verdict.facts
    assert facts["sentence"] in page.said["verdict"]
    numbers = {row[0]: row[1:] for row in page.table("verdict", "")}
    assert numbers["gain"] == [f"{points(facts['gain'])} points", points_interval(facts["low"], facts["high"])]
    baseline = facts["scores"]["baseline"]
    assert numbers["teacher (baseline)"] == [percent(baseline["accuracy"]), interval(baseline["low"], baseline["high"])]


def test_arms_are_named_by_the_stages_that_made_them(ran):
    verdict = answer(ran, "verdict")
    arms = {arm.name: arm for arm in arms_of(verdict, read_run(*ran).stages)}
    assert list(arms) == ["teacher", "students.0.student", "students.1.student"]
    for name, arm in arms.items():
        assert arm.key == answer(ran, name).key
    assert arms["students.0.student"].score == verdict.facts["scores"]["arm0"]
    assert arms["teacher"].roles == {"baseline"}


def test_each_part_is_held_against_its_teacher_with_a_paired_interval(ran):
    verdict, page = answer(ran, "verdict"), read_page(ran[1])
    rows = {row[0].partition(" (")[0]: row for row in page.table("verdict", "model")}
    table = verdict.predictions()
    columns = {"teacher": "baseline", "students.0.student": "arm0", "students.1.student": "arm1"}
    right = {name: torch.from_numpy(predictions_of(table, column).right).float() for name, column in columns.items()}
    for before, name in zip(list(columns)[:-1], list(columns)[1:], strict=True):
        new, old = right[name], right[before]
        low, high = paired_bootstrap(new, old, resamples=500, seed=0)
        assert rows[name][3:] == [points(float(new.mean() - old.mean())), points_interval(low, high), before]


def test_rounds_show_test_and_holdout_accuracy_and_the_gates_words(ran):
    page = read_page(ran[1])
    rows = {row[0]: row[1:] for row in page.table("rounds", "model")}
    for number in (0, 1):
        gate, scores = answer(ran, f"students.{number}.gate"), answer(ran, "verdict").facts["scores"]
        student, tested = gate.facts["student"], scores[f"arm{number}"]
        assert isinstance(gate, Decision)
        row = rows[f"round {number}"]
        assert row[:2] == [percent(tested["accuracy"]), interval(tested["low"], tested["high"])]
        assert row[2:] == [percent(student["accuracy"]), interval(student["low"], student["high"])]
        assert gate.facts["reason"][1:] in page.said["rounds"]


def test_curves_are_those_of_the_checkpoint(ran):
    page = read_page(ran[1])
    for name in ("pretrain", "teacher", "students.0.student", "students.1.student"):
        checkpoint = answer(ran, name)
        assert isinstance(checkpoint, Checkpoint)
        curves = checkpoint.curves().to_pylist()
        lost = [[f"{row['step']:,}", f"{row['value']:.4g}"] for row in curves if row["name"] == "loss"]
        losses = [[row[:2] for row in table[1:]] for table in page.tables["curves"] if table[0][:2] == ["step", "loss"]]
        assert lost in losses
    assert "labelled loss" in page.said["curves"] and "learning rate" in page.said["curves"]


def test_what_a_long_training_logs_rarely_is_drawn_as_it_was_logged(ran, monkeypatch):
    steps, looks = range(0, 4000, 20), range(399, 4000, 400)
    rows = [(n, "loss", n / 20) for n in steps] + [(n, "effective_rank", n / 100) for n in looks]
    columns = dict(zip(("step", "name", "value"), map(list, zip(*rows, strict=True)), strict=True))
    monkeypatch.setattr(Checkpoint, "curves", lambda self: pa.table(columns))
    step, series, each = learning._curve_table(answer(ran, "pretrain"))
    assert each == 2 and len(step) == 105 and step[:2].tolist() == [10, 50]
    assert series["loss"][:2].tolist() == [0.5, 2.5]  # means of 0 and 1, of 2 and 3
    rank = series["effective_rank"]
    assert rank[np.isfinite(rank)].tolist() == pytest.approx([n / 100 for n in looks])
    section = learning.curves(read_run(*ran))
    assert section is not None and "effective rank" in str(section.blocks)


def test_the_ledgers_health_is_the_pseudo_labels_facts(ran):
    page = read_page(ran[1])
    health = {row[0]: row[1:] for table in page.tables["ledger"] if "copies" in table[0] for row in table[1:]}
    for number in (0, 1):
        labels = answer(ran, f"students.{number}.pseudo")
        assert isinstance(labels, Labels)
        facts, row = labels.facts, health[f"round {number}"]
        assert row[:5] == [f"{facts['images']}", f"{facts['kept']}", percent(facts["kept_share"]), f"{facts['copies']}",
                           percent(facts["mean_confidence"])]  # fmt: skip
        assert row[5] == ("" if number == 0 else f"{facts['changed']} ({percent(facts['changed'] / facts['images'])})")
        n = facts["holdout_accepted"]
        span = wilson_interval(round(facts["holdout_precision"] * n), n)
        assert row[6:9] == [percent(facts["holdout_precision"]), interval(*span), str(n)]
    by_class = [table for table in page.tables["ledger"] if table[0][0] == "class"]
    assert [[int(cell) for cell in row[1:3]] for row in by_class[0][1:]] == [
        list(pair) for pair in zip(answer(ran, "students.0.pseudo").facts["predicted_by_class"],
                                   answer(ran, "students.0.pseudo").facts["kept_by_class"], strict=True)]  # fmt: skip


def test_the_confidence_histogram_counts_every_image_once(ran):
    page, labels = read_page(ran[1]), answer(ran, "students.1.pseudo")
    last = [table for table in page.tables["ledger"] if table[0] == ["confidence", "kept", "left out"]][-1]
    kept, left = (sum(int(row[column]) for row in last[1:]) for column in (1, 2))
    assert (kept, kept + left) == (labels.facts["kept"], labels.facts["images"])


def test_classes_and_confusion_are_counted_from_the_predictions(ran):
    page, verdict = read_page(ran[1]), answer(ran, "verdict")
    final = predictions_of(verdict.predictions(), "final")
    rows = page.table("classes", "class")
    for k, row in enumerate(rows):
        here = final.label == k
        assert row[0] == verdict.facts["classes"][k]
        assert row[1] == str(here.sum()) == "12"
        assert row[4] == percent((final.predicted[here] == k).mean())
    matrix = [[int(cell) for cell in row[1:4]] for row in page.table("classes", "label")]
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (final.label, final.predicted), 1)
    assert matrix == expected.tolist()


def test_the_calibration_error_shown_is_that_of_the_bins_shown(ran):
    page, verdict = read_page(ran[1]), answer(ran, "verdict")
    tables = page.tables["calibration"]
    assert len(tables) == 2
    for table, role in zip(tables, ("baseline", "final"), strict=True):
        n = sum(int(row[1]) for row in table[1:])
        gaps = sum(int(row[1]) * abs(float(row[2].split()[0]) - float(row[3].split()[0])) for row in table[1:])
        error = verdict.facts["scores"][role]["calibration_error"]
        assert n == 36
        assert gaps / 100 / n == pytest.approx(error, abs=1.1e-3)  # shown to a tenth of a percent
        assert f"{role}: expected calibration error (ECE) {error:.3f}" in page.said["calibration"]


def test_galleries_show_the_images_named(ran):
    page, verdict = read_page(ran[1]), answer(ran, "verdict")
    final = predictions_of(verdict.predictions(), "final")
    tiles = [attributes["title"] for tag, attributes in page.tags if attributes.get("class") == "tile"]
    table = answer(ran, "students.1.pseudo").table().to_pylist()
    table.sort(key=lambda row: (-row["confidence"], row["id"]))
    wrong = sorted((~final.right).nonzero()[0], key=lambda row: (-final.confidence[row], final.id[row]))[:24]
    assert tiles == [row["path"] for row in (*table[:24], *table[::-1][:24])] + [final.path[row] for row in wrong]


def test_a_gallery_picture_is_the_image_with_that_id(ran):
    store, folder = ran
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    row = answer(ran, "students.0.pseudo").table().to_pylist()[5]
    pictures = Pictures.open(store, recipe, 0, [row["id"]])
    png = base64.b64decode(pictures.uris([row["id"]])[row["id"]].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(png)))
    source = folder.parents[2] / "images" / row["path"] if not Path(row["path"]).is_absolute() else Path(row["path"])
    np.testing.assert_array_equal(shown, np.asarray(Image.open(source).convert("RGB")))


def test_probes_cost_data_and_keys_are_the_stored_ones(ran):
    store, folder = ran
    page, head = read_page(folder), json.loads((folder / "run.json").read_text())
    scores = answer(ran, "probe")
    assert isinstance(scores, Scores)
    assert [row[2:7] for row in page.table("probes", "probe")] == [
        [s["protocol"], s["metric"], percent(s["value"]), interval(s["low"], s["high"]), str(s["n"])]
        for s in scores.scores()
    ]
    cost = {row[0]: row for row in page.table("cost", "stage")}
    for stage in head["stages"]:
        assert cost[stage["name"]][4] == f"{store.manifest(stage['key'])['seconds']:.1f}"
    assert cost["students.0.student"][6] == "22"
    described = json.loads((folder / "data.json").read_text())[0]["splits"]
    counts = {row[0]: int(row[1]) for row in page.table("data", "split")}
    assert counts == {name: split["images"] for name, split in described.items()}
    assert [row[2:4] for row in page.table("reproduce", "stage")] == [
        [s["key"], store.manifest(s["key"])["digest"]] for s in head["stages"]
    ]
    assert (folder / "recipe.yaml").read_text(encoding="utf-8").strip() in page.said["reproduce"]


def test_nothing_is_asked_of_the_network(ran):
    text, page = (ran[1] / "report.html").read_text(encoding="utf-8"), read_page(ran[1])
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"(?:url\((?!#)|@import|https?://)", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_hostile_class_names_are_text_and_nothing_else(ran):
    page = read_page(ran[1])
    assert {tag for tag, _ in page.tags} & {"script", "object"} == set()
    assert all(attributes["src"].startswith("data:image/png") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    names = {row[0] for row in page.table("classes", "class")}
    assert names == set(HOSTILE)


def test_an_equal_store_gives_equal_bytes_and_lost_images_cost_only_the_pictures(tmp_path, ran):
    shutil.copytree(ran[0].root, tmp_path / "moved")  # a store may lie anywhere
    store, images = Store.open(tmp_path / "moved"), ran[0].root.parent / "images"
    folder = store.root / "runs" / ran[1].name
    write_report(store, folder)  # at the end of the run its total time was not known yet
    first = (folder / "report.html").read_bytes()
    write_report(*ran)
    assert (ran[1] / "report.html").read_bytes() == first
    images.rename(tmp_path / "elsewhere")
    try:
        write_report(store, folder)
    finally:
        (tmp_path / "elsewhere").rename(images)
    cut = re.compile(rb'<section id="galleries">.*?</section>', re.DOTALL)
    without = (folder / "report.html").read_bytes()
    assert cut.sub(b"", without) == cut.sub(b"", first)
    page = read_page(folder)
    assert "The pictures are left out" in page.said["galleries"]
    assert not any(tag == "img" for tag, _ in page.tags)
    assert str(store.root).encode() not in without and str(ran[0].root).encode() not in without


def test_several_seeds_show_each_and_their_mean(tmp_path, ran):
    store, folder = run(tmp_path / "store", write_images(tmp_path / "images"), seeds=2)
    page, head = read_page(folder), json.loads((folder / "run.json").read_text())
    verdicts = [store.open_artifact(s["key"]) for s in head["stages"] if s["kind"] == "Judge"]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts) and len(verdicts) == 2
    both = combine([verdict.facts for verdict in verdicts])
    assert both["sentence"] in page.said["verdict"]
    assert page.table("verdict", "seed") == [
        [str(seed), percent(v.facts["baseline"]), percent(v.facts["final"]), points(v.facts["gain"]),
         points_interval(v.facts["low"], v.facts["high"])] for seed, v in enumerate(verdicts)
    ]  # fmt: skip
    assert {row[0]: row[1] for row in page.table("verdict", "")}["final"] == percent(both["final"])
    against = {row[0]: row[1:] for row in page.table("verdict", "against")}
    assert against["baseline"][1:] == [points(both["gain"]), points_interval(both["low"], both["high"])]
    before = [v.facts["scores"]["arm0"]["accuracy"] for v in verdicts]
    gains = [v.facts["final"] - accuracy for v, accuracy in zip(verdicts, before, strict=True)]
    mean, spread = statistics.fmean(before), statistics.stdev(before)
    assert against["students.0.student"] == [
        f"{percent(mean)} ± {100 * spread:.1f}", points(statistics.fmean(gains)), points_interval(*t_interval(gains))
    ]  # fmt: skip
    assert "first seed, 0" in page.said["verdict"]
    first = predictions_of(verdicts[0].predictions(), "final")
    matrix = np.array([[int(cell) for cell in row[1:4]] for row in page.table("classes", "label")])
    assert np.trace(matrix) == first.right.sum()


def test_rounds_that_a_guard_ended_say_so_and_show_no_pseudo_labels(tmp_path):
    _, folder = run(tmp_path / "store", write_images(tmp_path / "images"), confidence=1.0, guard="stop", arms="null")
    page = read_page(folder)
    assert "The rounds ended at students.0.pseudo: only 0 of" in page.said["rounds"]
    assert "No round kept a pseudo-label." in page.said["ledger"]
    assert page.tables["ledger"] == []
    assert "The final model is the baseline itself" in page.said["verdict"]


def test_a_run_without_a_judge_has_the_sections_of_its_stages(tmp_path):
    source = json.dumps(str(write_images(tmp_path / "images")))
    text = RECIPE.format(source=source, seeds=1, confidence=0.5, guard="adapt", arms="null")
    head, _, rest = text.partition("  teacher:\n")
    prepared = prepare(parse(head + "resources:" + rest.partition("\nresources:")[2]), tmp_path / "store", label="test")
    execute(prepared, use_ray=False)
    assert read_page(prepared.folder).sections == ["curves", "probes", "cost", "data", "reproduce"]


def test_a_run_that_was_stopped_reports_what_it_has_and_says_so(tmp_path, ran):
    shutil.copytree(ran[0].root, tmp_path / "copy")
    store = Store.open(tmp_path / "copy")
    folder = store.root / "runs" / ran[1].name
    head = json.loads((folder / "run.json").read_text())
    for stage in head["stages"][-4:]:  # the second round and the verdict
        shutil.rmtree(store.folder(stage["key"]))
        (folder / "stages" / f"{stage['name']}.json").unlink()
    (folder / "run.json").write_text(json.dumps({**head, "status": "KILLED", "verdict": None}))
    text = write_report(store, folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "This run did not finish (killed)" in text
    assert not {"verdict", "classes", "calibration"} & set(page.sections)
    assert [row[0] for row in page.table("rounds", "model")] == ["teacher", "round 0"]
    assert "round 0: the 24 surest" in page.said["galleries"]
    assert [row[2] for row in page.table("cost", "stage")][-4:] == ["waiting"] * 4


def test_a_folder_without_a_run_is_named(tmp_path):
    store = Store.open(tmp_path / "store")
    with pytest.raises(UserError, match="run nothing: not in this store"):
        write_report(store, store.root / "runs" / "nothing")


@pytest.mark.parametrize("classes", [2, 12, 13, 100])
def test_a_confusion_matrix_names_every_class(classes):
    names = [f"class {k}" for k in range(classes)]
    svg = figures.confusion(np.eye(classes, dtype=int) * 7, names, salt="test")
    said = Page(f"<section id=x>{svg}").said["x"]
    for name in names:
        assert said.count(name) >= 2  # label and prediction
    assert said.count("7100 %") == (classes if classes <= 12 else 0)  # the count over its share


def test_a_figure_shows_names_as_they_are():
    names = ["$x_{1}$", "<b>&amp;"]
    svg = figures.confusion(np.eye(2, dtype=int), names, salt="test")
    page = Page(f"<section id=x>{svg}")
    assert all(page.said["x"].count(name) == 2 for name in names)  # neither mathematics nor markup
    assert "b" not in {tag for tag, _ in page.tags}


def test_figures_are_equal_for_equal_numbers_and_carry_no_ids_of_other_figures():
    rows = [figures.Dot("teacher", 0.5, 0.4, 0.6), figures.Dot("student", 0.7, 0.6, 0.8)]
    first, again, other = (figures.dots(rows, xlabel="accuracy", salt=salt) for salt in ("a", "a", "b"))
    assert first == again
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_a_long_name_loses_its_middle_and_stays_as_long_as_allowed():
    assert figures.short("arms.pirl.probe") == "arms.pirl.probe"
    assert figures.short("arms.colorization_regression.pretrain", 30) == "arms.colorizati…ssion.pretrain"
    assert all(len(figures.short("x" * 99, most)) == most for most in range(2, 40))


def test_ticks_between_whole_percents_are_not_rounded_to_uneven_steps():
    curves = {"colorization": [0.536, 0.54, 0.512, 0.425, 0.388], "random": [0.527, 0.529, 0.492, 0.429, 0.371]}
    svg = figures.by_layer(["c1", "c2", "c3", "c4", "gap"], curves, {"random"}, salt="test")
    ticks = [float(tick) for tick in re.findall(r"([\d.]+) %", svg)]
    assert len(ticks) > 3 and np.diff(ticks) == pytest.approx(ticks[1] - ticks[0])


def test_labels_of_lines_that_end_together_do_not_overlap():
    step = np.arange(3.0)
    names = ("loss one", "loss two", "loss three")
    svg = figures.lines(step, {name: np.array([1.0, 0.5, 0.2]) for name in names}, ylabel="nats", salt="test")
    heights = [float(y) for y in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>loss', svg)]
    assert len(heights) == len(names)
    assert min(abs(a - b) for i, a in enumerate(heights) for b in heights[:i]) >= 8  # points
    assert max(heights) <= (2.2 - 0.42) * 72 + 4  # none under the axes, 4 points for the baseline of the text


@pytest.mark.parametrize(("pixels", "shown"), [(1, 72), (8, 72), (16, 64), (32, 64), (72, 72), (224, 72)])
def test_pictures_are_drawn_at_whole_multiples_of_their_pixels(pixels, shown):
    assert shown_pixels(pixels) == shown
