"""How rows, cases and numbers are worded, and which rows a plot is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perf.measuring.rows import Row
from perf.report.page import number

OURS = "triton"


def is_ours(row: Row) -> bool:
    return bool(row["provider"] == OURS)


def timed_in_full(rows: Iterable[Row]) -> list[Row]:
    """The kernels' rows of a forward and backward pass that have a time."""
    return [row for row in rows if row["pass"] == "full" and is_ours(row) and row["ms_p50"]]


def series(
    rows: Sequence[Row], x: Callable[[Row], float], column: str
) -> dict[str, list[tuple[float, float]]]:
    """Points of the plainest cases: the most common parameters, float32, contiguous."""
    plain = [row for row in rows if row["dtype"] == "float32" and row["layout"] == "contiguous"]
    if not plain:
        return {}
    usual = statistics.mode(row["parameters"] for row in plain)
    found: dict[str, list[tuple[float, float]]] = {}
    for row in plain:
        if row["parameters"] == usual:
            found.setdefault(row["provider"], []).append((float(x(row)), float(row[column])))
    return {name: sorted(points) for name, points in found.items()}


def elements(row: Row) -> int:
    return int(row["batch"] * row["classes"] * row["height"] * row["width"])


def with_bytes_per_pixel(row: Row) -> Row:
    return {**row, "per_pixel": row["peak_delta_MiB"] * 2**20 * row["classes"] / elements(row)}


def case_words(row: Row) -> str:
    size = f"{row['batch']}x{row['classes']}x{row['height']}x{row['width']}"
    layout = "" if row["layout"] == "contiguous" else f" {row['layout']}"
    return f"{size} {row['dtype']}{layout} {row['parameters']}"


def first_per_op(entries: Iterable[Any]) -> list[Any]:
    """The first entry of each operation, its most telling one."""
    first: dict[str, Any] = {}
    for entry in entries:
        first.setdefault(entry["op"] if isinstance(entry, dict) else entry.op, entry)
    return list(first.values())


def words(op: str) -> str:
    named = op.strip("_").removesuffix("_kernel").split("_")
    return " ".join(_SHORT.get(word, word) for word in named)


_SHORT = {"ssim": "SSIM", "rmi": "RMI"}


def times(value: float) -> str:
    return f"{number(value, 2)}x"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"
