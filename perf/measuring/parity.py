"""The gate before every measurement: is the answer right?

Truth is the reference in float64, the yardstick is the reference in the case's own dtype. A
provider passes if no element of its outputs and gradients is much further from the truth than the
yardstick's worst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perf.measuring.trial import Trial
from perf.operations.contract import Case, Operation, Outputs

_FACTOR = 2.0
# Allowed beside that, relative to the largest element: one rounding of a result in a narrow dtype.
# In float32 a rounding is 6e-8; the rest is for sums in another order than the yardstick's.
_ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Verdict:
    """The largest error of any output or gradient, relative to its largest element; its limit."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not pass


class Gate:
    """Truth and yardstick of one case, to hold any number of providers against."""

    def __init__(self, operation: Operation, case: Case, device: torch.device) -> None:
        self._case = case
        self._inputs = operation.inputs(case, device)
        precise = tuple(x.double() if x.is_floating_point() else x for x in self._inputs)
        self._truth = Trial(operation.reference, case, precise).results()
        self._excused: Tensor | None = None
        if operation.excused is not None:
            with torch.no_grad():
                self._excused = operation.excused(case, precise)
        del precise
        error = self.error(operation.reference)
        self._allowed = _FACTOR * error + _ROUNDING[case.dtype]
        self.yardstick = Verdict(error, self._allowed)

    def judge(self, function: Callable[..., Outputs]) -> Verdict:
        """How wrong the function is, forward and backward."""
        return Verdict(self.error(function), self._allowed)

    def error(self, function: Callable[..., Outputs]) -> float:
        """The largest error of the function's outputs and gradients."""
        found = Trial(function, self._case, self._inputs).results()
        # The index of the first input's gradient, which may have elements to excuse.
        gradient = len(found) - sum(x.is_floating_point() for x in self._inputs)
        errors = [
            _relative_error(tensor, truth, self._excused if index == gradient else None)
            for index, (tensor, truth) in enumerate(zip(found, self._truth, strict=True))
        ]
        return float(torch.stack(errors).max())


def _relative_error(tensor: Tensor, truth: Tensor, excused: Tensor | None) -> Tensor:
    difference = (tensor.double() - truth).abs()
    if excused is not None:
        difference = difference.masked_fill(excused, 0)
    return difference.max() / truth.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
