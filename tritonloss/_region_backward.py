"""Backward pass of region mutual information: which kernels it runs, on what, in which order.

The mathematics stands in region_mutual_information.py.
"""

from __future__ import annotations

import math

import torch
import triton

from ._backend import device_guard
from ._region_gradient_kernels import (
    _rmi_border_kernel,
    _rmi_direct_gradient_kernel,
    _rmi_interior_kernel,
    _rmi_taps_kernel,
)
from ._region_maps import (
    Maps,
    Options,
    Saved,
    cell_grid,
    cells_of,
    ignored,
    is_direct,
    launch_of,
    maps_of,
    strides,
)
from ._region_pooling_kernels import _rmi_expand_kernel, _rmi_sample_backward_kernel


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
        if not options.pools:
            maps = maps_of(options, logits, target, saved.residual, saved.labels)
            _gradient(options, grad_loss, logits.size(0), maps, saved, grad_logits)
            return grad_logits
        for chosen, grad_pooled in _shares(saved.residual, grad_logits):
            part = saved.images(chosen)
            maps = Maps(part.residual, part.labels, -1, True)
            _gradient(options, grad_loss, logits.size(0), maps, part, grad_pooled)
            _expand(
                options, grad_loss, saved.statistics, logits[chosen], target[chosen], grad_pooled,
                grad_logits[chosen],
            )  # fmt: skip
    return grad_logits


def _shares(pooled: torch.Tensor, grad_logits: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """(images, room for the gradient to their pooled maps), to be worked off in order.

    The gradient to the pooled maps of most images waits where the gradient to the logits of the
    last ones will stand, so that only these take memory of their own.
    """
    images, image = grad_logits.size(0), math.prod(grad_logits.shape[1:])
    pooled_image = math.prod(pooled.shape[1:])
    unit = pooled.dtype.itemsize // grad_logits.dtype.itemsize  # logits that one pooled value takes
    last = -(-images * pooled_image * unit // (image + pooled_image * unit)) if image else images
    first = images - last
    # From an address that is a multiple of 16 bytes, as those of tensors are.
    start = -(-first * image // 8) * 8
    room = (images * image - start) // unit
    if grad_logits.stride(0) != image or not 0 < first * pooled_image <= room:
        return [(slice(0, images), torch.empty_like(pooled))]
    flat = grad_logits.as_strided((room * unit,), (1,), grad_logits.storage_offset() + start)
    waiting = flat.view(pooled.dtype)[: first * pooled_image].view(first, *pooled.shape[1:])
    return [
        (slice(0, first), waiting),
        (slice(first, images), torch.empty_like(pooled[first:])),
    ]


def _gradient(
    options: Options,
    grad_loss: torch.Tensor,
    images: int,
    maps: Maps,
    saved: Saved,
    out: torch.Tensor,
) -> None:
    """The gradient to the pooled probabilities, or to the logits where nothing is pooled."""
    if is_direct(options, maps.height, maps.width):
        _direct_gradient(options, grad_loss, images, maps, saved, out)
    else:
        _lag_gradient(options, grad_loss, images, maps, saved, out)


def _direct_gradient(
    options: Options,
    grad_loss: torch.Tensor,
    images: int,
    maps: Maps,
    saved: Saved,
    out: torch.Tensor,
) -> None:
    planes = out.size(0) * out.size(1)
    _rmi_direct_gradient_kernel[(planes, triton.cdiv(maps.height * maps.width, 128))](
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
        images=images,
        REGION=options.region_size,
        LANES=128,
        WEIGHT=1.0 - options.bce_weight,
        CELL=options.cell,
        num_warps=4,
    )


def _lag_gradient(
    options: Options,
    grad_loss: torch.Tensor,
    images: int,
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
        images=images,
        REGION=region,
        WEIGHT=1.0 - options.bce_weight,
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
    launch = launch_of("rmi_gradient", out, region, LANES=128, ROWS=64)
    bands = triton.cdiv(maps.height - span + 1, int(launch["ROWS"]))
    blocks = triton.cdiv(maps.width - span + 1, int(launch["LANES"]))
    _rmi_interior_kernel[(planes, bands, blocks)](**shared, **launch)
    if region > 1:
        border = 2 * (region - 1) * (maps.height + maps.width - 2 * (region - 1))
        _rmi_border_kernel[(planes, triton.cdiv(border, 128))](**shared, LANES=128, num_warps=4)


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
        "logits_strides": strides(logits),
        "target_strides": strides(target),
        "grad_logits_strides": strides(grad_logits),
        "channels": channels,
        "height": height,
        "width": width,
        "pooled_height": grad_pooled.size(2),
        "pooled_width": grad_pooled.size(3),
        "IGNORED": ignored(options, logits, target),
    }
    if options.pooling == "nearest":
        launch = launch_of("rmi_sample", logits, options.pool_size, LANES=128)
        blocks = triton.cdiv(width, int(launch["LANES"]))
        _rmi_sample_backward_kernel[(batch * height, blocks)](
            **shared, **launch, enable_fp_fusion=True
        )
        return
    cells = cells_of("rmi_expand", options, logits)
    _rmi_expand_kernel[cell_grid(logits, cells)](**shared, **cells)
