"""What is known of a compiled kernel: registers, spills, loops, and whether it may ship."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perf.compiling.targets import TARGETS, Target
from perf.operations.contract import KernelNotes
from tritonloss._tools.launches import Launch
from tritonloss._tools.resources import Resources

MAIN_TARGET = "sm_90"


@dataclass(frozen=True)
class LoopFacts:
    """One big loop. `per_output` is what one thread executes per output; None if code cannot tell:
    how often a loop within it runs is known at run time only. Such a loop's `instructions` are
    None, too, where the baseline is all that is known of it.
    """

    name: str
    instructions: int | None
    per_output: float | None


@dataclass(frozen=True)
class KernelFacts:
    """One kernel as one case launches it, compiled for one target."""

    op: str
    case: str
    target: str
    kernel: str
    configuration: str
    constants: Mapping[str, Any]
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float = 0.0
    instructions: int = 0
    loops: tuple[LoopFacts, ...] = ()
    compile_seconds: float | None = None
    digest: str = ""  # of all that its machine code depends on
    error: str | None = None  # why there are no facts
    committed: bool = False  # taken from the baseline, not compiled now

    @property
    def fault(self) -> str | None:
        """Why this kernel must not ship; None if it may."""
        taken = Resources(self.registers, self.spill_bytes, self.shared_bytes)
        return self.error or taken.fault(TARGETS[self.target].shared_per_block)

    @property
    def text(self) -> str:
        """Registers, occupancy and instructions per output in one line."""
        if self.error:
            return "FAULT: does not compile"
        if self.fault:
            return f"FAULT: {self.fault}"
        counts = [
            "nested loops" if loop.per_output is None else f"{loop.per_output:.1f}"
            for loop in self.loops
        ]
        parts = [f"{self.registers} r", f"{self.occupancy:.0%}", " / ".join(counts)]
        parts += [f"{self.shared_bytes} B shared"] if self.shared_bytes else []
        return " ".join(part for part in parts if part)


def once_per_target(facts: Iterable[KernelFacts]) -> list[KernelFacts]:
    """The facts without those of kernels that an earlier case has launched as well."""
    unique: dict[tuple[str, str], KernelFacts] = {}
    for fact in facts:
        unique.setdefault((fact.target, fact.digest), fact)
    return list(unique.values())


def numbered(kernels: Iterable[str]) -> list[str]:
    """The kernels' names; one that a case launches in several ways is numbered from the second."""
    names: list[str] = []
    for kernel in kernels:
        name, count = kernel, 1
        while name in names:
            count += 1
            name = f"{kernel} {count}"
        names.append(name)
    return names


def made_of(facts: Iterable[KernelFacts]) -> str:
    """A hash of all that the machine code of one case's kernels depends on."""
    digests = " ".join(fact.digest for fact in facts)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def outputs_per_round(notes: KernelNotes | None, target: Target, record: Launch) -> float | None:
    """What a thread completes in one round of a big loop; None where nobody has said so."""
    if notes is None:
        return None
    threads = record.num_warps * target.gpu.warp_size
    return notes.outputs({**record.constants, "THREADS": threads})


def loop_names(notes: KernelNotes | None, count: int) -> Sequence[str]:
    """The names of so many big loops, the smallest first."""
    if notes is not None and len(notes.loops) == count:
        return notes.loops
    # The compiler has merged or copied loops: no name would be right.
    return [f"loop {number + 1} of {count}" for number in range(count)]


def pivoted(facts: Sequence[KernelFacts]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table with one row per kernel and case, and one column per target."""
    targets = [name for name in TARGETS if any(fact.target == name for fact in facts)]
    lines: dict[tuple[str, str, str], dict[str, KernelFacts]] = {}
    for fact in facts:
        lines.setdefault((fact.op, fact.kernel, fact.case), {})[fact.target] = fact
    rows = []
    for (op, kernel, case), cells in lines.items():
        seconds = [fact.compile_seconds for fact in cells.values() if fact.compile_seconds]
        rows.append(
            [
                op,
                kernel.strip("_").removesuffix("_kernel"),
                case,
                *(cells[target].text if target in cells else "" for target in targets),
                f"{max(seconds):.1f}" if seconds else "",
            ]
        )
    return ["operation", "kernel", "case", *targets, "compile s"], rows
