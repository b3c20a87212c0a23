"""The section on the health of self-training: were the labels that models made for others, or for themselves, right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from methods.metrics import wilson_interval
from orchestrator.artifacts import Checkpoint, Labels
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
)
from orchestrator.report.reading import RunFacts, StageFacts, describe
from orchestrator.training.health import PREFIX

FEW_CLASSES = 20  # a table of more is closed until it is asked for
UNLIKE = (
    "at least so many unlabelled images are unlike the hold-out, by their energy, -logsumexp of the logits, or by how "
    "far their logits are from any of the hold-out's"
)


def health(run: RunFacts) -> Section | None:
    """Were the labels right that a model gave others, or itself?"""
    question = "Were the labels right that a model gave others, or itself?"
    section = Section("health", "Health of self-training", question)
    watched = [(s, c) for s, c in run.stored("Train", Checkpoint) if c.facts.get("health")]
    labelled = [(s, lab) for s, lab in run.stored("PseudoLabel", Labels) if lab.facts.get("holdout_by_class")]
    if watched:
        section.blocks.append(_trainings(watched))
        section.blocks.extend(_told([(s.name, line) for s, c in watched for _, line in c.facts["health"]["said"]]))
    for stage, checkpoint in watched:
        heading = f"{stage.name}: {describe(stage, run.names(next(iter(run.seeds))))}"
        section.blocks.extend([Text(heading, "heading"), *_training(stage, checkpoint)])
    if labelled:
        section.blocks.append(Text("Labels that teachers gave", "heading"))
        section.blocks.append(_rounds(labelled))
        section.blocks.extend(_told([(s.name, line) for s, lab in labelled for line in lab.facts["warnings"]]))
        for stage, labels in labelled:
            section.blocks.append(_by_class(stage, labels.facts["holdout_by_class"]))
    return section if section.blocks else None


def _told(said: Sequence[tuple[str, str]]) -> list[Block]:
    if not said:
        return [Text("No guard had anything to say.")]
    return [Text("Guards spoke:", "note"), Lines([f"{name}: {line}." for name, line in said])]


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _precision(accepted: int, right: int) -> list[str]:
    """A share with its interval, of what was accepted."""
    return [percent(right / accepted), interval(*wilson_interval(right, accepted))] if accepted else ["", ""]


def _trainings(watched: Sequence[tuple[StageFacts, Checkpoint]]) -> Table:
    rows = []
    for stage, checkpoint in watched:
        facts = checkpoint.facts["health"]
        live, average = facts.get("live"), facts.get("average")
        row = [stage.name, "", "", "", "", "", "", ""]
        if live:
            row[1], row[6], row[7] = (
                percent(live["accuracy"]),
                f"{live['calibration_error']:.3f}",
                f"{live['images']:,}",
            )
            if "min_confidence" in facts:
                row[4:6] = _precision(live["accepted"], live["right"])
        if live and average:
            row[2] = percent(average["accuracy"])
            row[3] = points(average["accuracy"] - live["accuracy"])
        rows.append([*row, _share(facts.get("unlabelled_acceptance")), _share(facts.get("unlike_holdout"))])
    header = ["training", "accuracy, live", "accuracy, average", "average less live, points", "precision", INTERVAL,
              "calibration error", "hold-out images", "accepted", "unlike hold-out"]  # fmt: skip
    return Table(
        header, rows, "l" + "r" * (len(header) - 1),
        "At the end of each training. Average: of the weights over the steps. Precision: of the hold-out images that "
        "would be accepted as pseudo-labels, so many right. Calibration error: expected, 15 bins. Accepted: of the "
        f"unlabelled images. Unlike: {UNLIKE}.",
    )  # fmt: skip


def _curves(checkpoint: Checkpoint) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps (P,) of the looks, and values by name (P,), nan where a look had none."""
    rows = [row for row in checkpoint.curves().to_pylist() if row["name"].startswith(PREFIX)]
    steps = sorted({row["step"] for row in rows})
    place = {step: number for number, step in enumerate(steps)}
    series: dict[str, np.ndarray] = {}
    for row in rows:
        values = series.setdefault(row["name"].removeprefix(PREFIX), np.full(len(steps), np.nan))
        values[place[row["step"]]] = row["value"]
    return np.array(steps, float), series


# what belongs on one axis: what it shows, label and look of the axis, lines by the name of their curve
PANELS: Sequence[tuple[str, str, str, Mapping[str, str]]] = (
    ("hold-out images that would be accepted as pseudo-labels, and how many of these are right", "share", "share",
     {"pseudo_label_precision": "right", "pseudo_label_acceptance": "accepted"}),
    ("unlabelled images that were accepted, in training and of a sample in eval mode", "accepted", "share",
     {"accepted_in_training": "training", "unlabelled_acceptance": "sample"}),
    ("accuracy on the hold-out, of the live weights and of their average", "accuracy", "share",
     {"holdout_accuracy": "live", "holdout_accuracy_of_average": "average"}),
    ("expected calibration error on the hold-out", "calibration error", "zero",
     {"calibration_error": "live", "calibration_error_of_average": "average"}),
    ("unlabelled images whose label is the largest class, and those unlike the hold-out", "share", "share",
     {"unlabelled_largest_class": "largest", "unlike_holdout": "unlike"}),
    ("the threshold, which a guard lowered", "min_confidence", "share", {"min_confidence": "min_confidence"}),
)  # fmt: skip


def _training(stage: StageFacts, checkpoint: Checkpoint) -> list[Block]:
    step, series = _curves(checkpoint)
    threshold = series.get("min_confidence")
    if threshold is not None and len(np.unique(threshold)) == 1:
        del series["min_confidence"]  # it is a number in the recipe
    shown = []
    for title, label, look, names in PANELS:
        lines = {name: series[curve] for curve, name in names.items() if curve in series}
        if not lines:
            continue
        rows = [[f"{at:,.0f}", *("" if np.isnan(v[i]) else f"{v[i]:.4g}" for v in lines.values())]
                for i, at in enumerate(step)]  # fmt: skip
        shown.append(Figure(
            figures.lines(step, lines, ylabel=label, salt=f"health-{stage.name}-{title}", share=look == "share",
                          zero=look == "zero"),
            f"{stage.name}: {title}.", Table(["step", *lines], rows, "r" * (1 + len(lines))),
        ))  # fmt: skip
    blocks: list[Block] = [Row(shown, narrow=True)]
    live = checkpoint.facts["health"].get("live")
    if live:
        blocks.append(_by_class(stage, live["by_class"], threshold=threshold is not None))
    return blocks


def _by_class(stage: StageFacts, count: Mapping[str, Sequence[int]], *, threshold: bool = True) -> Table:
    """Without a threshold every label is accepted, and acceptance says nothing."""
    names: Sequence[str] = stage.manifest["question"]["classes"]
    rows = []
    for name, images, accepted, named, right in zip(
        names, count["images"], count["accepted"], count["predicted"], count["right"], strict=True
    ):
        acceptance = [f"{accepted:,}", percent(accepted / images) if images else ""] if threshold else []
        rows.append([name, f"{images:,}", *acceptance, f"{named:,}", *_precision(named, right)])
    columns = ["accepted", "acceptance", "accepted as it"] if threshold else ["taken for it"]
    header = ["class", "hold-out images", *columns, "precision", INTERVAL]
    of = "accepted as" if threshold else "taken for"
    acceptance_is = " Acceptance: of the images of the class." if threshold else ""
    return Table(
        header, rows, "l" + "r" * (len(header) - 1),
        f"{stage.name}: the hold-out by class.{acceptance_is} Precision: of the images that are {of} the class",
        folded=len(rows) > FEW_CLASSES or stage.kind == "PseudoLabel",
    )  # fmt: skip


def _rounds(labelled: Sequence[tuple[StageFacts, Labels]]) -> Table:
    rows = []
    for stage, labels in labelled:
        facts: Mapping[str, Any] = labels.facts
        right = sum(facts["holdout_by_class"]["right"])
        rows.append([
            stage.name, percent(facts["holdout_accuracy"]), f"{facts['holdout_accepted']:,}",
            percent(facts["holdout_acceptance"]), *_precision(facts["holdout_accepted"], right),
            f"{facts['calibration_error']:.3f}", f"{facts['energy_holdout']:.2f}", f"{facts['energy_unlabelled']:.2f}",
            percent(facts["unlike_holdout"]), f"{facts['holdout_images']:,}",
        ])  # fmt: skip
    header = ["labels", "accuracy", "accepted", "acceptance", "precision", INTERVAL, "calibration error",
              "energy, hold-out", "energy, unlabelled", "unlike hold-out", "n"]  # fmt: skip
    return Table(header, rows, "l" + "r" * (len(header) - 1), f"On the n hold-out images. Unlike: {UNLIKE}.")
