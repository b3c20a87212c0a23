"""Start or join Ray, after checking that what a recipe asks can ever fit."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import UserError
from orchestrator.pipeline import cores
from orchestrator.recipe import Resources, report

NAMESPACE = "orchestrator"
JOIN_SECONDS = 20.0  # that the nodes of a cluster which has just been started have to report to its head
GROW_SECONDS = 1200  # that a cluster which grows has to start the nodes of a training

# set before ray is imported: Ray reads them once
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits for the next check: 2 s each by default
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the whole working directory
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # 15 by default: a training in an actor would wait for whatever else runs
}
_JOINING = {"RAY_NUM_REDIS_GET_RETRIES": "5"}  # seconds to try; 20 by default, also with a wrong token


def preflight(resources: Resources, batches: dict[str, int]) -> list[tuple[str, str]]:
    """(field, message) of what can never fit on the machine or the joined cluster's head, before anything starts.

    Args:
        batches: field to the images that all workers share at a time: of a step, or of one of its accumulated parts.
    """
    found: list[tuple[str, str]] = []
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in host:
        try:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            reason = error.strerror or str(error)
            found.append(
                ("RAY_ADDRESS", f"{address}: nothing answers there ({reason}); unset it to run on this machine")
            )
    if not joined() and resources.workers > cores():
        found.append(("resources.workers", f"{resources.workers} training workers need a core each, this machine has "
                                           f"{cores()}; use {cores()} or fewer"))  # fmt: skip
    elif not joined() and 1 < resources.workers and resources.workers * (resources.threads or 1) > cores():
        found.append(("resources.threads", f"{resources.workers} workers with {resources.threads} threads each need "
                                           f"{resources.workers * (resources.threads or 1)} cores, this machine has "
                                           f"{cores()}; use {cores() // resources.workers}"))  # fmt: skip
    if not joined() and resources.labellers > cores():
        found.append(
            ("resources.labellers", f"{resources.labellers} labellers need a core each, this machine has {cores()}")
        )
    stages = resources.parallel or 1
    each = resources.workers * (resources.threads or 1) + resources.labellers
    if not joined() and stages > 1 and stages * each > cores():
        found.append(("resources.parallel", f"{stages} stages at a time with {each} processes or threads each need "
                                            f"{stages * each} cores, this machine has {cores()}"))  # fmt: skip
    for name, batch in batches.items():
        fewest = resources.min_workers or resources.workers
        uneven = [count for count in range(resources.workers, fewest - 1, -1) if batch % count]
        if uneven:
            found.append((name, f"{batch} images at a time cannot be split evenly over {uneven[0]} workers"))
        elif resources.workers > 1 and batch // resources.workers < 2:
            found.append((name, f"{batch} images at a time over {resources.workers} workers leave "
                                f"{batch // resources.workers} each: batch norm needs 2 or more"))  # fmt: skip
    return found


def joined() -> bool:
    """Whether a cluster is joined: then its nodes do the work, and this machine may have none to give."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(resources: Resources, *, dashboard: bool = False) -> dict[str, float]:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine. Returns its {"cpus", "gpus", "nodes"}.

    Args:
        dashboard: start it here with one worker too; with several it is there anyway.
    Raises:
        UserError: no cluster at the address, one of another token or version, or one that cannot do what is asked.
    """
    for name, value in (_ENVIRONMENT | (_JOINING if joined() else {})).items():
        os.environ.setdefault(name, value)
    import ray

    from orchestrator.cluster.nodes import alive, growth, needs_of, room_problems

    if not ray.is_initialized():
        quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
        with _own_sigterm():
            if joined():
                _join(quiet)
            else:
                # a Train controller that dies frees its workers through the dashboard; with one process there is none
                ray.init(address="local", runtime_env=_own_python(), num_cpus=cores(), object_store_memory=256 * 2**20,
                         include_dashboard=dashboard or resources.workers > 1, **quiet)  # fmt: skip
    grows = growth() if joined() else None
    nodes, needs = alive(), needs_of(resources)
    end = time.monotonic() + (JOIN_SECONDS if joined() else 0)
    while (problems := room_problems(needs, nodes, grows)) and time.monotonic() < end:
        time.sleep(0.5)
        nodes = alive()
    if problems:
        raise report("the cluster" if joined() else "this machine", problems)
    if grows:  # a node needs minutes to come up, and Ray Train gives up after one
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROW_SECONDS))
    cpus, gpus = (sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return {"cpus": cpus, "gpus": gpus, "nodes": len(nodes)}


def _own_python() -> dict[str, Any] | None:
    """Names this Python to Ray's workers where its path has a space: Ray starts them by a shell and quotes nothing."""
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


def leave() -> None:
    """End Ray's part in this process: its threads print of lost nodes to stdout, as late as after the last line."""
    import ray

    ray.shutdown()


def _join(quiet: dict[str, Any]) -> None:
    import ray

    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(**quiet)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        causes = [str(one) for one in _chain(error)]
        if any("AuthToken" in text or "uthentication token" in text for text in causes):
            raise UserError(f"RAY_ADDRESS {address}: the cluster wants another token; set RAY_AUTH_MODE=token, and "
                            "RAY_AUTH_TOKEN_PATH to a copy of ~/.ray/auth_token of its head") from error  # fmt: skip
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there; unset it to run on this "
                        "machine") from error  # fmt: skip
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        told = " ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip())
        raise UserError(f"RAY_ADDRESS {address}: another version is there ({told}); install the same here") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM over and leaves at once; whoever handled it before, to stop cleanly, gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
