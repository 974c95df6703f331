"""Backward pass of region mutual information: which kernels it runs, on what, in which order.

The mathematics stands in region_mutual_information.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from .._core.backend import device_guard
from .._engine.strip_launch import ignored_class
from .gradient_kernels import (
    _rmi_border_kernel,
    _rmi_direct_gradient_kernel,
    _rmi_interior_kernel,
    _rmi_taps_kernel,
)
from .plan import Maps, Options, Part, Saved, cell_grid, cells_of, launch_of, maps_of, strides
from .pooling_kernels import _rmi_expand_kernel, _rmi_sample_backward_kernel


def backward_pass(
    options: Options,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    saved: Saved,
) -> torch.Tensor:
    """The gradient to the logits, in their dtype and layout."""
    grad_logits = torch.empty_like(logits)
    with device_guard(logits):
        if not saved.residual.numel():
            maps = maps_of(options, logits, target, saved.residual, saved.labels)
            _gradient(options, grad_loss, logits, maps, saved, grad_logits)
            return grad_logits
        for part, grad_pooled in _shares(saved.residual, grad_logits):
            own = saved.of(part)
            maps = Maps(own.residual, own.labels, -1, True)
            _gradient(options, grad_loss, logits, maps, own, grad_pooled)
            _expand(
                options, part, grad_loss, saved.statistics, logits, target, grad_pooled,
                part.of(grad_logits),
            )  # fmt: skip
    return grad_logits


def _shares(pooled: torch.Tensor, grad_logits: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    """(images, room for the gradient to their pooled maps), to be worked off in order.

    The gradient to the pooled maps of most images waits where the gradient to the logits of the
    last ones will stand, so that only these take memory of their own. Of one image it is classes.
    """
    axis = 0 if grad_logits.size(0) > 1 else 1
    count, size = grad_logits.size(axis), math.prod(grad_logits.shape[axis + 1 :])
    pooled_size = math.prod(pooled.shape[axis + 1 :])
    unit = pooled.dtype.itemsize // grad_logits.dtype.itemsize  # logits that one pooled value takes
    first = count - -(-count * pooled_size * unit // (size + pooled_size * unit))
    # From an address that is a multiple of 16 bytes, as those of tensors are.
    start = -(-first * size // 8) * 8
    room = (count * size - start) // unit
    if grad_logits.stride(axis) != size or not 0 < first * pooled_size <= room:
        return [(Part(axis, 0, count), torch.empty_like(pooled))]
    flat = grad_logits.as_strided((room * unit,), (1,), grad_logits.storage_offset() + start)
    shape = Part(axis, 0, first).of(pooled).shape
    waiting = flat.view(pooled.dtype)[: math.prod(shape)].view(shape)
    last = Part(axis, first, count - first)
    return [(Part(axis, 0, first), waiting), (last, torch.empty_like(last.of(pooled)))]


def _gradient(
    options: Options,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    maps: Maps,
    saved: Saved,
    out: torch.Tensor,
) -> None:
    """The gradient to the pooled probabilities, or to the logits where nothing is pooled."""
    if saved.kept.numel():
        _direct_gradient(options, grad_loss, logits.size(0), maps, saved, out)
    else:
        _lag_gradient(options, grad_loss, logits, maps, saved, out)


def _direct_gradient(
    options: Options,
    grad_loss: torch.Tensor,
    images: int,
    maps: Maps,
    saved: Saved,
    out: torch.Tensor,
) -> None:
    planes = out.size(0) * out.size(1)
    blocks = triton.cdiv(maps.height * maps.width, 128)
    # All on the first axis of the grid, the only one that takes more than 65535.
    _rmi_direct_gradient_kernel[(planes * blocks,)](
        **maps.arguments,
        grad_loss_ptr=grad_loss,
        statistics_ptr=saved.statistics,
        kept_ptr=saved.kept,
        residual_weights_ptr=saved.residual_weights,
        label_weights_ptr=saved.label_weights,
        constants_ptr=saved.constants,
        out_ptr=out,
        out_strides=strides(out),
        height=maps.height,
        width=maps.width,
        blocks=blocks,
        images=images,
        rmi_weight=1.0 - options.bce_weight,
        REGION=options.region_size,
        LANES=128,
        CELL=options.cell,
        num_warps=4,
    )


def _lag_gradient(
    options: Options,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    maps: Maps,
    saved: Saved,
    out: torch.Tensor,
) -> None:
    """Interior and border, from one table of taps per border class."""
    region = options.region_size
    span = 2 * region - 1
    planes = out.size(0) * out.size(1)
    taps = saved.statistics.new_empty(planes, span**2, 2 * span**2 + 1)
    _rmi_taps_kernel[(planes, span**2)](
        grad_loss_ptr=grad_loss,
        residual_weights_ptr=saved.residual_weights,
        label_weights_ptr=saved.label_weights,
        constants_ptr=saved.constants,
        taps_ptr=taps,
        images=logits.size(0),
        rmi_weight=1.0 - options.bce_weight,
        REGION=region,
        CELL=options.cell,
        num_warps=1,
        enable_fp_fusion=True,
    )
    shared = {
        **maps.arguments,
        "grad_loss_ptr": grad_loss,
        "statistics_ptr": saved.statistics,
        "taps_ptr": taps,
        "out_ptr": out,
        "out_strides": strides(out),
        "height": maps.height,
        "width": maps.width,
        "REGION": region,
    }
    launch = launch_of("rmi_gradient", logits, taps.dtype, region, LANES=128, ROWS=64)
    bands = triton.cdiv(maps.height - span + 1, int(launch["ROWS"]))
    blocks = triton.cdiv(maps.width - span + 1, int(launch["LANES"]))
    _rmi_interior_kernel[(planes, bands, blocks)](**shared, **launch)
    if region > 1:
        border = 2 * (region - 1) * (maps.height + maps.width - 2 * (region - 1))
        _rmi_border_kernel[(planes, triton.cdiv(border, 128))](**shared, LANES=128, num_warps=4)


def _expand(
    options: Options,
    part: Part,
    grad_loss: torch.Tensor,
    statistics: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_pooled: torch.Tensor,
    grad_logits: torch.Tensor,
) -> None:
    """From a part's pooled maps to its logits, with the cross entropy's gradient."""
    classes = logits.size(1)
    if options.samples:
        launch: dict[str, Any] = launch_of(
            "rmi_sample", logits, statistics.dtype, options.pool_size, LANES=128, num_warps=2
        )
    else:
        launch = cells_of("rmi_expand", options, logits, statistics.dtype)
    logits = part.of(logits)
    target = part.of(target) if part.axis == 0 else target
    batch, channels, height, width = logits.shape
    shared = {
        "grad_loss_ptr": grad_loss,
        "statistics_ptr": statistics,
        "logits_ptr": logits,
        "target_ptr": target,
        "grad_pooled_ptr": grad_pooled,
        "grad_logits_ptr": grad_logits,
        "logits_strides": strides(logits),
        "target_strides": strides(target),
        "grad_logits_strides": strides(grad_logits),
        "channels": channels,
        "first_class": part.start if part.axis == 1 else 0,
        "classes": classes,
        "height": height,
        "width": width,
        "pooled_height": grad_pooled.size(2),
        "pooled_width": grad_pooled.size(3),
        "IGNORED": ignored_class(options.ignore_index, classes, target.dtype),
    }
    if options.samples:
        blocks = triton.cdiv(width, int(launch["LANES"]))
        _rmi_sample_backward_kernel[(batch * height, blocks)](
            **shared, **launch, enable_fp_fusion=True
        )
    else:
        _rmi_expand_kernel[cell_grid(logits, launch)](**shared, **launch)
