"""Calls of a loss's public function on small maps, as training makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perf.operations.contract import Operation

SHAPE = (2, 19, 64, 64)


@dataclass(frozen=True)
class Call:
    """One function on one set of inputs; `leaves` are those that get a gradient."""

    function: Callable[[], Any]
    leaves: list[Tensor]

    def forward(self) -> list[Tensor]:
        """The outputs: the only one, or of several those that have a gradient."""
        found = self.function()
        return [found] if isinstance(found, Tensor) else [x for x in found if x.requires_grad]

    def upstream(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs' gradients for `backward`, made beforehand: 1 everywhere."""
        return [torch.ones_like(output) for output in outputs]

    def backward(self, outputs: list[Tensor], upstream: list[Tensor]) -> None:
        """Compute the leaves' gradients, where there are some."""
        if any(output.requires_grad for output in outputs):
            torch.autograd.grad(outputs, self.leaves, upstream)


def of_operation(operation: Operation, shape: tuple[int, int, int, int] = SHAPE) -> Call:
    """A call with the options of the operation's first case, on CPU tensors."""
    case = operation.cases[0]
    batch, classes, height, width = shape
    small = replace(case.shape, batch=batch, classes=classes, height=height, width=width)
    inputs = operation.inputs(replace(case, shape=small), torch.device("cpu"))
    given = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    leaves = [x for x in given if x.requires_grad]
    return Call(lambda: operation.function(*given, **case.options), leaves)
