"""SSIM of two images, and of sigmoid maps and labels as a loss.

With window means m, variances s and the residual d = x - y (SSL paper, Eq. 6):

    1 - S_1 = m_d^2 / (m_x^2 + m_y^2 + C1)          u, the luminance's dissimilarity
    1 - S_2 = s_d / (s_x + s_y + C2)                v, the contrast-structure's
    1 - SSIM = u + v - u v                          Eq. 7;  Eq. 9 is v alone

Bytes per pass, X and Y of the inputs (labels for a loss): forward X + Y, and the map if it is
wanted; backward X + Y twice, and the gradients. The backward recomputes the moments instead of
keeping maps of them: group by group of planes it writes three coefficient maps (four with a
gradient to y) into a scratch that fits a GPU's L2 cache, and lets the window's adjoint read them
back from there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from kernels_reference.ssim import ssim as ssim_reference
from kernels_reference.ssim import ssim_loss as ssim_loss_reference

from .._core import checks
from .._core.backend import device_guard, serves_triton
from .._core.configurations import Configuration, Launch, Shape, TuningCase
from .._core.operator import Operator
from .._core.prepared_launch import launch_kernel
from .._core.tuning_inputs import random_map
from .._engine.strips import (
    compute_dtype,
    ignored_class,
    strides,
    strip_candidates,
    strip_configuration,
    strip_heuristic,
    strip_launch,
    window_of,
)
from .ssim_kernels import (
    Similarity,
    _ssim_backward_kernel,
    _ssim_coefficients_kernel,
    _ssim_finish_kernel,
    _ssim_forward_kernel,
)

FORMS = ("full", "contrast_structure")
IMAGE_PADDINGS = ("zeros", "valid", "reflect")
REDUCTIONS = ("mean", "none")

# The coefficient maps of one group of planes: small enough to stay in the L2 cache of a large GPU.
SCRATCH_BYTES = 32 * 2**20

# --- launchers ------------------------------------------------------------------------------------


def _ssim_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    similarity: Similarity,
    window_size: int,
    sigma: float,
    padding: str,
    mapped: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [] or map, scale []): mean dissimilarity of a loss, mean similarity of images."""
    result, scale = _empty_results(x, window_size, padding, mapped)
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
            y_strides=strides(y, launch["STRIP"]),
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


def _ssim_backward(
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
    grad_x, grad_y = _empty_gradients(x, y, both)
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
            y_strides=strides(y, strip),
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
            y_strides=strides(y, strip),
            grad_x_strides=strides(grad_x, strip),
            grad_y_strides=strides(moved[-1], strip),
            SHIFT=-(window.size - 1) if window.padding == "valid" else -(window.size // 2),
            BOTH=both,
            **arguments,
            **launch,
        )


def _heuristic(operator: str, window_size: int) -> Configuration:
    configuration = strip_heuristic(4 if window_size <= 5 else 2 if window_size <= 11 else 1)
    if operator != "ssim_forward":
        configuration["ROWS"] = 32  # a group of planes makes few programs of 64 rows
    if operator == "ssim_backward" and window_size > 21:
        # With four warps ptxas keeps to 168 registers, for a spill of 8 bytes.
        configuration["LANES"] = 2 * int(configuration["LANES"])
        configuration["num_warps"] = 8
    return configuration


def _configuration(operator: str, x: torch.Tensor, window_size: int) -> Configuration:
    return strip_configuration(operator, x, window_size, _heuristic(operator, window_size))


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    cases = []
    for window_size in (11, 7):
        for dtype in (torch.float32, torch.bfloat16):
            for operator in ("ssim_forward", "ssim_coefficients", "ssim_backward"):
                forward_only = operator == "ssim_forward"
                sized = functools.partial(_tuning_pass, window_size, dtype, forward_only)
                run = functools.partial(sized, (16, 3, 512, 512), "contiguous")
                candidates = strip_candidates(_heuristic(operator, window_size))
                arguments = (3, window_size, dtype, "contiguous", run, candidates)
                cases.append(TuningCase(operator, *arguments, sized=sized))
    return cases


def _tuning_pass(
    window_size: int,
    dtype: torch.dtype,
    forward_only: bool,
    shape: Shape,
    layout: str,
    device: torch.device,
) -> Launch:
    x = random_map(shape, layout, dtype, device)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    options = ImageOptions(window_size, 1.5, 1.0, "zeros", mapped=False)
    if forward_only:
        return lambda: _image_forward(x, y, options)
    mean, scale = _image_forward(x, y, options)
    return lambda: _image_backward(torch.ones_like(mean), scale, x, y, True, options)


def _out_shape(x: torch.Tensor, window_size: int, padding: str) -> torch.Size:
    lost = window_size - 1 if padding == "valid" else 0
    return torch.Size((*x.shape[:2], x.size(2) - lost, x.size(3) - lost))


def _empty_results(
    x: torch.Tensor, window_size: int, padding: str, mapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(x.dtype)
    scale = torch.empty((), dtype=dtype, device=x.device)
    if mapped:
        shape = _out_shape(x, window_size, padding)
        return torch.empty(shape, dtype=dtype, device=x.device), scale
    return torch.empty_like(scale), scale


def _empty_gradients(
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


# --- operators ------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What a forward pass returns."""

    result: torch.Tensor  # the mean [], or the map
    scale: torch.Tensor  # []


class LossOptions(NamedTuple):
    """The options of the loss, as they pass through its operator."""

    full: bool
    window_size: int
    sigma: float
    c1: float
    c2: float
    ignore_index: int | None

    def similarity(self, logits: torch.Tensor, target: torch.Tensor) -> Similarity:
        """What the kernels are compiled for."""
        ignored = ignored_class(self.ignore_index, logits.size(1), target.dtype)
        return Similarity(True, self.full, self.c1, self.c2, ignored)


class ImageOptions(NamedTuple):
    """The options of the similarity of two images, as they pass through its operator."""

    window_size: int
    sigma: float
    data_range: float
    padding: str
    mapped: bool

    def similarity(self) -> Similarity:
        """What the kernels are compiled for."""
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        return Similarity(False, True, c1, c2, -1)


def _loss_forward(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> Results:
    similarity = options.similarity(logits, target)
    window = (options.window_size, options.sigma, "zeros")
    return Results(*_ssim_forward(logits, target, similarity, *window, mapped=False))


def _loss_backward(
    grad_result: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
) -> torch.Tensor:
    similarity = options.similarity(logits, target)
    window = (options.window_size, options.sigma, "zeros")
    arguments = (grad_result, scale, logits, target, similarity, *window)
    return _ssim_backward(*arguments, both=False)[0]


def _loss_results(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> Results:
    return Results(*_empty_results(logits, options.window_size, "zeros", mapped=False))


def _image_forward(x: torch.Tensor, y: torch.Tensor, options: ImageOptions) -> Results:
    window = (options.window_size, options.sigma, options.padding)
    return Results(*_ssim_forward(x, y, options.similarity(), *window, options.mapped))


def _image_backward(
    grad_result: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    wants_y: bool,
    options: ImageOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    window = (options.window_size, options.sigma, options.padding)
    return _ssim_backward(grad_result, scale, x, y, options.similarity(), *window, wants_y)


def _image_results(x: torch.Tensor, y: torch.Tensor, options: ImageOptions) -> Results:
    return Results(*_empty_results(x, options.window_size, options.padding, options.mapped))


def _image_gradients(
    x: torch.Tensor, y: torch.Tensor, wants_y: bool, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_gradients(x, y, wants_y)


SSIM_LOSS = Operator(
    "ssim_loss",
    forward=_loss_forward,
    backward=_loss_backward,
    allocate=_loss_results,
    results=Results,
    options=LossOptions,
)
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


# --- functions ------------------------------------------------------------------------------------


def ssim_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    form: str = "full",
    window_size: int = 11,
    sigma: float = 1.5,
    c1: float = 1e-4,
    c2: float = 9e-4,
    ignore_index: int | None = checks.IGNORE_INDEX,
) -> torch.Tensor:
    """SSIM loss: one minus the structural similarity of sigmoid(logits) and the one-hot target.

    With window means m, variances s and covariance s_xy of x = sigmoid(logits) and y = one-hot:

        "full":   1 - (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x + s_y + C2))
        "contrast_structure":   1 - (2 s_xy + C2) / (s_x + s_y + C2)

    averaged over valid pixels and classes. The gradient flows through all window terms. Outside the
    image and at ignored pixels x = y = 0. With one class y = (target == 1).

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN makes the
    loss NaN, and of its class the gradient of every pixel that shares a window with it; an
    infinite logit is a probability of 0 or 1.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64: 0 to C - 1, or 0 and 1 if C is 1.
        form: "full" (Eq. 7, default) or "contrast_structure" (Eq. 9).
        window_size: side of the Gaussian window in pixels, odd, 1 to 31. Default 11.
        sigma: standard deviation of the window in pixels, 0.001 to 1e6. Default 1.5.
        c1: stability of the luminance term, 1e-20 to 1e20. Default 0.01^2.
        c2: stability of the contrast-structure term, 1e-20 to 1e20. Default 0.03^2.
        ignore_index: label of pixels that take part in nothing, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels out of range raise on the CPU; on a GPU they count as ignored unless
            TRITONLOSS_CHECK_LABELS=1 is set.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits) in [0, 2]; 0 with zero gradient if
        no pixel is valid.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is.

    Reference:
        Zhao et al., "Structural Similarity Loss for Semantic Segmentation", Eq. 7 and 9.

    Example:
        >>> import torch
        >>> from tritonloss.functional import ssim_loss
        >>> logits = torch.randn(2, 3, 32, 32, requires_grad=True)
        >>> ssim_loss(logits, torch.randint(0, 3, (2, 32, 32))).backward()
        >>> logits.grad.shape
        torch.Size([2, 3, 32, 32])
    """
    checks.check_logits(logits)
    checks.check_target(logits, target)
    _check_options(form, window_size, sigma, c1, c2, ignore_index, logits.size(1))
    checks.check_labels_in_range(target, checks.labels_of(logits), ignore_index)
    if not serves_triton(logits):
        return ssim_loss_reference(
            logits,
            target,
            form=form,
            window_size=window_size,
            sigma=sigma,
            c1=c1,
            c2=c2,
            ignore_index=ignore_index,
        )
    options = LossOptions(
        full=form == "full",
        window_size=int(window_size),
        sigma=float(sigma),
        c1=float(c1),
        c2=float(c2),
        ignore_index=None if ignore_index is None else int(ignore_index),
    )
    return SSIM_LOSS(logits, target, options=options)[0]


def _check_options(
    form: str,
    window_size: int,
    sigma: float,
    c1: float,
    c2: float,
    ignore_index: int | None,
    classes: int | None = None,
) -> None:
    """All options; without ``classes``, for any number of them."""
    checks.check_option("form", form, FORMS)
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_range("c1", c1, 1e-20, 1e20)
    checks.check_range("c2", c2, 1e-20, 1e20)
    checks.check_ignore_index(ignore_index, classes)


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


# --- module ---------------------------------------------------------------------------------------


class SSIMLoss(nn.Module):
    """:func:`tritonloss.functional.ssim_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.SSIMLoss(form="contrast_structure")
        >>> criterion(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        form: str = "full",
        window_size: int = 11,
        sigma: float = 1.5,
        c1: float = 1e-4,
        c2: float = 9e-4,
        ignore_index: int | None = checks.IGNORE_INDEX,
    ) -> None:
        super().__init__()
        _check_options(form, window_size, sigma, c1, c2, ignore_index)
        self.form = form
        self.window_size = window_size
        self.sigma = sigma
        self.c1 = c1
        self.c2 = c2
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits [N, C, H, W], target [N, H, W] -> scalar."""
        return ssim_loss(
            logits,
            target,
            form=self.form,
            window_size=self.window_size,
            sigma=self.sigma,
            c1=self.c1,
            c2=self.c2,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"form={self.form!r}, window_size={self.window_size}, sigma={self.sigma}, "
            f"c1={self.c1}, c2={self.c2}, ignore_index={self.ignore_index}"
        )
