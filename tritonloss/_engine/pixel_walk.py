"""The walk of pixelwise losses over a map of logits: where pixels and logits are in memory.

A walk is for several losses at once. ``Terms`` holds the functions and options of each, and every
block of logits is read once for all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import sanitised_label
from .pixels import Block, Given, Pixel, for_classes, nearest_class


class Terms(NamedTuple):
    """The losses of a walk, known when a kernel is compiled; fields are tuples over them."""

    start: Any
    add: Any
    finish: Any
    factors: Any
    slope: Any
    lookups: Any
    bundles: Any
    join: Any
    add_again: Any
    twice: Any  # whether the loss goes through the classes twice; else the two above are not used
    passes: Any  # 2 if any of them does, else 1; a number, not a tuple
    silent: Any  # whether the slopes are 0 at pixels that are not valid, whatever the scale
    weighs: Any  # whether the weight of a valid pixel may be other than 1
    options: Any  # each loss's own
    maps: Any  # how many maps each leaves to the backward pass
    stored: Any  # how many of them it stores: all, or none if an earlier loss stores the same ones
    first_map: Any  # the place of each loss's first map among the maps of all losses
    adds: Any  # whether the gradient is added to what is there; no tuple


class Run(NamedTuple):
    """The run of pixels of a program."""

    image: Any
    first: Any  # the number of its first pixel in the image
    local: Any  # [pixels], numbers from 0
    inside: Any  # [pixels], whether the image has such a pixel
    width: Any  # of the image


class View(NamedTuple):
    """A program's pixels in a map [N, C, H, W]."""

    pointer: Any  # to the first class of a block: it moves from block to block
    offsets: Any  # of the pixels, which stay: [pixels], or [pixels, 1] if lanes share a pixel
    stride: Any  # from class to class


# --- where a program is ---------------------------------------------------------------------------


@triton.jit
def run_of_pixels(pixels, width, tiles, TILE: tl.constexpr):
    """This program's run of pixels; an image has ``pixels`` grains, cut into ``tiles`` runs."""
    PIXELS: tl.constexpr = TILE.pixels
    GRAIN: tl.constexpr = TILE.grain
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * PIXELS
    local = tl.arange(0, PIXELS)
    inside = first + local < pixels.to(tl.int64) * GRAIN
    return Run(image=image, first=first, local=local, inside=inside, width=width)


@triton.jit
def far_offsets(run, row_stride, column_stride):
    """Offsets of a run's pixels in a map with any strides."""
    pixel = run.first + run.local
    row = pixel // run.width
    return row * row_stride + (pixel - row * run.width) * column_stride


@triton.jit
def view_of(pointer, strides, run, TILE: tl.constexpr):
    """A run's view of a map. All strides but the last count in grains, if a grain is above 1."""
    GRAIN: tl.constexpr = TILE.grain
    one = tl.full((), 1, tl.int64)
    start = pointer + run.image * strides[0] * GRAIN
    if TILE.flat and TILE.lanes == 1:
        view = View(pointer=start + run.first, offsets=run.local, stride=one * strides[1] * GRAIN)
    elif TILE.flat:
        offsets = run.local.to(tl.int64) * strides[3]
        view = View(pointer=start + run.first * strides[3], offsets=offsets[:, None], stride=one)
    else:
        offsets = far_offsets(run, strides[2], strides[3])
        if TILE.lanes > 1:
            view = View(pointer=start, offsets=offsets[:, None], stride=one)
        else:
            view = View(pointer=start, offsets=offsets, stride=one * strides[1])
    return view


@triton.jit
def load_pixels(
    target_ptr, strides, run, IGNORED: tl.constexpr, BINARY: tl.constexpr, TILE: tl.constexpr
):
    """The pixels of a run, labels sanitised.

    label and own are -1 where there is none. They differ for BINARY labels only, where 1 is class 0
    and 0 is the absence of class 0.
    """
    GRAIN: tl.constexpr = TILE.grain
    start = target_ptr + run.image * strides[0] * GRAIN
    if TILE.flat:
        pointers = start + run.first + run.local
    else:
        pointers = start + far_offsets(run, strides[1], strides[2])
    loaded = tl.load(pointers, mask=run.inside, other=0)
    # A tensor, so that labels of eight bits are widened for the comparison with more classes.
    classes = tl.full((), 2 if BINARY else TILE.classes, tl.int32)
    label = sanitised_label(loaded, run.inside, classes, IGNORED)
    own = tl.where(label == 1, 0, -1) if BINARY else label
    return Pixel(label=label, own=own, inside=run.inside)


# --- values ---------------------------------------------------------------------------------------


@triton.jit
def _exists(COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr):
    """For every slot which lanes have a class, [1, lanes] each, if LEFT classes are left."""
    LANES: tl.constexpr = TILE.lanes
    exists = ()
    for j in tl.static_range(COUNT):
        if LEFT >= (j + 1) * LANES:
            exists = exists + (tl.full((1, LANES), True, tl.int1),)
        else:
            exists = exists + (tl.arange(0, LANES)[None, :] < LEFT - j * LANES,)
    return exists


@triton.jit
def _slot_mask(inside, exists, TILE: tl.constexpr):
    """Whether each value of a slot exists: its pixel, and its class."""
    if TILE.lanes == 1:
        mask = inside
    else:
        mask = inside[:, None] & exists
    return mask


@triton.jit
def _slot_pointers(view, SLOT: tl.constexpr, TILE: tl.constexpr):
    """Pointers to the values of a slot, [pixels] or [pixels, lanes]."""
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        pointers = view.pointer + SLOT * view.stride + view.offsets
    else:
        pointers = view.pointer + (view.offsets + (SLOT * LANES + tl.arange(0, LANES)[None, :]))
    return pointers


@triton.jit
def _load_block(view, start, inside, COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr):
    """The block of COUNT slots that begins with class ``start``, which the view points to."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    exists = _exists(COUNT, LEFT, TILE)
    logits = ()
    for j in tl.static_range(COUNT):
        mask = _slot_mask(inside, exists[j], TILE)
        if TILE.lanes == 1:
            loaded = tl.load(_slot_pointers(view, j, TILE), mask=mask, other=0.0)
        else:
            loaded = tl.load(_slot_pointers(view, j, TILE), mask=mask, other=float("-inf"))
        logits = logits + (loaded.to(dtype),)
    return Block(logits=logits, exists=exists, start=start, owned=(), base2=())


@triton.jit
def look_up(view, index, TILE: tl.constexpr):
    """Each pixel's logit of the class ``index``, [pixels]; 0 where that is negative."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if TILE.lanes == 1:
        pixels = view.offsets
    else:
        pixels = tl.reshape(view.offsets, (TILE.pixels,))
    offset = nearest_class(index, TILE).to(tl.int64) * view.stride + pixels
    return tl.load(view.pointer + offset, mask=index >= 0, other=0.0).to(dtype)


@triton.jit
def look_up_own(view, pixel, TILE: tl.constexpr):
    """Each pixel's logit of its own class, which is one; 0 where there is none."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if TILE.lanes == 1:
        pixels = view.offsets
    else:
        pixels = tl.reshape(view.offsets, (TILE.pixels,))
    # Unsigned, so that no sign is carried into the upper half: of -1 nothing is loaded.
    offset = pixel.own.to(tl.uint32).to(tl.int64) * view.stride
    return tl.load(view.pointer + pixels + offset, mask=pixel.own >= 0, other=0.0).to(dtype)


@triton.jit
def largest_of_bundle(view, number, inside, TILE: tl.constexpr):
    """Each pixel's largest logit of a bundle, [pixels]; anything where there is no pixel.

    The bundle's number comes from data, and is clamped so as not to lead outside the map. The last
    bundle begins early enough to be a whole one, if there are that many classes.
    """
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    LANES: tl.constexpr = TILE.lanes
    COUNT: tl.constexpr = TILE.bundle if TILE.bundle < TILE.classes else TILE.classes
    first = tl.minimum(tl.maximum(number, 0) * TILE.bundle, TILE.classes - COUNT)
    # [pixels], or [pixels, lanes]
    pointers = view.pointer + view.offsets + for_classes(first, TILE).to(tl.int64) * view.stride
    if LANES == 1:
        largest = tl.load(pointers, mask=inside, other=0.0).to(dtype)
        for _ in tl.static_range(1, COUNT):
            pointers += view.stride
            largest = tl.maximum(largest, tl.load(pointers, mask=inside, other=0.0).to(dtype))
    else:
        lane = tl.arange(0, LANES)[None, :]
        largest = tl.full((TILE.pixels, LANES), float("-inf"), dtype)
        for j in tl.static_range((COUNT + LANES - 1) // LANES):
            mask = inside[:, None] & (lane + j * LANES < COUNT)
            logits = tl.load(pointers + (lane + j * LANES), mask=mask, other=float("-inf"))
            largest = tl.maximum(largest, logits.to(dtype))
        largest = tl.max(largest, axis=1)
    return largest


# --- passes over the classes ----------------------------------------------------------------------


@triton.jit
def fold(view, pixel, given, full, TERMS: tl.constexpr, TILE: tl.constexpr):
    """The states of all losses after all classes.

    ``full`` is the number of classes in the blocks before the last. It is a run-time value, so that
    the loop over these blocks is not unrolled. If one block holds all classes, a loss that goes
    through them twice finds them in registers. Otherwise they are loaded again, from the cache if
    it is large enough.
    """
    COUNT: tl.constexpr = (TILE.classes + TILE.lanes - 1) // TILE.lanes
    states = of_each(start, (), TERMS, TILE)
    if COUNT <= TILE.unroll:
        block = _load_block(view, 0, pixel.inside, COUNT, TILE.classes, TILE)
        states = of_each(add, (states, block, pixel, given), TERMS, TILE)
        states = of_each(join, (states,), TERMS, TILE)
        states = of_each(add_again, (states, block, pixel, given), TERMS, TILE)
    else:
        states = _fold_blocks(states, view, pixel, given, full, add, TERMS, TILE)
        if TERMS.passes == 2:
            states = of_each(join, (states,), TERMS, TILE)
            states = _fold_blocks(states, view, pixel, given, full, add_again, TERMS, TILE)
    return states


@triton.jit
def _fold_blocks(
    states, view, pixel, given, full, ADD: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr
):
    """The states after ADD has been given all blocks, one after the other."""
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL  # at least one, at most a whole block
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    pointer = view.pointer
    if FULL > 0:
        for start in tl.range(0, full, STEP):
            here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
            block = _load_block(here, start, pixel.inside, TILE.unroll, STEP, TILE)
            states = of_each(ADD, (states, block, pixel, given), TERMS, TILE)
            pointer += STEP * view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    block = _load_block(here, FULL, pixel.inside, COUNT, LEFT, TILE)
    return of_each(ADD, (states, block, pixel, given), TERMS, TILE)


@triton.jit
def write_gradients(factors, views, pixel, given, full, TERMS: tl.constexpr, TILE: tl.constexpr):
    """Store the sum of all losses' slopes for every class; ``views`` are of logits and gradient."""
    STEP: tl.constexpr = TILE.unroll * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    view, grad_view = views
    pointer = view.pointer
    grad_pointer = grad_view.pointer
    if FULL > 0:
        for start in tl.range(0, full, STEP):
            here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
            there = View(pointer=grad_pointer, offsets=grad_view.offsets, stride=grad_view.stride)
            block = _load_block(here, start, pixel.inside, TILE.unroll, STEP, TILE)
            _write_block(factors, block, there, pixel, given, TERMS, TILE)
            pointer += STEP * view.stride
            grad_pointer += STEP * grad_view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    there = View(pointer=grad_pointer, offsets=grad_view.offsets, stride=grad_view.stride)
    block = _load_block(here, FULL, pixel.inside, COUNT, LEFT, TILE)
    _write_block(factors, block, there, pixel, given, TERMS, TILE)


@triton.jit
def _write_block(factors, block, grad_view, pixel, given, TERMS: tl.constexpr, TILE: tl.constexpr):
    """Store the gradient of a block's logits: the sum of all losses' slopes."""
    valid = for_classes(pixel.label >= 0, TILE)
    for j in tl.static_range(len(block.logits)):
        gradient = slope(factors, block, j, given, TERMS, 0, TILE)
        for k in tl.static_range(1, len(TERMS.slope)):
            gradient += slope(factors, block, j, given, TERMS, k, TILE)
        # Selected, not multiplied by 0: an ignored pixel may hold an infinity.
        gradient = tl.where(valid, gradient, 0.0)
        mask = _slot_mask(pixel.inside, block.exists[j], TILE)
        pointers = _slot_pointers(grad_view, j, TILE)
        if TERMS.adds:
            gradient += tl.load(pointers, mask=mask, other=0.0).to(gradient.dtype)
        tl.store(pointers, gradient, mask=mask)


@triton.jit
def store_maps(map_ptrs, position, saved, pixel, TERMS: tl.constexpr, K: tl.constexpr):
    """Store what a loss leaves to the backward pass."""
    FIRST: tl.constexpr = TERMS.first_map[K]
    COUNT: tl.constexpr = TERMS.stored[K]
    for i in tl.static_range(COUNT):
        tl.store(map_ptrs[FIRST + i] + position, saved[i], mask=pixel.inside)


# --- the losses' own functions --------------------------------------------------------------------
# Each function first makes a constexpr of its options: taken out of the tuple in the call itself,
# they would lose the names of their fields.


@triton.jit
def of_each(FUNCTION: tl.constexpr, arguments, TERMS: tl.constexpr, TILE: tl.constexpr):
    """(FUNCTION(arguments, TERMS, 0, TILE), FUNCTION(arguments, TERMS, 1, TILE), ...).

    Every length is written out, since elements of a tuple that grows lose the names of their fields
    under Triton 3.6.
    """
    COUNT: tl.constexpr = len(TERMS.start)
    tl.static_assert(COUNT <= 4, "at most four losses share a read of the logits")
    if COUNT == 1:
        results = (FUNCTION(arguments, TERMS, 0, TILE),)
    elif COUNT == 2:
        results = (FUNCTION(arguments, TERMS, 0, TILE), FUNCTION(arguments, TERMS, 1, TILE))
    elif COUNT == 3:
        results = (
            FUNCTION(arguments, TERMS, 0, TILE),
            FUNCTION(arguments, TERMS, 1, TILE),
            FUNCTION(arguments, TERMS, 2, TILE),
        )
    else:
        results = (
            FUNCTION(arguments, TERMS, 0, TILE),
            FUNCTION(arguments, TERMS, 1, TILE),
            FUNCTION(arguments, TERMS, 2, TILE),
            FUNCTION(arguments, TERMS, 3, TILE),
        )
    return results


@triton.jit
def given_to(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """What loss K was given."""
    own_ptrs, other_ptrs, numbers = arguments
    return Given(own_table=own_ptrs[K], other_table=other_ptrs[K], numbers=numbers[K])


@triton.jit
def start(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    OPTIONS: tl.constexpr = TERMS.options[K]
    return TERMS.start[K](OPTIONS, TILE)


@triton.jit
def add(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    OPTIONS: tl.constexpr = TERMS.options[K]
    states, block, pixel, given = arguments
    return TERMS.add[K](states[K], block, pixel, given[K], OPTIONS, TILE)


@triton.jit
def join(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    OPTIONS: tl.constexpr = TERMS.options[K]
    (states,) = arguments
    if TERMS.twice[K]:
        joined = TERMS.join[K](states[K], OPTIONS, TILE)
    else:
        joined = states[K]
    return joined


@triton.jit
def add_again(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    OPTIONS: tl.constexpr = TERMS.options[K]
    states, block, pixel, given = arguments
    if TERMS.twice[K]:
        added = TERMS.add_again[K](states[K], block, pixel, given[K], OPTIONS, TILE)
    else:
        added = states[K]
    return added


@triton.jit
def finish(state, own, pixel, given, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """(value, weight, saved) of loss K, [pixels] each; ``saved`` is a tuple of them."""
    OPTIONS: tl.constexpr = TERMS.options[K]
    return TERMS.finish[K](state, own, pixel, given, OPTIONS, TILE)


@triton.jit
def saved_by(maps, TERMS: tl.constexpr, K: tl.constexpr):
    """What a loss has left to the backward pass, out of all maps."""
    FIRST: tl.constexpr = TERMS.first_map[K]
    COUNT: tl.constexpr = TERMS.maps[K]
    saved = ()
    for i in tl.static_range(COUNT):
        saved = saved + (maps[FIRST + i],)
    return saved


@triton.jit
def factors_of(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """What the slopes of a loss share."""
    OPTIONS: tl.constexpr = TERMS.options[K]
    scales, maps, view, pixel, given = arguments
    saved = saved_by(maps, TERMS, K)
    bundles = TERMS.bundles[K](saved, pixel, TILE)
    classes = TERMS.lookups[K](saved, pixel, TILE)
    looked_up = ()
    for j in tl.static_range(len(bundles)):
        looked_up = looked_up + (largest_of_bundle(view, bundles[j], pixel.inside, TILE),)
    for j in tl.static_range(len(classes)):
        looked_up = looked_up + (look_up(view, classes[j], TILE),)
    return TERMS.factors[K](scales[K], saved, looked_up, pixel, given[K], OPTIONS, TILE)


@triton.jit
def slope(
    factors, block, SLOT: tl.constexpr, given, TERMS: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    OPTIONS: tl.constexpr = TERMS.options[K]
    return TERMS.slope[K](factors[K], block, SLOT, given[K], OPTIONS, TILE)


@triton.jit
def all_factors(arguments, TERMS: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """The factors of the first loss, then those of the others."""
    first, others = arguments
    if K == 0:
        factors = first
    else:
        factors = others[K]
    return factors


@triton.jit
def taken_in(factors, TERMS: tl.constexpr, TILE: tl.constexpr):
    """The factors; those of the last losses, if they have no slope, are taken in by the first's."""
    COUNT: tl.constexpr = len(TERMS.slope)
    if COUNT == len(TERMS.start):
        results = factors
    else:
        first = factors[0]
        for k in tl.static_range(COUNT, len(TERMS.start)):
            first = TERMS.take_in(first, factors[k], TILE)
        results = of_each(all_factors, (first, factors), TERMS, TILE)
    return results
