"""Sections of a search: what it brought, its trials, which parameter mattered, and the best recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.report import record, search_figures
from orchestrator.report.content import Block, Code, Figure, Row, Section, Table, Text
from orchestrator.report.reading import RunFacts
from orchestrator.search.trials import Trial, best_of, read_trials

FOLD = 40  # trials from which on the table is closed until it is asked for


def sections(run: RunFacts, folder: Path) -> list[Section]:
    """All that is known of a search so far; equal for an equal folder."""
    about, result = run.head["search"], run.head.get("result")
    trials = read_trials(folder)
    found = [
        _outcome(about, result, trials),
        _table(about, trials),
        _parameters(about, result, trials),
        record.data(run),
    ]
    found.append(_reproduce(run, folder))
    return [section for section in found if section is not None]


def told(value: float | None, *, share: bool) -> str:
    """A metric's value: of a share in percent."""
    return "" if value is None else f"{100 * value:.2f} %" if share else f"{value:.4g}"


def _outcome(about: Mapping[str, Any], result: Mapping[str, Any] | None, trials: Sequence[Trial]) -> Section:
    section = Section("result", "Result", "Is there a better recipe than the default?")
    share, best = about["share"], best_of(trials, about["mode"])
    if result is None:
        so_far = f" The best so far is trial {best.number}: {told(best.objective, share=share)}." if best else ""
        section.blocks.append(Text(f"This search has not ended.{so_far}", "note"))
        return section
    gain = result["gain"]
    certain = gain and gain["low"] is not None
    look: Any = "verdict open"
    if certain and gain["low"] > 0:
        look = "verdict good"
    elif certain and gain["high"] < 0:
        look = "verdict bad"
    section.blocks.append(Text(result["sentence"], look))
    if result["limit"]:
        section.blocks.append(Text(f"The trials ended at their budget of {result['limit']}.", "note"))
    chosen = result["best"]["values"]
    rows = [[p["name"], _word(p["default"]), _word(chosen[p["name"]]), p["range"]] for p in about["parameters"]]
    section.blocks.append(Table(["parameter", "recipe", "best", "range"], rows, "lrrl"))
    rows = [["hold-out, the search's seed", told(result["default"], share=share) or "not ended",
             told(result["best"]["objective"], share=share), "chosen by this number: optimistic"]]  # fmt: skip
    if gain:
        ends = [] if gain["low"] is None else [_signed(gain[end], share) for end in ("gain", "low", "high")]
        interval = f"gain {ends[0]}, 95 % interval {ends[1]} to {ends[2]}" if ends else ""
        seeds = ", ".join(map(str, result["seeds"]))
        rows.append(
            [f"hold-out, seeds {seeds}", told(gain["default"], share=share), told(gain["best"], share=share), interval]
        )
    if result["test"]:
        reads = f"read {result['test_reads']} times by this search" if result["test_reads"] > 1 else "read once"
        rows.append([f"test images, {result['test']['metric']}", "", told(result["test"]["value"], share=share), reads])
    section.blocks.append(Table(
        ["measured on", "recipe", "best", ""], rows, "lrrl",
        f"{about['metric']} on {about['held_out']:,} held-out images that nothing learns from; the interval is "
        "Student's of the seeds' differences.",
    ))  # fmt: skip
    return section


def _signed(value: float, share: bool) -> str:
    return f"{100 * value:+.2f} points" if share else f"{value:+.4g}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(about: Mapping[str, Any], trials: Sequence[Trial]) -> Section | None:
    if not trials:
        return None
    names = [p["name"] for p in about["parameters"]]
    best = best_of(trials, about["mode"])
    rows = []
    for trial in trials:
        default = all(trial.values[p["name"]] == p["default"] for p in about["parameters"])
        note = "best" if trial is best else "the recipe's default" if default else ""
        if trial.state == "failed":
            note = trial.note
        elif trial.objective is None and trial.looks:
            look, accuracy = trial.looks[-1]
            seen = f"{told(accuracy, share=True)} at look {look:g} of {about['looks']}"
            note = "; ".join(filter(None, (note, seen.replace(" ", "\u00a0"))))  # not broken in a narrow column
        shared = [stage["name"] for stage in trial.stages if stage["state"] == "stored"]
        rows.append([
            str(trial.number), trial.state.replace(" ", "\u00a0"), *(_word(trial.values[name]) for name in names),
            told(trial.objective, share=about["share"]), f"{trial.seconds:.1f}", ", ".join(shared), note,
        ])  # fmt: skip
    header = ["trial", "state", *names, about["metric"], "seconds", "stored", ""]
    caption = f"Up to {about['trials']} trials by {about['algorithm']}, {about['concurrent']} at once."
    align = "rl" + "r" * (len(names) + 2) + "ll"
    return Section(
        "trials", "Trials", "What was tried?", [Table(header, rows, align, caption, folded=len(rows) > FOLD)]
    )


def _parameters(
    about: Mapping[str, Any], result: Mapping[str, Any] | None, trials: Sequence[Trial]
) -> Section | None:  # fmt: skip
    done = [trial for trial in trials if trial.state == "finished" and trial.objective is not None]
    top = best_of(done, about["mode"])
    if len(done) < 2 or top is None:
        return None
    best, share, metric = done.index(top), about["share"], about["metric"]
    default = next(
        (i for i, t in enumerate(done) if all(t.values[p["name"]] == p["default"] for p in about["parameters"])), None
    )
    results = [trial.objective or 0.0 for trial in done]
    section = Section("parameters", "Parameters", "Which values matter, and where is the result best?")
    numbers = Table(
        ["trial", *(p["name"] for p in about["parameters"]), metric],
        [
            [str(t.number), *(_word(t.values[p["name"]]) for p in about["parameters"]), told(t.objective, share=share)]
            for t in done
        ],
        "r" * (len(about["parameters"]) + 2),
    )  # fmt: skip
    shares = (result or {}).get("importance") or {}
    blocks: list[Block] = []
    if shares:
        blocks.append(Figure(
            search_figures.importances(shares, salt="importance"),
            f"Share of the variance of {metric} that each parameter explains: fANOVA on {len(done)} trials that ended.",
            Table(["parameter", "share"], [[name, f"{100 * value:.1f} %"] for name, value in shares.items()], "lr"),
        ))  # fmt: skip
    svg = search_figures.parallel(
        about["parameters"], [t.values for t in done], results, best, metric=metric, share=share, salt="parallel"
    )
    blocks.append(Figure(svg, f"A line a trial, coloured by {metric}; the best is wide.", numbers, wide=True))
    figures = [
        Figure(
            search_figures.slices(
                p, [t.values[p["name"]] for t in done], results, best, default, metric=metric, share=share,
                salt=f"slice-{number}",
            ),
            f"{metric} over {p['name']}: a dot a trial, the best in red, the recipe's default ringed.",
            Table(
                [p["name"], metric], [[_word(t.values[p["name"]]), told(t.objective, share=share)] for t in done], "rr"
            ),
        )
        for number, p in enumerate(about["parameters"])
    ]  # fmt: skip
    section.blocks.extend([*blocks, Row(figures, narrow=True)])
    return section


def _reproduce(run: RunFacts, folder: Path) -> Section:
    best = folder / "best.yaml"
    section = Section("reproduce", "The best recipe", "How is it run?")
    if best.exists():
        section.blocks.extend([
            Text("Save the recipe below as best.yaml, beside the same data:"), Code("", "orchestrator run best.yaml"),
            Code("The best recipe", best.read_text(encoding="utf-8")),
        ])  # fmt: skip
    section.blocks.append(Code("The recipe that was searched", run.recipe))
    return section
