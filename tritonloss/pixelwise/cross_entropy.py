"""Cross entropy of the softmax: -w_t log p_t with p = softmax(z) and t the pixel's label.

Bytes per pass, with L of logits and T of labels: forward L + T, backward 2 L + T. The largest logit
and the logarithm of the sum are left to the backward pass. They take 4 bytes per pixel
(``softmax.py``), 6 or 8 with more than 256 classes, and 16 for float64. No map with classes is
allocated but the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.distributed import ProcessGroup

from kernels_reference.pixelwise import cross_entropy as cross_entropy_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .._core.process_groups import ranks_agree
from .._engine.joint_terms import Member
from .._engine.math import LN_2
from .._engine.pixel_operator import pixelwise_operator
from .._engine.pixel_terms import Loss, Term
from .._engine.pixel_tuning import pixel_cases
from .._engine.pixels import Record, for_classes, no_lookups, nothing_yet, sum_of_lanes
from .arguments import check_common, check_maps, options_of
from .softmax import (
    SoftmaxState,
    class_weight,
    exponent,
    exponent_of_largest,
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
    sum_of_weights,
    surprise,
)


class Options(NamedTuple):
    """The options of the loss, except the weights."""

    label_smoothing: float = 0.0
    ignore_index: int | None = checks.IGNORE_INDEX
    reduction: str = "mean"
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # the name of a process group


class Compiled(NamedTuple):
    """What of the options a kernel is compiled for."""

    weighted: bool  # a weight for every class, in the table of own classes
    smoothed: bool


# --- device functions -----------------------------------------------------------------------------


class _SmoothState(NamedTuple):
    """The statistics of the softmax, and those of the smoothing."""

    largest: Any
    bundle: Any
    total: Any
    weighted: Any  # sum of w (z - largest) log2 e; of w z the digits of large logits would cancel
    seen: Any  # sum of w


@triton.jit
def _start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    state = softmax_start(OPTIONS, TILE)
    if OPTIONS.smoothed:
        zero = nothing_yet(0.0, TILE)
        state = _SmoothState(
            largest=state.largest, bundle=state.bundle, total=state.total, weighted=zero, seen=zero
        )
    return state


@triton.jit
def _add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The statistics with a block of classes; those of the smoothing move with the largest."""
    softmax = SoftmaxState(largest=state.largest, bundle=state.bundle, total=state.total)
    added = softmax_add(softmax, block, pixel, given, OPTIONS, TILE)
    if OPTIONS.smoothed:
        seen = state.seen
        moved = exponent_of_largest(state.largest, added.largest, TILE)
        weighted = state.weighted + seen * moved
        for j in tl.static_range(len(block.logits)):
            weight = class_weight(given, block, j, OPTIONS, TILE)
            # Selected, not a product with 0: a lane without a class left holds -inf.
            beyond = exponent(block.logits[j], added.largest, TILE)
            weighted += tl.where(weight == 0, 0.0, weight * beyond)
            seen += weight
        added = _SmoothState(
            largest=added.largest, bundle=added.bundle, total=added.total, weighted=weighted,
            seen=seen,
        )  # fmt: skip
    return added


@triton.jit
def _finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(loss, w_t, saved): -(1 - s) w_t log p_t - (s / C) sum w_k log p_k, with smoothing s."""
    softmax = SoftmaxState(largest=state.largest, bundle=state.bundle, total=state.total)
    statistics = softmax_of_lanes(softmax, TILE)
    weight = own_weight(pixel, given, OPTIONS, TILE)
    loss = weight * surprise(statistics, own, TILE)
    if OPTIONS.smoothed:
        largest = for_classes(statistics.largest, TILE)
        beyond = exponent_of_largest(state.largest, largest, TILE)
        weighted = sum_of_lanes(state.weighted + state.seen * beyond, TILE)
        all_weights = sum_of_lanes(state.seen, TILE)
        smooth = (all_weights * statistics.log_sum - weighted) * LN_2
        smoothing = given.numbers[0]
        loss = (1.0 - smoothing) * loss + smoothing / TILE.classes * smooth
    return loss, weight, softmax_saved(softmax, statistics, TILE)


@triton.jit
def _factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The factors of (1 - s) w_t (p_k - y_k) + (s / C) (p_k sum w - w_k)."""
    own_class = scale * own_weight(pixel, given, OPTIONS, TILE)
    all_classes = own_class
    smooth = own_class
    if OPTIONS.smoothed:
        smoothing = given.numbers[0]
        own_class = own_class * (1.0 - smoothing)
        smooth = scale * (smoothing / TILE.classes)
        all_classes = own_class + smooth * sum_of_weights(given, OPTIONS, TILE)
    statistics = softmax_again(saved, looked_up, pixel, TILE)
    return softmax_factors(statistics, pixel, all_classes, own_class, smooth, TILE)


def _weighs(options: Compiled) -> bool:
    return options.weighted


LOSS = Loss(
    "cross_entropy",
    Record(
        _start,
        _add,
        _finish,
        _factors,
        softmax_slope,
        no_lookups,
        softmax_bundles,
        silent=softmax_is_silent,
        weighs=_weighs,
    ),
    saved=softmax_saves,
    of_logits=True,
    scaled=True,
)

# --- operator -------------------------------------------------------------------------------------


def _term(
    logits: torch.Tensor,
    weight: torch.Tensor | None,
    other: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Term:
    compiled = Compiled(weight is not None, options.label_smoothing != 0)
    return Term(LOSS, compiled, (options.label_smoothing,), own_table=weight)


CROSS_ENTROPY = pixelwise_operator(LOSS, Options, _term)
MEMBER = Member(Options, term=_term)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return pixel_cases(LOSS, CROSS_ENTROPY, Options())


# --- function and module --------------------------------------------------------------------------


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Cross entropy of the softmax, as :func:`torch.nn.functional.cross_entropy` defines it.

    Of a pixel with the label t, with smoothing s and C classes:

        (1 - s) w_t (-log p_t) + (s / C) sum_k w_k (-log p_k)

    The mean divides by the sum of w_t over valid pixels. The one exception to torch's definition:
    if no pixel is valid the mean is 0 with zero gradient, not NaN.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN and
    infinity make their pixel's loss NaN, and the gradient of all of its classes; -infinity is a
    probability of 0.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        weight: w, a weight for each class, floating-point [C], or None (default) for 1. It gets no
            gradient.
        label_smoothing: s, in [0, 1]. Default 0.
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
        The loss in float32 (float64 for float64 logits). The gradient has the dtype of the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", Section 7 (the
        smoothing).

    Example:
        >>> import torch
        >>> from tritonloss.functional import cross_entropy
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> cross_entropy(logits, target, label_smoothing=0.1).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    common: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "upsample": upsample,
        "align_corners": align_corners,
        "process_group": process_group,
    }
    part = _part(logits, target, weight=weight, label_smoothing=label_smoothing, **common)
    if not serves_triton(logits):
        return cross_entropy_reference(
            logits, target, weight=weight, label_smoothing=label_smoothing, **common
        )
    return CROSS_ENTROPY(logits, target, *part.tables, options=part.options)[0]


def _part(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None,
    label_smoothing: float,
    **common: Any,
) -> Part:
    """A call of the loss, checked; ``common`` is what all pixelwise losses have."""
    with ranks_agree(common["process_group"], logits):
        check_maps(logits, target, common)
        checks.check_classes(logits)
        _check_options(weight, label_smoothing, logits, **common)
        checks.check_labels_in_range(target, logits.size(1), common["ignore_index"])
    options = Options(label_smoothing=float(label_smoothing), **options_of(common))
    weight = None if weight is None else checks.without_gradient(weight)
    return Part(logits, target, "pixelwise.cross_entropy", options, (weight, None))


def _check_options(
    weight: torch.Tensor | None,
    label_smoothing: float,
    logits: torch.Tensor | None = None,
    **common: Any,
) -> None:
    """Check all options; without ``logits``, for any number of classes."""
    checks.check_class_weights("weight", weight, logits)
    checks.check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_common(common, None if logits is None else logits.size(1))


class CrossEntropyLoss(LossModule, function=cross_entropy, check=_check_options, part=_part):
    """:func:`tritonloss.functional.cross_entropy` as a module; ``weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example(
        "cross_entropy", cross_entropy, CROSS_ENTROPY, {"label_smoothing": 0.1}, CrossEntropyLoss
    ),
    Example(
        "cross_entropy, upsampled",
        cross_entropy,
        CROSS_ENTROPY,
        {"label_smoothing": 0.1, "upsample": "bilinear"},
        CrossEntropyLoss,
        half_resolution_and_target,
    ),
)
