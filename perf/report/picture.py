"""The picture of the README: extra memory of each loss against eager PyTorch, counted.

`python -m perf picture` counts at full size (no GPU is needed, nothing is computed), commits the
numbers to perf/baseline/memory.json and draws perf/results/memory.svg; `--draw` only draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from perf.measuring.counted import CountedMemory, count
from perf.operations.contract import Case, Operation, operations
from perf.report.page import number
from perf.report.wording import words

_FOLDER = Path(__file__).parents[1]
NUMBERS = _FOLDER / "baseline" / "memory.json"
PICTURE = _FOLDER / "results" / "memory.svg"
_ABOUT = (
    "bytes of one forward and backward pass beyond the inputs; written by python -m perf picture"
)
_SHAPE = "cityscapes"

_WIDTH, _LEFT, _BAR, _ROW, _TOP = 760, 186, 13, 46, 78
# Text, faint text and lines, the kernels' bars, eager's; what follows the reader's setting.
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.faint { fill: #59636e }
.title { font-size: 15px; font-weight: 600 }
.end { text-anchor: end }
line { stroke: #d1d9e0 }
.kernels { fill: #1a7f37 }
.eager { fill: #afb8c1 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  line { stroke: #3d444d }
  .kernels { fill: #3fb950 }
  .eager { fill: #656c76 }
}
"""


def question(operation: Operation) -> Case | None:
    """The loss's first case at the picture's size; None if it is no loss of logits and labels."""
    for case in operation.cases:
        plain = case.dtype == "float32" and case.layout == "contiguous" and case.schedule is None
        if plain and case.labels == "uint8" and case.shape.name == _SHAPE:
            return case
    return None


def counted() -> list[CountedMemory]:
    """The memory of every loss, counted now; the one that saves most comes first."""
    asked = [(operation, question(operation)) for operation in operations()]
    found = [count(operation, case) for operation, case in asked if case is not None]
    return sorted(found, key=lambda entry: -entry.eager / entry.kernels)


def read(path: Path = NUMBERS) -> list[CountedMemory]:
    """The committed numbers."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [CountedMemory(**entry) for entry in document["memory"]]


def write(memory: Sequence[CountedMemory], path: Path = NUMBERS) -> None:
    """Commit these numbers."""
    lines = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in memory)
    torch_version = torch.__version__.split("+")[0]  # whose eager operations allocate
    text = (
        f'{{\n "about": {json.dumps(_ABOUT)},\n "torch": {json.dumps(torch_version)},\n'
        f' "memory": [\n{lines}\n ]\n}}\n'
    )
    path.write_text(text, encoding="utf-8")


def drawn(memory: Sequence[CountedMemory]) -> str:
    """The picture: two bars for each loss, in units of the logits' size."""
    most = max(entry.eager / entry.input_bytes for entry in memory)
    scale = (_WIDTH - _LEFT - 60) / most
    height = _TOP + _ROW * len(memory) + 34
    size = memory[0].input_bytes / 2**20
    parts = [
        _text(14, 26, "Extra memory of a training step's loss, forward and backward", "title"),
        _text(14, 48, f"times the size of the logits ({size:.0f} MiB: 4 x 19 x 1024 x 2048, "
              "float32), counted tensor by tensor", "faint"),
        *_legend(14, 60),
        f'<line x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP + 6}" y2="{height - 30}"/>',
    ]  # fmt: skip
    for index, entry in enumerate(memory):
        top = _TOP + 12 + _ROW * index
        parts.append(_text(_LEFT - 10, top + _BAR + 5, words(entry.op), "end"))
        values = {"kernels": entry.kernels, "eager": entry.eager}
        for place, (name, value) in enumerate(values.items()):
            share, y = value / entry.input_bytes, top + place * (_BAR + 3)
            parts.append(_bar(name, _LEFT, y, share * scale))
            parts.append(_text(_LEFT + share * scale + 6, y + _BAR - 2, number(share)))
    note = (
        "The gradient alone is 1.00. torch.compile is not shown: "
        "what it keeps follows from what it fuses for a GPU."
    )
    parts.append(_text(14, height - 10, note, "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-label="{escape(_said(memory))}">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _said(memory: Sequence[CountedMemory]) -> str:
    """The picture in words, for those who do not see it."""
    told = [
        f"{words(entry.op)} {number(entry.kernels / entry.input_bytes)}, "
        f"eager PyTorch {number(entry.eager / entry.input_bytes)}"
        for entry in memory
    ]
    return f"Extra memory in units of the logits' size. {'; '.join(told)}."


def _legend(x: float, y: float) -> list[str]:
    names: Mapping[str, str] = {"kernels": "tritonloss", "eager": "eager PyTorch"}
    parts = []
    for name, text in names.items():
        parts += [_bar(name, x, y, _BAR), _text(x + _BAR + 6, y + _BAR - 2, text)]
        x += 110
    return parts


def _bar(name: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{name}" x="{x:g}" y="{y:g}" width="{width:.1f}" height="{_BAR}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:g}"{marked}>{escape(text)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m perf picture`."""
    parser = argparse.ArgumentParser(
        prog="python -m perf picture", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--draw", action="store_true", help="draw the committed numbers again")
    options = parser.parse_args(arguments)
    if not options.draw:
        write(counted())
    PICTURE.write_text(drawn(read()), encoding="utf-8")
    print(PICTURE)
    return 0
