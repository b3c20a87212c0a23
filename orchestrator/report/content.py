"""What a report is made of: sections of blocks, plain values that the template lays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Text:
    """A paragraph; a `note` is set apart, a `heading` stands over what follows."""

    text: str
    look: Literal["plain", "note", "heading", "verdict good", "verdict open", "verdict bad"] = "plain"

    block: ClassVar[str] = "text"


@dataclass(frozen=True)
class Lines:
    """A list of short lines."""

    lines: Sequence[str]

    block: ClassVar[str] = "lines"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `align` has an l or r for each column. `folded`: closed until it is asked for."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    caption: str = ""
    folded: bool = False

    block: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """An SVG with what it shows, and its numbers."""

    svg: str
    caption: str
    numbers: Table
    wide: bool = False  # too detailed for a narrow screen: it scrolls there

    block: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Row:
    """Figures side by side where there is room: two, or three where they are narrow."""

    figures: Sequence[Figure]
    narrow: bool = False

    block: ClassVar[str] = "row"


@dataclass(frozen=True)
class Tile:
    """A picture with lines under it; `title` is its tooltip."""

    uri: str
    lines: Sequence[str]
    title: str


@dataclass(frozen=True)
class Gallery:
    """Pictures under a caption, each drawn `pixels` wide; `crisp` keeps enlarged pixels square."""

    caption: str
    tiles: Sequence[Tile]
    pixels: int
    crisp: bool

    block: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Code:
    """Text as it is, under a caption."""

    caption: str
    text: str

    block: ClassVar[str] = "code"


INTERVAL = "95\u00a0%\u00a0interval"  # a table's header does not break it

Block = Text | Lines | Table | Figure | Row | Gallery | Code


@dataclass(frozen=True)
class Section:
    """A question and its answer. `name` is its anchor."""

    name: str
    title: str
    question: str
    blocks: list[Block] = field(default_factory=list)


def percent(share: float) -> str:
    """0.8316 is 83.2 %."""
    return f"{100 * share:.1f} %"


def interval(low: float, high: float) -> str:
    """0.792, 0.866 is 79.2 to 86.6 %."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def points(difference: float) -> str:
    """0.0132 is +1.3: percentage points."""
    return f"{100 * difference:+.1f}"


def points_interval(low: float, high: float) -> str:
    """-0.004, 0.03 is -0.4 to +3.0."""
    return f"{points(low)} to {points(high)}"
