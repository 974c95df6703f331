"""Pixelwise losses: extreme and confident logits, many classes, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.losses.pixelwise.cases import (
    LOSSES,
    Loss,
    check,
    kernel_gradient,
)
from tests.oracle import as_layout, segmentation_case
from tritonloss.functional import binary_cross_entropy, cross_entropy, focal_loss

pytestmark = pytest.mark.parity


def test_focal_gradient_of_the_specification() -> None:
    logits, target = segmentation_case((1, 4, 3, 5), dtype=torch.float64, ignore_index=None)
    p = logits.softmax(1)
    y = (target[:, None] == torch.arange(4).view(1, -1, 1, 1)).double()
    p_t = (p * y).sum(1, keepdim=True)
    q = 1 - p_t
    for detached in (False, True):
        live = 0 if detached else 2.5 * p_t * q**1.5 * p_t.log()
        expected = 0.3 * (q**2.5 - live) * (p - y) / target.numel()
        _, gradient = kernel_gradient(
            focal_loss, logits, target, gamma=2.5, alpha=0.3, detach_weight=detached
        )
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.7, 3.3])
@pytest.mark.shipped_sizes
def test_sums_over_many_classes_keep_their_digits(
    value: float, layout: str, device: torch.device
) -> None:
    """All logits but one are equal, so that every rounding of a running sum goes the same way."""
    logits = as_layout(torch.full((1, 1000, 1, 2), value, device=device), layout)
    logits[:, 0] += 1
    target = torch.zeros(1, 1, 2, dtype=torch.int16, device=device)
    truth = logits.double()
    for loss in LOSSES:
        found, _ = kernel_gradient(loss, logits, target, ignore_index=None)
        with tritonloss.use_backend("reference"):
            expected = loss(truth, target, ignore_index=None)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(loss: Loss, value: float, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 6, 12), ignore_index=None, device=device)
    logits[0, :, 2, 5] = value
    found, _ = kernel_gradient(loss, logits, target)
    assert not found.isfinite()
    one_class = logits.clone()
    one_class[0, :, 2, 5] = 1.0
    one_class[0, 1, 2, 5] = float("nan")
    found, gradient = kernel_gradient(loss, one_class, target)
    assert found.isnan() and gradient[0, 1, 2, 5].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [slice(0, 5), slice(5, 9)])
def test_masked_classes(loss: Loss, masked: slice, layout: str, device: torch.device) -> None:
    """-inf says that a class cannot be: a whole block of it, first or last, changes nothing."""
    logits, _ = segmentation_case((1, 9, 4, 6), device=device)
    logits[:, masked] = -float("inf")
    target = torch.full((1, 4, 6), 8 if masked.start == 0 else 2, dtype=torch.uint8, device=device)
    check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_huge_and_equal_logits(loss: Loss, scale: float, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 5, 6, 12), device=device)
    check(loss, as_layout(scale * logits.sign(), layout), target)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_keep_their_differences(
    shift: float, options: dict[str, float], device: torch.device
) -> None:
    """The softmax does not see a shift, so the result must not either."""
    logits, target = segmentation_case((1, 7, 6, 12), device=device)
    logits = (64 * logits).round() / 64
    expected = kernel_gradient(cross_entropy, logits, target, **options)
    value, gradient = kernel_gradient(cross_entropy, logits + shift, target, **options)
    torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-9)


def test_confident_pixels_keep_their_digits(device: torch.device) -> None:
    """Losses are 1e-6: nothing may be rounded away beside a 1, nor added and taken away again."""
    logits = torch.full((1, 5, 2, 4), -14.0, device=device)
    logits[:, 2] = 14.0
    target = torch.full((1, 2, 4), 2, device=device)
    value, gradient = kernel_gradient(binary_cross_entropy, logits, target)
    truth = logits.double()
    torch.testing.assert_close(
        value.double(), 5 * F.softplus(torch.tensor(-14.0, dtype=torch.float64)), rtol=1e-6, atol=0
    )
    expected = torch.where(truth > 0, -torch.sigmoid(-truth), torch.sigmoid(truth)) / 8
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0, 2.0])
def test_focal_loss_of_certain_pixels(gamma: float, device: torch.device) -> None:
    """Where q = 1 - p is 0, q^(gamma - 1) may be infinite, which must not show."""
    logits = torch.zeros(1, 3, 2, 4, device=device)
    logits[:, 1] = 200.0
    for label in (1, 0):
        target = torch.full((1, 2, 4), label, device=device)
        check(focal_loss, logits, target, gamma=gamma)
        value, gradient = kernel_gradient(focal_loss, logits, target, gamma=gamma)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("gap", [0.5, 3.4, 3.5, 4.0, 5.0])
def test_focal_loss_in_float64(gap: float, device: torch.device) -> None:
    """1 - p is computed by its series where p is nearly 1, and as a difference elsewhere."""
    logits = torch.tensor([gap, 0.0], dtype=torch.float64, device=device).view(1, 2, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(focal_loss, logits, target)
    entropy = F.softplus(torch.tensor(-gap, dtype=torch.float64))
    q, p = -torch.expm1(-entropy), torch.exp(-entropy)
    slope = q * (q * q + 2 * p * q * entropy)
    tight = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(value.cpu(), q * q * entropy, **tight)
    torch.testing.assert_close(gradient.flatten().cpu(), torch.stack((-slope, slope)), **tight)


@pytest.mark.parametrize("value", [2.0, 0.75])
def test_references_know_the_closed_forms(value: float) -> None:
    """Where two logits are v apart, -log p of the larger one is softplus(-v)."""
    logits = torch.tensor([value, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.long)
    entropy = F.softplus(torch.tensor(-value, dtype=torch.float64))
    p = torch.exp(-entropy)
    assert torch.isclose(kernels_reference.cross_entropy(logits, target), entropy)
    assert torch.isclose(
        kernels_reference.focal_loss(logits, target, gamma=1.5), (1 - p) ** 1.5 * entropy
    )
    expected = entropy + torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert torch.isclose(kernels_reference.binary_cross_entropy(logits, target), expected)
