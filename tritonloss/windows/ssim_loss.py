"""SSIM of sigmoid maps and one-hot labels, as a loss; ``ssim.py`` has the mathematics."""

from __future__ import annotations

import functools

import torch
from torch.distributed import ProcessGroup

from kernels_reference.ssim import ssim_loss as ssim_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, Shape, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .._core.tuning_inputs import random_labels, random_map
from .._engine.strip_launch import strip_candidates
from .ssim_launch import (
    Results,
    empty_results,
    operator_of,
    ssim_backward,
    ssim_forward,
    ssim_heuristic,
)
from .ssim_options import LossOptions

FORMS = ("full", "contrast_structure")

# --- operator -------------------------------------------------------------------------------------


def _loss_forward(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> Results:
    return ssim_forward(logits, target, options)


def _loss_backward(
    grad_result: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
) -> torch.Tensor:
    return ssim_backward(grad_result, scale, logits, target, options, both=False)[0]


def _loss_results(logits: torch.Tensor, target: torch.Tensor, options: LossOptions) -> Results:
    return empty_results(logits, options)


SSIM_LOSS = Operator(
    "ssim_loss",
    forward=_loss_forward,
    backward=_loss_backward,
    allocate=_loss_results,
    results=Results,
    options=LossOptions,
)


# --- function -------------------------------------------------------------------------------------


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
    process_group: ProcessGroup | None = None,
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
        ignore_index: label of pixels that are ignored, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels out of range raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits) in [0, 2]; 0 with zero gradient if
        no pixel is valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

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
    with ranks_agree(process_group, logits):
        checks.check_logits(logits)
        checks.check_target(logits, target)
        _check_options(
            form, window_size, sigma, c1, c2, ignore_index, process_group, logits.size(1)
        )
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
            process_group=process_group,
        )
    options = LossOptions(
        full=form == "full",
        window_size=int(window_size),
        sigma=float(sigma),
        c1=float(c1),
        c2=float(c2),
        ignore_index=checks.plain_label(ignore_index),
        group=name_of(process_group),
    )
    return SSIM_LOSS(logits, target, options=options)[0]


def _check_options(
    form: str,
    window_size: int,
    sigma: float,
    c1: float,
    c2: float,
    ignore_index: int | None,
    process_group: ProcessGroup | None,
    classes: int | None = None,
) -> None:
    """Check all options; without ``classes``, for any number of them."""
    checks.check_option("form", form, FORMS)
    checks.check_window_size(window_size)
    checks.check_sigma(sigma)
    checks.check_range("c1", c1, 1e-20, 1e20)
    checks.check_range("c2", c2, 1e-20, 1e20)
    checks.check_ignore_index(ignore_index, classes)
    check_process_group(process_group)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice: the backward pass.

    The forward pass shares its configurations with that of images, which ``ssim.py`` tunes.
    """
    cases = []
    for window_size in (11, 7):
        options = LossOptions(True, window_size, 1.5, 1e-4, 9e-4, checks.IGNORE_INDEX)
        for dtype in (torch.float32, torch.bfloat16):
            sized = functools.partial(_tuning_pass, options, dtype)
            run = functools.partial(sized, (4, 19, 512, 1024), "contiguous")
            candidates = strip_candidates(ssim_heuristic("backward", options))
            arguments = (19, window_size, dtype, "contiguous", run, candidates)
            cases.append(TuningCase(operator_of("backward", options), *arguments, sized=sized))
    return cases


def _tuning_pass(
    options: LossOptions, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    result, scale = _loss_forward(logits, target, options)
    return lambda: _loss_backward(torch.ones_like(result), scale, logits, target, options)


# --- module ---------------------------------------------------------------------------------------


class SSIMLoss(LossModule, function=ssim_loss, check=_check_options):
    """:func:`tritonloss.functional.ssim_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.SSIMLoss(form="contrast_structure")
        >>> criterion(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))).shape
        torch.Size([])
    """


EXAMPLES = tuple(
    Example(
        f"ssim_loss, {form}",
        ssim_loss,
        SSIM_LOSS,
        {"form": form, "window_size": 3},
        SSIMLoss,
    )
    for form in FORMS
)
