"""Forward pass of region mutual information: which kernels it runs, on what, in which order.

The mathematics stands in region_mutual_information.py.
"""

from __future__ import annotations

import math

import torch
import triton

from kernels_reference.region_mutual_information import pooled_size

from .._core.backend import device_guard
from .._engine.strips import compute_dtype
from .features import Reading
from .head_kernels import _rmi_finish_kernel, _rmi_head_kernel
from .moments_kernels import (
    _rmi_center_kernel,
    _rmi_direct_moments_kernel,
    _rmi_frame_kernel,
    _rmi_lags_kernel,
    _rmi_regions_kernel,
)
from .plan import (
    Maps,
    Options,
    Saved,
    arithmetic_dtype,
    cell_grid,
    cells_of,
    has_maps,
    ignored,
    is_direct,
    launch_of,
    maps_of,
    strides,
    sums_in_double,
)
from .pooling_kernels import _rmi_cross_entropy_kernel, _rmi_pool_kernel, _rmi_sample_kernel


def _pool(
    options: Options, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, labels, touched, partials): the pooled maps, and the sums of the cross entropy."""
    batch, channels, height, width = logits.shape
    pooled = pooled_size(height, width, options.pooling, options.pool_size)
    dtype = arithmetic_dtype(options, logits)
    residual = torch.empty((batch, channels, *pooled), dtype=dtype, device=logits.device)
    labels = torch.empty_like(residual, dtype=torch.float16)  # whole numbers up to 64: exact
    drop = options.ignore == "drop"
    touched = torch.empty(
        (batch, *pooled) if drop else (0,), dtype=torch.uint8, device=logits.device
    )
    if options.samples:
        _sample(options, logits, target, residual, labels, touched)
        return residual, labels, touched, _cross_entropy(options, logits, target)
    launch = cells_of("rmi_pool", options, logits, dtype)
    grid = cell_grid(logits, launch)
    partials = torch.empty((2, math.prod(grid)), dtype=dtype, device=logits.device)
    _rmi_pool_kernel[grid](
        logits_ptr=logits,
        target_ptr=target,
        residual_ptr=residual,
        labels_ptr=labels,
        touched_ptr=touched,
        partials_ptr=partials,
        logits_strides=strides(logits),
        target_strides=strides(target),
        channels=channels,
        height=height,
        width=width,
        pooled_height=pooled[0],
        pooled_width=pooled[1],
        DROP=drop,
        IGNORED=ignored(options, logits, target),
        **launch,
    )
    return residual, labels, touched, partials


def _sample(
    options: Options,
    logits: torch.Tensor,
    target: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
    touched: torch.Tensor,
) -> None:
    batch, channels, pooled_height, pooled_width = residual.shape
    launch = launch_of(
        "rmi_sample", logits, residual.dtype, options.pool_size, LANES=128, num_warps=2
    )
    blocks = triton.cdiv(pooled_width, int(launch["LANES"]))
    _rmi_sample_kernel[(batch * pooled_height, blocks)](
        logits_ptr=logits,
        target_ptr=target,
        residual_ptr=residual,
        labels_ptr=labels,
        touched_ptr=touched,
        logits_strides=strides(logits),
        target_strides=strides(target),
        channels=channels,
        height=logits.size(2),
        width=logits.size(3),
        pooled_height=pooled_height,
        pooled_width=pooled_width,
        row_step=logits.size(2) / pooled_height,
        column_step=logits.size(3) / pooled_width,
        DROP=options.ignore == "drop",
        IGNORED=ignored(options, logits, target),
        **launch,
        enable_fp_fusion=True,
    )


def _cross_entropy(options: Options, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Partial sums [2, programs] of the cross entropy and of the valid pixels."""
    batch, channels, height, width = logits.shape
    dtype = arithmetic_dtype(options, logits)
    launch = launch_of("rmi_cross_entropy", logits, dtype, 1, LANES=256, ROWS=8)
    lanes, rows = int(launch["LANES"]), int(launch["ROWS"])
    grid = (batch, triton.cdiv(height, rows), triton.cdiv(width, lanes))
    partials = torch.empty((2, math.prod(grid)), dtype=dtype, device=logits.device)
    _rmi_cross_entropy_kernel[grid](
        logits_ptr=logits,
        target_ptr=target,
        partials_ptr=partials,
        logits_strides=strides(logits),
        target_strides=strides(target),
        channels=channels,
        height=height,
        width=width,
        IGNORED=ignored(options, logits, target),
        **launch,
        enable_fp_fusion=True,
    )
    return partials


def _center(maps: Maps, statistics: torch.Tensor) -> torch.Tensor:
    """An approximate mean of p in each plane, [N * C]."""
    center = statistics.new_empty(maps.first.size(0) * maps.first.size(1))
    _rmi_center_kernel[(center.numel(),)](
        **maps.arguments,
        center_ptr=center,
        height=maps.height,
        width=maps.width,
        num_warps=4,
    )
    return center


def _lag_moments(
    options: Options, logits: torch.Tensor, maps: Maps, center: torch.Tensor
) -> torch.Tensor:
    """[N * C, 1, 2 d + 1, 2 d + 1] by lag sums and frame corrections; centred if there is one."""
    region = options.region_size
    span = 2 * region - 1
    half = region + (region - 1) * span
    lags = 2 * half + span * span + 2
    planes = logits.size(0) * logits.size(1)
    # Eight warps: with four, ptxas stops at 168 registers for a region of 4 and spills two.
    lanes = 256 if region == 4 else 128
    launch = launch_of(
        "rmi_moments", logits, center.dtype, region, LANES=lanes, ROWS=64, num_warps=lanes // 32
    )
    bands = triton.cdiv(maps.height - span + 1, int(launch["ROWS"]))
    blocks = triton.cdiv(maps.width - span + 1, int(launch["LANES"]))
    side = 2 * region * region + 1
    sums = torch.empty((planes, bands * blocks, lags), dtype=torch.float64, device=logits.device)
    moments = torch.empty((planes, 1, side, side), dtype=torch.float64, device=logits.device)
    arguments = {
        **maps.arguments,
        "READING": Reading(maps.pooled, maps.ignored, center.numel() > 0),
    }
    # All sums of a region of 4 would not fit the registers: two passes.
    for own, cross in ((True, True),) if region < 4 else ((True, False), (False, True)):
        _rmi_lags_kernel[(planes, bands, blocks)](
            **arguments,
            center_ptr=center,
            lags_ptr=sums,
            height=maps.height,
            width=maps.width,
            bands=bands,
            REGION=region,
            OWN=own,
            CROSS=cross,
            **launch,
        )
    # As few as do not spill.
    warps = 4 if region == 5 else 2 if region >= 3 and not maps.pooled else 1
    _rmi_frame_kernel[(planes, lags)](
        **arguments,
        center_ptr=center,
        lags_ptr=sums,
        moments_ptr=moments,
        height=maps.height,
        width=maps.width,
        parts=bands * blocks,
        REGION=region,
        BLOCK=32,
        num_warps=warps,
    )
    return moments


def _direct_moments(
    options: Options, logits: torch.Tensor, maps: Maps, touched: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(moments [N * C, chunks, 2 d + 1, 2 d + 1], kept regions) by all products of all regions."""
    region = options.region_size
    batch, channels = logits.shape[:2]
    side = 2 * region * region + 1
    rows, columns = maps.height - region + 1, maps.width - region + 1
    kept = torch.ones((batch, rows, columns), dtype=torch.uint8, device=logits.device)
    if options.ignore == "drop":
        marks = touched if maps.pooled else maps.second
        _rmi_regions_kernel[(batch * rows, triton.cdiv(columns, 128))](
            target_ptr=marks,
            kept_ptr=kept,
            target_strides=strides(marks),
            channels=channels,
            window_rows=rows,
            window_columns=columns,
            REGION=region,
            LANES=128,
            IGNORED=maps.ignored,
            POOLED=maps.pooled,
            num_warps=4,
            enable_fp_fusion=True,
        )
    chunks = min(16, triton.cdiv(rows * columns, 1024))
    moments = torch.empty(
        (batch * channels, chunks, side, side), dtype=torch.float64, device=logits.device
    )
    _rmi_direct_moments_kernel[(batch * channels, side, chunks)](
        **maps.arguments,
        kept_ptr=kept,
        moments_ptr=moments,
        chunks=chunks,
        window_rows=rows,
        window_columns=columns,
        REGION=region,
        BLOCK=32,
        num_warps=8,
    )
    return moments, kept


def _head(
    options: Options, moments: torch.Tensor, center: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(information [N * C], info [N * C], and the weights of the backward pass), one launch."""
    planes, area = moments.size(0), options.region_size**2
    information = moments.new_empty(planes)
    info = moments.new_empty(planes, dtype=torch.int32)
    residual_weights = moments.new_empty(planes, area, area)
    label_weights = moments.new_empty(planes, area, area)
    constants = moments.new_empty(planes, area)
    _rmi_head_kernel[(planes,)](
        moments_ptr=moments,
        center_ptr=center,
        information_ptr=information,
        info_ptr=info,
        residual_weights_ptr=residual_weights,
        label_weights_ptr=label_weights,
        constants_ptr=constants,
        chunks=moments.size(1),
        epsilon=options.epsilon,
        REGION=options.region_size,
        CELL=options.cell,
        MEAN=options.moments == "mean",
        CENTRED=center.numel() > 0,
        num_warps={1: 1, 5: 4}.get(options.region_size, 2),
        enable_fp_fusion=True,
    )
    return information, info, residual_weights, label_weights, constants


def forward_pass(
    options: Options, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    """(loss, info [N, C], what the backward pass needs)."""
    batch, channels = logits.shape[:2]
    loss = torch.empty((), dtype=compute_dtype(logits.dtype), device=logits.device)
    statistics = loss.new_empty(1, dtype=arithmetic_dtype(options, logits))
    with device_guard(logits):
        if has_maps(options, *logits.shape[2:]):
            residual, labels, touched, partials = _pool(options, logits, target)
        else:
            residual = statistics.new_empty(0)
            labels = statistics.new_empty(0, dtype=torch.float16)
            touched = statistics.new_empty(0, dtype=torch.uint8)
            partials = _cross_entropy(options, logits, target)
        maps = maps_of(options, logits, target, residual, labels)
        center = statistics.new_empty(0)
        if is_direct(options, *logits.shape[2:]):
            moments, kept = _direct_moments(options, logits, maps, touched)
        else:
            if not sums_in_double(options, logits):
                center = _center(maps, statistics)
            moments = _lag_moments(options, logits, maps, center)
            kept = statistics.new_empty(0, dtype=torch.uint8)
        information, info, *weights = _head(options, moments, center)
        _rmi_finish_kernel[(1,)](
            partials_ptr=partials,
            information_ptr=information,
            loss_ptr=loss,
            statistics_ptr=statistics,
            programs=partials.size(1),
            planes=information.numel(),
            images=batch,
            bce_weight=options.bce_weight,
            rmi_weight=1.0 - options.bce_weight,
            bce_smooth=options.bce_smooth,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    by_class = (weight.view(batch, channels, *weight.shape[1:]) for weight in weights)
    saved = Saved(statistics, residual, labels, kept, *by_class)
    return loss, info.view(batch, channels), saved
