"""Losses of overlap of interpolated logits: those of F.interpolate and the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tritonloss
from tests.losses.overlap.cases import ACTIVATIONS, Loss, check, kernel_gradient
from tests.losses.pixelwise.upsampled import Size, upsampled_case
from tests.oracle import LAYOUTS, as_layout
from tritonloss._core import prepared_launch
from tritonloss._engine import cell_grid, class_cell_launch, pixel_grid
from tritonloss.functional import dice_loss, soft_iou_loss, tversky_loss

pytestmark = pytest.mark.parity

BILINEAR: dict[str, Any] = {"upsample": "bilinear"}
SIZES: dict[str, tuple[Size, Size]] = {
    "1": ((3, 4), (3, 4)),
    "2": ((3, 5), (6, 10)),
    "3.3": ((3, 4), (10, 13)),
    "8": ((2, 2), (16, 16)),
    "one node": ((1, 1), (5, 7)),
    "one row": ((1, 6), (3, 7)),
    "several programs": ((3, 40), (4, 43)),
}


@pytest.fixture(autouse=True)
def small_cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp, two rows and columns of pixels and two rows of nodes at once, blocks of 4 classes.

    Then a cell has several chunks and bands, and a small map several strips.
    """
    size = {"PIXEL_COLUMNS": 2, "PIXEL_ROWS": 2, "NODE_ROWS": 2, "UNROLL": 4, "num_warps": 1}
    if not request.node.get_closest_marker("shipped_sizes"):
        monkeypatch.setattr(class_cell_launch, "cell_heuristic", lambda *_: size)


def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lanes hold all classes of a cell, as of many none do."""
    monkeypatch.setattr(prepared_launch, "_prepared", {})
    monkeypatch.setattr(class_cell_launch, "_MOST_HOLDERS", 0)
    monkeypatch.setattr(class_cell_launch, "_MOST_PARTS", 0)


def shared(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Going forward, lanes have so many classes of a cell."""
    monkeypatch.setattr(prepared_launch, "_prepared", {})
    monkeypatch.setattr(class_cell_launch, "_HELD", 0)
    monkeypatch.setattr(class_cell_launch, "_HELD_OF_SHARED", classes)


@pytest.fixture(params=["held", "shared", "in blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a lane holds all classes of a cell, or shares up to six with another, or neither."""
    if request.param == "in blocks":
        in_blocks(monkeypatch)
    elif request.param == "shared":
        shared(monkeypatch, 3)
    return str(request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_ratio(activation: str, align_corners: bool, size: str, device: torch.device) -> None:
    logits, target = upsampled_case(*SIZES[size], batch=2, device=device)
    check(dice_loss, logits, target, activation=activation, align_corners=align_corners, **BILINEAR)


@pytest.mark.parametrize("size", ["2", "3.3", "8", "several programs"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_ratio_in_blocks(
    activation: str, size: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch)
    logits, target = upsampled_case(*SIZES[size], batch=2, device=device)
    check(dice_loss, logits, target, activation=activation, **BILINEAR)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_of_classes_and_images(
    loss: Loss, activation: str, per_image: bool, way: str, device: torch.device
) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=6, batch=2, device=device)
    check(loss, logits, target, activation=activation, per_image=per_image, **BILINEAR)


@pytest.mark.parametrize("classes", [3, 4, 7, 9, 11, 15, 16, 17])
def test_lanes_that_share_a_cell(classes: int, device: torch.device) -> None:
    """One to four of them, each with up to four classes, some of which two of them have."""
    logits, target = upsampled_case((3, 12), (6, 31), classes=classes, device=device)
    check(dice_loss, logits, target, **BILINEAR)


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("classes", [9, 10, 11, 12])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lanes_that_share_a_cell_going_forward(
    activation: str,
    classes: int,
    lanes: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each finishes one of as many pixels, and the last one has some of another's classes."""
    shared(monkeypatch, -(-classes // lanes))
    size = {"PIXEL_COLUMNS": 4, "PIXEL_ROWS": 1, "NODE_ROWS": 2, "UNROLL": 4, "num_warps": 1}
    monkeypatch.setattr(class_cell_launch, "cell_heuristic", lambda *_: size)
    logits, target = upsampled_case((3, 12), (7, 41), classes=classes, device=device)
    check(dice_loss, logits, target, activation=activation, **BILINEAR)


def test_several_tiles_of_a_program(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_launch, "_prepared", {})
    monkeypatch.setattr(pixel_grid, "PROGRAMS", 3)
    logits, target = upsampled_case((3, 30), (13, 71), classes=4, batch=2, device=device)
    check(dice_loss, logits, target, **BILINEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), batch=2, dtype=dtype, device=device)
    check(tversky_loss, logits, target, **BILINEAR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), batch=2, device=device)
    check(soft_iou_loss, as_layout(logits, layout), as_layout(target, layout), **BILINEAR)


@pytest.mark.parametrize("size", ["3.3", "8"])
@pytest.mark.shipped_sizes
def test_shipped_sizes(size: str, device: torch.device) -> None:
    logits, target = upsampled_case(*SIZES[size], classes=7, device=device)
    check(dice_loss, logits, target, **BILINEAR)


def test_one_channel(device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=1, batch=2, device=device)
    check(dice_loss, logits, target, activation="sigmoid", **BILINEAR)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_logits(activation: str, way: str, device: torch.device) -> None:
    """The log-sum-exp of a pixel is rounded by up to 2^-24 of itself, but not where it is sure."""
    logits, target = upsampled_case((3, 4), (7, 9), classes=4, device=device)
    from tests.oracle import check_three_way

    for extreme in (1e4 * logits.sign(), 100 * logits, torch.full_like(logits, -1e4)):
        check_three_way(
            lambda z: dice_loss(z, target, activation=activation, **BILINEAR),
            extreme,
            gradient_tolerance=1e-5,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_pixels_ignored(activation: str, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), device=device)
    value, gradient = kernel_gradient(
        dice_loss, logits, target.fill_(255), activation=activation, classes="all", **BILINEAR
    )
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nodes_under_void_do_no_harm(
    activation: str, value: float, way: str, device: torch.device
) -> None:
    logits, target = upsampled_case((4, 5), (8, 15), classes=4, device=device)
    target[:, :, 6:] = 255  # from the centre of the third column of nodes on
    hidden = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device=device)
    hidden[..., 3:] = True
    calm, wild = (
        kernel_gradient(
            dice_loss, logits.where(~hidden, x), target, activation=activation, **BILINEAR
        )
        for x in (0.0, value)
    )
    assert torch.equal(calm[0], wild[0]) and torch.equal(calm[1], wild[1])
    assert (wild[1][hidden.expand_as(logits)] == 0).all()


def test_what_is_kept_is_small(device: torch.device) -> None:
    """4 bytes per pixel of the labels, and no map with classes."""
    logits, target = upsampled_case((2, 3), (8, 12), classes=6, device=device)
    leaf, saved = logits.requires_grad_(), list[torch.Tensor]()
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        dice_loss(leaf, target, **BILINEAR)
    own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
    assert sum(x.nbytes for x in own if x.shape == target.shape) / target.numel() == 4
    assert not [x for x in own if x.dim() > 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers(value: float, way: str, device: torch.device) -> None:
    """What makes the loss NaN does so in whichever lane; a class that is impossible does not."""
    for number in range(4):
        logits, target = upsampled_case((3, 4), (7, 9), classes=4, device=device)
        logits[:, number] = value
        with tritonloss.use_backend("triton"):
            found = dice_loss(logits, target.where(target != number, 255), **BILINEAR)
        assert found.isfinite() == (value < 0)


def test_it_is_the_loss_of_interpolated_logits(device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (6, 9), batch=2, device=device)
    at_labels = F.interpolate(logits, (6, 9), mode="bilinear")
    with tritonloss.use_backend("triton"):
        found, expected = dice_loss(logits, target, **BILINEAR), dice_loss(at_labels, target)
    torch.testing.assert_close(found, expected)
    assert cell_grid.cell_heuristic is not class_cell_launch.cell_heuristic
