"""Window moments of a pair of maps from plain sums about a pivot: four separable filters, no more.

A variance E[q^2] - E[q]^2 is as wrong as the rounding of E[q^2], whose window sums err by 4e-7 at
the most and 1e-9 on average. That is 5e-4 q^2 of the default C2: nothing where q is next to 0, and
up to that share of a coefficient where it is not, in a window that is flat itself. No pivot is near
to both sides of an edge. So gradients near edges lose up to 6e-5 of the largest one, where moments
in two levels lose 1e-5, and small constants need those, of ``ssim_moments.py``.

Of images q is d = x - y, less a mean of each lane's. Nothing cancels where they are nearly alike:
with c the covariance of x and y, s_x + s_y = s_d + 2 c. The sums are those of x, d, x y and d^2.

Of the loss q is d, about 0, or x, about its middle: see ``pivots_of``. The sums are those of 2 y,
q, 2 y q and q^2. The variance of a label is E[y] (1 - E[y]); with c that of q and y, either s_d =
s_q and s_x = s_q + 2 c + s_y, or s_x = s_q and s_d = s_q - 2 c + s_y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._engine.math import plus
from .._engine.strip_windows import filtered_column, filtered_row, repeated, window_of
from .._engine.strips import widened, zeros
from .ssim_moments import Pair, PairMoments, empty_history, next_moments
from .ssim_values import leave_row, pivots_of, row_values

# In units of lighter outermost weights squares of large values would leave float32.
_LEAST_WEIGHT = 1e-3


class SumWindow(NamedTuple):
    """A ``Window``, and what its plain sums are weighted with, along rows and down them.

    An outermost weight of 1 takes one product less for each sum. So sums of x and d are ``unit``
    times what they would be, and those of products ``unit`` squared.
    """

    size: int
    weights: tuple[float, ...]
    exponent: float
    padding: str
    unit: float
    along: tuple[float, ...]
    down: tuple[float, ...]
    down_of_products: tuple[float, ...]
    rounded: float  # ``unit``, of weights that are rounded to float32


class Sums(NamedTuple):
    """Of whole windows: a tensor per column. Or the unfinished ones of a strip."""

    first: Any  # see RowValues
    d: Any
    product: Any  # first times other
    square: Any  # d^2


@triton.jit
def _empty_sums(pair, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """What a strip carries before its first row."""
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    rows = repeated(zeros(pair.x, STRIP), ROWS)
    return Sums(first=rows, d=rows, product=rows, square=rows)


@triton.jit
def _filtered(values, history, DOWN: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """(finished sums, history) of one moment, along the row and down the rows at once.

    It is called for one moment after the other: there are not enough registers for the row sums of
    all four.
    """
    SIZE: tl.constexpr = WINDOW.size
    ALONG: tl.constexpr = WINDOW.along
    COLUMNS: tl.constexpr = STRIP.columns
    row = filtered_row(values, ALONG, SIZE, COLUMNS)
    return filtered_column(history, row, DOWN, SIZE, COLUMNS)


@triton.jit
def _next_sums(
    i, history, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (sums of the windows that it completes, history)."""
    DOWN: tl.constexpr = WINDOW.down
    DOWN_OF_PRODUCTS: tl.constexpr = WINDOW.down_of_products
    COUNT: tl.constexpr = STRIP.columns + WINDOW.size - 1
    row = row_values(i, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
    products = ()
    squares = ()
    for j in tl.static_range(COUNT):
        products = products + (row.first[j] * row.other[j],)
        squares = squares + (row.d[j] * row.d[j],)
    first, rest_first = _filtered(row.first, history.first, DOWN, WINDOW, STRIP)
    d, rest_d = _filtered(row.d, history.d, DOWN, WINDOW, STRIP)
    product, rest = _filtered(products, history.product, DOWN_OF_PRODUCTS, WINDOW, STRIP)
    square, rest_square = _filtered(squares, history.square, DOWN_OF_PRODUCTS, WINDOW, STRIP)
    sums = Sums(first=first, d=d, product=product, square=square)
    return sums, Sums(first=rest_first, d=rest_d, product=rest, square=rest_square)


@triton.jit
def _moments_of(sums, pair, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """The moments of windows; variances in the square of the window's unit."""
    COLUMNS: tl.constexpr = STRIP.columns
    mean_x = ()
    mean_y = ()
    twice_y = ()
    mean_d = ()
    both = ()
    residual = ()
    for v in tl.static_range(COLUMNS):
        first = sums.first[v]
        d = sums.d[v]
        variance_d = sums.square[v] - d * d
        if SIMILARITY.from_logits:
            # Four times the variance of y, exactly 0 where y is 1 in the whole window; and twice
            # the covariance of q and y.
            spread = first * (2.0 * pair.ones - first)
            covariance = sums.product[v] - d * first
            twice = first * pair.one
            y = 0.5 * twice
            shift_d = (d * pair.one + pair.pivot_d) - (0.5 - pair.share) * twice
            x = shift_d + y
            variance_d += (1.0 - 2.0 * pair.share) * (0.25 * spread - covariance)
            variances = (variance_d + covariance) + pair.share * spread
        else:
            shift_d = d * pair.one + pair.pivot_d
            x = first * pair.one + pair.pivot_x
            y = x - shift_d
            twice = 2.0 * y
            covariance = sums.product[v] - first * (first - d)
            # Of large values rounding may leave a variance far below 0. NaN stays NaN.
            variance_d = tl.maximum(variance_d, 0.0, propagate_nan=tl.PropagateNan.ALL)
            variances = tl.maximum(variance_d + 2.0 * covariance, 0.0)
        mean_x = mean_x + (x,)
        mean_y = mean_y + (y,)
        twice_y = twice_y + (twice,)
        mean_d = mean_d + (shift_d,)
        both = both + (variances,)
        residual = residual + (variance_d,)
    return PairMoments(
        mean_x=mean_x, mean_y=mean_y, twice_y=twice_y, mean_d=mean_d, both=both, residual=residual
    )


@triton.jit
def _ones_of(pair, WINDOW: tl.constexpr):
    """The sum of a window that is 1 everywhere, taken as all sums are; compilers know it."""
    SIZE: tl.constexpr = WINDOW.size
    ALONG: tl.constexpr = WINDOW.along
    DOWN: tl.constexpr = WINDOW.down
    one = widened(tl.full((), 1.0, tl.float32).to(pair.x.pointer.dtype.element_ty))
    row = one * ALONG[0]
    for j in tl.static_range(1, SIZE):
        row = plus(row, one, ALONG[j])
    ones = row * DOWN[0]
    for j in tl.static_range(1, SIZE):
        ones = plus(ones, row, DOWN[j])
    return ones


# --- device functions: either way -----------------------------------------------------------------


@triton.jit
def begun(
    pair, program, rows, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """(pair, history) before the first row of a strip."""
    if SIMILARITY.careful:
        history = empty_history(pair, WINDOW, STRIP)
    else:
        pivots = pivots_of(pair, program, rows, SIMILARITY, STRIP)
        ones = _ones_of(pair, WINDOW)
        pair = Pair(
            x=pair.x, y=pair.y, classes=pair.classes, height=pair.height, width=pair.width,
            window=pair.window, exchange_ptr=pair.exchange_ptr, pivot_x=pivots.x, pivot_d=pivots.d,
            share=pivots.share, ones=ones, one=1.0 / ones,
        )  # fmt: skip
        history = _empty_sums(pair, WINDOW, STRIP)
        if SIMILARITY.exchanged:
            first = tl.full((), 0, tl.int64)
            leave_row(first, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
    return pair, history


@triton.jit
def advanced(
    i, history, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (moments of the windows that it completes, history)."""
    if SIMILARITY.careful:
        moments, history = next_moments(i, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
    else:
        sums, history = _next_sums(i, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
        moments = _moments_of(sums, pair, SIMILARITY, STRIP)
    return moments, history


# --- host -----------------------------------------------------------------------------------------


def sum_window_of(size: int, sigma: float, padding: str) -> SumWindow:
    """The compile-time description of a Gaussian window."""
    window = window_of(size, sigma, padding)
    outermost = window.weights[0] if window.weights[0] > _LEAST_WEIGHT else 1.0
    along = tuple(weight / outermost for weight in window.weights)
    products = tuple(weight / outermost**3 for weight in window.weights)
    rounded = float(torch.tensor(along, dtype=torch.float32).double().sum()) ** 2
    return SumWindow(*window, outermost**-2, along, along, products, rounded)
