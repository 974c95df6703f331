"""Device functions of the pixelwise losses: a pair for each, as ``_pixels.py`` asks for.

Softmax losses (cross entropy, focal) share their statistics: the largest logit and log2 of the sum
of 2^((z - largest) log2 e). Both are saved, the largest in the logits' dtype: their sum alone, the
log-sum-exp, would lose the digits of every probability where all logits are large. Binary cross
entropy saves nothing, since its gradient is elementwise.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._engine.math import LN_2, LOG2_E, log_one_plus, sigmoid_base2, softplus_base2
from .._engine.pixels import (
    class_of,
    fold_classes,
    for_classes,
    largest_of_lanes,
    load_class,
    load_entry,
    load_table,
    nothing_yet,
    sum_of_lanes,
    write_gradients,
)

_LOWEST = tl.constexpr(-3.0e38)


class Options(NamedTuple):
    """The options of a pixelwise loss."""

    weighted: bool  # a weight for every class, in the table of own classes
    smoothing: float  # of the labels of the cross entropy
    gamma: float  # the exponent of the focal loss
    detached: bool  # the focal weight carries no gradient

    @property
    def compiled(self) -> Compiled:
        """What of them a kernel is compiled for."""
        power = int(self.gamma) if self.gamma in (0, 1, 2) else -1
        return Compiled(self.weighted, self.smoothing != 0, power, self.detached)

    @property
    def numbers(self) -> tuple[float, ...]:
        """What of them reaches a kernel at run time: a new value is no reason to compile."""
        return self.smoothing, self.gamma


class Compiled(NamedTuple):
    """The options that change a kernel's code."""

    weighted: bool
    smoothed: bool
    power: int  # gamma, if it is 0, 1 or 2; any other one is -1 here
    detached: bool


# --- statistics of the softmax --------------------------------------------------------------------


@triton.jit
def _add_softmax(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a block of classes to (largest, sum of 2^(...)), relative to the largest so far."""
    largest = state[0]
    for j in tl.static_range(COUNT):
        largest = tl.maximum(largest, values[j])
    # Summed within the block first: one sum over a thousand classes would lose its last digits.
    total = tl.exp2((values[0] - largest) * LOG2_E)
    for j in tl.static_range(1, COUNT):
        total += tl.exp2((values[j] - largest) * LOG2_E)
    return largest, total + state[1] * tl.exp2((state[0] - largest) * LOG2_E)


@triton.jit
def _add_smoothed_softmax(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """_add_softmax, and to (sum of w (z - largest), sum of w) over classes.

    Relative to the largest, nothing cancels when all logits are large.
    """
    largest, total = _add_softmax(
        (state[0], state[1]), values, start, pixel, given, dtype, OPTIONS, COUNT, LEFT, TILE
    )
    seen = state[3]
    weighted = state[2] + seen * (state[0] - largest)
    for j in tl.static_range(COUNT):
        weight = _class_weight(given.own_table, start, j, LEFT, dtype, OPTIONS, TILE)
        # Not a product with 0: a lane without a class left holds -inf.
        weighted += tl.where(weight == 0, 0.0, weight * (values[j] - largest))
        seen += weight
    return largest, total, weighted, seen


@triton.jit
def _class_weight(
    table, start, SLOT: tl.constexpr, LEFT: tl.constexpr, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The weights of a slot's classes; 0 where a lane has no class left."""
    if OPTIONS.weighted:
        weight = load_table(table, start, SLOT, LEFT, dtype, TILE)
    elif TILE.lanes == 1:
        weight = tl.full((), 1.0, dtype)
    else:
        lane = tl.arange(0, TILE.lanes)[None, :]
        weight = tl.where(lane < LEFT - SLOT * TILE.lanes, 1.0, 0.0).to(dtype)
    return weight


@triton.jit
def _own_weight(
    pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The weight of each pixel's own class, [pixels]; 1 if there are none."""
    if OPTIONS.weighted:
        result = load_entry(given.own_table, pixel.own, dtype, CLASSES)
    else:
        result = tl.full((TILE.pixels,), 1.0, dtype)
    return result


@triton.jit
def _softmax_statistics(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """(largest, log2 of the sum), [pixels]."""
    state = (nothing_yet(_LOWEST, dtype, TILE), nothing_yet(0.0, dtype, TILE))
    state = fold_classes(
        state, view, pixel, given, full, dtype, _add_softmax, OPTIONS, CLASSES, TILE
    )
    largest = largest_of_lanes(state[0], TILE)
    total = sum_of_lanes(state[1] * tl.exp2((state[0] - for_classes(largest, TILE)) * LOG2_E), TILE)
    return largest, tl.log2(total)


# --- cross entropy --------------------------------------------------------------------------------


@triton.jit
def cross_entropy_forward(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """-w_t log p_t; smoothed by s, (1 - s) of it and s / C of -sum w_k log p_k."""
    weight = _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE)
    if not OPTIONS.smoothed:
        largest, log_sum = _softmax_statistics(
            pixel, view, given, full, dtype, OPTIONS, CLASSES, TILE
        )
    else:
        zero = nothing_yet(0.0, dtype, TILE)
        state = (nothing_yet(_LOWEST, dtype, TILE), zero, zero, zero)
        state = fold_classes(
            state, view, pixel, given, full, dtype, _add_smoothed_softmax, OPTIONS, CLASSES, TILE
        )
        largest = largest_of_lanes(state[0], TILE)
        beyond = state[0] - for_classes(largest, TILE)
        log_sum = tl.log2(sum_of_lanes(state[1] * tl.exp2(beyond * LOG2_E), TILE))
        weighted = sum_of_lanes(state[2] + state[3] * beyond, TILE)
        all_weights = sum_of_lanes(state[3], TILE)

    own = load_class(view, pixel.own, pixel.own >= 0, dtype, CLASSES, TILE)
    value = weight * (log_sum * LN_2 + (largest - own))
    if OPTIONS.smoothed:
        smoothing = given.numbers[0]
        smooth = all_weights * (log_sum * LN_2) - weighted
        value = (1.0 - smoothing) * value + smoothing / CLASSES * smooth
    return value, weight, (largest, log_sum)


@triton.jit
def _softmax_slope(
    factors, value, start, SLOT: tl.constexpr, LEFT: tl.constexpr, given, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A p_k - B y_k - D w_k, factors being (largest, log_sum, own, A, B, D)."""
    largest, log_sum, own, all_classes, own_class, smooth = factors
    probability = tl.exp2((value - largest) * LOG2_E - log_sum)
    gradient = probability * all_classes
    gradient -= tl.where(class_of(start, SLOT, TILE) == own, own_class, 0.0)
    if OPTIONS.smoothed:
        weight = _class_weight(given.own_table, start, SLOT, LEFT, dtype, OPTIONS, TILE)
        gradient -= smooth * weight
    return gradient


@triton.jit
def _write_softmax_gradients(
    largest, log_sum, all_classes, own_class, smooth, pixel, view, grad_view, given, full,
    dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    factors = (
        for_classes(largest, TILE),
        for_classes(log_sum, TILE),
        for_classes(pixel.own, TILE),
        for_classes(all_classes, TILE),
        for_classes(own_class, TILE),
        for_classes(smooth, TILE),
    )
    write_gradients(
        factors, view, grad_view, pixel, given, full, dtype, _softmax_slope, OPTIONS, CLASSES, TILE
    )


@triton.jit
def _sum_of_weights(table, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr):
    """The sum of all classes' weights."""
    if OPTIONS.weighted:
        index = tl.arange(0, triton.next_power_of_2(CLASSES))
        result = tl.sum(tl.load(table + index, mask=index < CLASSES, other=0.0).to(dtype))
    else:
        result = tl.full((), CLASSES, dtype)
    return result


@triton.jit
def cross_entropy_backward(
    scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(1 - s) w_t (p_k - y_k) + (s / C) (p_k sum w - w_k)."""
    own_class = scale * _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE)
    all_classes = own_class
    smooth = own_class
    if OPTIONS.smoothed:
        smoothing = given.numbers[0]
        own_class = own_class * (1.0 - smoothing)
        smooth = scale * (smoothing / CLASSES)
        all_classes = own_class + smooth * _sum_of_weights(given.own_table, dtype, OPTIONS, CLASSES)
    _write_softmax_gradients(
        saved[0].to(dtype), saved[1].to(dtype), all_classes, own_class, smooth, pixel, view,
        grad_view, given, full, dtype, OPTIONS, CLASSES, TILE,
    )  # fmt: skip


# --- focal loss -----------------------------------------------------------------------------------


@triton.jit
def _power(base, exponent, POWER: tl.constexpr):
    """base^exponent for base >= 0; POWER is the exponent if it is 0, 1 or 2."""
    if POWER == 0:
        result = tl.zeros_like(base) + 1.0
    elif POWER == 1:
        result = base
    elif POWER == 2:
        result = base * base
    else:
        result = tl.exp2(tl.log2(base) * exponent)
    return result


@triton.jit
def _focal_parts(entropy, gamma, OPTIONS: tl.constexpr):
    """(p_t, 1 - p_t, (1 - p_t)^gamma) of -log p_t."""
    TERMS: tl.constexpr = 9 if entropy.dtype == tl.float64 else 4
    probability = tl.exp2(entropy * -LOG2_E)
    # Where p is 1 but for a few digits, 1 - p by the series x - x^2 / 2! + ... of 1 - e^-x.
    series = tl.zeros_like(entropy) + 1.0
    for i in tl.static_range(TERMS - 1):
        series = 1.0 - entropy * (1.0 / (TERMS - i)) * series
    series = entropy * series
    rest = tl.where(entropy < 0.03125, series, 1.0 - probability)
    rest = tl.where(rest < 0, 0.0, rest)  # rounded below; a NaN stays
    return probability, rest, _power(rest, gamma, OPTIONS.power)


@triton.jit
def focal_forward(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """-a_t (1 - p_t)^gamma log p_t."""
    largest, log_sum = _softmax_statistics(pixel, view, given, full, dtype, OPTIONS, CLASSES, TILE)
    own = load_class(view, pixel.own, pixel.own >= 0, dtype, CLASSES, TILE)
    entropy = log_sum * LN_2 + (largest - own)
    _, _, modulation = _focal_parts(entropy, given.numbers[1], OPTIONS)
    weight = _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE)
    return weight * modulation * entropy, tl.zeros_like(weight) + 1.0, (largest, log_sum)


@triton.jit
def focal_backward(
    scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """a_t (q^gamma - gamma p_t q^(gamma - 1) log p_t) (p_k - y_k) with q = 1 - p_t.

    Detached, the weight's own gradient, the second term, is left out.
    """
    largest = saved[0].to(dtype)
    log_sum = saved[1].to(dtype)
    own = load_class(view, pixel.own, pixel.own >= 0, dtype, CLASSES, TILE)
    entropy = log_sum * LN_2 + (largest - own)
    gamma = given.numbers[1]
    probability, rest, slope = _focal_parts(entropy, gamma, OPTIONS)
    if not OPTIONS.detached and OPTIONS.power != 0:
        # At q = 0 the product is 0, for log p_t is then -q; q^(gamma - 1) alone may be infinite.
        below: tl.constexpr = OPTIONS.power - 1 if OPTIONS.power > 0 else -1
        power = _power(tl.where(rest == 0, 1.0, rest), gamma - 1.0, below)
        live = gamma * probability * power * entropy
        # p_t = 0 with an infinite entropy: nothing is left of the product.
        slope += tl.where((rest == 0) | (probability == 0), 0.0, live)
    factor = scale * _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE) * slope
    _write_softmax_gradients(
        largest, log_sum, factor, factor, factor, pixel, view, grad_view, given, full, dtype,
        OPTIONS, CLASSES, TILE,
    )  # fmt: skip


# --- binary cross entropy -------------------------------------------------------------------------


@triton.jit
def _add_softplus(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add softplus(z) of the classes that are not the pixel's own."""
    own = for_classes(pixel.own, TILE)
    # Summed within the block first, as in _add_softmax.
    linear = tl.zeros_like(state[0])
    rest = tl.zeros_like(state[0])
    for j in tl.static_range(COUNT):
        # Left out rather than added and taken away again, which would cost a confident pixel all
        # of its digits.
        z = tl.where(class_of(start, j, TILE) == own, float("-inf"), values[j])
        t = tl.exp2(tl.abs(z) * -LOG2_E)
        linear += tl.maximum(z, 0.0)
        # One logarithm for all of the block: 1 + rest is the product of all 1 + t. Kept as
        # rest + t + rest t, small values are not rounded away beside the 1.
        rest = tl.fma(rest, t, rest + t)
    return (state[0] + (linear + log_one_plus(rest)),)


@triton.jit
def binary_cross_entropy_forward(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """w_t softplus(-z_t) + sum of softplus(z_k) over the other classes."""
    state = fold_classes(
        (nothing_yet(0.0, dtype, TILE),), view, pixel, given, full, dtype, _add_softplus, OPTIONS,
        CLASSES, TILE,
    )  # fmt: skip
    own = pixel.own
    positive = softplus_base2(load_class(view, own, own >= 0, dtype, CLASSES, TILE) * -LOG2_E)
    positive = tl.where(
        own >= 0, _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE) * positive, 0.0
    )
    value = sum_of_lanes(state[0], TILE) + positive
    return value, tl.zeros_like(value) + 1.0, ()


@triton.jit
def _sigmoid_slope(
    factors, value, start, SLOT: tl.constexpr, LEFT: tl.constexpr, given, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the own class -w sigmoid(-z), not p - 1, which has no digits left near p = 1."""
    own, other_class, own_class = factors
    is_own = class_of(start, SLOT, TILE) == own
    residual = sigmoid_base2(tl.where(is_own, -value, value) * LOG2_E)
    return residual * tl.where(is_own, -own_class, other_class)


@triton.jit
def binary_cross_entropy_backward(
    scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sigmoid(z_k), and -w_t sigmoid(-z_t) for the pixel's own class."""
    factors = (
        for_classes(pixel.own, TILE),
        for_classes(scale, TILE),
        for_classes(scale * _own_weight(pixel, given, dtype, OPTIONS, CLASSES, TILE), TILE),
    )
    write_gradients(
        factors, view, grad_view, pixel, given, full, dtype, _sigmoid_slope, OPTIONS, CLASSES, TILE
    )
