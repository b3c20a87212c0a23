"""MLflow: what a run recorded is sent there beside the run, so that a dead server slows nothing and loses nothing.

A `Sender`, one daemon thread in the driver, tails the run's `records.jsonl` (`orchestrator.records`) and sends what is
new in batches; `mlflow.json` beside it says how far it got. Every step is safe to repeat: MLflow runs carry the
identity of the record that started them, and a metric sent twice is one row, because its time is part of the record
(measured on MLflow 3.17 with SQLite). So an outage, a kill or a later `send_all` ends with each record in MLflow once.

This is the only module that imports mlflow, and only inside the sender: the import costs over a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import ipaddress
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from orchestrator.errors import UserError, nearest
from orchestrator.records import RECORDS, read_records

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

log = logging.getLogger(__name__)

LoadModel = Callable[[str], "tuple[nn.Module, np.ndarray]"]

PROGRESS = "mlflow.json"
_ARTIFACTS = "mlflow-artifacts"  # folder beside a local database

_POLL_SECONDS = 0.5
_FIRST_PAUSE_SECONDS = 1.0  # after an outage; doubles up to the longest
_LONGEST_PAUSE_SECONDS = 60.0
_BATCH_METRICS = 1000  # MLflow's limits for one log_batch: mlflow/utils/validation.py
_BATCH_PARAMS = 100
_KEY_CHARACTERS = 250
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_DIGEST_CHARACTERS = 36
_RUN_TAG = "orchestrator.run"  # identity of the record that started the run: what makes sending again harmless
_MODEL_TAG = "orchestrator.model"  # key of the artifact the model was made of


# Where to ------------------------------------------------------------------------------------------------------------


def tracking_uri(store: Path) -> str:
    """MLFLOW_TRACKING_URI when it is set, else an SQLite database inside the store."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if given:
        return given
    # SQLAlchemy reads "%" as an escape and "?" as the start of options; every other character may stand as it is.
    path = str(Path(store).absolute() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}"


_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https")
_SPECIAL = ("databricks",)


def check_uri(uri: str) -> None:
    """Whether MLflow could understand this tracking URI; asks no server and imports nothing.

    Raises:
        UserError: an unknown scheme, a server without a host, or a folder, which MLflow 3 no longer writes to.
    """
    shown = f"tracking URI {_without_password(uri)!r}"
    scheme, colon, rest = uri.partition(":")
    database = scheme.partition("+")[0]
    plugins = {point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    if scheme == "file" or not colon and uri not in _SPECIAL:
        raise UserError(f"{shown}: MLflow does not write to plain folders any more; use sqlite:////folder/mlflow.db")
    if scheme in _SERVERS:
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{shown}: {error}; write it as http://host:5000") from None
        if not host:
            raise UserError(f"{shown} names no host; write it as http://host:5000")
    elif database == "sqlite":
        file = _sqlite_file(uri)
        if not rest.startswith("///") or file is None or file.name in ("", ":memory:"):
            raise UserError(f"{shown} names no file; write it as sqlite:////folder/mlflow.db")
    elif database in _DATABASES:
        if not rest.startswith("//"):
            raise UserError(f"{shown}: write it as {scheme}://user:password@host/database")
    elif scheme not in _SPECIAL and scheme not in plugins:
        known = sorted({*_DATABASES, *_SERVERS, *_SPECIAL, *plugins})
        raise UserError(f"{shown}: unknown scheme {scheme!r}{nearest(scheme, known)}; MLflow knows {', '.join(known)}")


def _without_password(uri: str) -> str:
    """The URI as it may be shown and stored: user and password are left out."""
    return re.sub(r"//[^/]*@", "//", uri)


def _sqlite_file(uri: str) -> Path | None:
    """The database's file, or None for anything that is not SQLite."""
    if not re.match(r"sqlite(\+\w+)?:///", uri):
        return None
    path = uri.split(":///", 1)[1].partition("?")[0]
    return Path(path.replace("%3F", "?").replace("%25", "%")).absolute()


def _artifact_root(uri: str) -> str | None:
    """Where artifacts of a local database go: beside it. A server decides for itself."""
    file = _sqlite_file(uri)
    return None if file is None else (file.parent / _ARTIFACTS).as_uri()


def _follow_move(uri: str, old: str, new: str) -> None:
    """Point a local database at its artifacts again after the store was moved or mounted elsewhere.

    MLflow keeps absolute places and has no call to change them; left alone, it would write to the old one.
    """
    file = _sqlite_file(uri)
    assert file is not None
    places = {
        "experiments": ["artifact_location"],
        "runs": ["artifact_uri"],
        "logged_models": ["artifact_location"],
        "model_versions": ["source", "storage_location"],
    }
    with contextlib.closing(sqlite3.connect(file, timeout=20)) as database, database:
        for table, columns in places.items():
            for column in columns:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


# Sending -------------------------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """How far a folder's records were sent, and where to. Kept in `mlflow.json`, replaced by one rename."""

    uri: str
    experiment: str
    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)  # our run → MLflow's run id
    aside: list[dict[str, Any]] = field(default_factory=list)  # models, and artifacts whose storage did not answer

    @staticmethod
    def read(folder: Path) -> _Progress | None:
        try:
            return _Progress(**json.loads((folder / PROGRESS).read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: sending from the start again is harmless
            return None

    def save(self, folder: Path) -> None:
        temporary = folder / f"{PROGRESS}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / PROGRESS)


class Sender:
    """Sends a folder's records to MLflow from a daemon thread. Only `finish` waits for the server, up to its limit.

    Args:
        folder: the run's folder, with `records.jsonl` in it, now or later.
        uri: MLflow's tracking URI.
        experiment: the experiment's name; made when missing, in a local database with its artifacts beside it.
        load_model: artifact key → (module, example images (B, C, H, W) float32) for the registry. Called only in
            `finish` and `send_all`: tracing a model sets flags for all of torch (`torch.compiler.is_compiling`), which
            training in the same process must not see.
    Raises:
        UserError: the URI cannot be right.
    """

    def __init__(self, folder: Path, *, uri: str, experiment: str, load_model: LoadModel | None = None) -> None:
        check_uri(uri)
        self.folder, self.uri, self.experiment, self.load_model = Path(folder), uri, experiment, load_model
        self._finishing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._lock: int | None = None
        self._client: Any = None
        self._experiment_id = ""
        self._progress = _Progress("", "")
        self._problem = "not tried yet"  # why the last attempt ended early
        self._refused: list[str] = []  # what MLflow said to records that it will never take

    def start(self) -> None:
        """Begin to send. Returns at once."""
        self._thread.start()

    def finish(self, timeout_seconds: float) -> str | None:
        """Send what is left, models included, and stop.

        Returns:
            None when everything arrived; else a line: how many records wait, where, why, and what sends them.
        """
        self._finishing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        self._abandoned.set()  # a thread that still hangs in a request stops after it
        return self._summary()

    def send_now(self) -> str | None:
        """One attempt in this thread, models included; the same answer as `finish`."""
        try:
            self._attempt(finishing=True)
        finally:
            self._unlock()
        return self._summary()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._abandoned.is_set():
            finishing = self._finishing.is_set()
            sent = self._attempt(finishing)
            if finishing:
                break
            self._finishing.wait(_POLL_SECONDS if sent else pause)
            pause = _FIRST_PAUSE_SECONDS if sent else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._unlock()

    def _attempt(self, finishing: bool) -> bool:
        """Send all that is new. False after an outage of whatever kind: tracking must never end a run."""
        try:
            self._lock_folder()
            self._open()
            self._send_records()
            if finishing:
                self._send_aside()
        except Exception as error:
            self._problem = _first_line(error)
            log.debug("sending to MLflow failed", exc_info=True)
            return False
        self._problem = ""
        return True

    def _summary(self) -> str | None:
        # Read from the file, not from the thread's memory: the thread may still hang in a request.
        progress = _Progress.read(self.folder)
        if progress is None or (progress.uri, progress.experiment) != (_without_password(self.uri), self.experiment):
            progress = _Progress("", "")
        waiting = len(progress.aside) + sum(1 for _ in read_records(self.folder, progress.offset))
        lines = []
        if waiting:
            wait = "record waits" if waiting == 1 else "records wait"
            lines.append(
                f"{waiting} tracking {wait} in {self.folder / RECORDS}: MLflow at {_without_password(self.uri)}: "
                f"{self._problem or 'the time was up'}; the next run, or `orchestrator sync`, sends what waits"
            )
        if self._refused:
            lines.append(f"MLflow refused {len(self._refused)} tracking record(s), first: {self._refused[0]}")
        return "; ".join(lines) or None

    def _lock_folder(self) -> None:
        """One sender a folder: two at once would create each run twice."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / f"{PROGRESS}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise BlockingIOError("another process is sending these records") from None
            self._lock = lock

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            self._client = None  # another sender may go on from here: read its progress before sending again

    def _open(self) -> None:
        """Connect, find or make the experiment, and read how far the last sender got."""
        if self._client is not None:
            return
        client = _connect(self.uri)
        here = _without_password(self.uri)
        progress = _Progress.read(self.folder)
        if progress is None or (progress.uri, progress.experiment) != (here, self.experiment):
            progress = _Progress(here, self.experiment)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # A new or emptied database: whatever the old progress says was sent is not there. Saved before the
            # experiment exists, so that a crash in between cannot leave the two out of step.
            progress = _Progress(here, self.experiment)
            progress.save(self.folder)
            with contextlib.suppress(_mlflow_exception()):  # somebody else may make it first
                client.create_experiment(
                    self.experiment,
                    artifact_location=_artifact_root(self.uri),
                    tags={"mlflow.experimentKind": "custom_model_development"},  # the UI opens on runs, not on traces
                )
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise ConnectionError(f"MLflow did not make the experiment {self.experiment!r}")
        root = _artifact_root(self.uri)
        if root is not None and found.artifact_location != root and found.artifact_location.endswith(_ARTIFACTS):
            _follow_move(self.uri, found.artifact_location, root)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        with contextlib.suppress(FileNotFoundError):
            if progress.offset > (self.folder / RECORDS).stat().st_size:  # cut short, by a machine that lost its power
                progress.offset = 0
        self._client, self._experiment_id, self._progress = client, found.experiment_id, progress

    def _send_records(self) -> None:
        metrics: dict[str, list[Any]] = {}
        count, reached = 0, self._progress.offset

        def send_metrics() -> None:
            nonlocal count
            for run, values in metrics.items():
                self._try({"kind": "metrics", "run": run, "metrics": values}, self._log_metrics)
            metrics.clear()
            count = 0
            self._advance(reached)

        for record, end in read_records(self.folder, self._progress.offset):
            if self._abandoned.is_set():
                return
            if record["kind"] == "metrics":
                new = self._try(record, _mlflow_metrics) or []
                metrics.setdefault(record["run"], []).extend(new)
                count, reached = count + len(new), end
                if count >= _BATCH_METRICS:
                    send_metrics()
                continue
            if reached > self._progress.offset:
                send_metrics()
            self._send(record)
            self._advance(end)
            reached = end
        if reached > self._progress.offset:
            send_metrics()

    def _advance(self, offset: int) -> None:
        self._progress.offset = offset
        self._progress.save(self.folder)

    def _send(self, record: dict[str, Any]) -> None:
        kinds = {"start": self._start, "tags": self._tags, "data": self._data, "end": self._end}
        kind = record["kind"]
        if kind == "model":
            self._progress.aside.append(record)
        elif kind == "artifact":
            # Artifacts may live in another place than the database, with its own outages and passwords: they wait
            # aside, so that one that cannot be stored does not hold up the metrics behind it.
            try:
                self._try(record, self._artifact)
            except Exception as error:
                self._problem = _first_line(error)
                self._progress.aside.append(record)
        elif kind in kinds:
            self._try(record, kinds[kind])
        else:
            self._refused.append(f"unknown kind {kind!r} of run {record['run']!r}")

    def _send_aside(self) -> None:
        failed: Exception | None = None
        for record in list(self._progress.aside):
            if self._abandoned.is_set():
                return
            try:
                self._try(record, self._model if record["kind"] == "model" else self._artifact)
            except Exception as error:
                failed = error
            else:
                self._progress.aside.remove(record)
                self._progress.save(self.folder)
        if failed is not None:
            raise failed

    def _try(self, record: dict[str, Any], action: Callable[[dict[str, Any]], Any]) -> Any:
        """Run one action. What MLflow will never take is noted and passed over; an outage is raised."""
        try:
            return action(record)
        except Exception as error:
            permanent = isinstance(error, KeyError | TypeError | ValueError | FileNotFoundError)
            if isinstance(error, _mlflow_exception()):
                permanent = getattr(error, "error_code", None) in _REFUSALS
            if not permanent:
                raise
            # A proxy in front of a server that is down says "not found" as well: only a server that works may refuse.
            self._client.get_experiment(self._experiment_id)
            self._refused.append(f"{record['kind']} of run {record['run']!r}: {_first_line(error)}")
            log.warning("MLflow refused the %s", self._refused[-1])
            return None

    def _run_id(self, record: dict[str, Any]) -> str:
        try:
            return self._progress.runs[record["run"]]
        except KeyError:
            raise ValueError("the run was never started") from None

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        client, run = self._client, record["run"]
        tags = {key: str(value) for key, value in record["tags"].items()}
        params = {_key(key): _cut(_text(value), _PARAM_CHARACTERS) for key, value in record["params"].items()}
        known = self._progress.runs.get(run)
        if known is None:  # perhaps made by a sender that was killed before it could note so
            filter_string = f"tags.`{_RUN_TAG}` = '{record['id']}'"
            found = client.search_runs([self._experiment_id], filter_string=filter_string, max_results=1)
            known = found[0].info.run_id if found else None
        if known is None:
            identity = {_RUN_TAG: record["id"]}
            if record["parent"] in self._progress.runs:
                identity["mlflow.parentRunId"] = self._progress.runs[record["parent"]]
            made = client.create_run(
                self._experiment_id, start_time=record["time"], run_name=_cut(record["name"], 250), tags=identity
            )
            known, there = made.info.run_id, {}
        else:
            client.update_run(known, status="RUNNING")
            there = client.get_run(known).data.params
        self._progress.runs[run] = known
        for key in params.keys() & there.keys():  # MLflow's parameters are final: the change is told as a tag
            if params[key] != there[key]:
                tags[f"changed.{key}"] = params[key]
        new = [Param(key, value) for key, value in params.items() if key not in there]
        sendable = [RunTag(_key(key), _cut(value, _TAG_CHARACTERS)) for key, value in tags.items()]
        for at in range(0, max(len(new), len(sendable)), _BATCH_PARAMS):
            part = slice(at, at + _BATCH_PARAMS)
            client.log_batch(known, params=new[part], tags=sendable[part])

    def _log_metrics(self, record: dict[str, Any]) -> None:
        run_id, metrics = self._run_id(record), record["metrics"]
        for at in range(0, len(metrics), _BATCH_METRICS):
            self._client.log_batch(run_id, metrics=metrics[at : at + _BATCH_METRICS])

    def _tags(self, record: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_key(key), _cut(str(value), _TAG_CHARACTERS)) for key, value in record["tags"].items()]
        for at in range(0, len(tags), _BATCH_PARAMS):
            self._client.log_batch(self._run_id(record), tags=tags[at : at + _BATCH_PARAMS])

    def _data(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=_cut(record["name"], 500),
            digest=record["digest"][:_DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps({"digest": record["digest"]}),
        )
        tags = [InputTag("mlflow.data.context", record["context"])]
        self._client.log_inputs(self._run_id(record), [DatasetInput(data, tags)])

    def _artifact(self, record: dict[str, Any]) -> None:
        path, name, run_id = self.folder / record["path"], Path(record["name"]), self._run_id(record)
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), artifact_path=str(name))
            return
        parent = None if str(name.parent) == "." else str(name.parent)
        if path.name == name.name:
            self._client.log_artifact(run_id, str(path), artifact_path=parent)
            return
        with tempfile.TemporaryDirectory() as folder:  # MLflow has no argument for the file's name
            self._client.log_artifact(run_id, shutil.copyfile(path, Path(folder) / name.name), artifact_path=parent)

    def _end(self, record: dict[str, Any]) -> None:
        self._client.set_terminated(self._run_id(record), status=record["status"], end_time=record["time"])

    def _model(self, record: dict[str, Any]) -> None:
        """Log, register and alias a model. Each step looks for what an interrupted attempt left before it acts."""
        client, key, run_id = self._client, record["key"], self._run_id(record)
        name = re.sub(r"[/:'\"`\\]", "-", record["name"])
        with contextlib.suppress(_mlflow_exception()):  # it is there already; anything worse shows in the next call
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((version.version for version in versions if version.tags.get(_MODEL_TAG) == key), None)
        if version is None:
            logged = self._log_model(run_id, key, name)
            version = client.create_model_version(
                name, logged.artifact_location, run_id=run_id, model_id=logged.model_id, tags={_MODEL_TAG: key}
            ).version
        client.set_registered_model_alias(name, record["alias"], version)
        client.set_tag(run_id, "registered_model", f"models:/{name}/{version}")

    def _log_model(self, run_id: str, key: str, name: str) -> Any:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        client = self._client
        if self.load_model is None:
            raise ConnectionError(f"the model of artifact {key} needs a command that can load it")
        found = client.search_logged_models([self._experiment_id], filter_string=f"tags.`{_MODEL_TAG}` = '{key}'")
        logged = found[0] if found else None
        if logged is None or logged.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model"
                try:
                    description = _export_model(self.load_model, key, path)
                except Exception as error:  # a model that cannot be traced now cannot be traced later
                    raise ValueError(f"the model of artifact {key} cannot be exported: {_first_line(error)}") from error
                if logged is None:
                    tags = {_MODEL_TAG: key}
                    logged = client.create_logged_model(self._experiment_id, name=name, source_run_id=run_id, tags=tags)
                description.artifact_path, description.run_id = logged.artifact_location, run_id
                description.model_id = description.model_uuid = logged.model_id
                description.save(str(path / "MLmodel"))
                client.log_model_artifacts(logged.model_id, str(path))
            client.finalize_logged_model(logged.model_id, "READY")
        outputs = client.get_run(run_id).outputs
        if outputs is None or logged.model_id not in [output.model_id for output in outputs.model_outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return logged


def send_all(folder: Path, *, uri: str, experiment: str, load_model: LoadModel | None = None) -> str | None:
    """Send what an outage or a crash left behind, in this thread; arguments and answer as those of `Sender`."""
    return Sender(folder, uri=uri, experiment=experiment, load_model=load_model).send_now()


_REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
)


def _mlflow_exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException


def _connect(uri: str) -> Any:
    """An `MlflowClient`, quiet and with short timeouts. The one place where a database is opened."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the sender has its own pauses
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the defaults, 120 and 7 retries, hang for 16 minutes
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    file = _sqlite_file(uri)
    if file is None:
        return MlflowClient(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Asked first because MLflow tries again for 100 seconds when the file cannot be opened.
    sqlite3.connect(file).close()
    # Two processes that open a fresh database both create its tables, and one of them fails: they take turns.
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return MlflowClient(uri)


def _export_model(load_model: LoadModel, key: str, path: Path) -> Any:
    """Save an artifact's model at `path` as MLflow wants it, without pickle, for batches of any size."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, infer_signature

    module, example = load_model(key)
    module = module.cpu().eval()
    if len(example) < 2:  # the exporter takes a dimension of 1 for a constant
        example = np.repeat(example, 2, axis=0)
    example = example[:2]
    with torch.no_grad():
        answer = module(torch.from_numpy(example))
    description = Model()
    mlflow.pytorch.save_model(
        module,
        str(path),
        mlflow_model=description,
        signature=infer_signature(example, answer.numpy()),
        input_example=example,
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )
    return description


def _mlflow_metrics(record: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    at, step = record["time"], record["step"]
    return [Metric(_key(key), float(value), at, step) for key, value in record["values"].items()]


def _key(name: str) -> str:
    """A name MLflow takes: letters and digits of any alphabet, underscore, dash, dot, space, colon and slash."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_KEY_CHARACTERS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = f" … cut, {len(text)} characters"
    return text[: limit - len(mark)] + mark


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return _without_password(lines[0])[:300] if lines else type(error).__name__


# The page ------------------------------------------------------------------------------------------------------------


def serve(store: Path, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Show this store in MLflow's page until Ctrl-C or SIGTERM. Returns the exit code.

    Args:
        store: the store's folder.
        host: address to listen on. Anything but a loopback address prints what that means.
    Raises:
        UserError: the port is taken or not allowed, the records are on a server with its own page, or MLflow failed.
    """
    uri = tracking_uri(store)
    check_uri(uri)
    shown = _without_password(uri)
    if uri.partition(":")[0].partition("+")[0] not in _DATABASES:
        raise UserError(f"the records of this store are at {shown}, which has its own page: open it in a browser")
    _check_port(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not _is_loopback(host):
        print(
            f"warning: {address} is open to everybody who can reach this machine: they can read, change and delete "
            "every run, without a password. Safer: keep 127.0.0.1 and use `ssh -L`.",
            file=sys.stderr,
        )
    _connect(uri)  # so that the server finds the tables made
    store = Path(store).absolute()
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", _artifact_root(uri) or (store / _ARTIFACTS).as_uri()]
    # In the environment, not on the command line, which every user of the machine can read. Job execution would start
    # about ten more processes.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    output = store / "mlflow-server.log"
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if in_main_thread else None
    try:
        with open(output, "wb") as file:
            # Its own process group: the server starts processes of its own, and all of them must end with this one.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        try:
            print("starting MLflow, which takes some seconds ...", flush=True)
            if _wait_until_up(process, host, port):
                print(f"{shown} is shown at {address} (Ctrl-C stops it)", flush=True)
                process.wait()
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-5:])
            raise UserError(f"MLflow's server ended with code {process.returncode}; the end of {output}:\n{tail}")
        except KeyboardInterrupt:
            return 0
        finally:
            _stop_group(process)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            problem = error
    with socket.socket(family) as other:
        try:
            other.bind((host, 0))
        except OSError:
            raise UserError(f"host {host}: {problem.strerror}; give an address of this machine") from None
        free = other.getsockname()[1]
    raise UserError(f"port {port} of {host}: {problem.strerror}; {free} is free: --port {free}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wait_until_up(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """True once the server answers, False when it ended before."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}/health"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's port
    while process.poll() is None:
        with contextlib.suppress(OSError), direct.open(url, timeout=5):
            return True
        time.sleep(0.2)
    return False


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
