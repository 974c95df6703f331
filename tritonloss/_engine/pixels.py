"""Pixels: what a pixelwise loss is made of, whatever the map its logits come from.

A program owns a run of pixels of one image and goes through their classes in blocks, unrolled, so
that the label of a pixel is handled once and no sum over its classes ever leaves a warp:

- contiguous logits: neighbouring addresses are pixels. A lane owns a few neighbouring pixels
  (``Tile.grain`` of them are moved at once) with all of their classes: vectors [pixels].
- channels_last logits: neighbouring addresses are classes. A few lanes share a pixel, each with
  every ``Tile.lanes``-th class; what they find is joined once per pixel: tiles [pixels, lanes].

A loss is a ``Record`` of device functions. They see the values of a block of classes and never
where these come from: that is the business of the walk (``pixel_walk.py``). CONTRIBUTING.md shows
one; tests/engine/test_pixels.py runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import LOG2_E

Function = Callable[..., Any]


class Tile(NamedTuple):
    """What a program works on; known when a kernel is compiled."""

    pixels: int
    lanes: int  # how many share a pixel's classes; with 1 a lane has all of them
    unroll: int  # classes of a lane in one block
    grain: int  # pixels that can be moved at once in every map; 1 unless the maps are flat
    flat: bool  # a map's pixels lie at even distances; labels and contiguous logits side by side
    classes: int
    double: bool  # whether the arithmetic is in float64
    bundle: int  # classes of a bundle, at least as many as lanes; the same in both passes
    slots: int  # how many neighbouring slots of any block are in one bundle
    scaled: bool = False  # logits of blocks, and of own classes, are multiplied by log2 e


class Pixel(NamedTuple):
    """The pixels of a program, [pixels] each."""

    label: Any  # int32, -1 where there is none
    own: Any  # the own class, -1 where there is none
    inside: Any  # whether the image has such a pixel


class Given(NamedTuple):
    """What a loss was given beside logits and labels."""

    own_table: Any  # [C]: a number for a pixel's own class; the logits where there is no table
    other_table: Any  # [C]: a number for the other classes; the logits likewise
    numbers: Any  # a tuple; no kernel is compiled for their values


class Block(NamedTuple):
    """Some classes of a program's pixels."""

    logits: Any  # a tuple of slots, [pixels] or [pixels, lanes]; -inf where no class is left
    exists: Any  # a tuple of slots, [1, lanes]: whether the lane has a class left
    start: Any  # the first class
    owned: Any  # a tuple of slots, where known: whether the class is a valid pixel's own
    base2: Any  # a tuple of slots, where known: the logits times log2 e


def never(options: Any) -> bool:
    """For losses that leave it to their scale to be silent."""
    return False


def always(options: Any) -> bool:
    """For losses whose pixels may have any weight."""
    return True


@triton.jit
def no_bundles(saved, pixel, TILE: tl.constexpr):
    """No bundles: for losses whose gradient needs the largest logit of none."""
    return ()


class Record(NamedTuple):
    """A pixelwise loss, as device functions.

    At pixels that are not valid, these functions may return anything: the walk replaces it. Only
    the slopes, which are proportional to the scale, have to be finite there, and 0 if the scale is,
    where all logits are finite, whatever has been saved of such a pixel. OPTIONS is the loss's own
    NamedTuple of what kernels are compiled for, TILE a ``Tile``.

    Attributes:
        start: (OPTIONS, TILE) -> the state before the first class, a tuple. A sum or an extreme
            over classes, one value per pixel in the end, begins as ``nothing_yet``.
        add: (state, block, pixel, given, OPTIONS, TILE) -> the state with a block of classes.
        finish: (state, own, pixel, given, OPTIONS, TILE) -> (value, weight, saved), [pixels] each.
            ``own`` are the logits of the pixels' own classes, 0 where a valid pixel has none. The
            mean divides by the sum of the weights; ``saved`` are the maps for the backward pass.
        factors: (scale, saved, looked_up, pixel, given, OPTIONS, TILE) -> what the slopes of a
            pixel's classes share, a tuple. ``scale`` is the factor of a value's gradient.
        slope: (factors, block, SLOT, given, OPTIONS, TILE) -> the gradient of a slot's logits.
        lookups: (saved, pixel, TILE) -> the classes, a tuple of [pixels], whose logits ``factors``
            gets as ``looked_up``. Where a class is negative the logit is 0; it has to be negative
            where there is no pixel.
        bundles: (saved, pixel, TILE) -> the numbers of bundles, a tuple of [pixels], whose largest
            logits ``factors`` gets as well, before those of ``lookups``.
        join: (state, OPTIONS, TILE) -> the state before a second pass over the classes, or None if
            the loss has one pass only.
        add_again: like ``add``, in the second pass.
        silent: OPTIONS -> whether, of finite logits, the slopes of a pixel that is not valid are 0
            whatever the scale, if none of the classes counts as its own.
        weighs: OPTIONS -> whether the weight of a valid pixel may be other than 1.
    """

    start: Function
    add: Function
    finish: Function
    factors: Function
    slope: Function
    lookups: Function
    bundles: Function = no_bundles
    join: Function | None = None
    add_again: Function | None = None
    silent: Callable[[Any], bool] = never
    weighs: Callable[[Any], bool] = always


# --- device functions: classes --------------------------------------------------------------------


@triton.jit
def class_of(block, SLOT: tl.constexpr, TILE: tl.constexpr):
    """The class in a slot of a block: scalar, or [1, lanes]."""
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        result = block.start + SLOT
    else:
        result = block.start + SLOT * LANES + tl.arange(0, LANES)[None, :]
    return result


@triton.jit
def is_own(own, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    """Where a slot has the pixel's own class; ``own`` is shaped to broadcast over classes."""
    if len(block.owned) == 0:
        result = class_of(block, SLOT, TILE) == own
    else:
        result = block.owned[SLOT]
    return result


@triton.jit
def in_base2(block, SLOT: tl.constexpr):
    """A slot's logits times log2 e."""
    if len(block.base2) == 0:
        result = block.logits[SLOT] * LOG2_E
    else:
        result = block.base2[SLOT]
    return result


@triton.jit
def less_where(condition, x, y):
    """Where a condition holds the difference x - y, elsewhere x.

    Of a plain difference the compiler makes two instructions: y or 0, and x less that. A product
    that is y leaves it one, carried out under the condition.
    """
    half = tl.full((), -0.5, x.dtype)
    return tl.where(condition, tl.fma(y * 2.0, half, x), x)


@triton.jit
def first_of_slot(block, SLOT: tl.constexpr, TILE: tl.constexpr):
    """The first class in a slot of a block, scalar."""
    return block.start + SLOT * TILE.lanes


@triton.jit
def for_classes(x, TILE: tl.constexpr):
    """A value of each pixel, shaped to broadcast over its classes: [pixels], or [pixels, 1]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = x[:, None]
    return result


@triton.jit
def largest_of_lanes(x, TILE: tl.constexpr):
    """The largest of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.max(x, axis=1)
    return result


@triton.jit
def smallest_of_lanes(x, TILE: tl.constexpr):
    """The smallest of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.min(x, axis=1)
    return result


@triton.jit
def sum_of_lanes(x, TILE: tl.constexpr):
    """The sum of what a pixel's lanes have found, [pixels]."""
    if TILE.lanes == 1:
        result = x
    else:
        result = tl.sum(x, axis=1)
    return result


@triton.jit
def nothing_yet(value: tl.constexpr, TILE: tl.constexpr):
    """How a sum or an extreme over classes starts: [pixels], or [pixels, lanes]."""
    PIXELS: tl.constexpr = TILE.pixels
    LANES: tl.constexpr = TILE.lanes
    dtype: tl.constexpr = tl.float64 if TILE.double else tl.float32
    if LANES == 1:
        result = tl.full((PIXELS,), value, dtype)
    else:
        result = tl.full((PIXELS, LANES), value, dtype)
    return result


@triton.jit
def no_class_yet(TILE: tl.constexpr):
    """How the search for a class starts: class 0, int32."""
    PIXELS: tl.constexpr = TILE.pixels
    LANES: tl.constexpr = TILE.lanes
    if LANES == 1:
        result = tl.zeros((PIXELS,), tl.int32)
    else:
        result = tl.zeros((PIXELS, LANES), tl.int32)
    return result


@triton.jit
def load_table(table, block, SLOT: tl.constexpr, TILE: tl.constexpr):
    """A slot's entries in a table [classes]; 0 where a lane has no class left."""
    if TILE.lanes == 1:
        entry = tl.load(table + class_of(block, SLOT, TILE))
    else:
        entry = tl.load(table + class_of(block, SLOT, TILE), mask=block.exists[SLOT], other=0.0)
    return entry.to(tl.float64 if TILE.double else tl.float32)


@triton.jit
def load_entry(table, index, TILE: tl.constexpr):
    """A table's entry for one class of each pixel, [pixels]; an index out of range is clamped."""
    entry = tl.load(table + nearest_class(index, TILE))
    return entry.to(tl.float64 if TILE.double else tl.float32)


@triton.jit
def nearest_class(index, TILE: tl.constexpr):
    """The class nearest to an index: one that comes from data must not lead outside the memory."""
    return tl.minimum(tl.maximum(index, 0), TILE.classes - 1)


@triton.jit
def no_lookups(saved, pixel, TILE: tl.constexpr):
    """No classes: for losses whose gradient needs the logit of no class in particular."""
    return ()


@triton.jit
def own_class(saved, pixel, TILE: tl.constexpr):
    """Each pixel's own class: for losses whose gradient needs its logit."""
    return (pixel.own,)
