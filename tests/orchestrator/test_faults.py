"""kill -9 and Ctrl-C on real Ray, at exact moments: the same command goes on to an unbroken run's answers."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.artifacts import Labels
from orchestrator.cluster.coordinator import Coordinator
from orchestrator.context import Context
from orchestrator.pipeline import Outcome
from orchestrator.recipe import parse
from orchestrator.run import execute, prepare
from orchestrator.stages.train import Fit
from orchestrator.store import Store
from tests.conftest import SMALL
from tests.orchestrator.halting import Supervised

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds Ray's processes through /proc"),
]
DEADLINE = 240.0  # seconds for anything that will come; a loaded machine needs many to start Ray
ROOT = Path(__file__).parents[2]
METHODS = (
    ("simclr", "SimCLR"), ("pirl", "PIRL"), ("supervised", "Supervised"), ("noisy_student", "NoisyStudent"),
    ("mean_teacher", "MeanTeacher"), ("fixmatch", "FixMatchCTA"),
)  # fmt: skip
HALTING = {f"methods.{module}.{name}": f"tests.orchestrator.halting.{name}" for module, name in METHODS}


def waiting(text):
    """A recipe whose methods wait where a test asks them to, and which saves after every step."""
    for plain, halting in HALTING.items():
        text = text.replace(plain, halting)
    return text.replace("resources: {threads: 1}", "resources: {threads: 1, save_seconds: 0}")


WAITING = waiting(SMALL)
TWO_WORKERS = waiting("""
name: two-workers
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 2}
  unlabelled: {from: digits/train, labels: false}
resources: {threads: 1}
stages:
  teacher: &teacher
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.supervised.Supervised}
    optim: {lr: 0.05}
    steps: 8
    batch: 8
    ema: 0.9
  students:
    rounds: 1
    carry: {teacher: student, first: teacher}
    stages:
      pseudo:
        use: orchestrator.stages.pseudo_label.PseudoLabel
        inputs: {teacher: teacher, images: unlabelled}
        min_confidence: 0.0
        max_class_share: 1.0
      student:
        <<: *teacher
        inputs: {labelled: labelled, images: unlabelled, labels: pseudo}
        method: {use: methods.noisy_student.NoisyStudent}
""").replace("save_seconds: 0}", "save_seconds: 0, workers: 2}")


CLUSTERS = waiting("""
name: clusters-of-pirl
data:
  pixels: 16
  images: {from: digits/train, labels: false}
resources: {threads: 1}
stages:
  pretrain: &pretrain
    use: orchestrator.stages.train.Train
    inputs: {images: images}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.pirl.PIRL, flip: false}
    optim: {lr: 0.05}
    steps: 8
    batch: 16
  clusters: {use: orchestrator.stages.cluster.Cluster, inputs: {teacher: pretrain, images: images}, clusters: 12}
  student:
    <<: *pretrain
    inputs: {images: images, labels: clusters}
    method: {use: methods.supervised.Supervised}
""")

CONSISTENT = waiting("""
name: consistent
data:
  pixels: 16
  labelled: {from: digits/train, per_class: 2}
  holdout: {from: digits/train, per_class: 3}
  unlabelled: {from: digits/train, labels: false}
resources: {threads: 1}
stages:
  mean_teacher: &train
    use: orchestrator.stages.train.Train
    inputs: {labelled: labelled, images: unlabelled, holdout: holdout}
    encoder: {use: methods.encoders.SmallCNN, width: 0.25}
    method: {use: methods.mean_teacher.MeanTeacher}
    optim: {lr: 0.05}
    steps: 8
    batch: 8
    ema: 0.9
  fixmatch_cta:
    <<: *train
    method: {use: methods.fixmatch.FixMatchCTA, min_confidence: 0.2}
""")


class Driver:
    """One `orchestrator run`, or another verb, as a process, and all of its Ray."""

    def __init__(self, place, recipe, *overrides, store, halt=None, inside=(), verb="run"):
        self.place = Path(tempfile.mkdtemp(prefix="or", dir="/tmp"))  # Ray's sockets need a short path
        self.halt = self.place / "halt"
        self.halt.mkdir()
        self.ask(halt)
        file = place / "small.yaml"
        file.write_text(recipe, encoding="utf-8")
        program = Path(sys.executable).with_name("orchestrator")
        command = [*inside, program, verb, file, *overrides, "--store", store, "--json"]
        ours = {
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(self.place),
            "HALT_FOLDER": str(self.halt),
            "PYTHONPATH": str(ROOT),
        }
        foreign = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "ORCHESTRATOR_STORE")
        environment = {k: v for k, v in os.environ.items() if k not in foreign} | ours
        with (self.place / "out").open("wb") as out, (self.place / "err").open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)

    def ask(self, moment):
        """Let every process that waits go on, and have those that come to `moment` wait there."""
        for old in self.halt.glob("reached-*"):
            old.unlink()
        if moment is None:
            (self.halt / "at").unlink(missing_ok=True)
            return
        part = self.halt / "part"
        part.write_text(moment)
        part.rename(self.halt / "at")

    def reached(self, processes=1):
        """The ids of the processes that wait at the moment asked for, once there are so many."""

        def look():
            assert self.process.poll() is None, f"the driver ended before the moment: {self.output}"
            found = [int(path.name.removeprefix("reached-")) for path in self.halt.glob("reached-*")]
            return found if len(found) >= processes else None

        return eventually(look, f"{processes} processes at the moment; {self.output}")

    def title(self, pid):
        """How a process of this driver is called, such as ray::Coordinator.run."""
        assert pid in {process.pid for process in self.processes()}
        return psutil.Process(pid).cmdline()[0]

    def find(self, title):
        """The one process of this driver's Ray whose title begins so."""

        def look():
            found = []
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    found += [process.pid for part in process.cmdline()[:1] if part.startswith(title)]
            return found or None

        (pid,) = eventually(look, title)
        return pid

    def processes(self):
        """Everything that runs for this driver: its descendants, and what writes into its Ray's folder."""
        found = []
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            found = [top, *top.children(recursive=True)]
        known = {process.pid for process in found}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                ours = any(os.readlink(f"/proc/{process.pid}/fd/{n}").startswith(f"{self.place}/ray/") for n in (1, 2))
                if process.pid not in known and ours:
                    found.append(process)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def kill(self, pid=None):
        """kill -9: of the driver, or of another process of its Ray."""
        assert pid is None or pid in {process.pid for process in self.processes()}
        os.kill(pid or self.process.pid, signal.SIGKILL)
        if pid is None:
            self.process.wait(DEADLINE)

    def interrupt(self):
        """Ctrl-C, as a terminal sends it: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self):
        """Ctrl-C, and the time until the next step sees it."""
        self.interrupt()
        eventually(lambda: True if "stopping after this step" in self.output else None, "the answer to Ctrl-C")
        time.sleep(0.25)  # a training looks up the wish five times a second

    def end(self):
        """The exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(DEADLINE)
        raise AssertionError(f"still running; {self.output}")

    def result(self):
        """What a run that ends well printed for machines."""
        assert self.end() == 0, self.output
        return json.loads((self.place / "out").read_text(encoding="utf-8"))

    @property
    def output(self):
        """What it wrote for people."""
        return (self.place / "err").read_text(encoding="utf-8", errors="replace")

    def gone(self):
        """Wait until nothing of it runs any more."""
        eventually(lambda: not self.processes() or None, f"the end of {self.processes()}")

    def close(self):
        """Leave no process and no file behind."""
        for _ in range(100):
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not left:
                break
            time.sleep(0.1)
        self.process.wait(DEADLINE)
        shutil.rmtree(self.place, ignore_errors=True)


def eventually(look, what):
    """The first answer that is not None."""
    end = time.monotonic() + DEADLINE
    while (found := look()) is None:
        if time.monotonic() > end:
            pytest.fail(f"waited {DEADLINE:.0f} s for {what}")
        time.sleep(0.02)
    return found


@pytest.fixture
def driver(tmp_path):
    """Starts drivers, and leaves nothing of them running."""
    started = []

    def start(recipe=WAITING, *overrides, **options):
        started.append(Driver(tmp_path, recipe, *overrides, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def store(tmp_path):
    """A path as people have them."""
    return tmp_path / "größe und raum 店"


def run_unbroken(recipe, root):
    """Digests and ledger of a recipe that is run in this process without a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.run.Sender.start", lambda self: None)
        patch.setattr("orchestrator.run.Sender.finish", lambda self, timeout: None)
        result = execute(prepare(parse(recipe), root, label="small"), use_ray=False)
    return digests(result.json()), ledger(root, result.json())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run_unbroken(WAITING, tmp_path_factory.mktemp("unbroken") / "store")


@pytest.fixture(scope="module")
def unbroken_clusters(tmp_path_factory):
    return run_unbroken(CLUSTERS, tmp_path_factory.mktemp("clusters") / "store")


@pytest.fixture(scope="module")
def unbroken_consistent(tmp_path_factory):
    return run_unbroken(CONSISTENT, tmp_path_factory.mktemp("consistent") / "store")


def digests(result):
    return {stage["name"]: stage["digest"] for stage in result["stages"]}


def states(result):
    return {stage["name"]: stage["state"] for stage in result["stages"]}


def ledger(root, result):
    """The rows of every round of pseudo-labels."""
    opened = Store.open(root)
    answers = [opened.open_artifact(stage["key"]) for stage in result["stages"]]
    return [answer.table().to_pylist() for answer in answers if isinstance(answer, Labels)]


def finished(store):
    """Manifest of every stage that is done, as it was written."""
    return {path.parent.name: path.read_bytes() for path in store.glob("artifacts/[!.]*/manifest.json")}


def assert_went_on(result, store, before, unbroken):
    """Bit-equal answers, and nothing that was done is done again or touched."""
    assert (digests(result), ledger(store, result)) == unbroken
    after = finished(store)
    assert {key: after[key] for key in before} == before
    for stage in result["stages"]:
        assert (stage["state"] == "stored") == (stage["key"] in before), stage


DRIVER_MOMENTS = [
    pytest.param("SimCLR 0.50", "pretrain", "resumed", id="in a training, between checkpoints"),
    pytest.param("SimCLR 0.00", "pretrain", "ran", id="before the first checkpoint", marks=pytest.mark.slow),
    pytest.param("before commit Train None", "pretrain", "resumed", id="at a commit", marks=pytest.mark.slow),
    pytest.param(
        "after commit Train None", "probe", "ran", id="after a commit, before anybody knew", marks=pytest.mark.slow
    ),
    pytest.param("labelling", "students.0.pseudo", "ran", id="while the teacher labels", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("moment", "stage", "state"), DRIVER_MOMENTS)
def test_a_driver_killed_goes_on_in_a_renamed_store(driver, store, unbroken, moment, stage, state):
    first = driver(store=store, halt=moment)
    first.reached()
    first.kill()
    first.gone()
    before = finished(store)
    moved = store.rename(store.with_name("renamed 移動"))
    result = driver(store=moved).result()
    assert states(result)[stage] == state
    assert_went_on(result, moved, before, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "stage", "state"), [
    pytest.param("PIRL 0.50", "pretrain", "resumed", id="after a bank's update, before the checkpoint"),
    pytest.param("k-means 3", "clusters", "ran", id="in the third iteration of k-means"),
])  # fmt: skip
def test_a_driver_killed_leaves_no_trace_in_a_bank_or_in_clusters(
    driver, store, unbroken_clusters, moment, stage, state
):
    first = driver(CLUSTERS, store=store, halt=moment)
    first.reached()
    first.kill()
    first.gone()
    before = finished(store)
    assert len(before) == ["pretrain", "clusters"].index(stage)
    result = driver(CLUSTERS, store=store).result()
    assert states(result)[stage] == state
    assert_went_on(result, store, before, unbroken_clusters)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "stage"), [
    pytest.param("MeanTeacher 0.50", "mean_teacher", id="after a step of Mean Teacher"),
    pytest.param("FixMatchCTA 0.50", "fixmatch_cta", id="after an update of CTAugment's bins"),
])  # fmt: skip
def test_a_driver_killed_leaves_no_trace_in_a_moving_average_or_in_bins(
    driver, store, unbroken_consistent, moment, stage
):
    first = driver(CONSISTENT, store=store, halt=moment)
    first.reached()
    first.kill()
    first.gone()
    before = finished(store)
    result = driver(CONSISTENT, store=store).result()
    assert states(result)[stage] == "resumed"
    assert_went_on(result, store, before, unbroken_consistent)


@pytest.mark.slow
def test_a_driver_killed_in_the_second_round_goes_on_there_without_waiting(driver, store, unbroken):
    first = driver(store=store, halt="after commit Gate 0")
    first.reached()
    first.ask("NoisyStudent 0.50")
    first.reached()
    eventually(lambda: told(first, "students.0.gate"), "the first round's end is told while the second runs")
    first.kill()  # its coordinator still waits in the step, and holds the stage's lock until Ray ends it
    before = finished(store)
    result = driver(store=store).result()
    assert states(result)["students.1.student"] == "resumed"
    assert_went_on(result, store, before, unbroken)


def told(run, stage):
    """How often the output says that a stage without a progress bar is done."""
    return len(re.findall(rf"^{re.escape(stage)} ", run.output, re.MULTILINE))


COORDINATOR_MOMENTS = [
    pytest.param("NoisyStudent 0.50", id="in a student's training", marks=pytest.mark.slow),
    pytest.param("labelling", id="while the teacher labels", marks=pytest.mark.slow),
    pytest.param("before commit PseudoLabel 0", id="at a commit", marks=pytest.mark.slow),
    pytest.param("after commit Gate 0", id="between rounds", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moment", COORDINATOR_MOMENTS)
def test_a_coordinator_killed_comes_back_and_the_run_ends_as_if_nothing_happened(driver, store, unbroken, moment):
    run = driver(store=store, halt=moment)
    (pid,) = run.reached()
    assert run.title(pid).startswith("ray::Coordinator")
    run.kill(pid)
    before = finished(store)
    run.ask(None)
    result = run.result()
    assert (digests(result), ledger(store, result)) == unbroken
    assert {key: value for key, value in finished(store).items() if key in before} == before
    assert told(run, "students.0.gate") == told(run, "students.1.gate") == 1
    if moment.startswith("NoisyStudent"):
        assert states(result)["students.0.student"] == "resumed"


def test_a_coordinator_tells_everything_once_and_all_of_it_again_after_a_restart(store):
    prepared = prepare(parse(WAITING), store, label="small")
    prepared.folder.mkdir(parents=True)
    (prepared.folder / "recipe.yaml").write_text(prepared.recipe.text, encoding="utf-8")
    coordinator = Coordinator("students", store, prepared.name, 0)
    outcome = Outcome("students.0.pseudo", "PseudoLabel", "key", "ran")
    coordinator.said += ["one", outcome, "three"]
    first = coordinator.status()
    assert first["said"] == ["one", outcome, "three"]
    assert coordinator.status(first["life"], 1)["said"] == [outcome, "three"]
    assert coordinator.status(first["life"], 3)["said"] == []
    restarted = Coordinator("students", store, prepared.name, 0)
    restarted.said += ["one", "two", "three", "four"]
    assert restarted.status(first["life"], 3)["said"] == ["one", "two", "three", "four"]


@pytest.mark.slow
def test_a_coordinator_learns_from_the_corrections_that_its_driver_was_given(driver, store, tmp_path, unbroken):
    images = prepare(parse(WAITING), tmp_path / "first", label="small").plans[0].images["unlabelled"]
    file = tmp_path / "corrected.csv"
    file.write_text(f"round,id,corrected\n0,{images.ids[3]},7\n0,{images.ids[5]},?\n", encoding="utf-8")
    recipe = WAITING.replace("max_class_share: 1.0", f"max_class_share: 1.0\n        corrections: {file}")
    expected = run_unbroken(recipe, tmp_path / "alone")
    assert expected[0]["students.0.pseudo"] == unbroken[0]["students.0.pseudo"]
    assert expected[0]["students.1.pseudo"] != unbroken[0]["students.1.pseudo"]
    result = driver(recipe, store=store).result()
    assert (digests(result), ledger(store, result)) == expected


@pytest.mark.slow
def test_a_labeller_killed_comes_back_and_its_images_are_labelled_all_the_same(driver, store, unbroken):
    run = driver(WAITING, "resources.labellers=1", store=store, halt="labelling")
    (pid,) = run.reached()
    assert run.title(pid).startswith("ray::Labeller")
    run.kill(pid)
    run.ask(None)
    result = run.result()
    assert (digests(result), ledger(store, result)) == unbroken
    assert set(states(result).values()) == {"ran"}


@pytest.mark.slow
def test_a_coordinator_killed_while_its_labellers_work_gets_new_ones(driver, store, unbroken):
    run = driver(WAITING, "resources.labellers=1", store=store, halt="labelling")
    (labeller,) = run.reached()
    run.kill(run.find("ray::Coordinator"))
    eventually(lambda: not psutil.pid_exists(labeller) or None, "the end of the labeller, whose owner is dead")
    run.ask(None)
    result = run.result()
    assert (digests(result), ledger(store, result)) == unbroken


INTERRUPT_MOMENTS = [
    pytest.param("SimCLR 0.50", "pretrain", id="in this process", marks=pytest.mark.slow),
    pytest.param("NoisyStudent 0.50", "students.0.student", id="in the coordinator", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("moment", "stage"), INTERRUPT_MOMENTS)
def test_ctrl_c_stops_after_the_step_and_the_same_command_goes_on(driver, store, unbroken, moment, stage):
    first = driver(store=store, halt=moment)
    first.reached()
    first.stop()
    first.ask(None)
    assert first.end() == 130
    assert "Stopped. Everything done is kept; the same command goes on" in first.output
    assert "Traceback" not in first.output
    first.gone()
    before = finished(store)
    result = driver(store=store).result()
    assert states(result)[stage] == "resumed"
    assert_went_on(result, store, before, unbroken)


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once_and_loses_nothing(driver, store, unbroken):
    first = driver(store=store, halt="SimCLR 0.50")
    first.reached()
    first.stop()
    first.interrupt()  # the step never ends: it waits
    assert first.end() == 130
    assert "Traceback" not in first.output
    before = finished(store)
    result = driver(store=store).result()
    assert states(result)["pretrain"] == "resumed"
    assert_went_on(result, store, before, unbroken)


# a disk of 64 MB at $1, kept in $2 when the command that follows is over
SMALL_DISK = """
mount -t tmpfs -o size=64m tmpfs "$1" || exit 99
disk="$1" kept="$2"
shift 2
"$@"
code=$?
cp -a "$disk/." "$kept"
exit $code
"""
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def may_mount(place):
    """Whether this machine lets a user mount a disk that only its own processes see."""
    if shutil.which("unshare") is None:
        return False
    test = [*UNSHARE, 'mount -t tmpfs tmpfs "$1"', "sh", place]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before commit Train None", "SimCLR 0.50"])
def test_a_full_disk_is_one_line_and_with_more_space_the_run_goes_on(driver, tmp_path, unbroken, moment):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    if not may_mount(disk):
        pytest.skip("this machine lets no user mount a small disk")
    first = driver(store=disk, halt=moment, inside=[*UNSHARE, SMALL_DISK, "sh", disk, kept])
    (pid,) = first.reached()
    ballast = Path(f"/proc/{pid}/root{disk}/ballast")
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    first.ask(None)
    assert first.end() == 2, first.output
    assert "Traceback" not in first.output
    (line,) = [line for line in first.output.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line and "run the same command again" in line
    (kept / "ballast").unlink()
    before = finished(kept)
    result = driver(store=kept).result()
    assert states(result)["pretrain"] == "resumed"
    assert_went_on(result, kept, before, unbroken)


@pytest.fixture(scope="module")
def unbroken_two(tmp_path_factory):
    """The same of two training processes, on Ray: each has its own batch statistics, so the answers are others."""
    place = tmp_path_factory.mktemp("two")
    run = Driver(place, TWO_WORKERS, store=place / "store")
    try:
        result = run.result()
        return digests(result), ledger(place / "store", result)
    finally:
        run.close()


def diverge(rank, root, rendezvous, ends):
    """One of two training processes; the second one's loss is not a number."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    plan = prepare(parse(TWO_WORKERS), root, label="two").plans[0]
    stage = next(planned.stage for planned in plan.stages if planned.name == "teacher")
    if rank == 1:
        step = Supervised.training_step
        Supervised.training_step = lambda *given: {k: v * math.nan for k, v in step(*given).items()}
    try:
        fit = Fit(stage, Context(ends, ends, 0, plan.classes), plan.images["labelled"], None, None, None, None, None)
        fit.run(part=rank, parts=2)
    except FloatingPointError as error:
        (ends / str(rank)).write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_workers_stop_when_the_loss_of_one_is_not_finite(tmp_path):
    prepare(parse(TWO_WORKERS), tmp_path / "store", label="two")
    mp.spawn(diverge, (tmp_path / "store", tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first.startswith("another worker's loss is not finite at step 0: lower optim.lr")
    assert second.startswith("loss is nan at step 0: lower optim.lr")


@pytest.mark.slow
def test_two_workers_lose_one_of_them_and_then_their_coordinator(driver, store, unbroken_two):
    run = driver(TWO_WORKERS, store=store, halt="Supervised 0.50")
    worker = run.reached(processes=2)[0]
    assert run.title(worker).startswith("ray::RayTrainWorker")
    run.kill(worker)
    run.ask("NoisyStudent 0.50")
    run.reached(processes=2)
    run.kill(run.find("ray::Coordinator"))
    run.ask(None)
    result = run.result()
    assert (digests(result), ledger(store, result)) == unbroken_two
    assert states(result)["students.0.student"] == "resumed"


@pytest.mark.slow
def test_two_workers_go_on_after_ctrl_c_after_their_controllers_death_and_after_their_drivers(
    driver, store, unbroken_two
):
    first = driver(TWO_WORKERS, store=store, halt="Supervised 0.25")
    first.reached(processes=2)
    first.stop()
    first.ask(None)
    assert first.end() == 130 and "Traceback" not in first.output
    second = driver(TWO_WORKERS, store=store, halt="Supervised 0.50")
    second.reached(processes=2)
    second.kill(second.find("ray::TrainController"))
    second.ask("NoisyStudent 0.50")
    second.reached(processes=2)
    second.kill()
    before = finished(store)
    result = driver(TWO_WORKERS, store=store).result()
    assert states(result)["teacher"] == "stored" and states(result)["students.0.student"] == "resumed"
    assert_went_on(result, store, before, unbroken_two)
