"""Kernels that one call of a loss launches, forward and backward, and the committed numbers.

Every launch costs the host time, and a short one costs the GPU a gap. They are counted where the
public functions launch them, on a CPU: nothing is compiled and nothing runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

from perf.compiling.compile_only import compilers
from perf.measuring import calls, stand_in
from perf.operations.contract import Operation, Shape, operations
from tritonloss._tools.launches import offline, recorded

PATH = Path(__file__).parents[1] / "baseline" / "launches.json"
_ABOUT = (
    "operation: size of its logits > [kernels launched forward, backward] of a call with its first "
    "case's options; written by python -m perf check --launches --update"
)
LARGE = (1, 19, 256, 256)  # some losses have other kernels for small images
_TARGET = GPUTarget("cuda", 90, 32)

Launches = dict[str, tuple[int, int]]  # "operation: size" -> (forward, backward)


def collect(names: Sequence[str] | None = None) -> Launches:
    """The launches of all operations or of those named, counted in a process of its own."""
    with compilers(workers=1) as pool:
        return pool.submit(count, names).result()


def count(names: Sequence[str] | None = None) -> Launches:
    """The same, in this process, in which losses take CPU tensors for a GPU's from then on."""
    torch.set_num_threads(1)
    stand_in.adopt(guard=lambda device: nullcontext())
    with offline(_TARGET):
        return {
            f"{operation.name}: {'x'.join(map(str, shape))}": of_one(operation, shape)
            for operation in operations(names)
            for shape in (calls.SHAPE, LARGE)
            if shape == calls.SHAPE or has_images(operation)
        }


def has_images(operation: Operation) -> bool:
    """Whether the operation is about maps, which may be large; a matrix is no map."""
    return type(operation.cases[0].shape) is Shape


def of_one(operation: Operation, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """(launches forward, launches backward) of a call; the losses must take CPU tensors."""
    call = calls.of_operation(operation, shape)
    with recorded("skip") as launches:
        call.forward()  # the first call may set things up
        launches.clear()
        outputs = call.forward()
        forward = len(launches)
        call.backward(outputs, call.upstream(outputs))
        return forward, len(launches) - forward


def differences(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each operation that launches other numbers of kernels than are committed."""
    found = []
    for name, (forward, backward) in now.items():
        if name not in before:
            found.append(
                f"{name} launches {forward} + {backward} kernels, and nothing is committed"
            )
        elif tuple(before[name]) != (forward, backward):
            was = " + ".join(map(str, before[name]))
            found.append(
                f"{name} launches {forward} + {backward} kernels forward + backward, not {was}; "
                "check --launches --update makes this the baseline"
            )
    return found


def read(path: Path = PATH) -> Launches:
    """The committed numbers; none if there is no file."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: (counts[0], counts[1]) for name, counts in document["launches"].items()}


def write(now: Launches, path: Path = PATH) -> None:
    """Write these numbers, and keep those of other operations that still exist."""
    known = {operation.name for operation in operations()}
    kept = {name: counts for name, counts in read(path).items() if name.split(":")[0] in known}
    lines = [f'  "{name}": {json.dumps(counts)}' for name, counts in sorted((kept | now).items())]
    text = [f'{{\n "about": {json.dumps(_ABOUT)},\n "launches": {{', ",\n".join(lines), " }\n}\n"]
    path.write_text("\n".join(text), encoding="utf-8")
