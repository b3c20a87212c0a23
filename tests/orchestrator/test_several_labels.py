"""Images with several labels: judged by SVMs, learned from without labels, refused where one class is needed."""

import csv
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from orchestrator import cli
from orchestrator.data.decode import content_id, open_rgb
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.report.html import write_report
from orchestrator.run import execute, prepare
from orchestrator.store import Store
from orchestrator.svm import COSTS, svm_map

pytestmark = pytest.mark.usefixtures("untracked")

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
SHAPES = ("disc", "bar", "frame")

RECIPE = """
name: attributes
data:
  pixels: 16
  train: {from: SOURCE, separator: ";"}
  test: {from: train, fraction: 0.5}
resources: {threads: 1}
stages:
  pretrain:
    use: orchestrator.stages.train.Train
    inputs: {images: train}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.simclr.SimCLR, flip: false}
    optim: {lr: 0.05}
    steps: 2
    batch: 8
    precision: float32
  probe:
    use: orchestrator.stages.probe.Probe
    inputs: {model: pretrain, labelled: train, images: test}
    protocols: [svm]
"""
MODEL = """
  model:
    use: orchestrator.stages.train.Train
    inputs: {labelled: digits}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 2
    batch: 8
    precision: float32
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A CSV of pictures that each have a colour and a shape."""
    folder, rng, rows = tmp_path_factory.mktemp("attributes"), np.random.default_rng(0), []
    for number in range(120):
        colour, shape = list(COLOURS)[number % 3], SHAPES[(number // 3) % 3]
        image = Image.fromarray(rng.integers(0, 60, (24, 24, 3), dtype=np.uint8))
        x, y = rng.integers(2, 8, 2).tolist()
        draw, box = ImageDraw.Draw(image), (x, y, x + 13, y + 13)
        if shape == "disc":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "bar":
            draw.rectangle((x, y + 5, x + 13, y + 8), fill=COLOURS[colour])
        else:
            draw.rectangle(box, outline=COLOURS[colour], width=2)
        image.save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"{colour};{shape}"))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return folder / "list.csv"


def recipe_of(source, extra=""):
    return RECIPE.replace("SOURCE", str(source)) + extra


def independent(train, targets, test, wanted):
    """AP of each class, and its C, with scikit-learn and numpy alone."""

    def unit(x):
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)

    def precision(score, present):
        found, recall, _ = precision_recall_curve(present, score)
        best = np.maximum.accumulate(found)  # recall falls along the arrays: the best at that recall or more
        return float(-(np.diff(recall) * best[:-1]).sum())

    def fitted(x, y, cost):
        svm = LinearSVC(C=cost, class_weight={0: 1, 1: 2}, max_iter=2000, tol=1e-4, dual=True, random_state=0)
        return svm.fit(x, y)

    x, asked, answers = unit(train), unit(test), []
    for k in range(targets.shape[1]):
        y = targets[:, k]
        folds = list(StratifiedKFold(3).split(x, y))
        gain = {c: sum(precision(fitted(x[a], y[a], c).decision_function(x[b]), y[b]) for a, b in folds) for c in COSTS}
        cost = max(COSTS, key=gain.__getitem__)
        answers.append((precision(fitted(x, y, cost).decision_function(asked), wanted[:, k]), cost))
    return answers


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_precision_and_cost_of_every_class_are_scikit_learns_on_a_set_of_several_labels():
    rng = np.random.default_rng(3)
    direction = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]

    def scene(count):
        present = (rng.random((count, 3)) < [0.5, 0.3, 0.15]).astype(int)
        return (present @ direction * 2 + rng.normal(size=(count, 8))).astype(np.float32), present

    (train, targets), (test, wanted) = scene(90), scene(120)
    assert (targets.sum(axis=1) > 1).any() and (targets.sum(axis=1) == 0).any()
    found = svm_map(*(torch.from_numpy(part) for part in (train, targets, test, wanted)))
    expected = independent(train, targets, test, wanted)
    assert found["by_class"] == pytest.approx([value for value, _ in expected], abs=1e-6)
    assert found["costs"] == [cost for _, cost in expected]
    assert found["value"] == pytest.approx(np.mean([value for value, _ in expected]), abs=1e-6)
    assert found["low"] < found["value"] < found["high"] and found["n"] == 120


@pytest.fixture(scope="module")
def ran(untracked, source, tmp_path_factory):
    """The whole pipeline: images without labels are learned from, and judged by their labels."""
    prepared = prepare(parse(recipe_of(source)), tmp_path_factory.mktemp("store"), label="attributes")
    execute(prepared, use_ray=False)
    store = Store.open(prepared.store.root)
    (score,) = store.open_artifact(prepared.plans[0].key("probe")).scores()
    return store, prepared, score


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_run_from_a_manifest_gives_each_classes_precision_as_scikit_learn_does(ran, source):
    store, prepared, score = ran
    model = store.open_artifact(prepared.plans[0].key("pretrain")).build()
    said = {}
    with source.open() as file:
        for line in csv.DictReader(file):
            decoded = open_rgb((source.parent / line["path"]).read_bytes())
            said[content_id(np.asarray(decoded))] = set(line["label"].split(";"))
    classes = sorted([*COLOURS, *SHAPES])
    assert score["classes"] == classes == list(prepared.data[0].classes)

    def parts(name):
        images = prepared.data[0].splits[name]
        with torch.inference_mode():
            features = model.features(images.batch(torch.arange(len(images))).float() / 255)
        return features.numpy(), np.array([[c in said[i] for c in classes] for i in images.ids.tolist()]).astype(int)

    (train, targets), (test, wanted) = parts("train"), parts("test")
    assert (len(train), len(test)) == (score["labelled"], score["n"]) == (60, 60)
    expected = independent(train, targets, test, wanted)
    assert score["by_class"] == pytest.approx([value for value, _ in expected], abs=1e-6)
    assert score["value"] == pytest.approx(np.mean([value for value, _ in expected]), abs=1e-6)
    assert score["low"] < score["value"] < score["high"] and score["shown"] == wanted.sum(axis=0).tolist()
    assert (score["protocol"], score["metric"]) == ("svm", "mAP")


def test_colours_are_found_in_features_of_a_network_of_two_steps(ran):
    precision = dict(zip(ran[2]["classes"], ran[2]["by_class"], strict=True))
    chance = dict(zip(ran[2]["classes"], np.array(ran[2]["shown"]) / ran[2]["n"], strict=True))
    assert all(precision[colour] > 1.5 * chance[colour] for colour in COLOURS)


def test_the_report_shows_the_precision_of_every_class(ran):
    store, prepared, score = ran
    page = write_report(store, prepared.folder).read_text(encoding="utf-8")
    assert "Average precision by class" in page
    assert all(f"{100 * value:.1f}" in page for value in score["by_class"])


@pytest.mark.slow
def test_the_command_runs_such_a_set_and_says_how_its_cells_are_read(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "attributes.yaml").write_text(recipe_of(source))
    command = ["orchestrator", "run", str(tmp_path / "attributes.yaml"), "--store", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
        raise SystemExit(0)
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "several labels an image: cells are divided at ';'" in text
    assert re.search(r"probe ran [\d.]+ s svm_mAP \d+\.\d %", text)


def refused(text, tmp_path):
    with pytest.raises(UserError, match="nothing was run") as caught:
        prepare(parse(text), tmp_path / "store", label="attributes")
    return str(caught.value)


STAGES = {
    "train": "{use: orchestrator.stages.train.Train, encoder: {use: methods.encoders.SmallCNN, width: 0.25}, steps: 2,"
             " batch: 8, method: {use: methods.supervised.Supervised}, optim: {lr: 0.1}, inputs: {labelled: train}}",
    "pseudo": "{use: orchestrator.stages.pseudo_label.PseudoLabel, inputs: {teacher: model, images: train}}",
    "holdout": "{use: orchestrator.stages.pseudo_label.PseudoLabel,"
               " inputs: {teacher: model, images: digits, holdout: train}}",
    "gate": "{use: orchestrator.stages.gate.Gate, inputs: {teacher: model, student: model, images: train}}",
    "judge": "{use: orchestrator.stages.judge.Judge, inputs: {baseline: model, final: model, images: train}}",
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_needs_one_class_an_image_is_refused_before_anything_runs(source, tmp_path, name):
    digits = "  digits: {from: digits/test, per_class: 2}\nresources:"
    text = recipe_of(source, f"{MODEL}  asked: {STAGES[name]}\n").replace("resources:", digits)
    found = [line for line in refused(text, tmp_path).splitlines() if "stages.asked" in line]
    assert len(found) == 1
    assert "train has several labels an image, and" in found[0] and "needs one class" in found[0]
    assert "Probe's protocols: [svm]" in found[0] and "{from: train, labels: false}" in found[0]


@pytest.mark.parametrize("protocol", ["classifier", "knn", "linear", "layers", "retrieval", "clusters"])
def test_every_protocol_but_svm_is_refused_by_name(source, tmp_path, protocol):
    found = refused(recipe_of(source).replace("[svm]", f"[svm, {protocol}]"), tmp_path)
    assert f"train has several labels an image, and {protocol} needs one class: use protocols: [svm]" in found


def test_svm_refuses_to_judge_several_labels_by_images_of_one(source, tmp_path):
    text = recipe_of(source).replace("{from: train, fraction: 0.5}", "{from: digits/test, per_class: 2}")
    assert "train has several labels an image and test has not" in refused(text, tmp_path)


def test_svm_refuses_a_set_in_which_no_class_can_be_judged(source, tmp_path):
    (source.parent / "same.csv").write_text("path,label\n" + "".join(f"{n}.png,red;disc\n" for n in range(0, 40)))
    found = refused(recipe_of(source.parent / "same.csv"), tmp_path)
    assert "no class of test can be judged: svm needs images with and without it in train" in found


def test_one_input_does_not_mix_images_of_one_label_and_of_several(source, tmp_path):
    text = recipe_of(source).replace("  test:", "  digits: {from: digits/test, per_class: 2}\n  test:")
    found = refused(text.replace("{images: train}", "{images: [train, digits]}"), tmp_path)
    assert "train has several labels an image and digits one: read both without labels" in found
    hidden = text.replace("{images: train}", "{images: [train, digits]}").replace("per_class: 2}", "labels: false}")
    assert prepare(parse(hidden), tmp_path / "store", label="attributes").plans[0].key("pretrain")


def test_clusters_and_pretraining_read_such_images_with_their_labels_or_without(source, tmp_path):
    clusters = "{use: orchestrator.stages.cluster.Cluster, inputs: {teacher: pretrain, images: IMAGES}, clusters: 3}"
    keys = set()
    for images in ("train", "bare"):
        text = recipe_of(source)
        text = text[: text.index("  probe:")] + f"  clusters: {clusters}\n".replace("IMAGES", images)
        text = text.replace("{images: train}", f"{{images: {images}}}")
        prepared = prepare(parse(text.replace("  test:", "  bare: {from: train, labels: false}\n  test:")),
                           tmp_path / "store", label="attributes")  # fmt: skip
        execute(prepared, use_ray=False)
        plan = prepared.plans[0]
        keys.add(plan.key("pretrain"))
        found = Store.open(prepared.store.root).open_artifact(plan.key("clusters"))
        assert len(found.table()) == len(plan.images[images])
    assert len(keys) == 2


# Keys of answers that lie in stores. Whoever changes one on purpose raises a `version` and changes it here.
KEPT = {
    "pretrain": "bd60668366bc5cbf2201387828565937",
    "model": "15b5c274b79427a3392d2bc30f4e18f2",
    "probe": "c0ca33b562e0f473c836fe1b3d65c412",
}


def test_keys_of_a_stored_recipe_of_one_class_an_image_do_not_change(tmp_path):
    text = """
name: kept
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 6}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  pretrain:
    use: orchestrator.stages.train.Train
    inputs: {images: unlabelled}
    encoder: &encoder {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.simclr.SimCLR, flip: false}
    optim: {name: lars, lr: 0.5}
    steps: 3
    batch: 16
    precision: float32
  model:
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: *encoder
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 3
    batch: 16
    precision: float32
  probe:
    use: orchestrator.stages.probe.Probe
    inputs: {model: model, labelled: labelled, images: test}
    protocols: [knn, svm]
"""
    plan = prepare(parse(text), tmp_path / "store", label="kept").plans[0]
    assert {stage.name: stage.key for stage in plan.stages} == KEPT
