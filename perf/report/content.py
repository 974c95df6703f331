"""The report's first screen and its sections, from what was found out.

Four figures answer how much faster, how much less memory, on what machine, and whether to trust
it; two plots show the first two. Then a section per loss, the compile-only table, the environment.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence

from perf.compiling.facts import MAIN_TARGET, KernelFacts, pivoted
from perf.compiling.targets import TARGETS
from perf.measuring.counted import CountedMemory
from perf.measuring.rows import Row
from perf.operations.contract import operations
from perf.report import upsampled
from perf.report.page import Bars, Block, Card, Page, Paragraph, Picture, Section, Table
from perf.report.picture import share_of_compiled
from perf.report.report import Report
from perf.report.sections import of_the_losses
from perf.report.wording import first_per_op, is_ours, percent, timed_in_full, times, words

_VARIABLES = (
    "TRITON_INTERPRET", "TRITONLOSS_CHECK_LABELS", "TRITONLOSS_CACHE_DIR", "TRITONLOSS_TUNING",
)  # fmt: skip


def page(report: Report) -> Page:
    """The whole report as a page."""
    machine = report.machine
    gpu = machine.has_gpu
    cards = [_speed_card, _memory_card, _machine_card, _trust_card]
    return Page(
        title="tritonloss: performance report",
        headline=_headline(report),
        summary=[
            f"tritonloss {machine.tritonloss}"
            + (f", commit {machine.commit}" if machine.commit else "")
            + f" · {machine.utc} · made in {report.seconds:.0f} s",
        ],
        warning=None if gpu else _NO_GPU,
        cards=[card(report) for card in cards],
        plots=_gpu_plots(report) if gpu else _offline_plots(report),
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
    full = timed_in_full(report.rows)
    eager = [row["speedup_vs_eager"] for row in full if row["speedup_vs_eager"]]
    compiled = [row["speedup_vs_compile"] for row in full if row["speedup_vs_compile"]]
    parts = [f"{times(statistics.median(eager))} as fast as eager PyTorch"] if eager else []
    parts += [f"{times(statistics.median(compiled))} as fast as torch.compile"] if compiled else []
    alone = f"{len(full)} cases timed, and compared with nothing yet"
    return ", ".join(parts) or (alone if full else "No case could be measured")


def _speed_card(report: Report) -> Card:
    if not report.machine.has_gpu:
        return Card("not measured", "how much faster", "That takes a GPU: make gpu, on one.")
    full = timed_in_full(report.rows)
    eager = [row["speedup_vs_eager"] for row in full if row["speedup_vs_eager"]]
    if not eager:
        return Card("none", "how much faster", "no case was timed against eager PyTorch")
    compiled = [row["speedup_vs_compile"] for row in full if row["speedup_vs_compile"]]
    detail = f"median of {len(eager)} cases, forward and backward; from {times(min(eager))} to "
    detail += times(max(eager))
    if compiled:
        detail += f"; {times(statistics.median(compiled))} torch.compile's speed"
    return Card(times(statistics.median(eager)), "of eager PyTorch's speed", detail)


def _memory_card(report: Report) -> Card:
    if not report.machine.has_gpu:
        return _counted_memory_card(report)
    full = timed_in_full(report.rows)
    shares = [row["memory_vs_eager"] for row in full if row["memory_vs_eager"]]
    if not shares:
        return Card("none", "of eager's extra memory", "no case has both")
    detail = f"median of {len(shares)} cases, peak beyond the inputs; from {percent(min(shares))} "
    detail += f"to {percent(max(shares))}"
    return Card(percent(statistics.median(shares)), "of eager's extra memory", detail)


def _counted_memory_card(report: Report) -> Card:
    entries = first_per_op(_of_training(report))
    if not entries:
        return Card("not counted", "how much less memory")
    ratios = [entry.eager / max(entry.kernels, 1) for entry in entries]
    size = [entry.kernels / entry.input_bytes for entry in entries]
    detail = f"than eager PyTorch: median of {len(entries)} operations, from {times(min(ratios))} "
    detail += f"to {times(max(ratios))}; the kernels take {min(size):.2f} to {max(size):.2f} of "
    detail += "the input's size. Counted at full size, not measured."
    return Card(f"{statistics.median(ratios):.1f}x less", "extra memory, counted", detail)


def _of_training(report: Report) -> list[CountedMemory]:
    """What was counted of both passes, of logits at the labels' resolution.

    Others have their own sections: in units of the logits they are not to be compared.
    """
    forward_only = {operation.name for operation in operations() if not operation.differentiable}
    entries = [entry for entry in report.memory if entry.op not in forward_only]
    return [entry for entry in entries if not upsampled.is_upsampled(entry)]


def _machine_card(report: Report) -> Card:
    machine = report.machine
    if not machine.has_gpu:
        targets = ", ".join(_targets(report.facts)) or "no GPU"
        return Card("no GPU", "the machine", f"{machine.gpu}; kernels compiled for {targets}")
    shares = [row["share_of_copy"] for row in timed_in_full(report.rows) if row["share_of_copy"]]
    detail = f"copies {report.copy_GBps:.0f} GB/s"
    if shares:
        detail += f", of which the kernels reach {percent(statistics.median(shares))} (median)"
    detail += f"; torch {machine.torch}, triton {machine.triton}, driver {machine.driver}"
    return Card(machine.gpu, "the machine", detail)


def _trust_card(report: Report) -> Card:
    parts = []
    good = True
    if report.machine.has_gpu:
        judged = [row for row in report.rows if is_ours(row) and row["pass"] == "full"]
        passed = sum(row["ms_p50"] is not None for row in judged)
        slower = sum((row["speedup_vs_eager"] or 1) < 1 for row in judged)
        value, label = f"{passed} of {len(judged)}", "cases right, then timed"
        good = passed == len(judged)
        parts.append(f"each against float64 in this run; slower than eager in {slower}")
    else:
        passed = sum(entry.passed for entry in report.parity)
        value, label = f"{passed} of {len(report.parity)}", "parity checks passed"
        good = passed == len(report.parity) and bool(report.parity)
        parts.append("in the interpreter, against float64")
        if errors := [p.error for p in report.parity if "float32" in p.case]:
            parts[0] += f"; largest float32 error {max(errors):.0e}"
        if report.parity_left_out:
            parts.append(f"{report.parity_left_out} more were left out for lack of time")
    if report.facts:
        faults = sum(fact.fault is not None for fact in report.facts)
        good = good and not faults
        parts.append(f"{faults} of {len(report.facts)} compiled kernels spill or fail")
    judged_goals = [goal for goal in report.goals if goal.met is not None]
    if judged_goals:
        met = sum(goal.met is True for goal in judged_goals)
        waiting = len(report.goals) - len(judged_goals)
        parts.append(f"goals met: {met} of {len(judged_goals)}, {waiting} not measured")
    return Card(value, label, "; ".join(parts), good)


def _gpu_plots(report: Report) -> list[Block]:
    """Speed and memory in every operation's first case, against eager PyTorch."""
    speeds: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    full = [row for row in report.rows if row["pass"] == "full" and row["ms_p50"]]
    for first in first_per_op(timed_in_full(report.rows)):
        mine = [row for row in full if _same_case(row, first)]
        for row in mine:
            name = words(row["op"])
            if row["speedup_vs_eager"] and row["provider"] != "eager":
                speeds.setdefault(name, {})[row["provider"]] = row["speedup_vs_eager"]
            if row["memory_vs_eager"]:
                memory.setdefault(name, {})[row["provider"]] = 100 * row["memory_vs_eager"]
    return [
        Bars("How much faster", "times eager PyTorch's speed, first case", speeds),
        Bars("How much less memory", "% of eager's extra memory, first case", memory),
    ]


def _same_case(row: Row, other: Row) -> bool:
    names = ("op", "dtype", "layout", "batch", "classes", "height", "width", "parameters")
    return all(row[name] == other[name] for name in names)


def _offline_plots(report: Report) -> list[Block]:
    memory = {
        words(entry.op): {
            "kernels": entry.kernels / entry.input_bytes,
            **share_of_compiled(entry),
            "eager": entry.eager / entry.input_bytes,
        }
        for entry in first_per_op(_of_training(report))
    }
    code: dict[str, dict[str, float]] = {}
    first: dict[str, str] = {}
    for fact in report.facts:
        is_first = first.setdefault(fact.op, fact.case) == fact.case
        if is_first and fact.target == MAIN_TARGET and fact.counts.totals:
            most = max(count for _, count in fact.counts.totals)
            code.setdefault(words(fact.kernel), {"instructions": most})
    return [
        Bars("Extra memory, counted", "x the input's size", memory),
        Bars("Instructions per output, first case", f"compiled for {MAIN_TARGET}, not run", code),
    ]


def _sections(report: Report) -> Iterable[Section]:
    yield Section(upsampled.TITLE, upsampled.blocks(report.memory))
    yield from of_the_losses(report)
    yield Section("Training on photographs", _training_blocks(report))
    yield Section("Compiled, not run", _code_blocks(report.facts))
    yield Section("Environment", _environment_blocks(report))


def _code_blocks(facts: Sequence[KernelFacts]) -> list[Block]:
    if not facts:
        return []
    gpus = ", ".join(f"{name} is {TARGETS[name].gpus}" for name in _targets(facts))
    committed = sum(fact.committed for fact in facts)
    return [
        Paragraph(
            "Every shipped kernel compiled for GPUs that need not be there; nothing here is a "
            f"measurement. {len(facts) - committed} kernels were compiled for this report; the "
            f"numbers of {committed} are the committed ones of perf/baseline, since device code, "
            "launch configuration and Triton are the same as there (--compile compiles all). "
            "Each cell: registers, theoretical occupancy, and machine instructions per output as "
            "executed: in all (two numbers where a kernel has other code for classes that a strip "
            "does not contain) and, in brackets, of what runs once in a program and of every loop. "
            f"Of branches all are counted. {gpus}."
        ),
        Paragraph(_spills(facts)),
        Table(*pivoted(facts), folded=f"{len(facts)} kernels"),
    ]


def _spills(facts: Sequence[KernelFacts]) -> str:
    """A sentence on what spills in float64, where that is allowed."""
    spilling = [
        f"{words(fact.kernel)} ({fact.op}: {fact.case}) {fact.spill_bytes} B on {fact.target}"
        for fact in facts
        if fact.double and fact.spill_bytes
    ]
    if not spilling:
        return "In float64, for which nothing is tuned and which may, nothing spills registers."
    return f"In float64, for which nothing is tuned, these spill registers: {'; '.join(spilling)}."


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
    surrogate = report.training / "train-surrogate.png"
    if surrogate.exists():
        blocks.append(Picture(surrogate, "what NeuroIoU's network makes of held-out IoU losses"))
    return blocks


def _environment_blocks(report: Report) -> list[Block]:
    machine = report.machine
    libraries = ", ".join(report.absent) or "none"
    told = {
        "GPU": machine.gpu,
        "compute capability": machine.capability,
        "driver": machine.driver,
        "CUDA or ROCm": machine.cuda,
        "copy bandwidth" if machine.has_gpu else "copy bandwidth of the CPU": (
            f"{report.copy_GBps:.0f} GB/s, bytes read plus bytes written"
        ),
        "torch": machine.torch,
        "triton": machine.triton,
        "tritonloss": machine.tritonloss,
        "commit": machine.commit,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "libraries not installed, hence without rows": libraries,
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "date": machine.utc,
    }
    cells = [[name, value] for name, value in told.items() if value]
    notes = [Paragraph(note) for note in [*report.notes, *_method(report)]]
    return [Table(["", ""], cells), *notes]


def _method(report: Report) -> list[str]:
    notes = [
        "Bandwidths are the bytes a pass cannot do without over its time. No provider is timed "
        "before its outputs and gradients have passed the parity check of the same case in the "
        "same run: no element's error may exceed twice the worst of eager PyTorch in the same "
        "dtype plus a rounding (1e-5 in float32), all against float64, relative to the largest "
        "element. Rows that failed have an error and no time. Rows that are slower than another "
        "provider stay in.",
    ]
    if report.memory:
        notes.append(
            "Counted memory is the bytes of all tensors that exist at the same time in one forward "
            "and backward pass, beyond the inputs, at full size on torch's meta device, in units "
            "of the size of the maps that get a gradient. torch.compile's is committed: the CPU "
            "allocator's peak at a reduced size, as Inductor fuses the reference for a CPU; for a "
            "GPU it may fuse otherwise."
        )
    if report.host:
        notes.append(
            "Host time is the processor time of one thread for a call, forward and backward, on "
            "small maps and a stand-in for the GPU's driver that launches nothing; the bare pair "
            "is an autograd.Function with one launch each way, in the same run. Large images have "
            "256 x 256 pixels. PyTorch's own are its operations that compute something, each a "
            "launch more; compiled are the kernels that the first call needs (without those that "
            "an operation before it has had compiled), and again those that another size of image "
            "needs."
        )
    if report.machine.has_gpu:
        notes.append(
            "Times are medians with 20 % and 80 % quantiles, with the L2 cache flushed "
            "(triton.testing.do_bench), below 0.5 ms of a CUDA graph's replays; what takes more "
            "than 30 ms runs a few times only. The column timer says which. Backward passes run "
            "on a fresh forward pass each time. Memory is the allocator's peak beyond the inputs. "
            "Labels lie in regions of 32 x 32 pixels, 3 % ignored. torch.compile has a graph of "
            "its own for each case (dynamic=False), compiled before anything is timed. Eager RMI "
            "and margin calibration are the papers' own code restated in kernels_reference: a "
            "restatement, not that code."
        )
    return notes


def _targets(facts: Sequence[KernelFacts]) -> list[str]:
    return [name for name in TARGETS if any(fact.target == name for fact in facts)]
