"""The kernels of all pixelwise losses over logits that are interpolated (``cells.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .cell_gradients import Backward, Upstream, column_of_cells, nodes_from, sums_of_cells
from .cell_nodes import Gradient, join_rows, nothing_waits, row_below, store_nodes
from .cell_walk import Forward, finish_pixels, fold_cells, load_pixel_of, of_pixels
from .cells import (
    Axis,
    cells_of,
    further,
    nodes_around,
    place_of_program,
    shares_of_columns,
    shares_of_rows,
    wide,
)
from .pixel_kernels import Weights, store_loss, weight_of
from .pixel_walk import given_to, of_each
from .sums import Sums, comes_last, leave


@triton.jit
def _upsampled_forward_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C]: a table for a pixel's own class, if the loss has one
    other_ptrs,  # of every loss [C]: a table for the other classes, if the loss has one
    map_ptrs,  # [N, H, W] each: what the losses leave to the backward pass
    values_ptr,  # [N, H, W]: the sum of the losses of every pixel, if REDUCTION is "none"
    loss_ptr,  # [], otherwise
    terms_ptr,  # of every loss: its value without its weight, if WEIGHTED
    scale_ptr,  # of every loss: what the gradient of a pixel's value is multiplied by
    weights_ptr,  # float64, if WEIGHTED
    row_starts_ptr,  # [h + 2]: of every row of cells the first row of pixels
    row_shares_ptr,  # [H]: the share of the nodes below
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    scratch_ptr,
    tickets_ptr,
    numbers,  # of every loss its own
    weight_places,  # of every loss
    logits_strides,
    target_strides,
    sizes,
    full,
    programs,
    TERMS: tl.constexpr,
    REDUCTION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the labels once, and the logits once for the rows and columns that a lane has."""
    COUNT: tl.constexpr = len(TERMS.start)
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    place = place_of_program(sizes, TILE, CELLS)
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    target = (target_ptr, target_strides)
    cells = cells_of((rows, columns), place, target, sizes, CELLS)
    # A loss whose sums do not ask for the labels keeps none of them: they are loaded once more.
    walk = Forward(
        nodes=nodes_around(
            logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
        ),
        pixels=of_pixels(load_pixel_of, (cells, sizes), TERMS, TILE, CELLS),
        given=of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE),
        row_shares=shares_of_rows(rows, cells, sizes, CELLS),
        column_shares=shares_of_columns(columns, cells, sizes, CELLS),
    )
    states = fold_cells(walk, full, TERMS, TILE, CELLS)

    walk = Forward(
        nodes=walk.nodes,
        pixels=of_pixels(load_pixel_of, (cells, sizes), TERMS, TILE, CELLS),
        given=walk.given,
        row_shares=walk.row_shares,
        column_shares=walk.column_shares,
    )
    places = ()
    for k in tl.static_range(PIXELS):
        row_of_pixels = further(cells, k // CELLS.columns, k % CELLS.columns, sizes)
        places = places + (row_of_pixels.place,)
    values, totals = finish_pixels(states, walk, places, map_ptrs, TERMS, TILE, CELLS)
    weights = Weights(pointer=weights_ptr, places=weight_places)
    if REDUCTION == "none":
        for k in tl.static_range(PIXELS):
            in_all = weight_of(weights, 0, WEIGHTED, TILE) * values[k * COUNT]
            for j in tl.static_range(1, COUNT):
                in_all += weight_of(weights, j, WEIGHTED, TILE) * values[k * COUNT + j]
            tl.store(values_ptr + places[k], in_all, mask=walk.pixels[k].inside)
    else:
        sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=2 * COUNT + 1)
        for i in tl.static_range(2 * COUNT + 1):
            leave(sums, i, tl.sum(totals[i]))
        if comes_last(sums):
            pointers = (loss_ptr, terms_ptr, scale_ptr)
            store_loss(pointers, sums, weights, COUNT, REDUCTION, WEIGHTED)


@triton.jit
def _scale(scale_ptr, weights, K: tl.constexpr, WEIGHTED: tl.constexpr, TILE: tl.constexpr,
           CELLS: tl.constexpr):  # fmt: skip
    """What the gradient of a loss's values is multiplied by."""
    if CELLS.reduced:
        scale = tl.load(scale_ptr + K)
    else:
        scale = weight_of(weights, K, WEIGHTED, TILE)
    return scale


@triton.jit
def _upsampled_backward_kernel(
    upstream_ptr,  # [], or [N, H, W] unless reduced
    scale_ptr,  # of every loss, if reduced
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C], or of every image [N, C]
    other_ptrs,  # of every loss likewise
    map_ptrs,  # [N, H, W] each
    grad_ptr,  # [N, C, h, w]
    weights_ptr,  # float64, if WEIGHTED
    row_starts_ptr,  # [h + 2]
    row_shares_ptr,  # [H]
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    numbers,
    weight_places,
    upstream_strides,
    logits_strides,
    target_strides,
    grad_strides,
    table_strides,  # of every loss's tables, from image to image; 0 where these have the same one
    sizes,
    TERMS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Walks down a strip of cells; writes every node's gradient once.

    A program has one block of classes, or all of them: then a few of its lanes share each cell.
    """
    COUNT: tl.constexpr = len(TERMS.start)
    LANES: tl.constexpr = TILE.pixels
    SCALED: tl.constexpr = CELLS.reduced and COUNT == 1
    PARTS: tl.constexpr = CELLS.parts if CELLS.parts > 0 else 1
    MEMBERS: tl.constexpr = LANES // PARTS
    BLOCKS: tl.constexpr = 1 if CELLS.parts > 0 else (TILE.classes + TILE.unroll - 1) // TILE.unroll
    # Side by side are blocks of classes, which share labels and maps, then of cells.
    program = tl.program_id(0)
    class_block = program % BLOCKS
    program = program // BLOCKS
    block = program % sizes.blocks
    image = (program // sizes.blocks).to(tl.int64)
    # A lane's column of cells, in a strip of rows. The last one is there for the nodes between it
    # and its neighbour.
    lane = tl.arange(0, LANES)
    member = lane
    if PARTS > 1:
        class_block = lane // MEMBERS
        member = lane % MEMBERS
    # The last block begins early enough to be a whole one; what it shares, one of them stores.
    unseen = class_block * TILE.unroll
    first_class = tl.minimum(unseen, TILE.classes - TILE.unroll)
    index = block * (MEMBERS - 1) + member
    strip = index // (sizes.width + 1)
    column = index - strip * (sizes.width + 1)
    first_row = strip * sizes.nodes

    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    weights = Weights(pointer=weights_ptr, places=weight_places)
    scales = ()
    owns = ()
    others = ()
    for k in tl.static_range(COUNT):
        owns = owns + (own_ptrs[k] + image * table_strides[k],)
        others = others + (other_ptrs[k] + image * table_strides[k],)
        scales = scales + (_scale(scale_ptr, weights, k, WEIGHTED, TILE, CELLS),)
    walk = Backward(
        given=of_each(given_to, (owns, others, numbers), TERMS, TILE),
        map_ptrs=map_ptrs,
        upstream=Upstream(
            pointer=upstream_ptr + image * upstream_strides[0],
            value=tl.load(upstream_ptr).to(tl.float64 if TILE.double else tl.float32),
            row_stride=wide(upstream_strides[1]),
            column_stride=wide(upstream_strides[2]),
            scales=scales,
        ),
        row_axis=rows,
        column_axis=columns,
        column=column_of_cells(
            columns, column, (target_ptr, target_strides), image, sizes, TILE, CELLS
        ),
        sizes=sizes,
    )
    # The nodes above the first row of cells come before its own.
    pointer = grad_ptr + image * grad_strides[0] + (first_row - 1) * wide(grad_strides[2])
    gradient = Gradient(
        pointer=pointer + column * wide(grad_strides[3]),
        class_stride=wide(grad_strides[1]),
        rows=tl.where(
            (member < MEMBERS - 1) & (column < sizes.width), sizes.height - first_row, -1
        ),
        first=first_class,
        unseen=unseen,
        scale=walk.upstream.value * scales[0],
    )

    nodes = nodes_around(logits_ptr, logits_strides, image, first_row, column, sizes, CELLS)
    above = (nodes.above_left, nodes.above_right)
    bytes_of_a_row = wide(logits_strides[2]) * (logits_ptr.dtype.element_ty.primitive_bitwidth // 8)
    top = tl.load(row_starts_ptr + tl.minimum(first_row, sizes.height))
    waiting = nothing_waits(TILE)
    for i in tl.range(0, sizes.nodes + 1):
        row = first_row + i
        bottom = tl.load(row_starts_ptr + tl.minimum(row, sizes.height) + 1)
        bottom = tl.where(row <= sizes.height, bottom, top)
        down = tl.where((row > 0) & (row < sizes.height), bytes_of_a_row, 0)
        nodes = nodes_from(nodes, above, down)
        sums = sums_of_cells(walk, nodes, (top, bottom), first_class, TERMS, TILE, CELLS)
        complete, waiting = join_rows(waiting, sums, TILE)
        store_nodes(gradient, complete, i, SCALED, TERMS.adds, TILE)
        # the next row of cells
        above = (nodes.below_left, nodes.below_right)
        gradient = row_below(gradient, wide(grad_strides[2]))
        top = bottom
