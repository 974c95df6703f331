"""Local Gaussian-window statistics: mean and variance of every k x k neighbourhood.

The building block of the structural losses, which is public as well. How the kernels walk over an
image is documented in ``_engine/strips.py``; why the variance is exact on flat maps, in
``_engine/strip_windows.py``.

Bytes per pixel of a float32 map: forward 12 (x; mean, variance), backward 20 (x, mean and both
gradients; the gradient of x).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kernels_reference.gaussian_window import gaussian_statistics as gaussian_statistics_reference

from .._core import checks
from .._core.backend import device_guard, serves_triton
from .._core.configurations import Configuration, Launch, Shape, TuningCase
from .._core.example import Example
from .._core.operator import Operator
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._core.tuning_inputs import random_map
from .._engine.planes import compute_dtype
from .._engine.strip_launch import (
    channels_in_lanes,
    strides,
    strip_candidates,
    strip_configuration,
    strip_heuristic,
    strip_launch,
)
from .._engine.strip_windows import PADDINGS, Window, window_of
from .gaussian_statistics_kernels import (
    _gaussian_statistics_backward_kernel,
    _gaussian_statistics_forward_kernel,
)

# --- launchers ------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The options of the statistics, as they pass through the operator."""

    window_size: int
    sigma: float
    padding: str


class Results(NamedTuple):
    """Both maps of a forward pass, [N, C, H, W], smaller for padding "valid"."""

    mean: torch.Tensor
    variance: torch.Tensor


def _empty_statistics(x: torch.Tensor, options: Options) -> Results:
    """The maps that a forward pass fills, channels_last if x is."""
    lost = options.window_size - 1 if options.padding == "valid" else 0
    shape = (*x.shape[:2], x.size(2) - lost, x.size(3) - lost)
    layout = torch.channels_last if channels_in_lanes(x) else torch.contiguous_format
    dtype = compute_dtype(x.dtype)
    mean = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    variance = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    return Results(mean, variance)


def _forward_heuristic(window_size: int, in_lanes: bool = False) -> Configuration:
    columns = 4 if window_size <= 11 else 1
    # In channels_last two rows at once would double the registers.
    unroll = 2 if window_size <= 7 and not in_lanes else 1
    return strip_heuristic(columns, ROWS=128, UNROLL=unroll)


def _backward_heuristic(window_size: int) -> Configuration:
    # With window 11 four columns spill in channels_last.
    return strip_heuristic(4 if window_size <= 9 else 2 if window_size <= 11 else 1, ROWS=128)


def _gaussian_statistics_forward(x: torch.Tensor, options: Options) -> Results:
    """Mean and variance of every window of x."""
    results = _empty_statistics(x, options)
    launch = prepared(
        ("gaussian_statistics forward", kind(x), options),
        lambda: _forward_launch(x, results.mean, options),
    )
    with device_guard(x):
        launch(x_ptr=x, mean_ptr=results.mean, variance_ptr=results.variance)
    return results


def _forward_launch(x: torch.Tensor, mean: torch.Tensor, options: Options) -> PreparedLaunch:
    window_size, sigma, padding = options
    configuration = strip_configuration(
        "gaussian_statistics_forward",
        x,
        window_size,
        _forward_heuristic(window_size, channels_in_lanes(x)),
    )
    grid, launch = strip_launch(mean.shape, configuration, padding, x, mean)
    arguments = {
        "x_strides": strides(x, launch["STRIP"]),
        "mean_strides": strides(mean, launch["STRIP"]),
        "height": x.size(2),
        "width": x.size(3),
        "out_height": mean.size(2),
        "out_width": mean.size(3),
        "window": window_size,
        "WINDOW": window_of(window_size, sigma, padding),
        "SHIFT": 0 if padding == "valid" else -(window_size // 2),
        **launch,
    }
    return PreparedLaunch(
        _gaussian_statistics_forward_kernel, grid, arguments, launch["STRIP"].grain > 1
    )


def _gaussian_statistics_backward(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """The gradient of x, from those of mean and variance."""
    grad_x = torch.empty_like(x)
    maps = (grad_mean, grad_variance, x, mean)
    launch = prepared(
        ("gaussian_statistics backward", *map(kind, maps), options),
        lambda: _backward_launch(*maps, grad_x, options),
    )
    with device_guard(x):
        launch(
            grad_mean_ptr=grad_mean,
            grad_variance_ptr=grad_variance,
            mean_ptr=mean,
            x_ptr=x,
            grad_x_ptr=grad_x,
        )
    return grad_x


def _backward_launch(
    grad_mean: torch.Tensor,
    grad_variance: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    grad_x: torch.Tensor,
    options: Options,
) -> PreparedLaunch:
    window_size, sigma, padding = options
    configuration = strip_configuration(
        "gaussian_statistics_backward", x, window_size, _backward_heuristic(window_size)
    )
    if padding in ("reflect", "replicate"):
        configuration["COLUMNS"] = 1  # only the streamed row folds the images outside back in
    grid, launch = strip_launch(
        x.shape, configuration, padding, x, mean, grad_mean, grad_variance, grad_x
    )
    strip = launch["STRIP"]
    window = window_of(window_size, sigma, padding)
    arguments = {
        "grad_mean_strides": strides(grad_mean, strip),
        "grad_variance_strides": strides(grad_variance, strip),
        "mean_strides": strides(mean, strip),
        "x_strides": strides(x, strip),
        "grad_x_strides": strides(grad_x, strip),
        "height": x.size(2),
        "width": x.size(3),
        "out_height": mean.size(2),
        "out_width": mean.size(3),
        "window": window_size,
        "WINDOW": window,
        "TAILS": _tails(window),
        "SHIFT": -(window_size - 1) if padding == "valid" else -(window_size // 2),
        **launch,
    }
    return PreparedLaunch(
        _gaussian_statistics_backward_kernel, grid, arguments, launch["STRIP"].grain > 1
    )


def _tails(window: Window) -> tuple[float, ...]:
    """For each tap the sum of weights from its distance outwards: for a repeated edge pixel."""
    middle = window.size // 2
    outwards = [sum(window.weights[middle + distance :]) for distance in range(middle + 1)]
    return tuple(outwards[abs(tap - middle)] for tap in range(window.size))


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    passes = (
        ("gaussian_statistics_forward", _tuning_forward, _forward_candidates),
        ("gaussian_statistics_backward", _tuning_backward, _backward_candidates),
    )
    return [
        TuningCase(
            operator,
            19,
            window_size,
            dtype,
            "contiguous",
            functools.partial(run, window_size, dtype, (2, 19, 512, 1024), "contiguous"),
            candidates(window_size),
            sized=functools.partial(run, window_size, dtype),
            sized_candidates=functools.partial(candidates, window_size),
        )
        for window_size in (3, 7, 11, 5, 9)
        for dtype in (torch.float32, torch.bfloat16)
        for operator, run, candidates in passes
    ]


def _forward_candidates(
    window_size: int, classes: int = 19, layout: str = "contiguous"
) -> list[Configuration]:
    in_lanes = layout == "channels_last" and classes > 1
    return strip_candidates(_forward_heuristic(window_size, in_lanes))


def _backward_candidates(
    window_size: int, classes: int = 19, layout: str = "contiguous"
) -> list[Configuration]:
    return strip_candidates(_backward_heuristic(window_size))


def _tuning_forward(
    window_size: int, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    return lambda: _gaussian_statistics_forward(x, Options(window_size, 1.5, "zeros"))


def _tuning_backward(
    window_size: int, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    options = Options(window_size, 1.5, "zeros")
    mean, variance = _gaussian_statistics_forward(x, options)
    return lambda: _gaussian_statistics_backward(mean, variance, x, mean, options)


# --- operator -------------------------------------------------------------------------------------

STATISTICS = Operator(
    "gaussian_statistics",
    forward=_gaussian_statistics_forward,
    backward=_gaussian_statistics_backward,
    allocate=_empty_statistics,
    results=Results,
    options=Options,
    returned=2,
)


# --- function -------------------------------------------------------------------------------------


def gaussian_statistics(
    x: torch.Tensor, window_size: int = 3, sigma: float = 1.5, padding: str = "zeros"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every pixel's neighbourhood under a Gaussian window.

    mean = sum_i w_i x_i and variance = sum_i w_i (x_i - mean)^2 with the separable weights
    w_i ~ exp(-|i|^2 / (2 sigma^2)) of a window_size x window_size window, summing to 1. The
    variance is computed about the window's centre value: never negative, and without the
    cancellation of E[x^2] - E[x]^2, which gives flat maps a standard deviation of up to 5e-4.
    First-order differentiable through both outputs.

    A value that is not finite makes mean and variance of every window that holds it not finite,
    and the gradient of every pixel of its channel that shares a window with it.

    Args:
        x: maps [N, C, H, W], float16, bfloat16, float32 (or float64), any strides; each channel of
            each image is a map of its own.
        window_size: side of the window in pixels, odd, 1 to 31. Default 3.
        sigma: standard deviation of the window in pixels, 0.001 to 1e6. Default 1.5.
        padding: "zeros", "reflect" (without the edge pixel; needs H and W > window_size // 2),
            "replicate", or "valid": only windows that lie inside the image. Default "zeros".

    Returns:
        (mean, variance), both float32 (float64 for float64 input) [N, C, H, W], or
        [N, C, H - window_size + 1, W - window_size + 1] for "valid".

    Raises:
        TypeError: x is no floating-point tensor, or an option has the wrong type.
        ValueError: x is not four-dimensional or too small for the padding, window_size is even or
            out of range, sigma is out of range, or padding is unknown.

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 14 and 15.

    Example:
        >>> import torch, tritonloss
        >>> mean, variance = tritonloss.gaussian_statistics(torch.rand(2, 3, 32, 32), window_size=7)
        >>> mean.shape, bool((variance >= 0).all())
        (torch.Size([2, 3, 32, 32]), True)
    """
    checks.check_logits(x, "x")
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_option("padding", padding, PADDINGS)
    checks.check_padding_fits(x, window_size, padding, "x")
    if serves_triton(x):
        mean, variance = STATISTICS(x, options=Options(int(window_size), float(sigma), padding))
        return mean, variance
    return gaussian_statistics_reference(x, window_size, sigma, padding)


def _logits_alone(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (logits,)


EXAMPLES = (
    Example(
        "gaussian_statistics",
        gaussian_statistics,
        STATISTICS,
        {"window_size": 5, "padding": "reflect"},
        arguments=_logits_alone,
    ),
)
