"""The README's table of machine code, written from the committed numbers of the newest Triton.

`python -m perf code-table`
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from perf.compiling import baseline
from perf.compiling.baseline import Baseline, Kept
from perf.compiling.counting import TOTAL
from perf.compiling.facts import MAIN_TARGET
from perf.report.page import number
from perf.report.readme import write_table

_START = "| sm_90, float32, uint8 labels, Triton "
# Kernels with fewer instructions per output are left out, so that the table can be read.
_LEAST = 2.0


class Row(NamedTuple):
    """A case of an operation, and what the README calls it."""

    title: str
    operation: str
    case: str


_CITY, _ADE, _VOC = (
    f"{shape} float32 contiguous labels=uint8" for shape in ("cityscapes", "ade20k", "voc")
)
_LAST = _ADE.replace("contiguous", "channels_last")
_SSL = "structural_similarity_loss"
ROWS = (
    Row("SSL, window 3", _SSL, f"{_CITY} window_size=3"),
    Row("SSL, window 11", _SSL, f"{_CITY} window_size=11"),
    Row("SSIM loss, window 11", "ssim_loss", f"{_CITY} window_size=11"),
    Row("RMI, regions of 3, pooled 4 x 4", "rmi_loss", f"{_VOC} region_size=3 pool_size=4"),
    Row("RMI without pooling", "rmi_loss", f"{_VOC} region_size=3 pool_size=4 pooling=None"),
    Row("Cross entropy, 150 classes", "cross_entropy", _ADE),
    Row("the same, channels_last", "cross_entropy", _LAST),
    Row("Binary cross entropy, 150 classes", "binary_cross_entropy", _ADE),
    Row("the same, channels_last", "binary_cross_entropy", _LAST),
    Row("Margin calibration, 150 classes", "margin_calibrated_loss", _ADE),
    *(
        Row(
            f"Gaussian statistics, window {window}",
            "gaussian_statistics",
            f"cityscapes float32 contiguous window_size={window}",
        )
        for window in (3, 11)
    ),
)


def newest() -> Path:
    """The path of the newest Triton's baseline."""
    paths = baseline.FOLDER.glob("triton-*.json")
    return max(paths, key=lambda path: [int(part) for part in path.stem[7:].split(".")])


def table(version: str, committed: Baseline) -> list[str]:
    """The lines of the table."""
    lines = [
        f"{_START}{version} | registers | spills | instructions per pixel and class |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        kernels = committed.of_case((MAIN_TARGET, f"{row.operation}: {row.case}"))
        kernels = {name: kept for name, kept in kernels.items() if _most(kept) >= _LEAST}
        cells = [row.title, _registers(kernels), _spills(kernels.values()), _counts(kernels)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _totals(kept: Kept) -> Mapping[str, float]:
    return {name: count for name, count in kept.counts.items() if name.startswith(TOTAL)}


def _most(kept: Kept) -> float:
    return max(_totals(kept).values(), default=0.0)


def _words(names: Iterable[str]) -> dict[str, str]:
    """What tells the kernels of a case from each other, in words."""
    stems = {name: name.strip("_").replace("_kernel", "") for name in names}
    prefix = os.path.commonprefix([*stems.values(), *(s + "_" for s in stems.values())])
    cut = prefix.rfind("_") + 1
    return {name: stem[cut:].replace("_", " ") for name, stem in stems.items()}


def _registers(kernels: Mapping[str, Kept]) -> str:
    words = _words(kernels)
    return ", ".join(f"{words[name]} {kept.registers}" for name, kept in kernels.items())


def _spills(kernels: Iterable[Kept]) -> str:
    return f"{max((kept.spill_bytes for kept in kernels), default=0)}"


def _counts(kernels: Mapping[str, Kept]) -> str:
    words = _words(kernels)
    cells = []
    for name, kept in kernels.items():
        totals = [
            f"{number(count)}{label.removeprefix(TOTAL).replace(', class', '')}"
            for label, count in sorted(_totals(kept).items())
        ]
        cells.append(f"{words[name]} {', '.join(totals)}")
    return "; ".join(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf code-table`, which writes and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m perf code-table", description=str(__doc__).split("\n")[0]
    )
    parser.parse_args(arguments)
    path = newest()
    lines = table(path.stem.removeprefix("triton-"), baseline.read(path))
    write_table(_START, lines)
    print("\n".join(lines))
    return 0
