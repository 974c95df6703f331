"""The operator of all losses of overlap: scores of classes, their mean, its gradient.

Dice, Tversky and soft IoU are one score, (I + s) / (I + a (P - I) + b (Y - I) + s), of the sum I of
a class's probability over its pixels, the sum P over all pixels and the number Y of its pixels.
With a = b = 1/2 it is the dice score, with a = b = 1 the IoU. The generalised dice loss is one
ratio of weighted sums over the classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.distributed import ProcessGroup

from .._core import checks
from .._core.configurations import TuningCase
from .._core.loss_module import Part
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .._engine.class_heads import Counting, mean_of_classes
from .._engine.class_launch import (
    ClassLoss,
    ClassResults,
    allocated,
    launch_class_sums,
    launch_class_sums_backward,
)
from .._engine.joint_terms import Member
from .._engine.pixel_tuning import first_cases
from .probabilities import LOSSES, PROBABILITIES

_SMALLEST = tl.constexpr(1e-7)  # what a denominator, and a score before its logarithm, is at least
_SMALLEST_SQUARE = tl.constexpr(1e-5)


class Options(NamedTuple):
    """The options of all losses of overlap."""

    form: str  # "score", "log", "power" or "generalized"
    alpha: float
    beta: float
    gamma: float
    smooth: float
    per_image: bool
    classes: str  # "present" or "all"
    chosen: Sequence[int] = ()  # of those, if there are any
    activation: str = "softmax"
    include_background: bool = True
    empty: str = "loss"  # or "zero"
    ignore_index: int | None = checks.IGNORE_INDEX
    upsample: str | None = None
    align_corners: bool = False
    group: str | None = None  # a process group's name


# Those of the dice loss by default.
DICE = Options("score", 0.5, 0.5, 1.0, 5e-6, False, "present")


class Head(NamedTuple):
    """What of the options the head is compiled for."""

    form: str


# --- heads ----------------------------------------------------------------------------------------


@triton.jit
def score_head(classes, numbers, OPTIONS: tl.constexpr, COUNTING: tl.constexpr):
    """The mean of 1 - score, of -log score, or of (1 - score)^gamma."""
    alpha, beta, gamma, smooth = numbers
    score_up = classes.own + smooth
    false = alpha * (classes.all - classes.own) + beta * (classes.pixels - classes.own)
    down = score_up + false
    is_small = down < _SMALLEST
    down = tl.where(is_small, _SMALLEST, down)
    score = score_up / down
    # of the score by the two sums
    by_down = tl.where(is_small, 0.0, -score / down)
    own = 1.0 / down + by_down * (1.0 - alpha - beta)
    all_pixels = by_down * alpha
    if OPTIONS.form == "log":
        is_least = score < _SMALLEST
        value = -tl.log(tl.where(is_least, _SMALLEST, score))
        slope = tl.where(is_least, 0.0, -1.0 / tl.where(is_least, 1.0, score))
    elif OPTIONS.form == "power":
        rest = 1.0 - score
        is_left = ~(rest <= 0)  # NaN is
        log_rest = tl.log(tl.where(is_left, rest, 1.0))
        value = tl.where(is_left, tl.exp(gamma * log_rest), 0.0)
        slope = tl.where(is_left, -gamma * tl.exp((gamma - 1.0) * log_rest), 0.0)
    else:
        value = 1.0 - score
        slope = tl.zeros_like(score) - 1.0
    return mean_of_classes(classes, value, slope * own, slope * all_pixels, COUNTING)


@triton.jit
def generalized_head(classes, numbers, OPTIONS: tl.constexpr, COUNTING: tl.constexpr):
    """1 - 2 sum w I / max(sum w (P + Y), s) with w = 1 / max(Y^2, 1e-5)."""
    alpha, beta, gamma, smooth = numbers
    counted = classes.counted
    if COUNTING.zero:
        counted = counted & (classes.pixels > 0)
    size = classes.pixels * classes.pixels
    weight = classes.weight / tl.where(size < _SMALLEST_SQUARE, _SMALLEST_SQUARE, size)
    weight = tl.where(counted, weight, 0.0)
    up = tl.sum(tl.where(counted, weight * classes.own, 0.0))
    down = tl.sum(tl.where(counted, weight * (classes.all + classes.pixels), 0.0))
    is_small = down <= smooth
    down = tl.where(is_small, smooth, down)
    down = tl.where(down == 0, 1.0, down)
    taken = tl.where(tl.sum(counted.to(tl.int32)) > 0, 1.0, 0.0).to(tl.float64)
    value = 1.0 - 2.0 * up / down
    own = taken * (-2.0 / down) * weight
    all_pixels = taken * tl.where(is_small, 0.0, 2.0 * up / (down * down)) * weight
    return tl.where(taken > 0, value, 0.0), taken, taken, own, all_pixels


# --- operator -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _loss_of(options: Options, is_single: bool, weighted: bool) -> ClassLoss:
    """The loss as launchers take it."""
    counting = Counting(
        present=options.classes == "present",
        chosen=tuple(options.chosen),
        background=options.include_background or is_single,
        zero=options.empty == "zero",
        weighted=weighted,
        per_image=options.per_image,
    )
    return ClassLoss(
        LOSSES[options.activation],
        PROBABILITIES[options.activation],
        generalized_head if options.form == "generalized" else score_head,
        Head(options.form),
        counting,
        (options.alpha, options.beta, options.gamma, options.smooth),
        options.ignore_index,
        options.upsample,
        options.align_corners,
        options.group,
    )


def loss_of(options: Options, logits: torch.Tensor, weight: torch.Tensor | None) -> ClassLoss:
    """The loss that these options are of."""
    hashable = options._replace(chosen=tuple(options.chosen))
    return _loss_of(hashable, bool(logits.size(1) == 1), weight is not None)


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ClassResults:
    return launch_class_sums(loss_of(options, logits, weight), logits, target, weight, save)


def _backward(
    grad_loss: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    first: Any,
    second: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    kept = ClassResults(grad_loss, scale, table, first, second)
    loss = loss_of(options, logits, None)
    return launch_class_sums_backward(loss, grad_loss, kept, logits, target)


def _allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    save: bool,
) -> ClassResults:
    return allocated(LOSSES[options.activation], options.per_image, logits, target, save)


OVERLAP = Operator(
    "overlap",
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    results=ClassResults,
    options=Options,
)


MEMBER = Member(Options, classes=loss_of)


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for all losses of overlap together."""
    return first_cases(LOSSES["softmax"], OVERLAP, DICE)


# --- calls ----------------------------------------------------------------------------------------


class Common(NamedTuple):
    """What users give to every loss of overlap beside logits and labels."""

    activation: str
    per_image: bool
    smooth: float
    weight: torch.Tensor | None
    classes: str | Sequence[int]
    include_background: bool
    empty: str
    ignore_index: int | None
    upsample: str | None
    align_corners: bool
    process_group: ProcessGroup | None


def check_common(common: Common, logits: torch.Tensor | None = None) -> None:
    """Check what all losses of overlap have; without ``logits``, for any number of classes."""
    classes = None if logits is None else logits.size(1)
    checks.check_option("activation", common.activation, ("softmax", "sigmoid"))
    checks.check_flag("per_image", common.per_image)
    checks.check_range("smooth", common.smooth, 0.0, 1e6)
    checks.check_class_weights("weight", common.weight, logits)
    checks.check_class_choice("classes", common.classes, classes)
    checks.check_flag("include_background", common.include_background)
    checks.check_option("empty", common.empty, ("loss", "zero"))
    checks.check_ignore_index(common.ignore_index, classes)
    checks.check_upsample(common.upsample, common.align_corners)
    check_process_group(common.process_group)
    if logits is not None and common.activation == "softmax":
        checks.check_classes(logits, instead='use activation="sigmoid", or ')


def checked_maps(
    logits: torch.Tensor, target: torch.Tensor, common: Common
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels as images, after all checks of what every loss of overlap has."""
    with ranks_agree(common.process_group, logits):
        logits, target = checks.as_images(logits, target, common.upsample)
        checks.check_logits(logits)
        checks.check_upsample(common.upsample, common.align_corners)
        checks.check_target(logits, target, common.upsample, can_upsample=True)
        check_common(common, logits)
        checks.check_labels_in_range(target, checks.labels_of(logits), common.ignore_index)
    return logits, target


def part_of(
    logits: torch.Tensor,
    target: torch.Tensor,
    common: Common,
    *,
    form: str,
    smooth: float,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
) -> Part:
    """A call with checked maps. ``smooth`` is that of the score."""
    everything = isinstance(common.classes, str)
    options = Options(
        form=form,
        alpha=float(alpha),
        beta=float(beta),
        gamma=float(gamma),
        smooth=float(smooth),
        activation=common.activation,
        per_image=common.per_image,
        classes=str(common.classes) if everything else "all",
        chosen=() if everything else tuple(int(number) for number in common.classes),
        include_background=common.include_background,
        empty=common.empty,
        ignore_index=checks.plain_label(common.ignore_index),
        upsample=common.upsample,
        align_corners=common.align_corners,
        group=name_of(common.process_group),
    )
    weight = None if common.weight is None else checks.without_gradient(common.weight)
    return Part(logits, target, "overlap.scores", options, (weight, None))


def launched(part: Part) -> torch.Tensor:
    """The loss of a call, by kernels."""
    return OVERLAP(part.logits, part.target, part.tables[0], options=part.options)[0]
