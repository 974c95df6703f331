"""The kernels of all pixelwise losses, of one loss or of several in one read of the logits."""

from __future__ import annotations

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


@triton.jit
def _pixelwise_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    own_ptrs,  # of every loss [C]: a table for a pixel's own class, if the loss has one
    other_ptrs,  # of every loss [C]: a table for the other classes, if the loss has one
    map_ptrs,  # [N, H, W] each: what the losses leave to the backward pass
    values_ptr,  # [N, H, W]: the sum of the losses of every pixel, if REDUCTION is "none"
    loss_ptr,  # [], otherwise
    scale_ptr,  # of every loss: the factor of the gradient of a pixel's value
    scratch_ptr,  # see sums.py
    tickets_ptr,
    numbers,  # of every loss, a tuple
    shares,  # of every loss: its factor in the sum
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
    in_all = tl.zeros_like(own)
    for k in tl.static_range(COUNT):
        value, weight, saved = finish(states[k], own, pixel, given[k], TERMS, k, TILE)
        store_maps(map_ptrs, position, saved, pixel, TERMS, k)
        value = tl.where(valid, value, 0.0)
        if REDUCTION == "none":
            in_all += shares[k] * value
        else:
            leave(sums, 2 * k, tl.sum(value))
            leave(sums, 2 * k + 1, tl.sum(tl.where(valid, weight, 0.0)))
    if REDUCTION == "none":
        tl.store(values_ptr + position, in_all, mask=pixel.inside)
    else:
        # the number of valid pixels, in the last row
        leave(sums, 2 * COUNT, tl.sum(tl.where(valid, 1.0, 0.0)))
        if comes_last(sums):
            store_loss(loss_ptr, scale_ptr, sums, shares, COUNT, REDUCTION)


@triton.jit
def store_loss(loss_ptr, scale_ptr, sums, shares, COUNT: tl.constexpr, REDUCTION: tl.constexpr):
    """Store the loss, and for every term the factor of its gradient."""
    loss = tl.zeros((), tl.float64)
    valid = total(sums, 2 * COUNT)
    for k in tl.static_range(COUNT):
        divisor = tl.zeros_like(loss) + 1.0
        if REDUCTION == "mean":
            # No valid pixel: the mean is 0. Weights that sum to 0: NaN, as torch has it.
            divisor = tl.where(valid > 0, total(sums, 2 * k + 1), 1.0)
            divisor = tl.where(divisor == 0, float("nan"), divisor)
        loss += total(sums, 2 * k) / divisor * shares[k]
        tl.store(scale_ptr + k, shares[k] / divisor)
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
    numbers,
    shares,
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
    for k in tl.static_range(COUNT):
        scale = upstream * (tl.load(scale_ptr + k) if REDUCED else shares[k])
        scales = scales + (tl.where(pixel.label >= 0, scale, 0.0),)
    maps = ()
    for i in tl.static_range(len(map_ptrs)):
        maps = maps + (tl.load(map_ptrs[i] + position, mask=pixel.inside, other=0),)
    factors = of_each(factors_of, (scales, maps, view, pixel, given), TERMS, TILE)
    write_gradients(factors, (view, grad_view), pixel, given, full, TERMS, TILE)
