"""The doctor: what lies in some folders, and what would go wrong with it, before anything is trained."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.data.catalogue import Catalogue, open_catalogue
from orchestrator.data.sources import open_source, parts_of
from orchestrator.errors import UserError

_SHOWN = 10  # examples of each kind in the lines; the JSON has all bad files
_MOST_CLASSES = 40  # shown in full; of more, the largest and smallest
_TOO_BAD = 0.05  # DataConfig.max_bad_share's default
_FEW = 10  # images of a class below which a hold-out says little


@dataclass(frozen=True)
class SourceReport:
    """What one source holds. Counts of classes and sizes are over usable images, duplicates once.

    `widths` and `heights` are (min, median, max) in pixels. `top_tenth` is the share of labelled images that the
    largest 10 % of the classes, at least one, have. `labels_each` is the mean number of labels of a labelled image,
    where one may have several, and an image is counted in each of its classes; else None. `error` is set, and the rest
    empty, when nothing could be read.
    """

    source: str
    kind: str = ""
    images: int = 0
    usable: int = 0
    labelled: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    widths: tuple[int, int, int] = (0, 0, 0)
    heights: tuple[int, int, int] = (0, 0, 0)
    top_tenth: float = 0.0
    bad: list[tuple[str, str]] = field(default_factory=list)
    duplicates: int = 0
    duplicate_examples: list[list[str]] = field(default_factory=list)
    conflicts: int = 0
    conflict_examples: list[list[str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    label_problem: str | None = None
    labels_each: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Leak:
    """Images that two sources share, by content."""

    first: str
    second: str
    images: int
    example: tuple[str, str]


@dataclass(frozen=True)
class DoctorReport:
    """The findings, for people (`lines`) and for machines (`json`)."""

    sources: list[SourceReport]
    leaks: list[Leak]
    advice: list[str]

    @property
    def lines(self) -> list[str]:
        """Plain text, one line an element."""
        lines: list[str] = []
        for report in self.sources:
            lines += [*_source_lines(report), ""]
        for leak in self.leaks:
            lines.append(
                f"shared: {leak.images:,} images are in {leak.first} and in {leak.second}, such as {leak.example[0]} "
                f"and {leak.example[1]}"
            )
        if not self.advice:
            return [*lines, "nothing to mend"]
        return [*lines, "advice:", *(f"  - {line}" for line in self.advice)]

    def json(self) -> dict:
        """The same as plain JSON types."""
        return {
            "sources": [asdict(report) for report in self.sources],
            "leaks": [asdict(leak) for leak in self.leaks],
            "advice": self.advice,
        }


def inspect(
    paths: Sequence[str],
    *,
    cache: Path | None = None,
    separator: str | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> DoctorReport:
    """Decode everything in some sources and say what is there and what is wrong with it.

    A folder of several splits (train-*.parquet and test-*.parquet, or train/ and test/) is looked at split by split.

    Args:
        paths: sources, as in a recipe.
        cache: keeps what was found, so that looking again is quick; None keeps nothing.
        separator: what divides the labels in a cell, as in a recipe; for sources whose label column is text.
        progress: called with (source, done, total).
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return inspect(paths, cache=Path(folder), separator=separator, threads=threads, progress=progress)
    reports: list[SourceReport] = []
    seen: dict[str, tuple[Catalogue, np.ndarray, np.ndarray]] = {}
    for source in itertools.chain.from_iterable(parts_of(path) for path in dict.fromkeys(paths)):
        try:
            listing = open_source(source, cache, separator=separator)
        except UserError as error:
            reports.append(SourceReport(source, error=str(error)))
            continue
        catalogue = open_catalogue(listing, cache, pixels=None, threads=threads, progress=progress)
        rows = catalogue.kept
        seen[source] = (catalogue, rows, catalogue.ids(rows))
        reports.append(_report(source, catalogue, rows, listing.notices))
    leaks = []
    for first, second in itertools.combinations(seen, 2):
        (one, rows1, ids1), (two, rows2, ids2) = seen[first], seen[second]
        _, at1, at2 = np.intersect1d(ids1, ids2, assume_unique=True, return_indices=True)
        if len(at1):
            example = (one.path(int(rows1[at1[0]])), two.path(int(rows2[at2[0]])))
            leaks.append(Leak(first, second, len(at1), example))
    return DoctorReport(reports, leaks, _advice(reports, leaks))


def _report(source: str, catalogue: Catalogue, rows: np.ndarray, notices: list[str]) -> SourceReport:
    about = catalogue.about
    label, labelled = catalogue.label_names(rows)
    targets = catalogue.targets(rows)
    counts = np.bincount(label[labelled], minlength=len(about["classes"])) if targets is None else targets.sum(axis=0)
    classes = dict(zip(about["classes"], counts.tolist(), strict=True))
    largest = np.sort(counts)[::-1][: max(1, math.ceil(len(counts) / 10))] if len(counts) else counts
    return SourceReport(
        source=source,
        kind=about["kind"],
        images=len(catalogue),
        usable=len(rows),
        labelled=int(labelled.sum()),
        classes=classes,
        widths=_spread(catalogue.sizes("width", rows)),
        heights=_spread(catalogue.sizes("height", rows)),
        top_tenth=float(largest.sum() / max(counts.sum(), 1)) if len(counts) else 0.0,
        bad=catalogue.bad(),
        duplicates=about["duplicates"],
        duplicate_examples=about["duplicate_examples"],
        conflicts=about["conflicts"],
        conflict_examples=about["conflict_examples"],
        notices=notices,
        label_problem=about["label_problem"],
        labels_each=None if targets is None else float(counts.sum() / max(labelled.sum(), 1)),
    )


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


def _source_lines(report: SourceReport) -> list[str]:
    if report.error:
        return [report.error]
    lines = [f"{report.source}: {report.images:,} images, {report.kind}"]
    if report.usable:
        width, height = report.widths, report.heights
        lines.append(
            f"  sizes        width {width[0]} to {width[2]}, median {width[1]}; height {height[0]} to {height[2]}, "
            f"median {height[1]} pixels"
        )
    each = "" if report.labels_each is None else f", {report.labels_each:.1f} labels each on average"
    lines.append(f"  usable       {report.usable:,}, of which {report.labelled:,} have a label{each}")
    if report.classes:
        lines.append(f"  classes      {len(report.classes)}; the largest tenth holds {report.top_tenth:.0%} of labels")
        lines += _class_table(report.classes)
    if report.bad:
        lines.append(f"  cannot use   {len(report.bad):,}")
        lines += [f"    {path}   {reason}" for path, reason in report.bad[:_SHOWN]] + _more(len(report.bad))
    if report.duplicates:
        lines.append(f"  duplicates   {report.duplicates:,} exact copies; one of each is used")
        lines += [f"    {again} is {first}" for first, again in report.duplicate_examples[:_SHOWN]]
        lines += _more(report.duplicates)
    if report.conflicts:
        lines.append(f"  conflicts    {report.conflicts:,} copies with another label")
        lines += [
            f"    {again} ({other}) is {first} ({kept})"
            for first, again, kept, other in report.conflict_examples[:_SHOWN]
        ] + _more(report.conflicts)
    return lines + [f"  {notice.removeprefix(report.source + ': ')}" for notice in report.notices]


def _class_table(classes: dict[str, int]) -> list[str]:
    longest = max(len(name) for name in classes)
    lines = [f"    {name:<{longest}}  {count:>8,}" for name, count in classes.items()]
    if len(lines) <= _MOST_CLASSES:
        return lines
    by_size = np.argsort([-count for count in classes.values()], kind="stable").tolist()
    half = _MOST_CLASSES // 2
    largest, smallest = [lines[i] for i in by_size[:half]], [lines[i] for i in by_size[-half:]]
    return [*largest, f"    and {len(lines) - 2 * half:,} between", *smallest]


def _more(count: int) -> list[str]:
    return [f"    and {count - _SHOWN:,} more"] if count > _SHOWN else []


def _advice(reports: Sequence[SourceReport], leaks: Sequence[Leak]) -> list[str]:
    advice: list[str] = []
    for report in reports:
        source, counts = report.source, {name: count for name, count in report.classes.items() if count}
        if report.error:
            advice.append(report.error)
            continue
        if report.label_problem:
            advice.append(f"{report.label_problem} (as unlabelled images they can be used as they are)")
        if report.bad:
            share = len(report.bad) / report.images
            ends = f"; above {_TOO_BAD:.0%} (max_bad_share) a run does not start" if share > _TOO_BAD else ""
            advice.append(f"{source}: mend or remove the {len(report.bad):,} bad images ({share:.1%}){ends}")
        if report.conflicts:
            advice.append(f"{source}: {report.conflicts:,} copies have two labels: decide which is right")
        if report.labels_each is not None:
            advice.append(
                f"{source}: several labels an image: Probe's protocol svm judges by them, and methods without labels "
                "learn from the images; whatever needs one class an image is refused"
            )
        if len(counts) == 1 and report.labels_each is None:
            advice.append(f"{source}: one class only; training needs at least two")
        if len(counts) > 1:
            fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            if counts[fewest] < _FEW:
                advice.append(f"{source}: {fewest} has {counts[fewest]:,} images: a hold-out of it says little")
            if counts[most] > 10 * counts[fewest]:
                balance = ", and balance pseudo-labels by class" if report.labels_each is None else ""
                advice.append(
                    f"{source}: {most} has {counts[most] / counts[fewest]:.0f} times the images of {fewest}: look at "
                    f"per-class results{balance}"
                )
        smallest = min(report.widths[0], report.heights[0])
        if report.usable and smallest < 8:
            advice.append(f"{source}: the smallest side is {smallest} pixels: a mistake?")
    for leak in leaks:
        advice.append(
            f"{leak.first} and {leak.second} share {leak.images:,} images: if one is for testing, a run leaves them "
            "out of the other"
        )
    labelled = [report for report in reports if report.classes and not report.label_problem]
    for first, second in itertools.combinations(labelled, 2):
        for one, two in ((first, second), (second, first)):
            present = [name for name, count in one.classes.items() if count]
            missing = [name for name in present if not two.classes.get(name)]
            if 0 < len(missing) < len(present):  # nothing in common: two different subjects
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                names = ", ".join(missing[:5]) + more
                advice.append(f"{two.source} has no image of {names}, which {one.source} has")
    return advice
