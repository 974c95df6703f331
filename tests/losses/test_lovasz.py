"""Lovász losses: the kernels against the reference, and both against the published definition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels_reference
import tritonloss
from kernels_reference.lovasz import jaccard_increments
from tests.conftest import HAS_GPU
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case, value_and_gradients
from tests.slices import operators_with
from tritonloss._core import prepared_launch
from tritonloss._core.configurations import forced
from tritonloss.functional import lovasz_hinge_loss, lovasz_softmax_loss
from tritonloss.overlap import lovasz_hinge, lovasz_launch, lovasz_terms
from tritonloss.overlap.lovasz_operator import number_of_bins

Loss = Callable[..., Tensor]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def programs_for_the_interpreter() -> Iterator[None]:
    """Programs of 64 pixels: even small images take several, and several tiles."""
    with ExitStack() as stack:
        for operator in operators_with("PIXELS"):
            if operator.startswith("lovasz"):
                stack.enter_context(forced(operator, {"PIXELS": 64, "num_warps": 1}))
        yield


def loss_of(name: str, target: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    function = {"softmax": lovasz_softmax_loss, "hinge": lovasz_hinge_loss}[name]
    return lambda logits: function(logits, target, **options)


def case(name: str, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels; the hinge has one channel."""
    images, classes, *size = shape
    return segmentation_case((images, 1 if name == "hinge" else classes, *size), **options)


# --- the published definition ---------------------------------------------------------------------


def published_increments(sorted_own: Tensor) -> Tensor:
    """Differences of Jaccard losses, in the dtype of what is given."""
    total = sorted_own.sum()
    intersection = total - sorted_own.cumsum(0)
    union = total + (1 - sorted_own).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat((jaccard[:1], jaccard[1:] - jaccard[:-1]))


def published_softmax(
    logits: Tensor, target: Tensor, classes: str | tuple[int, ...] = "present", ignored: int = 255
) -> Tensor:
    count = logits.size(1)
    p = logits.softmax(1).movedim(1, -1).reshape(-1, count)
    labels = target.reshape(-1).long()
    p, labels = p[labels != ignored], labels[labels != ignored]
    losses = []
    for channel in range(count) if isinstance(classes, str) else classes:
        own = (labels == channel).to(p)
        if classes == "present" and own.sum() == 0:
            continue
        errors, order = (own - p[:, channel]).abs().sort(descending=True)
        losses.append(torch.dot(errors, published_increments(own[order])))
    return torch.stack(losses).mean()


def published_hinge(logits: Tensor, target: Tensor, ignored: int = 255) -> Tensor:
    scores, labels = logits.reshape(-1), target.reshape(-1).long()
    scores, labels = scores[labels != ignored], labels[labels != ignored]
    own = labels.to(scores)
    errors, order = (1 - scores * (2 * own - 1)).sort(descending=True)
    return torch.dot(errors.relu(), published_increments(own[order]))


@pytest.mark.parametrize("classes", ["present", "all", (1,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_exact_is_the_published_definition(
    name: str, classes: str | tuple[int, ...], device: torch.device
) -> None:
    logits, target = case(name, (2, 4, 9, 13), dtype=torch.float64, device=device)
    target[target == 3] = 0  # a class without pixels
    logits.requires_grad_()
    if name == "softmax":
        options: dict[str, Any] = {"classes": classes}
        expected = published_softmax(logits, target, classes)
    else:
        options = {}
        expected = published_hinge(logits, target)
    with tritonloss.use_backend("triton"):
        found = loss_of(name, target, exact=True, **options)(logits)
        single = loss_of(name, target, exact=True, **options)(logits.float())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)), rtol=1e-9, atol=1e-13
    )


def test_increments_stay_right_where_differences_do_not() -> None:
    """Of many pixels float32 differences of Jaccard losses are noise, and many of them 0."""
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(2**20, generator=generator) < 0.3
    exact = published_increments(own.double())
    closed = jaccard_increments(own, own.sum(-1, keepdim=True)).float()
    differences = published_increments(own.float())

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    assert error(closed) < 1e-7
    assert error(differences) > 1e-3 and (differences == 0).float().mean() > 0.01


def test_exact_counts_in_integers(device: torch.device) -> None:
    """The increments of ranks that float32 cannot tell apart: of 2^24 pixels and more."""
    from tritonloss.overlap.lovasz_exact_kernels import _rank_increments_kernel

    ahead = 2**24 + 1  # pixels with larger errors, which are left out
    own = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], device=device)
    items = own.numel()
    # With others ahead of it, every union is larger by as much: as many own pixels take their part.
    found = own.cumsum(0) + ahead
    errors = torch.ones(1, items, device=device)
    weights = torch.zeros(items, device=device)
    order = torch.arange(items, device=device)[None]
    _rank_increments_kernel[(1,)](
        errors, order, found[None], weights, items=items, pixels=items, classes=1, channel=0,
        tiles=1, PER_IMAGE=True, SAVE=True, SIZE=8,
    )  # fmt: skip
    union = (found[-1] + torch.arange(1, items + 1, device=device) - found).double()
    rest = (found[-1] - found).double()
    expected = torch.where(own == 1, -1 / union, rest / union / (union - 1))
    expected[0] = -1 / union[0]
    torch.testing.assert_close(weights.double(), expected, rtol=3e-7, atol=0)


# --- parity ---------------------------------------------------------------------------------------

SOFTMAX_WAYS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "few bins": {"bins": 64},
    "many bins": {"bins": 2048},
    "all, per image": {"classes": "all", "per_image": True},
    "some classes": {"classes": (0, 3)},
    "exact": {"exact": True},
    "exact, per image": {"exact": True, "per_image": True, "classes": (2, 1)},
}
HINGE_WAYS: Mapping[str, Mapping[str, Any]] = {
    "hinge": {},
    "hinge, few bins, per image": {"bins": 1024, "per_image": True},
    "hinge, exact": {"exact": True},
    "hinge, exact, per image": {"exact": True, "per_image": True},
}
WAYS = {**SOFTMAX_WAYS, **HINGE_WAYS}


def way_of(way: str) -> tuple[str, dict[str, Any]]:
    return ("hinge" if way in HINGE_WAYS else "softmax"), dict(WAYS[way])


@pytest.mark.parity
@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_parity(
    way: str, dtype: torch.dtype, layout: str, labels: torch.dtype, device: torch.device
) -> None:
    name, options = way_of(way)
    ignored = -7 if labels == torch.int8 else 255
    logits, target = case(name, (2, 5, 8, 20), dtype=dtype, device=device)
    if options.get("exact") and dtype != torch.float64 and layout == "expanded":
        pytest.skip("equal errors: their order is free, and rounding decides it")
    target = torch.where(target == 255, ignored, target.long()).to(labels)
    given = as_layout(logits, layout), as_layout(target, layout)
    loss = loss_of(name, given[1], ignore_index=ignored, **options)
    tolerance = 1e-2 if options.get("exact") and dtype == torch.bfloat16 else 4e-6
    check_three_way(loss, given[0], tolerance=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3, 17, 33, 40])
def test_any_number_of_classes(classes: int, layout: str, device: torch.device) -> None:
    """In registers going back up to 32 of a lane, and beyond that read twice."""
    logits, target = segmentation_case((1, classes, 5, 7), device=device)
    loss = loss_of("softmax", target, bins=64)
    check_three_way(loss, as_layout(logits, layout), tolerance=4e-6)


@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_volumes(name: str, device: torch.device) -> None:
    logits, target = case(name, (2, 3, 12, 5), device=device)
    volume = logits.unflatten(2, (3, 4)), target.unflatten(1, (3, 4))
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        given = volume[0].contiguous(memory_format=layout)
        found, gradients = value_and_gradients(loss_of(name, volume[1]), [given], "triton")
        expected, flat = value_and_gradients(loss_of(name, target), [logits], "triton")
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(gradients[0].flatten(2, 3), flat[0])


def test_labels_out_of_range_are_ignored_on_a_gpu_and_raise_here(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 3, 6, 7), label_dtype=torch.int64, device=device)
    wrong = target.clone()
    wrong[0, 0] = torch.tensor([-1, 3, 2**40 + 1, -(2**33), 77, 256, 254], device=device)
    ignored = wrong.clone()
    ignored[0, 0] = 255
    if device.type == "cpu":
        with pytest.raises(ValueError, match="^target must hold labels from 0 to 2"):
            lovasz_softmax_loss(logits, wrong)
    monkeypatch.setattr(tritonloss._core.checks, "check_labels_in_range", lambda *_: None)
    for options in ({}, {"exact": True}):
        found, expected = (
            value_and_gradients(loss_of("softmax", t, **options), [logits], "triton")
            for t in (wrong, ignored)
        )
        assert torch.equal(found[0][0], expected[0][0])
        assert torch.equal(found[1][0], expected[1][0])


# --- edges ----------------------------------------------------------------------------------------

SMALL = {"softmax": {"bins": 64}, "hinge": {"bins": 1024}}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_nothing_but_void_and_empty_batches(
    name: str, per_image: bool, exact: bool, device: torch.device
) -> None:
    options = {**SMALL[name], "per_image": per_image, "exact": exact}
    logits, target = case(name, (2, 3, 4, 5), device=device)
    for given in ((logits, torch.full_like(target, 255)), (logits[:0], target[:0])):
        for backend in ("triton", "reference"):
            loss = loss_of(name, given[1], **options)
            (value,), (gradient,) = value_and_gradients(loss, given[:1], backend)
            assert value == 0 and value.shape == ()
            assert (gradient == 0).all() and gradient.shape == given[0].shape
    one_is_void = target.clone()
    one_is_void[0] = 255
    check_three_way(loss_of(name, one_is_void, **options), logits, tolerance=4e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_class_without_pixels(exact: bool, device: torch.device) -> None:
    """It is left out, or its loss is its largest probability, on which alone the gradient is."""
    logits, target = segmentation_case((1, 3, 4, 5), device=device, dtype=torch.float64)
    target[target == 2] = 0
    target[0, 0, :2] = torch.tensor([0, 1])
    options: dict[str, Any] = {"exact": exact, "bins": 2048}
    for backend in ("triton", "reference"):
        (value,), (gradient,) = value_and_gradients(
            loss_of("softmax", target, classes=(2,), **options), [logits], backend
        )
        largest = logits.softmax(1)[:, 2].where(target != 255, 0).max()
        assert (value - largest).abs() <= (0 if exact else 1 / 4096) + 1e-12
        assert (gradient != 0).any(1).sum() == 1
        present = loss_of("softmax", target, **options)(logits)
        both = loss_of("softmax", target, classes=(0, 1), **options)(logits)
        assert torch.equal(present, both)
    hinge, mask = case("hinge", (1, 1, 4, 5), device=device)
    check_three_way(
        loss_of("hinge", torch.where(mask == 1, 0, mask), exact=exact), hinge, tolerance=4e-6
    )


def test_classes_are_compared_by_value(device: torch.device) -> None:
    logits, target = segmentation_case((1, 4, 4, 6), device=device)
    target[target == 3] = 0
    with tritonloss.use_backend("triton"):
        losses = {
            classes: lovasz_softmax_loss(logits, target, classes=classes, bins=64)
            for classes in ("present", "all")
        }
        for classes, expected in losses.items():
            built = "".join(list(classes))  # equal, and another object
            assert built is not classes
            assert torch.equal(
                lovasz_softmax_loss(logits, target, classes=built, bins=64), expected
            )
        numbers = lovasz_softmax_loss(logits, target, classes=(3, 1, 0, 2), bins=64)
    assert losses["present"] != losses["all"] and torch.equal(numbers, losses["all"])


@pytest.mark.parametrize("scale", [0.0, 1e4, 3e37])
@pytest.mark.parametrize("way", ["default", "exact", "hinge", "hinge, exact"])
def test_extreme_logits(way: str, scale: float, device: torch.device) -> None:
    name, options = way_of(way)
    logits, target = case(name, (1, 3, 5, 8), device=device)
    if scale == 0 and options.get("exact"):
        pytest.skip("all errors are equal: their order is free")
    check_three_way(loss_of(name, target, **options), logits * scale, tolerance=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [64, 1024])
def test_probabilities_of_one_half(bins: int, dtype: torch.dtype, device: torch.device) -> None:
    """Both classes' errors lie at the edge in the middle of the bins, or a digit beside it."""
    _, target = segmentation_case((1, 2, 4, 6), device=device)
    logits = torch.zeros(1, 2, 4, 6, dtype=dtype, device=device)
    check_three_way(loss_of("softmax", target, bins=bins), logits, tolerance=4e-6)
    logits[0, 0, :, ::2] = 1e-7
    check_three_way(loss_of("softmax", target, bins=bins), logits, tolerance=1e-5)
    (value,), _ = value_and_gradients(loss_of("softmax", target, bins=bins), [logits], "triton")
    exact = loss_of("softmax", target, exact=True)(logits)
    assert (value - exact).abs() <= 1 / (2 * bins) + 1e-6


@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_rows_that_lie_far_apart(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the 64 bits that they take, a tile's pixels are the same."""
    wide, target = case(name, (2, 3, 9, 17), device=device)
    options = SMALL[name]
    given = wide[..., 1:14], target[..., 1:14]
    loss = loss_of(name, given[1], **options)
    near = value_and_gradients(loss, given[:1], "triton")
    check_three_way(loss, given[0], tolerance=4e-6)
    monkeypatch.setattr(lovasz_launch, "_is_far", lambda *_: True)
    prepared_launch._prepared.clear()
    far = value_and_gradients(loss, given[:1], "triton")
    prepared_launch._prepared.clear()
    assert torch.equal(near[0][0], far[0][0]) and torch.equal(near[1][0], far[1][0])


@pytest.mark.parametrize("bins", [1024, 4096])
def test_errors_of_all_sizes_of_a_hinge(bins: int, device: torch.device) -> None:
    """None, near 0, at the edges of bins and between them, and very large; to the own side, too."""
    powers = torch.exp2(torch.arange(-12.0, 60.0, 2))
    errors = torch.cat((powers, 1.25 * powers, -powers, torch.zeros(4))).view(1, 1, 8, -1)
    logits = torch.cat((errors - 1, 1 - errors), 2).to(device)
    target = torch.arange(16, device=device).view(1, 16, 1).expand(1, 16, errors.size(3)) // 8
    loss = loss_of("hinge", target.to(torch.uint8), bins=bins)
    (value,), (gradient,) = value_and_gradients(loss, [logits], "triton")
    (truth,), (expected,) = value_and_gradients(loss, [logits], "reference")
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(gradient, expected)


def test_own_pixels_that_are_sure(device: torch.device) -> None:
    """Their probabilities are 1, of many pixels of many programs."""
    target = torch.arange(64, device=device).view(1, 8, 8).remainder(3).to(torch.uint8)
    logits = 60.0 * torch.nn.functional.one_hot(target.long(), 3).movedim(3, 1).float()
    logits[0, :, 0, :3] = torch.tensor([0.0, 1.0, 2.0], device=device)
    target[0, 1] = 255
    with forced("lovasz_softmax_forward", {"PIXELS": 32, "num_warps": 1}):
        check_three_way(loss_of("softmax", target, bins=64), logits, tolerance=4e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_is_no_number_makes_the_loss_none(
    backend: str, name: str, exact: bool, sign: float, device: torch.device
) -> None:
    logits, target = case(name, (2, 3, 4, 5), device=device)
    target[0, 0, 0] = 0
    options = {**SMALL[name], "exact": exact}
    spoilt = logits.clone()
    spoilt[0, 0, 0, 0] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    void = target.clone()
    void[0, 0, 0] = 255
    for per_image in (False, True):
        loss = loss_of(name, target, per_image=per_image, **options)
        (value,), (gradient,) = value_and_gradients(loss, [spoilt], backend)
        assert value.isnan() and gradient[0, :, 0, 0].isnan().all()
        gradient[0, :, 0, 0] = 0
        clean = loss_of(name, void, per_image=per_image, **options)
        (value,), (expected,) = value_and_gradients(clean, [spoilt], backend)
        assert value.isfinite()
        assert torch.equal(gradient, expected)


def test_the_same_bits_every_time(device: torch.device) -> None:
    for way in ("default", "hinge", "exact"):
        name, options = way_of(way)
        logits, target = case(name, (2, 4, 9, 11), device=device)
        first, second = (
            value_and_gradients(loss_of(name, target, **options), [logits], "triton")
            for _ in range(2)
        )
        assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("way", ["default", "hinge", "exact", "hinge, exact"])
def test_counts_of_many_pixels_have_64_bits(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = way_of(way)
    logits, target = case(name, (2, 3, 5, 9), device=device)
    loss = loss_of(name, target, **options)
    narrow = value_and_gradients(loss, [logits], "triton")
    monkeypatch.setattr(lovasz_terms, "_MANY", 0)
    wide = value_and_gradients(loss, [logits], "triton")
    assert torch.equal(wide[0][0], narrow[0][0]) and torch.equal(wide[1][0], narrow[1][0])


# --- how near bins come to the sort ---------------------------------------------------------------


def scene(stage: str, prevalence: float, side: int) -> tuple[Tensor, Tensor]:
    """Logits [1, 1, side, side] of a mask, and the mask, at a stage of a training."""
    generator = torch.Generator().manual_seed(3)
    apart = {"start": 0.0, "middle": 3.0, "late": 8.0, "done": 14.0}[stage]
    spread = {"start": 0.3, "middle": 1.6, "late": 2.5, "done": 3.0}[stage]
    own = torch.rand(side * side, generator=generator) < prevalence
    own[0] = True
    scores = torch.where(own, apart / 2, -apart / 2 - 0.5)
    scores += spread * torch.randn(side * side, generator=generator)
    if stage == "start":
        scores -= 2.9
    return scores.view(1, 1, side, side), own.view(1, side, side).to(torch.uint8)


@functools.cache
def exact_of(name: str, stage: str, prevalence: float, side: int) -> tuple[Tensor, Tensor]:
    """(value, gradient) of the reference with a sort, in float64."""
    logits, target = scene(stage, prevalence, side)
    logits = logits.double()
    if name == "softmax":
        logits = torch.cat((torch.zeros_like(logits), logits), 1)
    values, gradients = value_and_gradients(
        loss_of(name, target, exact=True, **({"classes": (1,)} if name == "softmax" else {})),
        [logits],
        "reference",
    )
    return values[0], gradients[0]


STAGES = [(stage, prevalence) for stage in ("start", "middle", "late", "done")
          for prevalence in (0.3, 0.01, 1e-4)]  # fmt: skip


@pytest.mark.parametrize(("stage", "prevalence"), STAGES)
@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_bins_are_as_near_to_the_sort_as_they_claim(
    name: str, stage: str, prevalence: float, device: torch.device
) -> None:
    side = 1000 if prevalence < 0.01 else 256  # so that a rare class has pixels, too
    logits, target = (x.to(device) for x in scene(stage, prevalence, side))
    if name == "softmax":
        logits = torch.cat((torch.zeros_like(logits), logits), 1)
    sizes = {"PIXELS": 2**14, "num_warps": 8}  # the interpreter takes as long for few as for many
    options = {"classes": (1,)} if name == "softmax" else {}
    with ExitStack() as stack:
        for operator in operators_with("PIXELS"):
            if not HAS_GPU:
                stack.enter_context(forced(operator, sizes))
        (value,), (gradient,) = value_and_gradients(
            loss_of(name, target, **options), [logits], "triton"
        )
    exact, truth = (x.to(device) for x in exact_of(name, stage, prevalence, side))
    error = (value.double() - exact).abs()
    near = 8 / number_of_bins(None, lovasz_hinge.BINS)
    assert error <= (1 / 1024 if name == "softmax" else exact * near + 2**-11)
    assert error <= (2e-4 if name == "softmax" else 2e-3) * exact.clamp(min=0.1)
    alike = torch.nn.functional.cosine_similarity(gradient.double().flatten(), truth.flatten(), 0)
    assert alike > 0.9999


@pytest.mark.parametrize("bins", [64, 256])
def test_the_bound_holds_for_the_worst_errors(bins: int, device: torch.device) -> None:
    """All errors at the edges of one bin, where the middle of it is as wrong as it can be."""
    for place in (1 / 64, 0.25, 0.5, 0.75):
        for side in (-1, 1):
            p = place + side * 1e-5
            logits = torch.tensor([0.0, torch.logit(torch.tensor(p)).item()])
            logits = logits.view(1, 2, 1, 1).expand(1, 2, 4, 6).to(device)
            target = torch.zeros(1, 4, 6, dtype=torch.uint8, device=device)
            target[0, 0, :2] = 1
            binned, exact = (
                kernels_reference.lovasz_softmax_loss(logits, target, classes="all", **options)
                for options in ({"bins": bins}, {"exact": True})
            )
            with tritonloss.use_backend("triton"):
                found = lovasz_softmax_loss(logits, target, classes="all", bins=bins)
            assert (found - exact).abs() <= 1 / (2 * bins) + 1e-6
            torch.testing.assert_close(found, binned)
