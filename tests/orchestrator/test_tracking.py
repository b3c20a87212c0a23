"""Tracking: what was recorded arrives in MLflow once, whatever happened on the way. Real MLflow on SQLite."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch import nn

from orchestrator import tracking
from orchestrator.errors import UserError
from orchestrator.records import Recorder, read_records
from orchestrator.tracking import Sender, check_uri, send_all, serve, tracking_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database with its tables made, which takes MLflow two seconds: tests copy it."""
    folder = tmp_path_factory.mktemp("database")
    tracking._connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path, empty_database, monkeypatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    shutil.copyfile(empty_database, store / "mlflow.db")
    return store


SEND_ALL = """
import sys
from pathlib import Path
from orchestrator.tracking import send_all
print(send_all(Path(sys.argv[1]), uri=sys.argv[2], experiment="test"))
"""


def python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True, **options
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.rand(16, 3, 12, 12))  # moves the running statistics off their start
    return net


def use_uri(monkeypatch, uri: str) -> None:
    """What a user does with `mlflow.set_tracking_uri`, undone after the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)


def runs_of(store: Path, experiment: str = "test") -> dict:
    """MLflow's runs by name; each name must be there once."""
    client = MlflowClient(tracking_uri(store))
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    return runs


def history_of(store: Path, run, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(store)).get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def record_one(recorder: Recorder, run: str = "a", metrics: int = 3) -> None:
    recorder.start(run, parent=None, name=run, tags={}, params={"lr": 0.1})
    for step in range(metrics):
        recorder.metrics(run, {"loss": step / 4}, step)
    recorder.end(run, "FINISHED")


def send(store: Path, folder: Path, **options) -> str | None:
    return send_all(folder, uri=tracking_uri(store), experiment="test", **options)


def test_pipeline_stage_and_round_arrive_nested_with_their_values(store):
    folder = store / "run"
    recorder = Recorder(folder)
    sender = Sender(folder, uri=tracking_uri(store), experiment="test")
    sender.start()
    recorder.start("top", parent=None, name="pipeline", tags={"recipe": "r"}, params={})
    recorder.start("s", parent="top", name="pretrain", tags={}, params={"lr": 0.5, "betas": [0.9, 0.99], "opt": "lars"})
    recorder.start("r", parent="s", name="round 0", tags={"teacher": "3f9c"}, params={"long": "x" * 7000})
    for step in range(2500):
        recorder.metrics("r", {"loss": 1 / (1 + step), "a (odd) näme": step, "кот": step, "кит": -step}, step)
    recorder.data("r", "train", "d" * 64, "/data/train", "training")
    recorder.tags("s", {"verdict": "kept"})
    recorder.end("r", "FINISHED")
    recorder.end("s", "FAILED")
    recorder.end("top", "KILLED")
    assert sender.finish(60) is None

    runs = runs_of(store)
    top, stage, round_ = runs["pipeline"], runs["pretrain"], runs["round 0"]
    assert "mlflow.parentRunId" not in top.data.tags and top.data.tags["recipe"] == "r"
    assert stage.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert round_.data.tags["mlflow.parentRunId"] == stage.info.run_id
    assert [run.info.status for run in (top, stage, round_)] == ["KILLED", "FAILED", "FINISHED"]
    assert stage.data.params == {"lr": "0.5", "betas": "[0.9, 0.99]", "opt": "lars"}
    assert stage.data.tags["verdict"] == "kept"
    assert len(round_.data.params["long"]) == 6000
    assert round_.data.params["long"].endswith("x … cut, 7000 characters")
    assert history_of(store, round_, "loss") == [(step, 1 / (1 + step)) for step in range(2500)]
    assert history_of(store, round_, "a _odd_ näme") == [(step, step) for step in range(2500)]
    assert [history_of(store, round_, name)[7] for name in ("кот", "кит")] == [(7, 7), (7, -7)]  # not one curve
    (data,) = round_.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("train", "d" * 36)
    assert json.loads(data.dataset.profile) == {"digest": "d" * 64}
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}
    assert sorted(os.listdir()) == ["store"]  # nothing is left in the working directory


def test_numbers_that_are_not_finite_arrive_as_mlflow_keeps_them(store):
    recorder = Recorder(store / "run")
    recorder.start("a", parent=None, name="a", tags={}, params={})
    recorder.metrics("a", {"nan": math.nan, "up": math.inf, "down": -math.inf, "tensor": torch.tensor(0.25)}, 7)
    recorder.end("a", "FINISHED")
    for line in (store / "run" / "records.jsonl").read_text().splitlines():
        json.loads(line or "0", parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert send(store, store / "run") is None
    metrics = runs_of(store)["a"].data.metrics
    largest = sys.float_info.max
    assert math.isnan(metrics["nan"])
    assert (metrics["up"], metrics["down"], metrics["tensor"]) == (largest, -largest, 0.25)


def test_figures_and_notes_arrive_under_their_names_in_a_store_with_odd_letters(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "Größe 100% (b)#c"
    folder = store / "runs" / "run 1"
    recorder = Recorder(folder)
    (folder / "curve.png").write_bytes(b"png")
    (store / "artifacts" / "notes").mkdir(parents=True)
    (store / "artifacts" / "notes" / "n.md").write_text("n")
    record_one(recorder)
    recorder.artifact("a", Path("curve.png"), "figures/accuracy by round.png")
    recorder.artifact("a", folder / "curve.png", "curve.png")
    recorder.artifact("a", store / "artifacts" / "notes", "notes")
    assert send(store, folder) is None
    assert (store / "mlflow.db").is_file()
    run = runs_of(store)["a"]
    kept = store / "mlflow-artifacts" / run.info.run_id / "artifacts"
    files = {str(path.relative_to(kept)): path.read_text() for path in kept.rglob("*") if path.is_file()}
    assert files == {"figures/accuracy by round.png": "png", "curve.png": "png", "notes/n.md": "n"}


def test_a_moved_store_keeps_its_figures_and_writes_to_its_new_place(store):
    folder = store / "run"
    recorder = Recorder(folder)
    recorder.start("a", parent=None, name="a", tags={}, params={})
    recorder.artifact("a", folder / "records.jsonl", "before")
    assert send(store, folder) is None
    (folder / "note.txt").write_text("n")
    recorder.artifact("a", folder / "note.txt", "note.txt")
    moved = store.rename(store.with_name("moved"))
    # A process of its own: MLflow remembers in memory where a run's artifacts go.
    answer = python(SEND_ALL, moved / "run", tracking_uri(moved))
    assert answer.stdout == "None\n", answer.stderr
    assert not store.exists()
    run = runs_of(moved)["a"]
    client = MlflowClient(tracking_uri(moved))
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["before", "note.txt"]
    assert (moved / "mlflow-artifacts" / run.info.run_id / "artifacts" / "note.txt").read_text() == "n"


def test_resume_continues_the_run_and_tells_a_changed_parameter_as_a_tag(store):
    recorder = Recorder(store / "run")
    recorder.start("a", parent=None, name="a", tags={"try": "1"}, params={"lr": 0.1, "same": "x"})
    recorder.metrics("a", {"loss": 2.0}, 0)
    recorder.end("a", "KILLED")
    assert send(store, store / "run") is None
    first = runs_of(store)["a"]
    again = Recorder(store / "run")
    again.start("a", parent=None, name="a", tags={"try": "2"}, params={"lr": 0.2, "same": "x", "new": 1})
    assert send(store, store / "run") is None
    assert runs_of(store)["a"].info.status == "RUNNING"
    again.metrics("a", {"loss": 1.0}, 1)
    again.end("a", "FINISHED")
    assert send(store, store / "run") is None
    run = runs_of(store)["a"]
    assert run.info.run_id == first.info.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "same": "x", "new": "1"}
    assert (run.data.tags["changed.lr"], run.data.tags["try"]) == ("0.2", "2")
    assert "changed.same" not in run.data.tags
    assert history_of(store, run, "loss") == [(0, 2.0), (1, 1.0)]


def test_after_an_outage_everything_is_sent_once(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, folder = tmp_path / "store", tmp_path / "run"
    store.write_text("a file where the database's folder should be")
    recorder = Recorder(folder)
    sender = Sender(folder, uri=tracking_uri(store), experiment="test")
    sender.start()
    record_one(recorder, metrics=4)
    message = sender.finish(60)
    assert message.startswith(f"6 tracking records wait in {folder / 'records.jsonl'}: MLflow at sqlite:///{store}")
    assert "`orchestrator sync`" in message

    store.unlink()
    store.mkdir()
    shutil.copyfile(empty_database, store / "mlflow.db")
    assert send(store, folder) is None
    assert send(store, folder) is None
    run = runs_of(store)["a"]
    assert run.info.status == "FINISHED"
    assert history_of(store, run, "loss") == [(step, step / 4) for step in range(4)]


@pytest.mark.parametrize("call", ["create_run", "log_batch", "set_terminated", "log_artifact", "log_inputs"])
@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_lost_request_or_answer_neither_loses_nor_doubles(store, monkeypatch, call, lost):
    folder = store / "run"
    recorder = Recorder(folder)
    recorder.start("a", parent=None, name="a", tags={"t": "1"}, params={"lr": 0.1})
    for step in range(1200):
        recorder.metrics("a", {"loss": step, "nan": math.nan}, step)
    recorder.artifact("a", folder / "records.jsonl", "records.jsonl")
    recorder.data("a", "train", "0" * 8, "/data", "training")
    recorder.end("a", "FINISHED")
    real, calls = getattr(MlflowClient, call), []

    def flaky(self, *args, **kwargs):
        calls.append(call)
        if len(calls) % 2 == 1:
            if lost == "answer":
                real(self, *args, **kwargs)
            raise MlflowException("API request failed: connection reset by peer")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, call, flaky)
    answers = [send(store, folder)]
    while answers[-1] is not None and len(answers) < 20:
        assert "connection reset by peer" in answers[-1]
        answers.append(send(store, folder))
    assert answers[-1] is None and len(calls) >= (2 if lost == "request" else 1)
    run = runs_of(store)["a"]
    assert history_of(store, run, "loss") == [(step, step) for step in range(1200)]
    assert len(history_of(store, run, "nan")) == 1200
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.1"} and run.data.tags["t"] == "1"
    assert len(run.inputs.dataset_inputs) == 1


def test_artifacts_that_cannot_be_stored_do_not_hold_up_the_metrics(store, monkeypatch):
    folder = store / "run"
    recorder = Recorder(folder)
    recorder.start("a", parent=None, name="a", tags={}, params={})
    recorder.artifact("a", folder / "records.jsonl", "records.jsonl")
    recorder.metrics("a", {"loss": 1.0}, 0)
    recorder.end("a", "FINISHED")
    with monkeypatch.context() as patch:

        def fail(*args, **kwargs):
            raise ConnectionError("no credentials for the bucket")

        patch.setattr(MlflowClient, "log_artifact", fail)
        message = send(store, folder)
    assert message.startswith("1 tracking record waits") and "no credentials for the bucket" in message
    run = runs_of(store)["a"]
    assert run.info.status == "FINISHED" and history_of(store, run, "loss") == [(0, 1.0)]
    assert send(store, folder) is None
    assert [file.path for file in MlflowClient(tracking_uri(store)).list_artifacts(run.info.run_id)] == [
        "records.jsonl"
    ]


def test_a_record_mlflow_will_never_take_is_named_and_passed_over(store):
    recorder = Recorder(store / "run")
    recorder.metrics("never started", {"loss": 1.0}, 0)
    recorder.start("a", parent=None, name="a", tags={}, params={})
    recorder.artifact("a", Path("missing.png"), "missing.png")
    recorder.tags("a", {"after": "yes"})
    message = send(store, store / "run")
    assert message.startswith("MLflow refused 2 tracking record(s), first: metrics of run 'never started'")
    assert runs_of(store)["a"].data.tags["after"] == "yes"
    assert send(store, store / "run") is None


def test_an_emptied_database_gets_everything_again(store, empty_database):
    recorder = Recorder(store / "run")
    record_one(recorder)
    assert send(store, store / "run") is None
    (store / "mlflow.db").unlink()
    shutil.copyfile(empty_database, store / "mlflow.db")
    # A process of its own: MLflow keeps the old file open in this one.
    code = (
        SEND_ALL
        + """
from mlflow import MlflowClient
client = MlflowClient(sys.argv[2])
(run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
print([metric.value for metric in client.get_metric_history(run.info.run_id, "loss")])
"""
    )
    answer = python(code, store / "run", tracking_uri(store))
    assert answer.stdout == "None\n[0.0, 0.25, 0.5]\n", answer.stderr


def test_losing_or_damaging_the_progress_file_doubles_nothing(store):
    folder = store / "run"
    record_one(Recorder(folder))
    assert send(store, folder) is None
    for damage in (None, b"", b"\0" * 50, b'{"uri": 3}'):
        (folder / "mlflow.json").unlink() if damage is None else (folder / "mlflow.json").write_bytes(damage)
        assert send(store, folder) is None
        assert history_of(store, runs_of(store)["a"], "loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_a_server_that_refuses_connections_is_named_without_its_password(tmp_path):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        record_one(Recorder(tmp_path))
        sender = Sender(tmp_path, uri=f"http://ann:secret@127.0.0.1:{port}", experiment="test")
        sender.start()
        message = sender.finish(60)
    assert message.startswith("5 tracking records wait") and f"http://127.0.0.1:{port}" in message
    assert "secret" not in message
    assert all(b"secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_server_that_never_answers_blocks_nothing(tmp_path):
    accepted, release = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept_and_be_silent():
            connection, _ = listener.accept()
            accepted.set()
            release.wait()
            connection.close()

        silent = threading.Thread(target=accept_and_be_silent)
        silent.start()
        sender = Sender(tmp_path, uri=f"http://127.0.0.1:{listener.getsockname()[1]}", experiment="test")
        sender.start()
        assert accepted.wait(60)
        # The request hangs now. That the calls below return at all is the claim; the server answers only after them.
        record_one(Recorder(tmp_path), metrics=1500)
        message = sender.finish(0.2)
        release.set()
        silent.join()
    assert message.startswith("1502 tracking records wait")
    assert len([1 for record, _ in read_records(tmp_path) if record["kind"] == "metrics"]) == 1500


SENDING = """
import sys, time
from pathlib import Path
from orchestrator.records import Recorder
from orchestrator.tracking import Sender
folder = Path(sys.argv[1])
recorder = Recorder(folder)
sender = Sender(folder, uri=sys.argv[2], experiment="test")
sender.start()
recorder.start("a", parent=None, name="a", tags={}, params={"lr": 1})
for step in range(6000):
    recorder.metrics("a", {"loss": step, "top1": step / 2}, step)
recorder.flush()
print("recorded", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("sent", [0.0, 0.5], ids=lambda sent: f"after {sent:.0%}")
def test_killed_while_sending_then_sent_later_gives_each_metric_once(store, sent):
    folder = store / "run"
    arguments = [sys.executable, "-c", SENDING, str(folder), tracking_uri(store)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "recorded\n"
        records = folder / "records.jsonl"
        while True:
            progress = tracking._Progress.read(folder)
            if progress is not None and progress.offset > sent * records.stat().st_size:
                break
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert send(store, folder) is None
    run = runs_of(store)["a"]
    assert history_of(store, run, "loss") == [(step, step) for step in range(6000)]
    assert history_of(store, run, "top1") == [(step, step / 2) for step in range(6000)]


def test_two_processes_record_into_one_file(store):
    folder = store / "run"
    recorder = Recorder(folder)
    recorder.start("top", parent=None, name="top", tags={}, params={})
    code = """
import pickle, sys
recorder = pickle.loads(bytes.fromhex(sys.argv[1]))
recorder.start(sys.argv[2], parent="top", name=sys.argv[2], tags={}, params={})
for step in range(3000):
    recorder.metrics(sys.argv[2], {"loss": step}, step)
    if step % 7 == 0:
        recorder.flush()
recorder.end(sys.argv[2], "FINISHED")
"""
    command = [sys.executable, "-c", code, pickle.dumps(recorder).hex()]
    workers = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("left", "right")]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert send(store, folder) is None
    runs = runs_of(store)
    for name in ("left", "right"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["top"].info.run_id
        assert history_of(store, runs[name], "loss") == [(step, step) for step in range(3000)]


def test_a_second_sender_leaves_the_records_to_the_first(store):
    record_one(Recorder(store / "run"))
    first = Sender(store / "run", uri=tracking_uri(store), experiment="test")
    first._lock_folder()
    assert "5 tracking records wait" in send(store, store / "run")
    assert "another process is sending" in send(store, store / "run")
    first._unlock()
    assert send(store, store / "run") is None


def test_several_processes_may_open_a_fresh_database_at_once(tmp_path):
    code = "import sys; from orchestrator.tracking import _connect; _connect(sys.argv[1])"
    command = [sys.executable, "-c", code, tracking_uri(tmp_path / "new")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]  # nor is anything printed
    assert [process.returncode for process in processes] == [0, 0]


def test_a_registered_model_loads_by_alias_and_answers_as_before_even_in_a_moved_store(store, net, monkeypatch):
    import mlflow

    folder = store / "run"
    recorder = Recorder(folder)
    record_one(recorder)
    recorder.model("a", key="3f9c", registered_name="cifar/student", alias="champion")
    loaded = []

    def load_model(key):
        loaded.append(key)
        return net, np.zeros((1, 3, 12, 12), np.float32)

    # The registry's answer is lost once: going on must not register a second version.
    real = MlflowClient.create_model_version
    with monkeypatch.context() as patch:

        def lose_answer(self, *args, **kwargs):
            real(self, *args, **kwargs)
            raise ConnectionError("reset by peer")

        patch.setattr(MlflowClient, "create_model_version", lose_answer)
        assert "1 tracking record waits" in send(store, folder, load_model=load_model)
    assert send(store, folder, load_model=load_model) is None
    recorder.model("a", key="3f9c", registered_name="cifar/student", alias="newest")
    assert send(store, folder, load_model=load_model) is None
    assert loaded == ["3f9c"]

    client = MlflowClient(tracking_uri(store))
    (version,) = client.search_model_versions("name = 'cifar-student'")
    run = runs_of(store)["a"]
    assert version.run_id == run.info.run_id and version.tags["orchestrator.model"] == "3f9c"
    assert len(run.outputs.model_outputs) == 1
    use_uri(monkeypatch, tracking_uri(store))
    images = torch.rand(7, 3, 12, 12)
    for alias in ("champion", "newest"):
        model = mlflow.pytorch.load_model(f"models:/cifar-student@{alias}")
        torch.testing.assert_close(model(images), net.eval()(images))
    info = mlflow.models.get_model_info("models:/cifar-student@champion")
    assert info.signature.inputs.inputs[0].shape == (-1, 3, 12, 12)
    assert info.signature.outputs.inputs[0].shape == (-1, 5)
    assert not list(store.rglob("*.pkl")) and not list(store.rglob("*.pth"))

    moved = store.rename(store.with_name("moved"))
    use_uri(monkeypatch, f"sqlite:///{moved}/mlflow.db")
    assert send(moved, moved / "run") is None
    torch.testing.assert_close(mlflow.pytorch.load_model("models:/cifar-student@newest")(images), net.eval()(images))


def test_models_are_traced_only_once_training_is_over(store, net):
    folder = store / "run"
    recorder = Recorder(folder)
    sender = Sender(folder, uri=tracking_uri(store), experiment="test", load_model=lambda key: pytest.fail("too early"))
    record_one(recorder)
    recorder.model("a", key="3f9c", registered_name="student", alias="champion")
    recorder.tags("a", {"after": "yes"})
    assert sender._attempt(finishing=False)
    sender._unlock()
    assert runs_of(store)["a"].data.tags["after"] == "yes"
    assert "1 tracking record waits" in sender._summary()
    assert send(store, folder, load_model=lambda key: (net, np.zeros((2, 3, 12, 12), np.float32))) is None


def test_a_model_that_cannot_be_exported_is_named_and_passed_over(store):
    recorder = Recorder(store / "run")
    record_one(recorder)
    recorder.model("a", key="3f9c", registered_name="student", alias="champion")

    def load_model(key):
        raise RuntimeError("no such artifact")

    message = send(store, store / "run", load_model=load_model)
    assert "refused 1" in message and "artifact 3f9c cannot be exported: no such artifact" in message
    assert send(store, store / "run") is None


def test_recording_and_importing_need_no_mlflow(tmp_path):
    code = """
import sys
from pathlib import Path
from orchestrator.records import Recorder
from orchestrator.tracking import Sender, tracking_uri
recorder = Recorder(Path(sys.argv[1]))
recorder.start("a", parent=None, name="a", tags={}, params={})
recorder.metrics("a", {"loss": 1}, 0)
Sender(Path(sys.argv[1]), uri=tracking_uri(Path(sys.argv[1])), experiment="e")
print([name for name in ("mlflow", "torch", "numpy") if name in sys.modules])
"""
    answer = python(code, tmp_path)
    assert answer.stdout.strip() == "[]", answer.stderr


# Where to


def test_the_environment_decides_and_else_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(tmp_path) == "http://tracker:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " ")
    assert tracking_uri(Path("/a b/ü")) == "sqlite:////a b/ü/mlflow.db"


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000",
        "https://ann:pw@mlflow.example.org/team",
        "sqlite:////data/a b/mlflow.db",
        "sqlite:///mlflow.db",
        "postgresql+psycopg2://ann:pw@host/mlflow",
        "databricks",
        "databricks://profile",
    ],
)
def test_uris_mlflow_knows_pass(uri):
    check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("htp://host:5000", "unknown scheme 'htp'; did you mean http?"),
        ("postgres://ann:secret@host/db", "unknown scheme 'postgres'; did you mean postgresql?"),
        ("http://", "names no host"),
        ("http://host:port", "write it as http://host:5000"),
        ("./mlruns", "use sqlite:"),
        ("file:///data/mlruns", "use sqlite:"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql:host", "write it as mysql://user:password@host/database"),
        ("", "use sqlite:"),
    ],
)
def test_uris_that_cannot_be_right_are_an_error_at_once(tmp_path, uri, part):
    with pytest.raises(UserError) as error:
        Sender(tmp_path, uri=uri, experiment="test")
    assert part in str(error.value) and "secret" not in str(error.value)


# The page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_taken_port_is_named_with_a_free_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1: Address already in use; \d+ is free: --port"):
            serve(tmp_path, port=port)
    with pytest.raises(UserError, match=r"host 192\.0\.2\.1: .*; give an address of this machine"):
        serve(tmp_path, host="192.0.2.1", port=free_port())


def test_a_store_on_a_server_has_that_servers_page(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@tracker:5000")
    with pytest.raises(UserError, match="are at http://tracker:5000, which has its own page"):
        serve(tmp_path)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_only_loopback_addresses_go_without_a_warning(host, loopback):
    assert tracking._is_loopback(host) is loopback


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the server's process id from /proc")
def test_the_page_shows_the_store_takes_records_over_http_and_ends_with_its_processes(store, net):
    record_one(Recorder(store / "run"), metrics=2)
    assert send(store, store / "run") is None
    port = free_port()
    code = "import signal, sys; from pathlib import Path; from orchestrator.tracking import serve; " + (
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore Ctrl-C
        "sys.exit(serve(Path(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(store), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert "takes some seconds" in process.stdout.readline()
        assert process.stdout.readline().endswith(f"is shown at http://127.0.0.1:{port} (Ctrl-C stops it)\n")
        remote = Recorder(store / "remote")
        record_one(remote, run="b", metrics=1200)
        remote.model("b", key="77aa", registered_name="remote", alias="champion")
        remote.artifact("b", store / "remote" / "records.jsonl", "log/records.jsonl")
        address = f"http://127.0.0.1:{port}"
        example = np.zeros((2, 3, 12, 12), np.float32)
        for _ in range(2):
            assert send_all(
                store / "remote", uri=address, experiment="test", load_model=lambda key: (net, example)
            ) is None  # fmt: skip
        client = MlflowClient(address)
        assert client.get_model_version_by_alias("remote", "champion").tags == {"orchestrator.model": "77aa"}
        assert len(client.get_metric_history(runs_of(store)["b"].info.run_id, "loss")) == 1200
        assert [file.path for file in client.list_artifacts(runs_of(store)["b"].info.run_id, "log")] == [
            "log/records.jsonl"
        ]
        group = [int(line) for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert group
    finally:
        process.send_signal(signal.SIGINT)
        answer = process.wait(30)
        process.stdout.close()
    assert answer == 0
    for leader in group:
        with pytest.raises(ProcessLookupError):
            os.killpg(leader, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert set(runs_of(store)) == {"a", "b"}
