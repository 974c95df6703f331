"""Cross entropy, binary cross entropy and focal loss: the kernels against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.engine.test_offsets import far_apart
from tests.losses.pixelwise.cases import (
    LOSSES,
    OPTIONS,
    REDUCTIONS,
    Loss,
    check,
    class_weights,
    filled,
    kernel_gradient,
    named,
)
from tests.oracle import LAYOUTS, as_layout, segmentation_case
from tritonloss._core import checks
from tritonloss.functional import binary_cross_entropy, cross_entropy

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("loss", "options"), [(loss, {}) for loss in LOSSES] + OPTIONS, ids=named)
def test_every_option_and_reduction(
    loss: Loss, options: dict[str, Any], reduction: str, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 7, 6, 12), device=device)
    options = filled(options, 7, device)
    check(loss, as_layout(logits, layout), target, reduction=reduction, **options)


def torch_case() -> tuple[Tensor, Tensor, Tensor]:
    logits, target = segmentation_case((2, 5, 6, 7), dtype=torch.float64)
    return logits, target, class_weights(5, torch.device("cpu")).double()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(
    weighted: bool, smoothing: float, reduction: str, backend: str
) -> None:
    logits, target, weights = torch_case()
    weight = weights if weighted else None
    results = []
    for function, labels in ((cross_entropy, target), (F.cross_entropy, target.long())):
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            value = function(
                leaf,
                labels,
                weight=weight,
                label_smoothing=smoothing,
                ignore_index=255,
                reduction=reduction,
            )
        upstream = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
        results.append((value.detach(), *torch.autograd.grad(value, leaf, upstream)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weights_of_zero_give_torchs_nan(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 4, 5), device=device)
    value, _ = kernel_gradient(cross_entropy, logits, target, weight=torch.zeros(3, device=device))
    assert value.isnan()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("classes", [1, 4])
def test_binary_cross_entropy_is_torchs(classes: int, backend: str) -> None:
    logits, target = segmentation_case((2, classes, 6, 7), dtype=torch.float64)
    weights = class_weights(classes, torch.device("cpu")).double()
    valid = target != 255
    if classes == 1:
        one_hot = (target == 1)[:, None]
    else:
        one_hot = target[:, None] == torch.arange(classes).view(1, -1, 1, 1)
    expected = F.binary_cross_entropy_with_logits(
        logits, one_hot.double(), pos_weight=weights.view(-1, 1, 1), reduction="none"
    ).sum(1)[valid]
    with tritonloss.use_backend(backend):
        value = binary_cross_entropy(logits, target, pos_weight=weights)
    torch.testing.assert_close(value, expected.mean())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(loss: Loss, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 5, 6, 12), dtype=dtype, device=device)
    check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 8, 9, 16, 17, 31, 33])
def test_every_number_of_classes(
    loss: Loss, classes: int, layout: str, device: torch.device
) -> None:
    """The classes fill less than a block, whole blocks, or whole blocks and a part of one."""
    logits, target = segmentation_case((1, classes, 3, 5), device=device)
    if loss is not binary_cross_entropy and classes == 1:
        with pytest.raises(ValueError, match="logits must .* use binary_cross_entropy"):
            loss(logits, target)
    else:
        check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.shipped_sizes
def test_shipped_sizes(loss: Loss, layout: str, device: torch.device) -> None:
    for classes in (19, 70):
        logits, target = segmentation_case((1, classes, 5, 8), device=device)
        check(loss, as_layout(logits, layout), target)


@pytest.mark.shipped_sizes
def test_many_classes(device: torch.device) -> None:
    logits, target = segmentation_case((1, 1000, 1, 2), label_dtype=torch.int16, device=device)
    target[0, 0, 1] = 999
    check(cross_entropy, as_layout(logits, "contiguous"), target, ignore_index=255)
    for loss in (cross_entropy, binary_cross_entropy):
        check(loss, as_layout(logits, "channels_last"), target, ignore_index=255)


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (3, 2, 1, 67), (2, 3, 13, 11), (1, 3, 129, 1), (2, 2, 8, 16)], ids=str
)
def test_every_shape(loss: Loss, shape: tuple[int, ...], device: torch.device) -> None:
    """Sizes are one pixel, odd, prime, more than a program has, with H != W."""
    logits, target = segmentation_case(shape, device=device, ignore_index=None)
    for layout in ("contiguous", "channels_last"):
        check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_pixels(
    loss: Loss, reduction: str, shape: tuple[int, ...], device: torch.device
) -> None:
    logits = torch.zeros(shape, device=device)
    value, gradient = kernel_gradient(
        loss, logits, logits[:, 0].to(torch.uint8), reduction=reduction
    )
    assert value.shape == ((shape[0], *shape[2:]) if reduction == "none" else ())
    assert value.sum() == 0 and gradient.shape == logits.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_layout(loss: Loss, reduction: str, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 6, 6, 12), device=device)
    check(loss, as_layout(logits, layout), target, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_labels(loss: Loss, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 6, 12), device=device)
    check(loss, logits, as_layout(target, layout))


def test_crop_of_channels_last_logits(loss: Loss, device: torch.device) -> None:
    """Classes are neighbours in memory, but rows of pixels do not follow each other."""
    logits, target = segmentation_case((2, 6, 5, 9), device=device)
    around = torch.full((2, 8, 7, 12), float("nan"), device=device)
    around = around.contiguous(memory_format=torch.channels_last)
    view = around[:, 1:7, 1:6, 2:11]
    view.copy_(logits)
    assert view.stride(1) == 1
    check(loss, view, target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)])
def test_far_strides(loss: Loss, axis: int, size: int, tmp_path: Path) -> None:
    shape = [1, 2, 2, 2]
    shape[axis] = size
    logits, target = segmentation_case(shape, dtype=torch.float16, ignore_index=None)
    apart = far_apart(logits, axis, tmp_path)
    expected, found = (kernel_gradient(loss, x, target) for x in (logits, apart))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_far_strides_of_labels(axis: int, tmp_path: Path) -> None:
    shape = [2, 2, 2]
    shape[axis] = 3
    logits, target = segmentation_case((shape[0], 2, *shape[1:]), ignore_index=None)
    expected, _ = kernel_gradient(cross_entropy, logits, target)
    value, _ = kernel_gradient(cross_entropy, logits, far_apart(target, axis, tmp_path))
    assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(loss: Loss, layout: str, device: torch.device) -> None:
    """All but the last corner is ignored: loss and gradient are those of the corner alone."""
    classes, side, corner = 3, 32768, 50
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    part, labels = segmentation_case((1, classes, corner, corner), dtype=torch.float16)
    part, labels = part.to(device), labels.to(device)
    logits = torch.zeros(1, classes, side, side, dtype=torch.float16, device=device)
    logits = as_layout(logits, layout)
    target = torch.full((1, side, side), 255, dtype=torch.uint8, device=device)
    logits[..., -corner:, -corner:] = part
    target[..., -corner:, -corner:] = labels
    value, gradient = kernel_gradient(loss, logits, target)
    expected = kernel_gradient(loss, part, labels)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient[..., -corner:, -corner:], expected[1])
    assert gradient[..., : side - corner, :].count_nonzero() == 0
    assert gradient[..., : side - corner].count_nonzero() == 0


def test_every_label_dtype(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 5, 8), device=device)
    expected = kernel_gradient(loss, logits, target)
    for dtype in (torch.int16, torch.int32, torch.int64):
        value, gradient = kernel_gradient(loss, logits, target.to(dtype))
        assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [
        (0, torch.uint8),
        (-1, torch.int16),
        (-100, torch.int64),
        (300, torch.int16),
        (2**32 + 1, torch.int64),
    ],
)
def test_every_ignore_label(
    loss: Loss, ignore_index: int, label_dtype: torch.dtype, device: torch.device
) -> None:
    case = segmentation_case(
        (1, 3, 5, 8), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check(loss, *case, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [0, 1])
def test_binary_labels_may_be_ignored(ignore_index: int, device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 5, 8), ignore_index=None, device=device)
    check(binary_cross_entropy, logits, target, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [None, 255, 257, -255])
def test_ignore_labels_that_do_not_occur(
    loss: Loss, ignore_index: int | None, device: torch.device
) -> None:
    """257 is 1 in eight bits, and so is -255: no class may vanish for that."""
    logits, target = segmentation_case((1, 2, 5, 8), ignore_index=None, device=device)
    check(loss, logits, target, ignore_index=ignore_index)


@pytest.mark.parametrize("outside", [2, 254, -1, 2**32 + 1])
def test_labels_out_of_range(
    loss: Loss, outside: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 2, 5, 8), label_dtype=torch.int64, device=device)
    target[0, 2, 3:5] = outside
    if device.type == "cpu":
        for backend in ("triton", "reference"):
            with (
                tritonloss.use_backend(backend),
                pytest.raises(ValueError, match=rf"target .*got 2 labels .*{outside} \(2x\)"),
            ):
                loss(logits, target)
    # Where labels are not checked, those count as ignored.
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    found = kernel_gradient(loss, logits, target)
    expected = kernel_gradient(loss, logits, target.where(target != outside, 255))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_pixels_ignored(loss: Loss, reduction: str, backend: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 8), device=device)
    leaf = logits.requires_grad_()
    with tritonloss.use_backend(backend):
        value = loss(leaf, target.fill_(255), reduction=reduction)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_ignored_pixels_do_no_harm(
    loss: Loss, value: float, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 3, 6, 12), device=device)
    ignored = (target == 255)[:, None]
    for reduction in ("mean", "none"):
        quiet, loud = (
            kernel_gradient(
                loss, as_layout(logits.where(~ignored, x), layout), target, reduction=reduction
            )
            for x in (0.0, value)
        )
        assert torch.equal(quiet[0], loud[0]) and torch.equal(quiet[1], loud[1])
        assert (loud[1][ignored.expand_as(loud[1])] == 0).all()
        with tritonloss.use_backend("reference"):
            leaf = logits.where(~ignored, value).requires_grad_()
            reference = loss(leaf, target, reduction=reduction)
            (gradient,) = torch.autograd.grad(reference.sum(), leaf)
        assert reference.isfinite().all() and gradient.isfinite().all()
