"""The report as Markdown: everything but the drawn plots, whose numbers are in tables."""

from __future__ import annotations

from perf import text
from perf.report import content
from perf.report.page import Bars, Block, Lines, Paragraph, Picture, Table, number
from perf.report.report import Report


def page(report: Report) -> str:
    """The text of the whole file."""
    made = content.page(report)
    parts = [f"# {made.title}", f"**{made.headline}**"]
    if made.warning:
        parts.append(f"> {made.warning}")
    parts.append("  \n".join(made.summary))
    cards = [[card.value, card.label, card.detail] for card in made.cards]
    parts.append(text.markdown(["", "", "rests on"], cards))
    parts += [_block(block) for block in made.plots]
    for section in made.sections:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Table):
        return text.markdown(block.header, block.rows) if block.rows else ""
    if isinstance(block, Picture):
        return f"![{block.text}]({block.path.name})"
    if isinstance(block, Bars):
        series = list(dict.fromkeys(name for group in block.groups.values() for name in group))
        cells = [
            [label, *(number(group.get(name)) for name in series)]
            for label, group in block.groups.items()
        ]
        title = f"{block.title} ({block.unit})"
        return text.markdown([title, *series], cells) if cells else ""
    return _lines(block)


def _lines(block: Lines) -> str:
    places = sorted({x for points in block.series.values() for x, _ in points})
    values = {name: dict(points) for name, points in block.series.items()}
    cells = [
        [name, *(number(values[name].get(place)) for place in places)] for name in block.series
    ]
    header = [f"{block.title} ({block.y_label}), {block.x_label}:", *map(number, places)]
    return text.markdown(header, cells) if cells else ""
