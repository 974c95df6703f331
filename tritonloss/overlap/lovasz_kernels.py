"""The kernels of the Lovász losses by bins: statistics, histograms, increments, gradients.

Going forward the softmax's statistics are written once per pixel, and the pixel's own class counts
its probability there. Then every class counts with them the probabilities of all pixels: where
those of its own are subtracted, the errors of the others are left. From these counts a small kernel
makes the loss and a table of increments. Going back every logit looks up the increment of its
error. Counts are integers, and the same in any order: atomic sums of them are deterministic.

The counters of a class are [bins] of the probabilities of all pixels, [bins] of those of its own,
and [SPREAD], whose sum belongs to the last of these. A pixel that is not counted has p = 0 for all
pixels: how many are counted is counted, too. Those of a hinge are [bins] of others' errors and
[bins] of own ones, and tell all that there is to know of the pixels: ``lovasz_hinge_kernels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.cells import divided, wide
from .._engine.math import LN_2, LOG2_E, log2_one_plus
from .._engine.pixel_walk import (
    Run,
    View,
    fold,
    load_pixels,
    look_up_own,
    run_of_pixels,
    view_of,
)
from .._engine.sums import Sums, comes_last, leave
from ..pixelwise.softmax import softmax_of_lanes
from .lovasz_bins import SPREAD, in_histogram, is_of_hinge, width_of

# --- statistics -----------------------------------------------------------------------------------


@triton.jit
def _softmax_statistics_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    largest_ptr,  # [N, H, W]: the largest logit
    log_sum_ptr,  # [N, H, W]: see softmax.py; infinity at pixels that are not counted
    histogram_ptr,  # [groups, C, counters]
    counts_ptr,  # [groups, 2]: wrong pixels of each group, and counted ones
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    tiles,  # runs of an image
    full,  # classes in the blocks before the last
    TERMS: tl.constexpr,
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,  # None if nothing is counted but wrong pixels
    TILE: tl.constexpr,
):
    """Reads labels and logits once, writes two numbers for every pixel, and counts it."""
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, False, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)

    (state,) = fold(view, pixel, ((),), full, TERMS, TILE)
    statistics = softmax_of_lanes(state, TILE)

    # The sum is at least 1, for the largest logit: a logarithm that is not at least 0 is wrong.
    is_number = (statistics.log_sum >= 0) & (statistics.log_sum < float("inf"))
    valid = pixel.label >= 0
    is_counted = valid & is_number
    group = run.image if PER_IMAGE else 0
    count_pixels(counts_ptr + 2 * group, valid, is_counted)

    position = run.image * pixels * TILE.grain + run.first + run.local
    log_sum = tl.where(is_counted, statistics.log_sum, float("inf"))
    tl.store(largest_ptr + position, statistics.largest, mask=pixel.inside)
    tl.store(log_sum_ptr + position, log_sum, mask=pixel.inside)

    if BINS is not None:
        p = probability(look_up_own(view, pixel, TILE), statistics.largest, log_sum)
        counters = histogram_ptr + group * (TILE.classes * BINS.row)
        count_own(counters, p, pixel.own, is_counted, BINS)


@triton.jit
def probability(logits, largest, log_sum):
    """The probabilities of logits. All passes have to get the same bits: others have other bins."""
    return tl.exp2((logits - largest) * LOG2_E - log_sum)


@triton.jit
def count_pixels(counts_ptr, valid, is_counted):
    """Count a program's valid pixels that are wrong, and those that are counted."""
    tally = tl.sum(tl.where(is_counted, 1, valid.to(tl.int32) << 16))
    wrong = (tally >> 16).to(counts_ptr.dtype.element_ty)
    counted = (tally & 0xFFFF).to(counts_ptr.dtype.element_ty)
    tl.atomic_add(counts_ptr, wrong, mask=wrong > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 1, counted, mask=counted > 0, sem="relaxed")


@triton.jit
def count_own(counters_ptr, p, own, is_counted, BINS: tl.constexpr):
    """Count every pixel's probability of its own class, in the counters of that class."""
    COUNT: tl.constexpr = BINS.count
    entry = in_histogram(p, BINS)
    spread = 2 * COUNT + tl.program_id(0) % SPREAD
    counter = own * BINS.row + tl.where(entry == COUNT - 1, spread, COUNT + entry)
    counter = tl.where(is_counted, counter, -1)
    one = tl.full((), 1, counters_ptr.dtype.element_ty)
    tl.atomic_add(counters_ptr + counter.to(tl.int64), one, mask=counter >= 0, sem="relaxed")


# --- histograms -----------------------------------------------------------------------------------


@triton.jit
def _softmax_histogram_kernel(
    logits_ptr,  # [N, C, H, W]
    largest_ptr,  # [N, H, W]
    log_sum_ptr,  # [N, H, W]
    histogram_ptr,  # [groups, C, counters]
    logits_strides,
    pixels,  # of an image, in grains
    width,  # what divides by it
    chunks,  # of an image
    rounds,  # tiles of a chunk
    PER_IMAGE: tl.constexpr,
    APART: tl.constexpr,
    FAR: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads statistics, and logits once more; counts the probabilities of a few classes."""
    COUNT: tl.constexpr = BINS.count
    CLASSES: tl.constexpr = TILE.unroll  # of a program
    CLASS_GROUPS: tl.constexpr = (TILE.classes + CLASSES - 1) // CLASSES
    program = tl.program_id(0)
    first_class = program % CLASS_GROUPS * CLASSES
    chunk = program // CLASS_GROUPS
    image = (chunk // chunks).to(tl.int64)
    chunk = (chunk % chunks).to(tl.int64)
    group = image if PER_IMAGE else image * 0

    counts = ()
    for _ in tl.static_range(CLASSES):
        counts = counts + (tl.zeros((COUNT,), tl.int32),)
    for i in tl.range(0, rounds):
        # statistics of a tile
        run = _run_of_tile(image, chunk * rounds + i, pixels, width, TILE)
        first = image * pixels * TILE.grain + run.first
        largest = tl.load(largest_ptr + first + run.local, mask=run.inside, other=0.0)
        log_sum = tl.load(log_sum_ptr + first + run.local, mask=run.inside, other=float("inf"))

        # a histogram of every class
        view = _view_of_tile(logits_ptr, logits_strides, run, APART, FAR, TILE)
        added = ()
        for j in tl.static_range(CLASSES):
            channel = tl.minimum(first_class + j, TILE.classes - 1)
            pointers = view.pointer + channel.to(tl.int64) * view.stride + view.offsets
            logits = tl.load(pointers, mask=run.inside, other=0.0).to(largest.dtype)
            entry = in_histogram(probability(logits, largest, log_sum), BINS)
            added = added + (counts[j] + tl.histogram(entry, COUNT),)
        counts = added

    add_to_histograms(histogram_ptr, counts, group, first_class, BINS, TILE)


@triton.jit
def add_to_histograms(
    histogram_ptr, counts, group, first_class, BINS: tl.constexpr, TILE: tl.constexpr
):
    """Add a program's counts of a few classes to those of all programs."""
    COUNT: tl.constexpr = BINS.count
    index = tl.arange(0, COUNT)
    for j in tl.static_range(len(counts)):
        channel = tl.minimum(first_class + j, TILE.classes - 1)
        row = histogram_ptr + (group * TILE.classes + channel) * BINS.row
        counted = tl.where(first_class + j < TILE.classes, counts[j], 0)
        tl.atomic_add(
            row + index, counted.to(row.dtype.element_ty), mask=counted > 0, sem="relaxed"
        )


@triton.jit
def _run_of_tile(image, tile, pixels, width, TILE: tl.constexpr):
    """The run of pixels of an image's tile; none beyond the image."""
    PIXELS: tl.constexpr = TILE.pixels
    GRAIN: tl.constexpr = TILE.grain
    first = tile * PIXELS
    local = tl.arange(0, PIXELS)
    # in 32 bits, like all that is different for every pixel
    left = tl.minimum(pixels.to(tl.int64) * GRAIN - first, PIXELS).to(tl.int32)
    inside = local < left
    return Run(image=image, first=first, local=local, inside=inside, width=width)


@triton.jit
def _view_of_tile(
    pointer, strides, run, APART: tl.constexpr, FAR: tl.constexpr, TILE: tl.constexpr
):
    """A run's view of logits.

    APART: their pixels lie at even distances, not side by side. FAR: 32 bits may not be enough for
    where they lie in an image.
    """
    if APART:
        start = pointer + run.image * strides[0] + run.first * strides[3]
        view = View(pointer=start, offsets=run.local * strides[3], stride=strides[1])
    elif TILE.flat:
        view = view_of(pointer, strides, run, TILE)
    else:
        start, offsets = _in_rows(
            pointer + run.image * strides[0], strides[2], strides[3], run, FAR
        )
        view = View(pointer=start, offsets=offsets, stride=strides[1])
    return view


@triton.jit
def _in_rows(pointer, row_stride, column_stride, run, FAR: tl.constexpr):
    """(pointer, offsets of a run's pixels from there), in an image's map with any strides."""
    if FAR:
        row = run.first // run.width[0]
        pointer += row * row_stride
        column = (run.first - row * run.width[0]).to(tl.int32) + run.local
        down, _ = divided(column, run.width)
        row_stride = wide(row_stride)
        column_stride = wide(column_stride)
    else:
        column = run.first.to(tl.int32) + run.local
        down, _ = divided(column, run.width)
    # one row further down, it is a row's columns less to the right
    return pointer, column * column_stride + down * (row_stride - run.width[0] * column_stride)


# --- loss and increments --------------------------------------------------------------------------


@triton.jit
def _increments_kernel(
    histogram_ptr,  # [groups, C, counters]
    counts_ptr,  # [groups, 2], of a softmax
    table_ptr,  # [groups, C, 2 bins, 2]: increments of every entry of the histogram
    class_loss_ptr,  # [2, groups, C]: the loss of every class, and whether it takes part
    loss_ptr,  # []
    scale_ptr,  # [groups]: the factor of the classes' gradients
    scratch_ptr,  # see sums.py
    tickets_ptr,
    groups,
    classes,
    programs,
    CLASSES: tl.constexpr,  # next power of two
    PRESENT: tl.constexpr,  # whether classes take part that pixels are of
    CHOSEN: tl.constexpr,  # if not, which ones do; all if this is empty
    BINS: tl.constexpr,
):
    """A program for every class of every group; the last one writes the mean."""
    COUNT: tl.constexpr = BINS.count
    dtype: tl.constexpr = class_loss_ptr.dtype.element_ty
    program = tl.program_id(0)
    row = program.to(tl.int64)
    channel = program % classes
    index = tl.arange(0, COUNT)

    # counts at the edges of the bins, from the largest errors down
    counters_ptr = histogram_ptr + row * BINS.row
    if BINS.hinge:
        others, own, own_total, wrong = _counts_of_hinges(counters_ptr, BINS)
    else:
        pixels = tl.load(counts_ptr + 2 * (program // classes) + 1)
        others, own, own_total = _counts_of_errors(counters_ptr, pixels, BINS)
    others_low = tl.cumsum(others, 0, reverse=True)
    own_low = tl.cumsum(own, 0, reverse=True)
    others_high = others_low - others
    own_high = own_low - own

    # the loss: the area below the Jaccard loss, whose values at the edges are exact
    low = (own_low + others_low).to(dtype) / tl.maximum(own_total + others_low, 1).to(dtype)
    high = (own_high + others_high).to(dtype) / tl.maximum(own_total + others_high, 1).to(dtype)
    loss = tl.sum((low + high) * 0.5 * width_of(index, dtype, BINS))
    if BINS.hinge:
        loss = tl.where(wrong > 0, float("nan"), loss)

    # whether the class takes part, and its increments
    if PRESENT:
        takes_part = own_total > 0
    elif len(CHOSEN) == 0:
        takes_part = channel >= 0
    else:
        takes_part = channel < 0
        for k in tl.static_range(len(CHOSEN)):
            takes_part = takes_part | (channel == CHOSEN[k])
    counted = tl.where(takes_part, 1.0, 0.0).to(dtype)
    tl.store(class_loss_ptr + row, loss)
    tl.store(class_loss_ptr + groups * classes + row, counted)
    # fmt: off
    _store_table(
        table_ptr + row * (4 * COUNT), (own, own_high, own_total), (others, others_high), counted,
        BINS,
    )
    # fmt: on

    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=1)
    leave(sums, 0, counted)
    if comes_last(sums):
        # fmt: off
        _store_mean(
            loss_ptr, scale_ptr, class_loss_ptr, counts_ptr, (groups, classes), CLASSES, BINS
        )
        # fmt: on


@triton.jit
def _counts_of_errors(counters_ptr, pixels, BINS: tl.constexpr):
    """(others' errors in each bin, own ones, own pixels in all) of a class of a softmax.

    ``pixels`` are those that are counted.
    """
    COUNT: tl.constexpr = BINS.count
    index = tl.arange(0, COUNT)
    others = tl.load(counters_ptr + index)
    own = tl.load(counters_ptr + COUNT + index)
    spread = tl.sum(tl.load(counters_ptr + 2 * COUNT + tl.arange(0, SPREAD)))
    others -= tl.where(index == 0, tl.sum(others) - pixels, 0)
    others -= own + tl.where(index == COUNT - 1, spread, 0)
    # the error of an own pixel is 1 - p
    own = tl.load(counters_ptr + 2 * COUNT - 1 - index) + tl.where(index == 0, spread, 0)
    return others, own, tl.sum(own)


@triton.jit
def _counts_of_hinges(counters_ptr, BINS: tl.constexpr):
    """(others' errors in each bin, own ones, own pixels in all, pixels whose error is none)."""
    COUNT: tl.constexpr = BINS.count
    APART: tl.constexpr = BINS.apart
    index = tl.arange(0, COUNT)
    others = tl.load(counters_ptr + index)
    own = tl.load(counters_ptr + COUNT + index)
    if APART:
        for j in tl.static_range(1, APART):
            own += tl.load(counters_ptr + (1 + j) * COUNT + index)
        others -= own
    is_error = is_of_hinge(index, BINS)
    is_wrong = ~is_error & (index < COUNT - 1)
    own_total = tl.sum(tl.where(is_wrong, 0, own))
    wrong = tl.sum(tl.where(is_wrong, own + others, 0))
    return tl.where(is_error, others, 0), tl.where(is_error, own, 0), own_total, wrong


@triton.jit
def _store_table(table_ptr, own_counts, others_counts, counted, BINS: tl.constexpr):
    """Store of every bin the increment at its edge towards 0, and how much the other's is above.

    Between the edges increments are a line whose mean is what the counts say: over n others in a
    bin they add up to the fall of the Jaccard loss, so that few errors get what their ranks would
    give. An own pixel's error falls where its probability rises: its increments are negative.
    """
    COUNT: tl.constexpr = BINS.count
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    own, own_high, own_total = own_counts
    others, others_high = others_counts
    union_high = tl.maximum(own_total + others_high, 1).to(dtype)
    union_low = tl.maximum(own_total + others_high + others, 1).to(dtype)
    missed_high = (own_total - own_high).to(dtype)
    missed_low = (own_total - own_high - own).to(dtype)
    several = tl.maximum(others, 1).to(dtype)

    # of own pixels
    inverse_high = 1.0 / union_high
    mean = log2_one_plus(others.to(dtype) * inverse_high) * (LN_2 / several)
    mean = tl.where(others > 0, mean, inverse_high)
    rise = tl.minimum(inverse_high - 1.0 / union_low, 2.0 * mean)
    _store_entries(table_ptr + 2 * COUNT, -mean, -rise, counted, BINS)

    # of the others; of a class that is nowhere only the largest error counts
    mean = 0.5 * (missed_low + missed_high) / union_low / union_high
    rise = missed_high / union_high / union_high - missed_low / union_low / union_low
    rise = tl.minimum(rise * (several - 1.0) / several, 2.0 * mean)
    is_top = (others > 0) & (others_high == 0)
    mean = tl.where(own_total > 0, mean, tl.where(is_top, 1.0 / several, 0.0))
    rise = tl.where(own_total > 0, rise, 0.0)
    _store_entries(table_ptr, mean, rise, counted, BINS)


@triton.jit
def _store_entries(table_ptr, mean, rise, counted, BINS: tl.constexpr):
    """Store the increments of bins whose errors rise, and turn them round where they fall."""
    COUNT: tl.constexpr = BINS.count
    index = tl.arange(0, COUNT)
    if not BINS.hinge:
        rise = tl.where(index < COUNT // 2, rise, -rise)
    tl.store(table_ptr + 2 * index, (mean - 0.5 * rise) * counted)
    tl.store(table_ptr + 2 * index + 1, rise * counted)


@triton.jit
def _store_mean(
    loss_ptr, scale_ptr, class_loss_ptr, counts_ptr, sizes, CLASSES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Store the mean over groups of the mean over classes, and the factors of their gradients."""
    groups, classes = sizes
    channel = tl.arange(0, CLASSES)
    loss = tl.zeros((), tl.float64)
    for group in tl.range(0, groups):
        place = group * classes + channel
        losses = tl.load(class_loss_ptr + place, mask=channel < classes, other=0.0)
        counted = tl.load(
            class_loss_ptr + groups * classes + place, mask=channel < classes, other=0.0
        )
        number = tl.maximum(tl.sum(counted), 1.0)
        mean = tl.sum(tl.where(counted > 0, losses, 0.0)) / number
        if not BINS.hinge:
            wrong = tl.load(counts_ptr + 2 * group)
            mean = tl.where(wrong > 0, float("nan"), mean)
        loss += mean
        tl.store(scale_ptr + group, 1.0 / (number * groups))
    tl.store(loss_ptr, loss / groups)
