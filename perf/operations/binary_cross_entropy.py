"""Cases, bytes and goals of binary cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import kernels_reference
from perf.operations import peers
from perf.operations.contract import Operation, Outputs, UnknownCaseError
from perf.operations.pixel_cases import (
    BINARY,
    CASES,
    KERNELS,
    SHIPPED,
    SIGMOID_CODE,
    WIDE,
    bandwidth_goals,
    code_goals,
    floor,
    inputs,
    launch,
)
from tritonloss import functional
from tritonloss.pixelwise.binary_cross_entropy import BINARY_CROSS_ENTROPY, Options


def torch_binary_cross_entropy() -> Callable[..., Outputs]:
    """PyTorch's own on one-hot labels; it cannot ignore pixels, so their losses are set to 0."""

    def binary_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if options or logits.size(1) == 1:
            raise UnknownCaseError("one-hot labels of several classes, mean over valid pixels only")
        valid = target != 255
        label = torch.where(valid, target, 0).long()
        one_hot = torch_functional.one_hot(label, logits.size(1)).movedim(-1, 1).to(logits)
        loss = torch_functional.binary_cross_entropy_with_logits(
            logits, one_hot, reduction="none"
        ).sum(1, dtype=torch.float32)
        return torch.where(valid, loss, 0).sum() / valid.sum()

    return binary_cross_entropy


OPERATIONS = (
    Operation(
        name="binary_cross_entropy",
        function=functional.binary_cross_entropy,
        reference=kernels_reference.binary_cross_entropy,
        inputs=inputs,
        launch=launch(BINARY_CROSS_ENTROPY, Options()),
        floor=floor,
        cases=(*CASES, BINARY),
        shipped=(*SHIPPED, replace(BINARY, everywhere=False), *WIDE),
        kernels=KERNELS,
        operators=("binary_cross_entropy_forward", "binary_cross_entropy_backward"),
        goals=(
            *bandwidth_goals("Binary cross entropy", 0.75, 0.65),
            *code_goals("Binary cross entropy", *SIGMOID_CODE),
        ),
        libraries={"torch": torch_binary_cross_entropy, **peers.BINARY_CROSS_ENTROPY},
    ),
)
