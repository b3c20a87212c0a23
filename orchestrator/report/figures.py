"""The report's figures, each one question, as SVG text: the only place that imports matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.report.content import percent

# Okabe and Ito 2008, told apart with any common colour blindness
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY, LIGHT, INK = "#707070", "#D0D4D8", "#222222"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)

WIDTH, NARROW = 4.5, 3.4  # inches: one figure fills a phone; on a desk two stand side by side, or three
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "lines.linewidth": 1.5, "figure.facecolor": "white",
    "axes.axisbelow": True, "axes.titlelocation": "left",
}  # fmt: skip


@dataclass(frozen=True)
class Dot:
    """A value with its 95 % interval, fractions in [0, 1], and the single values it is the mean of."""

    name: str
    value: float
    low: float
    high: float
    colour: str = BLUE
    each: tuple[float, ...] = ()


def short(name: str, most: int = 18) -> str:
    """A name that fits an axis: what is too long loses its middle, since stages of one arm differ at their ends."""
    tail = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def _room(names: Iterable[str], points: float = 8) -> float:
    """Inches that the longest of some names takes, on the safe side."""
    wide = (sum(2 if east_asian_width(letter) in "WF" else 1 for letter in name) for name in names)
    return 0.6 * points / 72 * max(wide, default=0) + 0.12


def _figure(axes: Axes) -> Figure:
    assert isinstance(axes.figure, Figure)  # not a part of one: `_axes` made it
    return axes.figure


def _axes(
    height: float, *, left: float = 0.62, right: float = 0.15, bottom: float = 0.48, top: float = 0.12,
    width: float = WIDTH,
) -> Axes:  # fmt: skip
    """Axes with margins in inches. Set by hand: matplotlib's own layout doubles the time of a report."""
    figure = Figure(figsize=(width, height))
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _key(axes: Axes, *names: tuple[str, str]) -> None:
    """What the bars' colours mean, above the axes."""
    for place, (name, colour) in enumerate(names):
        axes.annotate(f"■ {name}", (0, 1), (70 * place, 5), xycoords="axes fraction", textcoords="offset points",
                      color=colour, fontsize=8)  # fmt: skip


def _svg(axes: Axes, salt: str) -> str:
    """SVG for inside a page: no prolog, no metadata, no ids but those it refers to; equal for equal figures."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph DejaVu lacks: the browser's fonts draw the text
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(_figure(axes)).print_svg(text, metadata=unsaid)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg, count=2)  # HTML knows both names
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub(r">\s+<", "><", svg).strip()


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")  # 42.5 is not 43


def _line_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right of the axes, each at its line's last value, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 11 / (72 * _figure(axes).get_figheight() * axes.get_position().height)  # a line of text in shares of the axes
    places: list[float] = []
    for value, _, _ in sorted(labels):
        place = (value - low) / (high - low)
        places.append(max(place, places[-1] + gap) if places else max(0.0, place))
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - gap
    for place, (_, name, colour) in zip(places, sorted(labels), strict=True):
        axes.text(1.03, place, name, color=colour, transform=axes.transAxes, va="center", fontsize=7.5)


@matplotlib.rc_context(STYLE)
def dots(rows: Sequence[Dot], *, xlabel: str, salt: str) -> str:
    """Values with intervals, one row each, the first on top."""
    names = [short(row.name, 30) for row in rows]
    axes = _axes(0.65 + 0.36 * len(rows), left=_room(names), right=0.65)
    for place, row in enumerate(rows):
        axes.plot([row.low, row.high], [place, place], color=row.colour, linewidth=2, solid_capstyle="butt")
        if row.each:
            axes.plot(row.each, [place + 0.28] * len(row.each), "o", color=row.colour, markersize=3.5)  # under the mean
        axes.plot([row.value], [place], "o", color=row.colour, markersize=7)
        axes.text(1.03, place, percent(row.value), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _percent(axes.xaxis)
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def by_round(
    places: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float] | None]], refused: set[int], *,
    salt: str,
) -> str:  # fmt: skip
    """Accuracy (value, low, high) over teacher and rounds; models at the places in `refused` are drawn hollow."""
    axes = _axes(2.7, left=0.78, right=_room(series, 7.5) + 0.05, bottom=0.32)
    labels = []
    for number, (name, values) in enumerate(series.items()):
        colour, known = CYCLE[number], [(i, v) for i, v in enumerate(values) if v is not None]
        shift = 0.08 * (number - (len(series) - 1) / 2)
        x = [i + shift for i, _ in known]
        axes.plot(x, [v[0] for _, v in known], color=colour, linewidth=1, alpha=0.6)
        for at, (i, (value, low, high)) in zip(x, known, strict=True):
            axes.plot([at, at], [low, high], color=colour, linewidth=1.5)
            axes.plot([at], [value], "os"[number % 2], color=colour, markersize=7,
                      markerfacecolor="white" if i in refused else colour)  # fmt: skip
        if known:
            labels.append((known[-1][1][0], name, colour))
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_ylabel("accuracy")
    _percent(axes.yaxis)
    _line_labels(axes, labels)
    return _svg(axes, salt)


@matplotlib.rc_context({**STYLE, "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5})
def lines(
    step: np.ndarray, series: Mapping[str, np.ndarray], *, ylabel: str, salt: str, share: bool = False,
    zero: bool = False,
) -> str:  # fmt: skip
    """Values over training steps, several lines named at their ends. The axis is 0 to 100 % (`share`), or from 0."""
    names = [name.replace("_", " ") for name in series]
    axes = _axes(2.2, width=NARROW, bottom=0.42, right=_room(names, 7.5) if len(names) > 1 else 0.15)
    labels = []
    for number, (name, values) in enumerate(zip(names, series.values(), strict=True)):
        colour, known = CYCLE[number % len(CYCLE)], np.isfinite(values)
        axes.plot(step[known], values[known], color=colour, marker="o" if known.sum() == 1 else None)
        labels.append((float(values[known][-1]), name, colour))
    if share:
        axes.set_ylim(0, 1.02)
        _percent(axes.yaxis)
    elif zero:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    if len(labels) > 1:
        _line_labels(axes, labels)
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def by_layer(taps: Sequence[str], series: Mapping[str, Sequence[float | None]], dashed: set[str], *, salt: str) -> str:
    """Accuracy over the depth of an encoder, a line an arm; the arms in `dashed` are grey and dashed."""
    names = {name: short(name, 24) for name in series}
    right = _room(names.values(), 7.5) + 0.05
    axes = _axes(max(3.0, 0.18 * len(series) + 0.9), left=0.78, right=right, bottom=0.32)
    labels, number = [], 0
    for name, values in series.items():
        known = [(i, v) for i, v in enumerate(values) if v is not None]
        colour = GREY if name in dashed else CYCLE[number % (len(CYCLE) - 1)]
        number += name not in dashed
        axes.plot([i for i, _ in known], [v for _, v in known], color=colour, marker="osD^v"[(number // 6) % 5],
                  markersize=4, linestyle="--" if name in dashed else "-")  # fmt: skip
        labels.append((known[-1][1], names[name], colour))
    axes.set_xticks(range(len(taps)), taps)
    axes.set_xlim(-0.2, len(taps) - 0.8)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_ylabel("accuracy of a linear probe")
    _percent(axes.yaxis)
    _line_labels(axes, labels)
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def shares(names: Sequence[str], values: Sequence[float], *, ylabel: str, salt: str) -> str:
    """One upright bar each, from zero, with its number on top."""
    axes = _axes(2.1, bottom=0.32)
    axes.bar(range(len(names)), values, width=0.6, color=BLUE)
    for place, value in enumerate(values):
        axes.text(place, value, percent(value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.7, max(len(names), 3) - 0.3)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel(ylabel)
    _percent(axes.yaxis)
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def inside(
    names: Sequence[str], whole: Sequence[float], part: Sequence[float], *, whole_name: str, part_name: str,
    xlabel: str, salt: str, value: Sequence[str] = (),
) -> str:  # fmt: skip
    """A bar a row from zero, with the part of it that counts inside; `value` stands at the end of each."""
    names = [short(name, 30) for name in names]
    axes = _axes(0.75 + 0.2 * len(names), left=_room(names), top=0.25)
    places = range(len(names))
    axes.barh(places, whole, height=0.78, color=LIGHT)
    axes.barh(places, part, height=0.44, color=BLUE)
    for place, text in zip(places, value, strict=False):
        axes.annotate(text, (whole[place], place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max([*whole, 0]) * (1.25 if value else 1.05) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel(xlabel)
    _key(axes, (part_name, BLUE), (whole_name, GREY))
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def histogram(edges: np.ndarray, kept: np.ndarray, left_out: np.ndarray, *, salt: str) -> str:
    """Images by the teacher's confidence, (bins,) kept with (bins,) left out stacked on them."""
    axes = _axes(2.6, top=0.25, right=0.3)
    width = np.diff(edges) * 0.92
    middle = (edges[:-1] + edges[1:]) / 2
    axes.bar(middle, kept, width, color=BLUE)
    axes.bar(middle, left_out, width, bottom=kept, color=LIGHT)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("teacher's confidence")
    axes.set_ylabel("images")
    _percent(axes.xaxis)
    _key(axes, ("kept", BLUE), ("left out", GREY))
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def confusion(counts: np.ndarray, names: Sequence[str], *, salt: str) -> str:
    """Counts (K, K), label by prediction: colour is the root of a row's shares, up to 12 classes with numbers."""
    classes = len(names)
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    cell = 0.42 if classes <= 12 else 0.2 if classes <= 32 else 0.088
    size = 8 if classes <= 32 else 5.5
    ticks = [short(name, 14) for name in names]
    room, upright = _room(ticks, size), max(map(len, ticks)) > 3 or classes > 32
    left, bottom, edge = room + 0.3, (room if upright else 0.2) + 0.3, max(cell * classes, 1.6)
    axes = _axes(edge + bottom + 0.1, left=left, right=0.1, bottom=bottom, top=0.1, width=edge + left + 0.1)
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1, interpolation="none")  # few mistakes stay visible
    if classes <= 12:
        for i, j in zip(*counts.nonzero(), strict=True):
            axes.text(j, i, f"{counts[i, j]}\n{100 * share[i, j]:.0f} %", ha="center", va="center", fontsize=6.5,
                      linespacing=1.1, color="white" if share[i, j] > 0.3 else INK)  # fmt: skip
    axes.set_xticks(range(classes), ticks, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(range(classes), ticks, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def reliability(
    confidence: np.ndarray, accuracy: np.ndarray, low: np.ndarray, high: np.ndarray, count: np.ndarray, *, title: str,
    colour: str, salt: str,
) -> str:  # fmt: skip
    """Accuracy over mean confidence of the bins that hold images, with intervals; below, how many each holds."""
    axes = _axes(3.4, bottom=1.22, top=0.28)
    below = _figure(axes).add_axes((0.62 / WIDTH, 0.48 / 3.4, 1 - 0.77 / WIDTH, 0.6 / 3.4), sharex=axes)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.vlines(confidence, low, high, color=colour, linewidth=1.5)
    axes.plot(confidence, accuracy, "o", color=colour, markersize=6)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(0, 1.02)
    axes.set_ylabel("accuracy")
    axes.set_title(title)
    _percent(axes.yaxis)
    axes.tick_params(labelbottom=False)
    below.bar(confidence, count, width=0.04, color=colour)
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    below.set_ylim(bottom=0)
    below.set_ylabel("images")
    below.set_xlabel("confidence")
    _percent(below.xaxis)
    return _svg(axes, salt)
