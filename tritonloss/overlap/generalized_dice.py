"""Generalised dice loss: one dice score of all classes, each weighted by 1 / Y^2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.overlap import generalized_dice_loss as generalized_dice_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.example import Example
from .._core.loss_module import LossModule, Part
from .scores import OVERLAP, Common, check_common, checked_maps, launched, part_of


def generalized_dice_loss(
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
    ignore_index: int | None = checks.IGNORE_INDEX,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Generalised dice loss: one score of all classes, the smaller of which weigh more.

    With sums over the valid pixels of the batch (or of an image, ``per_image``), of a class with
    probabilities p and pixels y:

        1 - 2 sum_k w_k I_k / max(sum_k w_k (P_k + Y_k), s),   w_k = 1 / max(Y_k^2, 1e-5)

        I = sum of p y,  P = sum of p,  Y = sum of y

    A class without a pixel would weigh 1e5, and bring the loss to 1: by default it does not count.
    Of classes of a million pixels the weights are so small that s would rule: lower it there.

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
        smooth: s, the least that the denominator may be, in [0, 1e6]. Default 1e-5.
        weight: a factor of each class's w_k, floating-point [C], or None (default) for 1. It
            gets no gradient.
        classes: which classes the sums are over: "present" (default), those with a valid pixel
            in the image, or in the batch; "all"; or a tuple of different classes.
        include_background: whether class 0 counts. Default True. A single class is never the
            background.
        empty: how a class that counts and has no valid pixel weighs: "loss" (default), by the
            formula, or "zero", not at all.
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

    What gives the same as other libraries' generalised dice loss of a softmax, where every class
    has a pixel:

    | library | its options | options here |
    |---|---|---|
    | MONAI | ``smooth_nr=0, smooth_dr=0`` | ``per_image=True, smooth=0.0`` |
    | MONAI | these, ``batch=True`` | ``smooth=0.0`` |

    segmentation-models-pytorch, kornia and nnU-Net have none.

    Reference:
        Sudre et al., "Generalised Dice Overlap as a Deep Learning Loss Function for Highly
        Unbalanced Segmentations", Section 2.

    Example:
        >>> import torch
        >>> from tritonloss.functional import generalized_dice_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> generalized_dice_loss(logits, target, per_image=True).backward()
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
    part = _part(logits, target, **common._asdict())
    if not serves_triton(part.logits):
        return generalized_dice_loss_reference(part.logits, part.target, **common._asdict())
    return launched(part)


def _part(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> Part:
    """A call of the loss, checked."""
    common = Common(**options)
    logits, target = checked_maps(logits, target, common)
    return part_of(logits, target, common, form="generalized", smooth=common.smooth)


def _check_options(**common: Any) -> None:
    """Check all options, for any number of classes."""
    check_common(Common(**common))


class GeneralizedDiceLoss(
    LossModule, function=generalized_dice_loss, check=_check_options, part=_part
):
    """:func:`tritonloss.functional.generalized_dice_loss` as a module; ``weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.GeneralizedDiceLoss(per_image=True)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example(
        "generalized_dice_loss",
        generalized_dice_loss,
        OVERLAP,
        {"smooth": 1e-07},
        GeneralizedDiceLoss,
    ),
)
