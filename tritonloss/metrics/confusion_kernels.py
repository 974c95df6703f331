"""Device code of the confusion matrix: pairs of classes counted.

A pixel's label and its predicted class are a pair. Pixels of a program are near each other, so most
of them are of few pairs, and a sum for each pixel would queue at few addresses. A program adds up
its own first: up to 32 classes in a histogram of all pairs, of which it adds those to the matrix
that occur; with more classes it takes a pixel at a time, as if drawn by lot, and counts all that
are of the same pair, a few times over, before it adds the rest one by one. Integers are the same in
any order, so that atomic sums are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.largest import largest_place
from .._engine.pixel_walk import fold, load_pixels, run_of_pixels, view_of
from .._engine.pixels import Pixel

# Pairs of classes that a program has a histogram of.
_MOST_BINS = tl.constexpr(1024)
# How often a program takes a pixel and counts its likes. An image has about three classes in 512
# pixels of a row, and where classes meet the predictions differ.
_DRAWS = tl.constexpr(4)
# Odd: multiplied by it modulo a power of two, numbers are in disorder, and none is lost.
_DISORDER = tl.constexpr(421)


# --- counting -------------------------------------------------------------------------------------


@triton.jit
def count_pairs(matrix_ptr, label, prediction, CLASSES: tl.constexpr, BINS: tl.constexpr):
    """Add pixels to the matrix [CLASSES, CLASSES]; those whose label or prediction is -1 are none.

    BINS is a power of two that has room for all pairs.
    """
    is_valid = (label >= 0) & (prediction >= 0)
    if BINS <= _MOST_BINS:
        pair = tl.where(is_valid, label * CLASSES + prediction, 0)
        counts = tl.histogram(pair, BINS, mask=is_valid)
        tl.atomic_add(
            matrix_ptr + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed"
        )
    else:
        # Of 46341 classes and more there are too many pairs for 32 bits.
        wide: tl.constexpr = tl.int64 if CLASSES * CLASSES >= 2**31 else tl.int32
        pair = tl.where(is_valid, label.to(wide) * CLASSES + prediction, -1)
        _count_drawn(matrix_ptr, pair)


@triton.jit
def _count_drawn(matrix_ptr, pair):
    """Add pixels' pairs to the matrix; -1 is none."""
    PIXELS: tl.constexpr = pair.shape[0]
    lot = (tl.arange(0, PIXELS) * _DISORDER) % PIXELS
    for _ in tl.range(0, _DRAWS):
        drawn = tl.max(tl.where(pair >= 0, lot, -1))
        chosen = tl.max(tl.where(lot == drawn, pair, -1))
        is_like = (pair == chosen) & (pair >= 0)
        count = tl.sum(is_like.to(tl.int32))
        # One address, and one sum: none if no pixel is left.
        place = matrix_ptr + tl.maximum(chosen, 0)
        tl.atomic_add(place, count.to(tl.int64), mask=count > 0, sem="relaxed")
        pair = tl.where(is_like, -1, pair)
    one = tl.full((PIXELS,), 1, tl.int64)
    tl.atomic_add(matrix_ptr + tl.maximum(pair, 0), one, mask=pair >= 0, sem="relaxed")


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _confusion_matrix_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    matrix_ptr,  # int64 [C, C], or [2, 2] of one channel
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    TERMS: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once."""
    CLASSES: tl.constexpr = 2 if BINARY else TILE.classes
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)

    (state,) = fold(view, pixel, ((),), full, TERMS, TILE)

    count_pairs(matrix_ptr, pixel.label, largest_place(state, TILE), CLASSES, BINS)


@triton.jit
def _label_confusion_kernel(
    prediction_ptr,  # [N, H, W], integers
    target_ptr,  # [N, H, W]
    matrix_ptr,  # int64 [C, C]
    prediction_strides,
    target_strides,
    pixels,
    width,
    tiles,
    IGNORED: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads two label maps once."""
    run = run_of_pixels(pixels, width, tiles, TILE)
    found = load_pixels(prediction_ptr, prediction_strides, run, -1, False, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, False, TILE)

    count_pairs(matrix_ptr, pixel.label, found.label, TILE.classes, BINS)


@triton.jit
def _predict_kernel(
    logits_ptr,  # [N, C, H, W]
    prediction_ptr,  # [N, H, W], contiguous
    logits_strides,
    pixels,
    width,
    tiles,
    full,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads logits once, writes a class for every pixel."""
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = Pixel(label=run.local, own=run.local, inside=run.inside)  # no labels are needed
    view = view_of(logits_ptr, logits_strides, run, TILE)

    (state,) = fold(view, pixel, ((),), full, TERMS, TILE)

    position = run.image * pixels * TILE.grain + run.first + run.local
    tl.store(prediction_ptr + position, largest_place(state, TILE), mask=run.inside)
