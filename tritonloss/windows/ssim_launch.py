"""Launchers of SSIM, which the loss on labels and the similarity of two images share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._core.backend import device_guard
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.planes import compute_dtype
from .._engine.strip_launch import (
    ignored_class,
    label_strides,
    strides,
    strip_configuration,
    strip_heuristic,
    strip_launch,
)
from .._engine.strip_windows import Window, window_of
from .._engine.strips import LabelStrides, Strides, Strip
from .._engine.sums import sums_over
from .ssim_kernels import (
    _ssim_backward_kernel,
    _ssim_coefficients_kernel,
    _ssim_forward_kernel,
)
from .ssim_moments import Similarity

# The coefficient maps of one group of planes: small enough to stay in the L2 cache of a large GPU.
SCRATCH_BYTES = 32 * 2**20


class Comparison(NamedTuple):
    """What the kernels are compiled for."""

    similarity: Similarity
    window: Window


class LossOptions(NamedTuple):
    """The options of the loss, as they pass through its operator."""

    full: bool
    window_size: int
    sigma: float
    c1: float
    c2: float
    ignore_index: int | None

    @property
    def padding(self) -> str:
        """Outside the image x = y = 0."""
        return "zeros"

    @property
    def mapped(self) -> bool:
        """A loss is a mean."""
        return False

    def comparison(self, x: torch.Tensor, y: torch.Tensor) -> Comparison:
        """What the kernels are compiled for, of logits and labels."""
        ignored = ignored_class(self.ignore_index, x.size(1), y.dtype)
        similarity = Similarity(True, self.full, self.c1, self.c2, ignored)
        return Comparison(similarity, window_of(self.window_size, self.sigma, self.padding))


class ImageOptions(NamedTuple):
    """The options of the similarity of two images, as they pass through its operator."""

    window_size: int
    sigma: float
    data_range: float
    padding: str
    mapped: bool

    def comparison(self, x: torch.Tensor, y: torch.Tensor) -> Comparison:
        """What the kernels are compiled for."""
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        similarity = Similarity(False, True, c1, c2, -1)
        return Comparison(similarity, window_of(self.window_size, self.sigma, self.padding))


Options = LossOptions | ImageOptions


class Results(NamedTuple):
    """What a forward pass returns."""

    result: torch.Tensor  # the mean [], or the map
    scale: torch.Tensor  # [], or [0] for a map


def empty_results(x: torch.Tensor, options: Options) -> Results:
    """The tensors that a forward pass fills."""
    dtype = compute_dtype(x.dtype)
    scale = torch.empty(0 if options.mapped else (), dtype=dtype, device=x.device)
    shape = _out_shape(x, options) if options.mapped else ()
    return Results(torch.empty(shape, dtype=dtype, device=x.device), scale)


def empty_gradients(
    x: torch.Tensor, y: torch.Tensor, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to x and, if it is wanted, to y; [0] if not."""
    return torch.empty_like(x), torch.empty_like(y) if both else x.new_empty(0)


# --- forward --------------------------------------------------------------------------------------


class _ForwardPlan(NamedTuple):
    """The launch of a forward pass, for maps of one kind."""

    launch: PreparedLaunch
    programs: int


def ssim_forward(x: torch.Tensor, y: torch.Tensor, options: Options) -> Results:
    """Mean dissimilarity of a loss, mean similarity of images or its map; and 1 / count."""
    results = empty_results(x, options)
    plan = prepared(
        ("ssim forward", options, kind(x), kind(y)),
        lambda: _forward_plan(x, y, results.result, options),
    )
    if plan.programs == 0:
        results.result.zero_()
        results.scale.zero_()
        return results
    sums = sums_over(plan.programs, 2, x.device)
    with device_guard(x):
        plan.launch(
            x_ptr=x,
            y_ptr=y,
            result_ptr=results.result,
            scale_ptr=results.scale,
            scratch_ptr=sums["scratch_ptr"],
            tickets_ptr=sums["tickets_ptr"],
        )
    return results


def _forward_plan(
    x: torch.Tensor, y: torch.Tensor, result: torch.Tensor, options: Options
) -> _ForwardPlan:
    comparison = options.comparison(x, y)
    shape = _out_shape(x, options)
    configuration = _configuration("ssim_forward", x, options.window_size)
    moved = (x, y, result) if options.mapped else (x, y)
    grid, launch = strip_launch(shape, configuration, options.padding, *moved)
    strip = launch["STRIP"]
    arguments = {
        "x_strides": strides(x, strip),
        "y_strides": _second_strides(y, strip),
        "result_strides": strides(result if options.mapped else x, strip),
        "height": x.size(2),
        "width": x.size(3),
        "out_height": shape[2],
        "out_width": shape[3],
        "window": options.window_size,
        "programs": grid[0],
        "SIMILARITY": comparison.similarity,
        "WINDOW": comparison.window,
        "SHIFT": 0 if options.padding == "valid" else -(options.window_size // 2),
        "MAPPED": options.mapped,
        **launch,
    }
    return _ForwardPlan(PreparedLaunch(_ssim_forward_kernel, grid, arguments), grid[0])


# --- backward -------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Planes that the scratch takes at a time, and the launches for them."""

    region: tuple[slice, slice] | None  # images and channels; None for all
    coefficients: PreparedLaunch
    adjoint: PreparedLaunch


class _BackwardPlan(NamedTuple):
    """The launches of a backward pass, for maps of one kind."""

    scratch: tuple[int, ...]  # maps, images, channels, height, width
    groups: list[_Group]


def ssim_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    options: Options,
    both: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient to x, gradient to y or [0]); grad is that of the mean [] or of the map."""
    grad_x, grad_y = empty_gradients(x, y, both)
    maps = (grad, x, y, grad_x, grad_y)
    plan = prepared(
        ("ssim backward", options, both, kind(grad), kind(x), kind(y)),
        lambda: _backward_plan(maps, options),
    )
    scratch = torch.empty(plan.scratch, dtype=scale.dtype, device=x.device)
    with device_guard(x):
        for region, coefficients, adjoint in plan.groups:
            part_grad, part_x, part_y, part_grad_x, part_grad_y = _parts(maps, region)
            coefficient_maps = _part_of_scratch(scratch, part_x)
            coefficients(
                grad_ptr=part_grad,
                scale_ptr=scale,
                x_ptr=part_x,
                y_ptr=part_y,
                coefficients_ptr=coefficient_maps,
            )
            adjoint(
                coefficients_ptr=coefficient_maps,
                x_ptr=part_x,
                y_ptr=part_y,
                grad_x_ptr=part_grad_x,
                grad_y_ptr=part_grad_y,
            )
    return grad_x, grad_y


_Maps = tuple[torch.Tensor, ...]  # grad, x, y, grad_x, grad_y


def _parts(maps: _Maps, region: tuple[slice, slice] | None) -> _Maps:
    """A group's part of maps and label maps; what is neither stays whole."""
    if region is None:
        return maps
    of_labels = region[:1]
    return tuple(
        tensor[region] if tensor.dim() == 4 else tensor[of_labels] if tensor.dim() == 3 else tensor
        for tensor in maps
    )


def _part_of_scratch(scratch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    images, channels = x.shape[:2]
    if scratch.shape[1:3] == (images, channels):
        return scratch
    return scratch[:, :images, :channels]


def _backward_plan(maps: _Maps, options: Options) -> _BackwardPlan:
    _, x, y, _, grad_y = maps
    comparison = options.comparison(x, y)
    shape = _scratch_shape(x, options, maps=4 if grad_y.dim() == 4 else 3)
    scratch = torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)
    arguments = {
        "classes": x.size(1),
        "height": x.size(2),
        "width": x.size(3),
        "out_height": shape[3],
        "out_width": shape[4],
        "window": options.window_size,
        "SIMILARITY": comparison.similarity,
        "WINDOW": comparison.window,
        "BOTH": grad_y.dim() == 4,
    }
    regions = list(_plane_groups(x.shape, shape))
    launches: dict[Any, tuple[PreparedLaunch, PreparedLaunch]] = {}
    groups = []
    for images, channels in regions:
        region = (images, channels) if len(regions) > 1 else None
        parts = _parts(maps, region)
        key = (channels.start, parts[1].shape)
        if key not in launches:
            coefficients = _part_of_scratch(scratch, parts[1])
            arguments["first_channel"] = channels.start
            launches[key] = (
                _coefficients_launch(parts, coefficients, options, arguments),
                _adjoint_launch(parts, coefficients, options, arguments),
            )
        groups.append(_Group(region, *launches[key]))
    return _BackwardPlan(shape, groups)


def _coefficients_launch(
    maps: _Maps, coefficients: torch.Tensor, options: Options, arguments: dict[str, Any]
) -> PreparedLaunch:
    """Fills the coefficient maps [3 or 4, n, c, H, W] of a group of planes."""
    grad, x, y, _, _ = maps
    mapped = grad.dim() == 4
    moved = (x, y, coefficients[0], grad) if mapped else (x, y, coefficients[0])
    configuration = _configuration("ssim_coefficients", x, options.window_size)
    grid, launch = strip_launch(coefficients.shape[1:], configuration, options.padding, *moved)
    strip = launch["STRIP"]
    own = {
        "grad_strides": strides(moved[-1], strip),
        "x_strides": strides(x, strip),
        "y_strides": _second_strides(y, strip),
        "coefficient_strides": strides(coefficients[0], strip),
        "coefficient_stride": coefficients.stride(0) // strip.grain,
        "SHIFT": 0 if options.padding == "valid" else -(options.window_size // 2),
        "MAPPED": mapped,
    }
    return PreparedLaunch(_ssim_coefficients_kernel, grid, {**own, **arguments, **launch})


def _adjoint_launch(
    maps: _Maps, coefficients: torch.Tensor, options: Options, arguments: dict[str, Any]
) -> PreparedLaunch:
    """Makes the gradients of a group of planes from their coefficient maps."""
    _, x, y, grad_x, grad_y = maps
    both = grad_y.dim() == 4
    moved = (x, y, coefficients[0], grad_x, grad_y) if both else (x, y, coefficients[0], grad_x)
    window_size, padding = options.window_size, options.padding
    configuration = _configuration("ssim_backward", x, window_size)
    if padding == "reflect":
        configuration["COLUMNS"] = 1  # only the streamed row folds the images outside back in
    grid, launch = strip_launch(x.shape, configuration, padding, *moved)
    strip = launch["STRIP"]
    own = {
        "coefficient_strides": strides(coefficients[0], strip),
        "coefficient_stride": coefficients.stride(0) // strip.grain,
        "x_strides": strides(x, strip),
        "y_strides": _second_strides(y, strip),
        "grad_x_strides": strides(grad_x, strip),
        "grad_y_strides": strides(moved[-1], strip),
        "SHIFT": -(window_size - 1) if padding == "valid" else -(window_size // 2),
    }
    return PreparedLaunch(_ssim_backward_kernel, grid, {**own, **arguments, **launch})


# --- geometry -------------------------------------------------------------------------------------


def ssim_heuristic(operator: str, window_size: int) -> Configuration:
    """The operator's own choice."""
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


def _second_strides(y: torch.Tensor, strip: Strip) -> Strides | LabelStrides:
    return strides(y, strip) if y.dim() == 4 else label_strides(y, strip)


def _out_shape(x: torch.Tensor, options: Options) -> torch.Size:
    lost = options.window_size - 1 if options.padding == "valid" else 0
    return torch.Size((*x.shape[:2], x.size(2) - lost, x.size(3) - lost))


def _scratch_shape(x: torch.Tensor, options: Options, maps: int) -> tuple[int, ...]:
    """[maps, images, channels, H, W] of as many coefficient maps as the scratch may hold."""
    images, channels, height, width = _out_shape(x, options)
    itemsize = compute_dtype(x.dtype).itemsize
    planes = max(1, SCRATCH_BYTES // max(1, maps * height * width * itemsize))
    return maps, min(images, max(1, planes // channels)), min(channels, planes), height, width


def _plane_groups(shape: torch.Size, scratch: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """(images, channels) of the groups of planes that the scratch takes one after the other."""
    for image in range(0, shape[0], max(1, scratch[1])):
        for channel in range(0, shape[1], scratch[2]):
            yield slice(image, image + scratch[1]), slice(channel, channel + scratch[2])
