"""The launchers of pixelwise losses over logits that are interpolated to the size of the labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard, warp_size
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .cell_kernels import _upsampled_backward_kernel, _upsampled_forward_kernel
from .cells import CellTile, Sizes
from .pixel_terms import (
    Kept,
    Loss,
    Made,
    Term,
    Walk,
    allocated,
    key_of,
    labels_of,
    made,
    numbers_of,
    tables_of,
    terms_of,
)
from .pixels import Tile
from .planes import compute_dtype
from .sums import sums_over

# Pixels of a lane at once, going forward; columns of them, going back.
_MOST_PIXELS = 16
_MOST_COLUMNS = 8
# Pixels of a lane at once for losses that go through the classes twice, and keep more of each.
_MOST_PIXELS_TWICE = 4


# --- axes -----------------------------------------------------------------------------------------


class AxisTables(NamedTuple):
    """Where the pixels of an axis lie between its nodes.

    Attributes:
        starts: int32 [nodes + 2], of every cell the first pixel, and the number of pixels.
        shares: [pixels], the share of the later node of each pixel's cell.
        most: pixels of the cell that has the most.
    """

    starts: torch.Tensor
    shares: torch.Tensor
    most: int


@functools.lru_cache(maxsize=512)
def axis_tables(
    nodes: int, pixels: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> AxisTables:
    """The tables of an axis, by the arithmetic of PyTorch's interpolation in ``dtype``."""
    pixel = torch.arange(pixels, dtype=dtype)
    sizes = torch.tensor((nodes, pixels), dtype=dtype)
    if nodes == pixels:  # PyTorch copies
        place = pixel
    elif align_corners:
        place = pixel * ((sizes[0] - 1) / (sizes[1] - 1))
    else:
        # PyTorch's is a fused multiply-add, rounded once: in 53 bits the product is exact.
        place = (pixel + 0.5).double() * (sizes[0] / sizes[1]).double() - 0.5
        place = place.to(dtype)
    before = place.clamp(min=0).floor().clamp(max=nodes - 1)
    shares = (place.clamp(min=0) - before).clamp(0, 1)
    cells = torch.where(place < 0, 0, before + 1).long()
    # Beyond the outermost nodes a cell has the same node twice. The share is chosen so that no sum
    # of gradients is for a node that is not there.
    shares = torch.where(cells == 0, 1, torch.where(cells == nodes, 0, shares))
    starts = torch.searchsorted(cells, torch.arange(nodes + 2)).int()
    return AxisTables(
        starts.to(device, non_blocking=True),
        shares.to(device, non_blocking=True),
        int(starts.diff().max()),
    )


def _axes(
    logits: torch.Tensor, target: torch.Tensor, align_corners: bool
) -> tuple[AxisTables, AxisTables]:
    """The tables of rows and of columns."""
    dtype = compute_dtype(logits.dtype)
    rows, columns = (
        axis_tables(nodes, pixels, align_corners, dtype, logits.device)
        for nodes, pixels in zip(logits.shape[2:], target.shape[1:], strict=True)
    )
    return rows, columns


# --- launchers ------------------------------------------------------------------------------------


def launch_cells_forward(
    terms: tuple[Term, ...], logits: torch.Tensor, target: torch.Tensor, walk: Walk, save: bool
) -> tuple[torch.Tensor, Kept]:
    """The sum of the losses, and what their backward pass needs if ``save``."""
    losses = [term.loss for term in terms]
    if target.numel() == 0:  # no program runs, and so none comes last
        loss, kept = allocated(made(losses, logits, target, walk, save), logits)
        return loss.zero_(), kept._replace(scale=kept.scale.zero_())
    rows, columns = _axes(logits, target, walk.align_corners)

    def prepare() -> tuple[PreparedLaunch, int, tuple[Made, ...]]:
        programs, arguments = _forward_launch(losses, logits, target, walk, rows.most, columns.most)
        constants = {
            **numbers_of(terms),
            "logits_strides": logits.stride(),
            "target_strides": target.stride(),
            "programs": programs,
            "TERMS": terms_of(terms, logits, walk, save),
            "REDUCTION": walk.reduction,
            **arguments,
        }
        launch = PreparedLaunch(_upsampled_forward_kernel, (programs,), constants, aligned=False)
        return launch, programs, made(losses, logits, target, walk, save)

    key = (key_of(terms), kind(logits), kind(target), walk, save)
    launch, programs, filled = prepared(key, prepare)
    loss, kept = allocated(filled, logits)
    own, other = tables_of(terms, logits)
    sum_rows = 2 * len(terms) + 1 if walk.reduction != "none" else 0
    with device_guard(logits):
        sums = sums_over(programs, sum_rows, logits.device)
        launch(
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            map_ptrs=kept.maps,
            values_ptr=loss,
            loss_ptr=loss,
            scale_ptr=kept.scale,
            row_starts_ptr=rows.starts,
            row_shares_ptr=rows.shares,
            column_starts_ptr=columns.starts,
            column_shares_ptr=columns.shares,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
        )
    return loss, kept


def launch_cells_backward(
    terms: tuple[Term, ...],
    upstream: torch.Tensor,
    kept: Kept,
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
) -> torch.Tensor:
    """The gradient of the logits."""
    losses = [term.loss for term in terms]
    grad_logits = torch.empty_like(logits)
    if target.numel() == 0:
        return grad_logits.zero_()
    rows, columns = _axes(logits, target, walk.align_corners)
    own, other = tables_of(terms, logits)

    def prepare() -> tuple[PreparedLaunch, int]:
        programs, arguments = _backward_launch(
            losses, logits, target, walk, rows.most, columns.most
        )
        reduced = walk.reduction != "none"
        constants = {
            **numbers_of(terms),
            "upstream_strides": (0, 0, 0) if reduced else upstream.stride(),
            "logits_strides": logits.stride(),
            "target_strides": target.stride(),
            "grad_strides": grad_logits.stride(),
            "TERMS": terms_of(terms, logits, walk, save=True),
            **arguments,
        }
        launch = PreparedLaunch(_upsampled_backward_kernel, (programs,), constants, aligned=False)
        return launch, sum(constants["TERMS"].maps)

    # The gradient's layout follows from that of the logits.
    upstream_kind = kind(upstream) if walk.reduction == "none" else None
    key = (key_of(terms), kind(logits), kind(target), upstream_kind, walk)
    launch, maps = prepared(key, prepare)
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=kept.scale,
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            map_ptrs=kept.maps[:maps],
            grad_ptr=grad_logits,
            row_starts_ptr=rows.starts,
            row_shares_ptr=rows.shares,
            column_starts_ptr=columns.starts,
            column_shares_ptr=columns.shares,
        )
    return grad_logits


# --- configurations -------------------------------------------------------------------------------


def cell_heuristic(losses: Sequence[Loss], direction: str, most: int) -> Configuration:
    """A configuration that is always valid; the widest cell has ``most`` columns of pixels."""
    twice = any(loss.record.join is not None for loss in losses)
    if direction == "forward":
        pixels = _MOST_PIXELS_TWICE if twice else _MOST_PIXELS
        columns = min(triton.next_power_of_2(most), pixels)
        # Cells are about as high as wide.
        rows = min(pixels // columns, triton.next_power_of_2(most))
        unroll = min(8, *(loss.unroll for loss in losses))
        return {
            "PIXEL_COLUMNS": columns,
            "PIXEL_ROWS": rows,
            "UNROLL": unroll,
            "num_warps": 4,
        }
    # What a pixel needs going back takes registers, most of all where it looks up several logits.
    columns = 1 if twice else min(triton.next_power_of_2(most), _MOST_COLUMNS)
    # One warp: what neighbouring lanes exchange never leaves it.
    return {"PIXEL_COLUMNS": columns, "NODE_ROWS": 16, "UNROLL": 5, "num_warps": 1}


def _configuration(
    losses: Sequence[Loss], direction: str, logits: torch.Tensor, most: int
) -> Configuration:
    name = losses[0].name if len(losses) == 1 else "weighted_sum"
    return launch_configuration(
        f"{name}_upsampled_{direction}",
        device=logits.device,
        dtype=logits.dtype,
        classes=logits.size(1),
        window=min(triton.next_power_of_2(most), _MOST_PIXELS),
        layout="contiguous" if logits.stride(3) == 1 else "strided",
        heuristic=cell_heuristic(losses, direction, most),
    )


def _forward_launch(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    highest: int,
    widest: int,
    configuration: Configuration | None = None,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a kernel that goes forward; tuned if no configuration is given."""
    configuration = configuration or _configuration(losses, "forward", logits, widest)
    columns, rows = int(configuration["PIXEL_COLUMNS"]), int(configuration["PIXEL_ROWS"])
    chunks, bands = triton.cdiv(widest, columns), triton.cdiv(highest, rows)
    tile = _tile(configuration, logits)
    blocks = triton.cdiv((logits.size(2) + 1) * (logits.size(3) + 1), tile.pixels)
    programs = blocks * chunks * bands * logits.size(0)
    classes = logits.size(1)
    return programs, {
        "sizes": _sizes(logits, target, blocks, highest, rows),
        "full": (classes - 1) // tile.unroll * tile.unroll,
        "TILE": tile,
        "CELLS": _cell_tile(losses, logits, target, walk, (rows, columns, chunks, 1)),
        "num_warps": int(configuration["num_warps"]),
        "enable_fp_fusion": True,
    }


def _backward_launch(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    highest: int,
    widest: int,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of the kernel that goes back."""
    configuration = _configuration(losses, "backward", logits, widest)
    columns, nodes = int(configuration["PIXEL_COLUMNS"]), int(configuration["NODE_ROWS"])
    chunks = triton.cdiv(widest, columns)
    tile = _tile(configuration, logits)
    strips = triton.cdiv(logits.size(2), nodes)
    blocks = triton.cdiv(strips * (logits.size(3) + 1), tile.pixels - 1)
    class_blocks = triton.cdiv(logits.size(1), tile.unroll)
    return class_blocks * blocks * logits.size(0), {
        "sizes": _sizes(logits, target, blocks, highest, rows=1),
        "TILE": tile,
        "CELLS": _cell_tile(losses, logits, target, walk, (1, columns, chunks, nodes)),
        "num_warps": int(configuration["num_warps"]),
        "enable_fp_fusion": True,
    }


def _tile(configuration: Configuration, logits: torch.Tensor) -> Tile:
    """A lane owns a cell: to the losses it is a pixel."""
    # Blocks of one size, as far as that goes: going back, all are made of the same number.
    blocks = triton.cdiv(logits.size(1), int(configuration["UNROLL"]))
    unroll = triton.cdiv(logits.size(1), blocks)
    return Tile(
        pixels=int(configuration["num_warps"]) * warp_size(),
        lanes=1,
        unroll=unroll,
        grain=1,
        flat=False,
        classes=logits.size(1),
        double=logits.dtype == torch.float64,
        bundle=0,  # no logit is there to be looked up again
        slots=unroll,
    )


def _cell_tile(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    counts: tuple[int, int, int, int],
) -> CellTile:
    rows, columns, chunks, nodes = counts
    labels = labels_of(losses, logits, target, walk.ignore_index)
    return CellTile(
        rows=rows,
        columns=columns,
        chunks=chunks,
        nodes=nodes,
        near=target.stride(2) == 1,
        ignored=labels["IGNORED"],
        binary=labels["BINARY"],
        reduced=walk.reduction != "none",
    )


def _sizes(
    logits: torch.Tensor, target: torch.Tensor, blocks: int, highest: int, rows: int
) -> Sizes:
    """Of ``blocks`` of cells, the highest of which has so many rows, a lane ``rows`` at once."""
    return Sizes(
        height=logits.size(2),
        width=logits.size(3),
        rows=target.size(1),
        columns=target.size(2),
        blocks=blocks,
        bands=triton.cdiv(highest, rows),
        highest=highest,
    )
