"""The performance report of the machine it runs on: rows.csv, report.md and report.html.

With a GPU every case is measured on it. Without one the same cases run at a reduced size on the
CPU (reference only), the kernels are checked in Triton's interpreter and compiled for GPUs that
are not there; nothing of that is called a speed.

`python -m perf report [--ops ...] [--shapes ...] [--dtypes ...] [--quick] [--out FOLDER]`
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from perf.compiling import compile_only
from perf.measuring import interpreted, rows
from perf.measuring.counted import count
from perf.measuring.interpreted import Parity
from perf.measuring.machine import this_machine
from perf.measuring.measure import Bench, providers
from perf.measuring.timing import copy_bandwidth
from perf.operations import peers
from perf.operations.contract import SHAPES, Case, Operation, operations
from perf.report import html, markdown
from perf.report.goals import findings
from perf.report.record import RESULTS
from perf.report.report import Report
from tritonloss._core.progress import Progress

_CPU_CASES = 4
QUICK_S = 70.0  # when a quick report begins nothing more; what runs then still ends
KEPT_TRAINING = RESULTS / "training"


@dataclass(frozen=True)
class Choice:
    """What to report on; None is everything."""

    ops: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    quick: bool = False
    budget_s: float | None = None

    def cases(self, operation: Operation, on_gpu: bool) -> list[Case]:
        """The operation's cases that are asked for; on a CPU the first few stand for all."""
        chosen = [
            case
            for case in operation.cases
            if self.shapes is None or case.shape.name in self.shapes
            if self.dtypes is None or case.dtype in self.dtypes
            if on_gpu or case.schedule is None
        ]
        return chosen[: 1 if self.quick else None if on_gpu else _CPU_CASES]


def make(choice: Choice) -> Report:
    """Find out everything, with a progress bar on stderr. Interrupted, it keeps what it has."""
    started = time.monotonic()
    end = started + QUICK_S if choice.quick else None
    chosen = operations(choice.ops)
    machine = this_machine()
    plan = _plan(chosen, choice, machine.has_gpu)
    bar = Progress(len(plan) + 1, budget_s=QUICK_S if choice.quick else None)
    bar.announce("copy bandwidth")
    report = Report(machine, copy_bandwidth(machine.device), absent=peers.absent(chosen))
    bar.step("copy bandwidth")
    try:
        if machine.has_gpu:
            _measure(report, plan, choice, bar, end)
        _count_memory(report, chosen, choice)
        with ThreadPoolExecutor(1) as beside:
            # The interpreter is one process; beside it the compilers have cores to spare.
            step = (_interpret, report, chosen, choice, bar, end)
            interpreting = [] if machine.has_gpu else [beside.submit(*step)]
            _compile(report, chosen, choice, bar, end)
            for future in interpreting:
                future.result()
        if not machine.has_gpu:  # the reference's own times, of all that is reported the least
            _measure(report, plan, choice, bar, end)
    except KeyboardInterrupt:
        report.notes.append("The report was interrupted; what came before is complete.")
    report.rows = rows.with_comparisons(report.rows)
    report.goals = findings(chosen, report.rows, report.facts)
    report.seconds = time.monotonic() - started
    bar.close()
    return report


def _plan(
    chosen: Sequence[Operation], choice: Choice, on_gpu: bool
) -> list[tuple[Operation, Case]]:
    """Every operation's most telling case first, then every operation's second one, and so on."""
    queues = [
        [(operation, case) for case in choice.cases(operation, on_gpu)] for operation in chosen
    ]
    return [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]


def _measure(
    report: Report,
    plan: Sequence[tuple[Operation, Case]],
    choice: Choice,
    bar: Progress,
    end: float | None,
) -> None:
    bench = Bench(report.machine, report.copy_GBps)
    if choice.budget_s is not None:
        end = min(time.monotonic() + choice.budget_s, end or math.inf)
    left_out = 0
    for operation, case in plan:
        if end is not None and time.monotonic() > end:
            left_out += 1
            continue
        bar.announce(f"{operation.name}: {case.text}")
        gpu = report.machine.has_gpu
        # On a CPU one case per operation shows what torch.compile does; each takes half a minute.
        compiled = case.against_compile and (gpu or case is operation.cases[0])
        asked = case if gpu else case.reduced()
        candidates = providers(operation, gpu, compiled and not choice.quick)
        report.rows += bench.rows(operation, asked, candidates)
        bar.step(f"{operation.name}: {case.text}")
    _note(report, left_out, "cases")


def _note(report: Report, left_out: int, what: str) -> None:
    if left_out:
        report.notes.append(f"{left_out} {what} were left out to keep within the time allowed.")


def _count_memory(report: Report, chosen: Sequence[Operation], choice: Choice) -> None:
    """Nothing is computed, so all sizes are counted; of a quick report only the plain cases."""
    for operation in chosen:
        for case in replace(choice, quick=False).cases(operation, on_gpu=True):
            plain = case.columns() | {"parameters": operation.cases[0].parameters}
            if case.schedule is not None or choice.quick and plain != case.columns():
                continue
            try:
                report.memory.append(count(operation, case))
            except Exception as error:  # the rest of the report does not depend on it
                report.notes.append(
                    f"Memory of {operation.name} ({case.text}) was not counted: "
                    f"{type(error).__name__}: {error}"
                )


def _interpret(
    report: Report,
    chosen: Sequence[Operation],
    choice: Choice,
    bar: Progress,
    end: float | None,
) -> None:
    work = [(op.name, i) for op in chosen for i in interpreted.cases(op, choice.quick)]
    bar.more(len(work))
    report.parity, trouble = interpreted.check(work, bar.step, end)
    if trouble:
        report.parity.append(Parity("broke off", trouble, math.nan, 0.0, False))
    else:
        report.parity_left_out = len(work) - len(report.parity)
        _note(report, report.parity_left_out, "parity checks in the interpreter")


def _compile(
    report: Report,
    chosen: Sequence[Operation],
    choice: Choice,
    bar: Progress,
    end: float | None,
) -> None:
    work = compile_only.jobs(chosen, short=True)
    if choice.quick:
        work = [job for job in work if job[1] == 0]
        work.sort(key=lambda job: job[2] != compile_only.MAIN_TARGET)
    bar.more(len(work))
    done: list[str] = []
    progress = functools.partial(_step, bar, done)
    report.facts = compile_only.table(work, progress=progress, end=end)
    _note(report, len(work) - len(done), "compilations")


def _step(bar: Progress, done: list[str], text: str) -> None:
    done.append(text)
    bar.step(text)


def write(report: Report, out: Path) -> None:
    """Write the report's files into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    # A training run of this machine if there is one, else the one that is kept.
    trained = [folder for folder in (out, KEPT_TRAINING) if (folder / "train.md").exists()]
    if trained and trained[0] != out:
        for file in trained[0].glob("train.*"):
            shutil.copy(file, out)
    report.training = out if trained else None
    rows.write(out / "rows.csv", report.rows)
    (out / "report.md").write_text(markdown.page(report), encoding="utf-8")
    (out / "report.html").write_text(html.page(report), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m perf report`; 1 if a kernel was wrong or could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m perf report", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", metavar="OP")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE")
    parser.add_argument("--quick", action="store_true", help="a first look in 90 seconds")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this")
    parser.add_argument("--out", type=Path, default=Path("build/report"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    choice = Choice(options.ops, options.shapes, options.dtypes, options.quick, options.budget)
    report = make(choice)
    write(report, options.out)
    print(options.out / "report.html")
    return 1 if report.failed else 0
