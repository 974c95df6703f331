"""Lovász losses: the convex extension of the Jaccard loss, of the softmax and of the hinge.

Bytes per pass, with L of logits and T of labels: forward 2 L + T, and backward 2 L + T with the
gradient. The softmax's two statistics are kept for the backward pass, in 8 bytes per pixel (16 for
float64). Beside them there are only the gradient, and 48 bytes for each bin of each class. The
hinge needs no statistics, and reads logits once going forward.

With ``exact=True`` there is a number for every logit beside the gradient, and for one class at a
time what its sort takes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton

from kernels_reference.lovasz import lovasz_hinge_loss as hinge_reference
from kernels_reference.lovasz import lovasz_softmax_loss as softmax_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Launch, Shape, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator
from .._core.tuning_inputs import random_labels, random_map
from .._engine.pixel_terms import Loss
from .lovasz_launch import launch_backward, launch_forward, neighbours
from .lovasz_terms import HINGE, SOFTMAX, Options, Results, allocated

# Before this version a histogram takes Triton the longer the more bins it has.
_QUICK = (3, 9)
# How many bins there are if none are asked for: where histograms are quick, and before.
_SOFTMAX_BINS, _HINGE_BINS = (1024, 512), (4096, 2048)
# The fewest and the most.
_SOFTMAX_RANGE, _HINGE_RANGE = (64, 2048), (1024, 4096)

# --- operators ------------------------------------------------------------------------------------


def _operator(loss: Loss) -> Operator:
    """The operator of one of the losses."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
    ) -> Results:
        return launch_forward(loss, logits, target, options, save)

    def backward(
        grad_loss: torch.Tensor,
        scale: torch.Tensor,
        table: Any,
        largest: Any,
        log_sum: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        saved = Results(grad_loss, scale, table, largest, log_sum)
        return launch_backward(loss, grad_loss, saved, logits, target, options)

    def allocate(
        logits: torch.Tensor, target: torch.Tensor, options: Options, save: bool
    ) -> Results:
        return allocated(loss, logits, target, options, save)

    return Operator(
        loss.name,
        forward=forward,
        backward=backward,
        allocate=allocate,
        results=Results,
        options=Options,
    )


LOVASZ_SOFTMAX = _operator(SOFTMAX)
LOVASZ_HINGE = _operator(HINGE)


# --- functions and modules ------------------------------------------------------------------------


def lovasz_softmax_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    classes: str | tuple[int, ...] = "present",
    per_image: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    exact: bool = False,
    bins: int | None = None,
) -> torch.Tensor:
    """Lovász-softmax loss: the mean over classes of the Jaccard loss, extended to probabilities.

    Of a class, with the errors e = |y - p| of all valid pixels from the largest on, of which c are
    the class's own up to rank r and n are others, out of F own ones in all:

        sum_r e_(r) w_(r)    with w = 1 / (F + n) of an own pixel
                                  w = (F - c) / ((F + n) (F + n - 1)) of another

    which is the integral from 0 to 1 of the Jaccard loss of the pixels whose error is above t. No
    gradient passes through w.

    Nothing is sorted: the errors of each class are counted in bins, at whose edges that Jaccard
    loss is exact. Its integral is off by no more than 1 / (2 bins), whatever the logits (measured:
    {MEASURED}). The gradient has the w of the error's bin, interpolated.

    The counts are integers, however many pixels there are, and the loss is deterministic. Under an
    ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and infinity make the
    loss NaN, and the gradient of their own pixel; no other pixel's gradient is changed by them.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
            Volumes too: [N, C, ..., H, W].
        target: integer labels [N, H, W], or [N, ..., H, W], uint8 to int64.
        classes: whose mean the loss is: "present" (default) for those that a valid pixel is of,
            "all", or their numbers. The loss of a class without pixels is the largest of its
            probabilities.
        per_image: False (default) for the loss of all images together, True for the mean over
            images, where one without valid pixels counts as 0.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        exact: sort the errors of each class instead (default False). That takes many times as long,
            and the memory of a float32 number for each logit. The w are exact for any number of
            pixels; differences of Jaccard losses in float32, as they are often computed, are not.
        bins: 1 / bins is the width of the widest bins; nearer to 0 and to 1 than 1/32 they are the
            narrower. A power of two from 64 to 2048. Default None: 1024, or 512 under Triton before
            3.9, where histograms with more bins take longer.

    Returns:
        The loss in float32 (float64 for float64 logits), 0 with zero gradient where no pixel is
        valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Berman et al., "The Lovász-Softmax loss: A tractable surrogate for the optimization of the
        intersection-over-union measure in neural networks", Eq. 8, 9 and 12.

    Example:
        >>> import torch
        >>> from tritonloss.functional import lovasz_softmax_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> lovasz_softmax_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    logits, target = _of_images(logits, target)
    checks.check_logits(logits)
    checks.check_target(logits, target)
    _check_softmax_options(classes, per_image, ignore_index, exact, bins, logits)
    checks.check_classes(logits)
    checks.check_labels_in_range(target, logits.size(1), ignore_index)
    bins = _bins(bins, _SOFTMAX_BINS)
    if not serves_triton(logits):
        return softmax_reference(
            logits,
            target,
            classes=classes,
            per_image=per_image,
            ignore_index=ignore_index,
            exact=exact,
            bins=bins,
        )
    options = Options(
        bins,
        classes if isinstance(classes, str) else ",".join(str(int(c)) for c in classes),
        per_image,
        checks.plain_label(ignore_index),
        exact,
    )
    return LOVASZ_SOFTMAX(logits, target, options=options)[0]


def lovasz_hinge_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    per_image: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    exact: bool = False,
    bins: int | None = None,
) -> torch.Tensor:
    """Lovász hinge: the Jaccard loss of a binary mask, extended to margins.

    The sum of max(0, e) w over the errors e = 1 - z (2 y - 1) of all valid pixels, with the w of
    :func:`lovasz_softmax_loss`. It is the integral from 0 to infinity of the Jaccard loss of the
    pixels whose error is above t, which no gradient passes through.

    Nothing is sorted: the errors are counted in bins, at whose edges that Jaccard loss is exact.
    With n = bins / 32 bins for each power of two between 2^-10 and 2^18, the loss is off by no more
    than 1 / (2 n) of itself and 2^-11 (measured: {MEASURED}). Errors of 2^18 and more, as of a
    training that has diverged, have bins 32 times as wide.

    Args:
        logits: [N, 1, H, W], float16, bfloat16 or float32 (or float64), any strides. Volumes too:
            [N, 1, ..., H, W].
        target: labels 0 and 1 [N, H, W], or [N, ..., H, W], uint8 to int64.
        per_image: False (default) for the loss of all images together, True for the mean over
            images, where one without valid pixels counts as 0.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255. Other
            labels than 0 and 1 raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        exact: sort the errors instead (default False). That takes many times as long.
        bins: how many bins there are, a power of two from 1024 to 4096. Default None: 4096, or 2048
            under Triton before 3.9, where histograms with more bins take longer.

    Returns:
        The loss in float32 (float64 for float64 logits), 0 with zero gradient where no pixel is
        valid. The gradient has the dtype of the logits. NaN and an infinite error make the loss
        NaN, and the gradient of their pixel.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Yu and Blaschko, "The Lovász Hinge: A Novel Convex Surrogate for Submodular Losses"; Berman
        et al., "The Lovász-Softmax loss", Section 3.1.

    Example:
        >>> import torch
        >>> from tritonloss.functional import lovasz_hinge_loss
        >>> logits = torch.randn(2, 1, 32, 64, requires_grad=True)
        >>> lovasz_hinge_loss(logits, torch.randint(0, 2, (2, 32, 64))).backward()
        >>> logits.grad.shape
        torch.Size([2, 1, 32, 64])
    """
    logits, target = _of_images(logits, target)
    checks.check_logits(logits)
    checks.check_target(logits, target)
    _check_hinge_options(per_image, ignore_index, exact, bins)
    if logits.size(1) != 1:
        raise ValueError(
            "logits must have one channel, of a binary mask with labels 0 and 1 (for several "
            f"classes use lovasz_softmax_loss); got {checks.described(logits)}"
        )
    checks.check_labels_in_range(target, 2, ignore_index)
    bins = _bins(bins, _HINGE_BINS)
    if not serves_triton(logits):
        return hinge_reference(
            logits, target, per_image=per_image, ignore_index=ignore_index, exact=exact, bins=bins
        )
    options = Options(bins, "all", per_image, checks.plain_label(ignore_index), exact)
    return LOVASZ_HINGE(logits, target, options=options)[0]


def _of_images(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    """Logits and labels of volumes as those of images with more rows; anything else as it is."""
    given = isinstance(logits, torch.Tensor), isinstance(target, torch.Tensor)
    if not all(given) or logits.is_nested or target.is_nested or logits.dim() < 5:
        return logits, target
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        return logits, target
    return logits.flatten(2, -2), target.flatten(1, -2)


def _bins(bins: int | None, defaults: tuple[int, int]) -> int:
    """How many bins there are."""
    if bins is not None:
        return int(bins)
    version = re.findall(r"\d+", triton.__version__)
    return defaults[tuple(map(int, version[:2])) < _QUICK]


def _check_softmax_options(
    classes: str | tuple[int, ...],
    per_image: bool,
    ignore_index: int | None,
    exact: bool,
    bins: int | None,
    logits: torch.Tensor | None = None,
) -> None:
    """Check all options; without ``logits``, for any number of classes."""
    count = None if logits is None else logits.size(1)
    _check_chosen(classes, count)
    checks.check_flag("per_image", per_image)
    checks.check_ignore_index(ignore_index, count)
    checks.check_flag("exact", exact)
    _check_bins(bins, *_SOFTMAX_RANGE)


def _check_hinge_options(
    per_image: bool, ignore_index: int | None, exact: bool, bins: int | None
) -> None:
    checks.check_flag("per_image", per_image)
    checks.check_ignore_index(ignore_index)
    checks.check_flag("exact", exact)
    _check_bins(bins, *_HINGE_RANGE)


def _check_chosen(classes: str | Sequence[int], count: int | None) -> None:
    """``classes`` must be "present", "all", or numbers of different classes."""
    if isinstance(classes, str) and classes in ("present", "all"):
        return
    accepted = "classes must be 'present', 'all' or a tuple of different classes"
    if not isinstance(classes, (str, tuple, list)):
        raise TypeError(f"{accepted}; got {classes!r} of type {type(classes).__name__}")
    if isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
        raise ValueError(f"{accepted}; got {classes!r}")
    for channel in classes:
        checks.check_integer("classes", channel, 0, 2**31 - 1 if count is None else count - 1)


def _check_bins(bins: int | None, low: int, high: int) -> None:
    """``bins`` must be a power of two in a range, or None."""
    if bins is None:
        return
    checks.check_integer("bins", bins, low, high)
    if bins & (bins - 1):
        raise ValueError(f"bins must be a power of two from {low} to {high}; got {bins}")


class LovaszSoftmaxLoss(LossModule, function=lovasz_softmax_loss, check=_check_softmax_options):
    """:func:`tritonloss.functional.lovasz_softmax_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.LovaszSoftmaxLoss(classes="all")
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


class LovaszHingeLoss(LossModule, function=lovasz_hinge_loss, check=_check_hinge_options):
    """:func:`tritonloss.functional.lovasz_hinge_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.LovaszHingeLoss(per_image=True)
        >>> criterion(torch.randn(2, 1, 32, 64), torch.randint(0, 2, (2, 32, 64))).shape
        torch.Size([])
    """


# --- tuning and examples --------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    cases = []
    for loss, classes in ((SOFTMAX, 19), (HINGE, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            sized = functools.partial(_tuning_pass, loss, dtype)
            run = functools.partial(sized, (2, classes, 512, 512), "contiguous")
            for direction in ("forward", "histogram", "backward"):
                if loss.binary and direction == "forward":  # of the exact loss alone
                    continue
                candidates = functools.partial(neighbours, loss, direction, dtype)
                case = TuningCase(
                    f"{loss.name}_{direction}",
                    classes,
                    1,
                    dtype,
                    "contiguous",
                    run,
                    candidates(classes, "contiguous"),
                )
                if not loss.binary:
                    case = replace(case, sized=sized, sized_candidates=candidates)
                cases.append(case)
    return cases


def _tuning_pass(
    loss: Loss, dtype: torch.dtype, shape: Shape, layout: str, device: torch.device
) -> Launch:
    """A launch of both passes."""
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)
    operator, bins = (LOVASZ_HINGE, _HINGE_BINS) if loss.binary else (LOVASZ_SOFTMAX, _SOFTMAX_BINS)
    options = Options(_bins(None, bins), "all")

    def both_passes() -> tuple[torch.Tensor, ...]:
        return operator.both_passes(logits, target, options=options)

    return both_passes


def _mask_and_target(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the hinge takes: one channel, and labels 0 and 1."""
    return logits[:, :1], torch.where((target > 1) & (target < logits.size(1)), 0, target)


EXAMPLES = (
    Example(
        "lovasz_softmax_loss",
        lovasz_softmax_loss,
        LOVASZ_SOFTMAX,
        {"bins": 64},
        LovaszSoftmaxLoss,
    ),
    Example(
        "lovasz_softmax_loss, exact",
        lovasz_softmax_loss,
        LOVASZ_SOFTMAX,
        {"exact": True, "per_image": True},
        LovaszSoftmaxLoss,
    ),
    Example(
        "lovasz_hinge_loss",
        lovasz_hinge_loss,
        LOVASZ_HINGE,
        {"bins": 1024},
        LovaszHingeLoss,
        _mask_and_target,
    ),
)
