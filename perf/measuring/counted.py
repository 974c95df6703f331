"""Memory of full-size maps without a GPU: tensors counted on torch's meta device.

Nothing is computed and nothing is estimated: eager's peak is every tensor that autograd holds at
the same time, the kernels' is what their launchers allocate. The allocator's rounding and what
an operation takes within itself stay out of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perf.compiling.targets import TARGETS
from perf.measuring.memory import counted_peak
from perf.measuring.trial import Trial
from perf.operations.contract import Case, Operation, bytes_of, scheduled
from tritonloss._tools.launches import offline, recorded

_META = torch.device("meta")


@dataclass(frozen=True)
class CountedMemory:
    """Peak of one forward and backward pass beyond the inputs, in bytes."""

    op: str
    case: str
    input_bytes: int  # of the maps that get a gradient: L
    eager: int
    kernels: int
    classes: int = 1
    pixels: int = 1


def count(operation: Operation, case: Case) -> CountedMemory:
    """Count one case at its full size."""
    inputs = operation.inputs(case, _META)
    eager = counted_peak(Trial(operation.reference, case, inputs).full)
    maps = [x for x in inputs if x.is_floating_point()]
    return CountedMemory(
        operation.name,
        case.text,
        bytes_of(maps),
        eager,
        of_kernels(operation, case),
        case.shape.classes,
        case.shape.pixels,
    )


def of_kernels(operation: Operation, case: Case) -> int:
    """Peak of the launchers alone, in bytes."""
    inputs = operation.inputs(case, _META)
    with offline(TARGETS["sm_90"].gpu), recorded("skip"), scheduled(operation, case):
        return counted_peak(lambda: operation.launch(case, inputs))
