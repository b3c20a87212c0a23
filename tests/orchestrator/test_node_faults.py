"""Whole nodes die, of several on one machine: the run goes on elsewhere to the answers of an undisturbed one."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.context import SHARD
from orchestrator.search.trials import read_trials
from tests.orchestrator.ray_nodes import Watched
from tests.orchestrator.test_faults import TWO_WORKERS, digests, finished, ledger, run_unbroken, states
from tests.orchestrator.test_search import GRID, HALTS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds Ray's processes through /proc"),
]
TRAINING = TWO_WORKERS[: TWO_WORKERS.index("  students:")]
LABELLING = TWO_WORKERS.replace("workers: 2", "labellers: 2")


@pytest.fixture
def cluster(tmp_path):
    """A head that drives and three nodes with a CPU each."""
    nodes = Watched(tmp_path)
    for _ in range(3):
        nodes.add()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """More images without labels than one labelling task takes."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (SHARD + 500, 8, 8), dtype=np.uint8)
    rows = []
    for one in pixels:
        data = io.BytesIO()
        Image.fromarray(one).save(data, "png")
        rows.append({"bytes": data.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows}), folder / "train-00000-of-00001.parquet")
    return folder


def answers(store):
    """The digest of every stage that is done, by its key."""
    return {key: json.loads(manifest)["digest"] for key, manifest in finished(store).items()}


def test_a_node_lost_in_training_leaves_no_trace_in_the_weights(cluster, tmp_path):
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    calm.mkdir()
    broken.mkdir()
    cluster.ask(None)
    expected = digests(cluster.start(calm, TRAINING, calm / "store").result())
    cluster.ask("Supervised 0.50")
    run = cluster.start(broken, TRAINING, broken / "store")
    workers = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(workers[0]))
    cluster.ask(None)
    assert digests(run.result()) == expected


def test_a_node_lost_in_labelling_leaves_no_trace_in_the_ledger(cluster, tmp_path, photos):
    recipe = LABELLING.replace("{from: digits/train, labels: false}", f"{{from: {photos}, labels: false}}")
    expected = run_unbroken(recipe, tmp_path / "unbroken")
    cluster.ask("labelling")
    run = cluster.start(tmp_path, recipe, tmp_path / "store")
    labellers = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(labellers[0]))
    cluster.ask(None)
    result = run.result()
    assert (digests(result), ledger(tmp_path / "store", result)) == expected
    (rows,) = ledger(tmp_path / "store", result)
    assert len(rows) == len({row["id"] for row in rows}) > SHARD  # nothing is labelled twice, nothing left out
    assert set(states(result).values()) <= {"ran", "stored", "resumed"}


def test_a_node_lost_in_a_search_costs_no_trial_and_changes_none(cluster, tmp_path):
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    calm.mkdir()
    broken.mkdir()
    cluster.ask(None)
    expected = cluster.start(calm, HALTS, calm / "store", "tune", GRID).result()["result"]
    cluster.ask("Supervised 0.50")
    run = cluster.start(broken, HALTS, broken / "store", "tune", (*GRID, "--concurrent", "2"))
    trials = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(trials[0]))
    cluster.ask(None)
    result = run.result()["result"]
    assert result["trials"] == expected["trials"] == {"finished": 3}
    assert result["best"] == expected["best"] and answers(broken / "store") == answers(calm / "store")
    (folder,) = (broken / "store" / "runs").iterdir()
    states = [[stage["state"] for stage in trial.stages] for trial in read_trials(folder)]
    assert sum("resumed" in told for told in states) == 1, states  # it went on from its checkpoint on another node
