"""The backward pass of pixelwise losses over the classes of cells, into nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell_walk import load_corners
from .cells import along_row, factors_between, further, load_pixel, shares_of_columns
from .pixel_walk import of_each, slope
from .pixels import Block, no_class_yet, nothing_yet


class Backward(NamedTuple):
    """What a backward pass needs at every pixel."""

    given: Any
    map_ptrs: Any  # [N, H, W] each
    upstream: Any
    row_axis: Any
    column_axis: Any
    sizes: Any


class Upstream(NamedTuple):
    """The gradients of the values of an image."""

    pointer: Any  # to a map, or to one number for all pixels
    value: Any  # that number
    row_stride: Any
    column_stride: Any
    scales: Any  # of every loss: what it is multiplied by


class Row(NamedTuple):
    """A row of pixels in cells, with a block of classes."""

    share: Any  # [cells], of the nodes below
    lefts: Any  # of every class the left logit, [cells]
    steps: Any  # and the step to the right one
    first: Any  # the first class


class NodeSums(NamedTuple):
    """What the pixels of cells add to their nodes' gradients; tuples over a block's classes."""

    left: Any  # [cells], to the two nodes on the left
    right: Any
    below_left: Any  # of that, to the one below
    below_right: Any


class Gradient(NamedTuple):
    """Where the gradients of the nodes of an image go to."""

    pointer: Any  # [cells], to the lane's node of the first row and class
    row_stride: Any
    class_stride: Any
    rows: Any  # [cells], of nodes that are the lane's to store
    first: Any  # the first class of the block
    unseen: Any  # the first class that no other program has


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def sums_of_cells(
    walk, nodes, cells, first, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """What the pixels of cells add to their nodes, of the block of classes from ``first`` on."""
    UNROLL: tl.constexpr = TILE.unroll
    corners = load_corners(nodes, first, TILE.unroll, TILE)
    nothing = _zeros(TILE)
    sums = NodeSums(left=nothing, right=nothing, below_left=nothing, below_right=nothing)
    has_valid = no_class_yet(TILE)
    for r in tl.range(0, walk.sizes.highest):
        here = further(cells, r, 0, walk.sizes)
        # Below the cell anything will do.
        share = tl.load(walk.row_axis.shares + tl.minimum(here.top, walk.sizes.rows - 1))
        lefts = ()
        steps = ()
        for j in tl.static_range(UNROLL):
            left, step = along_row(corners[j], share)
            lefts = lefts + (left,)
            steps = steps + (step,)
        row = Row(share=share, lefts=lefts, steps=steps, first=first)
        in_row = (nothing, nothing, has_valid)
        if CELLS.chunks == 1:
            in_row = _add_chunk(in_row, walk, nodes, here, row, TERMS, TILE, CELLS)
        else:
            for chunk in tl.range(0, CELLS.chunks):
                part = further(here, 0, chunk * CELLS.columns, walk.sizes)
                in_row = _add_chunk(in_row, walk, nodes, part, row, TERMS, TILE, CELLS)
        all_sums, right_sums, has_valid = in_row
        sums = _add_row(sums, (all_sums, right_sums), share)
    return _without_ignored(sums, has_valid, TILE)


@triton.jit
def _without_ignored(sums, has_valid, TILE: tl.constexpr):
    """The sums, 0 of cells without a valid pixel.

    With a scale of 0, slopes are 0 but where a logit is not finite. Then so are the logits of all
    pixels of a cell, and its nodes' gradients are what the valid ones make of them: whatever the
    ignored ones beside them add, it changes nothing.
    """
    UNROLL: tl.constexpr = TILE.unroll
    left = ()
    right = ()
    below_left = ()
    below_right = ()
    for j in tl.static_range(UNROLL):
        left = left + (tl.where(has_valid != 0, sums.left[j], 0.0),)
        right = right + (tl.where(has_valid != 0, sums.right[j], 0.0),)
        below_left = below_left + (tl.where(has_valid != 0, sums.below_left[j], 0.0),)
        below_right = below_right + (tl.where(has_valid != 0, sums.below_right[j], 0.0),)
    return NodeSums(left=left, right=right, below_left=below_left, below_right=below_right)


@triton.jit
def _add_chunk(
    in_row, walk, nodes, cells, row, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """(sums of gradients, of those times the right nodes' shares, whether any pixel was valid).

    With those of a few columns more.
    """
    UNROLL: tl.constexpr = TILE.unroll
    COLUMNS: tl.constexpr = CELLS.columns
    shares = shares_of_columns(walk.column_axis, cells, walk.sizes, CELLS)
    all_sums, right_sums, has_valid = in_row
    for k in tl.static_range(COLUMNS):
        pixel = load_pixel(cells, k, TILE, CELLS)
        here = (further(cells, 0, k, walk.sizes), row, pixel, shares[k])
        factors = _factors(walk, nodes, here, TERMS, TILE, CELLS)
        block = _block_in_row(row, shares[k])
        more = ()
        more_right = ()
        for j in tl.static_range(UNROLL):
            gradient = slope(factors, block, j, walk.given, TERMS, 0, TILE)
            for term in tl.static_range(1, len(TERMS.slope)):
                gradient += slope(factors, block, j, walk.given, TERMS, term, TILE)
            more = more + (all_sums[j] + gradient,)
            more_right = more_right + (right_sums[j] + shares[k] * gradient,)
        all_sums = more
        right_sums = more_right
        has_valid = tl.where(pixel.label >= 0, 1, has_valid)
    return all_sums, right_sums, has_valid


@triton.jit
def _factors(walk, nodes, here, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """What the slopes of a pixel's classes share, of all losses."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    cells, row, pixel, column_share = here
    upstream = walk.upstream
    if CELLS.reduced:
        value = upstream.value
    else:
        offsets = cells.top * upstream.row_stride + cells.first * upstream.column_stride
        value = tl.load(upstream.pointer + offsets, mask=pixel.inside, other=0.0).to(dtype)
    scales = ()
    for k in tl.static_range(len(TERMS.slope)):
        scales = scales + (tl.where(pixel.label >= 0, value * upstream.scales[k], 0.0),)
    maps = ()
    for i in tl.static_range(len(walk.map_ptrs)):
        loaded = tl.load(walk.map_ptrs[i] + cells.place, mask=pixel.inside, other=0)
        maps = maps + (loaded,)
    arguments = (scales, maps, nodes, (row.share, column_share), pixel, walk.given)
    return of_each(factors_between, arguments, TERMS, TILE)


@triton.jit
def _block_in_row(row, share):
    """A block's classes of a column of pixels, interpolated along their row."""
    logits = ()
    for j in tl.static_range(len(row.lefts)):
        logits = logits + (row.lefts[j] + share * row.steps[j],)
    return Block(logits=logits, exists=(), start=row.first)


@triton.jit
def _add_row(sums, in_row, share):
    """The sums with those of a row that has this share of the nodes below."""
    all_sums, right_sums = in_row
    left = ()
    right = ()
    below_left = ()
    below_right = ()
    for j in tl.static_range(len(all_sums)):
        to_left = all_sums[j] - right_sums[j]
        left = left + (sums.left[j] + to_left,)
        right = right + (sums.right[j] + right_sums[j],)
        below_left = below_left + (sums.below_left[j] + share * to_left,)
        below_right = below_right + (sums.below_right[j] + share * right_sums[j],)
    return NodeSums(left=left, right=right, below_left=below_left, below_right=below_right)


@triton.jit
def _zeros(TILE: tl.constexpr):
    """A zero for every class of a block, [cells] each."""
    UNROLL: tl.constexpr = TILE.unroll
    zeros = ()
    for _ in tl.static_range(UNROLL):
        zeros = zeros + (nothing_yet(0.0, TILE),)
    return zeros


# --- nodes ----------------------------------------------------------------------------------------


@triton.jit
def nothing_waits(TILE: tl.constexpr):
    """What the nodes above the first row of cells have from the cells before it."""
    return _zeros(TILE), _zeros(TILE)


@triton.jit
def join_rows(waiting, sums, TILE: tl.constexpr):
    """The gradients (left, right) of the nodes above a row of cells, and of those below, so far."""
    UNROLL: tl.constexpr = TILE.unroll
    left_before, right_before = waiting
    left = ()
    right = ()
    for j in tl.static_range(UNROLL):
        left = left + (left_before[j] + (sums.left[j] - sums.below_left[j]),)
        right = right + (right_before[j] + (sums.right[j] - sums.below_right[j]),)
    return (left, right), (sums.below_left, sums.below_right)


@triton.jit
def store_nodes(gradient, complete, row, TILE: tl.constexpr):
    """Store the gradients of a row of nodes: what the cells on their left and right add."""
    UNROLL: tl.constexpr = TILE.unroll
    left, right = complete
    LANES: tl.constexpr = TILE.pixels
    neighbour = tl.minimum(tl.arange(0, LANES) + 1, LANES - 1)
    pointers = gradient.pointer + row * gradient.row_stride
    for j in tl.static_range(UNROLL):
        total = right[j] + tl.gather(left[j], neighbour, 0)
        number = gradient.first + j
        mask = row < tl.where(number >= gradient.unseen, gradient.rows, 0)
        tl.store(pointers + number * gradient.class_stride, total, mask=mask)
