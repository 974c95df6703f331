"""Launchers of region mutual information: which kernels a pass runs, on what, in which order.

The mathematics stands in region_mutual_information.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from kernels_reference.region_mutual_information import pooled_size

from ._backend import device_guard
from ._region_gradient_kernels import (
    _rmi_border_kernel,
    _rmi_direct_gradient_kernel,
    _rmi_interior_kernel,
    _rmi_taps_kernel,
)
from ._region_head_kernels import _rmi_finish_kernel, _rmi_head_kernel
from ._region_moments_kernels import (
    _rmi_direct_moments_kernel,
    _rmi_frame_kernel,
    _rmi_lags_kernel,
    _rmi_regions_kernel,
)
from ._region_pooling_kernels import (
    _rmi_cross_entropy_kernel,
    _rmi_expand_kernel,
    _rmi_pool_kernel,
    _rmi_sample_backward_kernel,
    _rmi_sample_kernel,
)
from ._strip import compute_dtype
from ._tuning import Configuration, TuningCase, launch_configuration

# --- options and maps -----------------------------------------------------------------------------


class Options(NamedTuple):
    """The options of the loss, as they pass through the operators."""

    region_size: int
    pooling: str | None
    pool_size: int
    moments: str
    epsilon: float
    bce_weight: float
    ignore: str
    ignore_index: int | None
    precision: str | None

    @property
    def pools(self) -> bool:
        """Whether there are pooled maps."""
        return self.pooling is not None and self.pool_size > 1

    @property
    def cell(self) -> int:
        """By how much the pooled maps are to be divided: they hold sums for "avg"."""
        return self.pool_size**2 if self.pools and self.pooling == "avg" else 1


class Maps(NamedTuple):
    """What the regions are taken from: pooled maps, or the logits and the labels themselves."""

    first: torch.Tensor
    second: torch.Tensor
    height: int
    width: int
    pooled: bool

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """The launch arguments that lead through both tensors."""
        return {"first_strides": _strides(self.first), "second_strides": _strides(self.second)}


class Head(NamedTuple):
    """What the head leaves for the backward pass, per (image, class)."""

    residual_weights: torch.Tensor  # [N * C, d, d]
    label_weights: torch.Tensor  # [N * C, d, d]
    constants: torch.Tensor  # [N * C, d]


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, channel, row and column; label maps have the channel stride 0."""
    stride = tensor.stride()
    return stride if tensor.dim() == 4 else (stride[0], 0, stride[1], stride[2])


def _ignored_class(options: Options, logits: torch.Tensor) -> int:
    """The ignore label if it would otherwise be a class, else -1: the range check does the rest."""
    index = options.ignore_index
    return index if index is not None and 0 <= index < logits.size(1) else -1


def _maps(
    options: Options,
    logits: torch.Tensor,
    target: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
) -> Maps:
    if options.pools:
        return Maps(residual, labels, residual.size(2), residual.size(3), True)
    return Maps(logits, target, logits.size(2), logits.size(3), False)


def is_direct(options: Options, height: int, width: int) -> bool:
    """Whether the moments take every product of every region: no lag sums."""
    return options.ignore == "drop" or min(height, width) < 2 * options.region_size - 1


def _sums_in_double(options: Options, logits: torch.Tensor) -> bool:
    """Whether lag sums are float64: where the GPU is slow at that (1/64), they are float32.

    The data-centre GPUs of NVIDIA (8.0, 9.0, 10.0) and of AMD (gfx9) are fast.
    """
    if options.precision is not None or logits.device.type != "cuda":
        return options.precision != "float32"
    if torch.version.hip is not None:
        return "gfx9" in torch.cuda.get_device_properties(logits.device).gcnArchName
    return torch.cuda.get_device_capability(logits.device) in ((8, 0), (9, 0), (10, 0))


def _configuration(operator: str, logits: torch.Tensor, window: int, **sizes: int) -> Configuration:
    return launch_configuration(
        operator,
        device=logits.device,
        dtype=logits.dtype,
        classes=logits.size(1),
        window=window,
        layout="contiguous" if logits.is_contiguous() else "strided",
        heuristic={**sizes, "num_warps": 4},
    )


# --- launchers: forward ---------------------------------------------------------------------------


def _cells(operator: str, options: Options, logits: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel whose tiles are pooling cells."""
    size = options.pool_size
    side = triton.next_power_of_2(size)
    configuration = _configuration(operator, logits, size, CELLS=max(512 // side, 1))
    return {
        "SIZE": size,
        "SIDE": side,
        "MAXIMUM": options.pooling == "max",
        **configuration,
        "enable_fp_fusion": True,
    }


def _cell_grid(options: Options, logits: torch.Tensor, cells: int) -> tuple[int, tuple[int, ...]]:
    """(rows of cells that cover the image, grid): few programs share out the classes."""
    batch, channels, height, width = logits.shape
    size = options.pool_size
    rows = triton.cdiv(height + size // 2, size)
    blocks = triton.cdiv(triton.cdiv(width + size // 2, size), cells)
    split = min(channels, max(1, 4096 // (batch * rows * blocks)))
    return rows, (batch * rows, blocks, split)


def _pool(
    options: Options, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, labels, touched, partials): the pooled maps, and the sums of the cross entropy."""
    batch, channels, height, width = logits.shape
    pooled = pooled_size(height, width, options.pooling, options.pool_size)
    dtype = compute_dtype(logits.dtype)
    residual = torch.empty((batch, channels, *pooled), dtype=dtype, device=logits.device)
    labels = torch.empty_like(residual)
    drop = options.ignore == "drop"
    touched = torch.empty(
        (batch, *pooled) if drop else (0,), dtype=torch.uint8, device=logits.device
    )
    if options.pooling == "nearest":
        _sample(options, logits, target, residual, labels, touched)
        return residual, labels, touched, _cross_entropy(options, logits, target)
    launch = _cells("rmi_pool", options, logits)
    rows, grid = _cell_grid(options, logits, launch["CELLS"])
    partials = torch.empty((2, math.prod(grid)), dtype=dtype, device=logits.device)
    _rmi_pool_kernel[grid](
        logits_ptr=logits,
        target_ptr=target,
        residual_ptr=residual,
        labels_ptr=labels,
        touched_ptr=touched,
        partials_ptr=partials,
        logits_strides=_strides(logits),
        target_strides=_strides(target),
        channels=channels,
        height=height,
        width=width,
        pooled_height=pooled[0],
        pooled_width=pooled[1],
        cell_rows=rows,
        DROP=drop,
        IGNORED=_ignored_class(options, logits),
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
    configuration = _configuration("rmi_sample", logits, options.pool_size, LANES=128)
    blocks = triton.cdiv(pooled_width, int(configuration["LANES"]))
    _rmi_sample_kernel[(batch * pooled_height, blocks)](
        logits_ptr=logits,
        target_ptr=target,
        residual_ptr=residual,
        labels_ptr=labels,
        touched_ptr=touched,
        logits_strides=_strides(logits),
        target_strides=_strides(target),
        channels=channels,
        height=logits.size(2),
        width=logits.size(3),
        pooled_height=pooled_height,
        pooled_width=pooled_width,
        DROP=options.ignore == "drop",
        IGNORED=_ignored_class(options, logits),
        **configuration,
        enable_fp_fusion=True,
    )


def _cross_entropy(options: Options, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Partial sums [2, programs] of the cross entropy and of the valid pixels."""
    batch, channels, height, width = logits.shape
    configuration = _configuration("rmi_cross_entropy", logits, 1, LANES=256, ROWS=8)
    lanes, rows = int(configuration["LANES"]), int(configuration["ROWS"])
    grid = (batch, triton.cdiv(height, rows), triton.cdiv(width, lanes))
    dtype = compute_dtype(logits.dtype)
    partials = torch.empty((2, math.prod(grid)), dtype=dtype, device=logits.device)
    _rmi_cross_entropy_kernel[grid](
        logits_ptr=logits,
        target_ptr=target,
        partials_ptr=partials,
        logits_strides=_strides(logits),
        target_strides=_strides(target),
        channels=channels,
        height=height,
        width=width,
        IGNORED=_ignored_class(options, logits),
        **configuration,
        enable_fp_fusion=True,
    )
    return partials


def _lag_moments(options: Options, logits: torch.Tensor, maps: Maps) -> torch.Tensor:
    """[N * C, 1, 2 d + 1, 2 d + 1] by lag sums and frame corrections."""
    region = options.region_size
    span = 2 * region - 1
    half = region + (region - 1) * span
    lags = 2 * half + span * span + 2
    planes = logits.size(0) * logits.size(1)
    configuration = _configuration("rmi_moments", logits, region, LANES=128, ROWS=64)
    bands = triton.cdiv(maps.height - span + 1, int(configuration["ROWS"]))
    blocks = triton.cdiv(maps.width - span + 1, int(configuration["LANES"]))
    side = 2 * region * region + 1
    sums = torch.empty((planes, bands * blocks, lags), dtype=torch.float64, device=logits.device)
    moments = torch.empty((planes, 1, side, side), dtype=torch.float64, device=logits.device)
    shared = {
        "first_ptr": maps.first,
        "second_ptr": maps.second,
        "lags_ptr": sums,
        **maps.strides,
        "channels": logits.size(1),
        "height": maps.height,
        "width": maps.width,
        "REGION": region,
        "IGNORED": _ignored_class(options, logits),
        "POOLED": maps.pooled,
        "enable_fp_fusion": True,
    }
    # All sums of a region of 4 would not fit the registers: two passes.
    for own, cross in ((True, True),) if region < 4 else ((True, False), (False, True)):
        _rmi_lags_kernel[(planes, bands, blocks)](
            **shared,
            bands=bands,
            OWN=own,
            CROSS=cross,
            DOUBLE=_sums_in_double(options, logits),
            **configuration,
        )
    _rmi_frame_kernel[(planes, lags)](
        **shared, moments_ptr=moments, parts=bands * blocks, BLOCK=32, num_warps=1
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
        labels = touched if maps.pooled else maps.second
        _rmi_regions_kernel[(batch * rows, triton.cdiv(columns, 128))](
            target_ptr=labels,
            kept_ptr=kept,
            target_strides=_strides(labels),
            channels=channels,
            window_rows=rows,
            window_columns=columns,
            REGION=region,
            LANES=128,
            IGNORED=_ignored_class(options, logits),
            POOLED=maps.pooled,
            num_warps=4,
            enable_fp_fusion=True,
        )
    chunks = min(16, triton.cdiv(rows * columns, 1024))
    moments = torch.empty(
        (batch * channels, chunks, side, side), dtype=torch.float64, device=logits.device
    )
    _rmi_direct_moments_kernel[(batch * channels, side, chunks)](
        first_ptr=maps.first,
        second_ptr=maps.second,
        kept_ptr=kept,
        moments_ptr=moments,
        **maps.strides,
        channels=channels,
        chunks=chunks,
        window_rows=rows,
        window_columns=columns,
        REGION=region,
        BLOCK=32,
        IGNORED=_ignored_class(options, logits),
        POOLED=maps.pooled,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return moments, kept


def _head(options: Options, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """(information [N * C], info [N * C], weights), one launch."""
    planes, area = moments.size(0), options.region_size**2
    information = moments.new_empty(planes)
    info = moments.new_empty(planes, dtype=torch.int32)
    head = Head(
        moments.new_empty(planes, area, area),
        moments.new_empty(planes, area, area),
        moments.new_empty(planes, area),
    )
    _rmi_head_kernel[(planes,)](
        moments_ptr=moments,
        information_ptr=information,
        info_ptr=info,
        residual_weights_ptr=head.residual_weights,
        label_weights_ptr=head.label_weights,
        constants_ptr=head.constants,
        chunks=moments.size(1),
        REGION=options.region_size,
        EPSILON=options.epsilon,
        CELL=options.cell,
        MEAN=options.moments == "mean",
        num_warps={3: 2, 4: 2, 5: 4}.get(options.region_size, 1),
        enable_fp_fusion=True,
    )
    return information, info, head


Results = tuple[torch.Tensor, ...]


def forward_pass(options: Options, logits: torch.Tensor, target: torch.Tensor) -> Results:
    """(loss, info [N, C], statistics [1], residual, labels, kept, and the head's three)."""
    dtype = compute_dtype(logits.dtype)
    loss = torch.empty((), dtype=dtype, device=logits.device)
    statistics = torch.empty(1, dtype=dtype, device=logits.device)
    with device_guard(logits):
        if options.pools:
            residual, labels, touched, partials = _pool(options, logits, target)
        else:
            residual, labels, touched = (statistics.new_empty(0) for _ in range(3))
            partials = _cross_entropy(options, logits, target)
        maps = _maps(options, logits, target, residual, labels)
        kept = torch.empty(0, dtype=torch.uint8, device=logits.device)
        if is_direct(options, maps.height, maps.width):
            moments, kept = _direct_moments(options, logits, maps, touched)
        else:
            moments = _lag_moments(options, logits, maps)
        information, info, head = _head(options, moments)
        _rmi_finish_kernel[(1,)](
            partials_ptr=partials,
            information_ptr=information,
            loss_ptr=loss,
            statistics_ptr=statistics,
            programs=partials.size(1),
            planes=information.numel(),
            images=logits.size(0),
            BCE_WEIGHT=options.bce_weight,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return loss, info.view(logits.shape[:2]), statistics, residual, labels, kept, *head


# --- launchers: backward --------------------------------------------------------------------------


def backward_pass(
    options: Options,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    statistics: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    *head: torch.Tensor,
) -> torch.Tensor:
    grad_logits = torch.empty_like(logits)
    maps = _maps(options, logits, target, residual, labels)
    out = torch.empty_like(residual) if maps.pooled else grad_logits
    shared = {
        "grad_loss_ptr": grad_loss,
        "statistics_ptr": statistics,
        "first_ptr": maps.first,
        "second_ptr": maps.second,
        "out_ptr": out,
        **maps.strides,
        "out_strides": _strides(out),
        "channels": logits.size(1),
        "height": maps.height,
        "width": maps.width,
        "REGION": options.region_size,
        "IGNORED": _ignored_class(options, logits),
        "POOLED": maps.pooled,
        "enable_fp_fusion": True,
    }
    with device_guard(logits):
        if is_direct(options, maps.height, maps.width):
            _direct_gradient(options, logits, kept, Head(*head), shared)
        else:
            _lag_gradient(options, logits, Head(*head), shared)
        if maps.pooled:
            _expand(options, grad_loss, statistics, logits, target, out, grad_logits)
    return grad_logits


def _direct_gradient(
    options: Options, logits: torch.Tensor, kept: torch.Tensor, head: Head, shared: dict[str, Any]
) -> None:
    planes = logits.size(0) * logits.size(1)
    pixels = shared["height"] * shared["width"]
    _rmi_direct_gradient_kernel[(planes, triton.cdiv(pixels, 128))](
        **shared,
        kept_ptr=kept,
        residual_weights_ptr=head.residual_weights,
        label_weights_ptr=head.label_weights,
        constants_ptr=head.constants,
        images=logits.size(0),
        LANES=128,
        WEIGHT=1.0 - options.bce_weight,
        CELL=options.cell,
        num_warps=4,
    )


def _lag_gradient(
    options: Options, logits: torch.Tensor, head: Head, shared: dict[str, Any]
) -> None:
    """Interior and border, from one table of taps per border class."""
    region = options.region_size
    span = 2 * region - 1
    planes = logits.size(0) * logits.size(1)
    taps = shared["statistics_ptr"].new_empty(planes, span**2, 2 * span**2 + 1)
    _rmi_taps_kernel[(planes, span**2)](
        grad_loss_ptr=shared["grad_loss_ptr"],
        residual_weights_ptr=head.residual_weights,
        label_weights_ptr=head.label_weights,
        constants_ptr=head.constants,
        taps_ptr=taps,
        images=logits.size(0),
        REGION=region,
        WEIGHT=1.0 - options.bce_weight,
        CELL=options.cell,
        num_warps=1,
        enable_fp_fusion=True,
    )
    height, width = shared["height"], shared["width"]
    configuration = _configuration("rmi_gradient", logits, region, LANES=128, ROWS=64)
    bands = triton.cdiv(height - span + 1, int(configuration["ROWS"]))
    blocks = triton.cdiv(width - span + 1, int(configuration["LANES"]))
    _rmi_interior_kernel[(planes, bands, blocks)](**shared, taps_ptr=taps, **configuration)
    if region > 1:
        border = 2 * (region - 1) * (height + width - 2 * (region - 1))
        _rmi_border_kernel[(planes, triton.cdiv(border, 128))](
            **shared, taps_ptr=taps, LANES=128, num_warps=4
        )


def _expand(
    options: Options,
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_pooled: torch.Tensor,
    grad_logits: torch.Tensor,
) -> None:
    """From the pooled maps to the logits, with the cross entropy's gradient."""
    batch, channels, height, width = logits.shape
    shared = {
        "grad_loss_ptr": grad_loss,
        "statistics_ptr": statistics,
        "logits_ptr": logits,
        "target_ptr": target,
        "grad_pooled_ptr": grad_pooled,
        "grad_logits_ptr": grad_logits,
        "logits_strides": _strides(logits),
        "target_strides": _strides(target),
        "grad_logits_strides": _strides(grad_logits),
        "channels": channels,
        "height": height,
        "width": width,
        "pooled_height": grad_pooled.size(2),
        "pooled_width": grad_pooled.size(3),
        "IGNORED": _ignored_class(options, logits),
    }
    if options.pooling == "nearest":
        configuration = _configuration("rmi_sample", logits, options.pool_size, LANES=128)
        blocks = triton.cdiv(width, int(configuration["LANES"]))
        _rmi_sample_backward_kernel[(batch * height, blocks)](
            **shared, **configuration, enable_fp_fusion=True
        )
        return
    launch = _cells("rmi_expand", options, logits)
    rows, grid = _cell_grid(options, logits, launch["CELLS"])
    _rmi_expand_kernel[grid](**shared, cell_rows=rows, **launch)


# --- tuning ---------------------------------------------------------------------------------------


def _tuning_pass(
    options: Options, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Forward and backward, on labels in regions as annotations are."""
    logits = torch.randn(4, 19, 513, 1025, device=device).to(dtype)
    target = torch.randint(0, 19, (4, 17, 33), device=device).repeat_interleave(32, 1)
    target = target.repeat_interleave(32, 2)[:, :513, :1025].to(torch.uint8)

    def both_passes() -> tuple[torch.Tensor, torch.Tensor]:
        loss, _, *saved = forward_pass(options, logits, target)
        return loss, backward_pass(options, loss, logits, target, *saved)

    return both_passes


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice; the first is the heuristic's."""
    rows: list[Configuration] = [
        {"LANES": lanes, "ROWS": count, "num_warps": lanes // 32}
        for lanes in (128, 64, 256)
        for count in (64, 32, 16, 128)
    ]
    cells: list[Configuration] = [
        {"CELLS": count, "num_warps": warps} for count in (128, 64, 256) for warps in (4, 2, 8)
    ]
    pooled = Options(3, "avg", 4, "mean", 1e-6, 0.5, "zero", 255, None)
    choices = [
        ("rmi_pool", 4, pooled, cells),
        ("rmi_expand", 4, pooled, cells),
        ("rmi_moments", 3, pooled._replace(pooling=None), rows),
        ("rmi_gradient", 3, pooled._replace(pooling=None), rows),
    ]
    return [
        TuningCase(
            operator, 19, window, dtype, "contiguous",
            functools.partial(_tuning_pass, options, dtype), candidates,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for operator, window, options, candidates in choices
    ]  # fmt: skip
