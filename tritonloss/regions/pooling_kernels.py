"""Kernels of region mutual information at the logits' resolution: pooling, cross entropy, and back.

Pooling cells of SIZE x SIZE pixels are tiles [CELLS, SIDE] (SIDE the next power of two), row after
row of the cell. A program reads its labels once and goes through the classes with them, so that
neither probabilities nor one-hot labels reach memory at full resolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E
from .features import (
    SIZES,
    complements,
    consistent_residual,
    load_label,
    load_scaled,
    logit_gradient,
    miss_of,
    plane_of,
    pointer_to,
    scale_of_entropy,
    sigmoid_pair,
    store_logit_gradient,
)

# How many factors of the cross entropy are multiplied: each is at most 2, and float32 holds 2^64.
FACTORS = tl.constexpr(64)
# Logits beyond it need not be told from infinite ones: their sigmoids are 0 and 1.
LARGE = tl.constexpr(1e38)


class Map(NamedTuple):
    """A map of all images and classes."""

    pointer: Any
    strides: Any


class Partials(NamedTuple):
    """Where a program leaves its two partial sums."""

    pointer: Any  # to the first
    parts: Any  # how far behind it the second is


class Corners(NamedTuple):
    """The four pixels around cells: where they are, their shares of p, and whether valid."""

    rows: Any
    columns: Any
    shares: Any
    are_valid: Any


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _cell_program(cell_rows, SIZE: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr):
    """(image, cell row, cells [CELLS], columns [CELLS, SIDE], inside [CELLS, SIDE])."""
    image = (tl.program_id(0) // cell_rows).to(tl.int64)
    cell_row = tl.program_id(0) % cell_rows
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    within = tl.arange(0, SIDE)
    column = cell[:, None] * SIZE + within[None, :] - SIZE // 2
    return image, cell_row, cell, column, (within < SIZE)[None, :] & (column >= 0)


@triton.jit
def _in_row(inside, column, row, height, width):
    """The mask of one row of pixels; a row outside the image has the column limit 0."""
    return inside & (column < tl.where((row >= 0) & (row < height), width, 0))


@triton.jit
def _nearest_place(index, pixels, cells):
    """(the pixel before a cell's place, numerator of the share of the pixel after it).

    Corners of both grids are at the same place: cell k is at k (pixels - 1) / (cells - 1), computed
    in whole numbers. The share is numerator / (cells - 1).
    """
    intervals = tl.maximum(cells - 1, 1)
    place = index.to(tl.int64) * (pixels - 1)
    return (place // intervals).to(tl.int32), place % intervals


@triton.jit
def _hat(pixel, pixels, cells):
    """(cell, numerator) of the one cell that may read a pixel; its share is numerator / intervals.

    Cells are at least two pixels apart, so that two cells never read the same pixel.
    """
    intervals = tl.maximum(cells - 1, 1)
    span = tl.maximum(tl.where(cells > 1, pixels - 1, 1), 1)
    scaled = pixel.to(tl.int64) * intervals
    cell = tl.minimum((2 * scaled + span) // (2 * span), cells - 1)
    distance = tl.abs(cell * tl.where(cells > 1, pixels - 1, 0) - scaled)
    return cell, tl.maximum(intervals - distance, 0)


@triton.jit
def _leave_entropy(
    partials, logits, target, size, dtype: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    IGNORED: tl.constexpr,
):  # fmt: skip
    """Store two sums over a strip: of the cross entropy, and of the valid pixels."""
    channels, height, width = size
    bands, blocks = tl.cdiv(height, ROWS), tl.cdiv(width, LANES)
    image = (tl.program_id(0) // (bands * blocks)).to(tl.int64)
    first_row = tl.program_id(0) // blocks % bands * ROWS
    column = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    labels = plane_of(target.pointer, target.strides, image, 0)

    entropy = tl.zeros((LANES,), dtype)
    valid = tl.zeros((LANES,), dtype)
    for i in tl.range(0, tl.minimum(ROWS, height - first_row)):
        row = first_row + i
        label = load_label(labels, row, column, column < width, channels, IGNORED)
        valid += tl.where(label >= 0, 1.0, 0.0)
        for block in tl.range(0, channels, FACTORS):
            product = tl.full((LANES,), 1.0, dtype)
            for channel in tl.range(block, tl.minimum(block + FACTORS, channels)):
                of_class = plane_of(logits.pointer, logits.strides, image, channel)
                pixels = pointer_to(of_class, row, column)
                u = tl.load(pixels, mask=label >= 0, other=float("-inf")).to(dtype) * LOG2_E
                _, excess, factor, rest = miss_of(u, label == channel)
                entropy += excess * LN_2 + rest
                product *= factor
            entropy += tl.log(product)
    tl.store(partials.pointer, tl.sum(entropy))
    tl.store(partials.pointer + partials.parts, tl.sum(valid))


@triton.jit
def _corners_of_cells(target, cells, size, steps, dtype: tl.constexpr, IGNORED: tl.constexpr):
    """(label of the nearest pixel, the four pixels around, whether an invalid pixel is read)."""
    cell_row, cell, pooled_height, pooled_width = cells
    channels, height, width = size
    mask = cell < pooled_width
    top, row_share = _nearest_place(cell_row, height, pooled_height)
    left, column_share = _nearest_place(cell, width, pooled_width)
    down = row_share.to(dtype) / tl.maximum(pooled_height - 1, 1).to(dtype)
    right = column_share.to(dtype) / tl.maximum(pooled_width - 1, 1).to(dtype)
    # In float32, as torch.nn.functional.interpolate finds the nearest pixel.
    nearest_row = tl.minimum((cell_row.to(tl.float32) * steps[0]).to(tl.int32), height - 1)
    nearest_column = tl.minimum((cell.to(tl.float32) * steps[1]).to(tl.int32), width - 1)
    nearest = load_label(target, nearest_row, nearest_column, mask, channels, IGNORED)

    rows = ()
    columns = ()
    shares = ()
    are_valid = ()
    touched = mask & (nearest < 0)
    for k in tl.static_range(4):
        share = (down if k >= 2 else 1.0 - down) * (right if k % 2 == 1 else 1.0 - right)
        row = tl.minimum(top + k // 2, height - 1)
        column = tl.minimum(left + k % 2, width - 1)
        label = load_label(target, row, column, mask, channels, IGNORED)
        touched = touched | (mask & (label < 0) & (share > 0))
        rows = rows + (row,)
        columns = columns + (column,)
        shares = shares + (share,)
        are_valid = are_valid + (label >= 0,)
    return nearest, Corners(rows=rows, columns=columns, shares=shares, are_valid=are_valid), touched


@triton.jit
def _sampled_residual(logits, corners, positive, mask, dtype: tl.constexpr):
    """The residual p - y of cells, with p interpolated between its corners."""
    p = tl.zeros(positive.shape, dtype)
    rest = tl.zeros(positive.shape, dtype)  # 1 - p
    for k in tl.static_range(4):
        u = load_scaled(logits, corners.rows[k], corners.columns[k], mask, dtype)
        u = tl.where(corners.are_valid[k], u, float("-inf"))  # p = 0
        larger, smaller = sigmoid_pair(u)
        # Selected, not multiplied: a NaN in a pixel that has no share does no harm.
        share = corners.shares[k]
        p += tl.where(share > 0, tl.where(u >= 0, larger, smaller) * share, 0.0)
        rest += tl.where(share > 0, tl.where(u >= 0, smaller, larger) * share, 0.0)
    larger, smaller = complements(tl.minimum(p, rest))
    wrong = tl.where((rest <= p) != positive, larger, smaller)
    return tl.where(positive, -wrong, wrong)


# --- kernels: forward -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_pool_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    residual_ptr,  # [N, C, h, w]: sum over the cell of p - y; of the maxima if MAXIMUM
    labels_ptr,  # [N, C, h, w]: sum or maximum of y
    touched_ptr,  # [N, h, w]: whether a cell holds an invalid pixel, if DROP
    partials_ptr,  # [2, programs] float64: sums of the cross entropy and of the valid pixels
    logits_strides,
    target_strides,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    cell_rows,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    CELLS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    DROP: tl.constexpr,
    IGNORED: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Pools CELLS cells of a row; the classes are shared out along the third axis of the grid."""
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    image, cell_row, cell, column, inside = _cell_program(cell_rows, SIZE, SIDE, CELLS)
    target = plane_of(target_ptr, target_strides, image, 0, FLAT)
    stored = cell < tl.where(cell_row < pooled_height, pooled_width, 0)
    offset = cell_row.to(tl.int64) * pooled_width + cell

    # labels of the cells, for all classes
    labels = ()
    valid = tl.zeros((CELLS, SIDE), dtype)
    touched = tl.zeros((CELLS, SIDE), tl.int32)
    for j in tl.static_range(SIZE):
        row = cell_row * SIZE + j - SIZE // 2
        mask = _in_row(inside, column, row, height, width)
        label = load_label(target, row, column, mask, channels, IGNORED)
        labels = labels + (label,)
        valid += tl.where(label >= 0, 1.0, 0.0)
        touched |= (mask & (label < 0)).to(tl.int32)
    if DROP:
        whole = touched_ptr + image * pooled_height * pooled_width
        tl.store(whole + offset, tl.max(touched, 1).to(tl.uint8), mask=stored)

    # class after class: its pooled maps, and its part of the cross entropy
    entropy = tl.zeros((CELLS, SIDE), dtype)
    product = tl.full((CELLS, SIDE), 1.0, dtype)
    factors = 0
    for channel in tl.range(tl.program_id(2), channels, tl.num_programs(2)):
        logits = plane_of(logits_ptr, logits_strides, image, channel, FLAT)
        residual = tl.zeros((CELLS, SIDE), dtype)
        largest = tl.full((CELLS, SIDE), float("-inf"), dtype)
        count = tl.zeros((CELLS, SIDE), dtype)
        for j in tl.static_range(SIZE):
            row = cell_row * SIZE + j - SIZE // 2
            pixels = pointer_to(logits, row, column)
            u = tl.load(pixels, mask=labels[j] >= 0, other=float("-inf")).to(dtype) * LOG2_E
            positive = labels[j] == channel
            missed, excess, factor, rest = miss_of(u, positive)
            entropy += excess * LN_2 + rest
            product *= factor
            count += tl.where(positive, 1.0, 0.0)
            residual += tl.where(positive, -missed, missed)
            if MAXIMUM:
                largest = tl.maximum(largest, u, propagate_nan=tl.PropagateNan.ALL)
        if MAXIMUM:
            present = tl.max(count, 1) > 0
            pooled = consistent_residual(tl.max(largest, 1), present)
            # On some devices a reduction drops NaN, and no option prevents it.
            spoilt = tl.max((largest != largest).to(tl.int32), 1) > 0
            pooled = tl.where(spoilt, float("nan"), pooled)
            labelled = tl.where(present, 1.0, 0.0)
        else:
            pooled = tl.sum(residual, 1)
            labelled = tl.sum(count, 1)
        plane = (image * channels + channel) * pooled_height * pooled_width
        tl.store(residual_ptr + plane + offset, pooled, mask=stored)
        tl.store(labels_ptr + plane + offset, labelled.to(tl.float16), mask=stored)
        factors += SIZE
        if factors + SIZE > FACTORS:
            entropy += tl.log(product)
            product = tl.full((CELLS, SIDE), 1.0, dtype)
            factors = 0
    entropy += tl.log(product)

    # the program's partial sums; valid pixels are counted by one share of the classes only
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    program += tl.program_id(0)
    counted = tl.where(tl.program_id(2) == 0, tl.sum(valid), 0.0)
    tl.store(partials_ptr + program, tl.sum(entropy))
    tl.store(partials_ptr + programs + program, counted)


@triton.jit(do_not_specialize=SIZES)
def _rmi_cross_entropy_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    partials_ptr,  # [2, programs] float64: sums of the cross entropy and of the valid pixels
    logits_strides,
    target_strides,
    channels,
    height,
    width,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    IGNORED: tl.constexpr,
):
    """Adds up the cross entropy alone, where no other kernel reads all pixels."""
    size = (channels, height, width)
    logits = Map(pointer=logits_ptr, strides=logits_strides)
    target = Map(pointer=target_ptr, strides=target_strides)
    partials = Partials(pointer=partials_ptr + tl.program_id(0), parts=tl.num_programs(0))
    element: tl.constexpr = logits_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    _leave_entropy(partials, logits, target, size, dtype, LANES, ROWS, IGNORED)


@triton.jit(do_not_specialize=SIZES)
def _rmi_sample_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    residual_ptr,  # [N, C, h, w]: p - y, p interpolated, y of the nearest pixel
    labels_ptr,  # [N, C, h, w]: y
    touched_ptr,  # [N, h, w]: whether an invalid pixel was read, if DROP
    partials_ptr,  # [2, parts] float64: sums of the cross entropy and of the valid pixels
    logits_strides,
    target_strides,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    row_step,  # pixels per cell
    column_step,
    parts,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    DROP: tl.constexpr,
    IGNORED: tl.constexpr,
):
    """Samples cells at their places; the first `parts` programs add up the cross entropy."""
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    logits = Map(pointer=logits_ptr, strides=logits_strides)
    target = Map(pointer=target_ptr, strides=target_strides)
    size = (channels, height, width)
    program = tl.program_id(0) - parts
    blocks = tl.cdiv(pooled_width, LANES)
    image = (program // (pooled_height * blocks)).to(tl.int64)
    cell_row = program // blocks % pooled_height
    cell = program % blocks * LANES + tl.arange(0, LANES)
    cells = (cell_row, cell, pooled_height, pooled_width)
    if program < 0:
        partials = Partials(pointer=partials_ptr + tl.program_id(0), parts=parts)
        _leave_entropy(partials, logits, target, size, dtype, LANES, ROWS, IGNORED)
    else:
        labels = plane_of(target_ptr, target_strides, image, 0)
        steps = (row_step, column_step)
        nearest, corners, touched = _corners_of_cells(labels, cells, size, steps, dtype, IGNORED)
        mask = cell < pooled_width
        offset = cell_row.to(tl.int64) * pooled_width + cell
        if DROP:
            whole = touched_ptr + image * pooled_height * pooled_width
            tl.store(whole + offset, touched.to(tl.uint8), mask=mask)
        for channel in tl.range(0, channels):
            of_class = plane_of(logits_ptr, logits_strides, image, channel)
            positive = nearest == channel
            residual = _sampled_residual(of_class, corners, positive, mask, dtype)
            plane = (image * channels + channel) * pooled_height * pooled_width
            tl.store(residual_ptr + plane + offset, residual, mask=mask)
            tl.store(labels_ptr + plane + offset, positive.to(tl.float16), mask=mask)


# --- kernels: backward ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_expand_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [1] float64: bce_weight / V
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    grad_pooled_ptr,  # [some images, or classes, h, w]: gradient of each pixel's probability
    grad_logits_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_logits_strides,
    channels,  # how many classes from first_class on, of `classes` in all
    first_image,
    first_class,
    classes,
    height,
    width,
    pooled_height,
    pooled_width,
    cell_rows,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    CELLS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    IGNORED: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Spreads a cell's gradient over its pixels, or gives it to the first of the largest."""
    dtype: tl.constexpr = grad_pooled_ptr.dtype.element_ty
    image, cell_row, cell, column, inside = _cell_program(cell_rows, SIZE, SIDE, CELLS)
    target = plane_of(target_ptr, target_strides, first_image + image, 0, FLAT)
    stored = cell < tl.where(cell_row < pooled_height, pooled_width, 0)
    offset = cell_row.to(tl.int64) * pooled_width + cell
    entropy_scale = scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype)
    # labels of the cells, for all classes
    labels = ()
    for j in tl.static_range(SIZE):
        row = cell_row * SIZE + j - SIZE // 2
        mask = _in_row(inside, column, row, height, width)
        labels = labels + (load_label(target, row, column, mask, classes, IGNORED),)

    for channel in tl.range(tl.program_id(2), channels, tl.num_programs(2)):
        own = first_class + channel
        logits = plane_of(logits_ptr, logits_strides, first_image + image, own, FLAT)
        grad_logits = plane_of(grad_logits_ptr, grad_logits_strides, first_image + image, own, FLAT)
        plane = (image * channels + channel) * pooled_height * pooled_width
        gradient = tl.load(grad_pooled_ptr + plane + offset, mask=stored, other=0.0)[:, None]
        first = tl.full((CELLS, 1), 0, tl.int32)
        if MAXIMUM:
            # The pixel that the maximum came from: the first of the largest logits, or of NaNs.
            largest = tl.full((CELLS, 1), float("-inf"), dtype)
            for j in tl.static_range(SIZE):
                row = cell_row * SIZE + j - SIZE // 2
                mask = _in_row(inside, column, row, height, width)
                u = load_scaled(logits, row, column, mask, dtype)
                u = tl.where(u == u, tl.minimum(tl.maximum(u, -LARGE), LARGE), float("inf"))
                u = tl.where(labels[j] >= 0, u, float("-inf"))
                of_row = tl.max(u, 1)[:, None]
                place = tl.broadcast_to(tl.arange(0, SIDE)[None, :], (CELLS, SIDE))
                place = tl.min(tl.where(u == of_row, place, SIDE), 1)[:, None]
                first = tl.where(of_row > largest, place + j * SIDE, first)
                largest = tl.maximum(largest, of_row)
        for j in tl.static_range(SIZE):
            row = cell_row * SIZE + j - SIZE // 2
            mask = _in_row(inside, column, row, height, width)
            share = gradient
            if MAXIMUM:
                place = tl.arange(0, SIDE)[None, :] + j * SIDE
                share = tl.where(place == first, gradient, 0.0)
            u = load_scaled(logits, row, column, mask, dtype)
            value = logit_gradient(u, labels[j], own, share, entropy_scale)
            store_logit_gradient(pointer_to(grad_logits, row, column), value, mask)


@triton.jit(do_not_specialize=SIZES)
def _rmi_sample_backward_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [1] float64: bce_weight / V
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    grad_pooled_ptr,  # [some images, or classes, h, w]: gradient of interpolated probabilities
    grad_logits_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_logits_strides,
    channels,  # how many classes from first_class on, of `classes` in all
    first_image,
    first_class,
    classes,
    height,
    width,
    pooled_height,
    pooled_width,
    LANES: tl.constexpr,
    IGNORED: tl.constexpr,
):
    """Gives each pixel of a row its share of the gradient of the one cell that may read it."""
    dtype: tl.constexpr = grad_pooled_ptr.dtype.element_ty
    image = (tl.program_id(0) // height).to(tl.int64)
    row = tl.program_id(0) % height
    column = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = column < width
    target = plane_of(target_ptr, target_strides, first_image + image, 0)
    entropy_scale = scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype)

    cell_row, down = _hat(row, height, pooled_height)
    cell, across = _hat(column, width, pooled_width)
    share = down.to(dtype) / tl.maximum(pooled_height - 1, 1).to(dtype)
    share = share * (across.to(dtype) / tl.maximum(pooled_width - 1, 1).to(dtype))
    offset = cell_row * pooled_width + cell
    label = load_label(target, row, column, mask, classes, IGNORED)

    first_plane = image * channels - first_class
    image += first_image
    for channel in tl.range(first_class, first_class + channels):
        logits = plane_of(logits_ptr, logits_strides, image, channel)
        grad_logits = plane_of(grad_logits_ptr, grad_logits_strides, image, channel)
        plane = (first_plane + channel) * pooled_height * pooled_width
        gradient = tl.load(grad_pooled_ptr + plane + offset, mask=mask & (share > 0), other=0.0)
        u = load_scaled(logits, row, column, mask, dtype)
        value = logit_gradient(u, label, channel, gradient * share, entropy_scale)
        store_logit_gradient(pointer_to(grad_logits, row, column), value, mask)
