"""Stages that do not wait for each other run at the same time, and the answers are those of one after the other."""

import pytest

from orchestrator.cluster.connect import preflight
from orchestrator.cluster.coordinator import room
from orchestrator.display import plan_rows
from orchestrator.plan import units, waves
from orchestrator.recipe import Resources, load, parse
from orchestrator.run import prepare
from tests.conftest import SMALL
from tests.orchestrator.test_faults import Driver, digests, run_unbroken, states, waiting

ARMS = waiting("""
name: together
seeds: 1
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 2}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
resources: {threads: 1}
stages:
  arms:
    each:
      slow: {}
      fast: {model.optim.lr: 0.1}
    stages:
      model:
        use: orchestrator.stages.train.Train
        inputs: {labelled: labelled}
        encoder: {use: methods.encoders.SmallCNN, width: 0.25}
        method: {use: methods.supervised.Supervised}
        optim: {lr: 0.05}
        steps: 8
        batch: 8
      probe:
        use: orchestrator.stages.probe.Probe
        inputs: {model: model, labelled: labelled, images: test}
        protocols: [classifier]
  comparison:
    use: orchestrator.stages.compare.Compare
    inputs: {scores: [arms.probe], supervised: arms.slow.probe}
    protocol: classifier
""")


def plan_of(text, root, **options):
    return prepare(parse(text, **options), root, label="together").plans[0]


def test_a_unit_comes_after_what_it_reads_and_rounds_are_one(tmp_path):
    found = {unit.name: unit for unit in units(plan_of(SMALL, tmp_path / "store"))}
    assert list(found) == ["pretrain", "probe", "teacher", "students", "verdict"]
    after = {name: set(unit.after) for name, unit in found.items()}
    assert after == {
        "pretrain": set(), "probe": {"pretrain"}, "teacher": set(), "students": {"teacher"},
        "verdict": {"teacher", "students"},
    }  # fmt: skip
    assert [stage.name for stage in found["students"].stages] == [
        f"students.{number}.{stage}" for number in (0, 1) for stage in ("pseudo", "student", "gate")
    ]


def test_a_wave_is_the_longest_way_from_the_data(tmp_path):
    wave = waves(plan_of(SMALL, tmp_path / "store"))
    assert (wave["pretrain"], wave["teacher"], wave["probe"], wave["students.1.gate"], wave["verdict"]) == (
        0, 0, 1, 1, 2)  # fmt: skip


def test_no_unit_of_a_shipped_recipe_comes_before_what_it_reads(tmp_path):
    plan = prepare(load("quickstart"), tmp_path / "store", label="quickstart").plans[0]
    seen = set()
    for unit in units(plan):
        assert unit.after <= seen
        seen.add(unit.name)
    assert {stage.name for unit in units(plan) for stage in unit.stages} == {stage.name for stage in plan.stages}


def test_plan_shows_which_stages_may_run_at_the_same_time(tmp_path):
    rows = plan_rows(prepare(parse(ARMS), tmp_path / "store", label="together"))
    assert {row["name"]: row["wave"] for row in rows} == {
        "arms.slow.model": 0, "arms.fast.model": 0, "arms.slow.probe": 1, "arms.fast.probe": 1, "comparison": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("resources", "threads", "total", "fits", "own"), [
    (Resources(), 2, {"CPU": 9}, 4, {"num_cpus": 2, "num_gpus": 0}),
    (Resources(gpus=1), 2, {"CPU": 64, "GPU": 3}, 3, {"num_cpus": 2, "num_gpus": 1}),
    (Resources(labellers=2), 1, {"CPU": 7}, 2, {"num_cpus": 1, "num_gpus": 0}),
    (Resources(workers=4, gpus=1, labellers=1), 1, {"CPU": 64, "GPU": 16}, 3, {"num_cpus": 0}),
    (Resources(gpus=1), 1, {"CPU": 8}, 0, {"num_cpus": 1, "num_gpus": 1}),
])  # fmt: skip
def test_as_many_fit_as_have_all_they_need_at_once(resources, threads, total, fits, own):
    assert room(resources, threads, total) == (fits, own)


def test_more_at_a_time_than_this_machine_has_cores_is_refused(monkeypatch):
    monkeypatch.setattr("orchestrator.cluster.connect.cores", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert preflight(Resources(parallel=4, threads=1), {}) == []
    (problem,) = preflight(Resources(parallel=3, threads=2), {})
    assert problem == (
        "resources.parallel", "3 stages at a time with 2 processes or threads each need 6 cores, this machine has 4"
    )  # fmt: skip
    with pytest.raises(ValueError, match="parallel = 0: must be at least 1"):
        Resources(parallel=0)


@pytest.mark.slow
@pytest.mark.cluster
def test_two_trainings_run_at_once_and_one_that_is_killed_comes_back_to_the_same_answers(tmp_path):
    expected, _ = run_unbroken(ARMS, tmp_path / "alone")
    run = Driver(tmp_path, ARMS, "resources.parallel=2", store=tmp_path / "store", halt="Supervised 0.50")
    try:
        first, second = run.reached(processes=2)
        assert {run.title(pid).partition(".")[0] for pid in (first, second)} == {"ray::Coordinator"}
        run.kill(first)
        run.ask(None)
        result = run.result()
    finally:
        run.close()
    assert digests(result) == expected
    assert sorted(states(result).values()) == ["ran"] * 4 + ["resumed"]


@pytest.mark.slow
@pytest.mark.cluster
def test_ctrl_c_stops_all_that_run_at_once_and_the_same_command_goes_on(tmp_path):
    expected, _ = run_unbroken(ARMS, tmp_path / "alone")
    first = Driver(tmp_path, ARMS, "resources.parallel=2", store=tmp_path / "store", halt="Supervised 0.50")
    again = None
    try:
        first.reached(processes=2)
        first.stop()
        first.ask(None)
        assert first.end() == 130 and "Traceback" not in first.output
        again = Driver(tmp_path, ARMS, "resources.parallel=2", store=tmp_path / "store")
        result = again.result()
    finally:
        for one in (first, again):
            if one is not None:
                one.close()
    assert digests(result) == expected
    assert states(result)["arms.slow.model"] == states(result)["arms.fast.model"] == "resumed"
