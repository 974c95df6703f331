"""The record of the margin-calibrated loss: its device functions.

Let a be the class of a pixel's largest score and b that of the next; of equal scores the first is
the larger. The margin of a class is z_k - z_a, and that of a itself z_a - z_b. The penalty of every
class is a function of an offset rho and of mu, which is -margin for the pixel's own class and
margin for the other classes:

    paper       log2(1 + 2^(mu + rho))
    released    log(1 + e^(mu + rho)), divided by C for the other classes
    margin      min(1, max(0, 1 + mu / rho))

With u_k the derivatives by the margins, dz_k = u_k - [k = a] sum_{j != a} u_j - [k = b] u_a. The
sum takes one pass over the classes and the gradient another. a, b and the sum are saved. They are 8
bytes per pixel (12 for float64), written and read once: 16 bytes of traffic. To find them again,
the backward pass would have to go through the logits three times instead of once, 2 L more from the
cache or the memory. It would also spend 30 instructions more per pixel and class (10 for the top
two, 20 for the sum; counted for sm_90), beside the 18 that the gradient takes. z_a and z_b, which
the gradient needs as well, are looked up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E, inverse, log2_one_plus, sigmoid_base2, softplus_base2
from .._engine.pixels import (
    Record,
    class_of,
    for_classes,
    largest_of_lanes,
    load_entry,
    load_table,
    no_class_yet,
    nothing_yet,
    smallest_of_lanes,
    sum_of_lanes,
)

_NO_CLASS = tl.constexpr(1 << 30)


class Compiled(NamedTuple):
    """What of the options a kernel is compiled for."""

    variant: str
    own_share: float  # what the penalty of the pixel's own class is multiplied by
    other_share: float  # what the penalties of the other classes are multiplied by
    saved: bool  # whether the sum of the derivatives is wanted


class _TopTwo(NamedTuple):
    """The two largest scores so far, and their classes: [pixels], or [pixels, lanes]."""

    largest: Any
    second: Any
    best: Any
    runner_up: Any


class _Penalties(NamedTuple):
    """What the second pass adds up, beside what the first has found."""

    penalties: Any
    slopes: Any
    largest: Any  # [pixels], as all below
    second: Any
    best: Any
    runner_up: Any


class _Factors(NamedTuple):
    """What the slopes of a pixel's classes share."""

    largest: Any
    own: Any
    best: Any
    runner_up: Any
    other_share: Any
    of_own: Any
    of_best: Any
    of_runner_up: Any


# --- penalties ------------------------------------------------------------------------------------


@triton.jit
def _exponent(mu, rho, OPTIONS: tl.constexpr):
    """The x for which the penalty is log(1 + 2^x), up to a factor."""
    x = mu + rho
    if OPTIONS.variant == "released":
        x = x * LOG2_E
    return x


@triton.jit
def _ramp(mu, rho):
    """1 - |mu| / rho between mu = -rho and 0; a NaN stays one, and rho = 0 is a step."""
    inside = 1.0 + mu * inverse(rho)
    return tl.where(mu >= 0, 1.0, tl.where(mu <= -rho, 0.0, inside))


@triton.jit
def _penalty(mu, rho, OPTIONS: tl.constexpr):
    """The penalty of one class, before its share."""
    if OPTIONS.variant == "margin":
        result = _ramp(mu, rho)
    elif OPTIONS.variant == "paper":
        result = softplus_base2(_exponent(mu, rho, OPTIONS)) * LOG2_E
    else:
        result = softplus_base2(_exponent(mu, rho, OPTIONS))
    return result


@triton.jit
def _penalty_slope(mu, rho, OPTIONS: tl.constexpr):
    """The derivative by mu of the penalty of one class, before its share."""
    if OPTIONS.variant == "margin":
        slope = tl.where((mu >= 0) | (mu <= -rho), 0.0, inverse(rho))
    else:
        slope = sigmoid_base2(_exponent(mu, rho, OPTIONS))
    return slope


# --- the passes over the classes ------------------------------------------------------------------


@triton.jit
def _start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    nothing = nothing_yet(float("-inf"), TILE)
    no_class = no_class_yet(TILE)
    return _TopTwo(largest=nothing, second=nothing, best=no_class, runner_up=no_class)


@triton.jit
def _add_to_top_two(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The two largest scores with a block of classes.

    A NaN is never larger than a score here, so that two classes are always found. With tl.maximum
    it would depend on the version and the device whether a NaN came through.
    """
    largest, second, best, runner_up = state
    for j in tl.static_range(len(block.logits)):
        z = block.logits[j]
        index = class_of(block, j, TILE)
        beats_second = z > second
        beats_largest = z > largest
        runner_up = tl.where(beats_second, index, runner_up)
        runner_up = tl.where(beats_largest, best, runner_up)
        best = tl.where(beats_largest, index, best)
        second = tl.where(beats_second, z, second)
        second = tl.where(beats_largest, largest, second)
        largest = tl.where(beats_largest, z, largest)
    return _TopTwo(largest=largest, second=second, best=best, runner_up=runner_up)


@triton.jit
def _top_two_of_lanes(state, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The state before the second pass, from the top two of all lanes."""
    largest, second, best, runner_up = state
    top = largest_of_lanes(largest, TILE)
    here = tl.where(largest == for_classes(top, TILE), best, _NO_CLASS)
    top_class = smallest_of_lanes(here, TILE)
    if TILE.lanes > 1:
        # A lane's own best is a candidate for the second place unless it is the best of all.
        is_top = best == for_classes(top_class, TILE)
        rival = tl.where(is_top, second, largest)
        rival_class = tl.where(is_top, runner_up, best)
        second = tl.max(rival, axis=1)
        here = tl.where(rival == second[:, None], rival_class, _NO_CLASS)
        runner_up = tl.min(here, axis=1)
    # If all other classes are -inf, none has been larger than the start, and the runner-up is still
    # class 0: it must be another class than the best.
    first_other = tl.where(top_class == 0, 1, 0)
    runner_up = tl.where(runner_up == top_class, first_other, runner_up)
    zero = nothing_yet(0.0, TILE)
    return _Penalties(
        penalties=zero, slopes=zero, largest=top, second=second, best=top_class,
        runner_up=runner_up,
    )  # fmt: skip


@triton.jit
def _add_penalties(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Penalties and slopes with the classes that are neither the pixel's own nor its best.

    The penalties of those two are added once per pixel, in _finish. Added here and taken away
    again, they would cost a confident pixel all of its digits.
    """
    largest = for_classes(state.largest, TILE)
    own_class = for_classes(pixel.own, TILE)
    best_class = for_classes(state.best, TILE)
    # Summed within the block first: one sum over a thousand classes would lose its last digits.
    linear = tl.zeros_like(state.penalties)
    rest = tl.zeros_like(state.penalties)
    slope = tl.zeros_like(state.slopes)
    for j in tl.static_range(len(block.logits)):
        index = class_of(block, j, TILE)
        left_out = (index == own_class) | (index == best_class)
        mu = tl.where(left_out, float("-inf"), block.logits[j] - largest)
        rho = load_table(given.other_table, block, j, TILE)
        if OPTIONS.variant == "margin":
            linear += _ramp(mu, rho)
            if OPTIONS.saved:
                slope += _penalty_slope(mu, rho, OPTIONS)
        else:
            x = _exponent(mu, rho, OPTIONS)
            t = tl.exp2(-tl.abs(x))
            linear += tl.maximum(x, 0.0)
            # One logarithm for all of the block, as in the binary cross entropy.
            rest = tl.fma(rest, t, rest + t)
            if OPTIONS.saved:
                near = inverse(1.0 + t)
                slope += tl.where(x >= 0, near, t * near)
    if OPTIONS.variant == "margin":
        penalties = state.penalties + linear
    elif OPTIONS.variant == "paper":
        penalties = state.penalties + (linear + log2_one_plus(rest))
    else:
        penalties = state.penalties + (linear + log2_one_plus(rest)) * LN_2
    return _Penalties(
        penalties=penalties, slopes=state.slopes + slope, largest=state.largest,
        second=state.second, best=state.best, runner_up=state.runner_up,
    )  # fmt: skip


# --- once per pixel -------------------------------------------------------------------------------


@triton.jit
def _finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(sum of penalties, 1, saved); saved are a and b in 16 bits each, and sum u_j for j != a."""
    own_is_best = pixel.own == state.best
    own_mu = tl.where(own_is_best, state.second - state.largest, state.largest - own)
    own_rho = load_entry(given.own_table, pixel.own, TILE)
    best_mu = state.largest - state.second
    best_rho = load_entry(given.other_table, state.best, TILE)
    others = sum_of_lanes(state.penalties, TILE)
    others += tl.where(own_is_best, 0.0, _penalty(best_mu, best_rho, OPTIONS))
    loss = OPTIONS.own_share * _penalty(own_mu, own_rho, OPTIONS) + OPTIONS.other_share * others

    slope = sum_of_lanes(state.slopes, TILE)
    if OPTIONS.saved:
        own_slope = OPTIONS.own_share * _penalty_slope(own_mu, own_rho, OPTIONS)
        slope = OPTIONS.other_share * slope - tl.where(own_is_best, 0.0, own_slope)
        # A NaN in the saved sum tells the backward pass that the loss of the pixel is NaN.
        slope = tl.where(loss == loss, slope, loss)
    return loss, tl.zeros_like(loss) + 1.0, (state.best | (state.runner_up << 16), slope)


@triton.jit
def _lookups(saved, pixel, TILE: tl.constexpr):
    """(best class, the next, the pixel's own), -1 where there is none."""
    classes, _ = saved
    best = tl.where(pixel.inside, classes & 0xFFFF, -1)
    runner_up = tl.where(pixel.inside, (classes >> 16) & 0xFFFF, -1)
    return best, runner_up, pixel.own


@triton.jit
def _factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """What the slopes u_k - [k = a] sum_{j != a} u_j - [k = b] u_a share.

    Where the loss is NaN the scale is NaN, and with it the gradient of all classes.
    """
    best, runner_up, own = _lookups(saved, pixel, TILE)
    largest, second, score = looked_up
    _, slope = saved
    slope = tl.where(pixel.label >= 0, slope.to(largest.dtype), 0.0)
    scale = tl.where(slope == slope, scale, slope)

    own_is_best = own == best
    own_mu = tl.where(own_is_best, second - largest, largest - score)
    own_rho = load_entry(given.own_table, own, TILE)
    of_own = -scale * OPTIONS.own_share * _penalty_slope(own_mu, own_rho, OPTIONS)
    best_rho = load_entry(given.other_table, best, TILE)
    best_slope = _penalty_slope(largest - second, best_rho, OPTIONS)
    other_share = scale * OPTIONS.other_share
    u_best = tl.where(own_is_best, of_own, other_share * best_slope)
    return _Factors(
        largest=for_classes(largest, TILE),
        own=for_classes(own, TILE),
        best=for_classes(best, TILE),
        runner_up=for_classes(runner_up, TILE),
        other_share=for_classes(other_share, TILE),
        of_own=for_classes(of_own, TILE),
        of_best=for_classes(u_best - scale * slope, TILE),
        of_runner_up=for_classes(u_best, TILE),
    )


@triton.jit
def _slope(factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The gradient of a slot: u_k, and what a and b get from the margins of the other classes."""
    index = class_of(block, SLOT, TILE)
    rho = load_table(given.other_table, block, SLOT, TILE)
    mu = block.logits[SLOT] - factors.largest
    gradient = _penalty_slope(mu, rho, OPTIONS) * factors.other_share
    gradient = tl.where(index == factors.own, factors.of_own, gradient)
    gradient = tl.where(index == factors.best, factors.of_best, gradient)
    return gradient - tl.where(index == factors.runner_up, factors.of_runner_up, 0.0)


MARGINS = Record(
    _start, _add_to_top_two, _finish, _factors, _slope, _lookups, join=_top_two_of_lanes,
    add_again=_add_penalties,
)  # fmt: skip
