"""What is known of a compiled kernel: registers, spills, loops, and whether it may ship."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perf.compiling.counting import ONCE, Counts
from perf.compiling.targets import TARGETS
from tritonloss._tools.resources import Resources

MAIN_TARGET = "sm_90"


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
    counts: Counts = Counts()
    compile_seconds: float | None = None
    digest: str = ""  # of all that its machine code depends on
    double: bool = False  # the case is of float64
    error: str | None = None  # why there are no facts
    committed: bool = False  # taken from the baseline, not compiled now

    @property
    def fault(self) -> str | None:
        """Why this kernel must not ship; None if it may. In float64 it may spill."""
        spilled = 0 if self.double else self.spill_bytes
        taken = Resources(self.registers, spilled, self.shared_bytes)
        fault = self.error or taken.fault(TARGETS[self.target].shared_per_block)
        if not fault and self.counts.unaccounted:
            fault = f"nobody counts the loops of {', '.join(self.counts.unaccounted)}"
        return fault

    @property
    def text(self) -> str:
        """Registers, occupancy and instructions per output in one line: the totals, their parts."""
        if self.error:
            return "FAULT: does not compile"
        if self.fault:
            return f"FAULT: {self.fault}"
        totals = [f"{count:.1f}" for _, count in self.counts.totals]
        parts = [f"{self.counts.once:.1f} {ONCE}"] if totals else []
        parts += [f"{loop.executed:.1f} {loop.name}" for loop in self.counts.loops]
        cells = [f"{self.registers} r", f"{self.occupancy:.0%}", " / ".join(totals)]
        cells += [f"({', '.join(parts)})"] if self.counts.loops else []
        cells += [f"{self.shared_bytes} B shared"] if self.shared_bytes else []
        cells += [f"spills {self.spill_bytes} B"] if self.spill_bytes else []
        return " ".join(cell for cell in cells if cell)


def once_per_target(facts: Iterable[KernelFacts]) -> list[KernelFacts]:
    """The facts without those of kernels that an earlier case launches, too."""
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


def pivoted(facts: Sequence[KernelFacts]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table with one row per kernel and case and one column per target."""
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
