"""Region mutual information (RMI): the labels of a region given its predictions.

Zhao et al., "Region Mutual Information Loss for Semantic Segmentation". A region of R x R pixels is a
point with d = R^2 coordinates. Over all regions of an image, class by class, with Y the labels and P
the predicted probabilities, both centred,

    M = S_Y - S_YP (S_P + eps I)^-1 S_PY + eps I                       Eq. 12
    RMI = mean over images, sum over classes, of log det M / (2 d)     Eq. 16
    loss = bce_weight BCE + (1 - bce_weight) RMI                       Eq. 15

Passes, L bytes of logits and T of labels, pooling cells of s x s pixels: a pooling pass reads L + T and
writes two maps of L / s^2; lag sums read them, a matrix per (image, class) is eliminated, and the
backward correlates the maps with the weights found and spreads the result: 2 L + T. Without pooling
the moments and the gradient are formed from logits and labels, and nothing but the gradient is stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import nn

from kernels_reference.region_mutual_information import pooled_size
from kernels_reference.region_mutual_information import rmi_loss as rmi_loss_reference

from . import _checks
from ._backend import device_guard, serves_triton
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

POOLINGS = ("avg", "max", "nearest")
MOMENTS = ("mean", "sum")
IGNORES = ("zero", "drop")
PRECISIONS = ("float64", "float32")
_EPSILON = {"mean": 1e-6, "sum": 5e-4}
_LARGEST_REGION = 5
_LARGEST_POOL = 16

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


def _is_direct(options: Options, height: int, width: int) -> bool:
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
        num_warps=4 if options.region_size == 5 else 1,
        enable_fp_fusion=True,
    )
    return information, info, head


Results = tuple[torch.Tensor, ...]


def _forward(options: Options, logits: torch.Tensor, target: torch.Tensor) -> Results:
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
        if _is_direct(options, maps.height, maps.width):
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


def _backward(
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
        if _is_direct(options, maps.height, maps.width):
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


# --- operator and gradient ------------------------------------------------------------------------


@torch.library.custom_op("tritonloss::rmi_forward", mutates_args=())
def _forward_op(
    logits: torch.Tensor,
    target: torch.Tensor,
    region_size: int,
    pooling: str | None,
    pool_size: int,
    moments: str,
    epsilon: float,
    bce_weight: float,
    ignore: str,
    ignore_index: int | None,
    precision: str | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    options = Options(
        region_size, pooling, pool_size, moments, epsilon, bce_weight, ignore, ignore_index,
        precision,
    )  # fmt: skip
    return _forward(options, logits, target)  # type: ignore[return-value]


@_forward_op.register_fake
def _forward_fake(logits: torch.Tensor, target: torch.Tensor, *arguments: Any) -> Results:
    options = Options(*arguments)
    batch, channels, height, width = logits.shape
    dtype = compute_dtype(logits.dtype)
    area = options.region_size**2
    pooled = pooled_size(height, width, options.pooling, options.pool_size)
    map_shape = (batch, channels, *pooled) if options.pools else (0,)
    kept_shape: tuple[int, ...] = (0,)
    if _is_direct(options, *pooled):
        kept_shape = (batch, *(size - options.region_size + 1 for size in pooled))
    planes = batch * channels
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((batch, channels), dtype=torch.int32),
        logits.new_empty(1, dtype=dtype),
        logits.new_empty(map_shape, dtype=dtype),
        logits.new_empty(map_shape, dtype=dtype),
        logits.new_empty(kept_shape, dtype=torch.uint8),
        logits.new_empty((planes, area, area), dtype=torch.float64),
        logits.new_empty((planes, area, area), dtype=torch.float64),
        logits.new_empty((planes, area), dtype=torch.float64),
    )


@torch.library.custom_op("tritonloss::rmi_backward", mutates_args=())
def _backward_op(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    statistics: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    residual_weights: torch.Tensor,
    label_weights: torch.Tensor,
    constants: torch.Tensor,
    region_size: int,
    pooling: str | None,
    pool_size: int,
    moments: str,
    epsilon: float,
    bce_weight: float,
    ignore: str,
    ignore_index: int | None,
    precision: str | None,
) -> torch.Tensor:
    options = Options(
        region_size, pooling, pool_size, moments, epsilon, bce_weight, ignore, ignore_index,
        precision,
    )  # fmt: skip
    return _backward(
        options, grad_loss, logits, target, statistics, residual, labels, kept, residual_weights,
        label_weights, constants,
    )  # fmt: skip


@_backward_op.register_fake
def _backward_fake(grad_loss: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    logits, target, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, target, *output[2:])
    ctx.options = Options(*options)


def _gradient(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    grad_logits = _backward_op(grad_loss, *ctx.saved_tensors, *ctx.options)
    return (grad_logits, *(None,) * 10)


_forward_op.register_autograd(_gradient, setup_context=_setup_context)


# --- function -------------------------------------------------------------------------------------


def rmi_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    region_size: int = 3,
    pooling: str | None = "avg",
    pool_size: int = 4,
    moments: str = "mean",
    epsilon: float | None = None,
    bce_weight: float = 0.5,
    ignore: str = "zero",
    ignore_index: int | None = 255,
    precision: str | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Region mutual information loss: how uncertain regions of labels stay, given the predictions.

    With d = region_size^2, P and Y the probabilities sigmoid(logits) and the one-hot labels in all
    regions of the pooled maps, S their second moments:

        M = S_Y - S_YP (S_P + epsilon I)^-1 S_PY + epsilon I        per image and class
        loss = bce_weight BCE + (1 - bce_weight) mean over images, sum over classes, log det M / (2 d)

    BCE is summed over classes and averaged over valid pixels. Values are often negative, or large
    with moments="sum", which adds log n / 2 per class for n regions.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        region_size: side of a region in pooled pixels, 1 to 5. Default 3.
        pooling: "avg" (default) and "max" with zeros for padding of pool_size // 2; "nearest" samples
            labels and interpolates probabilities linearly, corners on corners; None.
        pool_size: side and step of the pooling, 1 (none) to 16. Default 4.
        moments: "mean" (default, the paper) divides by the number of regions; "sum" (the released
            code) does not.
        epsilon: what is added to the diagonals, > 0. Default 1e-6 for "mean", 5e-4 for "sum".
        bce_weight: share of the cross entropy, in [0, 1]. Default 0.5.
        ignore: "zero" (default) counts invalid pixels as perfectly predicted background; "drop"
            leaves out the regions that touch one.
        ignore_index: label of pixels that are invalid, any integer or None. Default 255. Other labels
            outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they count as
            ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        precision: "float64" or "float32" for the sums of products; by default float32 on GPUs that
            are slow in float64.
        return_info: also return info. Default False.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits); 0 with zero gradient if no pixel is
        valid. With return_info also int32 [N, C] on the device: 0, or the order of the first leading
        minor of the matrix of P and Y that is not positive definite (its loss is then NaN).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, the pooled map is smaller than a
            region, or a label is out of range (see ignore_index).

    Reference:
        Zhao et al., "Region Mutual Information Loss for Semantic Segmentation", Eq. 12 to 16.

    Example:
        >>> import torch
        >>> from tritonloss.functional import rmi_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> rmi_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    _checks.check_logits(logits)
    _checks.check_target(logits, target)
    _check_options(region_size, pooling, pool_size, moments, epsilon, ignore, precision)
    _checks.check_range("bce_weight", bce_weight, 0.0, 1.0)
    _checks.check_ignore_index(ignore_index)
    _checks.check_flag("return_info", return_info)
    _check_region_fits(logits, region_size, pooling, pool_size)
    _checks.check_labels_in_range(target, logits.size(1), ignore_index)
    ridge = _EPSILON[moments] if epsilon is None else float(epsilon)
    options = Options(
        region_size, pooling, pool_size, moments, ridge, float(bce_weight), ignore, ignore_index,
        precision,
    )  # fmt: skip
    if logits.size(0) == 0 or not serves_triton(logits):
        return rmi_loss_reference(logits, target, **options._asdict(), return_info=return_info)
    results: Results = torch.ops.tritonloss.rmi_forward(logits, target, *options)
    return results[:2] if return_info else results[0]  # type: ignore[return-value]


def _check_options(
    region_size: int,
    pooling: str | None,
    pool_size: int,
    moments: str,
    epsilon: float | None,
    ignore: str,
    precision: str | None,
) -> None:
    _checks.check_integer("region_size", region_size, 1, _LARGEST_REGION)
    if pooling is not None:
        _checks.check_option("pooling", pooling, POOLINGS)
    _checks.check_integer("pool_size", pool_size, 1, _LARGEST_POOL)
    _checks.check_option("moments", moments, MOMENTS)
    if epsilon is not None:
        _checks.check_range("epsilon", epsilon, 0.0, math.inf, interval="()")
    _checks.check_option("ignore", ignore, IGNORES)
    if precision is not None:
        _checks.check_option("precision", precision, PRECISIONS)


def _check_region_fits(
    logits: torch.Tensor, region_size: int, pooling: str | None, pool_size: int
) -> None:
    height, width = logits.shape[2:]
    pooled = pooled_size(height, width, pooling, pool_size)
    if min(height, width) < 1 or min(pooled) < region_size:
        raise ValueError(
            f"logits must be large enough for a region of region_size={region_size} after "
            f"pooling={pooling!r} with pool_size={pool_size}; got height {height} and width "
            f"{width}, pooled to {pooled[0]} x {pooled[1]}"
        )


# --- module ---------------------------------------------------------------------------------------


class RMILoss(nn.Module):
    """Region mutual information loss as a module: :func:`tritonloss.functional.rmi_loss`.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.RMILoss(pool_size=2)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        region_size: int = 3,
        pooling: str | None = "avg",
        pool_size: int = 4,
        moments: str = "mean",
        epsilon: float | None = None,
        bce_weight: float = 0.5,
        ignore: str = "zero",
        ignore_index: int | None = 255,
        precision: str | None = None,
        return_info: bool = False,
    ) -> None:
        super().__init__()
        self.region_size = region_size
        self.pooling = pooling
        self.pool_size = pool_size
        self.moments = moments
        self.epsilon = epsilon
        self.bce_weight = bce_weight
        self.ignore = ignore
        self.ignore_index = ignore_index
        self.precision = precision
        self.return_info = return_info

    @classmethod
    def released(cls, *, ignore_index: int | None = 255) -> RMILoss:
        """The settings of the authors' released code: sums for moments, 5e-4 on the diagonals."""
        return cls(
            region_size=3,
            pooling="avg",
            pool_size=4,
            moments="sum",
            epsilon=5e-4,
            bce_weight=0.5,
            ignore="zero",
            ignore_index=ignore_index,
        )

    def forward(
        self, logits: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C, H, W], target [N, H, W] -> scalar, or (scalar, info [N, C])."""
        return rmi_loss(
            logits,
            target,
            region_size=self.region_size,
            pooling=self.pooling,
            pool_size=self.pool_size,
            moments=self.moments,
            epsilon=self.epsilon,
            bce_weight=self.bce_weight,
            ignore=self.ignore,
            ignore_index=self.ignore_index,
            precision=self.precision,
            return_info=self.return_info,
        )

    def extra_repr(self) -> str:
        return (
            f"region_size={self.region_size}, pooling={self.pooling!r}, "
            f"pool_size={self.pool_size}, moments={self.moments!r}, epsilon={self.epsilon}, "
            f"bce_weight={self.bce_weight}, ignore={self.ignore!r}, "
            f"ignore_index={self.ignore_index}, precision={self.precision!r}, "
            f"return_info={self.return_info}"
        )
