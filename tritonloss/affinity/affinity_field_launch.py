"""The launchers of affinity fields, which go through the sizes one after the other."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from .._core import checks
from .._core.backend import device_guard, warp_size
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.process_groups import add_over_ranks
from .._engine.planes import compute_dtype, ignored_class
from .._engine.sums import sums_over
from .affinity_field_kernels import _affinity_backward_kernel, _affinity_forward_kernel
from .stencil import Stencil


class Options(NamedTuple):
    """The options of the loss."""

    sizes: str = "1"  # with commas between them
    margin: float = 3.0
    edge_weight: float = 1.0
    non_edge_weight: float = 1.0
    triple: bool = True
    ignore_index: int | None = checks.IGNORE_INDEX
    group: str | None = None  # the name of a process group


class Results(NamedTuple):
    """What the operator returns."""

    loss: torch.Tensor  # []
    scale: torch.Tensor  # [sizes, 2]: what an edge adds to the loss, and any other entry


class Gradients(NamedTuple):
    """What the backward pass returns; empty where nothing is wanted."""

    logits: torch.Tensor
    edge_table: torch.Tensor
    non_edge_table: torch.Tensor


def sizes_of(options: Options) -> tuple[int, ...]:
    """How far neighbours are apart, one number for every size."""
    return tuple(map(int, options.sizes.split(",")))


def allocated(logits: torch.Tensor, options: Options) -> Results:
    """The results, not filled."""
    dtype = compute_dtype(logits.dtype)
    scale = logits.new_empty((len(sizes_of(options)), 2), dtype=dtype)
    return Results(logits.new_empty((), dtype=dtype), scale)


def allocated_gradients(
    logits: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    wants: tuple[bool, bool, bool],
) -> Gradients:
    """The gradients, not filled."""

    def like(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        if tensor is None or not wanted:
            return logits.new_empty(0)
        return torch.empty_like(tensor)

    return Gradients(*(like(x, w) for x, w in zip((logits, *tables), wants, strict=True)))


# Rows of a lane. More of them share more of what is evaluated, and take more registers; so do the
# weights of a table, beside which there are no more rows than that. Four rows going forward, and
# two beside tables going back, would take 3 to 8 % fewer instructions, but spill on some GPUs.
# Going back beside tables, and over maps whose columns lie apart, there are twice the warps: of
# fewer the compiler for some GPUs spills a register so that another program may run at the same
# time.
_WARPS = 4
_ROWS = {"forward": 2, "backward": 3}
_ROWS_OF_TABLES = {"forward": 2, "backward": 1}
_ROWS_APART = 2  # the addresses of columns that lie apart take registers, too


def heuristic(direction: str) -> Configuration:
    """A configuration that is always valid: a few rows of a column for every lane."""
    return {"LANES": _WARPS * warp_size(), "ROWS": _ROWS[direction], "num_warps": _WARPS}


def launch_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    options: Options,
) -> Results:
    """The loss, and what one entry adds to it."""
    results = allocated(logits, options)
    if options.group is not None:
        totals = logits.new_zeros((len(results.scale), 4), dtype=torch.float64)
    if target.numel() == 0:
        results.loss.zero_()
        results.scale.zero_()
        if options.group is not None:
            _add_other_ranks(totals, logits.size(1), options, results)
        return results
    for position, size in enumerate(sizes_of(options)):
        tables = _columns(edge_table, position), _columns(non_edge_table, position)

        def prepare(
            size: int = size,
            position: int = position,
            tables: tuple[torch.Tensor | None, torch.Tensor | None] = tables,
        ) -> tuple[PreparedLaunch, int]:
            programs, arguments = _over_stencils("forward", logits, target, tables, size, options)
            arguments |= {
                "programs": programs,
                "edge_weight": options.edge_weight,
                "other_weight": options.non_edge_weight,
                "FIRST": position == 0,
            }
            launch = PreparedLaunch(_affinity_forward_kernel, (programs,), arguments, aligned=False)
            return launch, programs

        key = "affinity_forward", size, position == 0, *_kinds(logits, target, tables), options
        launch, programs = prepared(key, prepare)
        sums = sums_over(programs, 4, logits.device)
        with device_guard(logits):
            launch(
                logits_ptr=logits,
                target_ptr=target,
                **_named(tables),
                loss_ptr=results.loss,
                scale_ptr=results.scale[position],
                scratch_ptr=sums["scratch_ptr"],
                tickets_ptr=sums["tickets_ptr"],
            )
            if options.group is not None:
                totals[position] = sums["scratch_ptr"][:4]
    if options.group is not None:
        _add_other_ranks(totals, logits.size(1), options, results)
    return results


def _add_other_ranks(
    totals: torch.Tensor, classes: int, options: Options, results: Results
) -> None:
    """Make the results those of all ranks' pixels.

    ``totals`` are this rank's sums of every size, as the kernel leaves them: of edges and of other
    entries, in base 2; the pairs of pixels, and those with different labels.
    """
    assert options.group is not None
    ranks = add_over_ranks(totals, options.group)
    entries, pairs, apart = totals[:, :2], totals[:, 2], totals[:, 3]
    edges = 2 * apart
    counts = torch.stack((edges, classes * pairs - edges), 1)
    weights = torch.empty_like(counts)
    weights[:, 0], weights[:, 1] = options.edge_weight, options.non_edge_weight
    scale = torch.where(counts > 0, weights / counts.clamp(min=1.0), 0.0)
    results.loss.copy_((scale * entries).sum() * math.log(2.0))
    results.scale.copy_(ranks * scale)


def launch_backward(
    grad_loss: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    wants: tuple[bool, bool, bool],
    options: Options,
) -> Gradients:
    """The gradients of the logits and of both tables."""
    gradients = allocated_gradients(logits, tables, wants)
    if target.numel() == 0:
        return Gradients(*(gradient.zero_() for gradient in gradients))
    asked = [wants[1 + i] and table is not None for i, table in enumerate(tables)]
    sums = []
    for position, size in enumerate(sizes_of(options)):
        columns = _columns(tables[0], position), _columns(tables[1], position)
        entries = _launch_gradient(
            (grad_loss, scale[position]), logits, target, columns, options,
            gradients.logits if wants[0] else None, (position, size, any(asked)),
        )  # fmt: skip
        if entries is not None:
            factor = grad_loss * scale[position]
            sums.append(entries.sum(0, dtype=torch.float64) * factor[:, None])
    for kind_of, gradient in enumerate(gradients[1:]):
        if asked[kind_of]:
            columns_of = torch.stack([total[kind_of] for total in sums], 1)  # [C, sizes]
            gradient.copy_(columns_of.sum(1) if gradient.dim() == 1 else columns_of)
    return gradients


def _launch_gradient(
    scales: tuple[torch.Tensor, torch.Tensor],
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    options: Options,
    grad_logits: torch.Tensor | None,
    which: tuple[int, int, bool],
) -> torch.Tensor | None:
    """Write the gradient of one size, or add it to that of others; sums of entries if wanted."""
    position, size, wants_table = which

    def prepare() -> tuple[PreparedLaunch, int]:
        programs, arguments = _over_stencils(
            "backward", logits, target, tables, size, options, grad_logits
        )
        # Beside tables that would take one register more than there are for two programs.
        wide = logits.dtype in (torch.float32, torch.float64)
        has_tables = any(table is not None for table in tables)
        arguments |= {
            "grad_strides": (0, 0, 0, 0) if grad_logits is None else grad_logits.stride(),
            "STORED": wide and not has_tables and position == 0,
            "ADDS": position > 0,
        }
        if grad_logits is None:
            arguments["grad_ptr"] = None
        if not wants_table:
            arguments["entries_ptr"] = None
        launch = PreparedLaunch(_affinity_backward_kernel, (programs,), arguments, aligned=False)
        return launch, programs

    grad_kind = None if grad_logits is None else kind(grad_logits)
    kinds = *_kinds(logits, target, tables), grad_kind
    key = "affinity_backward", size, position == 0, *kinds, wants_table, options
    launch, programs = prepared(key, prepare)
    tensors: dict[str, Any] = {
        "upstream_ptr": scales[0],
        "scale_ptr": scales[1],
        "logits_ptr": logits,
        "target_ptr": target,
        **_named(tables),
    }
    if grad_logits is not None:
        tensors["grad_ptr"] = grad_logits
    entries = None
    if wants_table:
        shape = (programs, 2, logits.size(1))
        entries = logits.new_empty(shape, dtype=compute_dtype(logits.dtype))
        tensors["entries_ptr"] = entries
    with device_guard(logits):
        launch(**tensors)
    return entries


def _columns(table: torch.Tensor | None, position: int) -> torch.Tensor | None:
    """A table's weights for one size, [C]."""
    return table if table is None or table.dim() == 1 else table[:, position]


def _named(tables: tuple[torch.Tensor | None, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tables that there are, by the names of the kernels' arguments."""
    names = ("edge_table_ptr", "other_table_ptr")
    return {name: table for name, table in zip(names, tables, strict=True) if table is not None}


def _kinds(
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[Any, ...]:
    """All of the tensors that a launch depends on, except their addresses."""
    return kind(logits), kind(target), *(None if x is None else kind(x) for x in tables)


def _over_stencils(
    direction: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    size: int,
    options: Options,
    *maps: torch.Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a kernel that goes through all pixels."""
    images, classes, height, width = logits.shape
    side_by_side = all(x.stride(3) == 1 for x in (logits, *maps) if x is not None)
    in_lanes = logits.stride(1) == 1 and not side_by_side
    configuration = launch_configuration(
        f"affinity_field_{direction}",
        device=logits.device,
        dtype=logits.dtype,
        classes=classes,
        window=1,
        layout="channels_last" if in_lanes else "contiguous" if side_by_side else "strided",
        heuristic=heuristic(direction),
    )
    lanes, rows = int(configuration["LANES"]), int(configuration["ROWS"])
    warps = int(configuration["num_warps"])
    has_tables = any(table is not None for table in tables)
    if has_tables:
        rows = min(rows, _ROWS_OF_TABLES[direction])
    elif not side_by_side:
        rows = min(rows, _ROWS_APART)
    takes_more = not side_by_side or (has_tables and direction == "backward")
    if takes_more and warps == _WARPS:
        lanes, warps = 2 * lanes, 2 * warps
    row_blocks, column_blocks = triton.cdiv(height, rows * size) * size, triton.cdiv(width, lanes)
    arguments: dict[str, Any] = {
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "table_strides": tuple(0 if x is None else x.stride(0) for x in tables),
        "height": height,
        "width": width,
        "row_blocks": row_blocks,
        "column_blocks": column_blocks,
        "classes": classes,
        "margin": options.margin,
        "STENCIL": Stencil(
            lanes=lanes,
            rows=rows,
            size=size,
            first=3 if direction == "forward" else 0,
            classes=classes,
            ignored=ignored_class(options.ignore_index, classes, target.dtype),
            triple=options.triple,
            side_by_side=side_by_side,
            double=logits.dtype == torch.float64,
        ),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    names = ("edge_table_ptr", "other_table_ptr")
    arguments |= {name: None for name, table in zip(names, tables, strict=True) if table is None}
    return images * row_blocks * column_blocks, arguments
