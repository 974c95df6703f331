"""Dice loss: 1 - (2 I + s) / (P + Y + s) of each class, and the mean over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.overlap import dice_loss as dice_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .scores import OVERLAP, Common, check_common, checked_maps, launched, part_of


def dice_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    activation: str = "softmax",
    per_image: bool = False,
    smooth: float = 1e-5,
    weight: torch.Tensor | None = None,
    classes: str | Sequence[int] = "present",
    include_background: bool = True,
    empty: str = "loss",
    log_loss: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Dice loss of each class's probabilities p and pixels y, the mean over the classes.

    Of a class, with sums over the valid pixels of the batch (or of an image, ``per_image``):

        1 - (2 I + s) / (P + Y + s),   I = sum of p y,  P = sum of p,  Y = sum of y

    A denominator is at least 1e-7.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN, or
    infinity in a softmax, makes the loss NaN; -infinity is a probability of 0.

    Args:
        logits: [N, C, H, W], float16, bfloat16 or float32 (or float64), any strides. Or [N, C, L],
            or volumes [N, C, D, H, W], of which those whose slices do not lie one behind the other
            are copied.
        target: integer labels [N, H, W] (or [N, L], [N, D, H, W]), uint8 to int64: 0 to C - 1, or 0
            and 1 if C is 1.
        activation: "softmax" (default) over the classes, of which there must be two or more, or
            "sigmoid" for each class.
        per_image: whether each image has scores of its own, of which the loss is the mean; an
            image in which nothing counts has none. Default False: the pixels of the batch are
            pooled.
        smooth: s, in [0, 1e6]. Default 1e-5.
        weight: a weight of each class in the mean, floating-point [C], or None (default) for 1.
            The mean divides by the weights of what it counts, and is NaN where all of them are 0.
            It gets no gradient.
        classes: which classes the mean counts: "present" (default), those with a valid pixel in
            the image, or in the batch; "all"; or a tuple of different classes.
        include_background: whether class 0 counts. Default True. A single class is never the
            background.
        empty: what a class that counts and has no valid pixel adds: "loss" (default), what the
            formula makes of it, or "zero", a loss of 0 without a gradient.
        log_loss: whether the loss of a class is -log max(score, 1e-7). Default False: 1 -
            score.
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

    What gives the same as other libraries' dice loss of a softmax, with their s:

    | library | its options | options here |
    |---|---|---|
    | segmentation-models-pytorch | ``smooth=s`` | ``smooth=s, classes="all", empty="zero"`` |
    | MONAI | ``smooth_nr=s, smooth_dr=s`` | ``per_image=True, smooth=s, classes="all"`` |
    | MONAI | these, ``batch=True`` | ``smooth=s, classes="all"`` |
    | kornia | ``average="macro"`` | ``per_image=True, smooth=0.0``, of images with all classes |
    | nnU-Net | ``smooth=s, batch_dice=True`` | ``smooth=s, classes="all"``, and minus 1 |

    ``log_loss`` and ``ignore_index`` are those of segmentation-models-pytorch, ``activation`` its
    modes, ``include_background`` is MONAI's and nnU-Net's ``do_bg``. MONAI does not divide by the
    weights' mean. kornia takes the mean over an image's classes before that over images; its
    default, "micro", pools the classes, which is another formula.

    Reference:
        Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
        Segmentation", Section 3.

    Example:
        >>> import torch
        >>> from tritonloss.functional import dice_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> dice_loss(logits, target, smooth=1.0).backward()
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
    part = _part(logits, target, log_loss=log_loss, **common._asdict())
    if not serves_triton(part.logits):
        return dice_loss_reference(part.logits, part.target, log_loss=log_loss, **common._asdict())
    return launched(part)


def _part(logits: torch.Tensor, target: torch.Tensor, *, log_loss: bool, **options: Any) -> Part:
    """A call of the loss, checked."""
    common = Common(**options)
    logits, target = checked_maps(logits, target, common)
    _check_own(log_loss)
    form = "log" if log_loss else "score"
    return part_of(logits, target, common, form=form, smooth=common.smooth / 2)


def _check_own(log_loss: bool) -> None:
    """Check what this loss has beside what all losses of overlap have."""
    checks.check_flag("log_loss", log_loss)


def _check_options(*, log_loss: bool, **common: Any) -> None:
    """Check all options, for any number of classes."""
    _check_own(log_loss)
    check_common(Common(**common))


class DiceLoss(LossModule, function=dice_loss, check=_check_options, part=_part):
    """:func:`tritonloss.functional.dice_loss` as a module; ``weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.DiceLoss(smooth=1.0)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example("dice_loss", dice_loss, OVERLAP, {"log_loss": True}, DiceLoss),
    Example(
        "dice_loss, sigmoid of all classes",
        dice_loss,
        OVERLAP,
        {"activation": "sigmoid", "classes": "all", "per_image": True},
        DiceLoss,
    ),
    Example(
        "dice_loss, upsampled",
        dice_loss,
        OVERLAP,
        {"upsample": "bilinear"},
        DiceLoss,
        half_resolution_and_target,
    ),
)
