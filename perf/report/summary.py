"""What a report's rows come to, a line per case: `python -m perf summary ROWS`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from perf.measuring.rows import Row, read, with_comparisons
from perf.report.page import number
from perf.report.wording import case_words, is_ours, percent, times
from perf.text import plain


def summary(rows: Sequence[Row]) -> str:
    """A table of the kernels' forward and backward passes, and the medians under it."""
    full = [row for row in rows if is_ours(row) and row["pass"] == "full"]
    if not full:
        return "no kernel was measured: that takes a GPU"
    header = ["operation", "case", "ms", "x eager", "x compile", "of eager's memory", "of copy", ""]
    lines = [plain(header, [_cells(row) for row in full])]
    for column, text in (
        ("speedup_vs_eager", "eager PyTorch's speed"),
        ("speedup_vs_compile", "torch.compile's speed"),
    ):
        values = [row[column] for row in full if row[column]]
        if values:
            lines.append(
                f"{times(statistics.median(values))} {text}, median of {len(values)} cases"
            )
    untimed = sum(row["ms_p50"] is None for row in full)
    lines.append(
        f"{len(full) - untimed} of {len(full)} cases right, then timed, on {full[0]['gpu']}"
    )
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        row["op"],
        case_words(row),
        number(row["ms_p50"]),
        number(row["speedup_vs_eager"]),
        number(row["speedup_vs_compile"]),
        percent(row["memory_vs_eager"]) if row["memory_vs_eager"] else "",
        percent(row["share_of_copy"]) if row["share_of_copy"] else "",
        "" if row["ms_p50"] else str(row["timer"]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf summary`: 1 if there are no rows."""
    parser = argparse.ArgumentParser(
        prog="python -m perf summary", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("rows", type=Path, metavar="ROWS", help="a rows.csv or a folder with one")
    options = parser.parse_args(arguments)
    try:
        print(summary(with_comparisons(read(options.rows))))
    except FileNotFoundError as error:
        print(f"there are no rows: {error}")
        return 1
    return 0
