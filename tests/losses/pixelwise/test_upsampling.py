"""Losses over interpolated logits: values and gradients are those of F.interpolate and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import interpreter

import tritonloss
from tests.engine.test_offsets import far_apart
from tests.losses.pixelwise.cases import (
    OPTIONS,
    REDUCTIONS,
    Loss,
    check,
    filled,
    kernel_gradient,
    named,
)
from tests.losses.pixelwise.upsampled import UPSAMPLED, Size, margins, upsampled_case
from tests.oracle import LAYOUTS, as_layout, check_three_way
from tests.slices import operators_with
from tritonloss._core import configurations
from tritonloss.functional import binary_cross_entropy, cross_entropy, focal_loss

pytestmark = pytest.mark.parity

BILINEAR: dict[str, Any] = {"upsample": "bilinear"}
# By the ratio or what is special: the sizes of the logits and of the labels.
SIZES: dict[str, tuple[Size, Size]] = {
    "1": ((3, 4), (3, 4)),
    "1.5": ((4, 6), (6, 9)),
    "2": ((3, 5), (6, 10)),
    "3.3": ((3, 4), (10, 13)),
    "4": ((2, 4), (8, 16)),
    "8": ((2, 2), (16, 16)),
    "16": ((1, 2), (16, 32)),
    "3 and 1": ((2, 5), (6, 5)),
    "no multiple": ((3, 5), (7, 23)),
    "one node": ((1, 1), (5, 7)),
    "one row": ((1, 6), (3, 7)),
    "one column": ((5, 1), (7, 4)),
    "several programs": ((3, 40), (4, 43)),
}


@pytest.fixture(autouse=True)
def small_cells(request: pytest.FixtureRequest) -> Iterator[None]:
    """One warp, two rows and columns of pixels and two rows of nodes at once, blocks of 4 classes.

    Then a cell has several chunks and bands, and a small map several strips.
    """
    size = {"PIXEL_COLUMNS": 2, "PIXEL_ROWS": 2, "NODE_ROWS": 2, "UNROLL": 4, "num_warps": 1}
    if request.node.get_closest_marker("shipped_sizes"):
        size = {}
    with ExitStack() as stack:
        for operator in operators_with("PIXEL_COLUMNS"):
            stack.enter_context(configurations.forced(operator, size))
        yield


@pytest.fixture(params=UPSAMPLED, ids=named)
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy], ids=named)
def test_every_ratio(loss: Loss, size: str, align_corners: bool, device: torch.device) -> None:
    logits, target = upsampled_case(*SIZES[size], device=device)
    check(loss, logits, target, align_corners=align_corners, **BILINEAR)


def test_one_pixel(loss: Loss, device: torch.device) -> None:
    logits, target = upsampled_case((1, 1), (1, 1), dtype=torch.float64, device=device)
    check(loss, logits, target, **BILINEAR)


@pytest.mark.parametrize("size", ["1.5", "4", "8"])
@pytest.mark.shipped_sizes
def test_shipped_sizes_of_every_ratio(loss: Loss, size: str, device: torch.device) -> None:
    logits, target = upsampled_case(*SIZES[size], classes=7, device=device)
    check(loss, logits, target, **BILINEAR)


MARGINS = [(margins, {"variant": variant}) for variant in ("paper", "released", "margin")]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("loss", "options"), [(loss, {}) for loss in UPSAMPLED[:3]] + OPTIONS + MARGINS, ids=named
)
def test_every_option_and_reduction(
    loss: Loss, options: dict[str, Any], reduction: str, device: torch.device
) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=5, batch=2, device=device)
    options = filled(options, 5, device)
    check(loss, logits, target, reduction=reduction, **options, **BILINEAR)


@pytest.mark.parametrize("size", ["2", "3.3"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_interpolated_by_torch(backend: str, size: str, device: torch.device) -> None:
    """The reference interpolates as anyone would: both are torch's two functions in a row."""
    logits, target = upsampled_case(*SIZES[size], dtype=torch.float64, device=device)
    for align_corners in (False, True):
        options = {"mode": "bilinear", "align_corners": align_corners}
        leaf = logits.clone().requires_grad_()
        at_labels = F.interpolate(leaf, target.shape[1:], **options)
        expected = F.cross_entropy(at_labels, target.long(), ignore_index=255)
        (truth,) = torch.autograd.grad(expected, leaf)
        with tritonloss.use_backend(backend):
            value = cross_entropy(leaf, target, align_corners=align_corners, **BILINEAR)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(loss: Loss, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = upsampled_case((3, 4), (7, 9), dtype=dtype, device=device)
    check(loss, logits, target, **BILINEAR)


@pytest.mark.parametrize("classes", [1, 2, 4, 9, 19])
def test_every_number_of_classes(loss: Loss, classes: int, device: torch.device) -> None:
    """Less than a block of classes, a whole one, and what is left over of several."""
    logits, target = upsampled_case((2, 2), (3, 4), classes=classes, device=device)
    if loss is not binary_cross_entropy and classes == 1:
        with pytest.raises(ValueError, match="logits must .* use binary_cross_entropy"):
            loss(logits, target, **BILINEAR)
    else:
        check(loss, logits, target, **BILINEAR)


@pytest.mark.shipped_sizes
def test_many_classes(loss: Loss, device: torch.device) -> None:
    logits, target = upsampled_case(
        (1, 2), (2, 3), classes=300, label_dtype=torch.int16, device=device
    )
    target[0, 0, 1] = 299
    check(loss, logits, target, ignore_index=255, **BILINEAR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(loss: Loss, layout: str, device: torch.device) -> None:
    logits, target = upsampled_case((3, 4), (6, 9), batch=2, device=device)
    check(loss, as_layout(logits, layout), target, **BILINEAR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_labels(layout: str, device: torch.device) -> None:
    logits, target = upsampled_case((3, 4), (6, 9), batch=2, device=device)
    check(cross_entropy, logits, as_layout(target, layout), **BILINEAR)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_every_layout_of_the_upstream_gradient(
    loss: Loss, layout: str, device: torch.device
) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), batch=2, device=device)
    upstream = as_layout(torch.rand(2, 5, 7, device=device), layout)
    gradients = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = loss(leaf, target, reduction="none", **BILINEAR)
        gradients += torch.autograd.grad(value, leaf, upstream)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)])
def test_far_strides(axis: int, size: int, tmp_path: Path) -> None:
    shape = [1, 2, 2, 2]
    shape[axis] = size
    batch, classes, *low = shape
    logits, target = upsampled_case(
        (low[0], low[1]), (4, 4), classes=classes, batch=batch, dtype=torch.float16
    )
    apart = far_apart(logits, axis, tmp_path)
    expected, found = (
        kernel_gradient(cross_entropy, x, target, **BILINEAR) for x in (logits, apart)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_far_strides_of_labels(axis: int, tmp_path: Path) -> None:
    shape = [2, 2, 2]
    shape[axis] = 3
    batch, height, width = shape
    logits, target = upsampled_case((1, 2), (height, width), batch=batch)
    apart = far_apart(target, axis, tmp_path)
    expected, found = (
        kernel_gradient(cross_entropy, logits, labels, **BILINEAR) for labels in (target, apart)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# --- labels ---------------------------------------------------------------------------------------


def test_every_label_dtype(loss: Loss, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), device=device)
    expected = kernel_gradient(loss, logits, target, **BILINEAR)
    for dtype in (torch.int16, torch.int32, torch.int64):
        found = kernel_gradient(loss, logits, target.to(dtype), **BILINEAR)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [(0, torch.uint8), (-100, torch.int64), (300, torch.int16), (None, torch.uint8)],
)
def test_every_ignore_label(
    ignore_index: int | None, label_dtype: torch.dtype, device: torch.device
) -> None:
    case = upsampled_case(
        (2, 3), (5, 7), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check(cross_entropy, *case, ignore_index=ignore_index, **BILINEAR)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_pixels_ignored(loss: Loss, reduction: str, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), device=device)
    value, gradient = kernel_gradient(
        loss, logits, target.fill_(255), reduction=reduction, **BILINEAR
    )
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "labels"), [((0, 3, 2, 5), (0, 4, 6)), ((2, 3, 0, 5), (2, 0, 6))], ids=str
)
def test_no_pixels(
    loss: Loss,
    reduction: str,
    shape: tuple[int, ...],
    labels: tuple[int, ...],
    device: torch.device,
) -> None:
    logits = torch.zeros(shape, device=device)
    target = torch.zeros(labels, dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(loss, logits, target, reduction=reduction, **BILINEAR)
    assert value.shape == (labels if reduction == "none" else ())
    assert value.sum() == 0 and gradient.shape == shape and gradient.sum() == 0


# --- values that are extreme, or none -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits(loss: Loss, dtype: torch.dtype, device: torch.device) -> None:
    """They are rounded by up to 2^-24 of themselves, but a pixel that is sure loses no digit."""
    logits, target = upsampled_case((3, 4), (7, 9), dtype=dtype, device=device)
    function = partial(loss, target=target, **BILINEAR)
    for extreme in (1e4 * logits.sign(), torch.full_like(logits, -1e4)):
        check_three_way(function, extreme, gradient_tolerance=2e-6)


@pytest.mark.parametrize("shift", [0.0, 30.0, -1e4])
@pytest.mark.parametrize("loss", [cross_entropy, focal_loss], ids=named)
def test_probabilities_have_the_digits_of_their_log_sum(
    loss: Loss, shift: float, device: torch.device
) -> None:
    """The one number per pixel is rounded by 2^-24 of it: so much is each probability off."""
    logits, target = upsampled_case((2, 3), (6, 9), classes=5, device=device)
    logits = (64 * logits).round() / 64 + shift  # without a rounding
    options = {"reduction": "sum", "ignore_index": None, **BILINEAR}
    target = target.where(target != 255, 0)
    _, gradient = kernel_gradient(loss, logits, target, **options)
    leaf = logits.double().requires_grad_()
    with tritonloss.use_backend("reference"):
        value = loss(leaf, target, **options)
    (truth,) = torch.autograd.grad(value, leaf)
    node = torch.ones_like(leaf).requires_grad_()
    at_labels = F.interpolate(node, target.shape[1:], mode="bilinear")
    (weights,) = torch.autograd.grad(at_labels.sum(), node)  # of all pixels of a node
    largest = logits.abs().max().item() + math.log(5)
    assert ((gradient - truth).abs() <= 3 * (8 + largest) * 2.0**-24 * weights).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_nodes_under_void_do_no_harm(loss: Loss, value: float, device: torch.device) -> None:
    """A border that is void for more than a cell, as augmentation leaves it."""
    logits, target = upsampled_case((4, 5), (8, 15), device=device)
    target[:, :, 6:] = 255  # from the centre of the third column of nodes on
    target[:, 5:] = 255
    hidden = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device=device)
    hidden[..., 3:] = True
    hidden[..., 3, :] = True
    for reduction in ("mean", "none"):
        quiet, loud = (
            kernel_gradient(loss, logits.where(~hidden, x), target, reduction=reduction, **BILINEAR)
            for x in (0.0, value)
        )
        assert torch.equal(quiet[0], loud[0]) and torch.equal(quiet[1], loud[1])
        assert (loud[1][hidden.expand_as(logits)] == 0).all()
        assert loud[1].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", ["3.3", "4", "1"])
def test_nodes_that_are_no_number(
    loss: Loss, size: str, value: float, device: torch.device
) -> None:
    """It is the logit of all pixels that have a part of it; by a part of 0 it may or may not be."""
    low, high = SIZES[size]
    logits, target = upsampled_case(low, high, device=device)
    spoilt = logits.clone()
    spoilt[0, 1, 1, 2] = value
    node = torch.zeros(1, 1, *low, device=device)
    node[0, 0, 1, 2] = 1
    touched = F.interpolate(node, high, mode="bilinear")[:, 0] > 0
    around = F.max_pool2d(node, 3, stride=1, padding=1)
    far = F.interpolate(around, high, mode="bilinear")[:, 0] < 1 - 1e-5
    with tritonloss.use_backend("reference"):
        at_labels = F.interpolate(logits, high, mode="bilinear")
        at_labels[:, 1] = value
        expected = loss(at_labels, target, reduction="none")
        leaf = spoilt.clone().requires_grad_()
        theirs = loss(leaf, target, reduction="none", **BILINEAR)
        (truth,) = torch.autograd.grad(theirs.sum(), leaf)
    clean, clean_gradient = kernel_gradient(loss, logits, target, reduction="none", **BILINEAR)
    found, gradient = kernel_gradient(loss, spoilt, target, reduction="none", **BILINEAR)
    torch.testing.assert_close(found[touched], expected[touched], equal_nan=True)
    assert torch.equal(found[far], clean[far])
    either = torch.isclose(found, expected, equal_nan=True) | (found == clean)
    assert either.all()
    far_nodes = (F.max_pool2d(around, 3, stride=1, padding=1) == 0).expand_as(logits)
    assert torch.equal(gradient[far_nodes], clean_gradient[far_nodes])
    if value != value:
        assert gradient[0, 1, 1, 2].isnan()
    if size != "1":  # torch copies, and has no parts of 0
        finite = truth.isfinite()
        torch.testing.assert_close(gradient[finite], truth[finite], rtol=1e-5, atol=1e-5)


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
def test_gradient_is_that_of_the_value(
    loss: Loss, align_corners: bool, device: torch.device
) -> None:
    logits, target = upsampled_case((2, 3), (3, 7), dtype=torch.float64, device=device)
    with tritonloss.use_backend("triton"):
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "align_corners": align_corners, **BILINEAR}
            assert torch.autograd.gradcheck(
                lambda z, options=options: loss(z, target, **options),
                logits.requires_grad_(),
                fast_mode=True,
            )


def test_backward_twice_and_logits_reused(loss: Loss, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), device=device)
    x = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(x, target, **BILINEAR)
    total = value + x.softmax(1).square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * total, x)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)


def test_no_gradient_of_the_gradient(loss: Loss, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), device=device)
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(leaf, target, **BILINEAR)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient"):
            gradient.sum().backward()


def test_vmap_and_func_grad(device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (4, 5), batch=2, device=device)

    def quick_loss(x: Tensor) -> Tensor:
        return cross_entropy(x, target, **BILINEAR)

    _, expected = kernel_gradient(cross_entropy, logits, target, **BILINEAR)
    with tritonloss.use_backend("triton"):
        torch.testing.assert_close(torch.func.grad(quick_loss)(logits), expected)
        maps = torch.stack((logits, -logits))
        values = torch.stack([quick_loss(x) for x in maps])
        assert torch.equal(torch.vmap(quick_loss)(maps), values)


def test_the_same_bits_whatever_the_order_of_calls(loss: Loss, device: torch.device) -> None:
    """Two calls, and one of another size in between."""
    logits, target = upsampled_case((3, 40), (4, 43), device=device)
    first = kernel_gradient(loss, logits, target, **BILINEAR)
    kernel_gradient(loss, logits[..., :7], target, **BILINEAR)
    second = kernel_gradient(loss, logits, target, **BILINEAR)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
def test_the_same_bits_whatever_the_order_of_programs(
    loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = upsampled_case((3, 40), (4, 43), device=device)
    first = kernel_gradient(loss, logits, target, **BILINEAR)
    builder = interpreter.interpreter_builder
    set_index, seen = builder.set_grid_idx, []

    def set_reversed(x: int, y: int, z: int) -> None:
        seen.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_reversed)
    second = kernel_gradient(loss, logits, target, **BILINEAR)
    assert max(seen) > 0
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_is_saved_is_small(loss: Loss, device: torch.device) -> None:
    """4 bytes per pixel of the labels, 8 of margins, nothing for binary cross entropy."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = upsampled_case((2, 3), (8, 12), classes=6, dtype=dtype, device=device)
        leaf = logits.requires_grad_()
        saved: list[Tensor] = []
        with (
            tritonloss.use_backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
        ):
            loss(leaf, target, **BILINEAR)
        own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
        per_pixel = sum(x.nbytes for x in own if x.dim() == 3) / target.numel()
        assert per_pixel == {binary_cross_entropy: 0, margins: 8}.get(loss, 4)
        assert not [x for x in own if x.dim() > 3]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("high", "options", "error", "message"),
    [
        ((8, 9), {}, ValueError, r'target must .*\(1, 4, 5\).*; upsample="bilinear" is for labels'),
        ((3, 9), {}, ValueError, r"target must .*got uint8 of shape \(1, 3, 9\)$"),
        (
            (3, 9),
            BILINEAR,
            ValueError,
            r"target must .*\(1, H, W\) with H of at least 4 and W of at least 5 ",
        ),
        ((8, 4), BILINEAR, ValueError, r"target must .*; got uint8 of shape \(1, 8, 4\)$"),
        ((4, 5), {"align_corners": True}, ValueError, "align_corners must be False without"),
        ((8, 9), {"upsample": "nearest"}, ValueError, "upsample must be .*'bilinear'.*'nearest'"),
        ((8, 9), {"upsample": True}, TypeError, "upsample must be .*got True of type bool"),
        ((8, 9), {**BILINEAR, "align_corners": 1}, TypeError, "align_corners must be True or"),
    ],
)
def test_refusals(
    loss: Loss, backend: str, high: Size, options: dict[str, Any], error: type, message: str
) -> None:
    logits, target = upsampled_case((4, 5), high)
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        loss(logits, target, **options)


def test_modules_keep_the_options() -> None:
    offsets = tritonloss.MarginOffsets(torch.ones(3), torch.ones(3))
    for module, given in (
        (tritonloss.CrossEntropyLoss, ()),
        (tritonloss.BinaryCrossEntropyLoss, ()),
        (tritonloss.FocalLoss, ()),
        (tritonloss.MarginCalibratedLoss, (offsets,)),
    ):
        criterion = module(*given, upsample="bilinear", align_corners=True)
        assert "upsample='bilinear', align_corners=True" in repr(criterion)
        with pytest.raises(ValueError, match="^align_corners must be False"):
            module(*given, align_corners=True)
        with pytest.raises(ValueError, match="^upsample must be one of 'bilinear' or None"):
            module(*given, upsample="bicubic")
