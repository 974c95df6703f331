"""Lovász hinge: the convex extension of the Jaccard loss of a binary mask, by bins of its errors.

Bytes per pass, with L of logits and T of labels: forward L + T, and backward 2 L + T with the
gradient. Beside that there are only 24 bytes for each bin, or 84 where there are few. With
``exact=True`` there is a number for every logit beside the gradient, and what a sort of them takes.
Of interpolated logits L is that of the low resolution; with ``exact`` they are in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from kernels_reference.lovasz import lovasz_hinge_loss as lovasz_hinge_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example
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
from .lovasz_terms import HINGE

# How many bins there are if none are asked for, where histograms are quick and where they are not;
# the fewest and the most.
BINS = (4096, 1024)
_RANGE = (1024, 4096)

LOVASZ_HINGE = lovasz_operator(HINGE)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return lovasz_tuning_cases(HINGE, LOVASZ_HINGE, 1, BINS)


# --- function and module --------------------------------------------------------------------------


def lovasz_hinge_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    per_image: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    exact: bool = False,
    bins: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Lovász hinge: the Jaccard loss of a binary mask, extended to margins.

    The sum of max(0, e) w over the errors e = 1 - z (2 y - 1) of all valid pixels, with the w of
    :func:`lovasz_softmax_loss`. It is the integral from 0 to infinity of the Jaccard loss of the
    pixels whose error is above t, which no gradient passes through.

    Nothing is sorted: the errors are counted in bins, at whose edges that Jaccard loss is exact.
    With n = bins / 16 bins for each power of two of the error and 1/4, up to 2^10, the loss is off
    by no more than 1 / (2 n) of itself and 1 / (8 n). Larger errors, as of a training that has
    diverged, have bins 32 times as wide. Measured as for the softmax, with 4096 bins, it was off by
    up to 1.3e-4 of itself, and 1 less the gradient's cosine to the exact one was up to 3e-5. With
    1024 bins it was 4.4e-4 and 7e-5.

    Args:
        logits: [N, 1, H, W], float16, bfloat16 or float32 (or float64), any strides. Or [N, 1, L],
            or volumes [N, 1, D, H, W], of which those whose slices do not lie one behind the other
            are copied.
        target: labels 0 and 1 [N, H, W] (or [N, L], [N, D, H, W]), uint8 to int64.
        per_image: False (default) for the loss of all images together, True for the mean over
            images, where one without valid pixels counts as 0.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255. Other
            labels than 0 and 1 raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        exact: sort the errors instead (default False). That takes many times as long.
        bins: how many bins there are, a power of two from 1024 to 4096. Default None: 4096, or 1024
            under Triton before 3.9 and on AMD, where histograms with more bins take longer.
        upsample: "bilinear" if the target has a higher resolution than the logits, [N, H, W] with
            H >= h and W >= w of logits [N, 1, h, w], at any ratios: the loss of
            ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``, which is
            never in memory unless ``exact``.
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
        valid. The gradient has the dtype of the logits. NaN and an infinite error make the loss
        NaN, and the gradient of their pixel; an error of -infinity is none.

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
    around = Around(per_image, ignore_index, exact, upsample, align_corners, process_group)
    with ranks_agree(process_group, logits):
        logits, target = checked_maps(logits, target, upsample, align_corners)
        check_around(around)
        check_bins(bins, *_RANGE)
        if logits.size(1) != 1:
            raise ValueError(
                "logits must have one channel, of a binary mask with labels 0 and 1 (for several "
                f"classes use lovasz_softmax_loss); got {checks.described(logits)}"
            )
        checks.check_labels_in_range(target, 2, ignore_index)
    bins = number_of_bins(bins, BINS)
    if not serves_triton(logits):
        return lovasz_hinge_reference(logits, target, bins=bins, **around._asdict())
    return LOVASZ_HINGE(logits, target, options=options_of(around, bins, "all"))[0]


def _check_options(*, bins: int | None, **around: Any) -> None:
    """Check all options."""
    check_around(Around(**around))
    check_bins(bins, *_RANGE)


class LovaszHingeLoss(LossModule, function=lovasz_hinge_loss, check=_check_options):
    """:func:`tritonloss.functional.lovasz_hinge_loss` as a module.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.LovaszHingeLoss(per_image=True)
        >>> criterion(torch.randn(2, 1, 32, 64), torch.randint(0, 2, (2, 32, 64))).shape
        torch.Size([])
    """


def _mask_and_target(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the hinge takes: one channel, and labels 0 and 1."""
    return logits[:, :1], torch.where((target > 1) & (target < logits.size(1)), 0, target)


def _half_resolution(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same with every second row and column of the logits."""
    logits, target = _mask_and_target(logits, target)
    return logits[..., ::2, ::2], target


EXAMPLES = (
    Example(
        "lovasz_hinge_loss",
        lovasz_hinge_loss,
        LOVASZ_HINGE,
        {"bins": 1024},
        LovaszHingeLoss,
        _mask_and_target,
        binary=True,
    ),
    Example(
        "lovasz_hinge_loss, exact",
        lovasz_hinge_loss,
        LOVASZ_HINGE,
        {"exact": True},
        LovaszHingeLoss,
        _mask_and_target,
        binary=True,
    ),
    Example(
        "lovasz_hinge_loss, upsampled",
        lovasz_hinge_loss,
        LOVASZ_HINGE,
        {"bins": 1024, "upsample": "bilinear"},
        LovaszHingeLoss,
        _half_resolution,
        binary=True,
    ),
)
