"""Sections that hold many methods against each other: one table, and a figure by method and by layer."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.artifacts import Table as Scored
from orchestrator.comparison import Comparison, Score, combine, finding
from orchestrator.report import figures
from orchestrator.report.content import INTERVAL, Figure, Section, Table, Text, interval, percent, points
from orchestrator.report.reading import RunFacts

FEATURES = "Which method's features are best?"


def comparison(run: RunFacts) -> Section | None:
    """Which method is best?"""
    seeds = [
        (stage.artifact.facts, {s.key: s.name for s in stages})
        for stages in run.seeds.values() for stage in stages if isinstance(stage.artifact, Scored)
    ]  # fmt: skip
    if not seeds:
        return None
    found = combine(seeds)
    asked = "Which method tells the classes apart best?" if found.protocol == "classifier" else FEATURES
    section = Section("comparison", "Comparison", asked)
    missing = len(run.seeds) - found.seeds
    if missing:
        section.blocks.append(Text(f"{missing} of {len(run.seeds)} seeds are not finished yet.", "note"))
    section.blocks.append(_by_arm(found))
    layers = [score for score in found.scores if score.protocol == "layers"]
    if layers:
        section.blocks.append(_by_layer(found, layers))
    section.blocks.append(_table(found))
    if found.seeds > 1 and found.tests():
        section.blocks.append(_claims(found))
    return section


SPOKEN = {"linear": "a linear probe", "knn": "k nearest neighbours", "classifier": "the model's own head"}


def _colour(found: Comparison, arm: str) -> str:
    return figures.GREY if arm in found.anchors.values() else figures.BLUE


def _titled(found: Comparison, arm: str) -> str:
    roles = [role for role, name in found.anchors.items() if name == arm and role != arm]
    return f"{arm} ({', '.join(roles)})" if roles else arm


def _by_arm(found: Comparison) -> Figure:
    ranked = sorted(found.ranking(), key=lambda score: -score.mean)
    rows = [
        figures.Dot(_titled(found, s.arm), s.mean, s.low, s.high, _colour(found, s.arm),
                    s.values if len(s.values) > 1 else ())
        for s in ranked
    ]  # fmt: skip
    spoken = SPOKEN.get(found.protocol, found.protocol)
    grey = " Anchors are grey." if found.anchors else ""
    several = f"mean of {found.seeds} seeds with Student's 95 % interval, under it a dot for each seed"
    what = several if found.seeds > 1 else "95 % Wilson interval, 1 seed"
    lines = [[s.arm, percent(s.mean), interval(s.low, s.high)] for s in ranked]
    return Figure(
        figures.dots(rows, xlabel=f"accuracy of {spoken}", salt="comparison"),
        f"Accuracy of {spoken}: {what}; n = {ranked[0].n:,} images.{grey}",
        Table(["arm", "accuracy", INTERVAL], lines, "lrr"),
    )


def _by_layer(found: Comparison, layers: Sequence[Score]) -> Figure:
    taps = list(dict.fromkeys(score.tap or "" for score in layers))
    table = {(score.arm, score.tap): score for score in layers}
    arms = [arm for arm in found.arms if any((arm, tap) in table for tap in taps)]
    series = {arm: [table[arm, tap].mean if (arm, tap) in table else None for tap in taps] for arm in arms}
    dashed = "; anchors are dashed" if found.anchors else ""
    rows = [[arm, *("" if v is None else percent(v) for v in series[arm])] for arm in arms]
    return Figure(
        figures.by_layer(taps, series, {arm for arm in arms if arm in found.anchors.values()}, salt="layers"),
        f"A linear probe on every tap, mean of {found.seeds} seed{'s' if found.seeds > 1 else ''}{dashed}.",
        Table(["arm", *taps], rows, "l" + "r" * len(taps)), wide=True,
    )  # fmt: skip


def _table(found: Comparison) -> Table:
    columns = list(dict.fromkeys((s.protocol, s.metric) for s in found.scores if s.tap is None))
    scores = {(s.arm, s.protocol, s.metric): s for s in found.scores if s.tap is None}
    rows = []
    for arm in found.arms:
        cells = []
        for column in columns:
            score = scores.get((arm, *column))
            spread = "" if score is None or score.deviation is None else f" ± {100 * score.deviation:.1f}"
            cells.append("" if score is None else f"{100 * score.mean:.1f}{spread} %")
        rows.append([_titled(found, arm), *cells])
    titles = [protocol if metric == "accuracy" else f"{protocol} {metric}" for protocol, metric in columns]
    seeds = f"Mean ± standard deviation over {found.seeds} seeds." if found.seeds > 1 else "One seed."
    return Table(["arm", *titles], rows, "l" + "r" * len(columns), seeds)


def _claims(found: Comparison) -> Table:
    says = {"better": "yes", "worse": "no, worse", "not shown": "not shown"}
    rows = [
        [f"{better} better than {worse}", points(difference), f"{100 * needed:.1f}", says[finding(difference, needed)]]
        for better, worse, difference, needed, _ in found.tests()
        if needed is not None
    ]
    return Table(
        ["claim", "difference, points", "needed", "holds"], rows, "lrrl",
        f"A claim holds when the means of {found.seeds} seeds differ by more than twice the root of the summed squared "
        "standard errors.",
    )  # fmt: skip
