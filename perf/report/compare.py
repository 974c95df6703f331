"""What moved between two reports: rows whose medians left the other one's quantiles.

`python -m perf compare BEFORE AFTER`, each a rows.csv or a folder with one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from perf import text
from perf.measuring.rows import Row, identity, read
from perf.report.page import number

_VERSIONS = ("driver", "cuda", "torch", "triton", "tritonloss", "commit")


def moved(before: Row, after: Row) -> bool:
    """Whether the two spreads, from the 20 % to the 80 % quantile, have nothing in common."""
    return bool(after["ms_p20"] > before["ms_p80"] or after["ms_p80"] < before["ms_p20"])


def newest(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    """The newest timed row of each kind; a file that is only ever appended to has several."""
    timed = sorted((row for row in rows if row["ms_p50"]), key=lambda row: str(row["utc"]))
    return {identity(row): row for row in timed}


def compare(before: Sequence[Row], after: Sequence[Row]) -> str:
    """A table of the rows that moved, the largest change first, and what else differs."""
    old, new = newest(before), newest(after)
    both = [(old[key], new[key]) for key in old if key in new]
    changed = [pair for pair in both if moved(*pair)]
    changed.sort(key=lambda pair: pair[1]["ms_p50"] / pair[0]["ms_p50"], reverse=True)
    lines = [
        f"{len(changed)} of {len(both)} rows moved beyond their own quantiles; "
        f"{len(old) - len(both)} only before, {len(new) - len(both)} only after."
    ]
    lines += _differences(both)
    if changed:
        header = ["operation", "provider", "pass", "case", "before ms", "after ms", "change"]
        lines.append(text.plain(header, [_cells(*pair) for pair in changed]))
    return "\n".join(lines)


def _differences(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    seen = {
        name: sorted(
            {f"{old[name]} -> {new[name]}" for old, new in pairs if old[name] != new[name]}
        )
        for name in _VERSIONS
    }
    return [f"{name}: {', '.join(changes)}" for name, changes in seen.items() if changes]


def _cells(old: Row, new: Row) -> list[str]:
    shape = "x".join(str(new[name]) for name in ("batch", "classes", "height", "width"))
    change = new["ms_p50"] / old["ms_p50"] - 1
    return [
        new["op"],
        new["provider"],
        new["pass"],
        f"{shape} {new['dtype']} {new['layout']} {new['parameters'] or ''}".strip(),
        f"{number(old['ms_p50'])} ({number(old['ms_p20'])} to {number(old['ms_p80'])})",
        f"{number(new['ms_p50'])} ({number(new['ms_p20'])} to {number(new['ms_p80'])})",
        f"{change:+.1%}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf compare`, which prints what moved."""
    parser = argparse.ArgumentParser(
        prog="python -m perf compare", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    options = parser.parse_args(arguments)
    print(compare(read(options.before), read(options.after)))
    return 0
