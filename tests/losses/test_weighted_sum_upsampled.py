"""Weighted sums of losses over interpolated logits: values, gradients, how many reads, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.losses.pixelwise.upsampled import Size, upsampled_case
from tests.losses.test_weighted_sum import (
    JOINT,
    SUMS,
    Members,
    check,
    launched,
    ramp,
    sigmoids,
    value_and_gradient,
)
from tests.oracle import LAYOUTS, as_layout, segmentation_case
from tritonloss import (
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    DiceLoss,
    MarginCalibratedLoss,
    TverskyLoss,
    WeightedSum,
)
from tritonloss._core import prepared_launch
from tritonloss._engine import class_cell_launch

__all__ = ["launched"]  # a fixture
pytestmark = pytest.mark.parity

SIZES: dict[str, tuple[Size, Size]] = {
    "2": ((3, 5), (6, 10)),
    "3.3": ((3, 4), (10, 13)),
    "5, 7": ((2, 3), (10, 21)),
    "8": ((2, 2), (16, 16)),
    "one node": ((1, 1), (5, 7)),
    "several programs": ((3, 40), (4, 43)),
}
HELD, FORWARD, PROJECT, BACKWARD = (
    "_class_cells_held_kernel",
    "_class_cells_forward_kernel",
    "_class_cells_project_kernel",
    "_upsampled_backward_kernel",
)


@pytest.fixture(autouse=True)
def small_cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp, two rows and columns of pixels and two rows of nodes at once, blocks of 4 classes.

    Then a cell has several chunks and bands, and a small map several strips.
    """
    size = {"PIXEL_COLUMNS": 2, "PIXEL_ROWS": 2, "NODE_ROWS": 2, "UNROLL": 4, "num_warps": 1}
    if not request.node.get_closest_marker("shipped_sizes"):
        monkeypatch.setattr(class_cell_launch, "cell_heuristic", lambda *_: size)


def between(members: Members, align_corners: bool = False) -> Members:
    """The same losses of interpolated logits."""
    for _, loss in members:
        loss.upsample, loss.align_corners = "bilinear", align_corners
    return members


@pytest.fixture(params=["held", "shared", "in blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a lane holds all classes of a cell, or shares them with another, or neither."""
    monkeypatch.setattr(prepared_launch, "_prepared", {})
    if request.param == "in blocks":
        monkeypatch.setattr(class_cell_launch, "_MOST_HOLDERS", 0)
        monkeypatch.setattr(class_cell_launch, "_MOST_PARTS", 0)
    elif request.param == "shared":
        monkeypatch.setattr(class_cell_launch, "_HELD", 0)
        monkeypatch.setattr(class_cell_launch, "_HELD_OF_SHARED", 3)
    return str(request.param)


@pytest.mark.parametrize("name", [*JOINT, "Lovasz", "two reads"])
def test_every_mix(name: str, way: str, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=5, batch=2, device=device)
    check(between(SUMS[name](5, device)), logits, target)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", ["cross entropy, dice", "sigmoids"])
def test_every_ratio(name: str, align_corners: bool, size: str, device: torch.device) -> None:
    logits, target = upsampled_case(*SIZES[size], batch=2, device=device)
    check(between(SUMS[name](3, device), align_corners), logits, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cross entropy, dice", "sigmoids", "Lovasz"])
def test_every_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=4, dtype=dtype, device=device)
    check(between(SUMS[name](4, device)), logits, target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=4, batch=2, device=device)
    members = between(SUMS["two passes"](4, device))
    check(members, as_layout(logits, layout), as_layout(target, layout))


@pytest.mark.parametrize("size", ["2", "8"])
@pytest.mark.parametrize("classes", [2, 19, 33, 41])
@pytest.mark.shipped_sizes
def test_configurations_that_ship(classes: int, size: str, device: torch.device) -> None:
    """Blocks of classes, of losses of one pass and of two."""
    logits, target = upsampled_case(*SIZES[size], classes=classes, device=device)
    members: Members = [(1.0, CrossEntropyLoss()), (0.5, DiceLoss())]
    if classes == 2:
        members.append((0.5, MarginCalibratedLoss((ramp(classes, device),) * 2)))
    check(between(members), logits, target)


def test_one_channel(device: torch.device) -> None:
    logits, target = upsampled_case((2, 3), (5, 7), classes=1, batch=2, device=device)
    check(between([(1.0, BinaryCrossEntropyLoss()), (1.0, sigmoids(DiceLoss))]), logits, target)


@pytest.mark.parametrize("name", ["cross entropy, dice", "sigmoids"])
def test_sixty_four_lanes(
    name: str, way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a warp of AMD's data centre GPUs has."""
    monkeypatch.setattr(class_cell_launch, "_WARPS", 2)
    logits, target = upsampled_case((3, 40), (4, 43), classes=6, device=device)
    check(between(SUMS[name](6, device)), logits, target)


def test_nothing_to_interpolate(device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 5, 6), device=device)
    check(between(SUMS["cross entropy, dice"](4, device)), logits, target)


@pytest.mark.parametrize("name", JOINT)
def test_nothing_valid_and_no_image(name: str, device: torch.device) -> None:
    for images in (0, 1):
        logits, target = upsampled_case((2, 3), (4, 5), batch=images, device=device)
        leaf = logits.requires_grad_()
        criterion = WeightedSum(between(SUMS[name](3, device)))
        value, gradient = value_and_gradient(criterion, leaf, torch.full_like(target, 255))
        assert value == 0 and (gradient == 0).all()
        assert criterion.terms is not None and (criterion.terms == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["cross entropy, dice", "sigmoids"])
def test_nodes_under_void_do_no_harm(name: str, value: float, device: torch.device) -> None:
    logits, target = upsampled_case((4, 5), (8, 15), device=device)
    target[:, :, 6:] = 255  # from the centre of the third column of nodes on
    hidden = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device=device)
    hidden[..., 3:] = True
    criterion = WeightedSum(between(SUMS[name](3, device)))
    calm, wild = (
        value_and_gradient(criterion, logits.where(~hidden, x), target) for x in (0.0, value)
    )
    assert torch.equal(calm[0], wild[0]) and torch.equal(calm[1], wild[1])
    assert (wild[1][hidden.expand_as(logits)] == 0).all()


def test_labels_of_no_class_change_nothing(device: torch.device) -> None:
    """Not even where the label that is ignored is a class."""
    logits, target = upsampled_case((2, 3), (5, 7), classes=4, device=device)
    members: Members = [
        (1.0, CrossEntropyLoss(ignore_index=1)),
        (0.5, DiceLoss(ignore_index=1)),
        (0.5, TverskyLoss(ignore_index=1)),
    ]
    check(between(members), logits, target.where(target != 255, 1))


@pytest.mark.parametrize("name", ["sigmoids", "smoothed and weighted"])
def test_gradcheck(name: str, device: torch.device) -> None:
    logits, target = upsampled_case((1, 3), (2, 5), dtype=torch.float64, device=device)
    criterion = WeightedSum(between(SUMS[name](3, device)))
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits.requires_grad_())


# --- reads, gradients, memory ---------------------------------------------------------------------


@pytest.mark.parametrize("name", JOINT)
def test_losses_share_a_read(
    name: str, way: str, device: torch.device, launched: list[str]
) -> None:
    logits, target = upsampled_case((2, 3), (4, 5), classes=4, device=device)
    value_and_gradient(WeightedSum(between(SUMS[name](4, device))), logits, target)
    if name == "pixelwise":
        expected = ["_upsampled_forward_kernel", BACKWARD]
    elif "sigmoids" in name:
        expected = [FORWARD, BACKWARD]
    elif way != "in blocks" and name not in ("smoothed and weighted", "two passes"):
        expected = [HELD, BACKWARD]
    else:
        expected = [FORWARD, PROJECT, BACKWARD]
    assert launched == expected


def test_gradients_are_added_in_place(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = upsampled_case((2, 3), (4, 5), classes=4, device=device)
    criterion = WeightedSum(between(SUMS["Lovasz"](4, device)))
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        value = criterion(leaf, target)
    made = []
    empty_like = torch.empty_like

    def noted(tensor: Tensor, **options: Any) -> Tensor:
        made.append(tensor.shape)
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    torch.autograd.grad(value, leaf)
    assert made.count(logits.shape) == 1


def test_what_is_kept_is_small(device: torch.device) -> None:
    """4 bytes per pixel of the labels for both losses, and no map with classes."""
    logits, target = upsampled_case((2, 3), (8, 12), classes=6, device=device)
    leaf, saved = logits.requires_grad_(), list[Tensor]()
    criterion = WeightedSum(between([(1.0, CrossEntropyLoss()), (1.0, DiceLoss())]))
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        criterion(leaf, target)
    own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
    assert sum(x.nbytes for x in own if x.shape == target.shape) / target.numel() == 4
    assert not [x for x in own if x.dim() > 3]


def test_the_same_twice(device: torch.device) -> None:
    logits, target = upsampled_case((3, 4), (10, 13), classes=5, batch=2, device=device)
    criterion = WeightedSum(between(SUMS["two passes"](5, device)))
    first, again = (value_and_gradient(criterion, logits, target) for _ in range(2))
    assert all(map(torch.equal, first, again))
