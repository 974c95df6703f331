"""Lovász losses of interpolated logits: those of F.interpolate and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.losses.pixelwise.upsampled import Size, upsampled_case
from tests.oracle import LAYOUTS, as_layout, check_three_way, value_and_gradients
from tritonloss._core import prepared_launch
from tritonloss.functional import lovasz_hinge_loss, lovasz_softmax_loss
from tritonloss.overlap import lovasz_cell_launch, lovasz_terms

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
SOFTMAX_WAYS: Mapping[str, Mapping[str, Any]] = {
    "bins": {"bins": 64},
    "all, per image": {"bins": 64, "classes": "all", "per_image": True},
    "some classes": {"bins": 64, "classes": (2, 0)},
    "exact": {"exact": True},
    "exact, per image": {"exact": True, "per_image": True},
}
HINGE_WAYS: Mapping[str, Mapping[str, Any]] = {
    "hinge": {"bins": 1024},
    "hinge, per image": {"bins": 1024, "per_image": True},
    "hinge, exact": {"exact": True},
    "hinge, exact, per image": {"exact": True, "per_image": True},
}
WAYS = {**SOFTMAX_WAYS, **HINGE_WAYS}
IN_BINS = ("bins", "all, per image", "hinge", "hinge, per image")
# A bin's increments lie on a line that rises by up to twice their mean: by what p is rounded counts
# twice as often as there are bins.
ROUNDED = {"tolerance": 4e-6, "gradient_tolerance": 2 * 64 * 6 * 2.0**-24}


@pytest.fixture(autouse=True)
def small_cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp, two rows and columns of pixels, two rows of nodes and a few classes at once.

    Then a cell has several chunks and bands, a small map several strips, and a histogram's program
    several tiles.
    """
    prepared_launch._prepared.clear()
    if request.node.get_closest_marker("shipped_sizes"):
        return
    sizes = {"PIXEL_COLUMNS": 2, "PIXEL_ROWS": 2, "NODE_ROWS": 2, "UNROLL": 2, "num_warps": 1}
    for name in ("cell_heuristic", "histogram_heuristic"):
        monkeypatch.setattr(lovasz_cell_launch, name, lambda *_: dict(sizes))
    monkeypatch.setattr(lovasz_cell_launch, "_PROGRAMS", 2)


def loss_of(way: str, target: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    function = lovasz_hinge_loss if way in HINGE_WAYS else lovasz_softmax_loss
    given = {"upsample": "bilinear", **WAYS[way], **options}
    return lambda logits: function(logits, target, **given)


def case(way: str, low: Size, high: Size, **given: Any) -> tuple[Tensor, Tensor]:
    """Logits of one size and labels of another; the hinge has one channel."""
    classes = 1 if way in HINGE_WAYS else given.pop("classes", 3)
    return upsampled_case(low, high, **{"batch": 2, **given, "classes": classes})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_ratio(way: str, align_corners: bool, size: str, device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32):
        logits, target = case(way, *SIZES[size], dtype=dtype, device=device)
        check_three_way(loss_of(way, target, align_corners=align_corners), logits, **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype(way: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = case(way, (2, 3), (5, 7), dtype=dtype, device=device)
    check_three_way(loss_of(way, target), logits, **ROUNDED)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("way", ["bins", "exact", "hinge"])
def test_every_layout(way: str, labels: torch.dtype, layout: str, device: torch.device) -> None:
    if way == "exact" and layout == "expanded":
        pytest.skip("equal errors: their order is free, and rounding decides it")
    logits, target = case(way, (2, 3), (5, 7), label_dtype=labels, device=device)
    loss = loss_of(way, as_layout(target, layout))
    check_three_way(loss, as_layout(logits, layout), **ROUNDED)


@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("way", ["bins", "all, per image"])
def test_blocks_of_classes(way: str, classes: int, device: torch.device) -> None:
    logits, target = case(way, (2, 3), (5, 7), classes=classes, device=device)
    check_three_way(loss_of(way, target), logits, **ROUNDED)


@pytest.mark.parametrize("size", ["1.5", "3.3", "8"])
@pytest.mark.parametrize("way", ["bins", "exact", "hinge"])
@pytest.mark.shipped_sizes
def test_shipped_sizes(way: str, size: str, device: torch.device) -> None:
    logits, target = case(way, *SIZES[size], classes=7, device=device)
    check_three_way(loss_of(way, target), logits, **ROUNDED)


@pytest.mark.parametrize("way", IN_BINS)
def test_large_logits(way: str, device: torch.device) -> None:
    """Interpolation and log-sum-exp round by up to 2^-24 of the logits, and p is off by as much.

    Of a class all increments together are 1 at most: so the gradient is off by no more, while most
    of it is 0.
    """
    logits, target = case(way, (3, 4), (7, 9), device=device)
    for extreme in (1e3 * logits, torch.full_like(logits, -1e4)):
        rounding = 16 * float(extreme.abs().max()) * 2.0**-24
        (value,), (gradient,) = value_and_gradients(loss_of(way, target), [extreme], "triton")
        (truth,), (right,) = value_and_gradients(
            loss_of(way, target), [extreme.double()], "reference"
        )
        largest = 1.0 if way not in HINGE_WAYS else float(truth)
        assert abs(value - truth) <= rounding * largest
        assert (gradient - right).abs().max() <= rounding


@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_void_and_empty_batches(way: str, device: torch.device) -> None:
    logits, target = case(way, (2, 3), (5, 7), device=device)
    one_is_void = target.clone()
    one_is_void[0] = 255
    check_three_way(loss_of(way, one_is_void), logits, **ROUNDED)
    for given in ((logits, torch.full_like(target, 255)), (logits[:0], target[:0])):
        (value,), (gradient,) = value_and_gradients(loss_of(way, given[1]), given[:1], "triton")
        assert value == 0 and (gradient == 0).all() and gradient.shape == given[0].shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", IN_BINS)
def test_nodes_under_void_do_no_harm(way: str, value: float, device: torch.device) -> None:
    logits, target = case(way, (4, 5), (8, 15), device=device)
    target[:, :, 6:] = 255  # from the centre of the third column of nodes on
    hidden = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device=device)
    hidden[..., 3:] = True
    calm, wild = (
        value_and_gradients(loss_of(way, target), [logits.where(~hidden, x)], "triton")
        for x in (0.0, value)
    )
    assert torch.equal(calm[0][0], wild[0][0]) and torch.equal(calm[1][0], wild[1][0])
    assert (wild[1][0][hidden.expand_as(logits)] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_number_makes_the_loss_none(way: str, device: torch.device) -> None:
    """And the gradient of the nodes beside it, and of no others."""
    logits, target = case(way, (4, 6), (8, 12), device=device)
    target[0, :2, :2] = 0
    logits[0, 0, 0, 0] = float("nan")
    (value,), (gradient,) = value_and_gradients(loss_of(way, target), [logits], "triton")
    assert value.isnan() and gradient[0, :, 0, 0].isnan().all()
    assert gradient[0, :, :, 3:].isfinite().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("way", ["bins", "hinge", "exact"])
def test_the_same_bits_every_time(way: str, device: torch.device) -> None:
    logits, target = case(way, *SIZES["3.3"], device=device)
    first, second = (
        value_and_gradients(loss_of(way, target), [logits], "triton") for _ in range(2)
    )
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("way", IN_BINS)
def test_counts_of_many_pixels_have_64_bits(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = case(way, (2, 3), (5, 7), device=device)
    narrow = value_and_gradients(loss_of(way, target), [logits], "triton")
    monkeypatch.setattr(lovasz_terms, "_MANY", 0)
    wide = value_and_gradients(loss_of(way, target), [logits], "triton")
    assert torch.equal(wide[0][0], narrow[0][0]) and torch.equal(wide[1][0], narrow[1][0])


@pytest.mark.parametrize(("way", "bytes_of_pixel"), [("bins", 4), ("hinge", 0)])
def test_what_is_kept_is_small(way: str, bytes_of_pixel: int, device: torch.device) -> None:
    """No map with classes, of bins."""
    logits, target = case(way, (2, 3), (8, 12), classes=6, device=device)
    leaf, saved = logits.requires_grad_(), list[Tensor]()
    with (
        tritonloss.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        loss_of(way, target)(leaf)
    own = [x for x in saved if x.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
    kept = sum(x.nbytes for x in own if x.shape == target.shape)
    assert kept == bytes_of_pixel * target.numel()
    assert not [x for x in own if x.shape[-2:] == target.shape[1:] and x.dim() > 3]


@pytest.mark.parametrize("way", ["bins", "exact", "hinge"])
def test_it_is_the_loss_of_interpolated_logits(way: str, device: torch.device) -> None:
    logits, target = case(way, (2, 3), (6, 9), dtype=torch.float64, device=device)
    at_labels = F.interpolate(logits, (6, 9), mode="bilinear")
    with tritonloss.use_backend("triton"):
        found = loss_of(way, target)(logits)
        expected = loss_of(way, target, upsample=None)(at_labels)
    torch.testing.assert_close(found, expected)


def test_wrong_arguments() -> None:
    logits, target = upsampled_case((2, 3), (5, 7), batch=2)
    with pytest.raises(ValueError, match='upsample="bilinear" is for labels of a higher'):
        lovasz_softmax_loss(logits, target)
    with pytest.raises(ValueError, match="align_corners must be False without upsample"):
        lovasz_hinge_loss(logits[:, :1], target, align_corners=True)
    with pytest.raises(ValueError, match="upsample must be None unless logits have the shape"):
        lovasz_softmax_loss(logits[:, :, None], target[:, None], upsample="bilinear")
