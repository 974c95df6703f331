"""Structural similarity loss (SSL): cross entropy weighted by how much the local structure is off.

Zhao et al., "Structural Similarity Loss for Semantic Segmentation". With p = sigmoid(z) and y the one-hot
label, both normalised by the statistics of a Gaussian window,

    e = |(y - mean_y + C4) / (deviation_y + C4) - (p - mean_p + C4) / (deviation_p + C4)|      Eq. 10
    f = 1[e > beta e_max],   M = sum f                                                        Eq. 11
    loss = bce_weight BCE + (1 - bce_weight) (1 / M) sum e f bce                              Eq. 13, 17

e, f and M carry no gradient, so that dL/dz = (p - y) (a m + b e f) is elementwise: a = bce_weight / V,
b = (1 - bce_weight) / M, with V valid pixels.

Bytes per pass, L of logits and T of labels: forward L + T; backward 2 L + T. Two schedules:

- recompute: the forward writes sums only, the backward recomputes e from the logits;
- stored: the forward leaves e f in the buffer that the backward turns into the gradient, which spares the
  window's arithmetic at the price of 2 L more traffic. Pays for large windows.

The gradient is the only map in memory under both.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from kernels_reference.gaussian_window import gaussian_window
from kernels_reference.structural_similarity import largest_difference
from kernels_reference.structural_similarity import (
    structural_similarity_loss as structural_similarity_loss_reference,
)

from . import _checks
from ._backend import device_guard, serves_triton
from ._device_math import LOG2_E, inverse, sanitised_label, sigmoid_base2, softplus_base2
from ._strip import (
    PADDINGS,
    channels_in_lanes,
    column_moments,
    compute_dtype,
    filtered_column,
    filtered_row,
    gaussian_exponent,
    gaussian_weight,
    grain,
    load_columns,
    repeated,
    row_limit,
    row_moments,
    size_arguments,
    source_row,
    store_columns,
    strides,
    strip_configuration,
    strip_grid,
    strip_program,
    without_oldest,
)
from ._tuning import Configuration

_SIZES = [
    "programs",
    *size_arguments("logits", "stored", "grad_logits"),
    *size_arguments("target", axes="nhw"),
]

# --- kernels ----------------------------------------------------------------------------------------


@triton.jit
def _class_in_strip(
    target_image,
    tile_column,
    first_row,
    channel,
    height,
    width,
    target_stride_h,
    target_stride_w,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Whether any label that this strip's windows see is ``channel``: a quick look before the work.

    Most (strip, class) pairs of a street scene have none; then y = 0 throughout and n_y = 1.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    WIDTH: tl.constexpr = LANES * COLUMNS
    BORDER: tl.constexpr = triton.next_power_of_2(2 * RADIUS + 1)
    inner = tile_column + tl.arange(0, WIDTH)
    border = tl.arange(0, BORDER)
    outer = tile_column + border - RADIUS + tl.where(border >= RADIUS, WIDTH, 0)
    inner_offset = inner.to(tl.int64) * target_stride_w
    outer_offset = outer.to(tl.int64) * target_stride_w
    inner_mask = inner < width
    outer_mask = (border < 2 * RADIUS) & (outer >= 0) & (outer < width)
    first = tl.maximum(first_row - RADIUS, 0)
    rows = tl.minimum(first_row + ROWS + RADIUS, height) - first

    inner_found = tl.zeros((WIDTH,), tl.int32)
    outer_found = tl.zeros((BORDER,), tl.int32)
    for i in tl.range(0, rows):
        row_ptr = target_image + (first + i).to(tl.int64) * target_stride_h
        label = tl.load(row_ptr + inner_offset, mask=inner_mask, other=0)
        inner_found |= ((label == channel) & inner_mask).to(tl.int32)
        if RADIUS > 0:
            label = tl.load(row_ptr + outer_offset, mask=outer_mask, other=0)
            outer_found |= ((label == channel) & outer_mask).to(tl.int32)
    return tl.maximum(tl.max(inner_found, 0), tl.max(outer_found, 0)) > 0


@triton.jit
def _valid_in_strip(
    target_image,
    tile_column,
    first_row,
    classes,
    height,
    width,
    target_stride_h,
    target_stride_w,
    dtype: tl.constexpr,
    IGNORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Number of valid pixels in this strip: counted for one class, since all classes share it."""
    column = tile_column + tl.arange(0, LANES * COLUMNS)
    count = tl.zeros((LANES * COLUMNS,), dtype)
    for i in tl.range(0, tl.minimum(ROWS, height - first_row)):
        row_ptr = target_image + (first_row + i).to(tl.int64) * target_stride_h
        offset = column.to(tl.int64) * target_stride_w
        label = tl.load(row_ptr + offset, mask=column < width, other=0)
        label = sanitised_label(label, column < width, classes, IGNORED)
        count += tl.where(label >= 0, 1.0, 0.0)
    return tl.sum(count)


@triton.jit
def _load_pixels(
    logits_row,
    target_row,
    chunk,
    limit,
    logits_stride_w,
    target_stride_w,
    classes,
    dtype: tl.constexpr,
    IGNORED: tl.constexpr,
    SHIFT: tl.constexpr,
    COUNT: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORISED: tl.constexpr,
):
    """(scaled logits, probabilities, labels) of COUNT columns; probability 0, label -1 where not valid."""
    loaded, _ = load_columns(
        logits_row, chunk, limit, logits_stride_w, SHIFT, COUNT, PADDING, LANES, COLUMNS, VECTORISED
    )
    found, inside = load_columns(
        target_row, chunk, limit, target_stride_w, SHIFT, COUNT, PADDING, LANES, COLUMNS, VECTORISED
    )
    logits = ()
    probabilities = ()
    labels = ()
    for j in tl.static_range(COUNT):
        logit = loaded[j].to(dtype) * LOG2_E
        label = sanitised_label(found[j], inside[j], classes, IGNORED)
        logits = logits + (logit,)
        labels = labels + (label,)
        # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
        probabilities = probabilities + (tl.where(label >= 0, sigmoid_base2(logit), 0.0),)
    return logits, probabilities, labels


@triton.jit
def _label_row(
    labels,
    channel,
    dtype: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(row_positive, row_negative): one row's part of the window means of y and 1 - y.

    1 - mean_y must be 0 on flat maps and precise when only a far corner differs. Since the weights sum to
    exactly 1 it is a plain difference ("window") as long as the corner weighs enough; else the difference
    is taken per row ("row"), or, for the smallest weights, the complement is filtered ("filtered").
    """
    y = ()
    complement = ()
    for j in tl.static_range(COLUMNS + WINDOW - 1):
        y = y + (tl.where(labels[j] == channel, 1.0, 0.0).to(dtype),)
        complement = complement + (tl.where(labels[j] == channel, 0.0, 1.0).to(dtype),)
    row_positive = filtered_row(y, LABEL_WEIGHTS, WINDOW, COLUMNS)
    row_negative = ()
    if COMPLEMENT == "filtered":
        row_negative = filtered_row(complement, LABEL_WEIGHTS, WINDOW, COLUMNS)
    elif COMPLEMENT == "row":
        for v in tl.static_range(COLUMNS):
            row_negative = row_negative + (1.0 - row_positive[v],)
    return row_positive, row_negative


@triton.jit
def _streamed_row(
    logits_row,
    target_row,
    chunk,
    limit,
    channel,
    logits_stride_w,
    target_stride_w,
    classes,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """(row_mean, row_variance, row_positive, row_negative) for one column per lane, tap by tap."""
    _, centre, label = _load_pixels(
        logits_row, target_row, chunk, limit, logits_stride_w, target_stride_w, classes,
        dtype, IGNORED, 0, 1, PADDING, LANES, 1, False,
    )  # fmt: skip
    first = tl.zeros_like(centre[0])
    second = first
    positive = tl.where(label[0] == channel, 1.0, 0.0).to(dtype) * WEIGHTS[WINDOW // 2]
    negative = tl.where(label[0] == channel, 0.0, 1.0).to(dtype) * WEIGHTS[WINDOW // 2]
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WEIGHTS, WINDOW, EXPONENT)
        for side in tl.static_range(-1, 2, 2):
            _, probability, label = _load_pixels(
                logits_row, target_row, chunk + side * distance, limit, logits_stride_w,
                target_stride_w, classes, dtype, IGNORED, 0, 1, PADDING, LANES, 1, False,
            )  # fmt: skip
            difference = probability[0] - centre[0]
            first += difference * weight
            second += difference * difference * weight
            if PRESENT:
                positive += tl.where(label[0] == channel, weight, 0.0)
                negative += tl.where(label[0] == channel, 0.0, weight)
    return (centre[0] + first,), (second - first * first,), (positive,), (negative,)


@triton.jit
def _structural_difference(
    probability,
    centre,
    shift,
    variance,
    belongs,
    positive,
    negative,
    STABILITY: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """E of one column (SSL paper, Eq. 10); mean_p = centre + shift, mean_y = positive = 1 - negative."""
    deviation = tl.sqrt(variance)
    excess = (probability - centre) - shift  # p - mean_p
    if PRESENT:
        label_deviation = tl.sqrt(
            positive * negative
        )  # y^2 = y, so variance_y = mean_y (1 - mean_y)
        label_excess = tl.where(belongs, negative, -positive)  # y - mean_y
        denominator = (deviation + STABILITY) * (label_deviation + STABILITY)
        numerator = (label_excess + STABILITY) * (deviation + STABILITY) - (excess + STABILITY) * (
            label_deviation + STABILITY
        )
    else:
        denominator = deviation + STABILITY
        numerator = deviation - excess
    return tl.abs(numerator) * inverse(denominator)


@triton.jit
def _empty_history(
    dtype: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    DELAYED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """What a strip carries from row to row: see _next_row."""
    zero = tl.zeros((LANES,), dtype)
    rows: tl.constexpr = (WINDOW - 1) * COLUMNS
    label_rows: tl.constexpr = rows if PRESENT else 0
    complement_rows: tl.constexpr = label_rows if COMPLEMENT != "window" else 0
    delay: tl.constexpr = WINDOW // 2 * COLUMNS if DELAYED else 0
    return (
        repeated(zero, rows),
        repeated(zero, rows),
        repeated(zero, label_rows),
        repeated(zero, complement_rows),
        repeated(zero, delay),
        repeated(zero, delay),
        repeated(tl.full((LANES,), -1, tl.int32), delay),
    )


@triton.jit
def _next_row(
    i,
    history,
    logits_plane,
    target_image,
    chunk,
    first_row,
    channel,
    classes,
    height,
    width,
    logits_stride_h,
    logits_stride_w,
    target_stride_h,
    target_stride_w,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    STABILITY: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORISED: tl.constexpr,
    DELAYED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Take in row i of the strip: (e, logits, probabilities, labels) of the row whose window it completes.

    history: row means and unfinished row variances of p, unfinished label means and their complement,
    and the logits, probabilities and labels of the half window still to be completed. DELAYED carries
    these in registers; large windows load them again from the cache instead.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    COUNT: tl.constexpr = COLUMNS + WINDOW - 1
    means, variances, positives, negatives, late_logits, late_probabilities, late_labels = history

    row = source_row(first_row + i - RADIUS, height, PADDING)
    limit = row_limit(row, height, width)
    logits_row = logits_plane + row.to(tl.int64) * logits_stride_h
    target_row = target_image + row.to(tl.int64) * target_stride_h
    if COLUMNS == 1:
        row_mean, row_variance, row_positive, row_negative = _streamed_row(
            logits_row, target_row, chunk, limit, channel, logits_stride_w, target_stride_w, classes,
            window, dtype, WEIGHTS, EXPONENT, IGNORED, WINDOW, PADDING, LANES, PRESENT,
        )  # fmt: skip
    else:
        logits, probabilities, labels = _load_pixels(
            logits_row, target_row, chunk, limit, logits_stride_w, target_stride_w, classes,
            dtype, IGNORED, -RADIUS, COUNT, PADDING, LANES, COLUMNS, VECTORISED,
        )  # fmt: skip
        row_mean, row_variance = row_moments(probabilities, WEIGHTS, WINDOW, COLUMNS)
        row_positive, row_negative = _label_row(
            labels, channel, dtype, LABEL_WEIGHTS, COMPLEMENT, WINDOW, COLUMNS
        )
    centres, shifts, variance, means, variances = column_moments(
        row_mean, row_variance, means, variances, WEIGHTS, WINDOW, COLUMNS
    )
    positive = centres
    negative = centres
    if PRESENT:
        positive, positives = filtered_column(
            positives, row_positive, LABEL_WEIGHTS, WINDOW, COLUMNS
        )
        if COMPLEMENT == "window":
            negative = ()
            for v in tl.static_range(COLUMNS):
                negative = negative + (1.0 - positive[v],)
        else:
            negative, negatives = filtered_column(
                negatives, row_negative, LABEL_WEIGHTS, WINDOW, COLUMNS
            )

    if DELAYED:
        for v in tl.static_range(COLUMNS):
            late_logits = late_logits + (logits[v + RADIUS],)
            late_probabilities = late_probabilities + (probabilities[v + RADIUS],)
            late_labels = late_labels + (labels[v + RADIUS],)
        out_logits, out_probabilities, out_labels = late_logits, late_probabilities, late_labels
        late_logits = without_oldest(late_logits, RADIUS + 1, COLUMNS)
        late_probabilities = without_oldest(late_probabilities, RADIUS + 1, COLUMNS)
        late_labels = without_oldest(late_labels, RADIUS + 1, COLUMNS)
    else:
        out_row = first_row + i - (WINDOW - 1)
        out_logits, out_probabilities, out_labels = _load_pixels(
            logits_plane + out_row.to(tl.int64) * logits_stride_h,
            target_image + out_row.to(tl.int64) * target_stride_h,
            chunk, row_limit(out_row, height, width), logits_stride_w, target_stride_w, classes,
            dtype, IGNORED, 0, COLUMNS, "zeros", LANES, COLUMNS, VECTORISED,
        )  # fmt: skip

    differences = ()
    for v in tl.static_range(COLUMNS):
        belongs = out_labels[v] == channel
        if WINDOW == 1:
            # One pixel has no structure (Eq. 10 is 1 for y and p alike): compared as they are.
            difference = tl.abs(tl.where(belongs, 1.0, 0.0).to(dtype) - out_probabilities[v])
        else:
            difference = _structural_difference(
                out_probabilities[v], centres[v], shifts[v], variance[v], belongs,
                positive[v], negative[v], STABILITY, PRESENT,
            )  # fmt: skip
        differences = differences + (difference,)
    history = (
        means, variances, positives, negatives, late_logits, late_probabilities, late_labels,
    )  # fmt: skip
    return differences, out_logits, out_probabilities, out_labels, history


@triton.jit(do_not_specialize=_SIZES)
def _structural_similarity_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    partials_ptr,  # [4, programs]: sums of bce, of e f bce, of f, and of valid pixels
    stored_ptr,  # [N, C, H, W]: e f, if STORED
    programs,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    logits_stride_n,
    logits_stride_c,
    logits_stride_h,
    logits_stride_w,
    target_stride_n,
    target_stride_h,
    target_stride_w,
    stored_stride_n,
    stored_stride_c,
    stored_stride_h,
    stored_stride_w,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    STABILITY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REWEIGHT: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    STORED: tl.constexpr,
    GRAIN: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    DELAYED: tl.constexpr,
):
    """Reads logits and labels once; writes four sums per program, and e f if STORED.

    Strides but the last are in units of GRAIN.
    """
    image, channel, chunk, first_lane, first_row = strip_program(
        channels, tiles_x, tiles_y, CHANNELS_IN_LANES, LANES, ROWS
    )
    logits_plane = logits_ptr + (image * logits_stride_n + channel * logits_stride_c) * GRAIN
    target_image = target_ptr + image * target_stride_n * GRAIN
    stored_plane = stored_ptr + (image * stored_stride_n + channel * stored_stride_c) * GRAIN
    VECTORISED: tl.constexpr = GRAIN > 1

    if CHANNELS_IN_LANES:
        present = True
    else:
        present = _class_in_strip(
            target_image, first_lane * COLUMNS, first_row, channel, height, width,
            target_stride_h * GRAIN, 1 if VECTORISED else target_stride_w,
            WINDOW, COLUMNS, LANES, ROWS,
        )  # fmt: skip
    if present:
        sums = _forward_strip(
            logits_plane, target_image, stored_plane, chunk, first_row, channel, channels,
            height, width, logits_stride_h * GRAIN, logits_stride_w, target_stride_h * GRAIN,
            target_stride_w, stored_stride_h * GRAIN, stored_stride_w, window,
            partials_ptr.dtype.element_ty, WEIGHTS, EXPONENT, LABEL_WEIGHTS, COMPLEMENT, STABILITY, THRESHOLD, REWEIGHT, IGNORED, WINDOW,
            PADDING, STORED, LANES, COLUMNS, ROWS, VECTORISED, UNROLL, DELAYED, True,
            CHANNELS_IN_LANES,
        )  # fmt: skip
    else:
        sums = _forward_strip(
            logits_plane, target_image, stored_plane, chunk, first_row, channel, channels,
            height, width, logits_stride_h * GRAIN, logits_stride_w, target_stride_h * GRAIN,
            target_stride_w, stored_stride_h * GRAIN, stored_stride_w, window,
            partials_ptr.dtype.element_ty, WEIGHTS, EXPONENT, LABEL_WEIGHTS, COMPLEMENT, STABILITY, THRESHOLD, REWEIGHT, IGNORED, WINDOW,
            PADDING, STORED, LANES, COLUMNS, ROWS, VECTORISED, UNROLL, DELAYED, False,
            CHANNELS_IN_LANES,
        )  # fmt: skip
    sum_ptr = partials_ptr + tl.program_id(0)
    for quantity in tl.static_range(4):
        tl.store(sum_ptr + quantity * programs, sums[quantity])
    if not CHANNELS_IN_LANES:
        if channel == 0:
            valid_count = _valid_in_strip(
                target_image, first_lane * COLUMNS, first_row, channels, height, width,
                target_stride_h * GRAIN, 1 if VECTORISED else target_stride_w,
                partials_ptr.dtype.element_ty, IGNORED, COLUMNS, LANES, ROWS,
            )  # fmt: skip
            tl.store(sum_ptr + 3 * programs, valid_count)


@triton.jit
def _forward_strip(
    logits_plane,
    target_image,
    stored_plane,
    chunk,
    first_row,
    channel,
    classes,
    height,
    width,
    logits_stride_h,
    logits_stride_w,
    target_stride_h,
    target_stride_w,
    stored_stride_h,
    stored_stride_w,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    STABILITY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REWEIGHT: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    STORED: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORISED: tl.constexpr,
    UNROLL: tl.constexpr,
    DELAYED: tl.constexpr,
    PRESENT: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
):
    """The four sums of one strip; the valid pixels only if the lanes hold all channels."""
    zero = tl.zeros((LANES,), dtype)
    entropy_sum, weighted_sum, hard_count, valid_count = zero, zero, zero, zero
    history = _empty_history(dtype, COMPLEMENT, WINDOW, COLUMNS, LANES, DELAYED, PRESENT)
    rows = tl.minimum(ROWS, height - first_row) + (WINDOW - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, logits, probabilities, labels, history = _next_row(
            i, history, logits_plane, target_image, chunk, first_row, channel, classes, height, width,
            logits_stride_h, logits_stride_w, target_stride_h, target_stride_w, window, dtype,
            WEIGHTS, EXPONENT, LABEL_WEIGHTS, COMPLEMENT, STABILITY, IGNORED, WINDOW, PADDING, LANES, COLUMNS,
            VECTORISED, DELAYED, PRESENT,
        )  # fmt: skip
        out_row = first_row + i - (WINDOW - 1)
        lowest_label = tl.where(i >= WINDOW - 1, 0, classes)
        kept = ()
        for v in tl.static_range(COLUMNS):
            valid = labels[v] >= lowest_label
            hard = _is_hard(
                differences[v], valid, chunk * COLUMNS + v, out_row, height, width,
                THRESHOLD, WINDOW, PADDING,
            )  # fmt: skip
            entropy = softplus_base2(tl.where(labels[v] == channel, -logits[v], logits[v]))
            weight = differences[v] if REWEIGHT else zero + 1.0
            entropy_sum += tl.where(valid, entropy, 0.0)
            weighted_sum += tl.where(hard, weight * entropy, 0.0)
            hard_count += tl.where(hard, 1.0, 0.0)
            if CHANNELS_IN_LANES:
                valid_count += tl.where(valid & (channel == 0), 1.0, 0.0)
            kept = kept + (tl.where(hard, weight, 0.0),)
        if STORED:
            store_columns(
                stored_plane + out_row.to(tl.int64) * stored_stride_h,
                chunk, tl.where(i >= WINDOW - 1, width, 0), stored_stride_w, kept,
                LANES, COLUMNS, VECTORISED,
            )  # fmt: skip
    return tl.sum(entropy_sum), tl.sum(weighted_sum), tl.sum(hard_count), tl.sum(valid_count)


@triton.jit
def _is_hard(
    difference,
    valid,
    column,
    row,
    height,
    width,
    THRESHOLD: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
):
    """F (SSL paper, Eq. 11). A NaN counts as hard, so that it reaches the loss."""
    hard = valid & ~(difference <= THRESHOLD)
    if PADDING == "valid":
        RADIUS: tl.constexpr = WINDOW // 2
        row_is_inside = (row >= RADIUS) & (row < height - RADIUS)
        limit = tl.where(row_is_inside, width - RADIUS, 0)
        hard = hard & (column >= RADIUS) & (column < limit)
    return hard


@triton.jit
def _structural_similarity_finish_kernel(
    partials_ptr,  # [4, programs]
    loss_ptr,  # []
    statistics_ptr,  # [2]: bce_weight / V, (1 - bce_weight) / M
    programs,
    BCE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the partial sums in float64, in an order that never changes, and forms the loss."""
    lane = tl.arange(0, BLOCK)
    entropy = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    hard = tl.zeros((BLOCK,), tl.float64)
    valid = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, programs, BLOCK):
        offset = start + lane
        mask = offset < programs
        entropy += tl.load(partials_ptr + offset, mask=mask, other=0.0)
        weighted += tl.load(partials_ptr + programs + offset, mask=mask, other=0.0)
        hard += tl.load(partials_ptr + 2 * programs + offset, mask=mask, other=0.0)
        valid += tl.load(partials_ptr + 3 * programs + offset, mask=mask, other=0.0)
    entropy_scale = BCE_WEIGHT / tl.maximum(tl.sum(valid), 1.0)
    weighted_scale = (1.0 - BCE_WEIGHT) / tl.maximum(tl.sum(hard), 1.0)
    loss = entropy_scale * tl.sum(entropy) + weighted_scale * tl.sum(weighted)
    tl.store(loss_ptr, loss)
    tl.store(statistics_ptr, entropy_scale)
    tl.store(statistics_ptr + 1, weighted_scale)


@triton.jit(do_not_specialize=_SIZES)
def _structural_similarity_backward_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    grad_logits_ptr,  # [N, C, H, W]
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    logits_stride_n,
    logits_stride_c,
    logits_stride_h,
    logits_stride_w,
    target_stride_n,
    target_stride_h,
    target_stride_w,
    grad_logits_stride_n,
    grad_logits_stride_c,
    grad_logits_stride_h,
    grad_logits_stride_w,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    STABILITY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REWEIGHT: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    GRAIN: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    DELAYED: tl.constexpr,
):
    """Reads logits and labels once more, recomputes e, writes the gradient once."""
    image, channel, chunk, first_lane, first_row = strip_program(
        channels, tiles_x, tiles_y, CHANNELS_IN_LANES, LANES, ROWS
    )
    logits_plane = logits_ptr + (image * logits_stride_n + channel * logits_stride_c) * GRAIN
    target_image = target_ptr + image * target_stride_n * GRAIN
    grad_plane = (
        grad_logits_ptr + (image * grad_logits_stride_n + channel * grad_logits_stride_c) * GRAIN
    )
    VECTORISED: tl.constexpr = GRAIN > 1
    grad_loss = tl.load(grad_loss_ptr)
    entropy_scale = grad_loss * tl.load(statistics_ptr)
    weighted_scale = grad_loss * tl.load(statistics_ptr + 1)

    if CHANNELS_IN_LANES:
        present = True
    else:
        present = _class_in_strip(
            target_image, first_lane * COLUMNS, first_row, channel, height, width,
            target_stride_h * GRAIN, 1 if VECTORISED else target_stride_w,
            WINDOW, COLUMNS, LANES, ROWS,
        )  # fmt: skip
    if present:
        _backward_strip(
            entropy_scale, weighted_scale, logits_plane, target_image, grad_plane, chunk, first_row,
            channel, channels, height, width, logits_stride_h * GRAIN, logits_stride_w,
            target_stride_h * GRAIN, target_stride_w, grad_logits_stride_h * GRAIN,
            grad_logits_stride_w, window, statistics_ptr.dtype.element_ty, WEIGHTS, EXPONENT,
            LABEL_WEIGHTS, COMPLEMENT,
            STABILITY, THRESHOLD, REWEIGHT, IGNORED, WINDOW, PADDING, LANES, COLUMNS, ROWS,
            VECTORISED, UNROLL, DELAYED, True,
        )  # fmt: skip
    else:
        _backward_strip(
            entropy_scale, weighted_scale, logits_plane, target_image, grad_plane, chunk, first_row,
            channel, channels, height, width, logits_stride_h * GRAIN, logits_stride_w,
            target_stride_h * GRAIN, target_stride_w, grad_logits_stride_h * GRAIN,
            grad_logits_stride_w, window, statistics_ptr.dtype.element_ty, WEIGHTS, EXPONENT,
            LABEL_WEIGHTS, COMPLEMENT,
            STABILITY, THRESHOLD, REWEIGHT, IGNORED, WINDOW, PADDING, LANES, COLUMNS, ROWS,
            VECTORISED, UNROLL, DELAYED, False,
        )  # fmt: skip


@triton.jit
def _backward_strip(
    entropy_scale,
    weighted_scale,
    logits_plane,
    target_image,
    grad_plane,
    chunk,
    first_row,
    channel,
    classes,
    height,
    width,
    logits_stride_h,
    logits_stride_w,
    target_stride_h,
    target_stride_w,
    grad_stride_h,
    grad_stride_w,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    LABEL_WEIGHTS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    STABILITY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    REWEIGHT: tl.constexpr,
    IGNORED: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORISED: tl.constexpr,
    UNROLL: tl.constexpr,
    DELAYED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """The gradient of one strip."""
    history = _empty_history(dtype, COMPLEMENT, WINDOW, COLUMNS, LANES, DELAYED, PRESENT)
    rows = tl.minimum(ROWS, height - first_row) + (WINDOW - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, logits, probabilities, labels, history = _next_row(
            i, history, logits_plane, target_image, chunk, first_row, channel, classes, height, width,
            logits_stride_h, logits_stride_w, target_stride_h, target_stride_w, window, dtype,
            WEIGHTS, EXPONENT, LABEL_WEIGHTS, COMPLEMENT, STABILITY, IGNORED, WINDOW, PADDING, LANES, COLUMNS,
            VECTORISED, DELAYED, PRESENT,
        )  # fmt: skip
        out_row = first_row + i - (WINDOW - 1)
        gradient = ()
        for v in tl.static_range(COLUMNS):
            valid = labels[v] >= 0
            hard = _is_hard(
                differences[v], valid, chunk * COLUMNS + v, out_row, height, width,
                THRESHOLD, WINDOW, PADDING,
            )  # fmt: skip
            weight = differences[v] if REWEIGHT else 1.0
            scale = entropy_scale + tl.where(hard, weighted_scale * weight, 0.0)
            residual = probabilities[v] - tl.where(labels[v] == channel, 1.0, 0.0)
            gradient = gradient + (tl.where(valid, scale * residual, 0.0),)
        store_columns(
            grad_plane + out_row.to(tl.int64) * grad_stride_h,
            chunk, tl.where(i >= WINDOW - 1, width, 0), grad_stride_w, gradient,
            LANES, COLUMNS, VECTORISED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _structural_similarity_stored_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    stored_ptr,  # [N, C, H, W]: e f in, gradient out
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    logits_stride_n,
    logits_stride_c,
    logits_stride_h,
    logits_stride_w,
    target_stride_n,
    target_stride_h,
    target_stride_w,
    stored_stride_n,
    stored_stride_c,
    stored_stride_h,
    stored_stride_w,
    IGNORED: tl.constexpr,
    GRAIN: tl.constexpr,
    CHANNELS_IN_LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turns the stored e f into the gradient in place: no window, three reads and a write."""
    image, channel, chunk, first_lane, first_row = strip_program(
        channels, tiles_x, tiles_y, CHANNELS_IN_LANES, LANES, ROWS
    )
    logits_plane = logits_ptr + (image * logits_stride_n + channel * logits_stride_c) * GRAIN
    target_image = target_ptr + image * target_stride_n * GRAIN
    stored_plane = stored_ptr + (image * stored_stride_n + channel * stored_stride_c) * GRAIN
    VECTORISED: tl.constexpr = GRAIN > 1
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    grad_loss = tl.load(grad_loss_ptr)
    entropy_scale = grad_loss * tl.load(statistics_ptr)
    weighted_scale = grad_loss * tl.load(statistics_ptr + 1)

    for i in tl.range(0, tl.minimum(ROWS, height - first_row)):
        row = (first_row + i).to(tl.int64) * GRAIN
        _, probabilities, labels = _load_pixels(
            logits_plane + row * logits_stride_h, target_image + row * target_stride_h,
            chunk, width, logits_stride_w, target_stride_w, channels,
            dtype, IGNORED, 0, COLUMNS, "zeros", LANES, COLUMNS, VECTORISED,
        )  # fmt: skip
        weights, _ = load_columns(
            stored_plane + row * stored_stride_h, chunk, width, stored_stride_w,
            0, COLUMNS, "zeros", LANES, COLUMNS, VECTORISED,
        )  # fmt: skip
        gradient = ()
        for v in tl.static_range(COLUMNS):
            scale = entropy_scale + weighted_scale * weights[v].to(dtype)
            residual = probabilities[v] - tl.where(labels[v] == channel, 1.0, 0.0)
            gradient = gradient + (tl.where(labels[v] >= 0, scale * residual, 0.0),)
        store_columns(
            stored_plane + row * stored_stride_h, chunk, width, stored_stride_w, gradient,
            LANES, COLUMNS, VECTORISED,
        )  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _label_weights(
    window_size: int, sigma: float, dtype: torch.dtype, columns: int
) -> tuple[tuple[float, ...], str]:
    """(weights, complement): 1-D weights for label maps, and how 1 - mean_y is best found with them.

    Rounded to multiples of the dtype's epsilon / 2 that sum to exactly 1, every partial sum is exact, and
    a window full of ones has the mean 1, to the bit. That rounding would spoil weights below 5e-4: there
    the exact ones are kept, and the complement is filtered on its own; likewise for one column per
    lane, where weights are computed on the way.
    """
    weights = gaussian_window(window_size, sigma)
    smallest = weights[0]
    if smallest < 5e-4 or columns == 1:
        return weights, "filtered"
    units = 2**53 if dtype == torch.float64 else 2**24
    counts = [round(weight * units) for weight in weights]
    counts[window_size // 2] += units - sum(counts)
    rounded = tuple(count / units for count in counts)
    return rounded, "window" if smallest**2 >= 5e-4 else "row"


def _constants(
    statistics_dtype: torch.dtype,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    columns: int,
) -> dict[str, Any]:
    """The kernels' arguments that follow from the loss's options."""
    label_weights, complement = _label_weights(window_size, sigma, statistics_dtype, columns)
    threshold = beta * largest_difference(window_size, sigma, stability)
    return {
        "window": window_size,
        "WEIGHTS": gaussian_window(window_size, sigma),
        "EXPONENT": gaussian_exponent(sigma),
        "LABEL_WEIGHTS": label_weights,
        "COMPLEMENT": complement,
        "STABILITY": stability,
        "THRESHOLD": threshold if hard_mining else -1.0,
        "REWEIGHT": reweight,
        "WINDOW": window_size,
        "PADDING": padding,
        # Mirrored columns beyond the image are no pixels of their own, so their labels are looked up anew.
        "DELAYED": 1 < columns and window_size <= 5 and padding in ("zeros", "valid"),
    }


def _ignored_class(ignore_index: int | None, classes: int) -> int:
    """The ignore label if it would otherwise be a class, else -1: the range check sees to the others."""
    return ignore_index if ignore_index is not None and 0 <= ignore_index < classes else -1


def _configuration(operator: str, logits: torch.Tensor, window_size: int) -> Configuration:
    columns = 4 if window_size <= 7 else 2 if window_size <= 11 else 1
    unroll = 2 if window_size <= 3 and logits.stride(-1) == 1 else 1
    if operator == "structural_similarity_forward":
        schedule = "recompute" if window_size <= 5 else "stored"
        return strip_configuration(
            operator, logits, window_size, columns, UNROLL=unroll, schedule=schedule
        )
    return strip_configuration(operator, logits, window_size, columns, UNROLL=unroll)


def _stores(logits: torch.Tensor, window_size: int, store: bool) -> bool:
    """Whether the forward leaves e f for the backward: if it may, and the configuration says so."""
    configuration = _configuration("structural_similarity_forward", logits, window_size)
    return store and configuration["schedule"] == "stored"


def _unroll(configuration: Configuration, padding: str) -> int:
    """Rows per loop iteration; mirrored columns make long code already."""
    return 1 if padding in ("reflect", "replicate") else int(configuration["UNROLL"])


def _unit(padding: str, columns: int, *tensors: torch.Tensor) -> int:
    """Elements a lane loads at a time; mirrored columns come one by one."""
    return 1 if padding in ("reflect", "replicate") else grain(columns, *tensors)


def _structural_similarity_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    bce_weight: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
    store: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [], statistics [2], e f [N, C, H, W] or [0])."""
    configuration = _configuration("structural_similarity_forward", logits, window_size)
    programs, launch = strip_grid(logits.shape, configuration, channels_in_lanes(logits))
    loss, statistics, stored = _empty_results(logits, window_size, store)
    stores = stored.dim() == 4
    target_like_stored = stored if stores else logits
    partials = statistics.new_empty(4, programs)
    unit = _unit(padding, launch["COLUMNS"], logits, target, target_like_stored)
    with device_guard(logits):
        _structural_similarity_forward_kernel[(programs,)](
            logits_ptr=logits,
            target_ptr=target,
            partials_ptr=partials,
            stored_ptr=stored,
            programs=programs,
            height=logits.size(2),
            width=logits.size(3),
            **strides("logits", logits, unit),
            **strides("target", target, unit, axes="nhw"),
            **strides("stored", target_like_stored, unit),
            **_constants(
                statistics.dtype,
                window_size,
                sigma,
                beta,
                stability,
                padding,
                hard_mining,
                reweight,
                launch["COLUMNS"],
            ),
            IGNORED=_ignored_class(ignore_index, logits.size(1)),
            STORED=stores,
            GRAIN=unit,
            UNROLL=_unroll(configuration, padding),
            enable_fp_fusion=True,
            **launch,
        )
        _structural_similarity_finish_kernel[(1,)](
            partials_ptr=partials,
            loss_ptr=loss,
            statistics_ptr=statistics,
            programs=programs,
            BCE_WEIGHT=bce_weight,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return loss, statistics, stored


def _empty_results(
    logits: torch.Tensor, window_size: int, store: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(logits.dtype)
    loss = torch.empty((), dtype=dtype, device=logits.device)
    statistics = torch.empty(2, dtype=dtype, device=logits.device)
    if _stores(logits, window_size, store):
        return loss, statistics, torch.empty_like(logits)
    return loss, statistics, logits.new_empty(0)


def _structural_similarity_backward(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
) -> torch.Tensor:
    """The gradient by recomputing e."""
    grad_logits = torch.empty_like(logits)
    configuration = _configuration("structural_similarity_backward", logits, window_size)
    programs, launch = strip_grid(logits.shape, configuration, channels_in_lanes(logits))
    unit = _unit(padding, launch["COLUMNS"], logits, target, grad_logits)
    with device_guard(logits):
        _structural_similarity_backward_kernel[(programs,)](
            grad_loss_ptr=grad_loss,
            statistics_ptr=statistics,
            logits_ptr=logits,
            target_ptr=target,
            grad_logits_ptr=grad_logits,
            height=logits.size(2),
            width=logits.size(3),
            **strides("logits", logits, unit),
            **strides("target", target, unit, axes="nhw"),
            **strides("grad_logits", grad_logits, unit),
            **_constants(
                statistics.dtype,
                window_size,
                sigma,
                beta,
                stability,
                padding,
                hard_mining,
                reweight,
                launch["COLUMNS"],
            ),
            IGNORED=_ignored_class(ignore_index, logits.size(1)),
            GRAIN=unit,
            UNROLL=_unroll(configuration, padding),
            enable_fp_fusion=True,
            **launch,
        )
    return grad_logits


def _structural_similarity_stored(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    stored: torch.Tensor,
    ignore_index: int | None,
) -> None:
    """The gradient from the stored e f, in its place."""
    configuration = strip_configuration("structural_similarity_stored", logits, 1, columns=4)
    programs, launch = strip_grid(logits.shape, configuration, channels_in_lanes(logits))
    unit = grain(launch["COLUMNS"], logits, target, stored)
    with device_guard(logits):
        _structural_similarity_stored_kernel[(programs,)](
            grad_loss_ptr=grad_loss,
            statistics_ptr=statistics,
            logits_ptr=logits,
            target_ptr=target,
            stored_ptr=stored,
            height=logits.size(2),
            width=logits.size(3),
            **strides("logits", logits, unit),
            **strides("target", target, unit, axes="nhw"),
            **strides("stored", stored, unit),
            IGNORED=_ignored_class(ignore_index, logits.size(1)),
            GRAIN=unit,
            enable_fp_fusion=True,
            **launch,
        )


# --- operator and gradient --------------------------------------------------------------------------


@torch.library.custom_op("tritonloss::structural_similarity_forward", mutates_args=())
def _forward_op(
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    bce_weight: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
    store: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _structural_similarity_forward(
        logits, target, window_size, sigma, beta, stability, bce_weight, padding,
        hard_mining, reweight, ignore_index, store,
    )  # fmt: skip


@_forward_op.register_fake
def _forward_fake(
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    bce_weight: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
    store: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_results(logits, window_size, store)


@torch.library.custom_op("tritonloss::structural_similarity_backward", mutates_args=())
def _backward_op(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
) -> torch.Tensor:
    return _structural_similarity_backward(
        grad_loss, statistics, logits, target, window_size, sigma, beta, stability, padding,
        hard_mining, reweight, ignore_index,
    )  # fmt: skip


@_backward_op.register_fake
def _backward_fake(
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    window_size: int,
    sigma: float,
    beta: float,
    stability: float,
    padding: str,
    hard_mining: bool,
    reweight: bool,
    ignore_index: int | None,
) -> torch.Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, window_size, sigma, beta, stability, _, *rest, ignore_index, _ = inputs
    _, statistics, stored = output
    ctx.save_for_backward(logits, target, statistics, stored)
    ctx.options = (window_size, sigma, beta, stability, *rest, ignore_index)
    ctx.is_stored = stored.dim() == 4


def _gradient(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    logits, target, statistics, stored = ctx.saved_tensors
    if ctx.is_stored and not torch.is_grad_enabled():
        # The buffer becomes the gradient; a second backward through the same graph recomputes.
        ctx.is_stored = False
        grad_logits = stored.detach()
        _structural_similarity_stored(
            grad_loss, statistics, logits, target, grad_logits, ctx.options[-1]
        )
    else:
        grad_logits = _backward_op(grad_loss, statistics, logits, target, *ctx.options)
    return (grad_logits, *(None,) * 11)


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


# --- function ---------------------------------------------------------------------------------------


def structural_similarity_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    window_size: int = 3,
    sigma: float = 1.5,
    beta: float = 0.1,
    stability: float = 0.01,
    bce_weight: float = 0.5,
    padding: str = "zeros",
    hard_mining: bool = True,
    reweight: bool = True,
    ignore_index: int | None = 255,
) -> torch.Tensor:
    """Structural similarity loss: cross entropy on the samples whose local structure is most wrong.

    With p = sigmoid(logits), y the one-hot target, n(x) = (x - mean + C4) / (deviation + C4) under a
    Gaussian window, e = |n(y) - n(p)|, f = 1[e > beta e_max] and M = sum f:

        loss = bce_weight BCE + (1 - bce_weight) (1 / M) sum e f bce(logits, y)

    BCE is summed over classes and averaged over valid pixels. e, f and M are constants to the gradient.
    Each class is a binary map of its own (one against the rest).

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        window_size: side of the window in pixels, odd, 1 to 31. Default 3. 1 compares single pixels:
            e = |y - p|, e_max = 1.
        sigma: standard deviation of the Gaussian window in pixels, > 0. Default 1.5.
        beta: share of the theoretical e_max below which a sample is dropped, in [0, 1). Default 0.1.
        stability: C4, > 0. Default 0.01.
        bce_weight: share of the plain cross entropy, in [0, 1]. Default 0.5.
        padding: "zeros" (default), "reflect", "replicate", or "valid": pixels whose window leaves the
            image count for the cross entropy only.
        hard_mining: False keeps all valid samples (f = 1). Default True.
        reweight: False sets e = 1 once the hard samples are chosen. Default True.
        ignore_index: label of pixels that take part in nothing (0 to the window, like padding), any
            integer or None. Default 255. Other labels outside [0, C) raise on the CPU; on a GPU, where
            looking would synchronise, they count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 with zero gradient if no pixel is
        valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see ignore_index).

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 10 to 17.

    Example:
        >>> import torch
        >>> from tritonloss.functional import structural_similarity_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> structural_similarity_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    _checks.check_logits(logits)
    _checks.check_target(logits, target)
    _checks.check_window_size(window_size)
    _checks.check_range("sigma", sigma, 0.0, math.inf, interval="()")
    _checks.check_range("beta", beta, 0.0, 1.0, interval="[)")
    _checks.check_range("stability", stability, 0.0, math.inf, interval="()")
    _checks.check_range("bce_weight", bce_weight, 0.0, 1.0)
    _checks.check_option("padding", padding, PADDINGS)
    _checks.check_padding_fits(logits, window_size, padding)
    _checks.check_flag("hard_mining", hard_mining)
    _checks.check_flag("reweight", reweight)
    _checks.check_ignore_index(ignore_index)
    _checks.check_labels_in_range(target, logits.size(1), ignore_index)
    if not serves_triton(logits):
        return structural_similarity_loss_reference(
            logits,
            target,
            window_size=window_size,
            sigma=sigma,
            beta=beta,
            stability=stability,
            bce_weight=bce_weight,
            padding=padding,
            hard_mining=hard_mining,
            reweight=reweight,
            ignore_index=ignore_index,
        )
    # A compiled graph may not reuse a saved buffer in place, so there e is always recomputed.
    store = logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    loss: torch.Tensor = torch.ops.tritonloss.structural_similarity_forward(
        logits, target, window_size, float(sigma), float(beta), float(stability), float(bce_weight),
        padding, hard_mining, reweight, ignore_index, store,
    )[0]  # fmt: skip
    return loss


# --- module -----------------------------------------------------------------------------------------


class StructuralSimilarityLoss(nn.Module):
    """Structural similarity loss as a module: :func:`tritonloss.functional.structural_similarity_loss`.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.StructuralSimilarityLoss(window_size=5)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        window_size: int = 3,
        sigma: float = 1.5,
        beta: float = 0.1,
        stability: float = 0.01,
        bce_weight: float = 0.5,
        padding: str = "zeros",
        hard_mining: bool = True,
        reweight: bool = True,
        ignore_index: int | None = 255,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.sigma = sigma
        self.beta = beta
        self.stability = stability
        self.bce_weight = bce_weight
        self.padding = padding
        self.hard_mining = hard_mining
        self.reweight = reweight
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [N, C, H, W], target [N, H, W] -> scalar."""
        return structural_similarity_loss(
            logits,
            target,
            window_size=self.window_size,
            sigma=self.sigma,
            beta=self.beta,
            stability=self.stability,
            bce_weight=self.bce_weight,
            padding=self.padding,
            hard_mining=self.hard_mining,
            reweight=self.reweight,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, sigma={self.sigma}, beta={self.beta}, "
            f"stability={self.stability}, bce_weight={self.bce_weight}, padding={self.padding!r}, "
            f"hard_mining={self.hard_mining}, reweight={self.reweight}, "
            f"ignore_index={self.ignore_index}"
        )
