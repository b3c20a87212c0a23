"""Recipes: every mistake at once, each on its line, with the nearest right name."""

import pytest
import yaml

from orchestrator.errors import UserError
from orchestrator.recipe import load, parse, shipped

GOOD = """
name: small
data: {pixels: 16, labelled: {from: digits/train, per_class: 2}, unlabelled: digits/train, test: digits/test}
stages:
  teacher: &teacher
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: {use: methods.encoders.SmallCNN, width: 0.5}
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 4
    batch: 8
  students:
    rounds: 2
    carry: {teacher: student, previous: pseudo, first: teacher}
    ladder: [{student.encoder.width: 0.5}, {student.encoder.width: 1.0}]
    stages:
      pseudo:
        use: orchestrator.stages.pseudo_label.PseudoLabel
        inputs: {teacher: teacher, images: unlabelled, previous: previous}
      student:
        <<: *teacher
        inputs: {labelled: labelled, images: unlabelled, labels: pseudo}
        method: {use: methods.noisy_student.NoisyStudent}
  verdict:
    use: orchestrator.stages.judge.Judge
    inputs: {baseline: teacher, final: students, images: test}
"""


def problems(text, *overrides):
    with pytest.raises(UserError) as caught:
        parse(text, label="small.yaml", overrides=overrides)
    return str(caught.value)


def test_rounds_lay_out_as_plain_stages_with_a_gate_each():
    recipe = parse(GOOD)
    assert [node.name for node in recipe.nodes] == [
        "teacher", "students.0.pseudo", "students.0.student", "students.0.gate",
        "students.1.pseudo", "students.1.student", "students.1.gate", "verdict",
    ]  # fmt: skip
    assert recipe.node("students.0.pseudo").inputs == {"teacher": ("teacher",), "images": ("unlabelled",)}
    assert recipe.node("students.1.pseudo").inputs == {
        "teacher": ("students.0.gate",), "images": ("unlabelled",), "previous": ("students.0.pseudo",)
    }  # fmt: skip
    assert recipe.node("students.1.student").inputs["labels"] == ("students.1.pseudo",)


def test_the_ladder_gives_each_round_its_encoder_and_anchors_share_nothing():
    recipe = parse(GOOD)
    widths = [recipe.node(f"students.{k}.student").stage.encoder.config.width for k in (0, 1)]
    assert widths == [0.5, 1.0] and recipe.node("teacher").stage.encoder.config.width == 0.5


def test_five_mistakes_are_five_lines():
    text = (
        GOOD.replace("per_class: 2", "per_clas: 2").replace("optim: {lr: 0.05}", "optim: {lr: -1}")
        .replace("supervised.Supervised}", "supervised.Supervisd}")
        .replace("final: students", "final: student").replace("name: small", "nam: small")
    )  # fmt: skip
    message = problems(text)
    assert message.startswith("small.yaml: 5 errors, nothing was run") or message.count("\n") >= 5, message
    for part in (
        "nam ", "did you mean name?", "data.labelled.per_clas", "did you mean per_class?", "lr = -1", "must be > 0",
        "Supervisd", "did you mean Supervised?", "student", "did you mean students?",
    ):  # fmt: skip
        assert part in message, (part, message)


@pytest.mark.parametrize(("override", "expected"), [
    ("stages.teacher.steps=nine", "stages.teacher.steps"),
    ("stages.teecher.steps=9", "did you mean teacher?"),
    ("stages.teacher.method.label_smothing=0.1", "did you mean label_smoothing?"),
    ("stages.teacher.method.augment.cutot=0.1", "did you mean cutout?"),
    ("stages.teacher.optim.lr=.inf", "stages.teacher.optim.lr  inf: input should be a finite number"),
    ("stages.teacher.method.augment.cutout=.nan", "augment.cutout  nan: input should be a finite number"),
    ("resources.gpus=.nan", "resources.gpus  nan: input should be a finite number"),
    ("stages.verdict.inputs.images=teacher", "teacher gives Checkpoint, Judge needs Images"),
    ("stages.teacher.inputs.labelled=students.0.pseudo", "comes later"),
    ("stages.teacher.inputs.labelled=test", "test is for Judge and Probe"),
    ("stages.students.rounds=0", "must be an integer of at least 1"),
    ("stages.students.carry.teacher=pupil", "pupil is no stage of a round"),
    ("resources.workers=0", "workers = 0: must be at least 1"),
    ("seed=-1", "must be an integer of at least 0"),
    ("data.labelled=", "no images given: add data.labelled=PATH or --labelled PATH"),
    ("data.pixels=0", "pixels"),
    ("nonsense", "an override is KEY=VALUE"),
    ("stages.teacher.steps.more=1", "steps is 4, it has no fields"),
    ("stages.verdict.use=os.system", "no Stage class of that name"),
    ("stages.teacher.method.use=orchestrator.stages.train.Train", "no Method or Encoder class of that name"),
])  # fmt: skip
def test_a_mistake_names_its_place_and_what_to_do(override, expected):
    message = problems(GOOD, override)
    assert expected in message and "nothing was run" in message


def test_overrides_reach_any_field_and_change_one_place():
    recipe = parse(
        GOOD,
        overrides=["stages.teacher.encoder.width=1.5", "data.labelled.per_class=3", "seeds=2", "resources.workers=2"],
    )
    assert recipe.node("teacher").stage.encoder.config.width == 1.5
    assert recipe.node("students.0.student").stage.encoder.config.width == 0.5
    assert recipe.data.splits["labelled"].per_class == 3 and recipe.seeds == 2 and recipe.resources.workers == 2


def test_a_key_written_twice_and_text_that_is_no_yaml_are_refused_with_their_line():
    assert "line 3" in problems("name: a\ndata: {}\nname: b\n") and "written twice" in problems("name: a\nname: b\n")
    assert "not YAML" in problems("name: [")
    assert "must be a mapping" in problems("- a\n")


def test_what_a_recipe_keeps_runs_again_as_the_same_recipe():
    recipe = parse(GOOD, overrides=["stages.teacher.steps=7"])
    again = parse(recipe.text)
    assert again.nodes == recipe.nodes and again.data == recipe.data


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid_on_given_data(name):
    blank = [split for split, source in yaml.safe_load(shipped()[name])["data"].items() if source is None]
    assert load(name, [f"data.{split}=digits/train" for split in blank]).name == name


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="quickstrat: neither a file nor a shipped recipe; did you mean quickstart?"):
        load("quickstrat")
