"""What losses of a softmax share: its statistics, class weights, and the slope of its gradients.

The backward pass needs two statistics of a pixel: the largest logit, and the log2 of the sum of
2^((z - largest) log2 e). Their sum alone, the log-sum-exp, would lose the digits of every
probability where all logits are large. Up to 256 classes, four bytes per pixel hold both. Five bits
are the number of the bundle in which the backward pass finds the largest logit again. The other 27
hold the logarithm, from 0 to log2 C, in fixed point, with as many digits as it has in float32. With
more classes, and in float64, the two numbers are saved as they are.

Of interpolated logits the log-sum-exp is saved alone, four bytes per pixel. They are in no memory,
and to find the largest again would take a second pass over the classes. Rounded to float32, the
log-sum-exp is off by up to 2^-24 of itself, and every probability is off by as much: 2e-6 if the
logits are about 30. The interpolation rounds the logits themselves by that much. A pixel that is
sure loses nothing: its log-sum-exp is the largest logit, to the last bit of both, since both passes
interpolate logits times log2 e and only subtract from them (``Tile.scaled``). A second number would
do as much for all others, and double the memory per pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E, log2_normal, negated
from .._engine.pixels import (
    first_of_slot,
    for_classes,
    is_own,
    largest_of_lanes,
    less_where,
    load_entry,
    load_table,
    no_class_yet,
    nothing_yet,
    smallest_of_lanes,
    sum_of_lanes,
)
from .._engine.planes import compute_dtype

_LOWEST = tl.constexpr(-2.0e38)  # log2 e times it is a number as well
_NO_CLASS = tl.constexpr(1 << 30)
_PACKED_CLASSES = tl.constexpr(256)
_ONE = tl.constexpr(2.0**24)  # 1 in fixed point
_MOST = tl.constexpr(2.0**27 - 8)  # float32 has no number between it and 2^27
_NAN = tl.constexpr((1 << 27) - 1)  # all 27 bits: stands for NaN
_BUNDLES = tl.constexpr(32)  # as many numbers as five bits hold


def softmax_saves(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    """The dtypes of the saved maps: both statistics in one number, or one after the other."""
    if interpolated:
        return (compute_dtype(logits.dtype),)
    if logits.size(1) <= _PACKED_CLASSES.value and logits.dtype != torch.float64:
        return (torch.int32,)
    return logits.dtype, compute_dtype(logits.dtype)


class SoftmaxState(NamedTuple):
    """The statistics so far: [pixels], or [pixels, lanes]."""

    largest: Any  # as ``reference`` has it, here and below
    bundle: Any  # the first class of a slot of the bundle that holds the largest
    total: Any  # sum of 2^((z - largest) log2 e)


class SoftmaxStatistics(NamedTuple):
    """The statistics of each pixel, [pixels]."""

    largest: Any
    log_sum: Any  # log2 of the sum of 2^((z - largest) log2 e)


class SoftmaxFactors(NamedTuple):
    """The factors of a pixel's gradient A p_k - B y_k - D w_k."""

    largest: Any
    log_sum: Any
    own: Any  # the class with y_k = 1
    all_classes: Any  # A
    own_class: Any  # B
    smooth: Any  # D


# --- relative to the largest logit ----------------------------------------------------------------
# Logits in memory are held as they are. Interpolated ones have been multiplied by log2 e before,
# or, where a loss beside the softmax wants them as they are, the largest one is, once per block:
# its rounding moves all classes of the pixel alike, and so nothing.


@triton.jit
def reference(logit, TILE: tl.constexpr):
    """A logit as the largest one is held."""
    return logit * LOG2_E if TILE.bundle == 0 and not TILE.scaled else logit


@triton.jit
def exponent(logit, largest, TILE: tl.constexpr):
    """(z - largest) log2 e."""
    if TILE.scaled:
        result = logit - largest
    elif TILE.bundle == 0:
        result = tl.fma(logit, tl.full((), LOG2_E, logit.dtype), negated(largest))
    else:
        result = (logit - largest) * LOG2_E
    return result


@triton.jit
def exponent_of_slot(block, SLOT: tl.constexpr, largest, TILE: tl.constexpr):
    """(z - largest) log2 e of a slot's logits."""
    if len(block.base2) > 0:
        result = block.base2[SLOT] - largest
    else:
        result = exponent(block.logits[SLOT], largest, TILE)
    return result


@triton.jit
def exponent_of_largest(before, largest, TILE: tl.constexpr):
    """``exponent`` of what was the largest logit before."""
    apart = before - largest
    return apart if TILE.bundle == 0 else apart * LOG2_E


# --- statistics -----------------------------------------------------------------------------------


@triton.jit
def softmax_start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The statistics before the first class."""
    return SoftmaxState(
        largest=nothing_yet(_LOWEST, TILE), bundle=no_class_yet(TILE), total=nothing_yet(0.0, TILE)
    )


@triton.jit
def softmax_add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The statistics with a block of classes, relative to the largest logit so far."""
    SLOTS: tl.constexpr = TILE.slots
    logits = block.logits
    largest = state.largest
    bundle = state.bundle
    for first in tl.static_range(0, len(logits), SLOTS):
        largest_here = logits[first]
        for j in tl.static_range(first + 1, first + SLOTS):
            if j < len(logits):
                largest_here = tl.maximum(largest_here, logits[j])
        largest_here = reference(largest_here, TILE)
        bundle = tl.where(largest_here > largest, first_of_slot(block, first, TILE), bundle)
        largest = tl.maximum(largest, largest_here)
    # Summed within the block first: one sum over a thousand classes would lose its last digits.
    total = tl.exp2(exponent(logits[0], largest, TILE))
    for j in tl.static_range(1, len(logits)):
        total += tl.exp2(exponent(logits[j], largest, TILE))
    total += state.total * tl.exp2(exponent_of_largest(state.largest, largest, TILE))
    return SoftmaxState(largest=largest, bundle=bundle, total=total)


@triton.jit
def softmax_of_lanes(state, TILE: tl.constexpr):
    """The statistics of each pixel, [pixels]."""
    largest = largest_of_lanes(state.largest, TILE)
    total = state.total
    if TILE.lanes > 1:
        beyond = exponent_of_largest(state.largest, for_classes(largest, TILE), TILE)
        total = sum_of_lanes(total * tl.exp2(beyond), TILE)
    # It is about 1 at least, for the largest logit, unless no class has a logit above -inf.
    log_sum = tl.where(total > 0, log2_normal(total), float("nan"))
    return SoftmaxStatistics(largest=largest, log_sum=log_sum)


@triton.jit
def softmax_saved(state, statistics, TILE: tl.constexpr):
    """What is saved of each pixel: a tuple of one or two maps, [pixels] each."""
    if TILE.bundle == 0:
        saved = (statistics.largest + statistics.log_sum,)
    elif TILE.classes > _PACKED_CLASSES or TILE.double:
        saved = (statistics.largest, statistics.log_sum)
    else:
        is_largest = state.largest == for_classes(statistics.largest, TILE)
        bundle = smallest_of_lanes(tl.where(is_largest, state.bundle, _NO_CLASS), TILE)
        # The sum is at least 1, for the largest logit: a logarithm that is not at least 0 is NaN.
        is_number = statistics.log_sum >= 0
        fixed = tl.minimum(statistics.log_sum * _ONE + 0.5, _MOST)
        fixed = tl.where(is_number, tl.where(is_number, fixed, 0.0).to(tl.int32), _NAN)
        number = (bundle // TILE.bundle) & (_BUNDLES - 1)
        saved = ((fixed << 5) | number,)
    return saved


@triton.jit
def softmax_bundles(saved, pixel, TILE: tl.constexpr):
    """The number of the bundle with the largest logit, unless that logit itself is saved."""
    if TILE.bundle == 0 or TILE.classes > _PACKED_CLASSES or TILE.double:
        bundles = ()
    else:
        (word,) = saved
        bundles = (word & (_BUNDLES - 1),)
    return bundles


@triton.jit
def softmax_again(saved, looked_up, pixel, TILE: tl.constexpr):
    """The statistics of each pixel, from what is saved and the largest logit of its bundle."""
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if TILE.bundle == 0:
        (log_sum,) = saved
        # Of a pixel that is not valid every probability is 0.
        log_sum = tl.where(pixel.label >= 0, log_sum, float("inf"))
        largest = tl.zeros_like(log_sum)
    elif TILE.classes > _PACKED_CLASSES or TILE.double:
        largest, log_sum = saved
        largest = largest.to(dtype)
        log_sum = log_sum.to(dtype)
    else:
        (word,) = saved
        largest = looked_up[0]
        fixed = (word >> 5) & _NAN
        log_sum = tl.where(fixed == _NAN, float("nan"), fixed.to(dtype) * (1 / _ONE))
    return SoftmaxStatistics(largest=largest, log_sum=log_sum)


@triton.jit
def surprise(statistics, logit, TILE: tl.constexpr):
    """-log p of each pixel's ``logit``, [pixels]."""
    if TILE.bundle == 0:
        result = (statistics.log_sum - exponent(logit, statistics.largest, TILE)) * LN_2
    else:
        result = statistics.log_sum * LN_2 + (statistics.largest - logit)
    return result


@triton.jit
def softmax_factors(statistics, pixel, all_classes, own_class, smooth, TILE: tl.constexpr):
    """The factors of A p_k - B y_k - D w_k, [pixels] each, for the slope."""
    return SoftmaxFactors(
        largest=for_classes(statistics.largest, TILE),
        log_sum=for_classes(statistics.log_sum, TILE),
        own=for_classes(pixel.own, TILE),
        all_classes=for_classes(all_classes, TILE),
        own_class=for_classes(own_class, TILE),
        smooth=for_classes(smooth, TILE),
    )


def softmax_is_silent(options: Any) -> bool:
    """Whether the slope is 0 at pixels that are not valid: their probabilities are."""
    return not options.smoothed


@triton.jit
def softmax_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of a slot's logits: A p_k - B y_k - D w_k."""
    if TILE.bundle == 0:  # relative to the log-sum-exp
        power = tl.exp2(exponent_of_slot(block, SLOT, factors.log_sum, TILE))
    else:
        scaled = (block.logits[SLOT] - factors.largest) * LOG2_E
        power = tl.exp2(scaled - factors.log_sum)
    gradient = power * factors.all_classes
    here = is_own(factors.own, block, SLOT, TILE)
    if len(block.owned) == 0:
        gradient -= tl.where(here, factors.own_class, 0.0)
    else:
        gradient = less_where(here, gradient, factors.own_class)
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
    """The weight of each pixel's own class, [pixels]; 1 if there are no weights."""
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
