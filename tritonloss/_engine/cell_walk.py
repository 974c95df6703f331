"""The forward pass of pixelwise losses over the classes of cells, into states."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cells import (
    along_row,
    further,
    interpolated,
    load_corner,
    load_pixel,
)
from .pixel_walk import add, add_again, finish, join, of_each, start, store_maps
from .pixels import Block, nothing_yet


class Forward(NamedTuple):
    """What a forward pass needs at every pixel of a lane."""

    nodes: Any
    pixels: Any  # a tuple of the lane's pixels, row after row
    given: Any
    row_shares: Any  # of every row the share of the nodes below, [cells]
    column_shares: Any  # of every column that of the right nodes


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
    lefts, steps = lines_of_rows(walk, first, COUNT, TILE, CELLS)
    return of_pixels(ADD, (states, walk, lefts, steps, first), TERMS, TILE, CELLS)


@triton.jit
def lines_of_rows(walk, first, COUNT: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """(left logits, steps to the right) of COUNT classes in each row of a lane's pixels."""
    ROWS: tl.constexpr = CELLS.rows
    corners = load_corners(walk.nodes, first, COUNT, TILE)
    lefts = ()
    steps = ()
    for r in tl.static_range(ROWS):
        for j in tl.static_range(COUNT):
            left, step = along_row(corners[j], walk.row_shares[r])
            lefts = lefts + (left,)
            steps = steps + (step,)
    return lefts, steps


@triton.jit
def load_corners(nodes, first, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The logits and steps of each cell, of every class of a block."""
    corners = ()
    logits = nodes.pointer + first * nodes.stride
    for _ in tl.static_range(COUNT):
        corners = corners + (load_corner(nodes, logits, TILE),)
        logits += nodes.stride
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
    return Block(logits=logits, exists=(), start=first, owned=(), base2=())


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
        own = own_between(walk.nodes, pixel, row_share, column_share, TILE, CELLS)
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


@triton.jit
def own_between(nodes, pixel, row_share, column_share, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The interpolated logits of the pixels' own classes, 0 where a valid pixel has none."""
    # A sanitised label is a class.
    index = tl.where(pixel.own >= 0, pixel.own, 0)
    own = interpolated(nodes, index, row_share, column_share, TILE)
    if CELLS.binary:
        own = tl.where(pixel.own >= 0, own, 0.0)
    return own


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
