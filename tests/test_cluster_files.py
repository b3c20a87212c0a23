"""The files that make clusters: Ray's own schema takes cluster.yaml, KubeRay's published fields the RayJob."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

from orchestrator import cli
from orchestrator.cluster.nodes import Node, groups_of, needs_of, room_problems
from orchestrator.recipe import Resources, load

ROOT = Path(__file__).parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((ROOT / "docs/kuberay/rayjob.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "docs/kuberay/Dockerfile").read_text(encoding="utf-8")

# KubeRay 1.5 and 1.6, https://docs.ray.io/en/master/cluster/kubernetes/references/api.html: the fields of ray.io/v1
RAY_JOB = set(
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend".split()
)
RAY_CLUSTER = set(
    "authOptions suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs".split()
)
HEAD_GROUP = set("template headService enableIngress rayStartParams serviceType".split())
WORKER_GROUP = set(
    "suspend groupName replicas minReplicas maxReplicas rayStartParams template scaleStrategy numOfHosts".split()
)
AUTOSCALER = set(
    "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode env envFrom volumeMounts".split()
)
AUTH = {"mode", "secretName"}
MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
# Kubernetes 1.34, core/v1: the fields of PodSpec and Container that a manifest of ours may use
POD = set(
    "containers volumes nodeSelector tolerations affinity terminationGracePeriodSeconds serviceAccountName "
    "imagePullSecrets securityContext priorityClassName restartPolicy initContainers".split()
)
CONTAINER = set(
    "name image imagePullPolicy command args env envFrom ports resources volumeMounts securityContext lifecycle "
    "livenessProbe readinessProbe startupProbe workingDir".split()
)


def validated(config):
    """Ray's own check of a configuration, as `ray up` makes it. Private to Ray, for want of a public one."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    return validate_config(prepare_config(copy.deepcopy(config)))


def pod_problems(template, where):
    """Fields that a pod template does not have."""
    spec = template["spec"]
    found = [f"{where}.{name}" for name in set(template) - {"metadata", "spec"}]
    found += [f"{where}.spec.{name}" for name in set(spec) - POD]
    return found + [f"{where}.{box['name']}.{name}" for box in spec["containers"] for name in set(box) - CONTAINER]


def job_problems(job):
    """Fields of a RayJob that KubeRay has not published, by their path."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    known = (
        ("", job, {"apiVersion", "kind", "metadata", "spec"}), ("spec", spec, RAY_JOB),
        ("cluster", cluster, RAY_CLUSTER), ("auth", cluster.get("authOptions", {}), AUTH),
        ("head", cluster["headGroupSpec"], HEAD_GROUP),
        ("autoscaler", cluster.get("autoscalerOptions", {}), AUTOSCALER),
        *((group["groupName"], group, WORKER_GROUP) for group in cluster["workerGroupSpecs"]),
    )  # fmt: skip
    found = [f"{where}.{name}" for where, given, fields in known for name in set(given) - fields]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        found += pod_problems(group["template"], group.get("groupName", "head"))
    return found


class TestClusterYaml:
    def test_ray_s_own_schema_takes_it(self):
        validated(CLUSTER)

    @pytest.mark.parametrize("broken", [{"max_worker": 3}, {"provider": None}, {"head_node_type": "heads"}])
    def test_ray_s_own_schema_would_find_a_mistake(self, broken):
        with pytest.raises(Exception, match="max_worker|provider|None|head_node_type"):
            validated({**CLUSTER, **broken})

    def test_it_has_a_head_that_works_not_and_workers_on_demand_and_on_spot(self):
        kinds = CLUSTER["available_node_types"]
        assert kinds[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}
        workers = {name: kind for name, kind in kinds.items() if name != CLUSTER["head_node_type"]}
        spot = {n for n, kind in workers.items() if kind["node_config"].get("InstanceMarketOptions")}
        assert len(spot) == 1 and len(workers) == 2
        assert all(0 <= kind["min_workers"] < kind["max_workers"] for kind in workers.values())
        assert sum(kind["max_workers"] for kind in workers.values()) <= CLUSTER["max_workers"]

    def test_every_process_of_ray_wants_the_token_and_the_dashboard_is_the_head_s_own(self):
        starts = [
            command for part in ("head", "worker") for command in CLUSTER[f"{part}_start_ray_commands"]
            if "ray start" in command
        ]  # fmt: skip
        assert len(starts) == 2
        for command in starts:
            assert command.index("export RAY_AUTH_MODE=token") < command.index("ray start")
        assert "--dashboard-host=127.0.0.1" in starts[0] and "0.0.0.0" not in yaml.safe_dump(CLUSTER)
        assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"

    def test_the_store_lies_on_what_all_nodes_mount(self):
        starts = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
        stores = {found for text in starts for found in re.findall(r"ORCHESTRATOR_STORE=([^;\s]+)", text)}
        assert stores == {"/mnt/shared/store"}
        assert "-v /mnt/shared:/mnt/shared" in CLUSTER["docker"]["run_options"]
        assert any("mount -t nfs4" in text and "/mnt/shared" in text for text in CLUSTER["initialization_commands"])

    def test_the_run_on_its_head_reads_how_far_it_may_grow(self):
        filled = copy.deepcopy(CLUSTER)  # the provider fills in what its machines have
        for kind in ("gpu_worker", "spot_worker"):
            filled["available_node_types"][kind]["resources"] = {"CPU": 8, "GPU": 1}
        head = [Node("h", "10.0.0.1", "head", {})]
        assert room_problems(needs_of(Resources(workers=6, gpus=1)), head, groups_of(filled)) == []
        assert room_problems(needs_of(Resources(workers=7, gpus=1)), head, groups_of(filled)) != []

    def test_it_is_for_a_version_of_python_and_ray_that_this_package_takes(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        ray, python = re.fullmatch(r"rayproject/ray:([\d.]+)-py3(\d+)-gpu", CLUSTER["docker"]["image"]).groups()
        least, most = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
        assert int(least) <= int(python) < int(most)
        (wanted,) = re.findall(r"ray\[[\w,]+\]>=([\d.]+)", " ".join(project["dependencies"]))
        assert [int(n) for n in ray.split(".")] >= [int(n) for n in wanted.split(".")]


class TestRayJob:
    def test_every_field_is_one_that_kuberay_has_published(self):
        assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
        assert job_problems(JOB) == []
        assert JOB["spec"]["submissionMode"] in MODES

    def test_a_misspelt_field_would_be_found_at_every_depth(self):
        broken = copy.deepcopy(JOB)
        cluster = broken["spec"]["rayClusterSpec"]
        broken["spec"]["backofLimit"] = 1
        cluster["workerGroupSpecs"][0]["minReplica"] = 1
        cluster["authOptions"]["token"] = True
        cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
        found = ["spec.backofLimit", "auth.token", "gpu.minReplica", "head.ray-head.volumeMount"]
        assert sorted(job_problems(broken)) == sorted(found)

    def test_its_command_is_one_that_the_command_line_takes(self):
        program, command, *arguments = shlex.split(JOB["spec"]["entrypoint"])
        assert (program, command) == ("orchestrator", "run")
        given = typer.main.get_command(cli.app).commands["run"].make_context("run", arguments).params
        data = [f"data.{split}={given[split]}" for split in ("labelled", "unlabelled", "test") if given[split]]
        resources = load(given["recipe"], [*data, *given["overrides"]]).resources
        groups = JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        there = [
            Node(str(number), "ip", group["groupName"],
                 {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])})
            for group in groups for number in range(group["minReplicas"])
            for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]]
        ]  # fmt: skip
        assert room_problems(needs_of(resources), there) == []  # of the nodes that are there from the beginning
        assert str(given["store"]).startswith("/mnt/shared/")

    def test_its_pods_share_the_claim_at_one_path_and_run_one_image(self):
        claim = yaml.safe_load((ROOT / "docs/kuberay/storage.yaml").read_text(encoding="utf-8"))
        assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
        cluster = JOB["spec"]["rayClusterSpec"]
        pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        assert len({pod["containers"][0]["image"] for pod in pods}) == 1
        for pod in pods:
            assert pod["containers"][0]["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
            assert pod["volumes"] == [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
            ]

    def test_the_variables_of_its_processes_are_text_and_give_a_stopped_run_time(self):
        variables = yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["env_vars"]
        assert all(isinstance(value, str) for value in variables.values())
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60

    def test_all_files_are_for_one_version_of_ray(self):
        image = CLUSTER["docker"]["image"]
        version = JOB["spec"]["rayClusterSpec"]["rayVersion"]
        assert f":{version}-" in image and f"FROM {image}\n" in DOCKERFILE
        assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
