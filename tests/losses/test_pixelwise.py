"""Cross entropy, binary cross entropy and focal loss: the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels_reference
import tritonloss
from tests.engine.test_offsets import far_apart
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case
from tritonloss._core import checks, configurations
from tritonloss._engine import pixel_launch
from tritonloss._engine.pixels import (
    Tile,
    class_of,
    fold_classes,
    for_classes,
    nothing_yet,
    pixel_program,
    sum_of_lanes,
    write_gradients,
)
from tritonloss.functional import binary_cross_entropy, cross_entropy, focal_loss
from tritonloss.pixelwise.kernels import Options

pytestmark = pytest.mark.parity

Loss = Callable[..., Tensor]
LOSSES = (cross_entropy, binary_cross_entropy, focal_loss)
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def small_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs of 64 pixels and blocks of 4 classes, unless a test wants what ships."""
    size = {"PIXELS": 64, "CLASS_LANES": 4, "UNROLL": 4, "num_warps": 1}
    if request.node.get_closest_marker("shipped_sizes"):
        size = {}
    with ExitStack() as stack:
        for name in ("cross_entropy", "binary_cross_entropy", "focal"):
            for half in ("forward", "backward"):
                stack.enter_context(configurations.forced(f"{name}_{half}", size))
        yield


def named(parameter: Any) -> str:
    """A name for a parameter: of functions without the address, which differs between workers."""
    return getattr(parameter, "__name__", None) or str(parameter)


@pytest.fixture(params=LOSSES, ids=named)
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


def class_weights(classes: int, device: torch.device) -> Tensor:
    return torch.linspace(0.25, 2.0, classes, device=device)


def check(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> None:
    check_three_way(partial(loss, target=target, **options), logits)


def kernel_gradient(
    loss: Loss, logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value, and gradient of its sum."""
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


OPTIONS = [
    (cross_entropy, {"weight": True}),
    (cross_entropy, {"label_smoothing": 0.1}),
    (cross_entropy, {"label_smoothing": 1.0, "weight": True}),
    (binary_cross_entropy, {"pos_weight": True}),
    (focal_loss, {"alpha": True}),
    (focal_loss, {"alpha": 0.25, "gamma": 0.0}),
    (focal_loss, {"gamma": 0.5}),
    (focal_loss, {"gamma": 1.0, "detach_weight": True}),
    (focal_loss, {"gamma": 3.5}),
    (focal_loss, {"detach_weight": True}),
]


def filled(options: dict[str, Any], classes: int, device: torch.device) -> dict[str, Any]:
    """Options with class weights in the place of True."""
    weights = class_weights(classes, device)
    return {
        name: weights if value is True and name != "detach_weight" else value
        for name, value in options.items()
    }


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(loss: Loss, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 5, 6, 12), dtype=dtype, device=device)
    check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 8, 9, 16, 17, 31, 33])
def test_every_number_of_classes(
    loss: Loss, classes: int, layout: str, device: torch.device
) -> None:
    """Less than a block, whole blocks, and what is left over of them."""
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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.7, 3.3])
@pytest.mark.shipped_sizes
def test_sums_over_many_classes_keep_their_digits(
    value: float, layout: str, device: torch.device
) -> None:
    """Equal logits but for one: every rounding of a running sum goes the same way."""
    logits = as_layout(torch.full((1, 1000, 1, 2), value, device=device), layout)
    logits[:, 0] += 1
    target = torch.zeros(1, 1, 2, dtype=torch.int16, device=device)
    truth = logits.double()
    for loss in LOSSES:
        found, _ = kernel_gradient(loss, logits, target, ignore_index=None)
        with tritonloss.use_backend("reference"):
            expected = loss(truth, target, ignore_index=None)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (3, 2, 1, 67), (2, 3, 13, 11), (1, 3, 129, 1), (2, 2, 8, 16)], ids=str
)
def test_every_shape(loss: Loss, shape: tuple[int, ...], device: torch.device) -> None:
    """One pixel, odd, prime, more than a program has, H != W."""
    logits, target = segmentation_case(shape, device=device, ignore_index=None)
    for layout in ("contiguous", "channels_last"):
        check(loss, as_layout(logits, layout), target)


@pytest.mark.parametrize("programs", [3, 4, 9])
def test_partial_sums_in_two_stages(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 2, programs, 64), device=device)
    expected = kernel_gradient(cross_entropy, logits, target)
    monkeypatch.setattr(pixel_launch, "_GROUP", 4)
    found = kernel_gradient(cross_entropy, logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


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
    """Classes lie side by side, rows of pixels do not follow each other."""
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


@triton.jit(do_not_specialize=["pixels"])
def _program_kernel(first_ptr, inside_ptr, pixels, tiles, TILE: tl.constexpr):
    _, first, local, inside = pixel_program(pixels, tiles, TILE)
    tl.store(first_ptr + tl.program_id(0), first)
    tl.store(inside_ptr + tl.program_id(0) * TILE.pixels + local, inside.to(tl.int32))


def test_images_of_2_to_the_31_pixels(device: torch.device) -> None:
    """Their number fits 32 bits in grains alone."""
    tile = Tile(pixels=64, lanes=1, unroll=1, grain=4, flat=True)
    first = torch.empty(2, dtype=torch.int64, device=device)
    inside = torch.empty(2, 64, dtype=torch.int32, device=device)
    _program_kernel[(2,)](first, inside, 2**29, 2**25, tile)
    assert first.tolist() == [0, 64] and inside.all()


@triton.jit
def _add_squares(
    state, values, start, pixel, given, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    COUNT: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    own = for_classes(pixel[1], TILE)
    total = state[0]
    for j in tl.static_range(COUNT):
        z = tl.where(class_of(start, j, TILE) == own, 0.0, tl.maximum(values[j], 0.0))
        total += z * z
    return (total,)


@triton.jit
def squares_forward(
    pixel, view, given, full, dtype: tl.constexpr, OPTIONS: tl.constexpr,
    CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    state = (nothing_yet(0.0, dtype, TILE),)
    state = fold_classes(
        state, view, pixel, given, full, dtype, _add_squares, OPTIONS, CLASSES, TILE
    )
    value = sum_of_lanes(state[0], TILE) * given[2][0]
    return value, tl.zeros_like(value) + 1.0, ()


@triton.jit
def _squares_slope(
    factors, value, start, SLOT: tl.constexpr, LEFT: tl.constexpr, given, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    scale, own = factors
    is_own = class_of(start, SLOT, TILE) == own
    return tl.where(is_own, 0.0, 2 * scale * tl.maximum(value, 0.0))


@triton.jit
def squares_backward(
    scale, saved, pixel, view, grad_view, given, full, dtype: tl.constexpr,
    OPTIONS: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    factors = (for_classes(scale * given[2][0], TILE), for_classes(pixel[1], TILE))
    write_gradients(
        factors,
        view,
        grad_view,
        pixel,
        given,
        full,
        dtype,
        _squares_slope,
        OPTIONS,
        CLASSES,
        TILE,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_of_ones_own(reduction: str, layout: str, device: torch.device) -> None:
    """The example in _pixels.py: all that a new loss takes."""
    squares = pixel_launch.Loss(
        "squares", squares_forward, squares_backward, saved=lambda dtype: ()
    )
    logits, target = segmentation_case((2, 7, 6, 12), device=device)
    leaf = as_layout(logits, layout).requires_grad_()
    valid = target != 255
    index = torch.arange(7, device=device).view(1, -1, 1, 1)
    others = torch.where(target[:, None] == index, 0, leaf.clamp(min=0))
    expected = torch.where(valid, 0.5 * others.square().sum(1), 0)
    if reduction != "none":
        expected = expected.sum() / (valid.sum() if reduction == "mean" else 1)
    upstream = torch.ones_like(expected)

    none, numbers = (None, None), (0.5,)
    arguments = (leaf.detach(), target, none, numbers, ())
    results = pixel_launch.launch_forward(squares, *arguments, reduction, 255, True)
    gradient = pixel_launch.launch_backward(squares, upstream, results, *arguments, 255)
    torch.testing.assert_close(results.loss, expected.detach())
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, leaf, upstream))


@pytest.mark.gpu
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
    # Where nobody looked they count as ignored.
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
    """Losses of 1e-6: nothing is rounded away beside a 1, nothing added and taken away again."""
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
    """1 - p = 0: q^(gamma - 1) is infinite and must not show."""
    logits = torch.zeros(1, 3, 2, 4, device=device)
    logits[:, 1] = 200.0
    for label in (1, 0):
        target = torch.full((1, 2, 4), label, device=device)
        check(focal_loss, logits, target, gamma=gamma)
        value, gradient = kernel_gradient(focal_loss, logits, target, gamma=gamma)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("gap", [0.5, 3.4, 3.5, 4.0, 5.0])
def test_focal_loss_in_float64(gap: float, device: torch.device) -> None:
    """1 - p by its series, where p is nearly 1, and by a difference elsewhere."""
    logits = torch.tensor([gap, 0.0], dtype=torch.float64, device=device).view(1, 2, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(focal_loss, logits, target)
    entropy = F.softplus(torch.tensor(-gap, dtype=torch.float64))
    q, p = -torch.expm1(-entropy), torch.exp(-entropy)
    slope = q * (q * q + 2 * p * q * entropy)
    tight = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(value.cpu(), q * q * entropy, **tight)
    torch.testing.assert_close(gradient.flatten().cpu(), torch.stack((-slope, slope)), **tight)


def test_new_values_of_options_compile_nothing() -> None:
    first = Options(weighted=True, smoothing=0.1, gamma=0.5, detached=False)
    assert first._replace(smoothing=0.2, gamma=3.5).compiled == first.compiled
    for change in ({"smoothing": 0.0}, {"gamma": 1.0}, {"gamma": 2.0}, {"weighted": False}):
        assert first._replace(**change).compiled != first.compiled


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
    name = {cross_entropy: "weight", binary_cross_entropy: "pos_weight", focal_loss: "alpha"}[loss]
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
    """At most 8 bytes per pixel; nothing for binary cross entropy."""
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
        assert per_pixel == (0 if loss is binary_cross_entropy else 4 + dtype.itemsize)
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


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.uint8)


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


@pytest.mark.parametrize("value", [2.0, 0.75])
def test_references_know_the_closed_forms(value: float) -> None:
    """Two classes apart by v: -log p is softplus(-v) for the larger."""
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
