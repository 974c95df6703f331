"""Logits that are not finite, and labels out of range: no crash, and both backends' NaN agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests import hostile
from tests.oracle import as_layout, segmentation_case, value_and_gradients
from tests.slices import OF_LABELS, is_pixelwise, is_upsampled, operators_with, with_more
from tritonloss import linalg
from tritonloss._core.configurations import forced
from tritonloss.functional import (
    binary_cross_entropy,
    cross_entropy,
    focal_loss,
    margin_calibrated_loss,
    rmi_loss,
    ssim,
    ssim_loss,
    structural_similarity_loss,
)

pytestmark = pytest.mark.parity

NAN, INF = float("nan"), float("inf")
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
VALUES = pytest.mark.parametrize("value", [NAN, INF, -INF])
NO_NUMBER = pytest.mark.parametrize("value", [NAN, INF])

# A corner, a border, the centre and the opposite corner of 5 x 6 pixels.
PLACES = ((0, 0), (0, 3), (2, 3), (4, 5))


@pytest.fixture(autouse=True)
def small_programs() -> Iterator[None]:
    """Programs of few pixels, and of several blocks of classes."""
    pixels = {"PIXELS": 64, "CLASS_LANES": 4, "UNROLL": 4, "num_warps": 1}
    strips = {"COLUMNS": 2, "LANES": 32, "ROWS": 16, "num_warps": 1}
    with ExitStack() as stack:
        for operator in operators_with("COLUMNS"):
            stack.enter_context(forced(operator, strips))
        for operator in operators_with("PIXELS"):
            stack.enter_context(forced(operator, pixels))
        yield


COMMAND = (sys.executable, "-W", "ignore", "-m", "tests.hostile")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def children() -> Iterator[subprocess.Popen[str] | None]:
    """A process that has imported everything, and has a child for each slice; None on a GPU.

    Who has seen a GPU can have no children.
    """
    if torch.cuda.is_available():
        yield None
        return
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process


@pytest.mark.parametrize("name", hostile.SLICES)
def test_hostile_values_end_no_process(name: str, children: subprocess.Popen[str] | None) -> None:
    """Logits, labels and saved maps full of NaN, infinities and extreme integers, every layout."""
    if children is None:
        ended = subprocess.run([*COMMAND, name], cwd=ROOT, capture_output=True, text=True)
        status, said = ended.returncode, f"{ended.stdout}\n{ended.stderr}"
    else:
        assert children.stdin is not None and children.stdout is not None
        print(name, file=children.stdin, flush=True)
        status, said = json.loads(children.stdout.readline())
    assert status == 0, f"status {status}\n{said}"


def case_with(
    value: float,
    classes: int,
    *,
    places: Sequence[tuple[int, int]] = PLACES,
    other: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A wrong logit beside an ignored pixel: an image for each place, and one that is clean.

    It is the pixel's own class in every second image, or, if `other`, in the images between.
    """
    logits, target = segmentation_case((len(places) + 1, classes, 5, 6))
    for image, (row, column) in enumerate(places):
        own = min(int(target[image, row, column]), classes - 1)
        target[image, row, column] = own
        target[image, row, column - 1 if column else 1] = 255
        logits[image, (own + (image + other) % 2) % classes, row, column] = value
    return logits.to(device), target.to(device)


def assert_same(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Value and gradient from the kernels, held to the reference's element by element.

    A NaN must be a NaN in both.
    """
    (found, gradient), (expected, truth) = (
        (output[0], slope[0])
        for output, slope in (
            value_and_gradients(function, [x], b) for b in ("triton", "reference")
        )
    )
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    finite = truth.isfinite()
    torch.testing.assert_close(gradient.isfinite(), finite)
    assert finite[-1].all()  # of the clean image
    allowed = tolerance * truth[finite].abs().max().item()
    torch.testing.assert_close(gradient[finite], truth[finite], rtol=tolerance, atol=allowed)
    return found, gradient


CLASSES = 5
WEIGHTS = torch.linspace(0.0, 2.0, CLASSES)  # one of them 0


def far_offsets(logits: Tensor, target: Tensor) -> tuple[Any, ...]:
    weights = WEIGHTS.to(logits.device)
    return logits, target, tritonloss.MarginOffsets(weights, 0.1 + weights)


# Beside what the slices show: tables of the classes, and other exponents of focal loss.
MORE: dict[str, Any] = {
    "cross_entropy": {
        "plain": {},
        "weighted": {"options": {"weight": WEIGHTS}},
        "both": {"options": {"weight": WEIGHTS, "label_smoothing": 0.1}},
    },
    "binary_cross_entropy": {"weighted": {"options": {"pos_weight": WEIGHTS}}},
    "focal_loss": {
        "half": {"options": {"gamma": 0.5}},
        "zero": {"options": {"gamma": 0.0}},
        "detached": {"options": {"gamma": 3.5, "detach_weight": True}},
        "weighted": {"options": {"alpha": WEIGHTS, "gamma": 1.0}},
    },
    "margin_calibrated_loss": {
        f"far {variant}": {"options": {"variant": variant}, "arguments": far_offsets}
        for variant in ("paper", "released", "margin")
    },
}
PIXELWISE = with_more(
    {n: e for n, e in OF_LABELS.items() if is_pixelwise(e) and not is_upsampled(e)}, MORE
)


def pixelwise(name: str, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of every pixel, as a function of the logits alone."""
    way = PIXELWISE[name]
    tables = {
        key: value.to(target.device)
        for key, value in way.options.items()
        if isinstance(value, Tensor)
    }
    return lambda logits: way(logits, target, reduction="none", **tables)[0]


@LAYOUTS
@VALUES
@pytest.mark.parametrize("name", PIXELWISE)
def test_pixelwise_losses(name: str, value: float, layout: str, device: torch.device) -> None:
    """The value is in one class of a pixel, in two, in all but two, and in all of them."""
    for other in (False, True):
        logits, target = case_with(value, CLASSES, other=other, device=device)
        target[1:4, 3, 2] = 2
        logits[1, 2:4, 3, 2] = value
        logits[2, :3, 3, 2] = value
        logits[3, :, 3, 2] = value
        found, gradient = assert_same(pixelwise(name, target), as_layout(logits, layout))
        if value != value:
            spoilt = logits.isnan().any(1)
            assert torch.equal(found.isnan(), spoilt & (target != 255))
            # One sigmoid knows nothing of another; in all other losses classes compete.
            alone = PIXELWISE[name].function is binary_cross_entropy
            wrong = logits.isnan() if alone else spoilt[:, None]
            assert torch.equal(gradient.isnan(), wrong.expand_as(logits))


@LAYOUTS
@pytest.mark.parametrize("variant", ["paper", "released", "margin"])
def test_margins_that_are_no_number(variant: str, layout: str, device: torch.device) -> None:
    """A single infinite score has margins, two that are largest have none."""
    scores = torch.tensor(
        [[INF, 1.0, 0.0], [INF, INF, 0.0], [-INF, 1.0, 0.0], [-INF, -INF, 0.0], [-INF] * 3]
    )
    logits = scores.view(5, 3, 1, 1).to(device)
    offsets = (torch.full((3,), 0.5, device=device), torch.full((3,), 0.5, device=device))
    for label in range(3):
        target = torch.full((5, 1, 1), label, device=device)
        loss = partial(
            margin_calibrated_loss, target=target, offsets=offsets, variant=variant,
            reduction="none",
        )  # fmt: skip
        leaf = as_layout(logits, layout).requires_grad_()
        with tritonloss.use_backend("triton"):
            value = loss(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        undefined = [False, True, False, False, True]
        assert value.isnan().flatten().tolist() == undefined
        assert gradient.isnan().all(1).flatten().tolist() == undefined
        assert gradient.isnan().any(1).flatten().tolist() == undefined


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_focal_loss_of_an_impossible_class(
    gamma: float, backend: str, device: torch.device
) -> None:
    """-log p where p is 0, as cross entropy has it; as the limit of ever lower logits."""
    logits = torch.tensor([-INF, 1.0, 0.5], device=device).view(1, 3, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)
    results = []
    for own in (-INF, -90.0):
        leaf = logits.where(logits.isfinite(), own).requires_grad_()
        with tritonloss.use_backend(backend):
            value = focal_loss(leaf, target, gamma=gamma)
        results.append((value.item(), torch.autograd.grad(value, leaf)[0]))
    assert results[0][0] == INF
    expected = F.one_hot(target.long(), 3).movedim(-1, 1)
    expected = logits.softmax(1) - expected
    torch.testing.assert_close(results[0][1], expected)
    torch.testing.assert_close(results[1][1], expected, rtol=1e-4, atol=1e-6)


@LAYOUTS
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_classes_of_no_weight_have_no_mean(
    smoothing: float, backend: str, layout: str, device: torch.device
) -> None:
    """NaN, value and gradient, as torch has it: also with weights for classes that are absent."""
    logits, target = segmentation_case((1, 3, 4, 5), device=device)
    target[target == 2] = 0
    weight = torch.tensor([0.0, 0.0, 1.0], device=device)
    results = []
    for loss in (cross_entropy, F.cross_entropy):
        leaf = as_layout(logits, layout).detach().requires_grad_()
        labels = target if loss is cross_entropy else target.long()
        with tritonloss.use_backend(backend):
            value = loss(leaf, labels, weight=weight, label_smoothing=smoothing, ignore_index=255)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    assert results[0][0].isnan() and (target == 255).any()
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


@NO_NUMBER
@pytest.mark.parametrize(
    ("window_size", "padding", "layout"),
    [
        (1, "zeros", "contiguous"),
        (3, "zeros", "contiguous"),
        (3, "zeros", "channels_last"),
        (3, "reflect", "contiguous"),
        (3, "replicate", "contiguous"),
        (3, "valid", "contiguous"),
    ],
)
def test_gaussian_statistics(
    window_size: int, padding: str, value: float, layout: str, device: torch.device
) -> None:
    """Nothing is finite in a window that holds the pixel, everything in all others."""
    x, _ = case_with(value, 2, device=device)
    options = {"window_size": window_size, "padding": padding}
    found, gradient = assert_same(
        lambda x: torch.stack(tritonloss.gaussian_statistics(x, **options)), as_layout(x, layout)
    )
    if padding == "zeros":
        reach = window_size // 2
        assert torch.equal(~found.isfinite(), within(x, reach).expand_as(found))
        assert torch.equal(~gradient.isfinite(), within(x, 2 * reach))


def within(x: Tensor, reach: int) -> Tensor:
    """Pixels that are no further than `reach` from one that is not finite, along both axes."""
    wrong = (~x.isfinite()).float()
    return F.max_pool2d(wrong, 2 * reach + 1, 1, reach) > 0


@pytest.mark.parametrize("columns", [1, 4])
def test_gaussian_statistics_below_a_nan(columns: int, device: torch.device) -> None:
    """A strip carries means from row to row: no NaN may stay in them."""
    x = torch.rand(1, 1, 24, 5, generator=torch.Generator().manual_seed(0)).to(device)
    x[0, 0, 4, 2] = NAN
    leaf = x.clone().requires_grad_()
    with forced("gaussian_statistics_backward", {"COLUMNS": columns, "ROWS": 64}):
        with tritonloss.use_backend("triton"):
            mean, variance = tritonloss.gaussian_statistics(leaf)
        (gradient,) = torch.autograd.grad(mean.sum() + variance.sum(), leaf)
    assert torch.equal(gradient.isnan(), within(x, 2))


@NO_NUMBER
@pytest.mark.parametrize("padding", ["zeros", "reflect", "valid"])
@pytest.mark.parametrize("window_size", [1, 3])
def test_ssim(window_size: int, padding: str, value: float, device: torch.device) -> None:
    x, _ = case_with(value, 1, device=device)
    x = torch.where(x.isfinite(), x.sigmoid(), x)
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"window_size": window_size, "padding": padding, "reduction": "none"}
    found, gradient = assert_same(lambda x: ssim(x, y, **options), x, tolerance=1e-4)
    assert_same(lambda x: ssim(y, x, **options), x, tolerance=1e-4)
    if padding == "zeros":
        reach = window_size // 2
        assert torch.equal(~found.isfinite(), within(x, reach))
        assert torch.equal(~gradient.isfinite(), within(x, 2 * reach))


@pytest.mark.parametrize(
    ("window_size", "form", "value"),
    [
        (1, "full", NAN),
        (1, "full", -INF),
        (1, "contrast_structure", NAN),
        (3, "full", NAN),
        (3, "full", INF),
        (3, "contrast_structure", NAN),
    ],
)
def test_ssim_loss(window_size: int, form: str, value: float, device: torch.device) -> None:
    """Infinite logits are probabilities of 0 and 1."""
    logits, target = case_with(value, 2, places=PLACES[1:3], device=device)
    loss = partial(ssim_loss, target=target, window_size=window_size, form=form)
    found, gradient = assert_same(loss, logits, tolerance=1e-4)
    assert found.isnan() == (value != value)
    near = within(logits, 2 * (window_size // 2)) & (target != 255)[:, None]
    assert torch.equal(~gradient.isfinite(), near & (value != value))


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"window_size": 1},
    {"padding": "reflect"},
    {"padding": "replicate"},
    {"padding": "valid"},
    {"hard_mining": False, "reweight": False},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_structural_similarity_loss(options: dict[str, Any], device: torch.device) -> None:
    logits, target = case_with(NAN, 2, places=PLACES[:3], device=device)
    found, _ = assert_same(partial(structural_similarity_loss, target=target, **options), logits)
    assert found.isnan()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_structural_similarity_loss_under_each_schedule(
    schedule: str, value: float, device: torch.device
) -> None:
    """A NaN is in every e of its windows; an infinite logit is a probability of 0 or 1."""
    logits, target = case_with(value, 2, device=device)
    with forced("structural_similarity_forward", {"schedule": schedule}):
        found, gradient = assert_same(partial(structural_similarity_loss, target=target), logits)
    assert not found.isfinite()
    near = within(logits, 1) & (target != 255)[:, None] & (value != value)
    assert torch.equal(~gradient.isfinite(), near)


REGIONS: list[dict[str, Any]] = [
    {"pooling": None, "region_size": 2},
    {"pooling": "avg", "region_size": 1},
    {"pooling": "max", "region_size": 1},
    {"pooling": "max", "region_size": 1, "precision": "float32"},
    {"pooling": "nearest", "region_size": 1},
    {"pooling": "avg", "region_size": 1, "ignore": "drop"},
]


@VALUES
@pytest.mark.parametrize("options", REGIONS, ids=str)
def test_rmi_loss(options: dict[str, Any], value: float, device: torch.device) -> None:
    """A NaN is in the whole of its class and image; infinite logits are probabilities 0 and 1."""
    logits, target = case_with(value, 2, places=PLACES[1:3], device=device)
    found, gradient = assert_same(
        partial(rmi_loss, target=target, pool_size=2, **options), logits, tolerance=1e-3
    )
    assert not found.isfinite()
    assert gradient[~logits.isfinite()].isnan().all() == (value != value)
    untouched = logits.isfinite().all(-1).all(-1)
    assert gradient[untouched].isfinite().all()


@pytest.mark.parametrize("order", [3, 12])
@pytest.mark.parametrize("name", ["cholesky_ex", "logdet", "inv", "solve"])
def test_linalg(name: str, order: int, device: torch.device) -> None:
    """A NaN in the lower triangle spoils its matrix, and no other; above it is not read."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, order, order, generator=generator, dtype=torch.float64)
    A = (A @ A.mT + order * torch.eye(order, dtype=torch.float64)).to(device)
    A[0, 0, 0], A[1, order - 1, 1], A[2, 0, 1] = NAN, NAN, NAN
    B = torch.ones(4, order, 2, dtype=torch.float64, device=device)

    def function(A: Tensor) -> Tensor:
        if name == "solve":
            return linalg.solve(A, B)
        result: Any = getattr(linalg, name)(A)
        return result if isinstance(result, Tensor) else result[0]

    results = [value_and_gradients(function, [A], b) for b in ("triton", "reference")]
    (found, *_), (gradient, *_) = results[0]
    spoilt = torch.stack([matrix.isnan().any() for matrix in found])
    assert spoilt.tolist() == [True, True, False, False] and found[2:].isfinite().all()
    torch.testing.assert_close(found, results[1][0][0], equal_nan=True)
    torch.testing.assert_close(gradient[2:], results[1][1][0][2:])
