"""Binary cross entropy of one sigmoid per class: sum_k bce(z_k, y_k), dz_k = sigmoid(z_k) - y_k.

Bytes per pass, with L of logits and T of labels: forward L + T, backward 2 L + T. Nothing is saved,
since the gradient is elementwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.distributed import ProcessGroup

from kernels_reference.pixelwise import (
    binary_cross_entropy as binary_cross_entropy_reference,
)

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .._core.process_groups import ranks_agree
from .._engine.joint_terms import Member
from .._engine.math import (
    LN_2,
    LOG2_E,
    log2_one_plus,
    negated,
    sigmoid_base2,
    softplus_base2,
)
from .._engine.pixel_operator import pixelwise_operator
from .._engine.pixel_terms import Loss, Term
from .._engine.pixel_tuning import pixel_cases
from .._engine.pixels import (
    Record,
    class_of,
    for_classes,
    in_base2,
    is_own,
    no_lookups,
    nothing_yet,
    sum_of_lanes,
)
from .arguments import check_common, check_maps, options_of
from .softmax import own_weight

# Classes of a lane of which the product of all 1 + t, below 2^96, is a float32. Of more classes it
# is divided by 2^32 where it is large.
_ONE_PRODUCT = tl.constexpr(96)
_LARGE = tl.constexpr(2.0**32)


class Options(NamedTuple):
    """The options of the loss, except the weights."""

    ignore_index: int | None = checks.IGNORE_INDEX
    reduction: str = "mean"
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # the name of a process group


class Compiled(NamedTuple):
    """What of the options a kernel is compiled for."""

    weighted: bool  # a weight for every class, in the table of own classes


# --- device functions -----------------------------------------------------------------------------


class _State(NamedTuple):
    """What has been added up so far, over all classes: softplus(z), or softplus(-z) of the own one.

    softplus(z) is max(z, 0) + log(1 + t) with t = e^-|z|. With weights the own class is left out.
    """

    linear: Any  # max(z, 0), and what the product was divided by; if scaled, times log2 e
    rest: Any  # 1 + rest is the product of all 1 + t


class _Factors(NamedTuple):
    """What the slopes of a pixel's classes share."""

    own: Any
    other_class: Any  # the factor of sigmoid(z)
    own_class: Any  # the factor of -sigmoid(-z)


@triton.jit
def _start(OPTIONS: tl.constexpr, TILE: tl.constexpr):
    nothing = nothing_yet(0.0, TILE)
    return _State(linear=nothing, rest=nothing)


@triton.jit
def _add(state, block, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The sums with a block of classes."""
    own = for_classes(pixel.own, TILE)
    # Summed within the block first: one sum over a thousand classes would lose its last digits.
    linear = tl.zeros_like(state.linear)
    rest = linear
    for j in tl.static_range(len(block.logits)):
        z = block.logits[j]
        is_own = class_of(block, j, TILE) == own
        # Added here and taken away again, the own class would cost a confident pixel all digits.
        z = tl.where(is_own, float("-inf") if OPTIONS.weighted else negated(z), z)
        linear += tl.maximum(z, 0.0)
        t = tl.exp2(tl.abs(z) * (-1.0 if TILE.scaled else -LOG2_E))
        # One logarithm for all classes, of the product of all 1 + t. Without the 1, as
        # rest + t + rest t, small values are not rounded away.
        rest = tl.fma(rest, t, rest + t) if j > 0 else t
    linear += state.linear
    rest = tl.fma(state.rest, rest, state.rest + rest)
    if TILE.classes > _ONE_PRODUCT * TILE.lanes:
        is_large = rest >= _LARGE
        linear += tl.where(is_large, 32.0 if TILE.scaled else 32 * LN_2, 0.0)
        rest = tl.where(is_large, rest * (1 / _LARGE) - 1.0, rest)
    return _State(linear=linear, rest=rest)


@triton.jit
def _finish(state, own, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """(w_t softplus(-z_t) + sum of softplus(z_k) over the other classes, 1, nothing saved)."""
    loss = log2_one_plus(state.rest)
    loss = (state.linear + loss) * LN_2 if TILE.scaled else state.linear + loss * LN_2
    loss = sum_of_lanes(loss, TILE)
    if OPTIONS.weighted:
        below = own * (-1.0 if TILE.scaled else -LOG2_E)
        positive = own_weight(pixel, given, OPTIONS, TILE) * softplus_base2(below)
        loss += tl.where(pixel.own >= 0, positive, 0.0)
    return loss, tl.zeros_like(loss) + 1.0, ()


@triton.jit
def _factors(scale, saved, looked_up, pixel, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    return _Factors(
        own=for_classes(pixel.own, TILE),
        other_class=for_classes(scale, TILE),
        own_class=for_classes(scale * own_weight(pixel, given, OPTIONS, TILE), TILE),
    )


@triton.jit
def _slope(factors, block, SLOT: tl.constexpr, given, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The gradient of a slot: sigmoid(z), or -w sigmoid(-z) for the own class.

    Not p - 1 for the own class, which has no digits left near p = 1.
    """
    u = in_base2(block, SLOT)
    here = is_own(factors.own, block, SLOT, TILE)
    residual = sigmoid_base2(tl.where(here, -u, u))
    return residual * tl.where(here, -factors.own_class, factors.other_class)


def _saves_nothing(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    return ()


LOSS = Loss(
    "binary_cross_entropy",
    Record(_start, _add, _finish, _factors, _slope, no_lookups),
    saved=_saves_nothing,
    unroll=16,  # classes that share one logarithm
    binary=True,
    scaled=True,
)

# --- operator -------------------------------------------------------------------------------------


def _term(
    logits: torch.Tensor,
    pos_weight: torch.Tensor | None,
    other: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Term:
    return Term(LOSS, Compiled(pos_weight is not None), own_table=pos_weight)


BINARY_CROSS_ENTROPY = pixelwise_operator(LOSS, Options, _term)
MEMBER = Member(Options, term=_term)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return pixel_cases(LOSS, BINARY_CROSS_ENTROPY, Options())


# --- function and module --------------------------------------------------------------------------


def binary_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    pos_weight: torch.Tensor | None = None,
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Binary cross entropy of one sigmoid per class against the rest, from integer labels.

    Of a pixel with the label t, summed over classes:

        w_t softplus(-z_t) + sum over k != t of softplus(z_k)

    which is torch's ``binary_cross_entropy_with_logits`` of the one-hot label. The mean is over
    valid pixels. With one class the labels are 1 where the class is and 0 where it is not.

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN makes its
    pixel's loss NaN, and its own gradient; an infinite logit is a probability of 0 or 1, and
    makes the loss infinite where that is wrong.

    Args:
        logits: [N, C, H, W] with C >= 1, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64: 0 to C - 1, or 0 and 1 if C is 1.
        pos_weight: w, a weight for the positive term of each class, floating-point [C], or None
            (default) for 1. It gets no gradient.
        ignore_index: label of pixels that are ignored, any integer or None. Default 255,
            which has to be given where there are more than 255 classes and it is one of them. Other
            labels out of range raise on the CPU; on a GPU, where looking would synchronise, they
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
        :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Example:
        >>> import torch
        >>> from tritonloss.functional import binary_cross_entropy
        >>> logits = torch.randn(2, 1, 32, 64)
        >>> target = torch.randint(0, 2, (2, 32, 64))
        >>> binary_cross_entropy(logits, target, reduction="none").shape
        torch.Size([2, 32, 64])
    """
    common: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "upsample": upsample,
        "align_corners": align_corners,
        "process_group": process_group,
    }
    part = _part(logits, target, pos_weight=pos_weight, **common)
    if not serves_triton(logits):
        return binary_cross_entropy_reference(logits, target, pos_weight=pos_weight, **common)
    return BINARY_CROSS_ENTROPY(logits, target, *part.tables, options=part.options)[0]


def _part(
    logits: torch.Tensor, target: torch.Tensor, *, pos_weight: torch.Tensor | None, **common: Any
) -> Part:
    """A call of the loss, checked; ``common`` is what all pixelwise losses have."""
    with ranks_agree(common["process_group"], logits):
        check_maps(logits, target, common)
        _check_options(pos_weight, logits, **common)
        checks.check_labels_in_range(target, checks.labels_of(logits), common["ignore_index"])
    pos_weight = None if pos_weight is None else checks.without_gradient(pos_weight)
    options = Options(**options_of(common))
    return Part(logits, target, "pixelwise.binary_cross_entropy", options, (pos_weight, None))


def _check_options(
    pos_weight: torch.Tensor | None, logits: torch.Tensor | None = None, **common: Any
) -> None:
    """Check all options; without ``logits``, for any number of classes."""
    checks.check_class_weights("pos_weight", pos_weight, logits)
    check_common(common, None if logits is None else logits.size(1))


class BinaryCrossEntropyLoss(
    LossModule, function=binary_cross_entropy, check=_check_options, part=_part
):
    """:func:`tritonloss.functional.binary_cross_entropy` as a module; ``pos_weight`` is a buffer.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.BinaryCrossEntropyLoss(pos_weight=torch.tensor([2.0]))
        >>> criterion(torch.randn(2, 1, 32, 64), torch.randint(0, 2, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example(
        "binary_cross_entropy",
        binary_cross_entropy,
        BINARY_CROSS_ENTROPY,
        {},
        BinaryCrossEntropyLoss,
    ),
    Example(
        "binary_cross_entropy, upsampled",
        binary_cross_entropy,
        BINARY_CROSS_ENTROPY,
        {"upsample": "bilinear", "align_corners": True},
        BinaryCrossEntropyLoss,
        half_resolution_and_target,
    ),
)
