"""Kernels of region mutual information: second moments of the features of all regions.

A region of R x R pixels holds R^2 residuals e and R^2 labels y. Their moments are sums over all
regions of products of two pixels at a fixed distance, a lag (dy, dx) of which there are (2R - 1)^2:
all pairs of one lag differ only in which pixels of the frame they leave out. So the core of the map
is summed once per lag, and a frame R - 1 pixels wide is corrected for each pair: instead of 2 R^4
products per pixel 2 (2R - 1)^2. Lags are listed as e with e, y with y (half of the plane each), y
before e, e before y, and last the plain sums of e and y; see _lag.

Regions that are left out one by one (ignore="drop"), and maps smaller than 2R - 1, take the direct
kernel, which forms every product of every region.

Where sums are float32, p less its approximate mean takes the place of y (load_pair).

Result: per (image, class) a symmetric matrix of side 2 R^2 + 1, float64: e, y, and a constant 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import (
    SIZES,
    features_of,
    load_features,
    load_label,
    load_pair,
    plane_of,
    pointer_to,
)


class Lag(NamedTuple):
    """Two features at a fixed distance: the newer lies dy rows below the older, dx beside it."""

    older_is_y: Any
    newer_is_y: Any
    is_plain: Any  # no product: the sum of the older alone
    dy: Any
    dx: Any


class Rows(NamedTuple):
    """Both features of some rows, or of some columns of a row: tuples of blocks [LANES]."""

    e: Any
    y: Any


class LagSums(NamedTuple):
    """Sums of products by lag, tuples of blocks [LANES], and the plain sums, blocks."""

    e_e: Any
    y_y: Any
    y_e: Any  # older first
    e_y: Any
    e: Any
    y: Any


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _lag(index, REGION: tl.constexpr):
    """The lag of an index: see the list above."""
    SPAN: tl.constexpr = 2 * REGION - 1
    HALF: tl.constexpr = REGION + (REGION - 1) * SPAN
    OWN: tl.constexpr = 2 * HALF
    LAST: tl.constexpr = OWN + SPAN * SPAN
    half = tl.where(index >= HALF, index - HALF, index)
    half_row = tl.where(half < REGION, 0, 1 + (half - REGION) // SPAN)
    half_column = tl.where(half < REGION, half, (half - REGION) % SPAN - (REGION - 1))
    cross = tl.maximum(index - OWN, 0)
    after = cross >= REGION * SPAN
    cross_row = tl.where(after, 1 + (cross - REGION * SPAN) // SPAN, cross // SPAN)
    cross_column = cross % SPAN - (REGION - 1)
    plain = index >= LAST
    older = ((index >= HALF) & (index < OWN)) | ((index >= OWN) & (after == 0))
    older = (older & (plain == 0)) | (index == LAST + 1)
    newer = ((index >= HALF) & (index < OWN)) | ((index >= OWN) & after)
    dy = tl.where(plain, 0, tl.where(index < OWN, half_row, cross_row))
    dx = tl.where(plain, 0, tl.where(index < OWN, half_column, cross_column))
    return Lag(older_is_y=older, newer_is_y=newer, is_plain=plain, dy=dy, dx=dx)


@triton.jit
def _frame_place(f, size, regions, REGION: tl.constexpr):
    """(index, is one) of the 2 (R - 1) rows or columns outside the core [R - 1, regions)."""
    place = tl.where(f < REGION - 1, f, f - (REGION - 1) + tl.maximum(regions, REGION - 1))
    return place, (f < 2 * (REGION - 1)) & (place < size)


@triton.jit
def _product(features, lag, row, column, mask, READING: tl.constexpr):
    """Older times newer feature in float64, or the older alone for a plain sum."""
    e, y = load_pair(features, row, column, mask, READING)
    older = tl.where(lag.older_is_y, y, e).to(tl.float64)
    e, y = load_pair(features, row + lag.dy, column + lag.dx, mask, READING)
    newer = tl.where(lag.newer_is_y, y, e).to(tl.float64)
    return tl.where(mask, older * tl.where(lag.is_plain, 1.0, newer), 0.0)


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """COUNT blocks of zeros."""
    blocks = ()
    for _k in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((LANES,), dtype),)
    return blocks


@triton.jit
def _no_sums(
    REGION: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr, CROSS: tl.constexpr,
    total: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Sums of nothing. Those of labels, which are whole numbers, are exact in any dtype."""
    SPAN: tl.constexpr = 2 * REGION - 1
    HALF: tl.constexpr = REGION + (REGION - 1) * SPAN if OWN else 0
    return LagSums(
        e_e=_zeros(HALF, LANES, total),
        y_y=_zeros(HALF, LANES, dtype),
        y_e=_zeros(REGION * SPAN if CROSS else 0, LANES, total),
        e_y=_zeros((REGION - 1) * SPAN if CROSS else 0, LANES, total),
        e=tl.zeros((LANES,), total),
        y=tl.zeros((LANES,), dtype),
    )


@triton.jit
def _with_row(
    sums, rows, new, REGION: tl.constexpr, OWN: tl.constexpr, CROSS: tl.constexpr,
    total: tl.constexpr,
):  # fmt: skip
    """The sums with the products of the core's rows, newest first, with all columns of the newest.

    The newest row is both the older and the newer of its own lags: of those half are enough.
    """
    SPAN: tl.constexpr = 2 * REGION - 1
    HALF: tl.constexpr = REGION + (REGION - 1) * SPAN if OWN else 0
    e_e = ()
    y_y = ()
    y_e = ()
    e_y = ()
    for q in tl.static_range(HALF):
        e_e = e_e + (
            sums.e_e[q]
            + rows.e[0 if q < REGION else 1 + (q - REGION) // SPAN]
            * new.e[(REGION - 1 + q) if q < REGION else (q - REGION) % SPAN],
        )
    for q in tl.static_range(HALF):
        y_y = y_y + (
            sums.y_y[q]
            + rows.y[0 if q < REGION else 1 + (q - REGION) // SPAN]
            * new.y[(REGION - 1 + q) if q < REGION else (q - REGION) % SPAN],
        )
    if CROSS:
        for q in tl.static_range(REGION * SPAN):
            y_e = y_e + (sums.y_e[q] + rows.y[q // SPAN].to(total) * new.e[q % SPAN],)
        for q in tl.static_range((REGION - 1) * SPAN):
            e_y = e_y + (sums.e_y[q] + rows.e[1 + q // SPAN] * new.y[q % SPAN].to(total),)
    return LagSums(e_e=e_e, y_y=y_y, y_e=y_e, e_y=e_y, e=sums.e + rows.e[0], y=sums.y + rows.y[0])


@triton.jit
def _store_sums(pointer, sums, REGION: tl.constexpr, OWN: tl.constexpr, CROSS: tl.constexpr):
    """Stores all sums in the order of their lags; a store for each would compile for minutes."""
    SPAN: tl.constexpr = 2 * REGION - 1
    HALF: tl.constexpr = REGION + (REGION - 1) * SPAN
    LAGS: tl.constexpr = 2 * HALF + SPAN * SPAN + 2
    WIDTH: tl.constexpr = triton.next_power_of_2(LAGS)
    lag = tl.arange(0, WIDTH)
    values = tl.zeros((WIDTH,), tl.float64)
    START: tl.constexpr = 0 if OWN else 2 * HALF
    in_order = sums.e_e + sums.y_y + sums.y_e + sums.e_y
    for q in tl.static_range((2 * HALF if OWN else 0) + (SPAN * SPAN if CROSS else 0)):
        values = tl.where(lag == START + q, tl.sum(in_order[q].to(tl.float64)), values)
    plain_e = tl.sum(sums.e.to(tl.float64))
    plain_y = tl.sum(sums.y.to(tl.float64))
    values = tl.where(lag == LAGS - 2, plain_e, values)
    values = tl.where(lag == LAGS - 1, plain_y, values)
    mine = lag < LAGS
    if not OWN:
        mine = (lag >= 2 * HALF) & (lag < LAGS)
    elif not CROSS:
        mine = lag < 2 * HALF
    tl.store(pointer + lag, values, mask=mine)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_center_kernel(
    first_ptr,  # as in _rmi_lags_kernel
    second_ptr,
    center_ptr,  # [N * C]
    first_strides,
    second_strides,
    channels,
    height,
    width,
    READING: tl.constexpr,
):
    """The mean of p over 32 x 32 places: near the mean of all, and exact if p is constant."""
    plane = tl.program_id(0).to(tl.int64)
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0
    )
    place = tl.arange(0, 1024)
    row = place // 32 * height // 32
    column = place % 32 * width // 32
    e, y = load_features(features, row, column, None, READING)
    tl.store(center_ptr + plane, tl.sum(y + e) / 1024)


@triton.jit(do_not_specialize=SIZES)
def _rmi_lags_kernel(
    first_ptr,  # residuals [N, C, h, w], or logits
    second_ptr,  # labels [N, C, h, w], or target [N, h, w]
    center_ptr,  # [N * C], if CENTRED
    lags_ptr,  # [N * C, bands * blocks, LAGS] float64
    first_strides,
    second_strides,
    channels,
    height,
    width,
    bands,
    REGION: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    CROSS: tl.constexpr,
    READING: tl.constexpr,
):
    """Lag sums over the core of ROWS rows: one column per lane, the older R - 1 rows in registers.

    OWN are the lags of e with e and of y with y, CROSS those of y with e; large regions take one
    pass for each. The products are float32, their sums float64, or if centred float32 for ROWS
    rows.
    """
    dtype: tl.constexpr = tl.float64 if first_ptr.dtype.element_ty == tl.float64 else tl.float32
    total: tl.constexpr = dtype if READING.centred else tl.float64
    SPAN: tl.constexpr = 2 * REGION - 1
    LAGS: tl.constexpr = 2 * (REGION + (REGION - 1) * SPAN) + SPAN * SPAN + 2
    plane = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + plane) if READING.centred else 0.0
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, center
    )
    column = REGION - 1 + tl.program_id(2) * LANES + tl.arange(0, LANES)
    first_row = REGION - 1 + tl.program_id(1) * ROWS
    core = column < width - REGION + 1
    # Lanes beyond the core look at its last column: no load needs a mask, and what they see is
    # multiplied by 0.
    place = tl.minimum(column, width - REGION)

    older_e = ()
    older_y = ()
    for k in tl.static_range(REGION - 1):
        mask = core & (column < tl.where(first_row - 1 - k < height, width, 0))
        e, y = load_pair(features, first_row - 1 - k, column, mask, READING)
        older_e = older_e + (e.to(total),)
        older_y = older_y + (y,)
    sums = _no_sums(REGION, LANES, OWN, CROSS, total, dtype)

    for i in tl.range(0, tl.minimum(ROWS, height - REGION + 1 - first_row)):
        new_e = ()
        new_y = ()
        for s in tl.static_range(SPAN):
            e, y = load_pair(features, first_row + i, place, None, READING, s - (REGION - 1))
            new_e = new_e + (e.to(total),)
            new_y = new_y + (y,)
        e_rows = (tl.where(core, new_e[REGION - 1], 0.0),) + older_e
        y_rows = (tl.where(core, new_y[REGION - 1], 0.0),) + older_y
        sums = _with_row(
            sums, Rows(e=e_rows, y=y_rows), Rows(e=new_e, y=new_y), REGION, OWN, CROSS, total
        )
        older_e = ()
        older_y = ()
        for k in tl.static_range(REGION - 1):
            older_e = older_e + (e_rows[k],)
            older_y = older_y + (y_rows[k],)

    part = tl.program_id(1) + bands * tl.program_id(2)
    parts = bands * tl.num_programs(2)
    _store_sums(lags_ptr + (plane * parts + part) * LAGS, sums, REGION, OWN, CROSS)


@triton.jit(do_not_specialize=SIZES)
def _rmi_frame_kernel(
    first_ptr,  # as in _rmi_lags_kernel
    second_ptr,
    center_ptr,
    lags_ptr,  # [N * C, parts, LAGS] float64
    moments_ptr,  # [N * C, 2 R^2 + 1, 2 R^2 + 1] float64
    first_strides,
    second_strides,
    channels,
    height,
    width,
    parts,
    REGION: tl.constexpr,
    BLOCK: tl.constexpr,
    READING: tl.constexpr,
):
    """One lag: the core's sum and, for each pair of pixels at that lag, its part of the frame.

    A pair's regions keep the pair inside a window of the map; the sums over rows, over columns and
    over corners of the frame that lie inside it are added.
    """
    SPAN: tl.constexpr = 2 * REGION - 1
    LAGS: tl.constexpr = 2 * (REGION + (REGION - 1) * SPAN) + SPAN * SPAN + 2
    AREA: tl.constexpr = REGION * REGION
    SIDE: tl.constexpr = 2 * AREA + 1
    FRAME: tl.constexpr = triton.next_power_of_2(2 * REGION - 1)
    PLACES: tl.constexpr = triton.next_power_of_2(REGION)
    plane = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + plane) if READING.centred else 0.0
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, center
    )
    lag = _lag(tl.program_id(1), REGION)
    region_rows = height - REGION + 1
    region_columns = width - REGION + 1

    lane = tl.arange(0, BLOCK)
    core = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, parts, BLOCK):
        part = plane * parts + start + lane
        core += tl.load(
            lags_ptr + part * LAGS + tl.program_id(1), mask=start + lane < parts, other=0.0
        )
    total = tl.sum(core)

    # The newer row and the older column decide whether a product belongs to the frame.
    frame = tl.arange(0, FRAME)
    frame_row, is_row = _frame_place(frame, height, region_rows, REGION)
    frame_column, is_column = _frame_place(frame, width, region_columns, REGION)
    is_row = is_row & (frame_row - lag.dy >= 0)
    is_column = is_column & (frame_column + lag.dx >= 0) & (frame_column + lag.dx < width)
    older_row = frame_row - lag.dy
    rows = tl.zeros((FRAME, BLOCK), tl.float64)
    for start in tl.range(REGION - 1, region_columns, BLOCK):
        column = (start + lane)[None, :]
        rows += _product(
            features, lag, older_row[:, None], column,
            is_row[:, None] & (column < region_columns), READING,
        )  # fmt: skip
    columns = tl.zeros((BLOCK, FRAME), tl.float64)
    for start in tl.range(REGION - 1, region_rows, BLOCK):
        row = (start + lane)[:, None]
        columns += _product(
            features, lag, row - lag.dy, frame_column[None, :],
            is_column[None, :] & (row < region_rows), READING,
        )  # fmt: skip
    corners = _product(
        features, lag, older_row[:, None], frame_column[None, :],
        is_row[:, None] & is_column[None, :], READING,
    )  # fmt: skip

    # Which frame rows and columns the regions reach with the older pixel at (a, b).
    place = tl.arange(0, PLACES)
    reached_row = is_row[None, :] & (older_row[None, :] >= place[:, None])
    reached_row = reached_row & (older_row[None, :] < place[:, None] + region_rows)
    reached_column = is_column[None, :] & (frame_column[None, :] >= place[:, None])
    reached_column = reached_column & (frame_column[None, :] < place[:, None] + region_columns)
    by_row = tl.sum(tl.where(reached_row, tl.sum(rows, 1)[None, :], 0.0), 1)
    by_column = tl.sum(tl.where(reached_column, tl.sum(columns, 0)[None, :], 0.0), 1)
    partly = tl.sum(tl.where(reached_row[:, :, None], corners[None, :, :], 0.0), 1)
    value = tl.sum(tl.where(reached_column[None, :, :], partly[:, None, :], 0.0), 2)
    value += by_row[:, None] + by_column[None, :] + total  # [PLACES, PLACES]

    a = place[:, None]
    b = place[None, :]
    one = (a < REGION) & (b < REGION)
    other = one & (a + lag.dy < REGION) & (b + lag.dx >= 0) & (b + lag.dx < REGION)
    older = tl.where(lag.older_is_y, AREA, 0) + a * REGION + b
    newer = tl.where(lag.newer_is_y, AREA, 0) + (a + lag.dy) * REGION + b + lag.dx
    newer = tl.where(lag.is_plain, 2 * AREA, newer)
    mask = one & (a < tl.where(lag.is_plain, REGION, 0))
    mask = mask | (other & (a < tl.where(lag.is_plain, 0, REGION)))
    out = moments_ptr + plane * SIDE * SIDE
    tl.store(out + older * SIDE + newer, value, mask=mask)
    tl.store(out + newer * SIDE + older, value, mask=mask)
    count = region_rows.to(tl.float64) * region_columns
    tl.store(out + SIDE * SIDE - 1, count)


@triton.jit(do_not_specialize=SIZES)
def _rmi_regions_kernel(
    target_ptr,  # touched [N, h, w], or labels
    kept_ptr,  # [N, h - R + 1, w - R + 1]: whether the region takes part
    target_strides,
    channels,
    window_rows,
    window_columns,
    REGION: tl.constexpr,
    LANES: tl.constexpr,
    IGNORED: tl.constexpr,
    POOLED: tl.constexpr,
):
    """Regions that touch no invalid pixel."""
    image = (tl.program_id(0) // window_rows).to(tl.int64)
    row = tl.program_id(0) % window_rows
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = column < window_columns
    target = plane_of(target_ptr, target_strides, image, 0)
    kept = mask
    for i in tl.static_range(REGION):
        for j in tl.static_range(REGION):
            if POOLED:
                pointer = pointer_to(target, row + i, column + j)
                kept = kept & (tl.load(pointer, mask=mask, other=0) == 0)
            else:
                label = load_label(target, row + i, column + j, mask, channels, IGNORED)
                kept = kept & (label >= 0)
    offset = (image * window_rows + row) * window_columns + column
    tl.store(kept_ptr + offset, kept.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _rmi_direct_moments_kernel(
    first_ptr,  # as in _rmi_lags_kernel
    second_ptr,
    kept_ptr,  # [N, window_rows, window_columns], if DROP
    moments_ptr,  # [N * C, chunks, 2 R^2 + 1, 2 R^2 + 1] float64
    first_strides,
    second_strides,
    channels,
    chunks,
    window_rows,
    window_columns,
    REGION: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    READING: tl.constexpr,
):
    """One row of the moments, over every chunks-th block of regions."""
    AREA: tl.constexpr = REGION * REGION
    SIDE: tl.constexpr = 2 * AREA + 1
    WIDTH: tl.constexpr = triton.next_power_of_2(SIDE)
    plane = tl.program_id(0).to(tl.int64)
    image = plane // channels
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0
    )
    own = tl.program_id(1)
    other = tl.arange(0, WIDTH)[None, :]
    own_place = own % AREA
    other_place = other % AREA

    sums = tl.zeros((BLOCK, WIDTH), tl.float64)
    count = window_rows * window_columns
    for start in tl.range(tl.program_id(2) * BLOCK, count, chunks * BLOCK):
        region = (start + tl.arange(0, BLOCK))[:, None]
        kept = region < count
        if DROP:
            kept = tl.load(kept_ptr + image * count + region, mask=kept, other=0) != 0
        row = region // window_columns
        column = region % window_columns
        e, y = load_pair(
            features, row + own_place // REGION, column + own_place % REGION, kept, READING
        )
        left = tl.where(own < AREA, e, tl.where(own < 2 * AREA, y, 1.0)).to(tl.float64)
        inside = kept & (other < SIDE)
        e, y = load_pair(
            features, row + other_place // REGION, column + other_place % REGION, inside, READING
        )
        right = tl.where(other < AREA, e, tl.where(other < 2 * AREA, y, 1.0)).to(tl.float64)
        sums += tl.where(inside, left * right, 0.0)
    out = moments_ptr + ((plane * chunks + tl.program_id(2)) * SIDE + own) * SIDE
    tl.store(out + tl.arange(0, WIDTH), tl.sum(sums, 0), mask=tl.arange(0, WIDTH) < SIDE)
