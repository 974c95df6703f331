"""What a report is about, before it is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perf.compiling.facts import KernelFacts
from perf.measuring.counted import CountedMemory
from perf.measuring.host_time import HostTime
from perf.measuring.interpreted import Parity
from perf.measuring.machine import Machine
from perf.measuring.rows import Row
from perf.report.goals import Finding


@dataclass
class Report:
    """All that was found out. `training` is a folder with train.md and train.png."""

    machine: Machine
    copy_GBps: float = 0.0  # noqa: N815
    rows: list[Row] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    parity_left_out: int = 0
    memory: list[CountedMemory] = field(default_factory=list)
    facts: list[KernelFacts] = field(default_factory=list)
    host: list[HostTime] = field(default_factory=list)
    goals: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # libraries that are not installed
    training: Path | None = None
    seconds: float = 0.0
    interrupted: bool = False
    lost: bool = False  # the GPU answered nothing any more: a new process may go on

    @property
    def failed(self) -> bool:
        """Whether a kernel gave a wrong answer, or none."""
        without_time = (row for row in self.rows if row["ms_p50"] is None)
        return any(row["provider"] == "triton" for row in without_time) or not all(
            parity.passed for parity in self.parity
        )
