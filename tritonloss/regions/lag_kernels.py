"""Kernels of region mutual information: lag sums over the core of a map and over its frame.

Lags and cells are documented in lag_sums.py. Where these kernels read logits, they add up the cross
entropy too, since no other kernel reads all pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.math import LN_2
from .features import (
    SIZES,
    features_of,
    load_features,
    load_label,
    load_pair,
    load_scaled,
    load_wide,
    miss_of,
)
from .lag_sums import (
    ALL,
    CROSS,
    OWN,
    RUN,
    Row,
    no_sums,
    store_sums,
    with_products,
    with_totals,
)

# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _with_row(
    state, features, row, column, KINDS: tl.constexpr, STRIP: tl.constexpr, READING: tl.constexpr
):
    """The state of _add_core after one more row: older rows, sums, cross entropy, its product."""
    older_e, older_y, sums, entropy, product = state
    dtype: tl.constexpr = entropy.dtype
    total: tl.constexpr = dtype if READING.centred else tl.float64
    REGION: tl.constexpr = STRIP.region
    COLUMNS: tl.constexpr = STRIP.columns
    new_e = ()
    new_y = ()
    new_wide = ()
    of_row = tl.full((STRIP.lanes,), 1.0, dtype)
    WIDTH: tl.constexpr = 2 * REGION - 2 + COLUMNS
    seen = load_wide(features, row, column, WIDTH, STRIP.grain, READING)
    for s in tl.static_range(WIDTH):
        e, y, excess, smaller, larger = seen[s]
        new_e = new_e + (e.to(total),)
        new_y = new_y + (y,)
        new_wide = new_wide + (y.to(total),)
        if KINDS != CROSS and s >= REGION - 1 and s < REGION - 1 + COLUMNS:
            entropy += excess
            if READING.centred:
                entropy += smaller - (1.0 - larger)  # what 1 - smaller lost
                of_row *= larger
            else:
                product -= product * smaller
    product *= of_row.to(tl.float64)
    row_e = ()
    row_y = ()
    row_wide = ()
    for v in tl.static_range(COLUMNS):
        row_e = row_e + (new_e[REGION - 1 + v],)
        row_y = row_y + (new_y[REGION - 1 + v],)
        row_wide = row_wide + (new_wide[REGION - 1 + v],)
    for k in tl.static_range((REGION - 1) * COLUMNS):
        row_wide = row_wide + (older_y[k].to(total),)  # takes fewer registers than keeping it
    older = Row(e=row_e + older_e, y=row_y + older_y, wide=row_wide)
    sums = with_products(sums, older, Row(e=new_e, y=new_y, wide=new_wide), KINDS, STRIP)
    older_e = ()
    older_y = ()
    for k in tl.static_range((REGION - 1) * COLUMNS):
        older_e = older_e + (older.e[k],)
        older_y = older_y + (older.y[k],)
    return older_e, older_y, sums, entropy, product


@triton.jit
def _add_core(
    features, out, size, first_row, block, KINDS: tl.constexpr, STRIP: tl.constexpr,
    READING: tl.constexpr,
):  # fmt: skip
    """The strip's cross entropy; stores lag sums of some kinds over a strip of the core.

    The older R - 1 rows stay in registers. Columns that make no whole chunk of a lane are left to
    the frame kernel.
    """
    element: tl.constexpr = features.first.pointer.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    total: tl.constexpr = dtype if READING.centred else tl.float64
    REGION: tl.constexpr = STRIP.region
    COLUMNS: tl.constexpr = STRIP.columns
    LANES: tl.constexpr = STRIP.lanes
    height, width = size
    chunks = (width - 2 * REGION + 2) // COLUMNS
    chunk = block * LANES + tl.arange(0, LANES)
    # Lanes beyond the core read its last chunk, so that no load needs a mask. The first column of
    # a lane's regions is REGION - 1 before its own first one.
    column = tl.minimum(chunk, chunks - 1) * COLUMNS

    older_e = ()
    older_y = ()
    for k in tl.static_range(REGION - 1):
        seen = load_wide(
            features, first_row - 1 - k, column, REGION - 1 + COLUMNS, STRIP.grain, READING
        )
        for v in tl.static_range(COLUMNS):
            older_e = older_e + (seen[REGION - 1 + v][0].to(total),)
            older_y = older_y + (seen[REGION - 1 + v][1],)
    sums = no_sums(KINDS, STRIP, total, dtype)
    entropy = tl.zeros((LANES,), dtype)
    product = tl.full((LANES,), 1.0, tl.float64)

    # row by row: its features, then its products with itself and with the rows above it
    rows = tl.minimum(STRIP.rows, height - REGION + 1 - first_row)
    state = (older_e, older_y, sums, entropy, product)
    if COLUMNS > 1 and total == tl.float32:
        for first in tl.range(0, rows, RUN):
            for i in tl.range(first, tl.minimum(first + RUN, rows)):
                state = _with_row(state, features, first_row + i, column, KINDS, STRIP, READING)
            older_e, older_y, sums, entropy, product = state
            state = (older_e, older_y, with_totals(sums, KINDS, STRIP), entropy, product)
    else:
        # A row that grows older moves to other registers: with two rows a round half as often.
        AT_ONCE: tl.constexpr = 2 if COLUMNS == 4 and REGION == 3 and total == tl.float64 else 1
        for i in tl.range(0, rows, loop_unroll_factor=AT_ONCE):
            state = _with_row(state, features, first_row + i, column, KINDS, STRIP, READING)
    older_e, older_y, sums, entropy, product = state

    mine = chunk < chunks
    store_sums(out, sums, mine, 0, KINDS, STRIP)
    return tl.sum(tl.where(mine, entropy - tl.log(product).to(dtype), 0.0))


@triton.jit
def _valid_of_core(
    features, size, first_row, block, STRIP: tl.constexpr, READING: tl.constexpr
):  # fmt: skip
    """The number of valid pixels in a strip of the core."""
    LANES: tl.constexpr = STRIP.lanes
    height, width = size
    core = (width - 2 * STRIP.region + 2) // STRIP.columns * STRIP.columns
    rows = tl.minimum(STRIP.rows, height - STRIP.region + 1 - first_row)
    count = tl.zeros((LANES,), tl.int32)
    for i in tl.range(0, rows * STRIP.columns):
        # Neighbouring lanes have neighbouring columns here, not chunks.
        column = (block * STRIP.columns + i % STRIP.columns) * LANES + tl.arange(0, LANES)
        label = load_label(
            features.second, first_row + i // STRIP.columns, column + STRIP.region - 1,
            column < core, features.channels, READING.ignored,
        )  # fmt: skip
        count += (label >= 0).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _center(features, height, width, READING: tl.constexpr):
    """The mean of p over 32 x 32 pixels: near the mean of all, and exact if p is constant."""
    place = tl.arange(0, 1024)
    row, column = place // 32 * height // 32, place % 32 * width // 32
    e, y = load_features(features, row, column, None, READING)
    return tl.sum(y + e) / 1024


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_lags_kernel(
    first_ptr,  # residuals [N, C, h, w], or logits
    second_ptr,  # labels [N, C, h, w], or target [N, h, w]
    center_ptr,  # [N * C], if CENTRED
    lags_ptr,  # [N * C, bands * blocks, LAGS] float64
    partials_ptr,  # [2, parts] float64: sums of the cross entropy and of the valid pixels
    first_strides,
    second_strides,
    channels,
    height,
    width,
    bands,
    parts,
    STRIP: tl.constexpr,
    READING: tl.constexpr,
):
    """Lag sums over the core: in float64, or if centred in float32.

    From regions of 4 on not all of them fit the registers: a program has half of the kinds.
    """
    SPAN: tl.constexpr = 2 * STRIP.region - 1
    LAGS: tl.constexpr = 4 * STRIP.region * SPAN + 2
    PASSES: tl.constexpr = 1 if STRIP.region < 4 else 2
    plane = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2) // PASSES
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0, READING
    )
    if READING.centred:
        center = _center(features, height, width, READING)
        if tl.program_id(1) + tl.program_id(2) == 0:
            tl.store(center_ptr + plane, center)
        features = features_of(
            first_ptr, second_ptr, first_strides, second_strides, plane, channels, center, READING
        )
    strips = bands * (tl.num_programs(2) // PASSES)
    out = lags_ptr + (plane * strips + tl.program_id(1) + bands * block) * LAGS
    first_row = STRIP.region - 1 + tl.program_id(1) * STRIP.rows
    size = (height, width)
    if PASSES == 1:
        entropy = _add_core(features, out, size, first_row, block, ALL, STRIP, READING)
    elif tl.program_id(2) % PASSES == 0:
        entropy = _add_core(features, out, size, first_row, block, OWN, STRIP, READING)
    else:
        entropy = _add_core(features, out, size, first_row, block, CROSS, STRIP, READING)
    if not READING.pooled and tl.program_id(2) % PASSES == 0:
        partial = partials_ptr + plane * strips + tl.program_id(1) + bands * block
        tl.store(partial, entropy)
        if features.channel == 0:
            valid = _valid_of_core(features, size, first_row, block, STRIP, READING)
        else:
            valid = 0
        tl.store(partial + parts, valid)


@triton.jit
def _cross_entropy(features, row, column, mask, READING: tl.constexpr):
    """(cross entropy, whether valid) of pixels; both are 0 where masked out."""
    element: tl.constexpr = features.first.pointer.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    label = load_label(features.second, row, column, mask, features.channels, READING.ignored)
    u = load_scaled(features.first, row, column, mask, dtype)
    u = tl.where(label >= 0, u, float("-inf"))
    _, excess, factor, rest = miss_of(u, (label >= 0) & (label == features.channel))
    return excess * LN_2 + tl.log(factor) + rest, (label >= 0).to(tl.int32)


@triton.jit
def _add_line(
    features, cells, size, line, first_dy, STRIP: tl.constexpr, READING: tl.constexpr
):  # fmt: skip
    """(cross entropy, number of valid pixels) of a line, whose lag sums are stored.

    Lines are the rows and the columns of the frame, between its corners, and then the columns of
    the core that the strips leave.
    """
    element: tl.constexpr = features.first.pointer.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    REGION: tl.constexpr = STRIP.region
    DEPTH: tl.constexpr = STRIP.depth
    LANES: tl.constexpr = STRIP.lanes
    SIDE: tl.constexpr = 2 * (REGION - 1)
    SPAN: tl.constexpr = 2 * REGION - 1
    LAGS: tl.constexpr = 4 * REGION * SPAN + 2
    # where the line is, and the cell that its sums go to
    height, width = size
    is_row = line < SIDE
    spare = line - 2 * SIDE  # the number of a column that strips left; negative in the frame
    left = (width - SIDE) % (STRIP.spare + 1)
    f = tl.where(is_row, line, line - SIDE)
    of_line = tl.where(f < REGION - 1, f, f + 1)  # the kind of its row or column
    across = tl.where(is_row, height, width)
    place = tl.where(f < REGION - 1, f, f - SIDE + across)
    place = tl.where(spare >= 0, width - REGION + 1 - left + spare, place)
    end = tl.where(is_row, width, height) - REGION + 1
    end = tl.where(spare < left, end, 0)
    cell = tl.where(is_row, of_line * SPAN + REGION - 1, (REGION - 1) * SPAN + of_line)
    cell = tl.where(spare >= 0, SPAN * SPAN + spare, cell)

    # along the line: its features and those around it, their products
    sums = no_sums(ALL, STRIP, tl.float64, tl.float64)
    entropy = tl.zeros((LANES,), dtype)
    valid = tl.zeros((LANES,), tl.int32)
    for start in tl.range(REGION - 1, end, LANES):
        along = start + tl.arange(0, LANES)
        row = tl.where(is_row, place, along)
        column = tl.where(is_row, along, place)
        older_e = ()
        older_y = ()
        for k in tl.static_range(DEPTH):
            mask = (along < end) & (row >= first_dy + k)
            e, y = load_pair(features, row - first_dy - k, column, mask, READING)
            older_e = older_e + (e.to(tl.float64),)
            older_y = older_y + (y.to(tl.float64),)
        newer_e = ()
        newer_y = ()
        for s in tl.static_range(SPAN):
            mask = (along < end) & (column + s >= REGION - 1) & (column + s < width + REGION - 1)
            e, y = load_pair(features, row, column, mask, READING, s - (REGION - 1))
            newer_e = newer_e + (e.to(tl.float64),)
            newer_y = newer_y + (y.to(tl.float64),)
        older = Row(e=older_e, y=older_y, wide=older_y)
        newer = Row(e=newer_e, y=newer_y, wide=newer_y)
        sums = with_products(sums, older, newer, ALL, STRIP)
        if not READING.pooled:
            missed, is_valid = _cross_entropy(features, row, column, along < end, READING)
            entropy += missed
            valid += is_valid
    store_sums(cells + cell * LAGS, sums, tl.arange(0, LANES) >= 0, first_dy, ALL, STRIP)
    counts = tl.where(first_dy == 0, 1, 0)
    return tl.sum(entropy) * counts, tl.sum(valid) * counts


@triton.jit
def _corners(size, REGION: tl.constexpr):
    """(rows, columns, cells, whether it is one) of the pixels in the corners of the frame."""
    SIDE: tl.constexpr = 2 * (REGION - 1)
    height, width = size
    corner = tl.arange(0, triton.next_power_of_2(SIDE * SIDE))
    down, across = corner // SIDE, corner % SIDE
    row = tl.where(down < REGION - 1, down, down - SIDE + height)
    column = tl.where(across < REGION - 1, across, across - SIDE + width)
    row_class = tl.where(down < REGION - 1, down, down + 1)
    column_class = tl.where(across < REGION - 1, across, across + 1)
    return row, column, row_class * (2 * REGION - 1) + column_class, corner < SIDE * SIDE


@triton.jit
def _add_corners(features, cells, size, lag, REGION: tl.constexpr, READING: tl.constexpr):
    """Store some lags of all pixels in the corners of the frame, which are single products."""
    SPAN: tl.constexpr = 2 * REGION - 1
    PLAIN: tl.constexpr = 4 * REGION * SPAN
    width = size[1]
    row, column, cell, is_corner = _corners(size, REGION)
    row, column = row[None, :], column[None, :]
    lag = lag[:, None]
    kind = lag // (REGION * SPAN)
    dy = tl.where(lag < PLAIN, lag // SPAN % REGION, 0)
    dx = tl.where(lag < PLAIN, lag % SPAN - (REGION - 1), 0)
    older_is_y = (kind == 1) | (kind == 2) | (lag == PLAIN + 1)
    newer_is_y = (kind == 1) | (kind == 3)
    mask = is_corner[None, :] & (lag < PLAIN + 2)
    inside = mask & (row >= dy) & (column + dx >= 0) & (column + dx < width)

    e, y = load_pair(features, row - dy, column + 0 * dx, inside, READING)
    older = tl.where(older_is_y, y, e).to(tl.float64)
    e, y = load_pair(features, row + 0 * dy, column + dx, inside, READING)
    newer = tl.where(newer_is_y, y, e).to(tl.float64)
    value = older * tl.where(lag < PLAIN, newer, 1.0)
    tl.store(cells + cell[None, :] * (PLAIN + 2) + lag, value, mask=mask)


@triton.jit
def _core_sum(lags_ptr, first, parts, lag, LAGS: tl.constexpr):
    """The sums of some lags over ``parts`` strips, whose sums are stored from ``first`` on."""
    core = tl.zeros((16, lag.shape[0]), tl.float64)
    for start in tl.range(0, parts, 16):
        part = start + tl.arange(0, 16)[:, None]
        mask = (part < parts) & (lag < LAGS)[None, :]
        core += tl.load(lags_ptr + (first + part) * LAGS + lag[None, :], mask=mask, other=0.0)
    return tl.sum(core, 0)


@triton.jit(do_not_specialize=SIZES)
def _rmi_frame_kernel(
    first_ptr,  # as in _rmi_lags_kernel
    second_ptr,
    center_ptr,
    lags_ptr,  # [N * C, strips, LAGS] float64
    cells_ptr,  # [N * C, (2R - 1)^2 + spare, LAGS] float64
    partials_ptr,
    first_strides,
    second_strides,
    channels,
    height,
    width,
    strips,
    parts,
    STRIP: tl.constexpr,
    READING: tl.constexpr,
):
    """Lag sums of one line of the frame; the last program has all corners and the core's total.

    Of large regions a line has too many sums for a program: each dy has programs of its own.
    """
    REGION: tl.constexpr = STRIP.region
    LINES: tl.constexpr = 4 * (REGION - 1) + STRIP.spare
    SPAN: tl.constexpr = 2 * REGION - 1
    LAGS: tl.constexpr = 4 * REGION * SPAN + 2
    SHARES: tl.constexpr = REGION // STRIP.depth
    plane = tl.program_id(0).to(tl.int64)
    center = tl.load(center_ptr + plane) if READING.centred else 0.0
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, center, READING
    )
    cells = cells_ptr + plane * ((SPAN * SPAN + STRIP.spare) * LAGS)
    line = tl.program_id(1) // SHARES
    share = tl.program_id(1) % SHARES
    size = (height, width)
    entropy = tl.zeros((1,), tl.float64)
    valid = tl.zeros((1,), tl.int32)
    if line < LINES:  # a line
        if LINES > 0:
            of_line, count = _add_line(
                features, cells, size, line, share * STRIP.depth, STRIP, READING
            )
            entropy += of_line.to(tl.float64)
            valid += count
    else:  # the corners, and the core's total in the middle cell
        BLOCK: tl.constexpr = 32 if REGION < 4 else 8  # larger regions have more corners
        for start in tl.range(share * BLOCK, LAGS, BLOCK * SHARES):
            lag = start + tl.arange(0, BLOCK)
            middle = (REGION - 1) * (SPAN + 1)
            core = _core_sum(lags_ptr, plane * strips, strips, lag, LAGS)
            tl.store(cells + middle * LAGS + lag, core, mask=lag < LAGS)
            if REGION > 1:
                _add_corners(features, cells, size, lag, REGION, READING)
        if REGION > 1 and not READING.pooled:
            row, column, _, is_corner = _corners(size, REGION)
            of_corners, are_valid = _cross_entropy(
                features, row, column, is_corner & (row < tl.where(share == 0, height, 0)), READING
            )
            entropy += tl.sum(of_corners).to(tl.float64)
            valid += tl.sum(are_valid)
    if not READING.pooled:
        partial = partials_ptr + (tl.num_programs(0) * strips).to(tl.int64)
        partial += plane * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1)
        tl.store(partial, entropy)
        tl.store(partial + parts, tl.where(features.channel == 0, valid, 0))
