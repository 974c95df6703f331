"""The kernel of region mutual information from the moments to the loss: one matrix per program.

Per (image, class), with P = Y + E the predictions and everything centred and over n (or 1):

    M = S_Y - S_YP (S_P + eps I)^-1 S_PY + eps I,       information = log det M / (2 d)
    d information / dP = (K1 E + K2 Y) / d,             K1 = A^T M^-1 A,  K2 = A^T M^-1 (A - I)

with A = S_YP (S_P + eps I)^-1. P is eliminated first, which leaves A^T and M. Then M is eliminated:
its pivots give the determinant, while M^-1 A and A^T M^-1 A are accumulated. No inverse is formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.sums import Sums, comes_last, leave, total
from .features import SIZES


class Moments(NamedTuple):
    """Sums over all regions: of products of two places (row, column), and of each place."""

    ee: Any
    ey: Any
    yy: Any
    e_sum: Any
    y_sum: Any
    count: Any


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _row_of(tile, is_row):
    """The chosen row of a tile [WIDTH, WIDTH]: [1, WIDTH]."""
    return tl.sum(tl.where(is_row, tile, 0.0), 0)[None, :]


@triton.jit
def _pivot(tile, info, rows, columns, k, OFFSET: tl.constexpr):
    """(row without its pivot, pivot, info); one that is not positive is noted in info, and is 1."""
    row = _row_of(tile, rows == k)
    pivot = tl.sum(tl.where(columns == k, row, 0.0), 1)[:, None]
    fails = (pivot > 0) == 0
    info = tl.where((info == 0) & fails, OFFSET + k + 1, info)
    return tl.where(columns == k, 0.0, row), tl.where(fails, 1.0, pivot), info


@triton.jit
def _of_matrix(moments_ptr, rows, columns, inside, chunks, AREA: tl.constexpr):
    """The moments from stored matrices, whose chunks are added up in order."""
    SIDE: tl.constexpr = 2 * AREA + 1
    zero = rows * 0 + columns * 0
    ee = zero.to(tl.float64)
    ey = ee
    yy = ee
    e_sum = (rows * 0).to(tl.float64)
    y_sum = e_sum
    count = tl.zeros((1, 1), tl.float64)
    scalar = tl.zeros((1, 1), tl.int32)
    for chunk in tl.range(0, chunks):
        matrix = moments_ptr + chunk * (SIDE * SIDE)
        own = matrix + rows * SIDE
        labels = own + AREA * SIDE
        ee += tl.load(own + columns, mask=inside, other=0.0)
        ey += tl.load(own + columns + AREA, mask=inside, other=0.0)
        yy += tl.load(labels + columns + AREA, mask=inside, other=0.0)
        e_sum += tl.load(own + 2 * AREA, mask=rows < AREA, other=0.0)
        y_sum += tl.load(labels + 2 * AREA, mask=rows < AREA, other=0.0)
        count += tl.load(matrix + SIDE * SIDE - 1 + scalar)
    return Moments(ee=ee, ey=ey, yy=yy, e_sum=e_sum, y_sum=y_sum, count=count)


@triton.jit
def _of_cells(cells_ptr, rows, columns, inside, regions, cells, REGION: tl.constexpr):
    """The moments as sums of cells: see lag_sums.py."""
    SPAN: tl.constexpr = 2 * REGION - 1
    KIND: tl.constexpr = REGION * SPAN
    LAGS: tl.constexpr = 4 * KIND + 2
    zero = rows * 0 + columns * 0
    up, left = rows // REGION + zero, rows % REGION + zero
    down, right = columns // REGION + zero, columns % REGION + zero
    dy = tl.abs(down - up)
    # Of two residuals, or two labels, the upper is the older one, and in the same row the left one.
    turned = (down < up) | ((down == up) & (right < left))
    own = dy * SPAN + tl.where(turned, left - right, right - left) + REGION - 1
    own_cell = (tl.maximum(up, down) * SPAN + tl.where(turned, right, left)) * LAGS
    # Of a residual and a label the upper is the older one, and in the same row the label.
    after = down > up
    mixed = dy * SPAN + tl.where(after, right - left, left - right) + REGION - 1
    mixed += tl.where(after, 3 * KIND, 2 * KIND)
    mixed_cell = (tl.maximum(up, down) * SPAN + tl.where(after, left, right)) * LAGS
    plain_cell = (rows // REGION * SPAN + rows % REGION) * LAGS

    ee = zero.to(tl.float64)
    ey = ee
    yy = ee
    e_sum = (rows * 0).to(tl.float64)
    y_sum = e_sum
    # R x R cells, and then the columns of the core that its strips have left.
    for k in tl.range(0, REGION * REGION + cells - SPAN * SPAN):
        is_cell = k < REGION * REGION
        place = k // REGION * SPAN + k % REGION
        first = tl.where(is_cell, place, k - REGION * REGION + SPAN * SPAN) * LAGS
        first = cells_ptr + first
        of_own = own + tl.where(is_cell, own_cell, 0)
        ee += tl.load(first + of_own, mask=inside, other=0.0)
        yy += tl.load(first + of_own + KIND, mask=inside, other=0.0)
        of_mixed = mixed + tl.where(is_cell, mixed_cell, 0)
        ey += tl.load(first + of_mixed, mask=inside, other=0.0)
        plain = first + 4 * KIND + tl.where(is_cell, plain_cell, 0)
        e_sum += tl.load(plain, mask=rows < REGION * REGION, other=0.0)
        y_sum += tl.load(plain + 1, mask=rows < REGION * REGION, other=0.0)
    count = tl.zeros((1, 1), tl.float64) + regions
    return Moments(ee=ee, ey=ey, yy=yy, e_sum=e_sum, y_sum=y_sum, count=count)


@triton.jit
def _store_loss(
    loss_ptr, statistics_ptr, partials_ptr, parts, mutual, bce_weight, bce_smooth,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the loss, and the scale of the cross entropy's gradient."""
    lane = tl.arange(0, BLOCK)
    entropy = tl.zeros((BLOCK,), tl.float64)
    valid = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, parts, BLOCK):
        mask = start + lane < parts
        entropy += tl.load(partials_ptr + start + lane, mask=mask, other=0.0)
        valid += tl.load(partials_ptr + parts + start + lane, mask=mask, other=0.0)
    count = tl.sum(valid)
    entropy_scale = bce_weight / tl.maximum(count + bce_smooth, 1.0)
    loss = entropy_scale * tl.sum(entropy) + mutual
    tl.store(loss_ptr, tl.where(count > 0, loss, 0.0))
    tl.store(statistics_ptr, entropy_scale)


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_head_kernel(
    moments_ptr,  # [N * C, chunks, 2 d + 1, 2 d + 1] float64, or [N * C, cells, lags]
    center_ptr,  # [N * C], if centred: then p - center takes the place of y in the moments
    partials_ptr,  # [2, parts] float64: sums of the cross entropy and of the valid pixels
    info_ptr,  # [N * C] int32
    weights_ptr,  # [N * C, 2 d + 1, d] float64: K1 / (d n), K2 / (d n), constants of the centring
    loss_ptr,  # []
    statistics_ptr,  # [1] float64: bce_weight / (V + bce_smooth)
    scratch_ptr,
    tickets_ptr,
    programs,
    chunks,  # of matrices; if cells > 0 the number of regions
    cells,  # of lag sums; 0 for matrices
    centred,
    middle,  # what was taken from labels
    parts,
    images,
    epsilon,
    bce_weight,
    rmi_weight,
    bce_smooth,
    REGION: tl.constexpr,
    CELL: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One matrix for each program; the last one adds up the losses, and the cross entropy's parts.

    The form of the moments is known when it runs, so that images of all sizes share the kernel.
    CELL: what maps are divided by. BLOCK: parts at a time.
    """
    AREA: tl.constexpr = REGION * REGION
    SIDE: tl.constexpr = 2 * AREA + 1
    WIDTH: tl.constexpr = triton.next_power_of_2(AREA)
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WIDTH)
    rows = index[:, None]
    columns = index[None, :]
    inside = (rows < AREA) & (columns < AREA)
    if cells > 0:
        LAGS: tl.constexpr = 4 * REGION * (2 * REGION - 1) + 2
        first = moments_ptr + matrix * cells * LAGS
        moments = _of_cells(first, rows, columns, inside, chunks, cells, REGION)
    else:
        first = moments_ptr + matrix * chunks * (SIDE * SIDE)
        moments = _of_matrix(first, rows, columns, inside, chunks, AREA)

    # Moments per region, centred. A constant becomes float32 unless it is made float64 here.
    cell = tl.full((1, 1), CELL, tl.float64)
    one = tl.full((1, 1), 1.0, tl.float64)
    scalar = tl.zeros((1, 1), tl.int32)
    count = moments.count
    regions = tl.maximum(count, 1.0)
    scale = 1.0 / (regions if MEAN else one)
    e_sum = moments.e_sum / cell
    y_sum = moments.y_sum / cell
    area = cell * cell
    ee = (moments.ee / area - e_sum * tl.trans(e_sum) / regions) * scale
    ey = (moments.ey / area - e_sum * tl.trans(y_sum) / regions) * scale
    yy = (moments.yy / area - y_sum * tl.trans(y_sum) / regions) * scale
    if centred:  # p - center was read in the place of y, and y = p - e
        pp = yy
        py = pp - tl.trans(ey)
        yy = pp - ey - tl.trans(ey) + ee
        center = tl.load(center_ptr + matrix).to(tl.float64) / cell
        y_sum = tl.where(rows < AREA, y_sum - e_sum + center * regions, 0.0)
    else:
        pp = ee + ey + tl.trans(ey) + yy
        py = ey + yy
        y_sum = tl.where(rows < AREA, y_sum + regions * middle, 0.0)
    e_row = tl.trans(e_sum)
    y_row = tl.trans(y_sum)

    ridge = tl.where(rows == columns, tl.where(rows < AREA, one * epsilon, one), 0.0)
    pp += ridge  # S_P + eps I
    m = yy + ridge  # to become M; py, S_PY, is to become A^T
    info = tl.zeros((1, 1), tl.int32)
    for k in tl.range(0, AREA):  # eliminate P
        row, pivot, info = _pivot(pp, info, rows, columns, k, 0)
        scaled = row / pivot
        column = tl.trans(scaled)
        cross = _row_of(py, rows == k)
        m -= tl.trans(cross) * (cross / pivot)
        py = tl.where(rows == k, cross / pivot, py - column * cross)
        pp = tl.where(columns == k, column, pp - column * row)
        pp = tl.where(rows == k, tl.where(columns == k, -1.0 / pivot, scaled), pp)

    a = tl.trans(py)  # rows of labels, columns of predictions
    right = a  # to become M^-1 A
    product = tl.zeros((WIDTH, WIDTH), tl.float64)  # to become A^T M^-1 A
    pivots = tl.full((1, WIDTH), 1.0, tl.float64)
    for k in tl.range(0, AREA):  # eliminate M
        row, pivot, info = _pivot(m, info, rows, columns, k, AREA)
        pivots = tl.where(columns == k, pivot, pivots)
        scaled = row / pivot
        column = tl.trans(scaled)
        solved = _row_of(right, rows == k)
        product += tl.trans(solved) * (solved / pivot)
        right = tl.where(rows == k, solved / pivot, right - column * solved)
        m = tl.where(columns == k, column, m - column * row)
        m = tl.where(rows == k, tl.where(columns == k, -1.0 / pivot, scaled), m)

    information = tl.sum(tl.log(pivots), 1)[:, None] * (0.5 / (one * AREA))
    information = tl.where(info == 0, information, float("nan"))
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=1)
    leave(sums, 0, tl.sum(tl.where(count > 0, information, 0.0)))

    works = (info == 0) & (count > 0)
    residual_weights = tl.where(works & inside, product * (scale / AREA), 0.0)
    label_weights = tl.where(works & inside, (product - tl.trans(right)) * (scale / AREA), 0.0)
    constants = residual_weights * (e_row / regions) + label_weights * (y_row / regions)
    tl.store(info_ptr + matrix + scalar, tl.where(count > 0, info, 0))
    weights = weights_ptr + matrix * (AREA * SIDE)
    tl.store(weights + rows * AREA + columns, residual_weights, mask=inside)
    tl.store(weights + (rows + AREA) * AREA + columns, label_weights, mask=inside)
    tl.store(weights + 2 * AREA * AREA + index, -tl.sum(constants, 1), mask=index < AREA)

    if comes_last(sums):
        mutual = rmi_weight * total(sums, 0) / images
        _store_loss(
            loss_ptr, statistics_ptr, partials_ptr, parts, mutual, bce_weight, bce_smooth, BLOCK
        )
