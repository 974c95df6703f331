"""The launchers of sums over what is predicted as a class rightly, wrongly, or not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core import checks
from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.cell_grid import axes_of, cell_heuristic, over_cells, over_strips, pointers_of
from .._engine.cell_kernels import _upsampled_backward_kernel
from .._engine.pixel_grid import in_grains, over_pixels, rounds_of
from .._engine.pixel_terms import Loss, Term, Walk, labels_of, terms_of
from .._engine.pixel_walk import Terms
from .._engine.pixels import Record
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
from .membership_cells import _membership_cells_kernel

MOST_CLASSES = 1024  # whose sums a program has at once
# Of interpolated logits: pixels of a lane at once and classes in one block, going forward; columns
# of pixels, going back.
_MOST_PIXELS = 4
_UNROLL = 6
_MOST_COLUMNS = 4

_RECORD = Record(
    members_start, members_add, members_add, members_factors, members_slope, members_lookups
)


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
    walk = _walk_of(options, logits, target)
    prepare = _prepare_backward if walk.upsample is None else _prepare_backward_of_cells
    launch = prepared(
        ("membership_backward", kind(logits), kind(target), options),
        lambda: prepare(logits, target, grad_logits, options, walk),
    )
    table = grad_sums.contiguous()
    tensors: dict[str, Any] = {"table_ptr": table}
    if walk.upsample is not None:
        one = table.new_ones(1)
        tensors = {
            "upstream_ptr": one, "scale_ptr": one, "own_ptrs": (table,), "other_ptrs": (table,)
        }  # fmt: skip
    with device_guard(logits):
        launch(
            **tensors,
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(logits, options, *maps),
            grad_ptr=grad_logits,
            **_axes(logits, target, walk),
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
    heuristic = {**cell_heuristic([loss], "forward", axes[1].most), "UNROLL": _UNROLL}
    columns = min(int(heuristic["PIXEL_COLUMNS"]), _MOST_PIXELS)
    heuristic["PIXEL_COLUMNS"] = columns
    heuristic["PIXEL_ROWS"] = min(int(heuristic["PIXEL_ROWS"]), _MOST_PIXELS // columns)
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
) -> PreparedLaunch:
    loss = _loss_of(options)
    axes = axes_of(logits, target, walk.align_corners)
    heuristic = cell_heuristic([loss], "backward", axes[1].most)
    heuristic["PIXEL_COLUMNS"] = min(int(heuristic["PIXEL_COLUMNS"]), _MOST_COLUMNS)
    programs, arguments = over_strips([loss], logits, target, walk, axes, heuristic)
    constants = {
        **arguments,
        "TERMS": _terms(logits, options, walk, True),
        "numbers": ((),),
        "shares": (1.0,),
        "upstream_strides": (0, 0, 0),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "grad_strides": grad_logits.stride(),
        "table_stride": 3 * logits.size(1),
    }
    return PreparedLaunch(_upsampled_backward_kernel, (programs,), constants, False)


def _loss_of(options: SumOptions) -> Loss:
    return HINGE if options.score == "hinge" else PROBABILITY


def _terms(logits: torch.Tensor, options: SumOptions, walk: Walk, save: bool) -> Terms:
    """What kernels of both passes are compiled for."""
    known = Options(hinge=options.score == "hinge", binary=logits.size(1) == 1)
    return terms_of((Term(_loss_of(options), known),), logits, walk, save)
