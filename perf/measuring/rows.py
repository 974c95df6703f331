"""The row schema: one row per measurement, long format, the same everywhere and for ever."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A row has all of these; None (an empty cell) is what was not, or could not be, measured.
FIELDS = (
    "op", "provider", "pass", "dtype", "layout", "batch", "classes", "height", "width",
    "parameters", "ms_p50", "ms_p20", "ms_p80", "timer", "peak_delta_MiB", "bytes_floor", "GBps",
    "share_of_copy", "speedup_vs_eager", "speedup_vs_compile", "memory_vs_eager", "max_error",
    "launch_config", "gpu", "capability", "driver", "cuda", "torch", "triton", "tritonloss",
    "commit", "utc",
)  # fmt: skip
Row = dict[str, Any]

_WHOLE = {"batch", "classes", "height", "width", "bytes_floor"}
_DECIMAL = {
    "ms_p50", "ms_p20", "ms_p80", "peak_delta_MiB", "GBps", "share_of_copy", "speedup_vs_eager",
    "speedup_vs_compile", "memory_vs_eager", "max_error",
}  # fmt: skip
_CASE = ("op", "pass", "dtype", "layout", "batch", "classes", "height", "width", "parameters")


def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was asked: rows that differ only in their answer have this in common."""
    return tuple(row[name] for name in _CASE)


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was asked of whom on which machine: at most one row of a report has it."""
    return (*case_of(row), row["provider"], row["gpu"])


def with_comparisons(rows: Iterable[Row]) -> list[Row]:
    """The rows made complete, with their ratios to other providers' rows of the same case.

    Speed-ups are how many times longer the other one takes; memory is this row's share of eager's.
    """
    listed = [{**dict.fromkeys(FIELDS), **row} for row in rows]
    by_provider = {identity(row): row for row in listed}

    def ratio(row: Row, provider: str, column: str) -> float | None:
        other = by_provider.get(identity({**row, "provider": provider}))
        if other is None or not other[column] or not row[column]:
            return None
        return float(other[column] / row[column])

    for row in listed:
        row["speedup_vs_eager"] = ratio(row, "eager", "ms_p50")
        row["speedup_vs_compile"] = ratio(row, "compile", "ms_p50")
        more = ratio(row, "eager", "peak_delta_MiB")
        row["memory_vs_eager"] = None if more is None else 1 / more
    return listed


def read(path: Path) -> list[Row]:
    """Rows of a file, or of the rows.csv in a folder.

    Raises:
        ValueError: the file has other columns.
    """
    file = path / "rows.csv" if path.is_dir() else path
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{file} must have the columns {FIELDS}; it has {reader.fieldnames}")
        return [{name: _parsed(name, text) for name, text in line.items()} for line in reader]


def write(path: Path, rows: Sequence[Row], append: bool = False) -> None:
    """Write rows to a file, or behind what it holds."""
    new = not (append and path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if new else "a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _printed(row.get(name)) for name in FIELDS} for row in rows)


def _parsed(name: str, text: str) -> Any:
    if text == "":
        return None
    if name in _WHOLE:
        return int(text)
    return float(text) if name in _DECIMAL else text


def _printed(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
