"""Self-training gone wrong, staged with real images: each guard speaks when it should and is silent otherwise."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from methods.base import Method, MethodConfig, View
from methods.consistency import acceptance, confident, consistency, together
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.views.policy import Augment
from orchestrator.artifacts import Labels
from orchestrator.context import Context, Interrupted
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.report.content import percent, points
from orchestrator.run import execute, prepare
from orchestrator.stages.train import Fit
from orchestrator.training import checkpoint as training_state
from orchestrator.training import health
from orchestrator.training.health import Limits, Watch
from tests.methods.contract import METHODS, batch_of, build
from tests.orchestrator.test_report import read_page

pytestmark = pytest.mark.usefixtures("untracked")


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig(MethodConfig):
    min_confidence: float = 0.8
    weight: float = 1.0


class SelfTraining(Method):
    """A weak view's confident class is the target of a stronger view: the shortest method that labels for itself."""

    Config = SelfTrainingConfig

    def __init__(self, encoder, config, *, classes, images):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, 0.0)

    def views(self, pixels):
        weak = Augment(flip=False, padding=1).build(pixels)
        strong = Augment(flip=False, padding=2, randaugment=5.0).build(pixels)
        return View("labelled", weak, stream="labelled"), View("weak", weak), View("strong", strong)

    def training_step(self, batch, progress):
        views = together(self.logits, batch["labelled"], batch["weak"], batch["strong"])
        target = views[1].detach().softmax(dim=1)
        mask = confident(target, self.config.min_confidence)
        labelled = cross_entropy(views[0], batch["label"])
        unlabelled = consistency(target.argmax(dim=1), views[2], distance="cross_entropy", mask=mask)
        return {"loss": labelled + self.config.weight * unlabelled, "labelled_loss": labelled.detach(),
                "unlabelled_loss": unlabelled.detach(), **acceptance(target, mask)}  # fmt: skip

    def features(self, images):
        return self.encoder(images)

    def logits(self, images):
        return self.head(self.encoder(images))


RECIPE = """
name: health
data:
  pixels: 8
  labelled: {from: digits/train, per_class: 4}
  holdout: {from: digits/train, per_class: 20}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  student:
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled, images: unlabelled, holdout: holdout}
    encoder: &encoder {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: tests.orchestrator.test_health.SelfTraining}
    optim: {lr: 0.05}
    steps: 60
    batch: 32
    unlabelled_ratio: 2
    ema: 0.95
"""
ROUNDS = (
    RECIPE[: RECIPE.index("  student:")]
    + """
  teacher: &train
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.supervised.Supervised, augment: {flip: false, padding: 1}}
    optim: {lr: 0.05}
    steps: 60
    batch: 32
  students:
    rounds: 1
    carry: {teacher: student, previous: pseudo, first: teacher}
    stages:
      pseudo:
        use: orchestrator.stages.pseudo_label.PseudoLabel
        inputs: {teacher: teacher, images: unlabelled, previous: previous, holdout: holdout}
        min_confidence: 0.6
      student:
        <<: *train
        inputs: {labelled: labelled, images: unlabelled, labels: pseudo}
        method: {use: methods.noisy_student.NoisyStudent, augment: {flip: false, padding: 1}}
  verdict:
    use: orchestrator.stages.judge.Judge
    inputs: {baseline: teacher, final: students, images: test}
"""
)


class Run:
    """A recipe run to its end in this process, and what was said meanwhile."""

    def __init__(self, place, *overrides, recipe=RECIPE):
        self.said = []
        self.prepared = prepare(parse(recipe, overrides=overrides), place / "store", label="health")
        self.result = execute(self.prepared, use_ray=False, notice=self.said.append)

    def artifact(self, name="student"):
        return self.prepared.store.open_artifact(self.prepared.plans[0].key(name))

    def curve(self, name, stage="student"):
        rows = self.artifact(stage).curves().to_pylist()
        return {row["step"]: row["value"] for row in rows if row["name"] == f"health/{name}"}

    @property
    def guards(self):
        return [line for line in self.said if "guard, step" in line]


def write(folder, pictures, classes=None):
    """8-bit pictures (N, H, W) or (N, H, W, 3) as PNG files, in a folder for each class where there are classes."""
    for number, picture in enumerate(pictures):
        place = folder if classes is None else folder / str(classes[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(picture, np.uint8)).save(place / f"{number:05}.png")
    return folder


@pytest.fixture(scope="module")
def digits():
    """Pictures (N, 8, 8) in [0, 255], and their classes (N,)."""
    found = load_digits()
    return found.images * 15.9, found.target


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A pool of pictures of nothing."""
    pictures = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3))
    return write(tmp_path_factory.mktemp("noise") / "pool", pictures)


@pytest.fixture(scope="module")
def shuffled_labels(tmp_path_factory, digits):
    """Ten images of each class under labels of no meaning."""
    pictures, target = digits
    rows = np.concatenate([np.flatnonzero(target == k)[:10] for k in range(10)])
    labels = np.random.default_rng(0).permutation(target[rows])
    return write(tmp_path_factory.mktemp("shuffled") / "labelled", pictures[rows], labels)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module")
def high(tmp_path_factory):
    """A threshold that nothing reaches."""
    return Run(tmp_path_factory.mktemp("high"), "stages.student.method.min_confidence=0.9999")


# Measures


def test_the_energy_of_two_equal_logits_is_minus_ln_two_and_falls_where_a_logit_grows():
    assert health.energy(torch.zeros(1, 2)).item() == pytest.approx(-math.log(2))
    values = health.energy(torch.tensor([[0.0, 0.0], [3.0, 0.0], [300.0, 0.0]]))
    assert values[0] > values[1] > values[2] == -300


def test_the_unlike_share_of_small_sets_is_the_one_computed_by_hand():
    of = lambda *values: torch.tensor(values, dtype=torch.float32)  # noqa: E731
    assert health.unlike(of(1, 3), of(0, 2)) == pytest.approx(0.5)
    assert health.unlike(of(0, 2), of(0, 2)) == 0
    assert health.unlike(of(5, 6), of(0, 2)) == 1
    assert health.unlike(of(-5, -6), of(0, 2)) == 0  # what training on images leaves
    assert health.unlike(of(-5, -6), of(0, 2), either=True) == 1 == health.unlike(of(5, 6), of(0, 2), either=True)
    assert health.surely_unlike(0.3, 1000, 100) == pytest.approx(0.3 - 1.2239 * math.sqrt(1 / 1000 + 1 / 100), abs=1e-4)


@given(seed=st.integers(0, 2**31), foreign=st.integers(0, 60))
def test_a_pool_is_never_called_more_foreign_than_it_is(seed, foreign):
    rng = torch.Generator().manual_seed(seed)
    known = torch.randn(60, generator=rng)
    pool = torch.cat([known, torch.rand(foreign, generator=rng) * 20 - 10])
    assert health.unlike(pool, known) <= health.unlike(pool, known, either=True) <= foreign / len(pool) + 1e-6


def test_logits_far_from_every_neighbour_are_strange_though_their_energies_are_the_holdouts():
    holdout = torch.eye(3).repeat_interleave(20, dim=0) * (4 + torch.arange(60) % 20 / 20)[:, None]
    between = torch.full((50, 3), -float(health.energy(holdout).median()) - math.log(3))
    assert health.unlike(health.energy(between), health.energy(holdout), either=True) <= 0.55
    assert health.strange(between, holdout) == 1
    assert health.strange(holdout, holdout) == 0 == health.strange(between, holdout[:1])
    mixed = torch.cat([holdout, between[:20]])  # a quarter of it foreign
    assert health.strange(mixed, holdout) == pytest.approx(0.25)


def test_a_large_holdout_is_thinned_evenly_and_tells_the_same():
    generator = torch.Generator().manual_seed(0)
    holdout = torch.randn(3 * health.NEIGHBOURS, 5, generator=generator).sort(dim=0).values
    pool = torch.randn(500, 5, generator=generator)
    assert health.strange(pool + 20, holdout) == 1 and health.strange(holdout, holdout) < 0.1


def test_energies_close_together_in_the_middle_are_seen_as_unlike_though_none_is_high():
    holdout = torch.linspace(0, 1, 1001)
    pool = torch.full((500,), 0.4)
    assert health.high_energy_share(pool, holdout) == 0
    assert health.unlike(pool, holdout) == pytest.approx(0.4, abs=2e-3)
    assert health.high_energy_share(holdout, holdout) == pytest.approx(0.05, abs=1e-3)


def test_pseudo_labels_are_counted_as_by_hand():
    probability = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
    found = health.pseudo_labels(probability, torch.tensor([0, 0, 0, 2]), min_confidence=0.8)
    assert found["images"] == 4 and found["accepted"] == 3 and found["right"] == 2
    assert found["acceptance"] == 0.75 and found["precision"] == pytest.approx(2 / 3) and found["accuracy"] == 0.75
    assert found["chance"] == 0.75
    assert found["calibration_error"] == pytest.approx(
        (0.1 + 0.4 + 2 * 0.3) / 4, abs=1e-6
    )  # bins of .9, .6, and .8 twice
    assert found["by_class"] == {"images": [3, 0, 1], "accepted": [2, 0, 1], "predicted": [1, 1, 1], "right": [1, 0, 1]}
    assert health.by_class(found, ["a", "b", "c"]) == {
        "acceptance": {"a": pytest.approx(2 / 3), "c": 1.0}, "precision": {"a": 1.0, "b": 0.0, "c": 1.0},
    }  # fmt: skip
    assert health.pseudo_labels(probability, torch.tensor([0, 0, 0, 2]), min_confidence=1.0)["precision"] is None


def test_of_hundreds_of_classes_none_has_curves_of_its_own():
    probability = torch.eye(101)
    found = health.pseudo_labels(probability, torch.arange(101), min_confidence=0.5)
    assert health.by_class(found, [str(k) for k in range(101)]) == {"acceptance": {}, "precision": {}}


def test_the_largest_class_is_that_of_the_accepted_alone():
    probability = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9]])
    assert health.largest_class(probability, min_confidence=0.7) == (1, pytest.approx(2 / 3))
    assert health.largest_class(probability, min_confidence=0.95) == (0, 0.0)


@pytest.mark.parametrize(("right", "speaks"), [(10, True), (27, True), (29, False), (90, False)])
def test_labels_a_fifth_of_the_way_from_guessing_to_certainty_have_skill(right, speaks):
    found = {"accepted": 100, "images": 200, "precision": right / 100, "accuracy": 0.5, "chance": 0.1}
    line = health.no_skill(found, 0.2)
    assert bool(line) == speaks and (not speaks or f"{right}.0% of 100 labels" in line)


def test_with_few_accepted_the_skill_is_that_of_all_labels():
    found = {"accepted": 3, "images": 200, "precision": 0.0, "accuracy": 0.5, "chance": 0.1}
    assert health.no_skill(found, 0.2) is None
    assert "12.0% of 200 labels" in health.no_skill({**found, "accuracy": 0.12}, 0.2)
    assert health.no_skill({**found, "images": 19, "accuracy": 0.0}, 0.2) is None  # too few to say anything


def test_a_precision_fell_only_beyond_the_margin_and_beyond_chance():
    assert health.fell(0.6, 200, 0.9, 0.1) and not health.fell(0.85, 200, 0.9, 0.1)
    assert not health.fell(0.7, 20, 0.85, 0.1)  # 14 of 20: up to 0.85 by chance
    assert not health.fell(None, 0, 0.9, 0.1) and not health.fell(0.0, 19, 0.9, 0.1)


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [("patience", 1.5, r"\[0, 1\]"), ("max_unlike", -0.1, r"\[0, 1\]"), ("adapt_share", 0.0, r"\(0, 1\]")],
)
def test_a_limit_outside_its_range_is_named(name, value, needed):
    with pytest.raises(ValueError, match=f"{name} = {value}: must be in {needed}"):
        Limits(**{name: value})


# A look


class Dropping(SelfTraining):
    """With dropout, and a part that stays in eval mode throughout, as frozen ones do."""

    def __init__(self, encoder, config, *, classes, images):
        super().__init__(encoder, config, classes=classes, images=images)
        self.head = nn.Sequential(nn.Dropout(0.5), self.head)


def test_a_look_changes_no_mode_no_statistic_and_no_generator(healthy):
    torch.manual_seed(0)
    method = Dropping(SmallCNN(SmallCNNConfig(width=0.25)), SelfTrainingConfig(), classes=10, images=0).train()
    frozen = next(module for module in method.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    images = healthy.prepared.plans[0].images["holdout"]
    random = torch.get_rng_state()
    first, second = (health.logits_of(method, images, torch.arange(50), "float32") for _ in range(2))
    assert torch.equal(first, second) and first.shape == (50, 10) and not first.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert method.training and method.head[0].training and not frozen.training


def test_a_holdout_changes_nothing_that_is_learned(healthy, tmp_path):
    without = Run(tmp_path, "stages.student.inputs.holdout=null")
    state, other = healthy.artifact().state(), without.artifact().state()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    plain = [
        [row for row in run.artifact().curves().to_pylist() if not row["name"].startswith("health/")]
        for run in (healthy, without)
    ]
    assert plain[0] == plain[1]
    assert not without.guards and not without.curve("holdout_accuracy") and without.curve("unlabelled_largest_class")


def test_a_recipe_without_a_holdout_and_with_the_default_guard_keeps_its_key(tmp_path):
    plain = ("stages.student.inputs.holdout=null",)
    limits = ("stages.student.guard=warn", "stages.student.limits={patience: 0.3}")
    keys = [
        prepare(parse(RECIPE, overrides=extra), tmp_path / "store", label="health").plans[0].key("student")
        for extra in (plain, (*plain, *limits), (*plain, "stages.student.guard=stop"))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_healthy_run_is_looked_at_ten_times_and_no_guard_speaks(healthy):
    assert healthy.guards == [] and healthy.artifact().facts["health"]["said"] == []
    assert list(healthy.curve("holdout_accuracy")) == [5, 11, 17, 23, 29, 35, 41, 47, 53, 59]
    live, average = healthy.curve("holdout_accuracy"), healthy.curve("holdout_accuracy_of_average")
    for step, difference in healthy.curve("average_minus_live").items():
        assert difference == average[step] - live[step]
    assert healthy.curve("pseudo_label_precision")[59] > 0.7 and healthy.curve("pseudo_label_acceptance")[59] > 0.3
    assert healthy.curve("accepted_in_training")[59] > 0.2 and healthy.curve("unlike_holdout")[59] < 0.15
    assert set(healthy.curve("min_confidence").values()) == {0.8}


def test_the_last_look_is_of_the_model_that_is_the_answer(healthy):
    context = Context(Path(), Path(), 0, healthy.prepared.plans[0].classes)
    holdout = healthy.prepared.plans[0].images["holdout"]
    probability = context.predict(healthy.artifact(), holdout)  # the answer is the average
    label = torch.from_numpy(holdout.label)
    found = health.pseudo_labels(probability, label, min_confidence=0.8)
    known = healthy.artifact().facts["health"]["average"]
    assert {k: v for k, v in known.items() if k != "calibration_error"} == {
        k: v for k, v in found.items() if k != "calibration_error"
    }
    assert known["calibration_error"] == pytest.approx(found["calibration_error"], abs=1e-6)


def test_tracking_has_every_curve_by_step_and_class(healthy):
    lines = (healthy.prepared.folder / "records.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines if line]
    values = {(r["step"], k): v for r in told if r["kind"] == "metrics" for k, v in r["values"].items()}
    rows = [row for row in healthy.artifact().curves().to_pylist() if row["name"].startswith("health/")]
    assert {f"health/{what}.3" for what in ("precision", "acceptance")} <= {row["name"] for row in rows}
    assert all(values[row["step"], row["name"]] == row["value"] for row in rows)


# Guards while training


def test_a_threshold_that_nothing_reaches_is_told_once_with_what_to_do(high):
    (line,) = high.guards
    # at the first look the model knew nothing yet, and a threshold was not to blame
    assert "step 24: for 18 steps fewer than 1.0% of the unlabelled images reached min_confidence 0.9999" in line
    assert "lower method.min_confidence" in line
    assert high.artifact().facts["health"]["said"] == [[24, line.partition(": ")[2]]]


def test_adapt_lowers_the_threshold_until_images_are_accepted(high, tmp_path):
    low = Run(tmp_path, "stages.student.method.min_confidence=0.9999", "stages.student.guard=adapt")
    threshold = list(low.curve("min_confidence").values())
    assert threshold[:4] == [0.9999] * 4 and all(0.5 <= value < 0.9999 for value in threshold[4:])
    assert "it goes down to what 20% of them reach" in low.guards[0]
    assert low.curve("accepted_in_training")[59] > 0.02 > high.curve("accepted_in_training")[59]


def test_stop_ends_the_training_with_advice_keeps_all_and_says_the_same_again(tmp_path):
    overrides = ("stages.student.method.min_confidence=0.9999", "stages.student.guard=stop")
    with pytest.raises(UserError, match=r"student: guard, step 24: .*lower method.min_confidence.*checkpoint is kept"):
        Run(tmp_path, *overrides)
    prepared = prepare(parse(RECIPE, overrides=overrides), tmp_path / "store", label="health")
    workdir = prepared.store.workdir(prepared.plans[0].key("student"))
    kept = training_state.load(workdir)
    assert kept["step"] == 24 and kept["average"] is not None
    with pytest.raises(UserError, match="guard, step 24"):
        Run(tmp_path, *overrides)
    assert training_state.load(workdir)["seconds"] == kept["seconds"]  # nothing was trained again


def test_noise_in_place_of_unlabelled_images_is_called_another_domain_and_not_adapted_to(noise, tmp_path):
    found = Run(tmp_path, f"data.unlabelled={noise}", "stages.student.guard=adapt")
    (line,) = found.guards
    assert "of the unlabelled images are unlike the hold-out" in line and "leave those of another domain out" in line
    assert set(found.curve("min_confidence").values()) == {0.8}
    assert found.curve("unlike_holdout")[59] > 0.8


def test_shuffled_pixels_are_called_another_domain(digits, tmp_path):
    rng = np.random.default_rng(0)
    pool = write(tmp_path / "pool", [rng.permutation(p.ravel()).reshape(8, 8) for p in digits[0][:600]])
    found = Run(tmp_path, f"data.unlabelled={pool}")
    assert any("are unlike the hold-out" in line for line in found.guards)


def test_photographs_in_place_of_digits_are_called_another_domain(data_folder, tmp_path):
    photographs = "{from: " + str(data_folder / "cifar10" / "test-00000-of-00001.parquet") + ", count: 800}"
    found = Run(tmp_path, f"data.photographs={photographs}", "data.unlabelled={from: photographs, labels: false}")
    assert any("are unlike the hold-out" in line for line in found.guards)
    assert found.curve("unlike_holdout")[59] > 0.5


def test_a_hundred_labels_of_one_class_for_one_of_each_other_are_told_as_one_class(digits, tmp_path):
    pictures, target = digits
    rows = np.concatenate([np.flatnonzero(target == k)[: 100 if k == 0 else 1] for k in range(10)])
    labelled = write(tmp_path / "labelled", pictures[rows], target[rows])
    found = Run(tmp_path, f"data.labelled={labelled}")
    (line,) = [line for line in found.guards if "class 0 held" in line]
    assert "of the accepted pseudo-labels, more than 80%" in line and "ReMixMatch" in line
    assert found.curve("unlabelled_largest_class")[59] > 0.8


def test_labels_without_meaning_are_told_as_no_better_than_guesses(shuffled_labels, tmp_path):
    found = Run(tmp_path, f"data.labelled={shuffled_labels}")
    assert any("labels that the model gave the hold-out were right, and always naming one class gives 10.0%" in line
               for line in found.guards)  # fmt: skip
    assert not any("min_confidence" in line and "fewer than" in line for line in found.guards)


class Unread:
    """500 images that nobody looks at."""

    blocks = None

    def __len__(self):
        return 500


def watching(monkeypatch, looks, *, limits=None, guard="warn", classes=10, threshold=0.9):
    """The lines said at each of some looks, made up, of a training of 100 steps; and the watch."""
    method = SelfTraining(
        SmallCNN(SmallCNNConfig(width=0.25)), SelfTrainingConfig(min_confidence=threshold), classes=classes, images=0
    )
    names = [str(k) for k in range(classes)]
    watch = Watch(
        method, None, classes=names, limits=limits or Limits(), guard=guard, total=10 * len(looks), seed=0,
        precision="float32", holdout=None, unlabelled=Unread(),
    )  # fmt: skip
    said = []
    for number, look in enumerate(looks, 1):
        monkeypatch.setattr(watch, "_look", lambda look=look: {"min_confidence": watch.threshold, "energy": {}, **look})
        said.append(watch.look(10 * number)[1])
    return said, watch


def held(precision, accuracy, accepted=500):
    images = 1000
    nothing = {name: [0] * 10 for name in ("images", "accepted", "predicted", "right")}
    found = {"images": images, "accepted": accepted, "right": round(precision * accepted), "precision": precision,
             "acceptance": accepted / images, "accuracy": accuracy, "calibration_error": 0.1, "chance": 0.1,
             "by_class": nothing}  # fmt: skip
    return {"holdout": found, "unlabelled": pool()}


def pool(acceptance=0.5, largest=0.2):
    return {"acceptance": acceptance, "accepted": round(500 * acceptance), "largest_class": largest, "class": 3,
            "quantile": 0.7}  # fmt: skip


def test_a_precision_that_falls_for_long_while_the_accuracy_does_not_rise_is_told(monkeypatch):
    said, _ = watching(monkeypatch, [held(0.9, 0.6)] * 3 + [held(0.7, 0.55)] * 7)
    assert [bool(lines) for lines in said] == [False] * 5 + [True] + [False] * 4
    assert "70.0%) than at step 10 (90.0%)" in said[5][0] and "learns its own mistakes" in said[5][0]


def test_a_precision_that_falls_because_more_is_accepted_and_accuracy_rises_is_health(monkeypatch):
    said, _ = watching(monkeypatch, [held(0.95, 0.5, 30)] * 3 + [held(0.8, 0.7, 900)] * 7)
    assert not any(said)


def test_trouble_that_passes_is_not_told(monkeypatch):
    ill, well = held(0.5, 0.5), held(0.9, 0.6)
    assert not any(watching(monkeypatch, [well, ill, ill, well, ill, ill, well, ill, ill, well])[0])


def test_patience_zero_speaks_at_the_first_look(monkeypatch):
    looks = [{"unlabelled": pool(acceptance=0.001)}] * 3
    said, _ = watching(monkeypatch, looks, limits=Limits(patience=0.0))
    assert len(said[0]) == 1 and not any(said[1:])


def test_two_classes_may_be_far_from_even(monkeypatch):
    looks = [{"unlabelled": {**pool(largest=0.95), "class": 1}}] * 10
    assert not any(watching(monkeypatch, looks, classes=2)[0])
    assert any(watching(monkeypatch, looks)[0])


def test_running_statistics_that_lag_behind_are_not_taken_for_one_class(monkeypatch):
    looks = [{"unlabelled": pool(largest=0.95)}] * 10
    assert any(watching(monkeypatch, looks)[0])
    batches_say = {"largest_class_in_training": 0.2}
    assert not any(watching(monkeypatch, [look | batches_say for look in looks])[0])


@pytest.mark.parametrize(("quantile", "expected"), [(0.7, 0.7), (0.95, 0.9), (0.1, 0.5)])
def test_an_adapted_threshold_follows_confidence_between_a_half_and_what_was_configured(
    monkeypatch, quantile, expected
):
    first = {"unlabelled": {**pool(acceptance=0.0), "quantile": 0.6}}
    said, watch = watching(monkeypatch, [first] * 3, guard="adapt", limits=Limits(patience=1.0))
    assert watch.threshold == 0.6 and sum(map(len, said)) == 1
    later = {"unlabelled": {**pool(), "quantile": quantile}}
    said, watch = watching(monkeypatch, [first] * 3 + [later] * 7, guard="adapt")
    assert watch.threshold == watch.method.config.min_confidence == expected and sum(map(len, said)) == 1


def config_of(cls):
    required = {"teacher_dim": 64} if cls.__name__ == "EmbeddingDistillation" else {}
    return cls.Config(**required)


@pytest.mark.parametrize("cls", [cls for cls in METHODS if hasattr(config_of(cls), "min_confidence")])
def test_a_threshold_that_is_lowered_in_training_is_the_one_the_method_accepts_by(cls):
    method = build(cls, min_confidence=1.0).train()
    batch = batch_of(method)
    assert method.training_step(batch, 0.9)["accepted"] == 0
    method.config = replace(method.config, min_confidence=0.0)
    assert method.training_step(batch, 0.9)["accepted"] == 1


# Resume and several workers

ADAPTING = ("stages.student.method.min_confidence=0.9999", "stages.student.guard=adapt", "stages.student.steps=25")


@pytest.mark.parametrize("stop_at", [1, 8, 13])
def test_a_watched_training_stopped_between_two_looks_ends_in_the_same_bits_and_curves(tmp_path, monkeypatch, stop_at):
    whole = Run(tmp_path / "whole", *ADAPTING)
    original, seen = Context.progress, []

    def stop(self, done, total, **figures):
        seen.append(done)
        if done == stop_at and len(seen) == stop_at:
            self.stop_file.touch()
            self._stop_seen = (0.0, True)
        original(self, done, total, **figures)

    monkeypatch.setattr(Context, "progress", stop)
    with pytest.raises(Interrupted):
        Run(tmp_path / "stopped", *ADAPTING)
    resumed = Run(tmp_path / "stopped", *ADAPTING)
    assert seen.count(stop_at) == 1 and seen[-1] == 25
    assert resumed.result.stages[0]["digest"] == whole.result.stages[0]["digest"]
    assert whole.curve("min_confidence")[24] < 0.9999 and len(whole.guards) == len(resumed.guards) == 1


def watched_worker(rank, root, rendezvous, ends):
    """One of two workers of the adapting training; the second sees other confidences than the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    plan = prepare(parse(RECIPE, overrides=ADAPTING), root, label="two").plans[0]
    (planned,) = plan.stages
    images = {name: plan.images[split[0]] for name, split in planned.inputs.items()}
    context = Context(ends, ends, 0, plan.classes)
    fit = Fit(planned.stage, context, images["labelled"], images["images"], None, None, None, images["holdout"])
    seen, note = [], Watch.look

    def look(self, done):
        values, lines = note(self, done)
        seen.append([done, self.threshold, len(lines), values])
        return values, lines

    Watch.look = look
    fit.run(part=rank, parts=2, wrap=nn.parallel.DistributedDataParallel)
    (ends / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_see_the_same_and_lower_the_threshold_alike(tmp_path):
    prepare(parse(RECIPE, overrides=ADAPTING), tmp_path / "store", label="two")  # the catalogue, once
    mp.spawn(watched_worker, (tmp_path / "store", tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first[-1][1] < 0.9999 and sum(look[2] for look in first) == 1


def test_notices_of_workers_elsewhere_are_told_when_the_training_is_done(tmp_path, monkeypatch):
    run = Fit.run

    def silent(self, **options):
        run(replace(self, context=replace(self.context, notice=lambda line: None)), **options)

    monkeypatch.setattr(Fit, "run", silent)
    found = Run(tmp_path, "stages.student.method.min_confidence=0.9999")
    assert len(found.guards) == 1


# What may be asked


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.student.method={use: methods.simclr.SimCLR}", "stages.student.inputs.labelled=null"],
         "stages.student.inputs.holdout  SimCLR tells no classes apart"),
        (["stages.student.method={use: methods.mean_teacher.MeanTeacher}", "stages.student.guard=adapt"],
         "stages.student.guard  adapt lowers min_confidence, which MeanTeacher does not have"),
        (["stages.student.inputs.holdout=unlabelled"], "stages.student.inputs.holdout  has no labels"),
        (["stages.student.limits={min_accepted: 2}"], "min_accepted = 2.0: must be in [0, 1]"),
        (["stages.student.guard=panic"], "stages.student.guard"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused_before_training(overrides, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(parse(RECIPE, overrides=overrides), tmp_path / "store", label="health")
    assert expected in str(caught.value)


def test_a_supervised_training_may_be_watched_and_no_guard_of_self_training_speaks(tmp_path, shuffled_labels):
    found = Run(
        tmp_path, "stages.student.inputs={labelled: labelled, holdout: holdout}", f"data.labelled={shuffled_labels}",
        "stages.student.method={use: methods.supervised.Supervised}", "stages.student.unlabelled_ratio=1",
    )  # fmt: skip
    assert found.curve("calibration_error")[59] > 0 and not found.guards


# Rounds


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("rounds"), "stages.students.rounds=2", recipe=ROUNDS)


def test_healthy_rounds_have_facts_of_the_holdout_and_no_warning(rounds):
    for number in (0, 1):
        labels = rounds.artifact(f"students.{number}.pseudo")
        assert isinstance(labels, Labels) and labels.facts["warnings"] == []
        assert labels.facts["holdout_images"] == 200 and 0 < labels.facts["calibration_error"] < 1
        assert set(labels.facts["holdout_acceptance_of"]) == set("0123456789")
        assert labels.facts["unlike_holdout"] < 0.2
        accepted = labels.facts["holdout_by_class"]["accepted"]
        assert sum(accepted) == labels.facts["holdout_accepted"]


def test_tracking_has_the_rounds_precision_by_class(rounds):
    lines = (rounds.prepared.folder / "records.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines if line]
    values = {k for r in told if r["kind"] == "metrics" and r["run"] == "students.1.pseudo" for k in r["values"]}
    assert {"calibration_error", "unlike_holdout", "holdout_precision", "holdout_acceptance_of.3"} <= values
    assert any(name.startswith("holdout_precision_of.") for name in values)


def test_a_poisoned_teacher_is_told_and_with_stop_ends_the_rounds(shuffled_labels, tmp_path):
    overrides = (f"data.labelled={shuffled_labels}", "stages.students.stages.pseudo.min_confidence=0.3")
    told = Run(tmp_path / "warn", *overrides, recipe=ROUNDS)
    facts = told.artifact("students.0.pseudo").facts
    assert "labels that the model gave the hold-out were right" in facts["warnings"][0]
    assert any(facts["warnings"][0] in line for line in told.said)
    ended = Run(tmp_path / "stop", *overrides, "stages.students.stages.pseudo.guard=stop", recipe=ROUNDS)
    states = {stage["name"]: stage["state"] for stage in ended.result.stages}
    assert states["students.0.pseudo"] == states["students.0.student"] == "skipped"
    assert ended.result.verdict["gain"] == 0


def test_a_teacher_that_got_worse_than_the_one_before_is_told(rounds, shuffled_labels, tmp_path):
    good = rounds.artifact("students.0.pseudo")
    stage = replace(
        next(s.stage for s in rounds.prepared.plans[0].stages if s.name == "students.1.pseudo"), min_skill=0.0
    )
    facts = {**good.facts, "holdout_precision": 0.5, "holdout_accepted": 150, "holdout_accuracy": 0.4}
    (line,) = stage._warnings(facts, good)
    assert line.startswith("50.0% of the hold-out's pseudo-labels are right, in the round before")
    assert stage._warnings(facts, None) == [] == stage._warnings(good.facts, good)
    better = {**facts, "holdout_accuracy": 1.0}
    assert stage._warnings(better, good) == []  # more accepted, and more right in all


@pytest.mark.parametrize("seed", [0, 3])
def test_a_pool_of_noise_is_told_by_the_round(noise, seed, tmp_path):
    found = Run(tmp_path, f"data.unlabelled={noise}", f"seed={seed}", recipe=ROUNDS)
    facts = found.artifact("students.0.pseudo").facts
    assert any("are unlike the hold-out" in line for line in facts["warnings"])


def test_shuffled_unlabelled_images_do_not_help_and_the_verdict_says_so(digits, tmp_path):
    rng = np.random.default_rng(0)
    pool = write(tmp_path / "pool", [rng.permutation(p.ravel()).reshape(8, 8) for p in digits[0][:600]])
    found = Run(tmp_path, f"data.unlabelled={pool}", recipe=ROUNDS)
    assert "did not help" in found.result.verdict["sentence"]
    assert any("are unlike the hold-out" in line for line in found.artifact("students.0.pseudo").facts["warnings"])


# The report


def test_the_report_shows_what_the_artifacts_say(rounds, high):
    page, facts = read_page(high.prepared.folder), high.artifact().facts["health"]
    (row,) = page.table("health", "training")
    live, average = facts["live"], facts["average"]
    assert row[:4] == ["student", percent(live["accuracy"]), percent(average["accuracy"]),
                       points(average["accuracy"] - live["accuracy"])]  # fmt: skip
    assert high.guards[0].removeprefix("student: ") in page.said["health"]
    classes = page.table("health", "class")
    assert [int(row[1]) for row in classes] == live["by_class"]["images"] == [20] * 10
    assert [int(row[4]) for row in classes] == live["by_class"]["predicted"]
    looks = next(table[1:] for table in page.tables["health"] if table[0][:3] == ["step", "live", "average"])
    assert [[int(row[0]), row[1]] for row in looks] == [
        [step, f"{value:.4g}"] for step, value in high.curve("holdout_accuracy").items()
    ]
    assert "health/" not in page.said["curves"] and "holdout accuracy" not in page.said["curves"]

    page = read_page(rounds.prepared.folder)
    found = page.table("health", "labels")
    for row, number in zip(found, (0, 1), strict=True):
        facts = rounds.artifact(f"students.{number}.pseudo").facts
        assert row[:4] == [f"students.{number}.pseudo", percent(facts["holdout_accuracy"]),
                           str(facts["holdout_accepted"]), percent(facts["holdout_acceptance"])]  # fmt: skip
        assert row[6] == f"{facts['calibration_error']:.3f}" and row[9] == percent(facts["unlike_holdout"])
    assert "No guard had anything to say" in page.said["health"]
