"""What an image costs at every stage, and how much work one driver, coordinator and store keep up with.

    python -m benchmarks.scaling [--only costs|simulation] [--json FILE] [--quick]

Costs are CPU time of one thread for an image: scan, reading, views, a training step, a labelling pass, the assignment
to a cluster; and bytes for an image: catalogue, ledger, memory of a driver. The simulation trains nothing: stages that
answer at once, shards that cost nothing and heartbeats go through the real store, pipeline, recorder, labelling pool
and coordinator, from as many logical workers as a cluster would have. It is timed by the clock, since several processes
take part, and says little beside other work: the load average is printed. docs/scaling.md does the arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor

from benchmarks.pictures import PIXELS, load_images
from benchmarks.turns import cpu_name
from methods.base import Method
from methods.clustering import nearest, normalise_rows
from methods.encoders import Encoder, ResNet, ResNetConfig, SmallCNN, SmallCNNConfig
from methods.simclr import SimCLR, SimCLRConfig
from methods.supervised import Supervised, SupervisedConfig
from orchestrator.artifacts import Checkpoint
from orchestrator.component import Component
from orchestrator.context import SHARD, Context, Forward
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.data.splits import DataConfig, Split, open_data
from orchestrator.display import status_rows
from orchestrator.pipeline import Setting, run_plan
from orchestrator.plan import units
from orchestrator.recipe import Resources, parse
from orchestrator.records import Recorder
from orchestrator.run import execute, prepare
from orchestrator.stage import Stage
from orchestrator.stages.pseudo_label import PseudoLabel
from orchestrator.training.loop import Stream, make_batch, train_steps
from orchestrator.training.optim import Optim
from orchestrator.training.precision import auto_precision

BATCH = 128
PHOTO = 224  # pixels that a photograph is learned from; it is larger on the disk
CLUSTERS, DIM = 1000, 512
COORDINATED = "rounds"


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    images: int  # at 32 pixels
    photos: int
    seconds: float  # CPU time of each figure at least
    encoders: tuple[str, ...]
    rows: int  # of ledgers
    stages: int  # a process runs one after the other
    processes: tuple[int, ...]
    labellers: tuple[int, ...]
    shards: int
    rounds: int


FULL = Scale(8192, 96, 2.0, ("SmallCNN", "ResNet-18"), 100_000, 12, (1, 8, 32), (8, 64, 512), 1024, 20)
QUICK = Scale(256, 4, 0.05, ("SmallCNN",), 2_000, 3, (1, 2), (4,), 16, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["costs", "simulation"], help="one of the two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="little of everything: a smoke test")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"one thread of {cpu_name()}, torch {torch.__version__}; load average {load:.1f} at the start")
    record: dict[str, Any] = {"cpu": cpu_name(), "torch": torch.__version__, "load_at_start": load}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "simulation":
            record["costs"] = told(costs(Path(folder), scale))
        if options.only != "costs":
            record["simulation"] = told(simulation(Path(folder), scale))
    record["load_at_end"] = os.getloadavg()[0]
    print(f"load average {record['load_at_end']:.1f} at the end")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def told(figures: Iterator[tuple[str, float, str]]) -> dict[str, dict[str, Any]]:
    """Print figures as they come, and keep them by name: {"value", "unit"}."""
    found: dict[str, dict[str, Any]] = {}
    for name, value, unit in figures:
        found[name] = {"value": value, "unit": unit}
        print(f"{name:58}{value:14,.3g} {unit}" if value < 1000 else f"{name:58}{value:14,.0f} {unit}", flush=True)
    return found


# ---- costs


def costs(folder: Path, scale: Scale) -> Iterator[tuple[str, float, str]]:
    """(what, how much, unit) of every stage."""
    records = large_source(folder / "records", scale.rows)
    small, photos = pictures(folder / "small", scale.images), photographs(folder / "photos", scale.photos)
    us = "µs an image"
    begin = time.process_time()
    copied = opened(small, folder, PIXELS)
    yield f"scan, {PIXELS} px PNG", per_image(begin, scale.images), us
    begin = time.process_time()
    streamed = opened(small, folder, PIXELS, stream="always")
    yield f"scan, {PIXELS} px PNG, streamed", per_image(begin, scale.images), us
    begin = time.process_time()
    large = opened(photos, folder, PHOTO)
    yield "scan, 500 x 375 JPEG", per_image(begin, scale.photos), us
    yield f"reading, {PIXELS} px, decoded in the store", reading(copied, scale), us
    yield f"reading, {PIXELS} px, streamed from shards", reading(streamed, scale), us
    yield f"reading, 500 x 375 JPEG to {PHOTO} px", reading(large, scale), us
    views = SimCLR(new_encoder("SmallCNN"), SimCLRConfig(), classes=0, images=0).views(PIXELS)
    stream = Stream("unlabelled", copied, Order.of(copied, BATCH, 0))
    steps = itertools.count()
    one = cpu(lambda: make_batch(views, [stream], next(steps), seed=0, device=torch.device("cpu")), scale)
    yield f"views, SimCLR's two at {PIXELS} px, with reading", one / BATCH, us
    for name in scale.encoders:
        yield f"training step, SimCLR with {name} at {PIXELS} px", training(name, copied, scale), us
        yield f"labelling pass, {name} at {PIXELS} px", labelling(name, copied, folder / name, scale), us
    centroids = normalise_rows(torch.randn(CLUSTERS, DIM))
    rows = normalise_rows(torch.randn(4096, DIM))
    assigned = cpu(lambda: nearest(rows, centroids), scale) / len(rows)
    yield f"assignment, {CLUSTERS:,} clusters of {DIM} numbers, an iteration", assigned, us
    yield from sizes(folder, copied, records, scale)


def per_image(begin: float, count: int) -> float:
    """Microseconds of CPU time since `begin` for each of `count` images."""
    return (time.process_time() - begin) / count * 1e6


def cpu(run: Callable[[], Any], scale: Scale) -> float:
    """Microseconds of CPU time of a call, after one that is not counted."""
    run()
    begin, calls = time.process_time(), 0
    while time.process_time() - begin < scale.seconds or not calls:
        run()
        calls += 1
    return per_image(begin, calls)


def pictures(folder: Path, count: int) -> str:
    """A Parquet shard of small PNGs, in row groups of 1,000: the path to give as a source."""
    _, images = load_images(count)
    return written(folder, [encoded(image, "PNG") for image in images])


def photographs(folder: Path, count: int) -> str:
    """The same of smooth pictures in the size and form of ImageNet's typical file, with grain: about 90 KB each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 24, 32, generator=generator)
    images = F.interpolate(coarse, (375, 500), mode="bicubic")
    images += 0.06 * torch.randn(images.shape, generator=generator)
    return written(folder, [encoded((255 * image.clamp(0, 1)).to(torch.uint8), "JPEG", quality=90) for image in images])


def encoded(image: Tensor, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    TF.to_pil_image(image).save(buffer, kind, **options)
    return buffer.getvalue()


def written(folder: Path, cells: list[bytes]) -> str:
    folder.mkdir()
    table = pa.table({"image": pa.array(cells, pa.binary())})
    pq.write_table(table, folder / "train.parquet", row_group_size=1000, compression="none")
    return str(folder / "train")


def opened(source: str, folder: Path, pixels: int, **options: Any) -> Images:
    config = DataConfig(pixels=pixels, splits={"images": Split(source=source)}, **options)
    return open_data(config, folder / "data", seed=0).splits["images"]


def reading(images: Images, scale: Scale) -> float:
    """Microseconds an image of an epoch in its order."""
    batch = min(BATCH, len(images))
    order, steps = Order.of(images, batch, 0), itertools.count()
    return cpu(lambda: images.batch(order.at(next(steps))[0]), scale) / batch


def training(name: str, images: Images, scale: Scale) -> float:
    """Microseconds an image of whole SimCLR steps: reading, views, forward, backward, update."""
    torch.manual_seed(0)
    method = SimCLR(new_encoder(name), SimCLRConfig(), classes=0, images=0).to(memory_format=torch.channels_last)
    optim = Optim(name="sgd", lr=0.03, schedule="constant", warmup=0.0)
    steps = train_steps(
        method.train(), method, (Stream("unlabelled", images, Order.of(images, BATCH, 0)),), optim.build(method), optim,
        pixels=PIXELS, start=0, total=1_000_000, seed=0, precision=auto_precision(method.encoder),
    )  # fmt: skip
    return cpu(lambda: next(steps), scale) / BATCH


def labelling(name: str, images: Images, folder: Path, scale: Scale) -> float:
    """Microseconds an image of a labeller's pass: reading and logits."""
    folder.mkdir()
    torch.manual_seed(0)
    rows = torch.arange(min(256, len(images)))
    run = Forward(new_checkpoint(name, folder), images, "logits").open()
    return cpu(lambda: run(rows), scale) / len(rows)


def new_encoder(name: str) -> Encoder:
    return SmallCNN(SmallCNNConfig()) if name == "SmallCNN" else ResNet(ResNetConfig(depth=18, stem="cifar"))


def new_checkpoint(name: str, folder: Path, classes: int = 10) -> Checkpoint:
    """An untrained classifier, stored."""
    encoder = new_encoder(name)
    method: Method = Supervised(encoder, SupervisedConfig(), classes=classes, images=0)
    return Checkpoint.write(
        folder, state=method.state_dict(), encoder=component(encoder), method=component(method),
        classes=tuple(map(str, range(classes))), images=0, pixels=PIXELS,
        precision=auto_precision(encoder), curves=[], facts={},
    )  # fmt: skip


def component(module: Method | Encoder) -> Component:
    return Component(f"{type(module).__module__}.{type(module).__name__}", module.config)


def large_source(folder: Path, count: int) -> str:
    """`count` different images of 2 x 2 pixels: a catalogue's rows, and hardly any pixels."""
    head = np.frombuffer(b"P6 2 2 255\n", np.uint8)
    pixels = np.arange(3 * count, dtype=np.uint32).view(np.uint8).reshape(count, 12)
    data = np.concatenate([np.broadcast_to(head, (count, len(head))), pixels], axis=1)
    return written(folder, [row.tobytes() for row in data])


def sizes(folder: Path, images: Images, records: str, scale: Scale) -> Iterator[tuple[str, float, str]]:
    """Bytes of an image on the disk, and of the driver's memory."""
    rows = len(images)
    catalogue = images._catalogues[0].folder
    yield "catalogue on the disk", (catalogue / "catalogue.arrow").stat().st_size / rows, "bytes an image"
    yield f"decoded copy in the store, {PIXELS} px", (catalogue / "pixels.u8").stat().st_size / rows, "bytes an image"
    scanning, opening = (peak(lambda: opened(records, folder, 2)) / scale.rows for _ in range(2))
    yield "memory of a scan, at most", scanning, "bytes an image"
    yield "memory to open the data once more, at most", opening, "bytes an image"
    for classes in (10, 1000):
        count = scale.rows * max(1, 100 // classes)  # so many that the process itself hardly counts
        place = folder / f"ledger-{classes}"
        place.mkdir()
        used = peak(functools.partial(ledger, place, count, classes))
        size = (place / "labels.parquet").stat().st_size
        yield f"ledger on the disk, {classes:,} classes", size / count, "bytes an image a round"
        yield f"memory to label, {classes:,} classes, at most", used / count, "bytes an image"


def peak(run: Callable[[], Any]) -> int:
    """Most bytes that a call adds to the memory of its process, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=grow, args=(run, theirs))
    process.start()
    theirs.close()
    grown = ours.recv()
    process.join()
    return grown


def grow(run: Callable[[], Any], answer: Any) -> None:
    before = psutil.Process().memory_info().rss
    run()
    answer.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


class Pool:
    """Stands for images of which nothing but their names is read."""

    def __init__(self, count: int, classes: int) -> None:
        self.ids = np.array([f"{row:032x}" for row in range(count)])
        self.classes = tuple(f"class {number}" for number in range(classes))

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, row: int) -> str:
        return f"s3://bucket/images/train-00000-of-01000.parquet row {row}"


def ledger(folder: Path, count: int, classes: int) -> None:
    """One round of labels, by the stage that makes them, of logits as a trained teacher has."""
    images: Any = Pool(count, classes)
    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(0)).mul_(3)
    logits[torch.arange(count), torch.arange(count) % classes] += 10
    context = Answered(folder, folder, 0, images.classes)
    context.answer = logits
    teacher = Checkpoint(folder, {}, "0" * 32)
    PseudoLabel(min_confidence=0.5).run(context, teacher=teacher, images=images)


class Answered(Context):
    """A context whose teacher has looked at all images already."""

    answer: Tensor

    def logits(self, checkpoint: Checkpoint, images: Images) -> Tensor:
        return self.answer


# ---- simulation


@dataclass(frozen=True, kw_only=True)
class Instant(Stage):
    """Answers with a checkpoint that it has ready: what is left of a stage when its work costs nothing."""

    number: int

    def run(self, context: Context, *, teacher: Checkpoint | None = None, images: Images | None = None) -> Checkpoint:
        context.progress(1, 1)
        context.log(0, {"loss": 0.0})
        return tiny(context.output, context.classes)


@functools.cache
def tiny_state() -> dict[str, Tensor]:
    encoder = SmallCNN(SmallCNNConfig(width=0.25))
    return Supervised(encoder, SupervisedConfig(), classes=10, images=0).state_dict()


def tiny(folder: Path, classes: tuple[str, ...]) -> Checkpoint:
    encoder = Component("methods.encoders.SmallCNN", SmallCNNConfig(width=0.25))
    method = Component("methods.supervised.Supervised", SupervisedConfig())
    return Checkpoint.write(
        folder, state=tiny_state(), encoder=encoder, method=method, classes=classes, images=0, pixels=8,
        precision="float32", curves=[], facts={},
    )  # fmt: skip


def recipe_of(name: str, stages: dict[str, Any]) -> Any:
    """A recipe of instant stages on scikit-learn's digits."""
    text = {"name": name, "data": {"pixels": 8, "images": "digits/test"}, "stages": stages, "resources": {"threads": 1}}
    return parse(json.dumps(text), label=name)


def instant(number: int, **inputs: str) -> dict[str, Any]:
    return {"use": "benchmarks.scaling.Instant", "number": number, "inputs": {"images": "images", **inputs}}


def simulation(folder: Path, scale: Scale) -> Iterator[tuple[str, float, str]]:
    """(what, how much, unit): work a second that driver, store and coordinator keep up with."""
    root = folder / "store"
    for count in scale.processes:
        rate = processes(root, count, scale.stages)
        yield f"stages committed by {count} processes at once", rate, "stages a second"
    yield from heartbeats(root, scale)
    with ray_started(folder):
        for count in scale.labellers:
            rate, busy = labellers(count, scale.shards)
            yield f"shards through {count} labellers", rate, "shards a second"
            yield f"driver's time for a shard of {count} labellers", busy * 1e3, "ms of CPU"
        yield from coordinator(root, scale.rounds)


def processes(root: Path, count: int, stages: int) -> float:
    """Stages a second of `count` drivers, each with a plan of its own, all in one store and one run's records."""
    plans = []
    for place in range(count):
        own = {f"stage{n}": instant((count * 1000 + place) * 1000 + n) for n in range(stages)}
        plans.append(prepare(recipe_of(f"simulated-{count}-{place}", own), root, label="simulated"))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count + 1)
    drivers = [context.Process(target=drive, args=(plan, root / "runs" / "all", barrier)) for plan in plans]
    tiny_state()
    for driver in drivers:
        driver.start()
    barrier.wait()
    begin = time.perf_counter()
    for driver in drivers:
        driver.join()
    seconds = time.perf_counter() - begin
    missing = [stage.key for plan in plans for stage in plan.plans[0].stages if not plan.store.has(stage.key)]
    if missing:
        raise RuntimeError(f"{len(missing)} of {count * stages} simulated stages are not in the store")
    return count * stages / seconds


def drive(prepared: Any, folder: Path, barrier: Any) -> None:
    plan = prepared.plans[0]
    barrier.wait()
    recorder = Recorder(folder)
    run_plan(plan, Setting(prepared.store, folder, prepared.recipe.resources, recorder, f"{prepared.name}/"))
    recorder.close()


def heartbeats(root: Path, scale: Scale) -> Iterator[tuple[str, float, str]]:
    """What workers say of themselves, and what it takes to look at all of them."""
    count = scale.stages * max(scale.processes)
    contexts = []
    for number in range(count):
        workdir = root / "work" / f"{number:032x}"
        workdir.mkdir(parents=True, exist_ok=True)
        contexts.append(Context(workdir, workdir, 0, ()))
    begin = time.perf_counter()
    for context in contexts:
        context.progress(1, 1)
    yield f"heartbeats of {count} workers", count / (time.perf_counter() - begin), "heartbeats a second"
    recorder = Recorder(root / "runs" / "metrics")
    begin, values = time.perf_counter(), 10 * count
    for step in range(values):
        recorder.metrics("stage", {"loss": 1.0, "learning_rate": 0.1, "images_per_second": 100.0}, step)
    recorder.close()
    yield "metric records of three values", values / (time.perf_counter() - begin), "records a second"
    stages = {f"stage{n}": instant(10_000_000 + n) for n in range(count)}
    prepared = prepare(recipe_of("looked-at", stages), root, label="looked-at")
    (prepared.folder / "stages").mkdir(parents=True)
    names = [stage.name for stage in prepared.plans[0].stages]
    heads = [{"name": n, "kind": "Instant", "key": f"{k:032x}", "round": None} for k, n in enumerate(names)]
    (prepared.folder / "run.json").write_text(json.dumps({"stages": heads}))
    outcome = {"state": "running", "seconds": 0.0, "computing": 0.0, "digest": None, "note": "", "facts": {}}
    for head in heads:
        text = json.dumps({**head, **outcome, "time": 0.0})
        (prepared.folder / "stages" / f"{head['name']}.json").write_text(text)
    begin = time.perf_counter()
    rows = status_rows(prepared.store.root, prepared.folder)
    seconds = time.perf_counter() - begin
    if not all(row["progress"]["done"] == 1 for row in rows):
        raise RuntimeError("the heartbeats of some workers are not seen")
    yield f"looks at the status of {count} stages", 1 / seconds, "looks a second"


@contextlib.contextmanager
def ray_started(folder: Path) -> Iterator[None]:
    import ray

    from orchestrator.cluster.connect import connect

    connect(Resources(threads=1))
    try:
        yield
    finally:
        ray.shutdown()


class Free:
    """A forward pass that costs nothing."""

    def open(self) -> Callable[[Tensor], Tensor]:
        return lambda rows: torch.zeros(len(rows), 10)


def labellers(count: int, shards: int) -> tuple[float, float]:
    """(shards a second, the driver's seconds of CPU for one) of the labelling pool with `count` logical labellers.

    They are shared out over two processes: what is measured is who asks and collects, not they.
    """
    import ray

    from orchestrator.cluster import extract

    kind = ray.remote(num_cpus=0, max_concurrency=64)(extract.Labeller)

    class Shared:
        """Stands for the labellers' class, and gives out two of them in turns."""

        hosts = [kind.remote(Free()) for _ in range(2)]
        turn = itertools.cycle(hosts)

        @classmethod
        def options(cls, **_: Any) -> type[Shared]:
            return cls

        @classmethod
        def remote(cls, job: Any) -> Any:
            return next(cls.turn)

    own, extract.LabellerActor = extract.LabellerActor, Shared
    rows = [torch.arange(SHARD) for _ in range(shards)]
    try:
        ray.get([host.answer.remote(rows[0]) for host in Shared.hosts])  # they are up
        begin, busy = time.perf_counter(), time.process_time()
        answers = list(extract.predict_in_pool(Free(), rows, count))  # type: ignore[arg-type]
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    finally:
        extract.LabellerActor = own
    if {number for number, _ in answers} != set(range(shards)) or any(a.shape != (SHARD, 10) for _, a in answers):
        raise RuntimeError("the pool lost a shard")
    return shards / seconds, busy / shards


def coordinator(root: Path, rounds: int) -> Iterator[tuple[str, float, str]]:
    """A run with a coordinator whose rounds cost nothing, and somebody who asks it all the time."""
    import ray

    from orchestrator.cluster.connect import NAMESPACE
    from orchestrator.cluster.coordinator import coordinator_name

    stages = {
        "first": instant(1),
        COORDINATED: {
            "rounds": rounds, "carry": {"teacher": "student", "first": "first"},
            "stages": {"student": instant(2, teacher="teacher")},
        },
    }  # fmt: skip
    prepared = prepare(recipe_of("coordinated", stages), root, label="coordinated")
    unit = next(one for one in units(prepared.plans[0]) if one.name == COORDINATED)
    name = coordinator_name(unit, Setting(prepared.store, prepared.folder, prepared.recipe.resources))
    answered: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it is not there yet, or no longer
                actor = ray.get_actor(name, namespace=NAMESPACE)
                begin = time.perf_counter()
                ray.get(actor.status.remote(0), timeout=10)
                answered.append(time.perf_counter() - begin)
            over.wait(0.01)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    result = execute(prepared)
    over.set()
    asking.join()
    done = [json.loads(path.read_text())["time"] for path in (prepared.folder / "stages").glob(f"{COORDINATED}.*.json")]
    if {stage["state"] for stage in result.stages} != {"ran"} or len(done) != 2 * rounds:
        raise RuntimeError("the coordinator did not run every round")
    yield "stages through the coordinator", (len(done) - 1) / (max(done) - min(done)), "stages a second"
    yield "status answers of the coordinator meanwhile", len(answered) / (max(done) - min(done)), "answers a second"
    yield "the longest that one of them took", max(answered) * 1e3, "ms"


if __name__ == "__main__":
    main()
