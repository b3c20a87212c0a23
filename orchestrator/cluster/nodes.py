"""What a joined cluster must be before anything starts: room for the work, one store, one version of everything.

The checks are functions of what was found; finding it out takes a few short tasks on every node, which ask for no CPU,
so that a head that has none to give is looked at too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import platform
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # a node that only answers needs no torch
    from orchestrator.recipe import Resources

ANSWER_SECONDS = 90.0  # a node has for each look; the first one starts a process there
COMPARED = ("torch", "ray")  # besides Python and this package
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # what `ray up` leaves on the head for its autoscaler
JOB_COPY = "runtime_resources"  # folder of Ray's own copies of working directories
Problem = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Node:
    """One machine of the cluster, and what it offers: "CPU", "GPU"."""

    id: str
    ip: str
    host: str
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"node {self.ip} ({self.host})"


@dataclass(frozen=True)
class Need:
    """Processes that run at once, each on one node with all it asks for."""

    field: str  # of the recipe
    what: str  # one of them
    count: int
    each: Mapping[str, float]

    def fits(self, offered: Mapping[str, float]) -> int:
        """How many of them a node has room for."""
        return min(int((offered.get(name, 0) + 1e-9) // amount) for name, amount in self.each.items() if amount > 0)


@dataclass(frozen=True)
class Group:
    """Nodes of one kind that an autoscaler may start."""

    most: int
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Look:
    """What a process on a node found: versions, why it could not write, whose tokens it read, whether locks hold."""

    versions: Mapping[str, str]
    failure: str | None  # of writing, in the system's words
    read: Mapping[str, bool]  # writer (a node's id, or "driver") to whether its token is there
    locked: bool | None = None  # whether the driver's lock is seen; None: there was nothing to lock


def needs_of(resources: Resources) -> list[Need]:
    """What trains, and what labels: the one waits for the other, so each must fit by itself."""
    gpus = {"GPU": float(resources.gpus)} if resources.gpus else {}
    fewest = resources.min_workers or resources.workers
    threads = float(resources.threads or 1)
    found = [Need("resources.workers", "training worker", fewest, {"CPU": threads, **gpus})]
    if resources.labellers:
        found.append(Need("resources.labellers", "labeller", resources.labellers, {"CPU": 1.0, **gpus}))
    return found


def room_problems(needs: Sequence[Need], nodes: Sequence[Node], groups: Sequence[Group] | None = None) -> list[Problem]:
    """(field, message) of what can never fit, with the numbers.

    Args:
        groups: what an autoscaler may start; None: it is not told, or there is none.
    """
    found = []
    for need in needs:
        now = {node: need.fits(node.resources) for node in nodes}
        grown = sum(group.most * need.fits(group.resources) for group in groups or ())
        if need.count <= max(sum(now.values()), grown):
            continue
        asked = " and ".join(f"{amount:g} {name}" for name, amount in need.each.items())
        what = need.what if need.count == 1 else f"{need.what}s"
        rooms = ", ".join(f"{node.ip} {room}" for node, room in now.items() if room) or "none has any"
        room = sum(now.values())
        there = "the node has" if len(nodes) == 1 else f"the {len(nodes)} nodes have"
        told = f"{need.count} {what} with {asked} each: {there} room for {room}"
        most = max(room, grown)
        fewer = f"use {most} or fewer"
        if groups is None:
            advice = f"{f'{fewer}, or ' if most else ''}add nodes (of a cluster that grows by itself, the least)"
        else:
            told = f"{told}, and at most {grown} when the cluster has grown"
            advice = fewer if most else "add nodes, or ask for less"
        found.append((need.field, f"{told} ({rooms}); {advice}"))
    return found


def version_problems(looks: Mapping[Node, Look], driver: Mapping[str, str]) -> list[Problem]:
    """(node, message) of every node that runs something else than the driver.

    Builds of one version (2.9.0+cpu, 2.9.0+cu128) count as equal: a head without a GPU may have the smaller one.
    """
    found = []
    for node, look in looks.items():
        for what, own in driver.items():
            there = look.versions.get(what)
            if there is None or there.partition("+")[0] != own.partition("+")[0]:
                has = f"has {what} {there}" if there else f"has no {what}"
                found.append((node.name, f"{has}, the driver {own}; install the same on all nodes, best by one image"))
    return found


def store_problems(store: Path, looks: Mapping[Node, Look], driver_read: Mapping[Node, bool]) -> list[Problem]:
    """(node, message) of every node whose store is another folder than the driver's, or cannot be written.

    Args:
        looks: what each node found; its `read` says "driver" for the driver's token.
        driver_read: node to whether the driver found its token.
    """
    remedy = f"mount one shared file system there, at {store} on every node, or give one with --store"
    found = []
    ips = {node.id: node.ip for node in looks}
    # whoever has another folder is named himself, not by all others who miss what he wrote
    apart = {node.id for node, look in looks.items() if not (look.read.get("driver") and driver_read[node])}
    for node, look in looks.items():
        unseen = [writer for writer, seen in look.read.items() if not seen and writer not in apart]
        if look.failure is not None:
            found.append((node.name, f"cannot write the store {store} ({look.failure}); {remedy}"))
        elif node.id in apart:
            found.append((node.name, f"{store} is another folder there: what the driver writes is not in it; {remedy}"))
        elif unseen:
            found.append((node.name, f"does not see what {ips[unseen[0]]} wrote into {store}; {remedy}"))
        elif look.locked is False:
            found.append((node.name, f"does not see locks on files in {store}, so two nodes could do the same work; "
                                     "mount it with locks (NFS 4 or without nolock, Lustre with flock)"))  # fmt: skip
    return found


def groups_of(config: Mapping[str, Any]) -> list[Group]:
    """What an autoscaler may start, by the configuration that `ray up` gives it. Kinds of unknown size are left out."""
    most = int(config.get("max_workers") or 0)
    kinds = (config.get("available_node_types") or {}).values()
    return [
        Group(min(most, int(kind.get("max_workers", 0))), {k: float(v) for k, v in kind["resources"].items()})
        for kind in kinds if kind.get("resources")
    ]  # fmt: skip


def alive() -> list[Node]:
    """The cluster's nodes as they are now."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"], node["Resources"])
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip


def growth() -> list[Group] | None:
    """What the cluster's autoscaler may start, where it is told: by Ray, or by `ray up` on its head."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        most = 10**6  # -1 says that there is no limit
        return [Group(kind.max_count if kind.max_count >= 0 else most, dict(kind.resources))
                for kind in config.node_group_configs]  # fmt: skip
    here = ray.get_runtime_context().get_node_id()
    on_head = any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())
    if on_head:
        with contextlib.suppress(OSError, yaml.YAMLError):
            return groups_of(yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8")))
    return None


@functools.cache
def versions() -> dict[str, str]:
    """What must be equal everywhere; of this package the code itself, which changes more often than its version."""
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return {**found, "orchestrator code": digest.hexdigest()[:8]}


def token_file(store: Path, token: str, writer: str) -> Path:
    """Where a process leaves its token. The name was never asked for before, so no cache can say it is not there."""
    return store / "work" / f".shared-{token}-{writer}"


def write_token(store: Path, token: str, writer: str) -> str | None:
    """Leave a token in the store; returns why it could not, in the system's words."""
    try:
        token_file(store, token, writer).write_text(token, encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
    return None


def read_token(store: Path, token: str, writer: str) -> bool:
    """Whether a process's token is in the store as this process sees it."""
    with contextlib.suppress(OSError):
        return token_file(store, token, writer).read_text(encoding="utf-8") == token
    return False


def sees_lock(file: Path) -> bool:
    """Whether a lock that another process holds on a file keeps this one from it."""
    try:
        with file.open("r+") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return False


def _begin(writer: str, store: Path, token: str) -> Look:
    return Look(versions(), write_token(store, token, writer), {})


def _read(reader: str, store: Path, token: str, writers: Sequence[str]) -> Look:
    driver = token_file(store, token, "driver")
    locked = sees_lock(driver) if driver.exists() else None
    return Look({}, None, {writer: read_token(store, token, writer) for writer in writers}, locked)


def _end(writer: str, store: Path, token: str) -> None:
    token_file(store, token, writer).unlink(missing_ok=True)


def on_nodes(
    nodes: Iterable[Node], function: Callable[..., Any], *arguments: Any
) -> tuple[dict[Node, Any], list[Problem]]:
    """`function(node's id, *arguments)` as a task on every node, and what is wrong with nodes that give no answer.

    The tasks ask for no CPU, and for their node and no other.
    """
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
        asked[node] = task.remote(node.id, *arguments)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers, problems = {}, []
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problems.append(
                (node.name, f"gives no answer in {ANSWER_SECONDS:.0f} s; look at its Ray logs, or remove it")
            )
            ray.cancel(reference, force=True)
        except ray.exceptions.RayError as error:
            problems.append((node.name, _lost(error)))
    return answers, problems


def _lost(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in lines if "No module named" in line), None)
    if missing:
        return f"{missing.rpartition('ModuleNotFoundError: ')[2]}: install this package there, as on the head"
    return f"cannot run a task ({lines[-1] if lines else type(error).__name__}); look at its Ray logs, or remove it"


def check_nodes(resources: Resources, store: Path) -> list[Problem]:
    """(field or node, message) of all that would go wrong on the joined cluster. A few seconds."""
    if JOB_COPY in store.parts:
        return [("--store", f"{store} lies in the job's own copy of the working directory, which Ray deletes; give an "
                            "absolute path that all nodes share")]  # fmt: skip
    nodes = alive()
    found = room_problems(needs_of(resources), nodes, growth())
    if found:
        return found
    token = uuid.uuid4().hex
    failure = write_token(store, token, "driver")
    if failure is not None:
        return [("--store", f"{store} cannot be written on the driver's node ({failure})")]
    try:
        with token_file(store, token, "driver").open("r+") as held:
            with contextlib.suppress(OSError):  # of a file system without locks: the nodes will find none
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun, found = on_nodes(nodes, _begin, store, token)
            seen, lost = on_nodes(begun, _read, store, token, ["driver", *(node.id for node in begun)])
        looks = {node: replace(begun[node], read=look.read, locked=look.locked) for node, look in seen.items()}
        back = {node: read_token(store, token, node.id) for node in looks}
        on_nodes(looks, _end, store, token)
    finally:
        _end("driver", store, token)
    return [*found, *lost, *version_problems(looks, versions()), *store_problems(store, looks, back)]
