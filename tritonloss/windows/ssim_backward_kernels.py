"""The backward pass of SSIM in one launch: maps of coefficients, and the window's adjoint of them.

The maps of all planes at once would take three times the memory of float32 logits. A launch for
every few planes would leave the GPU idle between launches. So the maps live in a ring of a few
units (a unit is a plane, or in channels_last some channels of an image), and one launch goes
through a list:

    step s: all tiles of the coefficients of unit s, then all of the gradients of unit s - lag

A program takes the next tile of the list when it starts. What it may have to wait for has then been
taken before: the gradients of a unit wait for its coefficients, and coefficients for the gradients
of the unit whose place in the ring they take. A program that has started keeps its processor until
it ends, so that the first tile that is not done never waits. A counter is raised, with release,
after a barrier behind the stores, and read, with acquire, before a barrier in front of the loads:
that orders what all threads of both programs do. The last program to end has seen all others do
their last count, and sets the counters to 0. Each tile's work is its own, so that the bits do not
depend on the order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._engine.strip_windows import filtered_column, repeated
from .._engine.strips import (
    SIZES,
    Program,
    Row,
    counted,
    load_values,
    plane_of,
    row_limit,
    store_columns,
    zeros,
)
from .ssim_adjoint import adjoint_rows, folded_column
from .ssim_kernels import Maps, pair_of
from .ssim_moments import dissimilarities, load_pair
from .ssim_sums import advanced, begun
from .ssim_values import exchange_of, slopes_of, valid_columns

_SIZES = (
    *SIZES, "unit_channels", "units_of_image", "units", "ring", "lag", "out_tiles_x", "out_tiles",
    "tiles", "out_rows", "rows",
)  # fmt: skip
# A chunk beyond the end of every row; its columns are still counted in 32 bits.
_BEYOND = tl.constexpr(2**28)
_BLOCK = tl.constexpr(256)  # counters that are put back at a time


class Pass(NamedTuple):
    """What a backward pass is given and returns; known when the kernel is compiled."""

    mapped: bool  # whether the upstream gradient is that of the map; else that of the mean
    both: bool  # whether y has a gradient as well


class Upstream(NamedTuple):
    """The upstream gradient, and its map's size; a run-time value, like the tuples below."""

    value: Any  # of the mean, times its scale; and what all gradients are multiplied with
    plane: Any  # of the map
    height: Any
    width: Any
    rows: Any  # of a program


class Gradients(NamedTuple):
    """The planes of the gradients to store, and the size of the coefficient maps."""

    x: Any
    y: Any
    out_height: Any
    out_width: Any
    rows: Any


class Units(NamedTuple):
    """How the planes are cut into units, and units into tiles."""

    channels: Any  # of a unit
    of_image: Any  # units
    classes: Any
    rows: Any  # of a program
    tiles_x: Any


# --- the list of tiles ----------------------------------------------------------------------------


@triton.jit
def _wait_for(counter_ptr, count):
    """Wait until the counter is at ``count``: all that was stored before it was is then seen."""
    seen = tl.zeros_like(count)
    while seen < count:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _count_one(counter_ptr):
    """Count this program, once all of its threads have stored.

    On NVIDIA's GPUs what all threads did before a barrier is released by any of them after it. On
    AMD's a release waits for the stores of its own wave alone, and then writes back what the cache
    holds. A barrier waits for no store there, since the waves of a program share the cache nearest
    to them: another wave's stores may be on their way while the count is raised already. So there a
    program has one wave (see the launcher), and the release has waited for everything.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _put_back(progress_ptr, units, programs):
    """Set all counters to 0 for the next launch, if this is the last program to end."""
    if tl.atomic_add(progress_ptr + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
        lane = tl.arange(0, _BLOCK)
        for first in tl.range(0, 2 * units + 2, _BLOCK):
            counter = first + lane
            tl.store(progress_ptr + counter, 0, mask=counter < 2 * units + 2)


@triton.jit
def _programs_of(unit, tile, place, units, STRIP: tl.constexpr):
    """(program, the same in the coefficient maps, whose images are the places of the ring)."""
    LANES: tl.constexpr = STRIP.lanes
    tile_x = tile % units.tiles_x
    first_row = tile // units.tiles_x * units.rows
    first_column = tile_x * (LANES * STRIP.columns)
    lane = tile_x * LANES + tl.arange(0, LANES)
    first_channel = unit % units.of_image * units.channels
    if STRIP.channels_in_lanes:
        own = lane % units.channels
        exists = first_channel + own < units.classes  # an image's last unit may have fewer
        chunk = tl.where(exists, lane // units.channels, _BEYOND)
        channel = tl.minimum(first_channel + own, units.classes - 1)
    else:
        own = unit - unit  # 0
        chunk = lane
        channel = first_channel
    image = (unit // units.of_image).to(tl.int64)
    program = Program(
        image=image, channel=channel, chunk=chunk, first_column=first_column, first_row=first_row
    )
    in_ring = Program(
        image=place.to(tl.int64), channel=own, chunk=chunk, first_column=first_column,
        first_row=first_row,
    )  # fmt: skip
    return program, in_ring


@triton.jit
def _value_of(grad_ptr, scale_ptr, FACTOR: tl.constexpr, dtype: tl.constexpr, PASS: tl.constexpr):
    """FACTOR times the gradient of each pixel's dissimilarity; alone, if that is not the same."""
    value = tl.full((), FACTOR, dtype)
    if not PASS.mapped:
        value = value * (tl.load(grad_ptr).to(dtype) * tl.load(scale_ptr))
    return value


# --- coefficients ---------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """Coefficients of the gradients, which the window's adjoint sums up; or their planes.

    With the dissimilarity = u + v - u v per pixel, its gradient to x_j is
    sum_i w_ij (a_i + 2 b_i (x_j - mean_x_i) + 2 c_i (d_j - mean_d_i)), where b = dv / d(variance_x
    + variance_y) and c = dv / d variance_d.
    """

    constant_x: Any  # a - 2 b mean_x - 2 c mean_d
    slope_both: Any  # 2 b
    slope_d: Any  # 2 c
    constant_y: Any  # for the gradient to y: a' - 2 b mean_y + 2 c mean_d


@triton.jit
def _coefficient_planes(pointer, strides, stride, program, STRIP: tl.constexpr):
    """The planes of all coefficient maps; ``stride`` is from map to map, in grains."""
    GRAIN: tl.constexpr = STRIP.grain
    step = stride.to(tl.int64) * GRAIN
    return Coefficients(
        constant_x=plane_of(pointer, strides, program, STRIP),
        slope_both=plane_of(pointer + step, strides, program, STRIP),
        slope_d=plane_of(pointer + 2 * step, strides, program, STRIP),
        constant_y=plane_of(pointer + 3 * step, strides, program, STRIP),
    )


@triton.jit
def _coefficients_of(
    moments, v: tl.constexpr, scale, SIMILARITY: tl.constexpr, SQUARE: tl.constexpr
):  # fmt: skip
    """The coefficients of the windows in column v; scale is the gradient of a dissimilarity."""
    C1: tl.constexpr = SIMILARITY.c1
    mean_x = moments.mean_x[v]
    mean_y = moments.mean_y[v]
    mean_d = moments.mean_d[v]
    found = dissimilarities(moments, v, SIMILARITY, SQUARE)
    to_structure = (2.0 * SQUARE) * scale * found.inverse_e
    if SIMILARITY.full:
        to_structure = to_structure * found.similar
        to_luminance = 2.0 * scale * found.inverse_d * (1.0 - found.structure)
        # m_d - u m_x loses its digits where m_y is 0: it is m_d (m_y (m_x + m_y) + C1) / D.
        to_means = to_luminance * (mean_d * found.inverse_d)
        direct_x = to_means * (mean_y * (mean_x + mean_y) + C1)
        direct_y = -to_means * (mean_x * (mean_x + mean_y) + C1)
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


@triton.jit
def _store_coefficients(
    pair, program, planes, upstream, PASS: tl.constexpr, SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Store the coefficients of a tile, from moments that are computed anew."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    UNROLL: tl.constexpr = STRIP.unroll
    SHIFT: tl.constexpr = 0 if WINDOW.padding == "valid" else -(WINDOW.size // 2)
    SQUARE: tl.constexpr = 1.0 if SIMILARITY.careful else WINDOW.unit * WINDOW.unit
    pair, history = begun(pair, program, upstream.rows, SIMILARITY, WINDOW, STRIP, SHIFT)
    rows = tl.minimum(upstream.rows, upstream.height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, counted(rows, STRIP), UNROLL):
        for j in tl.static_range(UNROLL):
            moments, history = advanced(
                i + j, history, pair, program, SIMILARITY, WINDOW, STRIP, SHIFT
            )
            number = i + j - (SIZE - 1)
            height = upstream.height - program.first_row
            limit = row_limit(tl.cast(number, tl.int32), height, upstream.width)
            number += program.first_row
            row = Row(number=number, chunk=program.chunk, limit=limit)
            if SIMILARITY.from_logits:
                valid = valid_columns(pair, row, SIMILARITY, STRIP)
            if PASS.mapped:
                grad = load_values(upstream.plane, row, STRIP, 0, COLUMNS, "zeros")
            maps_x = ()
            maps_both = ()
            maps_d = ()
            maps_y = ()
            for v in tl.static_range(COLUMNS):
                scale = grad[v] * upstream.value if PASS.mapped else upstream.value
                if SIMILARITY.from_logits:
                    scale = tl.where(valid[v], scale, 0.0)
                else:
                    scale = -scale  # the upstream gradient is that of the similarity
                found = _coefficients_of(moments, v, scale, SIMILARITY, SQUARE)
                maps_x = maps_x + (found.constant_x,)
                maps_both = maps_both + (found.slope_both,)
                maps_d = maps_d + (found.slope_d,)
                maps_y = maps_y + (found.constant_y,)
            store_columns(planes.constant_x, row, maps_x, STRIP)
            store_columns(planes.slope_both, row, maps_both, STRIP)
            store_columns(planes.slope_d, row, maps_d, STRIP)
            if PASS.both:
                store_columns(planes.constant_y, row, maps_y, STRIP)


# --- the window's adjoint -------------------------------------------------------------------------


@triton.jit
def _store_gradients(
    pair, program, planes, gradients, PASS: tl.constexpr, SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradients: the adjoint sums, each times its factor at the pixel."""
    SIZE: tl.constexpr = WINDOW.size
    COLUMNS: tl.constexpr = STRIP.columns
    WEIGHTS: tl.constexpr = WINDOW.down if COLUMNS > 1 else WINDOW.weights
    UNROLL: tl.constexpr = STRIP.unroll
    SHIFT: tl.constexpr = -(WINDOW.size - 1) if WINDOW.padding == "valid" else -(WINDOW.size // 2)
    MAPS: tl.constexpr = 4 if PASS.both else 3
    dtype: tl.constexpr = planes[0].pointer.dtype.element_ty
    none_yet = repeated(zeros(planes[0], STRIP), (SIZE - 1) * COLUMNS)
    history = repeated(none_yet, MAPS)
    rows = tl.minimum(gradients.rows, pair.height - program.first_row) + (SIZE - 1)
    for i in tl.range(0, counted(rows, STRIP), UNROLL):
        for j in tl.static_range(UNROLL):
            # the adjoint, map by map
            number = program.first_row + (i + j + SHIFT)
            limit = row_limit(tl.cast(number, tl.int32), gradients.out_height, gradients.out_width)
            row = Row(number=number, chunk=program.chunk, limit=limit)
            row_sums = adjoint_rows(
                planes, row, pair.width, pair.window, WINDOW, SHIFT, STRIP, MAPS
            )
            number = program.first_row + (i + j - (SIZE - 1))
            in_strip = tl.cast(i + j - (SIZE - 1), tl.int32)
            sums = ()
            unfinished = ()
            for m in tl.static_range(MAPS):
                if WINDOW.padding == "reflect":
                    finished, partials = folded_column(
                        history[m], row_sums[m], program.first_row + in_strip, pair.height, dtype,
                        WINDOW, COLUMNS,
                    )  # fmt: skip
                else:
                    finished, partials = filtered_column(
                        history[m], row_sums[m], WEIGHTS, SIZE, COLUMNS
                    )
                sums = sums + (finished,)
                unfinished = unfinished + (partials,)
            history = unfinished

            # the sums times their factors at the pixel
            limit = row_limit(in_strip, pair.height - program.first_row, pair.width)
            out_row = Row(number=number, chunk=program.chunk, limit=limit)
            if SIMILARITY.from_logits and not SIMILARITY.careful:
                values = slopes_of(pair, out_row, program.channel, SIMILARITY, STRIP)
            else:
                values = load_pair(
                    pair, out_row, program.channel, SIMILARITY, STRIP, 0, COLUMNS, "zeros"
                )
            found = Coefficients(
                constant_x=sums[0], slope_both=sums[1], slope_d=sums[2], constant_y=sums[MAPS - 1]
            )
            gradient_x = ()
            gradient_y = ()
            for v in tl.static_range(COLUMNS):
                x = values.x[v]
                # The first two nearly cancel.
                residual_part = found.slope_d[v] * values.d[v]
                gradient = (found.constant_x[v] + residual_part) + found.slope_both[v] * x
                if SIMILARITY.from_logits:
                    slope = values.rest[v]
                    if SIMILARITY.careful:
                        slope = x * slope
                    gradient = tl.where(values.valid[v], gradient * slope, 0.0)
                gradient_x = gradient_x + (gradient,)
                if PASS.both:
                    slope = found.slope_both[v]
                    gradient = (found.constant_y[v] - residual_part) + slope * values.y[v]
                    gradient_y = gradient_y + (gradient,)
            store_columns(gradients.x, out_row, gradient_x, STRIP)
            if PASS.both:
                store_columns(gradients.y, out_row, gradient_y, STRIP)


@triton.jit(do_not_specialize=_SIZES)
def _ssim_backward_kernel(
    grad_ptr,  # []: of the mean; or [N, C, out_height, out_width]: of the map, if PASS.mapped
    scale_ptr,  # []: 1 / count
    x_ptr,  # [N, C, H, W]
    y_ptr,  # [N, H, W] or [N, C, H, W]
    coefficients_ptr,  # [3 or 4, ring, channels of a unit, out_height, out_width]
    grad_x_ptr,  # [N, C, H, W]
    grad_y_ptr,  # like y, if PASS.both
    exchange_ptr,  # see ssim_values.py
    progress_ptr,  # int32, all 0: tiles taken, programs ended; tiles done of each unit, by kind
    grad_strides,
    x_strides,
    y_strides,
    coefficient_strides,  # of one map
    coefficient_stride,  # from map to map, in grains
    grad_x_strides,
    grad_y_strides,
    classes,
    unit_channels,
    units_of_image,
    units,
    ring,  # units that the coefficient maps hold
    lag,  # of gradients behind coefficients, in units
    programs,
    height,
    width,
    out_height,
    out_width,
    out_rows,
    rows,
    out_tiles_x,
    out_tiles,
    tiles_x,
    tiles,
    window,
    SIMILARITY: tl.constexpr,
    WINDOW: tl.constexpr,
    OUT_STRIP: tl.constexpr,  # of the coefficients
    STRIP: tl.constexpr,  # of the gradients
    PASS: tl.constexpr,
):
    """Works on a tile of coefficients or of gradients, whichever comes next in the list."""
    dtype: tl.constexpr = coefficients_ptr.dtype.element_ty
    # Adjoint sums are in units of the window, unless a lane has one column.
    UNIT: tl.constexpr = WINDOW.unit if dtype == tl.float64 else WINDOW.rounded
    FACTOR: tl.constexpr = 1.0 / UNIT if STRIP.columns > 1 else 1.0
    ticket = tl.atomic_add(progress_ptr, 1, sem="relaxed", scope="gpu")
    step = ticket // (out_tiles + tiles)
    tile = ticket % (out_tiles + tiles)
    stored_ptr = progress_ptr + 2  # tiles of coefficients of unit u at 2 u, of gradients after it
    is_first = tile < out_tiles  # of coefficients
    unit = tl.where(is_first, step, step - lag)
    if (unit >= 0) & (unit < units):
        # Gradients wait for their coefficients, and those for the unit whose place they take.
        earlier = tl.where(is_first, 2 * tl.maximum(unit - ring, 0) + 1, 2 * unit)
        awaited = tl.where(is_first, tl.where(unit >= ring, tiles, 0), out_tiles)
        _wait_for(stored_ptr + earlier, awaited)

        # the tile's planes; lanes and grain are those of both strips
        tile = tl.where(is_first, tile, tile - out_tiles)
        cut = Units(
            unit_channels, units_of_image, classes, tl.where(is_first, out_rows, rows),
            tl.where(is_first, out_tiles_x, tiles_x),
        )  # fmt: skip
        program, in_ring = _programs_of(unit, tile, unit % ring, cut, OUT_STRIP)
        maps = Maps(
            x=x_ptr, y=y_ptr, x_strides=x_strides, y_strides=y_strides, classes=classes,
            height=height, width=width, window=window,
        )  # fmt: skip
        exchange = exchange_of(exchange_ptr, unit % ring * out_tiles + tile, OUT_STRIP)
        pair = pair_of(maps, program, exchange, SIMILARITY, OUT_STRIP)
        planes = _coefficient_planes(
            coefficients_ptr, coefficient_strides, coefficient_stride, in_ring, OUT_STRIP
        )
        if is_first:
            upstream = Upstream(
                rows=out_rows,
                value=_value_of(grad_ptr, scale_ptr, FACTOR, dtype, PASS),
                plane=plane_of(grad_ptr, grad_strides, program, OUT_STRIP),
                height=out_height,
                width=out_width,
            )
            _store_coefficients(
                pair, program, planes, upstream, PASS, SIMILARITY, WINDOW, OUT_STRIP
            )
            _count_one(stored_ptr + 2 * unit)
        else:
            gradients = Gradients(
                rows=rows,
                x=plane_of(grad_x_ptr, grad_x_strides, program, STRIP),
                y=plane_of(grad_y_ptr, grad_y_strides, program, STRIP),
                out_height=out_height,
                out_width=out_width,
            )
            _store_gradients(pair, program, planes, gradients, PASS, SIMILARITY, WINDOW, STRIP)
            _count_one(stored_ptr + 2 * unit + 1)
    _put_back(progress_ptr, units, programs)
