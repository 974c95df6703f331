"""The kernels of pixel contrast: log-sums over negatives, losses of positives, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.math import log2_normal, sigmoid_base2, softplus_base2
from .._engine.sums import Sums, comes_last, leave, total
from .tiles import (
    LOWEST,
    Matrix,
    Side,
    added_product,
    anchors_of,
    are_others,
    are_same,
    bounds_of,
    keys_of,
    nothing,
    scores_of,
    side_of,
    slice_of,
    slopes_of,
)


@triton.jit(do_not_specialize=["count"])
def _classes_kernel(
    labels_ptr, classes_ptr, count, stride, ignored, IGNORES: tl.constexpr, BLOCK: tl.constexpr
):
    """Write labels as int32 classes; -1 where there is none."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    label = tl.load(labels_ptr + index * stride, mask=inside, other=0).to(tl.int64)

    none = (label < 0) | (label >= 2**31 - 1)
    if IGNORES:
        none = none | (label == ignored)

    tl.store(classes_ptr + index, tl.where(none, -1, label).to(tl.int32), mask=inside)


@triton.jit
def _negatives_kernel(
    anchors_ptr, anchor_classes_ptr, keys_ptr, key_classes_ptr, bounds_ptr, partial_ptr,
    anchors_stride, keys_stride, anchors, keys, tiles, splits, scale,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write of every anchor and part of the keys the largest score of negatives, and the sum.

    The sum is of 2^(score - largest). A part is every so many-th tile of keys: those of one class,
    which lie side by side, are in all parts. Programs of one part run side by side, so that its
    keys are read from memory once.
    """
    program = tl.program_id(0)
    split = program // tiles
    anchor_matrix = Matrix(pointer=anchors_ptr, stride=anchors_stride, count=anchors)
    key_matrix = Matrix(pointer=keys_ptr, stride=keys_stride, count=keys)
    rows = anchors_of(anchor_matrix, anchor_classes_ptr, program % tiles * TILE.anchors, TILE)
    held = slice_of(anchor_matrix, rows, 0, TILE.depth, TILE)
    lowest, _ = bounds_of(bounds_ptr, rows, anchors, TILE)

    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    largest = tl.full((TILE.anchors,), LOWEST, dtype)
    powers = tl.full((TILE.anchors,), 0.0, dtype)
    for first in tl.range(split * TILE.keys, keys, splits * TILE.keys):
        columns = keys_of(key_classes_ptr, first, keys, TILE)
        scores = scores_of(anchor_matrix, rows, held, key_matrix, columns, scale, TILE)
        negative = are_others(rows, columns)
        if TILE.hardest:
            negative = negative & ~(scores < lowest[:, None])
        scores = tl.where(negative, scores, float("-inf"))
        before = largest
        # A NaN is lost here on a GPU, and kept by the sum.
        largest = tl.maximum(largest, tl.max(scores, 1))
        powers = powers * tl.exp2(before - largest)
        powers += tl.sum(tl.exp2(scores - largest[:, None]), 1)

    pointer = partial_ptr + split * anchors + rows.index
    tl.store(pointer, largest, mask=rows.there)
    tl.store(pointer + splits * anchors, powers, mask=rows.there)


@triton.jit
def _log_sum(partial_ptr, rows, anchors, parts, TILE: tl.constexpr):
    """The base-2 logarithm of each anchor's sum over the negatives of all parts; -inf of none."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    largest = tl.full((TILE.anchors,), LOWEST, dtype)
    powers = tl.full((TILE.anchors,), 0.0, dtype)
    pointer = partial_ptr + rows.index
    for _ in tl.range(0, parts):
        other = tl.load(pointer, mask=rows.there, other=LOWEST)
        part = tl.load(pointer + parts * anchors, mask=rows.there, other=0.0)
        pointer += anchors
        before = largest
        largest = tl.maximum(largest, other)
        powers = powers * tl.exp2(before - largest) + part * tl.exp2(other - largest)
    # The sum is 1 at the least, or 0, or no number.
    return tl.where(powers == 0.0, float("-inf"), largest + log2_normal(powers))


@triton.jit
def _positives_kernel(
    anchors_ptr, anchor_classes_ptr, keys_ptr, key_classes_ptr, bounds_ptr,
    negatives_ptr, log_sum_ptr, partial_ptr,
    anchors_stride, keys_stride, anchors, keys, tiles, splits, parts, scale,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write of every anchor and part of the keys the sums over positives: losses, sigmoids, count.

    Tiles that hold no positive are passed by: nothing but their classes is read. ``parts`` are
    those that the sums over negatives were divided into.
    """
    program = tl.program_id(0)
    split = program // tiles
    anchor_matrix = Matrix(pointer=anchors_ptr, stride=anchors_stride, count=anchors)
    key_matrix = Matrix(pointer=keys_ptr, stride=keys_stride, count=keys)
    rows = anchors_of(anchor_matrix, anchor_classes_ptr, program % tiles * TILE.anchors, TILE)
    held = slice_of(anchor_matrix, rows, 0, TILE.depth, TILE)
    _, highest = bounds_of(bounds_ptr, rows, anchors, TILE)
    log_sum = _log_sum(negatives_ptr, rows, anchors, parts, TILE)
    if split == 0:
        tl.store(log_sum_ptr + rows.index, log_sum, mask=rows.there)
    first_class = tl.min(tl.where(rows.classes < 0, 2147483647, rows.classes), 0)
    last_class = tl.max(rows.classes, 0)

    losses = tl.zeros_like(log_sum)
    sigmoids = tl.zeros_like(log_sum)
    counts = tl.zeros_like(log_sum)
    for first in tl.range(split * TILE.keys, keys, splits * TILE.keys):
        columns = keys_of(key_classes_ptr, first, keys, TILE)
        near = (columns.classes >= first_class) & (columns.classes <= last_class)
        if tl.max(near.to(tl.int32), 0) > 0:
            scores = scores_of(anchor_matrix, rows, held, key_matrix, columns, scale, TILE)
            positive = are_same(rows, columns, TILE)
            if TILE.hardest:
                positive = positive & ~(scores > highest[:, None])
            above = log_sum[:, None] - scores
            losses += tl.sum(tl.where(positive, softplus_base2(above), 0.0), 1)
            sigmoids += tl.sum(tl.where(positive, sigmoid_base2(above), 0.0), 1)
            counts += tl.sum(positive.to(counts.dtype), 1)

    pointer = partial_ptr + split * anchors + rows.index
    tl.store(pointer, losses, mask=rows.there)
    tl.store(pointer + splits * anchors, sigmoids, mask=rows.there)
    tl.store(pointer + 2 * splits * anchors, counts, mask=rows.there)


@triton.jit
def _statistics_kernel(
    partial_ptr, log_sum_ptr, statistics_ptr, loss_ptr, share_ptr, totals_ptr,
    scratch_ptr, tickets_ptr, programs, anchors, splits, ratio,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what the backward pass needs of every anchor, and the mean of their losses."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < anchors
    log_sum = tl.load(log_sum_ptr + index, mask=inside, other=float("inf"))
    losses = tl.zeros_like(log_sum)
    sigmoids = tl.zeros_like(log_sum)
    counts = tl.zeros_like(log_sum)
    pointer = partial_ptr + index
    for _ in tl.range(0, splits):
        losses += tl.load(pointer, mask=inside, other=0.0)
        sigmoids += tl.load(pointer + splits * anchors, mask=inside, other=0.0)
        counts += tl.load(pointer + 2 * splits * anchors, mask=inside, other=0.0)
        pointer += anchors

    taken = counts > 0
    share = tl.where(taken, 1.0 / tl.maximum(counts, 1.0), 0.0)
    tl.store(statistics_ptr + index, tl.where(taken, log_sum, float("inf")), mask=inside)
    tl.store(statistics_ptr + anchors + index, sigmoids * share, mask=inside)
    tl.store(statistics_ptr + 2 * anchors + index, share, mask=inside)

    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=2)
    leave(sums, 0, tl.sum((losses * share).to(tl.float64)))
    leave(sums, 1, tl.sum(taken.to(tl.int32)))
    if comes_last(sums):
        value = total(sums, 0)
        count = total(sums, 1)
        tl.store(totals_ptr, value)
        tl.store(totals_ptr + 1, count)
        divisor = tl.maximum(count, 1.0)
        tl.store(loss_ptr, value / divisor * ratio)
        tl.store(share_ptr, 1.0 / divisor)


@triton.jit
def _slopes_kernel(
    anchors_ptr, anchor_classes_ptr, keys_ptr, key_classes_ptr, bounds_ptr,
    statistics_ptr, partial_ptr,
    anchors_stride, keys_stride, anchors, keys, tiles, splits, scale,
    TILE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Write of every anchor and part of the keys the sum over keys of slope times key.

    Where the keys are the anchors, a pair's slope is that of both of its losses. Slopes are at most
    2 and are scaled: 16 bits hold the small ones.
    """
    program = tl.program_id(0)
    split = program // tiles % splits
    # The dimensions of this program's gradient; others have the others.
    part = 0
    if TILE.width < TILE.dims:
        part = program // (tiles * splits) * TILE.width
    anchor_matrix = Matrix(pointer=anchors_ptr, stride=anchors_stride, count=anchors)
    key_matrix = Matrix(pointer=keys_ptr, stride=keys_stride, count=keys)
    rows = anchors_of(anchor_matrix, anchor_classes_ptr, program % tiles * TILE.anchors, TILE)
    held = slice_of(anchor_matrix, rows, 0, TILE.depth, TILE)
    side = _as_column(side_of(statistics_ptr, bounds_ptr, rows, anchors, TILE), SCALE)

    sums = nothing(TILE.width, TILE)
    for first in tl.range(split * TILE.keys, keys, splits * TILE.keys):
        columns = keys_of(key_classes_ptr, first, keys, TILE)
        scores = scores_of(anchor_matrix, rows, held, key_matrix, columns, scale, TILE)
        same = are_same(rows, columns, TILE)
        slopes = slopes_of(scores, same, side, TILE)
        if TILE.own:
            other = side_of(statistics_ptr, bounds_ptr, columns, anchors, TILE)
            slopes += slopes_of(scores, same, _as_row(other, SCALE), TILE)
            itself = rows.index[:, None] == columns.index[None, :]
            slopes = tl.where(itself, 0.0, slopes)
        counted = (rows.classes >= 0)[:, None] & columns.there[None, :]
        slopes = tl.where(counted, slopes, 0.0).to(keys_ptr.dtype.element_ty)
        key = slice_of(key_matrix, columns, part, TILE.width, TILE)
        sums = added_product(sums, slopes, key, TILE)

    row = (split.to(tl.int64) * anchors + rows.index) * TILE.dims
    column = part + tl.arange(0, TILE.width)
    inside = rows.there[:, None] & (column < TILE.dims)[None, :]
    tl.store(partial_ptr + row[:, None] + column[None, :], sums, mask=inside)


@triton.jit
def _as_column(side, SCALE: tl.constexpr):
    """What is known of a tile's rows, [anchors, 1], with slopes times SCALE."""
    return Side(
        log_sum=side.log_sum[:, None],
        weight=(side.weight * SCALE)[:, None],
        share=(side.share * SCALE)[:, None],
        lowest=side.lowest[:, None],
        highest=side.highest[:, None],
    )


@triton.jit
def _as_row(side, SCALE: tl.constexpr):
    """What is known of a tile's columns, [1, keys], with slopes times SCALE."""
    return Side(
        log_sum=side.log_sum[None, :],
        weight=(side.weight * SCALE)[None, :],
        share=(side.share * SCALE)[None, :],
        lowest=side.lowest[None, :],
        highest=side.highest[None, :],
    )


@triton.jit
def _gradient_kernel(
    partial_ptr, upstream_ptr, share_ptr, gradient_ptr, elements, splits, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the anchors' gradient: the sum over all parts, times what the mean makes of it."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    scale = tl.load(upstream_ptr).to(share_ptr.dtype.element_ty) * tl.load(share_ptr) * factor

    gradient = tl.full((BLOCK,), 0.0, partial_ptr.dtype.element_ty)
    pointer = partial_ptr + index
    for _ in tl.range(0, splits):
        gradient += tl.load(pointer, mask=inside, other=0.0)
        pointer += elements

    gradient *= scale
    if gradient_ptr.dtype.element_ty != tl.float64:
        gradient = gradient.to(tl.float32)
    tl.store(gradient_ptr + index, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
