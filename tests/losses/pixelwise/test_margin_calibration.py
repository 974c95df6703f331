"""Margin-calibrated loss: the kernels against the reference, the reference against its parts."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.engine.test_offsets import far_apart
from tests.losses.pixelwise.margins import check, kernel_gradient, offsets_for
from tests.oracle import LAYOUTS, as_layout, segmentation_case
from tritonloss import MarginOffsets
from tritonloss._core import checks, configurations
from tritonloss.functional import margin_calibrated_loss

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_variant_and_reduction(
    variant: str, reduction: str, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 7, 6, 12), device=device)
    check(as_layout(logits, layout), target, variant=variant, reduction=reduction)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(variant: str, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 5, 6, 12), dtype=dtype, device=device)
    check(as_layout(logits, layout), target, variant=variant)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3, 4, 8, 9, 16, 17, 33])
def test_every_number_of_classes(classes: int, layout: str, device: torch.device) -> None:
    """All classes are held in one block, or gone through twice in several."""
    logits, target = segmentation_case((1, classes, 3, 5), device=device)
    for variant in ("paper", "margin"):
        check(as_layout(logits, layout), target, variant=variant)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.shipped_sizes
def test_shipped_sizes(layout: str, device: torch.device) -> None:
    for classes in (19, 45):
        logits, target = segmentation_case((1, classes, 3, 8), device=device)
        check(as_layout(logits, layout), target)


@pytest.mark.shipped_sizes
def test_many_classes(device: torch.device) -> None:
    logits, target = segmentation_case((1, 1000, 1, 2), label_dtype=torch.int16, device=device)
    target[0, 0, 1] = 999
    check(as_layout(logits, "channels_last"), target, ignore_index=255)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.shipped_sizes
def test_sums_over_many_classes_keep_their_digits(layout: str, device: torch.device) -> None:
    """All scores but one are equal, so that every rounding of a running sum goes the same way."""
    logits = torch.full((1, 1000, 1, 2), -0.3, device=device)
    logits[:, 0] = 0.0
    target = torch.zeros(1, 1, 2, dtype=torch.int16, device=device)
    for variant in ("paper", "released"):
        offsets = offsets_for(1000, device)
        options = {"offsets": offsets, "variant": variant, "ignore_index": None}
        value, gradient = kernel_gradient(as_layout(logits, layout), target, **options)
        leaf = logits.double().requires_grad_()
        with tritonloss.use_backend("reference"):
            truth = margin_calibrated_loss(leaf, target, **options)
        torch.testing.assert_close(value.double(), truth.detach(), rtol=2e-6, atol=0)
        (expected,) = torch.autograd.grad(truth, leaf)
        torch.testing.assert_close(gradient.double(), expected, rtol=4e-6, atol=0)


def test_classes_whose_index_needs_sixteen_bits(device: torch.device) -> None:
    """Two indices share 32 bits: the larger must keep its sign bit to itself."""
    logits = torch.zeros(1, 40000, 1, 2, device=device)
    logits[0, 39999], logits[0, 39998] = 2.0, 1.0
    target = torch.full((1, 1, 2), 39999, device=device)
    wide = {"PIXELS": 2, "CLASS_LANES": 1024, "UNROLL": 8, "num_warps": 1}
    with ExitStack() as stack:
        for half in ("forward", "backward"):
            stack.enter_context(configurations.forced(f"margin_calibrated_{half}", wide))
        offsets = offsets_for(40000, device)
        check(as_layout(logits, "channels_last"), target, offsets=offsets, ignore_index=None)


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (3, 2, 1, 67), (2, 3, 13, 11), (1, 3, 129, 1), (2, 2, 8, 16)], ids=str
)
def test_every_shape(shape: tuple[int, ...], device: torch.device) -> None:
    logits, target = segmentation_case(shape, device=device, ignore_index=None)
    for layout in ("contiguous", "channels_last"):
        check(as_layout(logits, layout), target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_pixels(reduction: str, device: torch.device) -> None:
    logits = torch.zeros(0, 3, 4, 5, device=device)
    value, gradient = kernel_gradient(logits, logits[:, 0].to(torch.uint8), reduction=reduction)
    assert value.sum() == 0 and gradient.shape == logits.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, variant: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 6, 5, 8), device=device)
    check(as_layout(logits, layout), as_layout(target, layout), variant=variant)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)])
def test_far_strides(axis: int, size: int, tmp_path: Path) -> None:
    shape = [1, 2, 2, 2]
    shape[axis] = size
    logits, target = segmentation_case(shape, dtype=torch.float16, ignore_index=None)
    expected, found = (
        kernel_gradient(x, target) for x in (logits, far_apart(logits, axis, tmp_path))
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_every_label_dtype(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 5, 8), device=device)
    expected = kernel_gradient(logits, target)
    for dtype in (torch.int16, torch.int32, torch.int64):
        value, gradient = kernel_gradient(logits, target.to(dtype))
        assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("ignore_index", [0, -100, None, 257])
def test_every_ignore_label(ignore_index: int | None, device: torch.device) -> None:
    inside = ignore_index if ignore_index in (0, -100) else None
    logits, target = segmentation_case(
        (1, 3, 5, 8), ignore_index=inside, label_dtype=torch.int64, device=device
    )
    check(logits, target, ignore_index=ignore_index)


def test_labels_out_of_range(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = segmentation_case((1, 2, 5, 8), device=device)
    expected = kernel_gradient(logits, target)
    target[target == 255] = 77
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"target .*77 \("):
            margin_calibrated_loss(logits, target, offsets_for(2))
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    found = kernel_gradient(logits, target)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_pixels_ignored(
    variant: str, reduction: str, backend: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 3, 5, 8), device=device)
    leaf = logits.requires_grad_()
    with tritonloss.use_backend(backend):
        value = margin_calibrated_loss(
            leaf, target.fill_(255), offsets_for(3, device), variant=variant, reduction=reduction
        )
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_ignored_pixels_do_no_harm(
    variant: str, value: float, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 5, 6, 12), device=device)
    ignored = (target == 255)[:, None]
    quiet, loud = (
        kernel_gradient(as_layout(logits.where(~ignored, x), layout), target, variant=variant)
        for x in (0.0, value)
    )
    assert torch.equal(quiet[0], loud[0]) and torch.equal(quiet[1], loud[1])
    assert (loud[1][ignored.expand_as(loud[1])] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_a_number_is_not_hidden(
    variant: str, layout: str, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 9, 2, 4), ignore_index=None, device=device)
    for wrong in range(9):
        spoilt = logits.clone()
        spoilt[0, wrong, 1, 2] = float("nan")
        value, gradient = kernel_gradient(as_layout(spoilt, layout), target, variant=variant)
        assert value.isnan()
        assert gradient[0, :, 1, 2].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("left", [[0, 8], [8, 0], [3, 4], [0], [8]])
def test_masked_classes(left: list[int], variant: str, layout: str, device: torch.device) -> None:
    """-inf in all classes but one or two: where the next best is masked, it has no weight."""
    logits = torch.full((1, 9, 2, 3), -float("inf"), device=device)
    for place, index in enumerate(left):
        logits[:, index] = 0.5 - place
    target = torch.full((1, 2, 3), left[0], dtype=torch.uint8, device=device)
    check(as_layout(logits, layout), target, variant=variant)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e4, 1.0, 0.0])
def test_huge_and_tied_logits(
    scale: float, variant: str, layout: str, device: torch.device
) -> None:
    """Nine classes have -1, 0 or 1, so that nearly every pixel's best score is tied."""
    logits, target = segmentation_case((1, 9, 6, 12), device=device)
    check(as_layout(scale * (logits / 3).round().clamp(-1, 1), layout), target, variant=variant)


def test_of_equal_scores_the_first_is_the_best(device: torch.device) -> None:
    """Margins of tied bests are 0; what flows through the maximum goes to the first of them."""
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0], device=device).view(1, 4, 1, 1)
    zero = torch.zeros(4, device=device)
    target = torch.full((1, 1, 1), 3, device=device)
    value, gradient = kernel_gradient(logits, target, offsets=(zero, zero))
    # log2(1 + 2^x) at margins of -2, 0, 0 and, for the label, at 1.
    expected = math.log2(1.25) + 2 + math.log2(3)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    u = [1 / 5, 1 / 2, 1 / 2, -2 / 3]
    wanted = [u[0], u[1] - (u[0] + u[2] + u[3]), u[2] - u[1], u[3]]
    assert gradient.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_confident_pixels_keep_their_digits(device: torch.device) -> None:
    logits = torch.full((1, 5, 2, 4), -20.0, device=device)
    logits[:, 2] = 20.0
    zero = torch.zeros(5, device=device)
    target = torch.full((1, 2, 4), 2, device=device)
    value, _ = kernel_gradient(logits, target, offsets=(zero, zero))
    assert value.item() == pytest.approx(5 * math.log1p(2.0**-40) / math.log(2), rel=1e-6)


def test_gradient_is_that_of_the_value(variant: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 3, 4), dtype=torch.float64, device=device)
    offsets = MarginOffsets(*(x.double() for x in offsets_for(3, device)))
    with tritonloss.use_backend("triton"):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda z, reduction=reduction: margin_calibrated_loss(
                    z, target, offsets, variant=variant, reduction=reduction
                ),
                logits.requires_grad_(),
                fast_mode=True,
            )


def test_backward_twice_and_logits_reused(variant: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    x = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = margin_calibrated_loss(x, target, offsets_for(2, device), variant=variant)
    total = value + x.softmax(1).square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * total, x)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)


def test_no_gradient_wanted(variant: str, device: torch.device) -> None:
    """Without a backward pass the forward pass does less, and finds the same."""
    logits, target = segmentation_case((1, 3, 6, 12), device=device)
    expected, _ = kernel_gradient(logits, target, variant=variant)
    offsets = MarginOffsets(*(x.requires_grad_() for x in offsets_for(3, device)))
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                value = margin_calibrated_loss(logits, target, offsets, variant=variant)
                assert torch.equal(value, expected) and not value.requires_grad


def test_offsets_get_no_gradient(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 6, 12), device=device)
    for backend in ("triton", "reference"):
        offsets = MarginOffsets(*(x.requires_grad_() for x in offsets_for(3, device)))
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            margin_calibrated_loss(leaf, target, offsets).backward()
        assert leaf.grad is not None and offsets.own.grad is None and offsets.other.grad is None


def test_inputs_are_left_alone(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    before, labels = logits.clone(), target.clone()
    kernel_gradient(logits, target)
    assert torch.equal(logits, before) and torch.equal(target, labels)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.shipped_sizes
def test_same_bits_every_time(layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 66), device=device)
    logits = as_layout(logits, layout)
    first, second = (kernel_gradient(logits, target) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_eight_bytes_per_pixel_are_saved(device: torch.device) -> None:
    logits, target = segmentation_case((1, 6, 8, 12), device=device)
    leaf = logits.requires_grad_()
    saved: list[Tensor] = []
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        margin_calibrated_loss(leaf, target, offsets_for(6, device))
    maps = [x for x in saved if x.dim() == 3 and x.data_ptr() != target.data_ptr()]
    assert sum(x.nbytes for x in maps) == 8 * target.numel()


def test_compiled_once_for_heads_of_different_classes(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(margin_calibrated_loss, fullgraph=True, backend="aot_eager")
    for classes in (2, 3):
        logits, target = segmentation_case((1, classes, 3, 4), device=device)
        expected, gradient = kernel_gradient(logits, target)
        leaf = logits.detach().requires_grad_()
        with tritonloss.use_backend("triton"):
            value = compiled(leaf, target, offsets_for(classes, device))
        value.backward()
        assert torch.equal(value.detach(), expected) and torch.equal(leaf.grad, gradient)


def test_module() -> None:
    logits, target = segmentation_case((1, 3, 9, 12), ignore_index=1)
    options = {"variant": "released", "ignore_index": 1, "reduction": "sum"}
    criterion = tritonloss.MarginCalibratedLoss(offsets_for(3), **options)
    with tritonloss.use_backend("reference"):
        expected = margin_calibrated_loss(logits, target, offsets_for(3), **options)
        assert torch.equal(criterion(logits, target), expected)
        # The offsets can be loaded into another module and converted to another dtype.
        other = tritonloss.MarginCalibratedLoss((torch.zeros(3), torch.zeros(3)), **options)
        other.load_state_dict(criterion.state_dict())
        assert torch.equal(other(logits, target), expected)
    assert criterion.double().own.dtype == torch.float64
    assert all(f"{name}={value!r}" in repr(criterion) for name, value in options.items())
    assert not list(criterion.parameters()) and set(criterion.state_dict()) == {"own", "other"}
    with pytest.raises(TypeError):
        tritonloss.MarginCalibratedLoss(offsets_for(3), "paper")


def test_module_has_offsets_of_its_own() -> None:
    offsets = MarginOffsets(*(x.requires_grad_() for x in offsets_for(3)))
    criterion = tritonloss.MarginCalibratedLoss(offsets)
    criterion.own.zero_()
    assert offsets.own.sum() > 0 and not criterion.other.requires_grad


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("offsets", "options", "error", "message"),
    [
        (torch.ones(2, 3), {}, TypeError, "offsets must be a pair .*got Tensor"),
        ((torch.ones(3),), {}, ValueError, "offsets must be a pair .*got 1 elements"),
        ((torch.ones(3), [1.0] * 3), {}, TypeError, "offsets must be a pair .*got list"),
        ((torch.ones(3), torch.ones(4)), {}, ValueError, r"offsets.other must .*\(3,\); got .*4"),
        ((torch.ones(3).int(), torch.ones(3)), {}, TypeError, "offsets.own must .*got int32"),
        (offsets_for(3), {"variant": "paperback"}, ValueError, "variant must be .*'paperback'"),
        (offsets_for(3), {"reduction": None}, TypeError, "reduction must be .*None"),
        (offsets_for(3), {"ignore_index": 1.0}, TypeError, "ignore_index must be .*1.0"),
    ],
)
def test_errors(
    offsets: Any, options: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        margin_calibrated_loss(LOGITS, TARGET, offsets, **options)


@pytest.mark.parametrize(
    ("offsets", "options", "error", "message"),
    [
        (torch.ones(2, 3), {}, TypeError, "offsets must be a pair .*got Tensor"),
        ((torch.ones(3), torch.ones(4)), {}, ValueError, r"offsets must .*\(3,\) and \(4,\)"),
        ((torch.ones(1, 3), torch.ones(3)), {}, ValueError, r"offsets.own must .*\(C,\); got"),
        (offsets_for(3), {"variant": "paperback"}, ValueError, "variant must be .*'paperback'"),
        (offsets_for(3), {"reduction": None}, TypeError, "reduction must be .*None"),
        (offsets_for(3), {"ignore_index": 1.0}, TypeError, "ignore_index must be .*1.0"),
    ],
)
def test_errors_of_the_module(
    offsets: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tritonloss.MarginCalibratedLoss(offsets, **options)


def test_errors_of_shapes_and_classes() -> None:
    message = r"logits must have from 2 to 65536 classes, .*use binary_cross_entropy; got .*1, 4"
    with pytest.raises(ValueError, match=message):
        margin_calibrated_loss(LOGITS[:, :1], TARGET, offsets_for(1))
    with pytest.raises(ValueError, match=r"target must hold .*got .*\(2, 1, 4, 5\)"):
        margin_calibrated_loss(LOGITS, TARGET[:, None], offsets_for(3))
    with pytest.raises(TypeError):
        margin_calibrated_loss(LOGITS, TARGET, offsets_for(3), "paper")
