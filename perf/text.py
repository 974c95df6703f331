"""Tables as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text: columns as wide as their widest cell, only numbers flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if _is_number(rows, index) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers flush right."""
    rule = ["---:" if _is_number(rows, index) else "---" for index in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def _is_number(rows: Sequence[Sequence[str]], index: int) -> bool:
    """Whether a column holds numbers and nothing else; the first column holds names."""
    cells = [row[index] for row in rows if row[index]]
    return index > 0 and all(cell[0].isdigit() or cell[0] in "+-." for cell in cells)
