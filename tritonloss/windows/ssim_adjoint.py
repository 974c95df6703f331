"""The adjoint of a window, along a row and down the rows; folded where images are mirrored."""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.strip_windows import (
    filtered_row,
    folded_weight,
    gaussian_weight,
    repeated,
    without_oldest,
)
from .._engine.strips import load_column, load_columns, zeros


@triton.jit
def adjoint_rows(
    planes, row, width, window, WINDOW: tl.constexpr, SHIFT: tl.constexpr, STRIP: tl.constexpr,
    MAPS: tl.constexpr,
):  # fmt: skip
    """For each of the first MAPS planes the window's adjoint along one row, a tensor per column.

    In units of the window, unless a lane has one column.
    """
    SIZE: tl.constexpr = WINDOW.size
    ALONG: tl.constexpr = WINDOW.along
    COLUMNS: tl.constexpr = STRIP.columns
    rows = ()
    if COLUMNS == 1:
        RADIUS: tl.constexpr = WINDOW.size // 2
        zero = zeros(planes[0], STRIP)
        sums = repeated(zero, MAPS)
        for step in tl.range(0, window):
            tap = step - RADIUS
            weight = gaussian_weight(tap, zero.dtype, WINDOW)
            weight = folded_weight(row.chunk, tap, width, weight, weight, zero.dtype, WINDOW)
            added = ()
            for m in tl.static_range(MAPS):
                column = row.chunk + (SHIFT + RADIUS) + tap
                value = load_column(planes[m], row, column, STRIP, "zeros")
                added = added + (sums[m] + value * weight,)
            sums = added
        for m in tl.static_range(MAPS):
            rows = rows + ((sums[m],),)
    else:
        for m in tl.static_range(MAPS):
            values, _ = load_columns(planes[m], row, STRIP, SHIFT, COLUMNS + SIZE - 1, "zeros")
            rows = rows + (filtered_row(values, ALONG, SIZE, COLUMNS),)
    return rows


@triton.jit
def folded_column(
    partials, row, out_row, height, dtype: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """(finished sums, unfinished sums) as of filtered_column, with the weights of folded_weight."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    sums = ()
    for j in tl.static_range(SIZE):
        weight = folded_weight(
            out_row + j, SIZE // 2 - j, height, WEIGHTS[SIZE - 1 - j], WEIGHTS[SIZE - 1 - j], dtype,
            WINDOW,
        )  # fmt: skip
        for v in tl.static_range(COLUMNS):
            sum_so_far = row[v] * weight
            if j < SIZE - 1:
                sum_so_far += partials[j * COLUMNS + v]
            sums = sums + (sum_so_far,)
    return sums, without_oldest(sums, SIZE, COLUMNS)
