"""Gaussian-window statistics: the kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import kernels_reference
import tritonloss
from tests.oracle import LAYOUTS, as_layout, check_three_way, unaligned, value_and_gradients

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

PADDINGS = ("zeros", "reflect", "replicate", "valid")


def statistics(
    window_size: int = 3, sigma: float = 1.5, padding: str = "zeros"
) -> partial[tuple[Tensor, Tensor]]:
    return partial(
        tritonloss.gaussian_statistics, window_size=window_size, sigma=sigma, padding=padding
    )


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window_size", [1, 3, 5, 11])
@pytest.mark.shipped_sizes
def test_every_window_and_padding(window_size: int, padding: str, device: torch.device) -> None:
    x = image(1, 2, window_size + 1 if padding == "valid" else 6, 20).to(device)
    check_three_way(statistics(window_size, padding=padding), x)


@pytest.mark.parametrize("padding", ["zeros", "valid"])
@pytest.mark.shipped_sizes
def test_columns_that_fill_no_chunk(padding: str, device: torch.device) -> None:
    check_three_way(statistics(5, padding=padding), image(1, 1, 6, 21).to(device))


@pytest.mark.parametrize(("window_size", "padding"), [(31, "zeros"), (13, "reflect")])
@pytest.mark.shipped_sizes
def test_large_windows(window_size: int, padding: str, device: torch.device) -> None:
    x = image(1, 1, 3 if padding == "zeros" else 7, 19).abs().to(device)
    check_three_way(statistics(window_size, 5.0, padding), x)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1e6])
def test_every_width_of_gaussian(sigma: float, device: torch.device) -> None:
    check_three_way(statistics(5, sigma), image(1, 1, 6, 9).to(device))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(dtype: torch.dtype, padding: str, device: torch.device) -> None:
    x = image(2, 1, 5, 12, dtype=dtype).to(device)
    check_three_way(statistics(3, padding=padding), x)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3, 3),
        (2, 3, 3, 4),
        (1, 1, 3, 139),
        (1, 1, 11, 66),
        (3, 1, 7, 3),
    ],
    ids=str,
)
def test_every_shape(shape: tuple[int, ...], padding: str, device: torch.device) -> None:
    """Sizes are odd, prime, wider and higher than a program's strip, with H != W."""
    check_three_way(statistics(3, padding=padding), image(*shape).to(device))


@pytest.mark.parametrize("shape", [(1, 1, 66, 9), (1, 1, 2, 518)], ids=str)
@pytest.mark.shipped_sizes
def test_more_pixels_than_a_program_of_the_shipped_size(
    shape: tuple[int, ...], device: torch.device
) -> None:
    check_three_way(statistics(3), image(*shape).to(device))


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 7), (2, 1, 4, 1)], ids=str)
def test_images_smaller_than_the_window(
    shape: tuple[int, ...], padding: str, device: torch.device
) -> None:
    check_three_way(statistics(7, padding=padding), image(*shape).to(device))


def test_smallest_images_that_can_be_mirrored_or_hold_a_window(device: torch.device) -> None:
    check_three_way(statistics(7, padding="reflect"), image(1, 2, 4, 5).to(device))
    check_three_way(statistics(7, padding="valid"), image(1, 2, 7, 7).to(device))


@pytest.mark.parametrize("padding", PADDINGS)
def test_empty_batch(padding: str, device: torch.device) -> None:
    check_three_way(statistics(3, padding=padding), image(0, 3, 8, 9).to(device))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, padding: str, device: torch.device) -> None:
    x = as_layout(image(2, 3, 5, 10).to(device), layout)
    check_three_way(statistics(3, padding=padding), x)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("window_size", "width", "dtype"),
    [
        (3, 13, torch.float32),
        (5, 14, torch.bfloat16),
        (7, 133, torch.float16),
        (11, 21, torch.float32),
        (9, 20, torch.float64),
    ],
)
@pytest.mark.shipped_sizes
def test_unaligned_maps(
    window_size: int, width: int, dtype: torch.dtype, padding: str, device: torch.device
) -> None:
    """Rows that begin anywhere in a chunk: of odd widths, and of parts of larger maps."""
    x = image(1, 2, 11, width, dtype=dtype).to(device)
    check_three_way(statistics(window_size, padding=padding), x)
    check_three_way(statistics(window_size, padding=padding), unaligned(x, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_upstream_gradient(layout: str, device: torch.device) -> None:
    x = image(2, 3, 5, 10).to(device)
    upstream = as_layout(image(2, 3, 5, 10, seed=1).to(device), layout)
    gradients = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with tritonloss.use_backend(backend):
            outputs = tritonloss.gaussian_statistics(leaf)
        gradients += torch.autograd.grad(outputs, leaf, (upstream, upstream))
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-6)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone(output: int, device: torch.device) -> None:
    """The upstream gradient of the other one is absent."""
    function = statistics(3)
    check_three_way(lambda x: function(x)[output], image(1, 2, 6, 9).to(device))


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradcheck(padding: str, device: torch.device) -> None:
    x = image(1, 1, 4, 5, dtype=torch.float64).to(device).requires_grad_()
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(statistics(3, padding=padding), x, fast_mode=True)


def test_flat_maps_keep_their_digits(device: torch.device) -> None:
    """The deviation is right to 1e-7 where E[x^2] - E[x]^2 in float32 has it wrong by over 1e-4."""
    x = 1 + 1e-4 * image(1, 1, 9, 21).to(device)
    truth_mean, truth = kernels_reference.gaussian_statistics(x.double(), 3, 1.5, "reflect")
    with tritonloss.use_backend("triton"):
        mean, variance = tritonloss.gaussian_statistics(x, 3, 1.5, "reflect")
        square, _ = tritonloss.gaussian_statistics(x * x, 3, 1.5, "reflect")
    assert (variance >= 0).all()
    assert (variance.double().sqrt() - truth.sqrt()).abs().max() < 1e-7
    assert (mean.double() - truth_mean).abs().max() < 2e-7
    naive = (square - mean * mean).clamp(min=0)
    assert (naive.double().sqrt() - truth.sqrt()).abs().max() > 1e-4


@pytest.mark.parametrize(("window_size", "sigma"), [(5, 1.5), (11, 1.5), (5, 0.4)])
@pytest.mark.shipped_sizes
def test_flat_areas_beside_steps_keep_their_digits(
    window_size: int, sigma: float, device: torch.device
) -> None:
    """Windows of a chunk share the value that they deviate from, and it may lie beyond a step."""
    x = 4 * image(1, 1, 7, 43).to(device)
    x[..., 18:] += 1000
    x[..., 30] += 1000
    truth = kernels_reference.gaussian_statistics(x.double(), window_size, sigma)[1]
    with tritonloss.use_backend("triton"):
        variance = tritonloss.gaussian_statistics(x, window_size, sigma)[1]
    assert ((variance - truth).abs() <= 1e-4 * truth).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -1e4, 3e18])
def test_constant_maps(value: float, device: torch.device) -> None:
    """No window sees a difference: the mean is exactly the value, the variance exactly 0."""
    x = torch.full((1, 1, 6, 7), value, device=device, requires_grad=True)
    with tritonloss.use_backend("triton"):
        mean, variance = tritonloss.gaussian_statistics(x, 5, padding="replicate")
    assert (mean == value).all()
    assert (variance == 0).all()
    (gradient,) = torch.autograd.grad(variance.sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_within_its_windows(value: float, device: torch.device) -> None:
    x = image(1, 1, 9, 11).to(device)
    x[0, 0, 4, 5] = value
    with tritonloss.use_backend("triton"):
        mean, variance = tritonloss.gaussian_statistics(x)
    touched = torch.zeros(9, 11, dtype=torch.bool, device=device)
    touched[3:6, 4:7] = True
    assert torch.equal(~mean[0, 0].isfinite(), touched)
    assert torch.equal(~variance[0, 0].isfinite(), touched)


def test_large_values(device: torch.device) -> None:
    check_three_way(statistics(3), 1e4 * image(1, 1, 6, 9).to(device))


def test_backward_twice_and_input_reused(device: torch.device) -> None:
    x = image(1, 1, 5, 6).to(device).requires_grad_()
    p = x.softmax(-1)
    with tritonloss.use_backend("triton"):
        mean, variance = tritonloss.gaussian_statistics(p)
    total = mean.square().sum() + variance.sum() + p.sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)
    assert torch.equal(p, x.softmax(-1))


def test_no_gradient_wanted(device: torch.device) -> None:
    x = image(1, 1, 5, 6).to(device)
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                mean, variance = tritonloss.gaussian_statistics(x)
                assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.shipped_sizes
def test_same_bits_every_time(device: torch.device) -> None:
    x = image(1, 2, 7, 30).to(device)
    first, second = (value_and_gradients(statistics(5), (x,), "triton") for _ in range(2))
    for left, right in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be .*got list"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int32), {}, TypeError, "x must be .*int32"),
        (torch.ones(1, 4, 4), {}, ValueError, r"x must be .*\(1, 4, 4\)"),
        (torch.ones(1, 0, 4, 4), {}, ValueError, r"x must be .*\(1, 0, 4, 4\)"),
        (torch.ones(1, 1, 4, 4), {"window_size": 4}, ValueError, "window_size must be .*got 4"),
        (torch.ones(1, 1, 4, 4), {"window_size": 33}, ValueError, "window_size must be .*got 33"),
        (torch.ones(1, 1, 4, 4), {"window_size": 3.0}, TypeError, "window_size must be .*3.0"),
        (torch.ones(1, 1, 4, 4), {"sigma": 0.0}, ValueError, "sigma must be .*got 0.0"),
        (torch.ones(1, 1, 4, 4), {"padding": "same"}, ValueError, "padding must be .*'same'"),
        (
            torch.ones(1, 1, 2, 9),
            {"window_size": 5, "padding": "reflect"},
            ValueError,
            "x must have height and width of at least 3 .*height 2",
        ),
        (
            torch.ones(1, 1, 9, 4),
            {"window_size": 5, "padding": "valid"},
            ValueError,
            "x must have height and width of at least 5 .*width 4",
        ),
    ],
)
def test_errors(
    x: Tensor, options: dict[str, object], error: type[Exception], message: str, backend: str
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        tritonloss.gaussian_statistics(x, **options)
