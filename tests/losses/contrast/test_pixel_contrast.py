"""Pixel contrast: against the formula pair by pair, the reference, and what it must survive."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.engine.test_offsets import far_apart
from tests.oracle import check_three_way
from tritonloss.functional import pixel_contrast_loss

pytestmark = pytest.mark.parity

BACKENDS = ("triton", "reference")


def embeddings(count: int, dims: int, seed: int = 0, **kind: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dims, generator=generator, dtype=torch.float64)
    return F.normalize(values).to(**kind)


def labels_of(count: int, classes: int, seed: int = 1, lowest: int = -1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, classes, (count,), generator=generator)


def by_pairs(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    hardest: float | None = None,
) -> tuple[float, Tensor]:
    """Value and the anchors' gradient, one pair after the other, as the paper writes them."""
    own = keys is None
    others, other_labels = (anchors, anchor_labels) if own else (keys, key_labels)
    assert others is not None and other_labels is not None
    a = [[float(x) for x in row] for row in anchors.double()]
    k = [[float(x) for x in row] for row in others.double()]
    labels, key_classes = anchor_labels.tolist(), other_labels.tolist()
    losses: list[float] = []
    slopes: list[dict[int, float]] = []
    rows: list[int] = []
    for i, label in enumerate(labels):
        if label < 0:
            continue
        s = [sum(x * y for x, y in zip(a[i], row, strict=True)) / temperature for row in k]
        same = [j for j, c in enumerate(key_classes) if c == label and not (own and i == j)]
        rest = [j for j, c in enumerate(key_classes) if c not in (label,) and c >= 0]
        if hardest is not None:
            same = sorted(same, key=lambda j: s[j])[: max(math.ceil(hardest * len(same)), 1)]
            rest = sorted(rest, key=lambda j: -s[j])[: max(math.ceil(hardest * len(rest)), 1)]
        if not same:
            continue
        loss, slope = 0.0, dict.fromkeys([*same, *rest], 0.0)
        for p in same:
            top = max(s[j] for j in [p, *rest])
            parts = {j: math.exp(s[j] - top) for j in [p, *rest]}
            total = sum(parts.values())
            loss -= math.log(parts[p] / total) / len(same)
            for j, part in parts.items():
                slope[j] += (part / total - (j == p)) / len(same)
        losses.append(loss)
        slopes.append(slope)
        rows.append(i)
    gradient = torch.zeros(anchors.shape, dtype=torch.float64)
    if not losses:
        return 0.0, gradient
    factor = temperature / base_temperature / len(losses)
    for i, slope in zip(rows, slopes, strict=True):
        for j, value in slope.items():
            gradient[i] += factor / temperature * value * others[j].double()
            if own:
                gradient[j] += factor / temperature * value * anchors[i].double()
    return factor * sum(losses), gradient


def value_and_gradient(
    anchors: Tensor, *rest: Tensor | None, backend: str = "triton", **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = anchors.detach().clone().requires_grad_()
    with tritonloss.use_backend(backend):
        value = pixel_contrast_loss(leaf, *rest, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("with_keys", "hardest"), [(False, None), (True, None), (True, 0.3), (True, 1.0)]
)
def test_the_formula_pair_by_pair(
    with_keys: bool, hardest: float | None, backend: str, device: torch.device
) -> None:
    kind = {"dtype": torch.float64, "device": device}
    anchors, labels = embeddings(21, 5, **kind), labels_of(21, 4).to(device)
    keys = embeddings(33, 5, 2, **kind) if with_keys else None
    key_labels = labels_of(33, 3, 3).to(device) if with_keys else None
    expected, gradient = by_pairs(anchors, labels, keys, key_labels, hardest=hardest)
    value, found = value_and_gradient(
        anchors, labels, keys, key_labels, backend=backend, hardest=hardest
    )
    tolerance = 1e-10 if device.type == "cpu" else 2e-6  # numbers reach a GPU in float32
    assert float(value) == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(found, gradient.to(device), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dims", [1, 5, 16, 37, 64, 100])
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_three_ways(dtype: torch.dtype, with_keys: bool, dims: int, device: torch.device) -> None:
    kind = {"dtype": dtype, "device": device}
    anchors, labels = embeddings(37, dims, **kind), labels_of(37, 5).to(device)
    keys = embeddings(83, dims, 2, **kind)
    key_labels = labels_of(83, 4, 3).sort().values.to(device)

    def loss(a: Tensor) -> Tensor:
        if not with_keys:
            return pixel_contrast_loss(a, labels, temperature=0.5)
        return pixel_contrast_loss(a, labels, keys.to(a.dtype), key_labels, temperature=0.5)

    # Slopes are multiplied in 16 bits, each of which is rounded; the yardstick's are not.
    check_three_way(loss, anchors, gradient_tolerance=2.0**-9 if dtype == torch.float16 else None)


@pytest.mark.shipped_sizes
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_ways_with_shipped_tiles(
    dtype: torch.dtype, with_keys: bool, device: torch.device
) -> None:
    kind = {"dtype": dtype, "device": device}
    anchors, labels = embeddings(150, 48, **kind), labels_of(150, 6).to(device)
    keys = embeddings(700, 48, 2, **kind)
    key_labels = labels_of(700, 6, 3).sort().values.to(device)

    def loss(a: Tensor) -> Tensor:
        return pixel_contrast_loss(
            a, labels, *((keys.to(a.dtype), key_labels) if with_keys else ())
        )

    check_three_way(loss, anchors, tolerance=5e-6 if dtype == torch.float32 else None)


@pytest.mark.parametrize("with_keys", [False, True])
def test_gradcheck(with_keys: bool, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("numbers reach a GPU in float32")
    anchors = embeddings(18, 3, dtype=torch.float64).requires_grad_()
    labels = labels_of(18, 3)
    rest = (embeddings(20, 3, 2, dtype=torch.float64), labels_of(20, 3, 3)) if with_keys else ()
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda a: pixel_contrast_loss(a, labels, *rest, temperature=0.7), anchors
        )


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hardest_pairs_with_equal_scores(
    dtype: torch.dtype, share: float, device: torch.device
) -> None:
    """Keys are there several times: of equal ones all or none are taken. Scores of 0 are there."""
    kind = {"dtype": dtype, "device": device}
    anchors, labels = embeddings(20, 8, **kind), labels_of(20, 4).to(device)
    anchors[3] = 0
    keys = embeddings(20, 8, 2, **kind).repeat_interleave(3, 0)
    key_labels = labels_of(20, 3, 3).sort().values.repeat_interleave(3).to(device)
    rest = labels, keys, key_labels
    value, gradient = value_and_gradient(anchors, *rest, hardest=share)
    expected, right = value_and_gradient(
        anchors.double(), labels, keys.double(), key_labels, backend="reference", hardest=share
    )
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    assert (gradient.double() - right).abs().max() <= 4e-6 * right.abs().max()


def no_positive(own: bool) -> tuple[Tensor, ...]:
    anchors = embeddings(20, 6)
    if own:
        return anchors, torch.arange(20)
    return anchors, labels_of(20, 3), embeddings(30, 6, 2), torch.full((30,), 5)


def one_class() -> tuple[Tensor, ...]:
    return embeddings(20, 6), torch.zeros(20, dtype=torch.uint8)


def no_class() -> tuple[Tensor, ...]:
    return embeddings(20, 6), torch.full((20,), -1)


def no_key() -> tuple[Tensor, ...]:
    return embeddings(20, 6), labels_of(20, 3), embeddings(0, 6), labels_of(0, 3)


def no_anchor() -> tuple[Tensor, ...]:
    return embeddings(0, 6), labels_of(0, 3)


EMPTY = {
    "one anchor of each class": no_positive(True),
    "keys of another class": no_positive(False),
    "one class, without negatives": one_class(),
    "no class": no_class(),
    "no key": no_key(),
    "no anchor": no_anchor(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_to_contrast_is_zero(case: str, backend: str, device: torch.device) -> None:
    given = [tensor.to(device) for tensor in EMPTY[case]]
    for hardest in (None, 0.5) if len(given) == 4 else (None,):
        value, gradient = value_and_gradient(*given, backend=backend, hardest=hardest)
        assert value == 0 and gradient.shape == given[0].shape and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchors_without_a_positive_are_not_in_the_mean(backend: str, device: torch.device) -> None:
    anchors, labels = embeddings(24, 6, device=device), labels_of(24, 3, lowest=0).to(device)
    keys = embeddings(30, 6, 2, device=device)
    key_labels = labels_of(30, 3, 3, lowest=0).to(device)
    alone = torch.where(labels == 2, 7, labels)
    expected, _ = value_and_gradient(
        anchors[labels != 2], labels[labels != 2], keys, key_labels, backend=backend
    )
    value, gradient = value_and_gradient(anchors, alone, keys, key_labels, backend=backend)
    torch.testing.assert_close(value, expected)
    assert not gradient[labels == 2].any() and gradient[labels != 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hardest", [None, 0.2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_has_no_class_changes_no_bit(
    value: float, hardest: float | None, backend: str, device: torch.device
) -> None:
    anchors, labels = embeddings(30, 6, device=device), labels_of(30, 3).to(device)
    keys, key_labels = embeddings(50, 6, 2, device=device), labels_of(50, 3, 3).to(device)
    labels[4], key_labels[7] = 255, 255
    own = () if hardest is None else (keys, key_labels)
    for rest in {(), (keys, key_labels), own} if hardest is None else {own}:
        expected = value_and_gradient(anchors, labels, *rest, backend=backend, hardest=hardest)
        none, no_key = ((x < 0) | (x == 255) for x in (labels, key_labels))
        wild = anchors.masked_fill(none[:, None], value)
        spoilt = (keys.masked_fill(no_key[:, None], -value), key_labels) if rest else ()
        found = value_and_gradient(wild, labels, *spoilt, backend=backend, hardest=hardest)
        assert found[0].isfinite() and found[1].isfinite().all()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert not found[1][none].any()


@pytest.mark.parametrize("hardest", [None, 0.2])
def test_what_has_a_class_and_is_no_number(hardest: float | None, device: torch.device) -> None:
    anchors, labels = embeddings(30, 6, device=device), labels_of(30, 3, lowest=0).to(device)
    keys, key_labels = embeddings(50, 6, 2, device=device), labels_of(50, 3, 3).to(device)
    for spoilt in (keys, anchors):
        before, spoilt[9] = spoilt[9].clone(), float("nan")
        key_labels[9] = 1
        for backend in BACKENDS:
            value, _ = value_and_gradient(
                anchors, labels, keys, key_labels, backend=backend, hardest=hardest
            )
            assert value.isnan()
        spoilt[9] = before


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(
    ("scale", "temperature"), [(1.0, 1e-3), (100.0, 0.1), (1e-3, 1e4), (30.0, 1e-4)]
)
def test_long_embeddings_and_small_temperatures(
    scale: float, temperature: float, with_keys: bool, device: torch.device
) -> None:
    """The released code's loss is infinite there. Of scores of 1e7 the rounding is some units."""
    anchors = scale * embeddings(30, 12, dtype=torch.float32, device=device)
    labels = labels_of(30, 3).to(device)
    keys = scale * embeddings(50, 12, 2, dtype=torch.float32, device=device)
    rest: tuple[Tensor, ...] = (labels,)
    if with_keys:
        rest = labels, keys, labels_of(50, 3, 3).to(device)
    value, gradient = value_and_gradient(anchors, *rest, temperature=temperature)
    truth = value_and_gradient(
        anchors.double(), *(x.double() if x.is_floating_point() else x for x in rest),
        temperature=temperature, backend="reference",
    )  # fmt: skip
    assert value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value.double(), truth[0], rtol=2e-6, atol=2e-6)
    rounding = max(scale**2 / temperature * 2e-7, 4e-6)  # of a score, and so of a slope
    assert (gradient.double() - truth[1]).abs().max() <= rounding * truth[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype, device: torch.device) -> None:
    anchors, keys = embeddings(30, 6, device=device), embeddings(50, 6, 2, device=device)
    labels, key_labels = labels_of(30, 3).to(device), labels_of(50, 3, 3).to(device)
    expected = value_and_gradient(anchors, labels, keys, key_labels)
    none = 255 if dtype == torch.uint8 else -7
    given = [torch.where(x < 0, none, x).to(dtype) for x in (labels, key_labels)]
    found = value_and_gradient(anchors, given[0], keys, given[1])
    strided = torch.stack([given[0], given[0]], 1)[:, 0]
    again = value_and_gradient(anchors, strided, keys, given[1])
    for other in (found, again):
        assert torch.equal(other[0], expected[0]) and torch.equal(other[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_labels_are_classes_or_none(backend: str, device: torch.device) -> None:
    """None of 64 bits wraps around into a class; 255 is one where it is not ignored."""
    anchors = embeddings(20, 6, device=device)
    labels = torch.tensor([0, 1, 2, 255] * 5, device=device)
    run = partial(value_and_gradient, backend=backend)
    expected = run(anchors, torch.where(labels == 255, 3, labels))
    for wide in (labels, torch.where(labels == 255, 2**31 - 2, labels)):
        found = run(anchors, wide, ignore_index=None)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    without = run(anchors, torch.where(labels == 255, -1, labels))
    for none in (255, 2**31 - 1, 2**32, 2**63 - 1, -(2**63)):
        found = run(anchors, torch.where(labels == 255, none, labels))
        assert torch.equal(found[0], without[0]) and torch.equal(found[1], without[1])


@pytest.mark.parametrize("dims", [24, 7])
def test_rows_lie_anywhere(dims: int, device: torch.device) -> None:
    anchors, labels = embeddings(30, dims, device=device), labels_of(30, 3).to(device)
    keys, key_labels = embeddings(50, dims, 2, device=device), labels_of(50, 3, 3).to(device)
    anchors, keys = anchors.float(), keys.float()
    expected = value_and_gradient(anchors, labels, keys, key_labels)
    for lay in (
        lambda x: F.pad(x, (3, 2), value=float("nan"))[:, 3:-2],
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 0)[::2],
    ):
        leaf = lay(anchors).detach().requires_grad_()
        with tritonloss.use_backend("triton"):
            value = pixel_contrast_loss(leaf, labels, lay(keys), key_labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert torch.equal(value.detach(), expected[0]) and torch.equal(gradient, expected[1])


def test_the_order_of_keys_does_not_matter_and_the_bits_are_the_same(
    device: torch.device,
) -> None:
    anchors, labels = embeddings(40, 12, device=device), labels_of(40, 4).to(device)
    keys, key_labels = embeddings(90, 12, 2, device=device), labels_of(90, 4, 3).to(device)
    first, again = (value_and_gradient(anchors, labels, keys, key_labels) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    order = key_labels.argsort()
    other = value_and_gradient(anchors, labels, keys[order], key_labels[order])
    torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_that_lie_far_apart(rows: int, tmp_path: Path) -> None:
    """Their distance takes more than 32 bits, or that of the first and the last one does."""
    anchors, labels = embeddings(rows, 8).float(), torch.arange(rows) % 2
    keys, key_labels = embeddings(24, 8, 2).float(), labels_of(24, 2, 3)
    far = far_apart(anchors, 0, tmp_path)
    expected = value_and_gradient(anchors, labels, keys, key_labels)
    leaf = far.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        value = pixel_contrast_loss(leaf, labels, keys, key_labels)
        of_keys = pixel_contrast_loss(keys, key_labels, far, labels)
        near = pixel_contrast_loss(keys, key_labels, anchors, labels)
    assert torch.equal(value.detach(), expected[0]) and torch.equal(of_keys, near)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("hardest", [None, 0.3])
def test_the_same_bits_whatever_the_order_of_programs(
    hardest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    anchors, labels = embeddings(40, 6), labels_of(40, 3)
    rest = labels, embeddings(150, 6, 2), labels_of(150, 3, 3).sort().values
    first = value_and_gradient(anchors, *rest, hardest=hardest)
    builder = interpreter.interpreter_builder
    set_index, seen = builder.set_grid_idx, []

    def set_reversed(x: int, y: int, z: int) -> None:
        seen.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_reversed)
    second = value_and_gradient(anchors, *rest, hardest=hardest)
    assert max(seen) > 2
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_precision_of_float32_and_mixed_dtypes(device: torch.device) -> None:
    """In bf16 the loss is that of rounded embeddings; the gradient keeps the anchors' dtype."""
    anchors, labels = embeddings(30, 24, device=device).float(), labels_of(30, 3).to(device)
    keys, key_labels = embeddings(50, 24, 2, device=device), labels_of(50, 3, 3).to(device)
    rounded = [x.bfloat16() for x in (anchors, keys)]
    truth = value_and_gradient(
        rounded[0].double(), labels, rounded[1].double(), key_labels, backend="reference"
    )
    for a, k, precision in (
        (anchors, keys.float(), "bf16"),
        (rounded[0].float(), rounded[1], "tf32x3"),
        (rounded[0], rounded[1].float(), "tf32x3"),
        (rounded[0], rounded[1].double(), "tf32x3"),
    ):
        value, gradient = value_and_gradient(a, labels, k, key_labels, precision=precision)
        assert gradient.dtype == a.dtype
        assert value.dtype == (torch.float64 if k.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), truth[0], rtol=2e-6, atol=2e-6)
        error = (gradient.double() - truth[1]).abs().max() / truth[1].abs().max()
        assert error <= 2.0**-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    anchors, labels = embeddings(20, 6, device=device).float(), labels_of(20, 3).to(device)
    expected = value_and_gradient(anchors, labels, backend=backend)
    leaf = anchors.clone().requires_grad_()
    with tritonloss.use_backend(backend), torch.autocast(device.type, torch.bfloat16):
        value = pixel_contrast_loss(leaf, labels)
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(torch.autograd.grad(value, leaf)[0], expected[1])


def test_keys_get_no_gradient(device: torch.device) -> None:
    anchors = embeddings(20, 6, device=device).requires_grad_()
    keys = embeddings(30, 6, 2, device=device).requires_grad_()
    for backend in BACKENDS:
        with tritonloss.use_backend(backend):
            value = pixel_contrast_loss(
                anchors, labels_of(20, 3).to(device), keys, labels_of(30, 3, 3).to(device)
            )
        assert torch.autograd.grad(value, keys, allow_unused=True) == (None,)


def test_wrong_arguments() -> None:
    anchors, labels = embeddings(20, 6), labels_of(20, 3)
    wrong: Any
    for wrong, error, message in (
        ((anchors.long(), labels), TypeError, "anchors must be .*; got int64 of shape"),
        ((anchors[0], labels), ValueError, "anchors must be .*D of 1 to 512; got float64"),
        ((torch.zeros(2, 513), labels[:2]), ValueError, "anchors must be .*513"),
        ((anchors, labels[:-1]), ValueError, r"anchor_labels must .* \(20,\) .*\(19,\)"),
        ((anchors, labels.double()), TypeError, "anchor_labels must .*; got float64"),
        ((anchors, labels, anchors), ValueError, "key_labels must be given with keys; got None"),
        ((anchors, labels, None, labels), ValueError, "keys must be given with key_labels"),
        ((anchors, labels, anchors[:, :5], labels), ValueError, "keys must be .*D of 6 as anchors"),
        ((anchors, labels, anchors.to("meta"), labels), ValueError, "keys must be on the device"),
    ):
        with pytest.raises(error, match=message):
            pixel_contrast_loss(*wrong)
    for options, error in (
        ({"temperature": 0.0}, ValueError),
        ({"temperature": "cold"}, TypeError),
        ({"base_temperature": -1.0}, ValueError),
        ({"hardest": 0.0}, ValueError),
        ({"hardest": 0.1}, ValueError),
        ({"precision": "float16"}, ValueError),
        ({"ignore_index": 1.5}, TypeError),
        ({"process_group": "gloo"}, TypeError),
    ):
        with pytest.raises(error, match=f"^{next(iter(options))} must be"):
            pixel_contrast_loss(anchors, labels, **options)  # type: ignore[arg-type]
    wrong = "bank"
    maps, target = torch.randn(1, 6, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="bank must be a MemoryBank or None; got str"):
        tritonloss.PixelContrastLoss()(maps, target, target, wrong)
