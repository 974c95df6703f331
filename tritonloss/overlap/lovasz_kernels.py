"""The kernels of the Lovász losses by bins: statistics, histograms, increments, gradients.

Going forward the softmax's statistics are written once per pixel, and the pixel's own class counts
its probability there. Then every class counts with them the probabilities of all pixels: where
those of its own are subtracted, the errors of the others are left. From these counts a small kernel
makes the loss and a table of increments. Going back every logit looks up the increment of its
error. Counts are integers, and the same in any order: atomic sums of them are deterministic.

The counters of a class are [bins] of the probabilities of all pixels, [bins] of those of its own,
and [SPREAD], whose sum belongs to the last of these. A pixel that is not counted has p = 0 for all
pixels: how many are counted is counted, too. Those of a hinge are [bins] of others' errors and
[bins] of own ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.cells import divided
from .._engine.math import LN_2, LOG2_E, log2_one_plus, sanitised_label
from .._engine.pixel_walk import (
    Run,
    View,
    fold,
    load_pixels,
    look_up_own,
    run_of_pixels,
    view_of,
)
from .._engine.pixels import Pixel
from .._engine.sums import Sums, comes_last, leave
from ..pixelwise.softmax import softmax_of_lanes
from .lovasz_bins import SPREAD, hinge_place, in_histogram, width_of

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
def _hinge_histogram_kernel(
    logits_ptr,  # [N, 1, H, W]
    target_ptr,  # [N, H, W]
    histogram_ptr,  # [groups, 1, 2, bins]
    counts_ptr,  # [groups, 2]: wrong pixels of each group, and own ones
    logits_strides,
    target_strides,
    pixels,
    width,
    chunks,
    rounds,
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    APART: tl.constexpr,
    FAR: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once; counts the errors above 0.

    In two histograms, since one of twice the bins takes registers that there are not everywhere.
    """
    COUNT: tl.constexpr = BINS.count
    PIXELS: tl.constexpr = TILE.pixels
    chunk = tl.program_id(0)
    image = (chunk // chunks).to(tl.int64)
    chunk = (chunk % chunks).to(tl.int64)
    group = image if PER_IMAGE else image * 0

    own_errors = tl.zeros((COUNT,), tl.int32)
    errors = tl.zeros((COUNT,), tl.int32)
    tally = tl.zeros((PIXELS,), tl.int32)  # of own pixels, and above 16 bits of wrong ones
    for i in tl.range(0, rounds):
        run = _run_of_tile(image, chunk * rounds + i, pixels, width, TILE)
        pixel = _pixels_of_tile(target_ptr, target_strides, run, IGNORED, FAR, TILE)
        view = _view_of_tile(logits_ptr, logits_strides, run, APART, FAR, TILE)
        logits = tl.load(view.pointer + view.offsets, mask=run.inside, other=0.0)
        error = hinge_error(logits.to(tl.float64 if TILE.double else tl.float32), pixel)

        valid = pixel.label >= 0
        is_number = error < float("inf")
        is_own = pixel.label == 1
        place = hinge_place(error, BINS)
        is_error = valid & is_number & (error > 0)
        own_errors += tl.histogram(place.bin, COUNT, mask=is_error & is_own)
        errors += tl.histogram(place.bin, COUNT, mask=is_error & ~is_own)
        tally += tl.where(is_number, is_own.to(tl.int32), valid.to(tl.int32) << 16)

    row = histogram_ptr + group * (2 * COUNT) + tl.arange(0, COUNT)
    dtype: tl.constexpr = histogram_ptr.dtype.element_ty
    tl.atomic_add(row, errors.to(dtype), mask=errors > 0, sem="relaxed")
    tl.atomic_add(row + COUNT, own_errors.to(dtype), mask=own_errors > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 2 * group, tl.sum(tally >> 16).to(dtype), sem="relaxed")
    tl.atomic_add(counts_ptr + 2 * group + 1, tl.sum(tally & 0xFFFF).to(dtype), sem="relaxed")


@triton.jit
def hinge_error(logits, pixel):
    """1 - z (2 y - 1)."""
    return 1.0 - tl.where(pixel.label == 1, logits, logits * -1.0)


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
def _pixels_of_tile(
    target_ptr, strides, run, IGNORED: tl.constexpr, FAR: tl.constexpr, TILE: tl.constexpr
):
    """The pixels of a run with labels 0 and 1."""
    if TILE.flat:
        pixel = load_pixels(target_ptr, strides, run, IGNORED, True, TILE)
    else:
        start, offsets = _in_rows(
            target_ptr + run.image * strides[0], strides[1], strides[2], run, FAR
        )
        loaded = tl.load(start + offsets, mask=run.inside, other=0)
        label = sanitised_label(loaded, run.inside, tl.full((), 2, tl.int32), IGNORED)
        pixel = Pixel(label=label, own=label, inside=run.inside)
    return pixel


@triton.jit
def _in_rows(pointer, row_stride, column_stride, run, FAR: tl.constexpr):
    """(pointer to a run's first row, offsets of its pixels), in a map with any strides."""
    if FAR:
        row = run.first // run.width[0]
        column = (run.first - row * run.width[0]).to(tl.int32)
    else:
        row, column = divided(run.first.to(tl.int32), run.width)
    down, column = divided(column + run.local, run.width)
    if FAR:
        offsets = down.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    else:
        offsets = down * row_stride + column * column_stride
    return pointer + row.to(tl.int64) * row_stride, offsets


# --- loss and increments --------------------------------------------------------------------------


@triton.jit
def _increments_kernel(
    histogram_ptr,  # [groups, C, counters]
    counts_ptr,  # [groups, 2]
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
    pixels = tl.load(counts_ptr + 2 * (program // classes) + 1)
    others, own, own_total = _counts_of_errors(histogram_ptr + row * BINS.row, pixels, BINS)
    others_low = tl.cumsum(others, 0, reverse=True)
    own_low = tl.cumsum(own, 0, reverse=True)
    others_high = others_low - others
    own_high = own_low - own

    # the loss: the area below the Jaccard loss, whose values at the edges are exact
    low = (own_low + others_low).to(dtype) / tl.maximum(own_total + others_low, 1).to(dtype)
    high = (own_high + others_high).to(dtype) / tl.maximum(own_total + others_high, 1).to(dtype)
    loss = tl.sum((low + high) * 0.5 * width_of(index, dtype, BINS))

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
        _store_mean(loss_ptr, scale_ptr, class_loss_ptr, counts_ptr, (groups, classes), CLASSES)


@triton.jit
def _counts_of_errors(counters_ptr, pixels, BINS: tl.constexpr):
    """(others' errors in each bin, own ones, own pixels in all) of a class.

    ``pixels`` are those that are counted, or of a hinge the own ones.
    """
    COUNT: tl.constexpr = BINS.count
    index = tl.arange(0, COUNT)
    others = tl.load(counters_ptr + index)
    if BINS.hinge:
        own = tl.load(counters_ptr + COUNT + index)
        own_total = pixels
    else:
        own = tl.load(counters_ptr + COUNT + index)
        spread = tl.sum(tl.load(counters_ptr + 2 * COUNT + tl.arange(0, SPREAD)))
        others -= tl.where(index == 0, tl.sum(others) - pixels, 0)
        others -= own + tl.where(index == COUNT - 1, spread, 0)
        # the error of an own pixel is 1 - p
        own = tl.load(counters_ptr + 2 * COUNT - 1 - index) + tl.where(index == 0, spread, 0)
        own_total = tl.sum(own)
    return others, own, own_total


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
def _store_mean(loss_ptr, scale_ptr, class_loss_ptr, counts_ptr, sizes, CLASSES: tl.constexpr):
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
        wrong = tl.load(counts_ptr + 2 * group)
        loss += tl.where(wrong > 0, float("nan"), mean)
        tl.store(scale_ptr + group, 1.0 / (number * groups))
    tl.store(loss_ptr, loss / groups)
