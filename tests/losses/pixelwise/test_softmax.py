"""What the losses of a softmax save of a pixel: four bytes that hold its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.losses.pixelwise.cases import Loss, check, kernel_gradient
from tests.oracle import as_layout
from tritonloss._core.configurations import forced
from tritonloss.functional import cross_entropy, focal_loss

pytestmark = pytest.mark.parity

LAYOUTS = ("contiguous", "channels_last", "sliced")


@pytest.fixture(params=[cross_entropy, focal_loss], ids=lambda loss: loss.__name__)
def loss(request: pytest.FixtureRequest) -> Iterator[Loss]:
    yield request.param


def with_the_largest_everywhere(classes: int, shift: float, device: torch.device) -> Tensor:
    """Logits of as many pixels as classes, or more: each class is the largest somewhere."""
    pixels = -(-classes // 12) * 12
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(classes, pixels, generator=generator)
    place = torch.arange(pixels)
    logits[place % classes, place] = logits.amax(0) + 0.5
    # A second class has the largest logit, too: where they are in two bundles, either is right.
    logits[(3 * place + 1) % classes, place] = logits.amax(0)
    return (logits + shift).view(1, classes, pixels // 12, 12).to(device)


def labels_of(logits: Tensor) -> Tensor:
    batch, classes, height, width = logits.shape
    labels = torch.arange(batch * height * width, device=logits.device) * 5 % classes
    return labels.view(batch, height, width).to(torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 19, 150, 256, 257])
@pytest.mark.shipped_sizes
def test_the_largest_logit_is_found_again(
    loss: Loss, classes: int, layout: str, device: torch.device
) -> None:
    logits = as_layout(with_the_largest_everywhere(classes, 0.0, device), layout)
    check(loss, logits, labels_of(logits), ignore_index=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_far_from_zero(shift: float, layout: str, device: torch.device) -> None:
    logits = with_the_largest_everywhere(19, 0.0, device)
    logits = as_layout((64 * logits).round() / 64, layout)
    target = labels_of(logits)
    expected = kernel_gradient(cross_entropy, logits, target)
    value, gradient = kernel_gradient(cross_entropy, as_layout(logits + shift, layout), target)
    torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lanes", [(1, 8), (16, 2), (64, 4), (4, 64), (128, 1)])
def test_lanes_of_the_passes_may_differ(lanes: tuple[int, int], device: torch.device) -> None:
    logits = as_layout(with_the_largest_everywhere(150, 0.0, device), "channels_last")
    with ExitStack() as stack:
        for direction, count in zip(("forward", "backward"), lanes, strict=True):
            configuration = {"PIXELS": 16, "CLASS_LANES": count, "UNROLL": 3}
            stack.enter_context(forced(f"cross_entropy_{direction}", configuration))
        check(cross_entropy, logits, labels_of(logits), ignore_index=None)


@pytest.mark.parametrize("unroll", [1, 3, 16])
def test_blocks_need_not_be_bundles(unroll: int, device: torch.device) -> None:
    logits = with_the_largest_everywhere(70, 0.0, device)
    with forced("cross_entropy_forward", {"UNROLL": unroll}):
        check(cross_entropy, logits, labels_of(logits))


def test_a_gradient_of_another_layout(device: torch.device) -> None:
    """Neighbouring addresses are classes in the logits, and pixels in their gradient."""
    column = torch.randn(1, 70, 3, 1, device=device).to(memory_format=torch.channels_last)
    logits = column.detach().expand(-1, -1, -1, 12).requires_grad_()
    target = labels_of(logits)
    with tritonloss.use_backend("triton"):
        value = cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    expected = kernel_gradient(cross_entropy, logits.contiguous(), target)
    torch.testing.assert_close(value.detach(), expected[0])
    torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize("classes", [2, 255, 256])
def test_equal_logits(classes: int, device: torch.device) -> None:
    """The logarithm of the sum is at the end of the range that fixed point has."""
    logits = torch.full((1, classes, 2, 4), 3.25, device=device)
    _, gradient = kernel_gradient(
        cross_entropy, logits, labels_of(logits), ignore_index=None, reduction="sum"
    )
    others = gradient[gradient > 0]
    torch.testing.assert_close(others * classes, torch.ones_like(others), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_without_a_value_have_no_gradient(
    loss: Loss, value: float, layout: str, device: torch.device
) -> None:
    """Their gradient is NaN in all classes, and no other pixel's is."""
    logits = with_the_largest_everywhere(19, 0.0, device)
    logits[0, :, 1, 5] = value
    if value > 0 or value != value:
        logits[0, 1:, 1, 5] = 1.0
    _, gradient = kernel_gradient(loss, as_layout(logits, layout), labels_of(logits))
    assert gradient[0, :, 1, 5].isnan().all()
    gradient[0, :, 1, 5] = 0.0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("classes", "dtype", "expected"),
    [
        (256, torch.float32, 4),
        (256, torch.bfloat16, 4),
        (257, torch.float32, 8),
        (257, torch.bfloat16, 6),
        (2, torch.float64, 16),
    ],
)
def test_what_is_saved(
    loss: Loss, classes: int, dtype: torch.dtype, expected: int, device: torch.device
) -> None:
    logits = torch.zeros(1, classes, 2, 4, dtype=dtype, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        loss(logits, labels_of(logits), ignore_index=None)
    maps = [x for x in saved if x.shape == (1, 2, 4) and x.dtype != torch.int16]
    assert sum(x.element_size() for x in maps) == expected
