"""The structural difference e of a strip, row by row (SSL paper, Eq. 10).

A row of pixels completes the windows that are centred half a window above it. Each row that is read
therefore gives e of a row further up, together with the pixels of that row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, inverse, negated, sanitised_label, sigmoid_base2
from .._engine.strip_windows import (
    Moments,
    WindowMoments,
    column_moments,
    filtered_column,
    filtered_row,
    gaussian_weight,
    repeated,
    row_moments,
    without_oldest,
)
from .._engine.strips import Row, load_columns, row_limit, source_row, widened, zeros


class Sampling(NamedTuple):
    """How e and f are taken; known when a kernel is compiled."""

    label_weights: tuple[float, ...]
    complement: str  # how 1 - mean_y is found: "window", "row" or "filtered"; see _label_weights
    stability: float
    ignored: int  # the ignore label as sanitised_label takes it
    threshold: float
    reweight: bool
    delayed: bool  # pixels stay in registers until their windows are complete; else loaded again


class Maps(NamedTuple):
    """What the program of a strip reads; a run-time value, like the tuples below."""

    logits: Any  # a plane, from the first row of the strip on
    target: Any  # likewise
    classes: Any
    height: Any
    width: Any
    window: Any  # its size, for loops that are not to be unrolled


class Pixels(NamedTuple):
    """Pixels of a row, a tensor [lanes] per column; label -1 and probability 0 where not valid."""

    scaled: Any  # logits, times log2(e)
    probability: Any
    label: Any


class LabelMeans(NamedTuple):
    """Window means of y and of 1 - y, a tensor per column; finished, of one row, or unfinished."""

    positive: Any
    negative: Any


class History(NamedTuple):
    """What a strip carries from row to row."""

    moments: Any  # of the probabilities in the rows before
    labels: Any  # unfinished means of the labels
    late: Any  # the pixels whose windows are not complete yet, if SAMPLING.delayed


@triton.jit
def load_pixels(
    maps, row, IGNORED: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """COUNT pixels of a row per lane, from SHIFT columns after each chunk's first."""
    loaded, _ = load_columns(maps.logits, row, STRIP, SHIFT, COUNT, PADDING, None)
    found, inside = load_columns(maps.target, row, STRIP, SHIFT, COUNT, PADDING, None)
    scaled = ()
    probabilities = ()
    labels = ()
    for j in tl.static_range(COUNT):
        u = widened(loaded[j]) * LOG2_E
        label = sanitised_label(found[j], inside[j], maps.classes, IGNORED)
        scaled = scaled + (u,)
        labels = labels + (label,)
        # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
        probabilities = probabilities + (tl.where(label >= 0, sigmoid_base2(u), 0.0),)
    return Pixels(scaled=scaled, probability=probabilities, label=labels)


@triton.jit
def _label_row(
    labels, channel, dtype: tl.constexpr, SAMPLING: tl.constexpr, WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row's part of the means of y, and of 1 - y unless that follows from the means of y."""
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
    return LabelMeans(positive=row_positive, negative=row_negative)


@triton.jit
def _streamed_row(
    maps, row, channel, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """(moments, label means) of one row for one column per lane, tap by tap."""
    IGNORED: tl.constexpr = SAMPLING.ignored
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    RADIUS: tl.constexpr = WINDOW.size // 2
    pixel = load_pixels(maps, row, IGNORED, STRIP, 0, 1, PADDING)
    centre = pixel.probability[0]
    dtype: tl.constexpr = centre.dtype
    first = tl.zeros_like(centre)
    second = tl.zeros_like(centre)
    positive = tl.where(pixel.label[0] == channel, 1.0, 0.0).to(dtype) * WEIGHTS[RADIUS]
    negative = tl.where(pixel.label[0] == channel, 0.0, 1.0).to(dtype) * WEIGHTS[RADIUS]
    for distance in tl.range(1, maps.window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WINDOW)
        for side in tl.static_range(-1, 2, 2):
            column = row.chunk + side * distance
            tap = Row(number=row.number, chunk=column, limit=row.limit)
            neighbour = load_pixels(maps, tap, IGNORED, STRIP, 0, 1, PADDING)
            difference = neighbour.probability[0] - centre
            first += difference * weight
            second += difference * difference * weight
            if PRESENT:
                positive += tl.where(neighbour.label[0] == channel, weight, 0.0)
                negative += tl.where(neighbour.label[0] == channel, 0.0, weight)
    moments = Moments(mean=(centre + first,), variance=(second - first * first,))
    return moments, LabelMeans(positive=(positive,), negative=(negative,))


@triton.jit
def _structural_difference(
    probability, belongs, moments, means, STABILITY: tl.constexpr, PRESENT: tl.constexpr
):
    """The structural difference e of one column, from moments of p and means of y (Eq. 10)."""
    deviation = tl.sqrt(moments.variance)
    excess = (probability - moments.centre) - moments.shift  # p - mean_p
    if PRESENT:
        label_deviation = tl.sqrt(means.positive * means.negative)  # y^2 = y
        label_excess = tl.where(belongs, means.negative, negated(means.positive))  # y - mean_y
        denominator = (deviation + STABILITY) * (label_deviation + STABILITY)
        numerator = (label_excess + STABILITY) * (deviation + STABILITY) - (excess + STABILITY) * (
            label_deviation + STABILITY
        )
    else:  # y = 0 in the whole window: its term of Eq. 10 is 1
        denominator = deviation + STABILITY
        numerator = deviation - excess
    return tl.abs(numerator) * inverse(denominator)


@triton.jit
def empty_history(
    maps, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr, PRESENT: tl.constexpr
):
    """What a strip carries before its first row."""
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    LABELS: tl.constexpr = ROWS if PRESENT else 0
    COMPLEMENTS: tl.constexpr = LABELS if SAMPLING.complement != "window" else 0
    DELAY: tl.constexpr = WINDOW.size // 2 * STRIP.columns if SAMPLING.delayed else 0
    zero = zeros(maps.logits, STRIP)
    no_label = tl.full((LANES,), -1, tl.int32)
    return History(
        moments=Moments(mean=repeated(zero, ROWS), variance=repeated(zero, ROWS)),
        labels=LabelMeans(positive=repeated(zero, LABELS), negative=repeated(zero, COMPLEMENTS)),
        late=Pixels(
            scaled=repeated(zero, DELAY),
            probability=repeated(zero, DELAY),
            label=repeated(no_label, DELAY),
        ),
    )


@triton.jit
def next_row(
    i, history, maps, program, SAMPLING: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """(e, pixels, history) after row i, counted from the strip's first row.

    e and the pixels are those of the row whose window row i completes, half a window further up.
    """
    SIZE: tl.constexpr = WINDOW.size
    RADIUS: tl.constexpr = WINDOW.size // 2
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    LABEL_WEIGHTS: tl.constexpr = SAMPLING.label_weights
    STABILITY: tl.constexpr = SAMPLING.stability
    IGNORED: tl.constexpr = SAMPLING.ignored

    # moments and label means along the row
    number = source_row(program.first_row + i, maps.height, PADDING)
    limit = row_limit(number, maps.height, maps.width)
    row = Row(number=number - program.first_row, chunk=program.chunk, limit=limit)
    if COLUMNS == 1:
        row_of_moments, row_of_means = _streamed_row(
            maps, row, program.channel, SAMPLING, WINDOW, STRIP, PRESENT
        )
    else:
        newest = load_pixels(maps, row, IGNORED, STRIP, -RADIUS, COLUMNS + SIZE - 1, PADDING)
        row_of_moments = row_moments(newest.probability, WEIGHTS, SIZE, COLUMNS)
        dtype: tl.constexpr = newest.probability[0].dtype
        row_of_means = _label_row(newest.label, program.channel, dtype, SAMPLING, SIZE, COLUMNS)

    # moments and label means of the windows that the row completes
    moments, unfinished = column_moments(row_of_moments, history.moments, WEIGHTS, SIZE, COLUMNS)
    positive = moments.centre
    negative = moments.centre
    positives = history.labels.positive
    negatives = history.labels.negative
    if PRESENT:
        positive, positives = filtered_column(
            positives, row_of_means.positive, LABEL_WEIGHTS, SIZE, COLUMNS
        )
        if SAMPLING.complement == "window":
            negative = ()
            for v in tl.static_range(COLUMNS):
                negative = negative + (1.0 - positive[v],)
        else:
            negative, negatives = filtered_column(
                negatives, row_of_means.negative, LABEL_WEIGHTS, SIZE, COLUMNS
            )

    # the pixels at the windows' centres
    late = history.late
    if SAMPLING.delayed:
        scaled = late.scaled
        probability = late.probability
        label = late.label
        for v in tl.static_range(COLUMNS):
            scaled = scaled + (newest.scaled[v + RADIUS],)
            probability = probability + (newest.probability[v + RADIUS],)
            label = label + (newest.label[v + RADIUS],)
        pixels = Pixels(scaled=scaled, probability=probability, label=label)
        late = Pixels(
            scaled=without_oldest(scaled, RADIUS + 1, COLUMNS),
            probability=without_oldest(probability, RADIUS + 1, COLUMNS),
            label=without_oldest(label, RADIUS + 1, COLUMNS),
        )
    else:
        number = program.first_row + i - RADIUS
        limit = row_limit(number, maps.height, maps.width)
        middle = Row(number=i - RADIUS, chunk=program.chunk, limit=limit)
        pixels = load_pixels(maps, middle, IGNORED, STRIP, 0, COLUMNS, "zeros")

    # e of the row that is complete
    differences = ()
    for v in tl.static_range(COLUMNS):
        probability = pixels.probability[v]
        belongs = pixels.label[v] == program.channel
        if SIZE == 1:
            # One pixel has no structure, n(y) = n(p) = 1 in Eq. 10: y and p are compared instead.
            e = tl.abs(tl.where(belongs, 1.0, 0.0).to(probability.dtype) - probability)
        else:
            of_column = WindowMoments(
                centre=moments.centre[v], shift=moments.shift[v], variance=moments.variance[v]
            )
            means = LabelMeans(positive=positive[v], negative=negative[v])
            e = _structural_difference(probability, belongs, of_column, means, STABILITY, PRESENT)
        differences = differences + (e,)
    labels = LabelMeans(positive=positives, negative=negatives)
    return differences, pixels, History(moments=unfinished, labels=labels, late=late)
