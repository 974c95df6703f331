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

from .math import LOG2_E, sanitised_label
from .pixel_walk import saved_by
from .pixels import Pixel, nearest_class


class CellTile(NamedTuple):
    """What a lane works on; known when a kernel is compiled."""

    rows: int  # of pixels at once, going forward
    columns: int  # of pixels at once
    chunks: int  # of so many columns, until the widest cell is done
    near: bool  # neighbouring labels lie side by side
    far: bool  # nodes of an image lie so far apart that offsets take 64 bits
    ignored: int  # the ignored label if it would be a class, else -1
    binary: bool  # labels are 0 and 1, of one class
    reduced: bool  # the values are: all pixels have one upstream gradient
    even: bool  # going back: all cells have so many columns, those at the borders half of them
    parts: int  # lanes that share a cell, each with a block of all classes; else 0


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
    by_row: Any  # what divides by the cells of a row: see ``divided``
    by_blocks: Any
    by_bands: Any


class Place(NamedTuple):
    """Where a program that goes forward is."""

    image: Any
    row: Any  # of cells, [cells]
    column: Any
    band: Any  # of rows of pixels in the cells
    chunk: Any  # of columns


class Axis(NamedTuple):
    """Where the pixels of an axis lie."""

    starts: Any  # [nodes + 2], of every cell the first pixel
    shares: Any  # [pixels], of the later node


class Nodes(NamedTuple):
    """The four nodes around each cell: where their logits are, in bytes."""

    pointer: Any  # to the image's logits of class 0
    stride: Any  # from class to class
    above_left: Any  # [cells], how far from the pointer, 64 bits as all of these
    above_right: Any
    below_left: Any
    below_right: Any


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
def divided(number, divisor):
    """(quotient, remainder) of numbers from 0 on, int32; ``divisor`` is one of the host's.

    Four instructions: the machine has none that divides, and would take about 30.
    """
    divides, multiplier, shift = divisor
    twice = (number * 2).to(tl.uint32)
    quotient = (tl.umulhi(twice, multiplier.to(tl.uint32)) >> shift).to(tl.int32)
    return quotient, number - quotient * divides


@triton.jit
def place_of_program(sizes, TILE: tl.constexpr, CELLS: tl.constexpr):
    """Where a program is whose only tile has its own number."""
    return place_of(tl.program_id(0), sizes, TILE, CELLS)


@triton.jit
def place_of(tile, sizes, TILE: tl.constexpr, CELLS: tl.constexpr):
    """Side by side are blocks of cells, then chunks of columns and bands of rows in them."""
    rest, block = divided(tile, sizes.by_blocks)
    chunk = rest % CELLS.chunks
    image, band = divided(rest // CELLS.chunks, sizes.by_bands)
    if CELLS.parts == 0:
        cell = block * TILE.pixels + tl.arange(0, TILE.pixels)
    else:  # the lanes of a cell are as far apart as there are cells
        MEMBERS: tl.constexpr = TILE.pixels // CELLS.parts
        cell = block * MEMBERS + tl.arange(0, TILE.pixels) % MEMBERS
    row, column = divided(cell, sizes.by_row)
    return Place(image=image.to(tl.int64), row=row, column=column, band=band, chunk=chunk)


@triton.jit
def place_in_image(image, number, tiles, sizes, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The place of one of an image's tiles; one that is beyond the last has no cells."""
    place = place_of(image * tiles + tl.minimum(number, tiles - 1), sizes, TILE, CELLS)
    row = tl.where(number < tiles, place.row, sizes.height + 1)
    return Place(
        image=place.image, row=row, column=place.column, band=place.band, chunk=place.chunk
    )


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
def cells_of(axes, place, target, sizes, CELLS: tl.constexpr):
    """What is left of a program's cells from its own rows and columns of pixels on."""
    cells = cells_at(axes, place.row, place.column, target, place.image, sizes)
    return further(cells, place.band * CELLS.rows, place.chunk * CELLS.columns, sizes)


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
def nodes_around(logits_ptr, strides, image, row, column, sizes, CELLS: tl.constexpr):
    """The nodes around the cells in these rows and columns of cells; no index leaves the map."""
    # Multiplied by a stride and widened in one instruction each, unless nodes lie far apart.
    SIZE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    row_stride = wide(strides[2]) if CELLS.far else strides[2]
    column_stride = wide(strides[3]) if CELLS.far else strides[3]
    above = tl.minimum(tl.maximum(row - 1, 0), sizes.height - 1) * row_stride
    below = tl.minimum(row, sizes.height - 1) * row_stride
    left = tl.minimum(tl.maximum(column - 1, 0), sizes.width - 1) * column_stride
    right = tl.minimum(column, sizes.width - 1) * column_stride
    return Nodes(
        pointer=logits_ptr + image * strides[0],
        stride=wide(strides[1]),
        above_left=(above + left).to(tl.int64) * SIZE,
        above_right=(above + right).to(tl.int64) * SIZE,
        below_left=(below + left).to(tl.int64) * SIZE,
        below_right=(below + right).to(tl.int64) * SIZE,
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
    # Of a pixel that is not there any label will do.
    loaded = tl.load(pointers, mask=inside)
    # As a tensor: labels of eight bits may be fewer than the classes, and are widened then.
    classes = tl.full((), 2 if CELLS.binary else TILE.classes, tl.int32)
    label = sanitised_label(loaded, inside, classes, CELLS.ignored)
    own = tl.where(label == 1, 0, -1) if CELLS.binary else label
    return Pixel(label=label, own=own, inside=inside)


# --- interpolation --------------------------------------------------------------------------------


@triton.jit
def load_corner(nodes, logits, TILE: tl.constexpr):
    """Of a class, (logit above left, step down, step to the right, step of that down), [cells].

    ``logits`` points to the image's logits of that class. Where a node's logit is not finite, it is
    that of the whole cell: a step between an infinite logit and a finite one would make NaN of
    both.
    """
    above_left, above_right, below_left, below_right = _load_nodes(nodes, logits, TILE)
    step = above_right - above_left
    step_down = (below_right - below_left) - step
    is_finite = tl.abs(step_down) < float("inf")
    total = (above_left + above_right) + (below_left + below_right)
    return (
        scaled(tl.where(is_finite, above_left, total), TILE),
        scaled(tl.where(is_finite, below_left - above_left, 0.0), TILE),
        scaled(tl.where(is_finite, step, 0.0), TILE),
        scaled(tl.where(is_finite, step_down, 0.0), TILE),
    )


@triton.jit
def scaled(logit, TILE: tl.constexpr):
    """A logit, or a step, as the losses are given it."""
    return logit * LOG2_E if TILE.scaled else logit


@triton.jit
def _load_nodes(nodes, logits, TILE: tl.constexpr):
    """(above left, above right, below left, below right), the logits of a class, [cells] each."""
    return (
        _load_node(logits, nodes.above_left, TILE),
        _load_node(logits, nodes.above_right, TILE),
        _load_node(logits, nodes.below_left, TILE),
        _load_node(logits, nodes.below_right, TILE),
    )


@triton.jit
def _load_node(logits, distance, TILE: tl.constexpr):
    pointers = (logits.to(tl.pointer_type(tl.uint8)) + distance).to(logits.dtype.scalar)
    return tl.load(pointers).to(tl.float64 if TILE.double else tl.float32)


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
    logit = interpolated(nodes, nearest_class(index, TILE), row_share, column_share, TILE)
    return tl.where(index >= 0, logit, 0.0)


@triton.jit
def interpolated(nodes, index, row_share, column_share, TILE: tl.constexpr):
    """Each pixel's logit of the class ``index``, [cells], which has to be one."""
    logits = nodes.pointer + index * nodes.stride
    above_left, above_right, below_left, below_right = _load_nodes(nodes, logits, TILE)
    # As every class is interpolated, rounding for rounding: of a sure pixel the largest logit and
    # its own are the same.
    step = above_right - above_left
    down = below_left - above_left
    step_down = (below_right - below_left) - step
    left = scaled(above_left, TILE) + row_share * scaled(down, TILE)
    step = scaled(step, TILE) + row_share * scaled(step_down, TILE)
    logit = left + column_share * step
    # Where a node's logit is not finite, neither is this; then it is as in ``load_corner``.
    total = (above_left + above_right) + (below_left + below_right)
    return tl.where(tl.abs(logit) < float("inf"), logit, scaled(total, TILE))


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


@triton.jit
def together(parts):
    """The elements of 1, 2, 4, 8 or 16 vectors in one: a lane's are side by side."""
    if len(parts) > 1:
        parts = _by_twos(parts)
    if len(parts) > 1:
        parts = _by_twos(parts)
    if len(parts) > 1:
        parts = _by_twos(parts)
    if len(parts) > 1:
        parts = _by_twos(parts)
    (together,) = parts
    return together


@triton.jit
def _by_twos(parts):
    """Half as many vectors, twice as long."""
    halves = ()
    for i in tl.static_range(len(parts) // 2):
        pairs = tl.join(parts[2 * i], parts[2 * i + 1])
        halves = halves + (tl.reshape(pairs, (2 * pairs.shape[0],)),)
    return halves
