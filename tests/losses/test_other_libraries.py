"""SSIM of other libraries: README's table row by row, and what its text says beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tritonloss.functional import ssim

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\S+\(.*\))` \| `(.*)` \|$", README, flags=re.MULTILINE)
# The name that a row's first call begins with -> what to import.
MODULES = {
    "kornia": "kornia",
    "pytorch_msssim": "pytorch_msssim",
    "structural_similarity": "skimage.metrics",
}


def noisy_images(*shape: int) -> tuple[Tensor, Tensor]:
    """Two images of noise in [0, 1]: their variances are large beside a window's rounding."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    return x, 0.7 * x + 0.3 * y


def smooth_images() -> tuple[Tensor, Tensor]:
    """White, and the same with a faint edge: the variances are small beside a window's rounding."""
    x = torch.ones(1, 1, 24, 24, dtype=torch.float64)
    y = x.clone()
    y[..., 12:] = 0.95
    return x, y


def fused_ssim(x: Tensor, y: Tensor, padding: str = "same") -> Tensor:
    """What fused-ssim computes, as its CUDA source was read: zeros at the border, and clamps."""
    weights = torch.exp(-((torch.arange(11, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    window = (weights[:, None] * weights).expand(x.size(1), 1, 11, 11)

    def blurred(image: Tensor) -> Tensor:
        return F.conv2d(image, window, padding=5, groups=image.size(1))

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = (blurred(x * x) - mean_x**2).clamp(min=0)
    variance_y = (blurred(y * y) - mean_y**2).clamp(min=0)
    covariance = blurred(x * y) - mean_x * mean_y
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    values = values / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    values = values.clamp(-1, 1)
    return (values[..., 5:-5, 5:-5] if padding == "valid" else values).mean()


def library(call: str) -> dict[str, Any]:
    """The names that a library's call uses; skips the test where it is not installed."""
    name = re.split(r"[.(]", call)[0]
    if name == "fused_ssim":
        return {name: fused_ssim}
    module = pytest.importorskip(MODULES[name])
    return {name: getattr(module, name, module)}


def gradients(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the sum of squares of the result, to both images."""
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(call(*leaves).square().sum(), leaves)


def test_the_table_of_the_readme_names_every_library() -> None:
    names = {re.split(r"[.(]", there)[0] for there, _ in ROWS}
    assert names == {"fused_ssim", *MODULES} and len(ROWS) == 9


@pytest.mark.parametrize(
    ("backend", "shape"), [("triton", (1, 1, 11, 12)), ("reference", (3, 2, 13, 15))]
)
@pytest.mark.parametrize(("there", "here"), ROWS, ids=[there for there, _ in ROWS])
@pytest.mark.shipped_sizes
def test_both_calls_of_a_row_give_the_same(
    there: str, here: str, backend: str, shape: tuple[int, ...], device: torch.device
) -> None:
    names = library(there)
    x, y = noisy_images(*shape)
    expected = torch.as_tensor(eval(there, {"x": x, "y": y, **names}), dtype=torch.float64)
    with tritonloss.use_backend(backend):
        found = eval(here, {"ssim": ssim, "x": x.to(device), "y": y.to(device)})
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("there", "here"), [row for row in ROWS if "numpy" not in row[0]], ids=lambda call: call
)
def test_both_calls_of_a_row_have_the_same_gradients(there: str, here: str) -> None:
    names = library(there)
    x, y = noisy_images(3, 2, 13, 15)
    with tritonloss.use_backend("reference"):
        found = gradients(lambda x, y: eval(here, {"ssim": ssim, "x": x, "y": y}), x, y)
    expected = gradients(lambda x, y: eval(there, {"x": x, "y": y, **names}), x, y)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item())


def test_smooth_images_in_pytorch_msssim() -> None:
    """Its window of float32 weights is all that differs."""
    theirs = pytest.importorskip("pytorch_msssim").ssim
    x, y = smooth_images()
    weights = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (weights / weights.sum()).view(1, 1, 1, 11)
    with tritonloss.use_backend("reference"):
        found = ssim(x, y, padding="valid").item()
    assert found == pytest.approx(theirs(x, y, data_range=1, win=window).item(), abs=1e-6)
    assert abs(found - theirs(x, y, data_range=1).item()) == pytest.approx(1e-5, rel=0.2)


@pytest.mark.parametrize(("there", "here"), [row for row in ROWS if row[0].startswith("kornia")])
def test_smooth_images_in_kornia(there: str, here: str) -> None:
    names = library(there)
    x, y = smooth_images()
    with tritonloss.use_backend("reference"):
        found = eval(here, {"ssim": ssim, "x": x, "y": y})
    expected = eval(there, {"x": x, "y": y, **names})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_black_images_in_kornia() -> None:
    theirs = pytest.importorskip("kornia.metrics").ssim
    black = torch.zeros(1, 1, 13, 15, dtype=torch.float64)
    assert theirs(black, black, 11).mean().item() == pytest.approx(1 - 1.1e-5, abs=1e-6)
    with tritonloss.use_backend("reference"):
        assert ssim(black, black).item() == 1
