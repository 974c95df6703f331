"""Device functions of region mutual information: what a region is made of.

A map is read as two features per class, the residual e = p - y and the label y. Everything that the
loss needs follows from their moments. Nothing cancels where the prediction is nearly right: e is
computed from the logit as -sigmoid(-z) or sigmoid(z), not as a difference.

The features come from two pooled maps (READING.pooled), which hold sums over a pooling cell, or
else from the logits and the labels themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, inverse, sanitised_label
from .._engine.strips import split_columns

SIZES = (
    "channels", "first_image", "first_class", "classes", "height", "width", "pooled_height",
    "pooled_width", "cell_rows", "programs", "blocks", "bands", "parts", "images", "chunks",
    "window_rows", "window_columns", "split", "strips", "cells", "centred",
)  # fmt: skip


# --- what is known when a kernel is compiled ------------------------------------------------------


class Reading(NamedTuple):
    """How features are read."""

    pooled: bool  # from two pooled maps, or else from logits and labels
    ignored: int  # the ignore label, as sanitised_label takes it
    centred: bool = False  # with p less its approximate mean in the place of y: see load_pair
    middle: float = 0.0  # what is subtracted from labels
    flat: bool = False  # whether the pixels of a row lie side by side in all maps


# --- what is known when it runs -------------------------------------------------------------------


class Plane(NamedTuple):
    """One class of one image, or the labels of an image."""

    pointer: Any
    row_stride: Any
    column_stride: Any


class Features(NamedTuple):
    """What one class of one image is read from."""

    first: Any  # Plane of residuals, or of logits
    second: Any  # Plane of labels: pooled ones of the class, or the image's own
    center: Any  # the approximate mean of p, where the reading is centred
    channel: Any
    channels: Any


# --- planes ---------------------------------------------------------------------------------------


@triton.jit
def plane_of(pointer, strides, image, channel, FLAT: tl.constexpr = False):
    """The plane of a class; label maps have the class stride 0.

    FLAT says that the column stride is 1. No other stride is known when a kernel is compiled.
    """
    channel = tl.full((), 0, tl.int64) + channel  # which may be a constant
    pointer += image * strides[0] + channel * strides[1]
    column_stride = 1 if FLAT else strides[3]
    return Plane(pointer=pointer, row_stride=strides[2], column_stride=column_stride)


@triton.jit
def features_of(
    first_ptr, second_ptr, first_strides, second_strides, plane, channels, center,
    READING: tl.constexpr,
):  # fmt: skip
    """The features of a plane, by its number among all classes of all images."""
    channel = (plane % channels).to(tl.int32)
    image = plane // channels
    return Features(
        first=plane_of(first_ptr, first_strides, image, channel, READING.flat),
        second=plane_of(second_ptr, second_strides, image, channel, READING.flat),
        center=center,
        channel=channel,
        channels=channels,
    )


@triton.jit
def pointer_to(plane, row, column, SHIFT: tl.constexpr = 0):
    """Pointers to the pixels SHIFT columns beside (row, column); one of these two is a block.

    The shift is added to the pointer, so that it becomes a constant of the load instruction.
    """
    down = row.to(tl.int64) * plane.row_stride
    return (
        plane.pointer
        + down
        + column.to(tl.int64) * plane.column_stride
        + (SHIFT * plane.column_stride)
    )


@triton.jit
def load(pointer, mask):
    """The values at pointers, 0 where masked out; mask None spares two instructions."""
    if mask is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def load_label(target, row, column, mask, channels, IGNORED: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Class indices, -1 for pixels that are masked out, ignored or out of range."""
    pointer = pointer_to(target, row, column, SHIFT)
    if mask is None:
        label = tl.load(pointer)
        label = sanitised_label(label, label == label, channels, IGNORED)
    else:
        label = sanitised_label(tl.load(pointer, mask=mask, other=0), mask, channels, IGNORED)
    return label


@triton.jit
def load_neighbours(plane, row, column, COUNT: tl.constexpr, GRAIN: tl.constexpr):
    """COUNT neighbouring pixels as they are stored, from a lane's column on; all are there.

    With a grain above 1 the columns begin at multiples of it, and so do rows in memory: each wide
    instruction loads an aligned chunk.
    """
    values = ()
    if GRAIN > 1:
        LANES: tl.constexpr = column.shape[0]
        SIZE: tl.constexpr = plane.pointer.dtype.element_ty.primitive_bitwidth // 8
        WHOLE: tl.constexpr = min(SIZE * GRAIN, 16)
        # The mask changes nothing. It is there since compilers forget what is said of a sum.
        address = pointer_to(plane, row, column).to(tl.int64) & -WHOLE
        pointer = address.to(tl.pointer_type(plane.pointer.dtype.element_ty))
        pointer = tl.multiple_of(pointer, WHOLE)
        pointer = pointer[:, None] + tl.arange(0, GRAIN)[None, :]  # [LANES, GRAIN]
        for j in tl.static_range((COUNT + GRAIN - 1) // GRAIN):
            values = values + split_columns(tl.load(pointer + j * GRAIN), LANES, GRAIN)
    else:
        for j in tl.static_range(COUNT):
            values = values + (tl.load(pointer_to(plane, row, column, j)),)
    return values


@triton.jit
def _own(raw, features, IGNORED: tl.constexpr):
    """(whether the label is a class, whether it is the own one)."""
    index = sanitised_label(raw, raw == raw, features.channels, IGNORED)
    if IGNORED == -1:  # no class is ignored: one comparison instead of two
        wide = raw.to(tl.int64) if raw.dtype == tl.int64 else raw.to(tl.int32)
        positive = wide == features.channel
    else:
        positive = (index >= 0) & (index == features.channel)
    return index >= 0, positive


@triton.jit
def load_scaled(logits, row, column, mask, dtype: tl.constexpr, SHIFT: tl.constexpr = 0):
    """The logits times log2(e), for powers of two; 0 where masked out."""
    return load(pointer_to(logits, row, column, SHIFT), mask).to(dtype) * LOG2_E


@triton.jit
def smaller_sigmoid(t):
    """The sigmoid t / (1 + t) of -|z|, t = e^-|z|, to its last digit: a step of Newton's from q.

    What moments are taken of needs all digits: where p is nearly constant, or smooth, the inverse
    of its moments makes much of an error. Since q lies in [1/2, 1], 1 - q is exact.
    """
    q = inverse(1.0 + t)
    rest = 1.0 - q
    return rest - q * (rest - q * t)


@triton.jit
def sigmoid_pair(u):
    """(larger, smaller) of the sigmoids of u log 2 and -u log 2, with a relative error of 4e-7."""
    t = tl.exp2(-tl.abs(u))
    smaller = t * inverse(1.0 + t)
    return 1.0 - smaller, smaller


@triton.jit
def complements(smaller):
    """(1 - smaller, smaller), whose sum is exactly 1 where both are more than 1 / 1024.

    A residual p - y made of them gives the same p back whatever the label. Otherwise a constant map
    would look as if p depended on y, and the inverse of its moments would make that up to
    1 / epsilon times as large.
    """
    larger = 1.0 - smaller
    return larger, tl.where(smaller > 1.0 / 1024, 1.0 - larger, smaller)


@triton.jit
def consistent_residual(u, positive):
    """The residual p - y of a scaled logit, made of ``complements``."""
    larger, smaller = complements(smaller_sigmoid(tl.exp2(-tl.abs(u))))
    wrong = tl.where((u >= 0) != positive, larger, smaller)
    return tl.where(positive, -wrong, wrong)


@triton.jit
def residual_of(u, label, channel):
    """(residual p - y, slope p (1 - p)) of a scaled logit; residual 0 under an invalid label."""
    larger, smaller = sigmoid_pair(u)
    positive = label == channel
    wrong = tl.where((u >= 0) != positive, larger, smaller)
    return tl.where(label >= 0, tl.where(positive, -wrong, wrong), 0.0), larger * smaller


@triton.jit
def miss_of(u, positive):
    """(|p - y|, max(v, 0), 1 + 2^-|v|, what that sum rounded away), v = u or, where positive, -u.

    The cross entropy is log 2 times the second, plus the logarithm of the third, plus the fourth.
    The sum of many therefore takes a single logarithm, of a product. For u = -inf, not positive,
    the residual and the cross entropy are 0.
    """
    v = tl.where(positive, -u, u)
    t = tl.exp2(-tl.abs(v))
    factor = 1.0 + t
    smaller = t * inverse(factor)
    missed = tl.where(v >= 0, 1.0 - smaller, smaller)
    return missed, tl.maximum(v, 0.0), factor, t - (factor - 1.0)


@triton.jit
def load_features(features, row, column, mask, READING: tl.constexpr, SHIFT: tl.constexpr = 0):
    """(residual, label) of pixels or pooling cells SHIFT columns beside; 0 where masked out."""
    first, second = features.first, features.second
    dtype: tl.constexpr = tl.float64 if first.pointer.dtype.element_ty == tl.float64 else tl.float32
    if READING.pooled:
        residual = load(pointer_to(first, row, column, SHIFT), mask)
        y = load(pointer_to(second, row, column, SHIFT), mask).to(dtype)
    else:
        label = load_label(second, row, column, mask, features.channels, READING.ignored, SHIFT)
        u = load_scaled(first, row, column, mask, dtype, SHIFT)
        residual, _ = residual_of(u, label, features.channel)
        y = tl.where(label == features.channel, 1.0, 0.0).to(dtype)
    return residual, y


@triton.jit
def load_pair(features, row, column, mask, READING: tl.constexpr, SHIFT: tl.constexpr = 0):
    """(residual, label), or (residual, p - center) if centred: what the moments are taken of.

    Sums in float32 need the second form. Since the residual and p are summed apart, no digits are
    lost where p is nearly y; since p is summed about the centre, none are where it is nearly
    constant.
    """
    if READING.pooled:
        e, y = load_features(features, row, column, mask, READING, SHIFT)
    else:
        first = features.first
        dtype: tl.constexpr = (
            tl.float64 if first.pointer.dtype.element_ty == tl.float64 else tl.float32
        )
        label = load_label(
            features.second, row, column, mask, features.channels, READING.ignored, SHIFT
        )
        u = load_scaled(first, row, column, mask, dtype, SHIFT)
        u = tl.where(label >= 0, u, float("-inf"))  # p = 0
        positive = label == features.channel
        e = consistent_residual(u, positive)
        y = tl.where(positive, 1.0, 0.0).to(dtype)
    if READING.centred:
        y = (y + e) - features.center
    else:
        y = y - READING.middle
    if mask is not None:
        y = tl.where(mask, y, 0.0)
    return e, y


@triton.jit
def with_sign(x, signed):
    """The float64 x, or -x where the float32 ``signed`` is negative: one instruction."""
    sign = signed.to(tl.int32, bitcast=True) & -0x80000000
    result = x.to(tl.int64, bitcast=True) ^ (sign.to(tl.int64) << 32)
    return result.to(tl.float64, bitcast=True)


@triton.jit
def load_wide(
    features, row, column, COUNT: tl.constexpr, GRAIN: tl.constexpr, READING: tl.constexpr
):
    """What lag sums over the core are taken of, and the cross entropy: a tuple of COUNT pixels."""
    result = ()
    if READING.pooled:
        for j in tl.static_range(COUNT):
            e, y = load_pair(features, row, column, None, READING, j)
            result = result + ((e, y, 0.0, 0.0, 1.0),)
    else:
        logits = load_neighbours(features.first, row, column, COUNT, GRAIN)
        labels = load_neighbours(features.second, row, column, COUNT, GRAIN)
        for j in tl.static_range(COUNT):
            result = result + (_wide(logits[j], labels[j], features, READING),)
    return result


@triton.jit
def _wide(logit, label, features, READING: tl.constexpr):
    """(residual, label or centred p, excess, smaller sigmoid, larger sigmoid) of pixels.

    The excess is |z| where the larger sigmoid is wrong: the cross entropy is that less log(larger).
    The smaller sigmoid has all digits; the larger one is 1 - smaller, rounded.

    In float64 p is 1/2 and its distance from there: the same whatever the label, as complements
    are, with all digits of the residual p - y, for fewer instructions.
    """
    dtype: tl.constexpr = tl.float64 if logit.dtype == tl.float64 else tl.float32
    valid, positive = _own(label, features, READING.ignored)
    z = tl.where(valid, logit.to(dtype), float("-inf"))  # p = 0
    size = tl.abs(z)
    smaller = smaller_sigmoid(tl.exp2(size * -LOG2_E))
    y = tl.where(positive, 1.0 - READING.middle, -READING.middle).to(dtype)
    if READING.centred or dtype == tl.float64:
        larger, smaller = complements(smaller)
        e = tl.where((z >= 0) != positive, larger, smaller)
        e = tl.where(positive, -e, e)
        if READING.centred:
            y = (y + e) - features.center
    else:
        larger = 1.0 - smaller
        smaller = smaller.to(tl.float64)
        beyond = tl.full((1,), 0.5, tl.float64) - smaller  # of the larger sigmoid, above 1/2
        e = with_sign(beyond, z) - y.to(tl.float64)
    excess = tl.where((z >= 0) != positive, size, 0.0)
    return e, y, excess, smaller, larger


@triton.jit
def load_slopes(
    features, row, column, COUNT: tl.constexpr, GRAIN: tl.constexpr, READING: tl.constexpr
):
    """(residual, label, slope p (1 - p)) of COUNT pixels; of pooling cells the slope is 0."""
    result = ()
    if READING.pooled:
        for j in tl.static_range(COUNT):
            residual, y = load_features(features, row, column, None, READING, j)
            result = result + ((residual, y, 0.0),)
    else:
        logits = load_neighbours(features.first, row, column, COUNT, GRAIN)
        labels = load_neighbours(features.second, row, column, COUNT, GRAIN)
        for j in tl.static_range(COUNT):
            result = result + (_slope(logits[j], labels[j], features, READING),)
    return result


@triton.jit
def _slope(logit, label, features, READING: tl.constexpr):
    """(residual, label, slope p (1 - p)) of pixels, all 0 under an invalid label."""
    dtype: tl.constexpr = tl.float64 if logit.dtype == tl.float64 else tl.float32
    valid, positive = _own(label, features, READING.ignored)
    u = tl.where(valid, logit.to(dtype) * LOG2_E, float("-inf"))  # p = 0
    larger, smaller = sigmoid_pair(u)
    wrong = tl.where((u >= 0) != positive, larger, smaller)
    residual = tl.where(positive, -wrong, wrong)
    y = tl.where(positive, 1.0, 0.0).to(dtype)
    return residual, y, larger * smaller


@triton.jit
def scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype: tl.constexpr):
    """What the cross entropy's gradient is multiplied by, in the dtype of the arithmetic."""
    scale = tl.load(grad_loss_ptr).to(tl.float64) * tl.load(statistics_ptr)
    return scale.to(dtype)


@triton.jit
def logit_gradient(u, label, channel, grad_probability, entropy_scale):
    """The gradient of logits: that of p times the slope, and entropy_scale (p - y)."""
    residual, slope = residual_of(u, label, channel)
    value = grad_probability * slope + entropy_scale * residual
    return tl.where(label >= 0, value, 0.0)


@triton.jit
def store_logit_gradient(pointer, value, mask):
    """Store a gradient, by way of float32: the interpreter cannot round float64 to bfloat16."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)
