"""The kernels of the exact Lovász losses: errors to sort, and increments by the ranks of a sort."""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.math import LOG2_E
from .._engine.pixel_walk import load_pixels, run_of_pixels, view_of
from .lovasz_bins import hinge_error


@triton.jit
def _errors_kernel(
    logits_ptr,  # [N, C, H, W], of one class
    target_ptr,  # [N, H, W]
    largest_ptr,  # [N, H, W]; unless HINGE
    log_sum_ptr,  # [N, H, W]; unless HINGE
    key_ptr,  # [N, H, W]: the error, -infinity where none is counted
    own_ptr,  # int8 [N, H, W]: whether a pixel is of the class
    counts_ptr,  # [groups, 2]: wrong pixels of each group, if HINGE
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    channel,  # the class
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    HINGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels, statistics and one class's logits, writes a key for the sort."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, HINGE, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    pointers = view.pointer + channel.to(tl.int64) * view.stride + view.offsets
    logits = tl.load(pointers, mask=run.inside, other=0.0).to(dtype)
    position = run.image * pixels * TILE.grain + run.first + run.local

    if HINGE:
        error = hinge_error(logits, pixel.label == 1)
        is_number = error < float("inf")
        is_own = (pixel.label == 1) & is_number
        is_error = (pixel.label >= 0) & is_number & (error > 0)
        wrong = tl.sum(((pixel.label >= 0) & ~is_number).to(tl.int32))
        group = run.image if PER_IMAGE else 0
        wrong = wrong.to(counts_ptr.dtype.element_ty)
        tl.atomic_add(counts_ptr + 2 * group, wrong, mask=wrong > 0, sem="relaxed")
    else:
        largest = tl.load(largest_ptr + position, mask=run.inside, other=0.0)
        log_sum = tl.load(log_sum_ptr + position, mask=run.inside, other=float("inf"))
        p = tl.exp2((logits - largest) * LOG2_E - log_sum)
        is_error = log_sum < float("inf")
        is_own = (pixel.label == channel) & is_error
        error = tl.where(is_own, 1.0 - p, p)

    tl.store(key_ptr + position, tl.where(is_error, error, float("-inf")), mask=run.inside)
    tl.store(own_ptr + position, is_own.to(tl.int8), mask=run.inside)


@triton.jit
def _rank_increments_kernel(
    key_ptr,  # [groups, items], sorted from the largest; becomes the errors times increments
    order_ptr,  # int64 [groups, items]: their places before the sort
    found_ptr,  # [groups, items]: how many are of the class up to each
    weights_ptr,  # [N, C, pixels]: the increments, negative for the class's own
    items,  # of a group
    pixels,  # of an image
    classes,
    channel,
    tiles,  # of a group
    PER_IMAGE: tl.constexpr,
    SAVE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Increments in closed form, from integers: no two large numbers are subtracted."""
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    rank = (program % tiles).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = rank < items
    first = group * items

    key = tl.load(key_ptr + first + rank, mask=inside, other=float("-inf"))
    found = tl.load(found_ptr + first + rank, mask=inside, other=0)
    before = tl.load(found_ptr + first + rank - 1, mask=inside & (rank > 0), other=0)
    total = tl.load(found_ptr + first + items - 1)

    is_own = found > before
    others = rank + 1 - found
    union = total + others
    rest = tl.where(is_own, 1, total - found).to(dtype)
    less = tl.maximum(tl.where(is_own, 1, union - 1), 1).to(dtype)
    increment = rest / union.to(dtype) / less
    increment = tl.where(total > 0, increment, tl.where(others == 1, 1.0, 0.0))
    is_error = key > float("-inf")
    increment = tl.where(is_error, increment, 0.0)

    tl.store(key_ptr + first + rank, tl.where(is_error, key * increment, 0.0), mask=inside)
    if SAVE:
        place = tl.load(order_ptr + first + rank, mask=inside, other=0)
        place = tl.minimum(tl.maximum(place, 0), items - 1)
        image = group
        if not PER_IMAGE:
            image = place // pixels
            place = place - image * pixels
        row = (image * classes + channel) * pixels
        weight = tl.where(is_own, increment * -1.0, increment)
        tl.store(weights_ptr + row + place, weight, mask=inside)
