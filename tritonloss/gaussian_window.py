"""Local Gaussian-window statistics: mean and variance of every k x k neighbourhood.

The building block of the structural losses, public in its own right. How the kernels walk over an image,
and why the variance is exact on flat maps, is told in ``_strip.py``.

Bytes per pixel of a float32 map: forward 12 (x; mean, variance), backward 20 (x, mean, both gradients;
the gradient of x).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from kernels_reference.gaussian_window import gaussian_statistics as gaussian_statistics_reference
from kernels_reference.gaussian_window import gaussian_window

from . import _checks
from ._backend import device_guard, serves_triton
from ._strip import (
    PADDINGS,
    channels_in_lanes,
    column_moments,
    compute_dtype,
    converted,
    gaussian_exponent,
    gaussian_weight,
    grain,
    load_column,
    load_columns,
    repeated,
    row_limit,
    row_moments,
    size_arguments,
    source_row,
    store_columns,
    streamed_row_moments,
    strides,
    strip_configuration,
    strip_grid,
    strip_program,
)

# --- kernels ----------------------------------------------------------------------------------------


@triton.jit
def _adjoint_row(
    grad_mean,
    grad_variance,
    mean,
    WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(reference, constant, slope): sum_j w_j (g_j + 2 v_j (x - m_j)) = constant + slope (x - reference)."""
    references = ()
    constants = ()
    slopes = ()
    for v in tl.static_range(COLUMNS):
        reference = mean[v + WINDOW // 2]
        constant = grad_mean[v] * WEIGHTS[0]
        slope = grad_variance[v] * WEIGHTS[0]
        excess = slope * (reference - mean[v])
        for j in tl.static_range(1, WINDOW):
            weighted = grad_variance[v + j] * WEIGHTS[j]
            constant += grad_mean[v + j] * WEIGHTS[j]
            slope += weighted
            excess += weighted * (reference - mean[v + j])
        references = references + (reference,)
        constants = constants + (constant + 2.0 * excess,)
        slopes = slopes + (2.0 * slope,)
    return references, constants, slopes


@triton.jit
def _folded_weight(
    position,
    tap,
    size,
    weight,
    tail,
    dtype: tl.constexpr,
    PADDING: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Weight with which the window centred ``tap`` places after ``position`` sees that position.

    With reflect and replicate padding a window sees some pixels several times: at their own place, with
    ``weight``, and as their images outside. ``tail`` is the sum of the weights from |tap| outwards.
    """
    folded = weight + tl.zeros_like(position).to(dtype)
    if PADDING == "reflect":
        before = gaussian_weight(2 * position + tap, dtype, WEIGHTS, WINDOW, EXPONENT)
        after = gaussian_weight(2 * (size - 1 - position) - tap, dtype, WEIGHTS, WINDOW, EXPONENT)
        folded += tl.where(position > 0, before, 0.0) + tl.where(position < size - 1, after, 0.0)
    elif PADDING == "replicate":
        beyond = (tl.zeros_like(position).to(dtype) + tail) - weight
        folded += tl.where(position == 0, beyond, 0.0) + tl.where(position == size - 1, beyond, 0.0)
    return folded


@triton.jit
def _streamed_adjoint_row(
    grad_mean_row,
    grad_variance_row,
    mean_row,
    chunk,
    limit,
    width,
    grad_mean_stride_w,
    grad_variance_stride_w,
    mean_stride_w,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SHIFT: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
):
    """_adjoint_row for one column per lane, from the outermost taps inwards."""
    RADIUS: tl.constexpr = WINDOW // 2
    middle = chunk + (SHIFT + RADIUS)
    reference = load_column(mean_row, middle, limit, mean_stride_w, dtype, "zeros")
    constant = tl.zeros_like(reference)
    slope = tl.zeros_like(reference)
    excess = tl.zeros_like(reference)
    tail = tl.full((), 0.0, dtype)
    for step in tl.range(0, window):
        # RADIUS, -RADIUS, RADIUS - 1, -(RADIUS - 1), ..., 0
        distance = RADIUS - step // 2
        tap = distance - 2 * distance * (step % 2)
        weight = gaussian_weight(distance, dtype, WEIGHTS, WINDOW, EXPONENT)
        tail += tl.where(tap >= 0, weight, 0.0)
        weight = _folded_weight(
            chunk, tap, width, weight, tail, dtype, PADDING, WEIGHTS, WINDOW, EXPONENT
        )
        column = middle + tap
        grad_mean = load_column(grad_mean_row, column, limit, grad_mean_stride_w, dtype, "zeros")
        grad_variance = load_column(
            grad_variance_row, column, limit, grad_variance_stride_w, dtype, "zeros"
        )
        mean = load_column(mean_row, column, limit, mean_stride_w, dtype, "zeros")
        constant += grad_mean * weight
        slope += grad_variance * weight
        excess += grad_variance * weight * (reference - mean)
    return (reference,), (constant + 2.0 * excess,), (2.0 * slope,)


@triton.jit(do_not_specialize=size_arguments("x", "mean"))
def _gaussian_statistics_forward_kernel(
    x_ptr,  # [N, C, H, W]
    mean_ptr,  # [N, C, out_height, out_width]
    variance_ptr,  # strides of mean
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    mean_stride_n,
    mean_stride_c,
    mean_stride_h,
    mean_stride_w,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDING: tl.constexpr,
    GRAIN: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Reads x once, writes mean and variance once. Strides but the last are in units of GRAIN."""
    image, channel, chunk, first_lane, first_row = strip_program(
        channels, tiles_x, tiles_y, CHANNELS_IN_LANES, LANES, ROWS
    )
    x_base = x_ptr + (image * x_stride_n + channel * x_stride_c) * GRAIN
    mean_offset = (image * mean_stride_n + channel * mean_stride_c) * GRAIN
    VECTORISED: tl.constexpr = GRAIN == COLUMNS and GRAIN > 1
    COUNT: tl.constexpr = COLUMNS + WINDOW - 1

    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    zero = tl.zeros((LANES,), dtype)
    means = repeated(zero, (WINDOW - 1) * COLUMNS)
    variances = repeated(zero, (WINDOW - 1) * COLUMNS)
    rows = tl.minimum(ROWS, out_height - first_row) + (WINDOW - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        row = source_row(first_row + i + SHIFT, height, PADDING)
        row_ptr = x_base + row.to(tl.int64) * x_stride_h * GRAIN
        limit = row_limit(row, height, width)
        if COLUMNS == 1:
            row_mean, row_variance = streamed_row_moments(
                row_ptr,
                chunk,
                limit,
                x_stride_w,
                window,
                dtype,
                WEIGHTS,
                EXPONENT,
                SHIFT,
                WINDOW,
                PADDING,
            )
        else:
            loaded, _ = load_columns(
                row_ptr, chunk, limit, x_stride_w, SHIFT, COUNT, PADDING, LANES, COLUMNS, VECTORISED
            )
            values = converted(loaded, dtype, COUNT)
            row_mean, row_variance = row_moments(values, WEIGHTS, WINDOW, COLUMNS)
        centres, shifts, variance, means, variances = column_moments(
            row_mean, row_variance, means, variances, WEIGHTS, WINDOW, COLUMNS
        )
        mean = ()
        for v in tl.static_range(COLUMNS):
            mean = mean + (centres[v] + shifts[v],)

        out_row = first_row + i - (WINDOW - 1)
        out_limit = tl.where(i >= WINDOW - 1, out_width, 0)
        offset = mean_offset + out_row.to(tl.int64) * mean_stride_h * GRAIN
        store_columns(
            mean_ptr + offset, chunk, out_limit, mean_stride_w, mean, LANES, COLUMNS, VECTORISED
        )
        store_columns(
            variance_ptr + offset,
            chunk,
            out_limit,
            mean_stride_w,
            variance,
            LANES,
            COLUMNS,
            VECTORISED,
        )


@triton.jit(do_not_specialize=size_arguments("x", "mean", "grad_mean", "grad_variance", "grad_x"))
def _gaussian_statistics_backward_kernel(
    grad_mean_ptr,  # [N, C, out_height, out_width]
    grad_variance_ptr,
    mean_ptr,
    x_ptr,  # [N, C, H, W]
    grad_x_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    grad_mean_stride_n,
    grad_mean_stride_c,
    grad_mean_stride_h,
    grad_mean_stride_w,
    grad_variance_stride_n,
    grad_variance_stride_c,
    grad_variance_stride_h,
    grad_variance_stride_w,
    mean_stride_n,
    mean_stride_c,
    mean_stride_h,
    mean_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    grad_x_stride_n,
    grad_x_stride_c,
    grad_x_stride_h,
    grad_x_stride_w,
    WEIGHTS: tl.constexpr,
    TAILS: tl.constexpr,
    EXPONENT: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDING: tl.constexpr,
    GRAIN: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_x_j = sum_i w_ij (grad_mean_i + 2 grad_variance_i (x_j - mean_i)), the window's adjoint.

    x_j - mean_i is taken in two steps over a nearby mean, never as a difference of two large sums, so
    that flat maps keep their digits in the gradient too.
    """
    image, channel, chunk, first_lane, first_row = strip_program(
        channels, tiles_x, tiles_y, CHANNELS_IN_LANES, LANES, ROWS
    )
    grad_mean_base = (
        grad_mean_ptr + (image * grad_mean_stride_n + channel * grad_mean_stride_c) * GRAIN
    )
    grad_variance_base = (
        grad_variance_ptr
        + (image * grad_variance_stride_n + channel * grad_variance_stride_c) * GRAIN
    )
    mean_base = mean_ptr + (image * mean_stride_n + channel * mean_stride_c) * GRAIN
    x_base = x_ptr + (image * x_stride_n + channel * x_stride_c) * GRAIN
    grad_x_base = grad_x_ptr + (image * grad_x_stride_n + channel * grad_x_stride_c) * GRAIN
    VECTORISED: tl.constexpr = GRAIN == COLUMNS and GRAIN > 1
    COUNT: tl.constexpr = COLUMNS + WINDOW - 1
    RADIUS: tl.constexpr = WINDOW // 2
    FOLDED: tl.constexpr = PADDING == "reflect" or PADDING == "replicate"
    dtype: tl.constexpr = mean_ptr.dtype.element_ty

    zero = tl.zeros((LANES,), dtype)
    references = repeated(zero, COLUMNS)
    constants = repeated(zero, (WINDOW - 1) * COLUMNS)
    slopes = repeated(zero, (WINDOW - 1) * COLUMNS)
    for i in tl.range(0, tl.minimum(ROWS, height - first_row) + (WINDOW - 1)):
        # One row of windows: sum_i w_i (g_i + 2 v_i (x - m_i)) = constant + slope (x - reference).
        row = first_row + i + SHIFT
        wide_row = row.to(tl.int64) * GRAIN
        limit = row_limit(row, out_height, out_width)
        grad_mean_row = grad_mean_base + wide_row * grad_mean_stride_h
        grad_variance_row = grad_variance_base + wide_row * grad_variance_stride_h
        mean_row = mean_base + wide_row * mean_stride_h
        if COLUMNS == 1:
            row_mean, row_constant, row_slope = _streamed_adjoint_row(
                grad_mean_row, grad_variance_row, mean_row, chunk, limit, width, grad_mean_stride_w,
                grad_variance_stride_w, mean_stride_w, window, dtype, WEIGHTS, EXPONENT, SHIFT, WINDOW,
                PADDING,
            )  # fmt: skip
        else:
            loaded, _ = load_columns(
                grad_mean_row, chunk, limit, grad_mean_stride_w, SHIFT, COUNT, "zeros",
                LANES, COLUMNS, VECTORISED,
            )  # fmt: skip
            grad_means = converted(loaded, dtype, COUNT)
            loaded, _ = load_columns(
                grad_variance_row, chunk, limit, grad_variance_stride_w, SHIFT, COUNT, "zeros",
                LANES, COLUMNS, VECTORISED,
            )  # fmt: skip
            grad_variances = converted(loaded, dtype, COUNT)
            row_means, _ = load_columns(
                mean_row, chunk, limit, mean_stride_w, SHIFT, COUNT, "zeros",
                LANES, COLUMNS, VECTORISED,
            )  # fmt: skip
            row_mean, row_constant, row_slope = _adjoint_row(
                grad_means, grad_variances, row_means, WEIGHTS, WINDOW, COLUMNS
            )

        # Unfinished sums are kept about the newest row's mean; rows outside the image do not move it.
        out_row = first_row + i - (WINDOW - 1)
        steps = ()
        for v in tl.static_range(COLUMNS):
            steps = steps + (tl.where(limit > 0, row_mean[v] - references[v], 0.0),)
        references_here = ()
        for v in tl.static_range(COLUMNS):
            references_here = references_here + (references[v] + steps[v],)
        finished_constants = ()
        finished_slopes = ()
        unfinished_constants = ()
        unfinished_slopes = ()
        for j in tl.static_range(WINDOW):
            if FOLDED:
                row_weight = _folded_weight(
                    out_row + j, RADIUS - j, height, WEIGHTS[WINDOW - 1 - j], TAILS[WINDOW - 1 - j],
                    dtype, PADDING, WEIGHTS, WINDOW, EXPONENT,
                )  # fmt: skip
            for v in tl.static_range(COLUMNS):
                if FOLDED:
                    constant = row_constant[v] * row_weight
                    slope = row_slope[v] * row_weight
                else:
                    constant = row_constant[v] * WEIGHTS[WINDOW - 1 - j]
                    slope = row_slope[v] * WEIGHTS[WINDOW - 1 - j]
                if j < WINDOW - 1:
                    before = slopes[j * COLUMNS + v]
                    constant += constants[j * COLUMNS + v] + before * steps[v]
                    slope += before
                if j == 0:
                    finished_constants = finished_constants + (constant,)
                    finished_slopes = finished_slopes + (slope,)
                else:
                    unfinished_constants = unfinished_constants + (constant,)
                    unfinished_slopes = unfinished_slopes + (slope,)
        references = references_here
        constants = unfinished_constants
        slopes = unfinished_slopes

        out_limit = tl.where(i >= WINDOW - 1, width, 0)
        out_wide_row = out_row.to(tl.int64) * GRAIN
        loaded, _ = load_columns(
            x_base + out_wide_row * x_stride_h,
            chunk, out_limit, x_stride_w, 0, COLUMNS, "zeros", LANES, COLUMNS, VECTORISED,
        )  # fmt: skip
        x = converted(loaded, dtype, COLUMNS)
        gradient = ()
        for v in tl.static_range(COLUMNS):
            offset = x[v] - references[v]
            gradient = gradient + (finished_constants[v] + finished_slopes[v] * offset,)
        store_columns(
            grad_x_base + out_wide_row * grad_x_stride_h,
            chunk, out_limit, grad_x_stride_w, gradient, LANES, COLUMNS, VECTORISED,
        )  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------


def _statistics_shape(x: torch.Tensor, window_size: int, padding: str) -> tuple[int, ...]:
    lost = window_size - 1 if padding == "valid" else 0
    return (*x.shape[:2], x.size(2) - lost, x.size(3) - lost)


def _empty_statistics(
    x: torch.Tensor, window_size: int, padding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps in the layout of x."""
    shape = _statistics_shape(x, window_size, padding)
    layout = torch.channels_last if channels_in_lanes(x) else torch.contiguous_format
    dtype = compute_dtype(x.dtype)
    mean = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    variance = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    return mean, variance


def _gaussian_statistics_forward(
    x: torch.Tensor, window_size: int, sigma: float, padding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = _empty_statistics(x, window_size, padding)
    columns = 4 if window_size <= 7 else 2 if window_size <= 11 else 1
    configuration = strip_configuration(
        "gaussian_statistics_forward", x, window_size, columns, UNROLL=2 if window_size <= 7 else 1
    )
    programs, launch = strip_grid(mean.shape, configuration, channels_in_lanes(x))
    padded = padding in ("reflect", "replicate")
    unit = 1 if padded else grain(launch["COLUMNS"], x, mean)
    with device_guard(x):
        _gaussian_statistics_forward_kernel[(programs,)](
            x_ptr=x,
            mean_ptr=mean,
            variance_ptr=variance,
            height=x.size(2),
            width=x.size(3),
            out_height=mean.size(2),
            out_width=mean.size(3),
            **strides("x", x, unit),
            **strides("mean", mean, unit),
            window=window_size,
            WEIGHTS=gaussian_window(window_size, sigma),
            EXPONENT=gaussian_exponent(sigma),
            WINDOW=window_size,
            SHIFT=0 if padding == "valid" else -(window_size // 2),
            PADDING=padding,
            GRAIN=unit,
            UNROLL=configuration["UNROLL"],
            enable_fp_fusion=True,
            **launch,
        )
    return mean, variance


def _tails(weights: tuple[float, ...]) -> tuple[float, ...]:
    """For each tap the sum of the weights from its distance outwards: what an edge pixel stands for."""
    middle = len(weights) // 2
    outwards = [sum(weights[middle + distance :]) for distance in range(middle + 1)]
    return tuple(outwards[abs(tap - middle)] for tap in range(len(weights)))


def _gaussian_statistics_backward(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    window_size: int,
    sigma: float,
    padding: str,
) -> torch.Tensor:
    grad_x = torch.empty_like(x)
    folded = padding in ("reflect", "replicate")
    columns = 1 if folded or window_size > 11 else 4 if window_size <= 7 else 2
    configuration = strip_configuration("gaussian_statistics_backward", x, window_size, columns)
    programs, launch = strip_grid(x.shape, configuration, channels_in_lanes(x))
    unit = grain(launch["COLUMNS"], x, mean, grad_mean, grad_variance, grad_x)
    with device_guard(x):
        _gaussian_statistics_backward_kernel[(programs,)](
            grad_mean_ptr=grad_mean,
            grad_variance_ptr=grad_variance,
            mean_ptr=mean,
            x_ptr=x,
            grad_x_ptr=grad_x,
            height=x.size(2),
            width=x.size(3),
            out_height=mean.size(2),
            out_width=mean.size(3),
            **strides("grad_mean", grad_mean, unit),
            **strides("grad_variance", grad_variance, unit),
            **strides("mean", mean, unit),
            **strides("x", x, unit),
            **strides("grad_x", grad_x, unit),
            window=window_size,
            WEIGHTS=gaussian_window(window_size, sigma),
            TAILS=_tails(gaussian_window(window_size, sigma)),
            EXPONENT=gaussian_exponent(sigma),
            WINDOW=window_size,
            SHIFT=-(window_size - 1) if padding == "valid" else -(window_size // 2),
            PADDING=padding,
            GRAIN=unit,
            enable_fp_fusion=True,
            **launch,
        )
    return grad_x


# --- operator and gradient --------------------------------------------------------------------------


@torch.library.custom_op("tritonloss::gaussian_statistics_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor, window_size: int, sigma: float, padding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gaussian_statistics_forward(x, window_size, sigma, padding)


@_forward_op.register_fake
def _forward_fake(
    x: torch.Tensor, window_size: int, sigma: float, padding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_statistics(x, window_size, padding)


@torch.library.custom_op("tritonloss::gaussian_statistics_backward", mutates_args=())
def _backward_op(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    window_size: int,
    sigma: float,
    padding: str,
) -> torch.Tensor:
    return _gaussian_statistics_backward(
        grad_mean, grad_variance, x, mean, window_size, sigma, padding
    )


@_backward_op.register_fake
def _backward_fake(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    window_size: int,
    sigma: float,
    padding: str,
) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, *ctx.options = inputs
    mean, _ = output
    ctx.save_for_backward(x, mean)


def _gradient(ctx: Any, grad_mean: torch.Tensor, grad_variance: torch.Tensor) -> tuple[Any, ...]:
    x, mean = ctx.saved_tensors
    return _backward_op(grad_mean, grad_variance, x, mean, *ctx.options), None, None, None


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


# --- function ---------------------------------------------------------------------------------------


def gaussian_statistics(
    x: torch.Tensor, window_size: int = 3, sigma: float = 1.5, padding: str = "zeros"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every pixel's neighbourhood under a Gaussian window.

    mean = sum_i w_i x_i and variance = sum_i w_i (x_i - mean)^2 with the separable weights
    w_i ~ exp(-|i|^2 / (2 sigma^2)) of a window_size x window_size window, summing to 1. The variance is
    computed about the window's centre value: never negative, and without the cancellation of
    E[x^2] - E[x]^2, which gives flat maps a standard deviation of up to 5e-4. First-order differentiable
    through both outputs.

    Args:
        x: maps [N, C, H, W], float16, bfloat16, float32 (or float64), any strides; each channel of each
            image is a map of its own.
        window_size: side of the window in pixels, odd, 1 to 31. Default 3.
        sigma: standard deviation of the window in pixels, > 0. Default 1.5.
        padding: "zeros", "reflect" (without the edge pixel; needs H and W > window_size // 2),
            "replicate", or "valid": only windows that lie inside the image. Default "zeros".

    Returns:
        (mean, variance), both float32 (float64 for float64 input) [N, C, H, W], or
        [N, C, H - window_size + 1, W - window_size + 1] for "valid".

    Raises:
        TypeError: x is no floating-point tensor, or an option has the wrong type.
        ValueError: x is not four-dimensional or too small for the padding, window_size is even or out of
            range, sigma is not positive, or padding is unknown.

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 14 and 15.

    Example:
        >>> import torch, tritonloss
        >>> mean, variance = tritonloss.gaussian_statistics(torch.rand(2, 3, 32, 32), window_size=7)
        >>> mean.shape, bool((variance >= 0).all())
        (torch.Size([2, 3, 32, 32]), True)
    """
    _checks.check_logits(x, "x")
    _checks.check_window_size(window_size)
    _checks.check_range("sigma", sigma, 0.0, math.inf, interval="()")
    _checks.check_option("padding", padding, PADDINGS)
    _checks.check_padding_fits(x, window_size, padding, "x")
    if serves_triton(x):
        mean, variance = torch.ops.tritonloss.gaussian_statistics_forward(
            x, window_size, float(sigma), padding
        )
        return mean, variance
    return gaussian_statistics_reference(x, window_size, sigma, padding)
