"""From class sums to a loss and its gradient: sums of all programs, classes that count, the mean.

Every program adds up one class of one image, in float64 and in the order of the programs that have
left the parts. The one that comes last has all classes as vectors and gives them to the *head*, a
loss's own device function, once for the batch or once for every image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sums import _takes_last

# Parts that are added up at once.
_PARTS = tl.constexpr(256)


class Counting(NamedTuple):
    """Which classes are in the mean; known when a kernel is compiled."""

    present: bool  # only those that occur
    chosen: tuple[int, ...]  # only these, if there are any
    background: bool  # class 0 too
    zero: bool  # a class that does not occur has a loss of 0
    weighted: bool
    per_image: bool


class Classes(NamedTuple):
    """The classes of an image or of the batch, [classes] each, float64."""

    own: Any  # the sum of a class's probability where it is the label
    all: Any  # the sum of it everywhere
    pixels: Any  # with the label
    counted: Any  # whether it is in the mean
    weight: Any


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def add_parts(parts_ptr, sums_ptr, rows, programs, CLASSES: tl.constexpr):
    """Store the sums of a row, which is a class of an image or all of its labels: [3, rows]."""
    row = tl.program_id(0).to(tl.int64)
    kind = rows.to(tl.int64)
    lane = tl.arange(0, _PARTS)
    own = tl.zeros((_PARTS,), tl.float64)
    of_all = tl.zeros((_PARTS,), tl.float64)
    count = tl.zeros((_PARTS,), tl.int64)
    pointer = parts_ptr + row * programs
    is_class = row % (CLASSES + 1) < CLASSES
    for first in tl.range(0, programs, _PARTS):
        inside = first + lane < programs
        pointers = pointer + first + lane
        of_class = first + lane < tl.where(is_class, programs, 0)
        own += tl.load(pointers, mask=of_class, other=0.0).to(tl.float64)
        of_all += tl.load(pointers + kind * programs, mask=of_class, other=0.0).to(tl.float64)
        # A part is below 2^24, so that it is exact in float32.
        part = tl.load(pointers + 2 * kind * programs, mask=inside, other=0.0)
        count += part.to(tl.int64)
    tl.store(sums_ptr + row, tl.sum(own))
    tl.store(sums_ptr + kind + row, tl.sum(of_all))
    tl.store(sums_ptr + 2 * kind + row, tl.sum(count).to(tl.float64))


@triton.jit
def _classes_of(
    sums_ptr, first, last, rows, weight_ptr, COUNTING: tl.constexpr, CLASSES: tl.constexpr
):
    """The classes of the images from ``first`` to before ``last``, added up."""
    LANES: tl.constexpr = triton.next_power_of_2(CLASSES)
    CHOSEN: tl.constexpr = len(COUNTING.chosen)
    number = tl.arange(0, LANES)
    inside = number < CLASSES
    own = tl.zeros((LANES,), tl.float64)
    of_all = tl.zeros((LANES,), tl.float64)
    count = tl.zeros((LANES,), tl.float64)
    valid = tl.zeros((), tl.float64)
    for image in tl.range(first, last):
        pointer = sums_ptr + image * (CLASSES + 1)
        own += tl.load(pointer + number, mask=inside, other=0.0)
        of_all += tl.load(pointer + rows + number, mask=inside, other=0.0)
        count += tl.load(pointer + 2 * rows + number, mask=inside, other=0.0)
        valid += tl.load(pointer + 2 * rows + CLASSES)
    counted = number < tl.where(valid > 0, CLASSES, 0)
    if COUNTING.present:
        counted = counted & (count > 0)
    if CHOSEN > 0:
        is_chosen = number < 0
        for i in tl.static_range(CHOSEN):
            is_chosen = is_chosen | (number == COUNTING.chosen[i])
        counted = counted & is_chosen
    if not COUNTING.background:
        counted = counted & (number > 0)
    if COUNTING.weighted:
        weight = tl.load(weight_ptr + number, mask=inside, other=0.0).to(tl.float64)
    else:
        weight = tl.full((LANES,), 1.0, tl.float64)
    return Classes(own=own, all=of_all, pixels=count, counted=counted, weight=weight)


@triton.jit
def mean_of_classes(classes, values, own, all_pixels, COUNTING: tl.constexpr):
    """(sum of weighted values, sum of weights, how many, gradients) over the classes that count."""
    if COUNTING.zero:
        occurs = classes.pixels > 0
        values = tl.where(occurs, values, 0.0)
        own = tl.where(occurs, own, 0.0)
        all_pixels = tl.where(occurs, all_pixels, 0.0)
    weight = tl.where(classes.counted, classes.weight, 0.0)
    total = tl.sum(tl.where(classes.counted, weight * values, 0.0))
    own = tl.where(classes.counted, weight * own, 0.0)
    all_pixels = tl.where(classes.counted, weight * all_pixels, 0.0)
    taken = tl.sum(tl.where(classes.counted, 1.0, 0.0).to(tl.float64))
    return total, tl.sum(weight), taken, own, all_pixels


@triton.jit
def sum_losses(
    pointers, numbers, images, HEAD: tl.constexpr, OPTIONS: tl.constexpr, COUNTING: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """(sum of values, sum of weights, how many) over all groups of images, float64.

    The two numbers of every class are stored.
    """
    sums_ptr, weight_ptr, table_ptr = pointers
    LANES: tl.constexpr = triton.next_power_of_2(CLASSES)
    number = tl.arange(0, LANES)
    groups = images if COUNTING.per_image else 1
    size = 1 if COUNTING.per_image else images
    total = tl.zeros((), tl.float64)
    weight = tl.zeros((), tl.float64)
    taken = tl.zeros((), tl.float64)
    for group in tl.range(0, groups):
        first = group * size
        classes = _classes_of(
            sums_ptr, first, first + size, images * (CLASSES + 1), weight_ptr, COUNTING, CLASSES
        )
        value, value_weight, value_taken, own, all_pixels = HEAD(
            classes, numbers, OPTIONS, COUNTING
        )
        total += value
        weight += value_weight
        taken += value_taken
        pointer = table_ptr + group * CLASSES + number
        tl.store(pointer, own, mask=number < CLASSES)
        tl.store(pointer + groups * CLASSES, all_pixels, mask=number < CLASSES)
    return total, weight, taken


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _class_head_kernel(
    parts_ptr,  # [3, N, C + 1, programs of an image]
    sums_ptr,  # float64 [3, N, C + 1]: own, all, counts
    weight_ptr,  # [C], if COUNTING.weighted
    loss_ptr,  # []
    scale_ptr,  # [1]
    table_ptr,  # [2, N or 1, C]
    tickets_ptr,
    numbers,
    programs,  # of an image
    images,
    HEAD: tl.constexpr,
    OPTIONS: tl.constexpr,
    COUNTING: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Adds up what the programs have left; the last of its own programs computes the loss."""
    rows = images * (CLASSES + 1)
    add_parts(parts_ptr, sums_ptr, rows, programs, CLASSES)
    if _takes_last(tickets_ptr, rows):
        tl.debug_barrier()
        total, weight, taken = sum_losses(
            (sums_ptr, weight_ptr, table_ptr), numbers, images, HEAD, OPTIONS, COUNTING, CLASSES
        )
        # No class that counts: the mean is 0. Weights that sum to 0: NaN.
        divisor = tl.where(taken > 0, weight, 1.0)
        divisor = tl.where(divisor == 0, float("nan"), divisor)
        tl.store(loss_ptr, total / divisor)
        tl.store(scale_ptr, 1.0 / divisor)


@triton.jit
def _class_join_kernel(
    parts_ptr,  # [3, N, C + 1, programs of an image]
    sums_ptr,  # float64 [3, N, C + 1]
    programs,  # of an image
    images,
    CLASSES: tl.constexpr,
):
    """Adds up what the programs have left, for sums that are then added over ranks."""
    add_parts(parts_ptr, sums_ptr, images * (CLASSES + 1), programs, CLASSES)


@triton.jit
def _class_totals_kernel(
    sums_ptr,  # float64 [3, N, C + 1]
    weight_ptr,  # [C], if COUNTING.weighted
    totals_ptr,  # float64 [3]: sum of values, sum of weights, how many
    table_ptr,  # [2, N or 1, C]
    numbers,
    images,
    HEAD: tl.constexpr,
    OPTIONS: tl.constexpr,
    COUNTING: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """The loss as a ratio, both parts of which ranks may add up."""
    total, weight, taken = sum_losses(
        (sums_ptr, weight_ptr, table_ptr), numbers, images, HEAD, OPTIONS, COUNTING, CLASSES
    )
    tl.store(totals_ptr, total)
    tl.store(totals_ptr + 1, weight)
    tl.store(totals_ptr + 2, taken)
