"""Structural similarity loss: the kernels against the reference, on both schedules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.oracle import (
    LAYOUTS,
    as_layout,
    check_three_way,
    segmentation_case,
    settled_case,
    unaligned,
)
from tritonloss._core import checks, configurations
from tritonloss.functional import structural_similarity_loss

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

# e is a ratio over a C4 of 0.01: a rounding error of 6e-8 in a mean is one of 1e-5 in a weight.
WEIGHT_TOLERANCE = 2e-5


# Windows of four columns per lane and of two, with labels of every size.
UNALIGNED = [
    (3, 13, torch.uint8),
    (5, 14, torch.int16),
    (7, 133, torch.int64),
    (11, 21, torch.uint8),
    (9, 20, torch.int32),
]


@pytest.fixture(params=["recompute", "stored"])
def schedule(request: pytest.FixtureRequest, small_programs: dict[str, int]) -> Iterator[str]:
    configuration = {**small_programs, "schedule": request.param}
    with configurations.forced("structural_similarity_forward", configuration):
        yield request.param


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    check_three_way(
        partial(structural_similarity_loss, target=target, **options),
        logits,
        tolerance=WEIGHT_TOLERANCE,
    )


def kernel_gradient(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = structural_similarity_loss(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "valid"])
@pytest.mark.parametrize("window_size", [1, 3, 5, 11])
@pytest.mark.shipped_sizes
def test_every_window_and_padding(
    window_size: int, padding: str, schedule: str, device: torch.device
) -> None:
    window = {"window_size": window_size, "padding": padding}
    height = window_size + 1 if padding == "valid" else 6
    check(*settled_case((1, 2, height, 20), device=device, **window), **window)


@pytest.mark.parametrize("window_size", [3, 7])
@pytest.mark.shipped_sizes
def test_columns_that_fill_no_chunk(window_size: int, device: torch.device) -> None:
    logits, target = settled_case((1, 2, 5, 21), window_size=window_size, device=device)
    check(logits, target, window_size=window_size)


@pytest.mark.shipped_sizes
def test_largest_window(device: torch.device) -> None:
    window = {"window_size": 31, "sigma": 5.0}
    check(*settled_case((1, 2, 2, 18), device=device, **window), **window)


@pytest.mark.parametrize(
    "options",
    [
        {"hard_mining": False},
        {"reweight": False},
        {"hard_mining": False, "reweight": False},
        {"hard_mining": False, "padding": "valid"},
        {"bce_weight": 0.0},
        {"bce_weight": 1.0},
        {"beta": 0.0},
        {"beta": 0.3},
        {"stability": 1e-4},
        {"stability": 1.0},
        {"sigma": 0.3},
        {"sigma": 1e6},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any], schedule: str, device: torch.device) -> None:
    relevant = {key: options[key] for key in ("beta", "stability", "sigma") if key in options}
    check(*settled_case((1, 2, 6, 12), device=device, **relevant), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype: torch.dtype, schedule: str, device: torch.device) -> None:
    check(*settled_case((2, 2, 6, 12), dtype=dtype, device=device))


def test_share_of_the_cross_entropy_has_the_digits_of_float64(device: torch.device) -> None:
    """A kernel takes no number of 64 bits: the share comes in two halves."""
    logits, target = settled_case((1, 2, 4, 5), dtype=torch.float64, device=device)
    loss, _ = kernel_gradient(logits, target, bce_weight=0.3)
    with tritonloss.use_backend("reference"):
        expected = structural_similarity_loss(logits, target, bce_weight=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("padding", ["zeros", "valid"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 3), (3, 1, 5, 3), (1, 2, 3, 139), (2, 1, 11, 66), (1, 5, 7, 4)], ids=str
)
def test_every_shape(shape: tuple[int, ...], padding: str, device: torch.device) -> None:
    """Sizes are odd, prime, wider and higher than a program's strip, with H != W and one class."""
    check(*settled_case(shape, padding=padding, margin=1e-4, device=device), padding=padding)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("contiguous", (1, 1, 66, 9)),
        ("contiguous", (1, 1, 2, 518)),
        ("channels_last", (1, 2, 2, 260)),
    ],
)
@pytest.mark.shipped_sizes
def test_more_pixels_than_a_program_of_the_shipped_size(
    layout: str, shape: tuple[int, ...], device: torch.device
) -> None:
    check(*settled_case(shape, layout=layout, margin=1e-4, device=device))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 7), (2, 1, 4, 1)], ids=str)
def test_images_smaller_than_the_window(shape: tuple[int, ...], device: torch.device) -> None:
    check(*settled_case(shape, window_size=7, device=device), window_size=7)


def test_empty_batch(schedule: str, device: torch.device) -> None:
    logits = torch.zeros(0, 3, 8, 9, device=device)
    loss, gradient = kernel_gradient(logits, logits[:, 0].to(torch.uint8))
    assert loss == 0 and loss.shape == () and gradient.shape == logits.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, schedule: str, device: torch.device) -> None:
    check(*settled_case((2, 3, 5, 8), layout=layout, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_labels(layout: str, device: torch.device) -> None:
    logits, target = settled_case((2, 2, 5, 8), device=device)
    spread = as_layout(target, layout)
    options = {"hard_mining": False} if layout == "expanded" else {}
    check(logits, spread, **options)


@pytest.mark.parametrize(("window_size", "width", "label_dtype"), UNALIGNED)
@pytest.mark.shipped_sizes
def test_unaligned_maps(
    window_size: int, width: int, label_dtype: torch.dtype, schedule: str, device: torch.device
) -> None:
    """Rows that begin anywhere in a chunk: of odd widths, and of parts of larger maps."""
    shape = (1, 2, 7, width)
    window = {"window_size": window_size}
    logits, target = settled_case(shape, label_dtype=label_dtype, device=device, **window)
    check(logits, target, **window)
    check(unaligned(logits, 3), unaligned(target, 2), **window)


def test_every_label_dtype(device: torch.device) -> None:
    logits, target = settled_case((1, 2, 5, 8), device=device)
    expected = kernel_gradient(logits, target)
    for dtype in (torch.int16, torch.int32, torch.int64):
        loss, gradient = kernel_gradient(logits, target.to(dtype))
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [
        (0, torch.uint8),
        (-1, torch.int16),
        (-100, torch.int64),
        (300, torch.int16),
        (2**32 + 1, torch.int64),
        (-(2**31), torch.int32),
    ],
)
def test_every_ignore_label(
    ignore_index: int, label_dtype: torch.dtype, schedule: str, device: torch.device
) -> None:
    case = settled_case(
        (1, 3, 5, 8), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check(*case, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [None, 255, 257, -255])
def test_ignore_labels_that_do_not_occur(ignore_index: int | None, device: torch.device) -> None:
    """257 is 1 in eight bits, and so is -255: no class may vanish for that."""
    logits, target = settled_case((1, 2, 5, 8), ignore_index=None, device=device)
    check(logits, target, ignore_index=ignore_index)


def test_absent_and_lone_classes(device: torch.device) -> None:
    logits, _ = segmentation_case((1, 4, 6, 12), device=device)
    target = torch.full((1, 6, 12), 2, dtype=torch.uint8, device=device)
    target[0, 3, 7] = 1
    check(logits, target, hard_mining=False)


def test_many_classes_in_eight_bits(device: torch.device) -> None:
    """200 is negative in eight signed bits."""
    logits, target = segmentation_case((1, 201, 2, 3), device=device)
    logits = as_layout(logits, "channels_last")
    target[0, 0, 1] = 200
    check(logits, target, hard_mining=False)


@pytest.mark.parametrize("outside", [2, 254, 257, -1, 2**32 + 1])
def test_labels_out_of_range(
    outside: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 2, 5, 8), label_dtype=torch.int64, device=device)
    target[0, 2, 3:5] = outside
    if device.type == "cpu":
        for backend in ("triton", "reference"):
            with (
                tritonloss.use_backend(backend),
                pytest.raises(ValueError, match=rf"target .*got 2 labels .*{outside} \(2x\)"),
            ):
                structural_similarity_loss(logits, target)
    # Where labels are not checked, those count as ignored.
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    loss, gradient = kernel_gradient(logits, target)
    expected = kernel_gradient(logits, target.where(target != outside, 255))
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("padding", ["zeros", "valid"])
def test_all_pixels_ignored(padding: str, schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 5, 8), device=device)
    loss, gradient = kernel_gradient(logits, target.fill_(255), padding=padding)
    assert loss == 0 and (gradient == 0).all()


def test_no_sample_is_hard(schedule: str, device: torch.device) -> None:
    """M = 0: the cross entropy alone remains."""
    target = torch.zeros(1, 5, 8, dtype=torch.uint8, device=device)
    logits = torch.tensor([20.0, -20.0], device=device).view(1, 2, 1, 1).repeat(1, 1, 5, 8)
    loss, gradient = kernel_gradient(logits, target, beta=0.9, bce_weight=0.25)
    bce = 2 * F.softplus(torch.tensor(-20.0, dtype=torch.float64)).item()
    assert loss.item() == pytest.approx(0.25 * bce, rel=1e-5)
    assert gradient.abs().max().item() == pytest.approx(0.25 * bce / 2 / 40, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4])
def test_ignored_pixels_do_no_harm(value: float, schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    expected = kernel_gradient(logits.where((target != 255)[:, None], 0), target)
    loss, gradient = kernel_gradient(logits.where((target != 255)[:, None], value), target)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert (gradient[(target == 255)[:, None].expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(
    value: float, schedule: str, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 3, 6, 12), ignore_index=None, device=device)
    logits[0, :, 2, 5] = value
    loss, _ = kernel_gradient(logits, target)
    assert not loss.isfinite()


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_huge_and_equal_logits(scale: float, schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    check(scale * logits.sign(), target, hard_mining=False)


@pytest.mark.parametrize("window_size", [3, 7, 11])
def test_weights_on_flat_confident_maps(
    window_size: int, schedule: str, device: torch.device
) -> None:
    """Plain float32 moments are off by 0.05 there and flip a quarter of the mask."""
    generator = torch.Generator().manual_seed(0)
    logits = 1e-2 * torch.randn((1, 2, 13, 40), generator=generator).to(device)
    logits += torch.tensor([-8.0, 8.0], device=device).view(1, 2, 1, 1)
    target = torch.zeros(1, 13, 40, dtype=torch.uint8, device=device)
    target[0, 6, 30] = 1  # seen by windows from afar: variances of 1e-6
    options = {"window_size": window_size, "padding": "replicate"}
    truth = kernels_reference.structural_difference(logits.double(), target, **options)
    # Confidently wrong nearly everywhere: there dL/dz = (p - y) e / M loses no digit of e.
    _, gradient = kernel_gradient(logits, target, bce_weight=0.0, hard_mining=False, **options)
    y = torch.stack((target == 0, target == 1), 1).double()
    e = gradient.double() * logits.numel() / (logits.double().sigmoid() - y)
    wrong = (target == 0)[:, None].expand_as(e)
    assert (e - truth)[wrong].abs().max() < 1e-4

    p = logits[:, 1:].sigmoid()
    mean, _ = kernels_reference.gaussian_statistics(p, **options)
    square, _ = kernels_reference.gaussian_statistics(p * p, **options)
    deviation = (square - mean * mean).clamp(min=0).sqrt()
    naive = (1 - (p - mean + 0.01) / (deviation + 0.01)).abs()
    assert (naive - truth[:, 1:])[..., :20].abs().max() > 1e-2


def test_figure_2_of_the_paper(device: torch.device) -> None:
    y = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1]])
    p = torch.tensor([[0.1, 0.1, 0.1], [0.8, 0.8, 0.9], [0.8, 0.9, 0.8]])
    # Wrapped around, every 3 x 3 window holds the whole patch; class 0 mirrors class 1.
    logits = F.pad(p.logit()[None, None], (1, 1, 1, 1), mode="circular")
    logits = torch.cat((-logits, logits), 1).to(device)
    target = F.pad(y[None, None].float(), (1, 1, 1, 1), mode="circular")[0].to(device, torch.uint8)

    patch = (slice(None), slice(1, -1), slice(1, -1))
    loss, _ = kernel_gradient(logits[:, :, 1:-1, 1:-1], target[patch], bce_weight=1.0)
    assert 9 * loss.item() / 2 == pytest.approx(2.805, abs=1e-3)
    loss, gradient = kernel_gradient(
        logits,
        target,
        sigma=1e6,
        stability=1e-9,
        bce_weight=0.0,
        padding="valid",
        hard_mining=False,
    )
    assert 9 * loss.item() == pytest.approx(3.060, abs=1e-3)
    # dL/dz = (p - y) e / 18, at the middle pixel of class 1, whose label is 0
    e = 18 * gradient[0, 1, 2, 2].item() / 0.8
    share = e * -torch.tensor(0.2).log().item() / (9 * loss.item())
    assert share == pytest.approx(0.91, abs=5e-3)


def test_gradient_is_that_of_the_value(schedule: str, device: torch.device) -> None:
    """With reweight=False no live quantity is held constant: finite differences must agree."""
    logits, target = settled_case((1, 2, 4, 5), dtype=torch.float64, device=device)
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda z: structural_similarity_loss(z, target, reweight=False),
            logits.requires_grad_(),
            fast_mode=True,
        )


def test_e_and_the_mask_are_constants(device: torch.device) -> None:
    """dL/dz = (p - y) (lam m / V + (1 - lam) e f / M): elementwise, from e by itself."""
    logits, target = settled_case((1, 2, 6, 12), device=device)
    valid = (target != 255)[:, None]
    y = (target[:, None] == torch.arange(2, device=device).view(1, -1, 1, 1)).double()
    e = kernels_reference.structural_difference(logits.double(), target)
    hard = valid & (e > 0.1 * kernels_reference.largest_difference(3, 1.5, 0.01))
    expected = (logits.double().sigmoid() - y) * (
        0.3 * valid / valid.sum() + 0.7 * e * hard / hard.sum()
    )
    _, gradient = kernel_gradient(logits, target, bce_weight=0.3)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-7)


def test_backward_twice_and_logits_reused(schedule: str, device: torch.device) -> None:
    x = segmentation_case((1, 2, 6, 12), device=device)[0].requires_grad_()
    target = segmentation_case((1, 2, 6, 12), device=device)[1]
    with tritonloss.use_backend("triton"):
        loss = structural_similarity_loss(x, target)
    total = loss + x.softmax(1).square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * total, x)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)


def test_gradients_accumulate(schedule: str, device: torch.device) -> None:
    """The stored buffer becomes the gradient: the next loss must not find it taken."""
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    leaf = logits.clone().requires_grad_()
    with tritonloss.use_backend("triton"):
        for _ in range(2):
            structural_similarity_loss(leaf, target).backward()
    torch.testing.assert_close(leaf.grad, 2 * kernel_gradient(logits, target)[1])


def test_no_gradient_wanted(schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    expected, _ = kernel_gradient(logits, target)
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                loss = structural_similarity_loss(logits, target)
                assert torch.equal(loss, expected) and not loss.requires_grad


def test_logits_are_left_alone(schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 12), device=device)
    before, labels = logits.clone(), target.clone()
    kernel_gradient(logits, target)
    assert torch.equal(logits, before) and torch.equal(target, labels)


@pytest.mark.shipped_sizes
def test_same_bits_every_time(schedule: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 5, 40), device=device)
    first, second = (kernel_gradient(logits, target) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_gradient_may_be_changed_between_backwards(schedule: str, device: torch.device) -> None:
    """The gradient that autograd hands out is the caller's: accumulated into, zeroed, clipped."""
    logits, target = segmentation_case((1, 2, 5, 8), device=device)
    leaf = logits.requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = structural_similarity_loss(leaf, target, window_size=3)
    for _ in range(3):
        loss.backward(retain_graph=True)
    thrice = leaf.grad.clone()
    leaf.grad.zero_()
    loss.backward()
    torch.testing.assert_close(thrice, 3 * leaf.grad)


def test_confident_pixels_keep_their_gradient(schedule: str, device: torch.device) -> None:
    """For a pixel of the class with p near 1 the gradient is -sigmoid(-z), not a rounding error."""
    logits = torch.full((1, 1, 2, 4), 14.0, device=device)
    target = torch.ones(1, 2, 4, dtype=torch.int64, device=device)
    _, gradient = kernel_gradient(logits, target, bce_weight=1.0)
    torch.testing.assert_close(gradient, -torch.sigmoid(-logits) / 8, rtol=1e-5, atol=0)


def test_ignore_label_that_its_dtype_cannot_hold(device: torch.device) -> None:
    """129 is a class, but no label of eight bits can be 129: nothing is ignored."""
    logits = as_layout(torch.randn(1, 130, 1, 2, device=device), "channels_last")
    target = torch.zeros(1, 1, 2, dtype=torch.int8, device=device)
    expected, _ = kernel_gradient(logits, target, ignore_index=None)
    value, _ = kernel_gradient(logits, target, ignore_index=129)
    assert value == expected


def test_compiled_once_for_heads_of_different_classes(device: torch.device) -> None:
    """A second class count makes C symbolic under torch.compile."""
    torch._dynamo.reset()
    compiled = torch.compile(structural_similarity_loss, fullgraph=True, backend="aot_eager")
    for classes in (2, 3):
        logits, target = segmentation_case((1, classes, 3, 4), device=device)
        with tritonloss.use_backend("triton"):
            expected, gradient = kernel_gradient(logits, target)
            leaf = logits.detach().requires_grad_()
            loss = compiled(leaf, target)
        loss.backward()
        assert torch.equal(loss.detach(), expected) and torch.equal(leaf.grad, gradient)
