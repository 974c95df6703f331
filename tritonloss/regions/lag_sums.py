"""Sums of products by the distance of their two pixels, which the moments of regions are made of.

A region of R x R pixels holds R^2 residuals e and R^2 labels y. Their moments are sums, over all
regions, of products of two pixels at a fixed distance: a lag (dy, dx), of which there are
(2R - 1)^2. The moments of one lag differ only in which pixels near the border they leave out. So
each lag is summed once over the core of the map, and once over each row, each column and each
corner of a frame R - 1 pixels wide. That takes 2 (2R - 1)^2 products per pixel instead of 2 R^4.

Cells: a product belongs to the cell of its newer pixel's row and its older pixel's column. Rows are
of 2R - 1 kinds: the R - 1 uppermost, all of the core, and the R - 1 lowest; so are columns. The
regions that hold a pair of pixels at places (a, b) and (a', b') keep its products in the R x R
cells from (a', b) on, so that a moment is a sum of R^2 cells; the head adds them up.

Lags: four kinds of R x (2R - 1), older times newer: e e, y y, y e and e y. Of those with dy = 0
each product is there once. Then come the plain sums of e and of y.

Where sums are float32, p less its approximate mean takes the place of y (load_pair). Sums of lanes
of several columns have as many more terms. They are of a few rows only, and then added to totals;
what a total rounds away stays in the sum (Kahan).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Which kinds of lags are summed: all, e e and y y, or y e and e y.
ALL = tl.constexpr(0)
OWN = tl.constexpr(1)
CROSS = tl.constexpr(2)

# After how many rows float32 sums are added to totals.
RUN = tl.constexpr(3)


class Strip(NamedTuple):
    """The part of a map that a program goes through, known when a kernel is compiled."""

    region: int
    depth: int  # how many dy a program sums: all R, or one
    columns: int  # neighbouring ones that one lane owns
    lanes: int
    rows: int
    spare: int  # the most columns of the core that its strips leave to lines
    grain: int  # how many pixels are loaded at once: a lane's chunk, or 1


class Row(NamedTuple):
    """Both features of some pixels: tuples of blocks [lanes]."""

    e: Any
    y: Any
    wide: Any  # y in the dtype of e


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def no_sums(KINDS: tl.constexpr, STRIP: tl.constexpr, total: tl.constexpr, labels: tl.constexpr):
    """Sums of nothing, by lag, then those of e and of y; last the totals by lag, where kept.

    ``labels`` is the dtype of y y.
    """
    COUNT: tl.constexpr = STRIP.depth * (2 * STRIP.region - 1)
    FIRST: tl.constexpr = 2 * COUNT if KINDS == CROSS else 0
    LAST: tl.constexpr = 2 * COUNT if KINDS == OWN else 4 * COUNT
    LANES: tl.constexpr = STRIP.lanes
    sums = ()
    for q in tl.static_range(FIRST, LAST):
        if q // COUNT == 1:
            sums = sums + (tl.zeros((LANES,), labels),)
        else:
            sums = sums + (tl.zeros((LANES,), total),)
    sums = sums + (tl.zeros((LANES,), total), tl.zeros((LANES,), labels))
    if STRIP.columns > 1 and total == tl.float32:
        for _q in tl.static_range(FIRST, LAST):
            sums = sums + (tl.zeros((LANES,), total),)
    return sums


@triton.jit
def _with_row(
    total, older, newer, LAG: tl.constexpr, AT_ONCE: tl.constexpr, STRIP: tl.constexpr
):  # fmt: skip
    """The total with a lag's products of a lane's columns: of each, or AT_ONCE of all."""
    COLUMNS: tl.constexpr = STRIP.columns
    SPAN: tl.constexpr = 2 * STRIP.region - 1
    DOWN: tl.constexpr = LAG // SPAN % STRIP.depth * COLUMNS
    ASIDE: tl.constexpr = LAG % SPAN
    if AT_ONCE:
        row = older[DOWN] * newer[ASIDE]
        for v in tl.static_range(1, COLUMNS):
            row += older[DOWN + v] * newer[ASIDE + v]
        total += row
    else:
        for v in tl.static_range(COLUMNS):
            total += older[DOWN + v] * newer[ASIDE + v]
    return total


@triton.jit
def with_products(sums, older, newer, KINDS: tl.constexpr, STRIP: tl.constexpr):
    """The sums with the products of a row and what is above it, for all columns of a lane.

    ``older`` are the lane's own columns, row by row upwards. ``newer`` are the columns of the row
    itself, with R - 1 more on both sides. Products of the row with itself that would be there twice
    are left out.
    """
    REGION: tl.constexpr = STRIP.region
    DEPTH: tl.constexpr = STRIP.depth
    COLUMNS: tl.constexpr = STRIP.columns
    SPAN: tl.constexpr = 2 * REGION - 1
    COUNT: tl.constexpr = DEPTH * SPAN
    FIRST: tl.constexpr = 2 * COUNT if KINDS == CROSS else 0
    LAST: tl.constexpr = 2 * COUNT if KINDS == OWN else 4 * COUNT
    result = ()
    for q in tl.static_range(FIRST, LAST):
        value = sums[q - FIRST]
        if (
            DEPTH < REGION
            or q // SPAN % DEPTH > 0
            or q // COUNT == 2
            or (q // COUNT < 2 and q % SPAN >= REGION - 1)
        ):
            if q // COUNT == 0:
                value = _with_row(value, older.e, newer.e, q, False, STRIP)
            elif q // COUNT == 1:
                # Of logits y y is 1 / 4 for each pixel and itself: a row adds a single constant.
                value = _with_row(
                    value, older.y, newer.y, q, q % COUNT == REGION - 1 and COLUMNS > 1, STRIP
                )
            elif q // COUNT == 2:
                value = _with_row(value, older.wide, newer.e, q, False, STRIP)
            else:
                value = _with_row(value, older.e, newer.wide, q, False, STRIP)
        result = result + (value,)
    e = sums[LAST - FIRST]
    y = sums[LAST - FIRST + 1]
    for v in tl.static_range(COLUMNS):
        e += older.e[v]
        y += older.y[v]
    result = result + (e, y)
    for q in tl.static_range(LAST - FIRST + 2, len(sums)):
        result = result + (sums[q],)
    return result


@triton.jit
def with_totals(sums, KINDS: tl.constexpr, STRIP: tl.constexpr):
    """The sums with each lag's added to its total: what that rounds away is left of them.

    Those of e e are left as they are: they do not go into the inverse of p's moments.
    """
    COUNT: tl.constexpr = STRIP.depth * (2 * STRIP.region - 1)
    LAGS: tl.constexpr = (len(sums) - 2) // 2
    FIRST: tl.constexpr = 0 if KINDS == CROSS else COUNT
    rest = ()
    totals = ()
    for q in tl.static_range(LAGS):
        total = sums[LAGS + 2 + q]
        left = sums[q]
        if q >= FIRST:
            before = total
            total += left
            left -= total - before
        rest = rest + (left,)
        totals = totals + (total,)
    return rest + (sums[LAGS], sums[LAGS + 1]) + totals


@triton.jit
def store_sums(pointer, sums, mine, first_dy, KINDS: tl.constexpr, STRIP: tl.constexpr):
    """Store the sums over all lanes that are ``mine``, in the order of their lags.

    It is one store for all lags: one for each would take minutes to compile.
    """
    REGION: tl.constexpr = STRIP.region
    DEPTH: tl.constexpr = STRIP.depth
    SPAN: tl.constexpr = 2 * REGION - 1
    COUNT: tl.constexpr = DEPTH * SPAN
    FIRST: tl.constexpr = 2 * COUNT if KINDS == CROSS else 0
    LAST: tl.constexpr = 2 * COUNT if KINDS == OWN else 4 * COUNT
    PLAIN: tl.constexpr = 4 * REGION * SPAN
    lag = tl.arange(0, triton.next_power_of_2(PLAIN + 2))
    values = tl.zeros(lag.shape, tl.float64)
    stored = lag < 0
    for q in tl.static_range(FIRST, LAST):
        if (
            DEPTH < REGION
            or q // SPAN % DEPTH > 0
            or q // COUNT == 2
            or (q // COUNT < 2 and q % SPAN >= REGION - 1)
        ):
            is_it = lag == first_dy * SPAN + q // COUNT * (REGION * SPAN) + q % COUNT
            value = tl.where(mine, sums[q - FIRST], 0.0).to(tl.float64)
            if len(sums) > LAST - FIRST + 2:
                value += tl.where(mine, sums[LAST - FIRST + 2 + q - FIRST], 0.0).to(tl.float64)
            values = tl.where(is_it, tl.sum(value), values)
            stored = stored | is_it
    if KINDS != CROSS:
        for k in tl.static_range(2):
            is_it = lag == tl.where(first_dy == 0, PLAIN + k, -1)
            value = tl.where(mine, sums[LAST - FIRST + k], 0.0).to(tl.float64)
            values = tl.where(is_it, tl.sum(value), values)
            stored = stored | is_it
    tl.store(pointer + lag, values, mask=stored)
