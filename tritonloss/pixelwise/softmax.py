"""What losses of a softmax share: its statistics, class weights, and the slope of its gradients.

Saved are the largest logit, in the logits' dtype, and log2 of the sum of 2^((z - largest) log2 e):
their sum alone, the log-sum-exp, would lose the digits of every probability where all logits are
large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E
from .._engine.pixels import (
    class_of,
    for_classes,
    largest_of_lanes,
    load_entry,
    load_table,
    nothing_yet,
    sum_of_lanes,
)
from .._engine.planes import compute_dtype

_LOWEST = tl.constexpr(-3.0e38)


def softmax_saves(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of what is saved: the largest logit, which is one of the logits, and log2."""
    return dtype, compute_dtype(dtype)


class SoftmaxState(NamedTuple):
    """The statistics so far."""

    largest: Any
    total: Any  # sum of 2^((z - largest) log2 e)


class SoftmaxSaved(NamedTuple):
    """The statistics of a pixel."""

    largest: Any
    log_sum: Any  # log2 of the sum


class SoftmaxFactors(NamedTuple):
    """Of a pixel's gradient A p_k - B y_k - D w_k."""

    largest: Any
    log_sum: Any
    own: Any  # the class with y_k = 1
    all_classes: Any  # A
    own_class: Any  # B
    smooth: Any  # D


@triton.jit
def softmax_start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """No class yet."""
    return SoftmaxState(largest=nothing_yet(_LOWEST, TILE), total=nothing_yet(0.0, TILE))


@triton.jit
def softmax_add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The statistics with a block of classes, relative to the largest logit so far."""
    logits = block.logits
    largest = state.largest
    for j in tl.static_range(len(logits)):
        largest = tl.maximum(largest, logits[j])
    # Summed within the block first: one sum over a thousand classes would lose its last digits.
    total = tl.exp2((logits[0] - largest) * LOG2_E)
    for j in tl.static_range(1, len(logits)):
        total += tl.exp2((logits[j] - largest) * LOG2_E)
    total += state.total * tl.exp2((state.largest - largest) * LOG2_E)
    return SoftmaxState(largest=largest, total=total)


@triton.jit
def softmax_of_lanes(state, TILE: tl.constexpr):
    """The statistics of each pixel, [pixels]."""
    largest = largest_of_lanes(state.largest, TILE)
    beyond = state.largest - for_classes(largest, TILE)
    total = sum_of_lanes(state.total * tl.exp2(beyond * LOG2_E), TILE)
    return SoftmaxSaved(largest=largest, log_sum=tl.log2(total))


@triton.jit
def surprise(statistics, logit):
    """-log p of a logit."""
    return statistics.log_sum * LN_2 + (statistics.largest - logit)


@triton.jit
def softmax_factors(saved, pixel, all_classes, own_class, smooth, TILE: tl.constexpr):
    """The factors of A p_k - B y_k - D w_k, [pixels] each, for the slope."""
    largest, log_sum = saved
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    return SoftmaxFactors(
        largest=for_classes(largest.to(dtype), TILE),
        log_sum=for_classes(log_sum.to(dtype), TILE),
        own=for_classes(pixel.own, TILE),
        all_classes=for_classes(all_classes, TILE),
        own_class=for_classes(own_class, TILE),
        smooth=for_classes(smooth, TILE),
    )


@triton.jit
def softmax_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """A p_k - B y_k - D w_k."""
    scaled = (block.logits[SLOT] - factors.largest) * LOG2_E
    gradient = tl.exp2(scaled - factors.log_sum) * factors.all_classes
    is_own = class_of(block, SLOT, TILE) == factors.own
    gradient -= tl.where(is_own, factors.own_class, 0.0)
    if OPTIONS.smoothed:
        gradient -= factors.smooth * class_weight(given, block, SLOT, OPTIONS, TILE)
    return gradient


# --- class weights --------------------------------------------------------------------------------


@triton.jit
def class_weight(given, block, SLOT: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The weights of a slot's classes; 0 where a lane has no class left."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if OPTIONS.weighted:
        weight = load_table(given.own_table, block, SLOT, TILE)
    elif TILE.lanes == 1:
        weight = tl.full((), 1.0, dtype)
    else:
        weight = tl.where(block.exists[SLOT], 1.0, 0.0).to(dtype)
    return weight


@triton.jit
def own_weight(pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The weight of each pixel's own class, [pixels]; 1 if there are none."""
    if OPTIONS.weighted:
        result = load_entry(given.own_table, pixel.own, TILE)
    else:
        result = tl.full((TILE.pixels,), 1.0, tl.float64 if TILE.double else tl.float32)
    return result


@triton.jit
def sum_of_weights(given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The sum of all classes' weights."""
    CLASSES: tl.constexpr = TILE.classes
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if OPTIONS.weighted:
        index = tl.arange(0, triton.next_power_of_2(CLASSES))
        weights = tl.load(given.own_table + index, mask=index < CLASSES, other=0.0)
        result = tl.sum(weights.to(dtype))
    else:
        result = tl.full((), CLASSES, dtype)
    return result
