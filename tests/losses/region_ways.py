"""The ways through region mutual information that its tests take, at the lowest price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tritonloss.functional import rmi_loss

# The whole of the loss at the lowest price in the interpreter: regions of four pixels.
SMALL: dict[str, Any] = {"region_size": 2, "pool_size": 2}
DIRECT: dict[str, Any] = {"region_size": 2, "pooling": None, "ignore": "drop"}
RAW: dict[str, Any] = {"region_size": 2, "pooling": None}
WAYS = pytest.mark.parametrize("options", [SMALL, DIRECT, RAW], ids=["pooled", "direct", "raw"])


def kernel_gradient(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = rmi_loss(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
