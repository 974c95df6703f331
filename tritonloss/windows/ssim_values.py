"""Values of a row about their pivot, as the plain sums of ``ssim_sums.py`` take them in.

A lane's windows reach into its neighbours' chunks: with four columns to a lane and a window of 11
each pixel is in the rows of 3.5 lanes. Of images all of them load it. A sigmoid and the comparisons
of a label take more than a load, so from a window of 7 on every lane evaluates its own pixels only
and leaves them in memory, where the others find them after a barrier: one for each row, since two
rows have places of their own and one is written while the other is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, label_of, negated, sigmoid_base2, sigmoids_base2
from .._engine.strips import (
    Row,
    Strip,
    below,
    counted,
    is_below,
    join_columns,
    load_columns,
    row_of,
    split_columns,
    widened,
    zeros,
)
from .ssim_moments import Values, load_pair, source_of

# Columns that are kept of either neighbour of a strip: whole chunks, and as many as a radius.
_BESIDE = tl.constexpr(8)
# Smaller windows read few pixels of their neighbours' more than once.
_LEAST_WINDOW = 7


class Pivots(NamedTuple):
    """What plain sums are taken about."""

    x: Any  # of the sums of x
    d: Any  # of those of d
    share: Any  # of 2 y in what is filtered as d: x - y if it is 0.5, x if it is 0


class RowValues(NamedTuple):
    """A tensor per column. x and d are less their pivots, and so is the y of images."""

    first: Any  # x of images, 2 y of the loss
    other: Any  # what it is multiplied with: y of images, d of the loss
    d: Any  # x - y of images, x - y or x of the loss


# --- device functions: pivots and labels ----------------------------------------------------------


@triton.jit
def pivots_of(pair, program, rows, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """What the sums of a pair are taken about, from samples down each chunk's first column.

    Of images the means of four pixels. Of the loss, while no x is far from the others, sums of x
    about their middle, whatever y is. Else of d about 0: it is small where a class is predicted
    well, and about another level it would lose its digits there. That is one choice for all lanes
    if they exchange their pixels; else each decides for itself, since one that is flat is not near
    to the others.
    """
    x = zeros(pair.x, STRIP)
    d = zeros(pair.x, STRIP)
    least = zeros(pair.x, STRIP) + 2.0
    most = zeros(pair.x, STRIP) - 1.0
    for sample in tl.static_range(4):
        number = tl.minimum(program.first_row + sample * rows // 4, pair.height - 1)
        number = counted(number, STRIP)
        row = Row(number=number, chunk=program.chunk, limit=pair.width)
        pixel = load_pair(pair, row, program.channel, SIMILARITY, STRIP, 0, 1, "zeros")
        x += pixel.x[0] * 0.25
        d += pixel.d[0] * 0.25
        least = tl.where(pixel.valid[0], tl.minimum(least, pixel.x[0]), least)
        most = tl.where(pixel.valid[0], tl.maximum(most, pixel.x[0]), most)
    if SIMILARITY.from_logits:
        if SIMILARITY.exchanged:
            least = tl.min(least)
            most = tl.max(most)
        is_near = most - least < 0.8
        d = zeros(pair.x, STRIP) + tl.where(is_near, 0.5 * (least + most), 0.0)
        x = d
        share = tl.where(is_near, 0.0, 0.5).to(x.dtype)
    else:
        share = 0.5
    finite = (x - x == 0.0) & (d - d == 0.0)
    return Pivots(x=tl.where(finite, x, 0.0), d=tl.where(finite, d, 0.0), share=share)


@triton.jit
def _no_class(pair):
    """A label that no class has, unless all values of 8 bits are classes."""
    NO_CLASS: tl.constexpr = 255 if pair.y.pointer.dtype.element_ty == tl.uint8 else -1
    return tl.full((), NO_CLASS, pair.y.pointer.dtype.element_ty)


@triton.jit
def _loaded(
    plane, row, SIMILARITY: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr, PADDING: tl.constexpr, OTHER: tl.constexpr = 0,
):  # fmt: skip
    """load_columns. Lanes that exchange pixels have no registers for pointers of their own."""
    if SIMILARITY.exchanged:
        plane = below(plane, row.number, STRIP)
        row = Row(number=tl.full((), 0, tl.int32), chunk=row.chunk, limit=row.limit)
    return load_columns(plane, row, STRIP, SHIFT, COUNT, PADDING, OTHER)


@triton.jit
def _labels(
    pair, row, SIMILARITY: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """(labels, inside): load_columns with a label that is no class where there is no pixel.

    Unless all values of 8 bits are classes: then ``inside`` has to be asked.
    """
    NO_CLASS: tl.constexpr = 255 if pair.y.pointer.dtype.element_ty == tl.uint8 else -1
    return _loaded(pair.y, row, SIMILARITY, STRIP, SHIFT, COUNT, "zeros", NO_CLASS)


@triton.jit
def _is_valid(label, inside, pair, SIMILARITY: tl.constexpr):
    """Whether a label that _labels has found is a class, and not ignored."""
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
    labels, inside = _labels(pair, row, SIMILARITY, STRIP, 0, COLUMNS)
    valids = ()
    for v in tl.static_range(COLUMNS):
        valids = valids + (_is_valid(labels[v], inside[v], pair, SIMILARITY),)
    return valids


@triton.jit
def slopes_of(pair, row, channel, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """What gradients of the loss need of the pixels of a row, to all digits of 1 - x.

    Values of x and d = x - y, and the sigmoid's slope in the place of 1 - x.
    """
    COLUMNS: tl.constexpr = STRIP.columns
    logits, _ = load_columns(pair.x, row, STRIP, 0, COLUMNS, "zeros", None)
    labels, inside = _labels(pair, row, SIMILARITY, STRIP, 0, COLUMNS)
    xs = ()
    ds = ()
    slopes = ()
    valids = ()
    for v in tl.static_range(COLUMNS):
        x, rest = sigmoids_base2(widened(logits[v]) * LOG2_E)
        own = labels[v] == label_of(channel, SIMILARITY.ignored)
        xs = xs + (x,)
        ds = ds + (tl.where(own, negated(rest), x),)
        slopes = slopes + (x * rest,)
        valids = valids + (_is_valid(labels[v], inside[v], pair, SIMILARITY),)
    return Values(x=xs, y=xs, d=ds, rest=slopes, valid=valids)


# --- device functions: values ---------------------------------------------------------------------


@triton.jit
def row_values(
    i, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The Values in all columns that a lane's windows see of row i of the strip."""
    COUNT: tl.constexpr = STRIP.columns + WINDOW.size - 1
    if SIMILARITY.exchanged:
        # Row i is there, and row i - 1 has been read. The next one comes first: meanwhile the
        # values of this one would take registers.
        tl.debug_barrier()
        leave_row(i + 1, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
        y = _found(i, pair, 0, STRIP, SHIFT, COUNT)
        d = _found(i, pair, 1, STRIP, SHIFT, COUNT)
        values = RowValues(first=y, other=d, d=d)
    else:
        row = source_of(i, pair, program, WINDOW, SHIFT)
        values = _columns(pair, row, program.channel, SIMILARITY, WINDOW, STRIP, SHIFT, COUNT)
    return values


@triton.jit
def leave_row(
    i, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Evaluate 2 y and d of row i and leave them to all lanes, for row_values."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    RADIUS: tl.constexpr = WINDOW.size // 2
    row = source_of(i, pair, program, WINDOW, SHIFT)
    own = _columns(pair, row, program.channel, SIMILARITY, WINDOW, STRIP, 0, COLUMNS)
    y_ptr = _exchanged_row(i, pair, 0, STRIP)
    d_ptr = _exchanged_row(i, pair, 1, STRIP)
    lane = tl.arange(0, LANES)
    places = (lane * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
    tl.store(y_ptr + places, join_columns(own.first, LANES, COLUMNS))
    tl.store(d_ptr + places, join_columns(own.d, LANES, COLUMNS))

    # One pixel beside the strip for each of the first lanes, as many as windows see.
    is_used = lane < 2 * RADIUS
    place = lane - RADIUS + tl.where(lane < RADIUS, 0, LANES * COLUMNS)
    column = program.first_column + place
    inside = is_below(column, tl.where(is_used, row.limit, 0))
    logit = tl.load(row_of(pair.x, row.number, STRIP) + column, mask=inside)
    label_ptr = row_of(pair.y, row.number, STRIP) + column
    label = tl.load(label_ptr, mask=inside, other=_no_class(pair))
    y, d = _pixel(logit, label, inside, pair, program.channel, SIMILARITY)
    tl.store(y_ptr + place, y, mask=is_used)
    tl.store(d_ptr + place, d, mask=is_used)


@triton.jit
def _found(
    i, pair, PART: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr
):
    """COUNT columns that have been left, from SHIFT columns after each chunk's first."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    FIRST: tl.constexpr = SHIFT // COLUMNS
    SKIP: tl.constexpr = SHIFT - FIRST * COLUMNS
    CHUNKS: tl.constexpr = (SKIP + COUNT + COLUMNS - 1) // COLUMNS
    own = (tl.arange(0, LANES) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    pointer = _exchanged_row(i, pair, PART, STRIP) + own  # [LANES, COLUMNS]
    values = ()
    for j in tl.static_range(CHUNKS):
        loaded = split_columns(tl.load(pointer + (FIRST + j) * COLUMNS), LANES, COLUMNS)
        for v in tl.static_range(COLUMNS):
            if j * COLUMNS + v >= SKIP and j * COLUMNS + v < SKIP + COUNT:
                values = values + (loaded[v],)
    return values


@triton.jit
def _exchanged_row(i, pair, PART: tl.constexpr, STRIP: tl.constexpr):
    """Pointer to where 2 y (part 0) or d (part 1) of row i is left, of the strip's first column."""
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns + 2 * _BESIDE
    return pair.exchange_ptr + (i % 2 * (2 * WIDTH) + (PART * WIDTH + _BESIDE))


@triton.jit
def exchange_of(pointer, number, STRIP: tl.constexpr):
    """Where a program's lanes leave their pixels; no two that run at a time may have a number."""
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns + 2 * _BESIDE
    return pointer + number.to(tl.int64) * (4 * WIDTH)


@triton.jit
def _columns(
    pair, row, channel, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The Values of COUNT columns; see load_columns."""
    PADDING: tl.constexpr = WINDOW.padding
    REST: tl.constexpr = None if SIMILARITY.from_logits else 0  # invalid logits may be anything
    first, _ = _loaded(pair.x, row, SIMILARITY, STRIP, SHIFT, COUNT, PADDING, REST)
    xs = ()
    ys = ()
    ds = ()
    if SIMILARITY.from_logits:
        labels, inside = _labels(pair, row, SIMILARITY, STRIP, SHIFT, COUNT)
        for j in tl.static_range(COUNT):
            y, d = _pixel(first[j], labels[j], inside[j], pair, channel, SIMILARITY)
            ys = ys + (y,)
            ds = ds + (d,)
        values = RowValues(first=ys, other=ds, d=ds)
    else:
        second, _ = load_columns(pair.y, row, STRIP, SHIFT, COUNT, PADDING)
        for j in tl.static_range(COUNT):
            x = widened(first[j]) - pair.pivot_x
            y = widened(second[j]) - (pair.pivot_x - pair.pivot_d)
            xs = xs + (x,)
            ys = ys + (y,)
            ds = ds + (x - y,)
        values = RowValues(first=xs, other=ys, d=ds)
    return values


@triton.jit
def _pixel(logit, label, inside, pair, channel, SIMILARITY: tl.constexpr):
    """(2 y, what is filtered as d) of a pixel of the loss."""
    x = sigmoid_base2(widened(logit) * LOG2_E) - pair.pivot_d
    valid = _is_valid(label, inside, pair, SIMILARITY)
    own = label == label_of(channel, SIMILARITY.ignored)
    if SIMILARITY.ignored != -1 or SIMILARITY.crowded:
        own = own & valid
    # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
    x = tl.where(valid, x, 0.0 - pair.pivot_d)
    twice = tl.where(own, 2.0, 0.0).to(x.dtype)
    return twice, x - pair.share * twice


# --- host -----------------------------------------------------------------------------------------


def is_exchanged(strip: Strip, window_size: int) -> bool:
    """Whether the lanes of a loss's strips exchange their pixels."""
    return window_size >= _LEAST_WINDOW and strip.grain > 1 and not strip.channels_in_lanes


def exchanged_elements(strip: Strip) -> int:
    """How many numbers a program leaves to its lanes at a time: two rows of y and d."""
    return 4 * (strip.lanes * strip.columns + 2 * int(_BESIDE.value))
