"""Launchers of SSIM, which the loss on labels and the similarity of two images share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .._core.backend import architecture, device_guard, registers, warp_size
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .._engine.planes import compute_dtype
from .._engine.strip_launch import (
    channels_in_lanes,
    grain_of,
    label_strides,
    lanes_of_row,
    strides,
    strip_configuration,
    strip_heuristic,
    strip_launch,
)
from .._engine.strips import LabelStrides, Strides, Strip
from .._engine.sums import sums_over, tickets
from .ssim_backward_kernels import Pass, _ssim_backward_kernel
from .ssim_kernels import _ssim_forward_kernel
from .ssim_options import Comparison, ImageOptions, LossOptions, Options
from .ssim_values import exchanged_elements

# The bytes of the coefficient maps that exist at a time, unless a single plane has more.
SCRATCH_BYTES = 256 * 2**20
# How many programs of four warps a large GPU runs at a time, two on each of 132 processors; about
# twice as many.
AT_A_TIME = 264
ENOUGH = 500


class Results(NamedTuple):
    """What a forward pass returns."""

    result: torch.Tensor  # the mean [], or the map
    scale: torch.Tensor  # []: 1 / count of the mean; or [0] for a map


def empty_results(x: torch.Tensor, options: Options) -> Results:
    """The tensors that a forward pass fills."""
    dtype = compute_dtype(x.dtype)
    scale = torch.empty(0 if options.mapped else (), dtype=dtype, device=x.device)
    shape = _out_shape(x, options) if options.mapped else ()
    return Results(torch.empty(shape, dtype=dtype, device=x.device), scale)


def empty_gradients(
    x: torch.Tensor, y: torch.Tensor, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, gradient of y or [0]), to be filled; ``both`` asks for that of y."""
    return torch.empty_like(x), torch.empty_like(y) if both else x.new_empty(0)


# --- forward --------------------------------------------------------------------------------------


class _ForwardPlan(NamedTuple):
    """The launch of a forward pass, for maps of one kind."""

    launch: PreparedLaunch
    programs: int
    exchanged: int  # numbers that lanes leave to each other


def ssim_forward(x: torch.Tensor, y: torch.Tensor, options: Options) -> Results:
    """(loss, or similarity of images as mean or map; 1 / count, for means)."""
    results = empty_results(x, options)
    plan = prepared(
        ("ssim forward", options, kind(x), kind(y)),
        lambda: _forward_plan(x, y, results.result, options),
    )
    if plan.programs == 0:
        results.result.zero_()
        results.scale.zero_()
        if options.group is not None:
            totals = torch.zeros(2, dtype=torch.float64, device=x.device)
            _add_other_ranks(totals, options.group, results)
        return results
    sums = sums_over(plan.programs, 2, x.device)
    with device_guard(x):
        plan.launch(
            x_ptr=x,
            y_ptr=y,
            result_ptr=results.result,
            scale_ptr=results.scale,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
            exchange_ptr=torch.empty(plan.exchanged, dtype=results.scale.dtype, device=x.device),
        )
        if options.group is not None:
            _add_other_ranks(sums["scratch_ptr"][:2].clone(), options.group, results)
    return results


def _add_other_ranks(totals: torch.Tensor, group: str, results: Results) -> None:
    """Make a mean, and its scale, those of all ranks' samples; ``totals`` are this rank's sums."""
    ranks = add_over_ranks(totals, group)
    dissimilarity, samples = totals.unbind()
    scale = 1.0 / samples.clamp(min=1.0)
    results.result.copy_(dissimilarity * scale)
    results.scale.copy_(ranks * scale)


def _forward_plan(
    x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, options: Options
) -> _ForwardPlan:
    shape = _out_shape(x, options)
    configuration = _configuration("forward", x, y, options)
    moved = (x, y, result) if options.mapped else (x, y)
    (programs,), launch = strip_launch(shape, configuration, options.padding, *moved)
    strip = launch["STRIP"]
    of_a_row = programs // launch["tiles_y"]
    rows = rows_of(strip.rows, shape[2], of_a_row, _programs(ENOUGH, launch["num_warps"]))
    launch["tiles_y"] = triton.cdiv(shape[2], rows)
    programs = of_a_row * launch["tiles_y"]
    comparison = options.comparison(x, y, strip)
    arguments = {
        "x_strides": strides(x, strip),
        "y_strides": _second_strides(y, strip),
        "result_strides": strides(result if options.mapped else x, strip),
        "height": x.size(2),
        "width": x.size(3),
        "out_height": shape[2],
        "out_width": shape[3],
        "window": options.window_size,
        "rows": rows,
        "programs": programs,
        "SIMILARITY": comparison.similarity,
        "WINDOW": comparison.window,
        "SHIFT": 0 if options.padding == "valid" else -(options.window_size // 2),
        "MAPPED": options.mapped,
        **_registers("forward", x, options),
        **launch,
    }
    kernel = PreparedLaunch(_ssim_forward_kernel, (programs,), arguments, strip.grain > 1)
    return _ForwardPlan(kernel, programs, _exchanged(comparison, strip, programs))


# --- backward -------------------------------------------------------------------------------------


class _BackwardPlan(NamedTuple):
    """The launch of a backward pass, for maps of one kind."""

    launch: PreparedLaunch | None  # None for no images
    scratch: tuple[int, ...]  # maps, units, channels, height, width
    channels_last: bool  # how the scratch lies in memory
    exchanged: int
    counters: int


def ssim_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    options: Options,
    both: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of x, gradient of y or [0]); ``grad`` is that of the mean [] or of the map."""
    grad_x, grad_y = empty_gradients(x, y, both)
    plan = prepared(
        ("ssim backward", options, both, kind(grad), kind(x), kind(y)),
        lambda: _backward_plan((grad, x, y, grad_x, grad_y), options),
    )
    if plan.launch is not None:
        with device_guard(x):
            plan.launch(
                grad_ptr=grad,
                scale_ptr=scale,
                x_ptr=x,
                y_ptr=y,
                coefficients_ptr=_scratch(plan.scratch, plan.channels_last, scale.dtype, x.device),
                grad_x_ptr=grad_x,
                grad_y_ptr=grad_y,
                exchange_ptr=torch.empty(plan.exchanged, dtype=scale.dtype, device=x.device),
                progress_ptr=tickets(plan.counters, x.device),
            )
    return grad_x, grad_y


def _backward_plan(tensors: tuple[torch.Tensor, ...], options: Options) -> _BackwardPlan:
    grad, x, y, grad_x, grad_y = tensors
    kinds = Pass(mapped=grad.dim() == 4, both=grad_y.dim() == 4)
    maps, dtype = 4 if kinds.both else 3, compute_dtype(x.dtype)
    in_lanes, out_shape = channels_in_lanes(x), _out_shape(x, options)
    channels, most = _unit(x.size(1), maps * out_shape[2] * out_shape[3] * dtype.itemsize, in_lanes)
    of_image = triton.cdiv(x.size(1), channels)
    units = x.size(0) * of_image
    if x.numel() == 0:
        return _BackwardPlan(None, (), False, 0, 0)

    some = _scratch((maps, 1, channels, *out_shape[2:]), in_lanes, dtype, x.device)[0]
    moved = [x, y, some, grad_x]
    moved += [grad] if kinds.mapped else []
    moved += [grad_y] if kinds.both else []
    out, own = _tiles((out_shape, x.shape), channels, min(units, most), x, y, options, moved)
    comparison = options.comparison(x, y, out.strip)

    # The gradients of a unit follow its coefficients after so many units that those in between keep
    # the GPU busy until all of the unit's coefficients are stored.
    lag = triton.cdiv(_programs(AT_A_TIME, own.warps), out.programs + own.programs) + 1
    ring = min(most, units, 2 * lag)
    lag = ring // 2
    scratch = (maps, ring, channels, *out_shape[2:])
    one_map = _scratch((1, *scratch[1:]), in_lanes, dtype, x.device)[0]
    programs = (units + lag) * (out.programs + own.programs)
    arguments = {
        "grad_strides": strides(grad if kinds.mapped else x, own.strip),
        "x_strides": strides(x, own.strip),
        "y_strides": _second_strides(y, own.strip),
        "coefficient_strides": strides(one_map, own.strip),
        "coefficient_stride": one_map.numel() // own.strip.grain,
        "grad_x_strides": strides(grad_x, own.strip),
        "grad_y_strides": strides(grad_y if kinds.both else grad_x, own.strip),
        "classes": x.size(1),
        "unit_channels": channels,
        "units_of_image": of_image,
        "units": units,
        "ring": ring,
        "lag": lag,
        "programs": programs,
        "height": x.size(2),
        "width": x.size(3),
        "out_height": out_shape[2],
        "out_width": out_shape[3],
        "out_rows": out.rows,
        "rows": own.rows,
        "out_tiles_x": out.tiles_x,
        "out_tiles": out.programs,
        "tiles_x": own.tiles_x,
        "tiles": own.programs,
        "window": options.window_size,
        "SIMILARITY": comparison.similarity,
        "WINDOW": comparison.window,
        "OUT_STRIP": out.strip,
        "STRIP": own.strip,
        "PASS": kinds,
        "num_warps": own.warps,
        "enable_fp_fusion": True,
        **_registers("backward", x, options),
    }
    aligned = own.strip.grain > 1
    launch = PreparedLaunch(_ssim_backward_kernel, (programs,), arguments, aligned)
    exchanged = _exchanged(comparison, out.strip, ring * out.programs)
    return _BackwardPlan(launch, scratch, in_lanes, exchanged, 2 * units + 2)


def _unit(classes: int, plane: int, in_lanes: bool) -> tuple[int, int]:
    """(channels of a unit, units that the scratch holds); a unit's plane takes ``plane`` bytes.

    In channels_last lanes run over channels: a unit has many, the channels of an image in equal
    parts.
    """
    planes = max(1, SCRATCH_BYTES // max(1, plane))
    channels = 1
    if in_lanes:
        parts = triton.cdiv(classes, max(1, planes // 2))
        channels = triton.cdiv(classes, parts)
    return channels, max(1, planes // channels)


def _scratch(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Coefficient maps [maps, units, channels, H, W]; in memory [maps, units, H, W, channels]."""
    maps, units, channels, height, width = shape
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device=device)
    lying = (maps, units, height, width, channels)
    return torch.empty(lying, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)


# --- geometry -------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How the planes of a unit are cut into programs."""

    strip: Strip
    warps: int
    rows: int  # of a program
    tiles_x: int
    programs: int


def _tiles(
    shapes: tuple[torch.Size, torch.Size],
    channels: int,
    units: int,
    x: torch.Tensor,
    y: torch.Tensor,
    options: Options,
    moved: list[torch.Tensor],
) -> tuple[_Tiles, _Tiles]:
    """The tiles of the coefficients and of the gradients, maps of these shapes.

    ``units`` units of ``channels`` channels are worked on at a time; ``moved`` are all tensors that
    are loaded or stored.
    """
    configuration = _configuration("backward", x, y, options)
    most_warps = int(configuration["num_warps"])
    if warp_size() == 64:  # an AMD GPU, on which programs of one wave count right: _count_one
        lanes = int(configuration["LANES"]) // most_warps
        configuration |= {"LANES": lanes, "num_warps": 1}
    # Only the streamed row folds the images outside back in.
    folded = {"COLUMNS": 1} if options.padding == "reflect" else {}
    configurations = configuration, {**configuration, **folded}
    planes = [torch.Size((1, channels, *shape[2:])) for shape in shapes]
    fitting = [
        lanes_of_row(plane, int(configuration["COLUMNS"]), channels_in_lanes(x))
        for plane, configuration in zip(planes, configurations, strict=True)
    ]
    tiles = []
    for plane, configuration in zip(planes, configurations, strict=True):
        _, launch = strip_launch(plane, configuration, options.padding, *moved, fitting=fitting)
        strip, warps, tiles_x = launch["STRIP"], launch["num_warps"], launch["tiles_x"]
        # As many narrow programs have to be at work as fill the GPU, and the scratch holds them
        # all. It takes no more memory if they are half as high.
        rows = strip.rows // 2 if warps < most_warps else strip.rows
        rows = rows_of(rows, plane[2], tiles_x * units, _programs(AT_A_TIME, warps))
        programs = tiles_x * triton.cdiv(plane[2], rows)
        tiles.append(_Tiles(strip, warps, rows, tiles_x, programs))
    return tiles[0], tiles[1]


def _programs(count: int, warps: int) -> int:
    """How many programs of so many warps keep a GPU as busy as ``count`` of four."""
    return count * max(1, 4 // warps)


def rows_of(rows: int, height: int, others: int, wanted: int) -> int:
    """The rows of a program: about so many, shared out evenly, an even number.

    There are fewer rows where the strips times ``others`` would be fewer programs than ``wanted``.
    """
    strips = max(1, -(-(height - rows // 8) // rows))
    while strips * 16 < height and strips * others < wanted:
        strips *= 2
    return 2 * -(-height // (2 * strips))


def operator_of(direction: str, options: Options) -> str:
    """The name under which configurations of a pass are kept."""
    if options.careful:
        return f"ssim_careful_{direction}"
    # The gradients of two images take more registers than that of logits.
    of_loss = direction == "backward" and isinstance(options, LossOptions)
    return "ssim_loss_backward" if of_loss else f"ssim_{direction}"


def ssim_heuristic(
    direction: str, options: Options, aligned: bool = True, wide: bool = False
) -> Configuration:
    """A configuration that is always valid, for a pass with these options.

    ``aligned`` says whether rows are, ``wide`` whether labels have 64 bits.
    """
    window_size = options.window_size
    backward = direction == "backward"
    if not options.careful:
        # In the backward pass the scratch has to hold as many strips as run at a time.
        configuration = strip_heuristic(4, ROWS=144 if backward else 256, UNROLL=2)
        if backward and window_size > 7 and isinstance(options, ImageOptions):
            configuration["COLUMNS"] = 2  # the adjoint of four maps would not fit the registers
        if backward and window_size == 7 and isinstance(options, ImageOptions):
            configuration["UNROLL"] = 1  # with 2, ptxas takes 168 registers and spills 16 bytes
        if not backward and window_size > 7 and wide and architecture() >= 100:
            configuration["UNROLL"] = 1  # with 2, 40 bytes spill
        if backward and window_size > 7 and warp_size() == 64:
            configuration["UNROLL"] = 1  # with 2, 4 bytes spill on AMD's GPUs
        if window_size > 7 and not aligned and (wide or isinstance(options, ImageOptions)):
            configuration["COLUMNS"] = 2  # with 4, ptxas takes 255 registers and spills 24 bytes
        if backward and window_size <= 3:
            # Of rows that begin anywhere, and of labels of 64 bits, ptxas spills with more.
            configuration["UNROLL"] = 1 if wide or not aligned else 2
        if backward and window_size <= 3 and wide and aligned:
            # With four warps it takes 96 registers even so, and spills 16 bytes.
            configuration |= {"LANES": 2 * int(configuration["LANES"]), "num_warps": 8}
        if backward and window_size == 5 and isinstance(options, ImageOptions):
            configuration["UNROLL"] = 1  # with 2, ptxas takes 168 registers and spills 8 bytes
        if not backward and window_size <= 3 and options.padding == "valid":
            configuration["UNROLL"] = 1  # with 2, ptxas takes 72 registers and spills 8 bytes
        return configuration
    configuration = strip_heuristic(4 if window_size <= 5 else 2 if window_size <= 11 else 1)
    if backward and window_size > 21:
        # With four warps ptxas takes no more than 168 registers, and spills 8 bytes.
        configuration["LANES"] = 2 * int(configuration["LANES"])
        configuration["num_warps"] = 8
    return configuration


def _configuration(
    direction: str, x: torch.Tensor, y: torch.Tensor, options: Options
) -> Configuration:
    aligned, wide = grain_of(4, x, y) > 1, y.dtype == torch.int64
    heuristic = ssim_heuristic(direction, options, aligned, wide)
    return strip_configuration(operator_of(direction, options), x, options.window_size, heuristic)


def _registers(direction: str, x: torch.Tensor, options: Options) -> dict[str, int]:
    """What a launch of the loss says of registers: as many as leave room for 12 warps.

    With a window of 7 ptxas would take some more, which do not make the code any shorter but fit 8
    warps only; from sm_100 on it needs them. With one of 5, backward, it would take as few as fit
    16 warps, and spill 8 bytes.
    """
    asks = options.window_size == 7 and architecture() < 100
    asks |= options.window_size == 5 and direction == "backward"
    asks &= isinstance(options, LossOptions) and not options.careful and x.dtype != torch.float64
    return registers(168) if asks else {}


def _exchanged(comparison: Comparison, strip: Strip, programs: int) -> int:
    """How many numbers lanes leave to each other in so many programs."""
    return programs * exchanged_elements(strip) if comparison.similarity.exchanged else 0


def _second_strides(y: torch.Tensor, strip: Strip) -> Strides | LabelStrides:
    return strides(y, strip) if y.dim() == 4 else label_strides(y, strip)


def _out_shape(x: torch.Tensor, options: Options) -> torch.Size:
    lost = options.window_size - 1 if options.padding == "valid" else 0
    return torch.Size((*x.shape[:2], x.size(2) - lost, x.size(3) - lost))
