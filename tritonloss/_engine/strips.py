"""Strips: how the window kernels walk over an image, and how they are launched.

A program owns a strip of an image: a number of lanes, each with a chunk of neighbouring columns, a
number of rows high. It walks down the rows and keeps what the rows above contribute in registers,
so that each value is loaded once per strip (neighbouring columns come from the cache), with no
shared memory and no barrier. Tuples hold one tensor [lanes] per column of a chunk; histories hold
several rows of them, oldest first.

The variance never is E[x^2] - E[x]^2, which loses all its digits on flat maps. It is built in two
levels from deviations that are exactly zero there:

    row level:     d_j = x[r, c+j] - x[r, c]            h = sum_j w_j d_j
                   row_mean = x[r, c] + h               row_variance = sum_j w_j d_j^2 - h^2
    column level:  D_i = row_mean[r+i] - row_mean[r]    s = sum_i w_i D_i
                   mean = row_mean + s      variance = sum_i w_i (row_variance[r+i] + D_i^2) - s^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels_reference.gaussian_window import gaussian_window

from .._core.backend import warp_size
from .._core.configurations import Configuration, launch_configuration
from .math import plus

PADDINGS = ("zeros", "reflect", "replicate", "valid")

# Kernel arguments that a kernel is compiled for once, whatever their value.
SIZES = (
    "channels", "first_channel", "classes", "height", "width", "out_height", "out_width", "tiles_x",
    "tiles_y", "window", "programs", "coefficient_stride",
)  # fmt: skip


class Strip(NamedTuple):
    """How a map is cut into programs; known when a kernel is compiled."""

    columns: int  # of one lane's chunk: 1, 2 or 4
    lanes: int
    rows: int
    unroll: int
    grain: (
        int  # columns, if every row is made of whole aligned chunks that can be moved at once; or 1
    )
    channels_in_lanes: bool  # channels_last: lanes run over (chunk, channel), not over chunks


class Window(NamedTuple):
    """A Gaussian window; known when a kernel is compiled."""

    size: int
    weights: tuple[float, ...]
    exponent: float  # the weight at distance d is the centre's times 2^(exponent d^2)
    padding: str


# --- device functions: where a program is ---------------------------------------------------------


@triton.jit
def strip_program(channels, tiles_x, tiles_y, STRIP: tl.constexpr):
    """(image, channel, chunk, first_column, first_row): what this program and its lanes work on.

    In a channels_last map neighbouring addresses are channels, so there the lanes run over them and
    one program serves all; otherwise a program has one channel, and channels follow each other, so
    that the labels they share stay in the cache.
    """
    LANES: tl.constexpr = STRIP.lanes
    ROWS: tl.constexpr = STRIP.rows
    program = tl.program_id(0)
    tile = program if STRIP.channels_in_lanes else program // channels
    tile_x = tile % tiles_x
    tile_y = tile // tiles_x % tiles_y
    image = (tile // tiles_x // tiles_y).to(tl.int64)
    lane = tile_x * LANES + tl.arange(0, LANES)
    if STRIP.channels_in_lanes:
        channel = lane % channels
        chunk = lane // channels
    else:
        channel = program % channels
        chunk = lane
    return image, channel, chunk, tile_x * (LANES * STRIP.columns), tile_y * ROWS


@triton.jit
def plane_of(pointer, strides, image, channel, STRIP: tl.constexpr):
    """(pointer, row stride, column stride) of one channel; strides count in grains but the last."""
    GRAIN: tl.constexpr = STRIP.grain
    offset = image * strides[0] + channel.to(tl.int64) * strides[1]
    return pointer + offset * GRAIN, strides[2], strides[3]


@triton.jit
def label_plane_of(pointer, strides, image, STRIP: tl.constexpr):
    """plane_of for label maps [N, H, W]."""
    GRAIN: tl.constexpr = STRIP.grain
    return pointer + image * strides[0] * GRAIN, strides[1], strides[2]


@triton.jit
def row_of(plane, row, STRIP: tl.constexpr):
    """Pointer to a row of a plane."""
    GRAIN: tl.constexpr = STRIP.grain
    return plane[0] + row.to(tl.int64) * plane[1] * GRAIN


@triton.jit
def source_row(row, height, PADDING: tl.constexpr):
    """The image row that stands at ``row`` of the padded image; outside [0, height) for zeros."""
    if PADDING == "reflect":
        row = tl.abs(row)
        row = height - 1 - tl.abs(height - 1 - row)
    elif PADDING == "replicate":
        row = tl.minimum(tl.maximum(row, 0), height - 1)
    return row


@triton.jit
def row_limit(row, height, width):
    """Number of columns that exist in ``row``: the scalar that masks a whole row."""
    return tl.where((row >= 0) & (row < height), width, 0)


@triton.jit
def source_column(column, limit, PADDING: tl.constexpr):
    """(source, exists): the image column that stands at ``column`` of the padded image."""
    if PADDING == "reflect":
        column = tl.abs(column)
        column = tl.minimum(column, 2 * (limit - 1) - column)
    elif PADDING == "replicate":
        column = tl.minimum(tl.maximum(column, 0), limit - 1)
    return column.to(tl.int64), (column >= 0) & (column < limit)


# --- device functions: loads and stores -----------------------------------------------------------


@triton.jit
def split_columns(block, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """[LANES, COLUMNS] -> tuple of COLUMNS tensors [LANES]; free, since a lane owns its columns."""
    if COLUMNS == 2:
        first, second = tl.split(block)
        columns = (first, second)
    else:
        even, odd = tl.split(tl.reshape(block, (LANES, 2, 2)))
        column_0, column_2 = tl.split(even)
        column_1, column_3 = tl.split(odd)
        columns = (column_0, column_1, column_2, column_3)
    return columns


@triton.jit
def join_columns(columns, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of split_columns."""
    if COLUMNS == 2:
        block = tl.join(columns[0], columns[1])
    else:
        even = tl.join(columns[0], columns[2])
        odd = tl.join(columns[1], columns[3])
        block = tl.reshape(tl.join(even, odd), (LANES, COLUMNS))
    return block


@triton.jit
def load_columns(
    plane, row, chunk, limit, STRIP: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """(values, inside): COUNT columns of one row from SHIFT columns after each chunk's first.

    ``inside`` tells which of them exist; the others are loaded as 0. Chunks are loaded whole, one
    wide instruction each, where the strip's grain says so; else every column on its own.
    """
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    row_ptr = row_of(plane, row, STRIP)
    values = ()
    inside = ()
    if STRIP.grain > 1:
        FIRST: tl.constexpr = SHIFT // COLUMNS
        SKIP: tl.constexpr = SHIFT - FIRST * COLUMNS
        CHUNKS: tl.constexpr = (SKIP + COUNT + COLUMNS - 1) // COLUMNS
        for j in tl.static_range(CHUNKS):
            start = (chunk + (FIRST + j)) * COLUMNS
            exists = (start >= 0) & (start < limit)
            offsets = start[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
            mask = tl.broadcast_to(exists[:, None], (LANES, COLUMNS))
            block = tl.load(row_ptr + offsets, mask=mask, other=0)
            loaded = split_columns(block, LANES, COLUMNS)
            for v in tl.static_range(COLUMNS):
                if j * COLUMNS + v >= SKIP and j * COLUMNS + v < SKIP + COUNT:
                    values = values + (loaded[v],)
                    inside = inside + (exists,)
    else:
        for j in tl.static_range(COUNT):
            source, exists = source_column(chunk * COLUMNS + (SHIFT + j), limit, PADDING)
            values = values + (tl.load(row_ptr + source * plane[2], mask=exists, other=0),)
            inside = inside + (exists,)
    return values, inside


@triton.jit
def load_values(
    plane, row, chunk, limit, dtype: tl.constexpr, STRIP: tl.constexpr, SHIFT: tl.constexpr,
    COUNT: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """load_columns in the dtype of the arithmetic; half precision never is computed with."""
    loaded, inside = load_columns(plane, row, chunk, limit, STRIP, SHIFT, COUNT, PADDING)
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (loaded[j].to(dtype),)
    return values


@triton.jit
def load_column(
    plane, row, column, limit, dtype: tl.constexpr, STRIP: tl.constexpr, PADDING: tl.constexpr
):
    """One column per lane, in the dtype of the arithmetic."""
    source, exists = source_column(column, limit, PADDING)
    value = tl.load(row_of(plane, row, STRIP) + source * plane[2], mask=exists, other=0)
    return value.to(dtype)


@triton.jit
def store_columns(plane, row, chunk, limit, columns, STRIP: tl.constexpr):
    """Store a tuple of columns as the chunk's own."""
    LANES: tl.constexpr = STRIP.lanes
    COLUMNS: tl.constexpr = STRIP.columns
    row_ptr = row_of(plane, row, STRIP)
    if STRIP.grain > 1:
        start = chunk * COLUMNS
        offsets = start[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
        mask = tl.broadcast_to((start < limit)[:, None], (LANES, COLUMNS))
        tl.store(row_ptr + offsets, join_columns(columns, LANES, COLUMNS), mask=mask)
    else:
        for v in tl.static_range(COLUMNS):
            column = chunk * COLUMNS + v
            tl.store(row_ptr + column.to(tl.int64) * plane[2], columns[v], mask=column < limit)


# --- device functions: window arithmetic ----------------------------------------------------------


@triton.jit
def repeated(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the same tensor: how a loop-carried history starts."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (value,)
    return result


@triton.jit
def without_oldest(history, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A history of LENGTH rows without its first."""
    result = ()
    for slot in tl.static_range(COLUMNS, LENGTH * COLUMNS):
        result = result + (history[slot],)
    return result


@triton.jit
def filtered_row(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """Weighted sums along a row."""
    result = ()
    for v in tl.static_range(COLUMNS):
        total = values[v] * WEIGHTS[0]
        for j in tl.static_range(1, WINDOW):
            total = plus(total, values[v + j], WEIGHTS[j])
        result = result + (total,)
    return result


@triton.jit
def filtered_column(
    partials, row, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """(finished, partials): the vertical weighted sum as a transposed filter, one FMA per tap.

    partials: (WINDOW - 1) * COLUMNS unfinished sums, the next to be finished first.
    """
    finished = ()
    unfinished = ()
    if WINDOW == 1:
        finished = row
    else:
        for v in tl.static_range(COLUMNS):
            finished = finished + (plus(partials[v], row[v], WEIGHTS[WINDOW - 1]),)
        for j in tl.static_range(WINDOW - 2):
            for v in tl.static_range(COLUMNS):
                before = partials[(j + 1) * COLUMNS + v]
                unfinished = unfinished + (plus(before, row[v], WEIGHTS[WINDOW - 2 - j]),)
        for v in tl.static_range(COLUMNS):
            unfinished = unfinished + (row[v] * WEIGHTS[0],)
    return finished, unfinished


@triton.jit
def row_moments(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """(row_mean, row_variance) about each row's centre value.

    A difference of two neighbours serves two windows: as one's right tap and as the other's left.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    firsts = ()
    seconds = ()
    for v in tl.static_range(COLUMNS):
        firsts = firsts + (tl.zeros_like(values[v]),)
        seconds = seconds + (tl.zeros_like(values[v]),)
    for distance in tl.static_range(1, RADIUS + 1):
        differences = ()
        squares = ()
        for j in tl.static_range(RADIUS - distance, RADIUS + COLUMNS):
            difference = values[j + distance] - values[j]
            differences = differences + (difference,)
            squares = squares + (difference * difference,)
        first_sums = ()
        second_sums = ()
        for v in tl.static_range(COLUMNS):
            first = differences[v + distance] - differences[v]
            second = squares[v + distance] + squares[v]
            first_sums = first_sums + (plus(firsts[v], first, WEIGHTS[RADIUS - distance]),)
            second_sums = second_sums + (plus(seconds[v], second, WEIGHTS[RADIUS - distance]),)
        firsts = first_sums
        seconds = second_sums
    row_mean = ()
    row_variance = ()
    for v in tl.static_range(COLUMNS):
        row_mean = row_mean + (values[v + RADIUS] + firsts[v],)
        row_variance = row_variance + (seconds[v] - firsts[v] * firsts[v],)
    return row_mean, row_variance


@triton.jit
def gaussian_weight(distance, dtype: tl.constexpr, WINDOW: tl.constexpr):
    """The 1-D weight at a distance that is only known at run time; 0 beyond the window."""
    WEIGHTS: tl.constexpr = WINDOW.weights
    EXPONENT: tl.constexpr = WINDOW.exponent
    RADIUS: tl.constexpr = WINDOW.size // 2
    squared = tl.full((), 0.0, dtype) + distance * distance
    return tl.where(squared <= RADIUS * RADIUS, tl.exp2(squared * EXPONENT) * WEIGHTS[RADIUS], 0.0)


@triton.jit
def folded_weight(position, tap, size, weight, tail, dtype: tl.constexpr, WINDOW: tl.constexpr):
    """Weight with which the window centred ``tap`` places after ``position`` sees that position.

    With reflect and replicate padding a window sees some pixels several times: at their own place,
    with ``weight``, and as their images outside. ``tail`` sums the weights from |tap| outwards.
    """
    folded = weight + tl.zeros_like(position).to(dtype)
    if WINDOW.padding == "reflect":
        before = gaussian_weight(2 * position + tap, dtype, WINDOW)
        after = gaussian_weight(2 * (size - 1 - position) - tap, dtype, WINDOW)
        folded += tl.where(position > 0, before, 0.0) + tl.where(position < size - 1, after, 0.0)
    elif WINDOW.padding == "replicate":
        beyond = (tl.zeros_like(position).to(dtype) + tail) - weight
        folded += tl.where(position == 0, beyond, 0.0) + tl.where(position == size - 1, beyond, 0.0)
    return folded


@triton.jit
def streamed_row_moments(
    plane, row, first_column, limit, window, dtype: tl.constexpr, WINDOW: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """row_moments for one column per lane, tap by tap: wide windows do not fit the registers.

    window is the window's size at run time, so that the compiler does not unroll the loop after
    all.
    """
    PADDING: tl.constexpr = WINDOW.padding
    middle = first_column + WINDOW.size // 2
    centre = load_column(plane, row, middle, limit, dtype, STRIP, PADDING)
    first = tl.zeros_like(centre)
    second = tl.zeros_like(centre)
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WINDOW)
        left = load_column(plane, row, middle - distance, limit, dtype, STRIP, PADDING)
        right = load_column(plane, row, middle + distance, limit, dtype, STRIP, PADDING)
        left -= centre
        right -= centre
        first += (left + right) * weight
        second += (left * left + right * right) * weight
    return (centre + first,), (second - first * first,)


@triton.jit
def column_moments(
    row_mean, row_variance, means, variances, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(centre, shift, variance, means, variances) of the window whose last row this is.

    means holds the row means of the WINDOW - 1 rows before, variances the unfinished vertical sums
    of the row variances. The window's mean is centre + shift; centre is the middle row's mean.

    No clamp is needed: by Cauchy-Schwarz sum w D^2 - (sum w D)^2 is at least the centre's weight
    (1 / WINDOW or more) times sum w D^2, far above its rounding error.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    summed, variances = filtered_column(variances, row_variance, WEIGHTS, WINDOW, COLUMNS)
    centres = ()
    shifts = ()
    result = ()
    for v in tl.static_range(COLUMNS):
        if WINDOW == 1:
            centre = row_mean[v]
            first = centre - centre  # 0, and NaN where the pixel is not finite
            second = tl.zeros_like(centre)
        else:
            centre = means[RADIUS * COLUMNS + v]
            upper = means[v] - centre
            lower = row_mean[v] - centre
            first = (upper + lower) * WEIGHTS[0]
            second = (upper * upper + lower * lower) * WEIGHTS[0]
            for i in tl.static_range(1, RADIUS):
                upper = means[i * COLUMNS + v] - centre
                lower = means[(WINDOW - 1 - i) * COLUMNS + v] - centre
                first = plus(first, upper + lower, WEIGHTS[i])
                second = plus(second, upper * upper + lower * lower, WEIGHTS[i])
        centres = centres + (centre,)
        shifts = shifts + (first,)
        result = result + (summed[v] + (second - first * first),)
    means = without_oldest(means + row_mean, WINDOW, COLUMNS)
    return centres, shifts, result, means, variances


# --- launch geometry ------------------------------------------------------------------------------


def window_of(size: int, sigma: float, padding: str) -> Window:
    """The compile-time description of a Gaussian window."""
    exponent = -0.5 / (sigma * sigma * math.log(2.0))  # exp(-d^2 / (2 sigma^2)) = 2^(exponent d^2)
    return Window(size, gaussian_window(size, sigma), exponent, padding)


def channels_in_lanes(x: torch.Tensor) -> bool:
    """Whether neighbouring addresses are channels (channels_last), so that lanes should be too."""
    return x.size(1) > 1 and 0 < x.stride(1) < x.stride(3)


def strip_heuristic(columns: int, **extra: int | str) -> Configuration:
    """A configuration that is always valid; ``columns`` and ``extra`` are the operator's choice."""
    warps = 4
    return {
        "COLUMNS": columns,
        "LANES": warps * warp_size(),
        "ROWS": 64,
        "UNROLL": 1,
        "num_warps": warps,
        **extra,
    }


def strip_configuration(
    operator: str, x: torch.Tensor, window_size: int, heuristic: Configuration
) -> Configuration:
    """The launch configuration of a strip kernel for maps like x."""
    layout = "contiguous" if x.stride(-1) == 1 else "strided"
    return launch_configuration(
        operator,
        device=x.device,
        dtype=x.dtype,
        classes=x.size(1),
        window=window_size,
        layout="channels_last" if channels_in_lanes(x) else layout,
        heuristic=heuristic,
    )


def strip_candidates(heuristic: Configuration, **choices: Sequence[str]) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries."""
    columns, rows = int(heuristic["COLUMNS"]), int(heuristic["ROWS"])
    lanes, warps = int(heuristic["LANES"]), int(heuristic["num_warps"])
    changes: list[Configuration] = [{"COLUMNS": other} for other in (1, 2, 4) if other != columns]
    changes += [{"ROWS": rows // 2}, {"ROWS": rows * 2}]
    changes += [{"LANES": lanes // 2, "num_warps": warps // 2}]
    changes += [{"LANES": lanes * 2, "num_warps": warps * 2}]
    changes += [{"UNROLL": 3 - int(heuristic["UNROLL"])}]
    changes += [{name: value} for name, values in choices.items() for value in values]
    candidates = [heuristic]
    candidates += [{**heuristic, **change} for change in changes]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def strip_launch(
    shape: torch.Size, configuration: Configuration, padding: str, *maps: torch.Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, arguments) of a kernel that covers maps of ``shape`` [N, C, H, W] with strips.

    ``maps`` are all the tensors it moves, the one that decides on channels_last first.
    """
    images, channels, height, width = shape
    columns, rows = int(configuration["COLUMNS"]), int(configuration["ROWS"])
    lanes, warps = int(configuration["LANES"]), int(configuration["num_warps"])
    in_lanes = channels_in_lanes(maps[0])
    needed = triton.cdiv(width, columns) * (channels if in_lanes else 1)
    while warps > 1 and lanes // 2 >= needed:  # a small map would leave whole warps idle
        lanes, warps = lanes // 2, warps // 2

    # Mirrored columns come one by one, and make the code long enough as it is.
    mirrored = padding in ("reflect", "replicate")
    grain = 1 if mirrored else _grain(columns, *maps)
    unroll = 1 if mirrored else int(configuration["UNROLL"])
    tiles_x, tiles_y = triton.cdiv(needed, lanes), triton.cdiv(height, rows)
    return (images * tiles_x * tiles_y * (1 if in_lanes else channels),), {
        "channels": channels,
        "tiles_x": tiles_x,
        "tiles_y": tiles_y,
        "STRIP": Strip(columns, lanes, rows, unroll, grain, in_lanes),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def strides(tensor: torch.Tensor, strip: Strip) -> tuple[int, ...]:
    """The tensor's strides as the kernels take them: all but the last in units of the grain."""
    return (*(stride // strip.grain for stride in tensor.stride()[:-1]), tensor.stride(-1))


def ignored_class(ignore_index: int | None, classes: int, dtype: torch.dtype) -> int:
    """What the kernels call IGNORED: see `sanitised_label`.

    The ignore label if it would otherwise be a class, else -1: the range check does the rest. With
    one class, whose labels are 0 and 1, -3 less that, so that a kernel can tell.
    """
    labels = 2 if classes == 1 else classes
    ignored = -1
    if ignore_index is not None and 0 <= ignore_index < min(labels, torch.iinfo(dtype).max + 1):
        ignored = ignore_index
    return -3 - ignored if classes == 1 else ignored


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grain(columns: int, *maps: torch.Tensor) -> int:
    """``columns`` if every row of every map is made of whole aligned chunks, else 1."""
    for tensor in maps:
        if tensor.stride(-1) != 1 or tensor.size(-1) % columns:
            return 1
        if any(stride % columns for stride in tensor.stride()[:-1]):
            return 1
    return columns
