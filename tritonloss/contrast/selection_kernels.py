"""The kernels that find each anchor's hardest negatives and positives, a digit at a time.

Scores are ordered like unsigned integers of as many bits. Each pass over the keys counts the digits
of 4 bits of those scores that agree with what is known of the last one that is taken; then one more
of its digits is known. After 8 passes (16 of float64) it is found, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    Matrix,
    anchors_of,
    are_others,
    are_same,
    keys_of,
    scores_of,
    slice_of,
)


@triton.jit
def _ordered(x, TILE: tl.constexpr):
    """Unsigned integers in the order of the numbers."""
    if TILE.double:
        bits = x.to(tl.int64, bitcast=True)
        result = tl.where(bits < 0, ~bits, bits ^ (tl.full((), 1, tl.int64) << 63))
        result = result.to(tl.uint64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        result = tl.where(bits < 0, ~bits, bits ^ (tl.full((), 1, tl.int32) << 31))
        result = result.to(tl.uint32, bitcast=True)
    return result


@triton.jit
def _number_of(place, DOUBLE: tl.constexpr):
    """The number that has this place in the order."""
    if DOUBLE:
        bits = place.to(tl.int64, bitcast=True)
        bits = tl.where(bits < 0, bits ^ (tl.full((), 1, tl.int64) << 63), ~bits)
        result = bits.to(tl.float64, bitcast=True)
    else:
        bits = place.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ (tl.full((), 1, tl.int32) << 31), ~bits)
        result = bits.to(tl.float32, bitcast=True)
    return result


@triton.jit
def _digits_kernel(
    anchors_ptr, anchor_classes_ptr, keys_ptr, key_classes_ptr, places_ptr, counts_ptr,
    anchors_stride, keys_stride, anchors, keys, tiles, splits, scale, shift, first_shift,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write how many scores of each anchor have which digit, of negatives and of positives.

    Of positives the order is that of the scores' negatives. Only what has the digits that are known
    is counted. Counts are [2, splits, anchors, 16].
    """
    program = tl.program_id(0)
    split = program // tiles % splits
    positives = program // (tiles * splits)
    anchor_matrix = Matrix(pointer=anchors_ptr, stride=anchors_stride, count=anchors)
    key_matrix = Matrix(pointer=keys_ptr, stride=keys_stride, count=keys)
    rows = anchors_of(anchor_matrix, anchor_classes_ptr, program % tiles * TILE.anchors, TILE)
    held = slice_of(anchor_matrix, rows, 0, TILE.depth, TILE)
    pointer = places_ptr + positives * anchors + rows.index
    end_of_known = tl.where(shift < first_shift, anchors, 0)
    known = tl.load(pointer, mask=rows.index < end_of_known, other=0)
    known = known.to(tl.uint64 if TILE.double else tl.uint32, bitcast=True)
    known = ((known >> shift) >> 4)[:, None]
    first_class = tl.min(tl.where(rows.classes < 0, 2147483647, rows.classes), 0)
    last_class = tl.max(rows.classes, 0)

    bin = tl.arange(0, 16)[None, :]
    counts = tl.full((TILE.anchors, 16), 0, tl.int32)
    for first in tl.range(split * TILE.keys, keys, splits * TILE.keys):
        columns = keys_of(key_classes_ptr, first, keys, TILE)
        near = (columns.classes >= first_class) & (columns.classes <= last_class)
        if (positives == 0) | (tl.max(near.to(tl.int32), 0) > 0):
            scores = scores_of(anchor_matrix, rows, held, key_matrix, columns, scale, TILE)
            chosen = are_others(rows, columns)
            if positives == 1:
                chosen = are_same(rows, columns, TILE)
                scores = scores * -1.0
            place = _ordered(scores, TILE)
            chosen = chosen & (((place >> shift) >> 4) == known)
            digit = ((place >> shift) & 15).to(tl.int32)
            # Four counts of 8 bits in one sum: a tile has at most 128 keys.
            one = tl.where(chosen, 1 << ((digit & 3) * 8), 0)
            for word in tl.static_range(4):
                packed = tl.sum(tl.where((digit >> 2) == word, one, 0), 1)[:, None]
                counts += tl.where((bin >> 2) == word, (packed >> ((bin & 3) * 8)) & 255, 0)

    row = (positives * splits + split).to(tl.int64) * anchors + rows.index
    tl.store(counts_ptr + row[:, None] * 16 + bin, counts, mask=rows.there[:, None])


@triton.jit
def _narrow_kernel(
    counts_ptr, places_ptr, ranks_ptr, bounds_ptr, anchors, splits, shift, first_shift,
    SHARE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put one more digit into the place of the last score that is taken, and what it leaves.

    The first time its rank among all scores, from the top, is the share of their number.
    """
    blocks = tl.cdiv(anchors, BLOCK)
    positives = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < anchors
    bin = tl.arange(0, 16)[None, :]

    counts = tl.full((BLOCK, 16), 0, tl.int32)
    row = (positives * splits).to(tl.int64) * anchors + index
    pointer = counts_ptr + row[:, None] * 16 + bin
    for _ in tl.range(0, splits):
        counts += tl.load(pointer, mask=inside[:, None], other=0)
        pointer += anchors * 16
    everything = tl.sum(counts, 1)

    at = positives * anchors + index
    is_first = shift == first_shift
    later = index < tl.where(is_first, 0, anchors)
    place = tl.load(places_ptr + at, mask=later, other=0)
    rank = tl.load(ranks_ptr + at, mask=later, other=0)
    share = tl.ceil(everything.to(tl.float32) * SHARE).to(tl.int32)
    rank = tl.where(is_first, tl.maximum(share, 1), rank)

    above = everything[:, None] - tl.cumsum(counts, 1)
    enough = above >= rank[:, None]
    digit = tl.minimum(tl.sum(enough.to(tl.int32), 1), 15)
    # The bound of no scores is 0.
    digit = tl.where(everything == 0, tl.where(is_first, 8, 0), digit)
    passed = tl.sum(tl.where(bin == digit[:, None], above, 0), 1)
    place = place | (digit.to(place.dtype) << shift)
    tl.store(places_ptr + at, place, mask=inside)
    tl.store(ranks_ptr + at, rank - passed, mask=inside)
    if shift == 0:
        bound = _number_of(place, DOUBLE)
        bound = tl.where(positives == 1, bound * -1.0, bound)
        tl.store(bounds_ptr + at, bound, mask=inside)
