"""The picture of the README: extra memory of each loss, eager PyTorch and torch.compile, counted.

`python -m perf picture` counts at full size (no GPU is needed, nothing is computed), commits the
numbers to perf/baseline/memory.json and draws perf/results/memory.svg; `--draw` only draws.
`--compile` counts torch.compile, too, which takes minutes; else its committed numbers are kept.
Losses of upsampled logits have a table instead (`upsampled.py`), counted and written with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from perf.measuring.compiled_memory import ABOUT, CompiledMemory, of_compiled
from perf.measuring.counted import CountedMemory, count
from perf.operations.contract import Case, Operation, operations
from perf.report import upsampled
from perf.report.page import number
from perf.report.wording import words

_FOLDER = Path(__file__).parents[1]
NUMBERS = _FOLDER / "baseline" / "memory.json"
PICTURE = _FOLDER / "results" / "memory.svg"
_ABOUT = (
    "bytes of one forward and backward pass beyond the inputs; written by python -m perf picture"
)
_SHAPE = "cityscapes"

_WIDTH, _LEFT, _BAR, _ROW, _TOP = 760, 186, 13, 60, 78
# Colours of text, lines and bars, light or dark as the reader has set it.
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.faint { fill: #59636e }
.title { font-size: 15px; font-weight: 600 }
.end { text-anchor: end }
line { stroke: #d1d9e0 }
.kernels { fill: #1a7f37 }
.compile { fill: #8250df }
.eager { fill: #afb8c1 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  line { stroke: #3d444d }
  .kernels { fill: #3fb950 }
  .compile { fill: #a371f7 }
  .eager { fill: #656c76 }
}
"""


def question(operation: Operation) -> Case | None:
    """The loss's first case at the picture's size; None if it is no loss of logits and labels."""
    for case in operation.cases if operation.differentiable else ():
        plain = case.dtype == "float32" and case.layout == "contiguous" and case.schedule is None
        at_labels = case.labels == "uint8" and case.ratio is None
        if plain and at_labels and case.shape.name == _SHAPE:
            return case
    return None


def asked() -> list[tuple[Operation, Case]]:
    """Every loss of logits at the labels' resolution, with the case that is shown."""
    found = [(operation, question(operation)) for operation in operations()]
    return [(operation, case) for operation, case in found if case is not None]


def counted() -> list[CountedMemory]:
    """The memory of every loss, counted now; the one that saves most comes first."""
    found = [count(operation, case) for operation, case in asked()]
    return sorted(found, key=lambda entry: -entry.eager / entry.kernels)


def read(path: Path = NUMBERS) -> list[CountedMemory]:
    """The committed numbers."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [CountedMemory(**entry) for entry in document["memory"]]


def read_compiled(path: Path = NUMBERS) -> CompiledMemory:
    """The committed numbers of torch.compile."""
    document = json.loads(path.read_text(encoding="utf-8"))["torch.compile"]
    return CompiledMemory(document["shares"], document["left_out"])


def share_of_compiled(entry: CountedMemory) -> dict[str, float]:
    """torch.compile's committed share in this very case, by its bar's name; empty without one."""
    if upsampled.is_upsampled(entry):
        share = upsampled.read().compiled.shares.get(upsampled.key(entry.op, entry.case))
        return {} if share is None else {"compile": share}
    known = {(other.op, other.case) for other in read()}
    share = read_compiled().shares.get(entry.op) if (entry.op, entry.case) in known else None
    return {} if share is None else {"compile": share}


def write(memory: Sequence[CountedMemory], compiled: CompiledMemory, path: Path = NUMBERS) -> None:
    """Write these numbers to the committed file."""
    lines = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in memory)
    torch_version = torch.__version__.split("+")[0]  # whose operations allocate
    text = (
        f'{{\n "about": {json.dumps(_ABOUT)},\n "torch": {json.dumps(torch_version)},\n'
        f' "memory": [\n{lines}\n ],\n "torch.compile": {{\n  "about": {json.dumps(ABOUT)},\n'
        f'  "shares": {json.dumps(compiled.shares)},\n'
        f'  "left_out": {json.dumps(compiled.left_out)}\n }}\n}}\n'
    )
    path.write_text(text, encoding="utf-8")


def drawn(memory: Sequence[CountedMemory], compiled: CompiledMemory) -> str:
    """The picture: three bars for each loss, in units of the logits' size."""
    most = max(share for entry in memory for share in _shares(entry, compiled).values())
    scale = (_WIDTH - _LEFT - 60) / most
    notes = _notes(memory, compiled)
    height = _TOP + _ROW * len(memory) + 18 + 18 * len(notes)
    size = memory[0].input_bytes / 2**20
    parts = [
        _text(14, 26, "Extra memory of a training step's loss, forward and backward", "title"),
        _text(14, 48, f"times the size of the logits ({size:.0f} MiB: 4 x 19 x 1024 x 2048, "
              "float32), counted", "faint"),
        *_legend(14, 60),
        f'<line x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP + 6}" y2="{_TOP + _ROW * len(memory) + 4}"/>',
    ]  # fmt: skip
    for index, entry in enumerate(memory):
        top = _TOP + 12 + _ROW * index
        parts.append(_text(_LEFT - 10, top + _BAR + 12, words(entry.op), "end"))
        for place, (name, share) in enumerate(_shares(entry, compiled).items()):
            y = top + place * (_BAR + 3)
            parts.append(_bar(name, _LEFT, y, share * scale))
            parts.append(_text(_LEFT + share * scale + 6, y + _BAR - 2, number(share)))
    for place, note in enumerate(notes):
        parts.append(_text(14, height - 10 - 18 * (len(notes) - 1 - place), note, "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(_said(memory, compiled))}">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


_NAMES: Mapping[str, str] = {
    "kernels": "tritonloss",
    "compile": "torch.compile",
    "eager": "eager PyTorch",
}


def _shares(entry: CountedMemory, compiled: CompiledMemory) -> dict[str, float]:
    """The bars of one loss, in units of the logits' size."""
    shares = {"kernels": entry.kernels / entry.input_bytes}
    if entry.op in compiled.shares:
        shares["compile"] = compiled.shares[entry.op]
    return shares | {"eager": entry.eager / entry.input_bytes}


def _notes(memory: Sequence[CountedMemory], compiled: CompiledMemory) -> list[str]:
    """How to read the bars, and which are missing."""
    notes = [
        "The gradient alone is 1.00. torch.compile: the allocator's peak at a reduced size, as "
        "Inductor fuses for a CPU;",
        "for a GPU it may fuse otherwise.",
    ]
    missing = [words(entry.op) for entry in memory if entry.op not in compiled.shares]
    if missing:
        notes[1] += f" Inductor did not compile {', '.join(missing)}."
    return notes


def _said(memory: Sequence[CountedMemory], compiled: CompiledMemory) -> str:
    """The picture in words, for those who do not see it."""
    told = []
    for entry in memory:
        shares = _shares(entry, compiled)
        rest = [f"{_NAMES[name]} {number(share)}" for name, share in list(shares.items())[1:]]
        told.append(", ".join([f"{words(entry.op)} {number(shares['kernels'])}", *rest]))
    return f"Extra memory in units of the logits' size. {'; '.join(told)}."


def _legend(x: float, y: float) -> list[str]:
    parts = []
    for name, text in _NAMES.items():
        parts += [_bar(name, x, y, _BAR), _text(x + _BAR + 6, y + _BAR - 2, text)]
        x += 118
    return parts


def _bar(name: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{name}" x="{x:g}" y="{y:g}" width="{width:.1f}" height="{_BAR}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:g}"{marked}>{escape(text)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf picture`, which counts and draws."""
    parser = argparse.ArgumentParser(
        prog="python -m perf picture", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--draw", action="store_true", help="draw the committed numbers again")
    parser.add_argument(
        "--compile", action="store_true", help="count torch.compile too, which takes minutes"
    )
    options = parser.parse_args(arguments)
    if not options.draw:
        write(counted(), of_compiled(asked()) if options.compile else read_compiled())
        upsampled.update(options.compile)
    PICTURE.write_text(drawn(read(), read_compiled()), encoding="utf-8")
    print(PICTURE)
    return 0
