"""Extra memory of the losses of upsampled logits: the README's table, and the report's section.

The numbers are counted at full size (no GPU is needed, nothing is computed) and committed to
perf/baseline/upsampled.json by `python -m perf picture`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from perf.measuring.compiled_memory import ABOUT, CompiledMemory, share_of_compiled
from perf.measuring.counted import CountedMemory, count
from perf.operations.contract import Case, Operation, operations
from perf.report.page import Bars, Block, Paragraph, Table, number
from perf.report.readme import write_table
from perf.report.wording import words

NUMBERS = Path(__file__).parents[1] / "baseline" / "upsampled.json"
_ABOUT = (
    "bytes of one forward and backward pass beyond logits and labels; written by python -m perf "
    "picture"
)
_START = "| loss | logits | labels |"
_HEADER = ["loss", "logits", "labels", "tritonloss", "torch.compile", "eager", "less than eager"]
TITLE = "Losses of upsampled logits"


@dataclass(frozen=True)
class Memory:
    """The committed numbers: of the kernels and of eager PyTorch, and of torch.compile."""

    counted: Sequence[CountedMemory]
    compiled: CompiledMemory  # by "operation: case"


def asked() -> list[tuple[Operation, Case]]:
    """Every loss's plain cases at a quarter of the labels' resolution."""
    found = []
    for operation in operations():
        if not operation.differentiable:
            continue
        first = operation.cases[0]
        for case in operation.cases:
            if first.ratio is not None and case.parameters == first.parameters:
                if case.dtype == "float32" and case.layout == "contiguous":
                    found.append((operation, case))
    return found


def key(op: str, case: str) -> str:
    """What a share of torch.compile is committed under."""
    return f"{op}: {case}"


def of_compiled() -> CompiledMemory:
    """torch.compile's share of the logits in every case that is asked for, counted now."""
    found = CompiledMemory()
    for operation, case in asked():
        name = key(operation.name, case.text)
        try:
            found.shares[name] = round(share_of_compiled(operation, case), 4)
        except Exception as error:  # what Inductor cannot compile has no number
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            found.left_out[name] = reason[:200]
    return found


def read(path: Path = NUMBERS) -> Memory:
    """The committed numbers."""
    document = json.loads(path.read_text(encoding="utf-8"))
    compiled = document["torch.compile"]
    return Memory(
        [CountedMemory(**entry) for entry in document["memory"]],
        CompiledMemory(compiled["shares"], compiled["left_out"]),
    )


def write(memory: Memory, path: Path = NUMBERS) -> None:
    """Write these numbers to the committed file."""
    lines = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in memory.counted)
    shares = json.dumps(memory.compiled.shares, indent=1).replace("\n", "\n  ")
    text = (
        f'{{\n "about": {json.dumps(_ABOUT)},\n'
        f' "torch": {json.dumps(torch.__version__.split("+")[0])},\n'
        f' "memory": [\n{lines}\n ],\n "torch.compile": {{\n  "about": {json.dumps(ABOUT)},\n'
        f'  "shares": {shares},\n  "left_out": {json.dumps(memory.compiled.left_out)}\n }}\n}}\n'
    )
    path.write_text(text, encoding="utf-8")


def update(compile_too: bool) -> None:
    """Count anew, commit the numbers, and write the README's table."""
    counted = [count(operation, case) for operation, case in asked()]
    write(Memory(counted, of_compiled() if compile_too else read().compiled))
    write_table(_START, table(read()))


def table(memory: Memory) -> list[str]:
    """The lines of the README's table, in MiB."""
    rows = [_HEADER, ["---"] * len(_HEADER), *_rows(memory.counted, memory.compiled.shares)]
    return [f"| {' | '.join(row)} |" for row in rows]


def is_upsampled(entry: CountedMemory) -> bool:
    """Whether it is a case whose logits are interpolated to the size of the labels."""
    return " ratio=" in entry.case


def blocks(memory: Iterable[CountedMemory]) -> list[Block]:
    """The report's section: memory of all such losses, the plain cases as bars."""
    plain = {(op.name, case.text): _sizes(op, case) for op, case in asked()}
    losses = {name for name, _ in plain}
    entries = [entry for entry in memory if is_upsampled(entry) and entry.op in losses]
    if not entries:
        return []
    shares = read().compiled.shares
    bars = {
        f"{_name(entry)}, {' to '.join(plain[entry.op, entry.case])}": _mebibytes(entry, shares)
        for entry in entries
        if (entry.op, entry.case) in plain
    }
    return [
        Paragraph(
            "The logits have a lower resolution than the labels and are interpolated within the "
            "loss. Counted is all that exists at the same time in a forward and backward pass, "
            "beyond logits and labels, at full size. Eager is F.interpolate of the logits in "
            "float32, followed by PyTorch's own cross entropy or the reference of another loss. "
            "torch.compile is the same code as Inductor fuses it for a CPU, at a reduced size; "
            "for a GPU it may fuse otherwise."
        ),
        Bars("Extra memory of upsampled losses, counted", "MiB", bars),
        Table(["loss", "case", *_HEADER[3:]], [_row(e, [e.case], shares) for e in entries]),
    ]


def _rows(counted: Iterable[CountedMemory], shares: Mapping[str, float]) -> list[list[str]]:
    sizes = {(op.name, case.text): _sizes(op, case) for op, case in asked()}
    return [_row(entry, sizes[entry.op, entry.case], shares) for entry in counted]


def _row(entry: CountedMemory, sizes: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    held = {name: f"{value:.0f} MiB" for name, value in _mebibytes(entry, shares).items()}
    times = f"{number(entry.eager / entry.kernels)}x"
    return [_name(entry), *sizes, held["kernels"], held.get("compile", ""), held["eager"], times]


def _name(entry: CountedMemory) -> str:
    return words(entry.op.removesuffix("_upsampled"))


def _mebibytes(entry: CountedMemory, shares: Mapping[str, float]) -> dict[str, float]:
    share = shares.get(key(entry.op, entry.case))
    compiled = {} if share is None else {"compile": share * entry.input_bytes / 2**20}
    return {"kernels": entry.kernels / 2**20, **compiled, "eager": entry.eager / 2**20}


def _sizes(operation: Operation, case: Case) -> list[str]:
    logits, labels = operation.inputs(case, torch.device("meta"))
    return [" x ".join(map(str, shape)) for shape in (logits.shape, labels.shape[1:])]
