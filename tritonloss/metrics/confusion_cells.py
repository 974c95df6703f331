"""Kernels of the confusion matrix and of the prediction over logits that are interpolated.

A lane finds the largest logits of all pixels that it has of its cell (``_engine/cells.py``), and a
program counts those of all its lanes together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.cell_walk import Forward, fold_cells, load_pixel_of, of_pixels
from .._engine.cells import (
    Axis,
    cells_of,
    further,
    nodes_around,
    place_of_program,
    shares_of_columns,
    shares_of_rows,
    together,
)
from .._engine.largest import largest_place
from .._engine.pixels import Pixel
from .confusion_kernels import count_pairs


@triton.jit
def _largest_places(
    logits,
    shares,
    place,
    cells,
    sizes,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The class of the largest logit of each of a lane's pixels, a tuple of [cells].

    ``logits`` is (pointer, strides, classes in the blocks before the last), ``shares`` those of
    rows and of columns.
    """
    COUNT: tl.constexpr = CELLS.rows * CELLS.columns
    logits_ptr, logits_strides, full = logits
    row_shares, column_shares = shares
    walk = Forward(
        nodes=nodes_around(
            logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
        ),
        pixels=of_pixels(_no_label, (cells,), TERMS, TILE, CELLS),
        given=((),),
        row_shares=row_shares,
        column_shares=column_shares,
    )
    states = fold_cells(walk, full, TERMS, TILE, CELLS)
    places = ()
    for k in tl.static_range(COUNT):
        (state,) = states[k]
        places = places + (largest_place(state, TILE),)
    return places


@triton.jit
def _no_label(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """A pixel as far as the search needs it: not at all."""
    (cells,) = arguments
    return Pixel(label=cells.first, own=cells.first, inside=cells.first < cells.end)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _upsampled_confusion_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    matrix_ptr,  # int64 [C, C], or [2, 2] of one channel
    row_starts_ptr,  # [h + 2]: of every row of cells the first row of pixels
    row_shares_ptr,  # [H]: the share of the nodes below
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    logits_strides,
    target_strides,
    sizes,
    full,
    TERMS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the labels once, and the logits once for the rows and columns that a lane has."""
    CLASSES: tl.constexpr = 2 if CELLS.binary else TILE.classes
    COUNT: tl.constexpr = CELLS.rows * CELLS.columns
    place = place_of_program(sizes, TILE, CELLS)
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    target = (target_ptr, target_strides)
    cells = cells_of((rows, columns), place, target, sizes, CELLS)

    logits = (logits_ptr, logits_strides, full)
    row_shares = shares_of_rows(rows, cells, sizes, CELLS)
    column_shares = shares_of_columns(columns, cells, sizes, CELLS)
    shares = (row_shares, column_shares)
    found = _largest_places(logits, shares, place, cells, sizes, TERMS, TILE, CELLS)

    pixels = of_pixels(load_pixel_of, (cells, sizes), TERMS, TILE, CELLS)
    labels = ()
    for k in tl.static_range(COUNT):
        labels = labels + (pixels[k].label,)
    count_pairs(matrix_ptr, together(labels), together(found), CLASSES, BINS)


@triton.jit
def _upsampled_predict_kernel(
    logits_ptr,  # [N, C, h, w]
    prediction_ptr,  # [N, H, W], contiguous
    row_starts_ptr,  # [h + 2]
    row_shares_ptr,  # [H]
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    logits_strides,
    prediction_strides,
    sizes,
    full,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the logits once for the rows and columns that a lane has, writes their classes."""
    COUNT: tl.constexpr = CELLS.rows * CELLS.columns
    place = place_of_program(sizes, TILE, CELLS)
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    cells = cells_of((rows, columns), place, (prediction_ptr, prediction_strides), sizes, CELLS)

    logits = (logits_ptr, logits_strides, full)
    row_shares = shares_of_rows(rows, cells, sizes, CELLS)
    column_shares = shares_of_columns(columns, cells, sizes, CELLS)
    shares = (row_shares, column_shares)
    found = _largest_places(logits, shares, place, cells, sizes, TERMS, TILE, CELLS)

    for k in tl.static_range(COUNT):
        here = further(cells, k // CELLS.columns, k % CELLS.columns, sizes)
        tl.store(prediction_ptr + here.place, found[k], mask=here.first < here.end)
