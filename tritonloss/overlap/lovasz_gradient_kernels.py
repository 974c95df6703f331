"""The gradients of the Lovász losses: the increment of every error, back through the softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.pixel_walk import (
    View,
    _load_block,
    _slot_mask,
    _slot_pointers,
    load_pixels,
    run_of_pixels,
    view_of,
)
from .._engine.pixels import class_of, for_classes, nearest_class, nothing_yet, sum_of_lanes
from .lovasz_bins import hinge_error, hinge_place, in_table, shifted_hinge, softmax_place
from .lovasz_kernels import probability


class Softmax(NamedTuple):
    """What a pixel's classes share, shaped to broadcast over them."""

    largest: Any
    log_sum: Any
    own: Any
    scale: Any  # of the gradient
    position: Any  # of the pixel in a map [H, W] without gaps


@triton.jit
def _softmax_gradient_kernel(
    upstream_ptr,  # []
    scale_ptr,  # [groups]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    largest_ptr,  # [N, H, W]
    log_sum_ptr,  # [N, H, W]
    table_ptr,  # [groups, C, 2 bins, 2], or [N, C, H, W] if there are no BINS
    grad_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_strides,
    pixels,  # of an image, in grains
    width,
    tiles,
    full,
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels, statistics and logits, writes the gradient once.

    The sum over classes of p dL/dp comes first. If a lane's classes are all in one block, what it
    has found of them stays in registers; if not, they are read once more.
    """
    COUNT: tl.constexpr = (TILE.classes + TILE.lanes - 1) // TILE.lanes
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, False, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)

    # what the classes share; of a pixel that is not a number the gradient is none
    group = run.image if PER_IMAGE else 0
    position = run.first + run.local
    place = run.image * pixels * TILE.grain + position
    largest = tl.load(largest_ptr + place, mask=run.inside, other=0.0)
    log_sum = tl.load(log_sum_ptr + place, mask=run.inside, other=float("inf"))
    scale = tl.load(upstream_ptr).to(largest.dtype) * tl.load(scale_ptr + group)
    scale = tl.where(log_sum < float("inf"), scale, float("nan"))
    softmax = Softmax(
        largest=for_classes(largest, TILE),
        log_sum=for_classes(log_sum, TILE),
        own=for_classes(pixel.own, TILE),
        scale=for_classes(scale, TILE),
        position=for_classes(position, TILE),
    )
    if BINS is None:
        table_ptr += run.image * TILE.classes * pixels * TILE.grain
    else:
        table_ptr += group * (4 * BINS.count * TILE.classes)
    # of weights without bins: numbers of a class
    table = (table_ptr, pixels.to(tl.int64) * TILE.grain)

    if COUNT <= TILE.unroll:
        block = _load_block(view, 0, run.inside, COUNT, TILE.classes, TILE)
        held = ()
        total = nothing_yet(0.0, TILE)
        for j in tl.static_range(COUNT):
            p, increment = _increment(block, j, softmax, table, run.inside, BINS, TILE)
            held = held + ((p, p * increment),)
            total += p * increment
        total = for_classes(sum_of_lanes(total, TILE), TILE)
        for j in tl.static_range(COUNT):
            p, weighted = held[j]
            gradient = (weighted - p * total) * softmax.scale
            _store_slot(grad_view, j, gradient, pixel, block.exists[j], TILE)
    else:
        total = _sum_over_classes(softmax, view, run.inside, table, full, BINS, TILE)
        total = for_classes(sum_of_lanes(total, TILE), TILE)
        _write_gradients(softmax, total, (view, grad_view), pixel, table, full, BINS, TILE)


@triton.jit
def _increment(
    block, SLOT: tl.constexpr, softmax, table, inside, BINS: tl.constexpr, TILE: tl.constexpr
):
    """(p, dL/dp) of a slot's classes."""
    table_ptr, stride = table
    p = probability(block.logits[SLOT], softmax.largest, softmax.log_sum)
    channel = class_of(block, SLOT, TILE)
    nearest = nearest_class(channel, TILE)
    mask = _slot_mask(inside, block.exists[SLOT], TILE)
    if BINS is None:
        pointers = table_ptr + nearest * stride + softmax.position
        increment = tl.load(pointers, mask=mask, other=0.0)
    else:
        place = softmax_place(p, BINS)
        entry = in_table(place.bin, softmax.own == channel, p >= 0.5, BINS)
        row = table_ptr + nearest * (4 * BINS.count)
        increment = _interpolated(row, entry, place.fraction)
    return p, increment


@triton.jit
def _interpolated(row_ptr, entry, fraction):
    """The increment at a place in the bin of an entry of the table."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    if dtype == tl.float64:
        low = tl.load(row_ptr + 2 * entry)
        rise = tl.load(row_ptr + 2 * entry + 1)
    else:
        # Both numbers in one load.
        pair = tl.load(row_ptr.to(tl.pointer_type(tl.int64)) + entry)
        low = pair.to(tl.int32).to(tl.float32, bitcast=True)
        rise = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low + fraction * rise


@triton.jit
def _sum_over_classes(softmax, view, inside, table, full, BINS: tl.constexpr, TILE: tl.constexpr):
    """The sum of p dL/dp over all classes, one block after the other."""
    UNROLL: tl.constexpr = TILE.unroll
    STEP: tl.constexpr = UNROLL * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    pointer = view.pointer
    total = nothing_yet(0.0, TILE)
    for start in tl.range(0, full, STEP):
        here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
        block = _load_block(here, start, inside, UNROLL, STEP, TILE)
        for j in tl.static_range(UNROLL):
            p, increment = _increment(block, j, softmax, table, inside, BINS, TILE)
            total += p * increment
        pointer += STEP * view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    block = _load_block(here, FULL, inside, COUNT, LEFT, TILE)
    for j in tl.static_range(COUNT):
        p, increment = _increment(block, j, softmax, table, inside, BINS, TILE)
        total += p * increment
    return total


@triton.jit
def _write_gradients(
    softmax, total, views, pixel, table, full, BINS: tl.constexpr, TILE: tl.constexpr
):
    """Store p (dL/dp - total) for all classes, one block after the other."""
    UNROLL: tl.constexpr = TILE.unroll
    STEP: tl.constexpr = UNROLL * TILE.lanes
    FULL: tl.constexpr = (TILE.classes - 1) // STEP * STEP
    LEFT: tl.constexpr = TILE.classes - FULL
    COUNT: tl.constexpr = (LEFT + TILE.lanes - 1) // TILE.lanes
    view, grad_view = views
    pointer = view.pointer
    grad_pointer = grad_view.pointer
    for start in tl.range(0, full, STEP):
        here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
        there = View(pointer=grad_pointer, offsets=grad_view.offsets, stride=grad_view.stride)
        block = _load_block(here, start, pixel.inside, UNROLL, STEP, TILE)
        for j in tl.static_range(UNROLL):
            p, increment = _increment(block, j, softmax, table, pixel.inside, BINS, TILE)
            gradient = p * (increment - total) * softmax.scale
            _store_slot(there, j, gradient, pixel, block.exists[j], TILE)
        pointer += STEP * view.stride
        grad_pointer += STEP * grad_view.stride
    here = View(pointer=pointer, offsets=view.offsets, stride=view.stride)
    there = View(pointer=grad_pointer, offsets=grad_view.offsets, stride=grad_view.stride)
    block = _load_block(here, FULL, pixel.inside, COUNT, LEFT, TILE)
    for j in tl.static_range(COUNT):
        p, increment = _increment(block, j, softmax, table, pixel.inside, BINS, TILE)
        gradient = p * (increment - total) * softmax.scale
        _store_slot(there, j, gradient, pixel, block.exists[j], TILE)


@triton.jit
def _store_slot(grad_view, SLOT: tl.constexpr, gradient, pixel, exists, TILE: tl.constexpr):
    """Store the gradients of a slot's logits; 0 where the pixel is ignored, whatever it holds."""
    gradient = tl.where(for_classes(pixel.label >= 0, TILE), gradient, 0.0)
    mask = _slot_mask(pixel.inside, exists, TILE)
    tl.store(_slot_pointers(grad_view, SLOT, TILE), gradient, mask=mask)


@triton.jit
def _hinge_gradient_kernel(
    upstream_ptr,  # []
    scale_ptr,  # [groups]
    logits_ptr,  # [N, 1, H, W]
    target_ptr,  # [N, H, W]
    table_ptr,  # [groups, 1, 2 bins, 2], or [N, 1, H, W] if there are no BINS
    grad_ptr,  # [N, 1, H, W]
    logits_strides,
    target_strides,
    grad_strides,
    pixels,
    width,
    tiles,
    IGNORED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits, writes the gradient once."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, True, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)
    group = run.image if PER_IMAGE else 0
    scale = tl.load(upstream_ptr).to(dtype) * tl.load(scale_ptr + group)
    logits = tl.load(view.pointer + view.offsets, mask=run.inside, other=0.0).to(dtype)
    is_own = pixel.label == 1
    error = hinge_error(logits, is_own)

    if BINS is None:
        place = run.image * pixels * TILE.grain + run.first + run.local
        increment = tl.load(table_ptr + place, mask=run.inside, other=0.0)
    else:
        place = hinge_place(shifted_hinge(logits, is_own), BINS)
        entry = in_table(place.bin, is_own, is_own, BINS)
        increment = _interpolated(table_ptr + group * (4 * BINS.count), entry, place.fraction)

    # no increment where there is no error, and no number where the error is none
    gradient = tl.where(error > 0, increment * scale, 0.0)
    gradient = tl.where(error < float("inf"), gradient, float("nan"))
    gradient = tl.where(pixel.label >= 0, gradient, 0.0)
    tl.store(grad_view.pointer + grad_view.offsets, gradient, mask=run.inside)
