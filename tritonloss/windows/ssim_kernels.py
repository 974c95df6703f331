"""Kernels of SSIM; the mathematics stands in ssim.py.

All of them work on x and the residual d = x - y, whose window variance is the numerator of 1 - S_2:
formed as such, nothing cancels when the two maps are nearly alike.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, plus, sanitised_label, sigmoid_base2
from .._engine.strips import (
    SIZES,
    filtered_column,
    filtered_row,
    folded_weight,
    gaussian_weight,
    label_plane_of,
    load_column,
    load_columns,
    load_values,
    plane_of,
    repeated,
    row_limit,
    source_row,
    store_columns,
    strip_program,
    without_oldest,
)


class Similarity(NamedTuple):
    """What is compared, and how; known when a kernel is compiled."""

    from_logits: bool  # x = sigmoid(logits) against one-hot labels; else two images
    full: bool  # luminance and contrast-structure (Eq. 7); else contrast-structure alone (Eq. 9)
    c1: float
    c2: float
    ignored: int  # the ignore label if it is one of the classes, else -1


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _load_pair(
    x_plane, y_plane, row, chunk, limit, channel, classes, dtype: tl.constexpr,
    SIMILARITY: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """(x, x - y, valid) of COUNT columns; x and y are 0 where a pixel is not valid."""
    IGNORED: tl.constexpr = SIMILARITY.ignored
    first, inside = load_columns(x_plane, row, chunk, limit, STRIP, SHIFT, COUNT, PADDING)
    second, _ = load_columns(y_plane, row, chunk, limit, STRIP, SHIFT, COUNT, PADDING)
    xs = ()
    residuals = ()
    valids = ()
    for j in tl.static_range(COUNT):
        x = first[j].to(dtype)
        if SIMILARITY.from_logits:
            label = sanitised_label(second[j], inside[j], classes, IGNORED)
            valid = label >= 0
            # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
            x = tl.where(valid, sigmoid_base2(x * LOG2_E), 0.0)
            y = tl.where(label == channel, 1.0, 0.0).to(dtype)
        else:
            valid = inside[j]
            y = second[j].to(dtype)
        xs = xs + (x,)
        residuals = residuals + (x - y,)
        valids = valids + (valid,)
    return xs, residuals, valids


@triton.jit
def _moments_about(
    x, d, START: tl.constexpr, STEP: tl.constexpr, WEIGHTS: tl.constexpr, SIZE: tl.constexpr
):
    """(shift_x, shift_d, variance_x + variance_y, variance_d) of SIZE taps about the middle one.

    The taps are x[START], x[START + STEP], ...; symmetric ones are taken in pairs.
    """
    centre_x = x[START + SIZE // 2 * STEP]
    centre_d = d[START + SIZE // 2 * STEP]
    if SIZE == 1:
        first_x = centre_x - centre_x  # 0, and NaN where the pixel is not finite
        first_d = centre_d - centre_d
    else:
        first_x = tl.zeros_like(centre_x)
        first_d = tl.zeros_like(centre_x)
    second_both = tl.zeros_like(centre_x)
    second_d = tl.zeros_like(centre_x)
    for j in tl.static_range(SIZE // 2):
        left_x = x[START + j * STEP] - centre_x
        left_d = d[START + j * STEP] - centre_d
        right_x = x[START + (SIZE - 1 - j) * STEP] - centre_x
        right_d = d[START + (SIZE - 1 - j) * STEP] - centre_d
        left_y = left_x - left_d
        right_y = right_x - right_d
        first_x = plus(first_x, left_x + right_x, WEIGHTS[j])
        first_d = plus(first_d, left_d + right_d, WEIGHTS[j])
        squares = left_x * left_x + right_x * right_x + left_y * left_y + right_y * right_y
        second_both = plus(second_both, squares, WEIGHTS[j])
        second_d = plus(second_d, left_d * left_d + right_d * right_d, WEIGHTS[j])
    first_y = first_x - first_d
    both = second_both - (first_x * first_x + first_y * first_y)
    return first_x, first_d, both, second_d - first_d * first_d


@triton.jit
def _row_moments_of_pair(
    x, d, WEIGHTS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """(mean_x, mean_d, variance_x + variance_y, variance_d) along a row."""
    mean_x = ()
    mean_d = ()
    both = ()
    residual = ()
    for v in tl.static_range(COLUMNS):
        shift_x, shift_d, spread, spread_d = _moments_about(x, d, v, 1, WEIGHTS, SIZE)
        mean_x = mean_x + (x[v + SIZE // 2] + shift_x,)
        mean_d = mean_d + (d[v + SIZE // 2] + shift_d,)
        both = both + (spread,)
        residual = residual + (spread_d,)
    return mean_x, mean_d, both, residual


@triton.jit
def _streamed_moments_of_pair(
    x_plane, y_plane, row, column, limit, channel, classes, window, dtype: tl.constexpr,
    SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """_row_moments_of_pair for one column per lane, tap by tap; column is the window's centre."""
    PADDING: tl.constexpr = WINDOW.padding
    x, d, _ = _load_pair(
        x_plane, y_plane, row, column, limit, channel, classes, dtype, SIMILARITY, STRIP, 0, 1,
        PADDING,
    )  # fmt: skip
    first_x = tl.zeros_like(x[0])
    first_d = tl.zeros_like(x[0])
    second_both = tl.zeros_like(x[0])
    second_d = tl.zeros_like(x[0])
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WINDOW)
        for side in tl.static_range(-1, 2, 2):
            tap_x, tap_d, _ = _load_pair(
                x_plane, y_plane, row, column + side * distance, limit, channel, classes, dtype,
                SIMILARITY, STRIP, 0, 1, PADDING,
            )  # fmt: skip
            step_x = tap_x[0] - x[0]
            step_d = tap_d[0] - d[0]
            step_y = step_x - step_d
            first_x += step_x * weight
            first_d += step_d * weight
            second_both += (step_x * step_x + step_y * step_y) * weight
            second_d += step_d * step_d * weight
    first_y = first_x - first_d
    both = second_both - (first_x * first_x + first_y * first_y)
    return (x[0] + first_x,), (d[0] + first_d,), (both,), (second_d - first_d * first_d,)


@triton.jit
def _empty_history(dtype: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """What a strip carries from row to row; see _next_moments."""
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    rows = repeated(tl.zeros((LANES,), dtype), ROWS)
    return rows, rows, rows, rows


@triton.jit
def _next_moments(
    i, history, x_plane, y_plane, chunk, first_row, channel, classes, height, width, window,
    dtype: tl.constexpr, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (mean_x, mean_d, variance_x + variance_y, variance_d, history).

    history: row means of x and d, and the unfinished vertical sums of the row variances.
    """
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    RADIUS: tl.constexpr = WINDOW.size // 2
    means_x, means_d, sums_both, sums_d = history
    row = source_row(first_row + i + SHIFT, height, PADDING)
    limit = row_limit(row, height, width)
    if COLUMNS == 1:
        row_x, row_d, row_both, row_residual = _streamed_moments_of_pair(
            x_plane, y_plane, row, chunk + (SHIFT + RADIUS), limit, channel, classes, window,
            dtype, SIMILARITY, WINDOW, STRIP,
        )  # fmt: skip
    else:
        x, d, _ = _load_pair(
            x_plane, y_plane, row, chunk, limit, channel, classes, dtype, SIMILARITY, STRIP, SHIFT,
            COLUMNS + SIZE - 1, PADDING,
        )  # fmt: skip
        row_x, row_d, row_both, row_residual = _row_moments_of_pair(x, d, WEIGHTS, SIZE, COLUMNS)

    both, sums_both = filtered_column(sums_both, row_both, WEIGHTS, SIZE, COLUMNS)
    residual, sums_d = filtered_column(sums_d, row_residual, WEIGHTS, SIZE, COLUMNS)
    means_x = means_x + row_x
    means_d = means_d + row_d
    mean_x = ()
    mean_d = ()
    variance_both = ()
    variance_d = ()
    for v in tl.static_range(COLUMNS):
        shift_x, shift_d, spread, spread_d = _moments_about(
            means_x, means_d, v, COLUMNS, WEIGHTS, SIZE
        )
        mean_x = mean_x + (means_x[RADIUS * COLUMNS + v] + shift_x,)
        mean_d = mean_d + (means_d[RADIUS * COLUMNS + v] + shift_d,)
        variance_both = variance_both + (both[v] + spread,)
        variance_d = variance_d + (residual[v] + spread_d,)
    history = (
        without_oldest(means_x, SIZE, COLUMNS),
        without_oldest(means_d, SIZE, COLUMNS),
        sums_both,
        sums_d,
    )
    return mean_x, mean_d, variance_both, variance_d, history


@triton.jit
def _dissimilarities(mean_x, mean_d, both, residual, SIMILARITY: tl.constexpr):
    """(1 - S_1, 1 - S_2, 1 / D, 1 / E): D and E are the denominators of the two factors."""
    C1: tl.constexpr = SIMILARITY.c1
    C2: tl.constexpr = SIMILARITY.c2
    mean_y = mean_x - mean_d
    inverse_d = 1.0 / (mean_x * mean_x + mean_y * mean_y + C1)
    inverse_e = 1.0 / (both + C2)
    return mean_d * mean_d * inverse_d, residual * inverse_e, inverse_d, inverse_e


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _ssim_forward_kernel(
    x_ptr,  # [N, C, H, W]: logits or image
    y_ptr,  # [N, H, W] labels, or [N, C, H, W] image
    partials_ptr,  # [2, programs]: sum of the dissimilarities, number of valid samples
    map_ptr,  # [N, C, out_height, out_width]: the similarity of every pixel, if MAPPED
    x_strides,
    y_strides,
    map_strides,
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
    """Reads x and y once; writes two sums per program, or the map."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    LANES: tl.constexpr = STRIP.lanes
    UNROLL: tl.constexpr = STRIP.unroll
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    x_plane = plane_of(x_ptr, x_strides, image, channel, STRIP)
    if SIMILARITY.from_logits:
        y_plane = label_plane_of(y_ptr, y_strides, image, STRIP)
    else:
        y_plane = plane_of(y_ptr, y_strides, image, channel, STRIP)
    map_plane = plane_of(map_ptr, map_strides, image, channel, STRIP)

    total = tl.zeros((LANES,), dtype)
    count = tl.zeros((LANES,), dtype)
    history = _empty_history(dtype, WINDOW, STRIP)
    rows = tl.minimum(STRIP.rows, out_height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        mean_x, mean_d, both, residual, history = _next_moments(
            i, history, x_plane, y_plane, chunk, first_row, channel, channels, height, width,
            window, dtype, SIMILARITY, WINDOW, STRIP, SHIFT,
        )  # fmt: skip
        out_row = first_row + i - (SIZE - 1)
        limit = tl.where(i >= SIZE - 1, out_width, 0)
        if SIMILARITY.from_logits:
            _, _, valid = _load_pair(
                x_plane, y_plane, out_row, chunk, limit, channel, channels, dtype, SIMILARITY,
                STRIP, 0, COLUMNS, "zeros",
            )  # fmt: skip
        similarities = ()
        for v in tl.static_range(COLUMNS):
            luminance, structure, _, _ = _dissimilarities(
                mean_x[v], mean_d[v], both[v], residual[v], SIMILARITY
            )
            if SIMILARITY.full:
                dissimilarity = luminance + structure - luminance * structure
            else:
                dissimilarity = structure
            if SIMILARITY.from_logits:
                counts = valid[v]
            else:
                counts = chunk * COLUMNS + v < limit
            total += tl.where(counts, dissimilarity, 0.0)
            count += tl.where(counts, 1.0, 0.0)
            similarities = similarities + (1.0 - dissimilarity,)
        if MAPPED:
            store_columns(map_plane, out_row, chunk, limit, similarities, STRIP)
    if not MAPPED:
        tl.store(partials_ptr + tl.program_id(0), tl.sum(total))
        tl.store(partials_ptr + programs + tl.program_id(0), tl.sum(count))


@triton.jit
def _ssim_finish_kernel(
    partials_ptr,  # [2, programs]
    mean_ptr,  # []
    scale_ptr,  # []: 1 / count
    programs,
    SIMILAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean dissimilarity, or similarity if SIMILAR: added in float64, always in the same order."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, programs, BLOCK):
        mask = start + lane < programs
        total += tl.load(partials_ptr + start + lane, mask=mask, other=0.0)
        count += tl.load(partials_ptr + programs + start + lane, mask=mask, other=0.0)
    samples = tl.sum(count)
    scale = 1.0 / tl.maximum(samples, 1.0)
    mean = tl.sum(total) * scale
    if SIMILAR:
        mean = samples * scale - mean
    tl.store(mean_ptr, mean)
    tl.store(scale_ptr, scale)


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
    SIMILAR: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Maps that the window's adjoint turns into the gradient; recomputes the moments.

    With the loss dissimilarity = u + v - u v per pixel, its gradient to x_j is
    sum_i w_ij (a_i + 2 b_i (x_j - mean_x_i) + 2 c_i (d_j - mean_d_i)), where b = dv / d(variance_x
    + variance_y) and c = dv / d variance_d. Written are a - 2 b mean_x - 2 c mean_d, 2 b, 2 c, and,
    for the gradient to y, a' - 2 b mean_y + 2 c mean_d.
    """
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    GRAIN: tl.constexpr = STRIP.grain
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    image, local_channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    channel = local_channel + first_channel
    x_plane = plane_of(x_ptr, x_strides, image, local_channel, STRIP)
    if SIMILARITY.from_logits:
        y_plane = label_plane_of(y_ptr, y_strides, image, STRIP)
    else:
        y_plane = plane_of(y_ptr, y_strides, image, local_channel, STRIP)
    if MAPPED:
        grad_plane = plane_of(grad_ptr, grad_strides, image, local_channel, STRIP)
    else:
        upstream = tl.load(grad_ptr).to(dtype) * tl.load(scale_ptr)
    step = coefficient_stride.to(tl.int64) * GRAIN
    constant_x = plane_of(coefficients_ptr, coefficient_strides, image, local_channel, STRIP)
    slope_both = plane_of(coefficients_ptr + step, coefficient_strides, image, local_channel, STRIP)
    slope_d = plane_of(
        coefficients_ptr + 2 * step, coefficient_strides, image, local_channel, STRIP
    )
    constant_y = plane_of(
        coefficients_ptr + 3 * step, coefficient_strides, image, local_channel, STRIP
    )

    history = _empty_history(dtype, WINDOW, STRIP)
    rows = tl.minimum(STRIP.rows, out_height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        mean_x, mean_d, both, residual, history = _next_moments(
            i, history, x_plane, y_plane, chunk, first_row, channel, classes, height, width,
            window, dtype, SIMILARITY, WINDOW, STRIP, SHIFT,
        )  # fmt: skip
        out_row = first_row + i - (SIZE - 1)
        limit = tl.where(i >= SIZE - 1, out_width, 0)
        if SIMILARITY.from_logits:
            _, _, valid = _load_pair(
                x_plane, y_plane, out_row, chunk, limit, channel, classes, dtype, SIMILARITY,
                STRIP, 0, COLUMNS, "zeros",
            )  # fmt: skip
        if MAPPED:
            grad = load_values(grad_plane, out_row, chunk, limit, dtype, STRIP, 0, COLUMNS, "zeros")
        maps_x = ()
        maps_both = ()
        maps_d = ()
        maps_y = ()
        for v in tl.static_range(COLUMNS):
            u, w, inverse_d, inverse_e = _dissimilarities(
                mean_x[v], mean_d[v], both[v], residual[v], SIMILARITY
            )
            scale = grad[v] if MAPPED else upstream
            if SIMILAR:
                scale = -scale
            if SIMILARITY.from_logits:
                scale = tl.where(valid[v], scale, 0.0)
            mean_y = mean_x[v] - mean_d[v]
            to_structure = 2.0 * scale * inverse_e
            if SIMILARITY.full:
                to_structure = to_structure * (1.0 - u)
                to_luminance = 2.0 * scale * inverse_d * (1.0 - w)
                direct_x = to_luminance * (mean_d[v] - u * mean_x[v])
                direct_y = to_luminance * (-mean_d[v] - u * mean_y)
            else:
                direct_x = tl.zeros_like(to_structure)
                direct_y = direct_x
            to_both = -w * to_structure
            residual_part = to_structure * mean_d[v]
            maps_x = maps_x + (direct_x - to_both * mean_x[v] - residual_part,)
            maps_both = maps_both + (to_both,)
            maps_d = maps_d + (to_structure,)
            maps_y = maps_y + (direct_y - to_both * mean_y + residual_part,)
        store_columns(constant_x, out_row, chunk, limit, maps_x, STRIP)
        store_columns(slope_both, out_row, chunk, limit, maps_both, STRIP)
        store_columns(slope_d, out_row, chunk, limit, maps_d, STRIP)
        if BOTH:
            store_columns(constant_y, out_row, chunk, limit, maps_y, STRIP)


@triton.jit
def _adjoint_rows(
    planes, row, chunk, limit, width, window, dtype: tl.constexpr, WINDOW: tl.constexpr,
    SHIFT: tl.constexpr, STRIP: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """For each of the MAPS planes the adjoint of the window along one row: a tuple of tuples."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    COLUMNS: tl.constexpr = STRIP.columns
    rows = ()
    if COLUMNS == 1:
        RADIUS: tl.constexpr = WINDOW.size // 2
        LANES: tl.constexpr = STRIP.lanes
        sums = repeated(tl.zeros((LANES,), dtype), MAPS)
        for step in tl.range(0, window):
            tap = step - RADIUS
            weight = gaussian_weight(tap, dtype, WINDOW)
            weight = folded_weight(chunk, tap, width, weight, weight, dtype, WINDOW)
            added = ()
            for m in tl.static_range(MAPS):
                column = chunk + (SHIFT + RADIUS) + tap
                value = load_column(planes[m], row, column, limit, dtype, STRIP, "zeros")
                added = added + (sums[m] + value * weight,)
            sums = added
        for m in tl.static_range(MAPS):
            rows = rows + ((sums[m],),)
    else:
        for m in tl.static_range(MAPS):
            values = load_values(
                planes[m], row, chunk, limit, dtype, STRIP, SHIFT, COLUMNS + SIZE - 1, "zeros"
            )
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
            total = row[v] * weight
            if j < SIZE - 1:
                total += partials[j * COLUMNS + v]
            sums = sums + (total,)
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
    LANES: tl.constexpr = STRIP.lanes
    GRAIN: tl.constexpr = STRIP.grain
    UNROLL: tl.constexpr = STRIP.unroll
    MAPS: tl.constexpr = 4 if BOTH else 3
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    image, local_channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    x_plane = plane_of(x_ptr, x_strides, image, local_channel, STRIP)
    if SIMILARITY.from_logits:
        y_plane = label_plane_of(y_ptr, y_strides, image, STRIP)
    else:
        y_plane = plane_of(y_ptr, y_strides, image, local_channel, STRIP)
    grad_x_plane = plane_of(grad_x_ptr, grad_x_strides, image, local_channel, STRIP)
    grad_y_plane = plane_of(grad_y_ptr, grad_y_strides, image, local_channel, STRIP)
    step = coefficient_stride.to(tl.int64) * GRAIN
    planes = ()
    for m in tl.static_range(MAPS):
        plane = plane_of(
            coefficients_ptr + m * step, coefficient_strides, image, local_channel, STRIP
        )
        planes = planes + (plane,)

    zero = tl.zeros((LANES,), dtype)
    history = repeated(repeated(zero, (SIZE - 1) * COLUMNS), MAPS)
    rows = tl.minimum(STRIP.rows, height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        row = first_row + i + SHIFT
        out_row = first_row + i - (SIZE - 1)
        limit = row_limit(row, out_height, out_width)
        row_sums = _adjoint_rows(
            planes, row, chunk, limit, width, window, dtype, WINDOW, SHIFT, STRIP, MAPS
        )
        sums = ()
        unfinished = ()
        for m in tl.static_range(MAPS):
            if WINDOW.padding == "reflect":
                finished, partials = _folded_column(
                    history[m], row_sums[m], out_row, height, dtype, WINDOW, COLUMNS
                )
            else:
                finished, partials = filtered_column(
                    history[m], row_sums[m], WEIGHTS, SIZE, COLUMNS
                )
            sums = sums + (finished,)
            unfinished = unfinished + (partials,)
        history = unfinished

        out_limit = tl.where(i >= SIZE - 1, width, 0)
        x, d, valid = _load_pair(
            x_plane, y_plane, out_row, chunk, out_limit, local_channel + first_channel, classes,
            dtype, SIMILARITY, STRIP, 0, COLUMNS, "zeros",
        )  # fmt: skip
        gradient_x = ()
        gradient_y = ()
        for v in tl.static_range(COLUMNS):
            residual_part = sums[2][v] * d[v]
            gradient = sums[0][v] + sums[1][v] * x[v] + residual_part
            if SIMILARITY.from_logits:
                gradient = tl.where(valid[v], gradient * x[v] * (1.0 - x[v]), 0.0)
            gradient_x = gradient_x + (gradient,)
            if BOTH:
                gradient = sums[3][v] + sums[1][v] * (x[v] - d[v]) - residual_part
                gradient_y = gradient_y + (gradient,)
        store_columns(grad_x_plane, out_row, chunk, out_limit, gradient_x, STRIP)
        if BOTH:
            store_columns(grad_y_plane, out_row, chunk, out_limit, gradient_y, STRIP)
