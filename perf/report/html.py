"""The report as one HTML file that needs nothing else, readable in light and dark browsers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from perf.report import content, plots
from perf.report.page import Bars, Block, Card, Lines, Paragraph, Picture, Section, Table
from perf.report.report import Report

# What is folded on a screen is not folded on paper.
_OPEN_IN_PRINT = """<script>
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
</script>"""


def page(report: Report) -> str:
    """The text of the whole file."""
    made = content.page(report)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    warning = f'<p class="warning">{escape(made.warning)}</p>' if made.warning else ""
    summary = "<br>".join(map(escape, made.summary))
    contents = " ".join(
        f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in made.sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(made.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="title">{escape(made.title)}</p>
<h1>{escape(made.headline)}</h1>
<p class="machine">{summary}</p>
{warning}
<div class="cards">{"".join(map(_card, made.cards))}</div>
<div class="plots">{"".join(map(_block, made.plots))}</div>
<nav>{contents}</nav>
</header>
<main>
{"".join(map(_section, made.sections))}
</main>
{_OPEN_IN_PRINT}
</body>
</html>
"""


def _card(card: Card) -> str:
    state = {None: "", True: " good", False: " bad"}[card.good]
    lines = {"value": card.value, "label": card.label, "detail": card.detail}
    inner = "".join(f'<p class="{name}">{escape(text)}</p>' for name, text in lines.items())
    return f'<div class="card{state}">{inner}</div>'


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return (
        f'<section id="{_anchor(section)}"><h2>{escape(section.title)}</h2>\n{blocks}</section>\n'
    )


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        source = f"data:image/png;base64,{data}"
        return f'<figure><img alt="{escape(block.text)}" src="{source}"></figure>'
    if isinstance(block, Bars):
        return plots.bars(block)
    if isinstance(block, Lines):
        return plots.lines(block)
    return _table(block)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "\n".join(_row(row) for row in table.rows)
    markup = (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
    if table.folded is None:
        return markup
    return f"<details><summary>{escape(table.folded)}</summary>{markup}</details>"


def _row(row: Sequence[str]) -> str:
    cells = []
    for cell in row:
        bad = cell in ("missed", "FAILED") or cell.startswith(("FAULT", "not timed"))
        kind = "bad" if bad else "good" if cell in ("met", "passed") else ""
        kind += " number" if cell[:1].isdigit() or cell[:2] in ("+0", "-0") else ""
        cells.append(
            f'<td class="{kind.strip()}">{escape(cell)}</td>'
            if kind
            else f"<td>{escape(cell)}</td>"
        )
    return f"<tr>{''.join(cells)}</tr>"
