"""Natural loops of a machine program: the textbook's dominators and back edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction; `jump` is the index of the instruction a branch goes to."""

    opcode: str
    jump: int | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Loop:
    """A loop that lies in no other. `nests` if others lie in it, whose instructions count too.

    `takes_tickets`: it has an atomic operation, with which programs find out who is the last one.
    """

    start: int
    instructions: int
    nests: bool = False
    takes_tickets: bool = False


def loops(program: Sequence[Instruction]) -> tuple[Loop, ...]:
    """All outermost loops, in the order of their headers.

    Compilers move rare code behind the end of a program and jump back from there. Only a jump to
    an instruction that every path to the jump has passed closes a loop.
    """
    starts, following, dominators = _flow(program)
    bodies: dict[int, set[int]] = {}
    for block, targets in enumerate(following):
        for header in targets:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_body(following, header, block))

    ends = [*starts, len(program)][1:]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    inner = {h for h in bodies if any(h in bodies[other] for other in bodies if other != h)}
    atomic = {
        block
        for block, (start, end) in enumerate(zip(starts, ends, strict=True))
        if any(_is_atomic(instruction) for instruction in program[start:end])
    }
    return tuple(
        Loop(
            starts[header],
            sum(lengths[block] for block in body),
            bool(inner & body),
            bool(atomic & body),
        )
        for header, body in sorted(bodies.items())
        if header not in inner
    )


def instructions_of_everyone(program: Sequence[Instruction]) -> int:
    """How many instructions lie before a ticket is taken: what comes after it few programs run."""
    starts, _, dominators = _flow(program)
    ends = [*starts, len(program)][1:]
    spans = list(zip(starts, ends, strict=True))
    taking = {b for b, (s, e) in enumerate(spans) if any(map(_is_atomic, program[s:e]))}
    return sum(
        sum(instruction.opcode != "NOP" for instruction in program[start:end])
        for block, (start, end) in enumerate(spans)
        if not taking & dominators[block] - {block}
    )


def _flow(
    program: Sequence[Instruction],
) -> tuple[list[int], list[set[int]], list[set[int]]]:
    """(starts, successors, dominators) of the blocks of a program."""
    starts = _block_starts(program)
    following = _successors(program, starts)
    reachable = _reachable(following)
    following = [targets if b in reachable else set() for b, targets in enumerate(following)]
    return starts, following, _dominators(following, reachable)


def _is_atomic(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("ATOM") or "_atomic_" in instruction.opcode


def _block_starts(program: Sequence[Instruction]) -> list[int]:
    starts = {0} if program else set()
    for index, instruction in enumerate(program):
        if instruction.jump is not None:
            starts.add(instruction.jump)
        if instruction.jump is not None or not instruction.falls_through:
            starts.add(index + 1)
    return sorted(start for start in starts if start < len(program))


def _successors(program: Sequence[Instruction], starts: Sequence[int]) -> list[set[int]]:
    number = {start: block for block, start in enumerate(starts)}
    following = []
    for end in [*starts, len(program)][1:]:
        last = program[end - 1]
        targets = set() if last.jump is None else {number[last.jump]}
        if last.falls_through and end in number:
            targets.add(number[end])
        following.append(targets)
    return following


def _dominators(following: Sequence[set[int]], reachable: set[int]) -> list[set[int]]:
    """Per block, the blocks that every path from the entry passes; empty where no path leads."""
    preceding: list[set[int]] = [set() for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            preceding[target].add(block)
    dominators = [set(reachable) if b in reachable else set() for b in range(len(following))]
    if dominators:
        dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            paths = [dominators[before] for before in preceding[block]]
            update = set.intersection(*paths) | {block}
            if update != dominators[block]:
                dominators[block] = update
                changed = True
    return dominators


def _reachable(following: Sequence[set[int]]) -> set[int]:
    seen: set[int] = set()
    pending = [0] if following else []
    while pending:
        block = pending.pop()
        if block not in seen:
            seen.add(block)
            pending += following[block]
    return seen


def _body(following: Sequence[set[int]], header: int, end: int) -> set[int]:
    """The blocks from which `end` is reached without passing the header, and both of these."""
    body = {header, end}
    grown = True
    while grown:
        more = {
            b for b, targets in enumerate(following) if b not in body and targets & body - {header}
        }
        grown = bool(more)
        body |= more
    return body
