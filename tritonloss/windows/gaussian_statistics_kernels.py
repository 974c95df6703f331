"""Kernels of the Gaussian-window statistics, and of their adjoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import plus
from .._engine.strip_windows import (
    Moments,
    column_moments,
    folded_weight,
    gaussian_weight,
    repeated,
    row_moments,
    streamed_row_moments,
    without_oldest,
)
from .._engine.strips import (
    SIZES,
    Row,
    below,
    load_column,
    load_values,
    plane_of,
    row_limit,
    source_row,
    store_columns,
    strip_program,
    zeros,
)

# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _gaussian_statistics_forward_kernel(
    x_ptr,  # [N, C, H, W]
    mean_ptr,  # [N, C, out_height, out_width]
    variance_ptr,  # like mean
    x_strides,
    mean_strides,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Reads x once, writes mean and variance once."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    ROWS: tl.constexpr = STRIP.rows
    UNROLL: tl.constexpr = STRIP.unroll
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    first_row = program.first_row
    x_plane = below(plane_of(x_ptr, x_strides, program, STRIP), first_row, STRIP)
    mean_plane = below(plane_of(mean_ptr, mean_strides, program, STRIP), first_row, STRIP)
    variance_plane = below(plane_of(variance_ptr, mean_strides, program, STRIP), first_row, STRIP)

    none_yet = repeated(zeros(mean_plane, STRIP), (SIZE - 1) * COLUMNS)
    history = Moments(mean=none_yet, variance=none_yet)
    rows = tl.minimum(ROWS, out_height - first_row)
    for i in tl.range(SHIFT, rows + (SHIFT + SIZE - 1), loop_unroll_factor=UNROLL):
        # moments of a row, then of the windows that it completes
        number = source_row(first_row + i, height, PADDING)
        limit = row_limit(number, height, width)
        row = Row(number=number - first_row, chunk=program.chunk, limit=limit)
        if COLUMNS == 1:
            row_of_moments = streamed_row_moments(
                x_plane, row, program.chunk + SHIFT, window, WINDOW, STRIP
            )
        else:
            values = load_values(x_plane, row, STRIP, SHIFT, COLUMNS + SIZE - 1, PADDING)
            row_of_moments = row_moments(values, WEIGHTS, SIZE, COLUMNS)
        moments, history = column_moments(row_of_moments, history, WEIGHTS, SIZE, COLUMNS)
        mean = ()
        for v in tl.static_range(COLUMNS):
            mean = mean + (moments.centre[v] + moments.shift[v],)

        number = i - (SHIFT + SIZE - 1)
        out_row = Row(number=number, chunk=program.chunk, limit=tl.where(number >= 0, out_width, 0))
        # store
        store_columns(mean_plane, out_row, mean, STRIP)
        store_columns(variance_plane, out_row, moments.variance, STRIP)


# --- backward -------------------------------------------------------------------------------------


class Upstream(NamedTuple):
    """What the adjoint reads: the gradients of both maps, and the mean; their planes or values."""

    grad_mean: Any
    grad_variance: Any
    mean: Any


class Adjoint(NamedTuple):
    """sum_j w_j (g_j + 2 v_j (x - m_j)) = constant + slope (x - m), a tensor per column.

    g and v are the gradients of mean and variance, m_j the means, and m one mean that the sum is
    taken about.
    """

    constant: Any
    slope: Any


@triton.jit
def _adjoint_row(upstream, WEIGHTS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """(m, adjoint) of one row, with m the mean at each window's centre."""
    grad_mean = upstream.grad_mean
    grad_variance = upstream.grad_variance
    mean = upstream.mean
    references = ()
    constants = ()
    slopes = ()
    for v in tl.static_range(COLUMNS):
        reference = mean[v + SIZE // 2]
        constant = grad_mean[v] * WEIGHTS[0]
        slope = grad_variance[v] * WEIGHTS[0]
        excess = slope * (reference - mean[v])
        for j in tl.static_range(1, SIZE):
            weighted = grad_variance[v + j] * WEIGHTS[j]
            constant = plus(constant, grad_mean[v + j], WEIGHTS[j])
            slope += weighted
            excess += weighted * (reference - mean[v + j])
        references = references + (reference,)
        constants = constants + (constant + 2.0 * excess,)
        slopes = slopes + (2.0 * slope,)
    return references, Adjoint(constant=constants, slope=slopes)


@triton.jit
def _streamed_adjoint_row(
    planes, row, width, window, WINDOW: tl.constexpr, SHIFT: tl.constexpr, STRIP: tl.constexpr
):
    """(m, adjoint) of one row, for one column per lane, from the outermost taps inwards."""
    RADIUS: tl.constexpr = WINDOW.size // 2
    middle = row.chunk + (SHIFT + RADIUS)
    reference = load_column(planes.mean, row, middle, STRIP, "zeros")
    dtype: tl.constexpr = reference.dtype
    constant = tl.zeros_like(reference)
    slope = tl.zeros_like(reference)
    excess = tl.zeros_like(reference)
    tail = tl.full((), 0.0, dtype)
    for step in tl.range(0, window):
        # The taps are RADIUS, -RADIUS, RADIUS - 1, -(RADIUS - 1), ..., 0.
        distance = RADIUS - step // 2
        tap = distance - 2 * distance * (step % 2)
        weight = gaussian_weight(distance, dtype, WINDOW)
        tail += tl.where(tap >= 0, weight, 0.0)
        weight = folded_weight(row.chunk, tap, width, weight, tail, dtype, WINDOW)
        column = middle + tap
        grad_mean = load_column(planes.grad_mean, row, column, STRIP, "zeros")
        grad_variance = load_column(planes.grad_variance, row, column, STRIP, "zeros")
        mean = load_column(planes.mean, row, column, STRIP, "zeros")
        constant += grad_mean * weight
        slope += grad_variance * weight
        excess += grad_variance * weight * (reference - mean)
    return (reference,), Adjoint(constant=(constant + 2.0 * excess,), slope=(2.0 * slope,))


@triton.jit
def _adjoint_column(
    row, steps, history, out_row, height, TAILS: tl.constexpr, WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(finished, history): the vertical part of the adjoint, as filtered_column has it.

    The unfinished sums are about the mean of the newest row. ``steps`` says how far that has moved
    since the row before.
    """
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    FOLDED: tl.constexpr = WINDOW.padding == "reflect" or WINDOW.padding == "replicate"
    dtype: tl.constexpr = row.constant[0].dtype
    zero = tl.zeros_like(row.constant[0])
    new_constants = ()
    new_slopes = ()
    for j in tl.static_range(SIZE):
        if FOLDED:
            weight = folded_weight(
                out_row + j, SIZE // 2 - j, height, WEIGHTS[SIZE - 1 - j], TAILS[SIZE - 1 - j],
                dtype, WINDOW,
            )  # fmt: skip
        for v in tl.static_range(COLUMNS):
            constant = zero
            slope = zero
            if j < SIZE - 1:
                slope = history.slope[j * COLUMNS + v]
                constant = history.constant[j * COLUMNS + v] + slope * steps[v]
            if FOLDED:
                constant += row.constant[v] * weight
                slope += row.slope[v] * weight
            else:
                constant = plus(constant, row.constant[v], WEIGHTS[SIZE - 1 - j])
                slope = plus(slope, row.slope[v], WEIGHTS[SIZE - 1 - j])
            new_constants = new_constants + (constant,)
            new_slopes = new_slopes + (slope,)
    unfinished = Adjoint(
        constant=without_oldest(new_constants, SIZE, COLUMNS),
        slope=without_oldest(new_slopes, SIZE, COLUMNS),
    )
    return Adjoint(constant=new_constants, slope=new_slopes), unfinished


@triton.jit(do_not_specialize=SIZES)
def _gaussian_statistics_backward_kernel(
    grad_mean_ptr,  # [N, C, out_height, out_width]
    grad_variance_ptr,
    mean_ptr,
    x_ptr,  # [N, C, H, W]
    grad_x_ptr,
    grad_mean_strides,
    grad_variance_strides,
    mean_strides,
    x_strides,
    grad_x_strides,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    WINDOW: tl.constexpr,
    TAILS: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIP: tl.constexpr,
):
    """grad_x_j = sum_i w_ij (grad_mean_i + 2 grad_variance_i (x_j - mean_i)): the window's adjoint.

    x_j - mean_i is taken in steps over the means between, never as a difference of two large sums,
    so that flat maps keep their digits in the gradient too.
    """
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    ROWS: tl.constexpr = STRIP.rows
    UNROLL: tl.constexpr = STRIP.unroll
    WEIGHTS: tl.constexpr = WINDOW.weights
    COUNT: tl.constexpr = COLUMNS + SIZE - 1
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    grad_mean = plane_of(grad_mean_ptr, grad_mean_strides, program, STRIP)
    grad_variance = plane_of(grad_variance_ptr, grad_variance_strides, program, STRIP)
    mean = plane_of(mean_ptr, mean_strides, program, STRIP)
    first_row = program.first_row
    planes = Upstream(
        grad_mean=below(grad_mean, first_row, STRIP),
        grad_variance=below(grad_variance, first_row, STRIP),
        mean=below(mean, first_row, STRIP),
    )
    x_plane = below(plane_of(x_ptr, x_strides, program, STRIP), first_row, STRIP)
    grad_x_plane = below(plane_of(grad_x_ptr, grad_x_strides, program, STRIP), first_row, STRIP)

    zero = zeros(planes.mean, STRIP)
    references = repeated(zero, COLUMNS)
    none_yet = repeated(zero, (SIZE - 1) * COLUMNS)
    history = Adjoint(constant=none_yet, slope=none_yet)
    rows = tl.minimum(ROWS, height - first_row)
    for i in tl.range(SHIFT, rows + (SHIFT + SIZE - 1), loop_unroll_factor=UNROLL):
        # the adjoint along a row
        limit = row_limit(first_row + i, out_height, out_width)
        row = Row(number=i, chunk=program.chunk, limit=limit)
        if COLUMNS == 1:
            row_mean, row_adjoint = _streamed_adjoint_row(
                planes, row, width, window, WINDOW, SHIFT, STRIP
            )
        else:
            upstream = Upstream(
                grad_mean=load_values(planes.grad_mean, row, STRIP, SHIFT, COUNT, "zeros"),
                grad_variance=load_values(planes.grad_variance, row, STRIP, SHIFT, COUNT, "zeros"),
                mean=load_values(planes.mean, row, STRIP, SHIFT, COUNT, "zeros"),
            )
            row_mean, row_adjoint = _adjoint_row(upstream, WEIGHTS, SIZE, COLUMNS)

        # The mean that the sums are about. Rows outside the image do not move it. It is the row's
        # own, not the old one plus the step, in which a NaN would stay for all rows below.
        steps = ()
        moved = ()
        for v in tl.static_range(COLUMNS):
            reference = tl.where(limit > 0, row_mean[v], references[v])
            steps = steps + (reference - references[v],)
            moved = moved + (reference,)
        references = moved
        number = i - (SHIFT + SIZE - 1)
        adjoint, history = _adjoint_column(
            row_adjoint, steps, history, first_row + number, height, TAILS, WINDOW, COLUMNS
        )

        # the gradient of the row that is complete
        out_row = Row(number=number, chunk=program.chunk, limit=tl.where(number >= 0, width, 0))
        x = load_values(x_plane, out_row, STRIP, 0, COLUMNS, "zeros")
        gradient = ()
        for v in tl.static_range(COLUMNS):
            slope = adjoint.slope[v]
            gradient = gradient + (adjoint.constant[v] + slope * (x[v] - references[v]),)
        store_columns(grad_x_plane, out_row, gradient, STRIP)
