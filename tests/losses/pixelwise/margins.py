"""What the tests of the margin-calibrated loss share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonloss
from tests.oracle import check_three_way
from tritonloss import MarginOffsets
from tritonloss.functional import margin_calibrated_loss

VARIANTS = ("paper", "released", "margin")


def offsets_for(classes: int, device: torch.device | str = "cpu") -> MarginOffsets:
    """Offsets large enough to matter, of which one is 0."""
    other = torch.linspace(0.1, 3.0, classes, device=device)
    own = torch.linspace(2.0, 0.0, classes, device=device)
    return MarginOffsets(own, other)


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    options.setdefault("offsets", offsets_for(logits.size(1), logits.device))
    check_three_way(partial(margin_calibrated_loss, target=target, **options), logits)


def kernel_gradient(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of its sum."""
    options.setdefault("offsets", offsets_for(logits.size(1), logits.device))
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = margin_calibrated_loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
