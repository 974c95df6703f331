"""Device functions over tiles of anchors and keys: what is loaded, scores, pairs and slopes.

A score is the product of an anchor and a key over the temperature, times log2 e: all exponentials
here are powers of 2. Scores of a tile are in registers and nowhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import inverse

# What nothing is less than, and yet a number: the largest score of no keys.
LOWEST = tl.constexpr(-3.0e38)


class Tile(NamedTuple):
    """What the kernels are compiled for."""

    anchors: int  # rows of a tile
    keys: int  # columns of a tile
    dims: int  # of an embedding
    depth: int  # dimensions that are multiplied at once, a power of two: all, or a part
    width: int  # dimensions of a program's gradient, a power of two: likewise
    grain: int  # the distance of rows is a multiple of it
    precision: str  # of products of float32
    double: bool  # whether the arithmetic is float64
    own: bool  # whether the keys are the anchors
    hardest: bool  # whether only the hardest pairs count


class Matrix(NamedTuple):
    """Embeddings, one below the other."""

    pointer: Any
    stride: Any  # of the rows, in grains
    count: Any  # how many there are


class Rows(NamedTuple):
    """Rows of a matrix that a tile has as its rows, or as its columns."""

    index: Any  # int32
    there: Any  # whether they are to be loaded
    classes: Any  # int32; -1 of a key that has none, -2 of an anchor


class Side(NamedTuple):
    """What is known of the anchors of a tile's rows, or of its columns."""

    log_sum: Any  # of the negatives, in base 2; infinity where nothing counts
    weight: Any  # the mean of sigmoids over the positives
    share: Any  # 1 over the number of positives, or 0
    lowest: Any  # scores of negatives that count are no lower
    highest: Any  # scores of positives that count are no higher


@triton.jit
def anchors_of(matrix, classes_ptr, first, TILE: tl.constexpr):
    """The anchors of a tile that begins with ``first``."""
    index = first + tl.arange(0, TILE.anchors)
    there = index < matrix.count
    classes = tl.load(classes_ptr + index, mask=there, other=-1)
    return Rows(index=index, there=there, classes=tl.where(classes < 0, -2, classes))


@triton.jit
def keys_of(classes_ptr, first, end, TILE: tl.constexpr):
    """The keys of a tile that begins with ``first``, before ``end``; those of no class are not."""
    index = first + tl.arange(0, TILE.keys)
    classes = tl.load(classes_ptr + index, mask=index < end, other=-1)
    return Rows(index=index, there=classes >= 0, classes=classes)


@triton.jit
def slice_of(matrix, rows, first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Dimensions of rows from the first one on, [rows, WIDTH]; 0 of rows that are not there."""
    column = first + tl.arange(0, WIDTH)
    inside = rows.there[:, None]
    if TILE.dims % WIDTH != 0:
        inside = inside & (column < TILE.dims)[None, :]
    row = rows.index.to(tl.int64) * matrix.stride * TILE.grain
    return tl.load(matrix.pointer + row[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def nothing(WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Zeros [anchors, WIDTH] in the dtype of the arithmetic."""
    return tl.full((TILE.anchors, WIDTH), 0.0, tl.float64 if TILE.double else tl.float32)


@triton.jit
def added_product(total, left, right, TILE: tl.constexpr):
    """The sum total + left right, of matrices."""
    if TILE.double:
        result = tl.dot(left, right, total, out_dtype=tl.float64)
    else:
        result = tl.dot(left, right, total, input_precision=TILE.precision)
    return result


@triton.jit
def scores_of(anchors, rows, held, keys, columns, scale, TILE: tl.constexpr):
    """Scores [anchors, keys] of a tile; ``held`` are its anchors where a slice has all of them."""
    if TILE.depth >= TILE.dims:
        key = slice_of(keys, columns, 0, TILE.depth, TILE)
        scores = added_product(nothing(TILE.keys, TILE), held, tl.trans(key), TILE)
    else:
        scores = nothing(TILE.keys, TILE)
        for first in tl.range(0, TILE.dims, TILE.depth):
            anchor = slice_of(anchors, rows, first, TILE.depth, TILE)
            key = slice_of(keys, columns, first, TILE.depth, TILE)
            scores = added_product(scores, anchor, tl.trans(key), TILE)
    return scores * scale


@triton.jit
def are_same(rows, columns, TILE: tl.constexpr):
    """Whether anchor and key have one class; an anchor is no key of its own."""
    same = rows.classes[:, None] == columns.classes[None, :]
    if TILE.own:
        same = same & (rows.index[:, None] != columns.index[None, :])
    return same


@triton.jit
def are_others(rows, columns):
    """Whether the key has a class, and another one."""
    return (rows.classes[:, None] != columns.classes[None, :]) & columns.there[None, :]


@triton.jit
def bounds_of(bounds_ptr, rows, anchors, TILE: tl.constexpr):
    """(lowest score of negatives, highest of positives) that count of these anchors."""
    # Where nothing is bounded both must be there, whatever they are.
    lowest = rows.classes
    highest = rows.classes
    if TILE.hardest:
        lowest = tl.load(bounds_ptr + rows.index, mask=rows.there, other=0.0)
        highest = tl.load(bounds_ptr + anchors + rows.index, mask=rows.there, other=0.0)
    return lowest, highest


@triton.jit
def side_of(statistics_ptr, bounds_ptr, rows, anchors, TILE: tl.constexpr):
    """What is known of these anchors; of those that are not there nothing counts."""
    pointer = statistics_ptr + rows.index
    lowest, highest = bounds_of(bounds_ptr, rows, anchors, TILE)
    return Side(
        log_sum=tl.load(pointer, mask=rows.there, other=float("inf")),
        weight=tl.load(pointer + anchors, mask=rows.there, other=0.0),
        share=tl.load(pointer + 2 * anchors, mask=rows.there, other=0.0),
        lowest=lowest,
        highest=highest,
    )


@triton.jit
def slopes_of(scores, same, side, TILE: tl.constexpr):
    """The gradient of each anchor's loss to its scores in natural units, of keys with a class.

    The sides' numbers have the shape of the scores, or are broadcast to it.
    """
    power = tl.exp2(scores - side.log_sum)
    positive = side.share * inverse(1.0 + power)
    negative = side.weight * power
    if TILE.hardest:
        # Written so that what is no number counts.
        positive = tl.where(scores > side.highest, 0.0, positive)
        negative = tl.where(scores < side.lowest, 0.0, negative)
    return tl.where(same, positive * -1.0, negative)
