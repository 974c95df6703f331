"""The kernel of region mutual information from the moments to the loss: one matrix per program.

Per (image, class), with P = Y + E the predictions and everything centred and over n (or 1):

    M = S_Y - S_YP (S_P + eps I)^-1 S_PY + eps I,       information = log det M / (2 d)
    d information / dP = (K1 E + K2 Y) / d,             K1 = A^T M^-1 A,  K2 = A^T M^-1 (A - I)

with A = S_YP (S_P + eps I)^-1. P is eliminated first, which leaves A^T and M in its wake; then M,
whose pivots give the determinant while M^-1 A and A^T M^-1 A are accumulated. No inverse is formed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.sums import Sums, comes_last, leave, total
from .features import SIZES

# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _row_of(tile, is_row):
    """The chosen row of a tile: [1, SIDE]."""
    return tl.sum(tl.where(is_row, tile, 0.0), 0)[None, :]


@triton.jit
def _pivot(tile, info, rows, columns, k, OFFSET: tl.constexpr):
    """(row without its pivot, pivot, info): a pivot that is not positive is reported, and is 1."""
    row = _row_of(tile, rows == k)
    pivot = tl.sum(tl.where(columns == k, row, 0.0), 1)[:, None]
    fails = (pivot > 0) == 0
    info = tl.where((info == 0) & fails, OFFSET + k + 1, info)
    return tl.where(columns == k, 0.0, row), tl.where(fails, 1.0, pivot), info


@triton.jit
def _load_moments(moments_ptr, rows, columns, mask, chunks, SIDE: tl.constexpr):
    """A block of the moments, the chunks added up in order."""
    values = tl.load(moments_ptr + rows * SIDE + columns, mask=mask, other=0.0)
    for chunk in tl.range(1, chunks):
        values += tl.load(
            moments_ptr + chunk * (SIDE * SIDE) + rows * SIDE + columns, mask=mask, other=0.0
        )
    return values


@triton.jit
def _store_loss(
    loss_ptr, statistics_ptr, partials_ptr, parts, mutual, bce_weight, bce_smooth,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the loss, and what the gradient of the cross entropy is multiplied by."""
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
    moments_ptr,  # [N * C, chunks, 2 d + 1, 2 d + 1] float64
    center_ptr,  # [N * C], if CENTRED: then p - center takes the place of y in the moments
    partials_ptr,  # [2, parts]: sums of the cross entropy and of the valid pixels
    info_ptr,  # [N * C] int32
    weights_ptr,  # [N * C, 2 d + 1, d] float64: K1 / (d n), K2 / (d n), what centring takes away
    loss_ptr,  # []
    statistics_ptr,  # [1]: bce_weight / (V + bce_smooth)
    scratch_ptr,
    tickets_ptr,
    programs,
    chunks,
    parts,
    images,
    epsilon,
    bce_weight,
    rmi_weight,
    bce_smooth,
    REGION: tl.constexpr,
    CELL: tl.constexpr,
    MEAN: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CELL: by how much the pooled maps are to be divided. BLOCK parts are added up at a time."""
    AREA: tl.constexpr = REGION * REGION
    SIDE: tl.constexpr = 2 * AREA + 1
    WIDTH: tl.constexpr = triton.next_power_of_2(AREA)
    matrix = tl.program_id(0).to(tl.int64)
    moments = moments_ptr + matrix * chunks * (SIDE * SIDE)
    index = tl.arange(0, WIDTH)
    rows = index[:, None]
    columns = index[None, :]
    inside = (rows < AREA) & (columns < AREA)

    # A constant becomes float32 unless it is made float64 here.
    cell = tl.full((1, 1), CELL, tl.float64)
    one = tl.full((1, 1), 1.0, tl.float64)
    scalar = tl.zeros((1, 1), tl.int32)
    count = _load_moments(moments, scalar + 2 * AREA, scalar + 2 * AREA, scalar == 0, chunks, SIDE)
    regions = tl.maximum(count, 1.0)
    scale = 1.0 / (regions if MEAN else one)
    e_sum = _load_moments(moments, rows, scalar + 2 * AREA, rows < AREA, chunks, SIDE) / cell
    y_sum = _load_moments(moments, rows + AREA, scalar + 2 * AREA, rows < AREA, chunks, SIDE) / cell
    area = cell * cell
    ee = _load_moments(moments, rows, columns, inside, chunks, SIDE) / area
    ey = _load_moments(moments, rows, columns + AREA, inside, chunks, SIDE) / area
    yy = _load_moments(moments, rows + AREA, columns + AREA, inside, chunks, SIDE) / area
    ee = (ee - e_sum * tl.trans(e_sum) / regions) * scale
    ey = (ey - e_sum * tl.trans(y_sum) / regions) * scale
    yy = (yy - y_sum * tl.trans(y_sum) / regions) * scale
    if CENTRED:  # what was read as y is p - center; with y = p - e:
        pp = yy
        py = pp - tl.trans(ey)
        yy = pp - ey - tl.trans(ey) + ee
        center = tl.load(center_ptr + matrix).to(tl.float64) / cell
        y_sum = tl.where(rows < AREA, y_sum - e_sum + center * regions, 0.0)
    else:
        pp = ee + ey + tl.trans(ey) + yy
        py = ey + yy
    e_row = tl.trans(e_sum)
    y_row = tl.trans(y_sum)

    ridge = tl.where(rows == columns, tl.where(rows < AREA, one * epsilon, one), 0.0)
    pp += ridge  # S_P + eps I
    m = yy + ridge  # to become M; py, S_PY, is to become A^T
    info = tl.zeros((1, 1), tl.int32)
    for k in tl.range(0, AREA):
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
    for k in tl.range(0, AREA):
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
