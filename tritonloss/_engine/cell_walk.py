"""Passes of pixelwise losses over the classes of cells: forward into states, back into nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cells import (
    along_row,
    factors_between,
    further,
    load_corner,
    load_pixel,
    look_up_between,
    shares_of_columns,
)
from .pixel_walk import add, add_again, finish, join, of_each, slope, start, store_maps
from .pixels import Block, no_class_yet, nothing_yet


class Forward(NamedTuple):
    """What a forward pass needs at every pixel of a lane."""

    nodes: Any
    pixels: Any  # a tuple of the lane's pixels, row after row
    given: Any
    row_shares: Any  # of every row the share of the nodes below, [cells]
    column_shares: Any  # of every column that of the right nodes


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


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def load_pixel_of(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """One of a lane's pixels, for ``of_pixels``."""
    cells, sizes = arguments
    row = further(cells, K // CELLS.columns, 0, sizes)
    return load_pixel(row, K % CELLS.columns, TILE, CELLS)


@triton.jit
def fold_cells(walk, full, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The states of all losses, of every pixel of a lane, after all classes.

    ``full`` is the number of classes in the blocks before the last, known at run time only, so that
    the loop over them stays one.
    """
    states = of_pixels(_start, (), TERMS, TILE, CELLS)
    states = _fold_blocks(states, walk, full, _add, TERMS, TILE, CELLS)
    if TERMS.passes == 2:
        states = of_pixels(_join, (states,), TERMS, TILE, CELLS)
        states = _fold_blocks(states, walk, full, _add_again, TERMS, TILE, CELLS)
    return states


@triton.jit
def _fold_blocks(
    states, walk, full, ADD: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """The states after ADD of all blocks in turn."""
    STEP: tl.constexpr = TILE.unroll
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL  # at least one, at most a whole block
    if FULL > 0:
        for first in tl.range(0, full, STEP):
            states = _add_block(states, walk, first, ADD, STEP, TERMS, TILE, CELLS)
    return _add_block(states, walk, FULL, ADD, LEFT, TERMS, TILE, CELLS)


@triton.jit
def _add_block(
    states, walk, first, ADD: tl.constexpr, COUNT: tl.constexpr, TERMS: tl.constexpr,
    TILE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The states of all pixels after ADD of the COUNT classes that begin with ``first``."""
    ROWS: tl.constexpr = CELLS.rows
    corners = _load_corners(walk.nodes, first, COUNT, TILE)
    lefts = ()
    steps = ()
    for r in tl.static_range(ROWS):
        for j in tl.static_range(COUNT):
            left, step = along_row(corners[j], walk.row_shares[r])
            lefts = lefts + (left,)
            steps = steps + (step,)
    return of_pixels(ADD, (states, walk, lefts, steps, first), TERMS, TILE, CELLS)


@triton.jit
def _load_corners(nodes, first, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The logits and steps of each cell, of every class of a block."""
    corners = ()
    for j in tl.static_range(COUNT):
        corners = corners + (load_corner(nodes, first + j, TILE),)
    return corners


@triton.jit
def _start(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    return of_each(start, (), TERMS, TILE)


@triton.jit
def _add(arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    states, walk, lefts, steps, first = arguments
    block = _block_of(arguments, K, CELLS)
    return of_each(add, (states[K], block, walk.pixels[K], walk.given), TERMS, TILE)


@triton.jit
def _join(arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    (states,) = arguments
    return of_each(join, (states[K],), TERMS, TILE)


@triton.jit
def _add_again(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    states, walk, lefts, steps, first = arguments
    block = _block_of(arguments, K, CELLS)
    return of_each(add_again, (states[K], block, walk.pixels[K], walk.given), TERMS, TILE)


@triton.jit
def _block_of(arguments, K: tl.constexpr, CELLS: tl.constexpr):
    """A block's classes of one of a lane's pixels, interpolated along its row."""
    states, walk, lefts, steps, first = arguments
    COUNT: tl.constexpr = len(lefts) // CELLS.rows
    BEFORE: tl.constexpr = K // CELLS.columns * COUNT  # in the rows before
    logits = ()
    for j in tl.static_range(COUNT):
        share = walk.column_shares[K % CELLS.columns]
        logits = logits + (lefts[BEFORE + j] + share * steps[BEFORE + j],)
    return Block(logits=logits, exists=(), start=first)


@triton.jit
def finish_pixels(
    states, walk, places, map_ptrs, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """(values, totals): of every pixel of a lane the values of all losses, and the sums over them.

    Totals are, of every loss, values and weights, [cells] each, and then the number of valid
    pixels. What the losses leave to the backward pass is stored.
    """
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    COUNT: tl.constexpr = len(TERMS.start)
    zero = nothing_yet(0.0, TILE)
    totals = (zero,)
    for _ in tl.static_range(2 * COUNT):
        totals = totals + (zero,)
    values = ()
    for k in tl.static_range(PIXELS):
        pixel = walk.pixels[k]
        valid = pixel.label >= 0
        row_share = walk.row_shares[k // CELLS.columns]
        column_share = walk.column_shares[k % CELLS.columns]
        own = look_up_between(walk.nodes, pixel.own, row_share, column_share, TILE)
        sums = ()
        for j in tl.static_range(COUNT):
            value, weight, saved = finish(states[k][j], own, pixel, walk.given[j], TERMS, j, TILE)
            store_maps(map_ptrs, places[k], saved, pixel, TERMS, j)
            value = tl.where(valid, value, 0.0)
            weight = tl.where(valid, weight, 0.0)
            values = values + (value,)
            sums = sums + (totals[2 * j] + value, totals[2 * j + 1] + weight)
        totals = sums + (totals[2 * COUNT] + tl.where(valid, 1.0, 0.0),)
    return values, totals


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def sums_of_cells(
    walk, nodes, cells, first, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """What the pixels of cells add to their nodes, of the block of classes from ``first`` on."""
    UNROLL: tl.constexpr = TILE.unroll
    corners = _load_corners(nodes, first, TILE.unroll, TILE)
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


# --- of every pixel of a lane ---------------------------------------------------------------------


@triton.jit
def of_pixels(
    FUNCTION: tl.constexpr, arguments, TERMS: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """(FUNCTION(arguments, 0, ...), FUNCTION(arguments, 1, ...), ...), row after row.

    Written out: elements of a tuple that grows lose their names under Triton 3.6.
    """
    COUNT: tl.constexpr = CELLS.rows * CELLS.columns
    if COUNT == 1:
        results = (FUNCTION(arguments, 0, TERMS, TILE, CELLS),)
    elif COUNT == 2:
        results = (
            FUNCTION(arguments, 0, TERMS, TILE, CELLS),
            FUNCTION(arguments, 1, TERMS, TILE, CELLS),
        )
    elif COUNT == 4:
        results = (
            FUNCTION(arguments, 0, TERMS, TILE, CELLS),
            FUNCTION(arguments, 1, TERMS, TILE, CELLS),
            FUNCTION(arguments, 2, TERMS, TILE, CELLS),
            FUNCTION(arguments, 3, TERMS, TILE, CELLS),
        )
    elif COUNT == 8:
        results = (
            FUNCTION(arguments, 0, TERMS, TILE, CELLS),
            FUNCTION(arguments, 1, TERMS, TILE, CELLS),
            FUNCTION(arguments, 2, TERMS, TILE, CELLS),
            FUNCTION(arguments, 3, TERMS, TILE, CELLS),
            FUNCTION(arguments, 4, TERMS, TILE, CELLS),
            FUNCTION(arguments, 5, TERMS, TILE, CELLS),
            FUNCTION(arguments, 6, TERMS, TILE, CELLS),
            FUNCTION(arguments, 7, TERMS, TILE, CELLS),
        )
    else:
        tl.static_assert(COUNT == 16, "a lane has 1, 2, 4, 8 or 16 pixels at once")
        results = (
            FUNCTION(arguments, 0, TERMS, TILE, CELLS),
            FUNCTION(arguments, 1, TERMS, TILE, CELLS),
            FUNCTION(arguments, 2, TERMS, TILE, CELLS),
            FUNCTION(arguments, 3, TERMS, TILE, CELLS),
            FUNCTION(arguments, 4, TERMS, TILE, CELLS),
            FUNCTION(arguments, 5, TERMS, TILE, CELLS),
            FUNCTION(arguments, 6, TERMS, TILE, CELLS),
            FUNCTION(arguments, 7, TERMS, TILE, CELLS),
            FUNCTION(arguments, 8, TERMS, TILE, CELLS),
            FUNCTION(arguments, 9, TERMS, TILE, CELLS),
            FUNCTION(arguments, 10, TERMS, TILE, CELLS),
            FUNCTION(arguments, 11, TERMS, TILE, CELLS),
            FUNCTION(arguments, 12, TERMS, TILE, CELLS),
            FUNCTION(arguments, 13, TERMS, TILE, CELLS),
            FUNCTION(arguments, 14, TERMS, TILE, CELLS),
            FUNCTION(arguments, 15, TERMS, TILE, CELLS),
        )
    return results
