"""Sums over what is predicted as a class rightly, wrongly, or not: device code.

Of every image and class, over its true positives, false positives and false negatives: a sum of
each pixel's probability of the class, or of its hinge, and the number of pixels. A pixel is a
member of at most two such sets, those of its label and of its predicted class. So two numbers of a
pixel are all that is added up, whatever the number of classes.

Pixels of a tile are near each other, and have few classes. A program takes the smallest class that
a pixel of the tile has, adds up its members over all lanes, and goes on with the next one; it keeps
the sums of all classes side by side, a few in each lane, over all of its tiles.

Bytes, L of logits and T of labels: forward L + T, backward 2 L + T. The softmax leaves the
logarithm of its sum and the predicted class to the backward pass, 5 bytes per pixel and 8 from 257
classes on. Instructions per pixel and class beside loads and stores: forward 9 (5 for the softmax,
4 for the largest logit), and about 70 of each four pixels for every class that a tile has; backward
8 (3 for the probability, 5 for the pixel's two classes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.class_sums import run_at
from .._engine.largest import Largest, largest_add, largest_logit, largest_place, largest_start
from .._engine.math import LOG2_E, sigmoid_base2
from .._engine.pixel_walk import (
    factors_of,
    fold,
    load_pixels,
    look_up,
    of_each,
    run_of_pixels,
    view_of,
    write_gradients,
)
from .._engine.pixels import Given, class_of, for_classes
from ..pixelwise.softmax import exponent, softmax_add, softmax_of_lanes, softmax_start

_NO_CLASS = tl.constexpr(1 << 30)


class Options(NamedTuple):
    """What kernels are compiled for."""

    hinge: bool  # a pixel counts by its hinge, else by its probability
    binary: bool  # one channel: probabilities are sigmoids


class State(NamedTuple):
    """What of a pixel's classes is known so far."""

    softmax: Any
    largest: Any


class Members(NamedTuple):
    """What a tile's pixels are members of, [pixels] each."""

    predicted: Any  # the predicted class, -1 where there is none
    own: Any  # the label's class, -1 where there is none
    of_predicted: Any  # the number that counts for the predicted class
    of_own: Any  # that of the label's, where it is another


class Sums(NamedTuple):
    """Sums of all classes, [BINS] each: over true positives, false ones, false negatives."""

    true_positive: Any
    false_positive: Any
    false_negative: Any
    true_positives: Any  # and how many pixels these are
    false_positives: Any
    false_negatives: Any


class Factors(NamedTuple):
    """The factors of a pixel's gradient p_k A + (B if k is predicted) + (D if k is the label)."""

    largest: Any
    log_sum: Any
    predicted: Any
    own: Any
    all_classes: Any  # A
    of_predicted: Any  # B; in one channel what a logit above 0 gets
    of_own: Any  # D; in one channel what any other gets


# --- the record -----------------------------------------------------------------------------------


@triton.jit
def members_start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Nothing is known before the first class."""
    return State(softmax=softmax_start(OPTIONS, TILE), largest=largest_start(OPTIONS, TILE))


@triton.jit
def members_add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The largest logit and, unless hinges count, the softmax's sum, with a block of classes."""
    softmax = state.softmax
    if OPTIONS.binary:
        largest = Largest(logit=block.logits[0], place=state.largest.place)
    else:
        largest = largest_add(state.largest, block, pixel, given, OPTIONS, TILE)
        if not OPTIONS.hinge:
            softmax = softmax_add(softmax, block, pixel, given, OPTIONS, TILE)
    return State(softmax=softmax, largest=largest)


@triton.jit
def members_lookups(saved, pixel, TILE: tl.constexpr):
    """Each pixel's own class, and the predicted one, which is saved last; none in one channel."""
    if TILE.classes == 1:
        classes = ()
    else:
        predicted = saved[len(saved) - 1].to(tl.int32)
        classes = (pixel.own, tl.where(pixel.label >= 0, predicted, -1))
    return classes


@triton.jit
def hinge(logit, IS_MEMBER: tl.constexpr):
    """The hinge of a logit whose pixel has the class, or has not."""
    if IS_MEMBER:
        result = tl.maximum(1.0 - logit, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        result = tl.maximum(1.0 + logit, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return result


@triton.jit
def members_of(state, own_logit, pixel, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(members, what the backward pass needs), of all pixels of a tile."""
    valid = pixel.label >= 0
    place = largest_place(state.largest, TILE)
    own = tl.where(valid, pixel.own, -1)
    if OPTIONS.binary:
        logit = state.largest.logit
        predicted = tl.where(valid & (logit > 0), 0, -1)
        saved = ()
        if OPTIONS.hinge:
            of_predicted = tl.where(own == 0, hinge(logit, True), hinge(logit, False))
            of_own = hinge(logit, True)
        else:
            of_predicted = sigmoid_base2(logit * LOG2_E)
            of_own = of_predicted
    elif OPTIONS.hinge:
        predicted = tl.where(valid, place, -1)
        logit = largest_logit(state.largest, TILE)
        of_predicted = tl.where(own == place, hinge(logit, True), hinge(logit, False))
        of_own = hinge(own_logit, True)
        saved = (place,)
    else:
        predicted = tl.where(valid, place, -1)
        statistics = softmax_of_lanes(state.softmax, TILE)
        of_predicted = tl.exp2(-statistics.log_sum)
        of_own = tl.exp2(exponent(own_logit, statistics.largest, TILE) - statistics.log_sum)
        # Of interpolated logits the log-sum-exp: the largest is nowhere to be read.
        log_sum = statistics.log_sum
        saved = (log_sum + statistics.largest if TILE.bundle == 0 else log_sum, place)
    members = Members(predicted=predicted, own=own, of_predicted=of_predicted, of_own=of_own)
    return members, saved


@triton.jit
def members_factors(
    scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """What the slopes of a pixel share. ``given.own_table`` is the gradient of the sums, [C, 3]."""
    own = pixel.own
    if OPTIONS.binary:
        # Which sets a pixel is a member of depends on the logit, which the slope has.
        own_entry = class_entry(given, 0, 0, TILE)
        other_entry = class_entry(given, 0, 1, TILE)
        missed_entry = class_entry(given, 0, 2, TILE)
        predicted = own
        of_predicted = scale * tl.where(own == 0, own_entry, other_entry)
        of_own = scale * tl.where(own == 0, missed_entry, 0.0)
        logit = scale
        log_sum = scale
        all_classes = scale
    else:
        own_logit, logit = looked_up
        if OPTIONS.hinge:
            (place,) = saved
            log_sum = scale
        else:
            log_sum, place = saved
        predicted = tl.where(pixel.label >= 0, place.to(tl.int32), -1)
        is_right = predicted == own
        right = class_entry(given, own, 0, TILE)
        of_predicted = scale * tl.where(is_right, right, class_entry(given, predicted, 1, TILE))
        of_own = scale * tl.where(is_right, 0.0, class_entry(given, own, 2, TILE))
        if OPTIONS.hinge:
            # max(0, x) has the derivative 1 at 0, as PyTorch's clamp has.
            rises = tl.where(logit >= -1.0, 1.0, 0.0)
            of_predicted *= tl.where(is_right, tl.where(logit <= 1.0, -1.0, 0.0), rises)
            of_own *= tl.where(own_logit <= 1.0, -1.0, 0.0)
            all_classes = scale
        else:
            of_predicted *= tl.exp2(-log_sum)
            of_own *= tl.exp2((own_logit - logit) * LOG2_E - log_sum)
            all_classes = -(of_predicted + of_own)
    return Factors(
        largest=for_classes(logit, TILE),
        log_sum=for_classes(log_sum, TILE),
        predicted=for_classes(predicted, TILE),
        own=for_classes(own, TILE),
        all_classes=for_classes(all_classes, TILE),
        of_predicted=for_classes(of_predicted, TILE),
        of_own=for_classes(of_own, TILE),
    )


@triton.jit
def members_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of a slot's logits."""
    logit = block.logits[SLOT]
    if OPTIONS.binary:
        gradient = tl.where(logit > 0, factors.of_predicted, factors.of_own)
        if OPTIONS.hinge:
            falls = tl.where(logit <= 1.0, -1.0, 0.0)
            gradient *= tl.where(factors.own == 0, falls, tl.where(logit >= -1.0, 1.0, 0.0))
        else:
            p = sigmoid_base2(logit * LOG2_E)
            gradient *= p * (1 - p)
    else:
        number = class_of(block, SLOT, TILE)
        gradient = tl.where(number == factors.predicted, factors.of_predicted, 0.0)
        gradient += tl.where(number == factors.own, factors.of_own, 0.0)
        if not OPTIONS.hinge:
            scaled = (logit - factors.largest) * LOG2_E
            gradient += tl.exp2(scaled - factors.log_sum) * factors.all_classes
    return gradient


@triton.jit
def class_entry(given, index, KIND: tl.constexpr, TILE: tl.constexpr):
    """The gradient of a class's sum; an index out of range is clamped."""
    place = tl.minimum(tl.maximum(index, 0), TILE.classes - 1) * 3 + KIND
    return tl.load(given.own_table + place).to(tl.float64 if TILE.double else tl.float32)


# --- sums -----------------------------------------------------------------------------------------


@triton.jit
def no_sums(BINS: tl.constexpr, TILE: tl.constexpr):
    """The sums before the first tile."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    zero = tl.zeros((BINS,), dtype)
    none = tl.zeros((BINS,), tl.int32)
    return Sums(zero, zero, zero, none, none, none)


@triton.jit
def add_members(sums, members, BINS: tl.constexpr):
    """The sums with a tile of pixels more: of one class after the other that a pixel has."""
    # Three counts in one number, of ten bits each, or twenty where a tile may have 2^10 pixels.
    BITS: tl.constexpr = 10 if members.own.shape[0] < 1024 else 20
    one = tl.full((), 1, tl.int32 if BITS == 10 else tl.int64)
    most = (one << BITS) - 1
    number = tl.arange(0, BINS)
    chosen = _smallest_above(members, -1)
    while chosen < _NO_CLASS:
        is_predicted = members.predicted == chosen
        is_own = members.own == chosen
        is_right = is_predicted & is_own
        is_wrong = is_predicted & ~is_own
        is_missed = is_own & ~is_predicted
        true_positive = tl.sum(tl.where(is_right, members.of_predicted, 0.0))
        false_positive = tl.sum(tl.where(is_wrong, members.of_predicted, 0.0))
        false_negative = tl.sum(tl.where(is_missed, members.of_own, 0.0))
        last = tl.where(is_missed, one << (2 * BITS), 0)
        ones = tl.where(is_right, one, tl.where(is_wrong, one << BITS, last))
        counts = tl.sum(ones)
        right, wrong, missed = counts & most, (counts >> BITS) & most, counts >> (2 * BITS)
        here = number == chosen
        sums = Sums(
            true_positive=sums.true_positive + tl.where(here, true_positive, 0.0),
            false_positive=sums.false_positive + tl.where(here, false_positive, 0.0),
            false_negative=sums.false_negative + tl.where(here, false_negative, 0.0),
            true_positives=sums.true_positives + tl.where(here, right, 0).to(tl.int32),
            false_positives=sums.false_positives + tl.where(here, wrong, 0).to(tl.int32),
            false_negatives=sums.false_negatives + tl.where(here, missed, 0).to(tl.int32),
        )
        chosen = _smallest_above(members, chosen)
    return sums


@triton.jit
def _smallest_above(members, chosen):
    """The smallest class above this one that a pixel is predicted as or has."""
    predicted = tl.where(members.predicted > chosen, members.predicted, _NO_CLASS)
    own = tl.where(members.own > chosen, members.own, _NO_CLASS)
    return tl.min(tl.minimum(predicted, own))


@triton.jit
def store_sums(parts_ptr, row, rows, sums, BINS: tl.constexpr, CLASSES: tl.constexpr):
    """Store a program's sums in its row of [6, rows, CLASSES]."""
    number = tl.arange(0, BINS)
    inside = number < CLASSES
    pointers = parts_ptr + row * CLASSES + number
    step = rows.to(tl.int64) * CLASSES
    tl.store(pointers, sums.true_positive, mask=inside)
    tl.store(pointers + step, sums.false_positive, mask=inside)
    tl.store(pointers + 2 * step, sums.false_negative, mask=inside)
    # Below 2^24, so that a float32 holds them exactly.
    tl.store(pointers + 3 * step, sums.true_positives.to(tl.float32), mask=inside)
    tl.store(pointers + 4 * step, sums.false_positives.to(tl.float32), mask=inside)
    tl.store(pointers + 5 * step, sums.false_negatives.to(tl.float32), mask=inside)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _membership_sums_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    map_ptrs,  # [N, H, W] each: what the backward pass needs
    parts_ptr,  # [6, N * programs, C]
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    full,  # classes in the blocks before the last
    rounds,  # tiles of a program
    programs,  # of an image
    rows,  # N * programs
    TERMS: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once; each of its programs leaves its sums."""
    OPTIONS: tl.constexpr = TERMS.options[0]
    program = tl.program_id(0)
    image = (program // programs).to(tl.int64)
    sums = no_sums(BINS, TILE)
    for round in tl.range(0, rounds):
        run = run_at(image, program % programs + round * programs, pixels, width, TILE)
        pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
        view = view_of(logits_ptr, logits_strides, run, TILE)
        (state,) = fold(view, pixel, ((),), full, TERMS, TILE)
        own_logit = look_up(view, pixel.own, TILE)
        members, saved = members_of(state, own_logit, pixel, OPTIONS, TILE)
        sums = add_members(sums, members, BINS)
        position = image * pixels * TILE.grain + run.first + run.local
        for i in tl.static_range(len(map_ptrs)):
            tl.store(map_ptrs[i] + position, saved[i], mask=pixel.inside)
    store_sums(parts_ptr, program.to(tl.int64), rows, sums, BINS, TILE.classes)


@triton.jit
def _membership_backward_kernel(
    table_ptr,  # [N, C, 3]: the gradient of the sums
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    map_ptrs,  # [N, H, W] each
    grad_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    TERMS: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once more, writes the gradient once."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)
    table = table_ptr + run.image * (3 * TILE.classes)
    given = (Given(own_table=table, other_table=table, numbers=()),)
    scales = (tl.where(pixel.label >= 0, 1.0, 0.0).to(dtype),)
    position = run.image * pixels * TILE.grain + run.first + run.local
    maps = ()
    for i in tl.static_range(len(map_ptrs)):
        maps = maps + (tl.load(map_ptrs[i] + position, mask=pixel.inside, other=0),)
    factors = of_each(factors_of, (scales, maps, view, pixel, given), TERMS, TILE)
    write_gradients(factors, (view, grad_view), pixel, given, full, TERMS, TILE)
