"""Structural similarity (SSIM) of two images, and of sigmoid maps and labels as a loss."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels_reference.base import one_hot, over_ranks, sanitised, valid_pixels, working_dtype
from kernels_reference.gaussian_window import gaussian_statistics


def ssim_loss(
    logits: Tensor,
    target: Tensor,
    *,
    form: str = "full",
    window_size: int = 11,
    sigma: float = 1.5,
    c1: float = 1e-4,
    c2: float = 9e-4,
    ignore_index: int | None = 255,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Mean of 1 - SSIM(sigmoid(logits), one_hot(target)), SSL paper, Eq. 7 ("full") or Eq. 9."""
    classes = logits.size(1)
    valid = valid_pixels(target, classes, ignore_index)
    # Selected before the sigmoid and after it: no gradient passes through an ignored infinity.
    z = sanitised(logits, valid)
    p = torch.where(valid, z.sigmoid(), 0)
    y = (valid & one_hot(target, classes)).to(z.dtype)

    luminance, structure = _dissimilarities(p, y, window_size, sigma, c1, c2, "zeros")
    if form == "full":
        dissimilarity = luminance + structure - luminance * structure
    else:
        dissimilarity = structure
    total = over_ranks(torch.where(valid, dissimilarity, 0).sum(), process_group)
    return total / (classes * over_ranks(valid.sum(), process_group)).clamp(min=1)


def ssim(
    x: Tensor,
    y: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    padding: str = "zeros",
    reduction: str = "mean",
) -> Tensor:
    """SSIM of two images: luminance similarity times contrast-structure similarity."""
    dtype = working_dtype(torch.promote_types(x.dtype, y.dtype))
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    luminance, structure = _dissimilarities(
        x.to(dtype), y.to(dtype), window_size, sigma, c1, c2, padding
    )
    similarity = (1 - luminance) * (1 - structure)
    return similarity if reduction == "none" else similarity.sum() / max(similarity.numel(), 1)


def _dissimilarities(
    x: Tensor, y: Tensor, window_size: int, sigma: float, c1: float, c2: float, padding: str
) -> tuple[Tensor, Tensor]:
    """1 - (2 mx my + C1) / (mx^2 + my^2 + C1) and 1 - (2 sxy + C2) / (sxx + syy + C2).

    The numerators are the squared mean and the variance of x - y. Computed as these, nothing
    cancels.
    """
    mean_x, variance_x = gaussian_statistics(x, window_size, sigma, padding)
    mean_y, variance_y = gaussian_statistics(y, window_size, sigma, padding)
    mean_difference, variance_difference = gaussian_statistics(x - y, window_size, sigma, padding)
    luminance = mean_difference.square() / (mean_x.square() + mean_y.square() + c1)
    structure = variance_difference / (variance_x + variance_y + c2)
    return luminance, structure
