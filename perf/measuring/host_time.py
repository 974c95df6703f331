"""What a loss costs the host: time of a call, and kernels launched, without a GPU.

On a stand-in for the driver (`stand_in.py`) everything runs that runs on a GPU machine, up to the
driver's own function for a launch. Each loss is measured side by side with a bare
torch.autograd.Function that launches one kernel in each direction: times of one run compare, those
of two machines do not. `python -m perf host-time` prints the table. `collect` gets it from a
process of its own, since the stand-in has to be there before everything else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perf.measuring import calls, launches, stand_in
from perf.measuring.calls import Call
from perf.measuring.memory import tally
from perf.operations.contract import operations
from perf.text import plain

# How many calls in a row are timed together, and how often that is done.
_CALLS, _REPEATS = 10, 30
_OTHER_SHAPE, _MORE_MATRICES = (2, 19, 80, 96), (3, 19, 64, 64)
BARE = "bare autograd.Function"


@dataclass(frozen=True)
class HostTime:
    """The host's work for one operation, forward and backward.

    Kernels that were compiled for an operation before it are not counted again. For images of
    another size no kernel should be compiled again.
    """

    op: str
    forward_launches: int
    backward_launches: int
    microseconds: float  # of forward and backward, the median; on this machine only
    times_bare: float  # the same over that of the bare pair, in this run
    allocations: int = 0  # tensors, outputs and gradients among them
    views: int = 0  # that PyTorch makes of tensors
    torch_operations: int = 0  # PyTorch's that compute something: each would be a launch, too
    compilations: int = 0
    compilations_again: int = 0  # for images of another size
    large: tuple[int, int] | None = None  # launches for large images, where they may differ


def collect(names: Sequence[str] | None = None, timeout: float | None = 600) -> list[HostTime]:
    """The table, from a process of its own.

    Raises:
        RuntimeError: the process failed, for example for want of a C compiler.
    """
    command = [sys.executable, "-m", "perf", "host-time", "--json"]
    command += ["--ops", *names] if names else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"host time could not be measured: {done.stderr[-2000:]}")
    return [HostTime(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main(arguments: list[str]) -> int:
    """Measure here; this process must not have asked for Triton's driver yet."""
    parser = argparse.ArgumentParser(prog="python -m perf host-time", description=__doc__)
    parser.add_argument("--ops", nargs="*", help="these operations instead of all")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    choice = parser.parse_args(arguments)
    stand_in.install()
    stand_in.adopt()
    torch.set_num_threads(1)
    rows = measure(choice.ops or None)
    if choice.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print(plain(HEADER, [[row.op, *cells(row)] for row in rows]))
    return 0


HEADER = (
    "operation", "of the bare pair's time", "us", "launches", "of large images", "PyTorch's own",
    "allocations", "views", "compiled", "again",
)  # fmt: skip


def cells(row: HostTime) -> list[str]:
    """A row as it is printed, without its name."""
    counts = (
        row.torch_operations, row.allocations, row.views, row.compilations, row.compilations_again,
    )  # fmt: skip
    launched = [f"{row.forward_launches} + {row.backward_launches}"]
    launched.append(" + ".join(map(str, row.large or ())))
    return [f"{row.times_bare:.1f}", f"{row.microseconds:.0f}", *launched, *map(str, counts)]


def measure(names: Sequence[str] | None) -> list[HostTime]:
    """The bare pair first, then every operation on maps of one small size."""
    bare = _measured(BARE, _bare(calls.SHAPE), _bare(_OTHER_SHAPE))
    rows = [bare]
    for operation in operations(names):
        images = launches.has_images(operation)
        other = calls.of_operation(operation, _OTHER_SHAPE if images else _MORE_MATRICES)
        row = _measured(operation.name, calls.of_operation(operation), other)
        large = launches.of_one(operation, launches.LARGE) if images else None
        rows.append(replace(row, times_bare=row.microseconds / bare.microseconds, large=large))
    return rows


def _measured(name: str, call: Call, other: Call) -> HostTime:
    compiled: list[Any] = []
    upstream = None
    with _listening(compiled):
        upstream = call.upstream(call.forward())
        call.backward(call.forward(), upstream)
        compilations = len(compiled)
        other.backward(other.forward(), other.upstream(other.forward()))
    before = stand_in.launches()
    outputs = call.forward()
    between = stand_in.launches()
    call.backward(outputs, upstream)
    after = stand_in.launches()

    def step() -> None:
        call.backward(call.forward(), upstream)

    mine = tally(step)
    return HostTime(
        op=name,
        forward_launches=between - before,
        backward_launches=after - between,
        microseconds=_timed(step),
        times_bare=1.0,
        allocations=mine.allocations,
        views=mine.views,
        torch_operations=mine.computing,
        compilations=compilations,
        compilations_again=len(compiled) - compilations,
    )


@contextmanager
def _listening(compiled: list[Any]) -> Iterator[None]:
    """Note down every kernel that is compiled, or taken from Triton's cache."""
    knobs = triton.knobs.compilation
    before, knobs.listener = knobs.listener, lambda **told: compiled.append(told)
    try:
        yield
    finally:
        knobs.listener = before


def _timed(step: Callable[[], None]) -> float:
    """Microseconds of this thread for a step, warm: the median."""
    for _ in range(2 * _CALLS):
        step()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(_REPEATS):
            began = time.thread_time_ns()
            for _ in range(_CALLS):
                step()
            times.append((time.thread_time_ns() - began) / _CALLS / 1e3)
    finally:
        gc.enable()
    return statistics.median(times)


def _bare(shape: tuple[int, int, int, int]) -> Call:
    logits = torch.empty(shape).requires_grad_()
    return Call(lambda: _Bare.apply(logits), [logits])


@triton.jit
def _sum_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offset, mask=offset < size, other=0.0)))


@triton.jit
def _scale_kernel(grad_ptr, x_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < size, other=0.0)
    tl.store(out_ptr + offset, x * tl.load(grad_ptr), mask=offset < size)


class _Bare(torch.autograd.Function):
    """The least that a loss with kernels can be: one launch in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = torch.empty((), device=x.device)
        _sum_kernel[(64,)](x, result, x.numel(), BLOCK=1024, num_warps=4)
        ctx.save_for_backward(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        _scale_kernel[(64,)](grad, x, result, x.numel(), BLOCK=1024, num_warps=4)
        return result
