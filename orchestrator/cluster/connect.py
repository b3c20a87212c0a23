"""Start or join Ray, after checking that what a recipe asks can ever fit."""

from __future__ import annotations

import os
import socket
from typing import Any

from orchestrator.errors import UserError
from orchestrator.pipeline import cores
from orchestrator.recipe import Resources

NAMESPACE = "orchestrator"

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


def preflight(resources: Resources, batches: dict[str, int]) -> list[tuple[str, str]]:
    """(field, message) of what can never fit on the machine or the joined cluster's head, before anything starts.

    Args:
        batches: field to the images that all workers share at a time: of a step, or of one of its accumulated parts.
    """
    found: list[tuple[str, str]] = []
    address = os.environ.get("RAY_ADDRESS", "")
    joined = bool(address)
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in host:
        try:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            reason = error.strerror or str(error)
            found.append(
                ("RAY_ADDRESS", f"{address}: nothing answers there ({reason}); unset it to run on this machine")
            )
    if not joined and resources.workers > cores():
        found.append(("resources.workers", f"{resources.workers} training workers need a core each, this machine has "
                                           f"{cores()}; use {cores()} or fewer"))  # fmt: skip
    elif not joined and 1 < resources.workers and resources.workers * (resources.threads or 1) > cores():
        found.append(("resources.threads", f"{resources.workers} workers with {resources.threads} threads each need "
                                           f"{resources.workers * (resources.threads or 1)} cores, this machine has "
                                           f"{cores()}; use {cores() // resources.workers}"))  # fmt: skip
    if not joined and resources.labellers > cores():
        found.append(
            ("resources.labellers", f"{resources.labellers} labellers need a core each, this machine has {cores()}")
        )
    for name, batch in batches.items():
        fewest = resources.min_workers or resources.workers
        uneven = [count for count in range(resources.workers, fewest - 1, -1) if batch % count]
        if uneven:
            found.append((name, f"{batch} images at a time cannot be split evenly over {uneven[0]} workers"))
        elif resources.workers > 1 and batch // resources.workers < 2:
            found.append((name, f"{batch} images at a time over {resources.workers} workers leave "
                                f"{batch // resources.workers} each: batch norm needs 2 or more"))  # fmt: skip
    return found


def connect(resources: Resources) -> dict[str, Any]:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine. Returns {"cpus", "gpus", "nodes"}.

    Raises:
        UserError: no cluster at the address, or it has fewer CPUs or GPUs than one training needs.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            if os.environ.get("RAY_ADDRESS"):
                ray.init(**quiet)
            else:
                # a Train controller that dies frees its workers through the dashboard; with one process there is none
                ray.init(address="local", num_cpus=cores(), object_store_memory=256 * 2**20,
                         include_dashboard=resources.workers > 1, **quiet)  # fmt: skip
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}: no Ray cluster answers there; unset it to "
                            f"run on this machine") from error  # fmt: skip
    total = ray.cluster_resources()
    needed = {"CPU": resources.workers, "GPU": resources.workers * resources.gpus}
    for name, amount in needed.items():
        if amount > total.get(name, 0):
            raise UserError(f"resources: training needs {amount:g} {name}s for {resources.workers} workers, the "
                            f"cluster has {total.get(name, 0):g}; lower resources.workers")  # fmt: skip
    return {"cpus": total.get("CPU", 0), "gpus": total.get("GPU", 0), "nodes": len(ray.nodes())}
