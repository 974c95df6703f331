"""Region mutual information keeps its digits on small images, and is the released code's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels_reference
import tritonloss
from tests.oracle import segmentation_case
from tritonloss.functional import rmi_loss
from tritonloss.regions import plan

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
    """The released code's steps, with its windows, its inverse and its log det.

    As there, probabilities are pooled in the logits' own dtype; moments are float64.
    """
    classes = logits.size(1)
    z = logits.double()
    valid = (target != 255)[:, None]
    y = (target[:, None] == torch.arange(classes, device=target.device).view(1, -1, 1, 1)) & valid
    y = y.double()
    entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none") * valid
    loss = share * entropy.sum() / (valid.sum() + smooth)
    p = logits.sigmoid() * valid + 1e-6
    y = y.to(p)
    if pool is not None:
        y, p = (F.avg_pool2d(x, pool, pool, pool // 2) for x in (y, p))
    y, p = y.double(), p.double()
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


def near_cancellation(case: str) -> tuple[Tensor, Tensor]:
    """(logits, labels) of which the moments of p, or those of p - y, are nearly nothing."""
    random = torch.Generator().manual_seed(4)
    target = torch.randint(0, 2, (1, 23, 37), generator=random, dtype=torch.uint8)
    target[0, 5:12, 6:20], target[0, 14:, 20:] = 1, 0
    noise = torch.randn(1, 2, 23, 37, generator=random)
    positive = target[:, None] == torch.arange(2).view(1, -1, 1, 1)
    down = torch.linspace(0, 1, 23).view(-1, 1)
    across = torch.linspace(0, 1, 37)
    waves = torch.stack([3 * torch.sin(3 * across + 2 * down), 2 * torch.cos(4 * down - across)])
    logits = {
        "perfect": torch.where(positive, 14.0, -14.0) + noise / 10,
        "constant but for the last digits": 0.3 + 2.5e-5 * noise,
        "constant to a thousandth": 0.3 + 1e-3 * noise,
        "smooth": waves[None],
    }[case]
    return logits, target


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


# Of the largest gradient, with float32 sums: the moments' error over epsilon. A smooth map of this
# size has 1e-3; without totals of short sums, which keep what they round away, it would have 4e-3.
_SINGLE_SUMS = 1.5e-3


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    "options", [{"pooling": None}, {"pool_size": 2, "region_size": 2}], ids=str
)
@pytest.mark.parametrize(
    "case",
    ["perfect", "constant but for the last digits", "constant to a thousandth", "smooth"],
)
def test_near_cancellation(
    case: str, options: dict[str, Any], precision: str, device: torch.device
) -> None:
    """The kernels of large images lose no more than twice what float32 probabilities lose.

    The inverse of the moments of p makes up to 1 / epsilon of an error of p. So the gradient cannot
    be right to the specification's 1e-4 where p itself is rounded to float32, here or in PyTorch.
    """
    logits, target = (tensor.to(device) for tensor in near_cancellation(case))
    with plan.kernels_of_large_images(), tritonloss.use_backend("triton"):
        found = value_and_gradient(
            lambda z: rmi_loss(z, target, precision=precision, **options), logits
        )
    truth = value_and_gradient(
        lambda z: kernels_reference.rmi_loss(z, target, **options), logits.double()
    )
    shared = {"region": options.get("region_size", 3), "pool": options.get("pool_size")}
    eager = value_and_gradient(
        lambda z: released_formula(z, target, moments="mean", ridge=1e-6, **shared), logits
    )
    largest = truth[1].abs().max()
    error, yardstick = (((x[1] - truth[1]).abs().max() / largest).item() for x in (found, eager))
    allowed = 2 * yardstick + 2e-6
    if precision == "float32":
        allowed = max(allowed, _SINGLE_SUMS)
    assert error <= allowed
    # A few units in the last place of what is added up, whose largest term is 6.
    assert (found[0] - truth[0]).abs() <= 1e-6
    if case == "perfect":  # p - y is 1e-6, of which PyTorch's p keeps a digit
        assert error <= 2e-6
