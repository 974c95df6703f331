"""The launchers of the Lovász losses of interpolated logits.

With bins nothing at the labels' resolution has classes. Where every class is sorted there are such
maps anyway: the logits are interpolated then, and the gradient at the labels' resolution goes back
to the nodes by the adjoint of the interpolation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from .._core.backend import registers
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.cell_grid import axes_of, cell_heuristic, over_cells, over_strips, pointers_of
from .._engine.cell_kernels import _upsampled_backward_kernel
from .._engine.pixel_terms import Loss, Term, Walk, terms_of
from .._engine.pixels import Record, no_lookups
from .._engine.planes import compute_dtype
from .lovasz_cell_kernels import (
    _cell_hinge_histogram_kernel,
    _cell_histogram_kernel,
    _cell_project_kernel,
    _cell_statistics_kernel,
    hinge_factors,
    hinge_slope,
    map_factors,
    map_slope,
    softmax_factors,
    softmax_is_silent,
    softmax_slope,
)
from .lovasz_terms import (
    FEW_BINS,
    HINGE,
    SOFTMAX,
    Counts,
    Options,
    Results,
    bins_of,
    is_quick,
)

# Programs of a histogram, if they have 8 warps, that a large GPU has work for, and the most tiles
# that one goes through.
_PROGRAMS = 1056
_MOST_ROUNDS = 16
# Of a pass for statistics: pixels of a lane at once, and classes in one block.
_SUMMED = (8, 4)
# As many as that needs. With fewer ptxas spills, and with all of them fewer programs fit.
_REGISTERS = 80
# Of a look-up for every pixel and class: pixels of a lane at once, and classes in one block.
_PROJECTED = (4, 2)
_LOOKED_UP = (4, 3)

_start, _add = SOFTMAX.record.start, SOFTMAX.record.add


def _saves_two(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return (compute_dtype(logits.dtype),) * 2


def _saves_one(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return (compute_dtype(logits.dtype),)


_SOFTMAX = SOFTMAX._replace(
    record=Record(
        _start, _add, _add, softmax_factors, softmax_slope, no_lookups, silent=softmax_is_silent
    ),
    saved=_saves_two,
)
_HINGE = HINGE._replace(record=Record(_start, _add, _add, hinge_factors, hinge_slope, no_lookups))
_ADJOINT = Loss(
    "interpolation_adjoint",
    Record(_start, _add, _add, map_factors, map_slope, no_lookups),
    saved=_saves_one,
    binary=True,
)
_OF_CELLS = {SOFTMAX.name: _SOFTMAX, HINGE.name: _HINGE}


def walk_of(options: Options) -> Walk:
    """The walk over cells."""
    return Walk(options.ignore_index, "mean", options.upsample, options.align_corners)


# --- forward --------------------------------------------------------------------------------------


def count_over_cells(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    results: Results,
    counts: Counts,
    options: Options,
) -> None:
    """Write the log-sum-exp of every pixel, and count the errors in every bin of every class."""
    key = kind(logits), kind(target), options, counts.of_groups.dtype
    axes = pointers_of(axes_of(logits, target, options.align_corners))
    tensors: dict[str, Any] = {"logits_ptr": logits, "histogram_ptr": counts.histogram}
    if loss.binary:
        tensors["target_ptr"] = target
    else:
        statistics = prepared(
            ("lovasz_cell_statistics", *key), lambda: _prepare_statistics(logits, target, options)
        )
        assert results.log_sum is not None
        tensors["log_sum_ptr"] = results.log_sum
        statistics(**tensors, target_ptr=target, counts_ptr=counts.of_groups, **axes)
    histogram = prepared(
        ("lovasz_cell_histogram", loss.name, *key),
        lambda: _prepare_histogram(loss, logits, target, options),
    )
    histogram(**tensors, **axes)


def _prepare_statistics(
    logits: torch.Tensor, target: torch.Tensor, options: Options
) -> PreparedLaunch:
    walk = walk_of(options)
    axes = axes_of(logits, target, options.align_corners)
    pixels, unroll = _SUMMED
    heuristic: Configuration = {
        **_at_once(pixels, axes[1].most),
        "UNROLL": unroll,
        "num_warps": 4,
    }
    programs, arguments = over_cells([SOFTMAX], logits, target, walk, axes, heuristic)
    arguments["TILE"] = arguments["TILE"]._replace(scaled=False)
    constants = {
        **arguments,
        **({} if arguments["TILE"].double else registers(_REGISTERS)),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "programs": programs // logits.size(0),
        "TERMS": terms_of((Term(SOFTMAX, ()),), logits, walk, save=False),
        "PER_IMAGE": options.per_image,
        "BINS": bins_of(SOFTMAX, options),
    }
    return PreparedLaunch(_cell_statistics_kernel, (programs,), constants, False)


def histogram_heuristic(loss: Loss, most: int, bins: int) -> Configuration:
    """Pixels of a lane at once, so many that what a histogram takes once is shared.

    Where a histogram takes registers for its bins there is one class. Of cells with few pixels
    there are more, and of a hinge, whose histogram has twice the bins.
    """
    pixels, classes = 16, 1 if loss.binary else 4
    if not is_quick():
        classes, pixels = 1, 16 if bins <= FEW_BINS else 4
    at_once = _at_once(pixels, most)
    few = 4 * int(at_once["PIXEL_ROWS"]) * int(at_once["PIXEL_COLUMNS"]) <= pixels
    many = is_quick() and (few or loss.binary)
    return {**at_once, "UNROLL": classes, "num_warps": 16 if many else 8}


def _at_once(pixels: int, most: int) -> Configuration:
    """So many pixels of a lane, of cells with up to ``most`` columns."""
    columns = min(triton.next_power_of_2(most), pixels)
    rows = min(pixels // columns, triton.next_power_of_2(most))
    return {"PIXEL_COLUMNS": columns, "PIXEL_ROWS": rows}


def _prepare_histogram(
    loss: Loss, logits: torch.Tensor, target: torch.Tensor, options: Options
) -> PreparedLaunch:
    axes = axes_of(logits, target, options.align_corners)
    bins = bins_of(loss, options)
    heuristic = histogram_heuristic(loss, axes[1].most, bins.count)
    all_tiles, arguments = over_cells([loss], logits, target, walk_of(options), axes, heuristic)
    del arguments["full"]
    images = logits.size(0)
    tile, tiles = arguments["TILE"], all_tiles // images
    class_groups = triton.cdiv(logits.size(1), tile.unroll)
    work = all_tiles * class_groups * arguments["num_warps"] // 8
    rounds = min(max(work // _PROGRAMS, 1), _MOST_ROUNDS, tiles)
    chunks = triton.cdiv(tiles, rounds)
    constants = {
        **arguments,
        "TILE": tile._replace(scaled=not loss.binary),  # powers of 2
        "logits_strides": logits.stride(),
        "tiles": tiles,
        "chunks": chunks,
        "rounds": rounds,
        "PER_IMAGE": options.per_image,
        "BINS": bins,
    }
    kernel: Any = _cell_histogram_kernel
    if loss.binary:
        kernel, constants["target_strides"] = _cell_hinge_histogram_kernel, target.stride()
        constants |= registers(min(2048 // arguments["num_warps"], 255))
    return PreparedLaunch(kernel, (images * chunks * class_groups,), constants, False)


# --- backward -------------------------------------------------------------------------------------


def launch_backward_over_cells(
    loss: Loss,
    grad_loss: torch.Tensor,
    results: Results,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """The gradient of interpolated logits, of bins."""
    grad_logits = torch.empty_like(logits)
    assert results.table is not None
    project, launch = prepared(
        ("lovasz_cell_gradient", loss.name, kind(logits), kind(target), options),
        lambda: _prepare_backward(loss, logits, target, grad_logits, options),
    )
    axes = pointers_of(axes_of(logits, target, options.align_corners))
    maps: tuple[Any, ...] = ()
    if project is not None:
        assert results.log_sum is not None
        projection = torch.empty_like(results.log_sum)
        project(
            logits_ptr=logits,
            target_ptr=target,
            log_sum_ptr=results.log_sum,
            table_ptr=results.table,
            projection_ptr=projection,
            **axes,
        )
        maps = (results.log_sum, projection)
    launch(
        upstream_ptr=grad_loss,
        scale_ptr=results.scale,
        weights_ptr=results.scale,
        logits_ptr=logits,
        target_ptr=target,
        own_ptrs=(results.table,),
        other_ptrs=(results.table,),
        map_ptrs=maps,
        grad_ptr=grad_logits,
        **axes,
    )
    return grad_logits


def _prepare_backward(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    options: Options,
) -> tuple[PreparedLaunch | None, PreparedLaunch]:
    """(the launch that projects, if there is something to project, that of the gradient)."""
    loss, bins, walk = _OF_CELLS[loss.name], bins_of(loss, options), walk_of(options)
    axes = axes_of(logits, target, options.align_corners)
    terms = terms_of((Term(loss, bins),), logits, walk, save=True)
    stride = 4 * bins.count * logits.size(1) if options.per_image else 0
    project = None
    if not loss.binary:
        pixels, unroll = _PROJECTED
        heuristic: Configuration = {
            **_at_once(pixels, axes[1].most),
            "UNROLL": unroll,
            "num_warps": 4,
        }
        programs, arguments = over_cells([loss], logits, target, walk, axes, heuristic)
        constants = {
            **arguments,
            "logits_strides": logits.stride(),
            "target_strides": target.stride(),
            "table_stride": stride,
            "programs": programs // logits.size(0),
            "TERMS": terms,
        }
        project = PreparedLaunch(_cell_project_kernel, (programs,), constants, False)
    heuristic = cell_heuristic([loss], "backward", axes[1].most)
    columns, unroll = _LOOKED_UP
    heuristic["PIXEL_COLUMNS"] = min(int(heuristic["PIXEL_COLUMNS"]), columns)
    heuristic["UNROLL"] = min(int(heuristic["UNROLL"]), unroll)
    walked = logits, target, grad_logits
    return project, _of_nodes(loss, walked, walk, heuristic, terms, stride)


def _of_nodes(
    loss: Loss,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    walk: Walk,
    heuristic: Configuration,
    terms: Any,
    table_stride: int,
) -> PreparedLaunch:
    """The launch that goes back into nodes; ``tensors`` are logits, labels and gradient."""
    logits, target, grad_logits = tensors
    axes = axes_of(logits, target, walk.align_corners)
    programs, arguments = over_strips([loss], logits, target, walk, axes, heuristic)
    constants = {
        **arguments,
        "TERMS": terms,
        "numbers": ((),),
        "weight_places": (0,),
        "WEIGHTED": False,
        "upstream_strides": (0, 0, 0),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "grad_strides": grad_logits.stride(),
        "table_strides": (table_stride,),
    }
    return PreparedLaunch(_upsampled_backward_kernel, (programs,), constants, False)


# --- maps of classes ------------------------------------------------------------------------------


def interpolated(logits: torch.Tensor, target: torch.Tensor, options: Options) -> torch.Tensor:
    """The logits at the labels' resolution, in memory."""
    return torch.nn.functional.interpolate(
        logits.to(compute_dtype(logits.dtype)),
        size=target.shape[1:],
        mode="bilinear",
        align_corners=options.align_corners,
    ).contiguous()


def into_nodes(
    gradient: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, options: Options
) -> torch.Tensor:
    """The gradient of the logits, from that of the interpolated ones: sums in a fixed order."""
    grad_logits = torch.empty_like(logits)
    nodes = torch.empty_like(logits, memory_format=torch.contiguous_format).flatten(0, 1)[:, None]
    maps = gradient.flatten(0, 1)
    # Every pixel of every class is one of a binary mask.
    labels = target.new_zeros(()).expand(maps.shape)
    walk = Walk(None, "mean", options.upsample, options.align_corners)

    def prepare() -> PreparedLaunch:
        axes = axes_of(nodes, labels, walk.align_corners)
        heuristic = cell_heuristic([_ADJOINT], "backward", axes[1].most)
        terms = terms_of((Term(_ADJOINT, ()),), nodes, walk, save=True)
        return _of_nodes(_ADJOINT, (nodes, labels, nodes), walk, heuristic, terms, 0)

    launch = prepared(("interpolation_adjoint", kind(nodes), kind(labels), walk), prepare)
    one = maps.new_ones(1)
    launch(
        upstream_ptr=one,
        scale_ptr=one,
        weights_ptr=one,
        logits_ptr=nodes,
        target_ptr=labels,
        own_ptrs=(one,),
        other_ptrs=(one,),
        map_ptrs=(maps,),
        grad_ptr=nodes,
        **pointers_of(axes_of(nodes, labels, walk.align_corners)),
    )
    return grad_logits.copy_(nodes.view(logits.shape))
