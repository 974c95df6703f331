"""Region mutual information: how much the labels of a region tell about its predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from kernels_reference.base import one_hot, over_ranks, sanitised, valid_pixels


def rmi_loss(
    logits: Tensor,
    target: Tensor,
    *,
    region_size: int = 3,
    pooling: str | None = "avg",
    pool_size: int = 4,
    moments: str = "mean",
    epsilon: float | None = None,
    bce_weight: float = 0.5,
    ignore: str = "zero",
    ignore_index: int | None = 255,
    precision: str | None = None,
    bce_smooth: float = 0.0,
    return_info: bool = False,
    residual: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """bce_weight BCE + (1 - bce_weight) RMI, RMI paper, Eq. 12-16.

    ``residual`` chooses between two forms of the same matrix. ``precision`` is for the kernels:
    probabilities and moments are always float64 here. In float32 the last digit of a probability
    would depend on the pixel's label, and the inverse makes that up to 1 / epsilon times as large.
    """
    valid = valid_pixels(target, logits.size(1), ignore_index)
    positive = valid & one_hot(target, logits.size(1))
    z = sanitised(logits, valid)
    cross_entropy = torch.where(valid, -F.logsigmoid(torch.where(positive, z, -z)), 0)
    pixels = over_ranks(valid.sum(), process_group)
    total = over_ranks(cross_entropy.sum(), process_group)
    mean_cross_entropy = total / (pixels + bce_smooth).clamp(min=1)

    if pooling is None or pool_size == 1:
        e, y, touched = _residual(z, positive, valid), positive, ~valid
    else:
        e, y, touched = _POOLINGS[pooling](z, positive, valid, pool_size)
    keep = ~touched if ignore == "drop" else torch.ones_like(touched)

    epsilon = (1e-6 if moments == "mean" else 5e-4) if epsilon is None else epsilon
    information, info = _information(e, y, keep, region_size, moments, epsilon, residual)
    images = over_ranks(torch.tensor(logits.size(0), device=z.device), process_group)
    rmi = over_ranks(information.sum().to(z.dtype), process_group) / images.clamp(min=1)
    loss = bce_weight * mean_cross_entropy + (1 - bce_weight) * rmi
    loss = torch.where(pixels > 0, loss, 0)
    return (loss, info) if return_info else loss


def pooled_size(height: int, width: int, pooling: str | None, pool_size: int) -> tuple[int, int]:
    """Height and width of the maps that the regions are taken from."""
    if pooling is None or pool_size == 1:
        return height, width
    if pooling == "nearest":
        return height // pool_size, width // pool_size
    margin = 2 * (pool_size // 2) - pool_size
    return (height + margin) // pool_size + 1, (width + margin) // pool_size + 1


def _information(
    e: Tensor, y: Tensor, keep: Tensor, region: int, moments: str, epsilon: float, residual: bool
) -> tuple[Tensor, Tensor]:
    """(1/2 log det M / d, info) per image and class, from P = Y + E in regions of d pixels.

    M is the covariance of Y given P. Its Cholesky factor is the trailing block of the factor of the
    covariance of (P, Y). With Y - P in the place of Y, M is the same, and rounding errors shrink
    with Y - P.
    """
    windows = _regions(keep, region).all(-2, keepdim=True)
    count = windows.sum(-1, keepdim=True)
    y = _centred(_regions(y.double(), region), windows)
    e = _centred(_regions(e.double(), region), windows)
    p = y + e
    other = -e if residual else y
    joint = torch.cat((p, other), -2)
    scatter = joint @ joint.mT
    if moments == "mean":
        scatter = scatter / count.clamp(min=1)

    d = region * region
    ridge = epsilon * torch.eye(d, dtype=torch.float64, device=y.device)
    cross = -ridge if residual else torch.zeros_like(ridge)
    corner = 2 * ridge if residual else ridge
    ridge = torch.cat((torch.cat((ridge, cross), 1), torch.cat((cross, corner), 1)))
    factor, info = torch.linalg.cholesky_ex(scatter + ridge)
    information = factor[..., d:, d:].diagonal(dim1=-2, dim2=-1).log().sum(-1) / d
    information = torch.where(info == 0, information, torch.nan)
    return torch.where(count[..., 0, 0] > 0, information, 0), info


def _regions(x: Tensor, region: int) -> Tensor:
    """Every region of x [N, C, H, W] as a column of [N, C, region^2, regions]."""
    regions = x.unfold(2, region, 1).unfold(3, region, 1)
    return regions.flatten(4).flatten(2, 3).transpose(2, 3)


def _centred(x: Tensor, windows: Tensor) -> Tensor:
    """The regions x less their mean over the kept ones (``windows``), and 0 in all others."""
    x = torch.where(windows, x, 0)
    return torch.where(windows, x - x.sum(-1, keepdim=True) / windows.sum(-1, True).clamp(min=1), 0)


def _residual(z: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    """P - y in float64, of which no digit is lost where p is nearly y; 0 where not valid."""
    wrong = torch.where(positive, -z, z).double().sigmoid()
    return torch.where(valid, torch.where(positive, -wrong, wrong), 0)


# Each returns (residual p - y, labels y, whether an invalid pixel was read), pooled.


def _average(z: Tensor, positive: Tensor, valid: Tensor, size: int) -> tuple[Tensor, ...]:
    maps = (_residual(z, positive, valid), positive.double(), (~valid).to(z.dtype))
    e, y, touched = (F.avg_pool2d(x, size, size, padding=size // 2) for x in maps)
    return e, y, touched > 0


def _maximum(z: Tensor, positive: Tensor, valid: Tensor, size: int) -> tuple[Tensor, ...]:
    z = torch.where(valid, z, torch.finfo(z.dtype).min)  # p = 0
    maps = (z, positive.to(z.dtype), (~valid).to(z.dtype))
    z, y, touched = (F.max_pool2d(x, size, size, padding=size // 2) for x in maps)
    return _residual(z, y > 0, torch.ones_like(z, dtype=torch.bool)), y, touched > 0


def _nearest(z: Tensor, positive: Tensor, valid: Tensor, size: int) -> tuple[Tensor, ...]:
    """Labels of the nearest pixel; probabilities interpolated, the corners at the same place."""
    height, width = z.size(2) // size, z.size(3) // size
    nearest = F.interpolate(positive.to(z.dtype), (height, width), mode="nearest")
    below = _interpolated(torch.where(valid, z.double().sigmoid(), 0), height, width)
    above = _interpolated(torch.where(valid, (-z).double().sigmoid(), 1), height, width)
    void = (~valid).to(z.dtype)
    touched = _interpolated(void, height, width) + F.interpolate(void, (height, width)) > 0
    return torch.where(nearest > 0, -above, below), nearest, touched


def _interpolated(x: Tensor, height: int, width: int) -> Tensor:
    """The map x at another size, bilinear; corners stay, and pixels that coincide are exact."""
    for dim, size in ((2, height), (3, width)):
        place = torch.arange(size, device=x.device) * (x.size(dim) - 1)
        below = place // max(size - 1, 1)
        share = (place % max(size - 1, 1)).to(x.dtype) / max(size - 1, 1)
        share = share.view(-1, 1) if dim == 2 else share
        above = (below + 1).clamp(max=x.size(dim) - 1)
        # Selected, not multiplied: a NaN in a pixel that has no share does no harm.
        upper = torch.where(share > 0, x.index_select(dim, above) * share, 0)
        x = x.index_select(dim, below) * (1 - share) + upper
    return x


_POOLINGS = {"avg": _average, "max": _maximum, "nearest": _nearest}
