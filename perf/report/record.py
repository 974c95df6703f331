"""Keep a report's GPU rows: `python -m perf record ROWS` adds them to perf/results/<GPU>.csv.

Files in perf/results are only ever appended to; a row that is there already is not added again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from perf.measuring.rows import Row, append, identity, read, with_comparisons
from tritonloss._core.configurations import sanitised

RESULTS = Path(__file__).parents[1] / "results"


def record(rows: Sequence[Row], folder: Path = RESULTS) -> dict[Path, int]:
    """How many rows were appended to which file: new ones that were measured on a GPU."""
    added: dict[Path, int] = {}
    measured = [row for row in rows if row["capability"]]
    for gpu in dict.fromkeys(row["gpu"] for row in measured):
        path = folder / f"{sanitised(gpu)}.csv"
        known = {(*identity(row), row["utc"]) for row in read(path)} if path.exists() else set()
        mine = [row for row in measured if row["gpu"] == gpu]
        new = [row for row in mine if (*identity(row), row["utc"]) not in known]
        append(path, new)
        added[path] = len(new)
    return added


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf record`: 1 if no row is from a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m perf record", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("rows", type=Path, metavar="ROWS", help="a rows.csv or a folder with one")
    options = parser.parse_args(arguments)
    added = record(with_comparisons(read(options.rows)))
    for path, count in added.items():
        print(f"{count} rows added to {path.name}")
    if not added:
        print("no row was measured on a GPU", file=sys.stderr)
    return 0 if added else 1
