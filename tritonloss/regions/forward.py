"""Forward pass of region mutual information: which kernels it runs, on what, in which order.

Logits and labels are read into maps and a cross entropy, the maps become moments, and the head
makes the loss of both. The mathematics stands in region_mutual_information.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch
from .._engine.planes import compute_dtype
from .._engine.sums import sums_over
from .head_kernels import _rmi_head_kernel
from .moments_kernels import (
    _rmi_center_kernel,
    _rmi_direct_moments_kernel,
    _rmi_frame_kernel,
    _rmi_lags_kernel,
    _rmi_regions_kernel,
)
from .plan import (
    Options,
    Plan,
    Saved,
    cell_arguments,
    cell_grid,
    configuration_of,
    contiguous_strides,
    feature_arguments,
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
        moments = steps.moments.run(first, second, maps.touched if has_maps else target)
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
    moments: _LagMoments | _DirectMoments
    if plan.is_direct:
        moments = _direct_moments(plan, logits, target)
        chunks, centred = moments.chunks, False
    else:
        moments = _lag_moments(plan, logits, target)
        chunks, centred = 1, moments.center is not None
    read = _read(plan, logits, target)
    return _Forward(plan, read, moments, _head(plan, chunks, read.programs, centred))


# --- maps and cross entropy -----------------------------------------------------------------------


class _Maps(NamedTuple):
    """What is made of logits and labels at their resolution."""

    residual: torch.Tensor  # [N, C, h, w], or empty
    labels: torch.Tensor  # [N, C, h, w] float16, or empty
    touched: torch.Tensor  # [N, h, w] uint8: whether a cell holds an invalid pixel; or empty
    partials: torch.Tensor  # [2, programs]: sums of the cross entropy and of the valid pixels


class _Read(NamedTuple):
    """Makes the maps and the cross entropy: in one launch, unless cells are read at a place."""

    plan: Plan
    pool: PreparedLaunch | None
    sample: PreparedLaunch | None
    cross_entropy: PreparedLaunch | None
    programs: int  # that leave partial sums

    def run(self, logits: torch.Tensor, target: torch.Tensor) -> _Maps:
        plan = self.plan
        shape = plan.map_shape if plan.has_maps else (0,)
        marks = plan.mark_shape if plan.has_maps and plan.options.drops else (0,)
        residual = logits.new_empty(shape, dtype=plan.arithmetic)
        labels = logits.new_empty(shape, dtype=torch.float16)  # whole numbers up to 64: exact
        touched = logits.new_empty(marks, dtype=torch.uint8)
        partials = logits.new_empty((2, self.programs), dtype=plan.arithmetic)
        if self.pool is not None:
            self.pool(
                logits_ptr=logits,
                target_ptr=target,
                residual_ptr=residual,
                labels_ptr=labels,
                touched_ptr=touched,
                partials_ptr=partials,
            )
        if self.sample is not None:
            self.sample(
                logits_ptr=logits,
                target_ptr=target,
                residual_ptr=residual,
                labels_ptr=labels,
                touched_ptr=touched,
            )
        if self.cross_entropy is not None:
            self.cross_entropy(logits_ptr=logits, target_ptr=target, partials_ptr=partials)
        return _Maps(residual, labels, touched, partials)


def _read(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _Read:
    shared = {
        "logits_strides": strides(logits),
        "target_strides": strides(target),
        "channels": plan.classes,
        "height": plan.height,
        "width": plan.width,
        "IGNORED": plan.ignored,
        "enable_fp_fusion": True,
    }
    pooled = {
        **shared,
        "pooled_height": plan.rows,
        "pooled_width": plan.columns,
        "DROP": plan.options.drops,
    }
    if plan.has_maps and not plan.options.samples:
        cells = cell_arguments("rmi_pool", plan, logits)
        grid = cell_grid(plan.images, plan.classes, plan.width, cells)
        pool = PreparedLaunch(_rmi_pool_kernel, grid, {**pooled, **cells})
        return _Read(plan, pool, None, None, math.prod(grid))
    sample = _sample(plan, logits, pooled) if plan.has_maps else None
    launch = configuration_of("rmi_cross_entropy", plan, logits, 1, LANES=256, ROWS=8)
    bands = triton.cdiv(plan.height, int(launch["ROWS"]))
    grid = (plan.images, bands, triton.cdiv(plan.width, int(launch["LANES"])))
    cross_entropy = PreparedLaunch(_rmi_cross_entropy_kernel, grid, {**shared, **launch})
    return _Read(plan, None, sample, cross_entropy, math.prod(grid))


def _sample(plan: Plan, logits: torch.Tensor, arguments: dict[str, Any]) -> PreparedLaunch:
    size = plan.options.pool_size
    launch = configuration_of("rmi_sample", plan, logits, size, LANES=128, num_warps=2)
    steps = {
        "row_step": plan.height / plan.rows,
        "column_step": plan.width / plan.columns,
    }
    grid = (plan.images * plan.rows, triton.cdiv(plan.columns, int(launch["LANES"])))
    return PreparedLaunch(_rmi_sample_kernel, grid, {**arguments, **steps, **launch})


# --- moments --------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """The moments of all planes, and what they were taken of."""

    matrices: torch.Tensor  # [N * C, chunks, 2 d + 1, 2 d + 1] float64
    center: torch.Tensor  # [N * C], or empty: the moments are not centred
    kept: torch.Tensor  # [N, regions down, regions across] uint8, or empty: all


class _LagMoments(NamedTuple):
    """By lag sums over the core and corrections for the frame."""

    plan: Plan
    center: PreparedLaunch | None
    passes: tuple[PreparedLaunch, ...]
    frame: PreparedLaunch
    sums_shape: tuple[int, int, int]

    def run(self, first: torch.Tensor, second: torch.Tensor, _: torch.Tensor) -> _Moments:
        plan = self.plan
        planes = plan.planes if self.center is not None else 0
        center = first.new_empty(planes, dtype=plan.arithmetic)
        sums = first.new_empty(self.sums_shape, dtype=torch.float64)
        matrices = first.new_empty((plan.planes, 1, plan.side, plan.side), dtype=torch.float64)
        if self.center is not None:
            self.center(first_ptr=first, second_ptr=second, center_ptr=center)
        for lags in self.passes:
            lags(first_ptr=first, second_ptr=second, center_ptr=center, lags_ptr=sums)
        self.frame(
            first_ptr=first,
            second_ptr=second,
            center_ptr=center,
            lags_ptr=sums,
            moments_ptr=matrices,
        )
        return _Moments(matrices, center, first.new_empty(0, dtype=torch.uint8))


def _lag_moments(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _LagMoments:
    region = plan.options.region_size
    span = 2 * region - 1
    lags = 2 * (region + (region - 1) * span) + span * span + 2
    centred = not _sums_in_double(plan, logits.device)
    arguments = feature_arguments(plan, logits, target)
    arguments |= {"height": plan.rows, "width": plan.columns}
    center = None
    if centred:
        center = PreparedLaunch(_rmi_center_kernel, (plan.planes,), {**arguments, "num_warps": 4})
    arguments["REGION"] = region
    arguments["READING"] = plan.reading._replace(centred=centred)
    # Eight warps: with four, ptxas stops at 168 registers for a region of 4 and spills two.
    lanes = 256 if region == 4 else 128
    launch = configuration_of(
        "rmi_moments", plan, logits, region, LANES=lanes, ROWS=64, num_warps=lanes // 32
    )
    bands = triton.cdiv(plan.rows - span + 1, int(launch["ROWS"]))
    blocks = triton.cdiv(plan.columns - span + 1, int(launch["LANES"]))
    # All sums of a region of 4 would not fit the registers: two passes.
    passes = tuple(
        PreparedLaunch(
            _rmi_lags_kernel,
            (plan.planes, bands, blocks),
            {**arguments, **launch, "bands": bands, "OWN": own, "CROSS": cross},
        )
        for own, cross in (((True, True),) if region < 4 else ((True, False), (False, True)))
    )
    # As few as do not spill.
    warps = 4 if region == 5 else 2 if region >= 3 and not plan.has_maps else 1
    frame = PreparedLaunch(
        _rmi_frame_kernel,
        (plan.planes, lags),
        {**arguments, "parts": bands * blocks, "BLOCK": 32, "num_warps": warps},
    )
    return _LagMoments(plan, center, passes, frame, (plan.planes, bands * blocks, lags))


def _sums_in_double(plan: Plan, device: torch.device) -> bool:
    """Whether lag sums are float64: where the GPU is slow at that (1/64), they are float32.

    The data-centre GPUs of NVIDIA (8.0, 9.0, 10.0) and of AMD (gfx9) are fast.
    """
    precision = plan.options.precision
    if precision is not None or device.type != "cuda":
        return precision != "float32"
    if torch.version.hip is not None:
        return "gfx9" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


class _DirectMoments(NamedTuple):
    """By all products of all regions."""

    plan: Plan
    regions: PreparedLaunch | None  # which of them are kept
    products: PreparedLaunch
    chunks: int

    def run(self, first: torch.Tensor, second: torch.Tensor, marks: torch.Tensor) -> _Moments:
        plan = self.plan
        shape = (plan.planes, self.chunks, plan.side, plan.side)
        matrices = first.new_empty(shape, dtype=torch.float64)
        kept = first.new_empty(plan.kept_shape, dtype=torch.uint8)
        if self.regions is not None:
            self.regions(target_ptr=marks, kept_ptr=kept)
        self.products(first_ptr=first, second_ptr=second, kept_ptr=kept, moments_ptr=matrices)
        return _Moments(matrices, first.new_empty(0, dtype=plan.arithmetic), kept)


def _direct_moments(plan: Plan, logits: torch.Tensor, target: torch.Tensor) -> _DirectMoments:
    rows, columns = plan.region_rows, plan.region_columns
    chunks = min(16, triton.cdiv(rows * columns, 1024))
    shared = {"window_rows": rows, "window_columns": columns}
    regions = None
    if plan.options.drops:
        marks = contiguous_strides(plan.mark_shape) if plan.has_maps else strides(target)
        arguments = {
            "target_strides": marks,
            "channels": plan.classes,
            "REGION": plan.options.region_size,
            "LANES": 128,
            "IGNORED": plan.ignored,
            "POOLED": plan.has_maps,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        grid = (plan.images * rows, triton.cdiv(columns, 128))
        regions = PreparedLaunch(_rmi_regions_kernel, grid, {**shared, **arguments})
    products = PreparedLaunch(
        _rmi_direct_moments_kernel,
        (plan.planes, plan.side, chunks),
        {
            **shared,
            **feature_arguments(plan, logits, target),
            "chunks": chunks,
            "REGION": plan.options.region_size,
            "BLOCK": 32,
            "DROP": plan.options.drops,
            "num_warps": 8,
        },
    )
    return _DirectMoments(plan, regions, products, chunks)


# --- head -----------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """Makes the loss of moments and cross entropy, and what the gradient needs of the matrices."""

    plan: Plan
    launch: PreparedLaunch

    def run(
        self, moments: _Moments, partials: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, info, statistics, weights) for logits of a dtype."""
        plan, matrices = self.plan, moments.matrices
        loss = matrices.new_empty((), dtype=compute_dtype(dtype))
        info = matrices.new_empty((plan.images, plan.classes), dtype=torch.int32)
        statistics = matrices.new_empty(1, dtype=plan.arithmetic)
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
        return loss, info, statistics, weights


def _head(plan: Plan, chunks: int, parts: int, centred: bool) -> _Head:
    options = plan.options
    warps = {1: 1, 5: 4}.get(options.region_size, 2)
    in_double = plan.arithmetic == torch.float64
    arguments = {
        "programs": plan.planes,
        "chunks": chunks,
        "parts": parts,
        "images": plan.images,
        "epsilon": options.epsilon,
        "bce_weight": options.bce_weight,
        "rmi_weight": 1.0 - options.bce_weight,
        "bce_smooth": options.bce_smooth,
        "REGION": options.region_size,
        "CELL": options.cell,
        "MEAN": options.moments == "mean",
        "CENTRED": centred,
        # More in float64, or ptxas stops at 96 registers and spills two.
        "BLOCK": (1024 if in_double and warps == 2 else 512) * warps,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    return _Head(plan, PreparedLaunch(_rmi_head_kernel, (plan.planes,), arguments))
