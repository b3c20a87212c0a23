"""Workers come and go: batches stay what they were, and training goes on with what is left of a cluster."""

import subprocess
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.base import View
from orchestrator.cluster.connect import preflight
from orchestrator.data.loader import Order
from orchestrator.recipe import Resources, parse
from orchestrator.run import batches_of, prepare
from orchestrator.stages.train import LOOK_SECONDS
from orchestrator.store import Store
from orchestrator.training import checkpoint as training_state
from orchestrator.training.loop import Stream, make_batch
from tests.orchestrator.ray_nodes import BIN, Watched
from tests.orchestrator.test_faults import TWO_WORKERS

TEACHER = TWO_WORKERS[: TWO_WORKERS.index("  students:")]


class Numbered:
    """Images that say which row they are."""

    def batch(self, rows):
        return rows.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8)


def planned(tmp_path, *overrides):
    return prepare(parse(TEACHER, overrides=overrides), tmp_path / "store", label="elastic").plans[0]


@given(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.data())
def test_however_many_workers_share_a_batch_its_images_and_their_order_are_the_same(wanted, accumulate, per, data):
    present = data.draw(st.integers(1, wanted))
    batch = wanted * accumulate * present * per
    order = Order(97, batch, seed=3)
    stream = Stream("labelled", Numbered(), order)
    stage = next(s.stage for s in parse(TEACHER).nodes)
    stage = type(stage)(**{**vars(stage), "batch": batch, "accumulate": accumulate})
    method, _ = stage.build(10, 0)
    shares = stage.shares(method, present, wanted)
    views = (View("labelled", lambda images, draws: images.float(), stream="labelled"),)
    seen = []
    for worker in range(present):
        for part in range(shares):
            made, _ = make_batch(
                views, (stream,), 5, seed=0, device=torch.device("cpu"), part=worker * shares + part,
                parts=present * shares,
            )  # fmt: skip
            seen.append(made["labelled"][:, 0, 0, 0].long())
    assert torch.equal(torch.cat(seen), order.at(5)[0])
    assert {len(part) for part in seen} == {batch // (present * shares)}
    assert len(seen[0]) <= batch // (wanted * accumulate), "a part needs no more memory than with all workers"


def test_a_method_that_compares_the_images_of_a_batch_has_them_all_at_once():
    recipe = parse(TEACHER.replace("labelled: labelled", "images: unlabelled").replace(
        "tests.orchestrator.halting.Supervised", "methods.simclr.SimCLR"
    ))  # fmt: skip
    stage = next(node.stage for node in recipe.nodes)
    method, _ = stage.build(0, 100)
    assert stage.shares(method, 2, 4) == 1


def test_a_batch_that_some_number_of_workers_cannot_share_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.cluster.connect.cores", lambda: 8)
    plan = planned(tmp_path)
    assert preflight(Resources(workers=2, min_workers=1, threads=1), batches_of(plan)) == []
    (problem,) = preflight(Resources(workers=4, min_workers=3, threads=1), batches_of(plan))
    assert problem == ("stages.teacher.batch", "8 images at a time cannot be split evenly over 3 workers")
    with pytest.raises(ValueError, match="min_workers = 3: must be from 1 to workers = 2"):
        Resources(workers=2, min_workers=3)


@pytest.fixture
def nodes(tmp_path):
    """A head without cores and two nodes with one each."""
    found = Watched(tmp_path, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5")
    for _ in range(2):
        found.add()
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.cluster
def test_training_saves_when_a_machine_is_about_to_go_and_goes_on_with_the_one_that_is_left(nodes, tmp_path):
    root, lost = tmp_path / "store", "127.0.0.3"
    nodes.ask("Supervised 0.25")
    options = ("stages.teacher.steps=40", "resources.min_workers=1", "resources.save_seconds=3600")
    run = nodes.start(tmp_path, TEACHER, root, options=options)
    nodes.reached(run, processes=2)
    subprocess.run(
        [BIN / "ray", "drain-node", "--address", f"127.0.0.1:{nodes.port}", "--node-id", nodes.node_id(lost),
         "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a higher bid",
         "--deadline-remaining-seconds", "600"], check=True, capture_output=True, env=nodes.environment,
    )  # fmt: skip
    assert not list(root.glob("work/*/training.pt"))
    for number in range(11, 39):  # the workers are told within some seconds
        nodes.ask(f"Supervised {number / 40:.2f}")
        nodes.reached(run, processes=2)
        time.sleep(2 * LOOK_SECONDS)
        if saved := list(root.glob("work/*/training.pt")):
            break
    step = training_state.load(saved[0].parent)["step"]
    assert step in (number - 1, number)
    nodes.kill(lost)
    nodes.ask(None)
    (stage,) = run.result()["stages"]
    checkpoint = Store.open(root).open_artifact(stage["key"])
    assert checkpoint.facts["workers"] == [[0, 2], [step, 1]]
    assert checkpoint.facts["steps"] == 40 and checkpoint.facts["images_seen"] == 320
    assert f"from step {step} on 1 instead of 2 workers; a batch stays 8" in run.said
