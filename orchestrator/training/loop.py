"""The one training loop, a generator: logging, checkpoints and stops are the caller's `if` lines."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, View
from methods.ema import update_average
from methods.views.draws import Draws, mix
from orchestrator.data.images import Images
from orchestrator.data.loader import Order, read_ahead
from orchestrator.training.optim import Optim
from orchestrator.training.precision import autocast

OWN = -1  # the view number of what a method draws itself


@dataclass(frozen=True)
class Stream:
    """One stream of a method: its images in their endless order, with labels or with a teacher's distributions."""

    name: str
    images: Images
    order: Order
    label: Tensor | None = None  # (N,) int64, of the images
    target: Tensor | None = None  # of the images: (N, K) float32, or (N,) int64 where that is enough
    rows: Tensor | None = None  # (M,) rows of the images, where the stream repeats or leaves out some


@dataclass(frozen=True)
class Step:
    """What one step did: its number from 0, the losses (0-d, on the device), the seconds it took, and of those the
    seconds spent reading images."""

    number: int
    losses: Losses
    rate: float
    seconds: float
    waited: float


def make_batch(
    views: Sequence[View], streams: Sequence[Stream], step: int, *, seed: int, device: torch.device,
    part: int = 0, parts: int = 1,
) -> tuple[Batch, float]:  # fmt: skip
    """The batch of a step, augmented on the device, and the seconds spent reading.

    Every view's parameters are a function of (seed, epoch, row, view): nothing else enters.
    """
    batch: dict[str, Tensor] = {}
    waited = 0.0
    for stream in streams:
        place, epoch = stream.order.at(step, part=part, parts=parts)
        rows = place if stream.rows is None else stream.rows[place]
        begin = time.perf_counter()
        images = stream.images.batch(rows)
        read_ahead(stream.images, stream.order, step, part=part, parts=parts, rows=stream.rows)
        waited += time.perf_counter() - begin
        if device.type == "cuda":
            images = images.pin_memory().to(device, non_blocking=True)
        batch[f"{stream.name}.index"] = place.to(device)
        batch[f"{stream.name}.key"] = Draws.of(seed, epoch, place, OWN).key.to(device)
        for number, view in enumerate(views):
            if view.stream == stream.name:
                draws = Draws.of(seed, epoch.to(device), place.to(device), number)
                batch[view.name] = view.transform(images, draws)
        if stream.label is not None:
            batch["label"] = stream.label[rows].to(device)
        if stream.target is not None:
            batch["target"] = stream.target[rows].to(device)
    return batch, waited


@functools.cache
def add_in_order() -> None:
    """Makes this process sum gradients in one order, so that a training run twice ends in the same bits.

    Among others the gradient of `rows[index]` is otherwise added up by all threads at once on a CPU.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no such form on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, finds faults


@functools.cache
def keep_freed_memory() -> None:
    """Makes this process keep freed memory for its next allocation, which every training step on a CPU asks for again.

    glibc returns blocks over 32 MiB to the system at once, and the system clears the pages of the next ones: at 2 x 128
    images of 32 px, 20,000 page faults and a sixth of a SmallCNN step, 216,000 and an eighth of a ResNet-18 step. The
    price is that memory once used stays with the process. Does nothing where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS; TypeError: Windows
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(trim_threshold, -1)  # unlimited
    mallopt(mmap_max, 0)


def train_steps(
    method: Method, model: nn.Module, streams: Sequence[Stream], optimizer: torch.optim.Optimizer, optim: Optim, *,
    pixels: int, start: int, total: int, seed: int, precision: str, average: nn.Module | None = None,
    ema: float = 0.0, clip: float | None = None, accumulate: int = 1, part: int = 0, parts: int = 1,
) -> Iterator[Step]:  # fmt: skip
    """Steps start .. total - 1, each yielded after its update.

    Args:
        method: the module itself; `model` the same or its data-parallel wrapper.
        streams: one for each stream the method's views name.
        average: the EMA of the method, updated with decay `ema` after each step.
        clip: largest gradient norm. accumulate: micro-batches an update, each with its own part of the batch.
        part, parts: this worker among all; each takes its part of every batch.
    """
    device = next(method.parameters()).device
    add_in_order()
    if device.type == "cpu":
        keep_freed_memory()
    views = method.views(pixels)
    for number in range(start, total):
        begin = time.perf_counter()
        progress = number / total
        rate = optim.rate(number + 1, total)  # a warm-up's first update is not with rate 0
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        # dropout and stochastic depth: a function of (seed, step, worker), so nothing of them needs saving
        torch.manual_seed(int(mix(torch.tensor(seed * 1_000_003 + number * parts + part))) & 0x7FFF_FFFF)
        losses: Losses = {}
        waited = 0.0
        for micro in range(accumulate):
            batch, read = make_batch(
                views, streams, number, seed=seed, device=device,
                part=part * accumulate + micro, parts=parts * accumulate,
            )  # fmt: skip
            waited += read
            batch = {
                name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
                for name, value in batch.items()
            }
            with autocast(precision, device.type):
                found = model(batch, progress)
            (found["loss"] / accumulate).backward()
            losses = {k: losses.get(k, 0.0) + v.detach() / accumulate for k, v in found.items()}
        if clip is not None:
            losses["gradient_norm"] = nn.utils.clip_grad_norm_(method.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.on_step_end(progress)
        if average is not None:
            update_average(average, method, decay=ema, step=number)
        yield Step(number, losses, rate, time.perf_counter() - begin, waited)
