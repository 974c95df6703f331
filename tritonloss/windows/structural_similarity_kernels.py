"""Kernels of the structural similarity loss; its mathematics: structural_similarity.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import label_of, sanitised_label, sigmoid_base2, softplus_base2
from .._engine.strips import (
    SIZES,
    Row,
    label_plane_of,
    load_values,
    plane_of,
    row_of,
    store_columns,
    strip_program,
    zeros,
)
from .._engine.sums import Sums, comes_last, leave, total
from .structural_difference import Maps, empty_history, load_pixels, next_row

# Above the index of every class: no label is at least this.
_ABOVE_ALL = tl.constexpr(1 << 30)

# --- a look before the work -----------------------------------------------------------------------


@triton.jit
def _class_in_strip(
    maps, program, RADIUS: tl.constexpr, IGNORED: tl.constexpr, STRIP: tl.constexpr
):
    """Whether any label that this strip's windows see is the channel's: a look before the work.

    Most (strip, class) pairs of a street scene have none; then y = 0 throughout and n_y = 1.
    """
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns
    BORDER: tl.constexpr = triton.next_power_of_2(2 * RADIUS + 1)
    target = maps.target
    inner = program.first_column + tl.arange(0, WIDTH)
    border = tl.arange(0, BORDER)
    outer = program.first_column + border - RADIUS + tl.where(border >= RADIUS, WIDTH, 0)
    inner_mask = inner < maps.width
    outer_mask = (border < 2 * RADIUS) & (outer >= 0) & (outer < maps.width)
    first = tl.maximum(program.first_row - RADIUS, 0)
    rows = tl.minimum(program.first_row + STRIP.rows + RADIUS, maps.height) - first
    own = label_of(program.channel, IGNORED)

    inner_found = tl.zeros((WIDTH,), tl.int32)
    outer_found = tl.zeros((BORDER,), tl.int32)
    for i in tl.range(0, rows):
        row_ptr = row_of(target, first + i, STRIP)
        pointer = row_ptr + inner.to(tl.int64) * target.column_stride
        label = tl.load(pointer, mask=inner_mask, other=0)
        inner_found |= ((label == own) & inner_mask).to(tl.int32)
        if RADIUS > 0:
            pointer = row_ptr + outer.to(tl.int64) * target.column_stride
            label = tl.load(pointer, mask=outer_mask, other=0)
            outer_found |= ((label == own) & outer_mask).to(tl.int32)
    return tl.maximum(tl.max(inner_found, 0), tl.max(outer_found, 0)) > 0


@triton.jit
def _valid_in_strip(maps, program, IGNORED: tl.constexpr, STRIP: tl.constexpr):
    """Number of valid pixels in this strip: counted for one class, since all classes share it."""
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns
    target = maps.target
    column = program.first_column + tl.arange(0, WIDTH)
    inside = column < maps.width
    count = tl.zeros((WIDTH,), tl.float32)
    for i in tl.range(0, tl.minimum(STRIP.rows, maps.height - program.first_row)):
        row_ptr = row_of(target, program.first_row + i, STRIP)
        pointer = row_ptr + column.to(tl.int64) * target.column_stride
        label = tl.load(pointer, mask=inside, other=0)
        label = sanitised_label(label, inside, maps.classes, IGNORED)
        count += tl.where(label >= 0, 1.0, 0.0)
    return tl.sum(count)


# --- forward --------------------------------------------------------------------------------------


class StripSums(NamedTuple):
    """What a program adds up; a run-time value."""

    entropy: Any  # of bce
    weighted: Any  # of e f bce
    hard: Any  # of f
    valid: Any  # pixels


@triton.jit
def _is_hard(e, column, row, height, width, SAMPLING: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a valid pixel is hard (f, SSL paper, Eq. 11). A NaN is, and so reaches the loss."""
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
    """The sums of one strip; valid pixels are counted only if the lanes hold all channels."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    zero = zeros(maps.logits, STRIP)
    entropy_sum, weighted_sum, hard_count, valid_count = zero, zero, zero, zero
    history = empty_history(maps, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, maps.height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, pixels, history = next_row(
            i, history, maps, program, SAMPLING, WINDOW, STRIP, PRESENT
        )
        number = program.first_row + i - (SIZE - 1)
        lowest_label = tl.where(i >= SIZE - 1, 0, _ABOVE_ALL)
        kept = ()
        for v in tl.static_range(COLUMNS):
            label = pixels.label[v]
            valid = label >= lowest_label
            column = program.chunk * COLUMNS + v
            hard = valid & _is_hard(
                differences[v], column, number, maps.height, maps.width, SAMPLING, WINDOW
            )
            u = pixels.scaled[v]
            entropy = softplus_base2(tl.where(label == program.channel, -u, u))
            weight = differences[v] if SAMPLING.reweight else zero + 1.0
            entropy_sum += tl.where(valid, entropy, 0.0)
            weighted_sum += tl.where(hard, weight * entropy, 0.0)
            hard_count += tl.where(hard, 1.0, 0.0)
            if STRIP.channels_in_lanes:
                valid_count += tl.where(valid & (program.channel == 0), 1.0, 0.0)
            kept = kept + (tl.where(hard, weight, 0.0),)
        if STORED:
            limit = tl.where(i >= SIZE - 1, maps.width, 0)
            out_row = Row(number=number, chunk=program.chunk, limit=limit)
            store_columns(stored, out_row, kept, STRIP)
    return StripSums(
        entropy=tl.sum(entropy_sum),
        weighted=tl.sum(weighted_sum),
        hard=tl.sum(hard_count),
        valid=tl.sum(valid_count),
    )


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    loss_ptr,  # []
    statistics_ptr,  # [2]: bce_weight / V, (1 - bce_weight) / M
    stored_ptr,  # [N, C, H, W]: e f, if STORED
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
    bce_weight,  # the sum of both, to the precision of float64
    bce_weight_rest,
    SAMPLING: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    STORED: tl.constexpr,
):
    """Reads logits and labels once, adds up the loss; writes e f if STORED."""
    RADIUS: tl.constexpr = WINDOW.size // 2
    IGNORED: tl.constexpr = SAMPLING.ignored
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    maps = Maps(
        logits=plane_of(logits_ptr, logits_strides, program, STRIP),
        target=label_plane_of(target_ptr, target_strides, program, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=window,
    )
    stored = plane_of(stored_ptr, stored_strides, program, STRIP)

    present = True
    if not STRIP.channels_in_lanes:
        present = _class_in_strip(maps, program, RADIUS, IGNORED, STRIP)
    if present:
        found = _forward_strip(maps, stored, program, SAMPLING, WINDOW, STRIP, STORED, True)
    else:
        found = _forward_strip(maps, stored, program, SAMPLING, WINDOW, STRIP, STORED, False)

    valid = found.valid
    if not STRIP.channels_in_lanes:
        if program.channel == 0:
            valid = _valid_in_strip(maps, program, IGNORED, STRIP).to(valid.dtype)

    sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=4)
    leave(sums, 0, found.entropy)
    leave(sums, 1, found.weighted)
    leave(sums, 2, found.hard)
    leave(sums, 3, valid)
    if comes_last(sums):
        share = tl.zeros((), tl.float64) + bce_weight + bce_weight_rest
        entropy_scale = share / tl.maximum(total(sums, 3), 1.0)
        weighted_scale = (1.0 - share) / tl.maximum(total(sums, 2), 1.0)
        tl.store(loss_ptr, entropy_scale * total(sums, 0) + weighted_scale * total(sums, 1))
        tl.store(statistics_ptr, entropy_scale)
        tl.store(statistics_ptr + 1, weighted_scale)


# --- backward -------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """Of the two parts of the gradient, which is (p - y) (entropy + weighted e f)."""

    entropy: Any
    weighted: Any


@triton.jit
def _residual(u, probability, belongs, PRESENT: tl.constexpr):
    """The residual p - y; for y = 1 as -sigmoid(-z), since p - 1 has no digits left near 1."""
    residual = probability
    if PRESENT:
        residual = tl.where(belongs, -sigmoid_base2(-u), probability)
    return residual


@triton.jit
def _backward_strip(
    scales, maps, grad, program, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """The gradient of one strip: (p - y) (a m + b e f)."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    history = empty_history(maps, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, maps.height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, pixels, history = next_row(
            i, history, maps, program, SAMPLING, WINDOW, STRIP, PRESENT
        )
        number = program.first_row + i - (SIZE - 1)
        gradient = ()
        for v in tl.static_range(COLUMNS):
            label = pixels.label[v]
            column = program.chunk * COLUMNS + v
            hard = _is_hard(
                differences[v], column, number, maps.height, maps.width, SAMPLING, WINDOW
            )
            # Where a pixel is not valid p = y = 0, and with them the gradient: but 0 times a NaN,
            # of a neighbour, would be one.
            hard = hard & (label >= 0)
            weight = tl.where(hard, differences[v] if SAMPLING.reweight else 1.0, 0.0)
            belongs = label == program.channel
            residual = _residual(pixels.scaled[v], pixels.probability[v], belongs, PRESENT)
            gradient = gradient + ((scales.entropy + scales.weighted * weight) * residual,)
        limit = tl.where(i >= SIZE - 1, maps.width, 0)
        out_row = Row(number=number, chunk=program.chunk, limit=limit)
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
    RADIUS: tl.constexpr = WINDOW.size // 2
    IGNORED: tl.constexpr = SAMPLING.ignored
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    maps = Maps(
        logits=plane_of(logits_ptr, logits_strides, program, STRIP),
        target=label_plane_of(target_ptr, target_strides, program, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=window,
    )
    grad = plane_of(grad_logits_ptr, grad_logits_strides, program, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    present = True
    if not STRIP.channels_in_lanes:
        present = _class_in_strip(maps, program, RADIUS, IGNORED, STRIP)
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
    maps = Maps(
        logits=plane_of(logits_ptr, logits_strides, program, STRIP),
        target=label_plane_of(target_ptr, target_strides, program, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=1,
    )
    stored = plane_of(stored_ptr, stored_strides, program, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    for i in tl.range(0, tl.minimum(STRIP.rows, height - program.first_row)):
        row = Row(number=program.first_row + i, chunk=program.chunk, limit=width)
        pixels = load_pixels(maps, row, IGNORED, STRIP, 0, COLUMNS, "zeros")
        weights = load_values(stored, row, STRIP, 0, COLUMNS, "zeros")
        gradient = ()
        for v in tl.static_range(COLUMNS):
            belongs = pixels.label[v] == program.channel
            residual = _residual(pixels.scaled[v], pixels.probability[v], belongs, True)
            gradient = gradient + ((scales.entropy + scales.weighted * weights[v]) * residual,)
        store_columns(stored, row, gradient, STRIP)
