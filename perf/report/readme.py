"""Tables of the README that are written from committed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def write_table(start: str, lines: Sequence[str]) -> None:
    """Put these lines in place of the README's table whose first line begins with ``start``."""
    text = README.read_text(encoding="utf-8")
    README.write_text(replaced(text, start, lines), encoding="utf-8")


def replaced(text: str, start: str, lines: Sequence[str]) -> str:
    """The text with these lines in place of its table whose first line begins with ``start``.

    Raises:
        ValueError: the text has no such table.
    """
    before, found, after = text.partition(start)
    if not found:
        raise ValueError(f"the README has no line that begins with {start!r}")
    rest = after.splitlines(keepends=True)
    while rest and not rest[0].isspace():
        rest.pop(0)
    return before + "\n".join(lines) + "\n" + "".join(rest)
