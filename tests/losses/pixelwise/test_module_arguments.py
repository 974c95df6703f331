"""Pixelwise losses: modules and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tritonloss
from tests.losses.pixelwise.cases import (
    Loss,
    named,
)
from tests.oracle import segmentation_case
from tritonloss.functional import binary_cross_entropy, cross_entropy, focal_loss

pytestmark = pytest.mark.parity

MODULES = [
    (
        tritonloss.CrossEntropyLoss,
        cross_entropy,
        {"weight": torch.tensor([1.0, 2.0]), "label_smoothing": 0.2},
    ),
    (tritonloss.BinaryCrossEntropyLoss, binary_cross_entropy, {"pos_weight": torch.ones(2)}),
    (tritonloss.FocalLoss, focal_loss, {"alpha": torch.ones(2) / 2, "gamma": 1.0}),
    (tritonloss.FocalLoss, focal_loss, {"alpha": 0.25, "detach_weight": True}),
]
LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(("module", "function", "options"), MODULES, ids=named)
def test_modules(module: Any, function: Loss, options: dict[str, Any]) -> None:
    logits, target = segmentation_case((1, 2, 9, 12), ignore_index=1)
    options = {**options, "ignore_index": 1, "reduction": "sum"}
    criterion = module(**options)
    with tritonloss.use_backend("reference"):
        assert torch.equal(criterion(logits, target), function(logits, target, **options))
    tensors = {name for name, value in options.items() if isinstance(value, Tensor)}
    assert set(criterion.state_dict()) == tensors
    for name, value in options.items():
        shown = f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        assert f"{name}={shown}" in repr(criterion)
    assert not list(criterion.parameters())
    with pytest.raises(TypeError):
        module(0.5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (cross_entropy, {"reduction": "avg"}, ValueError, "reduction must be .*'avg'"),
        (cross_entropy, {"label_smoothing": 1.5}, ValueError, "label_smoothing must .*got 1.5"),
        (
            cross_entropy,
            {"weight": [1.0] * 3},
            TypeError,
            r"weight must .*\(3,\) or None; got list",
        ),
        (cross_entropy, {"weight": torch.ones(3).int()}, TypeError, "weight must .*got int32"),
        (cross_entropy, {"weight": torch.ones(4)}, ValueError, r"weight must .*\(4,\)"),
        (
            cross_entropy,
            {"weight": torch.ones(3, device="meta")},
            ValueError,
            "weight must be on the device of logits, cpu; got meta",
        ),
        (cross_entropy, {"ignore_index": 1.0}, TypeError, "ignore_index must be .*1.0"),
        (binary_cross_entropy, {"pos_weight": torch.ones(3, 1)}, ValueError, "pos_weight must"),
        (focal_loss, {"gamma": -1.0}, ValueError, "gamma must .*got -1.0"),
        (focal_loss, {"gamma": "2"}, TypeError, "gamma must .*'2'"),
        (focal_loss, {"alpha": -0.5}, ValueError, "alpha must .*got -0.5"),
        (
            focal_loss,
            {"alpha": [0.5] * 3},
            TypeError,
            r"alpha must be a number in \[0, 1e6\], a .*tensor of shape \(3,\) or None; got list",
        ),
        (focal_loss, {"alpha": True}, TypeError, "alpha must be a number .*got True"),
        (focal_loss, {"detach_weight": 1}, TypeError, "detach_weight must .*1"),
    ],
)
def test_errors(
    loss: Loss, options: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        loss(LOGITS, TARGET, **options)


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (tritonloss.CrossEntropyLoss, {"label_smoothing": 2}, ValueError, "label_smoothing must"),
        (
            tritonloss.CrossEntropyLoss,
            {"weight": [1.0]},
            TypeError,
            r"weight must .*\(C,\) or None",
        ),
        (tritonloss.CrossEntropyLoss, {"reduction": "avg"}, ValueError, "reduction must be"),
        (
            tritonloss.BinaryCrossEntropyLoss,
            {"pos_weight": torch.ones(3, 1)},
            ValueError,
            r"pos_weight must .*\(C,\) or None; got float32 of shape \(3, 1\)",
        ),
        (tritonloss.BinaryCrossEntropyLoss, {"ignore_index": "x"}, TypeError, "ignore_index must"),
        (tritonloss.FocalLoss, {"gamma": -1}, ValueError, "gamma must"),
        (tritonloss.FocalLoss, {"alpha": -0.5}, ValueError, "alpha must .*got -0.5"),
        (tritonloss.FocalLoss, {"alpha": [0.5]}, TypeError, "alpha must be a number .*got list"),
        (tritonloss.FocalLoss, {"detach_weight": 1}, TypeError, "detach_weight must"),
    ],
)
def test_errors_of_modules(
    module: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        module(**options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_numbers_of_numpy(backend: str) -> None:
    logits, target = segmentation_case((1, 3, 5, 8), ignore_index=1)
    kinds = [(float, int)] + [(kind, np.int64) for kind in (np.float32, np.float64)]
    with tritonloss.use_backend(backend):
        for loss, name in ((cross_entropy, "label_smoothing"), (focal_loss, "alpha")):
            values = [
                loss(logits, target, **{name: real(0.5)}, ignore_index=integer(1))
                for real, integer in kinds
            ]
            assert values[0] == values[1] == values[2]


def test_errors_of_shapes_and_labels(loss: Loss) -> None:
    with pytest.raises(TypeError, match="logits must be .*int64"):
        loss(LOGITS.long(), TARGET)
    with pytest.raises(ValueError, match=r"target must hold .*got .*\(2, 1, 4, 5\)"):
        loss(LOGITS, TARGET[:, None])
    with pytest.raises(ValueError, match=r"from 0 to 2 .*got 40 labels .*7 \(40x\)"):
        loss(LOGITS, TARGET + 7)
    with pytest.raises(TypeError):
        loss(LOGITS, TARGET, 0.1)


def test_binary_labels_of_one_class() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1 .*2 \(40x\)"):
        binary_cross_entropy(LOGITS[:, :1], TARGET + 2)
    for softmax_loss in (cross_entropy, focal_loss):
        message = r"logits must have at least 2 classes, .*0 and 1\) use binary_cross_entropy"
        with pytest.raises(ValueError, match=message):
            softmax_loss(LOGITS[:, :1], TARGET)
