"""What a report page is made of, before it is Markdown or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """One figure of the first screen: its value, what it is, and what it rests on."""

    value: str
    label: str
    detail: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """A table. `folded` is the title of one that opens on a click, for looking things up."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str | None = None


@dataclass(frozen=True)
class Bars:
    """Groups of horizontal bars: group -> series -> value."""

    title: str
    unit: str
    groups: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Lines:
    """Series of points, on logarithmic axes if `log` is set."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False


@dataclass(frozen=True)
class Picture:
    path: Path
    text: str


Block = Paragraph | Table | Bars | Lines | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The first screen, and sections below it."""

    title: str
    headline: str
    summary: Sequence[str]
    warning: str | None
    cards: Sequence[Card]
    plots: Sequence[Block] = field(default_factory=tuple)
    sections: Sequence[Section] = field(default_factory=tuple)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where that is readable."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:#.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:.0f}"
        return text.rstrip(".")
    return f"{value:.1e}"
