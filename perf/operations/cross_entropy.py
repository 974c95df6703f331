"""Cases, bytes and goals of cross entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import kernels_reference
from perf.operations import peers
from perf.operations.contract import Goal, Operation
from perf.operations.pixel_cases import (
    AROUND,
    BASE,
    CASES,
    KERNELS,
    SHIPPED,
    SOFTMAX_CODE,
    WIDE,
    bandwidth_goals,
    code_goals,
    floor,
    inputs,
    launch,
)
from tritonloss import functional
from tritonloss.pixelwise.cross_entropy import CROSS_ENTROPY, Options


def torch_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """PyTorch's own, which takes labels in int64 only: the conversion is part of its price."""
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    loss = torch_functional.cross_entropy(
        logits.float() if narrow and logits.device.type == "cpu" else logits,
        target.long(),
        ignore_index=255,
        **options,
    )
    return loss.float() if narrow else loss


CROSS_ENTROPY_CASES = tuple(
    replace(case, against_compile=True)
    for case in (*CASES, replace(BASE, options={"label_smoothing": 0.1}))
)
# Eager is torch's own here, and torch.compile works on that. The goal is to match the faster one.
_AGAINST_TORCH = tuple(
    Goal(f"Cross entropy, {case.text}: speed against {rival}", case, column, at_least=1.0)
    for case in CROSS_ENTROPY_CASES
    for rival, column in (
        ("torch.nn.functional", "speedup_vs_eager"),
        ("torch.compile", "speedup_vs_compile"),
    )
)


_EXTRA = (BASE.shape.elements * 4 + 4 * BASE.shape.pixels) * 1.001 / 2**20
_MEMORY = Goal(
    "Cross entropy: extra MiB, the gradient and 4 bytes per pixel",
    CASES[0],
    "peak_delta_MiB",
    at_most=_EXTRA,
)
OPERATIONS = (
    Operation(
        name="cross_entropy",
        function=functional.cross_entropy,
        reference=torch_cross_entropy,
        inputs=inputs,
        launch=launch(CROSS_ENTROPY, Options()),
        floor=floor,
        cases=CROSS_ENTROPY_CASES,
        shipped=(*SHIPPED, *AROUND, *WIDE),
        kernels=KERNELS,
        operators=("cross_entropy_forward", "cross_entropy_backward"),
        goals=(
            *bandwidth_goals("Cross entropy", 0.75, 0.65),
            *_AGAINST_TORCH,
            _MEMORY,
            *code_goals("Cross entropy", *SOFTMAX_CODE),
        ),
        libraries={"log_softmax": lambda: kernels_reference.cross_entropy, **peers.CROSS_ENTROPY},
    ),
)
