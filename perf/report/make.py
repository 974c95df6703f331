"""The performance report of the machine it runs on: rows.csv, report.md and report.html.

With a GPU every case is measured on it. Without one the first cases run at a reduced size on the
CPU (reference only) and the kernels are checked in Triton's interpreter; nothing of that is called
a speed. Without --rows-only, memory, host time and launches are counted, and machine code for GPUs
that need not be there is looked up in the committed baseline, or compiled where that is out of
date.

`python -m perf report [--ops ...] [--shapes ...] [--dtypes ...] [--quick] [--compile] [--out ...]`
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from perf.measuring import rows
from perf.measuring.machine import this_machine
from perf.measuring.measure import DeviceLostError
from perf.operations import peers
from perf.operations.contract import PASSES, SHAPES, Case, Operation, operations
from perf.report import html, markdown, parts
from perf.report.choice import Choice
from perf.report.goals import findings
from perf.report.parts import Making
from perf.report.record import RESULTS
from perf.report.report import Report
from tritonloss._core.progress import Progress
from tritonloss._tools.stopping import ended_in_order

QUICK_S = 70.0  # after so long a quick report begins nothing more; what runs then still ends
# After so long a report without a GPU no longer waits for the interpreter, begins no more cases of
# the reference, and begins no more of them under torch.compile, where one may take a minute.
PARITY_S, CPU_ROWS_S, CPU_COMPILE_S = 200.0, 150.0, 180.0
KEPT_TRAINING = RESULTS / "training"


def make(choice: Choice, out: Path, resume: bool = False) -> Report:
    """The report of this machine, made with a progress bar on stderr.

    Interrupted, it has what was found out by then. Rows are in the folder's rows.csv as soon as
    they are measured; `resume` goes on from there.
    """
    started = time.monotonic()
    chosen = operations(choice.ops)
    report = Report(this_machine(), absent=peers.absent(chosen))
    bar = Progress(1, budget_s=QUICK_S if choice.quick else choice.budget_s)
    end = started + QUICK_S if choice.quick else math.inf
    making = Making(report, choice, chosen, bar, end, gives_up=choice.give_up_one)
    if resume:
        report.rows = _measured_before(report, out)
    rows.write(out / "rows.csv", report.rows)
    with rows.Appender(out / "rows.csv") as making.file:
        try:
            _run(making, started)
        except KeyboardInterrupt:
            report.interrupted = True
        except DeviceLostError as error:
            report.lost = True
            report.notes.append(f"The GPU answered nothing any more: {error}.")
    making.finish(report.interrupted)
    report.rows = rows.with_comparisons(report.rows)
    report.goals = findings(chosen, report.rows, report.facts)
    report.seconds = time.monotonic() - started
    bar.close()
    return report


def _measured_before(report: Report, out: Path) -> list[rows.Row]:
    """The folder's rows of this machine, these versions and this commit, with all their passes."""
    if not (out / "rows.csv").exists():
        return []
    found = rows.read(out)
    columns = {key: value for key, value in report.machine.columns.items() if key != "utc"}
    mine = [row for row in found if all(row[key] == value for key, value in columns.items())]
    passes = Counter(map(rows.asked, mine))
    if len(mine) < len(found):
        report.notes.append(
            f"{len(found) - len(mine)} rows of another machine, version or commit were dropped."
        )
    return [row for row in mine if passes[rows.asked(row)] == len(PASSES)]


def _run(making: Making, started: float) -> None:
    """Make all parts, first those that a reader would miss most."""
    choice, gpu = making.choice, making.report.machine.has_gpu
    cases = plan(making.chosen, choice, gpu)
    measurements = _measurements(cases, choice, gpu)
    for what, work in measurements:
        making.plan(what, len(work))
    more = not choice.rows_only
    code = parts.code_work(making) if more else []
    parity = parts.parity_work(making) if more and not gpu else []
    making.plan(parts.MEMORY, len(making.chosen) * more)
    making.plan(parts.PARITY, len(parity))
    making.plan(parts.HOST, 0 if choice.quick else len(making.chosen) * more)
    making.plan(parts.CODE, len(code))
    parts.copy(making)
    if gpu or not more:
        with _allowed(making, choice.budget_s):
            for what, work in measurements:
                parts.measure(making, what, work)
    if not more:
        return
    # The interpreter is one process, which leaves cores for what is done beside it.
    with parts.interpreting(making, parity, started + PARITY_S):
        parts.count_memory(making)
        if choice.quick:
            making.report.notes.append("A quick report leaves out host time and torch.compile.")
        else:
            parts.measure_host(making)
        parts.look_up_code(making, code)
    if not gpu:  # the reference's own times, which matter least
        for what, work in measurements:
            end = CPU_COMPILE_S if what == parts.COMPILED else CPU_ROWS_S
            rest = started + end - time.monotonic()
            with _allowed(making, rest if choice.budget_s is None else choice.budget_s):
                parts.measure(making, what, work)


def _measurements(
    cases: Sequence[tuple[Operation, Case]], choice: Choice, gpu: bool
) -> list[tuple[str, Sequence[tuple[Operation, Case]]]]:
    """(what is measured, of which cases), the most wanted first: time may be over at any moment.

    On a GPU the kernels come first; then, of every operation's most telling case, all that they
    are compared with; then the other comparisons.
    """
    first = _first_of_each(cases)
    compiled = [] if choice.quick else [pair for pair in cases if pair[1].against_compile]
    told = _first_of_each(compiled)
    if not gpu:
        return [(parts.CASES, cases), (parts.COMPILED, told)]
    return [
        (parts.CASES, cases),
        (parts.OTHERS, first),
        (parts.COMPILED, told),
        (parts.OTHERS, [pair for pair in cases if pair not in first]),
        (parts.COMPILED, [pair for pair in compiled if pair not in told]),
    ]


@contextmanager
def _allowed(making: Making, seconds: float | None) -> Iterator[None]:
    """Let the parts in the block begin nothing after so many seconds."""
    before = making.end
    making.end = min(before, math.inf if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        making.end = before


def plan(chosen: Sequence[Operation], choice: Choice, on_gpu: bool) -> list[tuple[Operation, Case]]:
    """Every operation's most telling case first, then every operation's second one, and so on."""
    queues = [
        [(operation, case) for case in choice.cases(operation, on_gpu)] for operation in chosen
    ]
    return [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]


def _first_of_each(
    cases: Sequence[tuple[Operation, Case]],
) -> list[tuple[Operation, Case]]:
    """One case of every operation."""
    first: dict[str, tuple[Operation, Case]] = {}
    for operation, case in cases:
        first.setdefault(operation.name, (operation, case))
    return list(first.values())


def write(report: Report, out: Path, training: bool = True) -> None:
    """Write the report's files into a folder, if wanted with the results of training."""
    out.mkdir(parents=True, exist_ok=True)
    if training:
        # A training run of this machine if there is one, else the one that is kept.
        trained = [folder for folder in (out, KEPT_TRAINING) if (folder / "train.md").exists()]
        if trained and trained[0] != out:
            for file in trained[0].glob("train*.*"):
                shutil.copy(file, out)
        report.training = out if trained else None
    rows.write(out / "rows.csv", report.rows)
    (out / "report.md").write_text(markdown.page(report), encoding="utf-8")
    (out / "report.html").write_text(html.page(report), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf report`.

    It is 1 if a kernel was wrong or could not run, 130 if the report was interrupted, and 3 if the
    GPU was lost and a new process may go on with --resume.
    """
    parser = argparse.ArgumentParser(
        prog="python -m perf report", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE")
    parser.add_argument("--quick", action="store_true", help="a first look in 90 seconds")
    parser.add_argument(
        "--compile", action="store_true", help="compile every kernel, even if the baseline knows it"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this")
    parser.add_argument(
        "--rows-only", action="store_true", help="no memory, host time, machine code: only rows"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that the folder has")
    parser.add_argument(
        "--give-up-one", action="store_true",
        help="measure all but the first that has no rows: it has ended its process",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/report"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    choice = Choice(
        options.ops, options.shapes, options.dtypes, options.quick, options.budget, options.compile,
        options.rows_only, options.give_up_one,
    )  # fmt: skip
    with ended_in_order():
        report = make(choice, options.out, options.resume)
    write(report, options.out, training=not choice.rows_only)
    print(options.out / "report.html")
    if report.interrupted:
        return 130
    return 3 if report.lost else 1 if report.failed else 0
