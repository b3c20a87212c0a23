"""The verbs a stage may use. One object, made new for each stage; where work is spread, `workers` does it."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from methods.encoders import pooled_size, pooled_taps, tap_shapes
from methods.views.draws import Draws
from orchestrator.artifacts import Checkpoint
from orchestrator.data.images import Images
from orchestrator.store import replace_file
from orchestrator.training.precision import autocast, device

SHARD = 2048  # images a labelling task reads; fixed, so that results do not depend on who computes them
CHUNK = 256  # images a forward pass


def _save(part: Path, rows: Tensor) -> None:
    with part.open("wb") as file:  # by path numpy would change the name
        np.save(file, rows.numpy())


class Interrupted(Exception):
    """The user asked to stop; everything is kept, the same command goes on."""


class Recorder(Protocol):
    """What a stage needs of tracking: see orchestrator.records.Recorder."""

    def metrics(self, run: str, values: dict[str, float], step: int) -> None: ...


class Watcher(Protocol):
    """Who is told what a look at a training's hold-out saw, by `orchestrator.training.health`'s names. May not return:
    then the training ends there."""

    def __call__(self, step: int, total: int, seen: Mapping[str, float]) -> None: ...


class Workers(Protocol):
    """How work is spread over processes: see orchestrator.cluster."""

    def fit(self, job: Any) -> None: ...

    def predict(self, job: Any, shards: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]: ...


@dataclass
class Context:
    """Everything around a stage's question that is not part of it."""

    workdir: Path  # belongs to the stage's key and outlives a crash
    output: Path  # where the stage writes its answer
    seed: int
    classes: tuple[str, ...]
    threads: int = 1
    workers: Workers | None = None  # None: this process does it all
    round: int | None = None
    stop_file: Path | None = None  # the user's wish to stop, seen by every process
    save_seconds: float = 30.0
    run: str = ""  # the tracking run of this stage
    recorder: Recorder | None = None
    features: Path | None = None  # folder where the run keeps extracted features; None: they are not kept
    notice: Callable[[str], None] = lambda line: None
    watcher: Watcher | None = None  # told of the hold-out while a training goes on
    computing: float = 0.0  # seconds spent training, labelling and probing: what is not overhead
    _told: float = field(default=0.0, repr=False)
    _stop_seen: tuple[float, bool] = field(default=(0.0, False), repr=False)

    def draws(self, purpose: int, rows: int) -> Draws:
        """The draws of `rows` images for one purpose of this stage."""
        return Draws.of(self.seed, 0, torch.arange(rows)).fork(purpose)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a step, for tracking only."""
        if self.recorder is not None:
            self.recorder.metrics(self.run, values, step)

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Say how far the stage is, at most twice a second; readers find it in the working folder."""
        now = time.monotonic()
        if now - self._told >= 0.5 or done == total:
            self._told = now
            line = {"done": done, "total": total, "time": time.time(), **figures}
            replace_file(self.workdir / "progress.json", lambda part: part.write_text(json.dumps(line)))

    def stopping(self) -> bool:
        """Whether the user asked to stop; looked up at most five times a second."""
        now = time.monotonic()
        if self.stop_file is not None and now - self._stop_seen[0] >= 0.2:
            self._stop_seen = (now, self.stop_file.exists())
        return self._stop_seen[1]

    @contextmanager
    def compute(self) -> Any:
        """Count the time inside as computing."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.computing += time.perf_counter() - begin

    def predict(self, checkpoint: Checkpoint, images: Images) -> Tensor:
        """Class probabilities (N, K) float32 of a classifier without any noise: eval mode, whole images."""
        return self.logits(checkpoint, images).softmax(dim=1)

    def logits(self, checkpoint: Checkpoint, images: Images) -> Tensor:
        """As `predict`, before the softmax."""
        return self._forward(checkpoint, images, "logits")

    def extract(self, checkpoint: Checkpoint, images: Images) -> Tensor:
        """Features (N, dim) float32, rows in the order of the images; kept for the run's other stages."""
        if self.features is None:
            return self._forward(checkpoint, images, "features")
        path = self.features / f"{checkpoint.key}-{images.fingerprint}.npy"
        with contextlib.suppress(FileNotFoundError):
            return torch.from_numpy(np.load(path))
        found = self._forward(checkpoint, images, "features")
        with contextlib.suppress(FileNotFoundError):  # another run ended and took the folder away
            self.features.mkdir(exist_ok=True)
            replace_file(path, lambda part: _save(part, found))
        return found

    def extract_taps(self, checkpoint: Checkpoint, images: Images) -> dict[str, Tensor]:
        """Every tap of the encoder, pooled to about as many numbers each, (N, D) float32: all in one pass."""
        pooled = self._forward(checkpoint, images, "pooled_taps")
        shapes = tap_shapes(checkpoint.build().encoder, images.pixels)
        sizes = {tap: pooled_size(shape) for tap, shape in shapes.items()}
        return dict(zip(sizes, pooled.split(list(sizes.values()), dim=1), strict=True))

    def _forward(self, checkpoint: Checkpoint, images: Images, verb: str) -> Tensor:
        job = Forward(checkpoint, images, verb)
        shards = list(torch.arange(len(images)).split(SHARD))
        found: Tensor | None = None
        with self.compute():
            for number, answer in job.answers(shards) if self.workers is None else self.workers.predict(job, shards):
                if found is None:  # filled as answers come: joined at the end they would be held twice
                    found = torch.empty(len(images), *answer.shape[1:])
                found[SHARD * number : SHARD * number + len(answer)] = answer
        assert found is not None  # of no images there is one empty shard
        return found


@dataclass(frozen=True)
class Forward:
    """A forward pass of a checkpoint over images: `open()` loads the model, its result maps rows to outputs."""

    checkpoint: Checkpoint
    images: Images
    verb: str  # a method's `logits` or `features`, or "pooled_taps" of its encoder

    def open(self) -> Callable[[Tensor], Tensor]:
        """Load the model once; then rows (B,) int64 to float32 (B, ...), on the CPU."""
        where = device()
        method = self.checkpoint.build().to(where).to(memory_format=torch.channels_last)
        own = self.verb != "pooled_taps"
        verb = getattr(method, self.verb) if own else functools.partial(pooled_taps, method.encoder)
        precision = self.checkpoint.model["precision"]

        def run(rows: Tensor) -> Tensor:
            out = []
            with torch.inference_mode(), autocast(precision, where.type):
                for chunk in rows.split(CHUNK):
                    pixels = self.images.batch(chunk).to(where).to(torch.float32) / 255
                    out.append(verb(pixels.contiguous(memory_format=torch.channels_last)).float().cpu())
            return torch.cat(out)

        return run

    def answers(self, shards: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The outputs of every shard with its number, by this process."""
        run = self.open()
        for number, rows in enumerate(shards):
            yield number, run(rows)
