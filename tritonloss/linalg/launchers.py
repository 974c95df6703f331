"""Launchers of the batched small matrices: tensors in, tensors out, no gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .kernels import (
    _cholesky_backward_kernel,
    _cholesky_lanes_kernel,
    _cholesky_tile_kernel,
    _inverse_backward_kernel,
    _logdet_lanes_kernel,
    _logdet_tile_kernel,
    _solve_backward_kernel,
    _solve_kernel,
)

# Unrolled in lanes a factorisation of order 12 compiles for ten seconds, and one of 9 for two.
LARGEST_IN_LANES = 9


def in_lanes(operator: str, order: int) -> bool:
    """Whether a whole matrix is one lane's work."""
    return operator in ("cholesky", "logdet") and order <= LARGEST_IN_LANES


def heuristic(operator: str, order: int, dtype: torch.dtype) -> Configuration:
    """A configuration that is always valid."""
    if in_lanes(operator, order):
        return {"LANES": 64, "num_warps": 2}
    side = triton.next_power_of_2(order)
    # What solves or goes back holds two tiles; one warp would not hold them in float64.
    wide = dtype == torch.float64 and operator not in ("cholesky", "logdet")
    warps = {64: 8, 32: 4}.get(side, 2 if wide else 1)
    elements = 128 if wide else 256
    return {"MATRICES": max(1, elements // side**2), "num_warps": warps}


# --- launchers ------------------------------------------------------------------------------------


def cholesky(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, info)."""
    factor = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    info = torch.empty(matrices.shape[:-2], dtype=torch.int32, device=matrices.device)
    kernels = _Kernels(_cholesky_lanes_kernel, _cholesky_tile_kernel)
    _factorise("cholesky", kernels, _flat(matrices), factor_ptr=factor, info_ptr=info)
    return factor, info


def logdet(matrices: torch.Tensor) -> torch.Tensor:
    """Logarithms of the determinants."""
    result = torch.empty(matrices.shape[:-2], dtype=matrices.dtype, device=matrices.device)
    kernels = _Kernels(_logdet_lanes_kernel, _logdet_tile_kernel)
    _factorise("logdet", kernels, _flat(matrices), logdet_ptr=result)
    return result


def solve(
    matrices: torch.Tensor, right: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """Scale A^-1 right; the identity for None on the right, 1 for None as the scale."""
    shape = matrices.shape if right is None else right.shape
    solution = torch.empty(shape, dtype=matrices.dtype, device=matrices.device)
    if solution.numel() == 0:
        return solution
    flat = _flat(matrices)
    flat_right = flat if right is None else _flat(right)

    def prepare() -> PreparedLaunch:
        programs, launch = _tile_launch("solve", flat)
        columns = shape[-1]
        # At 64 in float64 half of the columns, for the sake of registers.
        limit = 32 if matrices.dtype == torch.float64 else 64
        block = min(triton.next_power_of_2(columns), max(launch["SIDE"], 16), limit)
        blocks = triton.cdiv(columns, block)
        launch |= {
            "strides": flat.stride(),
            "right_strides": flat_right.stride(),
            "columns": columns,
            "blocks": blocks,
            "BLOCK": block,
            "IDENTITY": right is None,
            "SCALED": scale is not None,
        }
        # All on the first axis of the grid, the only one that takes more than 65535.
        return PreparedLaunch(_solve_kernel, (programs * blocks,), launch)

    key = ("solve", kind(flat), None if right is None else kind(flat_right), scale is None)
    launch = prepared(key, prepare)
    with device_guard(matrices):
        launch(
            matrix_ptr=flat,
            right_ptr=flat_right,
            scale_ptr=solution if scale is None else scale.contiguous(),
            solution_ptr=solution,
        )
    return solution


def cholesky_backward(grad_factor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The gradient to A of its factor."""
    grad = _flat(grad_factor)
    pointers = {"grad_factor_ptr": grad, "factor_ptr": factor}
    return _matrix_backward("cholesky_backward", _cholesky_backward_kernel, grad, factor, pointers)


def inverse_backward(grad_inverse: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The gradient to A of its inverse."""
    grad = _flat(grad_inverse)
    pointers = {"grad_inverse_ptr": grad, "inverse_ptr": inverse}
    return _matrix_backward("inverse_backward", _inverse_backward_kernel, grad, inverse, pointers)


def solve_backward(grad_right: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """The gradient to A of X = A^-1 B from the one to B; both contiguous."""
    order = solution.size(-2)
    shape = (*solution.shape[:-1], order)
    result = torch.empty(shape, dtype=solution.dtype, device=solution.device)
    if result.numel() == 0:
        return result

    def prepare() -> PreparedLaunch:
        programs, launch = _tile_launch("solve_backward", _flat(result))
        launch["columns"] = solution.size(-1)
        return PreparedLaunch(_solve_backward_kernel, (programs,), launch)

    launch = prepared(("solve_backward", kind(solution)), prepare)
    with device_guard(solution):
        launch(grad_right_ptr=grad_right, solution_ptr=solution, grad_matrix_ptr=result)
    return result


# --- what they share ------------------------------------------------------------------------------


class _Kernels(NamedTuple):
    """A factorisation with a matrix per lane, and with matrices in tiles."""

    lanes: Any
    tile: Any


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, rows, columns]: a view unless the leading dimensions cannot be merged."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def _factorise(
    operator: str, kernels: _Kernels, matrices: torch.Tensor, **out: torch.Tensor
) -> None:
    """Launch the kernel in lanes or the one in tiles, by the order of the matrices."""
    batch, order = matrices.size(0), matrices.size(-1)
    if batch == 0:
        return

    def prepare() -> PreparedLaunch:
        if not in_lanes(operator, order):
            programs, launch = _tile_launch(operator, matrices)
            launch["strides"] = matrices.stride()
            return PreparedLaunch(kernels.tile, (programs,), launch)
        configuration = _configuration(operator, matrices)
        programs = triton.cdiv(batch, int(configuration["LANES"]))
        launch = {
            "strides": matrices.stride(),
            "batch": batch,
            "ORDER": order,
            **configuration,
            "enable_fp_fusion": True,
        }
        return PreparedLaunch(kernels.lanes, (programs,), launch)

    launch = prepared((operator, kind(matrices)), prepare)
    with device_guard(matrices):
        launch(matrix_ptr=matrices, **out)


def _matrix_backward(
    operator: str,
    kernel: Any,
    grad: torch.Tensor,
    saved: torch.Tensor,
    pointers: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The gradient to A of the factor or the inverse; ``grad`` is flat."""
    result = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
    if result.numel() == 0:
        return result

    def prepare() -> PreparedLaunch:
        programs, launch = _tile_launch(operator, _flat(saved))
        launch["grad_strides"] = grad.stride()
        return PreparedLaunch(kernel, (programs,), launch)

    launch = prepared((operator, kind(grad), kind(saved)), prepare)
    with device_guard(saved):
        launch(grad_matrix_ptr=result, **pointers)
    return result


def _tile_launch(operator: str, matrices: torch.Tensor) -> tuple[int, dict[str, Any]]:
    """(programs, launch arguments) of a kernel that works on tiles."""
    configuration = _configuration(operator, matrices)
    launch = {
        "batch": matrices.size(0),
        "order": matrices.size(-1),
        "SIDE": triton.next_power_of_2(matrices.size(-1)),
        **configuration,
        "enable_fp_fusion": True,
    }
    return triton.cdiv(matrices.size(0), int(configuration["MATRICES"])), launch


def _configuration(operator: str, matrices: torch.Tensor) -> Configuration:
    order = matrices.size(-1)
    return launch_configuration(
        operator,
        device=matrices.device,
        dtype=matrices.dtype,
        classes=order,
        window=1,
        # Orders of one bucket may be computed by either kernel, which take different settings.
        layout="lanes" if in_lanes(operator, order) else "tiles",
        heuristic=heuristic(operator, order, matrices.dtype),
    )
