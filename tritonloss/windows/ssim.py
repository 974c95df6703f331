"""SSIM of two images; ``ssim_loss.py`` makes it a loss of sigmoid maps and labels.

With window means m, variances s and the residual d = x - y (SSL paper, Eq. 6):

    1 - S_1 = m_d^2 / (m_x^2 + m_y^2 + C1)          u, the luminance's dissimilarity
    1 - S_2 = s_d / (s_x + s_y + C2)                v, the contrast-structure's
    1 - SSIM = u + v - u v                          Eq. 7;  Eq. 9 is v alone

Bytes per pass, with X and Y of the inputs (Y are labels for a loss): forward X + Y, and the map if
it is wanted; backward X + Y twice, and the gradients. The backward pass recomputes the moments
instead of keeping maps of them. It writes three coefficient maps (four with a gradient of y), of a
few planes at a time, into a scratch. The window's adjoint reads them back from there, all in one
launch (``ssim_backward_kernels.py``).

Where single pixels are shown (the map), constants are small or windows wide, the moments are those
of ``ssim_moments.py``; elsewhere the plain sums of ``ssim_sums.py`` are right enough. The loss's
values are evaluated once for all lanes that see them (``ssim_values.py``), which takes 8 KiB of
memory for each program.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from kernels_reference.ssim import ssim as ssim_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, Shape, TuningCase
from .._core.example import Example
from .._core.operator import Operator
from .._core.tuning_inputs import random_map
from .._engine.strip_launch import strip_candidates
from .ssim_launch import (
    Results,
    empty_gradients,
    empty_results,
    operator_of,
    ssim_backward,
    ssim_forward,
    ssim_heuristic,
)
from .ssim_options import ImageOptions

IMAGE_PADDINGS = ("zeros", "valid", "reflect")
REDUCTIONS = ("mean", "none")

# --- operator -------------------------------------------------------------------------------------


def _image_forward(x: torch.Tensor, y: torch.Tensor, options: ImageOptions) -> Results:
    return ssim_forward(x, y, options)


def _image_backward(
    grad_result: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    wants_y: bool,
    options: ImageOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    return ssim_backward(grad_result, scale, x, y, options, wants_y)


def _image_results(x: torch.Tensor, y: torch.Tensor, options: ImageOptions) -> Results:
    return empty_results(x, options)


def _image_gradients(
    x: torch.Tensor, y: torch.Tensor, wants_y: bool, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_gradients(x, y, wants_y)


SSIM = Operator(
    "ssim",
    forward=_image_forward,
    backward=_image_backward,
    allocate=_image_results,
    allocate_gradient=_image_gradients,
    results=Results,
    options=ImageOptions,
    differentiable=("x", "y"),
)


# --- function -------------------------------------------------------------------------------------


def ssim(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "zeros",
    reduction: str = "mean",
) -> torch.Tensor:
    """Structural similarity (SSIM) of two images, differentiable in both.

        (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x + s_y + C2))

    with window means m, variances s, covariance s_xy, C1 = (0.01 data_range)^2 and
    C2 = (0.03 data_range)^2. Nothing is clamped: values lie in [-1, 1].

    A pixel that is not finite makes the similarity NaN where the window holds it, and in its
    channel the gradient of every pixel that shares a window with it.

    Args:
        x: image [N, C, H, W], float16, bfloat16 or float32 (or float64), any strides.
        y: the other image, of the same shape, dtype and device.
        window_size: side of the Gaussian window in pixels, odd, 1 to 31. Default 11.
        sigma: standard deviation of the window in pixels, 0.001 to 1e6. Default 1.5.
        data_range: largest minus smallest possible value, 1e-6 to 1e9. Default 1.
        padding: "zeros" (default), "reflect", or "valid": only windows inside the images, as
            pytorch-msssim does.
        reduction: "mean" (default), or "none" for the similarity of every pixel.

    Returns:
        A float32 scalar, or the map [N, C, H, W] (smaller by window_size - 1 for "valid"); float64
        for float64 images.

    Raises:
        TypeError: an argument has the wrong type or dtype, or y another dtype than x.
        ValueError: shapes or devices do not match, or an option is out of range.

    Reference:
        Wang et al., "Image quality assessment: from error visibility to structural similarity";
        SSL paper, Eq. 6.

    Example:
        >>> import torch
        >>> from tritonloss.functional import ssim
        >>> x = torch.rand(1, 3, 32, 32)
        >>> round(float(ssim(x, x)), 6)
        1.0
    """
    checks.check_images(x, y)
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_range("data_range", data_range, 1e-6, 1e9)
    checks.check_option("padding", padding, IMAGE_PADDINGS)
    checks.check_option("reduction", reduction, REDUCTIONS)
    checks.check_padding_fits(x, window_size, padding, "x")
    if not serves_triton(x):
        return ssim_reference(
            x,
            y,
            window_size=window_size,
            sigma=sigma,
            data_range=data_range,
            padding=padding,
            reduction=reduction,
        )
    options = ImageOptions(
        int(window_size), float(sigma), float(data_range), padding, mapped=reduction == "none"
    )
    return SSIM(x, y, options=options)[0]


# --- tuning ---------------------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    cases = []
    for window_size, mapped in ((11, False), (7, False), (11, True)):
        options = ImageOptions(window_size, 1.5, 1.0, "zeros", mapped)
        for dtype in (torch.float32, torch.bfloat16):
            for direction in ("forward", "backward"):
                sized = functools.partial(_tuning_pass, options, dtype, direction)
                run = functools.partial(sized, (16, 3, 512, 512), "contiguous")
                candidates = strip_candidates(ssim_heuristic(direction, options))
                operator = operator_of(direction, options)
                arguments = (3, window_size, dtype, "contiguous", run, candidates)
                cases.append(TuningCase(operator, *arguments, sized=sized))
    return cases


def _tuning_pass(
    options: ImageOptions,
    dtype: torch.dtype,
    direction: str,
    shape: Shape,
    layout: str,
    device: torch.device,
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    if direction == "forward":
        return lambda: _image_forward(x, y, options)
    result, scale = _image_forward(x, y, options)
    return lambda: _image_backward(torch.ones_like(result), scale, x, y, True, options)


def _two_images(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = torch.sigmoid(logits)
    return x, x.flip(-1)


EXAMPLES = (
    Example("ssim", ssim, SSIM, {"window_size": 3}, arguments=_two_images),
    Example(
        "ssim, map", ssim, SSIM, {"window_size": 3, "reduction": "none"}, arguments=_two_images
    ),
)
