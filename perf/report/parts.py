"""The parts of a report: each adds what it finds out to the report at once.

So an interrupted report has all that was known by then. What a part does not reach is counted, and
the report says so.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import triton

from perf.compiling import baseline, compile_only
from perf.compiling.baseline import Baseline
from perf.compiling.facts import MAIN_TARGET, KernelFacts, once_per_target
from perf.measuring import host_time, interpreted
from perf.measuring.counted import count
from perf.measuring.interpreted import Interpreter, Parity
from perf.measuring.measure import OURSELVES, Bench, compiled, kernels, others
from perf.measuring.parity import Verdict
from perf.measuring.rows import FIELDS, Appender, Row, asked
from perf.measuring.timing import copy_bandwidth
from perf.operations.contract import PASSES, Case, Operation, Outputs
from perf.report.choice import Choice
from perf.report.report import Report
from tritonloss._core.progress import Progress

ENDED = "not timed: it ended its process"
CASES = "cases to be measured"  # on a GPU the kernels', elsewhere the reference's
OTHERS = "cases of eager PyTorch and of libraries"
COMPILED = "cases of the reference under torch.compile"
MEMORY = "operations whose memory is counted"
PARITY = "parity checks in the interpreter"
HOST = "operations whose host time is measured"
CODE = "cases whose machine code is looked up or compiled"
# Roughly the seconds of a step, to tell the time left. Under torch.compile few cases are begun.
_SECONDS = {
    CASES: 2.0, OTHERS: 2.0, COMPILED: 8.0, MEMORY: 1.0, PARITY: 2.0, HOST: 4.0, CODE: 0.1,
}  # fmt: skip
_COMPILING_S = 6.0


@dataclass
class Making:
    """A report that is being made: what of, until when, and what has not been reached.

    `file` is where rows are written as they are measured.
    """

    report: Report
    choice: Choice
    chosen: Sequence[Operation]
    bar: Progress
    end: float = math.inf  # a time of the monotonic clock after which nothing more is begun
    left: dict[str, int] = field(default_factory=dict)
    file: Appender | None = None
    gives_up: bool = False  # whether to leave out the next case, which has ended a process
    yardsticks: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Add a row that was measured to the report and to the file."""
        self.report.rows.append(row)
        if self.file is not None:
            self.file.add(row)

    @property
    def on_time(self) -> bool:
        return time.monotonic() < self.end

    def plan(self, what: str, steps: int) -> None:
        """Note that there is so much to do."""
        self.left[what] = self.left.get(what, 0) + steps
        self.bar.more(steps, _SECONDS[what])

    def done(self, what: str, text: str, steps: int = 1) -> None:
        """Note that so much of it is done; `text` says what."""
        self.left[what] -= steps
        self.bar.step(text, steps, _SECONDS[what])

    def finish(self, interrupted: bool) -> None:
        """Write into the report what was not reached."""
        why = "the report was interrupted" if interrupted else "the time allowed was over"
        missing = [f"{steps} {what}" for what, steps in self.left.items() if steps]
        if interrupted or missing:
            listed = ", ".join(missing) or "nothing"
            self.report.notes.append(f"Left out, since {why}: {listed}.")
        self.report.parity_left_out = self.left.get(PARITY, 0)


def copy(making: Making) -> None:
    """Measure the bandwidth of a large copy on this device."""
    making.bar.announce("copy bandwidth")
    making.report.copy_GBps = copy_bandwidth(making.report.machine.device)
    making.bar.step("copy bandwidth")


def measure(making: Making, what: str, plan: Sequence[tuple[Operation, Case]]) -> None:
    """Measure the rows of these cases that the report does not have yet.

    On a CPU the reference is timed at a reduced size. torch.compile takes half a minute for each
    case there, and is a part of its own.
    """
    report = making.report
    gpu = report.machine.has_gpu
    bench = Bench(report.machine, report.copy_GBps, making.yardsticks)
    known = set(map(asked, report.rows))
    for operation, case in plan:
        if not making.on_time:
            return
        making.bar.announce(f"{operation.name}: {case.text}")
        wanted = case if gpu else case.reduced()
        question = {"op": operation.name, **wanted.columns()}
        candidates = {
            name: function
            for name, function in _providers(what, operation, gpu).items()
            if asked({**question, "provider": name}) not in known
        }
        if making.gives_up:
            _give_up(making, question, candidates)
        for row in bench.rows(operation, wanted, candidates):
            making.add(row)
        making.done(what, f"{operation.name}: {case.text}")


def _give_up(making: Making, question: Row, candidates: dict[str, Callable[..., Outputs]]) -> None:
    """Give the first candidate rows without a time, and measure it no more.

    Libraries are left alone: one without rows may not know the case.
    """
    for name in [name for name in candidates if name in OURSELVES][:1]:
        given_up = {**question, "provider": name, "timer": ENDED, **making.report.machine.columns}
        for direction in PASSES:
            making.add({**dict.fromkeys(FIELDS), **given_up, "pass": direction})
        del candidates[name]
        making.gives_up = False


def _providers(what: str, operation: Operation, gpu: bool) -> dict[str, Callable[..., Outputs]]:
    """The functions that are measured in this part of the report, by their providers."""
    if what == COMPILED:
        return compiled(operation)
    return kernels(operation) if what == CASES and gpu else others(operation)


def count_memory(making: Making) -> None:
    """Count the memory of all cases, at full size since nothing is computed.

    A quick report counts only the cases with the same parameters as the operation's first one.
    """
    quick = making.choice.quick
    for operation in making.chosen:
        making.bar.announce(f"memory of {operation.name}")
        for case in replace(making.choice, quick=False).cases(operation, on_gpu=True):
            plain = case.columns() | {"parameters": operation.cases[0].parameters}
            if case.schedule is not None or quick and plain != case.columns():
                continue
            try:
                making.report.memory.append(count(operation, case))
            except Exception as error:  # the rest of the report does not depend on it
                making.report.notes.append(
                    f"Memory of {operation.name} ({case.text}) was not counted: "
                    f"{type(error).__name__}: {error}"
                )
        making.done(MEMORY, f"memory of {operation.name}")


def measure_host(making: Making) -> None:
    """Measure host time and launches of every operation, in a process of its own."""
    names = [operation.name for operation in making.chosen]
    making.bar.announce("host time and launches")
    try:
        making.report.host = host_time.collect(names)
    except Exception as error:  # there may be no C compiler, for example
        making.report.notes.append(f"Host time was not measured: {error}")
    making.done(HOST, "host time and launches", len(names))


def parity_work(making: Making) -> list[tuple[str, int]]:
    """The cases that the interpreter is to check: first every operation's first, and so on."""
    quick = making.choice.quick
    asked = [[(op.name, i) for i in interpreted.cases(op, quick)] for op in making.chosen]
    return [pair for turn in zip_longest(*asked) for pair in turn if pair is not None]


@contextmanager
def interpreting(
    making: Making, work: Sequence[tuple[str, int]], end: float = math.inf
) -> Iterator[None]:
    """Check the kernels in the interpreter, in a process beside all that is done in the block.

    At the end of the block it is waited for until `end` or the report's own end, which are times of
    the monotonic clock. An exception stops it.
    """
    if not work:
        yield
        return
    interpreter = Interpreter(work)
    beside = threading.Thread(target=_collect, args=(making, interpreter), daemon=True)
    beside.start()
    try:
        yield
        end = min(end, making.end)
        while beside.is_alive() and time.monotonic() < end:
            beside.join(timeout=0.2)
    finally:
        if beside.is_alive():
            interpreter.stop()
            beside.join()
        trouble = interpreter.trouble
        if making.left[PARITY] and not interpreter.stopped:
            trouble = trouble or "some answers could not be read"
        if trouble:
            making.left[PARITY] = 0
            making.report.parity.append(Parity("broke off", trouble, math.nan, 0.0, False))


def _collect(making: Making, interpreter: Interpreter) -> None:
    for parity in interpreter.results():
        making.report.parity.append(parity)
        making.done(PARITY, f"{parity.op} in the interpreter")


def code_work(making: Making) -> list[compile_only.Job]:
    """The cases whose machine code the report shows."""
    work = compile_only.jobs(making.chosen, short=True)
    if making.choice.quick:
        work = [job for job in work if job[1] == 0]
        work.sort(key=lambda job: job[2] != MAIN_TARGET)
    return work


def look_up_code(making: Making, work: Sequence[compile_only.Job]) -> None:
    """Find every kernel's facts: the baseline's where nothing has changed, else compiled now."""
    path = baseline.path_of(triton.__version__)
    known = baseline.read(path) if path.exists() and not making.choice.compile else Baseline()
    results: dict[compile_only.Job, list[KernelFacts]] = {}
    try:
        with compile_only.compilers() as pool:
            making.bar.announce("looking machine code up in the baseline")
            for name, found in compile_only.recognised(pool, work, known):
                results |= found
                making.done(CODE, f"{name} looked up", len(found))
            rest = [job for job in work if job not in results]
            making.bar.more(len(rest), _COMPILING_S)
            if rest:
                making.bar.announce(f"compiling {len(rest)} cases that have changed")
            for job, facts in compile_only.compiled(pool, rest, making.end):
                results[job] = facts
                making.done(CODE, f"{job[0]} for {job[2]}")
                making.bar.step(f"{job[0]} for {job[2]}", weight=_COMPILING_S)
    finally:
        making.report.facts = once_per_target(compile_only.in_order(results))
