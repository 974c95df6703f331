"""Dice, generalised dice, Tversky and soft IoU: the kernels against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.losses.overlap.cases import (
    ACTIVATIONS,
    LOSSES,
    Loss,
    check,
    kernel_gradient,
    named,
    reference_gradient,
    without_classes,
)
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case, unaligned
from tritonloss._engine import class_launch, pixel_grid
from tritonloss.functional import dice_loss, generalized_dice_loss, soft_iou_loss, tversky_loss
from tritonloss.overlap.scores import DICE, loss_of

pytestmark = pytest.mark.parity

OPTIONS: list[tuple[Loss, dict[str, Any]]] = [
    (dice_loss, {"smooth": 0.0}),
    (dice_loss, {"log_loss": True, "per_image": True}),
    (dice_loss, {"classes": "all", "empty": "zero"}),
    (soft_iou_loss, {"log_loss": True, "smooth": 2.0}),
    (soft_iou_loss, {"per_image": False, "classes": (1, 3)}),
    (tversky_loss, {"alpha": 0.0, "beta": 1.0}),
    (tversky_loss, {"gamma": 0.5}),
    (tversky_loss, {"gamma": 2.5, "per_image": False, "classes": "present"}),
    (generalized_dice_loss, {"smooth": 0.0, "per_image": True}),
    (generalized_dice_loss, {"classes": "all"}),
    (generalized_dice_loss, {"classes": "all", "empty": "zero"}),
    (generalized_dice_loss, {"smooth": 10.0}),  # more than the denominator
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("loss", "options"), [*((loss, {}) for loss in LOSSES), *OPTIONS], ids=named
)
def test_every_option(
    loss: Loss, options: dict[str, Any], activation: str, device: torch.device
) -> None:
    """Several images and programs, and classes that one image or none has."""
    logits, target = segmentation_case((2, 6, 6, 12), device=device)
    target = without_classes(target, 5)
    target[1] = without_classes(target[1], 2)
    check(loss, logits, target, activation=activation, **options)


def test_classes_and_weights(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 5, 7), device=device)
    target = without_classes(target, 3)
    weight = torch.linspace(0.25, 2.0, 4, device=device)
    for options in (
        {"weight": weight},
        {"weight": weight.double()[::2].repeat_interleave(2), "include_background": False},
        {"classes": "all", "include_background": False},
        {"classes": (3,), "empty": "zero"},
        {"classes": [0, 2]},
    ):
        check(loss, logits, target, **options)


def test_a_choice_of_classes_is_compared_by_its_value(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 5, 7), device=device)
    target = without_classes(target, 3)
    for word, other in (("present", "all"), ("all", "present")):
        made_anew = "".join(list(word))
        assert made_anew is not word
        value, different = (
            kernel_gradient(loss, logits, target, classes=classes)[0]
            for classes in (made_anew, other)
        )
        assert value == kernel_gradient(loss, logits, target, classes=word)[0] != different


def test_weights_that_sum_to_0_have_no_mean(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 4, 5), device=device)
    weight = torch.zeros(3, device=device)
    for found in (kernel_gradient, reference_gradient):
        assert found(dice_loss, logits, target, weight=weight)[0].isnan()


# --- shapes, layouts, dtypes ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, activation: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 6, 7, 11), device=device)
    given = as_layout(logits, layout), as_layout(target, layout)
    check(tversky_loss, *given, activation=activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 5, 20, 33, 70, 300])
@pytest.mark.shipped_sizes
def test_configurations_that_ship(classes: int, layout: str, device: torch.device) -> None:
    """Classes in registers, of two pixels and of four, and in blocks."""
    logits, target = segmentation_case(
        (1, classes, 4, 36), device=device, label_dtype=torch.int64, ignore_index=-1
    )
    check(dice_loss, as_layout(logits, layout), target, ignore_index=-1)


@pytest.mark.parametrize("unroll", [2, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_classes_in_blocks_and_in_registers(
    layout: str, activation: str, unroll: int, device: torch.device
) -> None:
    size = {"PIXELS": 64, "CLASS_LANES": 2, "UNROLL": unroll, "num_warps": 1}
    logits, target = segmentation_case((2, 7, 3, 40), device=device)
    with (
        tritonloss._core.configurations.forced("class_sums_forward", size),
        tritonloss._core.configurations.forced("class_sums_backward", size),
    ):
        check(soft_iou_loss, as_layout(logits, layout), target, activation=activation)


def test_programs_of_several_tiles(
    loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of an image has tiles that are not there."""
    logits, target = segmentation_case((2, 4, 9, 40), device=device)  # 6 tiles of an image
    monkeypatch.setattr(pixel_grid, "PROGRAMS", 3)
    check(loss, logits, target)


@pytest.mark.parametrize("offset", [1, 2])
def test_unaligned_maps(offset: int, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 8), device=device)
    check(dice_loss, unaligned(logits, offset), unaligned(target, offset))


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 3, 1, 5), (1, 4, 13, 1)], ids=str)
def test_small_and_odd_shapes(loss: Loss, shape: tuple[int, ...], device: torch.device) -> None:
    logits, target = segmentation_case(shape, device=device, seed=1)
    # Half as sure: a single pixel's gradient has the digits that float32 keeps of 1 - p, here five.
    # In larger images the largest gradient is that of a pixel that is less sure.
    tolerance = 1e-5 if target.numel() == 1 else None
    check_three_way(partial(loss, target=target), logits / 2, gradient_tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(loss: Loss, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = segmentation_case((2, 5, 6, 7), dtype=dtype, device=device)
    for activation in ACTIVATIONS:
        check(loss, logits, target, activation=activation)


def test_one_channel(loss: Loss, device: torch.device) -> None:
    """Labels 0 and 1, of which 1 is the class; it is never the background."""
    logits, target = segmentation_case((2, 1, 5, 8), device=device)
    check(loss, logits, target, activation="sigmoid")
    found = [
        kernel_gradient(loss, logits, target, activation="sigmoid", include_background=background)
        for background in (True, False)
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    with pytest.raises(ValueError, match='at least 2 classes.* use activation="sigmoid"'):
        loss(logits, target)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d, "slices"])
def test_volumes(loss: Loss, layout: Any, device: torch.device) -> None:
    """They are images of as many rows as all slices have together."""
    logits, target = segmentation_case((2, 3, 6, 5), device=device)
    expected = kernel_gradient(loss, logits, target)
    volume = logits.unflatten(2, (2, 3))
    if layout == "slices":
        volume = volume.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        volume = volume.contiguous(memory_format=layout)
    found = kernel_gradient(loss, volume, target.unflatten(1, (2, 3)))
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].shape == volume.shape
    torch.testing.assert_close(found[1].flatten(2, 3), expected[1])
    check(loss, volume, target.unflatten(1, (2, 3)))


def test_sequences(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 1, 21), device=device)
    expected = kernel_gradient(loss, logits, target)
    found = kernel_gradient(loss, logits[:, :, 0], target[:, 0])
    assert found[0] == expected[0] and torch.equal(found[1], expected[1][:, :, 0])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            (2, 4, 6),
            {},
            r"target must .* \(2, 2, 3, 5\) to match .*; got uint8 of shape \(2, 4, 6\)",
        ),
        ((2, 2, 3, 5), {"upsample": "bilinear"}, "upsample must be None unless logits"),
    ],
)
def test_refused_volumes(
    loss: Loss, labels: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    logits, target = torch.zeros(2, 3, 2, 3, 5), torch.zeros(labels, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        loss(logits, target, **options)


def test_every_label_dtype(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 7), device=device)
    expected = kernel_gradient(loss, logits, target)
    for dtype in (torch.int16, torch.int32, torch.int64):
        found = kernel_gradient(loss, logits, target.to(dtype))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [(0, torch.uint8), (-100, torch.int64), (300, torch.int16), (None, torch.uint8)],
)
def test_every_ignore_label(
    ignore_index: int | None, label_dtype: torch.dtype, device: torch.device
) -> None:
    logits, target = segmentation_case(
        (2, 4, 5, 7), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check(dice_loss, logits, target, ignore_index=ignore_index)


# --- nothing to count -----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", ["present", "all", (1,)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_pixels_ignored(
    loss: Loss, activation: str, classes: Any, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 3, 4, 5), device=device)
    target.fill_(255)
    for found in (kernel_gradient, reference_gradient):
        value, gradient = found(
            loss, logits, target, activation=activation, classes=classes, smooth=0.0
        )
        assert value == 0 and value.shape == () and (gradient == 0).all()


def test_an_image_without_a_valid_pixel_is_not_counted(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 4, 5), device=device)
    target[0] = 255
    for classes in ("present", "all"):
        options = {"classes": classes, "per_image": True}
        alone = kernel_gradient(loss, logits[1:], target[1:], **options)
        both = kernel_gradient(loss, logits, target, **options)
        assert both[0] == alone[0] and (both[1][0] == 0).all()
        assert torch.equal(both[1][1:], alone[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_pixels(loss: Loss, shape: tuple[int, ...], device: torch.device) -> None:
    logits = torch.zeros(shape, device=device)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.uint8, device=device)
    value, gradient = kernel_gradient(loss, logits, target)
    assert value == 0 and value.shape == () and gradient.shape == shape


# --- values that are extreme, or none -------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits(
    loss: Loss, dtype: torch.dtype, activation: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 4, 5, 7), dtype=dtype, device=device)
    for extreme in (1e4 * logits.sign(), 1e4 + logits.round(), torch.full_like(logits, -1e4)):
        check(loss, extreme.to(dtype), target, activation=activation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_ignored_does_no_harm(
    loss: Loss, activation: str, value: float, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 3, 6, 7), device=device)
    hidden = (target == 255)[:, None].expand_as(logits)
    assert hidden.any()
    calm, wild = (
        kernel_gradient(loss, logits.where(~hidden, x), target, activation=activation)
        for x in (0.0, value)
    )
    assert torch.equal(calm[0], wild[0]) and torch.equal(calm[1], wild[1])
    assert (wild[1][hidden] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_image(loss: Loss, activation: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 6, 7), device=device, ignore_index=None)
    options = {"per_image": True, "activation": activation}
    _, calm = kernel_gradient(loss, logits, target, **options)
    logits[0, :, 2, 3] = float("nan")
    value, gradient = kernel_gradient(loss, logits, target, **options)
    assert value.isnan() and torch.equal(gradient[1], calm[1])


# --- sums -----------------------------------------------------------------------------------------


def test_counts_are_exact_where_float32_is_not(device: torch.device) -> None:
    """Of 2^24 + 2 pixels, as the parts of many programs: a float32 sum would lose the last ones."""
    logits = torch.zeros(1, 2, 1, 1, device=device)
    loss = loss_of(DICE._replace(smooth=0.0, classes="all"), logits, None)
    programs = 3
    parts = torch.zeros(3, 1, 3, programs, device=device)
    parts[2, 0, 0] = torch.tensor([2.0**23, 2.0**23, 1.0])
    parts[2, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    parts[2, 0, 2] = parts[2, 0, 0] + parts[2, 0, 1]
    sums = torch.empty(3, 1, 3, dtype=torch.float64, device=device)
    results = class_launch.allocated(loss.loss, False, logits, logits[:, 0].long(), False)
    finish = class_launch._prepare_head(loss, 1, 2, programs)
    finish(
        parts_ptr=parts, sums_ptr=sums, weight_ptr=logits, loss_ptr=results.loss,
        scale_ptr=results.scale, table_ptr=results.table,
        tickets_ptr=torch.zeros(1, dtype=torch.int32, device=device),
    )  # fmt: skip
    assert sums[2, 0].tolist() == [2.0**24 + 1, 1, 2.0**24 + 2]


def test_half_precision_sums_do_not_overflow(device: torch.device) -> None:
    """The sum of 70000 ones is infinite in float16."""
    logits = torch.zeros(1, 1, 1, 70000, dtype=torch.float16).fill_(20.0).to(device)
    target = torch.ones(1, 1, 70000, dtype=torch.uint8, device=device)
    value, _ = reference_gradient(dice_loss, logits, target, activation="sigmoid")
    with tritonloss._core.configurations.forced("class_sums_forward", {"PIXELS": 8192}):
        found, _ = kernel_gradient(dice_loss, logits, target, activation="sigmoid")
    assert abs(found) < 1e-6 and abs(value) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
def test_the_same_bits_whatever_the_order_of_programs(
    loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    logits, target = segmentation_case((2, 3, 4, 43), device=device)
    first = kernel_gradient(loss, logits, target)
    builder = interpreter.interpreter_builder
    set_index, seen = builder.set_grid_idx, []

    def set_reversed(x: int, y: int, z: int) -> None:
        seen.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_reversed)
    second = kernel_gradient(loss, logits, target)
    assert max(seen) > 0
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# --- autograd -------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_value(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 3, 5), dtype=torch.float64, device=device)
    with tritonloss.use_backend("triton"):
        for activation in ACTIVATIONS:
            assert torch.autograd.gradcheck(
                lambda z, activation=activation: loss(z, target, activation=activation),
                logits.requires_grad_(),
                fast_mode=True,
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_saved_is_small(loss: Loss, activation: str, device: torch.device) -> None:
    """4 bytes per pixel of a softmax, nothing of sigmoids; and no map without a backward pass."""
    logits, target = segmentation_case((2, 6, 8, 12), device=device)
    leaf, saved = logits.requires_grad_(), list[Tensor]()
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        loss(leaf, target, activation=activation)
    own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
    per_pixel = sum(x.nbytes for x in own if x.shape == target.shape) / target.numel()
    assert per_pixel == (4 if activation == "softmax" else 0)
    assert not [x for x in own if x.dim() > 3]
