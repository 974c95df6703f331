"""Instructions per output as executed: each loop as often as it runs, and what runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from perf.compiling.control_flow import Loop
from perf.compiling.machine_code import MachineCode
from perf.compiling.targets import Target
from perf.operations.contract import KernelNotes
from tritonloss._tools.launches import Launch

ONCE = "once"
TOTAL = "total"
_DIGITS = 3


@dataclass(frozen=True)
class LoopFacts:
    """The instructions that one thread executes in a loop.

    `executed` is per output of the kernel, `per_output` per output that the loop itself completes.
    """

    name: str
    executed: float
    per_output: float


@dataclass(frozen=True)
class Counts:
    """Instructions that one thread executes per output.

    Attributes:
        once: those in no loop. Of branches all are counted.
        loops: those of every loop.
        totals: of all of them together, by "total", or by "total, class absent" and the like.
        unaccounted: functions with loops that no notes are about: their instructions are missing.
    """

    once: float = 0.0
    loops: tuple[LoopFacts, ...] = ()
    totals: tuple[tuple[str, float], ...] = ()
    unaccounted: tuple[str, ...] = ()

    @property
    def numbers(self) -> dict[str, float]:
        """All of them by their names; empty where nobody has said how to read the kernel."""
        if not self.totals:
            return {}
        executed = {loop.name: loop.executed for loop in self.loops}
        return {**dict(self.totals), ONCE: self.once, **executed}

    @property
    def named(self) -> list[tuple[str, float]]:
        """What goals are about: the totals, and each loop per output that it completes."""
        return [*self.totals, *((loop.name, loop.per_output) for loop in self.loops)]


class LoopReading(NamedTuple):
    """What the notes say of a loop in one launch; see LoopNotes."""

    name: str
    within: str
    rounds: float
    when: str | None
    unroll: float | None
    share: float


class Reading(NamedTuple):
    """How to read a launch's machine code: the outputs of one thread, and the loops."""

    outputs: float
    loops: tuple[LoopReading, ...]


def reading(
    notes: KernelNotes | None, target: Target, record: Launch, elements: int
) -> Reading | None:
    """The notes' numbers for a launch; None where nobody has written any."""
    if notes is None:
        return None
    given = {
        **record.constants,
        **record.numbers,
        "THREADS": record.num_warps * target.gpu.warp_size,
        "PROGRAMS": record.programs or 1,
        "ELEMENTS": elements,
    }
    loops = tuple(
        LoopReading(
            loop.name,
            loop.within,
            loop.rounds(given),
            loop.when,
            loop.unroll(given) if loop.unroll else None,
            loop.share(given),
        )
        for loop in notes.loops
    )
    return Reading(notes.outputs(given), loops)


def counts(read: Reading | None, code: MachineCode) -> Counts:
    """The counts of one kernel."""
    if read is None:
        return Counts()
    known = {loop.start: _notes_of(read.loops, loop, code.loops) for loop in code.loops}
    starts = {loop.start: loop for loop in code.loops}
    outer = {loop.around for loop in code.loops}
    executed: dict[str, float] = {}
    cases: dict[str, str | None] = {}
    unaccounted = []
    for group in _by_place(code.loops):
        # A version without the loops within it is for when those loops make no round.
        group = [loop for loop in group if loop.start in outer] or group
        notes = known[group[0].start]
        if notes is None:
            unaccounted.append(group[0].place.function or "unknown source")
            continue
        name, case, around = notes.name, notes.when, group[0].around
        parent = None if around is None else known[around]
        while case is None and around is not None:
            case = getattr(known[around], "when", None)
            around = starts[around].around
        name = name if case == notes.when else f"{name}, {case}"
        cases[name] = case
        executed[name] = (
            executed.get(name, 0.0)
            + _instructions(group, notes, parent.rounds if parent else 1.0) / read.outputs
        )
    once = code.once / read.outputs
    totals = {
        TOTAL if case is None else f"{TOTAL}, {case}": once
        + sum(count for name, count in executed.items() if cases[name] in (None, case))
        for case in [case for case in dict.fromkeys(cases.values()) if case] or [None]
    }
    named = {ONCE: once, **executed, **totals}
    return replace(
        from_numbers({name: round(count, _DIGITS) for name, count in named.items()}, read),
        unaccounted=tuple(dict.fromkeys(unaccounted)),
    )


def from_numbers(numbers: Mapping[str, float], read: Reading | None) -> Counts:
    """The counts that have these `Counts.numbers`."""
    shares = {loop.name: loop.share for loop in read.loops} if read else {}
    loops = []
    for name, count in numbers.items():
        if name != ONCE and not name.startswith(TOTAL):
            share = shares.get(name) or 1.0
            loops.append(LoopFacts(name, count, round(count / share, _DIGITS)))
    totals = tuple((name, count) for name, count in numbers.items() if name.startswith(TOTAL))
    return Counts(numbers.get(ONCE, 0.0), tuple(loops), totals)


def _by_place(loops: Sequence[Loop]) -> list[list[Loop]]:
    """The loops that the compiler has made of each loop of the source."""
    groups: dict[object, list[Loop]] = {}
    for loop in loops:
        # A loop whose place is not known stays alone.
        groups.setdefault(loop.place if loop.place.function else loop.start, []).append(loop)
    return list(groups.values())


def _notes_of(
    known: Sequence[LoopReading], loop: Loop, all_loops: Sequence[Loop]
) -> LoopReading | None:
    function, variable, lines, _ = loop.place
    fits = (f"{function}.{variable}", function, f".{variable}")
    within = next((notes.within for notes in known if notes.within in fits), None)
    mine = [notes for notes in known if notes.within == within]
    if len(mine) < 2:
        return mine[0] if mine else None
    places = [other.place for other in all_loops]
    others = {p.lines for p in places if (p.function, p.variable) == (function, variable)}
    number = sorted(others).index(lines)
    return mine[number] if number < len(mine) else None


def _instructions(loops: Sequence[Loop], notes: LoopReading, entries: float) -> float:
    """Instructions executed in what the compiler has made of one loop of the source.

    The largest loop does several rounds of the source in one, the others do the rounds that are
    left. How many a loop does in one is told by its loads and stores.
    """
    by_size = sorted(loops, key=lambda loop: -loop.instructions)
    sizes = [_size(loop) for loop in by_size]
    unit = float(sizes[-1])
    if notes.unroll is not None and (notes.unroll > 1 or len(loops) == 1):
        unit = sizes[0] / notes.unroll
    elif len(loops) == 1:
        unit /= _unrolled(loops[0])
    left, executed = notes.rounds / entries, 0.0
    for number, (loop, size) in enumerate(zip(by_size, sizes, strict=True)):
        step = max(1, round(size / unit))
        # Rounds that are an average need not be whole: what is left, the last loop does.
        whole = left >= 1 and (step > 1 or number < len(sizes) - 1)
        rounds = left // step if whole else left / step
        left -= rounds * step
        executed += rounds * loop.instructions
    return executed * entries


def _unrolled(loop: Loop) -> int:
    """How many rounds of the source one round of the loop does, where the last ones are in no loop.

    Where U rounds are done at a time, U - 1 may be left.
    """
    one = loop.moves - loop.beside
    return next((many for many in (2, 4, 8, 16) if loop.beside and many * one == loop.moves), 1)


def _size(loop: Loop) -> int:
    return loop.moves or loop.instructions
