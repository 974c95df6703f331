"""The nodes' gradients: sums over the pixels of their cells, joined from cell to cell."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixels import nothing_yet


class NodeSums(NamedTuple):
    """What a row of cells adds to the nodes' gradients: tuples over a block's classes."""

    above_both: Any  # of the nodes above, those on the left and on the right
    above_right: Any
    below_both: Any
    below_right: Any


class Gradient(NamedTuple):
    """Where the gradients of the nodes of an image go to."""

    pointer: Any  # [cells], to the lane's node of a row and of the first class of all
    class_stride: Any
    rows: Any  # [cells], of nodes that are the lane's to store
    first: Any  # the first class of the block
    unseen: Any  # the first class that no other program has
    scale: Any  # what all sums are multiplied by, if they are


@triton.jit
def add_row(sums, both_sums, right_sums, share):
    """The sums with those of a row that has this share of the nodes below."""
    above_both = ()
    above_right = ()
    below_both = ()
    below_right = ()
    above = 1.0 - share
    for j in tl.static_range(len(both_sums)):
        above_both = above_both + (sums.above_both[j] + above * both_sums[j],)
        above_right = above_right + (sums.above_right[j] + above * right_sums[j],)
        below_both = below_both + (sums.below_both[j] + share * both_sums[j],)
        below_right = below_right + (sums.below_right[j] + share * right_sums[j],)
    return NodeSums(
        above_both=above_both,
        above_right=above_right,
        below_both=below_both,
        below_right=below_right,
    )


@triton.jit
def if_any(has_valid, sums, TILE: tl.constexpr):
    """The sums of cells that have a valid pixel, and 0 of the others."""
    UNROLL: tl.constexpr = TILE.unroll
    above_both = ()
    above_right = ()
    below_both = ()
    below_right = ()
    valid = has_valid != 0
    for j in tl.static_range(UNROLL):
        above_both = above_both + (tl.where(valid, sums.above_both[j], 0.0),)
        above_right = above_right + (tl.where(valid, sums.above_right[j], 0.0),)
        below_both = below_both + (tl.where(valid, sums.below_both[j], 0.0),)
        below_right = below_right + (tl.where(valid, sums.below_right[j], 0.0),)
    return NodeSums(
        above_both=above_both,
        above_right=above_right,
        below_both=below_both,
        below_right=below_right,
    )


@triton.jit
def zeros(TILE: tl.constexpr):
    """A zero for every class of a block, [cells] each."""
    UNROLL: tl.constexpr = TILE.unroll
    zeros = ()
    for _ in tl.static_range(UNROLL):
        zeros = zeros + (nothing_yet(0.0, TILE),)
    return zeros


@triton.jit
def nothing_waits(TILE: tl.constexpr):
    """What the nodes above the first row of cells have from the cells before it."""
    return zeros(TILE)


@triton.jit
def join_rows(waiting, sums, TILE: tl.constexpr):
    """The gradients of the nodes above a row of cells, and of those below, so far.

    A lane's node lies between its cell and its neighbour's: it is on the right, and on the left.
    """
    UNROLL: tl.constexpr = TILE.unroll
    LANES: tl.constexpr = TILE.pixels
    neighbour = tl.minimum(tl.arange(0, LANES) + 1, LANES - 1)
    complete = ()
    still_waiting = ()
    for j in tl.static_range(UNROLL):
        above = tl.gather(sums.above_both[j] - sums.above_right[j], neighbour, 0)
        below = tl.gather(sums.below_both[j] - sums.below_right[j], neighbour, 0)
        complete = complete + (waiting[j] + (sums.above_right[j] + above),)
        still_waiting = still_waiting + (sums.below_right[j] + below,)
    return complete, still_waiting


@triton.jit
def store_nodes(
    gradient, complete, row, SCALED: tl.constexpr, ADDS: tl.constexpr, TILE: tl.constexpr
):
    """Store the gradients of the nodes above a row of cells.

    Of the first row of cells, number 0, they are not the program's.
    """
    UNROLL: tl.constexpr = TILE.unroll
    LANES: tl.constexpr = TILE.pixels
    inside = row <= tl.where(row > 0, gradient.rows, -1)
    for j in tl.static_range(UNROLL):
        total = complete[j]
        if SCALED:
            total = total * gradient.scale
        number = gradient.first + j
        pointers = gradient.pointer + number * gradient.class_stride
        is_unseen = tl.full((LANES,), 0, tl.int32) + number >= gradient.unseen
        if ADDS:
            total += tl.load(pointers, mask=inside & is_unseen, other=0.0).to(total.dtype)
        tl.store(pointers, total, mask=inside & is_unseen)


@triton.jit
def row_below(gradient, stride):
    """The same for the next row of nodes."""
    return Gradient(
        pointer=gradient.pointer + stride,
        class_stride=gradient.class_stride,
        rows=gradient.rows,
        first=gradient.first,
        unseen=gradient.unseen,
        scale=gradient.scale,
    )
