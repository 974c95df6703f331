"""Local Gaussian-window statistics: mean and variance of every k x k neighbourhood.

The building block of the structural losses, public in its own right. How the kernels walk over an
image, and why the variance is exact on flat maps, is told in ``_engine/strips.py``.

Bytes per pixel of a float32 map: forward 12 (x; mean, variance), backward 20 (x, mean and both
gradients; the gradient of x).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels_reference.gaussian_window import gaussian_statistics as gaussian_statistics_reference

from .._core import checks
from .._core.backend import device_guard, serves_triton
from .._core.configurations import Configuration, Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.prepared_launch import launch_kernel
from .._core.tuning_inputs import random_map
from .._engine.math import plus
from .._engine.strips import (
    PADDINGS,
    SIZES,
    Window,
    channels_in_lanes,
    column_moments,
    compute_dtype,
    folded_weight,
    gaussian_weight,
    load_column,
    load_values,
    plane_of,
    repeated,
    row_limit,
    row_moments,
    source_row,
    store_columns,
    streamed_row_moments,
    strides,
    strip_candidates,
    strip_configuration,
    strip_heuristic,
    strip_launch,
    strip_program,
    window_of,
    without_oldest,
)

# --- kernels --------------------------------------------------------------------------------------


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
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = STRIP.rows
    UNROLL: tl.constexpr = STRIP.unroll
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    x_plane = plane_of(x_ptr, x_strides, image, channel, STRIP)
    mean_plane = plane_of(mean_ptr, mean_strides, image, channel, STRIP)
    variance_plane = plane_of(variance_ptr, mean_strides, image, channel, STRIP)

    zero = tl.zeros((LANES,), dtype)
    means = repeated(zero, (SIZE - 1) * COLUMNS)
    variances = repeated(zero, (SIZE - 1) * COLUMNS)
    rows = tl.minimum(ROWS, out_height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        row = source_row(first_row + i + SHIFT, height, PADDING)
        limit = row_limit(row, height, width)
        if COLUMNS == 1:
            row_mean, row_variance = streamed_row_moments(
                x_plane, row, chunk + SHIFT, limit, window, dtype, WINDOW, STRIP
            )
        else:
            values = load_values(
                x_plane, row, chunk, limit, dtype, STRIP, SHIFT, COLUMNS + SIZE - 1, PADDING
            )
            row_mean, row_variance = row_moments(values, WEIGHTS, SIZE, COLUMNS)
        centres, shifts, variance, means, variances = column_moments(
            row_mean, row_variance, means, variances, WEIGHTS, SIZE, COLUMNS
        )
        mean = ()
        for v in tl.static_range(COLUMNS):
            mean = mean + (centres[v] + shifts[v],)

        out_row = first_row + i - (SIZE - 1)
        out_limit = tl.where(i >= SIZE - 1, out_width, 0)
        store_columns(mean_plane, out_row, chunk, out_limit, mean, STRIP)
        store_columns(variance_plane, out_row, chunk, out_limit, variance, STRIP)


@triton.jit
def _adjoint_row(
    grad_mean, grad_variance, mean, WEIGHTS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """(m, constant, slope): sum_j w_j (g_j + 2 v_j (x - m_j)) = constant + slope (x - m)."""
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
    return references, constants, slopes


@triton.jit
def _streamed_adjoint_row(
    grad_mean_plane, grad_variance_plane, mean_plane, row, chunk, limit, width, window,
    dtype: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """_adjoint_row for one column per lane, from the outermost taps inwards."""
    RADIUS: tl.constexpr = WINDOW.size // 2
    middle = chunk + (SHIFT + RADIUS)
    reference = load_column(mean_plane, row, middle, limit, dtype, STRIP, "zeros")
    constant = tl.zeros_like(reference)
    slope = tl.zeros_like(reference)
    excess = tl.zeros_like(reference)
    tail = tl.full((), 0.0, dtype)
    for step in tl.range(0, window):
        # RADIUS, -RADIUS, RADIUS - 1, -(RADIUS - 1), ..., 0
        distance = RADIUS - step // 2
        tap = distance - 2 * distance * (step % 2)
        weight = gaussian_weight(distance, dtype, WINDOW)
        tail += tl.where(tap >= 0, weight, 0.0)
        weight = folded_weight(chunk, tap, width, weight, tail, dtype, WINDOW)
        column = middle + tap
        grad_mean = load_column(grad_mean_plane, row, column, limit, dtype, STRIP, "zeros")
        grad_variance = load_column(grad_variance_plane, row, column, limit, dtype, STRIP, "zeros")
        mean = load_column(mean_plane, row, column, limit, dtype, STRIP, "zeros")
        constant += grad_mean * weight
        slope += grad_variance * weight
        excess += grad_variance * weight * (reference - mean)
    return (reference,), (constant + 2.0 * excess,), (2.0 * slope,)


@triton.jit
def _adjoint_column(
    row_constant, row_slope, steps, constants, slopes, out_row, height, dtype: tl.constexpr,
    TAILS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(constant, slope, constants, slopes): the vertical part of the adjoint, as filtered_column.

    All unfinished sums are about the newest row's mean; ``steps`` is how far that has just moved.
    """
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    FOLDED: tl.constexpr = WINDOW.padding == "reflect" or WINDOW.padding == "replicate"
    zero = tl.zeros_like(row_constant[0])
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
                slope = slopes[j * COLUMNS + v]
                constant = constants[j * COLUMNS + v] + slope * steps[v]
            if FOLDED:
                constant += row_constant[v] * weight
                slope += row_slope[v] * weight
            else:
                constant = plus(constant, row_constant[v], WEIGHTS[SIZE - 1 - j])
                slope = plus(slope, row_slope[v], WEIGHTS[SIZE - 1 - j])
            new_constants = new_constants + (constant,)
            new_slopes = new_slopes + (slope,)
    constants = without_oldest(new_constants, SIZE, COLUMNS)
    slopes = without_oldest(new_slopes, SIZE, COLUMNS)
    return new_constants, new_slopes, constants, slopes


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
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = STRIP.rows
    UNROLL: tl.constexpr = STRIP.unroll
    WEIGHTS: tl.constexpr = WINDOW.weights
    COUNT: tl.constexpr = COLUMNS + SIZE - 1
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    grad_mean_plane = plane_of(grad_mean_ptr, grad_mean_strides, image, channel, STRIP)
    grad_variance_plane = plane_of(grad_variance_ptr, grad_variance_strides, image, channel, STRIP)
    mean_plane = plane_of(mean_ptr, mean_strides, image, channel, STRIP)
    x_plane = plane_of(x_ptr, x_strides, image, channel, STRIP)
    grad_x_plane = plane_of(grad_x_ptr, grad_x_strides, image, channel, STRIP)

    zero = tl.zeros((LANES,), dtype)
    references = repeated(zero, COLUMNS)
    constants = repeated(zero, (SIZE - 1) * COLUMNS)
    slopes = repeated(zero, (SIZE - 1) * COLUMNS)
    rows = tl.minimum(ROWS, height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        row = first_row + i + SHIFT
        limit = row_limit(row, out_height, out_width)
        if COLUMNS == 1:
            row_mean, row_constant, row_slope = _streamed_adjoint_row(
                grad_mean_plane, grad_variance_plane, mean_plane, row, chunk, limit, width, window,
                dtype, WINDOW, SHIFT, STRIP,
            )  # fmt: skip
        else:
            row_mean, row_constant, row_slope = _adjoint_row(
                load_values(grad_mean_plane, row, chunk, limit, dtype, STRIP, SHIFT, COUNT,
                "zeros"), load_values(
                    grad_variance_plane, row, chunk, limit, dtype, STRIP, SHIFT, COUNT, "zeros"
                ),
                load_values(mean_plane, row, chunk, limit, dtype, STRIP, SHIFT, COUNT, "zeros"),
                WEIGHTS, SIZE, COLUMNS,
            )  # fmt: skip

        # Rows outside the image do not move what the sums are about. Taken anew, not as the old one
        # plus the step: in that a NaN would stay for all rows below.
        steps = ()
        moved = ()
        for v in tl.static_range(COLUMNS):
            reference = tl.where(limit > 0, row_mean[v], references[v])
            steps = steps + (reference - references[v],)
            moved = moved + (reference,)
        references = moved
        out_row = first_row + i - (SIZE - 1)
        constant, slope, constants, slopes = _adjoint_column(
            row_constant, row_slope, steps, constants, slopes, out_row, height, dtype, TAILS,
            WINDOW, COLUMNS,
        )  # fmt: skip

        out_limit = tl.where(i >= SIZE - 1, width, 0)
        x = load_values(x_plane, out_row, chunk, out_limit, dtype, STRIP, 0, COLUMNS, "zeros")
        gradient = ()
        for v in tl.static_range(COLUMNS):
            gradient = gradient + (constant[v] + slope[v] * (x[v] - references[v]),)
        store_columns(grad_x_plane, out_row, chunk, out_limit, gradient, STRIP)


# --- launchers ------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The options, as they pass through the operator."""

    window_size: int
    sigma: float
    padding: str


class Results(NamedTuple):
    """Both maps of a forward pass, [N, C, H, W]."""

    mean: torch.Tensor
    variance: torch.Tensor


def _empty_statistics(x: torch.Tensor, options: Options) -> Results:
    """Two maps in the layout of x."""
    lost = options.window_size - 1 if options.padding == "valid" else 0
    shape = (*x.shape[:2], x.size(2) - lost, x.size(3) - lost)
    layout = torch.channels_last if channels_in_lanes(x) else torch.contiguous_format
    dtype = compute_dtype(x.dtype)
    mean = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    variance = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    return Results(mean, variance)


def _forward_heuristic(window_size: int) -> Configuration:
    columns = 4 if window_size <= 11 else 1
    return strip_heuristic(columns, UNROLL=2 if window_size <= 7 else 1)


def _backward_heuristic(window_size: int) -> Configuration:
    # With window 11 four columns spill in channels_last.
    return strip_heuristic(4 if window_size <= 9 else 2 if window_size <= 11 else 1)


def _gaussian_statistics_forward(x: torch.Tensor, options: Options) -> Results:
    window_size, sigma, padding = options
    mean, variance = _empty_statistics(x, options)
    configuration = strip_configuration(
        "gaussian_statistics_forward", x, window_size, _forward_heuristic(window_size)
    )
    grid, launch = strip_launch(mean.shape, configuration, padding, x, mean)
    with device_guard(x):
        launch_kernel(
            _gaussian_statistics_forward_kernel,
            grid,
            x_ptr=x,
            mean_ptr=mean,
            variance_ptr=variance,
            x_strides=strides(x, launch["STRIP"]),
            mean_strides=strides(mean, launch["STRIP"]),
            height=x.size(2),
            width=x.size(3),
            out_height=mean.size(2),
            out_width=mean.size(3),
            window=window_size,
            WINDOW=window_of(window_size, sigma, padding),
            SHIFT=0 if padding == "valid" else -(window_size // 2),
            **launch,
        )
    return Results(mean, variance)


def _gaussian_statistics_backward(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    window_size, sigma, padding = options
    grad_x = torch.empty_like(x)
    configuration = strip_configuration(
        "gaussian_statistics_backward", x, window_size, _backward_heuristic(window_size)
    )
    if padding in ("reflect", "replicate"):
        configuration["COLUMNS"] = 1  # only the streamed row folds the images outside back in
    grid, launch = strip_launch(
        x.shape, configuration, padding, x, mean, grad_mean, grad_variance, grad_x
    )
    window = window_of(window_size, sigma, padding)
    with device_guard(x):
        launch_kernel(
            _gaussian_statistics_backward_kernel,
            grid,
            grad_mean_ptr=grad_mean,
            grad_variance_ptr=grad_variance,
            mean_ptr=mean,
            x_ptr=x,
            grad_x_ptr=grad_x,
            grad_mean_strides=strides(grad_mean, launch["STRIP"]),
            grad_variance_strides=strides(grad_variance, launch["STRIP"]),
            mean_strides=strides(mean, launch["STRIP"]),
            x_strides=strides(x, launch["STRIP"]),
            grad_x_strides=strides(grad_x, launch["STRIP"]),
            height=x.size(2),
            width=x.size(3),
            out_height=mean.size(2),
            out_width=mean.size(3),
            window=window_size,
            WINDOW=window,
            TAILS=_tails(window),
            SHIFT=-(window_size - 1) if padding == "valid" else -(window_size // 2),
            **launch,
        )
    return grad_x


def _tails(window: Window) -> tuple[float, ...]:
    """For each tap the sum of the weights from its distance outwards: what an edge pixel is for."""
    middle = window.size // 2
    outwards = [sum(window.weights[middle + distance :]) for distance in range(middle + 1)]
    return tuple(outwards[abs(tap - middle)] for tap in range(window.size))


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    passes = (
        ("gaussian_statistics_forward", _tuning_forward, _forward_heuristic),
        ("gaussian_statistics_backward", _tuning_backward, _backward_heuristic),
    )
    return [
        TuningCase(
            operator,
            19,
            window_size,
            dtype,
            "contiguous",
            functools.partial(run, window_size, dtype, (2, 19, 512, 1024), "contiguous"),
            strip_candidates(heuristic(window_size)),
            sized=functools.partial(run, window_size, dtype),
        )
        for window_size in (3, 7, 11, 5, 9)
        for dtype in (torch.float32, torch.bfloat16)
        for operator, run, heuristic in passes
    ]


def _tuning_forward(
    window_size: int, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    return lambda: _gaussian_statistics_forward(x, Options(window_size, 1.5, "zeros"))


def _tuning_backward(
    window_size: int, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    options = Options(window_size, 1.5, "zeros")
    mean, variance = _gaussian_statistics_forward(x, options)
    return lambda: _gaussian_statistics_backward(mean, variance, x, mean, options)


# --- operator -------------------------------------------------------------------------------------

STATISTICS = Operator(
    "gaussian_statistics",
    forward=_gaussian_statistics_forward,
    backward=_gaussian_statistics_backward,
    allocate=_empty_statistics,
    results=Results,
    options=Options,
    returned=2,
)


# --- function -------------------------------------------------------------------------------------


def gaussian_statistics(
    x: torch.Tensor, window_size: int = 3, sigma: float = 1.5, padding: str = "zeros"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every pixel's neighbourhood under a Gaussian window.

    mean = sum_i w_i x_i and variance = sum_i w_i (x_i - mean)^2 with the separable weights
    w_i ~ exp(-|i|^2 / (2 sigma^2)) of a window_size x window_size window, summing to 1. The
    variance is computed about the window's centre value: never negative, and without the
    cancellation of E[x^2] - E[x]^2, which gives flat maps a standard deviation of up to 5e-4.
    First-order differentiable through both outputs.

    A value that is not finite makes mean and variance of every window that holds it not finite,
    and the gradient of every pixel of its channel that shares a window with it.

    Args:
        x: maps [N, C, H, W], float16, bfloat16, float32 (or float64), any strides; each channel of
            each image is a map of its own.
        window_size: side of the window in pixels, odd, 1 to 31. Default 3.
        sigma: standard deviation of the window in pixels, 0.001 to 1e6. Default 1.5.
        padding: "zeros", "reflect" (without the edge pixel; needs H and W > window_size // 2),
            "replicate", or "valid": only windows that lie inside the image. Default "zeros".

    Returns:
        (mean, variance), both float32 (float64 for float64 input) [N, C, H, W], or
        [N, C, H - window_size + 1, W - window_size + 1] for "valid".

    Raises:
        TypeError: x is no floating-point tensor, or an option has the wrong type.
        ValueError: x is not four-dimensional or too small for the padding, window_size is even or
            out of range, sigma is out of range, or padding is unknown.

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 14 and 15.

    Example:
        >>> import torch, tritonloss
        >>> mean, variance = tritonloss.gaussian_statistics(torch.rand(2, 3, 32, 32), window_size=7)
        >>> mean.shape, bool((variance >= 0).all())
        (torch.Size([2, 3, 32, 32]), True)
    """
    checks.check_logits(x, "x")
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_option("padding", padding, PADDINGS)
    checks.check_padding_fits(x, window_size, padding, "x")
    if serves_triton(x):
        mean, variance = STATISTICS(x, options=Options(int(window_size), float(sigma), padding))
        return mean, variance
    return gaussian_statistics_reference(x, window_size, sigma, padding)
