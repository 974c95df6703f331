"""Kernels of the structural similarity loss; structural_similarity.py has its mathematics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import negated, sigmoid_base2, softplus_base2
from .._engine.strips import (
    SIZES,
    Row,
    below,
    label_plane_of,
    load_values,
    plane_of,
    store_columns,
    strip_program,
    zeros,
)
from .._engine.sums import Sums, comes_last, leave, total
from .structural_difference import Maps, empty_history, load_pixels, next_row
from .structural_labels import ABOVE_ALL, Look, class_is_present

# --- forward --------------------------------------------------------------------------------------


class StripSums(NamedTuple):
    """What a program adds up; a run-time value."""

    entropy: Any  # of bce
    weighted: Any  # of e f bce
    hard: Any  # of f


@triton.jit
def _is_hard(e, column, row, height, width, SAMPLING: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a valid pixel is hard (f, SSL paper, Eq. 11). A NaN is hard: it reaches the loss."""
    hard = ~(e <= SAMPLING.threshold)
    if WINDOW.padding == "valid":
        RADIUS: tl.constexpr = WINDOW.size // 2
        row_is_inside = (row >= RADIUS) & (row < height - RADIUS)
        limit = tl.where(row_is_inside, width - RADIUS, 0)
        hard = hard & (column >= RADIUS) & (column < limit)
    return hard


@triton.jit
def _forward_strip(
    maps, stored, program, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    STORED: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """The sums of one strip."""
    RADIUS: tl.constexpr = WINDOW.size // 2
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    zero = zeros(maps.logits, STRIP)
    entropy_sum, weighted_sum, hard_count = zero, zero, zero
    history = empty_history(maps, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, maps.height - program.first_row)
    for i in tl.range(-RADIUS, rows + RADIUS, loop_unroll_factor=UNROLL):
        differences, pixels, history = next_row(
            i, history, maps, program, SAMPLING, WINDOW, STRIP, PRESENT
        )
        # the pixels of the complete row, which count from the strip's first row on
        number = program.first_row + i - RADIUS
        lowest_label = tl.where(i >= RADIUS, 0, ABOVE_ALL)
        kept = ()
        for v in tl.static_range(COLUMNS):
            label = pixels.label[v]
            valid = label >= lowest_label
            column = program.chunk * COLUMNS + v
            hard = valid & _is_hard(
                differences[v], column, number, maps.height, maps.width, SAMPLING, WINDOW
            )
            u = pixels.scaled[v]
            entropy = softplus_base2(tl.where(label == program.channel, negated(u), u))
            weight = differences[v] if SAMPLING.reweight else zero + 1.0
            entropy_sum += tl.where(valid, entropy, 0.0)
            weighted_sum += tl.where(hard, weight * entropy, 0.0)
            hard_count += tl.where(hard, 1.0, 0.0)
            kept = kept + (tl.where(hard, weight, 0.0),)
        if STORED:
            limit = tl.where(i >= RADIUS, maps.width, 0)
            out_row = Row(number=i - RADIUS, chunk=program.chunk, limit=limit)
            store_columns(stored, out_row, kept, STRIP)
    return StripSums(
        entropy=tl.sum(entropy_sum),
        weighted=tl.sum(weighted_sum),
        hard=tl.sum(hard_count),
    )


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    loss_ptr,  # []
    statistics_ptr,  # [2]: bce_weight / V, (1 - bce_weight) / M
    stored_ptr,  # [N, C, H, W]: e f, if STORED
    found_ptr,  # see structural_labels.py
    valid_ptr,  # []
    scratch_ptr,  # see _engine/sums.py
    tickets_ptr,
    logits_strides,
    target_strides,
    stored_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    programs,
    bce_weight,  # bce_weight + bce_weight_rest has the precision of float64
    bce_weight_rest,
    SAMPLING: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    STORED: tl.constexpr,
):
    """Reads logits and labels once, adds up the loss; writes e f if STORED."""
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    first_row = program.first_row
    maps = Maps(
        logits=below(plane_of(logits_ptr, logits_strides, program, STRIP), first_row, STRIP),
        target=below(label_plane_of(target_ptr, target_strides, program, STRIP), first_row, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=window,
    )
    stored = below(plane_of(stored_ptr, stored_strides, program, STRIP), first_row, STRIP)

    present = True
    if not STRIP.channels_in_lanes:
        look = Look(found=found_ptr, classes=channels, height=height, width=width)
        present = class_is_present(look, program, STRIP)
    if present:
        found = _forward_strip(maps, stored, program, SAMPLING, WINDOW, STRIP, STORED, True)
    else:
        found = _forward_strip(maps, stored, program, SAMPLING, WINDOW, STRIP, STORED, False)

    # the sums of all strips, and the loss
    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=3)
    leave(sums, 0, found.entropy)
    leave(sums, 1, found.weighted)
    leave(sums, 2, found.hard)
    if comes_last(sums):
        share = tl.zeros((), tl.float64) + bce_weight + bce_weight_rest
        entropy_scale = share / tl.maximum(tl.load(valid_ptr), 1.0)
        weighted_scale = (1.0 - share) / tl.maximum(total(sums, 2), 1.0)
        tl.store(loss_ptr, entropy_scale * total(sums, 0) + weighted_scale * total(sums, 1))
        tl.store(statistics_ptr, entropy_scale)
        tl.store(statistics_ptr + 1, weighted_scale)


# --- backward -------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """The scales of the gradient's two parts: it is (p - y) (entropy + weighted e f)."""

    entropy: Any
    weighted: Any


@triton.jit
def _residual(u, probability, belongs, PRESENT: tl.constexpr):
    """The residual p - y; -sigmoid(-z) where y = 1, since p - 1 has no digits left near p = 1."""
    residual = probability
    if PRESENT:
        residual = tl.where(belongs, negated(sigmoid_base2(negated(u))), probability)
    return residual


@triton.jit
def _backward_strip(
    scales, maps, grad, program, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one strip: (p - y) (a m + b e f), m: whether a pixel is valid."""
    RADIUS: tl.constexpr = WINDOW.size // 2
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    history = empty_history(maps, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, maps.height - program.first_row)
    for i in tl.range(-RADIUS, rows + RADIUS, loop_unroll_factor=UNROLL):
        differences, pixels, history = next_row(
            i, history, maps, program, SAMPLING, WINDOW, STRIP, PRESENT
        )
        number = program.first_row + i - RADIUS
        gradient = ()
        for v in tl.static_range(COLUMNS):
            label = pixels.label[v]
            column = program.chunk * COLUMNS + v
            hard = _is_hard(
                differences[v], column, number, maps.height, maps.width, SAMPLING, WINDOW
            )
            # Where a pixel is not valid p = y = 0, which makes the gradient 0. But a NaN of a
            # neighbour in e would make it NaN: the weight is selected.
            hard = hard & (label >= 0)
            weight = tl.where(hard, differences[v] if SAMPLING.reweight else 1.0, 0.0)
            belongs = label == program.channel
            residual = _residual(pixels.scaled[v], pixels.probability[v], belongs, PRESENT)
            gradient = gradient + ((scales.entropy + scales.weighted * weight) * residual,)
        limit = tl.where(i >= RADIUS, maps.width, 0)
        out_row = Row(number=i - RADIUS, chunk=program.chunk, limit=limit)
        store_columns(grad, out_row, gradient, STRIP)


@triton.jit
def _gradient_scales(grad_loss_ptr, statistics_ptr):
    """What the two parts of the gradient are multiplied by."""
    grad_loss = tl.load(grad_loss_ptr)
    return Scales(
        entropy=grad_loss * tl.load(statistics_ptr),
        weighted=grad_loss * tl.load(statistics_ptr + 1),
    )


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_backward_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    found_ptr,
    grad_logits_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_logits_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    SAMPLING: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Reads logits and labels once more, recomputes e, writes the gradient once."""
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    first_row = program.first_row
    maps = Maps(
        logits=below(plane_of(logits_ptr, logits_strides, program, STRIP), first_row, STRIP),
        target=below(label_plane_of(target_ptr, target_strides, program, STRIP), first_row, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=window,
    )
    grad = below(plane_of(grad_logits_ptr, grad_logits_strides, program, STRIP), first_row, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    present = True
    if not STRIP.channels_in_lanes:
        look = Look(found=found_ptr, classes=channels, height=height, width=width)
        present = class_is_present(look, program, STRIP)
    if present:
        _backward_strip(scales, maps, grad, program, SAMPLING, WINDOW, STRIP, True)
    else:
        _backward_strip(scales, maps, grad, program, SAMPLING, WINDOW, STRIP, False)


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_stored_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    stored_ptr,  # [N, C, H, W]: e f in, gradient out
    logits_strides,
    target_strides,
    stored_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    IGNORED: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Turns the stored e f into the gradient in place: no window, three reads and a write."""
    COLUMNS: tl.constexpr = STRIP.columns
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    first_row = program.first_row
    maps = Maps(
        logits=below(plane_of(logits_ptr, logits_strides, program, STRIP), first_row, STRIP),
        target=below(label_plane_of(target_ptr, target_strides, program, STRIP), first_row, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=1,
    )
    stored = below(plane_of(stored_ptr, stored_strides, program, STRIP), first_row, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    for i in tl.range(0, tl.minimum(STRIP.rows, height - first_row)):
        row = Row(number=i, chunk=program.chunk, limit=width)
        pixels = load_pixels(maps, row, IGNORED, STRIP, 0, COLUMNS, "zeros")
        weights = load_values(stored, row, STRIP, 0, COLUMNS, "zeros")
        gradient = ()
        for v in tl.static_range(COLUMNS):
            belongs = pixels.label[v] == program.channel
            residual = _residual(pixels.scaled[v], pixels.probability[v], belongs, True)
            gradient = gradient + ((scales.entropy + scales.weighted * weights[v]) * residual,)
        store_columns(stored, row, gradient, STRIP)
