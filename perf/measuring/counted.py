"""Memory of full-size maps without a GPU: all that a training step holds at the same time.

Nothing is computed and nothing is estimated. Eager's peak is every tensor that autograd holds,
counted on torch's meta device. The kernels' peak is what the public function and its backward pass
ask of the CPU's allocator, with every launch left out: what is allocated is never touched, so it
takes no memory. The GPU allocator's rounding is not counted, nor is what an eager operation
allocates within itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perf.compiling.targets import TARGETS
from perf.measuring import stand_in
from perf.measuring.memory import allocated_peak, counted_peak
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
    """The memory of one case at its full size."""
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
    """Peak of the public function, forward and backward, in bytes."""
    inputs = [torch.empty_like(x, device="cpu") for x in operation.inputs(case, _META)]
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        found = operation.function(*inputs, **case.options)
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        if not operation.differentiable:
            return
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

    with (
        stand_in.adopted(),
        offline(TARGETS["sm_90"].gpu),
        recorded("skip"),
        scheduled(operation, case),
    ):
        step()  # the first step may set things up
        for leaf in leaves:
            leaf.grad = None
        return allocated_peak(step)
