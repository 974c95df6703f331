"""Affinity field loss: the kernels against the reference, and both against the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels_reference
import tritonloss
from tests.engine.test_offsets import far_apart
from tests.losses.affinity.oracle import count_by_definition, loss_by_definition
from tests.oracle import (
    LAYOUTS,
    as_layout,
    assert_no_worse,
    check_three_way,
    segmentation_case,
    unaligned,
    value_and_gradients,
)
from tritonloss._core.configurations import forced
from tritonloss.functional import affinity_field_loss

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WAYS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "pairs": {"void": "pair"},
    "far": {"size": 3, "void": "pair", "margin": 1.5},
    "weights": {"edge_weight": 0.3, "non_edge_weight": 2.0, "decay": 0.25},
    "sizes": {"size": (1, 2)},
}


def loss_of(target: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda logits: affinity_field_loss(logits, target, **options)


def tables(classes: int, sizes: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand((2, classes, sizes), generator=generator, dtype=torch.float64) + 0.25
    first, second = made.to(device)
    return first, second


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("triple", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1)], ids=str)
def test_it_is_the_definition(
    sizes: tuple[int, ...], triple: bool, backend: str, device: torch.device
) -> None:
    logits, target = segmentation_case((2, 3, 5, 6), dtype=torch.float64, device=device)
    logits[0, 1, 2, 2] = 30.0  # a probability above 1 - 1e-4, and others below 1e-4
    weighted = tables(3, len(sizes), device)
    for given in (None, weighted):
        options: dict[str, Any] = {"size": sizes, "void": "triple" if triple else "pair"}
        if given is not None:
            options |= {"edge_table": given[0], "non_edge_table": given[1], "margin": 1.25}
        leaf = logits.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            found = loss_of(target, **options, edge_weight=0.5)(leaf)
        twin = logits.clone().requires_grad_()
        expected = loss_by_definition(
            twin, target, sizes=sizes, triple=triple, tables=given, weights=(0.5, 1.0),
            margin=3.0 if given is None else 1.25,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
        (gradient,) = torch.autograd.grad(found, leaf)
        (truth,) = torch.autograd.grad(expected, twin)
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("triple", [True, False])
def test_entries_are_counted(triple: bool, device: torch.device) -> None:
    """The mean divides by edges, two for each pair of different labels, and by all others."""
    height, width, classes = 7, 9, 4
    logits = torch.zeros(1, classes, height, width, device=device)
    logits[:, 0] = 5.0  # the same probabilities everywhere: every D is 0
    target = torch.zeros(1, height, width, dtype=torch.uint8, device=device)
    target[0, 3, 4] = 2
    options = {"void": "triple" if triple else "pair", "margin": 2.5}
    for backend in ("triton", "reference"):
        with tritonloss.use_backend(backend):
            loss = affinity_field_loss(logits, target, **options)
            torch.testing.assert_close(loss, torch.full_like(loss, 2.5))
            # Without a margin nothing but other entries is left: one pixel of other probabilities.
            spread = logits.clone()
            spread[0, 1, 3, 4] = 5.0
            loss = affinity_field_loss(spread, target, **{**options, "margin": 0.0})
    p, q = (x[0, :, 3, 4].double().softmax(0) for x in (logits, spread))
    both_ways = ((p - q) * (p / q).log() + (q - p) * ((1 - p) / (1 - q)).log())[[1, 3]].sum()
    others = count_by_definition(height, width, 1, triple) * classes - 2 * 16
    torch.testing.assert_close(loss.double(), 8 * both_ways / others, rtol=2e-5, atol=0)


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize(("layout", "labels"), list(zip(LAYOUTS, LABELS, strict=True)), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_parity(
    way: str, dtype: torch.dtype, layout: str, labels: torch.dtype, device: torch.device
) -> None:
    ignored = -7 if labels == torch.int8 else 255
    logits, target = segmentation_case((2, 3, 7, 11), dtype=dtype, device=device)
    target = torch.where(target == 255, ignored, target.long()).to(labels)
    given = as_layout(logits, layout), as_layout(target, layout)
    check_three_way(loss_of(given[1], ignore_index=ignored, **WAYS[way]), given[0])


@pytest.mark.parity
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 1, 1), (1, 2, 1, 13), (2, 3, 13, 1), (1, 2, 3, 3), (1, 5, 17, 2), (3, 2, 5, 23)],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 5, (3, 1)], ids=str)
def test_shapes(shape: tuple[int, ...], size: int | tuple[int, ...], device: torch.device) -> None:
    logits, target = segmentation_case(shape, device=device)
    for void in ("triple", "pair"):
        check_three_way(loss_of(target, size=size, void=void), logits)


@pytest.mark.parity
@pytest.mark.shipped_sizes
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, (1, 2, 3)], ids=str)
def test_programs_that_ship(
    size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 4, 8, 150), dtype=dtype, device=device)
    check_three_way(loss_of(target, size=size), logits)


@pytest.mark.parity
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_any_number_of_rows(rows: int, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 11, 10), device=device)
    size = {"LANES": 16, "ROWS": rows, "num_warps": 1}
    with (
        forced("affinity_field_forward", size),
        forced("affinity_field_backward", size),
    ):
        check_three_way(loss_of(target, size=(1, 3), void="pair"), logits)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_maps_that_begin_anywhere(offset: int, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 6, 9), device=device)
    check_three_way(loss_of(unaligned(target, offset)), unaligned(logits, offset))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 2])
def test_tables_and_their_gradients(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = segmentation_case((2, 4, 7, 11), dtype=dtype, device=device)
    target[target == 3] = 0  # a class without a centre
    edge, other = (t.to(torch.promote_types(dtype, torch.float32)) for t in tables(4, 2, device))
    if columns == 1:
        edge, other = edge[:, 0], other[:, 1]  # of any stride

    def loss(logits: Tensor, edge: Tensor, other: Tensor) -> Tensor:
        return affinity_field_loss(
            logits, target, size=(1, 2), edge_table=edge, non_edge_table=other, edge_weight=2.0
        )

    _, gradient, _ = check_three_way(loss, logits, edge, other)
    _, (whole, *_) = value_and_gradients(lambda t: loss(logits, t, other), [edge], "reference")
    assert (gradient[3] == 0).all() and (gradient[:3] != 0).all()
    torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way: str, device: torch.device) -> None:
    """Away from the places where an entry or a probability reaches its limit."""
    options = dict(WAYS[way])
    options.setdefault("margin", 50.0)  # no edge is beyond it
    logits, target = segmentation_case((1, 3, 5, 6), dtype=torch.float64, device=device)
    sizes = options["size"] if isinstance(options.get("size"), tuple) else (1,)
    leaves = [logits * 0.5, *tables(3, len(sizes), device)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda z, edge, other: affinity_field_loss(
                z, target, edge_table=edge, non_edge_table=other, **options
            ),
            leaves,
        )


# --- digits ---------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("confidence", [0.0, 2.0, 6.0, 9.0, 9.3, 12.0])
def test_confident_pixels_keep_their_digits(confidence: float, device: torch.device) -> None:
    """Beside pixels that are not confident: from 1 - p in float32 few digits would be right."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 5, 9, 14, generator=generator)
    target = torch.randint(5, (1, 9, 14), generator=generator)
    sure = torch.rand(target.shape, generator=generator) < 0.5
    logits += confidence * (sure[:, None] & (target[:, None] == torch.arange(5).view(-1, 1, 1)))
    logits, target = (logits + 40.0).to(device), target.to(device)
    loss = loss_of(target, void="pair", margin=20.0)
    (value,), (gradient,) = value_and_gradients(loss, [logits], "triton")
    (truth,), (slope,) = value_and_gradients(loss, [logits.double()], "reference")
    assert (value.double() - truth).abs() <= 2e-6 * truth.abs()
    assert (gradient.double() - slope).abs().max() <= 3e-6 * slope.abs().max()


@pytest.mark.parity
@pytest.mark.parametrize("scale", [30.0, 1e4, 3e37])
def test_extreme_logits(scale: float, device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 6, 9), device=device)
    check_three_way(loss_of(target), logits * scale)


def test_equal_logits(device: torch.device) -> None:
    """Every D is 0, and so is the gradient, but for what rounding leaves of its two parts."""
    logits, target = segmentation_case((1, 3, 6, 9), device=device)
    logits = torch.full_like(logits, -7.0)
    (value,), (gradient,) = value_and_gradients(loss_of(target), [logits], "triton")
    (spread,), (usual,) = value_and_gradients(
        loss_of(target), [logits + torch.randn_like(logits)], "triton"
    )
    torch.testing.assert_close(value, torch.full_like(value, 3.0), rtol=1e-6, atol=0)
    assert gradient.abs().max() <= 1e-6 * usual.abs().max() and spread != value


def test_smooth_maps_keep_their_digits(device: torch.device) -> None:
    """Divergences of neighbours that are nearly alike are small differences of large numbers."""
    row, column = torch.meshgrid(torch.arange(9.0), torch.arange(15.0), indexing="ij")
    logits = torch.stack([(row * k + 2 * column) * 1e-2 for k in range(4)])[None].to(device)
    target = torch.zeros(1, 9, 15, dtype=torch.uint8, device=device)
    loss = loss_of(target)
    (value,), (gradient,) = value_and_gradients(loss, [logits], "triton")
    (expected,), (yardstick,) = value_and_gradients(loss, [logits], "reference")
    (truth,), (slope,) = value_and_gradients(loss, [logits.double()], "reference")
    assert_no_worse(value, expected, truth, tolerance=1e-3)
    assert_no_worse(gradient, yardstick, slope, tolerance=1e-4)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, (1, 2)], ids=str)
def test_nothing_that_counts(size: int | tuple[int, ...], device: torch.device) -> None:
    """Nothing but void, isolated pixels, an empty batch: 0 with a zero gradient."""
    logits, target = segmentation_case((2, 3, 5, 6), ignore_index=None, device=device)
    void = torch.full_like(target, 255)
    alone = void.clone()
    alone[:, 2, 3] = 1
    for given in ((logits, void), (logits, alone), (logits[:0], target[:0])):
        for backend in ("triton", "reference"):
            leaf = given[0].clone().requires_grad_()
            edge, other = (t.requires_grad_() for t in tables(3, 1, device))
            with tritonloss.use_backend(backend):
                loss = affinity_field_loss(
                    leaf, given[1], size=size, edge_table=edge[:, 0], non_edge_table=other[:, 0]
                )
            assert loss == 0 and loss.shape == ()
            for gradient in torch.autograd.grad(loss, (leaf, edge, other)):
                assert (gradient == 0).all()


def test_no_edges(device: torch.device) -> None:
    """A single label: the mean over no edges is 0, and the others are as they would be."""
    logits, target = segmentation_case((1, 3, 5, 6), ignore_index=None, device=device)
    target = torch.ones_like(target)
    check_three_way(loss_of(target), logits)
    with tritonloss.use_backend("triton"):
        loss = affinity_field_loss(logits, target)
        assert torch.equal(loss, affinity_field_loss(logits, target, edge_weight=0.0))
        assert loss > 0 and affinity_field_loss(logits, target, non_edge_weight=0.0) == 0


def test_edges_alone(device: torch.device) -> None:
    """Two classes, and labels like a chessboard's: the straight neighbours differ."""
    logits, _ = segmentation_case((1, 2, 5, 6), device=device)
    row, column = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    target = ((row + column) % 2)[None].to(device)
    check_three_way(loss_of(target, void="pair"), logits)
    check_three_way(loss_of(target, size=2), logits)


def test_labels_out_of_range_are_void_on_a_gpu_and_raise_here(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 3, 6, 7), label_dtype=torch.int64, device=device)
    wrong = target.clone()
    wrong[0, 0] = torch.tensor([-1, 3, 2**40 + 1, -(2**33), 77, 256, 254], device=device)
    void = wrong.clone()
    void[0, 0] = 255
    if device.type == "cpu":
        with pytest.raises(ValueError, match="^target must hold labels from 0 to 2"):
            affinity_field_loss(logits, wrong)
    monkeypatch.setattr(tritonloss._core.checks, "check_labels_in_range", lambda *_: None)
    edge, _ = tables(3, 1, device)
    for options in ({}, {"edge_table": edge[:, 0]}):
        found, expected = (
            value_and_gradients(loss_of(t, **options), [logits], "triton") for t in (wrong, void)
        )
        assert torch.equal(found[0][0], expected[0][0])
        assert torch.equal(found[1][0], expected[1][0])


@pytest.mark.parametrize("options", [{}, {"void": "pair"}, {"size": (1, 2)}], ids=str)
def test_what_is_no_number(options: dict[str, Any], device: torch.device) -> None:
    """Under void it changes nothing; elsewhere both backends agree, and NaN makes the loss NaN."""
    logits, target = segmentation_case((2, 3, 6, 7), device=device)
    target[0, 2:5, 2:5] = 1
    void = target.clone()
    void[0, 3, 3] = 255
    calm = value_and_gradients(loss_of(void, **options), [logits], "triton")
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = logits.clone()
        spoilt[0, 1, 3, 3] = value
        wild = value_and_gradients(loss_of(void, **options), [spoilt], "triton")
        assert torch.equal(calm[0][0], wild[0][0]) and torch.equal(calm[1][0], wild[1][0])
        assert (wild[1][0][0, :, 3, 3] == 0).all()
        found = value_and_gradients(loss_of(target, **options), [spoilt], "triton")
        expected = value_and_gradients(loss_of(target, **options), [spoilt], "reference")
        torch.testing.assert_close(found[0][0], expected[0][0], equal_nan=True)
        torch.testing.assert_close(found[1][0][1], expected[1][0][1])  # of the other image
        assert found[0][0].isnan() or value == -float("inf")


def test_two_classes_that_differ_keep_nan(device: torch.device) -> None:
    """Where all entries of a pixel are edges, a NaN is not taken for one beyond the margin."""
    row, column = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    target = (column % 2)[None].to(device)
    logits = torch.zeros(1, 2, 1, 6, device=device)
    logits[0, 0, 0, 2] = float("nan")
    with tritonloss.use_backend("triton"):
        assert affinity_field_loss(logits, target[:, :1], void="pair").isnan()


# --- programs, memory, autograd -------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_every_time(way: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 6, 13), device=device)
    first, second = (
        value_and_gradients(loss_of(target, **WAYS[way]), [logits], "triton") for _ in range(2)
    )
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
def test_the_same_bits_whatever_the_order_of_programs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    logits, target = segmentation_case((2, 3, 6, 13), device=device)
    edge, other = tables(3, 2, device)

    def loss(z: Tensor, edge: Tensor, other: Tensor) -> Tensor:
        return affinity_field_loss(z, target, size=(1, 2), edge_table=edge, non_edge_table=other)

    first = value_and_gradients(loss, [logits, edge, other], "triton")
    builder = interpreter.interpreter_builder
    set_index, seen = builder.set_grid_idx, []

    def set_reversed(x: int, y: int, z: int) -> None:
        seen.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_reversed)
    second = value_and_gradients(loss, [logits, edge, other], "triton")
    assert max(seen) > 0
    for one, another in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, another)


@pytest.mark.parity
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own memory would be needed")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)])
def test_far_strides(axis: int, size: int, tmp_path: Path) -> None:
    """Logits and labels whose last element along one axis lies 2^31 elements from the first."""
    shape = [1, 2, 2, 4]
    shape[axis] = size
    logits, target = segmentation_case(shape, dtype=torch.float16, ignore_index=None)
    loss = loss_of(target, void="pair")
    expected = value_and_gradients(loss, [logits], "triton")
    found = value_and_gradients(loss, [far_apart(logits, axis, tmp_path)], "triton")
    assert torch.equal(found[0][0], expected[0][0])
    torch.testing.assert_close(found[1][0], expected[1][0])
    if axis != 1 and target.shape[max(axis - 1, 0)] in (2, 3):
        labels = far_apart(target, max(axis - 1, 0), tmp_path)
        assert torch.equal(loss_of(labels, void="pair")(logits), loss(logits))


def test_autograd_as_it_is_used(device: torch.device) -> None:
    logits, target = segmentation_case((1, 3, 5, 6), device=device)
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        # once more, after the same softmax has been used elsewhere
        scores = leaf * 2
        value = affinity_field_loss(scores, target) + scores.softmax(1).square().mean()
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(value, leaf)
        assert torch.equal(first, second)
        # with an upstream gradient that is not 1
        (plain,) = torch.autograd.grad(affinity_field_loss(leaf, target), leaf)
        (scaled,) = torch.autograd.grad(affinity_field_loss(leaf, target) * -3.0, leaf)
        torch.testing.assert_close(scaled, -3.0 * plain)
        # of the tables alone
        edge = tables(3, 1, device)[0][:, 0].requires_grad_()
        alone = affinity_field_loss(leaf.detach(), target, edge_table=edge)
        (slope,) = torch.autograd.grad(alone, edge)
        both = affinity_field_loss(leaf, target, edge_table=edge)
        torch.testing.assert_close(torch.autograd.grad(both, (leaf, edge))[1], slope)
        with torch.no_grad():
            assert not affinity_field_loss(leaf, target).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (1, 1)}, "size must be an integer or a tuple of different ones"),
        ({"size": ()}, "size must be an integer or a tuple of different ones"),
        ({"size": 0}, "size must be an integer from 1 to 64; got 0"),
        ({"size": (1, 2), "edge_table": torch.ones(3, 3)}, r"edge_table must .* or \(C, 2\)"),
        ({"non_edge_table": torch.ones(4, 1)}, "non_edge_table must be a floating-point tensor"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    logits, target = segmentation_case((1, 3, 5, 6))
    with pytest.raises(ValueError, match=f"^{message}"):
        affinity_field_loss(logits, target, **options)


def test_one_class_is_none() -> None:
    logits, target = segmentation_case((1, 1, 5, 6))
    with pytest.raises(ValueError, match="binary_cross_entropy"):
        affinity_field_loss(logits, target)


def test_the_reference_is_public() -> None:
    assert kernels_reference.affinity_field_loss is not affinity_field_loss
