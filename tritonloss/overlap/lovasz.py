"""Lovász-softmax loss: the convex extension of the Jaccard loss, by bins of its errors.

Bytes per pass, with L of logits and T of labels: forward 2 L + T, and backward 2 L + T with the
gradient. The softmax's two statistics are kept for the backward pass, in 8 bytes per pixel (16 for
float64). Beside them there are only the gradient, and 48 bytes for each bin of each class and 256
for the class.

Of interpolated logits L is that of the low resolution, and 4 bytes per pixel of the labels are kept
for the backward pass, which takes 4 more for a while.

With ``exact=True`` there is a number for every logit beside the gradient, and for one class at a
time what its sort takes. Interpolated logits are in memory then, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.lovasz import lovasz_softmax_loss as lovasz_softmax_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule
from .._core.process_groups import ranks_agree
from .lovasz_operator import (
    Around,
    check_around,
    check_bins,
    checked_maps,
    lovasz_operator,
    lovasz_tuning_cases,
    number_of_bins,
    options_of,
)
from .lovasz_terms import SOFTMAX

# How many bins a unit has if none are asked for, where histograms are quick and where they are not;
# the fewest and the most.
BINS = (1024, 512)
_RANGE = (64, 2048)

LOVASZ_SOFTMAX = lovasz_operator(SOFTMAX)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return lovasz_tuning_cases(SOFTMAX, LOVASZ_SOFTMAX, 19, BINS)


# --- function and module --------------------------------------------------------------------------


def lovasz_softmax_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    classes: str | tuple[int, ...] = "present",
    per_image: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    exact: bool = False,
    bins: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Lovász-softmax loss: the mean over classes of the Jaccard loss, extended to probabilities.

    Of a class, with the errors e = |y - p| of all valid pixels from the largest on, of which c are
    the class's own up to rank r and n are others, out of F own ones in all:

        sum_r e_(r) w_(r)    with w = 1 / (F + n) of an own pixel
                                  w = (F - c) / ((F + n) (F + n - 1)) of another

    which is the integral from 0 to 1 of the Jaccard loss of the pixels whose error is above t. No
    gradient passes through w.

    Nothing is sorted: the errors of each class are counted in bins, at whose edges that Jaccard
    loss is exact. Its integral is off by no more than 1 / (2 bins), whatever the logits. Measured
    with a million pixels, a class of 30 %, 1 % or 0.01 % of them, and logits from the start of a
    training to its end, it was off by up to 1.1e-5 with 1024 bins and 1.2e-4 with 512. The gradient
    has the w of the error's bin, interpolated: 1 less its cosine to the exact one was up to 6e-5
    and 9e-5, where the class is the rarest, and below 2e-7 for the others.

    The counts are integers, however many pixels there are, and the loss is deterministic. Under an
    ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and infinity make the
    loss NaN, and the gradient of their own pixel; no other pixel's gradient is changed by them. The
    probability of -infinity is 0.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides. Or
            [N, C, L], or volumes [N, C, D, H, W], of which those whose slices do not lie one behind
            the other are copied. A binary mask of one channel is for :func:`lovasz_hinge_loss`.
        target: integer labels [N, H, W] (or [N, L], [N, D, H, W]), uint8 to int64.
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
            3.9 and on AMD, where histograms with more bins take longer.
        upsample: "bilinear" if the target has a higher resolution than the logits, [N, H, W] with
            H >= h and W >= w of logits [N, C, h, w], at any ratios: the loss of
            ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``,
            which is never in memory unless ``exact``, whose sort takes as much for itself.
            Default None: the same size, as volumes have to have.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch. What ranks add
            up is a histogram; with ``exact`` it has to be None unless images have losses of their
            own, ``per_image``.

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
    around = Around(per_image, ignore_index, exact, upsample, align_corners, process_group)
    with ranks_agree(process_group, logits):
        logits, target = checked_maps(logits, target, upsample, align_corners)
        _check(around, classes, bins, logits)
        checks.check_classes(logits)
        checks.check_labels_in_range(target, logits.size(1), ignore_index)
    bins = number_of_bins(bins, BINS)
    if not serves_triton(logits):
        return lovasz_softmax_reference(
            logits, target, classes=classes, bins=bins, **around._asdict()
        )
    chosen = classes if isinstance(classes, str) else ",".join(str(int(c)) for c in classes)
    return LOVASZ_SOFTMAX(logits, target, options=options_of(around, bins, chosen))[0]


def _check(
    around: Around,
    classes: str | tuple[int, ...],
    bins: int | None,
    logits: torch.Tensor | None = None,
) -> None:
    count = None if logits is None else logits.size(1)
    checks.check_class_choice("classes", classes, count)
    check_around(around, count)
    check_bins(bins, *_RANGE)


def _check_options(*, classes: str | tuple[int, ...], bins: int | None, **around: Any) -> None:
    """Check all options, for any number of classes."""
    _check(Around(**around), classes, bins)


class LovaszSoftmaxLoss(LossModule, function=lovasz_softmax_loss, check=_check_options):
    """:func:`tritonloss.functional.lovasz_softmax_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.LovaszSoftmaxLoss(classes="all")
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example(
        "lovasz_softmax_loss", lovasz_softmax_loss, LOVASZ_SOFTMAX, {"bins": 64}, LovaszSoftmaxLoss
    ),
    Example(
        "lovasz_softmax_loss, exact",
        lovasz_softmax_loss,
        LOVASZ_SOFTMAX,
        {"exact": True, "per_image": True},
        LovaszSoftmaxLoss,
    ),
    Example(
        "lovasz_softmax_loss, upsampled",
        lovasz_softmax_loss,
        LOVASZ_SOFTMAX,
        {"bins": 64, "upsample": "bilinear"},
        LovaszSoftmaxLoss,
        half_resolution_and_target,
    ),
    Example(
        "lovasz_softmax_loss, upsampled and exact",
        lovasz_softmax_loss,
        LOVASZ_SOFTMAX,
        {"exact": True, "upsample": "bilinear"},
        LovaszSoftmaxLoss,
        half_resolution_and_target,
    ),
)
