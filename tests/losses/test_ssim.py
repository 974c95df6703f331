"""SSIM of images and the SSIM losses: the kernels against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels_reference
import tritonloss
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case
from tritonloss._core import checks
from tritonloss.functional import ssim, ssim_loss

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

# The gradient divides by E^2 or D E, with E down to C2 = 9e-4 and D down to C1 = 1e-4.
TOLERANCE = 2e-5
FORMS = ("full", "contrast_structure")
PADDINGS = ("zeros", "valid", "reflect")


def images(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An image of flat areas and noise, and a version of it that is noisier still."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape
    flat = torch.rand((batch, channels, height // 4 + 1, width // 4 + 1), generator=generator)
    x = flat.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]
    x = x + 0.05 * torch.randn(shape, generator=generator)
    y = 0.9 * x + 0.1 * torch.randn(shape, generator=generator)
    return x.to(device, dtype), y.to(device, dtype)


def check_images(x: Tensor, y: Tensor, **options: Any) -> None:
    check_three_way(partial(ssim, **options), x, y, tolerance=TOLERANCE)


def check_loss(
    logits: Tensor, target: Tensor, tolerance: float = TOLERANCE, **options: Any
) -> None:
    check_three_way(partial(ssim_loss, target=target, **options), logits, tolerance=tolerance)


def kernel_gradient(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = ssim_loss(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window_size", [1, 3, 11])
@pytest.mark.shipped_sizes
def test_every_window_and_padding(window_size: int, padding: str, device: torch.device) -> None:
    x, y = images(1, 1, 11 if padding == "valid" else 6, 14, device=device)
    check_images(x, y, window_size=window_size, padding=padding, reduction="none")


@pytest.mark.parametrize("padding", PADDINGS)
def test_mean_over_the_map(padding: str, device: torch.device) -> None:
    check_images(*images(2, 2, 5, 9, device=device), window_size=3, padding=padding)


@pytest.mark.parametrize(
    "options", [{"data_range": 255.0}, {"data_range": 0.5}, {"sigma": 0.4}, {"sigma": 1e6}], ids=str
)
def test_every_option_of_ssim(options: dict[str, float], device: torch.device) -> None:
    x, y = images(1, 1, 6, 9, device=device)
    scale = options.get("data_range", 1.0)
    check_images(scale * x, scale * y, window_size=5, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_image_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_images(*images(1, 2, 6, 9, dtype=dtype, device=device), window_size=3, reduction="none")


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (2, 1, 11, 5), (1, 1, 3, 139)], ids=str)
def test_every_image_shape(shape: tuple[int, ...], device: torch.device) -> None:
    check_images(*images(*shape, device=device), window_size=3, reduction="none")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 4)], ids=str)
def test_images_smaller_than_the_window(shape: tuple[int, ...], device: torch.device) -> None:
    check_images(*images(*shape, device=device), window_size=5, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_images(reduction: str, device: torch.device) -> None:
    check_images(*images(0, 3, 8, 9, device=device), window_size=3, reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_layout(layout: str, device: torch.device) -> None:
    x, y = images(2, 2, 5, 8, device=device)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    check_images(as_layout(x, layout), as_layout(y, other), window_size=3, reduction="none")


@pytest.mark.parametrize("position", [0, 1])
def test_gradient_to_one_image_alone(position: int, device: torch.device) -> None:
    x, y = images(1, 1, 6, 9, device=device)
    if position == 0:
        check_three_way(lambda x: ssim(x, y.to(x), window_size=3), x, tolerance=TOLERANCE)
    else:
        check_three_way(lambda y: ssim(x.to(y), y, window_size=3), y, tolerance=TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradcheck_of_ssim(padding: str, device: torch.device) -> None:
    x, y = images(1, 1, 4, 5, dtype=torch.float64, device=device)
    function = partial(ssim, window_size=3, padding=padding, reduction="none")
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            function, (x.requires_grad_(), y.requires_grad_()), fast_mode=True
        )


def test_equal_images(device: torch.device) -> None:
    """The similarity is exactly 1 and has no gradient: nothing cancels."""
    x, _ = images(1, 2, 6, 9, device=device)
    first, second = (x.clone().requires_grad_() for _ in range(2))
    with tritonloss.use_backend("triton"):
        similarity = ssim(first, second, window_size=5, reduction="none")
    assert (similarity == 1).all()
    for gradient in torch.autograd.grad(similarity.sum(), (first, second)):
        assert gradient.abs().max() < 1e-4


def test_order_does_not_matter(device: torch.device) -> None:
    x, y = images(1, 1, 6, 9, device=device)
    with tritonloss.use_backend("triton"):
        assert ssim(x, y).item() == pytest.approx(ssim(y, x).item(), rel=1e-6)


def test_flat_images_keep_their_digits(device: torch.device) -> None:
    """Noise of 1e-3 on a bright image: its variances are 1e-6 where C2 is 9e-4."""
    generator = torch.Generator().manual_seed(0)
    x, y = 200 + 0.3 * torch.randn((2, 1, 1, 8, 20), generator=generator).to(device)
    options = {"data_range": 255.0, "padding": "reflect", "reduction": "none"}
    truth = kernels_reference.ssim(x.double(), y.double(), **options)
    with tritonloss.use_backend("triton"):
        similarity = ssim(x, y, **options)
    assert (similarity.double() - truth).abs().max() < 1e-6


def test_images_that_are_not_finite(device: torch.device) -> None:
    x, y = images(1, 1, 7, 9, device=device)
    x[0, 0, 3, 4] = float("nan")
    with tritonloss.use_backend("triton"):
        similarity = ssim(x, y, window_size=3, reduction="none")
    touched = torch.zeros(7, 9, dtype=torch.bool, device=device)
    touched[2:5, 3:6] = True
    assert torch.equal(similarity[0, 0].isnan(), touched)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window_size", [1, 3, 11])
@pytest.mark.shipped_sizes
def test_every_window_and_form(window_size: int, form: str, device: torch.device) -> None:
    case = segmentation_case((1, 2 if window_size == 3 else 1, 6, 14), device=device)
    # In one pixel terms of 1 / C2 cancel, which autograd never forms.
    tolerance = 1e-4 if window_size == 1 else TOLERANCE
    check_loss(*case, tolerance, window_size=window_size, form=form)


@pytest.mark.parametrize(
    "options", [{"c1": 1e-2}, {"c2": 1e-2}, {"sigma": 0.4}, {"sigma": 1e6}], ids=str
)
def test_every_option_of_the_loss(options: dict[str, float], device: torch.device) -> None:
    check_loss(*segmentation_case((1, 2, 6, 9), device=device), window_size=5, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_logit_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_loss(*segmentation_case((2, 2, 6, 9), dtype=dtype, device=device), window_size=3)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 3), (3, 1, 5, 2), (1, 2, 3, 139), (1, 1, 11, 5), (1, 5, 7, 4)], ids=str
)
def test_every_shape(shape: tuple[int, ...], device: torch.device) -> None:
    check_loss(*segmentation_case(shape, device=device), window_size=3)


@pytest.mark.parametrize("window_size", [7, 9, 11])
def test_lanes_exchange_their_pixels(window_size: int, device: torch.device) -> None:
    """Within a program and from beside it: three programs to a row, two below each other."""
    logits, target = segmentation_case((1, 2, 10, 136), device=device)
    check_loss(logits, target, window_size=window_size)


@pytest.mark.parametrize("width", [520, 1000])
@pytest.mark.shipped_sizes
def test_lanes_exchange_their_pixels_in_shipped_programs(width: int, device: torch.device) -> None:
    """Five programs of 32 lanes, or two of 128."""
    logits, target = segmentation_case((1, 1, 4, width), device=device)
    check_loss(logits, target, window_size=11)


@pytest.mark.shipped_sizes
def test_labels_of_64_bits_whose_rows_begin_anywhere(device: torch.device) -> None:
    """Of the largest window, whose configuration is another one."""
    logits, target = segmentation_case((1, 2, 4, 13), device=device)
    check_loss(logits, target.long(), window_size=11)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 4)], ids=str)
def test_maps_smaller_than_the_window(shape: tuple[int, ...], device: torch.device) -> None:
    check_loss(*segmentation_case(shape, device=device), window_size=5)


def test_empty_batch(device: torch.device) -> None:
    logits = torch.zeros(0, 3, 8, 9, device=device)
    loss, gradient = kernel_gradient(logits, logits[:, 0].to(torch.uint8))
    assert loss == 0 and loss.shape == () and gradient.shape == logits.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 2, 5, 8), device=device)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    check_loss(as_layout(logits, layout), as_layout(target, other), window_size=3)


def test_every_label_dtype(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 5, 8), device=device)
    expected = kernel_gradient(logits, target, window_size=3)
    for dtype in (torch.int16, torch.int32, torch.int64):
        loss, gradient = kernel_gradient(logits, target.to(dtype), window_size=3)
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"),
    [(0, torch.uint8), (-1, torch.int16), (300, torch.int16), (2**32 + 1, torch.int64)],
)
def test_every_ignore_label(
    ignore_index: int, label_dtype: torch.dtype, device: torch.device
) -> None:
    case = segmentation_case(
        (1, 3, 5, 8), ignore_index=ignore_index, label_dtype=label_dtype, device=device
    )
    check_loss(*case, window_size=3, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [None, 257])
def test_ignore_labels_that_do_not_occur(ignore_index: int | None, device: torch.device) -> None:
    case = segmentation_case((1, 2, 5, 8), ignore_index=None, device=device)
    check_loss(*case, window_size=3, ignore_index=ignore_index)


@pytest.mark.parametrize("outside", [2, 257, 2**32 + 1])
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
                ssim_loss(logits, target)
    # Where labels are not checked, those count as ignored.
    monkeypatch.setattr(checks, "check_labels_in_range", lambda *_: None)
    loss, gradient = kernel_gradient(logits, target, window_size=3)
    expected = kernel_gradient(logits, target.where(target != outside, 255), window_size=3)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


def test_absent_classes(device: torch.device) -> None:
    logits, _ = segmentation_case((1, 3, 6, 9), device=device)
    target = torch.full((1, 6, 9), 2, dtype=torch.uint8, device=device)
    target[0, 3, 7] = 1
    check_loss(logits, target, window_size=3)


@pytest.mark.parametrize("form", FORMS)
def test_all_pixels_ignored(form: str, device: torch.device) -> None:
    logits, target = segmentation_case((2, 2, 5, 8), device=device)
    loss, gradient = kernel_gradient(logits, target.fill_(255), form=form, window_size=3)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_ignored_pixels_do_no_harm(value: float, device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 9), device=device)
    valid = (target != 255)[:, None]
    expected = kernel_gradient(logits.where(valid, 0), target, window_size=3)
    loss, gradient = kernel_gradient(logits.where(valid, value), target, window_size=3)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert (gradient[~valid.expand_as(gradient)] == 0).all()


def test_nan_is_not_hidden(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 9), ignore_index=None, device=device)
    logits[0, :, 2, 5] = float("nan")
    loss, _ = kernel_gradient(logits, target, window_size=3)
    assert loss.isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [float("inf"), 1e4, 0.0])
def test_saturated_and_equal_logits(scale: float, form: str, device: torch.device) -> None:
    """A sigmoid of an infinite logit is 0 or 1: a value like any other."""
    logits, target = segmentation_case((1, 2, 6, 9), device=device)
    logits = torch.where(logits > 0, scale, -scale)
    check_loss(logits, target, form=form, window_size=3)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_loss(form: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 4, 5), dtype=torch.float64, device=device)
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            partial(ssim_loss, target=target, form=form, window_size=3),
            logits.requires_grad_(),
            fast_mode=True,
        )


def test_the_loss_is_one_minus_the_similarity(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 6, 9), ignore_index=None, device=device)
    one_hot = (target[:, None] == torch.arange(2, device=device).view(1, -1, 1, 1)).float()
    with tritonloss.use_backend("triton"):
        similarity = ssim(logits.sigmoid(), one_hot, window_size=5)
        loss = ssim_loss(logits, target, window_size=5)
    assert loss.item() == pytest.approx(1 - similarity.item(), abs=2e-6)


def test_backward_twice_and_input_reused(device: torch.device) -> None:
    x = segmentation_case((1, 2, 6, 9), device=device)[0].requires_grad_()
    target = segmentation_case((1, 2, 6, 9), device=device)[1]
    with tritonloss.use_backend("triton"):
        p = x.softmax(1)
        total = ssim_loss(x, target, window_size=3) + ssim(p, p.detach() ** 2, window_size=3)
    total = total + p.square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)
    assert torch.equal(p, x.softmax(1))


def test_no_gradient_wanted(device: torch.device) -> None:
    x, y = images(1, 1, 6, 9, device=device)
    logits, target = segmentation_case((1, 2, 6, 9), device=device)
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                assert not ssim(x, y, window_size=3).requires_grad
                assert not ssim_loss(logits, target, window_size=3).requires_grad


@pytest.mark.shipped_sizes
def test_same_bits_every_time(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 5, 20), device=device)
    first, second = (kernel_gradient(logits, target, window_size=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_module(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 9, 12), device=device)
    options = {
        "form": "contrast_structure",
        "window_size": 5,
        "sigma": 2.0,
        "c1": 1e-3,
        "c2": 1e-2,
        "ignore_index": 1,
    }
    module = tritonloss.SSIMLoss(**options)
    target = target.where(target != 255, 1)
    with tritonloss.use_backend("reference"):
        assert torch.equal(module(logits, target), ssim_loss(logits, target, **options))
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    with pytest.raises(TypeError):
        tritonloss.SSIMLoss("full")


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (ssim_loss, (LOGITS.int(), TARGET), {}, TypeError, "logits must be .*int32"),
        (ssim_loss, (LOGITS, TARGET.float()), {}, TypeError, "target must hold .*float32"),
        (ssim_loss, (LOGITS, TARGET[:1]), {}, ValueError, r"target must hold .*\(1, 4, 5\)"),
        (ssim_loss, (LOGITS, TARGET), {"form": "half"}, ValueError, "form must be .*'half'"),
        (ssim_loss, (LOGITS, TARGET), {"window_size": 0}, ValueError, "window_size must .*got 0"),
        (ssim_loss, (LOGITS, TARGET), {"sigma": 0}, ValueError, "sigma must .*got 0"),
        (ssim_loss, (LOGITS, TARGET), {"c1": 0.0}, ValueError, "c1 must .*got 0.0"),
        (ssim_loss, (LOGITS, TARGET), {"c2": -1.0}, ValueError, "c2 must .*got -1.0"),
        (ssim_loss, (LOGITS, TARGET), {"ignore_index": "x"}, TypeError, "ignore_index must .*'x'"),
        (ssim_loss, (LOGITS, TARGET + 9), {}, ValueError, r"target must hold .*9 \(40x\)"),
        (ssim, (1.0, LOGITS), {}, TypeError, "x must be .*float"),
        (ssim, (LOGITS, None), {}, TypeError, "y must be .*NoneType"),
        (ssim, (LOGITS, LOGITS.double()), {}, TypeError, "y must be .*float64"),
        (ssim, (LOGITS, LOGITS[:1]), {}, ValueError, r"y must be .*\(1, 3, 4, 5\)"),
        (ssim, (LOGITS, LOGITS), {"data_range": 0.0}, ValueError, "data_range must .*got 0.0"),
        (ssim, (LOGITS, LOGITS), {"padding": "same"}, ValueError, "padding must .*'same'"),
        (ssim, (LOGITS, LOGITS), {"reduction": "sum"}, ValueError, "reduction must .*'sum'"),
        (ssim, (LOGITS, LOGITS), {"padding": "valid"}, ValueError, "x must have .*at least 11"),
        (ssim, (LOGITS, LOGITS), {"padding": "reflect"}, ValueError, "x must have .*at least 6"),
    ],
)
def test_errors(
    function: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    backend: str,
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        function(*arguments, **options)
