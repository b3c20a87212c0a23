"""The whole chain in one process: reuse, equality, resume, guards and gates, and what a bad disk does to it."""

import errno
import json
import shutil

import pytest
import torch
import yaml

from orchestrator.artifacts import Checkpoint
from orchestrator.context import Context, Interrupted
from orchestrator.errors import UserError
from orchestrator.plan import why
from orchestrator.recipe import load, parse, shipped
from orchestrator.records import read_records
from orchestrator.run import execute, prepare
from orchestrator.runs import read_outcomes
from orchestrator.stages.pseudo_label import PseudoLabel
from orchestrator.stages.train import Fit
from orchestrator.store import Store
from orchestrator.training import checkpoint as training_state
from orchestrator.training.loop import make_batch
from tests.conftest import SMALL

pytestmark = pytest.mark.usefixtures("untracked")


def run(text, root, *overrides):
    recipe = parse(text, overrides=overrides)
    return execute(prepare(recipe, root, label="small"), use_ray=False)


def digests(result):
    return {stage["name"]: stage["digest"] for stage in result.stages}


def states(result):
    return {stage["name"]: stage["state"] for stage in result.stages}


@pytest.fixture(scope="module")
def first(untracked, tmp_path_factory):
    """One run that later tests copy or repeat."""
    root = tmp_path_factory.mktemp("store") / "größe und raum"
    return root, run(SMALL, root)


def test_every_stage_runs_once_and_the_verdict_is_the_difference_of_the_accuracies(first):
    _, result = first
    assert set(states(result).values()) == {"ran"}
    verdict = result.verdict
    assert verdict["gain"] == pytest.approx(verdict["final"] - verdict["baseline"])
    assert verdict["low"] <= verdict["gain"] <= verdict["high"] and verdict["n"] == 360


def test_the_same_recipe_twice_gives_the_same_content_in_another_store(first, small, tmp_path):
    assert digests(run(small, tmp_path / "other")) == digests(first[1])


def test_a_moved_store_is_not_run_again(first, small, tmp_path):
    root, result = first
    moved = tmp_path / "moved 店"
    shutil.copytree(root, moved)
    again = run(small, moved)
    assert set(states(again).values()) == {"stored"} and digests(again) == digests(result)


def test_a_change_runs_again_only_what_depends_on_it(first, small, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(first[0], root)
    recipe = parse(small, overrides=["stages.students.stages.student.optim.lr=0.06"])
    prepared = prepare(recipe, root, label="small")
    stored = {stage.name for stage in prepared.plans[0].stages if why(stage, prepared.store, None)[0] == "stored"}
    assert stored == {"pretrain", "probe", "teacher", "students.0.pseudo"}
    earlier = {s["name"]: s["key"] for s in first[1].stages}
    student = next(s for s in prepared.plans[0].stages if s.name == "students.0.student")
    assert why(student, prepared.store, earlier["students.0.student"]) == ("to run", "optim.lr 0.05 → 0.06")


def test_speed_settings_enter_no_key(small, tmp_path):
    plans = [
        prepare(parse(small, overrides=extra), tmp_path / "s", label="small").plans[0]
        for extra in ([], ["resources.labellers=2", "resources.threads=2", "resources.save_seconds=1"])
    ]
    assert [s.key for s in plans[0].stages] == [s.key for s in plans[1].stages]


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_training_stopped_at_any_step_ends_in_bit_equal_weights(first, small, tmp_path, monkeypatch, stop_at):
    steps = {"seen": 0}
    original = Context.progress

    def counting(self, done, total, **figures):
        steps["seen"] += 1
        if steps["seen"] == stop_at:
            (self.stop_file).touch()
            self._stop_seen = (0.0, True)
        original(self, done, total, **figures)

    monkeypatch.setattr(Context, "progress", counting)
    with pytest.raises(Interrupted):
        run(small, tmp_path / "s")
    monkeypatch.setattr(Context, "progress", original)
    result = run(small, tmp_path / "s")
    assert states(result)["pretrain"] == "resumed" and digests(result) == digests(first[1])


def test_a_damaged_training_checkpoint_starts_again_and_ends_the_same(first, small, tmp_path, monkeypatch):
    save = training_state.save

    def crash(workdir, state):
        save(workdir, state)
        path = workdir / training_state.NAME
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "s")
    monkeypatch.setattr(training_state, "save", save)
    assert digests(run(small, tmp_path / "s")) == digests(first[1])


def test_a_cut_artifact_is_named_with_what_to_do(first, small, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(first[0], root)
    key = next(s["key"] for s in first[1].stages if s["name"] == "teacher")
    path = root / "artifacts" / key / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model.safetensors: has \d+ bytes, the manifest says \d+; delete the folder"):
        run(small, root, "stages.students.stages.student.optim.lr=0.06")


def test_a_full_disk_at_commit_is_one_line_and_nothing_is_lost(first, small, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = tmp_path / "s"
    prepare(parse(small), root, label="small")  # the catalogue has a full-disk test of its own
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.store.os.rename", full)
        with pytest.raises(UserError, match="No space left on device.*run the same command again"):
            run(small, root)
    result = run(small, root)
    assert states(result)["pretrain"] == "resumed" and digests(result) == digests(first[1])


@pytest.mark.parametrize(("override", "expected"), [
    ("data.test.labels=false", "stages.verdict.inputs.images  test has no labels"),
    ("stages.probe.inputs.labelled=unlabelled", "stages.probe.inputs.labelled  unlabelled has no labels"),
    ("stages.probe.inputs.images=unlabelled", "stages.probe.inputs.images  unlabelled has no labels"),
    ("stages.students.gate.images=unlabelled", "unlabelled has no labels"),
])  # fmt: skip
def test_images_whose_labels_are_read_and_that_have_none_are_refused_before_training(
    small, tmp_path, override, expected
):
    with pytest.raises(UserError) as caught:
        run(small, tmp_path / "s", override)
    assert expected in str(caught.value)


def test_who_asks_to_stop_while_ray_starts_is_heard_at_the_first_stage(small, tmp_path, monkeypatch):
    prepared = prepare(parse(small), tmp_path / "s", label="small")
    prepared.folder.mkdir(parents=True)
    (prepared.folder / "stop").touch()  # an earlier run's, which this one is to forget

    def slowly(resources):
        assert not (prepared.folder / "stop").exists()
        (prepared.folder / "stop").touch()

    monkeypatch.setattr("orchestrator.cluster.connect.connect", slowly)
    with pytest.raises(Interrupted):
        execute(prepared)
    assert read_outcomes(prepared.folder, prepared.stage_names()) == []  # nothing was begun


def test_a_stage_that_fails_ends_its_record_and_those_of_its_round_as_failed(small, tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(PseudoLabel, "_trouble", broken)
    prepared = prepare(parse(small), tmp_path / "s", label="small")
    with pytest.raises(RuntimeError, match="a fault of the program"):
        execute(prepared, use_ray=False)
    ended = {record["run"]: record["status"] for record, _ in read_records(prepared.folder) if record["kind"] == "end"}
    assert ended["teacher"] == "FINISHED"
    assert {name: ended[name] for name in ("students.0.pseudo", "students.0", "students", "run")} == dict.fromkeys(
        ("students.0.pseudo", "students.0", "students", "run"), "FAILED"
    )


def test_features_whose_folder_another_run_took_away_are_there_all_the_same(first, tmp_path):
    store = Store.open(first[0])
    checkpoint = store.open_artifact(next(s["key"] for s in first[1].stages if s["name"] == "pretrain"))
    images = prepare(parse(SMALL), first[0], label="small").plans[0].images["test"]
    context = Context(tmp_path, tmp_path, 0, images.classes, features=tmp_path / "gone" / "features")
    assert context.extract(checkpoint, images).shape[0] == len(images)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_advice(small, tmp_path):
    with pytest.raises(UserError, match=r"teacher: loss is nan at step \d+: lower optim.lr"):
        run(small, tmp_path / "s", "stages.teacher.optim.lr=1e30", "stages.teacher.ema=0")


def test_a_student_starts_from_a_fresh_initialisation(first):
    store = Store.open(first[0])
    keys = {s["name"]: s["key"] for s in first[1].stages}
    teacher, student = (store.open_artifact(keys[name]).state() for name in ("teacher", "students.0.student"))
    assert all(
        not torch.equal(teacher[name], student[name])
        for name in teacher
        if name.endswith("weight") and teacher[name].ndim > 1
    )


def test_the_ledger_says_who_labelled_what_and_what_changed(first):
    store = Store.open(first[0])
    keys = {s["name"]: s["key"] for s in first[1].stages}
    rounds = [store.open_artifact(keys[f"students.{k}.pseudo"]) for k in (0, 1)]
    tables = [labels.table() for labels in rounds]
    assert set(tables[0]["teacher"].to_pylist()) == {keys["teacher"]} and tables[0]["changed"].null_count == len(
        tables[0]
    )
    before = dict(zip(tables[0]["id"].to_pylist(), tables[0]["class"].to_pylist(), strict=True))
    for row in tables[1].select(["id", "class", "changed", "probabilities", "confidence"]).to_pylist():
        assert row["changed"] == (before[row["id"]] != row["class"])
        assert (
            sum(row["probabilities"]) == pytest.approx(1, abs=1e-4) and max(row["probabilities"]) == row["confidence"]
        )
    assert rounds[1].facts["changed"] == sum(tables[1]["changed"].to_pylist())


def test_a_guard_that_stops_ends_the_rounds_and_the_teacher_is_the_final_model(small, tmp_path):
    rounds = "stages.students.stages.pseudo"
    result = run(
        small,
        tmp_path / "s",
        f"{rounds}.min_confidence=0.9999999",
        f"{rounds}.guard=stop",
        "stages.verdict.inputs.arms=[students.0.student, students.1.student]",
    )
    assert states(result)["students.0.pseudo"] == "skipped" and states(result)["students.1.student"] == "skipped"
    assert "reach min_confidence" in next(s["note"] for s in result.stages if s["name"] == "students.1.student")
    assert not result.verdict["scores"].keys() - {"baseline", "final"}
    assert result.verdict["gain"] == 0 and "did not help measurably" in result.verdict["sentence"]


def test_a_guard_that_adapts_takes_the_most_confident_of_every_predicted_class(small, tmp_path):
    result = run(small, tmp_path / "s", "stages.students.stages.pseudo.min_confidence=0.9999999")
    store = Store.open(tmp_path / "s")
    facts = store.open_artifact(next(s["key"] for s in result.stages if s["name"] == "students.0.pseudo")).facts
    assert "only 0 of 1387 images" in facts["guard"] and facts["kept"] > 0
    assert all(
        (kept > 0) == (predicted > 0)
        for kept, predicted in zip(facts["kept_by_class"], facts["predicted_by_class"], strict=True)
    )


@pytest.mark.parametrize(("otherwise", "action"), [("keep", "kept"), ("stop", "stopped")])
def test_a_worse_student_is_refused_and_the_rounds_go_on_or_end(small, tmp_path, otherwise, action):
    result = run(
        small, tmp_path / "s", "stages.students.gate.tolerance=0", f"stages.students.gate.otherwise={otherwise}",
        "stages.students.stages.student.optim.lr=1e-9", "stages.students.stages.student.steps=60",
        "stages.teacher.steps=60", "stages.teacher.ema=0",
    )  # fmt: skip
    gate = next(s for s in result.stages if s["name"] == "students.0.gate")
    teacher = next(s for s in result.stages if s["name"] == "teacher")
    assert gate["facts"]["action"] == action and gate["facts"]["promoted"] == teacher["key"]
    assert states(result)["students.1.student"] == ("ran" if otherwise == "keep" else "skipped")
    assert result.verdict["scores"]["final"]["key"] == teacher["key"]


def test_a_baseline_with_other_steps_or_another_encoder_is_refused(small, tmp_path):
    with pytest.raises(
        UserError, match="stages.verdict.inputs.baseline .*trains for 9 steps, the final model for 8 steps"
    ):
        run(small, tmp_path / "s", "stages.teacher.steps=9")
    with pytest.raises(UserError, match="its encoder .* is not the final model's"):
        run(small, tmp_path / "s", "stages.teacher.encoder.width=0.5")


def test_seeds_run_apart_and_the_interval_is_over_them(small, tmp_path):
    result = run(small, tmp_path / "s", "seeds=2")
    names = [stage["name"] for stage in result.stages]
    assert "seed-0/teacher" in names and "seed-1/verdict" in names
    gains = [one["gain"] for one in result.verdict["each"]]
    assert result.verdict["gain"] == pytest.approx(sum(gains) / 2)
    half = 12.706 * abs(gains[0] - gains[1]) / 2
    assert result.verdict["high"] - result.verdict["low"] == pytest.approx(2 * half)


def test_json_of_a_run_has_the_promised_fields(first):
    found = json.loads(json.dumps(first[1].json()))
    assert set(found) == {"run", "store", "report", "verdict", "stages"}
    assert set(found["verdict"]) == {"baseline", "final", "gain", "low", "high", "sentence"}
    assert all(set(stage) == {"name", "key", "digest", "state", "seconds"} for stage in found["stages"])


def test_every_artifact_says_where_it_comes_from_and_holds_no_path(first):
    root, result = first
    for stage in result.stages:
        manifest = json.loads((root / "artifacts" / stage["key"] / "manifest.json").read_text(encoding="utf-8"))
        assert {"stage", "question", "inputs", "created", "versions", "files", "digest"} <= set(manifest)
        assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in manifest["versions"]
    for path in (root / "artifacts").rglob("*.json"):
        assert str(root) not in path.read_text(encoding="utf-8")


def test_contrastive_batches_larger_than_the_set_are_refused_before_training(small, tmp_path):
    with pytest.raises(UserError, match="2000 images a step but inputs.images has 1387: SimCLR compares"):
        run(small, tmp_path / "s", "stages.pretrain.batch=2000")


@pytest.mark.parametrize("soft", [True, False])
def test_two_streams_read_the_rows_the_ledger_kept(first, soft):
    store = Store.open(first[0])
    keys = {s["name"]: s["key"] for s in first[1].stages}
    recipe = parse(SMALL, overrides=[f"stages.students.stages.student.method.soft={soft}"])
    plan = prepare(recipe, first[0], label="small").plans[0]
    labels = store.open_artifact(keys["students.0.pseudo"])
    stage = next(s.stage for s in plan.stages if s.name == "students.0.student")
    context = Context(first[0], first[0], 0, plan.classes)
    fit = Fit(stage, context, plan.images["labelled"], plan.images["unlabelled"], labels, None, None, None)
    labelled, unlabelled = fit.streams({"labelled", "unlabelled"})
    copies = labels.table(["copies"])["copies"].to_pylist()
    assert unlabelled.rows.bincount(minlength=len(copies)).tolist() == copies
    assert unlabelled.order.batch == 2 * labelled.order.batch
    batch, _ = make_batch((), (labelled, unlabelled), 0, seed=0, device=torch.device("cpu"))
    rows = unlabelled.rows[batch["unlabelled.index"]].tolist()
    column = labels.table()["probabilities" if soft else "class"]
    assert batch["target"].tolist() == [column[row].as_py() for row in rows]
    assert batch["label"].tolist() == plan.images["labelled"].label[batch["labelled.index"].numpy()].tolist()


def test_an_unwritable_store_is_one_line(small, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give a folder"):
        run(small, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        run(small, tmp_path / "other")


def test_a_checkpoint_builds_the_model_it_was_saved_from(first):
    store = Store.open(first[0])
    checkpoint = store.open_artifact(next(s["key"] for s in first[1].stages if s["name"] == "teacher"))
    assert isinstance(checkpoint, Checkpoint)
    method = checkpoint.build()
    state = checkpoint.state()
    assert not method.training and all(torch.equal(value, state[name]) for name, value in method.state_dict().items())
    assert checkpoint.classes == tuple("0123456789")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if "imagenet" in name else name for name in sorted(shipped())
])  # fmt: skip
def test_every_shipped_recipe_can_be_planned(tmp_path, name):
    overrides = ["data.pixels=32"]
    splits = {split: source for split, source in yaml.safe_load(shipped()[name])["data"].items() if split != "pixels"}
    for split, source in splits.items():
        images = "digits/test" if split == "test" else "digits/train"
        if isinstance(source, dict) and source["from"] not in splits:
            few = {"per_class": 2, "count": "null"}
            overrides += [f"data.{split}.from={images}", *(f"data.{split}.{k}={few[k]}" for k in few if k in source)]
        elif source is None or isinstance(source, str):
            how = {"labelled": ", per_class: 20", "unlabelled": ", labels: false"}.get(split, "")
            overrides.append(f"data.{split}={{from: {images}{how}}}")
    assert prepare(load(name, overrides), tmp_path, label=name).plans[0].stages
