"""The kernels of all pixelwise losses, of one loss or of several in one read of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixel_walk import (
    factors_of,
    far_offsets,
    finish,
    fold,
    given_to,
    load_pixels,
    look_up,
    of_each,
    run_of_pixels,
    store_maps,
    view_of,
    write_gradients,
)
from .sums import Sums, comes_last, leave, total


class Weights(NamedTuple):
    """What the losses of a sum are multiplied by."""

    pointer: Any
    places: Any  # of every loss


@triton.jit
def _pixelwise_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C]: a table for a pixel's own class, if the loss has one
    other_ptrs,  # of every loss [C]: a table for the other classes, if the loss has one
    map_ptrs,  # [N, H, W] each: what the losses leave to the backward pass
    values_ptr,  # [N, H, W]: the sum of the losses of every pixel, if REDUCTION is "none"
    loss_ptr,  # [], otherwise
    terms_ptr,  # of every loss: its value without its weight, if WEIGHTED
    scale_ptr,  # of every loss: the factor of the gradient of a pixel's value
    weights_ptr,  # float64, if WEIGHTED
    scratch_ptr,  # see sums.py
    tickets_ptr,
    numbers,  # of every loss, a tuple
    weight_places,  # of every loss
    logits_strides,
    target_strides,
    pixels,  # of an image, in grains
    width,
    tiles,  # runs of an image
    full,  # classes in the blocks before the last
    programs,
    TERMS: tl.constexpr,
    IGNORED: tl.constexpr,
    BINARY: tl.constexpr,
    REDUCTION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once (what is read again comes from the cache), writes the loss."""
    COUNT: tl.constexpr = len(TERMS.start)
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    given = of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE)

    # The own logits, before or after the walk over the classes. Between two passes every register
    # counts, and a pointer less is alive if they are looked up before. After a single pass they are
    # in the cache.
    if TERMS.passes == 2:
        own = look_up(view, pixel.own, TILE)
        states = fold(view, pixel, given, full, TERMS, TILE)
    else:
        states = fold(view, pixel, given, full, TERMS, TILE)
        own = look_up(view, pixel.own, TILE)

    # every loss in turn: its maps, and its sums or its part of the map
    valid = pixel.label >= 0
    position = run.image * pixels * TILE.grain + run.first + run.local
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=2 * COUNT + 1)
    weights = Weights(pointer=weights_ptr, places=weight_places)
    in_all = tl.zeros_like(own)
    for k in tl.static_range(COUNT):
        value, weight, saved = finish(states[k], own, pixel, given[k], TERMS, k, TILE)
        store_maps(map_ptrs, position, saved, pixel, TERMS, k)
        value = tl.where(valid, value, 0.0)
        if REDUCTION == "none":
            in_all += weight_of(weights, k, WEIGHTED, TILE) * value
        else:
            leave(sums, 2 * k, tl.sum(value))
            leave(sums, 2 * k + 1, tl.sum(tl.where(valid, weight, 0.0)))
    if REDUCTION == "none":
        tl.store(values_ptr + position, in_all, mask=pixel.inside)
    else:
        # the number of valid pixels, in the last row
        leave(sums, 2 * COUNT, tl.sum(tl.where(valid, 1.0, 0.0)))
        if comes_last(sums):
            pointers = (loss_ptr, terms_ptr, scale_ptr)
            store_loss(pointers, sums, weights, COUNT, REDUCTION, WEIGHTED)


@triton.jit
def weight_of(weights, K: tl.constexpr, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    """The weight of a loss in a sum of maps."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if WEIGHTED:
        weight = tl.load(weights.pointer + weights.places[K]).to(dtype)
    else:
        weight = tl.full((), 1.0, dtype)
    return weight


@triton.jit
def store_loss(
    pointers, sums, weights, COUNT: tl.constexpr, REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Store the sum, what is in it if there are weights, and the factors of the gradients."""
    loss_ptr, terms_ptr, scale_ptr = pointers
    loss = tl.zeros((), tl.float64)
    valid = total(sums, 2 * COUNT)
    for k in tl.static_range(COUNT):
        divisor = tl.zeros_like(loss) + 1.0
        if REDUCTION == "mean":
            # No valid pixel: the mean is 0. Weights that sum to 0: NaN, as torch has it.
            divisor = tl.where(valid > 0, total(sums, 2 * k + 1), 1.0)
            divisor = tl.where(divisor == 0, float("nan"), divisor)
        term = total(sums, 2 * k) / divisor
        if WEIGHTED:
            tl.store(terms_ptr + k, term)
            weight = tl.load(weights.pointer + weights.places[k])
            loss += term * weight
            tl.store(scale_ptr + k, weight / divisor)
        else:
            loss += term
            tl.store(scale_ptr + k, 1.0 / divisor)
    tl.store(loss_ptr, loss)


@triton.jit
def _pixelwise_backward_kernel(
    upstream_ptr,  # [], or [N, H, W] unless REDUCED
    scale_ptr,  # of every loss, if REDUCED
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C]
    other_ptrs,  # of every loss [C]
    map_ptrs,  # [N, H, W] each
    grad_ptr,  # [N, C, H, W]
    weights_ptr,  # float64, if WEIGHTED
    numbers,
    weight_places,
    upstream_strides,
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
    REDUCED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads labels and logits once more, writes the gradient once."""
    COUNT: tl.constexpr = len(TERMS.start)
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    run = run_of_pixels(pixels, width, tiles, TILE)
    pixel = load_pixels(target_ptr, target_strides, run, IGNORED, BINARY, TILE)
    view = view_of(logits_ptr, logits_strides, run, TILE)
    grad_view = view_of(grad_ptr, grad_strides, run, TILE)
    given = of_each(given_to, (own_ptrs, other_ptrs, numbers), TERMS, TILE)

    # the upstream gradient
    position = run.image * pixels * TILE.grain + run.first + run.local
    if REDUCED:
        upstream = tl.load(upstream_ptr).to(dtype)
    else:
        offsets = far_offsets(run, upstream_strides[1], upstream_strides[2])
        upstream_ptr += run.image * upstream_strides[0]
        upstream = tl.load(upstream_ptr + offsets, mask=pixel.inside, other=0.0).to(dtype)

    # what the slopes of every loss share, then all slopes
    scales = ()
    weights = Weights(pointer=weights_ptr, places=weight_places)
    for k in tl.static_range(COUNT):
        if REDUCED:
            scale = upstream * tl.load(scale_ptr + k)
        else:
            scale = upstream * weight_of(weights, k, WEIGHTED, TILE)
        scales = scales + (tl.where(pixel.label >= 0, scale, 0.0),)
    maps = ()
    for i in tl.static_range(len(map_ptrs)):
        maps = maps + (tl.load(map_ptrs[i] + position, mask=pixel.inside, other=0),)
    factors = of_each(factors_of, (scales, maps, view, pixel, given), TERMS, TILE)
    write_gradients(factors, (view, grad_view), pixel, given, full, TERMS, TILE)
