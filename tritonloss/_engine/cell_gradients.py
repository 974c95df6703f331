"""The backward pass of pixelwise losses over the classes of cells, into nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell_nodes import NodeSums, add_row, if_any, zeros
from .cell_walk import load_corners, of_pixels
from .cells import Nodes, along_row, factors_between, wide
from .math import LOG2_E
from .pixel_walk import all_factors, of_each, slope, taken_in
from .pixels import Block, Pixel, no_class_yet, nothing_yet

# Classes whose pixels' bits are looked at together: the machine reads so many at once.
_GROUP = tl.constexpr(7)
_GROUP_TAKING = tl.constexpr(5)  # where a loss takes in others: of 7, ptxas spills 8 bytes on sm_80


class Backward(NamedTuple):
    """What a backward pass needs at every pixel."""

    given: Any
    map_ptrs: Any  # [N, H, W] each
    upstream: Any
    row_axis: Any
    column_axis: Any
    column: Any  # of cells, a lane's
    sizes: Any


class Upstream(NamedTuple):
    """The gradients of the values of an image."""

    pointer: Any  # to a map, or to one number for all pixels
    value: Any  # that number
    row_stride: Any
    column_stride: Any
    scales: Any  # of every loss: what it is multiplied by


class Row(NamedTuple):
    """A row of pixels of cells, with a block of classes."""

    number: Any  # [cells], of the row in the image
    exists: Any  # whether it is one of the cell
    label: Any  # pointers to the label of the column's first pixel
    place: Any  # where that pixel is in a map [N, H, W]
    share: Any  # of the nodes below
    corners: Any  # of every class
    corners2: Any  # those in base 2
    first: Any  # the first class


class Weighed(NamedTuple):
    """A pixel of every cell, [cells] each, and what the slopes of its classes share."""

    share: Any  # of the nodes on the right
    to_both: Any  # what a slope is multiplied by for the sum of all nodes
    to_right: Any  # and for that of those on the right
    own: Any  # the bit of the block's class that is its own, another one, or 0 if it is not valid
    factors: Any  # of every loss


class Column(NamedTuple):
    """A lane's column of cells: what is the same in all of its rows."""

    first: Any  # [cells], the first column of pixels
    end: Any  # one more than the last
    label: Any  # pointers to the label of the image's first row in the span's first column
    place: Any  # where that is in a map [N, H, W]
    strides: Any  # of the labels: from row to row, from column to column
    span: Any  # of pixels, the first


class Span(NamedTuple):
    """As many columns of pixels as a lane has at once: those of a cell, and others beside them.

    All are columns of the image, so that nothing that is loaded has to be masked.
    """

    first: Any  # [cells]
    limits: Any  # a tuple over them: of a column of the cell the number of classes, else 0
    shares: Any  # a tuple over them, of the right nodes


# --- cells ----------------------------------------------------------------------------------------


@triton.jit
def span_of(axis, first, end, sizes, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The span with the columns from ``first`` to before ``end``, as far as it has them."""
    COLUMNS: tl.constexpr = CELLS.columns
    start = tl.minimum(first, sizes.columns - COLUMNS)
    limits = ()
    shares = ()
    for k in tl.static_range(COLUMNS):
        # Cells of an even number of columns have all of either half, or at the borders none.
        any_of_half = (0 if 2 * k < COLUMNS else COLUMNS - 1) if CELLS.even else k
        inside = (start + any_of_half >= first) & (start + any_of_half < end)
        limits = limits + (tl.where(inside, 2 if CELLS.binary else TILE.classes, 0),)
        shares = shares + (tl.load(axis.shares + start + k),)
    return Span(first=start, limits=limits, shares=shares)


@triton.jit
def column_of_cells(axis, column, target, image, sizes, TILE: tl.constexpr, CELLS: tl.constexpr):
    """What a lane's cells in this column have in common. ``target`` is (pointer, strides)."""
    target_ptr, target_strides = target
    first = tl.load(axis.starts + column)
    end = tl.load(axis.starts + column + 1)
    strides = (wide(target_strides[1]), wide(target_strides[2]))
    span = span_of(axis, first, end, sizes, TILE, CELLS)
    return Column(
        first=first,
        end=end,
        label=target_ptr + image * target_strides[0] + span.first * strides[1],
        place=image * sizes.rows * sizes.columns + span.first,
        strides=strides,
        span=span,
    )


@triton.jit
def nodes_from(nodes, above, down):
    """The nodes around cells, from those above and how many bytes below them the others are.

    Between rows only the places of those above are kept: a lane has few registers to spare.
    """
    above_left, above_right = above
    return Nodes(
        pointer=nodes.pointer,
        stride=nodes.stride,
        above_left=above_left,
        above_right=above_right,
        below_left=above_left + down,
        below_right=above_right + down,
    )


# --- pixels ---------------------------------------------------------------------------------------


@triton.jit
def sums_of_cells(
    walk, nodes, rows, first, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """What the pixels of cells add to their nodes, of the block of classes from ``first`` on.

    ``rows`` are (the cells' first rows of pixels, one more than their last). Cells without a valid
    pixel add nothing. With a scale of 0, slopes are 0 but where a logit is not finite. Then so are
    the logits of all pixels of a cell, and its nodes' gradients are what the valid ones make of
    them: whatever the ignored ones beside them add, it changes nothing.
    """
    UNROLL: tl.constexpr = TILE.unroll
    top, bottom = rows
    corners = load_corners(nodes, first, UNROLL, TILE)
    corners2 = ()  # what no loss asks for is not computed
    for j in tl.static_range(UNROLL):
        logit, down, step, step_down = corners[j]
        in_base2 = (logit * LOG2_E, down * LOG2_E, step * LOG2_E, step_down * LOG2_E)
        corners2 = corners2 + (corners[j] if TILE.scaled else in_base2,)
    nothing = zeros(TILE)
    sums = NodeSums(
        above_both=nothing, above_right=nothing, below_both=nothing, below_right=nothing
    )
    has_valid = no_class_yet(TILE)
    # As many rows as the highest of the cells has, at least one: all are rows of the image.
    highest = tl.maximum(tl.max(bottom - top), 1)
    number = tl.minimum(top, walk.sizes.rows - highest)
    label = walk.column.label + number * walk.column.strides[0]
    place = walk.column.place + number * wide(walk.sizes.columns)
    for _ in tl.range(0, highest):
        row = Row(
            number=number,
            exists=(number >= top) & (number < bottom),
            label=label,
            place=place,
            share=tl.load(walk.row_axis.shares + number),
            corners=corners,
            corners2=corners2,
            first=first,
        )
        in_row = (nothing, nothing, has_valid)
        if CELLS.chunks == 1:
            in_row = _add_span(in_row, walk, nodes, row, walk.column.span, TERMS, TILE, CELLS)
        else:
            for chunk in tl.range(0, CELLS.chunks):
                start = walk.column.first + chunk * CELLS.columns
                span = span_of(walk.column_axis, start, walk.column.end, walk.sizes, TILE, CELLS)
                in_row = _add_span(in_row, walk, nodes, row, span, TERMS, TILE, CELLS)
        both_sums, right_sums, has_valid = in_row
        sums = add_row(sums, both_sums, right_sums, row.share)
        # the next row
        number += 1
        label += walk.column.strides[0]
        place += walk.sizes.columns
    return if_any(has_valid, sums, TILE)


@triton.jit
def _add_span(
    in_row, walk, nodes, row, span, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """(sums of gradients of both nodes, of the right ones, whether any pixel was valid).

    With those of a few columns more.
    """
    UNROLL: tl.constexpr = TILE.unroll
    COLUMNS: tl.constexpr = CELLS.columns
    both_sums, right_sums, has_valid = in_row
    pixels = of_pixels(_weighed, (walk, nodes, row, span), TERMS, TILE, CELLS)
    both = ()
    right = ()
    # All classes at once where many pixels have weights of their own: they would wait too long.
    ALL: tl.constexpr = CELLS.parts > 0 or not (TERMS.silent[0] or COLUMNS <= 4)
    USUAL: tl.constexpr = _GROUP_TAKING if len(TERMS.slope) < len(TERMS.start) else _GROUP
    GROUP: tl.constexpr = UNROLL if ALL else USUAL
    for start in tl.static_range(0, UNROLL, GROUP):
        sums = (both_sums, right_sums)
        to_both, to_right = _add_group(sums, pixels, row, walk, start, TERMS, TILE, CELLS)
        both = both + to_both
        right = right + to_right
    for k in tl.static_range(COLUMNS):
        has_valid |= pixels[k].own
    return both, right, has_valid


@triton.jit
def _add_group(
    sums, pixels, row, walk, START: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """The sums of some classes of a block, from START on, with those of some columns."""
    ALL: tl.constexpr = CELLS.parts > 0 or not (TERMS.silent[0] or CELLS.columns <= 4)
    USUAL: tl.constexpr = _GROUP_TAKING if len(TERMS.slope) < len(TERMS.start) else _GROUP
    GROUP: tl.constexpr = TILE.unroll if ALL else USUAL
    COUNT: tl.constexpr = GROUP if START + GROUP <= TILE.unroll else TILE.unroll - START
    both_sums, right_sums = sums
    logits = ()
    steps = ()
    logits2 = ()
    steps2 = ()
    both = ()
    right = ()
    for j in tl.static_range(COUNT):
        logit, step = along_row(row.corners[START + j], row.share)
        logits = logits + (logit,)
        steps = steps + (step,)
        logit, step = along_row(row.corners2[START + j], row.share)
        logits2 = logits2 + (logit,)
        steps2 = steps2 + (step,)
        both = both + (both_sums[START + j],)
        right = right + (right_sums[START + j],)
    for k in tl.static_range(len(pixels)):
        pixel = pixels[k]
        lines = (logits, steps, logits2, steps2)
        factors = pixel.factors
        if CELLS.parts > 0:
            block = _block_of(lines, pixel, row.first, START, 0, COUNT)
            factors = _compared(factors, block, walk.given, TERMS, TILE, CELLS)
        more_both = ()
        more_right = ()
        for j in tl.static_range(COUNT):
            if CELLS.parts > 0:
                gradient = _slopes_of(factors, block, j, walk.given, TERMS, TILE)
            else:  # a class has registers only while it is its turn
                block = _block_of(lines, pixel, row.first, START, j, 1)
                gradient = _slopes_of(factors, block, 0, walk.given, TERMS, TILE)
            to_both = pixel.to_both * gradient
            to_right = pixel.to_right * gradient
            if k > 0 or CELLS.chunks > 1:  # else the sums are 0, and added to it would cost as much
                to_both += both[j]
                to_right += right[j]
            more_both = more_both + (to_both,)
            more_right = more_right + (to_right,)
        both = more_both
        right = more_right
    return both, right


@triton.jit
def _block_of(lines, pixel, first, START: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr):
    """COUNT classes of a pixel, from class FROM on of the group that begins with START."""
    logits, steps, logits2, steps2 = lines
    of_pixel = ()
    owned = ()
    of_pixel2 = ()
    for j in tl.static_range(FROM, FROM + COUNT):
        of_pixel = of_pixel + (logits[j] + pixel.share * steps[j],)
        owned = owned + ((pixel.own & (1 << (START + j))) != 0,)
        of_pixel2 = of_pixel2 + (logits2[j] + pixel.share * steps2[j],)
    return Block(
        logits=of_pixel, exists=(), start=first + (START + FROM), owned=owned, base2=of_pixel2
    )


@triton.jit
def _slopes_of(factors, block, SLOT: tl.constexpr, given, TERMS: tl.constexpr, TILE: tl.constexpr):
    """The sum of all losses' slopes."""
    gradient = slope(factors, block, SLOT, given, TERMS, 0, TILE)
    for term in tl.static_range(1, len(TERMS.slope)):
        gradient += slope(factors, block, SLOT, given, TERMS, term, TILE)
    return gradient


@triton.jit
def _compared(factors, block, given, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The factors of all losses: the first one's with the sum over all of a pixel's classes.

    The block has a lane's share of these; the other lanes of its cell have the others.
    """
    FIRST: tl.constexpr = 0
    UNROLL: tl.constexpr = TILE.unroll
    PARTS: tl.constexpr = CELLS.parts
    MEMBERS: tl.constexpr = TILE.pixels // CELLS.parts
    TWICE: tl.constexpr = CELLS.parts * UNROLL - TILE.classes  # classes that two lanes have
    lane = tl.arange(0, TILE.pixels)
    mine = nothing_yet(0.0, TILE)
    for j in tl.static_range(UNROLL):
        product = TERMS.product(factors[FIRST], block, j, given[FIRST], TILE)
        if j < TWICE:
            product = tl.where(block.start + j < lane // MEMBERS * UNROLL, 0.0, product)
        mine += product
    total = mine
    for k in tl.static_range(1, PARTS):
        total += tl.gather(mine, (lane + k * MEMBERS) % (PARTS * MEMBERS), 0)
    first = TERMS.less(factors[FIRST], total, TILE)
    return of_each(all_factors, (first, factors), TERMS, TILE)


@triton.jit
def _load_pixel(walk, row, span, K: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """(the pixels in a column of a span, where they are in its row); labels are sanitised.

    The own classes are not: they may be anything where the label is -1.
    """
    if CELLS.chunks == 1:
        offset = K
    else:
        offset = (span.first - walk.column.span.first) + K
    if CELLS.near:
        pointers = row.label + offset
    else:
        pointers = row.label + offset * walk.column.strides[1]
    loaded = tl.load(pointers)
    limit = span.limits[K]
    if loaded.dtype == tl.int64:
        valid = loaded.to(tl.uint64, bitcast=True) < limit.to(tl.uint64)
        label = loaded.to(tl.int32)
    else:
        label = loaded.to(tl.int32)
        valid = label.to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)
    valid = valid & row.exists
    if CELLS.ignored >= 0:
        valid = valid & (label != CELLS.ignored)
    own = tl.where(label == 1, 0, -1) if CELLS.binary else label
    inside = row.exists & (limit > 0)
    return Pixel(label=tl.where(valid, label, -1), own=own, inside=inside), offset


@triton.jit
def _weighed(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """The pixel in a column of a row, for ``of_pixels``."""
    walk, nodes, row, span = arguments
    COUNT: tl.constexpr = len(TERMS.start)
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    pixel, offset = _load_pixel(walk, row, span, K, TILE, CELLS)
    valid = pixel.label >= 0
    share = span.shares[K]
    upstream = walk.upstream
    if CELLS.reduced:
        value = upstream.value
    else:
        column = span.first + K
        offsets = row.number * upstream.row_stride + column * upstream.column_stride
        value = tl.load(upstream.pointer + offsets).to(dtype)
    one = tl.full((TILE.pixels,), 1.0, dtype)
    scales = (one,)
    if COUNT > 1:
        scales = ()
        for k in tl.static_range(COUNT):
            scale = one * (value * upstream.scales[k])
            if not CELLS.reduced or not TERMS.silent[k]:
                scale = tl.where(valid, scale, 0.0)
            scales = scales + (scale,)
    maps = ()
    for i in tl.static_range(len(walk.map_ptrs)):
        maps = maps + (tl.load(walk.map_ptrs[i] + row.place + offset),)
    arguments = (scales, maps, nodes, (row.share, share), pixel, walk.given)
    to_right = share
    to_both = one
    if COUNT == 1:
        # Slopes are proportional to the scale, and those of a single loss are multiplied late.
        if not CELLS.reduced:
            scale = value * upstream.scales[0]
            to_right = scale * to_right
            to_both = scale
        if not CELLS.reduced or not TERMS.silent[0]:
            to_right = tl.where(valid, to_right, 0.0)
            to_both = tl.where(valid, to_both, 0.0)
    factors = of_each(factors_between, arguments, TERMS, TILE)
    # A bit of no class for all classes that are not in the block.
    place = tl.minimum((pixel.own - row.first).to(tl.uint32, bitcast=True), 31)
    return Weighed(
        share=share,
        to_both=to_both,
        to_right=to_right,
        own=tl.where(valid, 1, 0) << place.to(tl.int32),
        factors=taken_in(factors, TERMS, TILE),
    )
