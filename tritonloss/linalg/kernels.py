"""Kernels for batched small symmetric positive definite matrices; see matrices.py.

There are two designs. In lanes: one matrix per lane, all of it in registers and every loop
unrolled. Compile time grows steeply with the order, so this ends at order 9. In tiles: MATRICES
matrices per program, each a [SIDE, SIDE] tile, eliminated step by step in a loop. A step takes one
row out of the tile by a masked sum. The column is that row transposed, since the tile is symmetric.

A pivot that is not positive (or NaN) is replaced by 1, so that its neighbours go on undisturbed.
Its order goes into info, and the results of its matrix are NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

SIZES = ("batch", "order", "columns")


class Tiles(NamedTuple):
    """Which elements of which matrices a program has in its tiles, shaped to broadcast."""

    matrix: Any  # [MATRICES, 1, 1]
    rows: Any  # [1, SIDE, 1]
    columns: Any  # [1, 1, SIDE]
    mask: Any  # [MATRICES, 1, 1]: whether there is such a matrix


# --- device functions: one matrix per lane --------------------------------------------------------


@triton.jit
def _factor_in_lanes(matrix_ptr, matrix, mask, strides, ORDER: tl.constexpr):
    """(factor, pivots, info): the lower triangle row by row, the squares of its diagonal, info."""
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    base = matrix_ptr + matrix * strides[0]
    factor = ()
    inverses = ()
    pivots = ()
    info = tl.zeros(matrix.shape, tl.int32)
    for i in tl.static_range(ORDER):
        for j in tl.static_range(i + 1):
            value = tl.load(base + i * strides[1] + j * strides[2], mask=mask, other=0.0)
            value = tl.where(mask, value, 1.0 if i == j else 0.0).to(dtype)
            for k in tl.static_range(j):
                value = value - factor[i * (i + 1) // 2 + k] * factor[j * (j + 1) // 2 + k]
            if i == j:
                fails = (value > 0) == 0
                info = tl.where((info == 0) & fails, i + 1, info)
                value = tl.where(fails, 1.0, value)
                pivots = pivots + (value,)
                root = tl.sqrt(value)
                factor = factor + (root,)
                inverses = inverses + (1.0 / root,)
            else:
                factor = factor + (value * inverses[j],)
    return factor, pivots, info


# --- device functions: tiles ----------------------------------------------------------------------


@triton.jit
def _row_of(tile, is_row):
    """The chosen row of every tile: [MATRICES, 1, SIDE]."""
    return tl.sum(tl.where(is_row, tile, 0.0), 1)[:, None, :]


@triton.jit
def _load_tile(pointer, strides, tiles, height, width, LOWER: tl.constexpr):
    """The matrices [MATRICES, SIDE, SIDE]; LOWER mirrors the lower triangle into the upper."""
    row = tl.maximum(tiles.rows, tiles.columns) if LOWER else tiles.rows
    column = tl.minimum(tiles.rows, tiles.columns) if LOWER else tiles.columns
    inside = tiles.mask & (tiles.rows < height) & (tiles.columns < width)
    offset = tiles.matrix * strides[0] + row * strides[1] + column * strides[2]
    return tl.load(pointer + offset, mask=inside, other=0.0)


@triton.jit
def _eliminate(tile, pivots, info, rows, columns, k):
    """(tile, pivots, info, column, scale) after step k; the tile's row k is then done."""
    is_row = rows == k
    row = _row_of(tile, is_row)
    pivot = tl.sum(tl.where(columns == k, row, 0.0), 2)[:, :, None]
    fails = (pivot > 0) == 0
    info = tl.where((info == 0) & fails, k + 1, info)
    pivot = tl.where(fails, 1.0, pivot)
    pivots = tl.where(columns == k, pivot, pivots)
    scale = (1.0 / tl.sqrt(pivot)).to(tile.dtype)
    upper = tl.where(columns >= k, row * scale, 0.0)
    column = tl.where(rows > k, tl.permute(upper, (0, 2, 1)), 0.0)
    return tl.where(is_row, upper, tile - column * upper), pivots, info, column, scale


@triton.jit
def _factor_tile(tile, rows, columns, order):
    """(upper, pivots, info) of tile = U^T U."""
    info = tl.zeros([tile.shape[0], 1, 1], tl.int32)
    pivots = tl.full([tile.shape[0], 1, tile.shape[2]], 1.0, tile.dtype)
    for k in tl.range(0, order):
        tile, pivots, info, _, _ = _eliminate(tile, pivots, info, rows, columns, k)
    return tile, pivots, info


@triton.jit
def _factor_and_substitute(tile, right, rows, columns, order):
    """(upper, right, info): tile = U^T U, and right becomes U^-T right on the way."""
    info = tl.zeros([tile.shape[0], 1, 1], tl.int32)
    pivots = tl.full([tile.shape[0], 1, tile.shape[2]], 1.0, tile.dtype)
    for k in tl.range(0, order):
        tile, pivots, info, column, scale = _eliminate(tile, pivots, info, rows, columns, k)
        solved = _row_of(right, rows == k) * scale
        right = tl.where(rows == k, solved, right - column * solved)
    return tile, right, info


@triton.jit
def _substitute_back(upper, right, rows, columns, order):
    """U^-1 right, computed from the last row up; U is the upper triangle of `upper`."""
    for step in tl.range(0, order):
        k = order - 1 - step
        is_row = rows == k
        column = tl.sum(tl.where(columns == k, upper, 0.0), 2)[:, :, None]  # [MATRICES, SIDE, 1]
        pivot = tl.sum(tl.where(is_row, column, 0.0), 1)[:, :, None]
        solved = _row_of(right, is_row) / pivot
        right = tl.where(is_row, solved, right - tl.where(rows < k, column, 0.0) * solved)
    return right


@triton.jit
def _transposed_product(left, right, rows, order):
    """left^T right, [MATRICES, SIDE, SIDE], by one rank-1 update per row."""
    product = tl.zeros_like(right)
    for k in tl.range(0, order):
        is_row = rows == k
        product += tl.permute(_row_of(left, is_row), (0, 2, 1)) * _row_of(right, is_row)
    return product


@triton.jit
def _tiles_of(program, batch, MATRICES: tl.constexpr, SIDE: tl.constexpr):
    """The tiles of the program with this number."""
    matrix = program.to(tl.int64) * MATRICES + tl.arange(0, MATRICES)
    side = tl.arange(0, SIDE)
    return Tiles(
        matrix=matrix[:, None, None],
        rows=side[None, :, None],
        columns=side[None, None, :],
        mask=(matrix < batch)[:, None, None],
    )


# --- kernels: one matrix per lane -----------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _cholesky_lanes_kernel(
    matrix_ptr,  # [batch, ORDER, ORDER]
    factor_ptr,  # [batch, ORDER, ORDER]
    info_ptr,  # [batch]
    strides,
    batch,
    ORDER: tl.constexpr,
    LANES: tl.constexpr,
):
    """The lower triangular factor L of A = L L^T, with zeros above its diagonal, and info."""
    matrix = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = matrix < batch
    factor, _, info = _factor_in_lanes(matrix_ptr, matrix, mask, strides, ORDER)
    out = factor_ptr + matrix * (ORDER * ORDER)
    for i in tl.static_range(ORDER):
        for j in tl.static_range(ORDER):
            if j <= i:
                value = tl.where(info == 0, factor[i * (i + 1) // 2 + j], float("nan"))
                tl.store(out + i * ORDER + j, value, mask=mask)
            else:
                value = tl.where(info == 0, 0.0, float("nan"))
                tl.store(out + i * ORDER + j, value, mask=mask)
    tl.store(info_ptr + matrix, info, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _logdet_lanes_kernel(
    matrix_ptr,  # [batch, ORDER, ORDER]
    logdet_ptr,  # [batch]
    strides,
    batch,
    ORDER: tl.constexpr,
    LANES: tl.constexpr,
):
    """The sum of the pivots' logarithms."""
    matrix = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = matrix < batch
    _, pivots, info = _factor_in_lanes(matrix_ptr, matrix, mask, strides, ORDER)
    total = tl.log(pivots[0])
    for i in tl.static_range(1, ORDER):
        total += tl.log(pivots[i])
    tl.store(logdet_ptr + matrix, tl.where(info == 0, total, float("nan")), mask=mask)


# --- kernels: tiles -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _cholesky_tile_kernel(
    matrix_ptr,  # [batch, order, order]
    factor_ptr,  # [batch, order, order]
    info_ptr,  # [batch]
    strides,
    batch,
    order,
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The lower triangular factor L of A = L L^T, with zeros above its diagonal, and info."""
    tiles = _tiles_of(tl.program_id(0), batch, MATRICES, SIDE)
    matrix, rows, columns, mask = tiles
    tile = _load_tile(matrix_ptr, strides, tiles, order, order, True)
    upper, _, info = _factor_tile(tile, rows, columns, order)
    upper = tl.where(info == 0, tl.where(columns >= rows, upper, 0.0), float("nan"))
    inside = mask & (rows < order) & (columns < order)
    tl.store(
        factor_ptr + (matrix * order + rows) * order + columns,
        tl.permute(upper, (0, 2, 1)),
        mask=inside,
    )
    tl.store(info_ptr + matrix, info, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _logdet_tile_kernel(
    matrix_ptr,  # [batch, order, order]
    logdet_ptr,  # [batch]
    strides,
    batch,
    order,
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The sum of the pivots' logarithms."""
    tiles = _tiles_of(tl.program_id(0), batch, MATRICES, SIDE)
    matrix, rows, columns, mask = tiles
    tile = _load_tile(matrix_ptr, strides, tiles, order, order, True)
    _, pivots, info = _factor_tile(tile, rows, columns, order)
    total = tl.sum(tl.log(pivots), 2)[:, :, None]
    tl.store(logdet_ptr + matrix, tl.where(info == 0, total, float("nan")), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _solve_kernel(
    matrix_ptr,  # [batch, order, order]
    right_ptr,  # [batch, order, columns]: B; not read if IDENTITY
    scale_ptr,  # [batch]; not read unless SCALED
    solution_ptr,  # [batch, order, columns]
    strides,
    right_strides,
    batch,
    order,
    columns,
    blocks,  # of columns: programs for the same matrices
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    IDENTITY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The product scale A^-1 B, for a block of columns; B = I gives the inverse."""
    tiles = _tiles_of(tl.program_id(0) // blocks, batch, MATRICES, SIDE)
    matrix, rows, across, mask = tiles
    tile = _load_tile(matrix_ptr, strides, tiles, order, order, True)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    if IDENTITY:
        right = tl.where(rows == column, 1.0, 0.0).to(tile.dtype)
        right = tl.broadcast_to(right, [MATRICES, SIDE, BLOCK])
    else:
        block = Tiles(matrix=matrix, rows=rows, columns=column, mask=mask)
        right = _load_tile(right_ptr, right_strides, block, order, columns, False)
    # U^T U = A; then U^-T B and U^-1 of it
    upper, right, info = _factor_and_substitute(tile, right, rows, across, order)
    right = _substitute_back(upper, right, rows, across, order)
    if SCALED:
        right *= tl.load(scale_ptr + matrix, mask=mask, other=0.0)
    right = tl.where(info == 0, right, float("nan"))
    tl.store(
        solution_ptr + (matrix * order + rows) * columns + column,
        right,
        mask=mask & (rows < order) & (column < columns),
    )


@triton.jit(do_not_specialize=SIZES)
def _cholesky_backward_kernel(
    grad_factor_ptr,  # [batch, order, order]
    factor_ptr,  # [batch, order, order]
    grad_matrix_ptr,  # [batch, order, order]
    grad_strides,
    batch,
    order,
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """1/2 L^-T (P + P^T) L^-1, with P the lower triangle of L^T dL, its diagonal halved."""
    tiles = _tiles_of(tl.program_id(0), batch, MATRICES, SIDE)
    matrix, rows, columns, mask = tiles
    inside = mask & (rows < order) & (columns < order)
    offset = (matrix * order + rows) * order + columns
    factor = tl.load(factor_ptr + offset, mask=inside & (columns <= rows), other=0.0)
    factor = tl.where(mask | (columns != rows), factor, 1.0)  # beyond the batch: the identity
    lower_half = Tiles(matrix=matrix, rows=rows, columns=columns, mask=mask & (columns <= rows))
    grad_factor = _load_tile(grad_factor_ptr, grad_strides, lower_half, order, order, False)
    # (P + P^T) / 2
    product = _transposed_product(factor, grad_factor, rows, order)
    lower = tl.where(columns < rows, product, tl.where(columns == rows, product * 0.5, 0.0))
    middle = (lower + tl.permute(lower, (0, 2, 1))) * 0.5
    # L^-T from the left, and again from the left on the transpose: L^-1 from the right
    upper = tl.permute(factor, (0, 2, 1))
    half = _substitute_back(upper, middle, rows, columns, order)
    result = _substitute_back(upper, tl.permute(half, (0, 2, 1)), rows, columns, order)
    tl.store(grad_matrix_ptr + offset, result, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _inverse_backward_kernel(
    grad_inverse_ptr,  # [batch, order, order]
    inverse_ptr,  # [batch, order, order]
    grad_matrix_ptr,  # [batch, order, order]
    grad_strides,
    batch,
    order,
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """-X sym(dX) X for X = A^-1."""
    tiles = _tiles_of(tl.program_id(0), batch, MATRICES, SIDE)
    matrix, rows, columns, mask = tiles
    inside = mask & (rows < order) & (columns < order)
    offset = (matrix * order + rows) * order + columns
    inverse = tl.load(inverse_ptr + offset, mask=inside, other=0.0)
    grad = _load_tile(grad_inverse_ptr, grad_strides, tiles, order, order, False)
    grad = (grad + tl.permute(grad, (0, 2, 1))) * 0.5
    right = _transposed_product(grad, inverse, rows, order)
    result = _transposed_product(inverse, right, rows, order)
    result = (result + tl.permute(result, (0, 2, 1))) * -0.5
    tl.store(grad_matrix_ptr + offset, result, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _solve_backward_kernel(
    grad_right_ptr,  # [batch, order, columns]
    solution_ptr,  # [batch, order, columns]
    grad_matrix_ptr,  # [batch, order, order]
    batch,
    order,
    columns,
    MATRICES: tl.constexpr,
    SIDE: tl.constexpr,
):
    """-sym(dB X^T), one rank-1 update per column of X."""
    matrix, rows, across, mask = _tiles_of(tl.program_id(0), batch, MATRICES, SIDE)
    by_row = mask & (rows < order)
    by_column = mask & (across < order)
    row_offset = (matrix * order + rows) * columns
    column_offset = (matrix * order + across) * columns
    dtype: tl.constexpr = grad_matrix_ptr.dtype.element_ty
    result = tl.zeros([MATRICES, SIDE, SIDE], dtype)
    for k in tl.range(0, columns):
        grad_down = tl.load(grad_right_ptr + row_offset + k, mask=by_row, other=0.0)
        grad_along = tl.load(grad_right_ptr + column_offset + k, mask=by_column, other=0.0)
        down = tl.load(solution_ptr + row_offset + k, mask=by_row, other=0.0)
        along = tl.load(solution_ptr + column_offset + k, mask=by_column, other=0.0)
        result -= (grad_down * along + down * grad_along) * 0.5
    offset = (matrix * order + rows) * order + across
    tl.store(grad_matrix_ptr + offset, result, mask=by_row & by_column)
