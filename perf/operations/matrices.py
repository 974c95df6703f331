"""Cases, bytes and goals of the batched Cholesky factorisation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels_reference import linalg as reference
from perf.operations.contract import (
    Case,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    Shape,
)
from tritonloss import linalg
from tritonloss.linalg import launchers

_ORDERS = (4, 9, 16, 18, 25, 32)


class Matrices(Shape):
    """A batch of square matrices; smaller ones are fewer, not of a smaller order."""

    def reduced(self) -> Matrices:
        return replace(self, batch=self.batch // 20)

    def tiny(self) -> Matrices:
        return replace(self, batch=3)


def _matrices(order: int, batch: int = 20000) -> Matrices:
    return Matrices(f"{batch} matrices of order {order}", batch, 1, order, order)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Symmetric positive definite matrices [batch, 1, n, n]."""
    half = torch.empty(case.shape.size, dtype=case.torch_dtype, device=device)
    if device.type == "meta":
        return (half,)
    half.normal_(generator=torch.Generator(device).manual_seed(0))
    order = half.size(-1)
    return (half @ half.mT + order * torch.eye(order, dtype=half.dtype, device=device),)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the launchers of all functions, forward and backward."""
    (matrices,) = tensors
    factor, _ = launchers.cholesky(matrices)
    launchers.logdet(matrices)
    inverse = launchers.solve(matrices, None, None)
    launchers.solve(matrices, inverse, None)
    launchers.cholesky_backward(factor, factor)
    launchers.inverse_backward(factor, inverse)
    launchers.solve_backward(factor, inverse)


def floor(case: Case) -> Floor:
    """Forward reads A and writes L; backward reads L and its gradient and writes A's."""
    size = case.shape.elements * case.torch_dtype.itemsize
    return Floor(forward=2 * size, backward=3 * size)


def _factor(matrices: Tensor) -> Tensor:
    return linalg.cholesky_ex(matrices)[0]


def _reference_factor(matrices: Tensor) -> Tensor:
    return reference.cholesky_ex(matrices)[0]


def _elements(given: Given) -> float:
    """A thread's share of the elements of its program's matrices."""
    return float(given["MATRICES"] * given["order"] ** 2 / given["THREADS"])


def _elements_in_lanes(given: Given) -> float:
    return float(given["LANES"] * given["ORDER"] ** 2 / given["THREADS"])


def _order(given: Given) -> float:
    return float(given["order"])


_TILE = KernelNotes(
    _elements, (LoopNotes("rows", ".k", _order), LoopNotes("rows back", ".step", _order))
)
KERNELS = {
    "_cholesky_lanes_kernel": KernelNotes(_elements_in_lanes),
    "_logdet_lanes_kernel": KernelNotes(_elements_in_lanes),
    "_cholesky_tile_kernel": _TILE,
    "_logdet_tile_kernel": _TILE,
    "_solve_kernel": _TILE,
    "_cholesky_backward_kernel": _TILE,
    "_inverse_backward_kernel": _TILE,
    "_solve_backward_kernel": KernelNotes(
        _elements, (LoopNotes("columns", ".k", lambda given: given["columns"]),)
    ),
}
CASES = tuple(Case(_matrices(order)) for order in _ORDERS)
SHIPPED = tuple(
    Case(_matrices(order), dtype=dtype, everywhere=order in (9, 32))
    for order in (1, 2, 4, 8, 9, 16, 18, 32, 64)
    for dtype in ("float32", "float64")
)
GOALS = tuple(
    Goal(
        f"Cholesky of order {case.shape.height}: speed against torch.linalg",
        case,
        "speedup_vs_eager",
        at_least=5,
    )
    for case in CASES
)
OPERATIONS = (
    Operation(
        name="cholesky_ex",
        function=_factor,
        reference=_reference_factor,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=SHIPPED,
        kernels=KERNELS,
        operators=(),
        goals=GOALS,
    ),
)
