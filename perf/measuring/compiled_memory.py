"""Memory of the reference under torch.compile without a GPU: as Inductor fuses it for a CPU.

For a GPU Inductor may fuse otherwise, so this is no count of what a GPU's memory will hold. It is
counted on maps of a reduced size: but for a few scratch buffers memory grows with the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from perf.measuring.memory import allocated_peak
from perf.measuring.trial import Trial
from perf.operations.contract import Case, Operation, bytes_of

SIZE = (1, 128, 256)  # images, rows, columns
ABOUT = (
    "torch.compile's peak beyond the inputs, over the maps with a gradient, as Inductor fuses the "
    f"reference for a CPU (dynamic=False, {SIZE[0]} x C x {SIZE[1]} x {SIZE[2]}); "
    "for a GPU it may fuse otherwise"
)


@dataclass(frozen=True)
class CompiledMemory:
    """By operation: the peak as a share of the inputs, or why there is none."""

    shares: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def of_compiled(asked: Sequence[tuple[Operation, Case]]) -> CompiledMemory:
    """The memory of these cases, one of each operation."""
    found = CompiledMemory()
    for operation, case in asked:
        try:
            found.shares[operation.name] = round(share_of_compiled(operation, case), 4)
        except Exception as error:  # what Inductor cannot compile has no bar
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            found.left_out[operation.name] = reason[:200]
    return found


def share_of_compiled(operation: Operation, case: Case, size: tuple[int, int, int] = SIZE) -> float:
    """The reference's peak in a compiled forward and backward pass, beyond and over the inputs."""
    batch, height, width = size
    shape = replace(case.shape, batch=batch, height=height, width=width)
    small = replace(case, shape=shape)
    inputs = operation.inputs(small, torch.device("cpu"))
    return share(compiled(operation.reference), small, inputs)


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """The function under torch.compile, for one size."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def share(function: Callable[..., object], case: Case, inputs: Sequence[Tensor]) -> float:
    """What a forward and backward pass allocates at its peak, over the maps with a gradient."""
    trial = Trial(function, case, inputs)
    for _ in range(2):  # what is made only once is made now
        trial.full()
    return allocated_peak(trial.full) / bytes_of([x for x in inputs if x.is_floating_point()])
