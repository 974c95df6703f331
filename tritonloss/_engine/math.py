"""Device functions that the kernels of several losses share.

All of them run in Triton's interpreter too: no inline assembly, no libdevice. They take float32, or
float64 where a test wants the exact mathematics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log(1 + t) = t * (c0 + c1 t + ...) on [0, 1], relative error 1.8e-7 in float32: nine FMAs where
# tl.log takes 25 instructions, and the small values that log(1 + t) would round away are kept.
_LOG1P = tl.constexpr(
    (
        0.9999999403953552,
        -0.4999949336051941,
        0.3331909775733948,
        -0.2484298199415207,
        0.19106008112430573,
        -0.13663248717784882,
        0.07822597771883011,
        -0.029505254700779915,
        0.005232698284089565,
    )
)
# log2(1 + f) = f * (c0 + c1 f + ...) for f in [-1/3, 1/3], relative error 3e-8 before rounding.
_LOG2 = tl.constexpr(
    (
        1.4426950216293335,
        -0.7213465571403503,
        0.4808959662914276,
        -0.36078956723213196,
        0.2887113392353058,
        -0.23678652942180634,
        0.20179913938045502,
        -0.22222118079662323,
        0.2027868926525116,
    )
)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def plus(total, value, WEIGHT: tl.constexpr):
    """The sum total + value * WEIGHT in one fused instruction.

    With the fma written out, the compiler keeps the sums of a long window in scalar registers. Left
    to contract a product and a sum itself, it first packs them into vectors, which it then spills.
    """
    return tl.fma(value, tl.full((), WEIGHT, value.dtype), total)


@triton.jit
def negated(x):
    """-x as part of another instruction; for a minus sign Triton computes 0 - x, which is one more.

    A NaN stays NaN; 0 may become -0.
    """
    return x * -1.0


@triton.jit
def inverse(x):
    """1 / x for x > 0: two instructions in float32 (relative error 3e-7) instead of eight."""
    if x.dtype == tl.float64:
        result = 1.0 / x
    else:
        root = tl.rsqrt(x)
        result = root * root
    return result


@triton.jit
def sigmoid_base2(u):
    """1 / (1 + 2^-u): the sigmoid of a logit x = u / LOG2_E, scaled once for all that use it.

    It takes four instructions in float32, since 1 / d = rsqrt(d)^2 for d > 0; relative error 3e-7.
    """
    return inverse(1.0 + tl.exp2(negated(u)))


@triton.jit
def sigmoids_base2(u):
    """(sigmoid, 1 - sigmoid) of a logit x = u / LOG2_E; the second keeps its digits next to 0.

    From 1 less a float32 sigmoid of 8 only 13 of 24 bits would be right.
    """
    power = tl.exp2(negated(u))
    sigmoid = inverse(1.0 + power)
    return sigmoid, sigmoid * tl.minimum(power, 2.0**126)  # 0, not NaN, where the sigmoid is 0


@triton.jit
def softplus_base2(u):
    """log(1 + 2^u) without overflow; a very negative u still gives 2^u, not 0."""
    t = tl.exp2(negated(tl.abs(u)))
    if u.dtype == tl.float64:
        # log1p by its correction term: exact to rounding where log(1 + t) alone loses t.
        rounded = 1.0 + t
        tail = tl.where(
            rounded == 1.0,
            t,
            tl.log(rounded) * t / (rounded - 1.0 + tl.where(rounded == 1.0, 1.0, 0.0)),
        )
    else:
        tail = _LOG1P[8] * t + _LOG1P[7]
        for i in tl.static_range(7):
            tail = tail * t + _LOG1P[6 - i]
        tail = tail * t
    return tl.maximum(u, 0.0) * LN_2 + tail


@triton.jit
def log2_normal(x):
    """log2(x) of a normal number x > 0, and NaN of a NaN: 15 instructions where tl.log2 takes 27.

    Relative error 1.5e-7, next to 1 as well. Of 0 it is about -127.
    """
    if x.dtype == tl.float64:
        result = tl.log2(x)
    else:
        exponent, scale = _split(x)
        result = _log2_near_one(tl.fma(x, scale, tl.full((), -1.0, x.dtype)), exponent)
    return result


@triton.jit
def log2_one_plus(x):
    """log2(1 + x) for x >= 0; no digit is lost where 1 + x rounds x away; relative error 2.1e-7."""
    rounded = 1.0 + x
    if x.dtype == tl.float64:
        result = (tl.log(rounded) + (x - (rounded - 1.0)) / rounded) * LOG2_E
    else:
        exponent, scale = _split(rounded)
        # (1 + x) / 2^e - 1, rounded once
        result = _log2_near_one(tl.fma(x, scale, scale - 1.0), exponent)
    return result


@triton.jit
def _split(x):
    """(e, 2^-e) of a number 2^e m with m in [2/3, 4/3)."""
    exponent = (x.to(tl.int32, bitcast=True) - 0x3F2AAAAB) >> 23
    scale = (0x3F800000 - exponent * 0x800000).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32), scale


@triton.jit
def _log2_near_one(f, exponent):
    """log2(1 + f) + exponent for f in [-1/3, 1/3]."""
    result = _LOG2[8] * f + _LOG2[7]
    for i in tl.static_range(7):
        result = result * f + _LOG2[6 - i]
    return result * f + exponent


@triton.jit
def sanitised_label(label, in_image, classes, IGNORED: tl.constexpr):
    """int32 class index, or -1 where the pixel is outside the image, ignored or out of range.

    IGNORED is the ignore label if it lies in [0, classes), else -1. For a map of one class, whose
    labels are 0 and 1, IGNORED is -3 minus that number: -2, -3 or -4. There label 1 is the map's
    class 0, and label 0 gets the index 1, which is no class of the map. Labels are compared in
    their own width, so that no int64 label wraps around into a class.
    """
    ONE_CLASS: tl.constexpr = IGNORED < -1
    LABEL: tl.constexpr = -3 - IGNORED if ONE_CLASS else IGNORED
    if ONE_CLASS:
        valid = in_image & (label < 2)
    else:
        valid = in_image & (label < classes)
    if label.dtype != tl.uint8:
        valid = valid & (label >= 0)
    if LABEL >= 0:
        valid = valid & (label != LABEL)
    index = label.to(tl.int32)
    if ONE_CLASS:
        index = 1 - index
    return tl.where(valid, index, -1)


@triton.jit
def label_of(channel, IGNORED: tl.constexpr):
    """The label of the pixels that belong to a class: its number, or 1 if it is the only one."""
    label = channel
    if IGNORED < -1:
        label = channel + 1
    return label
