"""Window moments of a pair of maps from plain sums about a pivot: four separable filters, no more.

The error of a variance E[q^2] - E[q]^2 is the rounding of E[q^2]. With q = x - pivot it is 0 where
the map is flat, at whatever level, and 1e-7 of the squared height at an edge. For a step of the
whole range that is 1e-4 of the default C2. It matters less than that, since a dissimilarity is
divided by the variances too. Smaller constants need the moments of ``ssim_moments.py``.

The second moments are those of d = x - y and of the product x y. With the covariance c of x and y
and the variance s_d of d, s_x + s_y = s_d + 2 c. Nothing cancels where the maps are nearly alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, label_of, sigmoid_base2
from .._engine.strip_windows import filtered_column, filtered_row, repeated
from .._engine.strips import (
    Row,
    row_limit,
    row_of,
    source_column,
    source_row,
    split_columns,
    widened,
    zeros,
)
from .ssim_moments import (
    Pair,
    PairMoments,
    empty_history,
    load_pair,
    next_moments,
)


class Sums(NamedTuple):
    """Sums of a row, or of whole windows, a tensor per column; or a strip's unfinished sums."""

    x: Any  # here and below, x and y stand for their differences from their pivots
    d: Any  # x - y
    product: Any  # x y
    square: Any  # d^2


# --- device functions: values about their pivot ---------------------------------------------------


@triton.jit
def pivoted(pair, program, rows, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """The pair and its pivot: the mean of four pixels down each chunk's first column, if finite.

    In a flat map the pivot is the map's level to the bit. With two levels it is often between them.
    """
    x = zeros(pair.x, STRIP)
    d = zeros(pair.x, STRIP)
    for sample in tl.static_range(4):
        number = tl.minimum(program.first_row + sample * rows // 4, pair.height - 1)
        row = Row(number=number, chunk=program.chunk, limit=pair.width)
        pixel = load_pair(pair, row, program.channel, SIMILARITY, STRIP, 0, 1, "zeros")
        x += pixel.x[0] * 0.25
        d += pixel.d[0] * 0.25
    finite = (x - x == 0.0) & (d - d == 0.0)
    return Pair(
        x=pair.x,
        y=pair.y,
        classes=pair.classes,
        height=pair.height,
        width=pair.width,
        window=pair.window,
        pivot_x=tl.where(finite, x, 0.0),
        pivot_y=tl.where(finite, x - d, 0.0),
    )


@triton.jit
def near_columns(
    plane, row, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
    PADDING: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """(values, inside) as load_columns, with OTHER where no column is, and one address per lane."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    row_ptr = row_of(plane, row.number, STRIP)
    values = ()
    inside = ()
    if STRIP.grain > 1:
        FIRST: tl.constexpr = SHIFT // COLUMNS
        SKIP: tl.constexpr = SHIFT - FIRST * COLUMNS
        CHUNKS: tl.constexpr = (SKIP + COUNT + COLUMNS - 1) // COLUMNS
        own = (row.chunk * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
        pointers = row_ptr + own
        limit = row.limit.to(tl.uint32)
        for j in tl.static_range(CHUNKS):
            exists = ((row.chunk + (FIRST + j)) * COLUMNS).to(tl.uint32) < limit
            mask = tl.broadcast_to(exists[:, None], (LANES, COLUMNS))
            block = tl.load(pointers + (FIRST + j) * COLUMNS, mask=mask, other=OTHER)
            loaded = split_columns(block, LANES, COLUMNS)
            for v in tl.static_range(COLUMNS):
                if j * COLUMNS + v >= SKIP and j * COLUMNS + v < SKIP + COUNT:
                    values = values + (loaded[v],)
                    inside = inside + (exists,)
    else:
        for j in tl.static_range(COUNT):
            source, exists = source_column(row.chunk * COLUMNS + (SHIFT + j), row.limit, PADDING)
            pointer = row_ptr + source * plane.column_stride
            values = values + (tl.load(pointer, mask=exists, other=OTHER),)
            inside = inside + (exists,)
    return values, inside


@triton.jit
def _near_labels(
    pair, row, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """(labels, inside): where there is no pixel, the label is none of the classes.

    Unless all values of 8 bits are classes: then only ``inside`` tells.
    """
    NO_CLASS: tl.constexpr = 255 if pair.y.pointer.dtype.element_ty == tl.uint8 else -1
    return near_columns(pair.y, row, STRIP, SHIFT, COUNT, "zeros", NO_CLASS)


@triton.jit
def _is_valid(label, inside, pair, SIMILARITY: tl.constexpr):
    """Whether a label that _near_labels has found is a class, and not ignored."""
    IGNORED: tl.constexpr = SIMILARITY.ignored
    if IGNORED < -1:  # one class: see sanitised_label
        valid = label < 2
        if IGNORED < -2:
            valid = valid & (label != -3 - IGNORED)
    else:
        valid = label < pair.classes
        if IGNORED >= 0:
            valid = valid & (label != IGNORED)
    if label.dtype != tl.uint8:
        valid = valid & (label >= 0)
    if SIMILARITY.crowded:
        valid = valid & inside
    return valid


@triton.jit
def valid_columns(pair, row, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """Whether each pixel of a chunk is valid: a tensor [lanes] per column."""
    COLUMNS: tl.constexpr = STRIP.columns
    labels, inside = _near_labels(pair, row, STRIP, 0, COLUMNS)
    valids = ()
    for v in tl.static_range(COLUMNS):
        valids = valids + (_is_valid(labels[v], inside[v], pair, SIMILARITY),)
    return valids


@triton.jit
def _pivoted_pair(
    pair, row, channel, SIMILARITY: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """(x, y), each less its pivot, of the columns that load_pair would load."""
    first, _ = near_columns(pair.x, row, STRIP, SHIFT, COUNT, PADDING, 0)
    xs = ()
    ys = ()
    if SIMILARITY.from_logits:
        labels, inside = _near_labels(pair, row, STRIP, SHIFT, COUNT)
        mine = label_of(channel, SIMILARITY.ignored)
        for j in tl.static_range(COUNT):
            x = sigmoid_base2(widened(first[j]) * LOG2_E) - pair.pivot_x
            valid = _is_valid(labels[j], inside[j], pair, SIMILARITY)
            own = labels[j] == mine
            if SIMILARITY.ignored != -1 or SIMILARITY.crowded:
                own = own & valid
            xs = xs + (tl.where(valid, x, 0.0 - pair.pivot_x),)
            ys = ys + (tl.where(own, 1.0 - pair.pivot_y, 0.0 - pair.pivot_y),)
    else:
        second, _ = near_columns(pair.y, row, STRIP, SHIFT, COUNT, PADDING, 0)
        for j in tl.static_range(COUNT):
            xs = xs + (widened(first[j]) - pair.pivot_x,)
            ys = ys + (widened(second[j]) - pair.pivot_y,)
    return xs, ys


# --- device functions: sums -----------------------------------------------------------------------


@triton.jit
def _filtered(values, history, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """(finished sums, history) of one moment, along the row and down the rows at once.

    It is called for one moment after the other: there are not enough registers for the row sums of
    all four.
    """
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    COLUMNS: tl.constexpr = STRIP.columns
    row = filtered_row(values, WEIGHTS, SIZE, COLUMNS)
    return filtered_column(history, row, WEIGHTS, SIZE, COLUMNS)


@triton.jit
def empty_sums(pair, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """What a strip carries before its first row."""
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    rows = repeated(zeros(pair.x, STRIP), ROWS)
    return Sums(x=rows, d=rows, product=rows, square=rows)


@triton.jit
def next_sums(
    i, history, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (moments of the windows that it completes, history)."""
    SIZE: tl.constexpr = WINDOW.size
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    number = source_row(program.first_row + i + SHIFT, pair.height, PADDING)
    limit = row_limit(number, pair.height, pair.width)
    row = Row(number=number, chunk=program.chunk, limit=limit)
    xs, ys = _pivoted_pair(
        pair, row, program.channel, SIMILARITY, STRIP, SHIFT, COLUMNS + SIZE - 1, PADDING
    )
    ds = ()
    products = ()
    squares = ()
    for j in tl.static_range(COLUMNS + SIZE - 1):
        ds = ds + (xs[j] - ys[j],)
        products = products + (xs[j] * ys[j],)
        squares = squares + (ds[j] * ds[j],)
    # the four sums of the windows, one after the other
    x, rest_x = _filtered(xs, history.x, WINDOW, STRIP)
    d, rest_d = _filtered(ds, history.d, WINDOW, STRIP)
    product, rest_product = _filtered(products, history.product, WINDOW, STRIP)
    square, rest_square = _filtered(squares, history.square, WINDOW, STRIP)

    # means and variances, from the sums about the pivots
    mean_x = ()
    mean_d = ()
    both = ()
    residual = ()
    for v in tl.static_range(COLUMNS):
        # Rounding may leave a variance below 0; a NaN stays NaN.
        variance_d = tl.maximum(square[v] - d[v] * d[v], 0.0, propagate_nan=tl.PropagateNan.ALL)
        covariance = product[v] - x[v] * (x[v] - d[v])
        mean_x = mean_x + (x[v] + pair.pivot_x,)
        mean_d = mean_d + (d[v] + (pair.pivot_x - pair.pivot_y),)
        both = both + (tl.maximum(variance_d + 2.0 * covariance, 0.0),)
        residual = residual + (variance_d,)
    moments = PairMoments(mean_x=mean_x, mean_d=mean_d, both=both, residual=residual)
    return moments, Sums(x=rest_x, d=rest_d, product=rest_product, square=rest_square)


# --- device functions: either way -----------------------------------------------------------------


@triton.jit
def begun(pair, program, rows, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """(pair, history) before the first row of a strip."""
    if SIMILARITY.careful:
        history = empty_history(pair, WINDOW, STRIP)
    else:
        pair = pivoted(pair, program, rows, SIMILARITY, STRIP)
        history = empty_sums(pair, WINDOW, STRIP)
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
        moments, history = next_sums(i, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
    return moments, history
