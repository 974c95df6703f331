"""Window arithmetic: what a program of a strip does with the rows that it has read.

The variance is not computed as E[x^2] - E[x]^2, which loses all digits on flat maps. It is built in
two levels from deviations that are exactly zero there:

    row level:     d_j = x[r, c+j] - x[r, c]            h = sum_j w_j d_j
                   row_mean = x[r, c] + h               row_variance = sum_j w_j d_j^2 - h^2
    column level:  D_i = row_mean[r+i] - row_mean[r]    s = sum_i w_i D_i
                   mean = row_mean + s      variance = sum_i w_i (row_variance[r+i] + D_i^2) - s^2
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels_reference.gaussian_window import gaussian_window

from .math import plus
from .strips import load_column

PADDINGS = ("zeros", "reflect", "replicate", "valid")


class Window(NamedTuple):
    """A Gaussian window; known when a kernel is compiled."""

    size: int
    weights: tuple[float, ...]
    exponent: float  # the weight at distance d is the centre's times 2^(exponent d^2)
    padding: str


class Moments(NamedTuple):
    """Mean and variance along a row, a tensor per column; or what is kept of the rows before.

    What is kept of them is the means of WINDOW - 1 rows, and the unfinished vertical sums of the
    variances. For WINDOW = 3, the mean of the first row is kept as its difference from the second.
    """

    mean: Any
    variance: Any


class WindowMoments(NamedTuple):
    """Moments of a whole window, whose mean is centre + shift; centre: the middle row's mean."""

    centre: Any
    shift: Any
    variance: Any


# --- device functions: window arithmetic ----------------------------------------------------------


@triton.jit
def repeated(value, COUNT: tl.constexpr):
    """A tuple that holds the same tensor COUNT times: how a loop-carried history starts."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (value,)
    return result


@triton.jit
def without_oldest(history, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A history of LENGTH rows without its first."""
    result = ()
    for slot in tl.static_range(COLUMNS, LENGTH * COLUMNS):
        result = result + (history[slot],)
    return result


@triton.jit
def filtered_row(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """The weighted sums along a row, one per column: of all windows of WINDOW columns."""
    result = ()
    for v in tl.static_range(COLUMNS):
        total = values[v] * WEIGHTS[0]
        for j in tl.static_range(1, WINDOW):
            total = plus(total, values[v + j], WEIGHTS[j])
        result = result + (total,)
    return result


@triton.jit
def filtered_column(
    partials, row, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """(finished sums, unfinished sums): vertical weighted sums, of which ``row`` finishes one.

    Every row is added to all sums that it belongs to, one FMA each (a transposed filter). partials
    are the (WINDOW - 1) * COLUMNS unfinished sums, with those first that are finished next.
    """
    finished = ()
    unfinished = ()
    if WINDOW == 1:
        finished = row
    else:
        for v in tl.static_range(COLUMNS):
            finished = finished + (plus(partials[v], row[v], WEIGHTS[WINDOW - 1]),)
        for j in tl.static_range(WINDOW - 2):
            for v in tl.static_range(COLUMNS):
                before = partials[(j + 1) * COLUMNS + v]
                unfinished = unfinished + (plus(before, row[v], WEIGHTS[WINDOW - 2 - j]),)
        for v in tl.static_range(COLUMNS):
            unfinished = unfinished + (row[v] * WEIGHTS[0],)
    return finished, unfinished


@triton.jit
def row_moments(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """The moments of one row.

    The deviations d_j are taken from one value that all windows of a chunk hold. The smaller that
    value's weight in a window, the more digits of the variance cancel. Where a weight would be
    below 0.02, the deviations are taken from each window's own centre instead.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    SHIFT: tl.constexpr = COLUMNS // 2  # from the first window's centre to the value
    if WINDOW > 3 and RADIUS >= SHIFT and WEIGHTS[RADIUS - SHIFT] >= 0.02:
        centres, firsts, seconds = _sums_about_one(values, WEIGHTS, WINDOW, COLUMNS)
    else:
        centres, firsts, seconds = _sums_about_each(values, WEIGHTS, WINDOW, COLUMNS)
    row_mean = ()
    row_variance = ()
    for v in tl.static_range(COLUMNS):
        row_mean = row_mean + (centres[v] + firsts[v],)
        row_variance = row_variance + (seconds[v] - firsts[v] * firsts[v],)
    return Moments(mean=row_mean, variance=row_variance)


@triton.jit
def _sums_about_one(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """(values, sums w d, sums w d^2) for deviations d from one value for all columns."""
    ONE: tl.constexpr = WINDOW // 2 + COLUMNS // 2
    one = values[ONE]
    deviations = ()
    squares = ()
    for j in tl.static_range(COLUMNS + WINDOW - 1):
        deviation = values[j] - one
        deviations = deviations + (deviation,)
        squares = squares + (deviation * deviation,)
    firsts = ()
    seconds = ()
    for v in tl.static_range(COLUMNS):
        first = deviations[v] * WEIGHTS[0]
        second = squares[v] * WEIGHTS[0]
        for j in tl.static_range(1, WINDOW):
            if v + j != ONE:
                first = plus(first, deviations[v + j], WEIGHTS[j])
                second = plus(second, squares[v + j], WEIGHTS[j])
        firsts = firsts + (first,)
        seconds = seconds + (second,)
    return repeated(one, COLUMNS), firsts, seconds


@triton.jit
def _sums_about_each(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """(values, sums w d, sums w d^2) for deviations d from each window's centre value.

    The difference of two values is used in two windows: as the right tap of one, and as the left
    tap of the other.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    centres = ()
    firsts = ()
    seconds = ()
    for v in tl.static_range(COLUMNS):
        centres = centres + (values[v + RADIUS],)
        firsts = firsts + (tl.zeros_like(values[v]),)
        seconds = seconds + (tl.zeros_like(values[v]),)
    for distance in tl.static_range(1, RADIUS + 1):
        differences = ()
        squares = ()
        for j in tl.static_range(RADIUS - distance, RADIUS + COLUMNS):
            difference = values[j + distance] - values[j]
            differences = differences + (difference,)
            squares = squares + (difference * difference,)
        first_sums = ()
        second_sums = ()
        for v in tl.static_range(COLUMNS):
            first = differences[v + distance] - differences[v]
            second = squares[v + distance] + squares[v]
            first_sums = first_sums + (plus(firsts[v], first, WEIGHTS[RADIUS - distance]),)
            second_sums = second_sums + (plus(seconds[v], second, WEIGHTS[RADIUS - distance]),)
        firsts = first_sums
        seconds = second_sums
    return centres, firsts, seconds


@triton.jit
def gaussian_weight(distance, dtype: tl.constexpr, WINDOW: tl.constexpr):
    """The weight, along one axis, at a distance known at run time; 0 beyond the window."""
    WEIGHTS: tl.constexpr = WINDOW.weights
    EXPONENT: tl.constexpr = WINDOW.exponent
    RADIUS: tl.constexpr = WINDOW.size // 2
    squared = tl.full((), 0.0, dtype) + distance * distance
    return tl.where(squared <= RADIUS * RADIUS, tl.exp2(squared * EXPONENT) * WEIGHTS[RADIUS], 0.0)


@triton.jit
def folded_weight(position, tap, size, weight, tail, dtype: tl.constexpr, WINDOW: tl.constexpr):
    """Weight with which the window centred ``tap`` places after ``position`` sees that position.

    With reflect and replicate padding a window sees some pixels several times: at their own place,
    with ``weight``, and as their mirror images or copies outside the map. ``tail`` is the sum of
    the weights from |tap| outwards.
    """
    folded = weight + tl.zeros_like(position).to(dtype)
    if WINDOW.padding == "reflect":
        before = gaussian_weight(2 * position + tap, dtype, WINDOW)
        after = gaussian_weight(2 * (size - 1 - position) - tap, dtype, WINDOW)
        folded += tl.where(position > 0, before, 0.0) + tl.where(position < size - 1, after, 0.0)
    elif WINDOW.padding == "replicate":
        beyond = (tl.zeros_like(position).to(dtype) + tail) - weight
        folded += tl.where(position == 0, beyond, 0.0) + tl.where(position == size - 1, beyond, 0.0)
    return folded


@triton.jit
def streamed_row_moments(
    plane, row, first_column, window, WINDOW: tl.constexpr, STRIP: tl.constexpr
):
    """row_moments for one column per lane, tap by tap: wide windows do not fit the registers.

    ``window`` is the window's size as a run-time value, so that the compiler cannot unroll the
    loop.
    """
    PADDING: tl.constexpr = WINDOW.padding
    middle = first_column + WINDOW.size // 2
    centre = load_column(plane, row, middle, STRIP, PADDING)
    first = tl.zeros_like(centre)
    second = tl.zeros_like(centre)
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, centre.dtype, WINDOW)
        left = load_column(plane, row, middle - distance, STRIP, PADDING)
        right = load_column(plane, row, middle + distance, STRIP, PADDING)
        left -= centre
        right -= centre
        first += (left + right) * weight
        second += (left * left + right * right) * weight
    return Moments(mean=(centre + first,), variance=(second - first * first,))


@triton.jit
def column_moments(
    row, history, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """(moments of the window whose last row this is, history for the next row).

    The variance needs no clamp at 0. By Cauchy-Schwarz sum w D^2 - (sum w D)^2 is at least the
    centre's weight (1 / WINDOW or more) times sum w D^2, far above its rounding error.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    means = history.mean
    summed, variances = filtered_column(history.variance, row.variance, WEIGHTS, WINDOW, COLUMNS)
    centres = ()
    shifts = ()
    result = ()
    steps = ()
    for v in tl.static_range(COLUMNS):
        if WINDOW == 1:
            centre = row.mean[v]
            first = centre - centre  # 0, and NaN where the pixel is not finite
            second = summed[v]
        else:
            centre = means[RADIUS * COLUMNS + v]
            upper = means[v] if WINDOW == 3 else means[v] - centre
            lower = row.mean[v] - centre
            steps = steps + (centre - row.mean[v],)
            # Onto the row variances, since what is added is more than what is taken away later.
            first = (upper + lower) * WEIGHTS[0]
            second = plus(summed[v], upper * upper + lower * lower, WEIGHTS[0])
            for i in tl.static_range(1, RADIUS):
                upper = means[i * COLUMNS + v] - centre
                lower = means[(WINDOW - 1 - i) * COLUMNS + v] - centre
                first = plus(first, upper + lower, WEIGHTS[i])
                second = plus(second, upper * upper + lower * lower, WEIGHTS[i])
        centres = centres + (centre,)
        shifts = shifts + (first,)
        result = result + (second - first * first,)
    if WINDOW == 3:
        means = steps + row.mean
    else:
        means = without_oldest(means + row.mean, WINDOW, COLUMNS)
    moments = WindowMoments(centre=centres, shift=shifts, variance=result)
    return moments, Moments(mean=means, variance=variances)


# --- host -----------------------------------------------------------------------------------------


def window_of(size: int, sigma: float, padding: str) -> Window:
    """The compile-time description of a Gaussian window."""
    exponent = -0.5 / (sigma * sigma * math.log(2.0))  # exp(-d^2 / (2 sigma^2)) = 2^(exponent d^2)
    return Window(size, gaussian_window(size, sigma), exponent, padding)
