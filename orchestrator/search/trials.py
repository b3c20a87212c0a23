"""What a search found: its trials, each a small file in the search's folder, and what follows from them.

STORE/runs/SEARCH/run.json         what is searched, how far it is, and the result
STORE/runs/SEARCH/trials/N.json    a trial: values, state, objective; written by one process at a time
STORE/runs/SEARCH/confirm/         the same for the runs that confirm the best, and for the one on the test images
STORE/runs/SEARCH/best.yaml        the best recipe, as `orchestrator run` takes it
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.artifacts import write_json
from orchestrator.comparison import t_interval
from orchestrator.store import replace_file

SEARCH = "search"  # `kind` in the head of a search's folder
State = Literal["waiting", "running", "finished", "stopped early", "interrupted", "failed"]
UNDONE = ("waiting", "running", "interrupted")  # "running" of a search that does not run: its process was killed


@dataclass
class Trial:
    """One trial: what it tried and what came of it.

    Args:
        seconds: of all attempts. looks: (look, hold-out accuracy) during training. stages: {name, key, state, seconds}.
        role: "search", or "default", "best" and "test" after it. seed: where it is not the recipe's.
    """

    number: int
    values: dict[str, Any]
    state: State = "waiting"
    objective: float | None = None
    seconds: float = 0.0
    looks: list[list[float]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    role: str = "search"
    seed: int | None = None
    file: str = ""

    @property
    def run(self) -> str:
        """Its name before the names of its stages, and in tracking."""
        return f"trial-{self.number:03d}" if self.role == "search" else Path(self.file).stem

    def write(self, folder: Path) -> None:
        """Keep it, by one rename."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda part: write_json(part, asdict(self)))


def trial_file(number: int) -> str:
    """The file of a trial in the search's folder."""
    return f"trials/{number:04d}.json"


def read_trial(path: Path) -> Trial:
    """A trial from its file."""
    return Trial(**json.loads(path.read_text(encoding="utf-8")))


def read_trials(folder: Path, kind: str = "trials") -> list[Trial]:
    """The trials of a search in order, or of "confirm" the runs after it."""
    return [read_trial(path) for path in sorted((folder / kind).glob("*.json"))]


def is_search(head: Mapping[str, Any]) -> bool:
    """Whether a folder of runs is a search's."""
    return head.get("kind") == SEARCH


def best_of(trials: Iterable[Trial], mode: str) -> Trial | None:
    """The finished trial with the best objective, the earliest of equal ones."""
    done = [trial for trial in trials if trial.state == "finished" and trial.objective is not None]
    sign = 1 if mode == "max" else -1
    return max(done, key=lambda trial: (sign * (trial.objective or 0.0), -trial.number), default=None)


def confirm_gain(best: Sequence[float], default: Sequence[float], mode: str) -> dict[str, Any]:
    """How much better the best is than the default on the same seeds, (n,) each: a paired t interval of the mean.

    Differences 0.01, 0.02, 0.03 give a gain of 0.02, from -0.005 to 0.045; `low` and `high` are None for one seed.
    """
    sign = 1 if mode == "max" else -1
    gains = [sign * (b - d) for b, d in zip(best, default, strict=True)]
    low, high = t_interval(gains) if len(gains) > 1 else (None, None)
    return {
        "seeds": len(gains), "best": statistics.fmean(best), "default": statistics.fmean(default),
        "gain": statistics.fmean(gains), "low": low, "high": high, "each": gains,
    }  # fmt: skip


def conclusion(result: Mapping[str, Any], metric: str, *, share: bool) -> str:
    """What the search brought, in plain words.

    Args:
        result: {"gain": see `confirm_gain` or None, "same": whether the default is the best}.
        share: the metric is a fraction of images, told in points.
    """
    if result["same"]:
        return f"No trial was better than the recipe as it is, by {metric} on the hold-out."
    gain = result["gain"]
    if gain is None:
        return f"The best trial was not held against the recipe's default on other seeds: its {metric} is optimistic."
    scale, unit = (100, " points") if share else (1, "")
    numbers = f"{scale * gain['gain']:+.2f}{unit}"
    seeds = f"{gain['seeds']} seed{'s' if gain['seeds'] > 1 else ''} that the search did not use"
    if gain["low"] is None:
        return f"By {metric} the best is {numbers} from the recipe's default on {seeds}: one seed has no interval."
    numbers += f", 95 % interval {scale * gain['low']:+.2f} to {scale * gain['high']:+.2f}, {seeds}"
    if gain["low"] > 0:
        return f"The best recipe beats the recipe's default by {metric} on the hold-out ({numbers})."
    if gain["high"] < 0:
        return f"The best trial is worse than the recipe's default on other seeds, which stays ({metric}: {numbers})."
    return (f"The best recipe does not measurably beat the recipe's default ({metric}: {numbers}; the interval "
            "contains 0).")  # fmt: skip


def counts(trials: Iterable[Trial]) -> dict[str, int]:
    """How many trials ended in which state."""
    found: dict[str, int] = {}
    for trial in trials:
        found[trial.state] = found.get(trial.state, 0) + 1
    return found
