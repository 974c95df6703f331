"""Class sums over interpolated logits whose sums stay in registers: the forward pass.

A lane goes through its pixels one by one, with a power of each class, and through several cells: it
holds the sums of all classes. Of more classes, a few lanes share a cell (``CellTile.parts``), with
a block of the classes each. They exchange what they know of a pixel, and then each finishes one of
as many pixels as there are lanes: what a pixel takes besides its classes is done once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell_walk import load_corners, own_between
from .cells import (
    Axis,
    along_row,
    cells_of,
    further,
    load_pixel,
    nodes_around,
    place_in_image,
    shares_of_columns,
    together,
)
from .class_cells import _of_two, _store_of_two
from .class_sums import (
    Plane,
    add_to_sums,
    count_labels,
    finish_tile,
    no_values,
    store_counts,
    store_values,
)
from .pixel_walk import add, given_to, of_each, start
from .pixels import Block, Pixel, nothing_yet


class Row(NamedTuple):
    """A row of pixels of cells, with a lane's classes."""

    cells: Any  # what is left of them from the row on
    nodes: Any  # around the cells
    lines: Any  # of every class (left logit, step to the right)
    share: Any  # of the nodes below
    column_shares: Any  # of every column that of the right nodes
    given: Any  # to every loss


class Part(NamedTuple):
    """Which of the lanes of a cell a lane is."""

    number: Any  # [cells]
    first: Any  # the first class of its block, [cells]


# --- device functions: lanes that share a cell ----------------------------------------------------


@triton.jit
def _part_of_lane(TILE: tl.constexpr, CELLS: tl.constexpr):
    """The last lane's block begins early enough to be as long as the others'."""
    if CELLS.parts == 0:
        number = 0
        first = 0
    else:
        number = tl.arange(0, TILE.pixels) // (TILE.pixels // CELLS.parts)
        first = tl.minimum(number * TILE.unroll, TILE.classes - TILE.unroll)
    return Part(number=number, first=first)


@triton.jit
def _load_block(nodes, part, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The corners of a lane's classes: -inf of those that the lane before has, too."""
    COUNT: tl.constexpr = TILE.unroll
    TWICE: tl.constexpr = CELLS.parts * COUNT - TILE.classes  # classes that two lanes have
    loaded = load_corners(nodes, part.first, COUNT, TILE)
    if TWICE <= 0:
        corners = loaded
    else:
        tl.static_assert(TWICE <= COUNT, "only the last lane has classes of another")
        corners = ()
        for j in tl.static_range(COUNT):
            corner = loaded[j]
            if j < TWICE:
                logit, down, step, step_down = corner
                is_own = part.first + j >= part.number * COUNT
                corner = (
                    tl.where(is_own, logit, float("-inf")),
                    tl.where(is_own, down, 0.0),
                    tl.where(is_own, step, 0.0),
                    tl.where(is_own, step_down, 0.0),
                )
            corners = corners + (corner,)
    return corners


@triton.jit
def _of_part(part, values, FROM: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT values the one that has the number of a lane's part."""
    result = values[FROM]
    for q in tl.static_range(1, COUNT):
        result = tl.where(part.number == q, values[FROM + q], result)
    return result


@triton.jit
def _same(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """The same for every loss."""
    (same,) = arguments
    return same


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _count_cells(
    counts, cells, part, sizes, BINS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """Counts of labels with those of all pixels of a lane, or of its part's rows of them."""
    ROWS: tl.constexpr = CELLS.rows // CELLS.parts if CELLS.parts > 0 else CELLS.rows
    PIXELS: tl.constexpr = ROWS * CELLS.columns
    labels = ()
    for k in tl.static_range(PIXELS):
        row = further(cells, part.number * ROWS + k // CELLS.columns, 0, sizes)
        labels = labels + (load_pixel(row, k % CELLS.columns, TILE, CELLS).label,)
    label = together(labels)
    return count_labels(counts, Pixel(label=label, own=label, inside=label >= 0), BINS)


@triton.jit
def _block_of(row, K: tl.constexpr, TILE: tl.constexpr):
    """A lane's classes of the pixel in a column, from 0 on."""
    COUNT: tl.constexpr = TILE.unroll
    logits = ()
    for j in tl.static_range(COUNT):
        left, step = row.lines[j]
        logits = logits + (left + row.column_shares[K] * step,)
    return Block(logits=logits, exists=(), start=0, owned=(), base2=())


@triton.jit
def _own_of(row, block, pixel, K: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The logits of the pixels' own classes in a column, 0 where there is none.

    Where the sums of own pixels compare each class, they cost less from registers than from memory;
    but beside labels of 64 bits ptxas would spill 120 bytes.
    """
    if row.cells.label.dtype.element_ty == tl.int64:
        own = own_between(row.nodes, pixel, row.share, row.column_shares[K], TILE, CELLS)
    else:
        own = nothing_yet(0.0, TILE)
        for j in tl.static_range(len(block.logits)):
            own = tl.where(pixel.own == j, block.logits[j], own)
    return own


@triton.jit
def _states_of(row, block, pixel, TERMS: tl.constexpr, TILE: tl.constexpr):
    states = of_each(start, (), TERMS, TILE)
    return of_each(add, (states, block, pixel, row.given), TERMS, TILE)


@triton.jit
def _sum_row(
    sums, row, map_ptrs, TERMS: tl.constexpr, PROBABILITIES: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """A lane's sums with a row of its pixels more, whose maps are stored: pixel after pixel."""
    COLUMNS: tl.constexpr = CELLS.columns
    own, all_pixels, totals = sums
    for k in tl.static_range(COLUMNS):
        block = _block_of(row, k, TILE)
        pixel = load_pixel(row.cells, k, TILE, CELLS)
        block = _block_of(row, k, TILE)
        states = _states_of(row, block, pixel, TERMS, TILE)
        shared = PROBABILITIES.share(states[0], TILE)
        own, all_pixels = add_to_sums((own, all_pixels), shared, block, pixel, PROBABILITIES, TILE)
        own_logit = _own_of(row, block, pixel, k, TILE, CELLS)
        maps = (map_ptrs, row.cells.place + k)
        totals = finish_tile(states, own_logit, maps, pixel, row.given, totals, TERMS, TILE)
    return own, all_pixels, totals


@triton.jit
def _sum_row_of_parts(
    sums, row, part, map_ptrs, TERMS: tl.constexpr, PROBABILITIES: tl.constexpr,
    TILE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The same where lanes share a cell. As many pixels as these are finished at once."""
    COLUMNS: tl.constexpr = CELLS.columns
    PARTS: tl.constexpr = CELLS.parts
    own, all_pixels, totals = sums
    for first in tl.static_range(0, COLUMNS, PARTS):
        mine = ()
        for k in tl.static_range(first, first + PARTS):
            pixel = load_pixel(row.cells, k, TILE, CELLS)
            pixel = Pixel(label=pixel.label, own=pixel.own - part.first, inside=pixel.inside)
            block = _block_of(row, k, TILE)
            state = _states_of(row, block, pixel, TERMS, TILE)[0]
            joined = PROBABILITIES.join(state, PARTS, TILE)
            shared = PROBABILITIES.share_of_part(state, joined, TILE)
            own, all_pixels = add_to_sums(
                (own, all_pixels), shared, block, pixel, PROBABILITIES, TILE
            )
            if k == first:
                mine = joined
            else:
                mine = PROBABILITIES.select(part.number == k - first, joined, mine)
        column = first + part.number
        pixel = load_pixel(row.cells, column, TILE, CELLS)
        share = _of_part(part, row.column_shares, first, PARTS)
        own_logit = own_between(row.nodes, pixel, row.share, share, TILE, CELLS)
        states = of_each(_same, (mine,), TERMS, TILE)  # losses that are taken in have it, too
        maps = (map_ptrs, row.cells.place + column)
        totals = finish_tile(states, own_logit, maps, pixel, row.given, totals, TERMS, TILE)
    return own, all_pixels, totals


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _class_cells_held_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C]: a table for a pixel's own class, if the loss has one
    other_ptrs,  # of every loss [C]: a table for the other classes, if the loss has one
    map_ptrs,  # [N, H, W] each: what the losses leave to the backward pass
    parts_ptr,  # [3, N, C + 1, programs of an image]: own, all, counts
    values_ptr,  # [pixelwise losses, 2, programs]: sums of values, and of weights
    row_starts_ptr,  # [h + 2]: of every row of cells the first row of pixels
    row_shares_ptr,  # [H]: the share of the nodes below
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    numbers,  # of every loss, a tuple
    logits_strides,
    target_strides,
    sizes,
    full,
    tiles,  # of an image
    rounds,  # tiles of a program
    programs,  # of an image
    images,
    TERMS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the logits once, and the labels twice; each of its programs leaves its sums."""
    COUNT: tl.constexpr = TILE.unroll
    ROWS: tl.constexpr = TILE.classes + 1
    OTHERS: tl.constexpr = len(TERMS.start) - 1
    image = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    given = of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE)
    plane = Plane(
        pointer=parts_ptr + image * ROWS * programs + program,
        stride=programs.to(tl.int64),
        kind=images.to(tl.int64) * ROWS * programs,
    )

    part = _part_of_lane(TILE, CELLS)
    own = ()
    all_pixels = ()
    for _ in tl.static_range(COUNT):
        own = own + (nothing_yet(0.0, TILE),)
        all_pixels = all_pixels + (nothing_yet(0.0, TILE),)
    counts = tl.zeros((BINS,), tl.int32)
    totals = no_values(TERMS, TILE)
    for i in tl.range(0, rounds):
        number = program * rounds + i
        place = place_in_image(image.to(tl.int32), number, tiles, sizes, TILE, CELLS)
        cells = cells_of((rows, columns), place, (target_ptr, target_strides), sizes, CELLS)
        nodes = nodes_around(
            logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
        )
        counts = _count_cells(counts, cells, part, sizes, BINS, TILE, CELLS)
        corners = _load_block(nodes, part, TILE, CELLS)
        column_shares = shares_of_columns(columns, cells, sizes, CELLS)
        for k in tl.range(0, CELLS.rows):
            here = further(cells, k, 0, sizes)
            share = tl.load(rows.shares + tl.minimum(here.top, sizes.rows - 1))
            lines = ()
            for j in tl.static_range(COUNT):
                lines = lines + (along_row(corners[j], share),)
            row = Row(
                cells=here,
                nodes=nodes,
                lines=lines,
                share=share,
                column_shares=column_shares,
                given=given,
            )
            sums = (own, all_pixels, totals)
            if CELLS.parts == 0:
                sums = _sum_row(sums, row, map_ptrs, TERMS, PROBABILITIES, TILE, CELLS)
            else:
                sums = _sum_row_of_parts(
                    sums, row, part, map_ptrs, TERMS, PROBABILITIES, TILE, CELLS
                )
            own, all_pixels, totals = sums

    # those of a class where it is the label, and of all pixels, side by side in neighbouring lanes
    for first in tl.static_range(0, COUNT, 4):
        both = ()
        for j in tl.static_range(first, first + 4):
            if j < COUNT:
                both = both + (_of_two(own[j], all_pixels[j], 1, TILE),)
        _store_of_two(plane, both, part.first + first, TILE, CELLS)
    store_counts(plane, counts, CELLS.binary, BINS, TILE.classes)
    store_values(values_ptr, totals, tl.sum(counts), programs * images, OTHERS, TERMS)
