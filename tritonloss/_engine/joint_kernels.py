"""Class sums and pixelwise losses in one read of the logits.

Going forward, a program goes through tiles of pixels as for class sums alone (``class_sums.py``).
The first of the walk's losses is that of the class sums, the others are pixelwise ones: a lane adds
up their values, too. A second kernel adds up what all programs have left. The last of its programs
makes the means of the pixelwise losses, has the heads of all losses of class sums make their losses
of the same sums, and makes one table of all their gradients, so that several of them cost a pixel
no more than one.

Going back, each pixel has the slopes of the class sums and those of the pixelwise losses. Those of
the same probabilities are taken in: a slope p_k (G_k - projection) + A p_k - B y_k needs p_k once.

Bytes, L of logits and T of labels, as for class sums alone: forward L + T, backward 2 L + T. What
depends on the logits alone, as a softmax's statistics do, is saved once for all losses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .class_heads import _PARTS, add_parts, sum_losses
from .class_sums import (
    Plane,
    _nothing,
    _project_block,
    _project_blocks,
    _sum_blocks,
    add_to_sums,
    count_labels,
    finish_tile,
    no_values,
    project,
    run_at,
    store_counts,
    store_sums,
    store_values,
)
from .pixel_walk import (
    _load_block,
    _write_block,
    add,
    add_again,
    all_factors,
    factors_of,
    fold,
    given_to,
    join,
    largest_of_bundle,
    load_pixels,
    look_up_own,
    of_each,
    saved_by,
    start,
    view_of,
    write_gradients,
)
from .pixels import Given, nothing_yet
from .sums import _takes_last


class Heads(NamedTuple):
    """The losses of the same class sums; fields are tuples over them."""

    head: Any  # device functions, as ``ClassLoss`` has them
    options: Any
    counting: Any
    per_image: Any


class Places(NamedTuple):
    """Where the numbers of a loss are: first those of all pixelwise losses, then of all heads."""

    weights: Any
    terms: Any  # among the values that users see


# --- device functions: forward --------------------------------------------------------------------


@triton.jit
def _add_values(values_ptr, totals_ptr, row, programs):
    """Store the sum of a row over all programs, in float64."""
    lane = tl.arange(0, _PARTS)
    total = tl.zeros((_PARTS,), tl.float64)
    for first in tl.range(0, programs, _PARTS):
        pointers = values_ptr + row * programs + first + lane
        total += tl.load(pointers, mask=first + lane < programs, other=0.0).to(tl.float64)
    tl.store(totals_ptr + row, tl.sum(total))


@triton.jit
def _valid_pixels(sums_ptr, images, CLASSES: tl.constexpr):
    """How many pixels of all images are valid, float64."""
    pointer = sums_ptr + 2 * images * (CLASSES + 1) + CLASSES
    valid = tl.zeros((), tl.float64)
    for image in tl.range(0, images):
        valid += tl.load(pointer + image * (CLASSES + 1))
    return valid


@triton.jit
def _mean_of_values(totals_ptr, valid, K: tl.constexpr, REDUCTION: tl.constexpr):
    """(mean, or sum, of a pixelwise loss, 1 by what it is divided by)."""
    value = tl.load(totals_ptr + 2 * K)
    inverse = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        # No valid pixel: the mean is 0. Weights that sum to 0: NaN, as torch has it.
        divisor = tl.where(valid > 0, tl.load(totals_ptr + 2 * K + 1), 1.0)
        divisor = tl.where(divisor == 0, float("nan"), divisor)
        value = value / divisor
        inverse = inverse / divisor
    return value, inverse


@triton.jit
def _losses_of_head(pointers, numbers, images, HEADS: tl.constexpr, K: tl.constexpr,
                    CLASSES: tl.constexpr):  # fmt: skip
    """(sum of values, what it is divided by) of a head; the two numbers of a class are stored."""
    HEAD: tl.constexpr = HEADS.head[K]
    OPTIONS: tl.constexpr = HEADS.options[K]
    COUNTING: tl.constexpr = HEADS.counting[K]
    value, divisor, taken = sum_losses(pointers, numbers, images, HEAD, OPTIONS, COUNTING, CLASSES)
    # No class that counts: the mean is 0. Weights that sum to 0: NaN.
    divisor = tl.where(taken > 0, divisor, 1.0)
    return value, tl.where(divisor == 0, float("nan"), divisor)


# --- kernels: forward -----------------------------------------------------------------------------


@triton.jit
def _joint_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C], as ``_pixelwise_forward_kernel`` has them; the first's is none
    other_ptrs,  # of every loss likewise
    map_ptrs,  # [N, H, W] each: what the losses leave to the backward pass
    parts_ptr,  # [3, N, C + 1, programs of an image]: own, all, counts
    values_ptr,  # [pixelwise losses, 2, programs]: sums of values, and of weights
    numbers,  # of every loss, a tuple
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    full,  # classes in the blocks before the last
    rounds,  # tiles of a program
    programs,  # of an image
    images,
    TERMS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once; each of its programs leaves its sums."""
    COUNT: tl.constexpr = (TILE.classes + TILE.lanes - 1) // TILE.lanes
    HELD: tl.constexpr = COUNT <= TILE.unroll
    OTHERS: tl.constexpr = len(TERMS.start) - 1
    image = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows: tl.constexpr = TILE.classes + 1
    plane = Plane(
        pointer=parts_ptr + image * rows * programs + program,
        stride=programs.to(tl.int64),
        kind=images.to(tl.int64) * rows * programs,
    )
    given = of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE)

    own = ()
    all_pixels = ()
    for _ in tl.static_range(COUNT if HELD else 0):
        own = own + (_nothing(TILE),)
        all_pixels = all_pixels + (_nothing(TILE),)
    counts = tl.zeros((BINS,), tl.int32)
    totals = no_values(TERMS, TILE)
    valid = tl.full((), 0, tl.int32)
    for i in tl.range(0, rounds):
        run = run_at(image, program * rounds + i, pixels, width, TILE)
        pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
        view = view_of(logits_ptr, logits_strides, run, TILE)
        counts = count_labels(counts, pixel, BINS)
        if not HELD:  # this tile is the only one
            store_counts(plane, counts, BINARY, BINS, TILE.classes)
            valid = tl.sum(counts)

        # the states of all losses, and with the own logits their values and maps
        if HELD:
            block = _load_block(view, 0, pixel.inside, COUNT, TILE.classes, TILE)
            states = of_each(start, (), TERMS, TILE)
            states = of_each(add, (states, block, pixel, given), TERMS, TILE)
            states = of_each(join, (states,), TERMS, TILE)
            states = of_each(add_again, (states, block, pixel, given), TERMS, TILE)
        else:
            states = fold(view, pixel, given, full, TERMS, TILE)
        own_logits = look_up_own(view, pixel, TILE)
        maps = (map_ptrs, image * pixels * TILE.grain + run.first + run.local)
        totals = finish_tile(states, own_logits, maps, pixel, given, totals, TERMS, TILE)

        shared = PROBABILITIES.share(states[0], TILE)
        if HELD:
            own, all_pixels = add_to_sums(
                (own, all_pixels), shared, block, pixel, PROBABILITIES, TILE
            )
        else:
            _sum_blocks(plane, shared, view, pixel, full, PROBABILITIES, TILE)

    if HELD:
        store_sums(plane, (own, all_pixels), 0, TILE)
        store_counts(plane, counts, BINARY, BINS, TILE.classes)
        valid = tl.sum(counts)
    store_values(values_ptr, totals, valid, programs * images, OTHERS, TERMS)


@triton.jit
def _joint_head_kernel(
    parts_ptr,  # [3, N, C + 1, programs of an image]
    sums_ptr,  # float64 [3, N, C + 1]: own, all, counts
    class_weight_ptrs,  # of every head [C], if it is weighted
    tables_ptr,  # float64 [heads, 2, N, C]: of every head's gradient, [2, 1, C] unless per image
    values_ptr,  # [pixelwise losses, 2, programs]: sums of values, and of weights
    totals_ptr,  # float64 [pixelwise losses, 2]
    weights_ptr,  # float64
    loss_ptr,  # []
    terms_ptr,  # [losses]
    scale_ptr,  # of the class sums, which is 1, and of every pixelwise loss
    table_ptr,  # [2, GROUPS, C]: what own pixels get on top, what all get, of all heads
    tickets_ptr,
    numbers,  # of every head, a tuple
    places,
    programs,  # of an image
    images,
    groups,  # images, or 1
    HEADS: tl.constexpr,
    REDUCTION: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Adds up what the programs have left; the last of its own programs computes the losses."""
    COUNT: tl.constexpr = len(HEADS.head)
    OTHERS: tl.constexpr = len(places.terms) - COUNT
    LANES: tl.constexpr = triton.next_power_of_2(CLASSES)
    rows = images * (CLASSES + 1)
    row = tl.program_id(0)
    if row < rows:
        add_parts(parts_ptr, sums_ptr, rows, programs, CLASSES)
    else:
        _add_values(values_ptr, totals_ptr, row - rows, programs * images)
    if _takes_last(tickets_ptr, rows + 2 * OTHERS):
        tl.debug_barrier()
        # the pixelwise losses
        tl.store(scale_ptr, 1.0)
        loss = tl.zeros((), tl.float64)
        valid = _valid_pixels(sums_ptr, images, CLASSES)
        for k in tl.static_range(OTHERS):
            weight = tl.load(weights_ptr + places.weights[k])
            term, inverse = _mean_of_values(totals_ptr, valid, k, REDUCTION)
            tl.store(terms_ptr + places.terms[k], term)
            tl.store(scale_ptr + 1 + k, weight * inverse)
            loss += weight * term

        # those of the heads
        size = 2 * images.to(tl.int64) * CLASSES  # of a head's tables
        scales = ()
        for k in tl.static_range(COUNT):
            rooms = (sums_ptr, class_weight_ptrs[k], tables_ptr + k * size)
            value, divisor = _losses_of_head(rooms, numbers[k], images, HEADS, k, CLASSES)
            weight = tl.load(weights_ptr + places.weights[OTHERS + k])
            tl.store(terms_ptr + places.terms[OTHERS + k], value / divisor)
            loss += weight * (value / divisor)
            scales = scales + (weight / divisor,)
        tl.store(loss_ptr, loss)

        # one table of all their gradients
        tl.debug_barrier()
        number = tl.arange(0, LANES)
        for group in tl.range(0, groups):
            own = tl.zeros((LANES,), tl.float64)
            all_pixels = tl.zeros((LANES,), tl.float64)
            for k in tl.static_range(COUNT):
                mine = group if HEADS.per_image[k] else 0
                count = images if HEADS.per_image[k] else 1
                table = tables_ptr + k * size + mine * CLASSES + number
                inside = number < CLASSES
                own += scales[k] * tl.load(table, mask=inside, other=0.0)
                table += count * CLASSES
                all_pixels += scales[k] * tl.load(table, mask=inside, other=0.0)
            pointers = table_ptr + group * CLASSES + number
            tl.store(pointers, own, mask=number < CLASSES)
            tl.store(pointers + groups * CLASSES, all_pixels, mask=number < CLASSES)


# --- device functions: backward -------------------------------------------------------------------


@triton.jit
def _factors_of_sums(scale, maps, view, pixel, tables, PROBABILITIES: tl.constexpr,
                     TERMS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """What the slopes of the class sums share, but for the projection."""
    saved = saved_by(maps, TERMS, 0)
    bundles = TERMS.bundles[0](saved, pixel, TILE)
    looked_up = ()
    for j in tl.static_range(len(bundles)):
        looked_up = looked_up + (largest_of_bundle(view, bundles[j], pixel.inside, TILE),)
    return PROBABILITIES.prepare(scale, saved, looked_up, pixel, tables, TILE)


@triton.jit
def _other_factors(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """What the slopes of a pixelwise loss share; nothing in the place of the class sums."""
    if K == 0:
        factors = ()
    else:
        factors = factors_of(arguments, TERMS, K, TILE)
    return factors


# --- kernels: backward ----------------------------------------------------------------------------


@triton.jit
def _joint_backward_kernel(
    upstream_ptr,  # []
    scale_ptr,  # of the class sums, and of every pixelwise loss
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every pixelwise loss [C]
    other_ptrs,  # of every pixelwise loss [C]
    table_ptr,  # [2, images or 1, C]: what own pixels get on top, what all get
    map_ptrs,  # [N, H, W] each
    grad_ptr,  # [N, C, H, W]
    numbers,  # of every loss, a tuple
    logits_strides,
    target_strides,
    grad_strides,
    table_strides,  # from the first to the second, from image to image
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    TERMS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once more, writes the gradient once."""
    COUNT: tl.constexpr = (TILE.classes + TILE.lanes - 1) // TILE.lanes
    LOSSES: tl.constexpr = len(TERMS.start)
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    image = (tl.program_id(0) // tiles).to(tl.int64)
    run = run_at(image, tl.program_id(0) % tiles, pixels, width, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)
    table = table_ptr + image * table_strides[1]
    tables = Given(own_table=table, other_table=table + table_strides[0], numbers=())
    owns = (tables.own_table,) + own_ptrs
    others = (tables.other_table,) + other_ptrs
    given = of_each(given_to, (owns, others, numbers), TERMS, TILE)

    # what the slopes of a pixel's classes share
    upstream = tl.load(upstream_ptr).to(dtype)
    scale_of_sums = tl.where(pixel.label >= 0, upstream, 0.0)
    scales = (scale_of_sums,)
    for k in tl.static_range(1, LOSSES):
        scale = upstream * tl.load(scale_ptr + k).to(dtype)
        scales = scales + (tl.where(pixel.label >= 0, scale, 0.0),)
    position = image * pixels * TILE.grain + run.first + run.local
    maps = ()
    for i in tl.static_range(len(map_ptrs)):
        maps = maps + (tl.load(map_ptrs[i] + position, mask=pixel.inside, other=0),)
    factors = of_each(_other_factors, (scales, maps, view, pixel, given), TERMS, TILE)
    of_sums = _factors_of_sums(scale_of_sums, maps, view, pixel, tables, PROBABILITIES, TERMS, TILE)

    # the projection, then the slopes
    nothing = nothing_yet(0.0, TILE)
    if COUNT <= TILE.unroll:
        block = _load_block(view, 0, pixel.inside, COUNT, TILE.classes, TILE)
        if PROBABILITIES.compared:
            sum_of_terms = _project_block(nothing, of_sums, block, tables, PROBABILITIES, TILE)
            of_sums = project(of_sums, sum_of_terms, view, pixel, PROBABILITIES, TILE)
    elif PROBABILITIES.compared:
        sum_of_terms = _project_blocks(of_sums, view, pixel, tables, full, PROBABILITIES, TILE)
        of_sums = project(of_sums, sum_of_terms, view, pixel, PROBABILITIES, TILE)
    for k in tl.static_range(len(TERMS.slope), LOSSES):
        of_sums = PROBABILITIES.take_in(of_sums, factors[k], TILE)
    factors = of_each(all_factors, (of_sums, factors), TERMS, TILE)
    if COUNT <= TILE.unroll:
        _write_block(factors, block, grad_view, pixel, given, TERMS, TILE)
    else:
        write_gradients(factors, (view, grad_view), pixel, given, full, TERMS, TILE)
