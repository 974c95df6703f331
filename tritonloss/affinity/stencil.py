"""Device functions of affinity fields: where pixels and their neighbours are, and their values.

A program has a lane for each of its columns, and a few rows that lie ``size`` apart: a pixel's
neighbours are in the rows and columns next to it in that grid. All of the grid is evaluated once
for every class and stays in registers, three rows of it at a time.

Logarithms are to base 2, and divergences are in units of log 2. Where a probability is above a half
its rest to 1 comes from the sum over the other classes: 1 - p would have lost its digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, log2_normal, log2_one_plus, negated, sanitised_label

_LOWEST = tl.constexpr(-2.0e38)
_LEAST = tl.constexpr(1e-4)  # that a probability, or its rest to 1, counts as
_LOG_LEAST = tl.constexpr(-13.287712379549449)
# log2(1 - p) = p (c0 + c1 p + ...) on [0, 1/2], relative error 1.5e-7 in float32.
_LOG2_REST = tl.constexpr(
    (
        -1.4426950216293335,
        -0.7213371992111206,
        -0.48142823576927185,
        -0.35029369592666626,
        -0.38896897435188293,
        0.29364463686943054,
        -1.8144339323043823,
        2.4465394020080566,
        -2.0790791511535645,
    )
)


class Stencil(NamedTuple):
    """What a kernel is compiled for."""

    lanes: int  # columns of a program
    rows: int  # of a program
    size: int  # how far neighbours are apart
    first: int  # place of the grid that is needed: 0, or 3 where the row above is not
    classes: int
    ignored: int  # the ignore label if it is a class, else -1
    triple: bool  # whether the pixel opposite to the neighbour has to be valid, too
    side_by_side: bool  # whether neighbouring columns lie side by side in all maps
    double: bool  # whether the arithmetic is in float64


class Place(NamedTuple):
    """Where a program is."""

    image: Any
    row: Any  # the first of its rows
    column: Any  # [lanes]
    height: Any
    width: Any


class View(NamedTuple):
    """The grid of a program in a map [N, C, H, W]."""

    pointer: Any  # to the image, and in it to a class
    rows: Any  # a tuple of offsets, from the row above on
    columns: Any  # a tuple of offsets, [lanes] each
    stride: Any  # from class to class


class Field(NamedTuple):
    """What a program knows of its grid before it goes through the classes."""

    labels: Any  # int32, -1 where there is none; two rows and columns more on every side
    pairs: Any  # a tuple over rows: of every neighbour two bits, see ``pairs_of_row``
    edge: Any  # a tuple: the factor of a centre's edges
    other: Any  # a tuple: the factor of a centre's other entries
    margin: Any  # in units of log 2


class Statistics(NamedTuple):
    """Of the pixels of a grid, tuples."""

    largest: Any  # logit
    log_sum: Any  # log2 of the sum of 2^((z - largest) log2 e)
    log_rest: Any  # log2(1 - p) of the largest logit's class, where p is above a half


class Values(NamedTuple):
    """Of the pixels of a grid and one class, tuples: nothing is below what counts."""

    log_p: Any
    log_q: Any
    p: Any
    q: Any  # 1 - p
    raw: Any  # p, however small
    raw_log_q: Any


# --- places ---------------------------------------------------------------------------------------


@triton.jit
def place_of_program(height, width, row_blocks, column_blocks, STENCIL: tl.constexpr):
    """Where this program is: rows that are ``size`` apart, of one image."""
    ROWS: tl.constexpr = STENCIL.rows
    SIZE: tl.constexpr = STENCIL.size
    program = tl.program_id(0)
    block = program // column_blocks
    column = (program - block * column_blocks) * STENCIL.lanes + tl.arange(0, STENCIL.lanes)
    image = block // row_blocks
    block = block - image * row_blocks
    row = block // SIZE * (ROWS * SIZE) + block % SIZE
    return Place(image=image.to(tl.int64), row=row, column=column, height=height, width=width)


@triton.jit
def view_of(pointer, strides, place, STENCIL: tl.constexpr):
    """The rows from -1 to ``rows`` and the columns from -1 to 1 of a program's pixels."""
    SIZE: tl.constexpr = STENCIL.size
    rows = ()
    for r in tl.static_range(STENCIL.rows + 2):
        rows = rows + ((place.row + (r - 1) * SIZE).to(tl.int64) * strides[2],)
    columns = ()
    for c in tl.static_range(3):
        column = place.column + (c - 1) * SIZE
        if STENCIL.side_by_side:
            columns = columns + (column,)
        else:
            columns = columns + (column.to(tl.int64) * strides[3],)
    stride = tl.full((), 1, tl.int64) * strides[1]
    return View(
        pointer=pointer + place.image * strides[0], rows=rows, columns=columns, stride=stride
    )


@triton.jit
def is_inside(place, ROW: tl.constexpr, COLUMN: tl.constexpr, STENCIL: tl.constexpr):
    """[lanes], whether the image has the pixels so many steps away from a program's first row."""
    row = place.row + ROW * STENCIL.size
    column = place.column + COLUMN * STENCIL.size
    width = tl.where((row >= 0) & (row < place.height), place.width, 0)
    return (column >= 0) & (column < width)


# --- labels ---------------------------------------------------------------------------------------


@triton.jit
def labels_around(target_ptr, strides, place, STENCIL: tl.constexpr):
    """The labels of the rows from -2 to rows + 1 and of the columns from -2 to 2, one tuple."""
    start = target_ptr + place.image * strides[0]
    # A tensor, so that labels of eight bits are widened for the comparison with more classes.
    classes = tl.full((), STENCIL.classes, tl.int32)
    labels = ()
    for k in tl.static_range((STENCIL.rows + 4) * 5):
        label = _label(start, strides, place, classes, k // 5 - 2, k % 5 - 2, STENCIL)
        labels = labels + (label,)
    return labels


@triton.jit
def _label(
    start, strides, place, classes, ROW: tl.constexpr, COLUMN: tl.constexpr, STENCIL: tl.constexpr
):
    """The labels so many steps away; -1 where only opposite pixels are, if those do not count."""
    LANES: tl.constexpr = STENCIL.lanes
    IS_NEAR: tl.constexpr = ROW >= -1 and ROW <= STENCIL.rows and COLUMN >= -1 and COLUMN <= 1
    if IS_NEAR or STENCIL.triple:
        inside = is_inside(place, ROW, COLUMN, STENCIL)
        row = (place.row + ROW * STENCIL.size).to(tl.int64)
        column = (place.column + COLUMN * STENCIL.size).to(tl.int64)
        pointers = start + row * strides[1] + column * strides[2]
        loaded = tl.load(pointers, mask=inside, other=0)
        label = sanitised_label(loaded, inside, classes, STENCIL.ignored)
    else:
        label = tl.full((LANES,), -1, tl.int32)
    return label


@triton.jit
def label_at(labels, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """The labels so many steps away from a program's first row."""
    return labels[(ROW + 2) * 5 + COLUMN + 2]


@triton.jit
def is_pair(
    labels,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    STENCIL: tl.constexpr,
):
    """[lanes], whether a centre and its neighbour count."""
    # Where there is no label all bits are set.
    joined = label_at(labels, ROW, COLUMN) | label_at(labels, ROW + DOWN, COLUMN + RIGHT)
    if STENCIL.triple:
        joined = joined | label_at(labels, ROW - DOWN, COLUMN - RIGHT)
    return joined >= 0


@triton.jit
def pairs_of_row(labels, ROW: tl.constexpr, FIRST: tl.constexpr, STENCIL: tl.constexpr):
    """int32 [lanes]: bit 2 k whether a pixel and its neighbour k count, the next one the reverse.

    Neighbours are counted row by row, from FIRST on.
    """
    LANES: tl.constexpr = STENCIL.lanes
    bits = tl.zeros((LANES,), tl.int32)
    for k in tl.static_range(FIRST, 8):
        there = is_pair(labels, ROW, 0, (k + k // 4) // 3 - 1, (k + k // 4) % 3 - 1, STENCIL)
        back = is_pair(
            labels,
            ROW + (k + k // 4) // 3 - 1,
            (k + k // 4) % 3 - 1,
            1 - (k + k // 4) // 3,
            1 - (k + k // 4) % 3,
            STENCIL,
        )
        bits = bits | (there.to(tl.int32) << (2 * k)) | (back.to(tl.int32) << (2 * k + 1))
    return bits


@triton.jit
def factors_of(table_ptr, stride, scale, labels, STENCIL: tl.constexpr):
    """A factor for every pixel of the grid: the scale, times the table's entry of its label."""
    factors = ()
    for k in tl.static_range(3 * (STENCIL.rows + 2)):
        if table_ptr is None:
            factors = factors + (scale,)
        else:
            label = label_at(labels, k // 3 - 1, k % 3 - 1)
            nearest = tl.minimum(tl.maximum(label, 0), STENCIL.classes - 1)
            entry = tl.load(table_ptr + nearest.to(tl.int64) * stride).to(scale.dtype)
            factors = factors + (scale * entry,)
    return factors


# --- values ---------------------------------------------------------------------------------------


@triton.jit
def load_logits(view, labels, K: tl.constexpr, STENCIL: tl.constexpr):
    """The logits of a pixel of the grid; 0 where there is no label, whatever lies there."""
    pointers = view.pointer + view.rows[K // 3] + view.columns[K % 3]
    valid = label_at(labels, K // 3 - 1, K % 3 - 1) >= 0
    loaded = tl.load(pointers, mask=valid, other=0.0)
    return loaded.to(tl.float64 if STENCIL.double else tl.float32)


@triton.jit
def statistics_of(view, labels, classes, STENCIL: tl.constexpr):
    """The statistics of the grid's pixels."""
    FIRST: tl.constexpr = STENCIL.first
    LANES: tl.constexpr = STENCIL.lanes
    COUNT: tl.constexpr = 3 * (STENCIL.rows + 2) - FIRST
    dtype: tl.constexpr = tl.float64 if STENCIL.double else tl.float32
    largest = ()
    rest = ()  # the sum but for the largest logit
    for _ in tl.static_range(COUNT):
        largest = largest + (tl.full((LANES,), _LOWEST, dtype),)
        rest = rest + (tl.full((LANES,), -1.0, dtype),)
    pointer = view.pointer
    for _ in tl.range(0, classes):
        here = View(pointer=pointer, rows=view.rows, columns=view.columns, stride=view.stride)
        new_largest = ()
        new_rest = ()
        for k in tl.static_range(COUNT):
            z = load_logits(here, labels, FIRST + k, STENCIL)
            apart = z - largest[k]
            smaller = tl.exp2(tl.abs(apart) * -LOG2_E)  # of the two, over the larger; NaN of NaN
            new_largest = new_largest + (tl.maximum(largest[k], z),)
            new_rest = new_rest + (rest[k] * tl.where(apart > 0, smaller, 1.0) + smaller,)
        largest = new_largest
        rest = new_rest
        pointer += view.stride

    log_sums = ()
    log_rests = ()
    for k in tl.static_range(COUNT):
        # It is -1 still if no logit is above -inf.
        log_sum = tl.where(rest[k] >= 0, log2_one_plus(rest[k]), float("nan"))
        log_sums = log_sums + (log_sum,)
        # Of no rest it is -inf: the gradient of a class that has all is 0, and no tiny number.
        log_rest = tl.where(rest[k] == 0, float("-inf"), log2_normal(rest[k]) - log_sum)
        log_rests = log_rests + (log_rest,)
    return Statistics(largest=largest, log_sum=log_sums, log_rest=log_rests)


@triton.jit
def log_probability(z, statistics, K: tl.constexpr, STENCIL: tl.constexpr):
    """log2 of a class's probability at a pixel of the grid."""
    return tl.fma(
        z - statistics.largest[K - STENCIL.first],
        tl.full((), LOG2_E, z.dtype),
        negated(statistics.log_sum[K - STENCIL.first]),
    )


@triton.jit
def with_row(values, view, statistics, labels, ROW: tl.constexpr, STENCIL: tl.constexpr):
    """The values of a class, with those of the next row of the grid, which is number ROW."""
    log_p = values.log_p
    log_q = values.log_q
    p = values.p
    q = values.q
    raw = values.raw
    raw_log_q = values.raw_log_q
    for k in tl.static_range(3 * ROW, 3 * ROW + 3):
        z = load_logits(view, labels, k, STENCIL)
        log_here = log_probability(z, statistics, k, STENCIL)
        here = tl.exp2(log_here)
        log_rest = tl.where(here > 0.5, statistics.log_rest[k - STENCIL.first], _log2_rest(here))
        least = tl.full((), _LEAST, here.dtype)
        log_least = tl.full((), _LOG_LEAST, here.dtype)
        counted_log_q = tl.maximum(log_rest, log_least, propagate_nan=tl.PropagateNan.ALL)
        log_p = log_p + (tl.maximum(log_here, log_least),)
        log_q = log_q + (counted_log_q,)
        p = p + (tl.maximum(here, least, propagate_nan=tl.PropagateNan.ALL),)
        q = q + (tl.exp2(counted_log_q),)
        raw = raw + (here,)
        raw_log_q = raw_log_q + (log_rest,)
    return Values(log_p=log_p, log_q=log_q, p=p, q=q, raw=raw, raw_log_q=raw_log_q)


@triton.jit
def _log2_rest(p):
    """log2(1 - p) of p from 0 to a half: nine instructions, and no digit is lost."""
    if p.dtype == tl.float64:
        # 1 - p rounds p away; what is lost is put back.
        rest = 1.0 - p
        result = (tl.log(rest) + ((1.0 - rest) - p) / rest) * LOG2_E
    else:
        result = _LOG2_REST[8] * p + _LOG2_REST[7]
        for i in tl.static_range(7):
            result = result * p + _LOG2_REST[6 - i]
        result = result * p
    return result


@triton.jit
def divergences(values, I: tl.constexpr, J: tl.constexpr):  # noqa: E741
    """(of centre I and neighbour J, of centre J and neighbour I, log p_j / p_i, log q_j / q_i)."""
    a = values.log_p[J] - values.log_p[I]
    b = values.log_q[J] - values.log_q[I]
    there = values.p[J] * a + values.q[J] * b
    back = negated(values.p[I] * a + values.q[I] * b)
    return there, back, a, b


@triton.jit
def beyond(divergence, margin):
    """max(0, margin - divergence), and NaN of NaN."""
    return tl.where(divergence >= margin, 0.0, margin - divergence)


@triton.jit
def where_counted(values, K: tl.constexpr, through_p, through_q):
    """What passes through a probability, and through its rest, if they count as what they are."""
    log_least = tl.full((), _LOG_LEAST, values.raw[K].dtype)
    result = tl.where(values.raw[K] < tl.full((), _LEAST, values.raw[K].dtype), 0.0, through_p)
    return result + tl.where(values.raw_log_q[K] < log_least, 0.0, through_q)
