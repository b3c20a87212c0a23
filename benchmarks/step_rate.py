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
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.pictures import PIXELS, Pictures, open_images
from benchmarks.turns import Contestant, cpu_name, print_speedup, print_steps, take_turns
from methods.encoders import Encoder, ResNet, ResNetConfig, SmallCNN, SmallCNNConfig
from methods.simclr import SimCLR, SimCLRConfig
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.training.loop import Stream, train_steps
from orchestrator.training.optim import Optim
from orchestrator.training.precision import auto_precision, autocast

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
    timings = take_turns(contestants, rounds=rounds, untimed=UNTIMED[name], steps=steps)
    print_steps(f"{name}, {steps} timed steps a turn", timings)
    ratios = [
        print_speedup(timings, ours, baseline, required)
        for baseline, required in zip((plain, tuned), REQUIRED[name], strict=True) if baseline in contestants
    ]  # fmt: skip
    return {
        "steps": steps, "wall_seconds": timings.wall, "core_seconds": timings.core, "loss": timings.loss,
        "ratios": ratios,
    }  # fmt: skip


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


def new_encoder(name: str) -> Encoder:
    return SmallCNN(SmallCNNConfig()) if name == "SmallCNN" else ResNet(ResNetConfig(depth=18, stem="cifar"))


def new_method(name: str) -> SimCLR:
    """Equal weights for every contestant."""
    torch.manual_seed(0)
    return SimCLR(new_encoder(name), SimCLRConfig(temperature=TEMPERATURE), classes=0, images=0)


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


if __name__ == "__main__":
    main()
