"""The report's text, tables and plots, from what was found out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from perf.compile_only import MAIN_TARGET, KernelFacts, pivoted
from perf.counted import CountedMemory
from perf.page import (
    Bars,
    Block,
    Card,
    Lines,
    Page,
    Paragraph,
    Picture,
    Section,
    Table,
    number,
)
from perf.rows import Row
from perf.targets import TARGETS

if TYPE_CHECKING:
    from perf.report import Report

OURS = "triton"


def page(report: Report) -> Page:
    """The whole report."""
    machine = report.machine
    return Page(
        title="tritonloss: performance report",
        headline=_headline(report),
        summary=[
            f"{machine.gpu} · torch {machine.torch} · triton {machine.triton}"
            + (f" · driver {machine.driver} · CUDA {machine.cuda}" if machine.has_gpu else ""),
            f"tritonloss {machine.tritonloss}"
            + (f", commit {machine.commit}" if machine.commit else "")
            + f" · {machine.utc} · made in {report.seconds:.0f} s",
        ],
        warning=None if machine.has_gpu else _NO_GPU,
        cards=_gpu_cards(report) if machine.has_gpu else _offline_cards(report),
        sections=[section for section in _sections(report) if section.blocks],
    )


_NO_GPU = (
    "No GPU was at hand. No kernel was timed, and there is no speed-up on this page. What stands "
    "here are facts that need no GPU: memory counted tensor by tensor, machine code compiled for "
    "GPUs that were not there, and the kernels' results in Triton's interpreter."
)


def _headline(report: Report) -> str:
    if not report.machine.has_gpu:
        return "Not measured on a GPU yet"
    eager = [row["speedup_vs_eager"] for row in _full(report) if row["speedup_vs_eager"]]
    compiled = [row["speedup_vs_compile"] for row in _full(report) if row["speedup_vs_compile"]]
    parts = [f"{_times(statistics.median(eager))} as fast as eager PyTorch"] if eager else []
    parts += [f"{_times(statistics.median(compiled))} as fast as torch.compile"] if compiled else []
    return ", ".join(parts) or "No case could be measured"


def _gpu_cards(report: Report) -> list[Card]:
    full = _full(report)
    cards = [
        _range_card(full, "speedup_vs_eager", "of eager PyTorch's speed", _times),
        _range_card(full, "speedup_vs_compile", "of torch.compile's speed", _times),
        _range_card(full, "memory_vs_eager", "of eager's extra memory", _percent),
        _range_card(full, "share_of_copy", "of a plain copy's bandwidth", _percent),
        _trust_card(report),
        _spill_card(report.facts),
        _goal_card(report),
    ]
    return [card for card in cards if card is not None]


def _offline_cards(report: Report) -> list[Card]:
    entries = sorted(_first_per_op(report.memory), key=lambda x: x.kernels / x.eager)
    cards: list[Card | None] = [_memory_card(entry) for entry in entries]
    passed = sum(entry.passed for entry in report.parity)
    if report.parity:
        worst = max((p.error for p in report.parity if "float32" in p.case), default=0.0)
        cards.append(
            Card(
                f"{passed} of {len(report.parity)}",
                "parity checks passed",
                f"kernels in the interpreter against float64; largest float32 error {worst:.0e}",
                passed == len(report.parity),
            )
        )
    cards += [_spill_card(report.facts), _goal_card(report)]
    return [card for card in cards if card is not None]


def _memory_card(entry: CountedMemory) -> Card:
    size = entry.input_bytes
    return Card(
        f"{entry.eager / entry.kernels:.1f}x less",
        f"memory: {_words(entry.op)}",
        f"{entry.kernels / size:.2f} of the input's size instead of {entry.eager / size:.1f}; "
        f"counted, {entry.case}",
    )


def _range_card(full: Sequence[Row], column: str, label: str, text: Any) -> Card | None:
    values = [row[column] for row in full if row[column]]
    if not values:
        return None
    spread = f"median of {len(values)} cases, forward and backward; "
    spread += f"from {text(min(values))} to {text(max(values))}"
    return Card(text(statistics.median(values)), label, spread)


def _trust_card(report: Report) -> Card:
    judged = [row for row in report.rows if row["provider"] == OURS and row["pass"] == "full"]
    passed = sum(row["ms_p50"] is not None for row in judged)
    slower = sum((row["speedup_vs_eager"] or 1) < 1 for row in judged)
    return Card(
        f"{passed} of {len(judged)}",
        "cases right, then timed",
        f"each held against float64 in this run before it was timed; slower than eager in {slower}",
        passed == len(judged),
    )


def _spill_card(facts: Sequence[KernelFacts]) -> Card | None:
    if not facts:
        return None
    faults = sum(fact.fault is not None for fact in facts)
    targets = [name for name in TARGETS if any(fact.target == name for fact in facts)]
    return Card(
        str(faults),
        "compiled kernels with spills or other faults",
        f"of {len(facts)}, for {', '.join(targets)}",
        faults == 0,
    )


def _goal_card(report: Report) -> Card | None:
    judged = [goal for goal in report.goals if goal.met is not None]
    if not judged:
        return None
    met = sum(goal.met is True for goal in judged)
    waiting = len(report.goals) - len(judged)
    return Card(f"{met} of {len(judged)}", "goals met", f"{waiting} more take a measurement")


def _sections(report: Report) -> Iterable[Section]:
    yield Section("Goals", _goal_blocks(report))
    if report.machine.has_gpu:
        yield Section("Time", _time_blocks(report))
    yield Section("Memory", _memory_blocks(report))
    yield Section("Machine code", _code_blocks(report.facts))
    yield Section("Parity in the interpreter", _parity_blocks(report))
    yield Section("Training on photographs", _training_blocks(report))
    if report.machine.has_gpu:
        yield Section("All rows", [_row_table(report.rows, "every measurement")])
    else:
        yield Section("The reference on this CPU", _cpu_blocks(report))
    yield Section("Notes", [Paragraph(note) for note in [*report.notes, *_method(report)]])


def _goal_blocks(report: Report) -> list[Block]:
    if not report.goals:
        return []
    return [
        Table(
            ["goal", "wanted", "found", ""],
            [[goal.text, goal.wanted, number(goal.value), goal.verdict] for goal in report.goals],
        )
    ]


def _time_blocks(report: Report) -> list[Block]:
    blocks: list[Block] = []
    for op in _ops(report.rows):
        full = [row for row in report.rows if row["op"] == op and row["pass"] == "full"]
        timed = [row for row in full if row["ms_p50"]]
        times: dict[str, dict[str, float]] = {}
        for row in timed:
            times.setdefault(_case(row), {})[row["provider"]] = row["ms_p50"]
        blocks.append(Bars(f"{_words(op)}: forward and backward", "ms", times))
        blocks.append(
            Lines(
                f"{_words(op)}: time against size",
                "million elements",
                "ms",
                _series(timed, lambda row: _elements(row) / 1e6, "ms_p50"),
                log=True,
            )
        )
        shares = {_case(row): {OURS: 100 * row["share_of_copy"]} for row in timed if _ours(row)}
        blocks.append(Bars(f"{_words(op)}: share of the copy bandwidth", "%", shares))
    return blocks


def _memory_blocks(report: Report) -> list[Block]:
    blocks: list[Block] = []
    if report.machine.has_gpu:
        for op in _ops(report.rows):
            full = [row for row in report.rows if row["op"] == op and row["pass"] == "full"]
            held = [_with_bytes_per_pixel(row) for row in full if row["peak_delta_MiB"]]
            lines = _series(held, lambda row: row["classes"], "per_pixel")
            title = f"{_words(op)}: extra memory against classes"
            blocks.append(Lines(title, "classes", "bytes per pixel", lines, log=True))
    if report.memory:
        blocks.append(
            Paragraph(
                "Counted, not measured: the bytes of all tensors that exist at the same time in "
                "one forward and backward pass, beyond the inputs, at full size on torch's meta "
                "device. In units of the size of the maps that get a gradient."
            )
        )
        for op in dict.fromkeys(entry.op for entry in report.memory):
            groups = {
                entry.case: {
                    "kernels": entry.kernels / entry.input_bytes,
                    "eager": entry.eager / entry.input_bytes,
                }
                for entry in report.memory
                if entry.op == op
            }
            blocks.append(Bars(f"{_words(op)}: extra memory", "x the input", groups))
    return blocks


def _code_blocks(facts: Sequence[KernelFacts]) -> list[Block]:
    if not facts:
        return []
    return [
        Paragraph(
            "Compiled, not run. Each cell: registers, theoretical occupancy, and machine "
            "instructions of the main loop per output (one number per big loop, the smallest "
            "first; a kernel may have one for classes that a tile does not contain)."
        ),
        *(_instruction_lines(op, facts) for op in dict.fromkeys(fact.op for fact in facts)),
        Table(*pivoted(facts), folded=f"{len(facts)} compiled kernels"),
    ]


def _instruction_lines(op: str, facts: Sequence[KernelFacts]) -> Lines:
    lines: dict[str, dict[float, float]] = {}
    for fact in facts:
        if fact.op == op and fact.target == MAIN_TARGET and _is_plain(fact):
            for loop in fact.loops:
                name = _words(fact.kernel.removesuffix("_kernel")).strip()
                name = name if len(fact.loops) == 1 else f"{name}, {loop.name}"
                if loop.per_output is not None:
                    window = float(fact.constants["WINDOW.size"])
                    lines.setdefault(name, {}).setdefault(window, loop.per_output)
    return Lines(
        f"{_words(op)}: instructions per output",
        "window size",
        f"{MAIN_TARGET}, float32",
        {name: sorted(points.items()) for name, points in lines.items()},
    )


def _parity_blocks(report: Report) -> list[Block]:
    if not report.parity:
        return []
    cells = [
        [p.op, p.case, f"{p.error:.1e}", f"{p.allowed:.1e}", "passed" if p.passed else "FAILED"]
        for p in report.parity
    ]
    return [
        Paragraph(
            "The kernels' own code on tiny maps, forward and backward, against the reference in "
            "float64. The error is that of the worst element of any output or gradient, relative "
            "to the largest one; allowed is twice the error of eager PyTorch in the same dtype, "
            "plus one rounding."
        ),
        Table(["operation", "case", "error", "allowed", ""], cells),
    ]


def _training_blocks(report: Report) -> list[Block]:
    if report.training is None:
        return []
    text = (report.training / "train.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    prose = " ".join(line for line in text.splitlines() if line and not line.startswith("|"))
    blocks: list[Block] = [Table(cells[0], cells[2:]), Paragraph(prose)]
    picture = report.training / "train.png"
    if picture.exists():
        blocks.append(Picture(picture, "held-out photographs, labels and predictions"))
    return blocks


def _cpu_blocks(report: Report) -> list[Block]:
    if not report.rows:
        return []
    return [
        Paragraph(
            "Eager PyTorch and torch.compile of the reference at a reduced size, measured on this "
            "machine's CPU. It shows that the measuring works and how long the reference takes. "
            "It says nothing about the kernels."
        ),
        _row_table(report.rows, "measurements on the CPU"),
    ]


def _row_table(rows: Sequence[Row], name: str) -> Table:
    header = [
        "operation", "case", "provider", "pass", "ms", "20 % to 80 %", "GB/s of the floor",
        "share of copy", "x eager", "x compile", "extra MiB", "error", "timer",
    ]  # fmt: skip
    cells = [
        [
            row["op"],
            _case(row),
            row["provider"],
            row["pass"],
            number(row["ms_p50"]),
            f"{number(row['ms_p20'])} to {number(row['ms_p80'])}" if row["ms_p50"] else "",
            number(row["GBps"]),
            _percent(row["share_of_copy"]) if row["share_of_copy"] else "",
            number(row["speedup_vs_eager"]),
            number(row["speedup_vs_compile"]),
            number(row["peak_delta_MiB"]),
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
            row["timer"],
        ]
        for row in rows
    ]
    return Table(header, cells, folded=f"{len(rows)} {name}")


def _method(report: Report) -> list[str]:
    notes = [
        f"A copy of a large buffer on this machine moves {report.copy_GBps:.0f} GB/s, bytes read "
        "plus bytes written; bandwidths are the bytes a pass cannot do without over its time.",
        "No provider is timed before its outputs and gradients have passed the parity check of the "
        "same case in the same run. Rows that failed it have an error and no time. Rows that are "
        "slower than another provider stay in.",
    ]
    if report.machine.has_gpu:
        notes.append(
            "Times are medians with 20 % and 80 % quantiles, with the L2 cache flushed "
            "(triton.testing.do_bench), or in a CUDA graph below 0.1 ms; backward passes run on "
            "a fresh forward pass each time. Memory is the allocator's peak beyond the inputs. "
            "Labels lie in regions of 32 x 32 pixels, 3 % ignored."
        )
    return notes


def _full(report: Report) -> list[Row]:
    return [row for row in report.rows if row["pass"] == "full" and _ours(row) and row["ms_p50"]]


def _ours(row: Row) -> bool:
    return bool(row["provider"] == OURS)


def _series(rows: Sequence[Row], x: Any, column: str) -> dict[str, list[tuple[float, float]]]:
    """Points of the plainest cases: the most common parameters, float32, contiguous."""
    plain = [row for row in rows if row["dtype"] == "float32" and row["layout"] == "contiguous"]
    if not plain:
        return {}
    usual = statistics.mode(row["parameters"] for row in plain)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in plain:
        if row["parameters"] == usual:
            series.setdefault(row["provider"], []).append((float(x(row)), float(row[column])))
    return {name: sorted(points) for name, points in series.items()}


def _is_plain(fact: KernelFacts) -> bool:
    changed = ("padding", "reduction", "form", "reweight", "int64", "odd", "voc")
    usual = "float32 contiguous" in fact.case and not any(word in fact.case for word in changed)
    return usual and 1 < fact.constants.get("WINDOW.size", 0) <= 11


def _with_bytes_per_pixel(row: Row) -> Row:
    pixels = _elements(row) / row["classes"]
    return {**row, "per_pixel": row["peak_delta_MiB"] * 2**20 / pixels}


def _elements(row: Row) -> int:
    return int(row["batch"] * row["classes"] * row["height"] * row["width"])


def _case(row: Row) -> str:
    size = f"{row['batch']}x{row['classes']}x{row['height']}x{row['width']}"
    layout = "" if row["layout"] == "contiguous" else f" {row['layout']}"
    return f"{size} {row['dtype']}{layout} {row['parameters']}"


def _ops(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in rows))


def _first_per_op(entries: Sequence[CountedMemory]) -> list[CountedMemory]:
    first: dict[str, CountedMemory] = {}
    for entry in entries:
        first.setdefault(entry.op, entry)
    return list(first.values())


def _words(op: str) -> str:
    return op.replace("_", " ")


def _times(value: float) -> str:
    return f"{number(value, 2)}x"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
