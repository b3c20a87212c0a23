"""The figures of a search: every trial as a line through its values, and its result over each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator, NullLocator

from orchestrator.report.figures import BLUE, GREY, INK, LIGHT, NARROW, RED, STYLE, _axes, _percent, _svg, short

MAP = "viridis"
GOLD = 2.399963  # radians: places of equal options are spread by it, so that points do not hide each other


def place(parameter: Mapping[str, Any], value: Any) -> float:
    """Where a value stands on its axis, in [0, 1]: by its option, or on the range's own scale."""
    known = parameter["options"]
    if known is not None:
        return known.index(value) / max(1, len(known) - 1) if value in known else math.nan
    low, high = parameter["low"], parameter["high"]
    if parameter["log"]:
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def ticks(parameter: Mapping[str, Any]) -> tuple[list[float], list[str]]:
    """(places in [0, 1], what stands there)."""
    known = parameter["options"]
    if known is not None:
        words = [value if isinstance(value, str) else json.dumps(value) for value in known]
        return [place(parameter, value) for value in known], [short(word, 14) for word in words]
    low, high = parameter["low"], parameter["high"]
    middle = math.sqrt(low * high) if parameter["log"] else (low + high) / 2
    return [0.0, 0.5, 1.0], [f"{value:.3g}" for value in (low, middle, high)]


@matplotlib.rc_context(STYLE)
def parallel(
    parameters: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, Any]], results: Sequence[float], best: int,
    *, metric: str, share: bool, salt: str,
) -> str:  # fmt: skip
    """A line a trial through an axis for each parameter, coloured by its result, which is the last axis.

    Args:
        results: one a trial. best: which of them is drawn on top, wide.
    """
    count = len(parameters) + 1
    width = max(4.5, 1.25 * count + 0.9)
    axes = _axes(3.2, left=0.5, right=0.65, bottom=0.3, top=0.35, width=width)
    low, high = min(results), max(results)
    spread = (high - low) or 1.0
    lines = [
        [(i, place(parameter, value[parameter["name"]])) for i, parameter in enumerate(parameters)]
        + [(count - 1, (result - low) / spread)]
        for value, result in zip(values, results, strict=True)
    ]  # fmt: skip
    colours = matplotlib.colormaps[MAP]([(result - low) / spread for result in results])
    order = sorted(range(len(lines)), key=lambda i: i == best)
    axes.add_collection(LineCollection(
        [lines[i] for i in order], colors=[colours[i] for i in order], alpha=0.85,
        linewidths=[3.0 if i == best else 1.2 for i in order],
    ))  # fmt: skip
    axes.set_xlim(-0.05, count - 0.95)
    axes.set_ylim(-0.04, 1.04)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_xticks(range(count), [short(p["name"], 18) for p in parameters] + [short(metric, 22)])
    axes.tick_params(axis="x", length=0)
    for i, parameter in enumerate(parameters):
        axes.axvline(i, color=GREY, linewidth=0.8)
        for at, text in zip(*ticks(parameter), strict=True):
            axes.annotate(text, (i, at), (3, 0), textcoords="offset points", fontsize=7, color=INK, va="center")
    axes.axvline(count - 1, color=GREY, linewidth=0.8)
    for at in (low, high):
        text = f"{100 * at:.1f} %" if share else f"{at:.3g}"
        axes.annotate(
            text, (count - 1, (at - low) / spread), (3, 0), textcoords="offset points", fontsize=7, va="center"
        )
    return _svg(axes, salt)


@matplotlib.rc_context(STYLE)
def slices(
    parameter: Mapping[str, Any], values: Sequence[Any], results: Sequence[float], best: int, default: int | None, *,
    metric: str, share: bool, salt: str,
) -> str:  # fmt: skip
    """The result of each trial over one parameter; the best is a red dot, the recipe's own values a ring."""
    axes = _axes(2.3, left=0.6, right=0.12, bottom=0.48, top=0.1, width=NARROW)
    at = np.array([place(parameter, value) for value in values])
    if parameter["options"] is not None:
        at = at + 0.02 * np.sin(GOLD * np.arange(len(at)))
    axes.plot(at, results, "o", color=BLUE, markersize=4.5, alpha=0.75, linestyle="none")
    axes.plot(at[best], results[best], "o", color=RED, markersize=7)
    if default is not None:
        axes.plot(at[default], results[default], "o", markerfacecolor="none", markeredgecolor=INK, markersize=10)
    _scale(axes, parameter)
    axes.set_ylabel(short(metric, 26))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    return _svg(axes, salt)


def _scale(axes: Axes, parameter: Mapping[str, Any]) -> None:
    where, words = ticks(parameter)
    axes.set_xticks(where, [short(word, 9) for word in words])
    axes.set_xlim(-0.08, 1.08)
    axes.set_xlabel(f"{short(parameter['name'], 30)}{', logarithmic' if parameter['log'] else ''}")


@matplotlib.rc_context(STYLE)
def importances(shares: Mapping[str, float], *, salt: str) -> str:
    """A bar from zero for each parameter: its share of the variance."""
    names = [short(name, 26) for name in shares]
    axes = _axes(0.7 + 0.24 * len(names), left=0.095 * max(map(len, names)) + 0.2, right=0.45)
    axes.barh(range(len(names)), list(shares.values()), height=0.6, color=BLUE)
    for row, value in enumerate(shares.values()):
        axes.annotate(f"{100 * value:.0f} %", (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the result's variance")
    _percent(axes.xaxis)
    return _svg(axes, salt)
