"""Kernels of region mutual information: second moments of regions, from every product of each.

They are used where regions are left out one by one (ignore="drop"), and for small maps. All other
moments are sums by lags (lag_sums.py).

The result per (image, class) is a symmetric float64 matrix of side 2 R^2 + 1: e, y, a constant 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import (
    SIZES,
    features_of,
    load_label,
    load_pair,
    plane_of,
    pointer_to,
)


@triton.jit(do_not_specialize=SIZES)
def _rmi_regions_kernel(
    target_ptr,  # touched [N, h, w], or labels
    kept_ptr,  # [N, h - R + 1, w - R + 1]: whether the region counts
    target_strides,
    channels,
    window_rows,
    window_columns,
    REGION: tl.constexpr,
    LANES: tl.constexpr,
    IGNORED: tl.constexpr,
    POOLED: tl.constexpr,
):
    """Marks the regions that touch no invalid pixel."""
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
    """Sums one row of the moments, over every chunks-th block of regions."""
    AREA: tl.constexpr = REGION * REGION
    SIDE: tl.constexpr = 2 * AREA + 1
    WIDTH: tl.constexpr = triton.next_power_of_2(SIDE)
    plane = tl.program_id(0).to(tl.int64)
    image = plane // channels
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0, READING
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
