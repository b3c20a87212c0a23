"""Sections about what was learned from what: training curves, pseudo-labels, pictures, probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from methods.metrics import wilson_interval
from orchestrator.artifacts import Checkpoint, Labels, Scores
from orchestrator.report import figures
from orchestrator.report.content import (
    INTERVAL,
    Block,
    Figure,
    Gallery,
    Lines,
    Row,
    Section,
    Table,
    Text,
    Tile,
    interval,
    percent,
)
from orchestrator.report.gallery import SIDE, Album, Pictures, Wanted, shown_pixels
from orchestrator.report.judgement import Judged
from orchestrator.report.reading import RunFacts, StageFacts, describe, ends
from orchestrator.training.health import PREFIX

CURVE_POINTS = 120  # a longer curve is drawn, and its numbers shown, as means of equal parts
GALLERY = 24  # pictures
FEW_CLASSES = 40  # more are shown by the extremes; every number is in the folded table


def curves(run: RunFacts) -> Section | None:
    """Did every training settle?"""
    section = Section("curves", "Training curves", "Did every training settle?")
    for stage, checkpoint in run.stored("Train", Checkpoint):
        step, series, each = _curve_table(checkpoint)
        if not len(step):
            continue
        means = f", means of {each} logged steps" if each > 1 else ""
        panels = [(names, label, look) for names, label, look in _panels(series) if names]
        group = [
            Figure(
                figures.lines(step, {n: series[n] for n in names}, ylabel=label, salt=f"curve-{stage.name}-{label}",
                              share=look == "share", zero=look == "zero"),
                f"{stage.name}: {label}{means}.",
                _numbers(step, {name: series[name] for name in names}),
            )
            for names, label, look in panels
        ]  # fmt: skip
        heading = f"{stage.name}: {describe(stage, run.names(next(iter(run.seeds))))}"
        section.blocks.extend([Text(heading, "heading"), Row(group, narrow=True)])
        if "effective_rank" in series:
            section.blocks.append(Text(_still_pays(checkpoint), "note"))
    return section if section.blocks else None


PAYS = 0.01  # share of the loss


def _still_pays(checkpoint: Checkpoint) -> str:
    """Whether longer pretraining is likely to be worth it, by how far the loss fell in its last fifth."""
    step, series, _ = _curve_table(checkpoint)
    loss = series["loss"][np.isfinite(series["loss"])]
    fifth = max(1, len(loss) // 5)
    before, last = loss[-2 * fifth : -fifth].mean() if len(loss) > fifth else loss[0], loss[-fifth:].mean()
    fell = (before - last) / abs(before) if before else 0.0
    spent = f"In the last fifth of its {checkpoint.facts['steps']:,} steps the loss fell by {100 * fell:.1f} %"
    return (f"{spent}: longer training is likely to pay." if fell > PAYS
            else f"{spent}: longer training alone is unlikely to bring much.")  # fmt: skip


def _numbers(step: np.ndarray, series: Mapping[str, np.ndarray]) -> Table:
    rows = [[f"{at:,.0f}", *(f"{values[i]:.4g}" for values in series.values())] for i, at in enumerate(step)]
    return Table(["step", *(name.replace("_", " ") for name in series)], rows, "r" * (1 + len(series)))


def _curve_table(checkpoint: Checkpoint) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Steps (P,), values by name (P,), nan where nothing was logged, and how many logged steps a point stands for."""
    table = checkpoint.curves()
    table = table.filter(pc.invert(pc.starts_with(table["name"], PREFIX)))  # those have a section of their own
    all_steps, names = table["step"].to_numpy(), np.array(table["name"].to_pylist(), dtype=object)
    values = table["value"].to_numpy()
    step = np.unique(all_steps)
    series = {}
    for name in dict.fromkeys(names.tolist()):
        series[name] = np.full(len(step), np.nan)
        series[name][np.searchsorted(step, all_steps[names == name])] = values[names == name]
    each = max(1, math.ceil(len(step) / CURVE_POINTS))
    parts = np.arange(0, len(step), each)
    if each > 1:
        series = {name: _means(value, parts) for name, value in series.items()}
        step = _means(step, parts)
    return step.astype(float), series, each


def _means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means of the known values of each part (P,) of values (M,), nan where a part has none: some are logged rarely."""
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(int), starts)
    total = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)


def _panels(series: Mapping[str, np.ndarray]) -> list[tuple[list[str], str, str]]:
    """(names, axis label, look) of what belongs on one axis: losses, shares, the learning rate, anything else."""
    losses = [name for name in series if "loss" in name]
    rest = [name for name in series if name not in losses and name != "learning_rate"]
    signals = ("alignment", "uniformity", "effective_rank")  # each on its own scale
    share = [
        name for name in rest if name not in signals and np.nanmin(series[name]) >= 0 and np.nanmax(series[name]) <= 1
    ]
    rate = [name for name in series if name == "learning_rate"]
    other = [name for name in rest if name not in share]
    title = share[0].replace("_", " ") if len(share) == 1 else "share of the images"
    return [
        (losses, "loss, nats", ""), (share, title, "share"),
        *(([name], name.replace("_", " "), "") for name in other), (rate, "learning rate", "zero"),
    ]  # fmt: skip


def ledger(run: RunFacts) -> Section | None:
    """Were the pseudo-labels fit to learn from?"""
    labelled = run.stored("PseudoLabel", Labels)
    if not labelled and not ends(run.stages):
        return None
    section = Section("ledger", "Pseudo-labels", "Were the pseudo-labels fit to learn from?")
    if not labelled:
        section.blocks.append(Text("No round kept a pseudo-label.", "note"))
        return section
    names = [_round_name(stage) for stage, _ in labelled]
    share = [labels.facts["kept_share"] for _, labels in labelled]
    counts = [[name, f"{labels.facts['images']:,}", f"{labels.facts['kept']:,}", percent(labels.facts["kept_share"])]
              for name, (_, labels) in zip(names, labelled, strict=True)]  # fmt: skip
    section.blocks.append(Figure(
        figures.shares(names, share, ylabel="kept share of the images", salt="kept"),
        f"Share of the unlabelled images that a student learned from; n = {labelled[0][1].facts['images']:,}.",
        Table(["round", "images", "kept", "kept share"], counts, "lrrr"),
    ))  # fmt: skip
    section.blocks.append(_health(labelled))
    guards = [f"{_round_name(stage)}: {labels.facts['guard']}." for stage, labels in labelled if labels.facts["guard"]]
    if guards:
        section.blocks.append(Text("The guard took the most confident images of each predicted class instead:", "note"))
        section.blocks.append(Lines(guards))
    for stage, labels in labelled:
        section.blocks.append(Row([_confidence(stage, labels), _by_class(stage, labels)]))
    return section


def _round_name(stage: StageFacts) -> str:
    return stage.name if stage.round is None else f"round {stage.round}"


def _health(labelled: Sequence[tuple[StageFacts, Labels]]) -> Table:
    held = any("holdout_accepted" in labels.facts for _, labels in labelled)
    rows = []
    for stage, labels in labelled:
        facts = labels.facts
        row = [_round_name(stage), f"{facts['images']:,}", f"{facts['kept']:,}", percent(facts["kept_share"]),
               f"{facts['copies']:,}", percent(facts["mean_confidence"]),
               f"{facts['changed']:,} ({percent(facts['changed'] / facts['images'])})" if "changed" in facts else "",
               "stepped in" if facts["guard"] else "quiet"]  # fmt: skip
        if held:
            row[-1:-1] = _precision(facts)
        rows.append(row)
    header = ["round", "images", "kept", "kept share", "copies", "mean confidence", "changed"]
    caption = "Copies: images learned from in an epoch, repeats too. Changed: of another class than a round before."
    return Table([*header, *(["hold-out precision", INTERVAL, "n"] if held else []), "guard"], rows,
                 "lrrrrrr" + ("rrr" if held else "") + "l", caption)  # fmt: skip


def _precision(facts: Mapping[str, Any]) -> list[str]:
    accepted, precision = facts.get("holdout_accepted"), facts.get("holdout_precision")
    if accepted is None or precision is None:
        return ["", "", "" if accepted is None else str(accepted)]
    return [percent(precision), interval(*wilson_interval(round(precision * accepted), accepted)), f"{accepted:,}"]


def _confidence(stage: StageFacts, labels: Labels) -> Figure:
    table = labels.table(["confidence", "copies"])
    confidence, kept = table["confidence"].to_numpy(), table["copies"].to_numpy() > 0
    edges = np.linspace(0, 1, 21)
    inside, outside = (np.histogram(confidence[rows], bins=edges)[0] for rows in (kept, ~kept))
    bins = zip(edges[:-1], edges[1:], inside.tolist(), outside.tolist(), strict=True)
    rows = [[f"{low:.2f} to {high:.2f}", f"{a:,}", f"{b:,}"] for low, high, a, b in bins if a or b]
    threshold = stage.config.get("min_confidence")
    caption = f"{_round_name(stage)}: images by teacher's confidence; min_confidence {threshold}, n = {len(table):,}."
    svg = figures.histogram(edges, inside, outside, salt=f"confidence-{stage.name}")
    return Figure(svg, caption, Table(["confidence", "kept", "left out"], rows, "lrr"))


def _by_class(stage: StageFacts, labels: Labels) -> Figure:
    predicted, kept = labels.facts["predicted_by_class"], labels.facts["kept_by_class"]
    classes: list[str] = stage.manifest["question"]["classes"]
    counts = zip(classes, predicted, kept, strict=True)
    rows = [[name, f"{p:,}", f"{k:,}", percent(k / p) if p else ""] for name, p, k in counts]
    order = list(range(len(classes)))
    some = ""
    if len(order) > FEW_CLASSES:
        by_count = sorted(order, key=lambda k: (-predicted[k], k))
        order = by_count[: FEW_CLASSES // 2] + by_count[-FEW_CLASSES // 2 :]
        some = f" The {FEW_CLASSES // 2} most and {FEW_CLASSES // 2} least predicted of {len(classes)} classes."
    svg = figures.inside(
        [classes[k] for k in order], [predicted[k] for k in order], [kept[k] for k in order], whole_name="predicted",
        part_name="kept", xlabel="images", salt=f"classes-{stage.name}",
    )  # fmt: skip
    caption = f"{_round_name(stage)}: images by predicted class, and how many were kept, n = {sum(predicted):,}.{some}"
    return Figure(svg, caption, Table(["class", "predicted", "kept", "kept share"], rows, "lrrr"))


def albums(run: RunFacts, judges: Sequence[Judged]) -> list[Album]:
    """The pictures worth a look: the surest and the least sure pseudo-labels, the surest mistakes."""
    found = []
    if labelled := run.stored("PseudoLabel", Labels):
        stage, labels = labelled[-1]
        table = labels.table(["id", "path", "name", "confidence", "copies"])
        order = pc.sort_indices(table, sort_keys=[("confidence", "descending"), ("id", "ascending")])
        few, name = min(GALLERY, math.ceil(len(table) / 2)), _round_name(stage)
        sure = [_pseudo_label(row) for row in table.take(order[:few]).to_pylist()]
        unsure = [_pseudo_label(row) for row in table.take(order[-few:]).to_pylist()[::-1]]
        found.append(Album(f"{name}: the {few} surest pseudo-labels of {len(table):,}", sure))
        found.append(Album(f"{name}: the {few} least sure", unsure))
    for probe, scores in run.stored("Probe", Scores):
        pictures = [wanted for answer in scores.neighbours() for wanted in _neighbours(answer)]
        if pictures:
            found.append(Album(f"{probe.name}: images marked ? with their nearest neighbours after them", pictures))
    if judges:
        judge, final = judges[0], judges[0].predictions[judges[0].final.key]
        wrong = sorted((~final.right).nonzero()[0].tolist(), key=lambda row: (-final.confidence[row], final.id[row]))
        shown = []
        for row in wrong[:GALLERY]:
            label, predicted = judge.classes[final.label[row]], judge.classes[final.predicted[row]]
            lines = [f"{label} → {predicted}", percent(final.confidence[row])]
            shown.append(Wanted(final.id[row], lines, final.path[row]))
        if shown:
            few_of = f"{len(shown)} of {len(wrong):,}"
            found.append(Album(f"The final model's surest mistakes on test: label → predicted, {few_of}", shown))
    return found


def _neighbours(answer: Mapping[str, Any]) -> list[Wanted]:
    query = answer["query"]
    found = [Wanted(query["id"], [f"? {query['label']}"], query["path"])]
    for near in answer["nearest"]:
        mark = "✓ " if near["label"] == query["label"] else ""
        found.append(Wanted(near["id"], [mark + near["label"]], near["path"]))
    return found


def _pseudo_label(row: Mapping[str, Any]) -> Wanted:
    kept = "" if row["copies"] else ", left out"
    return Wanted(row["id"], [row["name"], f"{percent(row['confidence'])}{kept}"], row["path"])


def galleries(albums: Sequence[Album], pictures: Pictures, pixels: int) -> Section | None:
    """What do the surest, the least sure and the mistaken images look like?"""
    if not albums:
        return None
    question = "What do the surest, the least sure and the mistaken images look like?"
    section = Section("galleries", "Pictures", question)
    if pictures.problem:
        section.blocks.append(Text(pictures.problem, "note"))
    for album in albums:
        uris = pictures.uris([wanted.id for wanted in album.pictures])
        tiles = [Tile(uris[w.id], w.lines, w.path) for w in album.pictures if w.id in uris]
        if tiles:
            section.blocks.append(Gallery(album.caption, tiles, shown_pixels(pixels), crisp=pixels < SIDE))
    return section


def probes(run: RunFacts) -> Section | None:
    """How good are the features?"""
    dots, rows, by_class = [], [], []
    for stage, scores in run.stored("Probe", Scores):
        if any(other.kind == "Compare" for other in run.stages):
            return None  # the comparison shows them all
        model = run.names(next(iter(run.seeds))).get(stage.manifest["inputs"]["model"], "")
        for score in scores.scores():
            value, low, high = score["value"], score["low"], score["high"]
            protocol = " ".join(filter(None, (score["protocol"], score.get("tap"))))
            dots.append(figures.Dot(f"{stage.name}, {protocol}", value, low, high))
            rows.append([stage.name, model, protocol, score["metric"], percent(value), interval(low, high),
                         f"{score['n']:,}", f"{score['labelled']:,}"])  # fmt: skip
            for name, precision, shown in zip(
                score.get("classes", ()), score.get("by_class", ()), score.get("shown", ()), strict=False
            ):
                told = "nothing to learn from or to find" if precision is None else percent(precision)
                by_class.append([stage.name, name, told, f"{shown:,}"])
    if not rows:
        return None
    header = ["probe", "features of", "protocol", "metric", "value", INTERVAL, "n", "labelled images"]
    figure = Figure(figures.dots(dots, xlabel="accuracy of the probe", salt="probes"),
                    "Probes on frozen features, 95 % Wilson intervals.", Table(header, rows, "llllrrrr"))  # fmt: skip
    blocks: list[Block] = [figure]
    if by_class:
        caption = "Average precision by class, where an image may have several labels"
        header = ["probe", "class", "AP", "test images that show it"]
        blocks.append(Table(header, by_class, "llrr", caption, folded=True))
    return Section("probes", "Probes", "How good are the features?", blocks)
