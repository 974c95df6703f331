"""Natural loops of a machine program: the textbook's dominators and back edges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from perf.compiling.source_loops import Lines, Place, around, places_of, told_apart

# Atomic loops of these functions take tickets, or of an unknown one; others wait for programs.
_TICKETS = ("comes_last", "_add_up", "")
_MOVES = ("LDG", "STG", "LDS", "STS", "LD", "ST")
_AMD_MOVES = re.compile(r"(global|buffer|flat|ds)_(load|store|read|write)")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `jump` is the index of the instruction a branch goes to.

    `lines` are those of the source that it may have been made of; not every compiler says of which
    of several calls.
    """

    opcode: str
    jump: int | None = None
    falls_through: bool = True
    lines: tuple[Lines, ...] = ()


@dataclass(frozen=True)
class Loop:
    """A loop of a machine program.

    Attributes:
        instructions: its own, not those of loops within it.
        moves: those of them that load or store.
        beside: loads and stores of the same loop of the source that lie in no loop that was made of
            it: the last rounds, where the compiler has made one of several.
        around: the start of the innermost loop that it lies in.
    """

    start: int
    instructions: int
    moves: int = 0
    beside: int = 0
    around: int | None = None
    place: Place = Place()


@dataclass(frozen=True)
class Flow:
    """Instructions of a program that all programs of a launch may run.

    What finishes the sums of all programs is left out: the loop that takes tickets, and what is
    reached through it only. With such a loop, code that no path leads to is left out, too: it is
    called to divide those sums.
    """

    instructions: int
    once: int  # of them in no loop
    loops: tuple[Loop, ...]  # in the order of their headers


def flow(program: Sequence[Instruction]) -> Flow:
    """The program's loops, and what lies in none.

    Compilers move rare code behind the end of a program and jump back from there. Only a jump to
    an instruction that every path to the jump has passed closes a loop.
    """
    blocks, following, dominators = _flow(program)
    bodies = {
        header: body
        for header, body in _bodies(following, dominators).items()
        if not _goes_through_lanes(program, blocks, header, body)
    }
    found = _loops(program, blocks, bodies)
    last = {
        header
        for header, body in bodies.items()
        if found[header].place.function in _TICKETS and _is_atomic(program, blocks, body)
    }

    def counted(some: set[int]) -> int:
        return sum(program[place].opcode != "NOP" for block in some for place in blocks[block])

    everyones = {
        block
        for block in range(len(blocks))
        if not last or (dominators[block] and not last & dominators[block])
    }
    in_loops = set().union(*bodies.values())
    return Flow(
        instructions=counted(everyones),
        once=counted(everyones - in_loops),
        loops=tuple(loop for header, loop in sorted(found.items()) if header in everyones),
    )


def _loops(
    program: Sequence[Instruction], blocks: Sequence[range], bodies: Mapping[int, set[int]]
) -> dict[int, Loop]:
    """The loops by their headers' blocks."""
    found: dict[int, Loop] = {}
    places: dict[int, tuple[Place, ...]] = {}
    for header, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        within = [other for other in bodies if other != header and other in body]
        own = body.difference(*(bodies[other] for other in within))
        outside = [other for other in bodies if other != header and header in bodies[other]]
        nearest = min(outside, key=lambda other: len(bodies[other]), default=None)
        code = [program[place] for block in sorted(own) for place in blocks[block]]
        found[header] = Loop(
            start=blocks[header].start,
            instructions=len(code),
            moves=sum(_moves(instruction.opcode) for instruction in code),
            around=None if nearest is None else blocks[nearest].start,
        )
        places[header] = places_of(
            [instruction.lines for instruction in code],
            [place for other in within for place in places[other]],
        )
    headers = sorted(found)
    for header, place in zip(headers, told_apart([places[h] for h in headers]), strict=True):
        found[header] = replace(found[header], place=place)
    return {
        header: replace(loop, beside=_beside(program, blocks, loop.place, found, bodies))
        for header, loop in found.items()
    }


def _beside(
    program: Sequence[Instruction],
    blocks: Sequence[range],
    place: Place,
    found: Mapping[int, Loop],
    bodies: Mapping[int, set[int]],
) -> int:
    """Loads and stores of a loop of the source outside of what was made of it.

    Those of several calls, of which one is as likely as the other, are shared out.
    """
    count = 0.0
    for block, span in enumerate(blocks):
        inside = {found[header].place for header, body in bodies.items() if block in body}
        for index in span:
            if not _moves(program[index].opcode):
                continue
            lines = program[index].lines
            known = {other for line in lines for other in around(line)}
            made = any(not place.is_within(other) for other in inside & known)
            if place in known and not made:
                count += 1 / len(lines)
    return round(count)


def _moves(opcode: str) -> bool:
    """Whether an instruction loads or stores, in global or shared memory."""
    return opcode.split(".")[0] in _MOVES or bool(_AMD_MOVES.match(opcode))


def _goes_through_lanes(
    program: Sequence[Instruction], blocks: Sequence[range], header: int, body: set[int]
) -> bool:
    """Whether this is no loop of the source, but goes through the lanes one after another.

    AMD's GPUs can do some things for one value at a time only. Where the value is the same for all
    lanes, one round is enough.
    """
    first = program[blocks[header].start]
    last = program[blocks[max(body)].stop - 1]
    return "_readfirstlane_" in first.opcode and last.opcode == "s_cbranch_execnz"


def _is_atomic(program: Sequence[Instruction], blocks: Sequence[range], body: set[int]) -> bool:
    opcodes = [program[place].opcode for block in body for place in blocks[block]]
    return any(opcode.startswith("ATOM") or "_atomic_" in opcode for opcode in opcodes)


def _bodies(following: Sequence[set[int]], dominators: Sequence[set[int]]) -> dict[int, set[int]]:
    """The blocks of every loop, by its header."""
    bodies: dict[int, set[int]] = {}
    for block, targets in enumerate(following):
        for header in targets:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_body(following, header, block))
    return bodies


def _flow(
    program: Sequence[Instruction],
) -> tuple[list[range], list[set[int]], list[set[int]]]:
    """(instructions, successors, dominators) of the blocks of a program."""
    starts = _block_starts(program)
    blocks = [range(*span) for span in zip(starts, [*starts, len(program)][1:], strict=True)]
    following = _successors(program, starts)
    reachable = _reachable(following)
    following = [targets if b in reachable else set() for b, targets in enumerate(following)]
    return blocks, following, _dominators(following, reachable)


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
