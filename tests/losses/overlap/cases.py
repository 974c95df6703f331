"""What the tests of the losses of overlap share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonloss
from tests.oracle import check_three_way
from tritonloss.functional import dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss

Loss = Callable[..., Tensor]
LOSSES: tuple[Loss, ...] = (dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss)
ACTIVATIONS = ("softmax", "sigmoid")


def named(parameter: Any) -> str:
    """A name for a parameter: of functions without the address, which differs between workers."""
    return getattr(parameter, "__name__", None) or str(parameter)


def check(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> None:
    check_three_way(partial(loss, target=target, **options), logits)


def kernel_gradient(
    loss: Loss, logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the kernels."""
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


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
