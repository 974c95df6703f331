"""Device functions of region mutual information: what a region is made of.

A map is read as two features per class, the residual e = p - y and the label y. Everything that the
loss needs follows from their moments, and nothing cancels where the prediction is nearly right: e
is taken from the logit as -sigmoid(-z) or sigmoid(z), never as a difference.

The features come from two pooled maps (POOLED), which hold sums over a pooling cell, or else from the
logits and the labels themselves. Either way they are read from `first` (residuals or logits) and
`second` (labels), each a tuple (pointer, row stride, column stride) of one plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device_math import LOG2_E, inverse, sanitised_label

SIZES = (
    "channels", "height", "width", "pooled_height", "pooled_width", "cell_rows", "programs",
    "bands", "parts", "planes", "images", "chunks", "window_rows", "window_columns",
)  # fmt: skip


@triton.jit
def plane_of(pointer, strides, image, channel):
    """(pointer, row stride, column stride) of a channel; label maps have the channel stride 0."""
    return pointer + image * strides[0] + channel * strides[1], strides[2], strides[3]


@triton.jit
def pointer_to(plane, row, column):
    """Pointers to pixels of a plane; at least one of row and column is a block."""
    return plane[0] + row.to(tl.int64) * plane[1] + column.to(tl.int64) * plane[2]


@triton.jit
def load_label(target, row, column, mask, channels, IGNORED: tl.constexpr):
    """Class indices, -1 for pixels that are masked, ignored or out of range."""
    label = tl.load(pointer_to(target, row, column), mask=mask, other=0)
    return sanitised_label(label, mask, channels, IGNORED)


@triton.jit
def load_scaled(logits, row, column, mask, dtype: tl.constexpr):
    """Logits over log 2: what the powers of two below want."""
    return tl.load(pointer_to(logits, row, column), mask=mask, other=0.0).to(dtype) * LOG2_E


@triton.jit
def sigmoid_and_slope(u):
    """Sigmoid of u log 2 and its derivative p (1 - p), both precise for either sign of u."""
    t = tl.exp2(-tl.abs(u))
    larger = inverse(1.0 + t)
    smaller = t * larger
    return tl.where(u >= 0, larger, smaller), smaller * larger


@triton.jit
def residual_of(u, label, channel):
    """The residual p - y of a scaled logit: 0 where the label is invalid."""
    positive = label == channel
    wrong, _ = sigmoid_and_slope(tl.where(positive, -u, u))
    return tl.where(label >= 0, tl.where(positive, -wrong, wrong), 0.0)


@triton.jit
def load_features(
    first, second, row, column, mask, channel, channels, dtype: tl.constexpr,
    IGNORED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """(residual, label) of pixels or pooling cells, 0 where masked."""
    if POOLED:
        residual = tl.load(pointer_to(first, row, column), mask=mask, other=0.0)
        y = tl.load(pointer_to(second, row, column), mask=mask, other=0.0)
    else:
        label = load_label(second, row, column, mask, channels, IGNORED)
        u = load_scaled(first, row, column, mask, dtype)
        residual = residual_of(u, label, channel)
        y = tl.where(label == channel, 1.0, 0.0).to(dtype)
    return residual, y


@triton.jit
def logit_gradient(
    logits, target, row, column, mask, grad_probability, entropy_scale, channel, channels,
    dtype: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    """The gradient to logits from the one to p, and from the cross entropy: (p - y) times its scale."""
    label = load_label(target, row, column, mask, channels, IGNORED)
    u = load_scaled(logits, row, column, mask, dtype)
    _, slope = sigmoid_and_slope(u)
    value = grad_probability * slope + entropy_scale * residual_of(u, label, channel)
    return tl.where(label >= 0, value, 0.0)
