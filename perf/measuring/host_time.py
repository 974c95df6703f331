"""What a loss costs the host: time of a call, and kernels launched, without a GPU.

On a stand-in for the driver (``stand_in.py``) everything runs that runs on a GPU machine, up to the
driver's own function for a launch. Each loss is measured side by side with a bare
torch.autograd.Function that launches one kernel in each direction: times of one run compare, those
of two machines do not. ``python -m perf host-time`` prints the table; ``collect`` asks a process of
its own for it, since the stand-in comes before everything else.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perf.measuring import stand_in

# Calls in a row that are timed together, and how often.
_CALLS, _REPEATS = 10, 30
_SHAPE = (2, 19, 64, 64)
BARE = "bare autograd.Function"


@dataclass(frozen=True)
class HostTime:
    """One operation, forward and backward."""

    op: str
    forward_launches: int
    backward_launches: int
    microseconds: float  # of forward and backward, the median; on this machine only
    times_bare: float  # the same over that of the bare pair, in this run


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
    print(f"{'operation':32} launches   host time   of the bare pair's")
    for row in rows:
        count = f"{row.forward_launches} + {row.backward_launches}"
        print(f"{row.op:32} {count:>8} {row.microseconds:8.0f} us {row.times_bare:12.1f}")
    return 0


def measure(names: Sequence[str] | None) -> list[HostTime]:
    """The bare pair first, then every operation on maps of one small size."""
    from perf.operations.contract import operations

    logits = torch.empty(_SHAPE).requires_grad_()
    bare = _measured(BARE, lambda: _Bare.apply(logits), [logits], 1.0)
    rows = [bare]
    for operation in operations(names):
        call, leaves = _call_of(operation)
        rows.append(_measured(operation.name, call, leaves, bare.microseconds))
    return rows


def _call_of(operation: Any) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call of the operation's public function with its first case's options, and its maps."""
    from dataclasses import replace

    case = operation.cases[0]
    batch, classes, height, width = _SHAPE
    shape = replace(case.shape, batch=batch, classes=classes, height=height, width=width)
    inputs = operation.inputs(replace(case, shape=shape), torch.device("cpu"))
    given = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    leaves = [x for x in given if x.requires_grad]
    return lambda: operation.function(*given, **case.options), leaves


def _measured(
    name: str, call: Callable[[], Any], leaves: list[Tensor], bare: float | None
) -> HostTime:
    before = stand_in.launches()
    found = call()
    outputs = [found] if isinstance(found, Tensor) else [x for x in found if x.requires_grad]
    upstream = [torch.ones_like(output) for output in outputs]
    between = stand_in.launches()
    torch.autograd.grad(outputs, leaves, upstream)
    after = stand_in.launches()

    def step() -> None:
        found = call()
        outputs = [found] if isinstance(found, Tensor) else [x for x in found if x.requires_grad]
        torch.autograd.grad(outputs, leaves, upstream)

    microseconds = _timed(step)
    share = microseconds / bare if bare and name != BARE else 1.0
    return HostTime(name, between - before, after - between, microseconds, share)


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


# --- the bare pair --------------------------------------------------------------------------------


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
    """The least that a loss of our own can be: one launch in each direction."""

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
