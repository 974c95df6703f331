"""Offsets past 2^31 elements: real ones, in files that are nearly all holes or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import segmentation_case
from tritonloss.functional import rmi_loss, ssim, ssim_loss, structural_similarity_loss
from tritonloss.regions.plan import kernels_of_large_images

pytestmark = pytest.mark.parity

# Of three elements the third lies past 2^31: that needs products in 64 bits. Of two elements the
# stride by itself is past 2^31: it must not be taken for a factor of 32 bits.
STRIDES = {3: 2**30 + 16, 2: 2**31 + 16}


def far_apart(tensor: Tensor, axis: int, directory: Path) -> Tensor:
    """A copy whose last element along one axis lies 2^31 elements from the first."""
    strides = list(torch.empty(tensor.shape, device="meta").stride())
    strides[axis] = STRIDES[tensor.shape[axis]]
    reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    path = directory / "sparse"
    with path.open("wb") as file:
        file.truncate(reach * tensor.element_size())
    storage = torch.from_file(str(path), shared=True, size=reach, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def statistics(x: Tensor, _: Tensor) -> Tensor:
    return torch.cat([s.flatten() for s in tritonloss.gaussian_statistics(x)])


def images(x: Tensor, _: Tensor) -> Tensor:
    return ssim(x, x.detach() ** 2, window_size=3, reduction="none")


def sigmoid_maps(logits: Tensor, target: Tensor) -> Tensor:
    return ssim_loss(logits, target, window_size=3)


def regions(logits: Tensor, target: Tensor) -> Tensor:
    return rmi_loss(logits, target, region_size=1, pooling=None)


def pooled_regions(logits: Tensor, target: Tensor) -> Tensor:
    return rmi_loss(logits, target, region_size=1, pool_size=2)


def sampled_regions(logits: Tensor, target: Tensor) -> Tensor:
    return rmi_loss(logits, target, region_size=1, pooling="nearest", pool_size=2)


def whole_regions(logits: Tensor, target: Tensor) -> Tensor:
    return rmi_loss(logits, target, region_size=2, pooling=None, ignore="drop")


OF_LOGITS = [
    structural_similarity_loss, sigmoid_maps, regions, pooled_regions, sampled_regions,
    whole_regions,
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)])
@pytest.mark.parametrize("function", [*OF_LOGITS, statistics, images])
def test_far_strides(
    function: Callable[[Tensor, Tensor], Tensor], axis: int, size: int, tmp_path: Path
) -> None:
    # Where columns are far apart and classes near each other, the lanes run over the classes.
    shape = [1, 2 if axis == 3 else 1, 2, 4]
    shape[axis] = size
    logits, target = segmentation_case(shape, dtype=torch.float16, ignore_index=None)
    apart = far_apart(logits, axis, tmp_path)
    outputs, gradients = [], []
    for x in (logits, apart):
        leaf = x.detach().requires_grad_()
        with tritonloss.use_backend("triton"), kernels_of_large_images():
            output = function(leaf, target)
        outputs.append(output.detach())
        gradients += torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own memory is used instead")
@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("function", OF_LOGITS)
def test_far_strides_of_labels(
    function: Callable[[Tensor, Tensor], Tensor], axis: int, size: int, tmp_path: Path
) -> None:
    shape = [1, 2, 4]
    shape[axis] = size
    logits, target = segmentation_case((shape[0], 1, *shape[1:]), ignore_index=None)
    with tritonloss.use_backend("triton"):
        expected = function(logits, target)
        assert torch.equal(function(logits, far_apart(target, axis, tmp_path)), expected)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (structural_similarity_loss, {"window_size": 3}),
        (structural_similarity_loss, {"window_size": 7}),
        (ssim_loss, {"window_size": 3}),
        (ssim_loss, {"window_size": 7}),
        (rmi_loss, {"region_size": 1, "pooling": None, "ignore": "drop"}),
    ],
)
def test_more_than_2_to_the_31_elements(
    function: Callable[..., Tensor], options: dict[str, Any], device: torch.device
) -> None:
    """All but the last corner is ignored: loss and gradient are those of the corner alone."""
    classes, side, corner = 3, 32768, 50
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    part, labels = segmentation_case((1, classes, corner, corner), dtype=torch.float16)
    logits = torch.zeros(1, classes, side, side, dtype=torch.float16, device=device)
    target = torch.full((1, side, side), 255, dtype=torch.uint8, device=device)
    logits[..., -corner:, -corner:] = part.to(device)
    target[..., -corner:, -corner:] = labels.to(device)
    part, labels = part.to(device), labels.to(device)
    leaf, alone = logits.requires_grad_(), part.clone().requires_grad_()
    loss = function(leaf, target, **options)
    expected = function(alone, labels, **options)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (expected_gradient,) = torch.autograd.grad(expected, alone)
    torch.testing.assert_close(gradient[..., -corner:, -corner:], expected_gradient)
    assert gradient[..., : side - corner, :].count_nonzero() == 0
    assert gradient[..., : side - corner].count_nonzero() == 0
