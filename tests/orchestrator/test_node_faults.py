"""Whole nodes die, of several on one machine: the run goes on elsewhere to the answers of an undisturbed one."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.context import SHARD
from orchestrator.search.trials import read_trials
from tests.orchestrator.ray_nodes import BIN, DEADLINE, Nodes, eventually
from tests.orchestrator.test_faults import TWO_WORKERS, digests, finished, ledger, run_unbroken, states
from tests.orchestrator.test_search import GRID, HALTS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds Ray's processes through /proc"),
]
TRAINING = TWO_WORKERS[: TWO_WORKERS.index("  students:")]
LABELLING = TWO_WORKERS.replace("workers: 2", "labellers: 2")


class Watched(Nodes):
    """Nodes whose methods wait at a moment, as `halting` tells."""

    def __init__(self, place):
        self.halt = place / "halt"
        self.halt.mkdir()
        super().__init__(environment={"HALT_FOLDER": str(self.halt)})

    def ask(self, moment):
        """Have processes wait at a moment, or with None let all go on."""
        for old in self.halt.glob("reached-*"):
            old.unlink()
        part = self.halt / "part"
        part.write_text(moment or "never")
        part.rename(self.halt / "at")

    def reached(self, run, processes=1):
        """The ids of the processes that wait."""

        def look():
            assert run.poll() is None, run.output.read_text() + self.logs()
            found = [int(path.name.removeprefix("reached-")) for path in self.halt.glob("reached-*")]
            return found if len(found) >= processes else None

        return eventually(look, lambda: f"{processes} processes at the moment; {run.output.read_text()}")

    def node_of(self, pid):
        """The address of the node that a process runs on."""
        for number, node in enumerate(self.nodes, 1):
            with contextlib.suppress(psutil.Error):
                if pid in {process.pid for process in psutil.Process(node.pid).children(recursive=True)}:
                    return f"127.0.0.{number}"
        raise AssertionError(f"{pid} runs on no node")

    def start(self, place, recipe, store, verb="run", options=()):
        """`orchestrator run`, or another command with its options, on a machine of the cluster."""
        file, output = place / "recipe.yaml", place / "err"
        file.write_text(recipe, encoding="utf-8")
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        command = [BIN / "orchestrator", verb, file, *options, "--store", store, "--json"]
        with (place / "out").open("wb") as out, output.open("wb") as err:
            run = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=place, start_new_session=True)
        run.output, run.answer = output, place / "out"
        self.runs.append(run)
        return run

    runs: list = []

    def result(self, run):
        """What a run that ends well printed for machines."""
        assert run.wait(DEADLINE) == 0, run.output.read_text()
        return json.loads(run.answer.read_text(encoding="utf-8"))

    def close(self):
        for run in self.runs:
            with contextlib.suppress(ProcessLookupError):
                run.kill()
            run.wait(DEADLINE)
        super().close()


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
    expected = digests(cluster.result(cluster.start(calm, TRAINING, calm / "store")))
    cluster.ask("Supervised 0.50")
    run = cluster.start(broken, TRAINING, broken / "store")
    workers = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(workers[0]))
    cluster.ask(None)
    assert digests(cluster.result(run)) == expected


def test_a_node_lost_in_labelling_leaves_no_trace_in_the_ledger(cluster, tmp_path, photos):
    recipe = LABELLING.replace("{from: digits/train, labels: false}", f"{{from: {photos}, labels: false}}")
    expected = run_unbroken(recipe, tmp_path / "unbroken")
    cluster.ask("labelling")
    run = cluster.start(tmp_path, recipe, tmp_path / "store")
    labellers = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(labellers[0]))
    cluster.ask(None)
    result = cluster.result(run)
    assert (digests(result), ledger(tmp_path / "store", result)) == expected
    (rows,) = ledger(tmp_path / "store", result)
    assert len(rows) == len({row["id"] for row in rows}) > SHARD  # nothing is labelled twice, nothing left out
    assert set(states(result).values()) <= {"ran", "stored", "resumed"}


def test_a_node_lost_in_a_search_costs_no_trial_and_changes_none(cluster, tmp_path):
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    calm.mkdir()
    broken.mkdir()
    cluster.ask(None)
    expected = cluster.result(cluster.start(calm, HALTS, calm / "store", "tune", GRID))["result"]
    cluster.ask("Supervised 0.50")
    run = cluster.start(broken, HALTS, broken / "store", "tune", (*GRID, "--concurrent", "2"))
    trials = cluster.reached(run, processes=2)
    cluster.kill(cluster.node_of(trials[0]))
    cluster.ask(None)
    result = cluster.result(run)["result"]
    assert result["trials"] == expected["trials"] == {"finished": 3}
    assert result["best"] == expected["best"] and answers(broken / "store") == answers(calm / "store")
    (folder,) = (broken / "store" / "runs").iterdir()
    states = [[stage["state"] for stage in trial.stages] for trial in read_trials(folder)]
    assert sum("resumed" in told for told in states) == 1, states  # it went on from its checkpoint on another node
