"""Device functions of the margin-calibrated losses: a pair, as ``_pixels.py`` asks for.

With a the class of the largest score of a pixel and b that of the next (the first of equals), the
margin of a class is z_k - z_a, and that of a itself z_a - z_b. Every class's penalty is a function
of mu = margin for the other classes, mu = -margin for the pixel's own, and of an offset rho:

    paper       log2(1 + 2^(mu + rho))
    released    log(1 + e^(mu + rho)), divided by C for the other classes
    margin      min(1, max(0, 1 + mu / rho))

With u_k the derivatives by the margins, dz_k = u_k - [k = a] sum_{j != a} u_j - [k = b] u_a. The
sum takes one pass over the classes and the gradient another. Saved are a, b and the sum, 8 bytes
per pixel (12 for float64), written and read once: 16 bytes of traffic. To find them again, the
backward pass would have to go through the logits three times instead of once, 2 L more from the
cache or the memory, and spend 30 instructions more per pixel and class (10 for the top two, 20 for
the sum; counted for sm_90) on the 18 that the gradient takes. z_a and z_b, which it needs as well,
are looked up.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E, inverse, log_one_plus, sigmoid_base2, softplus_base2
from .._engine.pixels import (
    class_of,
    fold_classes_twice,
    for_classes,
    largest_of_lanes,
    load_class,
    load_entry,
    load_table,
    nothing_yet,
    smallest_of_lanes,
    sum_of_lanes,
    write_gradients,
)

_NO_CLASS = tl.constexpr(1 << 30)


class Options(NamedTuple):
    """The options of the loss; known when a kernel is compiled."""

    variant: str
    own_share: float  # of a penalty in the loss: that of the pixel's own class
    other_share: float
    saved: bool  # the sum of the derivatives is wanted


# --- penalties ------------------------------------------------------------------------------------


@triton.jit
def _exponent(mu, rho, OPTIONS: tl.constexpr):
    """The x of which log(1 + 2^x) is the penalty, up to a factor."""
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
    """Its derivative by mu."""
    if OPTIONS.variant == "margin":
        slope = tl.where((mu >= 0) | (mu <= -rho), 0.0, inverse(rho))
    else:
        slope = sigmoid_base2(_exponent(mu, rho, OPTIONS))
    return slope


# --- passes over the classes ----------------------------------------------------------------------


@triton.jit
def _add_to_top_two(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(largest, next, class of the largest, class of the next) with a block of classes.

    A NaN beats nothing, so that two classes are always found; tl.maximum would leave it to the
    version and the device whether one came through.
    """
    largest, second, best, runner_up = state
    for j in tl.static_range(COUNT):
        z = values[j]
        index = class_of(start, j, TILE)
        beats_second = z > second
        beats_largest = z > largest
        runner_up = tl.where(beats_second, index, runner_up)
        runner_up = tl.where(beats_largest, best, runner_up)
        best = tl.where(beats_largest, index, best)
        second = tl.where(beats_second, z, second)
        second = tl.where(beats_largest, largest, second)
        largest = tl.where(beats_largest, z, largest)
    return largest, second, best, runner_up


@triton.jit
def _top_two_of_lanes(state, dtype: tl.constexpr, TILE: tl.constexpr):
    """The start of the second pass: (penalties, slopes, largest, next, best, runner-up)."""
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
    # With -inf in all other classes none has ever beaten the start.
    first_other = tl.where(top_class == 0, 1, 0)
    runner_up = tl.where(runner_up == top_class, first_other, runner_up)
    zero = nothing_yet(0.0, dtype, TILE)
    return zero, zero, top, second, top_class, runner_up


@triton.jit
def _add_penalties(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add penalties and slopes of the classes that are neither the pixel's own nor its best.

    Those two are added once per pixel; added here and taken away again, a confident pixel would
    lose all of its digits.
    """
    penalties, slopes, top, second, best, runner_up = state
    largest = for_classes(top, TILE)
    own_class = for_classes(pixel.own, TILE)
    best_class = for_classes(best, TILE)
    # Summed within the block first, lest sums over many classes lose their last digits.
    linear = tl.zeros_like(penalties)
    rest = tl.zeros_like(penalties)
    slope = tl.zeros_like(slopes)
    for j in tl.static_range(COUNT):
        index = class_of(start, j, TILE)
        left_out = (index == own_class) | (index == best_class)
        mu = tl.where(left_out, float("-inf"), values[j] - largest)
        rho = load_table(given.other_table, start, j, LEFT, dtype, TILE)
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
        penalties += linear
    elif OPTIONS.variant == "paper":
        penalties += linear + log_one_plus(rest) * LOG2_E
    else:
        penalties += linear * LN_2 + log_one_plus(rest)
    return penalties, slopes + slope, top, second, best, runner_up


# --- the pair -------------------------------------------------------------------------------------


@triton.jit
def margin_forward(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The sum of all classes' penalties; saved: a and b in 16 bits each, sum of u_j for j != a."""
    nothing = nothing_yet(float("-inf"), dtype, TILE)
    no_class = nothing_yet(0, tl.int32, TILE)
    state = (nothing, nothing, no_class, no_class)
    state = fold_classes_twice(
        state, view, pixel, given, full, dtype, _add_to_top_two, _add_penalties,
        _top_two_of_lanes, OPTIONS, CLASSES, TILE,
    )  # fmt: skip
    others, slopes, largest, second, best, runner_up = state
    others = sum_of_lanes(others, TILE)

    own = pixel.own
    own_is_best = own == best
    score = load_class(view, own, own >= 0, dtype, CLASSES, TILE)
    own_mu = tl.where(own_is_best, second - largest, largest - score)
    own_rho = load_entry(given.own_table, own, dtype, CLASSES)
    best_mu = largest - second
    best_rho = load_entry(given.other_table, best, dtype, CLASSES)
    others += tl.where(own_is_best, 0.0, _penalty(best_mu, best_rho, OPTIONS))
    value = OPTIONS.own_share * _penalty(own_mu, own_rho, OPTIONS) + OPTIONS.other_share * others

    slope = sum_of_lanes(slopes, TILE)
    if OPTIONS.saved:
        own_slope = OPTIONS.own_share * _penalty_slope(own_mu, own_rho, OPTIONS)
        slope = OPTIONS.other_share * slope - tl.where(own_is_best, 0.0, own_slope)
        # The backward pass learns from it that the value is NaN.
        slope = tl.where(value == value, slope, value)
    return value, tl.zeros_like(value) + 1.0, (best | (runner_up << 16), slope)


@triton.jit
def _margin_slope(
    factors, value, start, SLOT: tl.constexpr, LEFT: tl.constexpr, given, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """u_k, with what the largest and the next score receive from the others."""
    largest, own, best, runner_up, other_share, of_own, of_best, of_runner_up = factors
    index = class_of(start, SLOT, TILE)
    rho = load_table(given.other_table, start, SLOT, LEFT, dtype, TILE)
    gradient = _penalty_slope(value - largest, rho, OPTIONS) * other_share
    gradient = tl.where(index == own, of_own, gradient)
    gradient = tl.where(index == best, of_best, gradient)
    return gradient - tl.where(index == runner_up, of_runner_up, 0.0)


@triton.jit
def margin_backward(
    scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """u_k - [k = a] sum_{j != a} u_j - [k = b] u_a; NaN in all classes where the value is NaN."""
    slope = saved[1].to(dtype)
    scale = tl.where(slope == slope, scale, slope)
    best = saved[0] & 0xFFFF
    runner_up = (saved[0] >> 16) & 0xFFFF
    own = pixel.own
    largest = load_class(view, best, pixel.inside, dtype, CLASSES, TILE)
    second = load_class(view, runner_up, pixel.inside, dtype, CLASSES, TILE)
    score = load_class(view, own, own >= 0, dtype, CLASSES, TILE)

    own_is_best = own == best
    own_mu = tl.where(own_is_best, second - largest, largest - score)
    own_rho = load_entry(given.own_table, own, dtype, CLASSES)
    of_own = -scale * OPTIONS.own_share * _penalty_slope(own_mu, own_rho, OPTIONS)
    best_rho = load_entry(given.other_table, best, dtype, CLASSES)
    best_slope = _penalty_slope(largest - second, best_rho, OPTIONS)
    other_share = scale * OPTIONS.other_share
    u_best = tl.where(own_is_best, of_own, other_share * best_slope)

    factors = (
        for_classes(largest, TILE),
        for_classes(own, TILE),
        for_classes(best, TILE),
        for_classes(runner_up, TILE),
        for_classes(other_share, TILE),
        for_classes(of_own, TILE),
        for_classes(u_best - scale * slope, TILE),
        for_classes(u_best, TILE),
    )
    write_gradients(
        factors, view, grad_view, pixel, given, full, dtype, _margin_slope, OPTIONS, CLASSES, TILE
    )
