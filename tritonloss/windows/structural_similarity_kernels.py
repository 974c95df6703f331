"""Kernels of the structural similarity loss; its mathematics stands in structural_similarity.py."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, inverse, label_of, sanitised_label, sigmoid_base2, softplus_base2
from .._engine.strips import (
    SIZES,
    column_moments,
    filtered_column,
    filtered_row,
    gaussian_weight,
    label_plane_of,
    load_columns,
    load_values,
    plane_of,
    repeated,
    row_limit,
    row_moments,
    row_of,
    source_row,
    store_columns,
    strip_program,
    without_oldest,
)

# Above the index of every class: no label is at least this.
_ABOVE_ALL = tl.constexpr(1 << 30)


class Sampling(NamedTuple):
    """How e and f are taken; known when a kernel is compiled."""

    label_weights: tuple[float, ...]
    complement: str  # how 1 - mean_y is found: "window", "row" or "filtered"; see _label_weights
    stability: float
    threshold: float
    reweight: bool
    delayed: bool  # the half window still to be completed is kept in registers, not loaded again


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _class_in_strip(
    target, first_column, first_row, channel, height, width, RADIUS: tl.constexpr,
    IGNORED: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Whether any label that this strip's windows see is the channel's: a look before the work.

    Most (strip, class) pairs of a street scene have none; then y = 0 throughout and n_y = 1.
    """
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns
    BORDER: tl.constexpr = triton.next_power_of_2(2 * RADIUS + 1)
    inner = first_column + tl.arange(0, WIDTH)
    border = tl.arange(0, BORDER)
    outer = first_column + border - RADIUS + tl.where(border >= RADIUS, WIDTH, 0)
    inner_mask = inner < width
    outer_mask = (border < 2 * RADIUS) & (outer >= 0) & (outer < width)
    first = tl.maximum(first_row - RADIUS, 0)
    rows = tl.minimum(first_row + STRIP.rows + RADIUS, height) - first
    own = label_of(channel, IGNORED)

    inner_found = tl.zeros((WIDTH,), tl.int32)
    outer_found = tl.zeros((BORDER,), tl.int32)
    for i in tl.range(0, rows):
        row_ptr = row_of(target, first + i, STRIP)
        label = tl.load(row_ptr + inner.to(tl.int64) * target[2], mask=inner_mask, other=0)
        inner_found |= ((label == own) & inner_mask).to(tl.int32)
        if RADIUS > 0:
            label = tl.load(row_ptr + outer.to(tl.int64) * target[2], mask=outer_mask, other=0)
            outer_found |= ((label == own) & outer_mask).to(tl.int32)
    return tl.maximum(tl.max(inner_found, 0), tl.max(outer_found, 0)) > 0


@triton.jit
def _valid_in_strip(
    target, first_column, first_row, classes, height, width, dtype: tl.constexpr,
    IGNORED: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Number of valid pixels in this strip: counted for one class, since all classes share it."""
    WIDTH: tl.constexpr = STRIP.lanes * STRIP.columns
    column = first_column + tl.arange(0, WIDTH)
    count = tl.zeros((WIDTH,), dtype)
    for i in tl.range(0, tl.minimum(STRIP.rows, height - first_row)):
        row_ptr = row_of(target, first_row + i, STRIP)
        label = tl.load(row_ptr + column.to(tl.int64) * target[2], mask=column < width, other=0)
        label = sanitised_label(label, column < width, classes, IGNORED)
        count += tl.where(label >= 0, 1.0, 0.0)
    return tl.sum(count)


@triton.jit
def _load_pixels(
    logits, target, row, chunk, limit, classes, dtype: tl.constexpr, IGNORED: tl.constexpr,
    STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """(scaled logits, probabilities, labels) of COUNT columns; 0 and label -1 where not valid."""
    loaded, _ = load_columns(logits, row, chunk, limit, STRIP, SHIFT, COUNT, PADDING)
    found, inside = load_columns(target, row, chunk, limit, STRIP, SHIFT, COUNT, PADDING)
    scaled = ()
    probabilities = ()
    labels = ()
    for j in tl.static_range(COUNT):
        u = loaded[j].to(dtype) * LOG2_E
        label = sanitised_label(found[j], inside[j], classes, IGNORED)
        scaled = scaled + (u,)
        labels = labels + (label,)
        # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
        probabilities = probabilities + (tl.where(label >= 0, sigmoid_base2(u), 0.0),)
    return scaled, probabilities, labels


@triton.jit
def _label_row(
    labels, channel, dtype: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(row_positive, row_negative): one row's part of the window means of y and 1 - y."""
    LABEL_WEIGHTS: tl.constexpr = SAMPLING.label_weights
    y = ()
    complement = ()
    for j in tl.static_range(COLUMNS + WINDOW - 1):
        y = y + (tl.where(labels[j] == channel, 1.0, 0.0).to(dtype),)
        complement = complement + (tl.where(labels[j] == channel, 0.0, 1.0).to(dtype),)
    row_positive = filtered_row(y, LABEL_WEIGHTS, WINDOW, COLUMNS)
    row_negative = ()
    if SAMPLING.complement == "filtered":
        row_negative = filtered_row(complement, LABEL_WEIGHTS, WINDOW, COLUMNS)
    elif SAMPLING.complement == "row":
        for v in tl.static_range(COLUMNS):
            row_negative = row_negative + (1.0 - row_positive[v],)
    return row_positive, row_negative


@triton.jit
def _streamed_row(
    logits, target, row, column, limit, channel, classes, window, dtype: tl.constexpr,
    IGNORED: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """(row_mean, row_variance, row_positive, row_negative) for one column per lane, tap by tap."""
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    RADIUS: tl.constexpr = WINDOW.size // 2
    _, centre, label = _load_pixels(
        logits, target, row, column, limit, classes, dtype, IGNORED, STRIP, 0, 1, PADDING
    )
    first = tl.zeros_like(centre[0])
    second = tl.zeros_like(centre[0])
    positive = tl.where(label[0] == channel, 1.0, 0.0).to(dtype) * WEIGHTS[RADIUS]
    negative = tl.where(label[0] == channel, 0.0, 1.0).to(dtype) * WEIGHTS[RADIUS]
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WINDOW)
        for side in tl.static_range(-1, 2, 2):
            _, probability, label = _load_pixels(
                logits, target, row, column + side * distance, limit, classes, dtype, IGNORED,
                STRIP, 0, 1, PADDING,
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
    probability, centre, shift, variance, belongs, positive, negative, STABILITY: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """E of one column (SSL paper, Eq. 10); mean_p = centre + shift, mean_y = 1 - negative."""
    deviation = tl.sqrt(variance)
    excess = (probability - centre) - shift  # p - mean_p
    if PRESENT:
        label_deviation = tl.sqrt(positive * negative)  # y^2 = y
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
    dtype: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """What a strip carries from row to row; see _next_row."""
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    LABELS: tl.constexpr = ROWS if PRESENT else 0
    COMPLEMENTS: tl.constexpr = LABELS if SAMPLING.complement != "window" else 0
    DELAY: tl.constexpr = WINDOW.size // 2 * STRIP.columns if SAMPLING.delayed else 0
    zero = tl.zeros((LANES,), dtype)
    no_label = tl.full((LANES,), -1, tl.int32)
    moments = (repeated(zero, ROWS), repeated(zero, ROWS))
    label_means = (repeated(zero, LABELS), repeated(zero, COMPLEMENTS))
    late = (repeated(zero, DELAY), repeated(zero, DELAY), repeated(no_label, DELAY))
    return moments, label_means, late


@triton.jit
def _next_row(
    i, history, logits, target, chunk, first_row, channel, classes, height, width, window,
    dtype: tl.constexpr, IGNORED: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (e, (scaled logits, probabilities, labels), history).

    e and the pixels are those of the row whose window row i completes. history: the row means and
    unfinished row variances of p; the unfinished label means and their complements; the pixels of
    the half window still to be completed.
    """
    SIZE: tl.constexpr = WINDOW.size
    RADIUS: tl.constexpr = WINDOW.size // 2
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    LABEL_WEIGHTS: tl.constexpr = SAMPLING.label_weights
    STABILITY: tl.constexpr = SAMPLING.stability
    moments, label_means, late = history
    means, variances = moments
    positives, negatives = label_means
    late_logits, late_probabilities, late_labels = late

    row = source_row(first_row + i - RADIUS, height, PADDING)
    limit = row_limit(row, height, width)
    if COLUMNS == 1:
        row_mean, row_variance, row_positive, row_negative = _streamed_row(
            logits, target, row, chunk, limit, channel, classes, window, dtype, IGNORED, WINDOW,
            STRIP, PRESENT,
        )  # fmt: skip
    else:
        scaled, probabilities, labels = _load_pixels(
            logits, target, row, chunk, limit, classes, dtype, IGNORED, STRIP, -RADIUS,
            COLUMNS + SIZE - 1, PADDING,
        )  # fmt: skip
        row_mean, row_variance = row_moments(probabilities, WEIGHTS, SIZE, COLUMNS)
        row_positive, row_negative = _label_row(labels, channel, dtype, SAMPLING, SIZE, COLUMNS)
    centres, shifts, variance, means, variances = column_moments(
        row_mean, row_variance, means, variances, WEIGHTS, SIZE, COLUMNS
    )
    positive = centres
    negative = centres
    if PRESENT:
        positive, positives = filtered_column(positives, row_positive, LABEL_WEIGHTS, SIZE, COLUMNS)
        if SAMPLING.complement == "window":
            negative = ()
            for v in tl.static_range(COLUMNS):
                negative = negative + (1.0 - positive[v],)
        else:
            negative, negatives = filtered_column(
                negatives, row_negative, LABEL_WEIGHTS, SIZE, COLUMNS
            )

    if SAMPLING.delayed:
        for v in tl.static_range(COLUMNS):
            late_logits = late_logits + (scaled[v + RADIUS],)
            late_probabilities = late_probabilities + (probabilities[v + RADIUS],)
            late_labels = late_labels + (labels[v + RADIUS],)
        pixels = (late_logits, late_probabilities, late_labels)
        late_logits = without_oldest(late_logits, RADIUS + 1, COLUMNS)
        late_probabilities = without_oldest(late_probabilities, RADIUS + 1, COLUMNS)
        late_labels = without_oldest(late_labels, RADIUS + 1, COLUMNS)
    else:
        out_row = first_row + i - (SIZE - 1)
        pixels = _load_pixels(
            logits, target, out_row, chunk, row_limit(out_row, height, width), classes, dtype,
            IGNORED, STRIP, 0, COLUMNS, "zeros",
        )  # fmt: skip

    differences = ()
    for v in tl.static_range(COLUMNS):
        belongs = pixels[2][v] == channel
        if SIZE == 1:
            # One pixel has no structure (Eq. 10 is 1 for y and p alike): compared as they are.
            e = tl.abs(tl.where(belongs, 1.0, 0.0).to(dtype) - pixels[1][v])
        else:
            e = _structural_difference(
                pixels[1][v], centres[v], shifts[v], variance[v], belongs, positive[v], negative[v],
                STABILITY, PRESENT,
            )  # fmt: skip
        differences = differences + (e,)
    late = (late_logits, late_probabilities, late_labels)
    return differences, pixels, ((means, variances), (positives, negatives), late)


@triton.jit
def _is_hard(e, column, row, height, width, SAMPLING: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a valid pixel is hard (f, SSL paper, Eq. 11). A NaN is, and so reaches the loss."""
    hard = ~(e <= SAMPLING.threshold)
    if WINDOW.padding == "valid":
        RADIUS: tl.constexpr = WINDOW.size // 2
        row_is_inside = (row >= RADIUS) & (row < height - RADIUS)
        limit = tl.where(row_is_inside, width - RADIUS, 0)
        hard = hard & (column >= RADIUS) & (column < limit)
    return hard


@triton.jit
def _forward_strip(
    logits, target, stored, chunk, first_row, channel, classes, height, width, window,
    dtype: tl.constexpr, IGNORED: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr, STORED: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Sums of bce, e f bce, f, and of valid pixels (only if the lanes hold all channels)."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    LANES: tl.constexpr = STRIP.lanes
    UNROLL: tl.constexpr = STRIP.unroll
    zero = tl.zeros((LANES,), dtype)
    entropy_sum, weighted_sum, hard_count, valid_count = zero, zero, zero, zero
    history = _empty_history(dtype, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, pixels, history = _next_row(
            i, history, logits, target, chunk, first_row, channel, classes, height, width, window,
            dtype, IGNORED, SAMPLING, WINDOW, STRIP, PRESENT,
        )  # fmt: skip
        out_row = first_row + i - (SIZE - 1)
        lowest_label = tl.where(i >= SIZE - 1, 0, _ABOVE_ALL)
        kept = ()
        for v in tl.static_range(COLUMNS):
            label = pixels[2][v]
            valid = label >= lowest_label
            column = chunk * COLUMNS + v
            hard = valid & _is_hard(
                differences[v], column, out_row, height, width, SAMPLING, WINDOW
            )
            entropy = softplus_base2(tl.where(label == channel, -pixels[0][v], pixels[0][v]))
            weight = differences[v] if SAMPLING.reweight else zero + 1.0
            entropy_sum += tl.where(valid, entropy, 0.0)
            weighted_sum += tl.where(hard, weight * entropy, 0.0)
            hard_count += tl.where(hard, 1.0, 0.0)
            if STRIP.channels_in_lanes:
                valid_count += tl.where(valid & (channel == 0), 1.0, 0.0)
            kept = kept + (tl.where(hard, weight, 0.0),)
        if STORED:
            limit = tl.where(i >= SIZE - 1, width, 0)
            store_columns(stored, out_row, chunk, limit, kept, STRIP)
    return tl.sum(entropy_sum), tl.sum(weighted_sum), tl.sum(hard_count), tl.sum(valid_count)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_forward_kernel(
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    partials_ptr,  # [4, programs]: sums of bce, of e f bce, of f, and of valid pixels
    stored_ptr,  # [N, C, H, W]: e f, if STORED
    logits_strides,
    target_strides,
    stored_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    programs,
    IGNORED: tl.constexpr,
    SAMPLING: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
    STORED: tl.constexpr,
):
    """Reads logits and labels once; writes four sums per program, and e f if STORED."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    RADIUS: tl.constexpr = WINDOW.size // 2
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    logits = plane_of(logits_ptr, logits_strides, image, channel, STRIP)
    target = label_plane_of(target_ptr, target_strides, image, STRIP)
    stored = plane_of(stored_ptr, stored_strides, image, channel, STRIP)

    present = True
    if not STRIP.channels_in_lanes:
        present = _class_in_strip(
            target, first_column, first_row, channel, height, width, RADIUS, IGNORED, STRIP
        )
    if present:
        sums = _forward_strip(
            logits, target, stored, chunk, first_row, channel, channels, height, width, window,
            dtype, IGNORED, SAMPLING, WINDOW, STRIP, STORED, True,
        )  # fmt: skip
    else:
        sums = _forward_strip(
            logits, target, stored, chunk, first_row, channel, channels, height, width, window,
            dtype, IGNORED, SAMPLING, WINDOW, STRIP, STORED, False,
        )  # fmt: skip

    partial_ptr = partials_ptr + tl.program_id(0)
    for quantity in tl.static_range(4):
        tl.store(partial_ptr + quantity * programs, sums[quantity])
    if not STRIP.channels_in_lanes:
        if channel == 0:
            valid_count = _valid_in_strip(
                target, first_column, first_row, channels, height, width, dtype, IGNORED, STRIP
            )
            tl.store(partial_ptr + 3 * programs, valid_count)


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
    tl.store(loss_ptr, entropy_scale * tl.sum(entropy) + weighted_scale * tl.sum(weighted))
    tl.store(statistics_ptr, entropy_scale)
    tl.store(statistics_ptr + 1, weighted_scale)


@triton.jit
def _residual(u, probability, belongs, PRESENT: tl.constexpr):
    """The residual p - y; for y = 1 as -sigmoid(-z), since p - 1 has no digits left near 1."""
    residual = probability
    if PRESENT:
        residual = tl.where(belongs, -sigmoid_base2(-u), probability)
    return residual


@triton.jit
def _backward_strip(
    scales, logits, target, grad, chunk, first_row, channel, classes, height, width, window,
    dtype: tl.constexpr, IGNORED: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """The gradient of one strip: (p - y) (a m + b e f)."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    history = _empty_history(dtype, SAMPLING, WINDOW, STRIP, PRESENT)
    rows = tl.minimum(STRIP.rows, height - first_row) + (SIZE - 1)
    for i in tl.range(0, rows, loop_unroll_factor=UNROLL):
        differences, pixels, history = _next_row(
            i, history, logits, target, chunk, first_row, channel, classes, height, width, window,
            dtype, IGNORED, SAMPLING, WINDOW, STRIP, PRESENT,
        )  # fmt: skip
        out_row = first_row + i - (SIZE - 1)
        gradient = ()
        for v in tl.static_range(COLUMNS):
            column = chunk * COLUMNS + v
            hard = _is_hard(differences[v], column, out_row, height, width, SAMPLING, WINDOW)
            # Where a pixel is not valid p = y = 0, and with them the gradient: but 0 times a NaN,
            # of a neighbour, would be one.
            hard = hard & (pixels[2][v] >= 0)
            weight = tl.where(hard, differences[v] if SAMPLING.reweight else 1.0, 0.0)
            belongs = pixels[2][v] == channel
            residual = _residual(pixels[0][v], pixels[1][v], belongs, PRESENT)
            gradient = gradient + ((scales[0] + scales[1] * weight) * residual,)
        limit = tl.where(i >= SIZE - 1, width, 0)
        store_columns(grad, out_row, chunk, limit, gradient, STRIP)


@triton.jit
def _gradient_scales(grad_loss_ptr, statistics_ptr):
    """(a, b): the scales of the two parts of the gradient."""
    grad_loss = tl.load(grad_loss_ptr)
    return grad_loss * tl.load(statistics_ptr), grad_loss * tl.load(statistics_ptr + 1)


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_backward_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    grad_logits_ptr,  # [N, C, H, W]
    logits_strides,
    target_strides,
    grad_logits_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    window,
    IGNORED: tl.constexpr,
    SAMPLING: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Reads logits and labels once more, recomputes e, writes the gradient once."""
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    RADIUS: tl.constexpr = WINDOW.size // 2
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    logits = plane_of(logits_ptr, logits_strides, image, channel, STRIP)
    target = label_plane_of(target_ptr, target_strides, image, STRIP)
    grad = plane_of(grad_logits_ptr, grad_logits_strides, image, channel, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    present = True
    if not STRIP.channels_in_lanes:
        present = _class_in_strip(
            target, first_column, first_row, channel, height, width, RADIUS, IGNORED, STRIP
        )
    if present:
        _backward_strip(
            scales, logits, target, grad, chunk, first_row, channel, channels, height, width,
            window, dtype, IGNORED, SAMPLING, WINDOW, STRIP, True,
        )  # fmt: skip
    else:
        _backward_strip(
            scales, logits, target, grad, chunk, first_row, channel, channels, height, width,
            window, dtype, IGNORED, SAMPLING, WINDOW, STRIP, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _structural_similarity_stored_kernel(
    grad_loss_ptr,  # []
    statistics_ptr,  # [2]
    logits_ptr,  # [N, C, H, W]
    target_ptr,  # [N, H, W]
    stored_ptr,  # [N, C, H, W]: e f in, gradient out
    logits_strides,
    target_strides,
    stored_strides,
    channels,
    height,
    width,
    tiles_x,
    tiles_y,
    IGNORED: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Turns the stored e f into the gradient in place: no window, three reads and a write."""
    COLUMNS: tl.constexpr = STRIP.columns
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    image, channel, chunk, first_column, first_row = strip_program(
        channels, tiles_x, tiles_y, STRIP
    )
    logits = plane_of(logits_ptr, logits_strides, image, channel, STRIP)
    target = label_plane_of(target_ptr, target_strides, image, STRIP)
    stored = plane_of(stored_ptr, stored_strides, image, channel, STRIP)
    scales = _gradient_scales(grad_loss_ptr, statistics_ptr)

    for i in tl.range(0, tl.minimum(STRIP.rows, height - first_row)):
        row = first_row + i
        scaled, probabilities, labels = _load_pixels(
            logits, target, row, chunk, width, channels, dtype, IGNORED, STRIP, 0, COLUMNS, "zeros"
        )
        weights = load_values(stored, row, chunk, width, dtype, STRIP, 0, COLUMNS, "zeros")
        gradient = ()
        for v in tl.static_range(COLUMNS):
            residual = _residual(scaled[v], probabilities[v], labels[v] == channel, True)
            gradient = gradient + ((scales[0] + scales[1] * weights[v]) * residual,)
        store_columns(stored, row, chunk, width, gradient, STRIP)
