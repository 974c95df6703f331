"""How many kernels a loss needs for images of many sizes, counted without compiling them.

Each of them costs seconds at the first image that needs it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from perf.measuring import launches, stand_in
from perf.measuring.calls import Call
from perf.operations.contract import Case, Operation, operations
from tritonloss._tools.launches import Launch, offline, recorded

IMAGES = 48
LAYOUTS = ("contiguous", "channels_last", "crops")
# The least and the greatest height and width.
PHOTOGRAPHS = (200, 700)
ANY_SIZE = (12, 2100)
_TARGET = GPUTarget("cuda", 90, 32)

Range = tuple[int, int]
Distinct = dict[str, int]  # "forward kernel" or "backward kernel" -> of how many kinds


def count(
    layout: str,
    sizes: Range = PHOTOGRAPHS,
    names: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Distinct]:
    """The distinct kernels of all operations or of those named.

    They are those of an operation's first case, with ``changes`` of its dtype or its options. In
    this process losses take CPU tensors for a GPU's from now on. "crops" are contiguous maps, and
    parts of larger ones that begin anywhere, at random.
    """
    torch.set_num_threads(1)
    stand_in.adopt(guard=lambda device: nullcontext())
    with offline(_TARGET):
        return {
            operation.name: _of_one(
                operation, replace(operation.cases[0], **changes or {}), layout, sizes
            )
            for operation in operations(names)
            if launches.has_images(operation)
        }


def of_pass(distinct: Distinct, direction: str) -> int:
    """How many kernels a pass has, "forward" or "backward"."""
    return sum(kinds for name, kinds in distinct.items() if name.startswith(direction))


def _of_one(operation: Operation, case: Case, layout: str, sizes: Range) -> Distinct:
    chance = random.Random(layout)
    kinds: set[tuple[str, str]] = set()
    for _ in range(IMAGES):
        call = _call(operation, case, layout, sizes, chance)
        with recorded("skip") as launched:
            outputs = call.forward()
            forward = len(launched)
            call.backward(outputs, call.upstream(outputs))
        kinds |= {_kind("forward", launch) for launch in launched[:forward]}
        kinds |= {_kind("backward", launch) for launch in launched[forward:]}
    return dict(Counter(name for name, _ in kinds))


def _kind(direction: str, launch: Launch) -> tuple[str, str]:
    return f"{direction} {launch.kernel}", f"{launch.signature} {launch.num_warps}"


def _call(
    operation: Operation, case: Case, layout: str, sizes: Range, chance: random.Random
) -> Call:
    """A call like the case, for images of some size."""
    height, width = _side(sizes, chance), _side(sizes, chance)
    shape = replace(case.shape, batch=chance.randint(1, 3), classes=19, height=height, width=width)
    made = "channels_last" if layout == "channels_last" else "contiguous"
    inputs = operation.inputs(replace(case, shape=shape, layout=made), torch.device("meta"))
    place = _whole if layout != "crops" else _crop(chance)
    given = [place(x) for x in inputs]
    given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    leaves = [x for x in given if x.requires_grad]
    return Call(lambda: operation.function(*given, **case.options), leaves)


def _side(sizes: Range, chance: random.Random) -> int:
    """A height or a width; every doubling is as likely as the next."""
    least, most = map(math.log2, sizes)
    return round(2 ** chance.uniform(least, most))


def _whole(like: Tensor) -> Tensor:
    """A CPU tensor like the given one, in memory that is never touched and so takes no space."""
    return torch.empty_like(like, device="cpu")


def _crop(chance: random.Random) -> Callable[[Tensor], Tensor]:
    """Makes each map a part of a larger one, or a whole one."""
    top, left = chance.randint(0, 9), chance.randint(0, 9)

    def crop(like: Tensor) -> Tensor:
        if chance.random() < 0.5:
            return _whole(like)
        *outer, height, width = like.shape
        larger = torch.empty(*outer, height + 10, width + 10, dtype=like.dtype)
        return larger[..., top : top + height, left : left + width]

    return crop
