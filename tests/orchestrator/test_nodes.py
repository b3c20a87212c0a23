"""What a joined cluster must be: each check by what was found, then on real nodes, one of which has another disk."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import ray
from ray._private.state import state

from orchestrator.cluster import nodes as nodes_module
from orchestrator.cluster.connect import connect
from orchestrator.cluster.nodes import (
    Group,
    Look,
    Need,
    Node,
    _lost,
    check_nodes,
    groups_of,
    growth,
    needs_of,
    read_token,
    room_problems,
    sees_lock,
    store_problems,
    version_problems,
    versions,
    write_token,
)
from orchestrator.errors import UserError
from orchestrator.recipe import Resources
from tests.orchestrator.ray_nodes import DEADLINE, ROOT, Nodes
from tests.orchestrator.test_faults import UNSHARE, may_mount

HEAD = Node("a" * 8, "10.0.0.1", "head", {"node:__internal_head__": 1.0})
FIRST = Node("b" * 8, "10.0.0.2", "first", {"CPU": 8.0, "GPU": 1.0})
SECOND = Node("c" * 8, "10.0.0.3", "second", {"CPU": 3.0})
WORKERS = Need("resources.workers", "training worker", 4, {"CPU": 2.0})
STORE = Path("/mnt/store")


class TestRoom:
    def test_what_fits_node_by_node_is_no_problem(self):
        assert room_problems([WORKERS], [HEAD, FIRST]) == []

    def test_a_sum_that_would_do_is_not_enough_when_no_node_has_a_worker_s_share(self):
        four = [Node(str(n), f"10.0.0.{n}", "x", {"CPU": 3.0}) for n in range(4)]  # 12 CPUs, and 4 times 2 are 8
        assert room_problems([Need("f", "worker", 5, {"CPU": 2.0})], four) != []
        assert room_problems([Need("f", "worker", 4, {"CPU": 2.0})], four) == []

    def test_the_numbers_and_the_nodes_with_room_are_told(self):
        ((field, message),) = room_problems([Need("resources.workers", "training worker", 9, {"CPU": 2.0})],
                                            [HEAD, FIRST, SECOND])  # fmt: skip
        assert field == "resources.workers"
        assert message.startswith("9 training workers with 2 CPU each: the 3 nodes have room for 5 (10.0.0.2 4, "
                                  "10.0.0.3 1); use 5 or fewer")  # fmt: skip

    def test_a_worker_needs_its_gpu_and_its_cpus_on_one_node(self):
        both = Need("resources.workers", "training worker", 1, {"CPU": 4.0, "GPU": 1.0})
        apart = [Node("1", "10.0.0.1", "x", {"GPU": 8.0, "CPU": 2.0}), Node("2", "10.0.0.2", "y", {"CPU": 64.0})]
        ((_, message),) = room_problems([both], apart)
        assert "1 training worker with 4 CPU and 1 GPU each" in message and "(none has any)" in message
        assert room_problems([both], [FIRST]) == []

    def test_a_cluster_that_grows_is_measured_by_what_it_may_become(self):
        gpus = Need("resources.workers", "training worker", 4, {"GPU": 1.0})
        assert room_problems([gpus], [HEAD]) != []
        assert room_problems([gpus], [HEAD], [Group(2, {"GPU": 2.0, "CPU": 8.0})]) == []
        ((_, message),) = room_problems([gpus], [HEAD], [Group(3, {"GPU": 1.0}), Group(9, {"CPU": 64.0})])
        ((_, message),) = room_problems([gpus], [HEAD], [Group(9, {"CPU": 64.0})])
        assert "the node has room for 0, and at most 0" in message and message.endswith("add nodes, or ask for less")
        ((_, message),) = room_problems([gpus], [HEAD])
        assert message.endswith("(none has any); add nodes (of a cluster that grows by itself, the least)")
        ((_, message),) = room_problems([gpus], [HEAD], [Group(3, {"GPU": 1.0}), Group(9, {"CPU": 64.0})])
        assert "at most 3 when the cluster has grown" in message and message.endswith("use 3 or fewer")

    def test_the_needs_are_the_recipe_s_and_elastic_training_needs_its_least(self):
        one, labelling = needs_of(Resources(labellers=3))
        assert labelling == Need("resources.labellers", "labeller", 3, {"CPU": 1.0})
        assert (one.count, one.each) == (1, {"CPU": 1.0})  # a head without a CPU has no room even for one
        assert needs_of(Resources(labellers=3, gpus=0.5))[1].each == {"CPU": 1.0, "GPU": 0.5}
        (need,) = needs_of(Resources(workers=8, gpus=1))
        assert (need.count, need.each) == (8, {"CPU": 1.0, "GPU": 1.0})
        (need,) = needs_of(Resources(workers=8, min_workers=2, threads=4))
        assert (need.count, need.each) == (2, {"CPU": 4.0})

    def test_groups_are_read_from_what_ray_up_leaves_and_bounded_by_the_whole(self):
        config = {"max_workers": 5, "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0}, "spot": {"resources": {"GPU": 1}, "max_workers": 8},
            "filled in by the provider": {"max_workers": 3},
        }}  # fmt: skip
        assert [(group.most, dict(group.resources)) for group in groups_of(config)] == [
            (0, {"CPU": 0}),
            (5, {"GPU": 1}),
        ]
        assert groups_of({}) == []


def looked(node, *, versions=None, failure=None, unseen=(), locked=True):
    """A node that found everything right, but for what is said."""
    read = {writer: writer not in unseen for writer in ("driver", HEAD.id, FIRST.id, SECOND.id)}
    return node, Look(versions or {"torch": "2.9.0"}, failure, read, locked)


class TestVersions:
    def test_another_version_is_named_with_node_and_both(self):
        looks = dict([looked(FIRST, versions={"torch": "2.8.0+cu128", "python": "3.11.7"})])
        ((where, message),) = version_problems(looks, {"torch": "2.9.0+cpu", "python": "3.11.7"})
        assert where == "node 10.0.0.2 (first)" and message.startswith("has torch 2.8.0+cu128, the driver 2.9.0+cpu; i")

    def test_builds_of_one_version_are_equal(self):
        looks = dict([looked(FIRST, versions={"torch": "2.9.0+cu128"})])
        assert version_problems(looks, {"torch": "2.9.0+cpu"}) == []

    def test_a_package_that_is_missing_there_is_told(self):
        looks = dict([looked(FIRST, versions={"python": "3.11.7"})])
        ((_, message),) = version_problems(looks, {"python": "3.11.7", "ray": "2.60.0"})
        assert message.startswith("has no ray, the driver 2.60.0")

    def test_of_this_package_the_code_counts(self):
        found = versions()
        assert {"python", "torch", "ray", "orchestrator code"} == set(found) and len(found["orchestrator code"]) == 8


class TestStore:
    RIGHT = {HEAD: True, FIRST: True, SECOND: True}

    def test_one_store_on_all_nodes_is_no_problem(self):
        assert store_problems(STORE, dict([looked(HEAD), looked(FIRST), looked(SECOND)]), self.RIGHT) == []

    def test_a_disk_of_its_own_is_named_with_ip_and_remedy(self):
        own = looked(SECOND, unseen=("driver", HEAD.id, FIRST.id), locked=None)
        others = [looked(HEAD, unseen=(SECOND.id,)), looked(FIRST, unseen=(SECOND.id,))]
        ((where, message),) = store_problems(STORE, dict([own, *others]), {**self.RIGHT, SECOND: False})
        assert where == "node 10.0.0.3 (second)"
        assert "/mnt/store is another folder there" in message and "mount one shared file system" in message

    def test_a_node_that_reads_the_driver_but_whose_writing_is_lost_is_found(self):
        ((where, _),) = store_problems(STORE, dict([looked(SECOND)]), {SECOND: False})
        assert where == "node 10.0.0.3 (second)"

    def test_two_nodes_that_do_not_see_each_other_are_found(self):
        ((where, message),) = store_problems(
            STORE, dict([looked(FIRST), looked(SECOND, unseen=(FIRST.id,))]), self.RIGHT
        )
        assert where == "node 10.0.0.3 (second)" and message.startswith("does not see what 10.0.0.2 wrote")

    def test_a_node_that_cannot_write_is_told_in_the_system_s_words_and_once(self):
        looks = dict([looked(FIRST, failure="Permission denied"), looked(SECOND, unseen=(FIRST.id,))])
        ((where, message),) = store_problems(STORE, looks, self.RIGHT | {FIRST: False})
        assert where == "node 10.0.0.2 (first)" and "(Permission denied)" in message

    def test_locks_that_are_not_seen_are_found(self):
        ((_, message),) = store_problems(STORE, dict([looked(SECOND, locked=False)]), self.RIGHT)
        assert "does not see locks" in message

    def test_a_token_is_read_where_it_was_written_and_nowhere_else(self, tmp_path):
        (tmp_path / "work").mkdir()
        assert write_token(tmp_path, "t1", "me") is None and read_token(tmp_path, "t1", "me")
        assert not read_token(tmp_path, "t2", "me") and not read_token(tmp_path / "other", "t1", "me")
        assert write_token(tmp_path / "none", "t1", "me") == "No such file or directory"

    def test_a_lock_is_seen_by_another_process_while_it_is_held(self, tmp_path):
        file = tmp_path / "held"
        file.touch()
        code = "import sys, pathlib, orchestrator.cluster.nodes as n; print(n.sees_lock(pathlib.Path(sys.argv[1])))"
        with file.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            asked = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
        assert asked.stdout.strip() == "True"
        assert sees_lock(file) is False


class TestJoining:
    """What Ray says of a cluster that cannot be joined, as it says it, and what the user reads."""

    def refused(self, monkeypatch, error):
        def init(**_):
            raise error

        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(UserError) as told:
            connect(Resources())
        assert str(told.value).startswith("RAY_ADDRESS 10.0.0.1:6379: ") and "\n" not in str(told.value)
        return str(told.value)

    def test_another_token_is_told_from_nobody_there(self, monkeypatch):
        nobody = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
        assert "no Ray cluster answers there; unset it" in self.refused(monkeypatch, nobody)
        refused = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
        refused.__context__ = RuntimeError("... AuthenticationError: RPC error: InvalidAuthToken: Authentication ...")
        assert "wants another token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in self.refused(
            monkeypatch, refused
        )

    def test_another_version_is_told_with_both(self, monkeypatch):
        message = (
            "Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.12.1\n"
            "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
        )
        told = self.refused(monkeypatch, RuntimeError(message))
        assert (
            "another version is there (Ray: 2.50.0 Python: 3.12.1 This process" in told and "install the same" in told
        )

    def test_ray_does_not_keep_the_signal_that_stops_a_run(self, monkeypatch):
        def ours(*_):
            pass

        before = signal.signal(signal.SIGTERM, ours)
        try:
            monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
            monkeypatch.setattr(ray, "is_initialized", lambda: False)
            monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
            monkeypatch.setattr("orchestrator.cluster.nodes.alive", lambda: [FIRST])
            monkeypatch.setattr("orchestrator.cluster.nodes.growth", lambda: None)
            assert connect(Resources()) == {"cpus": 8.0, "gpus": 1.0, "nodes": 1}
            assert signal.getsignal(signal.SIGTERM) is ours
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_a_store_in_the_job_s_own_copy_of_the_folder_is_refused_since_ray_deletes_it(self):
        copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/orchestrator-store")
        ((where, message),) = check_nodes(Resources(), copy)
        assert where == "--store" and "which Ray deletes; give an absolute path that all nodes share" in message

    def test_how_far_a_cluster_grows_is_read_on_its_head_alone(self, monkeypatch, tmp_path):
        file = tmp_path / "ray_bootstrap_config.yaml"
        file.write_text("{max_workers: 4, available_node_types: {gpu: {max_workers: 9, resources: {GPU: 1}}}}")
        monkeypatch.setattr(nodes_module, "BOOTSTRAP", file)
        monkeypatch.setattr(state, "get_cluster_config", lambda: None)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: types.SimpleNamespace(get_node_id=lambda: HEAD.id))
        for resources, expected in ((HEAD.resources, 4), ({"CPU": 1.0}, None)):
            monkeypatch.setattr(ray, "nodes", lambda found=resources: [{"NodeID": HEAD.id, "Resources": found}])
            found = growth()
            assert (found and found[0].most) == expected

    def test_a_node_without_this_package_is_told_what_to_install(self):
        error = Exception("ray::_begin() (pid=1)\n  ...\nModuleNotFoundError: No module named 'orchestrator'\n")
        assert _lost(error) == "No module named 'orchestrator': install this package there, as on the head"


CHECK = """
import json, sys, time
from pathlib import Path
from orchestrator.cluster.connect import connect
from orchestrator.cluster.nodes import alive, check_nodes
from orchestrator.recipe import Resources
from orchestrator.store import Store

store = Store.open(Path(sys.argv[1]))
there = connect(Resources())
while len(alive()) < int(sys.argv[2]):
    time.sleep(0.1)
found = check_nodes(Resources(), store.root)
left = [path.name for path in (store.root / "work").iterdir()]
print(json.dumps([found, check_nodes(Resources(workers=4), store.root), left]))
"""


@pytest.mark.cluster
def test_real_nodes_are_looked_at_and_the_one_with_another_disk_is_named(tmp_path):
    """One test for the price of one cluster: a head without CPUs, and a node whose store is a disk of its own."""
    store = tmp_path / "store"
    (store / "work").mkdir(parents=True)
    (store / ".orchestrator-store").touch()
    mounts = may_mount(store)
    nodes = Nodes()
    try:
        own = f'mount -t tmpfs tmpfs "{store}" && mkdir "{store}/work" && exec "$@"'
        nodes.add(inside=[*UNSHARE, own, "sh"] if mounts else ())
        command = [sys.executable, "-c", CHECK, store, str(len(nodes.nodes))]
        environment = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE, check=False)
        assert done.returncode == 0, done.stderr + nodes.logs()
        found, room, left = json.loads(done.stdout)
        assert left == []  # no token stays behind
        assert [where.split()[1] for where, _ in found] == (["127.0.0.2"] if mounts else [])
        assert all(f"{store} is another folder there" in message for _, message in found)
        ((field, message),) = room
        assert field == "resources.workers"
        assert message.startswith("4 training workers with 1 CPU each: the 2 nodes have room for 1 (127.0.0.2 1)")
    finally:
        nodes.close()


WORKER_SAYS = """
import sys, ray
from orchestrator.cluster.connect import connect, leave
from orchestrator.recipe import Resources
connect(Resources())
print(ray.get(ray.remote(lambda: sys.executable).remote(), timeout=float(sys.argv[1])))
leave()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_starts_workers_from_an_environment_whose_path_has_a_space(tmp_path):
    (tmp_path / "two words").mkdir()
    (tmp_path / "two words" / "env").symlink_to(sys.prefix)
    python = tmp_path / "two words" / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([python, "-c", WORKER_SAYS, str(DEADLINE)], capture_output=True, text=True, env=environment)
    assert (said.stdout.strip(), said.returncode) == (str(python), 0), said.stderr
