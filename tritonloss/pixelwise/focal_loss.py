"""Focal loss of the softmax: -a_t (1 - p_t)^gamma log p_t with p = softmax(z) and t the label.

A pass moves as many bytes as one of the cross entropy, and saves the same statistics.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.distributed import ProcessGroup

from kernels_reference.pixelwise import focal_loss as focal_loss_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .._core.process_groups import ranks_agree
from .._engine.joint_terms import Member
from .._engine.math import LOG2_E
from .._engine.pixel_operator import pixelwise_operator
from .._engine.pixel_terms import Loss, Term
from .._engine.pixel_tuning import pixel_cases
from .._engine.pixels import Record, never, own_class
from .._engine.planes import compute_dtype
from .arguments import check_common, check_maps, options_of
from .softmax import (
    own_weight,
    softmax_add,
    softmax_again,
    softmax_bundles,
    softmax_factors,
    softmax_is_silent,
    softmax_of_lanes,
    softmax_saved,
    softmax_saves,
    softmax_slope,
    softmax_start,
    surprise,
)


class Options(NamedTuple):
    """The options of the loss, except the factors of its classes."""

    gamma: float = 2.0
    detach_weight: bool = False
    ignore_index: int | None = checks.IGNORE_INDEX
    reduction: str = "mean"
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # the name of a process group


class Compiled(NamedTuple):
    """What of the options a kernel is compiled for."""

    weighted: bool
    power: int  # gamma, if it is 0, 1 or 2; any other one is -1 here
    detached: bool
    smoothed: bool = False  # never; softmax_slope looks at it


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _power(base, exponent, POWER: tl.constexpr):
    """base^exponent for base >= 0; POWER is the exponent if it is 0, 1 or 2."""
    if POWER == 0:
        result = tl.zeros_like(base) + 1.0
    elif POWER == 1:
        result = base
    elif POWER == 2:
        result = base * base
    else:
        result = tl.exp2(tl.log2(base) * exponent)
    return result


@triton.jit
def _parts(entropy, gamma, OPTIONS: tl.constexpr):
    """(p_t, 1 - p_t, (1 - p_t)^gamma) of -log p_t."""
    TERMS: tl.constexpr = 9 if entropy.dtype == tl.float64 else 4
    probability = tl.exp2(entropy * -LOG2_E)
    # Near p = 1, where 1 - p would cancel, it is the series x - x^2 / 2! + ... of 1 - e^-x, with x
    # the entropy.
    series = tl.zeros_like(entropy) + 1.0
    for i in tl.static_range(TERMS - 1):
        series = 1.0 - entropy * (1.0 / (TERMS - i)) * series
    series = entropy * series
    rest = tl.where(entropy < 0.03125, series, 1.0 - probability)
    rest = tl.where(rest < 0, 0.0, rest)  # rounding may go below 0; a NaN stays
    return probability, rest, _power(rest, gamma, OPTIONS.power)


@triton.jit
def _finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(-a_t (1 - p_t)^gamma log p_t, 1, saved)."""
    statistics = softmax_of_lanes(state, TILE)
    entropy = surprise(statistics, own, TILE)
    _, _, modulation = _parts(entropy, given.numbers[0], OPTIONS)
    weight = own_weight(pixel, given, OPTIONS, TILE)
    value = weight * modulation * entropy
    return value, tl.zeros_like(weight) + 1.0, softmax_saved(state, statistics, TILE)


@triton.jit
def _factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The factors of a_t (q^gamma - gamma p_t q^(gamma - 1) log p_t) (p_k - y_k), q = 1 - p_t.

    If detached, the focal weight is held constant: a_t q^gamma (p_k - y_k).
    """
    statistics = softmax_again(saved, looked_up, pixel, TILE)
    entropy = surprise(statistics, looked_up[len(looked_up) - 1], TILE)
    gamma = given.numbers[0]
    probability, rest, slope = _parts(entropy, gamma, OPTIONS)
    if not OPTIONS.detached and OPTIONS.power != 0:
        # At q = 0 the product is 0, since log p_t is about -q; q^(gamma - 1) alone may be infinite.
        below: tl.constexpr = OPTIONS.power - 1 if OPTIONS.power > 0 else -1
        power = _power(tl.where(rest == 0, 1.0, rest), gamma - 1.0, below)
        live = gamma * probability * power * entropy
        # At p_t = 0 the product is 0 as well, though the entropy may be infinite.
        slope += tl.where((rest == 0) | (probability == 0), 0.0, live)
    factor = scale * own_weight(pixel, given, OPTIONS, TILE) * slope
    factor = tl.where(pixel.label >= 0, factor, 0.0)
    return softmax_factors(statistics, pixel, factor, factor, factor, TILE)


LOSS = Loss(
    "focal",
    Record(
        softmax_start,
        softmax_add,
        _finish,
        _factors,
        softmax_slope,
        own_class,
        softmax_bundles,
        silent=softmax_is_silent,
        weighs=never,
    ),
    saved=softmax_saves,
    of_logits=True,
    scaled=True,
)

# --- operator -------------------------------------------------------------------------------------


def _term(
    logits: torch.Tensor,
    alpha: torch.Tensor | None,
    other: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Term:
    power = int(options.gamma) if options.gamma in (0, 1, 2) else -1
    compiled = Compiled(alpha is not None, power, options.detach_weight)
    return Term(LOSS, compiled, (options.gamma,), own_table=alpha)


FOCAL = pixelwise_operator(LOSS, Options, _term)
MEMBER = Member(Options, term=_term)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return pixel_cases(LOSS, FOCAL, Options())


# --- function and module --------------------------------------------------------------------------


def focal_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | torch.Tensor | None = None,
    detach_weight: bool = False,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Focal loss of the softmax: cross entropy that turns away from pixels it has learnt.

    Of a pixel with the label t:

        -a_t (1 - p_t)^gamma log p_t

    The mean is over valid pixels, whatever their a_t.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and
    infinity make their pixel's loss NaN, and the gradient of all of its classes; -infinity is a
    probability of 0, and as the pixel's own class makes the loss infinite.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        gamma: how steeply the weight falls, 0 to 100. Default 2; 0 is cross entropy.
        alpha: a, a factor for each class, floating-point [C], one number in [0, 1e6] for all of
            them, or None (default) for 1. It gets no gradient.
        detach_weight: True holds (1 - p_t)^gamma constant in the gradient. Default False: the full
            gradient.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels outside [0, C) raise on the CPU; on a GPU, where looking would synchronise, they
            count as ignored unless TRITONLOSS_CHECK_LABELS=1 is set.
        reduction: "mean" (default), "sum", or "none": [N, H, W], zero at ignored pixels.
        upsample: "bilinear" if the target has a higher resolution than the logits, [N, H, W] with
            H >= h and W >= w of logits [N, C, h, w], at any ratios: the loss of
            ``F.interpolate(logits.float(), size=(H, W), mode="bilinear")``, which is never in
            memory. Default None: the same size.
        align_corners: of the interpolation, as in :func:`torch.nn.functional.interpolate`. Default
            False.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images, and not for reduction="none". Default None: no others. The
            value is that of the whole batch. The gradient is, too, times the number of ranks:
            DistributedDataParallel takes the mean of the ranks' gradients, which makes it that of
            the whole batch.

    Returns:
        The loss in float32 (float64 for float64 logits); the mean is 0 with zero gradient if no
        pixel is valid. The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", Eq. 5, over the softmax.

    Example:
        >>> import torch
        >>> from tritonloss.functional import focal_loss
        >>> logits = torch.randn(2, 19, 32, 64)
        >>> focal_loss(logits, torch.randint(0, 19, (2, 32, 64)), gamma=1.5).shape
        torch.Size([])
    """
    common: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "upsample": upsample,
        "align_corners": align_corners,
        "process_group": process_group,
    }
    part = _part(logits, target, gamma=gamma, alpha=alpha, detach_weight=detach_weight, **common)
    if not serves_triton(logits):
        own = {"gamma": float(gamma), "alpha": part.tables[0], "detach_weight": detach_weight}
        return focal_loss_reference(logits, target, **own, **common)
    return FOCAL(logits, target, *part.tables, options=part.options)[0]


def _part(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    gamma: float,
    alpha: float | torch.Tensor | None,
    detach_weight: bool,
    **common: Any,
) -> Part:
    """A call of the loss, checked; ``common`` is what all pixelwise losses have."""
    with ranks_agree(common["process_group"], logits):
        check_maps(logits, target, common)
        checks.check_classes(logits)
        _check_options(gamma, alpha, detach_weight, logits, **common)
        checks.check_labels_in_range(target, logits.size(1), common["ignore_index"])
    if alpha is not None and not isinstance(alpha, torch.Tensor):
        dtype = compute_dtype(logits.dtype)
        alpha = torch.full((logits.size(1),), float(alpha), dtype=dtype, device=logits.device)
    alpha = None if alpha is None else checks.without_gradient(alpha)
    options = Options(float(gamma), bool(detach_weight), **options_of(common))
    return Part(logits, target, "pixelwise.focal_loss", options, (alpha, None))


def _check_options(
    gamma: float,
    alpha: float | torch.Tensor | None,
    detach_weight: bool,
    logits: torch.Tensor | None = None,
    **common: Any,
) -> None:
    """Check all options; without ``logits``, for any number of classes."""
    checks.check_range("gamma", gamma, 0.0, 100.0)
    checks.check_flag("detach_weight", detach_weight)
    if isinstance(alpha, (int, float, numbers.Real)):
        checks.check_range("alpha", alpha, 0.0, 1e6)
    else:
        checks.check_class_weights("alpha", alpha, logits, or_number="a number in [0, 1e6], ")
    check_common(common, None if logits is None else logits.size(1))


class FocalLoss(LossModule, function=focal_loss, check=_check_options, part=_part):
    """:func:`tritonloss.functional.focal_loss` as a module; a tensor ``alpha`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.FocalLoss(gamma=2.0, alpha=0.25)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example("focal_loss", focal_loss, FOCAL, {"reduction": "none"}, FocalLoss),
    Example(
        "focal_loss, upsampled",
        focal_loss,
        FOCAL,
        {"reduction": "none", "upsample": "bilinear"},
        FocalLoss,
        half_resolution_and_target,
    ),
)
