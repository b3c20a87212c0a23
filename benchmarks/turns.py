"""Fair timing: contestants take turns within each round, and a ratio is the median of the rounds' own ratios.

Machines that are shared or get warm drift by tens of per cent within minutes, and ratios do not.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

Run = tuple[Callable[[], object], int]  # one pass over all images, and passes a round


@dataclass(frozen=True)
class Turn:
    """What a turn's timed steps took, in seconds of the clock and of CPU time of all processes, and the last loss."""

    wall: float
    core: float
    loss: float


@dataclass(frozen=True)
class Timings:
    """Seconds a step takes, by contestant and round, on the clock and of CPU time, and each contestant's last loss."""

    wall: dict[str, list[float]]
    core: dict[str, list[float]]
    loss: dict[str, float]


class Contestant:
    """A training in a process of its own that goes on when it is its turn and sleeps in between.

    `kind(*arguments)` makes it, and its `turn()` is an iterator over the losses of its steps, each after its update.
    """

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


def take_turns(contestants: Mapping[str, Contestant], *, rounds: int, untimed: int, steps: int) -> Timings:
    """Times all contestants for `rounds` rounds of `steps` steps, each after `untimed` ones, and ends them."""
    wall: dict[str, list[float]] = {key: [] for key in contestants}
    core: dict[str, list[float]] = {key: [] for key in contestants}
    loss: dict[str, float] = {}
    try:
        for number in range(rounds):
            keys = list(contestants)
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:  # nobody always follows the same one
                turn = contestants[key].turn(untimed, steps)
                wall[key].append(turn.wall / steps)
                core[key].append(turn.core / steps)
                loss[key] = turn.loss
    finally:
        for contestant in contestants.values():
            contestant.end()
    return Timings(wall, core, loss)


def print_steps(title: str, timings: Timings) -> None:
    """A line for each contestant: steps a second, core-seconds a step, the last loss."""
    print(f"\n{title:40}{'steps/s':>9}{'lowest':>9}{'highest':>9}{'core-s':>9}{'loss':>9}")
    for key, seconds in timings.wall.items():
        rates = sorted(1 / each for each in seconds)
        print(f"{key:40}{statistics.median(rates):9.3f}{rates[0]:9.3f}{rates[-1]:9.3f}"
              f"{statistics.median(timings.core[key]):9.3f}{timings.loss[key]:9.3f}")  # fmt: skip


def print_speedup(timings: Timings, contestant: str, baseline: str, required: float) -> dict:
    """How many times faster a contestant's steps are than a baseline's, beside what is required; and its numbers."""
    each = {
        clock: [b / a for a, b in zip(seconds[contestant], seconds[baseline], strict=True)]
        for clock, seconds in (("wall", timings.wall), ("core", timings.core))
    }
    ratio = {clock: statistics.median(values) for clock, values in each.items()}
    verdict = "met" if ratio["wall"] >= required else "NOT MET"
    print(f"{contestant} over {baseline}: {ratio['wall']:.2f} times, required {required:.1f}: {verdict}; "
          f"{ratio['core']:.2f} times fewer core-seconds", flush=True)  # fmt: skip
    return {
        "contestant": contestant, "baseline": baseline, "required": required, "ratio": ratio, "rounds": each,
    }  # fmt: skip


def core_rates(runs: Mapping[str, Run], *, images: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of this process's CPU time, by contestant and round, each pass being of `images` images."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (run, repeats) in runs.items():
            seconds = cpu_seconds(run, repeats)
            if number:  # the first round warms caches up
                rates[name].append(repeats * images / seconds)
    return rates


def print_core_rates(
    rates: Mapping[str, list[float]], required: Mapping[tuple[str, str], float]
) -> tuple[dict[str, float], list[dict]]:
    """Prints both tables, and returns the median rates and the ratios of (contestant, baseline) to what is required."""
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{'images per core-second':40}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name, values in rates.items():
        print(f"{name:40}{median[name]:10,.0f}{min(values):10,.0f}{max(values):10,.0f}")
    print(f"\n{'ratio':68}{'measured':>10}{'required':>10}")
    ratios = []
    for (name, baseline), least in required.items():
        if name in median and baseline in median:
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[baseline], strict=True))
            ratios.append({"contestant": name, "baseline": baseline, "ratio": ratio, "required": least})
            verdict = "met" if ratio >= least else "NOT MET"
            print(f"{name + ' / ' + baseline:68}{ratio:10.1f}{least:10.0f}  {verdict}", flush=True)
    return median, ratios


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU time of this process, in seconds, for `repeats` calls."""
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - begin


def core_seconds() -> float:
    """CPU time so far of this process and its live children, in seconds."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children())]
    return sum(used.user + used.system for used in times)


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
