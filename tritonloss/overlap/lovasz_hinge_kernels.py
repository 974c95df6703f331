"""The kernel that counts the errors of the Lovász hinge by bins, every pixel once.

The counters are [bins] of others' errors and [bins] of own ones, or where lanes vote on every bin
[bins] of all errors and several times [bins] of own ones: a histogram takes half as long then, and
own errors are few. Bins that no error lies in count the other pixels: ``in_hinge_histogram``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lovasz_bins import in_hinge_histogram, shifted_hinge
from .lovasz_kernels import _in_rows, _run_of_tile, _view_of_tile


@triton.jit
def _hinge_histogram_kernel(
    logits_ptr,  # [N, 1, H, W]
    target_ptr,  # [N, H, W]
    histogram_ptr,  # [groups, 1, counters]
    logits_strides,
    target_strides,
    pixels,
    width,
    chunks,
    rounds,
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether labels lie side by side
    APART: tl.constexpr,
    FAR: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once; counts the errors of others and own ones."""
    PIXELS: tl.constexpr = TILE.pixels
    chunk = tl.program_id(0)
    image = (chunk // chunks).to(tl.int64)
    chunk = (chunk % chunks).to(tl.int64)
    group = image if PER_IMAGE else image * 0

    counters_ptr = histogram_ptr + group * BINS.row
    counts = no_hinges(PIXELS, BINS)
    for i in tl.range(0, rounds):
        run = _run_of_tile(image, chunk * rounds + i, pixels, width, TILE)
        label = _labels_of_tile(target_ptr, target_strides, run, ALIGNED, FAR, TILE)
        view = _view_of_tile(logits_ptr, logits_strides, run, APART, FAR, TILE)
        logits = tl.load(view.pointer + view.offsets, mask=run.inside, other=0.0)
        logits = logits.to(tl.float64 if TILE.double else tl.float32)
        counts = count_hinges(counters_ptr, counts, logits, label, IGNORED, BINS)
    add_hinges(counters_ptr, counts, BINS)


@triton.jit
def no_hinges(PIXELS: tl.constexpr, BINS: tl.constexpr):
    """The counts of a program that has counted nothing: see ``count_hinges``."""
    COUNT: tl.constexpr = BINS.count
    if BINS.apart:
        counts = (tl.zeros((COUNT,), tl.int32), tl.zeros((PIXELS,), tl.int32))
    else:
        counts = (tl.zeros((2 * COUNT,), tl.int32),)
    return counts


@triton.jit
def count_hinges(counters_ptr, counts, logits, label, IGNORED: tl.constexpr, BINS: tl.constexpr):
    """A program's counts with those of more pixels, with any labels.

    They are (others' errors and own ones, in twice the bins), or with counters apart (all errors,
    own pixels without an error), where own errors are counted in memory at once.
    """
    COUNT: tl.constexpr = BINS.count
    valid = (label >= 0) & (label < 2)
    if IGNORED >= 0:
        valid = valid & (label != IGNORED)
    is_own = valid & (label.to(tl.int32) == 1)
    place = in_hinge_histogram(shifted_hinge(logits, is_own), valid, BINS)
    if BINS.apart:
        errors, right = counts
        counts = (errors + tl.histogram(place, COUNT), right + (is_own & (place == COUNT - 1)))
        own_ptr = counters_ptr + (1 + tl.program_id(0) % BINS.apart) * COUNT
        one = tl.full((), 1, counters_ptr.dtype.element_ty)
        tl.atomic_add(own_ptr + place, one, mask=is_own & (place < COUNT - 1), sem="relaxed")
    else:
        (errors,) = counts
        counts = (errors + tl.histogram(place | tl.where(is_own, COUNT, 0), 2 * COUNT),)
    return counts


@triton.jit
def add_hinges(counters_ptr, counts, BINS: tl.constexpr):
    """Add a program's counts to those of all programs."""
    dtype: tl.constexpr = counters_ptr.dtype.element_ty
    errors = counts[0]
    counter = counters_ptr + tl.arange(0, errors.shape[0])
    tl.atomic_add(counter, errors.to(dtype), mask=errors > 0, sem="relaxed")
    if BINS.apart:
        tl.atomic_add(counters_ptr + 2 * BINS.count - 1, tl.sum(counts[1]).to(dtype), sem="relaxed")


@triton.jit
def _labels_of_tile(
    target_ptr, strides, run, ALIGNED: tl.constexpr, FAR: tl.constexpr, TILE: tl.constexpr
):
    """The labels of a run as they are; 2, which is of no pixel, where the image has none."""
    GRAIN: tl.constexpr = TILE.grain
    start = target_ptr + run.image * strides[0] * GRAIN
    if ALIGNED:
        pointers = start + run.first + run.local
    else:
        start, offsets = _in_rows(start, strides[1], strides[2], run, FAR)
        pointers = start + offsets
    return tl.load(pointers, mask=run.inside, other=2)
