"""The launchers of sums over what is predicted as a class rightly, wrongly, or not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.pixel_grid import in_grains, over_pixels, rounds_of
from .._engine.pixel_terms import Loss, Term, Walk, labels_of, terms_of
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

MOST_CLASSES = 1024  # whose sums a program has at once

_RECORD = Record(
    members_start, members_add, members_add, members_factors, members_slope, members_lookups
)


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
    logits: torch.Tensor, target: torch.Tensor, hinge: bool, save: bool
) -> MembershipResults:
    """The results, of which nothing is computed yet; maps are there if ``save``."""
    shape = (*logits.shape[:2], 3)
    dtypes = _saved(logits, hinge) if save else ()
    maps = [logits.new_empty(target.shape, dtype=dtype) for dtype in dtypes]
    return MembershipResults(
        logits.new_empty(shape, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(shape, dtype=torch.int64),
        *maps,
        *(None,) * (2 - len(maps)),
    )


def launch_sums(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None, hinge: bool, save: bool
) -> MembershipResults:
    """The sums and counts, and what their backward pass needs if ``save``."""
    results = allocated(logits, target, hinge, save)
    if target.numel() == 0:
        return results._replace(sums=results.sums.zero_(), counts=results.counts.zero_())
    launch, rows = prepared(
        ("membership_sums", kind(logits), kind(target), ignore_index, hinge, save),
        lambda: _prepare_sums(logits, target, ignore_index, hinge, save),
    )
    images, classes = logits.shape[:2]
    parts = logits.new_empty((6, rows, classes), dtype=results.sums.dtype)
    with device_guard(logits):
        launch(
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(logits, hinge, results.first, results.second) if save else (),
            parts_ptr=parts,
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
    ignore_index: int | None,
    hinge: bool,
) -> torch.Tensor:
    """The gradient of the logits."""
    grad_logits = torch.empty_like(logits)
    if target.numel() == 0:
        return grad_logits.zero_()
    launch = prepared(
        ("membership_backward", kind(logits), kind(target), ignore_index, hinge),
        lambda: _prepare_backward(logits, target, grad_logits, ignore_index, hinge),
    )
    with device_guard(logits):
        launch(
            table_ptr=grad_sums.contiguous(),
            logits_ptr=logits,
            target_ptr=target,
            map_ptrs=_maps(logits, hinge, *maps),
            grad_ptr=grad_logits,
        )
    return grad_logits


def _maps(logits: torch.Tensor, hinge: bool, *maps: Any) -> tuple[Any, ...]:
    """The maps that are there: to a custom operator, one that is not is an empty tensor."""
    return maps[: len(_saved(logits, hinge))]


# --- launches -------------------------------------------------------------------------------------


def _prepare_sums(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None, hinge: bool, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, its programs)."""
    images, classes = logits.shape[:2]
    loss = HINGE if hinge else PROBABILITY
    _, arguments = over_pixels([loss], "forward", logits, target)
    tile, tiles = arguments["TILE"], arguments.pop("tiles")
    rounds = rounds_of(images * tiles)
    programs = triton.cdiv(tiles, rounds)
    rows = images * programs
    constants = {
        **arguments,
        **_around(loss, logits, target, ignore_index, hinge, save),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "rounds": rounds,
        "programs": programs,
        "rows": rows,
        "BINS": max(triton.next_power_of_2(classes), 32),
    }
    return PreparedLaunch(_membership_sums_kernel, (rows,), constants, tile.grain > 1), rows


def _prepare_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_logits: torch.Tensor,
    ignore_index: int | None,
    hinge: bool,
) -> PreparedLaunch:
    loss = HINGE if hinge else PROBABILITY
    programs, arguments = over_pixels([loss], "backward", logits, target, grad_logits)
    tile = arguments["TILE"]
    constants = {
        **arguments,
        **_around(loss, logits, target, ignore_index, hinge, True),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
    }
    return PreparedLaunch(_membership_backward_kernel, (programs,), constants, tile.grain > 1)


def _around(
    loss: Loss,
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int | None,
    hinge: bool,
    save: bool,
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    options = Options(hinge=hinge, binary=logits.size(1) == 1)
    return {
        "TERMS": terms_of((Term(loss, options),), logits, Walk(ignore_index, "sum"), save),
        **labels_of([loss], logits, target, ignore_index),
    }
