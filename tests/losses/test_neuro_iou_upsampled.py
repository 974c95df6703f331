"""NeuroIoU of interpolated logits: its sums are those of F.interpolate's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.losses.pixelwise.upsampled import Size, upsampled_case
from tests.oracle import LAYOUTS, ROUNDING, as_layout
from tritonloss import IoUSurrogate, collect_iou_pairs
from tritonloss._core import prepared_launch
from tritonloss.functional import neuro_iou_loss
from tritonloss.overlap import membership_launch
from tritonloss.overlap.neuro_iou import membership_sums

pytestmark = pytest.mark.parity

SIZES: dict[str, tuple[Size, Size]] = {
    "1": ((3, 4), (3, 4)),
    "1.5": ((4, 6), (6, 9)),
    "2": ((3, 5), (6, 10)),
    "3.3": ((3, 4), (10, 13)),
    "4": ((3, 3), (12, 12)),
    "8": ((2, 2), (16, 16)),
    "one node": ((1, 1), (5, 7)),
    "one row": ((1, 6), (3, 7)),
    "one column": ((5, 1), (11, 3)),
    "several programs": ((3, 40), (4, 43)),
}
SCORES = ("probability", "hinge")


@pytest.fixture(autouse=True)
def small_cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp, two columns of pixels and two rows of nodes at once, and programs of many tiles."""
    prepared_launch._prepared.clear()
    if request.node.get_closest_marker("shipped_sizes"):
        return
    sizes = {"PIXEL_COLUMNS": 2, "PIXEL_ROWS": 1, "NODE_ROWS": 2, "UNROLL": 2, "num_warps": 1}
    monkeypatch.setattr(membership_launch, "cell_heuristic", lambda *_: dict(sizes))
    monkeypatch.setattr(membership_launch, "rounds_of", lambda tiles: 3)
    monkeypatch.setattr(membership_launch, "_MOST_PIXELS", 2)
    monkeypatch.setattr(membership_launch, "_UNROLL", 2)


def check(logits: Tensor, target: Tensor, score: str, **options: Any) -> None:
    """Sums, counts and gradient against the reference in float64."""
    given: dict[str, Any] = {"score": score, "upsample": "bilinear", **options}
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        sums, counts = membership_sums(leaf, target, ignore_index=255, **given)
    upstream = torch.linspace(-1, 2, sums.numel(), device=sums.device).view(sums.shape).to(sums)
    (gradient,) = torch.autograd.grad(sums, leaf, upstream)
    truth = logits.detach().double().requires_grad_()
    expected = kernels_reference.membership_sums(truth, target, **given)
    (right,) = torch.autograd.grad(expected.sums, truth, upstream.double())
    assert torch.equal(counts, expected.counts)
    rounding = 1e-10 if logits.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(sums.double(), expected.sums, rtol=rounding, atol=rounding)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    rounding = max(rounding, ROUNDING[logits.dtype])
    assert (gradient.double() - right).abs().max() <= rounding * right.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("score", SCORES)
def test_every_ratio(
    score: str, classes: int, align_corners: bool, size: str, device: torch.device
) -> None:
    for dtype in (torch.float64, torch.float32):
        given = {"classes": classes, "dtype": dtype, "device": device, "batch": 2}
        logits, target = upsampled_case(*SIZES[size], **given)
        check(logits, target, score, align_corners=align_corners)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("score", SCORES)
def test_every_dtype_and_layout(
    score: str, labels: torch.dtype, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    logits, target = upsampled_case(
        (2, 3), (5, 7), batch=2, dtype=dtype, label_dtype=labels, device=device
    )
    check(as_layout(logits, layout), as_layout(target, layout), score)


@pytest.mark.parametrize("classes", [1, 2, 9, 300])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.shipped_sizes
def test_shipped_sizes(score: str, classes: int, device: torch.device) -> None:
    given = {"classes": classes, "label_dtype": torch.int64, "device": device}
    logits, target = upsampled_case((3, 4), (10, 13), ignore_index=None, **given)
    target[0, 0] = 255
    check(logits, target, score)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", SCORES)
def test_nodes_under_void_do_no_harm(score: str, value: float, device: torch.device) -> None:
    logits, target = upsampled_case((4, 5), (8, 15), device=device)
    target[:, :, 6:] = 255  # from the centre of the third column of nodes on
    hidden = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device=device)
    hidden[..., 3:] = True
    results = []
    for x in (0.0, value):
        leaf = logits.where(~hidden, x).requires_grad_()
        with tritonloss.use_backend("triton"):
            sums, counts = membership_sums(
                leaf, target, score=score, ignore_index=255, upsample="bilinear"
            )
        results.append((sums.detach(), counts, *torch.autograd.grad(sums.sum(), leaf)))
    assert all(torch.equal(calm, wild) for calm, wild in zip(*results, strict=True))
    assert (results[1][2][hidden.expand_as(logits)] == 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_large_logits(score: str, device: torch.device) -> None:
    """Probabilities are off by what the interpolation and the log-sum-exp round."""
    logits, target = upsampled_case((3, 4), (7, 9), device=device)
    leaf = (1e3 * logits).requires_grad_()
    with tritonloss.use_backend("triton"):
        sums, counts = membership_sums(
            leaf, target, score=score, ignore_index=255, upsample="bilinear"
        )
    (gradient,) = torch.autograd.grad(sums.sum(), leaf)
    truth = leaf.detach().double().requires_grad_()
    expected = kernels_reference.membership_sums(truth, target, score=score, upsample="bilinear")
    (right,) = torch.autograd.grad(expected.sums.sum(), truth)
    rounding = 16 * float(logits.abs().max()) * 1e3 * 2.0**-24
    assert torch.equal(counts, expected.counts)
    torch.testing.assert_close(sums.double(), expected.sums, rtol=rounding, atol=rounding)
    torch.testing.assert_close(gradient.double(), right, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("inputs", [3, 6])
def test_the_loss_is_that_of_interpolated_logits(inputs: int, device: torch.device) -> None:
    torch.manual_seed(1)
    surrogate = IoUSurrogate(inputs, layers=2, nodes=16).requires_grad_(False).to(device)
    logits, target = upsampled_case((3, 4), (7, 9), batch=2, device=device)
    at_labels = F.interpolate(logits, (7, 9), mode="bilinear", align_corners=True)
    options: dict[str, Any] = {"upsample": "bilinear", "align_corners": True}
    for backend in ("triton", "reference"):
        with tritonloss.use_backend(backend):
            found = neuro_iou_loss(logits, target, surrogate, **options)
            module = tritonloss.NeuroIoULoss(surrogate, **options)(logits, target)
            expected = neuro_iou_loss(at_labels, target, surrogate)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, module)
    pairs = collect_iou_pairs([(logits, target)], **options)
    others = collect_iou_pairs([(at_labels, target)])
    assert torch.equal(pairs.counts, others.counts) and set(pairs.pixels.tolist()) == {63}
    torch.testing.assert_close(pairs.sums, others.sums)


def test_what_is_kept_is_small(device: torch.device) -> None:
    """5 bytes per pixel of the labels, and no map with classes."""
    logits, target = upsampled_case((2, 3), (8, 12), classes=6, device=device)
    leaf, saved = logits.requires_grad_(), list[Tensor]()
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        membership_sums(leaf, target, score="probability", ignore_index=255, upsample="bilinear")
    own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
    assert sum(x.nbytes for x in own if x.shape == target.shape) == 5 * target.numel()
    assert not [x for x in own if x.dim() > 3]


def test_nothing_but_void_and_empty_batches(device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), batch=2, device=device)
    for given, labels in ((logits, torch.full_like(target, 255)), (logits[:0], target[:0])):
        leaf = given.clone().requires_grad_()
        with tritonloss.use_backend("triton"):
            sums, counts = membership_sums(
                leaf, labels, score="probability", ignore_index=255, upsample="bilinear"
            )
        (gradient,) = torch.autograd.grad(sums.sum(), leaf)
        assert not sums.any() and not counts.any() and not gradient.any()
