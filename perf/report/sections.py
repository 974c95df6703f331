"""One section of the report per loss: what was measured, counted and compiled of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from perf.compiling.counting import TOTAL
from perf.compiling.facts import MAIN_TARGET, KernelFacts
from perf.measuring import host_time
from perf.measuring.counted import CountedMemory
from perf.measuring.interpreted import Parity
from perf.measuring.rows import Row
from perf.report.page import Bars, Block, Lines, Paragraph, Section, Table, number
from perf.report.picture import share_of_compiled
from perf.report.report import Report
from perf.report.wording import (
    OURS,
    case_words,
    elements,
    is_ours,
    percent,
    series,
    with_bytes_per_pixel,
    words,
)


def of_the_losses(report: Report) -> Iterable[Section]:
    """A section for each operation that anything is known of."""
    named = [
        *(row["op"] for row in report.rows),
        *(entry.op for entry in report.memory),
        *(entry.op for entry in report.host if entry.op != host_time.BARE),
        *(entry.op for entry in report.parity),
        *(fact.op for fact in report.facts),
        *(goal.op for goal in report.goals),
    ]
    for op in dict.fromkeys(filter(None, named)):
        blocks = [
            *_measured(report, op),
            *_counted(report, op),
            *_host_blocks(report, op),
            *_table_blocks(report, op),
        ]
        if blocks:
            yield Section(words(op), blocks)


def _measured(report: Report, op: str) -> Iterable[Block]:
    if not report.machine.has_gpu:
        yield Paragraph(
            "Not measured on a GPU: no time, no bandwidth, no speed-up. Below is what needs none."
        )
        return
    full = [row for row in report.rows if row["op"] == op and row["pass"] == "full"]
    timed = [row for row in full if row["ms_p50"]]
    cases: dict[str, dict[str, float]] = {}
    for row in timed:
        cases.setdefault(case_words(row), {})[row["provider"]] = row["ms_p50"]
    yield Bars("Time, forward and backward", "ms", cases)
    yield Lines(
        "Time against size",
        "million elements",
        "ms",
        series(timed, lambda row: elements(row) / 1e6, "ms_p50"),
        log=True,
    )
    held = [with_bytes_per_pixel(row) for row in full if row["peak_delta_MiB"]]
    yield Lines(
        "Extra memory against classes",
        "classes",
        "bytes per pixel",
        series(held, lambda row: row["classes"], "per_pixel"),
        log=True,
    )
    shares = {case_words(row): {OURS: 100 * row["share_of_copy"]} for row in timed if is_ours(row)}
    yield Bars("Share of the copy bandwidth", "%", shares)


def _counted(report: Report, op: str) -> Iterable[Block]:
    memory = [entry for entry in report.memory if entry.op == op]
    if memory and not report.machine.has_gpu:
        yield _memory_lines(memory)
    yield _instruction_lines(op, report.facts)
    if memory:
        groups = {
            entry.case: {
                "kernels": entry.kernels / entry.input_bytes,
                **share_of_compiled(entry),
                "eager": entry.eager / entry.input_bytes,
            }
            for entry in memory
        }
        yield Bars("Extra memory, counted tensor by tensor", "x the input", groups)


def _host_blocks(report: Report, op: str) -> Iterable[Block]:
    rows = [row for row in report.host if row.op in (op, host_time.BARE)]
    if len(rows) == 2:
        header = ["Host time and launches of a call, forward and backward", *host_time.HEADER[1:]]
        yield Table(header, [[words(row.op), *host_time.cells(row)] for row in rows])


def _memory_lines(memory: Sequence[CountedMemory]) -> Lines:
    """Memory over classes, of the cases that differ from the first one only in their sizes."""
    kind = memory[0].case.split(" ", 1)[-1]
    plain = [entry for entry in memory if entry.case.split(" ", 1)[-1] == kind]
    lines = {
        name: sorted({(float(e.classes), getattr(e, name) / e.pixels) for e in plain})
        for name in ("kernels", "eager")
    }
    title = "Extra memory against classes, counted"
    return Lines(title, "classes", "bytes per pixel", lines, log=True)


def _instruction_lines(op: str, facts: Sequence[KernelFacts]) -> Lines:
    lines: dict[str, dict[float, float]] = {}
    for fact in facts:
        if fact.op == op and fact.target == MAIN_TARGET and _is_plain(fact):
            window = float(fact.constants["WINDOW.size"])
            for total, count in fact.counts.totals:
                name = f"{words(fact.kernel)}{total.removeprefix(TOTAL)}"
                lines.setdefault(name, {}).setdefault(window, count)
    if len({place for points in lines.values() for place in points}) < 2:
        lines = {}  # one window is no line; the table has its numbers
    return Lines(
        "Instructions per output, compiled and not run",
        "window size",
        f"{MAIN_TARGET}, float32",
        {name: sorted(points.items()) for name, points in lines.items()},
    )


def _is_plain(fact: KernelFacts) -> bool:
    changed = ("padding", "reduction", "form", "reweight", "int64", "odd", "voc")
    usual = "float32 contiguous" in fact.case and not any(word in fact.case for word in changed)
    return usual and 1 < fact.constants.get("WINDOW.size", 0) <= 11


def _table_blocks(report: Report, op: str) -> Iterable[Block]:
    goals = [goal for goal in report.goals if goal.op == op]
    if goals:
        cells = [[goal.text, goal.wanted, number(goal.value), goal.verdict] for goal in goals]
        yield Table(["goal", "wanted", "found", ""], cells)
    parity = [entry for entry in report.parity if entry.op == op]
    if parity:
        yield _parity_table(parity)
    rows = [row for row in report.rows if row["op"] == op]
    if not rows:
        return
    if report.machine.has_gpu:
        yield row_table(rows, f"{len(rows)} rows, every one measured")
    else:
        name = f"{len(rows)} rows of the reference on this CPU, at a reduced size; not the kernels"
        yield row_table(rows, name)


def _parity_table(parity: Sequence[Parity]) -> Table:
    cells = [
        [p.case, f"{p.error:.1e}", f"{p.allowed:.1e}", "passed" if p.passed else "FAILED"]
        for p in parity
    ]
    return Table(["kernels in the interpreter, tiny maps", "error", "allowed", ""], cells)


def row_table(rows: Sequence[Row], name: str) -> Table:
    """A table of rows with all that was measured, the errors, too."""
    header = [
        "case", "provider", "pass", "ms", "20 % to 80 %", "error", "x eager", "x compile",
        "extra MiB", "GB/s of the floor", "share of copy", "timer",
    ]  # fmt: skip
    cells = [
        [
            case_words(row),
            row["provider"],
            row["pass"],
            number(row["ms_p50"]),
            f"{number(row['ms_p20'])} to {number(row['ms_p80'])}" if row["ms_p50"] else "",
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
            number(row["speedup_vs_eager"]),
            number(row["speedup_vs_compile"]),
            number(row["peak_delta_MiB"]),
            number(row["GBps"]),
            percent(row["share_of_copy"]) if row["share_of_copy"] else "",
            row["timer"],
        ]
        for row in rows
    ]
    return Table(header, cells, folded=name)
