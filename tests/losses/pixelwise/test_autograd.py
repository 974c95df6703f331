"""Pixelwise losses: gradients, what is saved, what is compiled."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonloss
from tests.losses.pixelwise.cases import (
    LOSSES,
    OPTIONS,
    Loss,
    check,
    filled,
    kernel_gradient,
    named,
)
from tests.oracle import as_layout, segmentation_case
from tritonloss.functional import binary_cross_entropy, cross_entropy
from tritonloss.pixelwise import cross_entropy as cross_entropy_slice
from tritonloss.pixelwise import focal_loss as focal_slice

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("of", "same", "others"),
    [
        (cross_entropy_slice, {"label_smoothing": 0.2}, [{"label_smoothing": 0.0}]),
        (focal_slice, {"gamma": 3.5}, [{"gamma": 1.0}, {"gamma": 2.0}, {"detach_weight": True}]),
    ],
    ids=["cross_entropy", "focal"],
)
def test_new_values_of_options_compile_nothing(
    of: ModuleType, same: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    logits = torch.zeros(1, 3, 2, 2)
    first = of.Options()._replace(**{name: 0.5 for name, value in same.items()})

    def compiled(options: Any, weight: Tensor | None = None) -> Any:
        return of._term(logits, weight, None, options, True).options

    assert compiled(first._replace(**same)) == compiled(first)
    for change in others:
        assert compiled(first._replace(**change)) != compiled(first)
    assert compiled(first, torch.ones(3)) != compiled(first)


@pytest.mark.parametrize(("loss", "options"), [(loss, {}) for loss in LOSSES] + OPTIONS, ids=named)
def test_gradient_is_that_of_the_value(
    loss: Loss, options: dict[str, Any], device: torch.device
) -> None:
    if options.get("detach_weight"):
        pytest.skip("the gradient is not that of the value, on purpose")
    logits, target = segmentation_case((1, 3, 3, 4), dtype=torch.float64, device=device)
    options = filled(options, 3, device)
    with tritonloss.use_backend("triton"):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda z, reduction=reduction: loss(z, target, reduction=reduction, **options),
                logits.requires_grad_(),
                fast_mode=True,
            )


@pytest.mark.parametrize("spread", ["expanded", "transposed", "contiguous"])
def test_every_layout_of_the_upstream_gradient(
    loss: Loss, spread: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 3, 5, 8), device=device)
    upstream = as_layout(torch.rand(2, 5, 8, device=device), spread)
    gradients = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = loss(leaf, target, reduction="none")
        gradients += torch.autograd.grad(value, leaf, upstream)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_backward_twice_and_logits_reused(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    x = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(x, target)
    total = value + x.softmax(1).square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * total, x)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)


def test_no_gradient_wanted(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    expected, _ = kernel_gradient(loss, logits, target)
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                value = loss(logits, target)
                assert torch.equal(value, expected) and not value.requires_grad


def test_every_layout_of_weights(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 5, 8), device=device)
    options = inspect.signature(loss).parameters.values()
    (name,) = (option.name for option in options if "torch.Tensor | None" in option.annotation)
    for weight in (torch.rand(6, device=device)[::2], torch.full((1,), 0.5, device=device)):
        check(loss, logits, target, **{name: weight.expand(3)})


def test_weights_get_no_gradient(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    weight = torch.rand(2, device=device, requires_grad=True)
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            cross_entropy(leaf, target, weight=weight).backward()
            value = cross_entropy(logits, target, weight=weight)
        assert weight.grad is None and leaf.grad is not None and not value.requires_grad


def test_checkpointed(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    _, expected = kernel_gradient(loss, logits, target)
    for reentrant in (False, True):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend("triton"):
            value = checkpoint(loss, leaf, target, use_reentrant=reentrant)
            value.backward()
        assert torch.equal(leaf.grad, expected)


def test_inputs_are_left_alone(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    before, labels = logits.clone(), target.clone()
    kernel_gradient(loss, logits, target)
    assert torch.equal(logits, before) and torch.equal(target, labels)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.shipped_sizes
def test_same_bits_every_time(loss: Loss, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 130), device=device)
    logits = as_layout(logits, layout)
    first, second = (kernel_gradient(loss, logits, target) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_is_saved_is_small(loss: Loss, device: torch.device) -> None:
    """It is 4 bytes per pixel, and nothing for binary cross entropy."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = segmentation_case((1, 6, 8, 12), dtype=dtype, device=device)
        leaf = logits.requires_grad_()
        saved: list[Tensor] = []
        with (
            tritonloss.use_backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
        ):
            loss(leaf, target)
        own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
        per_pixel = sum(x.nbytes for x in own if x.dim() == 3) / target.numel()
        assert per_pixel == (0 if loss is binary_cross_entropy else 4)
        assert sum(x.numel() for x in own if x.dim() != 3) <= 2


def test_compiled_once_for_heads_of_different_classes(loss: Loss, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for classes in (2, 3):
        for reduction in ("mean", "none"):
            logits, target = segmentation_case((1, classes, 3, 4), device=device)
            expected, gradient = kernel_gradient(loss, logits, target, reduction=reduction)
            leaf = logits.detach().requires_grad_()
            with tritonloss.use_backend("triton"):
                value = compiled(leaf, target, reduction=reduction)
            value.sum().backward()
            assert torch.equal(value.detach(), expected) and torch.equal(leaf.grad, gradient)
