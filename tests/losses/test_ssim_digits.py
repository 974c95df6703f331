"""What rounding does to SSIM: plain sums about a pivot against float64, where digits get lost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import LAYOUTS, as_layout, check_three_way, segmentation_case, value_and_gradients
from tritonloss._core.configurations import forced
from tritonloss.functional import ssim, ssim_loss
from tritonloss.windows import ssim_launch

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

# As for the other tests of SSIM.
# Of the flat map, 2.04e-5 under Triton 3.6 and less under 3.9: their interpreters round otherwise.
TOLERANCE = 2.2e-5
FORMS = ("full", "contrast_structure")


def noise(scale: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(1, 1, 14, 18, generator=generator)


def edge() -> Tensor:
    """0 above and 1 below, so that half of a strip is as far from its pivot as the other."""
    image = torch.zeros(1, 1, 14, 18)
    image[:, :, 6:] = 1
    return image


def labels() -> Tensor:
    target = torch.zeros(1, 14, 18, dtype=torch.uint8)
    target[:, 3:9, 5:15] = 1
    target[:, 12, 2:4] = 255
    return target


LOGITS = {
    "flat": 0.5 + noise(1e-2),
    "confident": 5 * (2.0 * (labels() == 1)[:, None] - 1) + noise(0.5),
    "confident, wrong": 6 * (2 * edge() - 1) + noise(0.1),
    "flat beside confident": -8 * (1 - edge()) + noise(0.05),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_flat_and_confident_logits(
    logits: str, dtype: torch.dtype, form: str, device: torch.device
) -> None:
    z, target = LOGITS[logits].to(device, dtype), labels().to(device)
    function = partial(ssim_loss, target=target, form=form, window_size=5)
    check_three_way(function, z, tolerance=TOLERANCE)


@pytest.mark.parametrize(("data_range", "level"), [(1.0, 0.0), (255.0, 0.0), (255.0, 1000.0)])
def test_edges_and_levels_of_images(data_range: float, level: float, device: torch.device) -> None:
    x, y = (level + data_range * (edge() + noise(1e-2, seed)).to(device) for seed in (0, 1))
    function = partial(ssim, window_size=5, data_range=data_range, padding="reflect")
    check_three_way(function, x, y, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    x, y = ((edge() + noise(1e-2, seed)).to(device, dtype) for seed in (0, 1))
    check_three_way(partial(ssim, window_size=5), x, y, tolerance=TOLERANCE)


@pytest.mark.parametrize("constant", [{"c2": 1e-6}, {"c1": 1e-8}], ids=str)
def test_small_constants_take_care(constant: dict[str, float], device: torch.device) -> None:
    """Plain sums would be 10 % wrong."""
    z, target = LOGITS["confident, wrong"].to(device), labels().to(device)
    function = partial(ssim_loss, target=target, window_size=5, **constant)
    check_three_way(function, z, tolerance=TOLERANCE)


def test_gradients_of_confident_logits_keep_their_digits(device: torch.device) -> None:
    """p (1 - p) and p - 1 are taken from 1 - p as such: 1 less a float32 p has lost half of it."""
    target = labels().to(device)
    z = 12 * (2.0 * (target == 1)[:, None].roll(1, -1) - 1) + noise(0.05).to(device)
    truth, found = (
        value_and_gradients(partial(ssim_loss, target=target, window_size=5), [logits], backend)[1]
        for logits, backend in ((z.double(), "reference"), (z, "triton"))
    )
    error = (found[0].double() - truth[0]).abs().max() / truth[0].abs().max()
    assert error < 1e-4  # eager float32: 5e-3


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("planes", [1, pytest.param(2, marks=pytest.mark.thorough), 5])
def test_scratch_of_few_planes(
    planes: int, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, however often a place in the ring is used again."""
    logits, target = segmentation_case((2, 5, 10, 12), device=device)
    leaf = as_layout(logits, layout).requires_grad_()
    gradients = []
    for scratch in (ssim_launch.SCRATCH_BYTES, planes * 3 * 4 * 10 * 12):
        monkeypatch.setattr(ssim_launch, "SCRATCH_BYTES", scratch)
        with tritonloss.use_backend("triton"), forced("ssim_forward", {}):
            loss = ssim_loss(leaf, target, window_size=3)
            gradients += torch.autograd.grad(loss, leaf)
    assert torch.equal(*gradients)
