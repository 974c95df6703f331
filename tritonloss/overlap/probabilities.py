"""Probabilities of classes for losses of class sums: of a softmax, or of a sigmoid for each class.

The gradient to the logit of class k is p_k (G_k - sum of p_j G_j) of a softmax, with G the gradient
to the probabilities, and p_k (1 - p_k) G_k of sigmoids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._engine.class_sums import Probabilities
from .._engine.math import LOG2_E, inverse, negated, sigmoid_base2, sigmoids_base2
from .._engine.pixel_terms import Loss
from .._engine.pixels import (
    Record,
    always,
    for_classes,
    in_base2,
    is_own,
    largest_of_lanes,
    less_where,
    load_entry,
    load_table,
    no_lookups,
    sum_of_lanes,
)
from ..pixelwise.softmax import (
    SoftmaxState,
    exponent,
    exponent_of_largest,
    exponent_of_slot,
    softmax_add,
    softmax_again,
    softmax_bundles,
    softmax_of_lanes,
    softmax_saved,
    softmax_saves,
    softmax_slope,
    softmax_start,
)

# Classes of a lane that stay in registers, with two sums of each; logits of up to four pixels.
_HELD = 32
_MOST_STEPS = tl.constexpr(2)  # in which lanes that share a cell exchange: up to four of them


class _Shared(NamedTuple):
    """What the probabilities of a pixel's classes share: p = 2^((z - largest) log2 e) factor."""

    largest: Any
    factor: Any


class _Factors(NamedTuple):
    """What the slopes of a pixel's classes share, shaped to broadcast over them."""

    largest: Any
    own: Any  # the pixel's class
    own_gain: Any  # what is added to the number of that class
    other_gain: Any  # and of all others
    gain: Any  # after that number has been multiplied by this
    before: Any  # [pixels]: what the projection is made of
    taken: Any  # a tuple: what is taken from the own class's slope in the end, if anything is


class _Before(NamedTuple):
    """What the projection of a pixel is made of, [pixels]."""

    largest: Any
    factor: Any  # of the powers 2^((z - largest) log2 e)
    scale: Any
    own: Any  # what the pixel's own class gets on top


# --- softmax --------------------------------------------------------------------------------------


@triton.jit
def _softmax_share(state, TILE: tl.constexpr):
    """Relative to the largest logit of a lane's classes, whose powers are there already."""
    largest = for_classes(largest_of_lanes(state.largest, TILE), TILE)
    beyond = tl.exp2(exponent_of_largest(state.largest, largest, TILE))
    total = for_classes(sum_of_lanes(state.total * beyond, TILE), TILE)
    return _Shared(largest=state.largest, factor=beyond * inverse(total))


@triton.jit
def _softmax_join(state, PARTS: tl.constexpr, TILE: tl.constexpr):
    """With twice as many lanes in each step, so that all lanes of a pixel have the same sum."""
    FIRST: tl.constexpr = TILE.pixels // PARTS
    lane = tl.arange(0, TILE.pixels)
    largest = state.largest
    for k in tl.static_range(_MOST_STEPS):
        if 1 << k < PARTS:
            largest = tl.maximum(largest, tl.gather(largest, lane ^ (FIRST << k), 0))
    total = state.total * tl.exp2(exponent_of_largest(state.largest, largest, TILE))
    for k in tl.static_range(_MOST_STEPS):
        if 1 << k < PARTS:
            total += tl.gather(total, lane ^ (FIRST << k), 0)
    return SoftmaxState(largest=largest, bundle=state.bundle, total=total)


@triton.jit
def _softmax_share_of_part(state, joined, TILE: tl.constexpr):
    """Relative to the largest logit of the block, whose powers are there already."""
    beyond = tl.exp2(exponent_of_largest(state.largest, joined.largest, TILE))
    return _Shared(largest=state.largest, factor=beyond * inverse(joined.total))


@triton.jit
def _softmax_select(condition, state, other):
    return SoftmaxState(
        largest=tl.where(condition, state.largest, other.largest),
        bundle=other.bundle,  # nothing, of logits that are in no memory
        total=tl.where(condition, state.total, other.total),
    )


@triton.jit
def _softmax_factor(shared, block, TILE: tl.constexpr):
    return shared.factor


@triton.jit
def _softmax_power(shared, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    return tl.exp2(exponent(block.logits[SLOT], shared.largest, TILE))


@triton.jit
def _softmax_probability(shared, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    return _softmax_power(shared, block, SLOT, TILE) * shared.factor


@triton.jit
def _softmax_finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(nothing, nothing, the statistics)."""
    statistics = softmax_of_lanes(state, TILE)
    return own, own, softmax_saved(state, statistics, TILE)


@triton.jit
def _softmax_prepare(scale, saved, looked_up, pixel, given, TILE: tl.constexpr):
    statistics = softmax_again(saved, looked_up, pixel, TILE)
    if TILE.bundle == 0:
        # Interpolated logits have their log-sum-exp alone: powers are relative to that.
        largest = statistics.log_sum
        factor = tl.zeros_like(scale) + 1.0
    else:
        largest = statistics.largest
        factor = tl.exp2(-statistics.log_sum)
    before = _Before(
        largest=largest,
        factor=factor,
        scale=scale,
        own=load_entry(given.own_table, pixel.own, TILE),
    )
    return _projected(before, tl.zeros_like(scale), pixel.own, TILE)


@triton.jit
def _projected(before, projection, own, TILE: tl.constexpr):
    """The factors of the slopes p_k (G_k - projection)."""
    gain = before.factor * before.scale
    return _Factors(
        largest=for_classes(before.largest, TILE),
        own=for_classes(own, TILE),
        own_gain=for_classes(gain * (before.own - projection), TILE),
        other_gain=for_classes(-gain * projection, TILE),
        gain=for_classes(gain, TILE),
        before=before,
        taken=(),
    )


@triton.jit
def _power(factors, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    return tl.exp2(exponent_of_slot(block, SLOT, factors.largest, TILE))


@triton.jit
def _softmax_term(factors, block, SLOT: tl.constexpr, given, TILE: tl.constexpr):
    return _power(factors, block, SLOT, TILE) * load_table(given.other_table, block, SLOT, TILE)


@triton.jit
def _softmax_projection(factors, total, own, pixel, TILE: tl.constexpr):
    """The sum of p_j G_j, from the sum over powers and the logit of each pixel's own class."""
    before = factors.before
    own_power = tl.exp2(exponent(own, before.largest, TILE))
    of_own = tl.where(pixel.own >= 0, own_power * before.own, 0.0)
    return before.factor * (total + of_own)


@triton.jit
def _softmax_project(factors, projection, pixel, TILE: tl.constexpr):
    return _projected(factors.before, projection, pixel.own, TILE)


@triton.jit
def _softmax_factors(
    scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """The factors with a projection, if it is saved after the statistics."""
    if len(saved) == 1:
        factors = _softmax_prepare(scale, saved, looked_up, pixel, given, TILE)
    else:
        log_sum, projection = saved
        factors = _softmax_prepare(scale, (log_sum,), looked_up, pixel, given, TILE)
        # Of a pixel that is not valid anything may be saved, but the slopes have to be 0.
        projection = tl.where(pixel.label >= 0, projection, 0.0)
        factors = _softmax_project(factors, projection, pixel, TILE)
    return factors


@triton.jit
def _gain(factors, block, SLOT: tl.constexpr, given, TILE: tl.constexpr):
    """What a slot's probabilities, or powers, are multiplied by."""
    here = is_own(factors.own, block, SLOT, TILE)
    added = tl.where(here, factors.own_gain, factors.other_gain)
    return load_table(given.other_table, block, SLOT, TILE) * factors.gain + added


@triton.jit
def _softmax_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    return _power(factors, block, SLOT, TILE) * _gain(factors, block, SLOT, given, TILE)


@triton.jit
def _softmax_product(factors, block, SLOT: tl.constexpr, given, TILE: tl.constexpr):
    """A slot's p_k G_k - B y_k. The pixelwise loss that is taken in has A = B."""
    here = is_own(factors.own, block, SLOT, TILE)
    power = _power(factors, block, SLOT, TILE)
    other = load_table(given.other_table, block, SLOT, TILE)
    own = other + load_table(given.own_table, block, SLOT, TILE)
    product = power * (other * factors.gain)
    # Under a condition of its own, so that it takes no selection besides.
    if len(factors.taken) == 0:
        more = power * (own * factors.gain)
    else:
        more = tl.fma(power, own * factors.gain, negated(factors.taken[0]))
    return tl.where(here, more, product)


@triton.jit
def _softmax_less(factors, total, TILE: tl.constexpr):
    """The factors with the sum of all products: that of p_j G_j, less A.

    The slope p_k (G_k - sum of p_j G_j) + A p_k - B y_k is then the product less p_k times that.
    """
    return _Factors(
        largest=factors.largest,
        own=factors.own,
        own_gain=factors.own_gain,
        other_gain=negated(total),
        gain=factors.gain,
        before=factors.before,
        taken=factors.taken,
    )


@triton.jit
def _softmax_product_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """A slot's product less the probability times the sum of all products."""
    product = _softmax_product(factors, block, SLOT, given, TILE)
    return tl.fma(_power(factors, block, SLOT, TILE), factors.other_gain, product)


@triton.jit
def _softmax_take_in(factors, other, TILE: tl.constexpr):
    """The factors with those of a loss whose slopes are A p_k - B y_k."""
    gain = for_classes(factors.before.factor, TILE) * other.all_classes
    taken = other.own_class
    if len(factors.taken) > 0:
        taken += factors.taken[0]
    return _Factors(
        largest=factors.largest,
        own=factors.own,
        own_gain=factors.own_gain + gain,
        other_gain=factors.other_gain + gain,
        gain=factors.gain,
        before=factors.before,
        taken=(taken,),
    )


@triton.jit
def _softmax_joint_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    gradient = _softmax_slope(factors, block, SLOT, given, OPTIONS, TILE)
    return less_where(is_own(factors.own, block, SLOT, TILE), gradient, factors.taken[0])


SOFTMAX = Probabilities(
    True,
    _softmax_share,
    _softmax_join,
    _softmax_share_of_part,
    _softmax_select,
    _softmax_probability,
    _softmax_power,
    _softmax_factor,
    _softmax_prepare,
    _softmax_term,
    _softmax_projection,
    _softmax_project,
    softmax_slope,
    _softmax_take_in,
    _softmax_joint_slope,
    _softmax_product,
    _softmax_less,
    _softmax_product_slope,
)

# --- sigmoid --------------------------------------------------------------------------------------


class _Nothing(NamedTuple):
    """No state: the probability of a class depends on no other class."""

    nothing: Any


@triton.jit
def _sigmoid_start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    return _Nothing(nothing=0)


@triton.jit
def _sigmoid_add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    return state


@triton.jit
def _sigmoid_finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(nothing, nothing, nothing saved)."""
    return own, own, ()


@triton.jit
def _sigmoid_share(state, TILE: tl.constexpr):
    return state


@triton.jit
def _sigmoid_join(state, PARTS: tl.constexpr, TILE: tl.constexpr):
    return state


@triton.jit
def _sigmoid_share_of_part(state, joined, TILE: tl.constexpr):
    return state


@triton.jit
def _sigmoid_select(condition, state, other):
    return state


@triton.jit
def _sigmoid_probability(shared, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    return sigmoid_base2(block.logits[SLOT] * LOG2_E)


@triton.jit
def _sigmoid_power(shared, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    return 2.0 * _sigmoid_probability(shared, block, SLOT, TILE)


@triton.jit
def _sigmoid_factor(shared, block, TILE: tl.constexpr):
    return tl.zeros_like(block.logits[0]) + 0.5


@triton.jit
def _sigmoid_prepare(scale, saved, looked_up, pixel, given, TILE: tl.constexpr):
    own_gain = scale * load_entry(given.own_table, pixel.own, TILE)
    return _Factors(
        largest=(),
        own=for_classes(pixel.own, TILE),
        own_gain=for_classes(own_gain, TILE),
        other_gain=for_classes(tl.zeros_like(scale), TILE),
        gain=for_classes(scale, TILE),
        before=(),
        taken=(),
    )


@triton.jit
def _sigmoid_term(factors, block, SLOT: tl.constexpr, given, TILE: tl.constexpr):
    return block.logits[SLOT]


@triton.jit
def _sigmoid_projection(factors, total, own, pixel, TILE: tl.constexpr):
    return own


@triton.jit
def _sigmoid_project(factors, projection, pixel, TILE: tl.constexpr):
    return factors


@triton.jit
def _sigmoid_factors(
    scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    return _sigmoid_prepare(scale, saved, looked_up, pixel, given, TILE)


@triton.jit
def _sigmoid_slope(
    factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    p, rest = sigmoids_base2(in_base2(block, SLOT))
    return p * rest * _gain(factors, block, SLOT, given, TILE)


SIGMOID = Probabilities(
    False,
    _sigmoid_share,
    _sigmoid_join,
    _sigmoid_share_of_part,
    _sigmoid_select,
    _sigmoid_probability,
    _sigmoid_power,
    _sigmoid_factor,
    _sigmoid_prepare,
    _sigmoid_term,
    _sigmoid_projection,
    _sigmoid_project,
)


def _saves_nothing(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return ()


# The losses as walks know them, by their activation. Both have the configurations of the softmax,
# which takes more registers.
LOSSES = {
    "softmax": Loss(
        "class_sums",
        Record(
            softmax_start,
            softmax_add,
            _softmax_finish,
            _softmax_factors,
            _softmax_slope,
            no_lookups,
            softmax_bundles,
            silent=always,  # the probabilities of a pixel that is not valid are 0
        ),
        saved=softmax_saves,
        scaled=True,
        of_logits=True,
        held=_HELD,
        held_back=_HELD,
        held_wide=_HELD,
    ),
    "sigmoid": Loss(
        "class_sums",
        Record(
            _sigmoid_start,
            _sigmoid_add,
            _sigmoid_finish,
            _sigmoid_factors,
            _sigmoid_slope,
            no_lookups,
        ),
        saved=_saves_nothing,
        held=_HELD,
        held_back=_HELD,
        held_wide=_HELD,
        binary=True,
    ),
}
PROBABILITIES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
