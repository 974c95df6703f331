"""Class sums over logits that are interpolated: the walk over cells (``cells.py``).

Of few classes lanes hold all sums going forward (``held_cells.py``). Going back, a few lanes share
a cell, with a block of the classes each. The projection of a pixel is over all of them: a sum over
these lanes. Its terms are there for the slopes, too (``cell_gradients.py``).

Of more classes, or where another loss has slopes of its own, a lane goes forward through the
classes twice, first for the statistics of its pixels and then for their probabilities, which it
adds up over all of them. Going back, programs have a block of classes each. A kernel of its own
leaves the projections in a map, 4 bytes per pixel, and the gradient is that of any other loss
(``cell_kernels.py``).

Pixelwise losses can share the walk: the first of its losses is that of the class sums. Going
forward they have the first time through the classes with it, and the last kernel going back.

A softmax's statistics take 4 bytes per pixel of the labels, those and projections 8.

Instructions per pixel and class of 19, each interpolated over 4 x 4 pixels, at sm_90: forward 13.9
and back 18.5, with cross entropy 14.9 and 18.7; of cross entropy alone 12.4 and 13.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cell_walk import (
    Forward,
    _start,
    finish_pixels,
    fold_cells,
    lines_of_rows,
    load_pixel_of,
    of_pixels,
)
from .cells import (
    Axis,
    cells_of,
    further,
    look_up_between,
    nodes_around,
    place_of_program,
    shares_of_columns,
    shares_of_rows,
    together,
)
from .class_sums import (
    Plane,
    count_labels,
    store_counts,
    store_values,
)
from .pixel_walk import given_to, of_each
from .pixels import Block, Given, Pixel, nothing_yet

# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _walk_of(logits, target, axes, given, sizes, TERMS: tl.constexpr, TILE: tl.constexpr,
             CELLS: tl.constexpr):  # fmt: skip
    """(walk, cells): what a forward pass needs at the pixels of this program's lanes.

    ``logits`` and ``target`` are (pointer, strides).
    """
    place = place_of_program(sizes, TILE, CELLS)
    cells = cells_of(axes, place, target, sizes, CELLS)
    rows, columns = axes
    logits_ptr, logits_strides = logits
    walk = Forward(
        nodes=nodes_around(
            logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
        ),
        pixels=of_pixels(load_pixel_of, (cells, sizes), TERMS, TILE, CELLS),
        given=given,
        row_shares=shares_of_rows(rows, cells, sizes, CELLS),
        column_shares=shares_of_columns(columns, cells, sizes, CELLS),
    )
    return walk, cells


@triton.jit
def _places_of(cells, sizes, CELLS: tl.constexpr):
    """Where each of a lane's pixels is in a map [N, H, W]."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    places = ()
    for k in tl.static_range(PIXELS):
        here = further(cells, k // CELLS.columns, k % CELLS.columns, sizes)
        places = places + (here.place,)
    return places


@triton.jit
def _slot_of(lines, walk, first, K: tl.constexpr, SLOT: tl.constexpr, CELLS: tl.constexpr):
    """A block of one class, that of a slot, of a lane's pixel K."""
    lefts, steps = lines
    COUNT: tl.constexpr = len(lefts) // CELLS.rows
    PLACE: tl.constexpr = K // CELLS.columns * COUNT + SLOT
    logit = lefts[PLACE] + walk.column_shares[K % CELLS.columns] * steps[PLACE]
    return Block(logits=(logit,), exists=(), start=first + SLOT, owned=(), base2=())


@triton.jit
def _share(
    arguments, K: tl.constexpr, PROBABILITIES: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """What the probabilities of a lane's pixel share."""
    (states,) = arguments
    return PROBABILITIES.share(states[K][0], TILE)


@triton.jit
def _of_two(first, second, BIT: tl.constexpr, TILE: tl.constexpr):
    """In half of the lanes a sum over two lanes of the first vector, in the others of the second.

    Lanes whose number has the BIT have the second. So many sums over a warp take a third of what
    they take one by one.
    """
    lane = tl.arange(0, TILE.pixels)
    is_second = (lane & BIT) != 0
    kept = tl.where(is_second, second, first)
    given = tl.where(is_second, first, second)
    return kept + tl.gather(given, lane ^ BIT, 0)


@triton.jit
def _store_block(
    plane, shared, walk, first, COUNT: tl.constexpr, PROBABILITIES: tl.constexpr,
    TILE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Store the sums of COUNT classes, at most four, over all pixels of the program: a warp's."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    lines = lines_of_rows(walk, first, COUNT, TILE, CELLS)
    sums = ()  # of every class, in lanes of an even number of the label's pixels, else of all
    for j in tl.static_range(COUNT):
        own = nothing_yet(0.0, TILE)
        all_pixels = nothing_yet(0.0, TILE)
        for k in tl.static_range(PIXELS):
            pixel = walk.pixels[k]
            block = _slot_of(lines, walk, first, k, j, CELLS)
            power = PROBABILITIES.power(shared[k], block, 0, TILE)
            factor = PROBABILITIES.factor(shared[k], block, TILE)
            # Carried out under its condition, as in ``add_to_sums``.
            own = tl.where(pixel.own == block.start, tl.fma(power, factor, own), own)
            more = tl.fma(power, factor, all_pixels)
            all_pixels = tl.where(pixel.label >= 0, more, all_pixels)
        sums = sums + (_of_two(own, all_pixels, 1, TILE),)

    _store_of_two(plane, sums, first, TILE, CELLS)


@triton.jit
def _store_of_two(plane, sums, first, TILE: tl.constexpr, CELLS: tl.constexpr):
    """Store the sums of up to four classes from ``first`` on, over all lanes that have them."""
    COUNT: tl.constexpr = len(sums)
    MEMBERS: tl.constexpr = TILE.pixels // (CELLS.parts if CELLS.parts > 0 else 1)
    tl.static_assert(COUNT <= 4 and MEMBERS >= 8 and MEMBERS <= 64)
    # a class for every second lane, then the sums over the lanes of a class
    nothing = nothing_yet(0.0, TILE)
    early = _of_two(sums[0], sums[1] if COUNT > 1 else nothing, 2, TILE)
    late = nothing
    if COUNT > 2:
        late = _of_two(sums[2], sums[3] if COUNT > 3 else nothing, 2, TILE)
    total = _of_two(early, late, 4, TILE)
    lane = tl.arange(0, TILE.pixels)
    if MEMBERS > 8:
        total += tl.gather(total, lane ^ 8, 0)
    if MEMBERS > 16:
        total += tl.gather(total, lane ^ 16, 0)
    if MEMBERS > 32:
        total += tl.gather(total, lane ^ 32, 0)
    if CELLS.parts == 0:
        slot = lane >> 1
        kept = slot < COUNT
    else:  # of the lanes that have a class twice the one whose own it is
        slot = lane % MEMBERS >> 1
        kept = (slot < COUNT) & (first + slot >= lane // MEMBERS * TILE.unroll)
    pointers = plane.pointer + (first + slot) * plane.stride
    tl.store(tl.where((lane & 1) != 0, pointers + plane.kind, pointers), total, mask=kept)


@triton.jit
def _count_pixels(counts, pixels, PIXELS: tl.constexpr, BINS: tl.constexpr):
    labels = ()
    for k in tl.static_range(PIXELS):
        labels = labels + (pixels[k].label,)
    label = together(labels)
    return count_labels(counts, Pixel(label=label, own=label, inside=label >= 0), BINS)


@triton.jit
def _prepare(
    arguments, K: tl.constexpr, PROBABILITIES: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """The factors of a lane's pixel, for a scale of 1."""
    walk, maps, given = arguments
    pixel = walk.pixels[K]
    scale = nothing_yet(1.0, TILE)
    return PROBABILITIES.prepare(scale, (maps[K],), (), pixel, given, TILE)


@triton.jit
def _add_terms(
    totals, factors, walk, first, COUNT: tl.constexpr, PROBABILITIES: tl.constexpr,
    TILE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Each pixel's sum of terms with COUNT classes more; ``walk.given`` are the tables."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    lines = lines_of_rows(walk, first, COUNT, TILE, CELLS)
    more = ()
    for k in tl.static_range(PIXELS):
        total = totals[k]
        for j in tl.static_range(COUNT):
            block = _slot_of(lines, walk, first, k, j, CELLS)
            total += PROBABILITIES.term(factors[k], block, 0, walk.given, TILE)
        more = more + (total,)
    return more


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _class_cells_forward_kernel(
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
    programs,  # of an image
    images,
    TERMS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the labels once, and the logits twice for the rows and columns that a lane has."""
    STEP: tl.constexpr = TILE.unroll
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    OTHERS: tl.constexpr = len(TERMS.start) - 1
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    given = of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE)
    walk, cells = _walk_of(
        (logits_ptr, logits_strides), (target_ptr, target_strides), (rows, columns), given, sizes,
        TERMS, TILE, CELLS,
    )  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    ROWS: tl.constexpr = TILE.classes + 1
    plane = Plane(
        pointer=parts_ptr + image * ROWS * programs + tl.program_id(0) % programs,
        stride=programs.to(tl.int64),
        kind=images.to(tl.int64) * ROWS * programs,
    )

    # the counts, first, when there is nothing else in registers
    counts = _count_pixels(tl.zeros((BINS,), tl.int32), walk.pixels, PIXELS, BINS)
    store_counts(plane, counts, CELLS.binary, BINS, TILE.classes)

    # the states of all losses, their values and maps
    states = of_pixels(_start, (), TERMS, TILE, CELLS)
    if PROBABILITIES.compared or OTHERS > 0:
        states = fold_cells(walk, full, TERMS, TILE, CELLS)
        places = _places_of(cells, sizes, CELLS)
        _, totals = finish_pixels(states, walk, places, map_ptrs, TERMS, TILE, CELLS)
        of_others = ()
        for i in tl.static_range(2 * OTHERS):
            of_others = of_others + (totals[2 + i],)
        store_values(values_ptr, of_others, tl.sum(counts), programs * images, OTHERS, TERMS)

    # the sums
    shared = of_pixels(_share, (states,), PROBABILITIES, TILE, CELLS)
    if FULL > 0:
        for first in tl.range(0, full, STEP):
            _store_block(plane, shared, walk, first, STEP, PROBABILITIES, TILE, CELLS)
    _store_block(plane, shared, walk, FULL, TILE.classes - FULL, PROBABILITIES, TILE, CELLS)


@triton.jit
def _class_cells_project_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    map_ptr,  # [N, H, W]: the statistics
    table_ptr,  # [2, images or 1, C]: what own pixels get on top, what all get
    projection_ptr,  # [N, H, W]
    row_starts_ptr,  # [h + 2]
    row_shares_ptr,  # [H]
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    logits_strides,
    target_strides,
    table_strides,  # from the first to the second, from image to image
    sizes,
    full,
    programs,  # of an image
    TERMS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads labels, statistics and logits once; writes the projection of every pixel."""
    STEP: tl.constexpr = TILE.unroll
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    image = (tl.program_id(0) // programs).to(tl.int64)
    table = table_ptr + image * table_strides[1]
    given = Given(own_table=table, other_table=table + table_strides[0], numbers=())
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    walk, cells = _walk_of(
        (logits_ptr, logits_strides), (target_ptr, target_strides), (rows, columns), given, sizes,
        TERMS, TILE, CELLS,
    )  # fmt: skip
    places = _places_of(cells, sizes, CELLS)
    maps = ()
    totals = ()
    for k in tl.static_range(PIXELS):
        maps = maps + (tl.load(map_ptr + places[k], mask=walk.pixels[k].inside, other=0.0),)
        totals = totals + (nothing_yet(0.0, TILE),)

    factors = of_pixels(_prepare, (walk, maps, given), PROBABILITIES, TILE, CELLS)
    if FULL > 0:
        for first in tl.range(0, full, STEP):
            totals = _add_terms(totals, factors, walk, first, STEP, PROBABILITIES, TILE, CELLS)
    LEFT: tl.constexpr = TILE.classes - FULL
    totals = _add_terms(totals, factors, walk, FULL, LEFT, PROBABILITIES, TILE, CELLS)

    for k in tl.static_range(PIXELS):
        pixel = walk.pixels[k]
        row_share = walk.row_shares[k // CELLS.columns]
        column_share = walk.column_shares[k % CELLS.columns]
        own = look_up_between(walk.nodes, pixel.own, row_share, column_share, TILE)
        projection = PROBABILITIES.projection(factors[k], totals[k], own, pixel, TILE)
        tl.store(projection_ptr + places[k], projection, mask=pixel.inside)
