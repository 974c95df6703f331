"""Sums over true and false positives and false negatives of interpolated logits: device code.

The walk is that over cells (``cells.py``). A lane goes through the classes of a few pixels of its
cell, and a program adds up what those of all its lanes are members of, tile after tile. Going back,
a kernel of its own writes each pixel's projection, the sum of probability times gradient over its
two classes, 4 bytes per pixel. The gradient is then that of any other loss (``cell_kernels.py``).
Hinges need no projection, but the logits of both classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from .._engine.class_cells import _places_of, _walk_of
from .._engine.math import LOG2_E
from .._engine.pixels import Given, class_of, is_own
from .membership import Members, add_members, class_entry, members_of, no_sums, store_sums

# --- slopes of probabilities ----------------------------------------------------------------------


class CellFactors(NamedTuple):
    """The factors of the gradient p_k (G_k - sum of p_j G_j) of a pixel, [cells] each."""

    log_sum: Any  # base 2, of the sum of powers of e; infinity where the pixel is not valid
    predicted: Any
    own: Any
    of_predicted: Any  # G of the predicted class
    of_own: Any  # and of the label's, if it is another
    projection: Any


@triton.jit
def cell_factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """What the slopes of a pixel share, with a projection that is saved after the statistics."""
    log_sum, place, projection = saved
    valid = pixel.label >= 0
    factors = _before_projection(log_sum, place, pixel, given, TILE)
    return CellFactors(
        log_sum=factors.log_sum,
        predicted=factors.predicted,
        own=factors.own,
        of_predicted=factors.of_predicted,
        of_own=factors.of_own,
        projection=tl.where(valid, projection, 0.0),
    )


@triton.jit
def cell_slope(factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """The gradient of a slot's logits."""
    number = class_of(block, SLOT, TILE)
    gradient = tl.where(number == factors.predicted, factors.of_predicted, 0.0)
    gradient += tl.where(is_own(factors.own, block, SLOT, TILE), factors.of_own, 0.0)
    p = tl.exp2(block.logits[SLOT] * LOG2_E - factors.log_sum)  # as in the projection
    return p * (gradient - factors.projection)


def cell_is_silent(options: Any) -> bool:
    """The probabilities of a pixel that is not valid are 0."""
    return True


@triton.jit
def _before_projection(log_sum, place, pixel, given, TILE: tl.constexpr):
    """The factors but for the projection, from what is saved of a pixel."""
    valid = pixel.label >= 0
    predicted = tl.where(valid, place.to(tl.int32), -1)
    is_right = predicted == pixel.own
    right = class_entry(given, pixel.own, 0, TILE)
    of_own = class_entry(given, pixel.own, 2, TILE)
    return CellFactors(
        log_sum=tl.where(valid, log_sum, float("inf")),
        predicted=predicted,
        own=pixel.own,
        of_predicted=tl.where(is_right, right, class_entry(given, predicted, 1, TILE)),
        of_own=tl.where(is_right, 0.0, of_own),
        projection=(),
    )


# --- kernels --------------------------------------------------------------------------------------


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
        cells = cells_of((row_axis, column_axis), place, (target_ptr, target_strides), sizes, CELLS)
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


@triton.jit
def _membership_project_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    log_sum_ptr,  # [N, H, W]
    place_ptr,  # [N, H, W]: the predicted class
    table_ptr,  # [N, C, 3]: the gradient of the sums
    projection_ptr,  # [N, H, W]
    row_starts_ptr,
    row_shares_ptr,
    column_starts_ptr,
    column_shares_ptr,
    logits_strides,
    target_strides,
    sizes,
    programs,  # of an image
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads labels, statistics and the logits of two classes; writes each pixel's projection."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    image = (tl.program_id(0) // programs).to(tl.int64)
    table = table_ptr + image * (3 * TILE.classes)
    given = Given(own_table=table, other_table=table, numbers=())
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    walk, cells = _walk_of(
        (logits_ptr, logits_strides), (target_ptr, target_strides), (rows, columns), given, sizes,
        TERMS, TILE, CELLS,
    )  # fmt: skip
    places = _places_of(cells, sizes, CELLS)
    for k in tl.static_range(PIXELS):
        pixel = walk.pixels[k]
        log_sum = tl.load(log_sum_ptr + places[k], mask=pixel.inside, other=0.0)
        place = tl.load(place_ptr + places[k], mask=pixel.inside, other=0)
        factors = _before_projection(log_sum, place, pixel, given, TILE)
        row_share = walk.row_shares[k // CELLS.columns]
        column_share = walk.column_shares[k % CELLS.columns]
        logit = look_up_between(walk.nodes, factors.predicted, row_share, column_share, TILE)
        projection = tl.exp2(logit * LOG2_E - factors.log_sum) * factors.of_predicted
        logit = look_up_between(walk.nodes, pixel.own, row_share, column_share, TILE)
        projection += tl.exp2(logit * LOG2_E - factors.log_sum) * factors.of_own
        projection = tl.where(pixel.label >= 0, projection, 0.0)
        tl.store(projection_ptr + places[k], projection, mask=pixel.inside)
