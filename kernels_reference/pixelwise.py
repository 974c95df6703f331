"""Losses with one value per pixel: cross entropy, binary cross entropy, focal loss."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from kernels_reference.base import at_labels, one_hot, reduced, sanitised, valid_pixels


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = 255,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """(1 - s) w_t (-log p_t) + (s / C) sum_k w_k (-log p_k); the mean divides by the sum of w_t."""
    logits = at_labels(logits, target, upsample, align_corners)
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    negative_log_p = -sanitised(logits, valid).log_softmax(1)
    w = _per_class(weight, negative_log_p)

    # Selected, not multiplied: a probability of 0 elsewhere must not turn into 0 * inf.
    own = one_hot(target, classes)
    loss = torch.where(own, w * negative_log_p, 0).sum(1)
    if label_smoothing > 0:
        smooth = torch.where(w == 0, 0, w * negative_log_p).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing / classes * smooth
    own_weight = torch.where(own & valid, w, 0).sum(1)
    return reduced(loss, valid.squeeze(1), own_weight, reduction, process_group)


def binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """w_t softplus(-z_t) + sum over the other classes of softplus(z_k); mean over valid pixels."""
    logits = at_labels(logits, target, upsample, align_corners)
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    own = one_hot(target, classes)
    z = sanitised(logits, valid)
    w = _per_class(pos_weight, z)
    loss = torch.where(own, -w * F.logsigmoid(z), -F.logsigmoid(-z)).sum(1)
    valid = valid.squeeze(1)
    return reduced(loss, valid, valid, reduction, process_group)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    detach_weight: bool = False,
    ignore_index: int | None = 255,
    reduction: str = "mean",
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """-a_t (1 - p_t)^gamma log p_t over the softmax; mean over valid pixels."""
    logits = at_labels(logits, target, upsample, align_corners)
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    own = one_hot(target, classes)
    log_p = torch.where(own, sanitised(logits, valid).log_softmax(1), 0).sum(1)
    a = torch.where(own, _per_class(alpha, log_p), 0).sum(1)

    # Where p is 0 the loss is -a log p: (1 - p)^gamma is the constant 1 in its derivative.
    rest = torch.where(log_p == -torch.inf, 1, -torch.expm1(log_p))
    # 0^gamma has no derivative for gamma < 1, and the loss needs none there: log p is 0 as well.
    modulation = torch.where(rest == 0, 1, rest) ** gamma
    modulation = torch.where(rest == 0, 0.0**gamma, modulation)
    if detach_weight:
        modulation = modulation.detach()
    valid = valid.squeeze(1)
    return reduced(-a * modulation * log_p, valid, valid, reduction, process_group)


def _per_class(weight: Tensor | None, like: Tensor) -> Tensor:
    """The weights of the classes, [1, C, 1, 1]; a single 1 if there are none."""
    if weight is None:
        return like.new_ones(1, 1, 1, 1)
    return weight.detach().to(like.dtype).view(1, -1, 1, 1)
