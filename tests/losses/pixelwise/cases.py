"""What the tests of the pixelwise losses share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonloss
from tests.oracle import check_three_way
from tests.slices import is_pixelwise, one_of_each
from tritonloss._core.example import logits_and_target
from tritonloss.functional import binary_cross_entropy, cross_entropy, focal_loss

Loss = Callable[..., Tensor]
# All that walk over pixels and take nothing but logits, labels and options.
LOSSES = tuple(
    example.function
    for example in one_of_each().values()
    if is_pixelwise(example) and example.arguments is logits_and_target
)
REDUCTIONS = ("mean", "sum", "none")


def named(parameter: Any) -> str:
    """A name for a parameter: of functions without the address, which differs between workers."""
    return getattr(parameter, "__name__", None) or str(parameter)


def class_weights(classes: int, device: torch.device) -> Tensor:
    return torch.linspace(0.25, 2.0, classes, device=device)


def check(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> None:
    check_three_way(partial(loss, target=target, **options), logits)


def kernel_gradient(
    loss: Loss, logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value, and gradient of its sum."""
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def filled(options: dict[str, Any], classes: int, device: torch.device) -> dict[str, Any]:
    """Options with class weights in the place of True."""
    weights = class_weights(classes, device)
    return {
        name: weights if value is True and name != "detach_weight" else value
        for name, value in options.items()
    }


OPTIONS = [
    (cross_entropy, {"weight": True}),
    (cross_entropy, {"label_smoothing": 0.1}),
    (cross_entropy, {"label_smoothing": 1.0, "weight": True}),
    (binary_cross_entropy, {"pos_weight": True}),
    (focal_loss, {"alpha": True}),
    (focal_loss, {"alpha": 0.25, "gamma": 0.0}),
    (focal_loss, {"gamma": 0.5}),
    (focal_loss, {"gamma": 1.0, "detach_weight": True}),
    (focal_loss, {"gamma": 3.5}),
    (focal_loss, {"detach_weight": True}),
]
