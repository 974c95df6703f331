"""Kernels of SSIM; the mathematics is told in ssim.py, their moments are in ssim_moments.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.strip_windows import (
    filtered_column,
    filtered_row,
    folded_weight,
    gaussian_weight,
    repeated,
    without_oldest,
)
from .._engine.strips import (
    SIZES,
    Program,
    Row,
    label_plane_of,
    load_column,
    load_values,
    plane_of,
    row_limit,
    store_columns,
    strip_program,
    zeros,
)
from .._engine.sums import Sums, comes_last, leave, total
from .ssim_moments import Pair, dissimilarities, empty_history, load_pair, next_moments

# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _second_plane_of(y_ptr, y_strides, program, SIMILARITY: tl.constexpr, STRIP: tl.constexpr):
    """The plane of labels, or of the other image."""
    if SIMILARITY.from_logits:
        plane = label_plane_of(y_ptr, y_strides, program, STRIP)
    else:
        plane = plane_of(y_ptr, y_strides, program, STRIP)
    return plane


@triton.jit(do_not_specialize=SIZES)
def _ssim_forward_kernel(
    x_ptr,  # [N, C, H, W]: logits or image
    y_ptr,  # [N, H, W] labels, or [N, C, H, W] image
    result_ptr,  # []: the mean; or [N, C, out_height, out_width]: of every pixel, if MAPPED
    scale_ptr,  # []: 1 / count, unless MAPPED
    scratch_ptr,  # see _engine/sums.py
    tickets_ptr,
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
    window,
    programs,
    SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Reads x and y once; mean dissimilarity of logits, mean similarity or its map of images."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    pair = Pair(
        x=plane_of(x_ptr, x_strides, program, STRIP),
        y=_second_plane_of(y_ptr, y_strides, program, SIMILARITY, STRIP),
        classes=channels,
        height=height,
        width=width,
        window=window,
    )
    map_plane = plane_of(result_ptr, result_strides, program, STRIP)

    dissimilarity_sum = zeros(pair.x, STRIP)
    count = zeros(pair.x, STRIP)
    history = empty_history(pair, WINDOW, STRIP)
    rows = tl.minimum(STRIP.rows, out_height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        moments, history = next_moments(i, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
        limit = tl.where(i >= SIZE - 1, out_width, 0)
        row = Row(number=program.first_row + i - (SIZE - 1), chunk=program.chunk, limit=limit)
        if SIMILARITY.from_logits:
            _, _, valid = load_pair(
                pair, row, program.channel, SIMILARITY, STRIP, 0, COLUMNS, "zeros"
            )
        similarities = ()
        for v in tl.static_range(COLUMNS):
            found = dissimilarities(moments, v, SIMILARITY)
            if SIMILARITY.full:
                dissimilarity = (
                    found.luminance + found.structure - found.luminance * found.structure
                )
            else:
                dissimilarity = found.structure
            if SIMILARITY.from_logits:
                counts = valid[v]
            else:
                counts = program.chunk * COLUMNS + v < limit
            dissimilarity_sum += tl.where(counts, dissimilarity, 0.0)
            count += tl.where(counts, 1.0, 0.0)
            similarities = similarities + (1.0 - dissimilarity,)
        if MAPPED:
            store_columns(map_plane, row, similarities, STRIP)
    if not MAPPED:
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


# --- backward: coefficients -----------------------------------------------------------------------


class Coefficients(NamedTuple):
    """Of x_j, d_j and y_j in the gradients, which the window's adjoint sums up; or their planes.

    With the loss dissimilarity = u + v - u v per pixel, its gradient to x_j is
    sum_i w_ij (a_i + 2 b_i (x_j - mean_x_i) + 2 c_i (d_j - mean_d_i)), where b = dv / d(variance_x
    + variance_y) and c = dv / d variance_d.
    """

    constant_x: Any  # a - 2 b mean_x - 2 c mean_d
    slope_both: Any  # 2 b
    slope_d: Any  # 2 c
    constant_y: Any  # for the gradient to y: a' - 2 b mean_y + 2 c mean_d


@triton.jit
def _coefficient_planes(pointer, strides, stride, program, STRIP: tl.constexpr):
    """The planes of all coefficients; ``stride`` is from map to map, in grains."""
    GRAIN: tl.constexpr = STRIP.grain
    step = stride.to(tl.int64) * GRAIN
    return Coefficients(
        constant_x=plane_of(pointer, strides, program, STRIP),
        slope_both=plane_of(pointer + step, strides, program, STRIP),
        slope_d=plane_of(pointer + 2 * step, strides, program, STRIP),
        constant_y=plane_of(pointer + 3 * step, strides, program, STRIP),
    )


@triton.jit
def _of_all_channels(program, first_channel):
    """The program of a group of planes, its channel counted from the image's first."""
    return Program(
        image=program.image,
        channel=program.channel + first_channel,
        chunk=program.chunk,
        first_column=program.first_column,
        first_row=program.first_row,
    )


@triton.jit
def _coefficients_of(moments, v: tl.constexpr, scale, SIMILARITY: tl.constexpr):
    """The coefficients of the windows in column v; scale is the gradient of a dissimilarity."""
    mean_x = moments.mean_x[v]
    mean_d = moments.mean_d[v]
    found = dissimilarities(moments, v, SIMILARITY)
    mean_y = mean_x - mean_d
    to_structure = 2.0 * scale * found.inverse_e
    if SIMILARITY.full:
        to_structure = to_structure * (1.0 - found.luminance)
        to_luminance = 2.0 * scale * found.inverse_d * (1.0 - found.structure)
        direct_x = to_luminance * (mean_d - found.luminance * mean_x)
        direct_y = to_luminance * (-mean_d - found.luminance * mean_y)
    else:
        direct_x = tl.zeros_like(to_structure)
        direct_y = direct_x
    to_both = -found.structure * to_structure
    residual_part = to_structure * mean_d
    return Coefficients(
        constant_x=direct_x - to_both * mean_x - residual_part,
        slope_both=to_both,
        slope_d=to_structure,
        constant_y=direct_y - to_both * mean_y + residual_part,
    )


@triton.jit(do_not_specialize=SIZES)
def _ssim_coefficients_kernel(
    grad_ptr,  # []: of the mean; or [N, C, out_height, out_width]: of the map, if MAPPED
    scale_ptr,  # []: 1 / count
    x_ptr,  # [N, C, H, W]
    y_ptr,  # [N, H, W] or [N, C, H, W]
    coefficients_ptr,  # [3 or 4, N, C, out_height, out_width]
    grad_strides,
    x_strides,
    y_strides,
    coefficient_strides,  # of one map
    coefficient_stride,  # from map to map, in grains
    first_channel,
    channels,
    classes,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
    MAPPED: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Maps of Coefficients, which the window's adjoint makes the gradient; the moments anew."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    group = strip_program(channels, tiles_x, tiles_y, STRIP)
    pair = Pair(
        x=plane_of(x_ptr, x_strides, group, STRIP),
        y=_second_plane_of(y_ptr, y_strides, group, SIMILARITY, STRIP),
        classes=classes,
        height=height,
        width=width,
        window=window,
    )
    program = _of_all_channels(group, first_channel)
    if MAPPED:
        grad_plane = plane_of(grad_ptr, grad_strides, group, STRIP)
    else:
        upstream = tl.load(grad_ptr).to(dtype) * tl.load(scale_ptr)
    planes = _coefficient_planes(
        coefficients_ptr, coefficient_strides, coefficient_stride, group, STRIP
    )

    history = empty_history(pair, WINDOW, STRIP)
    rows = tl.minimum(STRIP.rows, out_height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        moments, history = next_moments(i, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT)
        limit = tl.where(i >= SIZE - 1, out_width, 0)
        row = Row(number=program.first_row + i - (SIZE - 1), chunk=program.chunk, limit=limit)
        if SIMILARITY.from_logits:
            _, _, valid = load_pair(
                pair, row, program.channel, SIMILARITY, STRIP, 0, COLUMNS, "zeros"
            )
        if MAPPED:
            grad = load_values(grad_plane, row, STRIP, 0, COLUMNS, "zeros")
        maps_x = ()
        maps_both = ()
        maps_d = ()
        maps_y = ()
        for v in tl.static_range(COLUMNS):
            scale = grad[v] if MAPPED else upstream
            if SIMILARITY.from_logits:
                scale = tl.where(valid[v], scale, 0.0)
            else:
                scale = -scale  # of the similarity
            found = _coefficients_of(moments, v, scale, SIMILARITY)
            maps_x = maps_x + (found.constant_x,)
            maps_both = maps_both + (found.slope_both,)
            maps_d = maps_d + (found.slope_d,)
            maps_y = maps_y + (found.constant_y,)
        store_columns(planes.constant_x, row, maps_x, STRIP)
        store_columns(planes.slope_both, row, maps_both, STRIP)
        store_columns(planes.slope_d, row, maps_d, STRIP)
        if BOTH:
            store_columns(planes.constant_y, row, maps_y, STRIP)


# --- backward: adjoint ----------------------------------------------------------------------------


@triton.jit
def _adjoint_rows(
    planes, row, width, window, WINDOW: tl.constexpr, SHIFT: tl.constexpr, STRIP: tl.constexpr,
    MAPS: tl.constexpr,
):  # fmt: skip
    """The adjoint of the window along one row, of the first MAPS planes: a tuple of tuples."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    COLUMNS: tl.constexpr = STRIP.columns
    rows = ()
    if COLUMNS == 1:
        RADIUS: tl.constexpr = WINDOW.size // 2
        zero = zeros(planes[0], STRIP)
        sums = repeated(zero, MAPS)
        for step in tl.range(0, window):
            tap = step - RADIUS
            weight = gaussian_weight(tap, zero.dtype, WINDOW)
            weight = folded_weight(row.chunk, tap, width, weight, weight, zero.dtype, WINDOW)
            added = ()
            for m in tl.static_range(MAPS):
                column = row.chunk + (SHIFT + RADIUS) + tap
                value = load_column(planes[m], row, column, STRIP, "zeros")
                added = added + (sums[m] + value * weight,)
            sums = added
        for m in tl.static_range(MAPS):
            rows = rows + ((sums[m],),)
    else:
        for m in tl.static_range(MAPS):
            values = load_values(planes[m], row, STRIP, SHIFT, COLUMNS + SIZE - 1, "zeros")
            rows = rows + (filtered_row(values, WEIGHTS, SIZE, COLUMNS),)
    return rows


@triton.jit
def _folded_column(
    partials, row, out_row, height, dtype: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """filtered_column with the weights of a mirrored image: see folded_weight."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    sums = ()
    for j in tl.static_range(SIZE):
        weight = folded_weight(
            out_row + j, SIZE // 2 - j, height, WEIGHTS[SIZE - 1 - j], WEIGHTS[SIZE - 1 - j], dtype,
            WINDOW,
        )  # fmt: skip
        for v in tl.static_range(COLUMNS):
            sum_so_far = row[v] * weight
            if j < SIZE - 1:
                sum_so_far += partials[j * COLUMNS + v]
            sums = sums + (sum_so_far,)
    return sums, without_oldest(sums, SIZE, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def _ssim_backward_kernel(
    coefficients_ptr,  # [3 or 4, N, C, out_height, out_width]
    x_ptr,  # [N, C, H, W]
    y_ptr,  # [N, H, W] or [N, C, H, W]
    grad_x_ptr,  # [N, C, H, W]
    grad_y_ptr,  # like y, if BOTH
    coefficient_strides,  # of one map
    coefficient_stride,  # from map to map, in grains
    x_strides,
    y_strides,
    grad_x_strides,
    grad_y_strides,
    first_channel,
    channels,
    classes,
    height,
    width,
    out_height,
    out_width,
    tiles_x,
    tiles_y,
    window,
    SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
    BOTH: tl.constexpr,
):
    """The window's adjoint of the coefficient maps, times what they multiply at the pixel."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    MAPS: tl.constexpr = 4 if BOTH else 3
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    group = strip_program(channels, tiles_x, tiles_y, STRIP)
    pair = Pair(
        x=plane_of(x_ptr, x_strides, group, STRIP),
        y=_second_plane_of(y_ptr, y_strides, group, SIMILARITY, STRIP),
        classes=classes,
        height=height,
        width=width,
        window=window,
    )
    program = _of_all_channels(group, first_channel)
    grad_x_plane = plane_of(grad_x_ptr, grad_x_strides, group, STRIP)
    grad_y_plane = plane_of(grad_y_ptr, grad_y_strides, group, STRIP)
    planes = _coefficient_planes(
        coefficients_ptr, coefficient_strides, coefficient_stride, group, STRIP
    )

    none_yet = repeated(zeros(planes[0], STRIP), (SIZE - 1) * COLUMNS)
    history = repeated(none_yet, MAPS)
    rows = tl.minimum(STRIP.rows, height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        # the adjoint, map by map
        number = program.first_row + i + SHIFT
        limit = row_limit(number, out_height, out_width)
        row = Row(number=number, chunk=program.chunk, limit=limit)
        row_sums = _adjoint_rows(planes, row, width, window, WINDOW, SHIFT, STRIP, MAPS)
        number = program.first_row + i - (SIZE - 1)
        sums = ()
        unfinished = ()
        for m in tl.static_range(MAPS):
            if WINDOW.padding == "reflect":
                finished, partials = _folded_column(
                    history[m], row_sums[m], number, height, dtype, WINDOW, COLUMNS
                )
            else:
                finished, partials = filtered_column(
                    history[m], row_sums[m], WEIGHTS, SIZE, COLUMNS
                )
            sums = sums + (finished,)
            unfinished = unfinished + (partials,)
        history = unfinished

        # what the sums multiply at the pixel
        limit = tl.where(i >= SIZE - 1, width, 0)
        out_row = Row(number=number, chunk=program.chunk, limit=limit)
        x, d, valid = load_pair(
            pair, out_row, program.channel, SIMILARITY, STRIP, 0, COLUMNS, "zeros"
        )
        found = Coefficients(
            constant_x=sums[0], slope_both=sums[1], slope_d=sums[2], constant_y=sums[MAPS - 1]
        )
        gradient_x = ()
        gradient_y = ()
        for v in tl.static_range(COLUMNS):
            residual_part = found.slope_d[v] * d[v]
            gradient = found.constant_x[v] + found.slope_both[v] * x[v] + residual_part
            if SIMILARITY.from_logits:
                gradient = tl.where(valid[v], gradient * x[v] * (1.0 - x[v]), 0.0)
            gradient_x = gradient_x + (gradient,)
            if BOTH:
                slope = found.slope_both[v]
                gradient = found.constant_y[v] + slope * (x[v] - d[v]) - residual_part
                gradient_y = gradient_y + (gradient,)
        store_columns(grad_x_plane, out_row, gradient_x, STRIP)
        if BOTH:
            store_columns(grad_y_plane, out_row, gradient_y, STRIP)
