"""Whole SimCLR training steps per second: ours beside the same step written with lightly's transform and loss.

    python -m benchmarks.step_rate [--rounds N] [--steps N] [--threads N] [--json FILE] [--quick]

Wall clock of two threads, batch 128 at 32 px, SGD, the same encoder class and projector for all. A step is everything
from decoded images in memory to the updated weights. Three contestants for each encoder:

- ours: `train_steps` over a `Stream`, channels-last, in the precision `auto_precision` gives;
- lightly, float32: its SimCLRTransform for each PIL image in a DataLoader with two workers, its NTXentLoss, and the
  plain loop of its documentation: nothing but defaults;
- lightly, tuned: the same, given our precision and memory layout, which a user can switch on as well.

Each contestant lives in a process of its own, since some of what makes a step fast belongs to the whole process, and
they take turns within each round; ratios are the median of each round's, since a shared machine drifts. Every turn
begins with steps that are not timed, so that the loader workers' queue is in its steady state, and ends with the
workers, so that none of their work falls into another's turn. Beside the wall clock stand core-seconds, the CPU time of
the process and its workers: where other programs run they say more, above all with `--threads 1`, since two threads
burn time waiting for each other. The images are CIFAR-10's test split where the environment variable ORCHESTRATOR_DATA
names a folder with `cifar10/test-*.parquet`, otherwise smooth noise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from methods.encoders import Encoder, ResNet, ResNetConfig, SmallCNN, SmallCNNConfig
from methods.simclr import SimCLR, SimCLRConfig
from orchestrator.data.catalogue import open_catalogue
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.data.sources import open_source
from orchestrator.training.loop import Stream, train_steps
from orchestrator.training.optim import Optim
from orchestrator.training.precision import auto_precision, autocast

PIXELS = 32
BATCH = 128
WORKERS = 2
TEMPERATURE = 0.5
OPTIM = Optim(name="sgd", lr=0.03, momentum=0.9, weight_decay=5e-4, schedule="constant", warmup=0.0)
REQUIRED = {"SmallCNN": (3.0, 1.4), "ResNet-18": (2.5, 1.1)}  # over lightly's float32 defaults, over lightly tuned
SHARE = {"SmallCNN": 1.0, "ResNet-18": 0.2}  # of --steps: one ResNet-18 step takes as long as twenty of SmallCNN's
UNTIMED = {"SmallCNN": 2, "ResNet-18": 1}  # a turn's first batches come from workers that have all cores to themselves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median is reported (default 5)")
    parser.add_argument("--steps", type=int, default=10, help="timed SmallCNN steps a turn; ResNet-18: a fifth (10)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the training process (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="SmallCNN only, two rounds of three steps: a smoke test")
    options = parser.parse_args()
    rounds, steps = (2, 3) if options.quick else (options.rounds, options.steps)
    names = ["SmallCNN"] if options.quick else list(REQUIRED)
    missing, version = find_lightly()
    with tempfile.TemporaryDirectory() as folder:
        source, images = open_images(Path(folder))
        load = os.getloadavg()[0]
        print(f"batch {BATCH} of {len(images):,} images of {PIXELS} px ({source})")
        print(f"{options.threads} threads of {cpu_name()}; {rounds} rounds; load average {load:.1f} at the start")
        print(f"torch {torch.__version__}")
        print(missing or f"lightly {version} with {WORKERS} loader workers", flush=True)
        record: dict = {
            "images": source, "cpu": cpu_name(), "torch": torch.__version__, "lightly": version,
            "threads": options.threads, "load_at_start": load, "encoders": {},
        }  # fmt: skip
        for name in names:
            share = max(1, round(steps * SHARE[name]))
            record["encoders"][name] = compare(
                name, images, rounds=rounds, steps=share, threads=options.threads, peer=not missing
            )
    record["load_at_end"] = os.getloadavg()[0]
    print(f"\nload average {record['load_at_end']:.1f} at the end")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def compare(name: str, images: Images, *, rounds: int, steps: int, threads: int, peer: bool) -> dict:
    """Times all contestants with one encoder, prints the table, and returns its numbers."""
    precision = auto_precision(new_encoder(name))
    ours, plain = f"ours ({precision}, channels-last)", "lightly (float32)"
    tuned = f"lightly ({precision}, channels-last)"
    contestants = {ours: Contestant(Ours, threads, name, images, precision)}
    if peer:
        contestants[plain] = Contestant(Lightly, threads, name, images, "float32", torch.contiguous_format)
        contestants[tuned] = Contestant(Lightly, threads, name, images, precision, torch.channels_last)
    wall: dict[str, list[float]] = {key: [] for key in contestants}
    core: dict[str, list[float]] = {key: [] for key in contestants}
    loss: dict[str, float] = {}
    try:
        for number in range(rounds):
            keys = list(contestants)
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:  # nobody always follows the same one
                turn = contestants[key].turn(UNTIMED[name], steps)
                wall[key].append(turn.wall / steps)
                core[key].append(turn.core / steps)
                loss[key] = turn.loss
    finally:
        for contestant in contestants.values():
            contestant.end()
    title = f"{name}, {steps} timed steps a turn"
    print(f"\n{title:34}{'steps/s':>9}{'lowest':>9}{'highest':>9}{'core-s':>9}{'loss':>9}")
    for key in contestants:
        rates = sorted(1 / seconds for seconds in wall[key])
        print(f"{key:34}{statistics.median(rates):9.3f}{rates[0]:9.3f}{rates[-1]:9.3f}"
              f"{statistics.median(core[key]):9.3f}{loss[key]:9.3f}")  # fmt: skip
    ratios = []
    for baseline, required in zip((plain, tuned), REQUIRED[name], strict=True):
        if baseline in contestants:
            each = {
                clock: [b / a for a, b in zip(seconds[ours], seconds[baseline], strict=True)]
                for clock, seconds in (("wall", wall), ("core", core))
            }
            ratio = {clock: statistics.median(values) for clock, values in each.items()}
            ratios.append({"baseline": baseline, "required": required, "ratio": ratio, "rounds": each})
            verdict = "met" if ratio["wall"] >= required else "NOT MET"
            print(f"{'over ' + baseline:34}{ratio['wall']:7.2f} times, required {required:.1f}: {verdict}; "
                  f"{ratio['core']:.2f} times fewer core-seconds", flush=True)  # fmt: skip
    return {"steps": steps, "wall_seconds": wall, "core_seconds": core, "loss": loss, "ratios": ratios}


@dataclass(frozen=True)
class Turn:
    """What a turn's timed steps took, in seconds of the clock and of CPU time of all processes, and the last loss."""

    wall: float
    core: float
    loss: float


class Contestant:
    """A training in a process of its own that goes on when it is its turn and sleeps in between."""

    def __init__(self, kind: Callable, threads: int, *arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, threads, arguments))
        self._process.start()
        theirs.close()

    def turn(self, untimed: int, timed: int) -> Turn:
        """Trains for `untimed + timed` steps and times the last `timed`. Raises EOFError when the process died."""
        self._pipe.send((untimed, timed))
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.close()  # which ends its loop
        self._process.join()


def _serve(pipe: Connection, kind: Callable, threads: int, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    training = kind(*arguments)
    while True:
        try:
            untimed, timed = pipe.recv()
        except EOFError:
            return
        steps = training.turn()
        for _ in range(untimed):
            next(steps)
        wall, core = time.perf_counter(), core_seconds()
        for _ in range(timed):
            loss = next(steps)
        turn = Turn(time.perf_counter() - wall, core_seconds() - core, float(loss))
        del steps  # with it end the loader's workers
        pipe.send(turn)


def core_seconds() -> float:
    """CPU time so far of this process and its live children, in seconds."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children())]
    return sum(used.user + used.system for used in times)


class Ours:
    """The training loop of this package."""

    def __init__(self, name: str, images: Images, precision: str) -> None:
        method = new_method(name).to(memory_format=torch.channels_last).train()
        streams = (Stream("unlabelled", images, Order(len(images), BATCH, seed=1)),)
        self._steps = train_steps(
            method, method, streams, OPTIM.build(method), OPTIM, pixels=PIXELS, start=0, total=1_000_000, seed=0,
            precision=precision,
        )  # fmt: skip

    def turn(self) -> Iterator[Tensor]:
        """The losses of one turn's steps, each after its update."""
        return (step.losses["loss"] for step in self._steps)


class Lightly:
    """The SimCLR example of lightly's documentation: loader workers, a pass for each view, a plain loop."""

    def __init__(self, name: str, images: Images, precision: str, layout: torch.memory_format) -> None:
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform

        self._method = new_method(name).to(memory_format=layout).train()
        self._precision, self._layout = precision, layout
        # the encoder normalises, here as in ours
        transform = SimCLRTransform(input_size=PIXELS, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
        self._loader = DataLoader(
            Pictures(images, transform), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=WORKERS
        )
        self._criterion = NTXentLoss(temperature=TEMPERATURE)
        self._optimizer = torch.optim.SGD(
            self._method.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=OPTIM.nesterov,
            weight_decay=OPTIM.weight_decay,
        )  # fmt: skip

    def turn(self) -> Iterator[Tensor]:
        """The losses of one turn's steps, each after its update; the workers are new, and end with the iterator."""
        method = self._method
        for view1, view2 in self._loader:
            view1, view2 = view1.to(memory_format=self._layout), view2.to(memory_format=self._layout)
            with autocast(self._precision, "cpu"):
                z1 = method.projector(method.encoder(view1))
                z2 = method.projector(method.encoder(view2))
                loss = self._criterion(z1, z2)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            yield loss.detach()


class Pictures(Dataset):
    """Decoded PIL images in memory, each given out as its two views."""

    def __init__(self, images: Images, transform) -> None:
        self._pictures = [TF.to_pil_image(image) for image in images.batch(torch.arange(len(images)))]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self._transform(self._pictures[row])


def new_encoder(name: str) -> Encoder:
    return SmallCNN(SmallCNNConfig()) if name == "SmallCNN" else ResNet(ResNetConfig(depth=18, stem="cifar"))


def new_method(name: str) -> SimCLR:
    """Equal weights for every contestant."""
    torch.manual_seed(0)
    return SimCLR(new_encoder(name), SimCLRConfig(temperature=TEMPERATURE), classes=0, images=0)


def open_images(folder: Path) -> tuple[str, Images]:
    """Where the images are from, and the images, decoded into `folder` as every training reads them."""
    data = os.environ.get("ORCHESTRATOR_DATA")
    if data and any(Path(data, "cifar10").glob("test-*.parquet")):
        source, where = "CIFAR-10 test", str(Path(data, "cifar10", "test"))
    else:
        source, where = "smooth noise", str(folder / "pictures")
        os.mkdir(where)
        torch.manual_seed(0)
        smooth = F.interpolate(torch.rand(2048, 3, PIXELS // 4, PIXELS // 4), (PIXELS, PIXELS), mode="bicubic")
        for number, image in enumerate(smooth.clamp(0, 1)):
            TF.to_pil_image(image).save(f"{where}/{number:04d}.png")
    listing = open_source(where, folder / "downloads")
    return source, Images.of(open_catalogue(listing, folder / "cache", pixels=PIXELS))


def find_lightly() -> tuple[str, str | None]:
    """Why lightly takes no part, empty when it does, and its version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightly.loss
            import lightly.transforms
    except ImportError as error:
        return f"lightly is not installed, so ours runs alone: see benchmarks/README.md ({error})", None
    return "", lightly.__version__


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
