"""Searches: what a trial reads, what is computed once, what is kept, and that the same command goes on."""

import json
import os
import signal

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.context import Interrupted
from orchestrator.errors import UserError
from orchestrator.recipe import Resources, load, parse
from orchestrator.records import read_records
from orchestrator.report.html import write_report
from orchestrator.runs import read_head
from orchestrator.search.question import Budget, Metric, listed_points, make_search, needed, read_budget
from orchestrator.search.run import Job, Room, execute_search, make_room, prepare_search, run_trial
from orchestrator.search.trials import (
    Trial,
    best_of,
    conclusion,
    confirm_gain,
    read_trial,
    read_trials,
    trial_file,
)
from orchestrator.store import Store
from tests.orchestrator.test_faults import Driver, eventually, finished, waiting

pytestmark = pytest.mark.usefixtures("untracked")

SEARCHED = """
name: searched
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 3}
  holdout: {from: digits/train, per_class: 10}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  pretrain:
    use: orchestrator.stages.train.Train
    inputs: {images: unlabelled}
    encoder: &encoder {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.simclr.SimCLR, flip: false}
    optim: {lr: 0.05}
    steps: 4
    batch: 16
  model:
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled, init: pretrain}
    encoder: *encoder
    method: {use: methods.supervised.Supervised, augment: {flip: false, padding: 1}}
    optim: {lr: 0.05}
    steps: 10
    batch: 8
  probe:
    use: orchestrator.stages.probe.Probe
    inputs: {model: model, labelled: labelled, images: test}
    protocols: [classifier, knn]
"""
SMOOTHING = "stages.model.method.label_smoothing=choice([0.0, 0.1, 0.2])"
HALTS = waiting(SEARCHED)


def dumped(raw):
    """YAML with the stages in their order."""
    return yaml.safe_dump(raw, sort_keys=False)


def searched(
    root, text=SEARCHED, *, params=(SMOOTHING,), trials=3, confirm=1, algorithm="grid", stop="none", **options
):
    """A search of a recipe, prepared."""
    recipe = parse(text, overrides=options.pop("overrides", ()))
    search, notes = make_search(recipe, label="searched", params=params, algorithm=algorithm, stop=stop, **options)
    return prepare_search(recipe, root, search, budget=Budget(trials), confirm=confirm, notes=tuple(notes))


# What a trial is ------------------------------------------------------------------------------------------------------


def test_a_trial_reads_the_hold_out_wherever_the_recipe_reads_the_test_images(small):
    search, _ = make_search(parse(small), label="small", params=["stages.teacher.optim.lr=loguniform(0.01, 0.1)"])
    trial = search.recipe({})
    assert not [node.name for node in trial.nodes if any("test" in targets for targets in node.inputs.values())]
    assert trial.node("verdict").inputs["images"] == ("holdout",)
    assert "test" not in trial.data.splits and trial.seeds == 1
    assert search.recipe({}, test=True).node("verdict").inputs["images"] == ("test",)


def test_the_test_images_are_not_opened_by_trials(tmp_path):
    """Their folder need not even be there until the best recipe is read on them."""
    prepared = searched(tmp_path / "store", overrides=[f"data.test={tmp_path / 'nowhere'}"], trials=2, confirm=0,
                        params=["stages.model.method.label_smoothing=choice([0.0, 0.1])"])  # fmt: skip
    with pytest.raises(UserError, match="nowhere"):
        execute_search(prepared, use_ray=False)
    assert [trial.state for trial in read_trials(prepared.folder)] == ["finished", "finished"]
    (test,) = read_trials(prepared.folder, "confirm")
    assert (test.role, test.state) == ("test", "failed")


def test_a_test_split_cut_from_the_labels_stays_out_of_what_trials_learn_from(tmp_path):
    cut = "data.test={from: labelled, fraction: 0.2}"
    prepared = searched(tmp_path, overrides=[cut, "data.labelled.per_class=10"])
    splits = prepared.data.splits
    test, others = set(splits["test"].ids), {name: set(images.ids) for name, images in splits.items() if name != "test"}
    assert len(test) == 20 and all(not test & ids for ids in others.values())
    assert not [stage.name for stage in prepared.plan.stages if any("test" in t for t in stage.inputs.values())]


def test_a_recipe_without_a_hold_out_gets_a_part_of_its_labels(tmp_path):
    raw = yaml.safe_load(SEARCHED)
    del raw["data"]["holdout"]
    prepared = searched(tmp_path, dumped(raw), overrides=["data.labelled.per_class=10"])
    assert len(prepared.data.splits["holdout"]) == 20 and len(prepared.data.splits["labelled"]) == 80
    assert any("on 20 held-out images" in line for line in prepared.lines())
    assert any("±22 points" in line for line in prepared.lines())


def test_a_recipe_without_labels_to_hold_out_is_refused(small):
    raw = yaml.safe_load(small)
    raw["data"] = {"pixels": 16, "mine": "digits/train", "unlabelled": "digits/train", "test": "digits/test"}
    raw["stages"] = {
        "pretrain": raw["stages"]["pretrain"],
        "probe": {
            "use": "orchestrator.stages.probe.Probe",
            "inputs": {"model": "pretrain", "labelled": "mine", "images": "test"},
        },
    }
    with pytest.raises(UserError, match=r"data.holdout is missing.*give data.holdout"):
        make_search(parse(dumped(raw)), label="small", names=["simclr"])


def test_only_what_the_metric_needs_is_run():
    recipe = load("compare-selftraining")
    assert needed(recipe, "arms.fixmatch.probe") == {"arms.fixmatch.probe", "arms.fixmatch.model"}
    search, _ = make_search(recipe, label="compare", names=["fixmatch"], metric="arms.fixmatch.probe")
    assert {place for p in search.parameters for place in p.places} == {
        f"stages.arms.each.fixmatch.model.{field}"
        for field in ("method.min_confidence", "method.unlabelled_weight", "unlabelled_ratio")
    }  # fmt: skip
    (threshold,) = [p.name for p in search.parameters if p.name.endswith("min_confidence")]
    changed = search.recipe({threshold: 0.6})
    assert changed.node("arms.fixmatch.model").stage.method.config.min_confidence == 0.6
    assert changed.node("arms.uda.model").stage.method.config.min_confidence == 0.8


def test_the_default_metric_is_the_judges_and_else_the_last_probes(small):
    place = "stages.teacher.optim.lr=loguniform(0.01, 0.1)"
    assert str(make_search(parse(small), label="x", params=[place])[0].metric) == "verdict.final"
    assert str(make_search(parse(SEARCHED), label="x", params=[SMOOTHING])[0].metric) == "probe.classifier_accuracy"
    pretrain = "stages.pretrain.optim.lr=loguniform(0.01, 0.1)"
    assert str(make_search(parse(small), label="x", params=[pretrain])[0].metric) == "probe.knn_accuracy"


@pytest.mark.parametrize(("options", "said"), [
    ({"metric": "probe.liner_accuracy"}, r"not measured; did you mean probe.\w+_accuracy.*there are"),
    ({"params": ["stages.model.method.label_smothing=uniform(0, 1)"]}, "did you mean method.label_smoothing"),
    ({"params": ["stages.modle.optim.lr=uniform(0.1, 1)"]}, "no stage lies there; did you mean stages.model"),
    ({"params": ["data.labelled.per_class=randint(1, 5)"]}, "only fields under stages"),
    ({"params": ["resources.threads=randint(1, 5)"]}, "only fields under stages"),
    ({"params": ["stages.model.optim.lr"]}, "write PATH=RANGE"),
    ({"params": ["stages.model.optim.lr=uniform(1)"]}, "takes 2 values, found 1"),
    ({"params": [SMOOTHING, SMOOTHING]}, "varies twice"),
    ({"names": ["fixmtch"], "params": ()}, "did you mean fixmatch"),
    ({"names": ["fixmatch"], "params": ()}, "no stage of searched is of its kind"),
    ({"params": [SMOOTHING, "stages.model.steps=choice([-1, -2])"]}, "fewer than two of its values fit: .*steps = -"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_anything_runs(options, said):
    with pytest.raises(UserError, match=said) as caught:
        make_search(parse(SEARCHED), label="searched", **({"params": [SMOOTHING]} | options))
    assert len(str(caught.value).splitlines()) == 1


def test_a_metric_that_does_not_depend_on_what_varies_is_refused(small):
    with pytest.raises(UserError, match="probe.knn_accuracy: does not depend on what varies.*verdict.final"):
        make_search(parse(small), label="x", params=["stages.teacher.optim.lr=loguniform(0.01, 0.1)"],
                    metric="probe.knn_accuracy")  # fmt: skip


def test_early_stopping_is_off_where_nothing_is_known_during_training_and_says_why():
    pretrain = ["stages.pretrain.method.temperature=loguniform(0.1, 1)"]
    raw = yaml.safe_load(SEARCHED)
    raw["stages"]["probe"] |= {
        "inputs": {"model": "pretrain", "labelled": "labelled", "images": "test"},
        "protocols": ["knn"],
    }
    search, lines = make_search(parse(dumped(raw)), label="x", params=pretrain, stop="asha")
    assert search.stop == "none" and any("tells the classes apart" in line for line in lines)
    search, lines = make_search(parse(SEARCHED), label="x", params=[SMOOTHING], stop="asha", mode="min")
    assert search.stop == "none" and any("is no accuracy" in line for line in lines)
    search, lines = make_search(parse(SEARCHED), label="x", params=[SMOOTHING], stop="asha")
    assert (search.stop, search.watched, lines) == ("asha", ("model",), [])
    assert search.recipe({}).node("model").inputs["holdout"] == ("holdout",)
    assert "holdout" not in search.recipe({}, test=True).node("model").inputs


# Budgets, room, points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "budget"), [
    ("90s", Budget(5, seconds=90)), ("30m", Budget(5, seconds=1800)), ("2h", Budget(5, seconds=7200)),
    ("1.5h", Budget(5, seconds=5400)), ("4gpuh", Budget(5, gpu_hours=4)), (None, Budget(5)),
])  # fmt: skip
def test_a_budget_is_a_time_or_gpu_hours(text, budget):
    assert read_budget(5, text) == budget


@pytest.mark.parametrize("text", ["2", "2d", "h", "-1h", "0s", "gpuh"])
def test_a_wrong_budget_is_refused_with_examples(text):
    with pytest.raises(UserError, match="90s, 30m or 2h"):
        read_budget(5, text)


def test_what_cannot_fit_is_refused_with_the_numbers():
    assert make_room(Resources(), None, 20, 2, 0) == Room(2, 1, 1, 0.0)
    assert make_room(Resources(), None, 20, 64, 0) == Room(20, 3, 1, 0.0)
    assert make_room(Resources(threads=4), None, 20, 8, 0) == Room(2, 4, 1, 0.0)
    assert make_room(Resources(), None, 20, 16, 2) == Room(2, 8, 1, 1.0)
    assert make_room(Resources(gpus=0.5), None, 20, 16, 2) == Room(4, 4, 1, 0.5)
    assert make_room(Resources(workers=2), None, 20, 4, 0) == Room(2, 1, 2, 0.0)
    with pytest.raises(UserError, match="--concurrent 3: needs 3 cores, there are 2; use --concurrent 2"):
        make_room(Resources(), 3, 20, 2, 0)
    with pytest.raises(UserError, match="a trial needs 8 cores for 4 workers with 2 threads, there are 2"):
        make_room(Resources(workers=4, threads=2), None, 20, 2, 0)
    with pytest.raises(UserError, match="a trial needs 4 GPUs, there are 1"):
        make_room(Resources(workers=2, gpus=2), None, 20, 8, 1)


def test_a_request_that_cannot_fit_is_refused_before_anything_starts(tmp_path):
    file = tmp_path / "searched.yaml"
    file.write_text(SEARCHED, encoding="utf-8")
    words = ["tune", str(file), "--param", SMOOTHING, "--concurrent", "999", "--store", str(tmp_path / "store")]
    answer = CliRunner().invoke(app, words)
    assert isinstance(answer.exception, UserError) and "--concurrent 999: needs 999 cores" in str(answer.exception)
    assert not list((tmp_path / "store" / "runs").iterdir())


def test_a_grid_has_every_combination_and_says_when_there_are_too_few_trials():
    params = [SMOOTHING, "stages.model.optim.lr=loguniform(0.01, 1)"]
    search, _ = make_search(parse(SEARCHED), label="x", params=params, algorithm="grid", stop="none")
    points = listed_points(search, 9, 0)
    assert len(points) == 9 and {p["model.optim.lr"] for p in points} == {0.01, 0.1, 1.0}
    assert len(listed_points(search, 8, 0)) == 6
    with pytest.raises(UserError, match="at least 3 x 2 = 6 trials; use --trials 6"):
        listed_points(search, 5, 0)


def test_random_points_start_with_the_recipes_own_and_do_not_depend_on_how_many_there_are():
    search, _ = make_search(parse(SEARCHED), label="x", params=["stages.model.optim.lr=loguniform(0.01, 1)"],
                            algorithm="random", stop="none")  # fmt: skip
    assert listed_points(search, 9, 0)[:4] == listed_points(search, 4, 0) != listed_points(search, 4, 1)
    assert listed_points(search, 4, 0)[0] == {"model.optim.lr": 0.05}


# Running --------------------------------------------------------------------------------------------------------------


def test_what_trials_do_not_touch_is_computed_once_and_the_same_call_runs_nothing_again(tmp_path):
    prepared = searched(tmp_path / "store")
    result = execute_search(prepared, use_ray=False)
    trials = read_trials(prepared.folder)
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert prepared.shared() == (["pretrain"], ["model", "probe"])
    states = [[stage["state"] for stage in trial.stages] for trial in trials]
    assert states == [["ran", "ran", "ran"], ["stored", "ran", "ran"], ["stored", "ran", "ran"]]
    assert len({trial.stages[0]["key"] for trial in trials}) == 1
    store, before = Store.open(tmp_path / "store"), finished(tmp_path / "store")
    again = execute_search(searched(tmp_path / "store"), use_ray=False)
    assert finished(tmp_path / "store") == before and again["best"] == result["best"]
    assert all(store.has(stage["key"]) for trial in trials for stage in trial.stages)
    assert [trial.seconds for trial in read_trials(prepared.folder)] == [trial.seconds for trial in trials]


def test_the_objective_is_what_the_probe_measured_on_the_hold_out(tmp_path):
    prepared = searched(tmp_path, trials=3)
    execute_search(prepared, use_ray=False)
    store = Store.open(tmp_path)
    for trial in read_trials(prepared.folder):
        manifest = store.manifest(trial.stages[-1]["key"])
        assert manifest["facts"]["classifier_accuracy"] == trial.objective
        assert manifest["inputs"]["images"] == f"images:{prepared.data.splits['holdout'].fingerprint}"
    (test,) = [trial for trial in read_trials(prepared.folder, "confirm") if trial.role == "test"]
    digits = parse(SEARCHED).data.splits["test"].source
    assert digits == "digits/test"
    read = store.manifest(test.stages[-1]["key"])["inputs"]["images"]
    assert read != f"images:{prepared.data.splits['holdout'].fingerprint}"


def test_the_best_recipe_is_one_that_run_takes_and_reads_the_test_images(tmp_path):
    prepared = searched(tmp_path)
    result = execute_search(prepared, use_ray=False)
    best = load(str(prepared.folder / "best.yaml"))
    assert best.node("probe").inputs["images"] == ("test",)
    smoothing = best.node("model").stage.method.config.label_smoothing
    assert {"model.method.label_smoothing": smoothing} == result["best"]["values"]
    assert result["test"]["metric"] == "probe.classifier_accuracy" and result["test_reads"] == 1


def test_the_best_is_held_against_the_default_on_seeds_that_the_search_did_not_use(tmp_path):
    prepared = searched(tmp_path, confirm=2, params=["stages.model.optim.lr=choice([0.001, 0.05])"],
                        overrides=["stages.model.optim.lr=0.001"], trials=2)  # fmt: skip
    result = execute_search(prepared, use_ray=False)
    after = [trial for trial in read_trials(prepared.folder, "confirm") if trial.role != "test"]
    assert result["seeds"] == [1, 2] and not result["same"]
    assert sorted((t.role, t.seed) for t in after) == [("best", 1), ("best", 2), ("default", 1), ("default", 2)]
    each = {(t.role, t.seed): t.objective for t in after}
    assert result["gain"]["each"] == [each["best", s] - each["default", s] for s in (1, 2)]


def test_when_no_trial_beats_the_default_nothing_is_confirmed_and_the_sentence_says_so(tmp_path):
    prepared = searched(tmp_path, params=["stages.model.optim.lr=choice([0.05, 0.0000001])"], trials=2)
    result = execute_search(prepared, use_ray=False)
    assert result["same"] and result["gain"] is None and result["seeds"] == []
    assert (
        result["sentence"]
        == "No trial was better than the recipe as it is, by probe.classifier_accuracy on the hold-out."
    )
    assert [trial.role for trial in read_trials(prepared.folder, "confirm")] == ["test"]


def test_a_trial_that_cannot_be_built_fails_with_its_reason_and_the_search_goes_on(tmp_path):
    params = ["stages.model.batch=choice([8, 4])", "stages.model.accumulate=choice([1, 8])"]
    prepared = searched(tmp_path, params=params, trials=4)
    execute_search(prepared, use_ray=False)
    trials = read_trials(prepared.folder)
    assert sorted(trial.state for trial in trials) == ["failed", "finished", "finished", "finished"]
    (failed,) = [trial for trial in trials if trial.state == "failed"]
    assert "accumulate = 8: must divide batch = 4" in failed.note and failed.objective is None


def test_when_the_first_trials_all_fail_the_search_ends_with_what_they_said(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.stages.probe.Probe._knn", lambda *args: 1 / 0)
    with pytest.raises(UserError, match="the first 3 trials failed, the first with: ZeroDivisionError"):
        execute_search(searched(tmp_path), use_ray=False)


def test_a_full_disk_ends_the_search_and_its_trial_is_tried_again(tmp_path, monkeypatch):
    def full(self, key, artifact, manifest):
        raise UserError("store: cannot keep Checkpoint") from OSError(28, "No space left on device")

    prepared = searched(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", full)
        with pytest.raises(UserError, match="cannot keep"):
            execute_search(prepared, use_ray=False)
    assert [trial.state for trial in read_trials(prepared.folder)] == ["interrupted"]
    execute_search(prepared, use_ray=False)
    assert [trial.state for trial in read_trials(prepared.folder)] == ["finished"] * 3


def job_of(prepared):
    return Job(prepared.search, prepared.store.root, prepared.folder, prepared.room)


def test_a_trial_tells_of_its_hold_out_while_it_trains_and_one_that_is_stopped_keeps_its_state(tmp_path):
    prepared = searched(tmp_path, stop="asha")
    told = []

    def stop_at_four(look, accuracy):
        told.append((look, accuracy))
        if look == 4:
            raise SystemExit  # as Ray Tune ends a trial

    trial = Trial(0, prepared.search.default(), file=trial_file(0))
    with pytest.raises(SystemExit):
        run_trial(trial, job_of(prepared), tell=stop_at_four)
    kept = read_trial(prepared.folder / trial.file)
    assert kept.state == "stopped early" and kept.objective is None
    assert [look for look, _ in told] == [1, 2, 3, 4] and kept.looks == [list(one) for one in told]
    key = next(stage.key for stage in prepared.plan.stages if stage.name == "model")
    work = prepared.store.root / "work" / key
    assert (work / "training.pt").exists() and not prepared.store.has(key)
    run_trial(trial, job_of(prepared), tell=lambda look, accuracy: told.append((look, accuracy)))
    assert [look for look, _ in told[4:]] == [5, 6, 7, 8, 9, 10] and trial.state == "finished"


def test_a_trial_that_was_stopped_and_goes_on_ends_as_one_that_was_not(tmp_path):
    whole, broken = searched(tmp_path / "a", stop="asha"), searched(tmp_path / "b", stop="asha")
    trials = [Trial(0, one.search.default(), file=trial_file(0)) for one in (whole, broken)]
    run_trial(trials[0], job_of(whole))

    def stop(look, accuracy):
        raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(trials[1], job_of(broken), tell=stop)
    run_trial(trials[1], job_of(broken))
    digest = [one.store.manifest(t.stages[1]["key"])["digest"] for one, t in zip((whole, broken), trials, strict=True)]
    assert digest[0] == digest[1] and trials[0].objective == trials[1].objective


def test_a_wish_to_stop_keeps_everything_and_the_same_call_goes_on(tmp_path):
    prepared = searched(tmp_path)
    ended = []

    def stop_after_one(trial):
        ended.append(trial.number)
        (prepared.folder / "stop").touch()

    with pytest.raises(Interrupted):
        execute_search(prepared, use_ray=False, finished=stop_after_one)
    assert ended == [0] and read_head(prepared.folder)["status"] == "KILLED"
    before = finished(tmp_path)
    execute_search(prepared, use_ray=False, finished=lambda trial: ended.append(trial.number))
    assert ended[:3] == [0, 1, 2]
    assert {key: finished(tmp_path)[key] for key in before} == before


def test_trials_lie_under_the_search_in_tracking_and_stages_under_their_trial(tmp_path):
    prepared = searched(tmp_path)
    execute_search(prepared, use_ray=False)
    starts = {r["run"]: r for r, _ in read_records(prepared.folder) if r["kind"] == "start"}
    assert starts["run"]["parent"] is None and starts["run"]["tags"]["stage"] == "search"
    assert [starts[f"trial-{n:03d}"]["parent"] for n in range(3)] == ["run"] * 3
    assert starts["trial-001/model"]["parent"] == "trial-001"
    assert starts["trial-001"]["params"]["model.method.label_smoothing"] == "0.1"
    metrics = [r for r, _ in read_records(prepared.folder) if r["kind"] == "metrics" and r["run"] == "trial-001"]
    named = {name for r in metrics for name in r["values"]}
    assert named == {"objective", "probe.classifier_accuracy"}  # what MLflow's comparison offers first
    ends = {r["run"]: r["status"] for r, _ in read_records(prepared.folder) if r["kind"] == "end"}
    assert set(ends.values()) == {"FINISHED"} and "trial-001/model" in ends


def test_the_report_shows_trials_and_figures_and_is_equal_for_an_equal_folder(tmp_path):
    prepared = searched(tmp_path)
    result = execute_search(prepared, use_ray=False)
    page = write_report(prepared.store, prepared.folder).read_text(encoding="utf-8")
    for words in ('id="result"', 'id="trials"', 'id="parameters"', "<svg", "orchestrator run best.yaml", "read once"):
        assert words in page
    assert result["sentence"].replace("'", "&#39;") in page
    assert write_report(prepared.store, prepared.folder).read_text(encoding="utf-8") == page


def test_status_and_show_know_a_search_and_other_commands_pass_it_by(tmp_path):
    prepared = searched(tmp_path)
    execute_search(prepared, use_ray=False)

    def ask(*words):
        return CliRunner().invoke(app, [*words, "--store", str(tmp_path)])

    listed = ask("status")
    assert listed.exit_code == 0 and f"{prepared.name}" in listed.output and "3/3 trials" in listed.output
    assert "label_smoothing" in ask("status", prepared.name).output
    shown = ask("show", "latest")
    assert shown.exit_code == 0 and "best.yaml" in shown.output and "read once" in shown.output
    assert f"orchestrator ui --store {prepared.store.root}" in " ".join(shown.output.split())
    told = json.loads(ask("show", prepared.name, "--json").output)
    assert [trial["number"] for trial in told["trials"]] == [0, 1, 2] and told["result"]["test_reads"] == 1
    assert isinstance(ask("predict", "latest", str(tmp_path)).exception, UserError)


def test_a_dry_run_says_what_would_be_searched_and_trains_nothing(tmp_path):
    file = tmp_path / "searched.yaml"
    file.write_text(SEARCHED, encoding="utf-8")
    words = ["tune", str(file), "--param", SMOOTHING, "--dry-run", "--json", "--store", str(tmp_path / "store")]
    answer = CliRunner().invoke(app, words, catch_exceptions=False)
    question = json.loads(answer.stdout)["question"]
    assert question["once"] == ["pretrain"] and question["each"] == ["model", "probe"]
    assert question["parameters"][0]["options"] == [0.0, 0.1, 0.2] and question["held_out"] == 100
    assert not finished(tmp_path / "store")


# Results --------------------------------------------------------------------------------------------------------------


def test_the_gain_is_students_interval_of_the_seeds_differences():
    found = confirm_gain([0.51, 0.62, 0.73], [0.5, 0.6, 0.7], "max")
    half = 4.303 * 0.01 / 3**0.5  # the differences 0.01, 0.02, 0.03 deviate by 0.01
    assert found["gain"] == pytest.approx(0.02) and found["high"] - found["gain"] == pytest.approx(half)
    assert confirm_gain([0.5], [0.4], "max")["low"] is None
    assert confirm_gain([0.5, 0.5], [0.4, 0.4], "min")["gain"] == pytest.approx(-0.1)


def test_the_conclusion_says_when_the_default_is_not_beaten():
    def said(low, high):
        gain = {"seeds": 3, "gain": (low + high) / 2, "low": low, "high": high}
        return conclusion({"same": False, "gain": gain}, "probe.knn", share=True)

    assert said(0.01, 0.03).startswith("The best recipe beats the recipe's default")
    assert "does not measurably beat" in said(-0.01, 0.03) and "the interval contains 0" in said(-0.01, 0.03)
    assert "worse than the recipe's default" in said(-0.03, -0.01)
    assert "optimistic" in conclusion({"same": False, "gain": None}, "m", share=True)


def test_the_best_is_the_earliest_of_equal_ones_and_only_finished_trials_count():
    trials = [Trial(0, {}, "finished", 0.5), Trial(1, {}, "finished", 0.7), Trial(2, {}, "finished", 0.7),
              Trial(3, {}, "stopped early", None, looks=[[3, 0.9]]), Trial(4, {}, "failed")]  # fmt: skip
    assert best_of(trials, "max").number == 1 and best_of(trials, "min").number == 0
    assert best_of(trials[3:], "max") is None


def test_a_metric_reads_nested_facts_and_says_what_there_is():
    assert Metric("model", "health.live.accuracy").read({"health": {"live": {"accuracy": 0.5}}}) == 0.5
    with pytest.raises(UserError, match="measured final, gain"):
        Metric("verdict", "fnal").read({"final": 0.5, "gain": 0.1})


# On Ray ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path):
    """Starts `orchestrator tune`, and leaves nothing of it running."""
    started = []

    def start(*options, store, recipe=HALTS, **more):
        (tmp_path / str(len(started))).mkdir()
        started.append(Driver(tmp_path / str(len(started)), recipe, *options, store=store, verb="tune", **more))
        return started[-1]

    yield start
    for one in started:
        one.close()


def trials_of(store):
    (folder,) = (store / "runs").iterdir()
    return read_trials(folder)


def ran(store):
    """Stage name to how many trials computed it, by what the trials say of the store."""
    stages = [stage for trial in trials_of(store) for stage in trial.stages]
    return {name: sum(s["state"] in ("ran", "resumed") for s in stages if s["name"] == name)
            for name in {s["name"] for s in stages}}  # fmt: skip


GRID = ("--param", SMOOTHING, "--search", "grid", "--trials", "3", "--stop", "none", "--confirm", "0")


@pytest.mark.cluster
def test_trials_that_race_for_one_pretraining_compute_it_once(driver, tmp_path):
    store = tmp_path / "store"
    two = ("--param", "stages.model.method.label_smoothing=choice([0.0, 0.1])", *GRID[2:4], "--trials", "2", *GRID[6:])
    untested = SEARCHED.replace("  test: digits/test\n", "").replace("images: test", "images: holdout")
    result = driver(*two, recipe=untested, store=store).result()["result"]
    assert result["trials"] == {"finished": 2} and result["test"] is None
    assert ran(store) == {"pretrain": 1, "model": 2, "probe": 2}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_driver_killed_goes_on_and_runs_no_finished_trial_again(driver, tmp_path):
    store = tmp_path / "store"
    first = driver(*GRID, "--concurrent", "1", store=store, halt="after commit Probe None")
    first.reached()
    first.ask("Supervised 0.50")
    first.reached()
    first.kill()
    first.gone()
    before, states = finished(store), [trial.state for trial in trials_of(store)]
    assert states == ["finished", "running"]
    seconds = trials_of(store)[0].seconds
    result = driver(*GRID, "--concurrent", "1", store=store).result()["result"]
    assert result["trials"] == {"finished": 3} and {key: finished(store)[key] for key in before} == before
    assert trials_of(store)[0].seconds == seconds  # nobody wrote its file again
    assert [s["state"] for s in trials_of(store)[1].stages] == ["stored", "resumed", "ran"]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_trial_killed_goes_on_from_its_checkpoint_in_the_same_search(driver, tmp_path):
    store = tmp_path / "store"
    one = driver(*GRID, "--concurrent", "1", store=store, halt="Supervised 0.50")
    (pid,) = one.reached()
    one.ask(None)
    os.kill(pid, signal.SIGKILL)
    result = one.result()["result"]
    assert result["trials"] == {"finished": 3}
    assert trials_of(store)[0].stages[1]["state"] == "resumed" and ran(store)["pretrain"] <= 1


@pytest.mark.cluster
@pytest.mark.slow
def test_ctrl_c_ends_a_search_with_130_and_the_same_command_goes_on(driver, tmp_path):
    store = tmp_path / "store"
    first = driver(*GRID, "--concurrent", "1", store=store, halt="Supervised 0.50")
    first.reached()
    first.stop()
    first.ask(None)
    assert first.end() == 130, first.output
    first.gone()
    assert [trial.state for trial in trials_of(store)] == ["interrupted"]
    result = driver(*GRID, "--concurrent", "1", store=store).result()["result"]
    assert result["trials"] == {"finished": 3}
    assert trials_of(store)[0].stages[1]["state"] == "resumed"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_budget_of_time_stops_running_trials_within_a_step_and_says_so(driver, tmp_path):
    """One trial ends, the next waits in a step until the time is over: it is interrupted there and kept."""
    store = tmp_path / "store"
    options = (*GRID, "--concurrent", "1", "--budget", "60s")
    first = driver(*options, store=store, halt="after commit Probe None")
    first.reached()
    first.ask("Supervised 0.50")
    first.reached()
    (folder,) = (store / "runs").iterdir()
    eventually(lambda: (folder / "stop").exists() or None, "the end of the budget")
    first.ask(None)
    result = first.result()["result"]
    assert result["limit"] == "60 s" and result["trials"] == {"finished": 1, "interrupted": 1}
    again = driver(*options, store=store).result()["result"]  # what is spent stays spent
    assert again["trials"] == {"finished": 1, "interrupted": 1}
    more = driver(*GRID, "--concurrent", "1", store=store).result()["result"]
    assert more["trials"] == {"finished": 3}


@pytest.mark.cluster
@pytest.mark.slow
def test_optuna_and_asha_search_together_and_learn_from_a_search_that_goes_on(driver, tmp_path):
    store = tmp_path / "store"
    options = ("--param", "stages.model.optim.lr=loguniform(0.00001, 0.5)", "--stop", "asha", "--confirm", "0")
    driver(*options, "--trials", "2", recipe=SEARCHED, store=store).result()
    before = {trial.number: trial.values for trial in trials_of(store)}
    result = driver(*options, "--trials", "4", recipe=SEARCHED, store=store).result()["result"]
    trials = trials_of(store)
    assert {number: trials[number].values for number in before} == before
    assert len({json.dumps(trial.values) for trial in trials}) == 4  # the second search repeats no draw of the first
    assert {trial.state for trial in trials} <= {"finished", "stopped early"}
    assert all(1e-5 <= trial.values["model.optim.lr"] <= 0.5 for trial in trials)
    assert result["best"]["objective"] == max(t.objective for t in trials if t.state == "finished")
    assert all(trial.looks for trial in trials)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_trial_of_two_workers_starts_a_group_and_ends(driver, tmp_path):
    store = tmp_path / "store"
    two = ("--param", "stages.model.method.label_smoothing=choice([0.0, 0.1])", "--search", "grid", "--trials", "2")
    result = driver("resources.workers=2", *two, "--confirm", "0", recipe=SEARCHED, store=store).result()
    assert result["result"]["trials"] == {"finished": 2} and ran(store)["pretrain"] == 1
