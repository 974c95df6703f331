"""Tversky loss of each class: (1 - (TP + s) / (TP + a FP + b FN + s))^gamma; the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.overlap import tversky_loss as tversky_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .scores import OVERLAP, Common, check_common, checked_maps, launched, part_of


def tversky_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    activation: str = "softmax",
    per_image: bool = True,
    smooth: float = 1.0,
    weight: torch.Tensor | None = None,
    classes: str | Sequence[int] = "all",
    include_background: bool = True,
    empty: str = "loss",
    ignore_index: int | None = checks.IGNORE_INDEX,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Tversky loss, or focal Tversky loss, the mean over images and classes.

    Of a class of an image (or of the batch, ``per_image=False``), with its probabilities p and
    pixels y:

        (1 - (TP + s) / (TP + a FP + b FN + s))^gamma

    with the sums TP of p y, FP of p (1 - y) and FN of (1 - p) y over valid pixels. A denominator is
    at least 1e-7. Where gamma is below 1, the loss of 0 has a gradient of 0.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN, or
    infinity in a softmax, makes the loss NaN; -infinity is a probability of 0.

    Args:
        logits: [N, C, H, W], float16, bfloat16 or float32 (or float64), any strides. Or [N, C, L],
            or volumes [N, C, D, H, W], of which those whose slices do not lie one behind the other
            are copied.
        target: integer labels [N, H, W] (or [N, L], [N, D, H, W]), uint8 to int64: 0 to C - 1, or 0
            and 1 if C is 1.
        alpha: a, the weight of false positives, in [0, 1e6]. Default 0.3.
        beta: b, that of false negatives, in [0, 1e6]. Default 0.7.
        gamma: of the focal Tversky loss, in [0.01, 100]. Default 1.
        activation: "softmax" (default) over the classes, of which there must be two or more, or
            "sigmoid" for each class.
        per_image: whether each image has scores of its own, of which the loss is the mean
            (default; an image in which nothing counts has none), or the pixels of the batch are
            pooled.
        smooth: s, in [0, 1e6]. Default 1.
        weight: a weight of each class in the mean, floating-point [C], or None (default) for 1.
            The mean divides by the weights of what it counts, and is NaN where all of them are 0.
            It gets no gradient.
        classes: which classes the mean counts: "all" (default); "present", those with a valid
            pixel in the image, or in the batch; or a tuple of different classes.
        include_background: whether class 0 counts. Default True. A single class is never the
            background.
        empty: what a class that counts and has no valid pixel adds: "loss" (default), what the
            formula makes of it, or "zero", a loss of 0 without a gradient.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255, which
            has to be given where there are more than 255 classes and it is one of them. Other
            labels out of range raise on the CPU; on a GPU, where looking would synchronise,
            they count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        upsample: "bilinear" if the target has a higher resolution than the logits, [N, H, W] with
            H >= h and W >= w of logits [N, C, h, w], at any ratios: the loss of
            ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``, which is never in
            memory. Default None: the same size, as volumes have to have.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss in float32 (float64 for float64 logits); 0 with zero gradient if no pixel is valid
        or no class counts. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    What gives the same as other libraries' Tversky loss of a softmax, with their ``alpha``,
    ``beta`` and s:

    | library | its options | options here |
    |---|---|---|
    | segmentation-models-pytorch | ``smooth=s`` | ``per_image=False, smooth=s, empty="zero"`` |
    | MONAI | ``smooth_nr=s, smooth_dr=s`` | ``smooth=s`` |
    | MONAI | these, ``batch=True`` | ``per_image=False, smooth=s`` |

    segmentation-models-pytorch takes the mean to the power ``gamma``, not each class. kornia pools
    the classes, so that false positives are as many as false negatives. nnU-Net has another one.

    Reference:
        Salehi et al., "Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional
        Deep Networks"; Abraham and Khan, "A Novel Focal Tversky Loss Function with Improved
        Attention U-Net for Lesion Segmentation".

    Example:
        >>> import torch
        >>> from tritonloss.functional import tversky_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> tversky_loss(logits, target, gamma=0.75).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    common = Common(
        activation=activation,
        per_image=per_image,
        smooth=smooth,
        weight=weight,
        classes=classes,
        include_background=include_background,
        empty=empty,
        ignore_index=ignore_index,
        upsample=upsample,
        align_corners=align_corners,
        process_group=process_group,
    )
    part = _part(logits, target, alpha=alpha, beta=beta, gamma=gamma, **common._asdict())
    if not serves_triton(part.logits):
        return tversky_loss_reference(
            part.logits, part.target, alpha=alpha, beta=beta, gamma=gamma, **common._asdict()
        )
    return launched(part)


def _part(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    **options: Any,
) -> Part:
    """A call of the loss, checked."""
    common = Common(**options)
    logits, target = checked_maps(logits, target, common)
    _check_own(alpha, beta, gamma)
    return part_of(
        logits,
        target,
        common,
        form="score" if gamma == 1 else "power",
        smooth=common.smooth,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
    )


def _check_own(alpha: float, beta: float, gamma: float) -> None:
    """Check what this loss has beside what all losses of overlap have."""
    checks.check_range("alpha", alpha, 0.0, 1e6)
    checks.check_range("beta", beta, 0.0, 1e6)
    checks.check_range("gamma", gamma, 0.01, 100.0)


def _check_options(*, alpha: float, beta: float, gamma: float, **common: Any) -> None:
    """Check all options, for any number of classes."""
    _check_own(alpha, beta, gamma)
    check_common(Common(**common))


class TverskyLoss(LossModule, function=tversky_loss, check=_check_options, part=_part):
    """:func:`tritonloss.functional.tversky_loss` as a module; ``weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.TverskyLoss(alpha=0.5, beta=0.5)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example("tversky_loss", tversky_loss, OVERLAP, {}, TverskyLoss),
    Example(
        "tversky_loss, focal",
        tversky_loss,
        OVERLAP,
        {"gamma": 0.75, "activation": "sigmoid", "empty": "zero"},
        TverskyLoss,
    ),
    Example(
        "tversky_loss, upsampled",
        tversky_loss,
        OVERLAP,
        {"upsample": "bilinear", "align_corners": True, "activation": "sigmoid"},
        TverskyLoss,
        half_resolution_and_target,
    ),
)
