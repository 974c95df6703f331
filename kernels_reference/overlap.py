"""Losses of overlap: dice, generalised dice, Tversky, soft IoU; of per (image, class) sums."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels_reference.base import at_labels, one_hot, over_ranks, sanitised, valid_pixels

_SMALLEST = 1e-7  # what a denominator, and a score before its logarithm, is at the least


class ClassSums(NamedTuple):
    """Sums over the valid pixels of an image, or of the batch."""

    own: Tensor  # [N, C]: of a class's probability where it is the label
    all: Tensor  # [N, C]: of its probability everywhere
    pixels: Tensor  # [N, C]: with the label, int64
    valid: Tensor  # [N, 1]: pixels with any, int64


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    per_image: bool = False,
    smooth: float = 1e-5,
    weight: Tensor | None = None,
    classes: str | Sequence[int] = "present",
    include_background: bool = True,
    empty: str = "loss",
    log_loss: bool = False,
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """1 - (2 I + s) / (P + Y + s), or -log of that score; mean over classes."""
    logits = at_labels(logits, target, upsample, align_corners)
    sums = class_sums(logits, target, activation, per_image, ignore_index, process_group)
    score = (sums.own + smooth / 2) / ((sums.all + sums.pixels + smooth) / 2).clamp(min=_SMALLEST)
    counted = _counted(sums, classes, include_background)
    values = _of_score(score, log_loss)
    return _mean(values, sums, counted, weight, empty, process_group if per_image else None)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    activation: str = "softmax",
    per_image: bool = True,
    smooth: float = 1.0,
    weight: Tensor | None = None,
    classes: str | Sequence[int] = "all",
    include_background: bool = True,
    empty: str = "loss",
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """(1 - (TP + s) / (TP + a FP + b FN + s))^gamma; mean over images and classes."""
    logits = at_labels(logits, target, upsample, align_corners)
    sums = class_sums(logits, target, activation, per_image, ignore_index, process_group)
    false = alpha * (sums.all - sums.own) + beta * (sums.pixels - sums.own)
    score = (sums.own + smooth) / (sums.own + false + smooth).clamp(min=_SMALLEST)
    values = 1 - score
    if gamma != 1:
        # 0^gamma has no derivative for gamma < 1, and the loss needs none there: it is at its end.
        is_left = ~(values <= 0)  # NaN is
        values = torch.where(is_left, torch.where(is_left, values, 1) ** gamma, 0)
    counted = _counted(sums, classes, include_background)
    return _mean(values, sums, counted, weight, empty, process_group if per_image else None)


def soft_iou_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    per_image: bool = True,
    smooth: float = 0.0,
    weight: Tensor | None = None,
    classes: str | Sequence[int] = "present",
    include_background: bool = True,
    empty: str = "loss",
    log_loss: bool = False,
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """1 - (I + s) / (U + s) with U = P + Y - I, or -log of that score; mean over classes."""
    logits = at_labels(logits, target, upsample, align_corners)
    sums = class_sums(logits, target, activation, per_image, ignore_index, process_group)
    union = sums.all + sums.pixels - sums.own
    score = (sums.own + smooth) / (union + smooth).clamp(min=_SMALLEST)
    counted = _counted(sums, classes, include_background)
    values = _of_score(score, log_loss)
    return _mean(values, sums, counted, weight, empty, process_group if per_image else None)


def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    per_image: bool = False,
    smooth: float = 1e-5,
    weight: Tensor | None = None,
    classes: str | Sequence[int] = "present",
    include_background: bool = True,
    empty: str = "loss",
    ignore_index: int | None = 255,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """1 - 2 sum w I / max(sum w (P + Y), s) with w = 1 / max(Y^2, 1e-5)."""
    logits = at_labels(logits, target, upsample, align_corners)
    sums = class_sums(logits, target, activation, per_image, ignore_index, process_group)
    counted = _counted(sums, classes, include_background)
    size = sums.pixels.to(sums.own.dtype)
    w = 1 / (size * size).clamp(min=1e-5)
    if weight is not None:
        w = w * weight.detach().to(w.dtype)
    if empty == "zero":
        counted = counted & (sums.pixels > 0)
    w = torch.where(counted, w, 0)
    numerator = (w * sums.own).sum(1)
    denominator = (w * (sums.all + size)).sum(1)
    is_small = denominator <= smooth
    denominator = torch.where(is_small, torch.full_like(denominator, smooth), denominator)
    values = 1 - 2 * numerator / torch.where(denominator == 0, 1, denominator)
    taken = counted.any(1)
    group = process_group if per_image else None
    total = over_ranks(torch.where(taken, values, 0).sum(), group)
    return total / over_ranks(taken.sum(), group).clamp(min=1)


def class_sums(
    logits: Tensor,
    target: Tensor,
    activation: str,
    per_image: bool,
    ignore_index: int | None,
    process_group: ProcessGroup | None = None,
) -> ClassSums:
    """The sums of every image, or of the whole batch and that of other ranks (N is 1)."""
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    own = one_hot(target, classes) & valid
    z = sanitised(logits, valid)
    p = z.softmax(1) if activation == "softmax" else z.sigmoid()
    axes = tuple(range(2, logits.dim())) if per_image else (0, *range(2, logits.dim()))
    over_all = torch.where(valid, p, 0).sum(axes)
    sums = (torch.where(own, p, 0).sum(axes), over_all, own.sum(axes), valid.sum(axes))
    if per_image:
        return ClassSums(*sums)
    return ClassSums(*(over_ranks(s, process_group).unsqueeze(0) for s in sums))


def _counted(sums: ClassSums, classes: str | Sequence[int], include_background: bool) -> Tensor:
    """Which classes of which images are in the mean, bool [N, C]; none without a valid pixel."""
    counted = (sums.valid > 0).expand_as(sums.pixels)
    if classes == "present":
        counted = counted & (sums.pixels > 0)
    number = torch.arange(sums.pixels.size(1), device=sums.pixels.device)
    if not isinstance(classes, str):
        chosen = torch.tensor(tuple(classes), device=number.device)
        counted = counted & (number[:, None] == chosen).any(1)
    if not include_background and sums.pixels.size(1) > 1:
        counted = counted & (number > 0)
    return counted


def _of_score(score: Tensor, log_loss: bool) -> Tensor:
    return -score.clamp(min=_SMALLEST).log() if log_loss else 1 - score


def _mean(
    values: Tensor,
    sums: ClassSums,
    counted: Tensor,
    weight: Tensor | None,
    empty: str,
    process_group: ProcessGroup | None,
) -> Tensor:
    """The mean over the counted classes of all images, weighted; 0 if there is none."""
    if empty == "zero":
        values = torch.where(sums.pixels > 0, values, 0)
    w = torch.ones_like(values) if weight is None else weight.detach().to(values.dtype)
    w = torch.where(counted, w, 0)
    total = over_ranks(torch.where(counted, w * values, 0).sum(), process_group)
    taken = over_ranks(counted.sum(), process_group)
    divisor = torch.where(taken > 0, over_ranks(w.sum(), process_group), 1)
    return torch.where(divisor == 0, torch.nan, total / divisor)
