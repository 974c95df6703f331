"""Sums over true and false positives and false negatives of interpolated logits: device code.

The walk is that over cells (``cells.py``). A lane goes through the classes of a few pixels of its
cell, and a program adds up what those of all its lanes are members of, tile after tile. Going back,
the gradient is that of any other loss (``cell_kernels.py``): each pixel's own and predicted class
are interpolated once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.cell_walk import Forward, fold_cells, load_pixel_of, of_pixels
from .._engine.cells import (
    Axis,
    cells_of,
    look_up_between,
    nodes_around,
    place_in_image,
    shares_of_columns,
    shares_of_rows,
    together,
)
from .._engine.class_cells import _places_of
from .membership import Members, add_members, members_of, no_sums, store_sums


@triton.jit
def _store_members(walk, states, places, map_ptrs, TERMS: tl.constexpr, TILE: tl.constexpr,
                   CELLS: tl.constexpr):  # fmt: skip
    """What all pixels of all lanes are members of; what the backward pass needs is stored."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    OPTIONS: tl.constexpr = TERMS.options[0]
    predicted = ()
    own = ()
    of_predicted = ()
    of_own = ()
    for k in tl.static_range(PIXELS):
        pixel = walk.pixels[k]
        row_share = walk.row_shares[k // CELLS.columns]
        column_share = walk.column_shares[k % CELLS.columns]
        own_logit = look_up_between(walk.nodes, pixel.own, row_share, column_share, TILE)
        (state,) = states[k]
        members, saved = members_of(state, own_logit, pixel, OPTIONS, TILE)
        for i in tl.static_range(len(map_ptrs)):
            tl.store(map_ptrs[i] + places[k], saved[i], mask=pixel.inside)
        predicted = predicted + (members.predicted,)
        own = own + (members.own,)
        of_predicted = of_predicted + (members.of_predicted,)
        of_own = of_own + (members.of_own,)
    return Members(
        predicted=together(predicted),
        own=together(own),
        of_predicted=together(of_predicted),
        of_own=together(of_own),
    )


@triton.jit
def _membership_cells_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    map_ptrs,  # [N, H, W] each: what the backward pass needs
    parts_ptr,  # [6, N * programs, C]
    row_starts_ptr,  # [h + 2]: of every row of cells the first row of pixels
    row_shares_ptr,  # [H]: the share of the nodes below
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    logits_strides,
    target_strides,
    sizes,
    full,  # classes in the blocks before the last
    tiles,  # of an image
    rounds,  # tiles of a program
    programs,  # of an image
    rows,  # N * programs
    TERMS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the labels once, and the logits once for the rows and columns that a lane has."""
    program = tl.program_id(0)
    image = program // programs
    row_axis = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    column_axis = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    sums = no_sums(BINS, TILE)
    for i in tl.range(0, rounds):
        number = program - image * programs + i * programs
        place = place_in_image(image, number, tiles, sizes, TILE, CELLS)
        cells = cells_of(
            (row_axis, column_axis), place, (target_ptr, target_strides), sizes, CELLS
        )
        walk = Forward(
            nodes=nodes_around(
                logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
            ),
            pixels=of_pixels(load_pixel_of, (cells, sizes), TERMS, TILE, CELLS),
            given=((),),
            row_shares=shares_of_rows(row_axis, cells, sizes, CELLS),
            column_shares=shares_of_columns(column_axis, cells, sizes, CELLS),
        )
        states = fold_cells(walk, full, TERMS, TILE, CELLS)
        places = _places_of(cells, sizes, CELLS)
        members = _store_members(walk, states, places, map_ptrs, TERMS, TILE, CELLS)
        sums = add_members(sums, members, BINS)
    store_sums(parts_ptr, program.to(tl.int64), rows, sums, BINS, TILE.classes)
