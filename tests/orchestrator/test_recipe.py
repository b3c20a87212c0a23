"""Recipes: every mistake at once, each on its line, with the nearest right name."""

import pytest
import yaml

from orchestrator.errors import UserError, nearest
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
    ("stages.students.carry.teacher=", "stages.students.carry.teacher  None: must be the name of a stage"),
    ("stages.students.carry.teacher=[]", "stages.students.carry.teacher  []: must be the name of a stage"),
    ("stages.students.carry.first=[]", "stages.students.carry.first  []: must be the name of a stage"),
    ("stages.students.carry={teacher: 3, first: teacher}", "3 is no stage of a round"),
    ("stages.students.ladder=[{1: 2}]", "1 leads nowhere in stages"),
    ("stages.students.gate={1: 2}", "stages.students.gate.1  1: keys should be strings"),
    ("stages.students.stages.pseudo.inputs.teacher={}", "inputs.teacher  {}: must be the name of a split or stage"),
    ("stages.teacher.inputs.labelled={}", "stages.teacher.inputs.labelled  {}: must be the name of a split or stage"),
    ("stages.teacher.inputs.labelled=[]", "stages.teacher.inputs.labelled  []: must be the name of a split or stage"),
    ("stages.teacher.inputs={1: 2}", "stages.teacher.inputs.1  unknown"),
    ("stages.teacher.optim={1: 2}", "stages.teacher.optim.1  "),
    ("data={1: 2}", "2: must be a mapping"),
    ("data.labelled={from: digits/train, 1: 2}", "data.labelled.1  "),
    ("name=2024-13-45", "is not YAML; quote it"),
    ("data.labelled.from=3", "data.labelled.from  3: input should be a valid string"),
    ("data.labelled.from=''", "data.labelled  from = '': must be a path"),
    ("data.test={from: digits/test, label_noise: 0.1}", "data.test.label_noise  0.1: must be left out, wrong labels"),
    ("data.unlabelled={from: digits/train, per_class: 3}", "data.unlabelled.per_class  3: must be left out"),
    ("data.test={from: digits/test, without: tset}", "data.test.without  tset is no split; did you mean test?"),
    ("data={pixels: 16, a: {from: b, count: 1}, b: {from: a, count: 1}}", "  a, b: must not be made from each"),
    ("data={pixels: 16}", "  must name at least one split"),
])  # fmt: skip
def test_a_mistake_names_its_place_and_what_to_do(override, expected):
    message = problems(GOOD, override)
    assert expected in message and "nothing was run" in message


@pytest.mark.parametrize("override", [
    "stages.students.carry.teacher=", "stages.students.rounds=0", "stages.teacher.inputs.labelled=[]", "name=a/b",
    "data.labelled.from=3", "data.test={from: digits/test, without: tset}",
    "data.test={from: digits/test, label_noise: 0.1}",
])  # fmt: skip
def test_one_slip_is_one_line(override):
    message = problems(GOOD, override)
    assert message.startswith("small.yaml: 1 error, nothing was run") and "splits" not in message, message


@pytest.mark.parametrize("text", ["? [a]\n: 1\n", "? {a: 1}\n: 1\n", "name: 2024-13-45\n"])
def test_yaml_that_no_recipe_can_hold_is_refused_and_not_a_traceback(text):
    assert "not YAML" in problems(text)


@pytest.mark.parametrize("name", [
    "a/b", "../../out", "..", ".hidden", "-rf", " a", "", "a\\b", "a\nb", "a:b", "x" * 101, "雪" * 67, 5, None, True,
    0.5, [], {},
])  # fmt: skip
def test_a_name_that_is_no_folder_s_is_refused_in_one_line(name):
    recipe = {**yaml.safe_load(GOOD), "name": name}
    found = problems(yaml.safe_dump(recipe, sort_keys=False)).splitlines()
    assert found[0] == "small.yaml: 1 error, nothing was run" and found[1].startswith("  name  ") and len(found) == 2


@pytest.mark.parametrize("name", [
    "small", "Größe 1.2_b-c", "9", "x" * 100, "雪だるま", "हिन्दी", "e\u0301te\u0301", "v1..2",
])  # fmt: skip
def test_a_name_may_have_letters_of_any_alphabet(name):
    assert parse(yaml.safe_dump({**yaml.safe_load(GOOD), "name": name}, sort_keys=False)).name == name


@pytest.mark.parametrize(("old", "new", "expected"), [
    ("  verdict:", "  ver.dict:", "  ver.dict: a name has no `.` and no `/`, they divide names; call it ver_dict"),
    ("  verdict:", "  ver/dict:", "  ver/dict: a name has no `.` and no `/`, they divide names; call it ver_dict"),
    ("  verdict:", "  0.1:", "stages  0.1: a name has no `.` and no `/`, they divide names; call it v0_1"),
    ("  verdict:", "  on:", "stages  True: is no text to YAML"),
    ("  verdict:", "  '':", "stages  '': a name must be plain text"),
    ("  verdict:", '  "a\\nb":', "stages  'a\\nb': a name must be plain text"),
    ("      student:", "      stu.dent:", "  stu.dent: a name has no `.` and no `/`"),
    ("      student:", "      2024-01-01:", "  2024-01-01: is no text to YAML"),
])  # fmt: skip
def test_a_name_that_would_divide_is_refused_with_one_that_does_not(old, new, expected):
    assert expected in problems(GOOD.replace(old, new))


def test_stages_may_be_numbered():
    text = GOOD.replace("  teacher: &", "  1: &").replace("first: teacher", "first: 1")
    text = text.replace("baseline: teacher", "baseline: 1").replace("      student:", "      2:")
    text = text.replace("carry: {teacher: student", "carry: {teacher: 2").replace("student.encoder", "2.encoder")
    recipe = parse(text)
    assert {"1", "students.1.2"} <= {node.name for node in recipe.nodes}
    assert recipe.node("students.0.pseudo").inputs["teacher"] == ("1",)
    assert parse(recipe.text).nodes == recipe.nodes


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


@pytest.mark.parametrize(("word", "known", "hint"), [
    (501, [500, 9], "; did you mean 500?"), ("501", [500], "; did you mean 500?"), (None, ["a"], ""),
    ([], {"a": 1}, ""), ("stesp", ["steps"], "; did you mean steps?"), ("a", [None, ()], ""),
])  # fmt: skip
def test_the_nearest_word_of_anything(word, known, hint):
    assert nearest(word, known) == hint
