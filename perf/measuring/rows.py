"""The row schema: one row per measurement, long format, the same everywhere and for ever."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
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


def asked(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was asked of whom, whatever the pass."""
    return (*case_of({**row, "pass": ""}), row["provider"])


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


class Appender:
    """A file of rows that grows as they are measured.

    A row is in the file when `add` returns, whatever becomes of the process after that. A part of a
    row, left by a process that was stopped, is cut off.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+", newline="", encoding="utf-8")
        self._stream.seek(0)
        whole = _whole_lines(self._stream.read())
        self._stream.truncate(len(whole.encode("utf-8")))
        self._stream.seek(0, os.SEEK_END)
        if not whole:
            self._put(dict(zip(FIELDS, FIELDS, strict=True)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row down."""
        self._put({name: _printed(row.get(name)) for name in FIELDS})

    def _put(self, cells: Mapping[str, Any]) -> None:
        line = io.StringIO()
        csv.DictWriter(line, FIELDS, lineterminator="\n").writerow(cells)
        self._stream.write(line.getvalue())
        self._stream.flush()

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()


def read(path: Path) -> list[Row]:
    """Rows of a file, or of the rows.csv in a folder; a last line that is not whole is left out.

    Raises:
        ValueError: the file has other columns.
    """
    file = path / "rows.csv" if path.is_dir() else path
    reader = csv.DictReader(io.StringIO(_whole_lines(file.read_text(encoding="utf-8"))))
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise ValueError(f"{file} must have the columns {FIELDS}; it has {reader.fieldnames}")
    return [{name: _parsed(name, text) for name, text in line.items()} for line in reader]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of rows in one step: stopped, this leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    append(draft, rows)
    draft.replace(path)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Write rows behind those that a file holds."""
    with Appender(path) as file:
        for row in rows:
            file.add(row)


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _parsed(name: str, text: str) -> Any:
    if text == "":
        return "" if name == "parameters" else None  # no parameters are an answer, not a gap
    if name in _WHOLE:
        return int(text)
    return float(text) if name in _DECIMAL else text


def _printed(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
