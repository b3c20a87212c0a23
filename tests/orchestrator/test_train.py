"""What a training may be asked: which inputs its method needs, and what it makes of other stages' labels."""

import pytest
import torch

from methods.supervised import Supervised
from orchestrator.context import Context, Interrupted
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.run import execute, prepare
from orchestrator.store import Store

pytestmark = pytest.mark.usefixtures("untracked")

RECIPE = """
name: labels
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 3}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  teacher: &train
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 4
    batch: 8
  soft:
    use: orchestrator.stages.pseudo_label.PseudoLabel
    inputs: {teacher: teacher, images: unlabelled}
    min_confidence: 0.0
    max_class_share: 1.0
  student:
    <<: *train
    inputs: {images: unlabelled, labels: soft}
    method: {use: methods.supervised.Supervised, soft: true}
"""


def run(tmp_path, *overrides):
    prepared = prepare(parse(RECIPE, overrides=overrides), tmp_path / "store", label="labels")
    return prepared, execute(prepared, use_ray=False)


def test_a_student_may_learn_from_a_teachers_labels_alone_and_soft_or_hard_is_not_the_same(tmp_path):
    _, soft = run(tmp_path)
    _, hard = run(tmp_path, "stages.student.method.soft=false")
    assert [stage["state"] for stage in soft.stages] == ["ran"] * 3
    assert soft.stages[1]["digest"] == hard.stages[1]["digest"]
    assert soft.stages[2]["digest"] != hard.stages[2]["digest"]


def test_a_student_outside_of_rounds_starts_from_other_weights_than_its_teacher_unless_it_starts_from_it(tmp_path):
    chain = """
  again: {use: orchestrator.stages.pseudo_label.PseudoLabel, inputs: {teacher: student, images: unlabelled},
          min_confidence: 0.0, max_class_share: 1.0}
  second: {<<: *train, inputs: {images: unlabelled, labels: again}}
  tuned: {<<: *train, inputs: {images: unlabelled, labels: again, init: student}}
  beside: {<<: *train, inputs: {images: unlabelled, labels: soft}}
"""
    plan = prepare(parse(RECIPE + chain), tmp_path, label="labels").plans[0]
    seed = {stage.name: stage.seed for stage in plan.stages}
    assert seed["teacher"] == seed["soft"] == seed["tuned"] == 0
    assert seed["student"] == seed["beside"] and len({seed["teacher"], seed["student"], seed["second"]}) == 3
    weights = {}
    for stage in plan.stages:
        if stage.kind == "Train" and stage.name in ("teacher", "student", "second"):
            torch.manual_seed(stage.seed)
            weights[stage.name] = stage.stage.build(10, 0)[0].state_dict()
    for one, other in (("teacher", "student"), ("student", "second"), ("teacher", "second")):
        drawn = [name for name, value in weights[one].items() if name.endswith("weight") and value.ndim > 1]
        assert drawn and not any(torch.equal(weights[one][name], weights[other][name]) for name in drawn)


def test_images_without_labels_or_labels_without_images_are_refused(tmp_path):
    for override, expected in (
        ("stages.student.inputs.labels=null", "stages.student.inputs.labels  missing: Supervised learns from it"),
        ("stages.teacher.method.soft=true", "give inputs.images and inputs.labels"),
        ("stages.teacher.steps=-1", "steps = -1: must be >= 0"),
        (
            "stages.student.inputs.images=labelled",
            "inputs.images  is [labelled], and soft has the labels of [unlabelled]: give",
        ),
        (
            "stages.student.inputs.images=[unlabelled, labelled]",
            "is [unlabelled, labelled], and soft has the labels of",
        ),
    ):
        with pytest.raises(UserError) as caught:
            run(tmp_path, override)
        assert expected in str(caught.value)


STATEFUL = {
    "bank": "{use: methods.pirl.PIRL, negative_count: 32, grid: 2, cell: 8, tile: 7}",
    "prior": "{use: methods.colorization.Colorization}",
    "turns": "{use: methods.multitask.MultiTask, rotation: {}, relative_patch: null}",
    "permutations": "{use: methods.jigsaw.JigsawPlus}",
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_outside_the_optimiser_resumes_bit_equal(tmp_path, monkeypatch, name):
    overrides = [f"stages.teacher.method={STATEFUL[name]}", "stages.teacher.inputs={images: unlabelled}"]
    recipe = RECIPE[: RECIPE.index("  soft:")]
    whole = execute(prepare(parse(recipe, overrides=overrides), tmp_path / "whole", label="whole"), use_ray=False)
    original, seen = Context.progress, []

    def stop_after_two(self, done, total, **figures):
        seen.append(done)
        if done == 2 and len(seen) == 2:
            self.stop_file.touch()
            self._stop_seen = (0.0, True)
        original(self, done, total, **figures)

    monkeypatch.setattr(Context, "progress", stop_after_two)
    prepared = prepare(parse(recipe, overrides=overrides), tmp_path / "stopped", label="stopped")
    with pytest.raises(Interrupted):
        execute(prepared, use_ray=False)
    resumed = execute(prepared, use_ray=False)
    assert resumed.stages[0]["state"] == "resumed" and seen[-2:] == [3, 4]
    assert resumed.stages[0]["digest"] == whole.stages[0]["digest"]


LAST = """
  low: {<<: *train, pixels: 8, ema: 0.0}
  finetuned:
    <<: *train
    inputs: {labelled: labelled, init: low}
    method: {use: methods.supervised.Supervised, augment: {padding: 0, flip: false}}
    keep_head: true
    frozen: c3
"""


HEAD = "head.1.weight"


def finetune(tmp_path, *overrides):
    recipe = RECIPE[: RECIPE.index("  soft:")] + LAST
    prepared = prepare(parse(recipe, overrides=overrides), tmp_path / "store", label="last")
    result = execute(prepared, use_ray=False)
    opened, plan = Store.open(tmp_path / "store"), prepared.plans[0]
    return {name: opened.open_artifact(plan.key(name)).state() for name in ("low", "finetuned")}, result


def test_a_training_below_the_datas_resolution_reads_small_images_and_its_fine_tuning_large_ones(tmp_path, monkeypatch):
    step, sides = Supervised.training_step, []

    def watched(self, batch, progress):
        sides.append(batch["labelled"].shape[-1])
        return step(self, batch, progress)

    monkeypatch.setattr(Supervised, "training_step", watched)
    _, result = finetune(tmp_path, "stages.finetuned.steps=3")
    assert sides == [16] * 4 + [8] * 4 + [16] * 3
    checkpoint = Store.open(tmp_path / "store").open_artifact(result.stages[1]["key"])
    assert checkpoint.model["pixels"] == 16  # it is judged, and labels, at the data's


def test_fine_tuning_keeps_weights_and_statistics_up_to_the_frozen_tap_and_trains_the_rest(tmp_path):
    state, _ = finetune(tmp_path)
    low, tuned = state["low"], state["finetuned"]
    kept = {name for name in low if torch.equal(low[name], tuned[name])}
    frozen = {name for name in low if name.startswith(("encoder.blocks.c1", "encoder.blocks.c2", "encoder.blocks.c3"))}
    assert kept == frozen | {"encoder.mean", "encoder.std"}


def test_a_kept_head_starts_as_the_one_before_and_a_new_one_does_not(tmp_path):
    still = ("stages.finetuned.optim.lr=1e-9", "stages.finetuned.frozen=null")
    state, _ = finetune(tmp_path, *still)
    assert torch.allclose(state["finetuned"][HEAD], state["low"][HEAD], atol=1e-6)
    state, _ = finetune(tmp_path, *still, "stages.finetuned.keep_head=false")
    assert not torch.allclose(state["finetuned"][HEAD], state["low"][HEAD], atol=1e-2)


@pytest.mark.parametrize(("overrides", "expected"), [
    (["frozen=c9"], "stages.finetuned.frozen  frozen = c9: must be a tap of the encoder, one of c1, c2, c3, c4, gap"),
    (["inputs.init=null"], "stages.finetuned.keep_head  True: there is nothing to keep; give inputs.init"),
    (["encoder.width=0.5"], "stages.finetuned.encoder  is not the one of inputs.init"),
    (["pixels=0"], "pixels = 0: must be > 0"),
    (["method={use: methods.simclr.SimCLR}", "inputs={images: unlabelled, init: low}"],
     "stages.finetuned.keep_head  SimCLR has no classifier to keep; leave it out"),
])  # fmt: skip
def test_a_fine_tuning_that_cannot_start_is_refused_before_anything_runs(tmp_path, overrides, expected):
    with pytest.raises(UserError) as caught:
        finetune(tmp_path, *(f"stages.finetuned.{override}" for override in overrides))
    assert expected in str(caught.value)
    assert not list(tmp_path.glob("store/artifacts/*"))


def test_zero_steps_give_the_weights_as_drawn_with_statistics_of_clean_images(tmp_path):
    prepared, result = run(tmp_path, "stages.teacher.steps=0")
    state = Store.open(tmp_path / "store").open_artifact(prepared.plans[0].key("teacher")).state()
    assert result.stages[0]["state"] == "ran"
    assert state["encoder.blocks.c1.1.weight"].eq(1).all() and state["encoder.blocks.c1.1.running_mean"].ne(0).any()
