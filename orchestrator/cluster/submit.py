"""Recipes as jobs of a Ray cluster: send, follow, list, stop. All goes over the job server's address."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import ipaddress
import json
import logging
import os
import re
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import ray
import yaml
from ray.job_submission import JobSubmissionClient

from orchestrator.errors import UserError, nearest

if TYPE_CHECKING:  # to look and to stop needs no torch, and answers at once
    from orchestrator.recipe import Recipe

ANSWER_SECONDS = 10.0  # how long a job server may take to answer; Ray's own client waits for ever
STOP_SECONDS = 600  # how long a stopped run may take to end its step and save; Ray kills after 3 by default
FOLLOW_TRIES = 5  # lost connections in a row, without a line between them, before following gives up
LARGEST_FOLDER = 100 * 2**20  # bytes of a working directory; Ray refuses 500 MiB, after reading them all
LEFT_OUT = (  # names that are never sent: versions, environments, caches, weights, data
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", "node_modules", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", "mlruns", "mlflow.db", "*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.arrow", "*.parquet",
    "*.npy", "*.npz", "*.u8", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.jpg", "*.jpeg", "*.png", "*.mp4",
)  # fmt: skip
POLL_SECONDS = 1.0
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One try of a run on the cluster, as its job server tells it. Times are seconds since 1970."""

    id: str
    name: str  # the run's name there: the same for every try of one recipe
    recipe: str
    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER

    def json(self) -> dict[str, Any]:
        """The object that `status --address --json` prints."""
        when = {"started": _iso(self.started), "ended": _iso(self.ended)}
        return {"id": self.id, "name": self.name, "recipe": self.recipe, "state": self.state, **when,
                "exit_code": self.exit_code, "message": self.message}  # fmt: skip


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def open_client(address: str, token: Path | None = None, *, same_version: bool = False) -> JobSubmissionClient:
    """A client of the job server at an address, after asking who is there.

    Args:
        address: http://HOST:8265, as the dashboard has it.
        token: file with the cluster's token; None sends one only where RAY_AUTH_MODE=token says so.
        same_version: refuse a cluster of another version of Ray.
    Raises:
        UserError: no address, nothing answers, something else does, the token is missing or wrong, another version.
    """
    address = _checked(address)
    headers = {"Authorization": f"Bearer {_token(token)}"} if token is not None else {}
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client believes RAY_ADDRESS more than its own argument
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = _ask_version(address, headers or _own_headers())
    if same_version and found != ray.__version__:
        raise UserError(f"--address {address}: the cluster runs Ray {found}, here is {ray.__version__}; install "
                        f"ray=={found} here, or the cluster's image with {ray.__version__}")  # fmt: skip
    return JobSubmissionClient(address, headers=headers)


def _checked(address: str) -> str:
    """An address with scheme, host and port."""
    text = address if "://" in address else f"http://{address}"
    parts = urlsplit(text.rstrip("/"))
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or (parts.scheme == "http" and port is None):
        raise UserError(f"--address {address}: must be the job server's, such as http://HEAD:8265 (for Ray's own port, "
                        "10001 or 6379, there is RAY_ADDRESS)")  # fmt: skip
    return text.rstrip("/")


def _token(file: Path) -> str:
    try:
        text = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token {file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not text or len(text.split()) > 1:
        raise UserError(f"--token {file}: must hold the cluster's token and nothing else; on the head it is in "
                        "~/.ray/auth_token")  # fmt: skip
    return text


def _own_headers() -> dict[str, str]:
    """What Ray itself would send: a token where RAY_AUTH_MODE=token says so."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        return dict(get_auth_headers_if_auth_enabled({}))
    except ray.exceptions.AuthenticationError:
        return {}


def _ask_version(address: str, headers: Mapping[str, str]) -> str:
    """The version of Ray that answers at an address, asked with a time limit, which Ray's client has not."""
    asked = urllib.request.Request(f"{address}/api/version", headers=dict(headers))
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS) as answer:
            return str(json.loads(answer.read())["ray_version"])
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UserError(f"--address {address}: wants a token; give the file that holds it with --token, on the "
                            "head ~/.ray/auth_token") from error  # fmt: skip
        if error.code == 403:
            raise UserError(f"--address {address}: refuses this token; the cluster's is on its head, in "
                            "~/.ray/auth_token; give it with --token") from error  # fmt: skip
        raise _nobody(address, f"HTTP {error.code}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _nobody(address, "no version of Ray in the answer") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        timed_out = isinstance(reason, TimeoutError | socket.timeout)
        raise UserError(f"--address {address}: nothing answers there ({'no answer in time' if timed_out else text}); "
                        "is the cluster up, and the tunnel to port 8265 of its head open?") from error  # fmt: skip


def _nobody(address: str, found: str) -> UserError:
    return UserError(f"--address {address}: something answers there, but no Ray ({found}); the job server is at port "
                     "8265 of the head")  # fmt: skip


def job_name(recipe: Recipe) -> str:
    """The run's name on a cluster: the same for the same recipe, whatever its resources.

    Not the name in the store, which needs the images that only the cluster sees; that one is in the job's log.
    """
    asked = {key: value for key, value in yaml.safe_load(recipe.text).items() if key != "resources"}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', recipe.name).strip('-.') or 'recipe'}-{digest}"


def next_id(name: str, known: Iterable[str]) -> str:
    """The next submission id of a name: Ray takes each only once, so tries are numbered from 1."""
    tries = [int(found[1]) for one in known if (found := re.fullmatch(re.escape(name) + r"-(\d+)", one))]
    return f"{name}-{max(tries, default=0) + 1}"


def entrypoint(recipe: str, overrides: Sequence[str], store: str | None) -> str:
    """The command that runs on the head."""
    return shlex.join(["orchestrator", "run", recipe, *overrides, *(["--store", store] if store else [])])


def check_places(recipe: Recipe, store: str | None) -> None:
    """Refuse what means something here and nothing, or something else, on the cluster.

    Raises:
        UserError: a relative path of images on this machine, a relative store.
    """
    for name, split in recipe.data.splits.items():
        if split.source in recipe.data.splits and split.source != name:
            continue  # drawn from another split, whatever lies here under that name
        if not split.source.startswith(("/", "~")) and Path(split.source).exists():
            raise UserError(f"data.{name}: {split.source} lies on this machine; give a path that every node of the "
                            "cluster sees")  # fmt: skip
    if store is not None and not Path(store).is_absolute():
        raise UserError(f"--store {store}: must be an absolute path, of a folder that every node of the cluster sees, "
                        "such as /mnt/shared/store")  # fmt: skip


def working_directory(recipe: str, folder: Path | None) -> Path | None:
    """The folder that is sent: the one given, this one when the recipe is a file, none for a shipped recipe.

    Raises:
        UserError: the folder is none, the recipe lies outside of it, or it is too large.
    """
    file = Path(recipe)
    if folder is None and not file.is_file():
        return None
    folder = folder or Path(".")
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: is no folder")
    if file.is_file() and (file.is_absolute() or not (folder / file).is_file()):
        raise UserError(f"recipe {recipe}: must be named as it lies in --working-dir {folder}, which is what the "
                        "cluster gets")  # fmt: skip
    sizes = _sizes(folder)
    if sum(sizes.values()) > LARGEST_FOLDER:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} {sizes[name] / 2**20:.0f} MB" for name in largest)
        raise UserError(f"--working-dir {folder}: holds more than {LARGEST_FOLDER // 2**20} MB ({told} ...); give a "
                        "folder that holds recipes and code alone")  # fmt: skip
    return folder


def left_out(folder: Path) -> list[str]:
    """What of a folder is not sent, as Ray takes it: like the lines of a .gitignore."""
    stores = [place for pattern in ("*", "*/*") for place in folder.glob(pattern) if _is_store(place)]
    return [*LEFT_OUT, *(f"/{place.relative_to(folder).as_posix()}/" for place in stores)]


def _is_store(folder: Path) -> bool:
    from orchestrator.store import MARKER

    return (folder / MARKER).exists()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each entry of a folder without what is left out; counting ends once there are too many."""
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _skipped(name) and not _is_store(Path(place) / name)]
        for name in files:
            if not _skipped(name):
                path = Path(place) / name
                top = path.relative_to(folder).parts[0]
                sizes[top] = sizes.get(top, 0) + (path.stat().st_size if path.exists() else 0)
        if sum(sizes.values()) > 10 * LARGEST_FOLDER:
            break
    return sizes


def _skipped(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)


def runtime_environment(folder: Path | None, given: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment of a job: the working directory and the variables that the run needs there.

    Args:
        given: NAME=VALUE, as `--env` has them. Everybody who may see the dashboard can read them.
    Raises:
        UserError: one of them is not NAME=VALUE.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if _travels(tracking):
        variables["MLFLOW_TRACKING_URI"] = tracking
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env {text}: must be NAME=VALUE, such as --env MLFLOW_TRACKING_URI=http://mlflow:5000")
        variables[name] = value
    sent = {} if folder is None else {"working_dir": str(folder), "excludes": left_out(folder)}
    return {"env_vars": variables, **sent}


def _travels(uri: str) -> bool:
    """Whether a tracking server's address means the same on a cluster, and is no secret."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return False
    try:
        return not ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return parts.hostname != "localhost"


def send(
    client: JobSubmissionClient, recipe: Recipe, command: str, environment: dict[str, Any]
) -> tuple[Job, bool]:  # fmt: skip
    """Send a run, or find the one that is there and not over. Returns the job, and whether it was sent now.

    The driver takes no CPU of the cluster, so it runs on the head, even on one that has none to give.

    Raises:
        UserError: the job server refuses it.
    """
    name = job_name(recipe)
    there = jobs(client)
    for job in there:
        if job.name == name and not job.over:
            return job, False
    metadata = {"run": name, "recipe": recipe.name, "orchestrator": importlib.metadata.version("orchestrator")}
    submission = next_id(name, [job.id for job in there])
    with _refusals(client):
        client.submit_job(entrypoint=command, submission_id=submission, runtime_env=environment, metadata=metadata,
                          entrypoint_num_cpus=0)  # fmt: skip
    return job_of(client, submission), True


def jobs(client: JobSubmissionClient) -> list[Job]:
    """The jobs that run recipes, oldest first; those of plain `ray job submit` too."""
    with _refusals(client):
        found = [_job(info) for info in client.list_jobs() if info.submission_id and _ours(info)]
    return sorted(found, key=lambda job: (job.started or 0, job.id))


def lines(found: Sequence[Job]) -> list[str]:
    """A line for each job: its name, which try, its state, since when, and of a failed one why."""
    width = max((len(job.name) for job in found), default=0)
    told = []
    for job in found:
        why = job.message.splitlines()[0] if job.state == "FAILED" and job.message else ""
        attempt = job.id.removeprefix(job.name).lstrip("-")
        line = f"{job.name:{width}}  {attempt:>3}  {job.state.lower():9}  {_iso(job.started) or '':25}  {why}"
        told.append(line.rstrip())
    return told


def job_of(client: JobSubmissionClient, submission: str) -> Job:
    """A job by its submission id, as it is now."""
    with _refusals(client):
        return _job(client.get_job_info(submission))


def _ours(info: Any) -> bool:
    return "run" in (info.metadata or {}) or re.search(r"\borchestrator(\.cli)? run\b", info.entrypoint) is not None


def _job(info: Any) -> Job:
    metadata = info.metadata or {}
    started, ended = (None if at is None else at / 1000 for at in (info.start_time, info.end_time))
    name = metadata.get("run", info.submission_id)
    return Job(info.submission_id, name, metadata.get("recipe", ""), info.status.value, started, ended,
               info.driver_exit_code, (info.message or "").strip())  # fmt: skip


def find(client: JobSubmissionClient, name: str) -> Job:
    """The newest try of a run: by the beginning of its name or id, or by its name in the store, told in its log.

    Raises:
        UserError: there is no such run, or several.
    """
    there = jobs(client)
    found = [job for job in there if job.id.startswith(name) or job.name.startswith(name)]
    if not found:
        likely = [job for job in there if not job.recipe or name.startswith(f"{job.recipe}-")]
        found = [job for job in likely if f"\nrun {name}" in "\n" + log(client, job)]
    names = list(dict.fromkeys(job.name for job in found))
    if len(names) > 1:
        raise UserError(f"run {name}: is the beginning of {', '.join(names)}")
    if not found:
        known = list(dict.fromkeys(job.name for job in there))
        told = nearest(name, known) or ("; there are " + ", ".join(known) if known else "; no run was sent there")
        raise UserError(f"run {name}: not on this cluster{told}")
    return found[-1]


def log(client: JobSubmissionClient, job: Job) -> str:
    """What a job has written so far."""
    with _refusals(client):
        return client.get_job_logs(job.id)


def follow(client: JobSubmissionClient, job: Job, write: Callable[[str], None]) -> Job:
    """Pass on what a job writes until it is over; goes on after a lost connection. Returns the job as it ended.

    Raises:
        UserError: the connection is lost again and again.
    """
    told, failures = 0, 0

    def say(text: str, start: int) -> None:
        """Write what of a piece of the log, which begins at `start`, was not written before."""
        nonlocal told, failures
        if start + len(text) > told:
            write(text[max(0, told - start) :])
            told, failures = start + len(text), 0

    while True:
        try:
            asyncio.run(_tail(client, job, say))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            failures += 1
            if failures > FOLLOW_TRIES:
                raise UserError(f"run {job.name}: the connection was lost ({error}); the run goes on, and the same "
                                "command follows it again") from error  # fmt: skip
        now = job_of(client, job.id)
        if now.over:
            say(log(client, now), 0)
            return now
        time.sleep(POLL_SECONDS)


async def _tail(client: JobSubmissionClient, job: Job, say: Callable[[str, int], None]) -> None:
    """The log from its beginning, piece by piece with the place of each, until the server hangs up."""
    seen = 0
    async for text in client.tail_job_logs(job.id):
        say(text, seen)
        seen += len(text)


def stop(client: JobSubmissionClient, job: Job) -> bool:
    """Ask a job to stop after its step, with everything kept. Returns whether there was anything to stop."""
    if job.over:
        return False
    with _refusals(client):
        return client.stop_job(job.id)


@contextlib.contextmanager
def _refusals(client: JobSubmissionClient) -> Iterator[None]:
    """What the job server refuses, as one line."""
    where = f"--address {client.get_address()}"
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"{where}: refuses this token; give the cluster's with --token") from error
    except OSError as error:
        raise UserError(f"{where}: the connection was lost; try again") from error
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        no_agent = "No available agent" in str(error)
        told = "the head is not ready for jobs yet; try again in a minute" if no_agent else (lines or ["?"])[-1]
        raise UserError(f"{where}: the job server refused it: {told}") from error
