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
arithmetic (``cell_launch.py``).
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
    nodes: int  # rows of nodes of a program, going back
    near: bool  # neighbouring labels lie side by side
    ignored: int  # the ignored label if it would be a class, else -1
    binary: bool  # labels are 0 and 1, of one class


class Sizes(NamedTuple):
    """Sizes at run time."""

    height: Any  # of the logits
    width: Any
    rows: Any  # of the labels
    columns: Any
    blocks: Any  # of cells, side by side
    bands: Any  # of rows of pixels in the highest cell; going back, strips of rows of nodes


class Nodes(NamedTuple):
    """The four nodes around each cell of a row of cells."""

    above: Any  # pointer to the upper two's row, at the first class
    below: Any
    left: Any  # [cells], offsets in a row
    right: Any
    stride: Any  # from class to class


class Cells(NamedTuple):
    """A row of cells, or the part of it that a program is at."""

    image: Any
    first: Any  # [cells], the first column of pixels
    end: Any  # [cells], one more than the last
    top: Any  # the first row of pixels
    bottom: Any  # one more than the last


class Labels(NamedTuple):
    """Where the labels of an image lie."""

    pointer: Any
    row_stride: Any
    column_stride: Any


class Axis(NamedTuple):
    """Where the pixels of an axis lie."""

    starts: Any  # [nodes + 2], of every cell the first pixel
    shares: Any  # [pixels], of the later node


# --- where a program is ---------------------------------------------------------------------------


@triton.jit
def wide(stride):
    """A stride in 64 bits, as all that is multiplied by it will be."""
    return tl.full((), 1, tl.int64) * stride


@triton.jit
def labels_of_image(target_ptr, strides, image):
    """Where the labels of an image lie."""
    return Labels(
        pointer=target_ptr + image * strides[0],
        row_stride=wide(strides[1]),
        column_stride=wide(strides[2]),
    )


@triton.jit
def cells_of_row(row_axis, column_axis, image, row, index, sizes):
    """The cells of a row."""
    cell = tl.minimum(index, sizes.width)
    first = tl.load(column_axis.starts + cell)
    end = tl.load(column_axis.starts + cell + 1)
    return Cells(
        image=image,
        first=first,
        end=tl.where(index <= sizes.width, end, first),
        top=tl.load(row_axis.starts + row),
        bottom=tl.load(row_axis.starts + row + 1),
    )


@triton.jit
def further(cells, rows, columns):
    """What is left of cells after so many rows and columns of their pixels."""
    return Cells(
        image=cells.image,
        first=cells.first + columns,
        end=cells.end,
        top=cells.top + rows,
        bottom=cells.bottom,
    )


@triton.jit
def nodes_around(logits_ptr, strides, image, row, index, sizes):
    """The nodes around the cells of a row of cells; no index leaves the map."""
    start = logits_ptr + image * strides[0]
    above = tl.minimum(tl.maximum(row - 1, 0), sizes.height - 1)
    below = tl.minimum(row, sizes.height - 1)
    left = tl.minimum(tl.maximum(index - 1, 0), sizes.width - 1)
    right = tl.minimum(index, sizes.width - 1)
    row_stride, column_stride = wide(strides[2]), wide(strides[3])
    return Nodes(
        above=start + above * row_stride,
        below=start + below * row_stride,
        left=left * column_stride,
        right=right * column_stride,
        stride=wide(strides[1]),
    )


@triton.jit
def shares_of_columns(axis, cells, CELLS: tl.constexpr):
    """Of every column of a lane the share of the right nodes, a tuple of [cells]."""
    shares = ()
    for k in tl.static_range(CELLS.columns):
        column = cells.first + k
        shares = shares + (tl.load(axis.shares + column, mask=column < cells.end, other=0.0),)
    return shares


@triton.jit
def shares_of_rows(axis, cells, CELLS: tl.constexpr):
    """Of every row of a lane the share of the nodes below, a tuple of scalars."""
    shares = ()
    for r in tl.static_range(CELLS.rows):
        row = cells.top + r
        shares = shares + (tl.load(axis.shares + row, mask=row < cells.bottom, other=0.0),)
    return shares


@triton.jit
def place_of(cells, row, column, sizes):
    """Where the pixels in a row and a column of each cell lie in a map [N, H, W] side by side."""
    start = (cells.image * sizes.rows + row) * sizes.columns
    return start + (cells.first + column)


@triton.jit
def load_pixel(labels, cells, row, column, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The pixels in a row and, counted from the cell's first, a column; labels sanitised."""
    x = cells.first + column
    inside = x < tl.where(row < cells.bottom, cells.end, cells.first)
    if CELLS.near:
        offsets = x
    else:
        offsets = x * labels.column_stride
    pointer = labels.pointer + row * labels.row_stride
    loaded = tl.load(pointer + offsets, mask=inside, other=0)
    # As a tensor: labels of eight bits may be fewer than the classes, and are widened then.
    classes = tl.full((), 2 if CELLS.binary else TILE.classes, tl.int32)
    label = sanitised_label(loaded, inside, classes, CELLS.ignored)
    own = tl.where(label == 1, 0, -1) if CELLS.binary else label
    return Pixel(label=label, own=own, inside=inside)


# --- interpolation --------------------------------------------------------------------------------


@triton.jit
def load_nodes(nodes, index, TILE: tl.constexpr):
    """The logits of a class, scalar or [cells]: (above left, above right, below left, right)."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    offset = index.to(tl.int64) * nodes.stride
    above_left = tl.load(nodes.above + offset + nodes.left).to(dtype)
    above_right = tl.load(nodes.above + offset + nodes.right).to(dtype)
    below_left = tl.load(nodes.below + offset + nodes.left).to(dtype)
    below_right = tl.load(nodes.below + offset + nodes.right).to(dtype)
    return above_left, above_right, below_left, below_right


@triton.jit
def along_row(logits, share):
    """(left logit, step to the right one) in a row of pixels with this share of the nodes below.

    Of an infinite left logit and a finite right one, the step is finite: left + share * step has to
    be infinite too, and not NaN.
    """
    above_left, above_right, below_left, below_right = logits
    left = above_left * (1.0 - share) + below_left * share
    right = above_right * (1.0 - share) + below_right * share
    step = right - tl.where(tl.abs(left) == float("inf"), 0.0, left)
    return left, step


@triton.jit
def look_up_between(nodes, index, row_share, column_share, TILE: tl.constexpr):
    """Each pixel's interpolated logit of a class of its own, [cells]; 0 where that is less than 0.

    Whatever the class has become, it leads to no foreign memory.
    """
    logits = load_nodes(nodes, nearest_class(index, TILE), TILE)
    left, step = along_row(logits, row_share)
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
