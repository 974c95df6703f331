"""Which loop of the device code a machine instruction belongs to, by the lines it was made of."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import tritonloss

PACKAGE = Path(tritonloss.__file__).parent
Line = tuple[str, int]  # a file, and a line of it
Lines = tuple[Line, ...]  # a line, and those of the calls around it, the innermost first
# A loop's own instructions may come from elsewhere: what does not change in it is computed before,
# and what is computed before may be computed again in it.
_MOST_OF_A_LOOP = 0.6
# Calls are told apart by what only one of them does.
_ALIKE = 0.99


class Place(NamedTuple):
    """A loop of the device code in one of the places where its function is called.

    `lines` are those of the calls, the outermost first, and its own first one; `last` is its last.
    Unknown: all is empty.
    """

    function: str = ""
    variable: str = ""
    lines: Lines = ()
    last: int = 0

    def is_within(self, other: Place) -> bool:
        """Whether this loop is another one and lies in that."""
        depth = len(other.lines) - 1
        if self == other or self.lines[:depth] != other.lines[:depth] or len(self.lines) <= depth:
            return False
        file, first = other.lines[depth]
        mine = self.lines[depth]
        return mine[0] == file and first <= mine[1] <= other.last


class _Statement(NamedTuple):
    function: str
    variable: str
    first: int
    last: int


def places_of(
    instructions: Sequence[Sequence[Lines]], outside: Collection[Place] = ()
) -> tuple[Place, ...]:
    """The innermost loop of the device code that most instructions belong to, if there is one.

    There are several where nothing tells in which of several calls it is.

    Args:
        instructions: of each the lines that it may have been made of.
        outside: loops that lie within the one that is looked for.
    """
    known = [set(chain(*map(around, lines))) for lines in instructions if lines]
    counts = Counter(chain(*known))
    most = [
        place
        for place, count in counts.items()
        if place not in outside and count >= _MOST_OF_A_LOOP * len(known)
    ]
    innermost = [place for place in most if not any(other.is_within(place) for other in most)]
    largest = max((counts[place] for place in innermost), default=0)
    return tuple(sorted(place for place in innermost if counts[place] > _ALIKE * largest))


def told_apart(found: Sequence[tuple[Place, ...]]) -> list[Place]:
    """One place for every loop of a program, given in the order of the loops' addresses.

    Where a loop may be of several calls, those calls share such loops in their order: calls that
    are alike are compiled alike. A call that another loop is known to be of is left out.
    """
    known = {places[0] for places in found if len(places) == 1}
    left = [tuple(place for place in places if place not in known) or places for places in found]
    result = []
    for number, places in enumerate(left):
        alike = [other for other, others in enumerate(left) if others == places]
        share = alike.index(number) * len(places) // len(alike)
        result.append(places[share] if places else Place())
    return [
        places[0] if len(places) == 1 else place
        for places, place in zip(found, result, strict=True)
    ]


@cache
def around(lines: Lines) -> tuple[Place, ...]:
    """The loops that an instruction lies in, the outermost first."""
    found = []
    for depth in reversed(range(len(lines))):
        file, number = lines[depth]
        calls = tuple(reversed(lines[depth + 1 :]))
        found += [
            Place(
                statement.function,
                statement.variable,
                (*calls, (file, statement.first)),
                statement.last,
            )
            for statement in _statements(file)
            if statement.first <= number <= statement.last
        ]
    return tuple(found)


@cache
def _statements(file: str) -> tuple[_Statement, ...]:
    """The loops of a file that stay loops when they are compiled, the outer ones first.

    The file is read in the package as it is here: a compiler's cache may hold what another copy of
    the same device code was compiled to.
    """
    parts = Path(file).parts
    if PACKAGE.name not in parts:
        return ()
    last = len(parts) - 1 - parts[::-1].index(PACKAGE.name)
    path = PACKAGE.joinpath(*parts[last + 1 :])
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.While):
                    variable = "while"
                elif isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
                    variable = ast.unparse(node.target)
                else:
                    continue
                last = node.end_lineno or node.lineno
                found.append(_Statement(function.name, variable, node.lineno, last))
    return tuple(found)
