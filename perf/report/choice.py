"""What a report is asked to be about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perf.operations.contract import Case, Operation

_CPU_CASES = 2


@dataclass(frozen=True)
class Choice:
    """What to report on; None stands for everything."""

    ops: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    quick: bool = False
    budget_s: float | None = None
    compile: bool = False  # even what the baseline knows
    rows_only: bool = False  # no memory, host time, machine code or interpreter
    give_up_one: bool = False  # leave out the first case without rows: it has ended a process

    def cases(self, operation: Operation, on_gpu: bool) -> list[Case]:
        """The operation's cases that are asked for: on a CPU the first few, if quick the first."""
        chosen = [
            case
            for case in operation.cases
            if self.shapes is None or case.shape.name in self.shapes
            if self.dtypes is None or case.dtype in self.dtypes
            if on_gpu or case.schedule is None
        ]
        return chosen[: 1 if self.quick else None if on_gpu else _CPU_CASES]
