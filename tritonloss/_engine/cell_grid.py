"""How kernels go through cells: tables of the axes, configurations, grids and arguments."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import is_captured, registers, stream_of, warp_size
from .._core.configurations import Configuration, launch_configuration
from .cell_kernels import _upsampled_backward_kernel, _upsampled_forward_kernel
from .cells import CellTile, Sizes
from .pixel_terms import Loss, Walk, Way, labels_of
from .pixels import Tile
from .planes import compute_dtype

# Pixels of a lane at once, going forward; columns of them, going back.
_MOST_PIXELS = 16
_MOST_COLUMNS = 8
# Pixels of a lane at once for losses that go through the classes twice, and keep more of each.
_MOST_PIXELS_TWICE = 4
_IS_OLD = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 7)
# Warps of a backward pass: one for every scheduler of an A100, if strips of a few rows make it.
_WARPS = 432
_FEWEST_ROWS = 8


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
def axis_tables(nodes: int, pixels: int, align_corners: bool, dtype: torch.dtype) -> AxisTables:
    """The tables of an axis, on the CPU, by the arithmetic of PyTorch's interpolation."""
    pixel = torch.arange(pixels, dtype=dtype, device="cpu")
    sizes = torch.tensor((nodes, pixels), dtype=dtype, device="cpu")
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
    starts = torch.searchsorted(cells, torch.arange(nodes + 2, device="cpu")).int()
    return AxisTables(starts, shares, int(starts.diff().max()))


Axes = tuple[AxisTables, AxisTables]  # of rows and of columns
# Copies of the tables, by the stream that has made them: another one might read them too early. All
# are forgotten when there are so many.
_copies: dict[Hashable, dict[int, Axes]] = {}
_MOST_COPIES = 512


def axes_of(logits: torch.Tensor, target: torch.Tensor, align_corners: bool) -> Axes:
    """The tables of rows and of columns, copied to the device of the logits by this stream.

    Raises:
        RuntimeError: a CUDA graph is being captured, and these sizes have not been seen before.
    """
    device = logits.device
    key = (logits.shape[2:], target.shape[1:], align_corners, logits.dtype, device)
    copies, stream = _copies.get(key, {}), stream_of(device)
    if stream in copies:
        return copies[stream]
    if is_captured(device):
        if not copies:
            raise RuntimeError(
                "tritonloss: run the loss once on logits and labels of these sizes before a CUDA "
                "graph of it is captured"
            )
        return next(iter(copies.values()))  # the capture has waited for the stream of that run
    if len(_copies) >= _MOST_COPIES:
        _copies.clear()
    rows, columns = (
        _copied(axis_tables(nodes, pixels, align_corners, compute_dtype(logits.dtype)), device)
        for nodes, pixels in zip(logits.shape[2:], target.shape[1:], strict=True)
    )
    return _copies.setdefault(key, {}).setdefault(stream, (rows, columns))


def _copied(tables: AxisTables, device: torch.device) -> AxisTables:
    return AxisTables(
        tables.starts.to(device, non_blocking=True),
        tables.shares.to(device, non_blocking=True),
        tables.most,
    )


# --- what kernels are given -----------------------------------------------------------------------


def pointers_of(axes: Axes) -> dict[str, torch.Tensor]:
    """The kernels' arguments for the tables of rows and of columns."""
    rows, columns = axes
    return {
        "row_starts_ptr": rows.starts,
        "row_shares_ptr": rows.shares,
        "column_starts_ptr": columns.starts,
        "column_shares_ptr": columns.shares,
    }


def axes_of_walk(logits: torch.Tensor, target: torch.Tensor, walk: Walk) -> dict[str, torch.Tensor]:
    """The arguments that say where pixels lie between logits; none where they lie on them."""
    if walk.upsample is None:
        return {}
    return pointers_of(axes_of(logits, target, walk.align_corners))


def forward_over_cells(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, walk: Walk
) -> Way:
    """The way of a forward pass through the cells of ``logits``."""
    axes = axes_of(logits, target, walk.align_corners)
    programs, arguments = over_cells(losses, logits, target, walk, axes)
    arguments |= {"logits_strides": logits.stride(), "target_strides": target.stride()}
    return Way(_upsampled_forward_kernel, programs, arguments, False)


def backward_over_cells(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    grads: tuple[torch.Tensor, torch.Tensor],
) -> Way:
    """The way of a backward pass; ``grads`` are of the loss and of the logits."""
    upstream, grad_logits = grads
    axes = axes_of(logits, target, walk.align_corners)
    programs, arguments = over_strips(losses, logits, target, walk, axes)
    arguments |= {
        "table_strides": (0,) * len(losses),
        "upstream_strides": (0, 0, 0) if walk.reduction != "none" else upstream.stride(),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "grad_strides": grad_logits.stride(),
    }
    return Way(_upsampled_backward_kernel, programs, arguments, False)


# --- configurations -------------------------------------------------------------------------------


def cell_heuristic(losses: Sequence[Loss], direction: str, most: int) -> Configuration:
    """A configuration that is always valid; the widest cell has ``most`` columns of pixels."""
    twice = any(loss.record.join is not None for loss in losses)
    if direction == "forward":
        pixels = _MOST_PIXELS_TWICE if twice else _MOST_PIXELS
        columns = min(triton.next_power_of_2(most), pixels)
        # Cells are about as high as wide.
        rows = min(pixels // columns, triton.next_power_of_2(most))
        # Of more, losses that go through all classes twice take 128 registers, and spill.
        unroll = min(4 if twice else 8, *(loss.unroll for loss in losses))
        return {
            "PIXEL_COLUMNS": columns,
            "PIXEL_ROWS": rows,
            "UNROLL": unroll,
            "num_warps": 4,
        }
    # What a pixel needs going back takes registers, most of all where it looks up several logits.
    columns = 1 if twice else min(triton.next_power_of_2(most), _MOST_COLUMNS)
    # One warp: what neighbouring lanes exchange never leaves it.
    return {"PIXEL_COLUMNS": columns, "NODE_ROWS": 32, "UNROLL": 5 if twice else 10, "num_warps": 1}


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


def over_cells(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    axes: Axes,
    configuration: Configuration | None = None,
    parts: int = 0,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a kernel that goes forward; tuned if no configuration is given.

    If a cell is that of so many ``parts``, these lanes have a block of its classes each.
    """
    highest, widest = (axis.most for axis in axes)
    configuration = configuration or _configuration(losses, "forward", logits, widest)
    columns, rows = int(configuration["PIXEL_COLUMNS"]), int(configuration["PIXEL_ROWS"])
    chunks, bands = triton.cdiv(widest, columns), triton.cdiv(highest, rows)
    # Once for a cell and class, what losses of powers of 2 would do once for a pixel and class.
    scaled = all(loss.scaled for loss in losses)
    tile = _tile(configuration, logits)._replace(scaled=scaled)
    if parts > 0:
        count = triton.cdiv(logits.size(1), parts)
        tile = tile._replace(unroll=count, slots=count)
    members = tile.pixels // max(parts, 1)
    blocks = triton.cdiv((logits.size(2) + 1) * (logits.size(3) + 1), members)
    programs = blocks * chunks * bands * logits.size(0)
    classes = logits.size(1)
    tile_of_cells = _cell_tile(losses, logits, target, walk, (rows, columns, chunks))
    return programs, {
        "sizes": _sizes(logits, target, blocks, highest, rows),
        "full": (classes - 1) // tile.unroll * tile.unroll,
        "TILE": tile,
        "CELLS": tile_of_cells._replace(parts=parts),
        "num_warps": int(configuration["num_warps"]),
        "enable_fp_fusion": True,
    }


def over_strips(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    axes: Axes,
    configuration: Configuration | None = None,
    parts: int = 0,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of the kernel that goes back; tuned if no configuration is given.

    If a cell is that of so many ``parts``, these lanes have a block of its classes each; else a
    program has one block.
    """
    highest, widest = (axis.most for axis in axes)
    configuration = configuration or _configuration(losses, "backward", logits, widest)
    columns, nodes = int(configuration["PIXEL_COLUMNS"]), int(configuration["NODE_ROWS"])
    # Not more than the image has: all that a lane has at once are columns of it.
    columns = min(columns, 1 << (target.size(2).bit_length() - 1))
    chunks = triton.cdiv(widest, columns)
    even = are_even(columns, widest, logits, target, walk)
    scaled = all(loss.scaled for loss in losses)
    if not even and any(loss.scaled for loss in losses) and not scaled:
        # Corners in base 2 as well, of ten classes: ptxas takes 168 registers, and spills 8 bytes.
        configuration = {**configuration, "UNROLL": min(int(configuration["UNROLL"]), 7)}
    nine = _even(logits.size(1), int(configuration["UNROLL"])) == 9
    if _IS_OLD and nine and scaled and losses[0].binary:
        configuration = {**configuration, "UNROLL": 8}  # ptxas of Triton 3.6 would spill 8 bytes
    tile = _tile(configuration, logits)._replace(scaled=scaled)
    class_blocks = 1 if parts > 0 else triton.cdiv(logits.size(1), tile.unroll)
    members = tile.pixels // max(parts, 1)
    # As many strips as that makes, all of about the same height; more of them, which repeat more of
    # each other's rows, where a large GPU would have too little to do.
    strips = triton.cdiv(logits.size(2), nodes)
    at_once = class_blocks * logits.size(0) * (logits.size(3) + 1) / members
    while strips * at_once < _WARPS and strips * _FEWEST_ROWS < logits.size(2):
        strips += 1
    nodes = triton.cdiv(logits.size(2), strips)
    blocks = triton.cdiv(strips * (logits.size(3) + 1), members - 1)
    tile_of_cells = _cell_tile(losses, logits, target, walk, (1, columns, chunks))
    return class_blocks * blocks * logits.size(0), {
        "sizes": _sizes(logits, target, blocks, highest, rows=1, nodes=nodes),
        "TILE": tile,
        "CELLS": tile_of_cells._replace(even=even, parts=parts),
        "num_warps": int(configuration["num_warps"]),
        "enable_fp_fusion": True,
        **registers(),
    }


def _tile(configuration: Configuration, logits: torch.Tensor) -> Tile:
    """A lane owns a cell: to the losses it is a pixel."""
    unroll = _even(logits.size(1), int(configuration["UNROLL"]))
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


def _even(classes: int, most: int) -> int:
    """Classes of a block, at most so many: the last block has nearly as many as the others.

    Going back, all blocks take the time of a full one: one block more, if that leaves fewer over.
    """
    blocks = triton.cdiv(classes, most)
    sizes = [triton.cdiv(classes, count) for count in (blocks, blocks + 1)]
    return int(min(sizes, key=lambda size: triton.cdiv(classes, size) * size))


def are_even(
    columns: int, widest: int, logits: torch.Tensor, target: torch.Tensor, walk: Walk
) -> bool:
    """Whether all cells are of so many columns of pixels, and the ratio is a power of two.

    Then PyTorch's arithmetic is exact.
    """
    exact = columns == widest > 1 and columns * logits.size(3) == target.size(2)
    return exact and not walk.align_corners


def blocks_of(classes: int, configuration: Configuration) -> int:
    """How many blocks of classes there are."""
    return int(triton.cdiv(classes, _even(classes, int(configuration["UNROLL"]))))


def _cell_tile(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    counts: tuple[int, int, int],
) -> CellTile:
    rows, columns, chunks = counts
    labels = labels_of(losses, logits, target, walk.ignore_index)
    return CellTile(
        rows=rows,
        columns=columns,
        chunks=chunks,
        near=target.stride(2) == 1,
        far=_extent(logits) >= 2**31,
        ignored=labels["IGNORED"],
        binary=labels["BINARY"],
        reduced=walk.reduction != "none",
        even=False,
        parts=0,
    )


def _extent(logits: torch.Tensor) -> int:
    """The offset of the last node of an image from the first one, in elements."""
    return sum((logits.size(axis) - 1) * logits.stride(axis) for axis in (2, 3))


def _sizes(
    logits: torch.Tensor, target: torch.Tensor, blocks: int, highest: int, rows: int, nodes: int = 1
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
        nodes=nodes,
        by_row=_divisor(logits.size(3) + 1),
        by_blocks=_divisor(blocks),
        by_bands=_divisor(triton.cdiv(highest, rows)),
    )


def _divisor(number: int) -> tuple[int, int, int]:
    """(number, multiplier, shift): n // number is (n * multiplier) >> (31 + shift) for n < 2^31.

    The multiplier has 32 bits, and is given as an int32: kernels are compiled for a number's width.
    """
    shift = (number - 1).bit_length()
    multiplier = (1 << 31 + shift) // number + 1
    return number, (multiplier + 2**31) % 2**32 - 2**31, shift
