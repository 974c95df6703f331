"""Kernels of region mutual information: the gradient of the probabilities of the (pooled) maps.

A pixel is in up to R^2 regions. Its gradient is a correlation of the maps with taps, (2R - 1)^2 for
each feature. The taps are sums, along equal lags, of the head's weights K1 (of residuals) and K2
(of labels). Near the border some of a pixel's regions do not exist. So there are (2R - 1)^2 tables
of taps, one for each combination of the kinds of rows and columns (_border_class). All pixels of
the interior share one table.

Without pooling the gradient goes through the sigmoid at once, that of the cross entropy is added,
and the gradient of the logits is stored; else the gradient of the pooled probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import (
    SIZES,
    Plane,
    features_of,
    load_features,
    load_label,
    load_pair,
    load_scaled,
    load_slopes,
    logit_gradient,
    plane_of,
    pointer_to,
    scale_of_entropy,
)

# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _out_plane(out_ptr, rest_ptr, strides, split, plane, features, READING: tl.constexpr):
    """The plane that a gradient goes to; of maps, those from `split` on are in rest_ptr."""
    if READING.pooled:
        is_rest = plane >= split
        pointer = tl.where(is_rest, rest_ptr, out_ptr)
        pointer += (plane - tl.where(is_rest, split, 0)) * strides[1]
        out = Plane(pointer=pointer, row_stride=strides[2], column_stride=1)
    else:
        image = plane // features.channels
        out = plane_of(out_ptr, strides, image, features.channel, READING.flat)
    return out


@triton.jit
def _store_gradient(
    out, value, features, row, column, mask, entropy_scale, READING: tl.constexpr,
):  # fmt: skip
    """Store a gradient: of pooled probabilities as it is, else as the gradient of the logits."""
    if not READING.pooled:
        first = features.first
        dtype: tl.constexpr = (
            tl.float64 if first.pointer.dtype.element_ty == tl.float64 else tl.float32
        )
        label = load_label(features.second, row, column, mask, features.channels, READING.ignored)
        u = load_scaled(first, row, column, mask, dtype)
        value = logit_gradient(u, label, features.channel, value, entropy_scale)
    tl.store(pointer_to(out, row, column), value, mask=mask)


@triton.jit
def _middle_taps(taps_ptr, plane, REGION: tl.constexpr):
    """(taps of residuals, of labels, constant) of a pixel whose regions all exist."""
    SPAN: tl.constexpr = 2 * REGION - 1
    TAPS: tl.constexpr = SPAN * SPAN
    table = taps_ptr + (plane * TAPS + (REGION - 1) * (SPAN + 1)) * (2 * TAPS + 1)
    residual_taps = ()
    label_taps = ()
    for q in tl.static_range(TAPS):
        residual_taps = residual_taps + (tl.load(table + q),)
        label_taps = label_taps + (tl.load(table + TAPS + q),)
    return residual_taps, label_taps, tl.load(table + 2 * TAPS)


@triton.jit
def _border_class(place, size, regions, REGION: tl.constexpr):
    """Which of a pixel's R regions along one axis exist: 0 to 2R - 2, all of them at R - 1."""
    return tl.where(place < regions, tl.minimum(place, REGION - 1), place - regions + REGION)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _rmi_taps_kernel(
    grad_loss_ptr,  # []
    weights_ptr,  # [N * C, 2 R^2 + 1, R^2] float64: for residuals, for labels, and constants
    taps_ptr,  # [N * C, (2R - 1)^2, 2 (2R - 1)^2 + 1]: for each border class taps and constant
    images,
    rmi_weight,
    REGION: tl.constexpr,
    CELL: tl.constexpr,
):
    """Sums the weights along lags, over the regions that exist, and scales them as the gradient."""
    SPAN: tl.constexpr = 2 * REGION - 1
    AREA: tl.constexpr = REGION * REGION
    TAPS: tl.constexpr = SPAN * SPAN
    plane = tl.program_id(0).to(tl.int64)
    row_class = tl.program_id(1) // SPAN
    column_class = tl.program_id(1) % SPAN
    tap = tl.arange(0, triton.next_power_of_2(TAPS))
    dy = tap // SPAN - (REGION - 1)
    dx = tap % SPAN - (REGION - 1)
    weights = weights_ptr + plane * ((2 * AREA + 1) * AREA)

    residual_tap = tl.zeros(tap.shape, tl.float64)
    label_tap = tl.zeros(tap.shape, tl.float64)
    constant = tl.zeros((1,), tl.float64)
    for place in tl.range(0, AREA):
        a = place // REGION
        b = place % REGION
        exists = (a >= row_class - (REGION - 1)) & (a <= row_class)
        exists = exists & (b >= column_class - (REGION - 1)) & (b <= column_class)
        limit = tl.where(exists, REGION, 0)
        mask = (tap < TAPS) & (a + dy >= 0) & (a + dy < limit) & (b + dx >= 0) & (b + dx < REGION)
        weight = weights + place * AREA + (a + dy) * REGION + b + dx
        residual_tap += tl.load(weight, mask=mask, other=0.0)
        label_tap += tl.load(weight + AREA * AREA, mask=mask, other=0.0)
        alone = tl.arange(0, 1)
        constant += tl.load(
            weights + 2 * AREA * AREA + place + alone, mask=alone < limit, other=0.0
        )

    scale = tl.load(grad_loss_ptr).to(tl.float64) / images
    scale = scale * rmi_weight / CELL
    out = taps_ptr + (plane * TAPS + tl.program_id(1)) * (2 * TAPS + 1)
    tl.store(out + tap, residual_tap * (scale / CELL), mask=tap < TAPS)
    tl.store(out + TAPS + tap, label_tap * (scale / CELL), mask=tap < TAPS)
    tl.store(out + 2 * TAPS + tl.arange(0, 1), constant * scale)


@triton.jit(do_not_specialize=SIZES)
def _rmi_interior_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [1] float64: bce_weight / V
    first_ptr,  # residuals [N, C, h, w], or logits
    second_ptr,  # labels [N, C, h, w], or target [N, h, w]
    taps_ptr,  # as in _rmi_taps_kernel
    out_ptr,  # gradient of the pooled probabilities of the first planes, or of the logits
    rest_ptr,  # that of the planes from `split` on
    first_strides,
    second_strides,
    out_strides,
    channels,
    height,
    width,
    split,
    STRIP: tl.constexpr,
    READING: tl.constexpr,
):
    """Gradient of pixels whose regions all exist: a row read feeds 2R - 1 unfinished rows.

    Unfinished rows are in registers. A lane has a chunk of columns; if these are several, residuals
    and slopes are kept until their row is finished.
    """
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    REGION: tl.constexpr = STRIP.region
    COLUMNS: tl.constexpr = STRIP.columns
    LANES: tl.constexpr = STRIP.lanes
    SPAN: tl.constexpr = 2 * REGION - 1
    KEPT: tl.constexpr = (REGION - 1) * COLUMNS if COLUMNS > 1 else 0  # pixels
    plane = tl.program_id(0).to(tl.int64)
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0, READING
    )
    out = _out_plane(out_ptr, rest_ptr, out_strides, split, plane, features, READING)
    # Columns are counted from the first one of a lane's regions, REGION - 1 before its own first.
    column = (tl.program_id(2) * LANES + tl.arange(0, LANES)) * COLUMNS
    across = width - 2 * (REGION - 1)
    place = tl.minimum(column, across - COLUMNS)  # for all loads: none needs a mask
    first_row = REGION - 1 + tl.program_id(1) * STRIP.rows
    entropy_scale = scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype)
    residual_taps, label_taps, constant = _middle_taps(taps_ptr, plane, REGION)
    pending = ()
    for _q in tl.static_range(SPAN * COLUMNS):
        pending = pending + (tl.zeros((LANES,), dtype) + constant,)
    kept = ()
    for _q in tl.static_range(2 * KEPT):
        kept = kept + (tl.zeros((LANES,), dtype),)

    rows = tl.minimum(STRIP.rows, height - REGION + 1 - first_row)
    for i in tl.range(0, rows + 2 * (REGION - 1)):
        # feed a row to all unfinished rows that it belongs to
        row = first_row + i - (REGION - 1)
        own = ()
        seen = load_slopes(features, row, place, SPAN - 1 + COLUMNS, STRIP.grain, READING)
        for s in tl.static_range(SPAN - 1 + COLUMNS):
            e, y, slope = seen[s]
            if COLUMNS > 1 and s >= REGION - 1 and s < REGION - 1 + COLUMNS:
                own = own + (e, slope)
            fed = ()
            for q in tl.static_range(SPAN * COLUMNS):
                if s - q % COLUMNS >= 0 and s - q % COLUMNS < SPAN:
                    fed = fed + (
                        pending[q]
                        + residual_taps[(SPAN - 1 - q // COLUMNS) * SPAN + s - q % COLUMNS] * e
                        + label_taps[(SPAN - 1 - q // COLUMNS) * SPAN + s - q % COLUMNS] * y,
                    )
                else:
                    fed = fed + (pending[q],)
            pending = fed
        # store the row that is finished
        done = row - (REGION - 1)
        end = tl.where(i >= 2 * (REGION - 1), across, 0)
        kept = own + kept
        for v in tl.static_range(COLUMNS):
            mask = (place + v >= column) & (column < end)
            if COLUMNS > 1:
                value = pending[v] * kept[2 * KEPT + 2 * v + 1]
                value += entropy_scale * kept[2 * KEPT + 2 * v]
                tl.store(pointer_to(out, done, place, REGION - 1 + v), value, mask=mask)
            else:
                own_column = place + (REGION - 1)
                _store_gradient(
                    out, pending[v], features, done, own_column, mask, entropy_scale, READING
                )
        # make room for the next row
        rest = ()
        for q in tl.static_range(COLUMNS, SPAN * COLUMNS):
            rest = rest + (pending[q],)
        for _q in tl.static_range(COLUMNS):
            rest = rest + (tl.zeros((LANES,), dtype) + constant,)
        pending = rest
        newest = ()
        for q in tl.static_range(2 * KEPT):
            newest = newest + (kept[q],)
        kept = newest


@triton.jit(do_not_specialize=SIZES)
def _rmi_border_kernel(
    grad_loss_ptr,  # as in _rmi_interior_kernel
    statistics_ptr,
    first_ptr,
    second_ptr,
    taps_ptr,
    out_ptr,
    rest_ptr,
    first_strides,
    second_strides,
    out_strides,
    channels,
    height,
    width,
    split,
    REGION: tl.constexpr,
    LANES: tl.constexpr,
    READING: tl.constexpr,
):
    """Gradient of the pixels of the frame: its full rows, then the rest of its columns."""
    SPAN: tl.constexpr = 2 * REGION - 1
    TAPS: tl.constexpr = SPAN * SPAN
    BAND: tl.constexpr = 2 * (REGION - 1)
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    plane = tl.program_id(0).to(tl.int64)
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0, READING
    )
    out = _out_plane(out_ptr, rest_ptr, out_strides, split, plane, features, READING)
    entropy_scale = scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype)

    # where the program's pixels are: rows first, then what columns have beside them
    pixel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    in_rows = BAND * width
    beside = pixel - in_rows
    row = tl.where(pixel < in_rows, pixel // width, beside // BAND + REGION - 1)
    row += tl.where((pixel < in_rows) & (row >= REGION - 1), height - BAND, 0)
    column = tl.where(pixel < in_rows, pixel % width, beside % BAND)
    column += tl.where((pixel >= in_rows) & (column >= REGION - 1), width - BAND, 0)
    mask = pixel < in_rows + BAND * (height - BAND)

    row_class = _border_class(row, height, height - REGION + 1, REGION)
    column_class = _border_class(column, width, width - REGION + 1, REGION)
    table = taps_ptr + (plane * TAPS + row_class * SPAN + column_class) * (2 * TAPS + 1)
    value = tl.load(table + 2 * TAPS, mask=mask, other=0.0)
    for q in tl.range(0, TAPS):
        other_row = row + (q // SPAN - (REGION - 1))
        other_column = column + (q % SPAN - (REGION - 1))
        inside = mask & (other_row >= 0) & (other_row < height)
        inside = inside & (other_column >= 0) & (other_column < width)
        e, y = load_features(features, other_row, other_column, inside, READING)
        value += tl.load(table + q, mask=mask, other=0.0) * e
        value += tl.load(table + TAPS + q, mask=mask, other=0.0) * y
    _store_gradient(out, value, features, row, column, mask, entropy_scale, READING)


@triton.jit(do_not_specialize=SIZES)
def _rmi_direct_gradient_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [1] float64: bce_weight / V
    first_ptr,  # as in _rmi_interior_kernel
    second_ptr,
    kept_ptr,  # [N, window_rows, window_columns], if DROP
    weights_ptr,  # [N * C, 2 R^2 + 1, R^2] float64: for residuals, for labels, and constants
    out_ptr,
    rest_ptr,
    first_strides,
    second_strides,
    out_strides,
    channels,
    height,
    width,
    split,
    blocks,
    images,
    rmi_weight,
    REGION: tl.constexpr,
    LANES: tl.constexpr,
    CELL: tl.constexpr,
    DROP: tl.constexpr,
    READING: tl.constexpr,
):
    """Gradient from every region of every pixel, for regions left out one by one or small maps.

    It is summed in float64: with few regions the matrices are nearly singular, and weights large.
    """
    element: tl.constexpr = first_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    AREA: tl.constexpr = REGION * REGION
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    image = plane // channels
    features = features_of(
        first_ptr, second_ptr, first_strides, second_strides, plane, channels, 0.0, READING
    )
    out = _out_plane(out_ptr, rest_ptr, out_strides, split, plane, features, READING)
    entropy_scale = scale_of_entropy(grad_loss_ptr, statistics_ptr, dtype)
    window_rows = height - REGION + 1
    window_columns = width - REGION + 1
    weights = weights_ptr + plane * ((2 * AREA + 1) * AREA)

    # region after region that holds the pixel: its weights times its features
    pixel = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    mask = pixel < height * width
    row = pixel // width
    column = pixel % width
    value = tl.zeros((LANES,), tl.float64)
    for own in tl.range(0, AREA):
        top = row - own // REGION
        left = column - own % REGION
        exists = mask & (top >= 0) & (top < window_rows) & (left >= 0) & (left < window_columns)
        if DROP:
            offset = (image * window_rows + top) * window_columns + left
            exists = exists & (tl.load(kept_ptr + offset, mask=exists, other=0) != 0)
        term = tl.zeros((LANES,), tl.float64)
        term += tl.load(weights + 2 * AREA * AREA + own) * CELL
        for other in tl.range(0, AREA):
            e, y = load_pair(
                features, top + other // REGION, left + other % REGION, exists, READING
            )
            weight = weights + own * AREA + other
            term += tl.load(weight) * e.to(tl.float64)
            term += tl.load(weight + AREA * AREA) * y.to(tl.float64)
        value += tl.where(exists, term, 0.0)
    scale = tl.load(grad_loss_ptr).to(tl.float64) / images
    scale = scale * rmi_weight / (CELL * CELL)
    _store_gradient(
        out, (value * scale).to(dtype), features, row, column, mask, entropy_scale, READING
    )
