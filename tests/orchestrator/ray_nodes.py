"""A Ray cluster of several nodes on one machine, made by `ray start` as on real ones; each node has its own address.

Ports are free ones, Ray's files lie in a folder of the cluster's own, and what is ended is what was started here: other
clusters on the machine are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

DEADLINE = 240.0  # seconds for anything that will come; a loaded machine needs many to start Ray
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-tests-0123456789ab"
MEMORY = 100 * 2**20


def eventually(look, what):
    """The first answer of `look` that is neither None nor False."""
    end = time.monotonic() + DEADLINE
    while not (found := look()):
        if time.monotonic() > end:
            pytest.fail(f"waited {DEADLINE:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Nodes:
    """A head, which has no CPU to give, and workers beside it. Every process wants the token."""

    def __init__(self, head_cpus: int = 0, environment: Mapping[str, str] | None = None) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="or", dir="/tmp"))  # Ray's sockets need a short path
        self.token = self.place / "token"
        self.token.write_text(TOKEN + "\n", encoding="utf-8")
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        foreign = ("RAY_", "MLFLOW_TRACKING_URI", "ORCHESTRATOR_STORE", "HALT_FOLDER")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {
            "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(self.place), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
            # a lost node is noticed within seconds
            "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5",
            **(environment or {}),
        }  # fmt: skip
        self.nodes: list[subprocess.Popen] = []
        self._start("--head", f"--port={self.port}", f"--num-cpus={head_cpus}", "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={self.dashboard}")  # fmt: skip
        eventually(self._up, self.logs)

    def _start(self, *options: str, inside: Sequence[str] = ()) -> subprocess.Popen:
        # files of its own, as on a machine of its own: a node deletes the copies of folders that its jobs need no more
        own = self.place / str(len(self.nodes))
        command = [*inside, str(BIN / "ray"), "start", "--block", f"--object-store-memory={MEMORY}",
                   f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={own}", *options]  # fmt: skip
        with (self.place / f"node-{len(self.nodes)}").open("wb") as out:
            node = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment, start_new_session=True)
        self.nodes.append(node)
        return node

    def _up(self) -> bool:
        assert self.nodes[0].poll() is None, self.logs()
        asked = urllib.request.Request(f"{self.address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
        with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=5):
            return True
        return False

    def add(self, cpus: int = 1, inside: Sequence[str] = ()) -> str:
        """One more node; returns its IP address."""
        address = f"127.0.0.{len(self.nodes) + 1}"
        self._start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}", f"--node-ip-address={address}",
                    inside=inside)  # fmt: skip
        return address

    def kill(self, address: str) -> None:
        """Lose a node at once: everything that runs on it, without a word to the others."""
        top = psutil.Process(self.nodes[int(address.rpartition(".")[2]) - 1].pid)
        for process in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def logs(self) -> str:
        """What the nodes wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.place.glob("node-*")))

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """An `orchestrator` command, as from a laptop: it knows the cluster by what the arguments say alone."""
        command = [str(BIN / "orchestrator"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.laptop() | variables, timeout=DEADLINE)

    def laptop(self) -> dict[str, str]:
        """The environment of a machine that is no part of the cluster."""
        return {k: v for k, v in self.environment.items() if not k.startswith("RAY_")} | {"HOME": str(self.place)}

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this cluster: what the nodes started, and what writes into its folder."""
        found: dict[int, psutil.Process] = {}
        for node in self.nodes:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(node.pid)
                found |= {process.pid: process for process in [*top.children(recursive=True), top]}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if any(os.readlink(f"/proc/{process.pid}/fd/{n}").startswith(f"{self.place}/") for n in (1, 2)):
                    found[process.pid] = process
        return [process for process in found.values() if process.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        """Leave no process and no file behind."""
        for _ in range(100):
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not left:
                break
            time.sleep(0.1)
        for node in self.nodes:
            node.wait(DEADLINE)
        shutil.rmtree(self.place, ignore_errors=True)


class Watched(Nodes):
    """Nodes whose methods wait at a moment, as `halting` tells, and the runs on them."""

    def __init__(self, place: Path, **environment: str) -> None:
        self.halt = place / "halt"
        self.halt.mkdir()
        self.runs: list[Run] = []
        super().__init__(environment={"HALT_FOLDER": str(self.halt), **environment})

    def ask(self, moment: str | None) -> None:
        """Have processes wait at a moment, or with None let all go on."""
        for old in self.halt.glob("reached-*"):
            old.unlink()
        part = self.halt / "part"
        part.write_text(moment or "never")
        part.rename(self.halt / "at")

    def reached(self, run: Run, processes: int = 1) -> list[int]:
        """The ids of the processes that wait."""

        def look() -> list[int] | None:
            assert run.process.poll() is None, run.said + self.logs()
            found = [int(path.name.removeprefix("reached-")) for path in self.halt.glob("reached-*")]
            return found if len(found) >= processes else None

        return eventually(look, lambda: f"{processes} processes at the moment; {run.said}")

    def node_of(self, pid: int) -> str:
        """The address of the node that a process runs on."""
        for number, node in enumerate(self.nodes, 1):
            with contextlib.suppress(psutil.Error):
                if pid in {process.pid for process in psutil.Process(node.pid).children(recursive=True)}:
                    return f"127.0.0.{number}"
        raise AssertionError(f"{pid} runs on no node")

    def node_id(self, address: str) -> str:
        """What Ray calls a node."""
        listed = subprocess.run([BIN / "ray", "list", "nodes", "--format", "json", "--address", self.address],
                                capture_output=True, env=self.environment, check=True, timeout=DEADLINE)  # fmt: skip
        (found,) = (node["node_id"] for node in json.loads(listed.stdout) if node["node_ip"] == address)
        return found

    def start(self, place: Path, recipe: str, store: Path, verb: str = "run", options: Sequence[str] = ()) -> Run:
        """`orchestrator run`, or another command with its options, on a machine of the cluster."""
        file = place / "recipe.yaml"
        file.write_text(recipe, encoding="utf-8")
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        command = [BIN / "orchestrator", verb, file, *options, "--store", store, "--json"]
        with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            run = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=place, start_new_session=True)
        self.runs.append(Run(run, place))
        return self.runs[-1]

    def close(self) -> None:
        for run in self.runs:
            with contextlib.suppress(ProcessLookupError):
                run.process.kill()
            run.process.wait(DEADLINE)
        super().close()


@dataclass(frozen=True)
class Run:
    """One command that runs on the nodes, with its output beside its recipe."""

    process: subprocess.Popen
    place: Path

    @property
    def said(self) -> str:
        """What it wrote for people."""
        return (self.place / "err").read_text(encoding="utf-8", errors="replace")

    def result(self) -> dict[str, Any]:
        """What a run that ends well printed for machines."""
        assert self.process.wait(DEADLINE) == 0, self.said
        return json.loads((self.place / "out").read_text(encoding="utf-8"))
