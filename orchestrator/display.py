"""What a person sees: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.comparison import finding
from orchestrator.pipeline import Outcome
from orchestrator.plan import waves, why
from orchestrator.run import Prepared, RunResult
from orchestrator.runs import read_head, read_outcomes
from orchestrator.store import Store

LINE_SECONDS = 15.0  # between progress lines where there is no terminal
COLOURS = {
    "ran": "green",
    "resumed": "green",
    "stored": "cyan",
    "running": "yellow",
    "failed": "red",
    "skipped": "magenta",
}


class Display:
    """Prints to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200, soft_wrap=True)
        self.live = self.console.is_terminal
        self._reading: float | None = None
        self._watching: _Watch | None = None

    def line(self, text: str) -> None:
        """A plain line."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """End a progress line that is still open."""
        if self._reading is not None and self.live:
            self.console.print()
        self._reading = None

    def reading(self, what: str, done: int, total: int) -> None:
        """Progress of the catalogue: a line rewritten on a terminal, else one at the end and every few seconds."""
        now = time.monotonic()
        if self.live and (self._reading is None or now - self._reading > 0.1 or done == total):
            self._reading = now
            self.console.file.write(f"\r\x1b[K{what}: {done:,} of {total:,}")  # rich would print the return as text
            self.console.file.flush()
            if done == total:
                self.close()
        elif not self.live and total > 20_000 and (self._reading is None or now - self._reading > LINE_SECONDS):
            self._reading = now
            self.line(f"{what}: {done:,} of {total:,}")

    def notices(self, prepared: Prepared) -> None:
        """What was noticed in the data, and how much work it will be, in plain words."""
        self.close()
        for text in prepared.data[0].notices:
            self.line(f"  {text}")
        if prepared.data[0].quarantine:
            self.line(f"  the left-out files with their reasons: {prepared.folder / 'data.json'}")
        for kind, say in (("bookkeeping", lambda text: self.line(f"  {text}")), ("advice", self.notice)):
            told: dict[str, list[str]] = {}
            for stage in prepared.plans[0].stages:  # of every seed the same
                if kind in stage.work and not prepared.store.has(stage.key):
                    told.setdefault(stage.work[kind], []).append(stage.name)
            for text, names in told.items():
                say(f"{', '.join(names)}: {text}")

    def notice(self, text: str) -> None:
        """Something a person should know while it runs."""
        self.console.print(Text(f"! {text}", style="yellow" if self.live else ""))

    def finished(self, outcome: Outcome) -> None:
        """A stage is done; where there is no table, that is a line."""
        if not self.live:
            self.line(
                f"{outcome.name:24} {outcome.state:8} {outcome.seconds:7.1f} s  {headline(outcome.kind, outcome.facts)}"
            )

    @contextlib.contextmanager
    def watch(self, prepared: Prepared) -> Iterator[None]:
        """Show stages and progress while the body runs."""
        watch = _Watch(self, prepared)
        watch.start()
        try:
            yield
        finally:
            watch.stop()

    def plan(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A plan's stages."""
        table = Table("stage", "key", "state", "wave", "work", "why", box=None, pad_edge=False)
        for row in rows:
            table.add_row(row["name"], row["key"][:8], row["state"], str(row["wave"]), row["work"], Text(row["why"]))
        self.console.print(table)
        todo = [row for row in rows if row["state"] != "stored"]
        widest = max((sum(row["wave"] == wave for row in todo) for wave in {row["wave"] for row in todo}), default=0)
        if widest > 1:
            self.line(f"Stages of one wave do not wait for each other: up to {widest} run at the same time, as many as "
                      "resources.parallel allows here, or as fit on a cluster.")  # fmt: skip

    def result(self, prepared: Prepared, result: RunResult) -> None:
        """The end of a run: verdict, paths, next command."""
        for stage in result.stages:
            if stage["note"] and stage["state"] in ("skipped",):
                self.line(f"  {stage['name']}: {stage['note']}")
        if result.verdict:
            self.console.print()
            self.console.print(Text(result.verdict["sentence"], style="bold"))
        if result.comparison:
            self.comparison(result.comparison)
        seconds = result.seconds
        self.line(f"\n{seconds['total']:.0f} s, of these {seconds['start_up']:.0f} s start-up, "
                  f"{seconds['computing']:.0f} s training and labelling, "
                  f"{seconds['overhead']:.0f} s everything else")  # fmt: skip
        if result.report:
            self.line(f"report  {result.report}")
        self.line(f"store   {result.store}")
        place = store_option(prepared.store.root)
        labelled = any(stage["kind"] == "PseudoLabel" for stage in result.stages)
        commands = (f"show {result.run}", *([f"labels {result.run}"] if labelled else []), "ui")
        self.line("next    " + "    ".join(f"orchestrator {command}{place}" for command in commands))

    def status(self, head: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], *, whole: bool) -> None:
        """One run: a line, or with `whole` its stages too."""
        done = sum(stage["state"] in ("ran", "stored", "resumed") for stage in stages)
        seconds = head.get("seconds")
        spent = ""
        if seconds:
            spent = (f"  {seconds['total']:.0f} s, {seconds['overhead']:.1f} s of them overhead "
                     f"after {seconds['start_up']:.1f} s start-up")  # fmt: skip
        verdict = head.get("verdict")
        gain = f"  gain {100 * verdict['gain']:+.1f} points" if verdict else ""
        self.line(f"{head['run']:40} {head['status'].lower():9} {done}/{len(head['stages'])} stages{spent}{gain}")
        if whole:
            self.console.print(stage_table(stages))

    def comparison(self, found: Mapping[str, Any]) -> None:
        """Every arm by every protocol, the best first, and which claims hold."""
        names = [(s["protocol"], s["metric"]) for s in found["arms"] if s["tap"] is None]
        columns = list(dict.fromkeys(names))
        scores = {(s["arm"], s["protocol"], s["metric"]): s for s in found["arms"] if s["tap"] is None}
        arms = sorted({s["arm"] for s in found["arms"]}, key=lambda arm: -scores[arm, *_ranking(found)]["mean"])
        roles = {arm: f" ({role})" for role, arm in found["anchors"].items() if arm != role}
        titles = [p if m == "accuracy" else f"{p} {m}" for p, m in columns]
        table = Table("arm", *titles, box=None, pad_edge=False, title_justify="left")
        for arm in arms:
            shown = [scores.get((arm, *column)) for column in columns]
            table.add_row(arm + roles.get(arm, ""), *("" if s is None else _spread(s) for s in shown))
        self.console.print()
        self.console.print(table)
        seeds = found["seeds"]
        self.line(f"{seeds} seed{'s: mean ± standard deviation' if seeds > 1 else ''}, ranked by {found['protocol']}")
        for claim in found["claims"]:
            difference = f"{claim['better']} against {claim['worse']}: {100 * claim['difference']:+.1f} points"
            if claim["holds"] is None:
                continue
            verdict = finding(claim["difference"], claim["needed"]).replace("not shown", "not shown to differ")
            self.line(f"  {difference}, {verdict} (needs {100 * claim['needed']:.1f})")

    def show(self, head: Mapping[str, Any], result: RunResult) -> None:
        """The numbers of a run."""
        seeds = ", ".join(map(str, head["seeds"]))
        self.line(f"{result.run}  {head['status'].lower()}, started {head['started']}, seeds {seeds}")
        self.console.print(stage_table(result.stages))
        if result.verdict:
            self.console.print(Text(result.verdict["sentence"], style="bold"))
        if result.comparison:
            self.comparison(result.comparison)
        if result.verdict or result.comparison:
            self.line(f"report  {result.report}")


def _ranking(found: Mapping[str, Any]) -> tuple[str, str]:
    return next((s["protocol"], s["metric"]) for s in found["arms"] if s["protocol"] == found["protocol"])


def _spread(score: Mapping[str, Any]) -> str:
    spread = "" if score["deviation"] is None else f" ± {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{spread} %"


def headline(kind: str, facts: Mapping[str, Any]) -> str:
    """The number of a stage that a person wants first."""
    if kind == "Train" and facts:
        return f"{facts['steps']:,} steps, {facts['images_seen']:,} images"
    if kind == "Probe":
        few = [name for name in facts if not name.startswith("layers_")] or list(facts)
        return ", ".join(f"{name.removesuffix('_accuracy')} {100 * facts[name]:.1f} %" for name in few)
    if kind == "Compare" and facts:
        return f"{len(facts['arms'])} arms"
    if kind == "PseudoLabel" and facts:
        sure = facts.get("holdout_precision")
        changed = f", {facts['changed']:,} changed" if "changed" in facts else ""
        by_hand = f", {facts['corrected'] + facts['dropped']:,} by hand" if "corrected" in facts else ""
        return (
            f"kept {facts['kept']:,} of {facts['images']:,}"
            + (f", {100 * sure:.1f} % right on the hold-out" if sure else "")
            + changed
            + by_hand
        )
    if kind == "Gate" and facts:
        return f"{facts['action']}: {facts['reason']}"
    if kind == "Judge" and facts:
        return f"gain {100 * facts['gain']:+.1f} points ({100 * facts['low']:+.1f} to {100 * facts['high']:+.1f})"
    return ""


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Stages with state, progress and their number."""
    table = Table("stage", "state", "", "", box=None, pad_edge=False)
    for stage in stages:
        text = headline(stage["kind"], stage["facts"]) or stage["note"]
        progress = stage.get("progress")
        if stage["state"] == "running" and progress:
            text = bar(progress)
        seconds = f"{stage['seconds']:.1f} s" if stage["seconds"] else ""
        table.add_row(stage["name"], Text(stage["state"], style=COLOURS.get(stage["state"], "")), seconds, Text(text))
    return table


def bar(progress: Mapping[str, Any], width: int = 24) -> str:
    """Progress as a bar with the share done, the rate and the seconds left."""
    done, total = progress["done"], progress["total"]
    full = round(width * done / max(1, total))
    left = f", {progress['left']:.0f} s left" if "left" in progress else ""
    return f"{'━' * full}{'─' * (width - full)} {done:,}/{total:,}{left}"


def status_rows(store: Path, folder: Path) -> list[dict[str, Any]]:
    """Every stage of a run with its outcome so far, and the progress of the one that runs."""
    head = read_head(folder)
    known = {line["name"]: dict(line) for line in read_outcomes(folder, [s["name"] for s in head["stages"]])}
    rows = []
    for stage in head["stages"]:
        empty = {"name": stage["name"], "kind": stage["kind"], "key": stage["key"], "state": "waiting", "seconds": 0.0,
                 "digest": None, "note": "", "facts": {}, "round": stage["round"]}  # fmt: skip
        row = known.get(stage["name"], empty)
        if row["state"] == "running":
            with contextlib.suppress(OSError, json.JSONDecodeError):
                text = (store / "work" / stage["key"] / "progress.json").read_text(encoding="utf-8")
                row["progress"] = json.loads(text)
        rows.append(row)
    return rows


def store_option(root: Path) -> str:
    """What the next commands need to find a store that is not the one they take by themselves."""
    return "" if root.name == "orchestrator-store" else f" --store {root}"


def plan_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """Every stage with its key, state, reason and work, as `plan` shows them."""
    earlier = _earlier_keys(prepared.store, prepared)
    rows = []
    for plan in prepared.plans:
        wave = waves(plan)
        for stage in plan.stages:
            name = prepared.prefix(plan) + stage.name
            state, reason = why(stage, prepared.store, earlier.get(name))
            work = stage.work
            parts = [f"{work[key]:,} {key}" for key in ("steps", "images", "parameters") if key in work]
            precision = stage.question["config"].get("precision")
            rows.append({"name": name, "kind": stage.kind, "key": stage.key, "state": state, "why": reason,
                         "wave": wave[stage.name], **work,
                         "work": ", ".join(parts + ([precision] if precision else []))})  # fmt: skip
    return rows


def _earlier_keys(store: Store, prepared: Prepared) -> dict[str, str]:
    """Stage name to key of the last run of this recipe."""
    heads = [
        json.loads(p.read_text(encoding="utf-8"))
        for p in sorted((store.root / "runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    ]
    for head in reversed(heads):
        if head["recipe"] == prepared.recipe.name and head["run"] != prepared.name and head["stages"]:
            return {stage["name"]: stage["key"] for stage in head["stages"]}
    return {}


class _Watch(threading.Thread):
    """Looks at the run's folder a few times a second: the same view for stages here and in other processes."""

    def __init__(self, display: Display, prepared: Prepared) -> None:
        super().__init__(daemon=True, name="display")
        self.display, self.prepared = display, prepared
        self._over = threading.Event()
        self._rates: dict[str, tuple[float, int]] = {}
        self._said = time.monotonic()

    def run(self) -> None:
        if not self.display.live:
            while not self._over.wait(1.0):
                self._say()
            return
        with Live(console=self.display.console, refresh_per_second=4, transient=False) as live:
            while not self._over.wait(0.3):
                self._update(live)
            self._update(live)

    def stop(self) -> None:
        """End it, with the table as it is then."""
        self._over.set()
        self.join()

    def _rows(self) -> list[dict[str, Any]]:
        if not (self.prepared.folder / "run.json").exists():
            return []
        rows = status_rows(self.prepared.store.root, self.prepared.folder)
        for row in rows:
            progress = row.get("progress")
            if progress:
                first = self._rates.setdefault(row["name"], (progress["time"], progress["done"]))
                seconds, steps = progress["time"] - first[0], progress["done"] - first[1]
                if seconds > 1 and steps > 0:
                    progress["left"] = (progress["total"] - progress["done"]) * seconds / steps
        return rows

    def _update(self, live: Live) -> None:
        rows = self._rows()
        if rows:
            live.update(stage_table(rows))

    def _say(self) -> None:
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            for row in self._rows():
                if row["state"] == "running" and row.get("progress"):
                    self.display.line(f"{row['name']:24} {bar(row['progress'])}")
