"""What a training may be asked: which inputs its method needs, and what it makes of other stages' labels."""

import pytest

from orchestrator.context import Context, Interrupted
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.run import execute, prepare
from orchestrator.store import Store

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


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setattr("orchestrator.run.Sender.start", lambda self: None)
    monkeypatch.setattr("orchestrator.run.Sender.finish", lambda self, timeout: None)


def run(tmp_path, *overrides):
    prepared = prepare(parse(RECIPE, overrides=overrides), tmp_path / "store", label="labels")
    return prepared, execute(prepared, use_ray=False)


def test_a_student_may_learn_from_a_teachers_labels_alone_and_soft_or_hard_is_not_the_same(tmp_path):
    _, soft = run(tmp_path)
    _, hard = run(tmp_path, "stages.student.method.soft=false")
    assert [stage["state"] for stage in soft.stages] == ["ran"] * 3
    assert soft.stages[1]["digest"] == hard.stages[1]["digest"]
    assert soft.stages[2]["digest"] != hard.stages[2]["digest"]


def test_images_without_labels_or_labels_without_images_are_refused(tmp_path):
    for override, expected in (
        ("stages.student.inputs.labels=null", "stages.student.inputs.labels  missing: Supervised learns from it"),
        ("stages.teacher.method.soft=true", "give inputs.images and inputs.labels"),
        ("stages.teacher.steps=-1", "steps = -1: must be >= 0"),
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


def test_zero_steps_give_the_weights_as_drawn_with_statistics_of_clean_images(tmp_path):
    prepared, result = run(tmp_path, "stages.teacher.steps=0")
    state = Store.open(tmp_path / "store").open_artifact(prepared.plans[0].key("teacher")).state()
    assert result.stages[0]["state"] == "ran"
    assert state["encoder.blocks.c1.1.weight"].eq(1).all() and state["encoder.blocks.c1.1.running_mean"].ne(0).any()
