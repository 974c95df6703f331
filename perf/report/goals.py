"""Goals held against what was measured and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perf.compiling.facts import KernelFacts
from perf.measuring.rows import Row
from perf.operations.contract import CodeGoal, Goal, Operation


@dataclass(frozen=True)
class Finding:
    """A goal and what came out; `value` is None where it takes a GPU that was not there."""

    text: str
    wanted: str
    value: float | None
    met: bool | None
    op: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in a word or two."""
        return {None: "not measured", True: "met", False: "missed"}[self.met]


def findings(
    chosen: Sequence[Operation], rows: Sequence[Row], facts: Sequence[KernelFacts]
) -> list[Finding]:
    """One finding per goal of the operations."""
    found = []
    for operation in chosen:
        for goal in operation.goals:
            if isinstance(goal, Goal):
                finding = _measured(operation, goal, rows)
            else:
                finding = _counted(operation, goal, facts)
            found.append(replace(finding, op=operation.name))
    return found


def _measured(operation: Operation, goal: Goal, rows: Sequence[Row]) -> Finding:
    asked = {"op": operation.name, "provider": "triton", "pass": "full", **goal.case.columns()}
    found = [row for row in rows if all(row[name] == value for name, value in asked.items())]
    value = found[0].get(goal.column) if found else None
    if goal.at_least is not None:
        wanted = f"≥ {goal.at_least:g}"
        return Finding(goal.text, wanted, value, None if value is None else value >= goal.at_least)
    wanted = f"≤ {goal.at_most:g}"
    return Finding(goal.text, wanted, value, None if value is None else value <= goal.at_most)


def _counted(operation: Operation, goal: CodeGoal, facts: Sequence[KernelFacts]) -> Finding:
    asked = (operation.name, goal.case.text, goal.kernel, goal.target)
    counts = [
        count
        for fact in facts
        if (fact.op, fact.case, fact.kernel, fact.target) == asked
        for name, count in fact.counts.named
        if name == goal.loop
    ]
    value = counts[0] if counts else None
    wanted = f"≤ {goal.at_most:g}"
    return Finding(goal.text, wanted, value, None if value is None else value <= goal.at_most)
