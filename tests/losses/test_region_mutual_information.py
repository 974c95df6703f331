"""Region mutual information: the kernels against the reference and the released code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.losses.region_ways import DIRECT, RAW, SMALL, WAYS, kernel_gradient
from tests.oracle import as_layout, check_three_way, segmentation_case, unaligned
from tritonloss._core import checks
from tritonloss._core.configurations import forced
from tritonloss.functional import rmi_loss
from tritonloss.regions import plan


@pytest.fixture(autouse=True)
def kernels_of_large_images() -> Iterator[None]:
    """The small images of these tests take the kernels of large ones.

    tests/losses/test_region_digits.py is about those of small ones.
    """
    with plan.kernels_of_large_images():
        yield


def check(logits: Tensor, target: Tensor, tolerance: float = 2e-5, **options: Any) -> None:
    check_three_way(lambda z: rmi_loss(z, target, **options), logits, tolerance=tolerance)


def released_code(logits: Tensor, target: Tensor, bce_weight: float = 0.5) -> Tensor:
    """The authors' released computation, step by step, with its explicit inverse."""
    classes = logits.size(1)
    valid = target < classes
    one_hot = (
        F.one_hot(target.long() * valid, classes).permute(0, 3, 1, 2).to(logits) * valid[:, None]
    )
    entropy = F.binary_cross_entropy_with_logits(
        logits, one_hot, weight=valid[:, None].to(logits), reduction="sum"
    )
    p = logits.sigmoid() * valid[:, None] + 1e-6
    y, p = (F.avg_pool2d(x, 4, 4, padding=2) for x in (one_hot, p))
    new_height, new_width = p.size(2) - 2, p.size(3) - 2
    stacks = []
    for x in (y, p):
        parts = [x[:, :, i : i + new_height, j : j + new_width] for i in range(3) for j in range(3)]
        stack = torch.stack(parts, 2).flatten(3).double()
        stacks.append(stack - stack.mean(3, keepdim=True))
    y, p = stacks
    ridge = 5e-4 * torch.eye(9, dtype=torch.float64)
    cross = y @ p.mT
    m = y @ y.mT - cross @ (p @ p.mT + ridge).inverse() @ cross.mT + ridge
    rmi = 0.5 * 2 * torch.linalg.cholesky(m).diagonal(dim1=-2, dim2=-1).add(1e-8).log().sum(-1)
    return bce_weight * entropy / (valid.sum() + 1) + (1 - bce_weight) * (rmi / 9).mean(0).sum()


@pytest.mark.parametrize("ignore", ["zero", "drop"])
@pytest.mark.parametrize(
    ("pooling", "pool_size", "shape"),
    [
        ("avg", 4, (1, 2, 23, 27)),
        ("avg", 3, (2, 1, 17, 20)),
        ("max", 3, (1, 2, 17, 22)),
        ("nearest", 2, (1, 2, 13, 12)),
        ("nearest", 3, (1, 1, 17, 20)),
        (None, 4, (2, 2, 7, 9)),
        ("avg", 1, (1, 1, 7, 9)),
    ],
)
def test_three_way(
    pooling: str | None, pool_size: int, shape: tuple[int, ...], ignore: str, device: torch.device
) -> None:
    logits, target = segmentation_case(shape, device=device)
    if ignore == "drop":  # a tenth of the pixels would leave next to no region
        target = target.where(target != 255, 0)
        target[:, -3:, -2:] = 255
    check(
        logits, target, region_size=2, pooling=pooling, pool_size=pool_size, ignore=ignore,
        bce_weight=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("pooling", ["avg", None])
@pytest.mark.parametrize("region_size", [1, 3, 5])
def test_every_region(region_size: int, pooling: str | None, device: torch.device) -> None:
    size = 2 * region_size + 1
    scale = 2 if pooling else 1
    if region_size == 5 and pooling is not None:
        region_size = 4  # 5 is slow in the interpreter: it is tested without pooling
    logits, target = segmentation_case((1, 1, scale * size, scale * (size + 2)), device=device)
    check(
        logits, target, region_size=region_size, pooling=pooling, pool_size=2, epsilon=1e-3
    )  # few regions: a larger epsilon than usual keeps the problem well posed


@pytest.mark.parametrize("moments", ["mean", "sum"])
@pytest.mark.parametrize("bce_weight", [0.0, 0.3])
def test_moments_and_weights(moments: str, bce_weight: float, device: torch.device) -> None:
    logits, target = segmentation_case((2, 1, 8, 9), device=device)
    check(logits, target, moments=moments, bce_weight=bce_weight, **SMALL)


@pytest.mark.parametrize("pooling", ["avg", None])
def test_several_programs(pooling: str | None, device: torch.device) -> None:
    """There are several bands of rows, blocks of columns, and chunks of the direct moments."""
    logits, target = segmentation_case((1, 2, 8, 22), device=device)
    scale = 2 if pooling else 1
    logits, target = logits.repeat_interleave(scale, 2), target.repeat_interleave(scale, 1)
    small = {"LANES": 16, "ROWS": 4, "num_warps": 1}
    shared = {"LANES": 2, "ROWS": 4, "num_warps": 1}  # several columns to a lane
    with forced("rmi_moments", small), forced("rmi_gradient", small):
        with forced("rmi_moments_of_logits", shared), forced("rmi_gradient_of_logits", shared):
            with forced("rmi_pool", {"CELLS": 4, "num_warps": 1}):
                check(logits, target, region_size=2, pooling=pooling, pool_size=2)


@pytest.mark.parametrize("width", [9, 10, 11, 12, 13])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_columns_that_make_no_whole_chunk(precision: str, width: int, device: torch.device) -> None:
    """Without pooling lanes own several columns; what is left of a row are lines of the frame."""
    logits, target = segmentation_case((1, 2, 7, width), device=device)
    check(logits, target, region_size=3, pooling=None, precision=precision, tolerance=1e-4)


@pytest.mark.parametrize("region_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "labels"),
    [
        (torch.float32, torch.uint8),
        (torch.float16, torch.int16),
        (torch.float32, torch.int64),
        (torch.float64, torch.int32),
    ],
)
def test_rows_of_whole_chunks_give_what_others_give(
    dtype: torch.dtype, labels: torch.dtype, region_size: int, device: torch.device
) -> None:
    """Chunks are loaded at once; the same pixels in rows that begin anywhere, one by one."""
    logits, target = segmentation_case((2, 2, 9, 16), dtype=dtype, device=device)
    target = target.to(labels)
    options = {"region_size": region_size, "pooling": None}
    whole = kernel_gradient(logits, target, **options)
    others = kernel_gradient(unaligned(logits, 1), unaligned(target, 3), **options)
    for found, expected in zip(whole, others, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    check(logits, target, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [SMALL, RAW], ids=["pooled", "raw"])
def test_half_precision(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 8, 9), dtype=dtype, device=device)
    target[:] = torch.where(target == 255, 0, target)
    check(logits, target, **options)


@pytest.mark.parametrize("options", [SMALL, RAW], ids=["pooled", "raw"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layouts(options: dict[str, Any], layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 7, 8), ignore_index=None, device=device)
    spread = as_layout(logits, layout)
    assert layout != "sliced" or not spread.is_contiguous()
    check(spread, as_layout(target, layout), epsilon=1e-3, **options)


@WAYS
def test_float32_sums(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 9, 12), device=device)
    target[:] = torch.where(target == 255, 0, target)
    check(logits, target, precision="float32", tolerance=1e-4, **options)


def test_both_forms_of_the_reference() -> None:
    logits, target = segmentation_case((2, 3, 27, 33), dtype=torch.float64)
    for options in ({}, {"moments": "sum"}, {"ignore": "drop", "pooling": None}):
        plain, residual = (
            kernels_reference.rmi_loss(logits, target, residual=residual, **options)
            for residual in (False, True)
        )
        torch.testing.assert_close(plain, residual, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [4.0, 12.0, 50.0])
def test_confident_logits(scale: float, device: torch.device) -> None:
    """The loss is within 2e-4 per log-determinant and never NaN, from unsure to saturated logits.

    Most of the logits are right, and those of an area are wrong.
    """
    _, target = segmentation_case((1, 2, 12, 16), ignore_index=None, device=device)
    positive = target[:, None] == torch.arange(2, device=device).view(1, -1, 1, 1)
    logits = torch.where(positive, scale, -scale)
    logits[:, :, 3:6, 4:9] *= -1
    for moments, precision in (("mean", "float64"), ("sum", "float32")):
        options = {"moments": moments, "bce_weight": 0.0, "precision": precision, **SMALL}
        loss, gradient = kernel_gradient(logits, target, **options)
        leaf = logits.double().requires_grad_()
        truth = kernels_reference.rmi_loss(leaf, target, **options)
        (expected,) = torch.autograd.grad(truth, leaf)
        assert (loss - truth).abs() <= 2e-4 and gradient.isfinite().all()
        if scale <= 4:
            error = (gradient.double() - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("logit", "precision", "options"),
    [
        (0.3, "float32", {"pooling": None, "moments": "sum"}),
        (0.3, "float64", {"pooling": None, "moments": "sum"}),
        (-2.2, "float32", {"pool_size": 2, "moments": "sum"}),
        (5.0, "float32", {"pooling": None, "region_size": 4}),
    ],
)
def test_constant_maps(
    logit: float, precision: str, options: dict[str, Any], device: torch.device
) -> None:
    """Variances are 0 over bands of many rows: there is no NaN, and p depends on no label."""
    target = segmentation_case((1, 2, 72, 24), ignore_index=None, device=device)[1]
    logits = torch.full((1, 2, 72, 24), logit, device=device)
    options = {"precision": precision, "bce_weight": 0.0, **options}
    loss, gradient = kernel_gradient(logits, target, **options)
    truth = kernels_reference.rmi_loss(logits.double(), target, **options)
    assert (loss - truth).abs() <= 4e-4
    # Where nothing is pooled the truth is 0; what is left is rounding, far below a step's size.
    assert gradient.isfinite().all()
    if options.get("pooling", "avg") is None:
        assert gradient.abs().max() < 2e-6


def test_a_perfect_prediction(device: torch.device) -> None:
    """P - Y is formed without cancellation: log(2 eps) / 2 per class, and no NaN."""
    target = segmentation_case((1, 2, 16, 20), ignore_index=None, device=device)[1]
    positive = target[:, None] == torch.arange(2, device=device).view(1, -1, 1, 1)
    logits = torch.where(positive, 50.0, -50.0)
    loss, gradient = kernel_gradient(logits, target, bce_weight=0.0, region_size=1, pool_size=2)
    assert loss.item() == pytest.approx(2 * 0.5 * math.log(2e-6), abs=1e-3)
    assert gradient.isfinite().all()


def test_rare_and_absent_classes(device: torch.device) -> None:
    """An absent class is a constant, log(eps) / 2, with no gradient but the cross entropy's."""
    logits, _ = segmentation_case((1, 3, 28, 36), device=device)
    target = torch.zeros((1, 28, 36), dtype=torch.uint8, device=device)
    target[0, 7, 9] = 1  # 0.1 % of the pixels
    check(logits, target, region_size=2, pool_size=4)
    alone = logits[:, :, :8, :9]
    target = torch.full_like(target[:, :8, :9], 1)
    _, gradient = kernel_gradient(alone, target, bce_weight=0.0, **SMALL)
    assert gradient[:, 0].abs().max() < 1e-7
    loss, _ = kernel_gradient(alone[:, :1] * 0, target * 0, bce_weight=0.0, **RAW)
    assert loss.item() == pytest.approx(0.5 * math.log(1e-6), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 8, 8), {}),
        ((1, 1, 12, 12), {"pooling": "nearest"}),
        ((1, 1, 1, 1), {"pooling": None, "region_size": 1}),
        ((1, 2, 1, 5), {"pooling": "avg", "region_size": 1}),
        ((2, 1, 2, 3), {"pooling": "nearest", "pool_size": 2, "region_size": 1}),
        ((1, 2, 3, 3), {"pooling": None}),
        ((1, 1, 5, 3), {"pooling": None}),
        ((1, 1, 3, 11), {"pooling": None, "region_size": 2}),
        ((1, 2, 17, 31), {"pooling": "avg", "pool_size": 8, "region_size": 1}),
    ],
)
def test_shapes(shape: tuple[int, ...], options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case(shape, ignore_index=None, device=device)
    check(logits, target, epsilon=1e-3, **options)


def test_empty_batch(device: torch.device) -> None:
    logits = torch.empty((0, 2, 16, 16), device=device)
    target = torch.empty((0, 16, 16), dtype=torch.uint8, device=device)
    loss, gradient = kernel_gradient(logits, target)
    assert loss == 0 and gradient.shape == logits.shape


def test_every_pixel_is_in_the_cross_entropy(device: torch.device) -> None:
    """Pooling leaves out the last row of 11 = 4 + 4 + 3 with a padding of 2; BCE does not."""
    logits, target = segmentation_case((1, 2, 11, 15), device=device)
    loss, gradient = kernel_gradient(logits, target, bce_weight=1.0, region_size=1)
    valid = (target != 255)[:, None]
    y = (target[:, None] == torch.arange(2, device=device).view(1, -1, 1, 1)).float()
    expected = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    assert loss.item() == pytest.approx((expected * valid).sum().item() / valid.sum().item())
    torch.testing.assert_close(gradient, (logits.sigmoid() - y) * valid / valid.sum())


@WAYS
def test_every_label_dtype(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    expected = kernel_gradient(logits, target, **options)
    for dtype in (torch.int16, torch.int32, torch.int64):
        loss, gradient = kernel_gradient(logits, target.to(dtype), **options)
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [(0, torch.uint8), (-100, torch.int64), (None, torch.uint8)],
)
def test_every_ignore_label(
    ignore_index: int | None, label_dtype: torch.dtype, device: torch.device
) -> None:
    case = segmentation_case(
        (1, 3, 9, 10), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check(*case, ignore_index=ignore_index, **SMALL)


@pytest.mark.parametrize("outside", [2, -1, 2**32 + 1])
def test_labels_out_of_range(
    outside: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 2, 8, 9), label_dtype=torch.int64, device=device)
    target[0, 2, 3:5] = outside
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"target .*got 2 labels .*{outside} \(2x\)"):
            rmi_loss(logits, target, **SMALL)
    # Where labels are not checked, those count as ignored.
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    loss, gradient = kernel_gradient(logits, target, **SMALL)
    expected = kernel_gradient(logits, target.where(target != outside, 255), **SMALL)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@WAYS
def test_all_pixels_ignored(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((2, 1, 7, 8), device=device)
    loss, gradient = kernel_gradient(logits, target.fill_(255), **options)
    assert loss == 0 and (gradient == 0).all()


def test_an_image_without_a_whole_region(device: torch.device) -> None:
    """With ignore="drop" such an image adds nothing; the other one is as it was."""
    logits, target = segmentation_case((2, 2, 8, 9), ignore_index=None, device=device)
    target[1, ::2] = 255
    options = {**DIRECT, "bce_weight": 0.0}
    loss, gradient = kernel_gradient(logits, target, **options)
    alone, own = kernel_gradient(logits[:1], target[:1], **options)
    torch.testing.assert_close(2 * loss, alone)
    torch.testing.assert_close(2 * gradient[:1], own)
    assert (gradient[1] == 0).all()


@WAYS
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_ignored_pixels_do_no_harm(
    options: dict[str, Any], value: float, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    expected = kernel_gradient(logits.where((target != 255)[:, None], 0), target, **options)
    loss, gradient = kernel_gradient(
        logits.where((target != 255)[:, None], value), target, **options
    )
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@WAYS
def test_what_is_not_finite_is_not_hidden(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), ignore_index=None, device=device)
    logits[0, :, 2, 5] = float("nan")
    loss, _ = kernel_gradient(logits, target, **options)
    assert loss.isnan()


@WAYS
@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_huge_and_equal_logits(options: dict[str, Any], scale: float, device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    loss, gradient = kernel_gradient(scale * logits.sign(), target, **options)
    truth = kernels_reference.rmi_loss(scale * logits.sign().double(), target, **options)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    assert gradient.isfinite().all()


def test_info(device: torch.device) -> None:
    """int32 [N, C]: 0 for what is finite; where a NaN came in, the minor that it spoiled."""
    logits, target = segmentation_case((2, 2, 8, 9), ignore_index=None, device=device)
    logits[1, 0, 2, 5] = float("nan")
    for backend in ("triton", "reference"):
        with tritonloss.use_backend(backend):
            loss, info = rmi_loss(logits[:1], target[:1], return_info=True, **SMALL)
            assert info.shape == (1, 2) and info.dtype == torch.int32 and (info == 0).all()
            assert loss.isfinite()
            if backend == "triton":
                _, info = rmi_loss(logits, target, return_info=True, **SMALL)
                assert info[1, 0] == 1 and info.count_nonzero() == 1


def test_the_released_code(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 25, 33), dtype=torch.float64)
    truth = released_code(logits.requires_grad_(), target)
    (expected,) = torch.autograd.grad(truth, logits)
    module = tritonloss.RMILoss.released()
    leaf = logits.detach().float().to(device).requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = module(leaf, target.to(device))
    loss.backward()
    # The released code adds 1e-6 to p inside the image only, which the padded border sees.
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    error = (leaf.grad.cpu().double() - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_sums_differ_from_means_by_the_count(device: torch.device) -> None:
    """Eq. 12 without 1 / n: with epsilon scaled alike, log n / 2 more per class and image."""
    logits, target = segmentation_case((1, 2, 11, 14), device=device)
    count = 5 * 7
    mean, _ = kernel_gradient(logits, target, bce_weight=0.0, epsilon=1e-3, **SMALL)
    total, _ = kernel_gradient(
        logits, target, bce_weight=0.0, moments="sum", epsilon=1e-3 * count, **SMALL
    )
    assert (total - mean).item() == pytest.approx(2 * 0.5 * math.log(count), rel=1e-4)
