"""Region mutual information keeps its digits on small images, and is the released code's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tests.oracle import segmentation_case
from tritonloss.functional import rmi_loss

pytestmark = pytest.mark.parity


def released_formula(
    logits: Tensor,
    target: Tensor,
    *,
    region: int = 3,
    pool: int | None = 4,
    moments: str = "sum",
    ridge: float = 5e-4,
    smooth: float = 0.0,
    share: float = 0.5,
) -> Tensor:
    """The released code's steps in float64, with its windows, its inverse and its log det."""
    classes = logits.size(1)
    z = logits.double()
    valid = (target != 255)[:, None]
    y = (target[:, None] == torch.arange(classes, device=target.device).view(1, -1, 1, 1)) & valid
    y = y.double()
    entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none") * valid
    loss = share * entropy.sum() / (valid.sum() + smooth)
    p = z.sigmoid() * valid + 1e-6
    if pool is not None:
        y, p = (F.avg_pool2d(x, pool, pool, pool // 2) for x in (y, p))
    sides = [side - region + 1 for side in p.shape[2:]]
    windows = [
        torch.stack(
            [
                x[:, :, dy : dy + sides[0], dx : dx + sides[1]].flatten(2)
                for dy in range(region)
                for dx in range(region)
            ],
            2,
        )
        for x in (y, p)
    ]
    labels, found = (x - x.mean(-1, keepdim=True) for x in windows)
    count = labels.size(-1) if moments == "mean" else 1
    eye = ridge * torch.eye(region**2, dtype=torch.float64, device=z.device)
    of_labels, of_found, mixed = (
        a @ b.mT / count for a, b in ((labels, labels), (found, found), (labels, found))
    )
    left = of_labels - mixed @ torch.linalg.inv(of_found + eye) @ mixed.mT + eye
    information = torch.logdet(left) / (2 * region**2)
    return loss + (1 - share) * information.sum() / logits.size(0)


def value_and_gradient(function: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = function(leaf)
    return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()


def assert_close(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    """As close as the specification asks: 2e-4 in value, 1e-4 of the largest gradient."""
    assert (found[0] - truth[0]).abs() <= 2e-4
    assert (found[1] - truth[1]).abs().max() <= 1e-4 * truth[1].abs().max()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    ("size", "region", "pool"), [((5, 7), 3, None), ((6, 6), 3, None), ((9, 14), 2, 4)]
)
def test_fewer_regions_than_matrix_rows(
    size: tuple[int, int],
    region: int,
    pool: int | None,
    precision: str,
    backend: str,
    device: torch.device,
) -> None:
    logits, target = segmentation_case((2, 3, *size), device=device)
    options: dict[str, Any] = {"pooling": None} if pool is None else {"pool_size": pool}
    for moments, ridge in (("mean", 1e-6), ("sum", 5e-4)):
        with tritonloss.use_backend(backend):
            found = value_and_gradient(
                lambda z, moments=moments: rmi_loss(
                    z, target, region_size=region, moments=moments, precision=precision, **options
                ),
                logits,
            )
        truth = value_and_gradient(
            lambda z, moments=moments, ridge=ridge: released_formula(
                z, target, region=region, pool=pool, moments=moments, ridge=ridge
            ),
            logits.double(),
        )
        assert_close(found, truth)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("pooling", ["max", "avg", "nearest", None])
@pytest.mark.parametrize("level", [0.3, -1.7, 2.9])
def test_constant_maps_tell_nothing_about_labels(
    level: float, pooling: str | None, backend: str, device: torch.device
) -> None:
    """With regions of one pixel, predictions that never change have no gradient, whatever y is."""
    target = torch.randint(
        2, (1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    ).to(device)
    logits = torch.full((1, 2, 8, 8), level, device=device)
    if pooling == "avg":
        # The zeros of the padding would change averages: cells of one pixel have no padding.
        pooling_options: dict[str, Any] = {"pooling": "avg", "pool_size": 1}
    else:
        pooling_options = {"pooling": pooling, "pool_size": 2}
    with tritonloss.use_backend(backend):
        _, gradient = value_and_gradient(
            lambda z: rmi_loss(z, target, region_size=1, bce_weight=0.0, **pooling_options), logits
        )
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_released_settings_are_the_released_code(backend: str, device: torch.device) -> None:
    """Few pixels, so that V + 1 instead of V shows; the shift by 1e-6 shows nowhere."""
    logits, target = segmentation_case((2, 3, 13, 14), device=device)
    with tritonloss.use_backend(backend):
        found = value_and_gradient(lambda z: tritonloss.RMILoss.released()(z, target), logits)
        other = value_and_gradient(
            lambda z: rmi_loss(z, target, moments="sum", epsilon=5e-4), logits
        )
    truth = value_and_gradient(lambda z: released_formula(z, target, smooth=1.0), logits.double())
    assert_close(found, truth)
    torch.testing.assert_close(found[0], truth[0], rtol=2e-6, atol=2e-6)
    assert (other[0] - truth[0]).abs() > 1e-3
