"""The launchers of sums over what is predicted as a class rightly, wrongly, or not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core import checks
from .._core.backend import device_guard
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.cell_grid import axes_of, cell_heuristic, over_cells, over_strips, pointers_of
from .._engine.cell_kernels import _upsampled_backward_kernel
from .._engine.pixel_grid import in_grains, over_pixels, rounds_of
from .._engine.pixel_terms import Loss, Term, Walk, labels_of, terms_of
from .._engine.pixel_walk import Terms
from .._engine.pixels import Record, no_lookups
from .._engine.planes import compute_dtype
from .membership import (
    Options,
    _membership_backward_kernel,
    _membership_sums_kernel,
    members_add,
    members_factors,
    members_lookups,
    members_slope,
    members_start,
)
from .membership_cells import (
    _membership_cells_kernel,
    _membership_project_kernel,
    cell_factors,
    cell_is_silent,
    cell_slope,
)

MOST_CLASSES = 1024  # whose sums a program has at once
# Of interpolated logits: pixels of a lane at once and classes in one block, going forward; columns
# of pixels and classes, going back.
_MOST_PIXELS, _UNROLL = 4, 3
_MOST_COLUMNS, _UNROLL_BACK = 2, 4

_RECORD = Record(
    members_start, members_add, members_add, members_factors, members_slope, members_lookups
)

# Of interpolated logits, whose projections are saved.
_CELL_RECORD = Record(
    members_start, members_add, members_add, cell_factors, cell_slope, no_lookups,
    silent=cell_is_silent,
)  # fmt: skip


class SumOptions(NamedTuple):
    """The options of the sums, as their operator has them."""

    score: str = "probability"
    ignore_index: int | None = checks.IGNORE_INDEX
    upsample: str | None = None
    align_corners: bool = False


class MembershipResults(NamedTuple):
    """What the operator returns."""

    sums: torch.Tensor  # [N, C, 3]
    counts: torch.Tensor  # int64 [N, C, 3]
    first: torch.Tensor | None  # maps for the backward pass, [N, H, W]
    second: torch.Tensor | None


def _saved(logits: torch.Tensor, hinge: bool) -> tuple[torch.dtype, ...]:
    """The dtypes of the maps for the backward pass."""
    if logits.size(1) == 1:
        return ()
    place = torch.uint8 if logits.size(1) <= 256 else torch.int16
    return (place,) if hinge else (compute_dtype(logits.dtype), place)


def _saved_of_hinges(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return _saved(logits, True)


def _saved_of_probabilities(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return _saved(logits, False)


# The sum of its terms is no loss: what is asked of them is to fold, and to have slopes.
PROBABILITY = Loss("membership_sums", _RECORD, saved=_saved_of_probabilities, unroll=6, binary=True)
HINGE = Loss("membership_hinge_sums", _RECORD, saved=_saved_of_hinges, unroll=6, binary=True)


def allocated(
    logits: torch.Tensor, target: torch.Tensor, options: SumOptions, save: bool
) -> MembershipResults:
    """The results, of which nothing is computed yet; maps are there if ``save``."""
    shape = (*logits.shape[:2], 3)
    dtypes = _saved(logits, options.score == "hinge") if save else ()
    maps = [logits.new_empty(target.shape, dtype=dtype) for dtype in dtypes]
    return MembershipResults(
        logits.new_empty(shape, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(shape, dtype=torch.int64),
        *maps,
        *(None,) * (2 - len(maps)),
    )


def launch_sums(
    logits: torch.Tensor, target: torch.Tensor, options: SumOptions, save: bool
) -> MembershipResults:
    """The sums and counts, and what their backward pass needs if ``save``."""
    results = allocated(logits, target, options, save)
    if target.numel() == 0:
        return results._replace(sums=results.sums.zero_(), counts=results.counts.zero_())
    walk = _walk_of(options, logits, target)
    prepare = _prepare_sums if walk.upsample is None else _prepare_sums_of_cells
    launch, rows = prepared(
        ("membership_sums", kind(logits), kind(target), options, save),
        lambda: prepare(logits, target, options, walk, save),
    )
    images, classes = logits.shape[:2]
    parts = logits.new_empty((6, rows, classes), dtype=results.sums.dtype)
    with device_guard(logits):
        launch(
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(logits, options, results.first, results.second) if save else (),
            parts_ptr=parts,
            **_axes(logits, target, walk),
        )
    # In float64 and in one order for one shape.
    joined = parts.view(6, images, -1, classes).sum(2, dtype=torch.float64).permute(1, 2, 0)
    results.sums.copy_(joined[..., :3])
    results.counts.copy_(joined[..., 3:])
    return results


def launch_sums_backward(
    grad_sums: torch.Tensor,
    maps: tuple[torch.Tensor | None, ...],
    logits: torch.Tensor,
    target: torch.Tensor,
    options: SumOptions,
) -> torch.Tensor:
    """The gradient of the logits."""
    grad_logits = torch.empty_like(logits)
    if target.numel() == 0:
        return grad_logits.zero_()
    walk, table = _walk_of(options, logits, target), grad_sums.contiguous()
    tensors: dict[str, Any] = {"logits_ptr": logits, "target_ptr": target}
    kept = _maps(logits, options, *maps)
    with device_guard(logits):
        if walk.upsample is None:
            launch = prepared(
                ("membership_backward", kind(logits), kind(target), options),
                lambda: _prepare_backward(logits, target, grad_logits, options, walk),
            )
            launch(**tensors, table_ptr=table, map_ptrs=kept, grad_ptr=grad_logits)
            return grad_logits
        project, launch = prepared(
            ("membership_backward", kind(logits), kind(target), options),
            lambda: _prepare_backward_of_cells(logits, target, grad_logits, options, walk),
        )
        axes, one = _axes(logits, target, walk), table.new_ones(1)
        if project is not None:
            log_sum, place = kept
            projection = torch.empty_like(log_sum)
            project(
                **tensors,
                log_sum_ptr=log_sum,
                place_ptr=place,
                table_ptr=table,
                projection_ptr=projection,
                **axes,
            )
            kept = (*kept, projection)
        launch(
            **tensors,
            upstream_ptr=one,
            scale_ptr=one,
            weights_ptr=one,
            own_ptrs=(table,),
            other_ptrs=(table,),
            map_ptrs=kept,
            grad_ptr=grad_logits,
            **axes,
        )
    return grad_logits


def _walk_of(options: SumOptions, logits: torch.Tensor, target: torch.Tensor) -> Walk:
    """The walk that the options ask for; to interpolate to the same size is to do nothing."""
    if options.upsample is None or logits.shape[2:] == target.shape[1:]:
        return Walk(options.ignore_index, "sum")
    return Walk(options.ignore_index, "sum", options.upsample, options.align_corners)


def _maps(logits: torch.Tensor, options: SumOptions, *maps: Any) -> tuple[Any, ...]:
    """The maps that are there: to a custom operator, one that is not is an empty tensor."""
    return maps[: len(_saved(logits, options.score == "hinge"))]


def _axes(logits: torch.Tensor, target: torch.Tensor, walk: Walk) -> dict[str, torch.Tensor]:
    """The arguments that say where pixels lie between logits; none where they lie on them."""
    if walk.upsample is None:
        return {}
    return pointers_of(axes_of(logits, target, walk.align_corners))


# --- launches -------------------------------------------------------------------------------------


def _prepare_sums(
    logits: torch.Tensor, target: torch.Tensor, options: SumOptions, walk: Walk, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, its programs)."""
    images, classes = logits.shape[:2]
    loss = _loss_of(options)
    _, arguments = over_pixels([loss], "forward", logits, target)
    tile, tiles = arguments["TILE"], arguments.pop("tiles")
    rounds = rounds_of(images * tiles)
    programs = triton.cdiv(tiles, rounds)
    rows = images * programs
    constants = {
        **arguments,
        "TERMS": _terms(logits, options, walk, save),
        **labels_of([loss], logits, target, walk.ignore_index),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "rounds": rounds,
        "programs": programs,
        "rows": rows,
        "BINS": max(triton.next_power_of_2(classes), 32),
    }
    return PreparedLaunch(_membership_sums_kernel, (rows,), constants, tile.grain > 1), rows


def _prepare_sums_of_cells(
    logits: torch.Tensor, target: torch.Tensor, options: SumOptions, walk: Walk, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch over interpolated logits, its programs)."""
    images, classes = logits.shape[:2]
    loss = _loss_of(options)
    axes = axes_of(logits, target, walk.align_corners)
    heuristic: Configuration = {**_at_once(axes[1].most), "UNROLL": _UNROLL, "num_warps": 4}
    all_tiles, arguments = over_cells([loss], logits, target, walk, axes, heuristic)
    rounds = rounds_of(all_tiles)
    programs = triton.cdiv(all_tiles // images, rounds)
    constants = {
        **arguments,
        "TERMS": _terms(logits, options, walk, save),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "tiles": all_tiles // images,
        "rounds": rounds,
        "programs": programs,
        "rows": images * programs,
        "BINS": max(triton.next_power_of_2(classes), 32),
    }
    launch = PreparedLaunch(_membership_cells_kernel, (images * programs,), constants, False)
    return launch, images * programs


def _prepare_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    options: SumOptions,
    walk: Walk,
) -> PreparedLaunch:
    loss = _loss_of(options)
    programs, arguments = over_pixels([loss], "backward", logits, target, grad_logits)
    tile = arguments["TILE"]
    constants = {
        **arguments,
        "TERMS": _terms(logits, options, walk, True),
        **labels_of([loss], logits, target, walk.ignore_index),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
    }
    return PreparedLaunch(_membership_backward_kernel, (programs,), constants, tile.grain > 1)


def _prepare_backward_of_cells(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    options: SumOptions,
    walk: Walk,
) -> tuple[PreparedLaunch | None, PreparedLaunch]:
    """(the launch that projects, if there is something to project, that of the gradient)."""
    loss = _loss_of(options)
    axes = axes_of(logits, target, walk.align_corners)
    strides = {"logits_strides": logits.stride(), "target_strides": target.stride()}
    terms, project = _terms(logits, options, walk, True), None
    if options.score != "hinge" and logits.size(1) > 1:
        heuristic = {**cell_heuristic([loss], "forward", axes[1].most), **_at_once(axes[1].most)}
        programs, arguments = over_cells([loss], logits, target, walk, axes, heuristic)
        del arguments["full"]
        arguments |= {"programs": programs // logits.size(0), "TERMS": terms, **strides}
        project = PreparedLaunch(_membership_project_kernel, (programs,), arguments, False)
        loss = PROBABILITY._replace(record=_CELL_RECORD)
        terms = terms_of((Term(loss, terms.options[0]),), logits, walk, True)
        terms = terms._replace(maps=(3,))  # with the projections
    heuristic = {**cell_heuristic([loss], "backward", axes[1].most), "UNROLL": _UNROLL_BACK}
    heuristic["PIXEL_COLUMNS"] = min(int(heuristic["PIXEL_COLUMNS"]), _MOST_COLUMNS)
    programs, arguments = over_strips([loss], logits, target, walk, axes, heuristic)
    constants = {
        **arguments,
        **strides,
        "TERMS": terms,
        "numbers": ((),),
        "weight_places": (0,),
        "WEIGHTED": False,
        "upstream_strides": (0, 0, 0),
        "grad_strides": grad_logits.stride(),
        "table_strides": (3 * logits.size(1),),
    }
    return project, PreparedLaunch(_upsampled_backward_kernel, (programs,), constants, False)


def _at_once(most: int) -> Configuration:
    """Pixels of a lane at once, of cells with up to ``most`` columns."""
    columns = min(triton.next_power_of_2(most), _MOST_PIXELS)
    rows = min(triton.next_power_of_2(most), _MOST_PIXELS // columns)
    return {"PIXEL_COLUMNS": columns, "PIXEL_ROWS": rows}


def _loss_of(options: SumOptions) -> Loss:
    return HINGE if options.score == "hinge" else PROBABILITY


def _terms(logits: torch.Tensor, options: SumOptions, walk: Walk, save: bool) -> Terms:
    """What kernels of both passes are compiled for."""
    known = Options(hinge=options.score == "hinge", binary=logits.size(1) == 1)
    return terms_of((Term(_loss_of(options), known),), logits, walk, save)
