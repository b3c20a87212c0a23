"""What a person sees of a search: a table of trials, live on a terminal, and lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.display import COLOURS, Display, store_option
from orchestrator.runs import read_head
from orchestrator.search.trials import Trial, best_of, counts, read_trials

STATES = {"finished": "green", "stopped early": "magenta", "interrupted": "yellow", **COLOURS}
SHOWN = 30  # trials in the live table: the newest


def number(value: float | None, *, share: bool) -> str:
    """A metric's value: shares as percent."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if share else f"{value:.4g}"


def short(value: Any) -> str:
    """A parameter's value in few letters."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def trial_table(about: Mapping[str, Any], trials: Sequence[Trial]) -> Table:
    """Every trial with its values and result; the best one is marked. `about` is the head's "search"."""
    names = [parameter["name"] for parameter in about["parameters"]]
    table = Table("trial", "state", *names, about["metric"], "", box=None, pad_edge=False)
    best = best_of(trials, about["mode"])
    for trial in trials:
        told = number(trial.objective, share=about["share"])
        if trial.objective is None and trial.looks:
            look, accuracy = trial.looks[-1]
            told = f"{number(accuracy, share=True)} at {look:g}/{about['looks']}"
        mark = " best" if trial is best else " default" if _is_default(about, trial) else ""
        seconds = f"{trial.seconds:.0f} s" if trial.seconds else ""
        table.add_row(
            f"{trial.number}{mark}", Text(trial.state, style=STATES.get(trial.state, "")),
            *(short(trial.values[name]) for name in names), told, Text(seconds or trial.note),
        )  # fmt: skip
    return table


def _is_default(about: Mapping[str, Any], trial: Trial) -> bool:
    return all(trial.values[p["name"]] == p["default"] for p in about["parameters"])


def line(about: Mapping[str, Any], trial: Trial) -> str:
    """A trial that ended, in a line."""
    what = f"trial {trial.number}" if trial.role == "search" else f"{trial.role}, seed {trial.seed}"
    told = number(trial.objective, share=about["share"])
    values = ", ".join(f"{name}={short(value)}" for name, value in trial.values.items())
    note = f"  {trial.note}" if trial.state == "failed" else ""
    return f"{what:18} {trial.state:13} {trial.seconds:7.1f} s  {told:>9}  {values}{note}"


def status_line(head: Mapping[str, Any], trials: Sequence[Trial]) -> str:
    """A search in a line, for `status`."""
    about = head["search"]
    best = best_of(trials, about["mode"])
    told = f"  best {number(best.objective, share=about['share'])} (trial {best.number})" if best else ""
    states = ", ".join(f"{count} {state}" for state, count in counts(trials).items())
    ended = sum(trial.state in ("finished", "stopped early", "failed") for trial in trials)
    return (f"{head['run']:40} {head['status'].lower():9} {ended}/{about['trials']} trials"
            f"{f' ({states})' if states else ''}{told}")  # fmt: skip


def show_search(display: Display, folder: Path, *, head: Mapping[str, Any] | None = None) -> None:
    """The trials and the result of a search."""
    head = read_head(folder) if head is None else head
    about, result = head["search"], head.get("result")
    display.console.print(trial_table(about, read_trials(folder)))
    if not result:
        return
    share = about["share"]
    if result["importance"]:
        told = ", ".join(f"{name} {100 * value:.0f} %" for name, value in result["importance"].items())
        display.line(f"importance (fANOVA): {told}")
    if gain := result["gain"]:
        seeds = ", ".join(map(str, result["seeds"]))
        display.line(f"on seeds {seeds}: default {number(gain['default'], share=share)}, "
                     f"best {number(gain['best'], share=share)}")  # fmt: skip
    display.console.print(Text(result["sentence"], style="bold"))
    if test := result["test"]:
        again = f" (read {result['test_reads']} times by this search)" if result["test_reads"] > 1 else ""
        display.line(f"on the test images, read once: {test['metric']} {number(test['value'], share=share)}{again}")
    else:
        display.line("this recipe reads no test images")
    display.line(f"report  {folder / 'report.html'}")
    display.line(f"best    {folder / 'best.yaml'}")
    place = store_option(folder.parents[1])
    commands = (f"run {folder / 'best.yaml'}", f"show {folder.name}", "ui")
    display.line("next    " + "    ".join(f"orchestrator {command}{place}" for command in commands))


@contextlib.contextmanager
def watch_search(display: Display, folder: Path) -> Iterator[None]:
    """On a terminal, the newest trials as they stand while the body runs."""
    over = threading.Event()

    def look() -> None:
        with Live(console=display.console, refresh_per_second=2, transient=True) as live:
            while not over.wait(0.5):
                with contextlib.suppress(OSError, ValueError, KeyError):  # of a folder that is being made
                    found = [*read_trials(folder), *read_trials(folder, "confirm")]
                    live.update(trial_table(read_head(folder)["search"], found[-SHOWN:]))

    thread = threading.Thread(target=look, daemon=True, name="trials")
    if display.live:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if display.live:
            thread.join()
