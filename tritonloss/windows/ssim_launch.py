"""Launchers of SSIM, which the loss on labels and the similarity of two images share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._core.backend import device_guard
from .._core.configurations import Configuration
from .._core.prepared_launch import launch_kernel
from .._engine.strip_launch import (
    compute_dtype,
    label_strides,
    strides,
    strip_configuration,
    strip_heuristic,
    strip_launch,
)
from .._engine.strip_windows import window_of
from .ssim_kernels import (
    _ssim_backward_kernel,
    _ssim_coefficients_kernel,
    _ssim_finish_kernel,
    _ssim_forward_kernel,
)
from .ssim_moments import Similarity

# The coefficient maps of one group of planes: small enough to stay in the L2 cache of a large GPU.
SCRATCH_BYTES = 32 * 2**20


class Results(NamedTuple):
    """What a forward pass returns."""

    result: torch.Tensor  # the mean [], or the map
    scale: torch.Tensor  # []


def ssim_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    similarity: Similarity,
    window_size: int,
    sigma: float,
    padding: str,
    mapped: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [] or map, scale []): mean dissimilarity of a loss, mean similarity of images."""
    result, scale = empty_results(x, window_size, padding, mapped)
    shape = _out_shape(x, window_size, padding)
    configuration = _configuration("ssim_forward", x, window_size)
    moved = (x, y, result) if mapped else (x, y)
    grid, launch = strip_launch(shape, configuration, padding, *moved)
    partials = scale.new_empty(2, *grid)
    with device_guard(x):
        launch_kernel(
            _ssim_forward_kernel,
            grid,
            x_ptr=x,
            y_ptr=y,
            partials_ptr=partials,
            map_ptr=result,
            x_strides=strides(x, launch["STRIP"]),
            y_strides=(label_strides if similarity.from_logits else strides)(y, launch["STRIP"]),
            map_strides=strides(moved[-1] if mapped else x, launch["STRIP"]),
            height=x.size(2),
            width=x.size(3),
            out_height=shape[2],
            out_width=shape[3],
            window=window_size,
            programs=grid[0],
            SIMILARITY=similarity,
            WINDOW=window_of(window_size, sigma, padding),
            SHIFT=0 if padding == "valid" else -(window_size // 2),
            MAPPED=mapped,
            **launch,
        )
        if not mapped:
            launch_kernel(
                _ssim_finish_kernel,
                (1,),
                partials_ptr=partials,
                mean_ptr=result,
                scale_ptr=scale,
                programs=grid[0],
                SIMILAR=not similarity.from_logits,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return result, scale


def ssim_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    similarity: Similarity,
    window_size: int,
    sigma: float,
    padding: str,
    both: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient to x, gradient to y or [0]); grad is that of the mean [] or of the map."""
    grad_x, grad_y = empty_gradients(x, y, both)
    scratch = _scratch(x, window_size, padding, maps=4 if both else 3)
    for images, channels in _plane_groups(x.shape, scratch.shape):
        region = (images, channels)
        part_x = x[region]
        part_y = y[images] if similarity.from_logits else y[region]
        coefficients = scratch[:, : part_x.size(0), : part_x.size(1)]
        arguments = {
            "first_channel": channels.start,
            "classes": x.size(1),
            "height": x.size(2),
            "width": x.size(3),
            "out_height": scratch.size(3),
            "out_width": scratch.size(4),
            "window": window_size,
            "SIMILARITY": similarity,
            "WINDOW": window_of(window_size, sigma, padding),
        }
        _ssim_coefficients(
            grad[region] if grad.dim() else grad, scale, part_x, part_y, coefficients, arguments
        )
        _ssim_adjoint(
            coefficients, part_x, part_y, grad_x[region], grad_y[region] if both else grad_y,
            arguments,
        )  # fmt: skip
    return grad_x, grad_y


def _ssim_coefficients(
    grad: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    coefficients: torch.Tensor,
    arguments: dict[str, Any],
) -> None:
    """Fill the coefficient maps [3 or 4, n, c, H, W] of a group of planes."""
    window = arguments["WINDOW"]
    mapped = grad.dim() == 4
    moved = (x, y, coefficients[0], grad) if mapped else (x, y, coefficients[0])
    configuration = _configuration("ssim_coefficients", x, window.size)
    grid, launch = strip_launch(coefficients.shape[1:], configuration, window.padding, *moved)
    strip = launch["STRIP"]
    with device_guard(x):
        launch_kernel(
            _ssim_coefficients_kernel,
            grid,
            grad_ptr=grad,
            scale_ptr=scale,
            x_ptr=x,
            y_ptr=y,
            coefficients_ptr=coefficients,
            grad_strides=strides(moved[-1], strip),
            x_strides=strides(x, strip),
            y_strides=(strides if y.dim() == 4 else label_strides)(y, strip),
            coefficient_strides=strides(coefficients[0], strip),
            coefficient_stride=coefficients.stride(0) // strip.grain,
            SHIFT=0 if window.padding == "valid" else -(window.size // 2),
            MAPPED=mapped,
            SIMILAR=not arguments["SIMILARITY"].from_logits,
            BOTH=coefficients.size(0) == 4,
            **arguments,
            **launch,
        )


def _ssim_adjoint(
    coefficients: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    grad_x: torch.Tensor,
    grad_y: torch.Tensor,
    arguments: dict[str, Any],
) -> None:
    """The gradients of a group of planes from their coefficient maps."""
    window = arguments["WINDOW"]
    both = grad_y.dim() == 4
    moved = (x, y, coefficients[0], grad_x, grad_y) if both else (x, y, coefficients[0], grad_x)
    configuration = _configuration("ssim_backward", x, window.size)
    if window.padding == "reflect":
        configuration["COLUMNS"] = 1  # only the streamed row folds the images outside back in
    grid, launch = strip_launch(x.shape, configuration, window.padding, *moved)
    strip = launch["STRIP"]
    with device_guard(x):
        launch_kernel(
            _ssim_backward_kernel,
            grid,
            coefficients_ptr=coefficients,
            x_ptr=x,
            y_ptr=y,
            grad_x_ptr=grad_x,
            grad_y_ptr=grad_y,
            coefficient_strides=strides(coefficients[0], strip),
            coefficient_stride=coefficients.stride(0) // strip.grain,
            x_strides=strides(x, strip),
            y_strides=(strides if y.dim() == 4 else label_strides)(y, strip),
            grad_x_strides=strides(grad_x, strip),
            grad_y_strides=strides(moved[-1], strip),
            SHIFT=-(window.size - 1) if window.padding == "valid" else -(window.size // 2),
            BOTH=both,
            **arguments,
            **launch,
        )


def ssim_heuristic(operator: str, window_size: int) -> Configuration:
    configuration = strip_heuristic(4 if window_size <= 5 else 2 if window_size <= 11 else 1)
    if operator != "ssim_forward":
        configuration["ROWS"] = 32  # a group of planes makes few programs of 64 rows
    if operator == "ssim_backward" and window_size > 21:
        # With four warps ptxas keeps to 168 registers, for a spill of 8 bytes.
        configuration["LANES"] = 2 * int(configuration["LANES"])
        configuration["num_warps"] = 8
    return configuration


def _configuration(operator: str, x: torch.Tensor, window_size: int) -> Configuration:
    return strip_configuration(operator, x, window_size, ssim_heuristic(operator, window_size))


def _out_shape(x: torch.Tensor, window_size: int, padding: str) -> torch.Size:
    lost = window_size - 1 if padding == "valid" else 0
    return torch.Size((*x.shape[:2], x.size(2) - lost, x.size(3) - lost))


def empty_results(
    x: torch.Tensor, window_size: int, padding: str, mapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(x.dtype)
    scale = torch.empty((), dtype=dtype, device=x.device)
    if mapped:
        shape = _out_shape(x, window_size, padding)
        return torch.empty(shape, dtype=dtype, device=x.device), scale
    return torch.empty_like(scale), scale


def empty_gradients(
    x: torch.Tensor, y: torch.Tensor, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(y) if both else x.new_empty(0)


def _scratch(x: torch.Tensor, window_size: int, padding: str, maps: int) -> torch.Tensor:
    """Coefficient maps [maps, images, channels, H, W] of as many planes as the scratch may hold."""
    images, channels, height, width = _out_shape(x, window_size, padding)
    dtype = compute_dtype(x.dtype)
    planes = max(1, SCRATCH_BYTES // max(1, maps * height * width * dtype.itemsize))
    shape = (maps, min(images, max(1, planes // channels)), min(channels, planes), height, width)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _plane_groups(shape: torch.Size, scratch: torch.Size) -> Iterator[tuple[slice, slice]]:
    """(images, channels) of the groups of planes that the scratch takes one after the other."""
    for image in range(0, shape[0], max(1, scratch[1])):
        for channel in range(0, shape[1], scratch[2]):
            yield slice(image, image + scratch[1]), slice(channel, channel + scratch[2])
