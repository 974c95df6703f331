"""Forward kernel of SSIM; ssim.py has the mathematics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.strips import (
    SIZES,
    Program,
    Row,
    counted,
    label_plane_of,
    plane_of,
    row_limit,
    store_columns,
    strip_program,
    zeros,
)
from .._engine.sums import Sums, comes_last, leave, total
from .ssim_moments import Pair, dissimilarities, dissimilarity
from .ssim_sums import advanced, begun
from .ssim_values import exchange_of, valid_columns


class Maps(NamedTuple):
    """The two maps that are compared, and their size."""

    x: Any  # pointers
    y: Any
    x_strides: Any
    y_strides: Any
    classes: Any
    height: Any
    width: Any
    window: Any  # its size


@triton.jit
def _second_plane_of(y_ptr, y_strides, program, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """The plane of labels, or of the other image."""
    if SIMILARITY.from_logits:
        plane = label_plane_of(y_ptr, y_strides, program, STRIP)
    else:
        plane = plane_of(y_ptr, y_strides, program, STRIP)
    return plane


@triton.jit
def pair_of(maps, program, exchange_ptr, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """The planes of both maps that a program works on."""
    return Pair(
        x=plane_of(maps.x, maps.x_strides, program, STRIP),
        y=_second_plane_of(maps.y, maps.y_strides, program, SIMILARITY, STRIP),
        classes=maps.classes,
        height=maps.height,
        width=maps.width,
        window=maps.window,
        exchange_ptr=exchange_ptr,
        pivot_x=0.0,
        pivot_d=0.0,
        share=0.5,
        ones=1.0,
        one=1.0,
    )


@triton.jit
def _of_rows(rows, program, STRIP: tl.constexpr):
    """The strip's program with ``rows`` rows in the place of the strip's."""
    ROWS: tl.constexpr = STRIP.rows
    return Program(
        image=program.image,
        channel=program.channel,
        chunk=program.chunk,
        first_column=program.first_column,
        first_row=program.first_row // ROWS * rows,
    )


@triton.jit(do_not_specialize=(*SIZES, "rows"))
def _ssim_forward_kernel(
    x_ptr,  # [N, C, H, W]: logits or image
    y_ptr,  # [N, H, W] labels, or [N, C, H, W] image
    result_ptr,  # []: the mean; or [N, C, out_height, out_width]: of every pixel, if MAPPED
    scale_ptr,  # []: 1 / count, unless MAPPED
    scratch_ptr,  # see _engine/sums.py
    tickets_ptr,
    exchange_ptr,  # see ssim_values.py
    x_strides,
    y_strides,
    result_strides,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    rows,
    window,
    programs,
    SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Reads x and y once; writes the mean loss of logits, or the mean or map of a similarity."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    SQUARE: tl.constexpr = 1.0 if SIMILARITY.careful else WINDOW.unit * WINDOW.unit
    program = _of_rows(rows, strip_program(channels, tiles_x, tiles_y, STRIP), STRIP)
    maps = Maps(
        x=x_ptr, y=y_ptr, x_strides=x_strides, y_strides=y_strides, classes=channels, height=height,
        width=width, window=window,
    )  # fmt: skip
    exchange = exchange_of(exchange_ptr, tl.program_id(0), STRIP)
    pair = pair_of(maps, program, exchange, SIMILARITY, STRIP)
    map_plane = plane_of(result_ptr, result_strides, program, STRIP)

    # row by row: moments, dissimilarities, their sums
    dissimilarity_sum = zeros(pair.x, STRIP)
    count = zeros(pair.x, STRIP)
    pair, history = begun(pair, program, rows, SIMILARITY, WINDOW, STRIP, SHIFT)
    left = out_height - program.first_row
    steps = tl.minimum(rows, left) + (SIZE - 1)
    for i in tl.range(0, counted(steps, STRIP), UNROLL):
        for j in tl.static_range(UNROLL):
            moments, history = advanced(
                i + j, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT
            )
            number = i + j - (SIZE - 1)
            limit = row_limit(tl.cast(number, tl.int32), left, out_width)
            row = Row(number=program.first_row + number, chunk=program.chunk, limit=limit)
            if SIMILARITY.from_logits:
                valid = valid_columns(pair, row, SIMILARITY, STRIP)
            similarities = ()
            for v in tl.static_range(COLUMNS):
                if SIMILARITY.from_logits and not SIMILARITY.careful:
                    different = dissimilarity(moments, v, SIMILARITY, SQUARE)
                else:
                    found = dissimilarities(moments, v, SIMILARITY, SQUARE)
                    different = found.structure
                    if SIMILARITY.full:
                        different += found.luminance * (1.0 - found.structure)
                if SIMILARITY.from_logits:
                    counts = valid[v]
                else:
                    counts = program.chunk * COLUMNS + v < limit
                weight = tl.where(counts, 1.0, 0.0).to(count.dtype)
                dissimilarity_sum += different * weight
                count += weight
                similarities = similarities + (1.0 - different,)
            if MAPPED:
                store_columns(map_plane, row, similarities, STRIP)
    if not MAPPED:
        # the mean, by the last program
        sums = Sums(scratch=scratch_ptr, tickets=tickets_ptr, programs=programs, rows=2)
        leave(sums, 0, tl.sum(dissimilarity_sum))
        leave(sums, 1, tl.sum(count))
        if comes_last(sums):
            samples = total(sums, 1)
            scale = 1.0 / tl.maximum(samples, 1.0)
            mean = total(sums, 0) * scale
            if not SIMILARITY.from_logits:
                mean = samples * scale - mean
            tl.store(result_ptr, mean)
            tl.store(scale_ptr, scale)
