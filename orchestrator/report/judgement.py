"""Sections about the judged models: verdict, rounds, classes, calibration."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from methods.metrics import paired_bootstrap, wilson_interval
from orchestrator import ledger
from orchestrator.artifacts import Decision, Labels, Verdict
from orchestrator.comparison import share_interval, t_interval
from orchestrator.report import figures
from orchestrator.report.content import (
    INTERVAL,
    Block,
    Figure,
    Lines,
    Row,
    Section,
    Table,
    Text,
    interval,
    percent,
    points,
    points_interval,
)
from orchestrator.report.reading import (
    Arm,
    Predictions,
    RunFacts,
    StageFacts,
    arms_of,
    describe,
    ends,
    predictions_of,
    teachers_of,
)
from orchestrator.stages.judge import combine

BINS = 15  # of confidence, those of the calibration error
MATRIX_CLASSES = 100  # more fit no page


class Judged:
    """One Judge stage over the run's seeds: the verdict, and the first seed's arms and predictions."""

    def __init__(self, run: RunFacts, name: str, verdicts: Sequence[tuple[int, Verdict]]) -> None:
        self.name, self.verdicts = name, verdicts
        self.combined = combine([verdict.facts for _, verdict in verdicts])
        self.seed, self.first = verdicts[0]
        self.arms = arms_of(self.first, run.seeds[self.seed])
        self.classes: list[str] = self.first.facts["classes"]
        table = self.first.predictions()
        self.predictions: dict[str, Predictions] = {arm.key: predictions_of(table, arm.column) for arm in self.arms}

    @property
    def baseline(self) -> Arm:
        """The supervised model."""
        return next(arm for arm in self.arms if "baseline" in arm.roles)

    @property
    def final(self) -> Arm:
        """The model the run ends with; the baseline itself where no student took its place."""
        return next(arm for arm in self.arms if "final" in arm.roles)


def judged(run: RunFacts) -> list[Judged]:
    """The Judge stages of a run that have an answer."""
    return [Judged(run, name, verdicts) for name, verdicts in run.verdicts().items()]


def verdict(run: RunFacts, judges: Sequence[Judged]) -> Section | None:
    """Did the unlabelled images help, and what did each part bring?"""
    if not judges:
        return None
    section = Section("verdict", "Verdict", "Did the unlabelled images help?")
    for judge in judges:
        facts = judge.combined
        look = "good" if facts["low"] > 0 else "bad" if facts["high"] < 0 else "open"
        section.blocks.append(Text(facts["sentence"], f"verdict {look}"))  # type: ignore[arg-type]
        if judge.baseline is judge.final:
            section.blocks.append(Text("The final model is the baseline itself: no student took its place.", "note"))
        missing = len(run.seeds) - len(judge.verdicts)
        if missing:
            section.blocks.append(Text(f"{missing} of {len(run.seeds)} seeds have no verdict yet.", "note"))
        section.blocks.extend(_several(run, judge) if len(judge.verdicts) > 1 else [_scores(judge)])
        if len(judge.arms) > 1:
            section.blocks.append(_parts(run, judge))
    by_hand = max((labels.facts.get("corrected", 0) for _, labels in run.stored("PseudoLabel", Labels)), default=0)
    if by_hand:
        told = f"{by_hand:,} pseudo-labels were corrected by hand: the gain holds them, the baseline had none of them."
        section.blocks.append(Text(told, "note"))
    return section


def _headline(facts: Mapping[str, Any], rows: Sequence[Sequence[str]], seeds: int) -> Table:
    over = "bootstrap over the test images, in pairs" if seeds == 1 else "Student's t over the seeds"
    gain = ["gain", f"{points(facts['gain'])} points", points_interval(facts["low"], facts["high"])]
    return Table(
        ["", "accuracy", INTERVAL], [*rows, gain], "lrr",
        f"{facts['n']:,} test images, {seeds} seed{'s' if seeds > 1 else ''}. Interval of the gain: {over}.",
    )  # fmt: skip


def _colour(arm: Arm) -> str:
    return figures.BLUE if "final" in arm.roles else figures.GREY if "baseline" in arm.roles else figures.SKY


def _scores(judge: Judged) -> Figure:
    rows = [figures.Dot(a.title, a.score["accuracy"], a.score["low"], a.score["high"], _colour(a)) for a in judge.arms]
    facts = judge.combined
    lines = [[a.title, percent(a.score["accuracy"]), interval(a.score["low"], a.score["high"])] for a in judge.arms]
    return Figure(
        figures.dots(rows, xlabel="accuracy on the test images", salt=f"verdict-{judge.name}"),
        f"Accuracy with 95 % Wilson intervals, n = {facts['n']:,} test images, 1 seed.", _headline(facts, lines, 1),
    )  # fmt: skip


def _several(run: RunFacts, judge: Judged) -> list[Block]:
    found: dict[str, dict[int, float]] = {}  # name to seed to accuracy
    for seed, one in judge.verdicts:
        for arm in arms_of(one, run.seeds[seed]):
            for name in ([arm.name] if "baseline" not in arm.roles else []) + sorted(arm.roles):
                found.setdefault(name, {})[seed] = arm.score["accuracy"]
    others = [name for name in found if name != "baseline" and found[name] != found["final"]]
    order = ["baseline", *others, "final"]
    colours = {"baseline": figures.GREY, "final": figures.BLUE}
    rows, lines = [], []
    for name in order:
        values = list(found[name].values())
        low, high = share_interval(values) if len(values) > 1 else (values[0], values[0])
        mean, colour = statistics.fmean(values), colours.get(name, figures.SKY)
        rows.append(figures.Dot(name, mean, low, high, colour, tuple(values)))
        if name in colours:
            lines.append([name, percent(mean), interval(low, high)])
    seeds = len(judge.verdicts)
    each = Table(
        ["seed", "baseline", "final", "gain, points", INTERVAL],
        [[str(seed), percent(v.facts["baseline"]), percent(v.facts["final"]), points(v.facts["gain"]),
          points_interval(v.facts["low"], v.facts["high"])] for seed, v in judge.verdicts],
        "rrrrr", "Each seed by itself; intervals by bootstrap over the test images, in pairs.",
    )  # fmt: skip
    against = []
    for name in (name for name in order[:-1] if len(found[name]) == seeds):
        gains = [found["final"][seed] - value for seed, value in found[name].items()]
        mean, spread = statistics.fmean(found[name].values()), statistics.stdev(found[name].values())
        against.append([name, f"{percent(mean)} ± {100 * spread:.1f}", points(statistics.fmean(gains)),
                        points_interval(*t_interval(gains))])  # fmt: skip
    n = f"{judge.combined['n']:,} test images"
    caption = f"Mean of {seeds} seeds with Student's 95 % interval, under it a dot for each seed; {n}."
    svg = figures.dots(rows, xlabel="accuracy on the test images", salt=f"verdict-{judge.name}")
    return [
        Figure(svg, caption, _headline(judge.combined, lines, seeds)), each,
        *([Table(["against", "mean ± s.d.", "the final model has more, points", INTERVAL], against, "lrrr",
                 "The final model against each other one; intervals by Student's t over the seeds, in pairs.")]
          if others else []),
        Text(f"What follows is of the first seed, {judge.seed}.", "note"),
    ]  # fmt: skip


def _parts(run: RunFacts, judge: Judged) -> Table:
    """Each model against the one it grew out of: its teacher where a gate says so, else the one before it."""
    stages = run.seeds[judge.seed]
    place = {stage.key: stage for stage in stages}
    teachers, by_key = teachers_of(stages), {arm.key: arm for arm in judge.arms}
    judge_stage = next(s for s in stages if s.artifact is judge.first)
    resamples, seed = judge_stage.config["resamples"], judge_stage.manifest["question"]["seed"]
    rows = []
    for number, arm in enumerate(judge.arms):
        what = describe(place[arm.key], run.names(judge.seed)) if arm.key in place else ""
        before = by_key.get(teachers.get(arm.key, ""), judge.arms[number - 1]) if number else None
        difference, span, other = "", "", ""
        if before is not None and before is not arm:
            new, old = judge.predictions[arm.key].right, judge.predictions[before.key].right
            low, high = paired_bootstrap(_float(new), _float(old), resamples=resamples, seed=seed)
            difference, span, other = points(new.mean() - old.mean()), points_interval(low, high), before.name
        rows.append([arm.title, what, percent(arm.score["accuracy"]), difference, span, other])
    return Table(
        ["model", "what it is", "accuracy", "points", INTERVAL, "against"], rows, "llrrrl",
        f"What each part brought, n = {judge.first.facts['n']:,} test images; differences by paired bootstrap.",
    )  # fmt: skip


def _float(right: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(right.astype(np.float32))


ACTIONS = {
    "promoted": "the student is promoted", "kept": "the student is refused, its teacher stays",
    "stopped": "the student is refused and the rounds end",
}  # fmt: skip


def rounds(run: RunFacts, judges: Sequence[Judged]) -> Section | None:
    """Did each round make a better student, and what did the gate decide?"""
    groups = list(dict.fromkeys(stage.group for stage in run.stages if stage.group))
    if not groups:
        return None
    section = Section("rounds", "Accuracy by round", "Did each round make a better student?")
    tested = {arm.key: arm.score for judge in reversed(judges) for arm in judge.arms}
    for group in groups:
        stages = [stage for stage in run.stages if stage.group == group]
        gates = [(s.round or 0, s.artifact.facts) for s in stages if isinstance(s.artifact, Decision)]
        if gates:
            section.blocks.extend(_gates(group, gates, tested))
        section.blocks.extend(_labels(stages))
        if not any(facts["action"] == "stopped" for _, facts in gates):  # a gate has said why, a guard has not
            section.blocks.extend(Text(f"{note[:1].upper()}{note[1:]}.", "note") for note in ends(stages))
    return section if section.blocks else None


def _gates(group: str, gates: Sequence[tuple[int, Mapping[str, Any]]], tested: Mapping[str, Any]) -> list[Block]:
    models = [("teacher", gates[0][1]["teacher"]), *((f"round {number}", facts["student"]) for number, facts in gates)]
    series: dict[str, list[tuple[float, float, float] | None]] = {}
    sizes = []
    for name, scores in (("test", [tested.get(m["key"], {}) for _, m in models]), ("hold-out", [m for _, m in models])):
        if any("accuracy" in score for score in scores[1:]):
            series[name] = [(s["accuracy"], s["low"], s["high"]) if "accuracy" in s else None for s in scores]
            sizes.append(f"{max(score.get('n', 0) for score in scores):,} {name} images")
    lines = [f"Round {number}: {ACTIONS[facts['action']]}. {facts['reason'][:1].upper()}{facts['reason'][1:]}."
             for number, facts in gates]  # fmt: skip
    if not series:
        return [Lines(lines)]
    refused = {place for place, (_, facts) in enumerate(gates, 1) if facts["action"] != "promoted"}
    header = ["model", *(text for name in series for text in (name, INTERVAL))]
    rows = [[name, *(text for values in series.values() for text in _spelled(values[place]))]
            for place, (name, _) in enumerate(models)]  # fmt: skip
    svg = figures.by_round([name for name, _ in models], series, refused, salt=f"rounds-{group}")
    hollow = " Hollow: refused by the gate." if refused else ""
    gate = " The gate saw the hold-out alone." if "hold-out" in series else ""
    caption = (f"{group}: accuracy of the first teacher and of each round's student, 95 % Wilson intervals; "
               f"{', '.join(sizes)}.{hollow}{gate}")  # fmt: skip
    return [Figure(svg, caption, Table(header, rows, "l" + "rr" * len(series))), Lines(lines)]


def _labels(stages: Sequence[StageFacts]) -> list[Block]:
    """How the pseudo-labels changed from round to round, and what people said against them."""
    found: dict[str, dict[int, Labels]] = {}
    for stage in stages:
        if stage.kind == "PseudoLabel" and isinstance(stage.artifact, Labels):
            found.setdefault(stage.name.rpartition(".")[2], {})[stage.round or 0] = stage.artifact
    blocks: list[Block] = []
    for name, rounds in found.items():
        by_hand = any("corrected" in labels.facts for labels in rounds.values())
        if len(rounds) < 2 and not by_hand:
            continue
        tables = {number: labels.table(["id", "name", "copies"]) for number, labels in rounds.items()}
        rows = []
        for number, labels in rounds.items():
            row, before = [f"round {number}", f"{len(tables[number]):,}"], tables.get(number - 1)
            if before is None:
                row += ["", "", ""]
            else:
                change = ledger.compare(before, tables[number])
                share = f" ({percent(change.changed / change.images)})" if change.images else ""
                row += [f"{change.changed:,}{share}", f"{change.newly_kept:,}", f"{change.newly_left_out:,}"]
            if by_hand:
                row += [str(labels.facts.get(part, "")) for part in ("corrected", "teacher_agrees", "dropped")]
            rows.append(row)
        header = ["pseudo-labels", "images", "of another class", "left out → kept", "kept → left out"]
        caption = f"{name}: what changed since the round before.{_often(tables)}"
        if by_hand:
            header += ["corrected by hand", "its teacher agrees", "dropped by hand"]
            caption += " Its teacher agrees: corrected images that the round's teacher takes for the same class."
        blocks.append(Table(header, rows, "l" + "r" * (len(header) - 1), caption))
    return blocks


def _often(tables: Mapping[int, Any]) -> str:
    """How many images changed their class again and again; worth saying from the third round on."""
    if len(tables) < 3:
        return ""
    flips = np.bincount(ledger.flips(tables, tables[max(tables)]), minlength=3)
    return f" Over all rounds {flips[1]:,} images changed class once, {flips[2:].sum():,} more than once."


def _spelled(value: tuple[float, float, float] | None) -> tuple[str, str]:
    return ("", "") if value is None else (percent(value[0]), interval(value[1], value[2]))


def classes(run: RunFacts, judges: Sequence[Judged]) -> Section | None:
    """Which classes gained, and what is taken for what?"""
    if not judges:
        return None
    judge = judges[0]
    base, final = judge.predictions[judge.baseline.key], judge.predictions[judge.final.key]
    names = judge.classes
    rows = []
    for k, name in enumerate(names):
        here = final.label == k
        n = int(here.sum())
        if not n:
            rows.append([name, "0", *[""] * 6])
            continue
        old, new = base.right[here], final.right[here]
        spans = [interval(*wilson_interval(int(right.sum()), n)) for right in (old, new)]
        low, high = paired_bootstrap(_float(new), _float(old), resamples=2000)
        rows.append([name, f"{n:,}", percent(old.mean()), spans[0], percent(new.mean()), spans[1],
                     points(new.mean() - old.mean()), points_interval(low, high)])  # fmt: skip
    table = Table(
        ["class", "n", "baseline", INTERVAL, "final", INTERVAL, "points", INTERVAL], rows, "lrrrrrrr",
        f"Accuracy by class on {len(final.label):,} test images. Of many intervals a few miss the truth by chance.",
    )  # fmt: skip
    question = "Which classes gained, and what is taken for what?"
    return Section("classes", "Classes", question, [table, *_confusion(judge, final)])


def _confusion(judge: Judged, final: Predictions) -> list[Block]:
    names, classes = judge.classes, len(judge.classes)
    counts = np.bincount(final.label * classes + final.predicted, minlength=classes**2).reshape(classes, classes)
    totals = counts.sum(axis=1)
    cells = [(int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True)]
    if classes <= 12:
        rows = [[names[i], *(f"{c:,}" for c in counts[i]), f"{totals[i]:,}"] for i in range(classes)]
        numbers = Table(["label", *names, "n"], rows, "l" + "r" * (classes + 1), "Counts, label by prediction.")
    else:
        rows = [[names[i], names[j], f"{c:,}", percent(c / totals[i])] for c, i, j in cells]
        numbers = Table(["label", "predicted", "images", "share of the label"], rows, "llrr", "Every pair seen.")
    found: list[Block] = []
    if classes <= MATRIX_CLASSES:
        text = "Each cell has the images and their share of the label's row. " if classes <= 12 else ""
        name, n = judge.final.name, len(final.label)
        caption = f"Confusion of the final model, {name}. {text}Colour: root of the row's share, n = {n:,}."
        found.append(Figure(figures.confusion(counts, names, salt="confusion"), caption, numbers, wide=classes > 12))
    wrong = sorted(((c, i, j) for c, i, j in cells if i != j), key=lambda cell: (-cell[0], *cell[1:]))
    if wrong and classes > 2:
        rows = [[names[i], names[j], f"{c:,}", percent(c / totals[i]), f"{totals[i]:,}"] for c, i, j in wrong[:10]]
        header = ["label", "taken for", "images", "share of the label", "n"]
        found.append(Table(header, rows, "llrrr", "The most frequent confusions."))
    return found


def calibration(run: RunFacts, judges: Sequence[Judged]) -> Section | None:
    """Can the confidences be believed?"""
    if not judges:
        return None
    judge = judges[0]
    pair = [(judge.baseline, "baseline", figures.GREY), (judge.final, "final", figures.BLUE)]
    pair = pair[:1] if judge.baseline is judge.final else pair
    shown = [_reliability(judge, arm, role, colour) for arm, role, colour in pair]
    return Section("calibration", "Calibration", "Can the confidences be believed?", [Row(shown)])


def _reliability(judge: Judged, arm: Arm, role: str, colour: str) -> Figure:
    found = judge.predictions[arm.key]
    which = np.clip((found.confidence.astype(np.float32) * BINS).astype(int), 0, BINS - 1)
    count = np.bincount(which, minlength=BINS)
    used = count.nonzero()[0]
    right = np.bincount(which, weights=found.right, minlength=BINS)[used]
    confidence = np.bincount(which, weights=found.confidence, minlength=BINS)[used] / count[used]
    spans = np.array([wilson_interval(int(r), int(n)) for r, n in zip(right, count[used], strict=True)]).reshape(-1, 2)
    accuracy = right / count[used]
    error = arm.score["calibration_error"]
    rows = [
        [f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}", f"{count[b]:,}", percent(c), percent(a), interval(low, high)]
        for b, c, a, (low, high) in zip(used.tolist(), confidence, accuracy, spans, strict=True)
    ]
    svg = figures.reliability(
        confidence, accuracy, spans[:, 0], spans[:, 1], count[used], title=f"{role}, {arm.name}: ECE {error:.3f}",
        colour=colour, salt=f"reliability-{role}",
    )  # fmt: skip
    caption = (f"{role}: expected calibration error (ECE) {error:.3f} in {BINS} bins, n = {len(found.label):,}. Points "
               "under the diagonal: surer than right. 95 % Wilson intervals.")  # fmt: skip
    return Figure(svg, caption, Table(["confidence", "n", "mean confidence", "accuracy", INTERVAL], rows, "lrrrr"))
