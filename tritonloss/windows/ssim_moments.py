"""Window moments of a pair of maps, row by row: what every kernel of SSIM starts from.

The moments are those of x and of the residual d = x - y, whose window variance is the numerator of
1 - S_2. Computed in this way, nothing cancels when the two maps are nearly alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.math import LOG2_E, inverse, plus, sanitised_label, sigmoids_base2
from .._engine.strip_windows import filtered_column, gaussian_weight, repeated, without_oldest
from .._engine.strips import Row, load_columns, row_limit, source_row, widened, zeros


class Similarity(NamedTuple):
    """What is compared, and how; known when a kernel is compiled."""

    from_logits: bool  # x = sigmoid(logits) against one-hot labels; else two images
    full: bool  # luminance and contrast-structure (Eq. 7); else contrast-structure alone (Eq. 9)
    c1: float
    c2: float
    ignored: int  # the ignore label if it is one of the classes, else -1
    crowded: bool  # all values of 8-bit labels are classes
    exchanged: bool  # a lane evaluates its own pixels only, and leaves them to its neighbours
    careful: bool  # moments in two levels, for small constants; else plain sums about a pivot


class Pair(NamedTuple):
    """The two maps that are compared; a run-time value, like the tuples below."""

    x: Any  # a plane
    y: Any  # a plane: of labels, or of the other image
    classes: Any
    height: Any
    width: Any
    window: Any  # its size, for loops that are not to be unrolled
    exchange_ptr: Any  # where a program's lanes leave their pixels
    pivot_x: Any  # what plain sums of x are taken about
    pivot_d: Any  # and those of d
    share: Any  # of 2 y in what is filtered as d: x - y if it is 0.5, x if it is 0
    ones: Any  # the sum of a window that is 1 everywhere, to the last bit
    one: Any  # its inverse


class Values(NamedTuple):
    """What was loaded of a row, a tensor [lanes] per column; x and y are 0 where not valid."""

    x: Any
    y: Any
    d: Any  # x - y
    rest: Any  # 1 - x of the loss, to all its digits
    valid: Any


class RowMoments(NamedTuple):
    """Moments along a row, a tensor per column; or what is kept of the rows before.

    What is kept of them is the row means of SIZE - 1 rows, and the unfinished vertical sums of the
    spreads.
    """

    mean_x: Any
    mean_d: Any
    both: Any  # variance of x + variance of y
    residual: Any  # variance of d


class PairMoments(NamedTuple):
    """Moments of whole windows, a tensor per column."""

    mean_x: Any
    mean_y: Any
    twice_y: Any  # 2 mean_y
    mean_d: Any
    both: Any  # variance of x + variance of y
    residual: Any  # variance of d


@triton.jit
def source_of(i, pair, program, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Where row i of the strip comes from."""
    PADDING: tl.constexpr = WINDOW.padding
    number = source_row(program.first_row + tl.cast(i + SHIFT, tl.int32), pair.height, PADDING)
    limit = row_limit(number, pair.height, pair.width)
    if PADDING == "zeros" or PADDING == "valid":
        number = program.first_row + (i + SHIFT)  # as wide as the loop counts
    return Row(number=number, chunk=program.chunk, limit=limit)


@triton.jit
def load_pair(
    pair, row, channel, SIMILARITY: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The Values of COUNT columns per lane, from SHIFT columns after each chunk's first."""
    IGNORED: tl.constexpr = SIMILARITY.ignored
    first, inside = load_columns(pair.x, row, STRIP, SHIFT, COUNT, PADDING)
    second, _ = load_columns(pair.y, row, STRIP, SHIFT, COUNT, PADDING)
    xs = ()
    ys = ()
    residuals = ()
    rests = ()
    valids = ()
    for j in tl.static_range(COUNT):
        x = widened(first[j])
        rest = x
        if SIMILARITY.from_logits:
            label = sanitised_label(second[j], inside[j], pair.classes, IGNORED)
            valid = label >= 0
            # Selected, not multiplied: an infinite logit under an ignored pixel does no harm.
            sigmoid, rest = sigmoids_base2(x * LOG2_E)
            x = tl.where(valid, sigmoid, 0.0)
            y = tl.where(label == channel, 1.0, 0.0).to(x.dtype)
        else:
            valid = inside[j]
            y = widened(second[j])
        xs = xs + (x,)
        ys = ys + (y,)
        residuals = residuals + (x - y,)
        rests = rests + (rest,)
        valids = valids + (valid,)
    return Values(x=xs, y=ys, d=residuals, rest=rests, valid=valids)


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
    """The moments along a row, of the windows of COLUMNS columns."""
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
    return RowMoments(mean_x=mean_x, mean_d=mean_d, both=both, residual=residual)


@triton.jit
def _streamed_moments_of_pair(
    pair, row, channel, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr
):
    """_row_moments_of_pair for one column per lane, tap by tap; row.chunk is the centre."""
    PADDING: tl.constexpr = WINDOW.padding
    middle = load_pair(pair, row, channel, SIMILARITY, STRIP, 0, 1, PADDING)
    x = middle.x[0]
    d = middle.d[0]
    first_x = tl.zeros_like(x)
    first_d = tl.zeros_like(x)
    second_both = tl.zeros_like(x)
    second_d = tl.zeros_like(x)
    for distance in tl.range(1, pair.window // 2 + 1):
        weight = gaussian_weight(distance, x.dtype, WINDOW)
        for side in tl.static_range(-1, 2, 2):
            column = row.chunk + side * distance
            tap = Row(number=row.number, chunk=column, limit=row.limit)
            neighbour = load_pair(pair, tap, channel, SIMILARITY, STRIP, 0, 1, PADDING)
            step_x = neighbour.x[0] - x
            step_d = neighbour.d[0] - d
            step_y = step_x - step_d
            first_x += step_x * weight
            first_d += step_d * weight
            second_both += (step_x * step_x + step_y * step_y) * weight
            second_d += step_d * step_d * weight
    first_y = first_x - first_d
    both = second_both - (first_x * first_x + first_y * first_y)
    return RowMoments(
        mean_x=(x + first_x,),
        mean_d=(d + first_d,),
        both=(both,),
        residual=(second_d - first_d * first_d,),
    )


@triton.jit
def empty_history(pair, WINDOW: tl.constexpr, STRIP: tl.constexpr):
    """What a strip carries before its first row."""
    ROWS: tl.constexpr = (WINDOW.size - 1) * STRIP.columns
    rows = repeated(zeros(pair.x, STRIP), ROWS)
    return RowMoments(mean_x=rows, mean_d=rows, both=rows, residual=rows)


@triton.jit
def next_moments(
    i, history, pair, program, SIMILARITY: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Take in row i of the strip: (moments of the windows that it completes, history)."""
    SIZE: tl.constexpr = WINDOW.size
    WEIGHTS: tl.constexpr = WINDOW.weights
    PADDING: tl.constexpr = WINDOW.padding
    COLUMNS: tl.constexpr = STRIP.columns
    RADIUS: tl.constexpr = WINDOW.size // 2

    # moments along the row
    row = source_of(i, pair, program, WINDOW, SHIFT)
    if COLUMNS == 1:
        middle = program.chunk + (SHIFT + RADIUS)
        centre = Row(number=row.number, chunk=middle, limit=row.limit)
        along = _streamed_moments_of_pair(pair, centre, program.channel, SIMILARITY, WINDOW, STRIP)
    else:
        values = load_pair(
            pair, row, program.channel, SIMILARITY, STRIP, SHIFT, COLUMNS + SIZE - 1, PADDING
        )
        along = _row_moments_of_pair(values.x, values.d, WEIGHTS, SIZE, COLUMNS)

    # moments of the windows that the row completes
    both, sums_both = filtered_column(history.both, along.both, WEIGHTS, SIZE, COLUMNS)
    residual, sums_d = filtered_column(history.residual, along.residual, WEIGHTS, SIZE, COLUMNS)
    means_x = history.mean_x + along.mean_x
    means_d = history.mean_d + along.mean_d
    mean_x = ()
    mean_y = ()
    twice_y = ()
    mean_d = ()
    variance_both = ()
    variance_d = ()
    for v in tl.static_range(COLUMNS):
        shift_x, shift_d, spread, spread_d = _moments_about(
            means_x, means_d, v, COLUMNS, WEIGHTS, SIZE
        )
        mean_x = mean_x + (means_x[RADIUS * COLUMNS + v] + shift_x,)
        mean_d = mean_d + (means_d[RADIUS * COLUMNS + v] + shift_d,)
        mean_y = mean_y + (mean_x[v] - mean_d[v],)
        twice_y = twice_y + (2.0 * mean_y[v],)
        variance_both = variance_both + (both[v] + spread,)
        variance_d = variance_d + (residual[v] + spread_d,)
    moments = PairMoments(
        mean_x=mean_x,
        mean_y=mean_y,
        twice_y=twice_y,
        mean_d=mean_d,
        both=variance_both,
        residual=variance_d,
    )
    history = RowMoments(
        mean_x=without_oldest(means_x, SIZE, COLUMNS),
        mean_d=without_oldest(means_d, SIZE, COLUMNS),
        both=sums_both,
        residual=sums_d,
    )
    return moments, history


@triton.jit
def dissimilarity(moments, v: tl.constexpr, SIMILARITY: tl.constexpr, SQUARE: tl.constexpr):
    """1 - SSIM in column v, or 1 - S_2, of probabilities and labels; one division instead of two.

    With D = m_x^2 + m_y^2 + C1 and E = s_x + s_y + C2 it is (m_d^2 E + s_d (D - m_d^2)) / (D E),
    and D - m_d^2 = 2 m_x m_y + C1.
    """
    C1: tl.constexpr = SIMILARITY.c1
    C2: tl.constexpr = SIMILARITY.c2 * SQUARE
    structure = moments.both[v] + C2
    if SIMILARITY.full:
        squared = moments.mean_d[v] * moments.mean_d[v]
        twice_product = moments.mean_x[v] * moments.twice_y[v] + C1
        numerator = squared * structure + moments.residual[v] * twice_product
        result = numerator * inverse((squared + twice_product) * structure)
    else:
        result = moments.residual[v] * inverse(structure)
    return result


class Dissimilarities(NamedTuple):
    """The dissimilarities of the windows in one column, and their inverse divisors."""

    luminance: Any  # u = 1 - S_1
    similar: Any  # 1 - u, which is next to 0 where one map's mean is: not a difference
    structure: Any  # v = 1 - S_2
    inverse_d: Any  # 1 / (m_x^2 + m_y^2 + C1)
    inverse_e: Any  # 1 / (s_x + s_y + C2)


@triton.jit
def dissimilarities(moments, v: tl.constexpr, SIMILARITY: tl.constexpr, SQUARE: tl.constexpr):
    """The Dissimilarities of column v: 1 - S_1, 1 - S_2 and their inverse divisors (Eq. 6)."""
    C1: tl.constexpr = SIMILARITY.c1
    C2: tl.constexpr = SIMILARITY.c2 * SQUARE
    squared = moments.mean_d[v] * moments.mean_d[v]
    twice_product = moments.mean_x[v] * moments.twice_y[v] + C1
    inverse_d = inverse(squared + twice_product)
    inverse_e = inverse(moments.both[v] + C2)
    return Dissimilarities(
        luminance=squared * inverse_d,
        similar=twice_product * inverse_d,
        structure=moments.residual[v] * inverse_e,
        inverse_d=inverse_d,
        inverse_e=inverse_e,
    )
