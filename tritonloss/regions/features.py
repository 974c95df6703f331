"""Device functions of region mutual information: what a region is made of.

A map is read as two features per class, the residual e = p - y and the label y. Everything that the
loss needs follows from their moments, and nothing cancels where the prediction is nearly right: e
is taken from the logit as -sigmoid(-z) or sigmoid(z), never as a difference.

The features come from two pooled maps (POOLED), which hold sums over a pooling cell, or else from
the logits and the labels themselves. Either way they are read from `first` (residuals or logits)
and `second` (labels), each a tuple (pointer, row stride, column stride) of one plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._engine.math import LOG2_E, inverse, sanitised_label

SIZES = (
    "channels", "first_class", "classes", "height", "width", "pooled_height", "pooled_width",
    "cell_rows", "programs", "blocks", "bands", "parts", "planes", "images", "chunks",
    "window_rows", "window_columns",
)  # fmt: skip


@triton.jit
def plane_of(pointer, strides, image, channel):
    """(pointer, row stride, column stride) of a channel; label maps have the channel stride 0."""
    channel = tl.full((), 0, tl.int64) + channel  # which may be a constant
    return pointer + image * strides[0] + channel * strides[1], strides[2], strides[3]


@triton.jit
def pointer_to(plane, row, column, SHIFT: tl.constexpr = 0):
    """Pointers to the pixels SHIFT columns beside (row, column), of which one at least is a block.

    The shift is added to the pointer, so that it becomes a constant of the load instruction.
    """
    return (
        plane[0] + row.to(tl.int64) * plane[1] + column.to(tl.int64) * plane[2] + SHIFT * plane[2]
    )


@triton.jit
def load(pointer, mask):
    """What stands there, 0 where masked; without a mask, None, two instructions less."""
    if mask is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def load_label(target, row, column, mask, channels, IGNORED: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Class indices, -1 for pixels that are masked, ignored or out of range."""
    pointer = pointer_to(target, row, column, SHIFT)
    if mask is None:
        label = tl.load(pointer)
        label = sanitised_label(label, label == label, channels, IGNORED)
    else:
        label = sanitised_label(tl.load(pointer, mask=mask, other=0), mask, channels, IGNORED)
    return label


@triton.jit
def load_scaled(logits, row, column, mask, dtype: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Logits over log 2: what the powers of two below want."""
    return load(pointer_to(logits, row, column, SHIFT), mask).to(dtype) * LOG2_E


@triton.jit
def sigmoid_pair(u):
    """(larger, smaller) of the sigmoids of u log 2 and -u log 2, both precise."""
    t = tl.exp2(-tl.abs(u))
    smaller = t * inverse(1.0 + t)
    return 1.0 - smaller, smaller


@triton.jit
def complements(smaller):
    """(1 - smaller, smaller), 1 in sum to the last digit where both are more than 1 / 1024.

    Residuals p - y made of them lead back to the same p whatever the label. A constant map must not
    look as if p depended on y: the inverse of its moments makes up to 1 / epsilon of that.
    """
    larger = 1.0 - smaller
    return larger, tl.where(smaller > 1.0 / 1024, 1.0 - larger, smaller)


@triton.jit
def consistent_residual(u, positive):
    """The residual p - y of a scaled logit, from complements."""
    _, smaller = sigmoid_pair(u)
    larger, smaller = complements(smaller)
    wrong = tl.where((u >= 0) != positive, larger, smaller)
    return tl.where(positive, -wrong, wrong)


@triton.jit
def residual_of(u, label, channel):
    """(residual p - y, slope p (1 - p)) of a scaled logit; no residual under an invalid label."""
    larger, smaller = sigmoid_pair(u)
    positive = label == channel
    wrong = tl.where((u >= 0) != positive, larger, smaller)
    return tl.where(label >= 0, tl.where(positive, -wrong, wrong), 0.0), larger * smaller


@triton.jit
def miss_of(u, positive):
    """(|p - y|, v if > 0, 1 + 2^-|v|, what that sum rounded away), v = u or, where positive, -u.

    The cross entropy is log 2 times the second, and the logarithm of the third, and the fourth: so
    the sum of many takes a single logarithm, of a product. All of it is nothing for u = -inf.
    """
    v = tl.where(positive, -u, u)
    t = tl.exp2(-tl.abs(v))
    factor = 1.0 + t
    smaller = t * inverse(factor)
    missed = tl.where(v >= 0, 1.0 - smaller, smaller)
    return missed, tl.maximum(v, 0.0), factor, t - (factor - 1.0)


@triton.jit
def load_features(
    first, second, row, column, mask, channel, channels, dtype: tl.constexpr,
    IGNORED: tl.constexpr, POOLED: tl.constexpr, SHIFT: tl.constexpr = 0,
):  # fmt: skip
    """(residual, label) of pixels or pooling cells SHIFT columns beside, 0 where masked out."""
    if POOLED:
        residual = load(pointer_to(first, row, column, SHIFT), mask)
        y = load(pointer_to(second, row, column, SHIFT), mask).to(dtype)
    else:
        label = load_label(second, row, column, mask, channels, IGNORED, SHIFT)
        u = load_scaled(first, row, column, mask, dtype, SHIFT)
        residual, _ = residual_of(u, label, channel)
        y = tl.where(label == channel, 1.0, 0.0).to(dtype)
    return residual, y


@triton.jit
def load_pair(
    first, second, center, row, column, mask, channel, channels, dtype: tl.constexpr,
    CENTRED: tl.constexpr, IGNORED: tl.constexpr, POOLED: tl.constexpr, SHIFT: tl.constexpr = 0,
):  # fmt: skip
    """(residual, label), or CENTRED (residual, p - center): what the moments are taken of.

    Sums in float32 need the second form: with the residual and p apart no digits are lost where p
    is nearly y, and about the centre none where p is nearly constant.
    """
    if POOLED:
        e, y = load_features(
            first, second, row, column, mask, channel, channels, dtype, IGNORED, POOLED, SHIFT
        )
    else:
        label = load_label(second, row, column, mask, channels, IGNORED, SHIFT)
        u = load_scaled(first, row, column, mask, dtype, SHIFT)
        u = tl.where(label >= 0, u, float("-inf"))  # p = 0
        positive = label == channel
        e = consistent_residual(u, positive)
        y = tl.where(positive, 1.0, 0.0).to(dtype)
    if CENTRED:
        y = (y + e) - center
        if mask is not None:
            y = tl.where(mask, y, 0.0)
    return e, y


@triton.jit
def logit_gradient(u, label, channel, grad_probability, entropy_scale):
    """The gradient to logits from the one to p, and from the cross entropy, scale (p - y)."""
    residual, slope = residual_of(u, label, channel)
    value = grad_probability * slope + entropy_scale * residual
    return tl.where(label >= 0, value, 0.0)


@triton.jit
def store_logit_gradient(pointer, value, mask):
    """To 16 bits by way of float32: the interpreter does not round float64 to bfloat16."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value, mask=mask)
