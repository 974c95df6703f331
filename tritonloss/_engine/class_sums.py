"""Class sums: losses of each (image, class)'s sums of probabilities, in the walk over pixels.

Three numbers of each class of an image are all that such a loss is a function of: the sum of the
class's probability where it is the label, that sum everywhere, and the number of pixels with the
label. Hence two numbers of each class are all that its gradient to a probability is made of: what
every pixel gets, and what those with the label get on top.

Going forward, a program goes through several tiles of pixels of one image. It adds up within a
lane, and over its lanes only at its end. Its sums are of float32 and its counts of integers; a
second kernel, of one program for each class of each image, adds those of all programs in float64
and in their order. Whichever of these comes last has the *head* compute the loss and the two
numbers of each class. Going back, a pixel's logits are read once more, and the gradient is written.

Bytes, L of logits and T of labels: forward L + T, backward 2 L + T, if a lane's classes are held in
registers, as up to 32 of them are. With more, in contiguous logits, every tile's logits are read
twice in each pass, the second time from the cache as far as that goes. The softmax leaves its
statistics to the backward pass, 4 bytes per pixel. No map with classes is made but the gradient.

Instructions per pixel and class, of float32, before loads and stores: forward 5 for the softmax's
statistics, whose powers are the probabilities' too, 1 for the sum of all and 2 for that of the
label; backward 3 for the exponential, 1 for the sum over classes, 2 for the look-up, 2 for the
slope and 1 for ignored pixels. All are 12.9 and 15.8 of 19 classes (cross entropy: 12.4 and 12.8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixel_walk import (
    Run,
    View,
    _load_block,
    _write_block,
    add,
    finish,
    fold,
    largest_of_bundle,
    load_pixels,
    look_up,
    of_each,
    start,
    store_maps,
    view_of,
    write_gradients,
)
from .pixels import Given, class_of, for_classes, nothing_yet, sum_of_lanes

Function = Callable[..., Any]


class Probabilities(NamedTuple):
    """What a loss of class sums has beside its ``Record``: probabilities of a pixel's classes.

    The record's ``finish`` returns no value, only what is saved. Its ``factors`` get the projection
    (below), as if it were saved, after what is.

    Attributes:
        compared: whether they are those of a softmax: what the classes of a pixel share needs a
            pass over all of them, and a slope depends on the probabilities of all.
        share: (state, TILE) -> what the probabilities of a pixel's classes share, a tuple.
        join: (state, PARTS, TILE) -> that of all classes, where so many lanes have a block each.
        share_of_part: (state, the joined one, TILE) -> what the probabilities of a block share.
        select: (condition, state, other state) -> one of both, lane by lane.
        probability: (shared, block, SLOT, TILE) -> the probabilities of a slot; anything where
            the pixel is not valid.
        power: likewise -> what they are once they are multiplied by what comes next.
        factor: (shared, block, TILE) -> [pixels], the same for all of a pixel's classes.
        prepare: (scale, saved, looked_up, pixel, given, TILE) -> the factors of the slopes but for
            the projection, the sum over a pixel's classes of the probability times its gradient.
            ``given.own_table`` is what own pixels get on top of ``given.other_table``, for all.
        term: (factors, block, SLOT, given, TILE) -> a slot's part of a sum over the classes.
        projection: (factors, total, own, pixel, TILE) -> the projection, [pixels], from that sum
            and the logits of the pixels' own classes, 0 where there is none.
        project: (factors, projection, pixel, TILE) -> the factors with it.
        takes: the slope of pixelwise losses that are taken in where they share a walk, or None. A
            slope that is the sum of both costs less than two.
        take_in: (factors, those of such a loss, TILE) -> the factors of both.
        slope: as ``Record.slope``, of factors that have taken in another's.
        product: (factors, block, SLOT, given, TILE) -> a slot's probability times its gradient and
            what has been taken in, where the lanes of a cell have all of a pixel's classes.
        less: (factors, total, TILE) -> the factors with the sum of all products of the pixel.
        product_slope: as ``Record.slope``, from a slot's product and that sum.
    """

    compared: bool
    share: Function
    join: Function
    share_of_part: Function
    select: Function
    probability: Function
    power: Function
    factor: Function
    prepare: Function
    term: Function
    projection: Function
    project: Function
    takes: Function | None = None
    take_in: Function | None = None
    slope: Function | None = None
    product: Function | None = None
    less: Function | None = None
    product_slope: Function | None = None


class Plane(NamedTuple):
    """Where the sums of an image are."""

    pointer: Any  # to the first number of the first class
    stride: Any  # from class to class
    kind: Any  # from the sums of the label's probabilities to those of all, and to the counts


# --- device functions: sums -----------------------------------------------------------------------


@triton.jit
def run_at(image, number, pixels, width, TILE: tl.constexpr):
    """A run of pixels of an image, by its number; beyond the image it has none."""
    first = number.to(tl.int64) * TILE.pixels
    local = tl.arange(0, TILE.pixels)
    inside = first + local < pixels.to(tl.int64) * TILE.grain
    return Run(image=image, first=first, local=local, inside=inside, width=width)


@triton.jit
def _nothing(TILE: tl.constexpr):
    """A lane's sum before the first tile."""
    if TILE.lanes == 1:
        dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
        LANES: tl.constexpr = TILE.pixels // TILE.grain
        result = tl.zeros((LANES,), dtype)
    else:
        result = nothing_yet(0.0, TILE)
    return result


@triton.jit
def _in_lane(x, TILE: tl.constexpr):
    """The sums of a lane's pixels, where it has several of them side by side."""
    if TILE.lanes == 1 and TILE.grain > 1:
        LANES: tl.constexpr = TILE.pixels // TILE.grain
        result = tl.sum(tl.reshape(x, (LANES, TILE.grain)), axis=1)
    else:
        result = x
    return result


@triton.jit
def _two_values(shared, block, SLOT: tl.constexpr, pixel, PROBABILITIES: tl.constexpr,
                TILE: tl.constexpr):  # fmt: skip
    """(probability where the slot's class is the label, probability), of valid pixels; else 0."""
    p = PROBABILITIES.probability(shared, block, SLOT, TILE)
    is_own = class_of(block, SLOT, TILE) == for_classes(pixel.own, TILE)
    # Selected, not multiplied: an ignored pixel may hold an infinity.
    return tl.where(is_own, p, 0.0), tl.where(for_classes(pixel.label >= 0, TILE), p, 0.0)


@triton.jit
def _side_by_side(x, TILE: tl.constexpr):
    """The pixels that a lane has side by side, one after the other: a tuple of [lanes] each."""
    LANES: tl.constexpr = TILE.pixels // TILE.grain
    if TILE.grain == 4:
        even, odd = tl.split(tl.reshape(x, (LANES, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    elif TILE.grain == 2:
        first, second = tl.split(tl.reshape(x, (LANES, 2)))
        parts = (first, second)
    else:
        parts = (x,)
    return parts


@triton.jit
def add_to_sums(sums, shared, block, pixel, PROBABILITIES: tl.constexpr, TILE: tl.constexpr):
    """(own, all) with a tile of pixels more, of every slot what a lane has added up."""
    own, all_pixels = sums
    more_own = ()
    more = ()
    if TILE.lanes > 1:
        for j in tl.static_range(len(block.logits)):
            of_label, of_all = _two_values(shared, block, j, pixel, PROBABILITIES, TILE)
            more_own = more_own + (own[j] + of_label,)
            more = more + (all_pixels[j] + of_all,)
    else:
        # An addition is carried out under its condition if it is a product's, too: nothing is
        # selected, and an ignored pixel may hold an infinity.
        factors = _side_by_side(PROBABILITIES.factor(shared, block, TILE), TILE)
        owns = _side_by_side(pixel.own, TILE)
        labels = _side_by_side(pixel.label, TILE)
        for j in tl.static_range(len(block.logits)):
            powers = _side_by_side(PROBABILITIES.power(shared, block, j, TILE), TILE)
            of_label = own[j]
            of_all = all_pixels[j]
            for k in tl.static_range(len(powers)):
                is_own = owns[k] == block.start + j
                of_label = tl.where(is_own, tl.fma(powers[k], factors[k], of_label), of_label)
                of_all = tl.where(labels[k] >= 0, tl.fma(powers[k], factors[k], of_all), of_all)
            more_own = more_own + (of_label,)
            more = more + (of_all,)
    return more_own, more


@triton.jit
def _store_slot(plane, values, first, SLOT: tl.constexpr, TILE: tl.constexpr):
    """Store the sums over all lanes of a slot's classes, [pixels] or [pixels, lanes]."""
    total = tl.sum(values, axis=0)
    if TILE.lanes == 1:
        tl.store(plane.pointer + (first + SLOT) * plane.stride, total)
    else:
        number = first + SLOT * TILE.lanes + tl.arange(0, TILE.lanes)
        tl.store(plane.pointer + number * plane.stride, total, mask=number < TILE.classes)


@triton.jit
def store_sums(plane, sums, first, TILE: tl.constexpr):
    """Store a program's sums of the classes from ``first`` on."""
    own, all_pixels = sums
    of_all = Plane(pointer=plane.pointer + plane.kind, stride=plane.stride, kind=plane.kind)
    for j in tl.static_range(len(own)):
        _store_slot(plane, own[j], first, j, TILE)
        _store_slot(of_all, all_pixels[j], first, j, TILE)


@triton.jit
def _sum_block(plane, shared, block, pixel, PROBABILITIES: tl.constexpr, TILE: tl.constexpr):
    """Store the sums of a block's classes over a single tile."""
    own = ()
    all_pixels = ()
    for j in tl.static_range(len(block.logits)):
        of_label, of_all = _two_values(shared, block, j, pixel, PROBABILITIES, TILE)
        own = own + (_in_lane(of_label, TILE),)
        all_pixels = all_pixels + (_in_lane(of_all, TILE),)
    store_sums(plane, (own, all_pixels), block.start, TILE)


@triton.jit
def _sum_blocks(
    plane, shared, view, pixel, full, PROBABILITIES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store the sums of all classes over a single tile, whose logits are read once more."""
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    pointer = view.pointer
    for first in tl.range(0, full, STEP):
        here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
        block = _load_block(here, first, pixel.inside, TILE.unroll, STEP, TILE)
        _sum_block(plane, shared, block, pixel, PROBABILITIES, TILE)
        pointer += STEP * view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    block = _load_block(here, FULL, pixel.inside, COUNT, LEFT, TILE)
    _sum_block(plane, shared, block, pixel, PROBABILITIES, TILE)


@triton.jit
def count_labels(counts, pixel, BINS: tl.constexpr):
    """Counts of labels with a tile more, int32 [BINS]."""
    valid = pixel.label >= 0
    return counts + tl.histogram(tl.where(valid, pixel.label, 0), BINS, mask=valid)


@triton.jit
def store_counts(plane, counts, BINARY: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr):
    """Store a program's counts: of each class, and in the row after the last one of all labels."""
    number = tl.arange(0, BINS) - (1 if BINARY else 0)
    pointer = plane.pointer + 2 * plane.kind
    mask = (number >= 0) & (number < CLASSES)
    tl.store(pointer + number * plane.stride, counts.to(tl.float32), mask=mask)
    tl.store(pointer + CLASSES * plane.stride, tl.sum(counts).to(tl.float32))


@triton.jit
def no_values(TERMS: tl.constexpr, TILE: tl.constexpr):
    """A lane's sums of values, and of weights, of the pixelwise losses, before the first tile."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    LANES: tl.constexpr = TILE.pixels // (TILE.grain if TILE.lanes == 1 else 1)
    nothing = ()
    for _ in tl.static_range(2 * (len(TERMS.start) - 1)):
        nothing = nothing + (tl.zeros((LANES,), dtype),)
    return nothing


@triton.jit
def finish_tile(states, own, maps, pixel, given, totals, TERMS: tl.constexpr, TILE: tl.constexpr):
    """A lane's sums with a tile more; the maps of all losses are stored.

    ``maps`` is (pointers, where the pixels are in a map).
    """
    map_ptrs, position = maps
    _, _, saved = finish(states[0], own, pixel, (), TERMS, 0, TILE)
    store_maps(map_ptrs, position, saved, pixel, TERMS, 0)
    valid = pixel.label >= 0
    more = ()
    for k in tl.static_range(1, len(TERMS.start)):
        value, weight, saved = finish(states[k], own, pixel, given[k], TERMS, k, TILE)
        store_maps(map_ptrs, position, saved, pixel, TERMS, k)
        value = tl.where(valid, value, 0.0)
        more = more + (totals[2 * k - 2] + _in_lane(value, TILE),)
        if TERMS.weighs[k]:
            weight = tl.where(valid, weight, 0.0)
            more = more + (totals[2 * k - 1] + _in_lane(weight, TILE),)
        else:  # all weights are the number of valid pixels
            more = more + (totals[2 * k - 1],)
    return more


@triton.jit
def store_values(values_ptr, totals, valid, programs, COUNT: tl.constexpr, TERMS: tl.constexpr):
    """Store a program's sums of values and of weights: those may be the number of valid pixels."""
    for k in tl.static_range(COUNT):
        pointer = values_ptr + 2 * k * programs + tl.program_id(0)
        tl.store(pointer, tl.sum(totals[2 * k]))
        if TERMS.weighs[k + 1]:
            tl.store(pointer + programs, tl.sum(totals[2 * k + 1]))
        else:  # below 2^24, so that it is exact in float32
            tl.store(pointer + programs, valid.to(tl.float32))


# --- device functions: the projection -------------------------------------------------------------


@triton.jit
def _project_block(total, factors, block, given, PROBABILITIES: tl.constexpr, TILE: tl.constexpr):
    here = PROBABILITIES.term(factors, block, 0, given, TILE)
    for j in tl.static_range(1, len(block.logits)):
        here += PROBABILITIES.term(factors, block, j, given, TILE)
    return total + here


@triton.jit
def _project_blocks(
    factors, view, pixel, given, full, PROBABILITIES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The projection of each pixel, [pixels] or [pixels, lanes], from all blocks of its classes."""
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    total = nothing_yet(0.0, TILE)
    pointer = view.pointer
    for first in tl.range(0, full, STEP):
        here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
        block = _load_block(here, first, pixel.inside, TILE.unroll, STEP, TILE)
        total = _project_block(total, factors, block, given, PROBABILITIES, TILE)
        pointer += STEP * view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    block = _load_block(here, FULL, pixel.inside, COUNT, LEFT, TILE)
    return _project_block(total, factors, block, given, PROBABILITIES, TILE)


@triton.jit
def project(factors, total, view, pixel, PROBABILITIES: tl.constexpr, TILE: tl.constexpr):
    """The factors with the projection, from the sum of its terms."""
    own = look_up(view, pixel.own, TILE)
    projection = PROBABILITIES.projection(factors, sum_of_lanes(total, TILE), own, pixel, TILE)
    return PROBABILITIES.project(factors, projection, pixel, TILE)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _class_sums_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    map_ptrs,  # [N, H, W] each: what the loss leaves to the backward pass
    parts_ptr,  # [3, N, C + 1, programs of an image]: own, all, counts
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
    image = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    rows: tl.constexpr = TILE.classes + 1
    plane = Plane(
        pointer=parts_ptr + image * rows * programs + program,
        stride=programs.to(tl.int64),
        kind=images.to(tl.int64) * rows * programs,
    )

    own = ()
    all_pixels = ()
    for _ in tl.static_range(COUNT if HELD else 0):
        own = own + (_nothing(TILE),)
        all_pixels = all_pixels + (_nothing(TILE),)
    counts = tl.zeros((BINS,), tl.int32)
    for i in tl.range(0, rounds):
        run = run_at(image, program * rounds + i, pixels, width, TILE)
        pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
        view = view_of(logits_ptr, logits_strides, run, TILE)
        counts = count_labels(counts, pixel, BINS)
        if not HELD:  # this tile is the only one
            store_counts(plane, counts, BINARY, BINS, TILE.classes)

        # the statistics of the softmax, which are saved
        states = of_each(start, (), TERMS, TILE)
        if HELD:
            block = _load_block(view, 0, pixel.inside, COUNT, TILE.classes, TILE)
            states = of_each(add, (states, block, pixel, ((),)), TERMS, TILE)
        elif PROBABILITIES.compared:
            states = fold(view, pixel, ((),), full, TERMS, TILE)
        nothing = tl.zeros_like(run.local).to(tl.float32)
        (state,) = states
        value, weight, saved = finish(state, nothing, pixel, (), TERMS, 0, TILE)
        position = image * pixels * TILE.grain + run.first + run.local
        store_maps(map_ptrs, position, saved, pixel, TERMS, 0)

        shared = PROBABILITIES.share(state, TILE)
        if HELD:
            own, all_pixels = add_to_sums(
                (own, all_pixels), shared, block, pixel, PROBABILITIES, TILE
            )
        else:
            _sum_blocks(plane, shared, view, pixel, full, PROBABILITIES, TILE)
    if HELD:
        store_sums(plane, (own, all_pixels), 0, TILE)
        store_counts(plane, counts, BINARY, BINS, TILE.classes)


@triton.jit
def _class_sums_backward_kernel(
    upstream_ptr,  # []
    scale_ptr,  # [1]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    table_ptr,  # [2, images or 1, C]: what own pixels get on top, what all get
    map_ptrs,  # [N, H, W] each
    grad_ptr,  # [N, C, H, W]
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
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    image = (tl.program_id(0) // tiles).to(tl.int64)
    run = run_at(image, tl.program_id(0) % tiles, pixels, width, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)

    # what the slopes of a pixel's classes share
    maps = ()
    position = image * pixels * TILE.grain + run.first + run.local
    for i in tl.static_range(len(map_ptrs)):
        maps = maps + (tl.load(map_ptrs[i] + position, mask=pixel.inside, other=0),)
    bundles = TERMS.bundles[0](maps, pixel, TILE)
    looked_up = ()
    for j in tl.static_range(len(bundles)):
        looked_up = looked_up + (largest_of_bundle(view, bundles[j], pixel.inside, TILE),)
    table = table_ptr + image * table_strides[1]
    given = Given(own_table=table, other_table=table + table_strides[0], numbers=())
    scale = tl.load(upstream_ptr).to(dtype) * tl.load(scale_ptr).to(dtype)
    scale = tl.where(pixel.label >= 0, scale, 0.0)
    factors = PROBABILITIES.prepare(scale, maps, looked_up, pixel, given, TILE)

    # the projection, and the slopes
    if COUNT <= TILE.unroll:
        block = _load_block(view, 0, pixel.inside, COUNT, TILE.classes, TILE)
        if PROBABILITIES.compared:
            nothing = nothing_yet(0.0, TILE)
            total = _project_block(nothing, factors, block, given, PROBABILITIES, TILE)
            factors = project(factors, total, view, pixel, PROBABILITIES, TILE)
        _write_block((factors,), block, grad_view, pixel, (given,), TERMS, TILE)
    else:
        if PROBABILITIES.compared:
            total = _project_blocks(factors, view, pixel, given, full, PROBABILITIES, TILE)
            factors = project(factors, total, view, pixel, PROBABILITIES, TILE)
        write_gradients((factors,), (view, grad_view), pixel, (given,), full, TERMS, TILE)
