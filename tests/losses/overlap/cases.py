"""What the tests of the losses of overlap share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tritonloss
from tests.losses.pixelwise.cases import Loss, check, kernel_gradient, named
from tritonloss.functional import dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "Loss",
    "check",
    "kernel_gradient",
    "named",
    "reference_gradient",
    "without_classes",
]
LOSSES: tuple[Loss, ...] = (dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss)
ACTIVATIONS = ("softmax", "sigmoid")


def reference_gradient(
    loss: Loss, logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the reference."""
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("reference"):
        value = loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def without_classes(target: Tensor, *classes: int) -> Tensor:
    """The labels with class 0 in the place of these."""
    for number in classes:
        target = torch.where(target == number, 0, target)
    return target
