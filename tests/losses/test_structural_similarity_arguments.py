"""Structural similarity loss: what it takes, what it refuses, and the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import segmentation_case
from tritonloss.functional import structural_similarity_loss

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]


def test_module(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 9, 12), device=device)
    options = {
        "window_size": 5,
        "sigma": 2.0,
        "beta": 0.2,
        "stability": 0.02,
        "bce_weight": 0.25,
        "padding": "reflect",
        "hard_mining": False,
        "reweight": False,
        "ignore_index": 1,
    }
    module = tritonloss.StructuralSimilarityLoss(**options)
    target = target.where(target != 255, 1)
    with tritonloss.use_backend("reference"):
        assert torch.equal(
            module(logits, target), structural_similarity_loss(logits, target, **options)
        )
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    assert not list(module.parameters()) and not module.state_dict()
    with pytest.raises(TypeError):
        tritonloss.StructuralSimilarityLoss(5)


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (None, TARGET, {}, TypeError, "logits must be .*NoneType"),
        (LOGITS.long(), TARGET, {}, TypeError, "logits must be .*int64"),
        (LOGITS[0], TARGET, {}, ValueError, r"logits must be .*\(3, 4, 5\)"),
        (LOGITS[:, :0], TARGET, {}, ValueError, r"logits must be .*\(2, 0, 4, 5\)"),
        (LOGITS, [0], {}, TypeError, "target must hold .*list"),
        (LOGITS, TARGET.float(), {}, TypeError, "target must hold .*float32"),
        (LOGITS, TARGET.bool(), {}, TypeError, "target must hold .*bool"),
        (
            LOGITS,
            TARGET[:, None],
            {},
            ValueError,
            r"target must hold .*\(2, 4, 5\) to match .*\(2, 3, 4, 5\); got .*\(2, 1, 4, 5\)",
        ),
        (LOGITS, TARGET, {"window_size": 2}, ValueError, "window_size must be .*got 2"),
        (LOGITS, TARGET, {"window_size": True}, TypeError, "window_size must be .*True"),
        (LOGITS, TARGET, {"sigma": -1.0}, ValueError, "sigma must be .*got -1.0"),
        (LOGITS, TARGET, {"sigma": float("nan")}, ValueError, "sigma must be .*got nan"),
        (LOGITS, TARGET, {"beta": 1.0}, ValueError, "beta must be .*got 1.0"),
        (LOGITS, TARGET, {"beta": "0.1"}, TypeError, "beta must be .*'0.1'"),
        (LOGITS, TARGET, {"stability": 0.0}, ValueError, "stability must be .*got 0.0"),
        (LOGITS, TARGET, {"bce_weight": 1.5}, ValueError, "bce_weight must be .*got 1.5"),
        (LOGITS, TARGET, {"padding": "constant"}, ValueError, "padding must be .*'constant'"),
        (LOGITS, TARGET, {"hard_mining": 1}, TypeError, "hard_mining must be .*1"),
        (LOGITS, TARGET, {"reweight": None}, TypeError, "reweight must be .*None"),
        (LOGITS, TARGET, {"ignore_index": 1.0}, TypeError, "ignore_index must be .*1.0"),
        (
            LOGITS,
            TARGET,
            {"window_size": 5, "padding": "valid"},
            ValueError,
            "logits must have .*at least 5 .*height 4",
        ),
        (LOGITS, TARGET + 7, {}, ValueError, r"target must hold .*got 40 labels .*7 \(40x\)"),
    ],
)
def test_errors(
    logits: Tensor,
    target: Tensor,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    backend: str,
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        structural_similarity_loss(logits, target, **options)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        structural_similarity_loss(LOGITS, TARGET, 3)


def test_labels_of_a_subclass_are_looked_at() -> None:
    class Mask(Tensor):
        """Like torchvision's tv_tensors.Mask."""

    target = torch.full((1, 4, 4), 9).as_subclass(Mask)
    with pytest.raises(ValueError, match="target must hold labels from 0 to 1"):
        structural_similarity_loss(torch.randn(1, 2, 4, 4), target)


@pytest.mark.parametrize(
    "options", [{"sigma": 1e-200}, {"sigma": 10**400}, {"stability": 0.0}, {"ignore_index": 2**70}]
)
def test_values_beyond_reason_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must"):
        structural_similarity_loss(torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4).long(), **options)
