"""Plots as HTML and SVG whose colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from perf.report.page import Bars, Lines, number

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
# Providers keep their colour from plot to plot; anything else takes the next free one.
_COLOURS = {"triton": 1, "kernels": 1, "eager": 2, "compile": 3}


def bars(plot: Bars) -> str:
    """Horizontal bars, each with its value behind it."""
    if not plot.groups:
        return ""
    names = list(dict.fromkeys(name for group in plot.groups.values() for name in group))
    colours = _colours(names)
    largest = max(value for group in plot.groups.values() for value in group.values())
    groups = []
    for label, group in plot.groups.items():
        drawn = "".join(
            f'<div class="bar"><i class="c{colours[name]}" '
            f'style="width:{max(0.3, 78 * value / largest):.1f}%"></i>'
            f"<span>{number(value)}</span></div>"
            for name, value in group.items()
        )
        groups.append(f'<div class="group"><div class="case">{escape(label)}</div>{drawn}</div>')
    title = f"<b>{escape(plot.title)}</b>, {escape(plot.unit)}"
    caption = f"<figcaption>{title}{_legend(names)}</figcaption>"
    return f'<figure class="bars">{caption}{"".join(groups)}</figure>'


def lines(plot: Lines) -> str:
    """Points joined by lines, on linear or logarithmic axes."""
    series = {name: points for name, points in plot.series.items() if points}
    if not series:
        return ""
    across = _Axis([x for points in series.values() for x, _ in points], plot.log, zero=False)
    places = sorted({x for points in series.values() for x, _ in points})
    if not plot.log and len(places) <= 8:
        across.marks = places
    up = _Axis([y for points in series.values() for _, y in points], plot.log, zero=not plot.log)
    names = list(series)
    colours = _colours(names)
    drawn = [_grid(across, up)]
    for name, points in series.items():
        dots = [(_x(across.place(x)), _y(up.place(y))) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        drawn.append(f'<polyline class="s{colours[name]}" points="{path}"/>')
        drawn += [
            f'<circle class="f{colours[name]}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(name)}: {number(value)} at {number(place)}</title></circle>"
            for (x, y), (place, value) in zip(dots, points, strict=True)
        ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{_HEIGHT - 6}" class="m">{escape(plot.x_label)}</text>')
    title = f"<b>{escape(plot.title)}</b>, {escape(plot.y_label)}"
    return (
        f'<figure class="lines"><figcaption>{title}{_legend(names)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


class _Axis:
    """Where values lie between 0 and 1, and which of them get a mark."""

    def __init__(self, values: Sequence[float], log: bool, zero: bool) -> None:
        self._log = log
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.3, high * 1.3
        else:
            margin = 0.05 * (high - low or high or 1)
            low, high = 0.0 if zero else low - margin, high + margin
        self._low, self._high = self._scaled(low), self._scaled(high)
        self.marks = list(self._log_marks(low, high) if log else self._marks(low, high))

    def place(self, value: float) -> float:
        return (self._scaled(value) - self._low) / (self._high - self._low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    @staticmethod
    def _marks(low: float, high: float) -> Iterable[float]:
        rough = (high - low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        for index in range(math.ceil(low / step), math.floor(high / step) + 1):
            yield index * step

    @staticmethod
    def _log_marks(low: float, high: float) -> Iterable[float]:
        decades = math.log10(high / low)
        factors = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
            for factor in factors:
                if low <= factor * 10**exponent <= high:
                    yield factor * 10.0**exponent


def _grid(across: _Axis, up: _Axis) -> str:
    drawn = []
    for value in up.marks:
        y = _y(up.place(value))
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" class="e">{_mark(value)}</text>')
    for value in across.marks:
        x = _x(across.place(value))
        drawn.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" class="m">{_mark(value)}</text>'
        )
    return "".join(drawn)


def _mark(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0e}"


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - _RIGHT)


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _TOP - _BOTTOM)


def _colours(names: Sequence[str]) -> dict[str, int]:
    free = [index for index in range(1, 9) if index not in {_COLOURS.get(n) for n in names}]
    chosen = {}
    for name in names:
        chosen[name] = _COLOURS[name] if name in _COLOURS else (free.pop(0) if free else 8)
    return chosen


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    colours = _colours(names)
    return "".join(
        f' <span class="key"><i class="c{colours[name]}"></i>{escape(name)}</span>'
        for name in names
    )
