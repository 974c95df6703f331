"""Cells: the walk of pixelwise losses over logits that are interpolated to the size of the labels.

The pixels of a label map lie between the nodes of a coarser map of logits, each between two columns
and two rows of them: in a cell. An axis of n nodes has n + 1 cells. Cell c lies between the nodes
c - 1 and c; the first and the last one, beyond the outermost nodes, have the same node twice. A
lane owns a cell: four loads are enough for all of its pixels.

Going forward, a lane has a few rows and columns of its cell's pixels at once, goes through blocks
of classes and hands each pixel's interpolated logits to the losses, which do not know. Going back,
it walks down a column of cells with a block of classes. Of the pixels of a cell, the gradients of
its four nodes are sums; those of the lower two wait for the next cell, and those of the left two
go to the left neighbour. No two programs write to one node, and every sum has its order.

Where a pixel lies is read in tables, one for each axis, made on the host by PyTorch's own
arithmetic (``cell_grid.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import sanitised_label
from .pixel_walk import saved_by
from .pixels import Pixel, nearest_class


class CellTile(NamedTuple):
    """What a lane works on; known when a kernel is compiled."""

    rows: int  # of pixels at once, going forward
    columns: int  # of pixels at once
    chunks: int  # of so many columns, until the widest cell is done
    near: bool  # neighbouring labels lie side by side
    ignored: int  # the ignored label if it would be a class, else -1
    binary: bool  # labels are 0 and 1, of one class
    reduced: bool  # the values are: all pixels have one upstream gradient
    even: bool  # going back: all cells have so many columns, those at the borders half of them


class Sizes(NamedTuple):
    """Sizes at run time."""

    height: Any  # of the logits
    width: Any
    rows: Any  # of the labels
    columns: Any
    blocks: Any  # of cells
    bands: Any  # of rows of pixels in the highest cell
    highest: Any  # rows of pixels in that cell
    nodes: Any  # rows of nodes of a program, going back


class Axis(NamedTuple):
    """Where the pixels of an axis lie."""

    starts: Any  # [nodes + 2], of every cell the first pixel
    shares: Any  # [pixels], of the later node


class Nodes(NamedTuple):
    """The four nodes around each cell, [cells] each: pointers to their logits of class 0."""

    above_left: Any
    above_right: Any
    below_left: Any
    below_right: Any
    stride: Any  # from class to class


class Cells(NamedTuple):
    """What is left of a program's cells, from a row and a column of each cell's pixels on."""

    first: Any  # [cells], the column
    end: Any  # [cells], one more than the last column; ``first`` where no row is left
    top: Any  # [cells], the row
    bottom: Any  # [cells], one more than the last row
    label: Any  # [cells], pointers to the label of the first pixel
    place: Any  # [cells], where that pixel is in a map [N, H, W]
    strides: Any  # of the labels: from row to row, from column to column


# --- where a program is ---------------------------------------------------------------------------


@triton.jit
def wide(stride):
    """A stride in 64 bits, as all that is multiplied by it will be."""
    return tl.full((), 1, tl.int64) * stride


@triton.jit
def cells_at(axes, row, column, target, image, sizes):
    """The cells of an image in these rows and columns of cells, [cells] each.

    Cells beyond the image have no pixels. ``target`` is (pointer, strides).
    """
    row_axis, column_axis = axes
    target_ptr, target_strides = target
    here = tl.minimum(row, sizes.height)
    top = tl.load(row_axis.starts + here)
    bottom = tl.load(row_axis.starts + here + 1)
    bottom = tl.where(row <= sizes.height, bottom, top)
    here = tl.minimum(column, sizes.width)
    first = tl.load(column_axis.starts + here)
    end = tl.load(column_axis.starts + here + 1)
    end = tl.where(column <= sizes.width, end, first)
    strides = (wide(target_strides[1]), wide(target_strides[2]))
    start = target_ptr + image * target_strides[0]
    return Cells(
        first=first,
        end=end,
        top=top,
        bottom=bottom,
        label=start + top * strides[0] + first * strides[1],
        place=(image * sizes.rows + top) * sizes.columns + first,
        strides=strides,
    )


@triton.jit
def further(cells, rows, columns, sizes):
    """What is left of the cells after so many rows and columns more."""
    top = cells.top + rows
    first = cells.first + columns
    return Cells(
        first=first,
        end=tl.where(top < cells.bottom, cells.end, first),
        top=top,
        bottom=cells.bottom,
        label=cells.label + rows * cells.strides[0] + columns * cells.strides[1],
        place=cells.place + rows * wide(sizes.columns) + columns,
        strides=cells.strides,
    )


@triton.jit
def nodes_around(logits_ptr, strides, image, row, column, sizes):
    """The nodes around the cells in these rows and columns of cells; no index leaves the map."""
    start = logits_ptr + image * strides[0]
    above = tl.minimum(tl.maximum(row - 1, 0), sizes.height - 1) * wide(strides[2])
    below = tl.minimum(row, sizes.height - 1) * wide(strides[2])
    left = tl.minimum(tl.maximum(column - 1, 0), sizes.width - 1) * wide(strides[3])
    right = tl.minimum(column, sizes.width - 1) * wide(strides[3])
    return Nodes(
        above_left=start + above + left,
        above_right=start + above + right,
        below_left=start + below + left,
        below_right=start + below + right,
        stride=wide(strides[1]),
    )


@triton.jit
def shares_of_columns(axis, cells, sizes, CELLS: tl.constexpr):
    """Of every column of a lane the share of the right nodes, a tuple of [cells]."""
    COLUMNS: tl.constexpr = CELLS.columns
    shares = ()
    for k in tl.static_range(COLUMNS):
        # Beyond the cell anything will do.
        column = tl.minimum(cells.first + k, sizes.columns - 1)
        shares = shares + (tl.load(axis.shares + column),)
    return shares


@triton.jit
def shares_of_rows(axis, cells, sizes, CELLS: tl.constexpr):
    """Of every row of a lane the share of the nodes below, a tuple of [cells]."""
    ROWS: tl.constexpr = CELLS.rows
    shares = ()
    for r in tl.static_range(ROWS):
        row = tl.minimum(cells.top + r, sizes.rows - 1)
        shares = shares + (tl.load(axis.shares + row),)
    return shares


@triton.jit
def load_pixel(cells, column, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The pixels in the first row and in a column, counted from the first; labels sanitised."""
    inside = cells.first + column < cells.end
    if CELLS.near:
        pointers = cells.label + column
    else:
        pointers = cells.label + column * cells.strides[1]
    loaded = tl.load(pointers, mask=inside, other=0)
    # As a tensor: labels of eight bits may be fewer than the classes, and are widened then.
    classes = tl.full((), 2 if CELLS.binary else TILE.classes, tl.int32)
    label = sanitised_label(loaded, inside, classes, CELLS.ignored)
    own = tl.where(label == 1, 0, -1) if CELLS.binary else label
    return Pixel(label=label, own=own, inside=inside)


# --- interpolation --------------------------------------------------------------------------------


@triton.jit
def load_corner(nodes, index, TILE: tl.constexpr):
    """Of a class, scalar or [cells], (logit above left, step down, step right, step of that down).

    Where a node's logit is not finite, it is that of the whole cell: a step between an infinite
    logit and a finite one would make NaN of both.
    """
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    offset = index * nodes.stride
    above_left = tl.load(nodes.above_left + offset).to(dtype)
    above_right = tl.load(nodes.above_right + offset).to(dtype)
    below_left = tl.load(nodes.below_left + offset).to(dtype)
    below_right = tl.load(nodes.below_right + offset).to(dtype)
    total = (above_left + above_right) + (below_left + below_right)
    is_finite = tl.abs(total) < float("inf")
    step = above_right - above_left
    return (
        tl.where(is_finite, above_left, total),
        tl.where(is_finite, below_left - above_left, 0.0),
        tl.where(is_finite, step, 0.0),
        tl.where(is_finite, (below_right - below_left) - step, 0.0),
    )


@triton.jit
def along_row(corner, share):
    """(left logit, step to the right) in a row of pixels with this share of the nodes below."""
    logit, down, step, step_down = corner
    return logit + share * down, step + share * step_down


@triton.jit
def look_up_between(nodes, index, row_share, column_share, TILE: tl.constexpr):
    """Each pixel's interpolated logit of a class of its own, [cells]; 0 where that is less than 0.

    Whatever the class has become, it leads to no foreign memory.
    """
    corner = load_corner(nodes, nearest_class(index, TILE), TILE)
    left, step = along_row(corner, row_share)
    return tl.where(index >= 0, left + column_share * step, 0.0)


@triton.jit
def factors_between(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """What the slopes of a loss share, as ``factors_of`` for logits that are interpolated."""
    OPTIONS: tl.constexpr = TERMS.options[K]
    scales, maps, nodes, shares, pixel, given = arguments
    row_share, column_share = shares
    saved = saved_by(maps, TERMS, K)
    classes = TERMS.lookups[K](saved, pixel, TILE)
    looked_up = ()
    for j in tl.static_range(len(classes)):
        logit = look_up_between(nodes, classes[j], row_share, column_share, TILE)
        looked_up = looked_up + (logit,)
    return TERMS.factors[K](scales[K], saved, looked_up, pixel, given[K], OPTIONS, TILE)
