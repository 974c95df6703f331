"""Batched small symmetric positive definite matrices: Cholesky factor, determinant, solve, inverse.

For batches of matrices up to 64 x 64, where a library call per matrix, or a kernel built for large
ones, spends its time on launches. Every function factorises A = L L^T once, in the dtype of A:

    logdet A = 2 sum log diag L,     A^-1 B = L^-T (L^-1 B)

and every gradient has a closed form and a kernel. The gradients are symmetric, as torch.linalg's.
With sym(M) = (M + M^T) / 2:

    cholesky_ex    dA = 1/2 L^-T (P + P^T) L^-1,  P: lower triangle of L^T dL, its diagonal halved
    logdet         dA = A^-1 d(logdet)
    solve          dA = -sym(dB X^T),  dB = A^-1 dX
    inv            dA = -X sym(dX) X,  X = A^-1

Gradients of gradients are not available: asking for them raises. The gradient through a matrix
that is not positive definite is undefined and may be NaN; its neighbours' are not touched by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kernels_reference import linalg as reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Configuration, TuningCase
from .._core.example import Example
from .._core.operator import Operator
from . import launchers

__all__ = ["cholesky_ex", "inv", "logdet", "solve"]

LARGEST = 64

# --- operators ------------------------------------------------------------------------------------


class Factor(NamedTuple):
    """The results of cholesky_ex: L [..., n, n] and info, int32 [...]."""

    factor: torch.Tensor
    info: torch.Tensor


class Result(NamedTuple):
    """The one result of an operator."""

    result: torch.Tensor


def _like(tensor: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """A contiguous tensor of the same dtype, as every launcher returns."""
    return tensor.new_empty(tensor.shape if shape is None else shape)


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without elements, with the same leading dimensions: for a gradient not asked for."""
    return tensor.new_empty((*tensor.shape[:-1], 0))


def _solve_gradients(
    grad_result: torch.Tensor, result: torch.Tensor, A: torch.Tensor, wants_A: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of A, gradient of B); that of A has no elements if it is not wanted."""
    grad_right = launchers.solve(A, grad_result, None)
    return launchers.solve_backward(grad_right, result) if wants_A else _nothing(A), grad_right


def _empty_solve_gradients(
    result: torch.Tensor, A: torch.Tensor, wants_A: bool, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors of the shapes that _solve_gradients returns."""
    return _like(A) if wants_A else _nothing(A), _like(result)


CHOLESKY = Operator(
    "cholesky_ex",
    forward=lambda A: Factor(*launchers.cholesky(A)),
    backward=lambda grad_factor, factor: launchers.cholesky_backward(grad_factor, factor),
    allocate=lambda A: Factor(_like(A), A.new_empty(A.shape[:-2], dtype=torch.int32)),
    allocate_gradient=lambda factor, **_: _like(factor),
    results=Factor,
    returned=2,
    batched=True,
)
LOGDET = Operator(
    "logdet",
    forward=lambda A: Result(launchers.logdet(A)),
    backward=lambda grad_result, A: launchers.solve(A, None, grad_result),
    allocate=lambda A: Result(_like(A, A.shape[:-2])),
    allocate_gradient=lambda A, **_: _like(A),
    results=Result,
    batched=True,
)
SOLVE = Operator(
    "solve",
    forward=lambda A, B: Result(launchers.solve(A, B, None)),
    backward=_solve_gradients,
    allocate=lambda A, B: Result(_like(B)),
    allocate_gradient=_empty_solve_gradients,
    results=Result,
    batched=True,
    differentiable=("A", "B"),
)
INVERSE = Operator(
    "inv",
    forward=lambda A: Result(launchers.solve(A, None, None)),
    backward=lambda grad_result, result: launchers.inverse_backward(grad_result, result),
    allocate=lambda A: Result(_like(A)),
    allocate_gradient=lambda result, **_: _like(result),
    results=Result,
    batched=True,
)


# --- functions ------------------------------------------------------------------------------------


def cholesky_ex(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factor of each symmetric positive definite matrix: A = L L^T.

    An element that is not finite spoils its own matrix, and no other of the batch.

    Args:
        A: [..., n, n] with 1 <= n <= 64, float32 or float64; the lower triangle is read.

    Returns:
        (L, info): L [..., n, n] lower triangular, zeros above the diagonal, in the dtype of A; info
        int32 [...], 0 or the 1-based order of the first leading minor that is not positive
        definite. L is NaN where info is not 0. Nothing waits for the GPU.

    Raises:
        TypeError: A is not a float32 or float64 tensor.
        ValueError: A is not square, or n is not in 1 to 64.

    Example:
        >>> import torch, tritonloss
        >>> A = torch.eye(4).repeat(1000, 1, 1)
        >>> L, info = tritonloss.linalg.cholesky_ex(A)
        >>> bool((info == 0).all())
        True
    """
    _check_matrices(A)
    if not serves_triton(A):
        return reference.cholesky_ex(A)
    factor, info = CHOLESKY(A)
    return factor, info


def logdet(A: torch.Tensor) -> torch.Tensor:
    """Logarithm of the determinant of each symmetric positive definite matrix.

    An element that is not finite spoils its own matrix, and no other of the batch.

    Args:
        A: [..., n, n] with 1 <= n <= 64, float32 or float64; the lower triangle is read.

    Returns:
        log det A [...] in the dtype of A; NaN where A is not positive definite.

    Raises:
        TypeError: A is not a float32 or float64 tensor.
        ValueError: A is not square, or n is not in 1 to 64.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.linalg.logdet(torch.eye(3).repeat(2, 1, 1))
        tensor([0., 0.])
    """
    _check_matrices(A)
    if not serves_triton(A):
        return reference.logdet(A)
    return LOGDET(A)[0]


def solve(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """X with A X = B for each symmetric positive definite A.

    An element that is not finite spoils its own matrix, and no other of the batch.

    Args:
        A: [..., n, n] with 1 <= n <= 64, float32 or float64; the lower triangle is read.
        B: [..., n, m] with the leading dimensions and the dtype of A.

    Returns:
        X [..., n, m]; NaN where A is not positive definite.

    Raises:
        TypeError: A or B is not a float32 or float64 tensor, or their dtypes differ.
        ValueError: A is not square, n is not in 1 to 64, or B does not match A.

    Example:
        >>> import torch, tritonloss
        >>> A = 2 * torch.eye(3).repeat(5, 1, 1)
        >>> tritonloss.linalg.solve(A, torch.ones(5, 3, 1))[0, :, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    _check_matrices(A)
    _check_right(A, B)
    if not serves_triton(A):
        return reference.solve(A, B)
    return SOLVE(A, B)[0]


def inv(A: torch.Tensor) -> torch.Tensor:
    """Inverse of each symmetric positive definite matrix.

    An element that is not finite spoils its own matrix, and no other of the batch.

    Args:
        A: [..., n, n] with 1 <= n <= 64, float32 or float64; the lower triangle is read.

    Returns:
        A^-1 [..., n, n]; NaN where A is not positive definite.

    Raises:
        TypeError: A is not a float32 or float64 tensor.
        ValueError: A is not square, or n is not in 1 to 64.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.linalg.inv(4 * torch.eye(2).repeat(3, 1, 1))[0, 0]
        tensor([0.2500, 0.0000])
    """
    _check_matrices(A)
    if not serves_triton(A):
        return reference.inv(A)
    return INVERSE(A)[0]


def _check_matrices(A: torch.Tensor) -> None:
    accepted = f"A must be a float32 or float64 tensor of shape (..., n, n), 1 <= n <= {LARGEST}"
    if not isinstance(A, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(A).__name__}")
    checks.check_dense(A, "A")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{accepted}; got {checks.described(A)}")
    if A.dim() < 2 or A.size(-1) != A.size(-2) or not 1 <= A.size(-1) <= LARGEST:
        raise ValueError(f"{accepted}; got {checks.described(A)}")


def _check_right(A: torch.Tensor, B: torch.Tensor) -> None:
    leading = ", ".join(str(size) for size in A.shape[:-1])
    accepted = f"B must be a tensor of shape ({leading}, m) and the dtype and device of A"
    if not isinstance(B, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(B).__name__}")
    checks.check_dense(B, "B")
    if B.dtype != A.dtype:
        raise TypeError(f"{accepted}, {A.dtype}; got {checks.described(B)}")
    if B.dim() != A.dim() or B.shape[:-1] != A.shape[:-1] or B.device != A.device:
        raise ValueError(f"{accepted}; got {checks.described(B)} on {B.device}")


# --- tuning ---------------------------------------------------------------------------------------


def _random_matrices(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Positive definite matrices [16384, order, order], the same at every call."""
    half = torch.empty((16384, order, order), dtype=dtype, device=device)
    if device.type != "meta":
        half.normal_(generator=torch.Generator(device).manual_seed(0))
    return half @ half.mT + order * torch.eye(order, dtype=dtype, device=device)


def _case(operator: str, order: int, dtype: torch.dtype, run: Callable[..., Any]) -> TuningCase:
    """The tuning case of ``run`` on matrices of one order; the heuristic is its first candidate."""
    first = launchers.heuristic(operator, order, dtype)
    in_lanes = launchers.in_lanes(operator, order)
    name = "LANES" if in_lanes else "MATRICES"
    size = int(first[name])
    sizes = {32, 64, 128, 256} if in_lanes else {size, 2 * size, max(size // 2, 1)}
    others: list[Configuration] = [
        {name: value, "num_warps": warps} for value in sorted(sizes) for warps in (1, 2, 4, 8)
    ]

    def prepared(device: torch.device) -> Callable[[], Any]:
        inputs = _random_matrices(order, dtype, device)
        return lambda: run(inputs)

    candidates = [first, *(other for other in others if other != first)]
    layout = "lanes" if in_lanes else "tiles"
    return TuningCase(operator, order, 1, dtype, layout, prepared, candidates)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` tries out for this module."""
    runs: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("cholesky", launchers.cholesky),
        ("logdet", launchers.logdet),
        ("solve", lambda matrices: launchers.solve(matrices, None, None)),
        # The matrices are also used as factors and solutions: any numbers make the same work.
        ("cholesky_backward", lambda matrices: launchers.cholesky_backward(matrices, matrices)),
        ("inverse_backward", lambda matrices: launchers.inverse_backward(matrices, matrices)),
        ("solve_backward", lambda matrices: launchers.solve_backward(matrices, matrices)),
    )
    return [
        _case(operator, order, dtype, run)
        for order in (9, 16, 32, 64, 8, 4, 2)
        for dtype in (torch.float32, torch.float64)
        for operator, run in runs
        if order != 9 or launchers.in_lanes(operator, order)  # in tiles, 9 is in the bucket of 16
    ]


def _products(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x^T x + 1 for x the first four columns: positive definite, whatever the logits."""
    half = logits[..., :4]
    return (half.mT @ half + torch.eye(4).to(half),)


def _product_and_rows(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*_products(logits, target), logits[..., :4].mT)


EXAMPLES = (
    Example("linalg.cholesky_ex", cholesky_ex, CHOLESKY, arguments=_products),
    Example("linalg.logdet", logdet, LOGDET, arguments=_products),
    Example("linalg.solve", solve, SOLVE, arguments=_product_and_rows),
    Example("linalg.inv", inv, INVERSE, arguments=_products),
)
