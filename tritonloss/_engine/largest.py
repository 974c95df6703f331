"""Each pixel's largest logit and its class, as a record that a walk folds like a loss.

It finds what torch.argmax does on a CPU: of equal logits the first, and NaN before any number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixels import class_of, for_classes, no_class_yet, nothing_yet, smallest_of_lanes

_NO_CLASS = tl.constexpr(1 << 30)


class Options(NamedTuple):
    """What of the question a kernel is compiled for."""

    binary: bool  # one channel: above 0 it is class 1, else class 0


class Largest(NamedTuple):
    """The largest logit so far, [pixels] or [pixels, lanes]."""

    logit: Any
    place: Any  # its class


@triton.jit
def largest_start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Class 0, which is below all others, or, in one channel, beside a logit of 0."""
    lowest: tl.constexpr = 0.0 if OPTIONS.binary else float("-inf")
    return Largest(logit=nothing_yet(lowest, TILE), place=no_class_yet(TILE))


@triton.jit
def largest_add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The largest logit with a block of classes."""
    logit = state.logit
    place = state.place
    for j in tl.static_range(len(block.logits)):
        here = block.logits[j]
        if OPTIONS.binary:
            place = tl.where(here > logit, 1, place)
        else:
            # A NaN is not below, and once found it stays.
            is_larger = (logit == logit) & ~(here <= logit)
            place = tl.where(is_larger, class_of(block, j, TILE), place)
            logit = tl.where(is_larger, here, logit)
    return Largest(logit=logit, place=place)


@triton.jit
def largest_place(state, TILE: tl.constexpr):
    """The class of each pixel's largest logit, int32 [pixels]."""
    if TILE.lanes == 1:
        place = state.place
    else:
        largest = for_classes(largest_logit(state, TILE), TILE)
        # Nothing equals a NaN, so that where there is one only such lanes are left.
        found = (state.logit == largest) | (state.logit != state.logit)
        place = smallest_of_lanes(tl.where(found, state.place, _NO_CLASS), TILE)
    return place


@triton.jit
def largest_logit(state, TILE: tl.constexpr):
    """Each pixel's largest logit, [pixels]."""
    if TILE.lanes == 1:
        logit = state.logit
    else:
        logit = tl.reduce(state.logit, 1, _larger)
    return logit


@triton.jit
def _larger(a, b):
    """The larger number; NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
