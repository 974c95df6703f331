"""Margin-calibrated log-loss: one class against the best of the others, offset by its rarity.

Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images". With the
margin of class k at a pixel, its score less the best score of the other classes,

    margin_k = z_k - max over j != k of z_j                           Eq. 8
    calibrated_k = margin_k - own_k if k is the label else margin_k + other_k    Algorithm 2
    loss = (1 / V) sum over pixels and classes of a penalty on it     Eq. 17, 18 or 9, 16

the two largest scores give every margin of a pixel, and the gradient flows through both.

Bytes per pass, with L of logits and T of labels: forward L + T, backward 2 L + T. The forward pass
goes through the classes twice. Up to 32 contiguous classes, or 256 in channels_last, it finds them
in registers the second time. With more it reads 2 L + T, the second L from the cache as far as it
fits there. 8 bytes per pixel are saved, 12 for float64 (``margins.py`` says which, and why).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from kernels_reference.margin_calibration import (
    margin_calibrated_loss as margin_calibrated_loss_reference,
)

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import TuningCase
from .._core.example import Example, half_resolution_and_target
from .._core.loss_module import LossModule, Part
from .._core.process_groups import ranks_agree
from .._engine.joint_terms import Member
from .._engine.pixel_operator import pixelwise_operator
from .._engine.pixel_terms import Loss, Term
from .._engine.pixel_tuning import pixel_cases
from .._engine.planes import compute_dtype
from ..metrics.label_statistics import MarginOffsets
from .arguments import check_common, check_maps, options_of
from .margins import MARGINS, Compiled

VARIANTS = ("paper", "released", "margin")


class Options(NamedTuple):
    """The options of the loss, except the offsets."""

    variant: str = "paper"
    ignore_index: int | None = checks.IGNORE_INDEX
    reduction: str = "mean"
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # the name of a process group


# --- operator -------------------------------------------------------------------------------------


def _saves(logits: torch.Tensor, interpolated: bool) -> tuple[torch.dtype, ...]:
    """The dtypes of the saved maps: two classes in 16 bits each, and a sum of derivatives."""
    return torch.int32, compute_dtype(logits.dtype)


LOSS = Loss(
    "margin_calibrated",
    MARGINS,
    saved=_saves,
    held=32,
    unroll=5,  # with 6 to 10, two registers too many on one GPU or another
)


def _term(
    logits: torch.Tensor,
    own: torch.Tensor | None,
    other: torch.Tensor | None,
    options: Options,
    save: bool,
) -> Term:
    return Term(LOSS, _compiled(options.variant, logits.size(1), save), (), own, other)


@functools.lru_cache(maxsize=256)
def _compiled(variant: str, classes: int, save: bool) -> Compiled:
    # A penalty's share in the loss: the released code has a mean over the other classes.
    share = 1.0 / classes if variant == "released" else 1.0
    return Compiled(variant, 1.0, share, save)


MARGIN_CALIBRATED = pixelwise_operator(LOSS, Options, _term)
MEMBER = Member(Options, term=_term)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return pixel_cases(LOSS, MARGIN_CALIBRATED, Options(), tables=2)


# --- function -------------------------------------------------------------------------------------


def margin_calibrated_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    offsets: tuple[torch.Tensor, torch.Tensor],
    *,
    variant: str = "paper",
    ignore_index: int | None = checks.IGNORE_INDEX,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Margin-calibrated loss: a penalty on every class's margin, harder on rare classes.

    With margin_k = z_k - max over j != k of z_j (0 for scores that tie for the best), and for the
    pixel's own class c = margin - own, for all others c = margin + other:

        "paper"     log2(1 + 2^-c) for the own class, log2(1 + 2^c) for the others
        "released"  log(1 + e^-c) for the own class, log(1 + e^c) / C for the others: what the
                    authors' code computes, a mean over classes in which the own class weighs C
        "margin"    min(1, max(0, 1 - margin / own)) for the own class,
                    min(1, max(0, 1 + margin / other)) for the others: the ramp that the log-loss
                    replaces

    summed over classes, averaged over valid pixels. The gradient flows through both maxima; of
    equal scores the first counts as the larger.

    Which variant to take: "released" to train from the start with five classes and more; "paper"
    with up to four, or from a network whose scores are well apart already; "margin", which has no
    slope where a margin is wrong, only from such a network. At the start "paper" raises a wrong
    winner. Proof: let a be the best class of a pixel, t the label and not a, and u_k the
    derivative of the penalty on class k by its margin. z_a enters margin_a with +1 and every other
    margin with -1, so that the pixel's loss has

        derivative by z_a = u_a - (sum over k != a of u_k)

    At equal scores all margins are 0, and with s(x) = 1 / (1 + e^-x) the penalties have

        "paper"     u_t = -s(own_t ln 2),  u_k = s(other_k ln 2) for the other classes
        "released"  u_t = -s(own_t),       u_k = s(other_k) / C  for the other classes

    Without offsets every s is 1/2. The derivative by z_a is then

        "paper"     1/2 + 1/2 - (C - 2) / 2           = (4 - C) / 2
        "released"  1 / (2 C) + 1/2 - (C - 2) / (2 C) = 3 / (2 C)

    For "paper" it is negative from C = 5 on: until the other scores have fallen behind, descent
    raises the wrong winner at a rate of (C - 4) / 2, and the label at 1/2. For "released" it is
    positive for every C. Positive ``other`` lower both: those of 40 million pixels in equal shares
    give -2.0, -7.6 and -79 at C = 8, 19 and 150 for "paper", and 0.19, 0.07 and -0.05 for
    "released".

    Under an ignored pixel a logit that is not finite changes nothing. Elsewhere NaN, and
    margins between equal infinities, make their pixel's loss NaN, and the gradient of all of
    its classes; any other infinite score has infinite margins.

    Args:
        logits: [N, C, H, W] with C from 2 to 65536, float16, bfloat16 or float32 (or float64), any
            strides.
        target: integer labels [N, H, W], uint8 to int64.
        offsets: (own, other), floating-point [C] each, finite and not negative, as
            :func:`tritonloss.margin_offsets` returns them. They get no gradient. Others raise on
            the CPU (an infinite offset makes the loss infinite, or constant if "margin"); on a GPU,
            where looking would synchronise, and under torch.compile nobody looks.
        variant: "paper" (default), "released" or "margin"; above is when to take which.
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
        Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images",
        Eq. 8, 9, 16 to 18.

    Example:
        >>> import torch, tritonloss
        >>> from tritonloss.functional import margin_calibrated_loss
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> offsets = tritonloss.margin_offsets(tritonloss.count_labels(target, 19))
        >>> margin_calibrated_loss(torch.randn(2, 19, 32, 64), target, offsets).shape
        torch.Size([])
    """
    common: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "upsample": upsample,
        "align_corners": align_corners,
        "process_group": process_group,
    }
    part = _part(logits, target, offsets=offsets, variant=variant, **common)
    if not serves_triton(logits):
        return margin_calibrated_loss_reference(
            logits, target, part.tables, variant=variant, **common
        )
    return MARGIN_CALIBRATED(logits, target, *part.tables, options=part.options)[0]


def _part(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    offsets: tuple[torch.Tensor, torch.Tensor],
    variant: str,
    **common: Any,
) -> Part:
    """A call of the loss, checked; ``common`` is what all pixelwise losses have."""
    with ranks_agree(common["process_group"], logits):
        check_maps(logits, target, common)
        checks.check_classes(logits, 1 << 16)
        own, other = _check_options(offsets, variant, logits, **common)
        checks.check_labels_in_range(target, logits.size(1), common["ignore_index"])
    tables = (checks.without_gradient(own), checks.without_gradient(other))
    options = Options(variant, **options_of(common))
    return Part(logits, target, "pixelwise.margin_calibration", options, tables)


def _check_options(
    offsets: tuple[torch.Tensor, torch.Tensor],
    variant: str,
    logits: torch.Tensor | None = None,
    **common: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets, once all options are checked; without ``logits``, for any number of classes."""
    own, other = checks.check_pair("offsets", offsets)
    checks.check_class_weights("offsets.own", own, logits, optional=False)
    checks.check_class_weights("offsets.other", other, logits, optional=False)
    if logits is None and own.shape != other.shape:
        raise ValueError(
            f"offsets must be of one shape; got {tuple(own.shape)} and {tuple(other.shape)}"
        )
    checks.check_offsets(own, "offsets.own")
    checks.check_offsets(other, "offsets.other")
    checks.check_option("variant", variant, VARIANTS)
    check_common(common, own.shape[0])
    return own, other


# --- module ---------------------------------------------------------------------------------------


class MarginCalibratedLoss(
    LossModule, function=margin_calibrated_loss, check=_check_options, part=_part
):
    """:func:`tritonloss.functional.margin_calibrated_loss` as a module.

    With five classes and more, ``variant="released"`` trains from the start (the function's
    docstring says why).

    The offsets are buffers, copies of what is given: they go with ``.to()`` and into state_dict().
    A change of dtype rounds them: under ``.half()`` those below 3e-8 become 0, as the own offsets
    of a large data set are. Logits of any dtype go with offsets in float32.

    Args: the offsets and the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> counts = torch.tensor([9000, 900, 100])
        >>> offsets = tritonloss.margin_offsets(counts)
        >>> criterion = tritonloss.MarginCalibratedLoss(offsets, variant="released")
        >>> criterion(torch.randn(2, 3, 32, 64), torch.randint(0, 3, (2, 32, 64))).shape
        torch.Size([])
    """

    own: torch.Tensor
    other: torch.Tensor

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"classes={self.own.numel()}, {super().extra_repr()}"

    def _keep(self, option: inspect.Parameter, value: Any) -> None:
        if option.name != "offsets":
            super()._keep(option, value)
            return
        own, other = value
        self.register_buffer("own", own.detach().clone())
        self.register_buffer("other", other.detach().clone())

    def _kept(self, option: inspect.Parameter) -> Any:
        return (
            MarginOffsets(self.own, self.other)
            if option.name == "offsets"
            else super()._kept(option)
        )


def _with_offsets(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    offset = torch.linspace(0.5, 1.0, logits.size(1), device=logits.device)
    return logits, target, MarginOffsets(offset, offset)


def _upsampled_with_offsets(logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    return _with_offsets(*half_resolution_and_target(logits, target))


EXAMPLES = (
    *(
        Example(
            f"margin_calibrated_loss, {variant}",
            margin_calibrated_loss,
            MARGIN_CALIBRATED,
            {"variant": variant},
            MarginCalibratedLoss,
            _with_offsets,
        )
        for variant in VARIANTS
    ),
    Example(
        "margin_calibrated_loss, upsampled",
        margin_calibrated_loss,
        MARGIN_CALIBRATED,
        {"upsample": "bilinear"},
        MarginCalibratedLoss,
        _upsampled_with_offsets,
    ),
)
