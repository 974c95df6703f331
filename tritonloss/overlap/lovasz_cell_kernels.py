"""The kernels of the Lovász losses of interpolated logits: those of ``lovasz_kernels`` over cells.

Going forward, each pixel's log-sum-exp is written once, and its own class counts its probability. A
program of a histogram goes through several tiles of cells (``cells.py``) for a few classes,
interpolates these once more, and keeps the counts of all pixels in registers. Going back, the
projection of every pixel, the sum over its classes of the probability times its increment, is
written by a kernel of its own. The gradient is then that of any other loss (``cell_kernels.py``),
whose slopes look up increments.

A pixel of the labels takes 8 bytes, 4 of them in the backward pass alone; of a hinge none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.cell_walk import fold_cells, lines_of_rows, of_pixels
from .._engine.cells import (
    Axis,
    cells_of,
    further,
    load_corner,
    nodes_around,
    place_in_image,
    shares_of_columns,
    shares_of_rows,
    together,
)
from .._engine.class_cells import _places_of, _slot_of, _walk_of
from .._engine.math import LOG2_E
from .._engine.pixels import Given, class_of, is_own, nothing_yet
from ..pixelwise.softmax import softmax_of_lanes
from .lovasz_bins import (
    hinge_error,
    hinge_place,
    in_histogram,
    in_table,
    shifted_hinge,
    softmax_place,
)
from .lovasz_gradient_kernels import _interpolated
from .lovasz_hinge_kernels import add_hinges, count_hinges, no_hinges
from .lovasz_kernels import add_to_histograms, count_own, count_pixels

# --- slopes ---------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What the slopes of a pixel share, [cells] each."""

    log_sum: Any  # base 2, of the sum of powers of e; infinity at pixels that are not counted
    own: Any
    projection: Any


@triton.jit
def softmax_factors(
    scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """The factors. Of a pixel that is not a number the gradient is none, of an ignored one 0."""
    log_sum, projection = saved
    valid = pixel.label >= 0
    projection = tl.where(log_sum < float("inf"), projection, float("nan"))
    return Factors(
        log_sum=tl.where(valid, log_sum, float("inf")),
        own=pixel.own,
        projection=tl.where(valid, projection, 0.0),
    )


@triton.jit
def softmax_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """P (dL/dp - projection)."""
    p, increment = _increment(factors, block, SLOT, given, OPTIONS, TILE)
    return p * (increment - factors.projection)


def softmax_is_silent(options: Any) -> bool:
    """The probabilities of a pixel that is not valid are 0."""
    return True


@triton.jit
def _increment(factors, block, SLOT: tl.constexpr, given, BINS: tl.constexpr, TILE: tl.constexpr):
    """(p, dL/dp) of a slot's class.

    For the projection and for the gradient p has to have the same bits: one in another bin would
    have another increment, where the two are to cancel.
    """
    p = tl.exp2(block.logits[SLOT] * LOG2_E - factors.log_sum)
    place = softmax_place(p, BINS)
    own = is_own(factors.own, block, SLOT, TILE)
    entry = in_table(place.bin, own, p >= 0.5, BINS)
    row = given.own_table + class_of(block, SLOT, TILE) * (4 * BINS.count)
    return p, _interpolated(row, entry, place.fraction)


@triton.jit
def hinge_factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The class alone."""
    return Factors(log_sum=(), own=pixel.own, projection=())


@triton.jit
def hinge_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """The increment of an error; no number where the error is none."""
    own = is_own(factors.own, block, SLOT, TILE)
    logit = block.logits[SLOT]
    error = hinge_error(logit, own)
    place = hinge_place(shifted_hinge(logit, own), OPTIONS)
    entry = in_table(place.bin, own, own, OPTIONS)
    increment = _interpolated(given.own_table, entry, place.fraction)
    gradient = tl.where(error > 0, increment, 0.0)
    return tl.where(error < float("inf"), gradient, float("nan"))


@triton.jit
def map_factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The gradient of a pixel's only class, which is in a map."""
    return saved


@triton.jit
def map_slope(factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """That gradient: what goes back to the nodes is the adjoint of the interpolation."""
    (gradient,) = factors
    return gradient


# --- statistics -----------------------------------------------------------------------------------


@triton.jit
def _cell_statistics_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    log_sum_ptr,  # [N, H, W]: see Factors
    histogram_ptr,  # [groups, C, counters]
    counts_ptr,  # [groups, 2]: wrong pixels of each group, and counted ones
    row_starts_ptr,  # [h + 2]: of every row of cells the first row of pixels
    row_shares_ptr,  # [H]: the share of the nodes below
    column_starts_ptr,  # [w + 2]
    column_shares_ptr,  # [W]
    logits_strides,
    target_strides,
    sizes,
    full,
    programs,  # of an image
    TERMS: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads the labels once, and the logits once for the rows and columns that a lane has."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    walk, cells = _walk_of(
        (logits_ptr, logits_strides), (target_ptr, target_strides), (rows, columns), ((),), sizes,
        TERMS, TILE, CELLS,
    )  # fmt: skip
    states = fold_cells(walk, full, TERMS, TILE, CELLS)

    places = _places_of(cells, sizes, CELLS)
    image = (tl.program_id(0) // programs).to(tl.int64)
    group = image if PER_IMAGE else 0
    counters = histogram_ptr + group * (TILE.classes * BINS.row)
    all_valid = ()
    all_counted = ()
    for k in tl.static_range(PIXELS):
        (state,) = states[k]
        statistics = softmax_of_lanes(state, TILE)
        # The sum is about 1 at least: the largest logit times log2 e is rounded.
        is_number = tl.abs(statistics.log_sum) < float("inf")
        valid = walk.pixels[k].label >= 0
        is_counted = valid & is_number
        log_sum = statistics.largest + statistics.log_sum
        log_sum = tl.where(is_counted, log_sum, float("inf"))
        tl.store(log_sum_ptr + places[k], log_sum, mask=walk.pixels[k].inside)
        p = _own_probability(walk, log_sum, k, TILE, CELLS)
        count_own(counters, p, walk.pixels[k].own, is_counted, BINS)
        all_valid = all_valid + (valid,)
        all_counted = all_counted + (is_counted,)
    count_pixels(counts_ptr + 2 * group, together(all_valid), together(all_counted))


@triton.jit
def _own_probability(walk, log_sum, K: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The probability of its own class at a lane's pixel: the bits that the histogram finds."""
    own = tl.maximum(walk.pixels[K].own, 0).to(tl.int64)
    nodes = walk.nodes
    logit, down, step, step_down = load_corner(nodes, nodes.pointer + own * nodes.stride, TILE)
    corner = (logit * LOG2_E, down * LOG2_E, step * LOG2_E, step_down * LOG2_E)
    left, step = _along_row(corner, walk.row_shares[K // CELLS.columns])
    return tl.exp2(tl.fma(walk.column_shares[K % CELLS.columns], step, left) - log_sum)


@triton.jit
def _along_row(corner, share):
    """(left logit, step to the right) as ``cells.along_row``, whatever else is multiplied."""
    logit, down, step, step_down = corner
    return tl.fma(share, down, logit), tl.fma(share, step_down, step)


# --- histograms -----------------------------------------------------------------------------------


class CellsOfTile(NamedTuple):
    """A tile of cells, and where its pixels lie between the nodes."""

    nodes: Any
    cells: Any
    row_shares: Any
    column_shares: Any


@triton.jit
def _tile_of(logits, target, axes, place, sizes, CELLS: tl.constexpr):
    """The tile in a place. ``logits`` and ``target`` are (pointer, strides)."""
    logits_ptr, logits_strides = logits
    rows, columns = axes
    cells = cells_of(axes, place, target, sizes, CELLS)
    return CellsOfTile(
        nodes=nodes_around(
            logits_ptr, logits_strides, place.image, place.row, place.column, sizes, CELLS
        ),
        cells=cells,
        row_shares=shares_of_rows(rows, cells, sizes, CELLS),
        column_shares=shares_of_columns(columns, cells, sizes, CELLS),
    )


@triton.jit
def _interpolated_logits(tile, channel, TILE: tl.constexpr, CELLS: tl.constexpr):
    """The logits of a class at all pixels of a tile, in one vector."""
    ROWS: tl.constexpr = CELLS.rows
    COLUMNS: tl.constexpr = CELLS.columns
    corner = load_corner(
        tile.nodes, tile.nodes.pointer + channel.to(tl.int64) * tile.nodes.stride, TILE
    )
    logits = ()
    for r in tl.static_range(ROWS):
        left, step = _along_row(corner, tile.row_shares[r])
        for c in tl.static_range(COLUMNS):
            logits = logits + (tl.fma(tile.column_shares[c], step, left),)
    return together(logits)


@triton.jit
def _log_sums(tile, log_sum_ptr, sizes, CELLS: tl.constexpr):
    """The log-sum-exps of all pixels of a tile, in one vector."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    log_sums = ()
    for k in tl.static_range(PIXELS):
        here = further(tile.cells, k // CELLS.columns, k % CELLS.columns, sizes)
        inside = here.first < here.end
        log_sum = tl.load(log_sum_ptr + here.place, mask=inside, other=float("inf"))
        log_sums = log_sums + (log_sum,)
    return together(log_sums)


@triton.jit
def _cell_histogram_kernel(
    logits_ptr,  # [N, C, h, w]
    log_sum_ptr,  # [N, H, W]
    histogram_ptr,  # [groups, C, counters]
    row_starts_ptr,
    row_shares_ptr,
    column_starts_ptr,
    column_shares_ptr,
    logits_strides,
    sizes,
    tiles,  # of an image
    chunks,  # of tiles of an image
    rounds,  # tiles of a chunk
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads log-sum-exps, and logits once more; counts the probabilities of a few classes."""
    COUNT: tl.constexpr = BINS.count
    CLASSES: tl.constexpr = TILE.unroll  # of a program
    CLASS_GROUPS: tl.constexpr = (TILE.classes + CLASSES - 1) // CLASSES
    program = tl.program_id(0)
    first_class = program % CLASS_GROUPS * CLASSES
    chunk = program // CLASS_GROUPS
    image = chunk // chunks
    first_tile = (chunk - image * chunks) * rounds
    logits = (logits_ptr, logits_strides)
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)

    counts = ()
    for _ in tl.static_range(CLASSES):
        counts = counts + (tl.zeros((COUNT,), tl.int32),)
    for i in tl.range(0, rounds):
        place = place_in_image(image, first_tile + i, tiles, sizes, TILE, CELLS)
        # Of labels it needs none: any map will do.
        tile = _tile_of(logits, (log_sum_ptr, (0, 0, 0)), (rows, columns), place, sizes, CELLS)
        log_sum = _log_sums(tile, log_sum_ptr, sizes, CELLS)
        added = ()
        for j in tl.static_range(CLASSES):
            channel = tl.minimum(first_class + j, TILE.classes - 1)
            p = tl.exp2(_interpolated_logits(tile, channel, TILE, CELLS) - log_sum)
            added = added + (counts[j] + tl.histogram(in_histogram(p, BINS), COUNT),)
        counts = added

    group = image.to(tl.int64) if PER_IMAGE else 0
    add_to_histograms(histogram_ptr, counts, group, first_class, BINS, TILE)


@triton.jit
def _cell_hinge_histogram_kernel(
    logits_ptr,  # [N, 1, h, w]
    target_ptr,  # [N, H, W]
    histogram_ptr,  # [groups, 1, counters]
    row_starts_ptr,
    row_shares_ptr,
    column_starts_ptr,
    column_shares_ptr,
    logits_strides,
    target_strides,
    sizes,
    tiles,
    chunks,
    rounds,
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads labels and logits once; counts the errors of others and own ones."""
    PIXELS: tl.constexpr = TILE.pixels * CELLS.rows * CELLS.columns
    IGNORED: tl.constexpr = CELLS.ignored
    image = tl.program_id(0) // chunks
    first_tile = (tl.program_id(0) - image * chunks) * rounds
    logits = (logits_ptr, logits_strides)
    target = (target_ptr, target_strides)
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)

    group = image.to(tl.int64) if PER_IMAGE else 0
    counters_ptr = histogram_ptr + group * BINS.row
    counts = no_hinges(PIXELS, BINS)
    for i in tl.range(0, rounds):
        place = place_in_image(image, first_tile + i, tiles, sizes, TILE, CELLS)
        tile = _tile_of(logits, target, (rows, columns), place, sizes, CELLS)
        label = _labels(tile.cells, sizes, CELLS)
        interpolated = _interpolated_logits(tile, tl.zeros((), tl.int32), TILE, CELLS)
        counts = count_hinges(counters_ptr, counts, interpolated, label, IGNORED, BINS)
    add_hinges(counters_ptr, counts, BINS)


@triton.jit
def _labels(cells, sizes, CELLS: tl.constexpr):
    """The labels of all pixels of a tile as they are, in one vector; 2 where there is no pixel."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    labels = ()
    for k in tl.static_range(PIXELS):
        row = further(cells, k // CELLS.columns, 0, sizes)
        column = k % CELLS.columns
        if CELLS.near:
            pointers = row.label + column
        else:
            pointers = row.label + column * row.strides[1]
        labels = labels + (tl.load(pointers, mask=row.first + column < row.end, other=2),)
    return together(labels)


# --- projections ----------------------------------------------------------------------------------


@triton.jit
def _add_terms(
    totals, factors, walk, first, COUNT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Each pixel's sum of p dL/dp with COUNT classes more."""
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    lines = lines_of_rows(walk, first, COUNT, TILE, CELLS)
    more = ()
    for k in tl.static_range(PIXELS):
        total = totals[k]
        for j in tl.static_range(COUNT):
            block = _slot_of(lines, walk, first, k, j, CELLS)
            p, increment = _increment(factors[k], block, 0, walk.given, BINS, TILE)
            total += p * increment
        more = more + (total,)
    return more


@triton.jit
def _prepare(
    arguments, K: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, CELLS: tl.constexpr
):
    """The factors of a lane's pixel, but for the projection."""
    log_sums, pixels = arguments
    return Factors(log_sum=log_sums[K], own=pixels[K].own, projection=())


@triton.jit
def _cell_project_kernel(
    logits_ptr,  # [N, C, h, w]
    target_ptr,  # [N, H, W]
    log_sum_ptr,  # [N, H, W]
    table_ptr,  # [groups, C, 2 bins, 2]
    projection_ptr,  # [N, H, W]
    row_starts_ptr,
    row_shares_ptr,
    column_starts_ptr,
    column_shares_ptr,
    logits_strides,
    target_strides,
    table_stride,  # from image to image
    sizes,
    full,
    programs,  # of an image
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Reads labels, statistics and logits once; writes the projection of every pixel."""
    BINS: tl.constexpr = TERMS.options[0]
    STEP: tl.constexpr = TILE.unroll
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    PIXELS: tl.constexpr = CELLS.rows * CELLS.columns
    image = (tl.program_id(0) // programs).to(tl.int64)
    table = table_ptr + image * table_stride
    given = Given(own_table=table, other_table=table, numbers=())
    rows = Axis(starts=row_starts_ptr, shares=row_shares_ptr)
    columns = Axis(starts=column_starts_ptr, shares=column_shares_ptr)
    walk, cells = _walk_of(
        (logits_ptr, logits_strides), (target_ptr, target_strides), (rows, columns), given, sizes,
        TERMS, TILE, CELLS,
    )  # fmt: skip
    places = _places_of(cells, sizes, CELLS)
    log_sums = ()
    totals = ()
    for k in tl.static_range(PIXELS):
        inside = walk.pixels[k].inside
        log_sum = tl.load(log_sum_ptr + places[k], mask=inside, other=float("inf"))
        log_sums = log_sums + (log_sum,)
        totals = totals + (nothing_yet(0.0, TILE),)

    factors = of_pixels(_prepare, (log_sums, walk.pixels), TERMS, TILE, CELLS)
    if FULL > 0:
        for first in tl.range(0, full, STEP):
            totals = _add_terms(totals, factors, walk, first, STEP, BINS, TILE, CELLS)
    LEFT: tl.constexpr = TILE.classes - FULL
    totals = _add_terms(totals, factors, walk, FULL, LEFT, BINS, TILE, CELLS)

    for k in tl.static_range(PIXELS):
        # Of a pixel that is not counted every probability is 0, unless it is none.
        total = tl.where(log_sums[k] < float("inf"), totals[k], 0.0)
        tl.store(projection_ptr + places[k], total, mask=walk.pixels[k].inside)
