"""Forward pass of region mutual information: which kernels it runs, on what, in which order.

Logits and labels are read into maps and a cross entropy. Moments are computed from the maps, and
the head computes the loss from both. The mathematics is documented in region_mutual_information.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch
from .._core.process_groups import add_over_ranks
from .._engine.planes import compute_dtype
from .._engine.sums import sums_over
from .features import Reading
from .head_kernels import _rmi_head_kernel
from .lag_kernels import _rmi_frame_kernel, _rmi_lags_kernel
from .moments_kernels import _rmi_direct_moments_kernel, _rmi_regions_kernel
from .plan import (
    Options,
    Plan,
    Saved,
    cell_arguments,
    cell_grid,
    configuration_of,
    contiguous_strides,
    core_strip,
    feature_arguments,
    is_flat,
    of_kind,
    strides,
)
from .pooling_kernels import _rmi_cross_entropy_kernel, _rmi_pool_kernel, _rmi_sample_kernel


def forward_pass(
    options: Options, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    """(loss, info [N, C], what the backward pass needs)."""
    steps = of_kind(
        "rmi forward", options, logits, target, lambda plan: _forward(plan, logits, target)
    )
    with device_guard(logits):
        maps = steps.read.run(logits, target)
        has_maps = steps.plan.has_maps
        first, second = (maps.residual, maps.labels) if has_maps else (logits, target)
        moments = steps.moments.run(first, second, maps)
        loss, info, statistics, weights = steps.head.run(moments, maps.partials, logits.dtype)
    saved = Saved(statistics, maps.residual, maps.labels, moments.kept, weights)
    return loss, info, saved


class _Forward(NamedTuple):
    """The steps of the pass."""

    plan: Plan
    read: _Read
    moments: _LagMoments | _DirectMoments
    head: _Head


def _forward(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _Forward:
    """The steps of a plan."""
    moments: _LagMoments | _DirectMoments
    if plan.is_direct:
        moments = _direct_moments(plan, logits, target)
    else:
        moments = _lag_moments(plan, logits, target)
    read = _read(plan, logits, target, moments.programs)
    return _Forward(plan, read, moments, _head(plan, read.programs, moments.form))


# --- maps and cross entropy -----------------------------------------------------------------------


class _Maps(NamedTuple):
    """What is computed from logits and labels at their resolution."""

    residual: torch.Tensor  # [N, C, h, w], or empty
    labels: torch.Tensor  # [N, C, h, w] float16, or empty
    marks: torch.Tensor  # [N, h, w] uint8: whether a cell holds an invalid pixel; or the labels
    partials: torch.Tensor  # [2, programs] float64: sums of the cross entropy, of valid pixels


class _Read(NamedTuple):
    """The step that computes the maps and the cross entropy, in one launch."""

    plan: Plan
    launch: PreparedLaunch | None  # None where the kernels of the moments read the logits
    programs: int  # how many leave partial sums of the cross entropy

    def run(self, logits: torch.Tensor, target: torch.Tensor) -> _Maps:
        plan = self.plan
        shape = plan.map_shape if plan.has_maps else (0,)
        residual = logits.new_empty(shape, dtype=plan.arithmetic)
        labels = logits.new_empty(shape, dtype=torch.float16)  # whole numbers up to 64: exact
        marks = target
        if plan.options.pools:
            marks = logits.new_empty(plan.mark_shape, dtype=torch.uint8)
        partials = logits.new_empty((2, self.programs), dtype=torch.float64)
        if self.launch is not None:
            read = {"logits_ptr": logits, "target_ptr": target, "partials_ptr": partials}
            made = {"residual_ptr": residual, "labels_ptr": labels, "touched_ptr": marks}
            self.launch(**read, **(made if plan.has_maps else {}))
        return _Maps(residual, labels, marks, partials)


def _read(plan: Plan, logits: torch.Tensor, target: torch.Tensor, programs: int) -> _Read:
    """The step before the moments, of which ``programs`` leave sums of the cross entropy."""
    if programs > 0:
        return _Read(plan, None, programs)
    arguments = {
        "logits_strides": strides(logits),
        "target_strides": strides(target),
        "channels": plan.classes,
        "height": plan.height,
        "width": plan.width,
        "IGNORED": plan.ignored,
        "enable_fp_fusion": True,
    }
    if plan.has_maps:
        arguments |= {
            "pooled_height": plan.rows,
            "pooled_width": plan.columns,
            "DROP": plan.options.pools and plan.options.drops,
        }
    if plan.has_maps and not plan.options.samples:
        cells = cell_arguments("rmi_pool", plan, logits)
        cells["FLAT"] = is_flat(logits, target)
        grid = cell_grid(plan.images, plan.classes, plan.width, cells)
        # Cells begin anywhere: they are moved pixel by pixel.
        pool = PreparedLaunch(_rmi_pool_kernel, grid, {**arguments, **cells}, aligned=False)
        return _Read(plan, pool, math.prod(grid))
    if plan.has_maps:
        return _sample(plan, logits, arguments)
    launch = configuration_of("rmi_cross_entropy", plan, logits, 1, LANES=256, ROWS=8)
    strips = _strips(plan, int(launch["LANES"]), int(launch["ROWS"]))
    # Here and in what follows values are moved one by one, wherever they begin.
    read = PreparedLaunch(
        _rmi_cross_entropy_kernel, (strips,), {**arguments, **launch}, aligned=False
    )
    return _Read(plan, read, strips)


def _sample(plan: Plan, logits: torch.Tensor, arguments: dict[str, Any]) -> _Read:
    """The step that reads cells at a place; its first programs add up the cross entropy."""
    size = plan.options.pool_size
    launch = configuration_of("rmi_sample", plan, logits, size, LANES=128, num_warps=2)
    blocks = triton.cdiv(plan.columns, int(launch["LANES"]))
    strips = _strips(plan, int(launch["LANES"]), 8)
    own = {
        "row_step": plan.height / plan.rows,
        "column_step": plan.width / plan.columns,
        "parts": strips,
        "ROWS": 8,
    }
    grid = (strips + plan.images * plan.rows * blocks,)
    sample = PreparedLaunch(_rmi_sample_kernel, grid, {**arguments, **own, **launch}, aligned=False)
    return _Read(plan, sample, strips)


def _strips(plan: Plan, lanes: int, rows: int) -> int:
    """The number of strips, of ``rows`` rows and ``lanes`` columns, in all images."""
    down, across = -(-plan.height // rows), -(-plan.width // lanes)
    return plan.images * down * across


# --- moments --------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """The moments of all planes, and what they were taken about and over."""

    matrices: torch.Tensor  # [N * C, chunks, 2 d + 1, 2 d + 1] float64, or cells of lag sums
    center: torch.Tensor  # [N * C], or empty: the moments are not centred
    kept: torch.Tensor  # [N, regions down, regions across] uint8, or empty: all


class _LagMoments(NamedTuple):
    """Moments by lag sums, over the core and over the lines and corners of the frame.

    Where these kernels read logits, they add up the cross entropy too.
    """

    plan: Plan
    reading: Reading
    core: PreparedLaunch
    frame: PreparedLaunch
    sums_shape: tuple[int, int, int]
    cells_shape: tuple[int, int, int]
    programs: int  # how many leave partial sums of the cross entropy

    def run(self, first: torch.Tensor, second: torch.Tensor, maps: _Maps) -> _Moments:
        planes = self.plan.planes if self.reading.centred else 0
        center = first.new_empty(planes, dtype=self.plan.arithmetic)
        sums = first.new_empty(self.sums_shape, dtype=torch.float64)
        cells = first.new_empty(self.cells_shape, dtype=torch.float64)
        tensors = {
            "first_ptr": first,
            "second_ptr": second,
            "center_ptr": center,
            "lags_ptr": sums,
            "partials_ptr": maps.partials,
        }
        self.core(**tensors)
        self.frame(**tensors, cells_ptr=cells)
        return _Moments(cells, center, first.new_empty(0, dtype=torch.uint8))

    @property
    def form(self) -> dict[str, Any]:
        """Launch arguments of a kernel that reads the moments."""
        return {
            "chunks": self.plan.region_rows * self.plan.region_columns,
            "cells": self.cells_shape[1],
            "centred": int(self.reading.centred),
            "middle": self.reading.middle,
        }


def _lag_moments(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _LagMoments:
    """The step that sums by lags: the launch over the core, and that over the frame."""
    region = plan.options.region_size
    span = 2 * region - 1
    lags = 4 * region * span + 2
    centred = not _sums_in_double(plan, logits.device)
    middle = 0.0 if centred or plan.has_maps else 0.5
    launch = core_strip("rmi_moments", plan, logits, target)
    strip = launch["STRIP"]
    bands = triton.cdiv(plan.rows - span + 1, strip.rows)
    blocks = triton.cdiv(plan.columns - span + 1, strip.lanes * strip.columns)
    strips = bands * blocks
    # Larger regions have too many lags and corners for the registers of one warp.
    depth, warps = (region, 1) if region < 4 else (1, 4 if region > 4 and plan.has_maps else 2)
    line = strip._replace(depth=depth, columns=1, lanes=32 * warps, rows=1, grain=1)
    lines = (4 * (region - 1) + strip.spare + 1) * (region // line.depth)
    programs = 0 if plan.has_maps else plan.planes * (strips + lines)
    arguments = feature_arguments(plan, logits, target)
    reading = arguments["READING"]._replace(centred=centred, middle=middle)
    arguments |= {"height": plan.rows, "width": plan.columns, "READING": reading}
    arguments |= {"parts": programs}
    # From a region of 4 on, not all sums fit the registers: each strip has two programs.
    grid = (plan.planes, bands, blocks if region < 4 else 2 * blocks)
    core = {**arguments, "bands": bands, **launch}
    frame = {**arguments, "strips": strips, "STRIP": line, "num_warps": warps}
    return _LagMoments(
        plan,
        reading,
        PreparedLaunch(_rmi_lags_kernel, grid, core, aligned=False),  # the strip says what is
        PreparedLaunch(_rmi_frame_kernel, (plan.planes, lines), frame, aligned=False),
        (plan.planes, strips, lags),
        (plan.planes, span**2 + strip.spare, lags),
        programs,
    )


def _sums_in_double(plan: Plan, device: torch.device) -> bool:
    """Whether lag sums are float64: not where the GPU is slow at it, with 1/64 of its speed.

    The data-centre GPUs of NVIDIA (8.0, 9.0, 10.0) and of AMD (gfx9) are fast.
    """
    precision = plan.options.precision
    if precision is not None or device.type != "cuda":
        return precision != "float32"
    if torch.version.hip is not None:
        return "gfx9" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


class _DirectMoments(NamedTuple):
    """Moments by all products of all regions."""

    plan: Plan
    regions: PreparedLaunch | None  # which of them are kept
    products: PreparedLaunch
    chunks: int
    center_dtype: torch.dtype
    programs: int = 0  # none leaves partial sums of the cross entropy

    def run(self, first: torch.Tensor, second: torch.Tensor, maps: _Maps) -> _Moments:
        plan = self.plan
        shape = (plan.planes, self.chunks, plan.side, plan.side)
        matrices = first.new_empty(shape, dtype=torch.float64)
        kept = first.new_empty(plan.kept_shape, dtype=torch.uint8)
        if self.regions is not None:
            self.regions(target_ptr=maps.marks, kept_ptr=kept)
        self.products(first_ptr=first, second_ptr=second, kept_ptr=kept, moments_ptr=matrices)
        center = first.new_empty(0, dtype=self.center_dtype)
        return _Moments(matrices, center, kept)

    @property
    def form(self) -> dict[str, Any]:
        """Launch arguments of a kernel that reads the moments."""
        return {"chunks": self.chunks, "cells": 0, "centred": 0, "middle": 0.0}


def _direct_moments(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _DirectMoments:
    """The step that forms every product of every region, or of those that are kept."""
    rows, columns = plan.region_rows, plan.region_columns
    chunks = min(16, triton.cdiv(rows * columns, 1024))
    shared = {"window_rows": rows, "window_columns": columns}
    regions = None
    if plan.options.drops:
        pools = plan.options.pools
        marks = contiguous_strides(plan.mark_shape) if pools else strides(target)
        arguments = {
            "target_strides": marks,
            "channels": plan.classes,
            "REGION": plan.options.region_size,
            "LANES": 128,
            "IGNORED": plan.ignored,
            "POOLED": pools,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        grid = (plan.images * rows, triton.cdiv(columns, 128))
        regions = PreparedLaunch(_rmi_regions_kernel, grid, {**shared, **arguments}, aligned=False)
    products = PreparedLaunch(
        _rmi_direct_moments_kernel,
        (plan.planes, plan.side, chunks),
        {
            **shared,
            **feature_arguments(plan, logits, target),
            "chunks": chunks,
            "REGION": plan.options.region_size,
            "BLOCK": 16,  # 32 would spill two registers on some targets
            "DROP": plan.options.drops,
            "num_warps": 4,
        },
        aligned=False,
    )
    return _DirectMoments(plan, regions, products, chunks, compute_dtype(logits.dtype))


# --- head -----------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """The step from moments and cross entropy to the loss, and to the weights of the gradient."""

    plan: Plan
    launch: PreparedLaunch

    def run(
        self, moments: _Moments, partials: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, info, statistics, weights) for logits of a dtype."""
        plan, matrices = self.plan, moments.matrices
        loss = matrices.new_empty((), dtype=compute_dtype(dtype))
        info = matrices.new_empty((plan.images, plan.classes), dtype=torch.int32)
        statistics = matrices.new_empty(1)
        weights = matrices.new_empty(plan.weights_shape)
        sums = sums_over(plan.planes, 1, matrices.device)
        self.launch(
            moments_ptr=matrices,
            center_ptr=moments.center,
            partials_ptr=partials,
            info_ptr=info,
            weights_ptr=weights,
            loss_ptr=loss,
            statistics_ptr=statistics,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
        )
        if plan.options.group is not None:
            images = torch.full_like(statistics, plan.images)
            totals = torch.cat((partials.sum(1), sums["scratch_ptr"][:1], images))
            weights *= plan.images * add_other_ranks(totals, plan.options, loss, statistics)
        return loss, info, statistics, weights


def add_other_ranks(
    totals: torch.Tensor, options: Options, loss: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    """An image's share in the gradient of RMI; the loss and statistics become those of all ranks.

    ``totals`` are this rank's sums of the cross entropy, its valid pixels, the information of its
    images, and their number; float64.
    """
    assert options.group is not None
    ranks = add_over_ranks(totals, options.group)
    entropy, valid, information, images = totals.unbind()
    entropy_scale = options.bce_weight / (valid + options.bce_smooth).clamp(min=1.0)
    mutual = (1.0 - options.bce_weight) * information / images.clamp(min=1.0)
    loss.copy_(torch.where(valid > 0, entropy_scale * entropy + mutual, 0.0))
    statistics.copy_(ranks * entropy_scale)
    return ranks / images.clamp(min=1.0)


def _head(plan: Plan, parts: int, form: dict[str, Any]) -> _Head:
    """The last step, for so many partial sums of the cross entropy and moments of a form."""
    options = plan.options
    warps = {1: 1, 5: 4}.get(options.region_size, 2)
    arguments = {
        "programs": plan.planes,
        **form,
        "parts": parts,
        "images": plan.images,
        "epsilon": options.epsilon,
        "bce_weight": options.bce_weight,
        "rmi_weight": 1.0 - options.bce_weight,
        "bce_smooth": options.bce_smooth,
        "REGION": options.region_size,
        "CELL": options.cell,
        "MEAN": options.moments == "mean",
        # Smaller for two warps, and ptxas takes no more than 96 registers and spills two.
        "BLOCK": (1024 if warps == 2 else 512) * warps,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    return _Head(plan, PreparedLaunch(_rmi_head_kernel, (plan.planes,), arguments))
