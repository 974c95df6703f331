"""Strips: how the window kernels walk over an image, and how they are launched.

A program owns a strip of an image: LANES lanes of COLUMNS neighbouring columns each, ROWS rows high. It
walks down the rows and keeps what the K - 1 rows above contribute in registers, so that each value is
loaded once per strip (neighbouring columns come from the cache), with no shared memory and no barrier.
Tuples hold one tensor [LANES] per column of a lane; histories hold several rows of them, oldest first.

The variance never is E[x^2] - E[x]^2, which loses all its digits on flat maps. It is built in two levels
from deviations that are exactly zero there:

    row level:     d_j = x[r, c+j] - x[r, c]          h = sum_j w_j d_j
                   row_mean = x[r, c] + h             row_variance = sum_j w_j d_j^2 - h^2
    column level:  D_i = row_mean[r+i] - row_mean[r]  s = sum_i w_i D_i
                   mean = row_mean + s                variance = sum_i w_i (row_variance[r+i] + D_i^2) - s^2
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._backend import warp_size
from ._tuning import Configuration, launch_configuration

PADDINGS = ("zeros", "reflect", "replicate", "valid")

# --- device functions -------------------------------------------------------------------------------


@triton.jit
def strip_program(
    channels,
    tiles_x,
    tiles_y,
    CHANNELS_IN_LANES: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(image, channel, chunk, first_lane, first_row): what this program and each of its lanes work on.

    A chunk is COLUMNS neighbouring columns. In a channels_last map neighbouring addresses are channels,
    so there the lanes run over (chunk, channel) and one program serves all channels; otherwise a program
    has one channel, and channels follow each other so that the labels they share stay in the cache.
    """
    program = tl.program_id(0)
    if CHANNELS_IN_LANES:
        tile = program
    else:
        tile = program // channels
    tile_x = tile % tiles_x
    tile_y = tile // tiles_x % tiles_y
    image = (tile // tiles_x // tiles_y).to(tl.int64)
    lane = tile_x * LANES + tl.arange(0, LANES)
    if CHANNELS_IN_LANES:
        channel = (lane % channels).to(tl.int64)
        chunk = lane // channels
    else:
        channel = (program % channels).to(tl.int64)
        chunk = lane
    return image, channel, chunk, tile_x * LANES, tile_y * ROWS


@triton.jit
def source_row(row, height, PADDING: tl.constexpr):
    """The image row that stands at ``row`` once the image is padded; outside [0, height) for zeros."""
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
def split_columns(block, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """[LANES, COLUMNS] -> tuple of COLUMNS tensors [LANES]; free, since a lane owns its columns."""
    if COLUMNS == 1:
        columns = (tl.reshape(block, (LANES,)),)
    elif COLUMNS == 2:
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
    if COLUMNS == 1:
        block = tl.reshape(columns[0], (LANES, 1))
    elif COLUMNS == 2:
        block = tl.join(columns[0], columns[1])
    else:
        even = tl.join(columns[0], columns[2])
        odd = tl.join(columns[1], columns[3])
        block = tl.reshape(tl.join(even, odd), (LANES, 4))
    return block


@triton.jit
def padded_column(column, limit, PADDING: tl.constexpr):
    """(source, exists): the image column that stands at ``column`` once the image is padded."""
    if PADDING == "reflect":
        column = tl.abs(column)
        column = tl.minimum(column, 2 * (limit - 1) - column)
    elif PADDING == "replicate":
        column = tl.minimum(tl.maximum(column, 0), limit - 1)
    return column.to(tl.int64), (column >= 0) & (column < limit)


@triton.jit
def load_column(row_ptr, column, limit, column_stride, dtype: tl.constexpr, PADDING: tl.constexpr):
    """One column per lane of a padded row, in the dtype of the arithmetic."""
    source, exists = padded_column(column, limit, PADDING)
    return tl.load(row_ptr + source * column_stride, mask=exists, other=0).to(dtype)


@triton.jit
def load_columns(
    row_ptr,
    chunk,
    limit,
    column_stride,
    SHIFT: tl.constexpr,
    COUNT: tl.constexpr,
    PADDING: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORISED: tl.constexpr,
):
    """(values, inside): columns chunk * COLUMNS + SHIFT + 0 .. COUNT - 1 of one row, as tuples.

    ``inside`` tells which of them exist; the others are loaded as 0. VECTORISED loads whole aligned
    chunks, one wide instruction each, and needs zero padding; otherwise every column is a load of its own.
    """
    values = ()
    inside = ()
    if VECTORISED:
        FIRST: tl.constexpr = SHIFT // COLUMNS
        SKIP: tl.constexpr = SHIFT - FIRST * COLUMNS
        CHUNKS: tl.constexpr = (SKIP + COUNT + COLUMNS - 1) // COLUMNS
        for j in tl.static_range(CHUNKS):
            start = (chunk + (FIRST + j)) * COLUMNS
            exists = (start >= 0) & (start < limit)
            offsets = start[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
            mask = tl.broadcast_to(exists[:, None], (LANES, COLUMNS))
            loaded = split_columns(tl.load(row_ptr + offsets, mask=mask, other=0), LANES, COLUMNS)
            for v in tl.static_range(COLUMNS):
                if j * COLUMNS + v >= SKIP and j * COLUMNS + v < SKIP + COUNT:
                    values = values + (loaded[v],)
                    inside = inside + (exists,)
    else:
        for j in tl.static_range(COUNT):
            source, exists = padded_column(chunk * COLUMNS + (SHIFT + j), limit, PADDING)
            loaded_column = tl.load(row_ptr + source * column_stride, mask=exists, other=0)
            values = values + (loaded_column,)
            inside = inside + (exists,)
    return values, inside


@triton.jit
def store_columns(
    row_ptr,
    chunk,
    limit,
    column_stride,
    columns,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORISED: tl.constexpr,
):
    """Store a tuple of COLUMNS tensors at the lane's own columns."""
    if VECTORISED:
        start = chunk * COLUMNS
        offsets = start[:, None] + tl.arange(0, COLUMNS)[None, :]  # [LANES, COLUMNS]
        mask = tl.broadcast_to((start < limit)[:, None], (LANES, COLUMNS))
        tl.store(row_ptr + offsets, join_columns(columns, LANES, COLUMNS), mask=mask)
    else:
        for v in tl.static_range(COLUMNS):
            column = chunk * COLUMNS + v
            tl.store(row_ptr + column.to(tl.int64) * column_stride, columns[v], mask=column < limit)


@triton.jit
def repeated(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the same tensor: how a loop-carried history starts."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (value,)
    return result


@triton.jit
def without_oldest(history, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """``history`` holds LENGTH rows of COLUMNS tensors, oldest first; the same without its first row."""
    result = ()
    for slot in tl.static_range(COLUMNS, LENGTH * COLUMNS):
        result = result + (history[slot],)
    return result


@triton.jit
def converted(values, dtype: tl.constexpr, COUNT: tl.constexpr):
    """The tuple in the dtype of the arithmetic; half precision never is computed with."""
    result = ()
    for j in tl.static_range(COUNT):
        result = result + (values[j].to(dtype),)
    return result


@triton.jit
def filtered_row(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """Weighted sums along a row."""
    result = ()
    for v in tl.static_range(COLUMNS):
        total = values[v] * WEIGHTS[0]
        for j in tl.static_range(1, WINDOW):
            total += values[v + j] * WEIGHTS[j]
        result = result + (total,)
    return result


@triton.jit
def filtered_column(
    partials, row, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """(finished, partials): the vertical weighted sum as a transposed filter.

    partials: (WINDOW - 1) * COLUMNS unfinished sums, the next to be finished first. One FMA per tap.
    """
    finished = ()
    unfinished = ()
    if WINDOW == 1:
        finished = row
    else:
        for v in tl.static_range(COLUMNS):
            finished = finished + (partials[v] + row[v] * WEIGHTS[WINDOW - 1],)
        for j in tl.static_range(WINDOW - 2):
            for v in tl.static_range(COLUMNS):
                tap = row[v] * WEIGHTS[WINDOW - 2 - j]
                unfinished = unfinished + (partials[(j + 1) * COLUMNS + v] + tap,)
        for v in tl.static_range(COLUMNS):
            unfinished = unfinished + (row[v] * WEIGHTS[0],)
    return finished, unfinished


@triton.jit
def row_moments(values, WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """(row_mean, row_variance) about each row's centre value.

    A difference of two neighbours serves two windows: as the one's right tap and the other's left.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    mean = ()
    variance = ()
    for v in tl.static_range(COLUMNS):
        first = tl.zeros_like(values[v + RADIUS])
        mean = mean + (first,)
        variance = variance + (first,)
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
            first = (differences[v + distance] - differences[v]) * WEIGHTS[RADIUS - distance]
            second = (squares[v + distance] + squares[v]) * WEIGHTS[RADIUS - distance]
            first_sums = first_sums + (first if distance == 1 else mean[v] + first,)
            second_sums = second_sums + (second if distance == 1 else variance[v] + second,)
        mean = first_sums
        variance = second_sums
    row_mean = ()
    row_variance = ()
    for v in tl.static_range(COLUMNS):
        row_mean = row_mean + (values[v + RADIUS] + mean[v],)
        row_variance = row_variance + (variance[v] - mean[v] * mean[v],)
    return row_mean, row_variance


@triton.jit
def gaussian_weight(
    distance,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """The 1-D weight 2^(EXPONENT d^2) times the centre's, at a distance known only at run time; 0 outside."""
    squared = tl.full((), 0.0, dtype) + distance * distance
    weight = tl.exp2(squared * EXPONENT) * WEIGHTS[WINDOW // 2]
    return tl.where(squared <= (WINDOW // 2) * (WINDOW // 2), weight, 0.0)


@triton.jit
def streamed_row_moments(
    row_ptr,
    chunk,
    limit,
    column_stride,
    window,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SHIFT: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
):
    """row_moments for one column per lane, tap by tap: wide windows do not fit the registers at once.

    window is WINDOW as a run-time value, so that the compiler does not unroll the loop after all.
    """
    middle = chunk + (SHIFT + WINDOW // 2)
    centre = load_column(row_ptr, middle, limit, column_stride, dtype, PADDING)
    first = tl.zeros_like(centre)
    second = tl.zeros_like(centre)
    for distance in tl.range(1, window // 2 + 1):
        weight = gaussian_weight(distance, dtype, WEIGHTS, WINDOW, EXPONENT)
        left = (
            load_column(row_ptr, middle - distance, limit, column_stride, dtype, PADDING) - centre
        )
        right = (
            load_column(row_ptr, middle + distance, limit, column_stride, dtype, PADDING) - centre
        )
        first += (left + right) * weight
        second += (left * left + right * right) * weight
    return (centre + first,), (second - first * first,)


@triton.jit
def column_moments(
    row_mean,
    row_variance,
    means,
    variances,
    WEIGHTS: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(centre, shift, variance, means, variances) of the window whose last row this is.

    means holds the row means of the WINDOW - 1 rows before, variances the unfinished vertical sums of
    the row variances. The window's mean is centre + shift, where centre is the middle row's mean.

    No clamp is needed: by Cauchy-Schwarz sum w D^2 - (sum w D)^2 is at least the centre's weight
    (1 / WINDOW or more) times sum w D^2, far above its rounding error.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    summed, variances = filtered_column(variances, row_variance, WEIGHTS, WINDOW, COLUMNS)
    centres = ()
    shifts = ()
    result = ()
    if WINDOW == 1:
        for v in tl.static_range(COLUMNS):
            centres = centres + (row_mean[v],)
            shifts = shifts + (tl.zeros_like(row_mean[v]),)
            result = result + (row_variance[v],)
    else:
        for v in tl.static_range(COLUMNS):
            centre = means[RADIUS * COLUMNS + v]
            lower = row_mean[v] - centre
            upper = means[v] - centre
            first = (upper + lower) * WEIGHTS[0]
            second = (upper * upper + lower * lower) * WEIGHTS[0]
            for i in tl.static_range(1, RADIUS):
                upper = means[i * COLUMNS + v] - centre
                lower = means[(WINDOW - 1 - i) * COLUMNS + v] - centre
                first += (upper + lower) * WEIGHTS[i]
                second += (upper * upper + lower * lower) * WEIGHTS[i]
            centres = centres + (centre,)
            shifts = shifts + (first,)
            result = result + (summed[v] + (second - first * first),)
    means = without_oldest(means + row_mean, WINDOW, COLUMNS)
    return centres, shifts, result, means, variances


def gaussian_exponent(sigma: float) -> float:
    """EXPONENT of gaussian_weight: exp(-d^2 / (2 sigma^2)) = 2^(EXPONENT d^2)."""
    return -0.5 / (sigma * sigma * math.log(2.0))


# --- launch geometry --------------------------------------------------------------------------------


def size_arguments(*tensors: str, axes: str = "nchw") -> list[str]:
    """Names of the sizes and strides of a kernel: compiled once for all their values."""
    sizes = [
        "window",
        "channels",
        "height",
        "width",
        "out_height",
        "out_width",
        "tiles_x",
        "tiles_y",
    ]
    return sizes + [f"{tensor}_stride_{axis}" for tensor in tensors for axis in axes]


def channels_in_lanes(x: torch.Tensor) -> bool:
    """Whether neighbouring addresses are channels (channels_last), so that lanes should be too."""
    return x.size(1) > 1 and 0 < x.stride(1) < x.stride(3)


def layout_name(x: torch.Tensor) -> str:
    """The layout as the launch configurations know it."""
    if channels_in_lanes(x):
        return "channels_last"
    return "contiguous" if x.stride(-1) == 1 else "strided"


def grain(columns: int, *tensors: torch.Tensor) -> int:
    """``columns`` if every row of every tensor is made of whole aligned chunks, else 1."""
    for tensor in tensors:
        if tensor.stride(-1) != 1 or tensor.size(-1) % columns:
            return 1
        if any(stride % columns for stride in tensor.stride()[:-1]):
            return 1
    return columns


def strides(name: str, tensor: torch.Tensor, unit: int, axes: str = "nchw") -> dict[str, int]:
    """Keyword arguments <name>_stride_<axis> of a kernel, all but the last in units of ``unit``."""
    values = [*(stride // unit for stride in tensor.stride()[:-1]), tensor.stride(-1)]
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def strip_grid(
    shape: torch.Size, configuration: Configuration, in_lanes: bool
) -> tuple[int, dict[str, int]]:
    """(programs, launch arguments) that cover maps of ``shape`` [N, C, H, W] with strips.

    A strip is never made much wider than the map, so that small maps do not idle whole warps.
    """
    images, channels, height, width = shape
    columns, rows = int(configuration["COLUMNS"]), int(configuration["ROWS"])
    lanes, warps = int(configuration["LANES"]), int(configuration["num_warps"])
    needed = triton.cdiv(width, columns) * (channels if in_lanes else 1)
    while warps > 1 and lanes // 2 >= needed:
        lanes, warps = lanes // 2, warps // 2
    tiles_x, tiles_y = triton.cdiv(needed, lanes), triton.cdiv(height, rows)
    programs = images * tiles_x * tiles_y * (1 if in_lanes else channels)
    return programs, {
        "channels": channels,
        "tiles_x": tiles_x,
        "tiles_y": tiles_y,
        "CHANNELS_IN_LANES": in_lanes,
        "COLUMNS": columns,
        "LANES": lanes,
        "ROWS": rows,
        "num_warps": warps,
    }


def strip_configuration(
    operator: str, x: torch.Tensor, window_size: int, columns: int, **extra: int | str
) -> Configuration:
    """The launch configuration of a strip kernel; ``columns`` is the heuristic's choice per lane."""
    warps = 4
    heuristic: Configuration = {
        "COLUMNS": columns,
        "LANES": warps * warp_size(),
        "ROWS": 64,
        "num_warps": warps,
        **extra,
    }
    return launch_configuration(
        operator,
        device=x.device,
        dtype=x.dtype,
        classes=x.size(1),
        window=window_size,
        layout=layout_name(x),
        heuristic=heuristic,
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
