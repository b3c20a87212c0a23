"""From a laptop to a cluster: what is refused before anything is sent, and jobs on a real one that wants a token."""

import contextlib
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.cluster import submit
from orchestrator.cluster.submit import (
    STOP_SECONDS,
    Job,
    check_places,
    entrypoint,
    job_name,
    left_out,
    lines,
    next_id,
    open_client,
    runtime_environment,
    working_directory,
)
from orchestrator.errors import UserError
from orchestrator.recipe import load, parse
from tests.conftest import SMALL
from tests.orchestrator.ray_nodes import DEADLINE, TOKEN, Nodes, eventually
from tests.orchestrator.test_faults import run_unbroken

BRIEF = SMALL[: SMALL.index("  teacher: &supervised")].replace("name: small", "name: brief")
LONG = (
    BRIEF.replace("brief", "long")
    .replace("steps: 6", "steps: 100000")
    .replace("threads: 1", "threads: 1, save_seconds: 0")
)


@contextlib.contextmanager
def answering(status, body):
    """A server that answers every request so; gives its address and the headers that it was asked with."""
    headers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            headers.append(dict(self.headers))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", headers
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_ray_variables(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which open_client sets, and which must not outlive the test
    monkeypatch.setenv("COLUMNS", "200")


def one_line(*arguments):
    """The error line of a command that is refused."""
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    return str(refused.value)


class TestNobodyThere:
    def test_a_closed_port_is_one_line(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with pytest.raises(UserError, match=rf"--address http://127.0.0.1:{port}: nothing answers there \(Connection "):
            open_client(f"http://127.0.0.1:{port}")

    def test_a_name_that_is_no_host_is_one_line(self):
        with pytest.raises(UserError, match=r"--address http://no\.such\.host\.invalid:8265: nothing answers there"):
            open_client("no.such.host.invalid:8265")

    def test_a_port_that_takes_the_call_and_says_nothing_is_one_line(self, monkeypatch):
        monkeypatch.setattr(submit, "ANSWER_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            with pytest.raises(UserError, match=r"nothing answers there \(no answer in time\)"):
                open_client(f"http://127.0.0.1:{silent.getsockname()[1]}")

    @pytest.mark.parametrize(("status", "body"), [(200, "<html>hello</html>"), (200, '{"version": 4}'), (404, "")])
    def test_another_server_is_no_ray(self, status, body):
        with answering(status, body) as (address, _):
            with pytest.raises(UserError, match=r"something answers there, but no Ray"):
                open_client(address)

    @pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://head", "http://:8265", "http://head:x"])
    def test_an_address_that_is_no_job_server_s_is_refused_with_an_example(self, address):
        with pytest.raises(UserError, match=r"must be the job server's, such as http://HEAD:8265"):
            open_client(address)


class TestWhoIsThere:
    @pytest.mark.parametrize(("status", "told"), [(401, "wants a token"), (403, "refuses this token")])
    def test_a_missing_and_a_wrong_token_are_told_apart(self, status, told):
        with answering(status, "no") as (address, _):
            with pytest.raises(UserError, match=told + ".*--token"):
                open_client(address)

    def test_another_version_is_refused_with_both_where_it_matters(self):
        with answering(200, '{"ray_version": "2.9.0"}') as (address, _):
            with pytest.raises(UserError, match=rf"runs Ray 2\.9\.0, here is {re.escape(ray.__version__)}; install"):
                open_client(address, same_version=True)
            assert open_client(address).get_address() == address  # to look and to stop it is good enough

    def test_the_token_of_the_file_is_sent_and_ray_address_does_not_lead_elsewhere(self, tmp_path, monkeypatch):
        file = tmp_path / "token"
        file.write_text(f"{TOKEN}\n")
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        with answering(200, json.dumps({"ray_version": ray.__version__})) as (address, headers):
            assert open_client(address + "/", file).get_address() == address
        assert {sent["Authorization"] for sent in headers} == {f"Bearer {TOKEN}"}

    def test_without_an_option_no_token_goes_to_a_stranger(self, tmp_path, monkeypatch):
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        with answering(200, json.dumps({"ray_version": ray.__version__})) as (address, headers):
            open_client(address)
        assert headers and not [sent for sent in headers if "Authorization" in sent]

    @pytest.mark.parametrize(("text", "told"), [(None, "cannot be read"), ("", "must hold"), ("a b", "must hold")])
    def test_a_token_file_that_is_none_is_refused(self, tmp_path, text, told):
        file = tmp_path / "token"
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match=f"--token .*{told}"):
            open_client("http://127.0.0.1:1", file)


class TestBeforeAnythingIsSent:
    def test_a_typo_in_the_recipe_is_refused_though_nobody_is_at_the_address(self):
        line = one_line("submit", "quickstart", "stages.pretrain.stepz=3", "--address", "http://127.0.0.1:1")
        assert "stages.pretrain.stepz" in line and "did you mean steps?" in line and "--address" not in line

    def test_images_that_only_the_cluster_sees_are_not_looked_for(self, small):
        recipe = parse(small, overrides=["data.unlabelled.from=/only/there", "data.test=s3://bucket/test"])
        check_places(recipe, "/mnt/store")

    def test_images_beside_the_recipe_are_refused_since_they_do_not_travel(self, small, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        with pytest.raises(UserError, match=r"data\.unlabelled: photos lies on this machine; give a path that every"):
            check_places(parse(small, overrides=["data.unlabelled.from=photos"]), None)

    def test_a_folder_that_is_called_like_a_split_is_not_taken_for_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "labelled").mkdir()
        given = ["data.labelled=/mnt/shared/labelled", "data.unlabelled=/mnt/shared/unlabelled"]
        check_places(load("noisy-student", given), None)
        with pytest.raises(UserError, match=r"data\.labelled: labelled lies on this machine"):
            check_places(load("noisy-student", ["data.labelled=labelled", given[1]]), None)

    def test_a_relative_store_is_refused(self, small):
        with pytest.raises(UserError, match=r"--store orchestrator-store: must be an absolute path"):
            check_places(parse(small), "orchestrator-store")

    def test_an_own_recipe_outside_of_the_folder_that_is_sent_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.yaml").write_text(SMALL)
        (tmp_path / "code").mkdir()
        assert working_directory("mine.yaml", None) == Path(".")
        assert working_directory("quickstart", None) is None
        for recipe, folder in (("mine.yaml", Path("code")), (str(tmp_path / "mine.yaml"), None)):
            with pytest.raises(UserError, match=r"must be named as it lies in --working-dir"):
                working_directory(recipe, folder)
        with pytest.raises(UserError, match="is no folder"):
            working_directory("quickstart", Path("none"))

    def test_a_folder_of_data_is_refused_with_what_is_large_in_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(submit, "LARGEST_FOLDER", 3 * 2**20)
        (tmp_path / "film").mkdir()
        (tmp_path / "film" / "raw.bin").write_bytes(bytes(5 * 2**20))
        (tmp_path / "model.safetensors").write_bytes(bytes(5 * 2**20))
        with pytest.raises(UserError, match=r"holds more than 3 MB \(film 5 MB \.\.\.\); give a folder"):
            working_directory("quickstart", tmp_path)
        (tmp_path / "film" / "raw.bin").unlink()
        assert working_directory("quickstart", tmp_path) == tmp_path

    def test_stores_are_left_out_by_their_mark_whatever_their_name(self, tmp_path):
        for name in ("results", "more/results"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / ".orchestrator-store").touch()
        assert {"/results/", "/more/results/", ".git", "*.safetensors"} <= set(left_out(tmp_path))


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_run_takes_sigterm_as_ctrl_c_and_dies_of_the_second(self, tmp_path, number):
        notices = []
        display = types.SimpleNamespace(notice=notices.append)
        before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        with cli._stop_on_interrupt(tmp_path / "run" / "stop", display):
            signal.raise_signal(number)
            assert (tmp_path / "run" / "stop").exists()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert notices == ["stopping after this step; Ctrl-C again quits at once"]
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


class TestWhatIsThere:
    def test_runs_are_a_line_each_with_try_state_and_reason(self):
        first = Job("a-12-1", "a-12", "a", "SUCCEEDED", 0.0, 9.0, 0, "Job finished successfully.")
        second = Job("longer-3-12", "longer-3", "longer", "FAILED", None, None, 2, "why\nmore")
        assert lines([first, second]) == [
            "a-12        1  succeeded  1970-01-01T00:00:00+00:00",
            "longer-3   12  failed                                why",
        ]

    def test_to_look_and_to_stop_needs_no_torch(self):
        code = "import sys, orchestrator.cli, orchestrator.cluster.submit; print('torch' in sys.modules)"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert asked.stdout == "False\n"


class TestWhatIsSent:
    def test_a_name_is_the_recipe_s_own_and_resources_do_not_change_it(self, small):
        name = job_name(parse(small))
        assert re.fullmatch(r"small-[0-9a-f]{8}", name)
        assert job_name(parse(small, overrides=["resources.workers=4"])) == name
        assert job_name(parse(small, overrides=["seeds=2"])) != name
        assert job_name(parse(small.replace("name: small", "name: Größe 1 2"))).startswith("Gr-e-1-2-")

    def test_tries_are_numbered_since_ray_takes_an_id_only_once(self):
        assert next_id("a-1", []) == "a-1-1"
        assert next_id("a-1", ["a-1-1", "a-1-9", "a-1-10", "a-1-2-x", "b-1-30"]) == "a-1-11"

    def test_the_command_survives_a_shell(self):
        assert entrypoint("my recipe.yaml", ["data.labelled=/x y", "a=[1, 2]"], "/mnt/store") == (
            "orchestrator run 'my recipe.yaml' 'data.labelled=/x y' 'a=[1, 2]' --store /mnt/store"
        )

    def test_a_stopped_run_has_the_time_to_save(self):
        assert runtime_environment(None, [])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_SECONDS)

    @pytest.mark.parametrize(("uri", "travels"), [
        ("http://mlflow.internal:5000", True), ("https://mlflow", True), ("http://127.0.0.1:5000", False),
        ("http://localhost:5000", False), ("http://user:secret@mlflow", False), ("sqlite:////home/mlflow.db", False),
    ])  # fmt: skip
    def test_a_tracking_server_travels_unless_it_is_this_machine_s_or_holds_a_password(self, monkeypatch, uri, travels):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert ("MLFLOW_TRACKING_URI" in runtime_environment(None, [])["env_vars"]) == travels

    def test_variables_of_the_user_win_and_others_are_refused(self):
        assert runtime_environment(None, ["A=b=c", "PYTHONUNBUFFERED="])["env_vars"].items() >= {
            "A": "b=c", "PYTHONUNBUFFERED": ""
        }.items()  # fmt: skip
        with pytest.raises(UserError, match=r"--env TOKEN: must be NAME=VALUE"):
            runtime_environment(None, ["TOKEN"])


@pytest.fixture(scope="module")
def cluster():
    """A head without a CPU to give and one worker."""
    nodes = Nodes()
    nodes.add(cpus=2)
    yield nodes
    nodes.close()


@pytest.fixture
def folder(tmp_path):
    """A folder of a recipe, with the user's own method beside it."""
    place = tmp_path / "code"
    place.mkdir()
    (place / "own.py").write_text("from methods.simclr import SimCLR\n\n\nclass Mine(SimCLR):\n    pass\n")
    (place / "mine.yaml").write_text(BRIEF.replace("methods.simclr.SimCLR", "own.Mine"))
    (place / "long.yaml").write_text(LONG)
    return place


@pytest.mark.cluster
@pytest.mark.slow
class TestOnACluster:
    def asked(self, cluster, *arguments, **options):
        return cluster.run(*arguments, "--address", cluster.address, "--token", cluster.token, **options)

    def test_a_recipe_with_own_classes_gives_there_what_it_gives_here_and_is_not_run_twice(
        self, cluster, folder, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(folder)
        store = tmp_path / "store"
        first = self.asked(cluster, "submit", "mine.yaml", "--store", store, "--follow", "--json")
        assert first.returncode == 0, first.stderr + cluster.logs()
        told = json.loads(first.stdout)
        assert told["state"] == "SUCCEEDED" and told["sent"] and told["id"] == told["name"] + "-1"
        (head,) = store.glob("runs/*/run.json")
        assert f"run {head.parent.name}\n" in first.stderr and json.loads(head.read_text())["status"] == "FINISHED"
        assert first.stderr.count("pretrain                 ran") == 1  # every line is written once

        monkeypatch.syspath_prepend(folder)
        here, _ = run_unbroken((folder / "mine.yaml").read_text(), tmp_path / "here")
        there = [json.loads(path.read_text()) for path in head.parent.glob("stages/**/*.json")]
        assert {stage["name"]: stage["digest"] for stage in there} == here

        again = self.asked(cluster, "submit", "mine.yaml", "--store", store, "--follow", "--json")
        assert json.loads(again.stdout)["id"] == told["name"] + "-2"
        assert {json.loads(path.read_text())["state"] for path in head.parent.glob("stages/**/*.json")} == {"stored"}
        seen = self.asked(cluster, "status", head.parent.name, "--json")  # by the run's name in the store
        (job,) = json.loads(seen.stdout)
        assert job["id"] == told["name"] + "-2" and any("next" in line for line in job["log"])

    def test_a_plain_ray_job_does_too(self, cluster, folder, tmp_path):
        store = tmp_path / "store"
        command = ["ray", "job", "submit", "--working-dir", folder, "--", "orchestrator", "run", "mine.yaml"]
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        done = subprocess.run([*map(str, command), "--store", store], capture_output=True, text=True, env=environment,
                              timeout=DEADLINE, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (head,) = store.glob("runs/*/run.json")
        assert json.loads(head.read_text())["status"] == "FINISHED"

    def test_stop_ends_after_a_step_with_everything_kept_and_the_same_command_goes_on(
        self, cluster, folder, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(folder)
        store = tmp_path / "store"
        sent = self.asked(cluster, "submit", "long.yaml", "--store", store)
        assert sent.returncode == 0 and re.search(r"sent as (long-\w+)-1\n", sent.stdout), sent.stderr
        eventually(lambda: list(store.glob("work/*/training.pt")), cluster.logs)
        running = self.asked(cluster, "submit", "long.yaml", "--store", store)
        assert "runs already as long-" in running.stdout
        (job,) = json.loads(self.asked(cluster, "status", "long", "--json").stdout)
        assert job["state"] == "RUNNING"
        stopped = self.asked(cluster, "stop", "long")
        assert "stops after its step" in stopped.stdout, stopped.stderr

        def over():
            return json.loads(self.asked(cluster, "status", "long", "--json").stdout)[0]["state"] != "RUNNING"

        eventually(over, "the end of the job")
        (job,) = json.loads(self.asked(cluster, "status", "long", "--json").stdout)
        assert job["state"] == "STOPPED" and "Stopped. Everything done is kept" in "\n".join(job["log"])
        (head,) = store.glob("runs/*/run.json")
        assert json.loads(head.read_text())["status"] == "KILLED" and list(store.glob("work/*/training.pt"))
        assert "is over already: stopped" in self.asked(cluster, "stop", "long").stdout

    def test_a_run_that_the_cluster_refuses_ends_here_as_it_did_there(self, cluster, tmp_path):
        store = tmp_path / "store"
        failed = self.asked(
            cluster, "submit", "quickstart", "data.unlabelled.from=/not/there", "--store", store, "--follow"
        )
        assert failed.returncode == 2 and "/not/there" in failed.stdout and "Traceback" not in failed.stdout
        listed = self.asked(cluster, "status")
        assert re.search(r"quickstart-\w+ +1 +failed", listed.stdout), listed.stdout

    def test_an_unknown_run_is_one_line_with_those_that_are_there(self, cluster):
        missed = self.asked(cluster, "stop", "nothing-like-it")
        assert missed.returncode == 2 and missed.stderr.startswith("error: run nothing-like-it: not on this cluster")

    def test_a_wrong_and_a_missing_token_are_one_line(self, cluster, tmp_path):
        wrong = tmp_path / "wrong"
        wrong.write_text(TOKEN.upper())
        refused = cluster.run("status", "--address", cluster.address, "--token", wrong)
        assert refused.returncode == 2 and "refuses this token" in refused.stderr
        refused = cluster.run("submit", "quickstart", "--address", cluster.address)
        assert refused.returncode == 2 and "wants a token" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        joining = {
            "RAY_ADDRESS": f"127.0.0.1:{cluster.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN.upper(),
        }
        refused = cluster.run("run", "quickstart", "--store", tmp_path / "store", **joining)
        assert refused.returncode == 2 and "wants another token" in refused.stderr, refused.stderr
