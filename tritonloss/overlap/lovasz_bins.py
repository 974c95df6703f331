"""Bins of errors, for the Lovász losses: device functions.

A bin's place has an integer part, the bin, and a fraction, where in the bin the error lies. Both
come from the bits of a float32 number, without a logarithm or a division, and exactly: the
reference gets the same ones.

An error of a softmax lies in [0, 1]. What is binned is the smaller of p and 1 - p, in [0, 1/2), so
that the bin of the one is the mirrored bin of the other. Above 1/32 all bins have one width, and
below it they are the narrower the nearer they are to 0. An error of a hinge lies in [0, infinity).
What is binned is the error and 1/4: the bins' widths grow with that, and up to an error of 1/4 all
have one.

Whatever a number is, its entry in a histogram or a table is one of them: higher bits are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Powers of two with bins of their own between 2^-22 and 1/32, and between 1/4 and 2^10, and those
# from there on.
_SMALL = tl.constexpr(17)
_NEAR = tl.constexpr(12)
_FARTHER = tl.constexpr(128 - 10)
_SMALLEST = tl.constexpr(2.0**-22)
_SHIFT = tl.constexpr(0.25)
_ONE_SHIFTED = tl.constexpr(1.25)
_FAR = tl.constexpr(2.0**10)
# The bits of these float32 numbers, and of 1.
_SMALLEST_BITS = tl.constexpr((127 - 22) << 23)
_SHIFT_BITS = tl.constexpr((127 - 2) << 23)
_FAR_BITS = tl.constexpr((127 + 10) << 23)
_ONE_BITS = tl.constexpr(127 << 23)
_MANTISSA = tl.constexpr((1 << 23) - 1)
_LARGEST = tl.constexpr(3.4028234663852886e38)
# Counters of each class for its own pixels in the last bin. There may be very many of them, and
# sums at one address wait for each other.
SPREAD = tl.constexpr(64)
_ONLY_LINE = tl.constexpr(1.0 / 32)
# 1, but for the last digit of a float32 number: p and it less p are never both 1/2, which would be
# in the bin beyond the last one.
_ALMOST_ONE = tl.constexpr(1.0 - 2.0**-24)


class Bins(NamedTuple):
    """The bins of a loss, known when a kernel is compiled."""

    count: int  # of a class: a power of two
    each: int  # of a power of two
    digits: int  # of binary digits of a mantissa that tell those apart
    hinge: bool  # whether errors are those of a hinge
    row: int  # counters of a class: see ``lovasz_kernels.py``
    apart: int  # counters of each bin of a hinge for own errors, or 0: see ``count_hinges``


class Place(NamedTuple):
    """Where errors lie."""

    bin: Any  # int32, within the bins
    fraction: Any  # float32: 0 at the bin's edge towards 0, 1 at the other


@triton.jit
def softmax_place(p, BINS: tl.constexpr):
    """The place of the smaller of p and 1 - p. The larger one lies in the mirrored bin.

    What is no number lies in bin 0.
    """
    HALF: tl.constexpr = BINS.count // 2
    nearest = tl.minimum(p, _ALMOST_ONE - p).to(tl.float32)
    nearest = tl.where(nearest > _SMALLEST, nearest, _SMALLEST)
    bits = nearest.to(tl.int32, bitcast=True)
    power = _bin_of_power(bits, _SMALLEST_BITS, BINS.digits)
    power_fraction = _fraction(bits, BINS.digits)
    steps = nearest * HALF
    whole = steps.to(tl.int32)
    is_small = nearest < _ONLY_LINE
    place = tl.where(is_small, power, whole + HALF // 2)
    fraction = tl.where(is_small, power_fraction, steps - whole.to(tl.float32))
    return Place(bin=place, fraction=fraction)


@triton.jit
def hinge_error(logits, is_own):
    """1 - z (2 y - 1)."""
    return 1.0 - tl.where(is_own, logits, logits * -1.0)


@triton.jit
def shifted_hinge(logits, is_own):
    """The error and 1/4, of which it is told where it lies: rounded once, as the error is."""
    return tl.where(is_own, logits * -1.0, logits) + _ONE_SHIFTED


@triton.jit
def hinge_place(shifted, BINS: tl.constexpr):
    """The place of an error above 0, given as ``shifted_hinge``."""
    shifted = shifted.to(tl.float32)
    bits = shifted.to(tl.int32, bitcast=True)
    near_fraction = _fraction(bits, BINS.digits)
    far_fraction = _fraction(bits, BINS.digits - 5)
    fraction = tl.where(shifted >= _FAR, far_fraction, near_fraction)
    return Place(bin=_hinge_bin(bits, BINS) & (BINS.count - 1), fraction=fraction)


@triton.jit
def _hinge_bin(bits, BINS: tl.constexpr):
    """The bin of a number from 1/4 up, by its bits.

    Below 2^10 the wider bins' numbers are the larger ones, and from there on the smaller ones.
    """
    near = _bin_of_power(bits, _SHIFT_BITS, BINS.digits)
    far = _bin_of_power(bits, _FAR_BITS, BINS.digits - 5)
    return tl.minimum(near, far + _NEAR * BINS.each)


@triton.jit
def _bin_of_power(bits, FIRST: tl.constexpr, DIGITS: tl.constexpr):
    """The bin of numbers by their bits: 2^DIGITS bins of one width for a power of two."""
    return (bits >> (23 - DIGITS)) - (FIRST >> (23 - DIGITS))


@triton.jit
def _fraction(bits, DIGITS: tl.constexpr):
    """Where in such a bin numbers lie."""
    rest = ((bits << DIGITS) & _MANTISSA) | _ONE_BITS
    return rest.to(tl.float32, bitcast=True) - 1.0


@triton.jit
def in_histogram(p, BINS: tl.constexpr):
    """The entry of p in a class's histogram [bins], in the order of p."""
    COUNT: tl.constexpr = BINS.count
    place = softmax_place(p, BINS).bin & (COUNT // 2 - 1)
    return tl.where(p >= 0.5, COUNT - 1 - place, place)


@triton.jit
def in_hinge_histogram(shifted, valid, BINS: tl.constexpr):
    """The bin that a pixel is counted in, whose error is given as ``shifted_hinge``.

    The last bins have no width. In the last of all are pixels without an error, and those that are
    not valid. Those whose error is no number, or infinite, are in one before that.
    """
    COUNT: tl.constexpr = BINS.count
    nearest = tl.abs(shifted.to(tl.float32))  # so that no NaN is negative
    if shifted.dtype == tl.float64:
        nearest = tl.where(shifted < float("inf"), tl.minimum(nearest, _LARGEST), nearest)
    nearest = tl.maximum(nearest, _SHIFT, propagate_nan=tl.PropagateNan.ALL)
    place = _hinge_bin(nearest.to(tl.int32, bitcast=True), BINS)
    return tl.where(valid & ~(shifted <= _SHIFT), place, COUNT - 1) & (COUNT - 1)


@triton.jit
def is_of_hinge(index, BINS: tl.constexpr):
    """Whether errors lie in a bin, by its number from the smallest errors up."""
    return index < _NEAR * BINS.each + _FARTHER * (BINS.each // 32)


@triton.jit
def in_table(place, is_own, is_mirrored, BINS: tl.constexpr):
    """The entry in a class's table [2, bins]: of other classes' pixels, then of its own.

    Bins are in the order of errors. ``is_mirrored`` is of p: the error of an own pixel is 1 - p.
    """
    COUNT: tl.constexpr = BINS.count
    if BINS.hinge:
        entry = place + tl.where(is_own, COUNT, 0)
    else:
        # To reverse the order is to invert every digit.
        mirrored = tl.where(is_mirrored, COUNT - 1, 0)
        entry = place ^ mirrored ^ tl.where(is_own, 2 * COUNT - 1, 0)
    return entry & (2 * COUNT - 1)


@triton.jit
def width_of(index, dtype: tl.constexpr, BINS: tl.constexpr):
    """The widths of bins, by their numbers from the smallest errors up."""
    COUNT: tl.constexpr = BINS.count
    if BINS.hinge:
        width = _hinge_edge(index + 1, dtype, BINS) - _hinge_edge(index, dtype, BINS)
    else:
        place = tl.where(index < COUNT // 2, index, COUNT - 1 - index)
        width = _softmax_edge(place + 1, dtype, BINS) - _softmax_edge(place, dtype, BINS)
    return width


@triton.jit
def _softmax_edge(index, dtype: tl.constexpr, BINS: tl.constexpr):
    """The edges of the bins from 0 to 1/2."""
    HALF: tl.constexpr = BINS.count // 2
    power = ((index << (23 - BINS.digits)) + _SMALLEST_BITS).to(tl.float32, bitcast=True)
    line = (index - HALF // 2).to(tl.float32) * (1.0 / HALF)
    edge = tl.where(index < _SMALL * BINS.each, power, line)
    return tl.where(index == 0, 0.0, edge).to(dtype)


@triton.jit
def _hinge_edge(index, dtype: tl.constexpr, BINS: tl.constexpr):
    """The edges of the bins from 0 up, and 1/4.

    There are more bins than numbers: the last have no width.
    """
    NEAR: tl.constexpr = _NEAR * BINS.each
    FAR: tl.constexpr = _FARTHER * (BINS.each // 32)
    near = ((index << (23 - BINS.digits)) + _SHIFT_BITS).to(tl.float32, bitcast=True)
    far = (tl.minimum(index - NEAR, FAR) << (28 - BINS.digits)) + _FAR_BITS
    far = tl.minimum(far.to(tl.float32, bitcast=True), _LARGEST)
    return tl.where(index < NEAR, near, far).to(dtype)
