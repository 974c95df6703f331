"""Which loop of the device code a machine instruction belongs to, by the lines it was made of."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import tritonloss

PACKAGE = Path(tritonloss.__file__).parent
Line = tuple[str, int]  # a file, and a line of it
# A loop's own instructions may come from elsewhere: what does not change in it is computed before,
# and what is computed before may be computed again in it.
_MOST_OF_A_LOOP = 0.6


class Place(NamedTuple):
    """A loop of the device code in one of the places where its function is called.

    `lines` are those of the calls, the outermost first, and its own. Unknown: all is empty.
    """

    function: str = ""
    variable: str = ""
    lines: tuple[Line, ...] = ()


class _Statement(NamedTuple):
    function: str
    variable: str
    first: int
    last: int


def place_of(instructions: Sequence[Sequence[Line]], outside: Collection[Place] = ()) -> Place:
    """The innermost loop of the device code that most instructions belong to.

    Args:
        instructions: of each the line that it was made of, and the lines of the calls around it,
            the innermost first.
        outside: loops that lie within the one that is looked for.
    """
    known = [lines for lines in instructions if lines]
    depths: dict[Place, int] = {}
    counts: Counter[Place] = Counter()
    for lines in known:
        for depth, place in enumerate(around(lines)):
            depths[place] = depth
            counts[place] += 1
    most = [
        place
        for place, count in counts.items()
        if place not in outside and count >= _MOST_OF_A_LOOP * len(known)
    ]
    return max(most, key=lambda place: depths[place], default=Place())


def around(lines: Sequence[Line]) -> list[Place]:
    """The loops that an instruction lies in, the outermost first."""
    found = []
    for depth in reversed(range(len(lines))):
        file, number = lines[depth]
        calls = tuple(reversed(lines[depth + 1 :]))
        found += [
            Place(statement.function, statement.variable, (*calls, (file, statement.first)))
            for statement in _statements(file)
            if statement.first <= number <= statement.last
        ]
    return found


@cache
def _statements(file: str) -> tuple[_Statement, ...]:
    """The loops of a file that stay loops when they are compiled, the outer ones first.

    Of the package as it is here: a compiler's cache may hold what another copy of the same device
    code was compiled to.
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
