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

# The largest order in lanes. A factorisation is unrolled: it takes two seconds to compile for order
# 9, and ten seconds for order 12.
LARGEST_IN_LANES = 9


def in_lanes(operator: str, order: int) -> bool:
    """Whether the operator has one matrix per lane for this order; else tiles."""
    return operator in ("cholesky", "logdet") and order <= LARGEST_IN_LANES


def heuristic(operator: str, order: int, dtype: torch.dtype) -> Configuration:
    """A configuration that is always valid."""
    if in_lanes(operator, order):
        return {"LANES": 64, "num_warps": 2}
    side = triton.next_power_of_2(order)
    # The other operators hold two tiles, for which one warp has not enough registers in float64.
    wide = dtype == torch.float64 and operator not in ("cholesky", "logdet")
    warps = {64: 8, 32: 4}.get(side, 2 if wide else 1)
    elements = 128 if wide else 256
    return {"MATRICES": max(1, elements // side**2), "num_warps": warps}


# --- launchers ------------------------------------------------------------------------------------


def cholesky(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, info): L [..., n, n] with A = L L^T, and int32 [...]."""
    factor = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    info = torch.empty(matrices.shape[:-2], dtype=torch.int32, device=matrices.device)
    kernels = _Kernels(_cholesky_lanes_kernel, _cholesky_tile_kernel)
    _factorise("cholesky", kernels, _flat(matrices), factor_ptr=factor, info_ptr=info)
    return factor, info


def logdet(matrices: torch.Tensor) -> torch.Tensor:
    """The logarithms of the determinants, [...]."""
    result = torch.empty(matrices.shape[:-2], dtype=matrices.dtype, device=matrices.device)
    kernels = _Kernels(_logdet_lanes_kernel, _logdet_tile_kernel)
    _factorise("logdet", kernels, _flat(matrices), logdet_ptr=result)
    return result


def solve(
    matrices: torch.Tensor, right: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """The product scale A^-1 right; None is the identity as ``right``, and 1 as ``scale``."""
    shape = matrices.shape if right is None else right.shape
    solution = torch.empty(shape, dtype=matrices.dtype, device=matrices.device)
    if solution.numel() == 0:
        return solution
    flat = _flat(matrices)
    flat_right = flat if right is None else _flat(right)

    def prepare() -> PreparedLaunch:
        programs, launch = _tile_launch("solve", flat)
        columns = shape[-1]
        # In float64 a program takes at most 32 columns, for the sake of registers.
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
        # All programs are on the first axis of the grid: the others take at most 65535.
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
    """The gradient of A, from the gradient of its factor."""
    grad = _flat(grad_factor)
    pointers = {"grad_factor_ptr": grad, "factor_ptr": factor}
    return _matrix_backward("cholesky_backward", _cholesky_backward_kernel, grad, factor, pointers)


def inverse_backward(grad_inverse: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The gradient of A, from the gradient of its inverse."""
    grad = _flat(grad_inverse)
    pointers = {"grad_inverse_ptr": grad, "inverse_ptr": inverse}
    return _matrix_backward("inverse_backward", _inverse_backward_kernel, grad, inverse, pointers)


def solve_backward(grad_right: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """The gradient of A, from X = A^-1 B and the gradient of B, both contiguous."""
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
    """The two kernels of a factorisation: one matrix per lane, and matrices in tiles."""

    lanes: Any
    tile: Any


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as [batch, rows, columns]: a view, if the leading dimensions can be merged."""
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
    """The gradient of A, from that of its factor or its inverse; ``grad`` is flat."""
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
    """The launch configuration of an operator, by the order of the matrices."""
    order = matrices.size(-1)
    return launch_configuration(
        operator,
        device=matrices.device,
        dtype=matrices.dtype,
        classes=order,
        window=1,
        # A bucket may hold orders of both designs, which have different settings.
        layout="lanes" if in_lanes(operator, order) else "tiles",
        heuristic=heuristic(operator, order, matrices.dtype),
    )
