"""Structural similarity loss: cross entropy on the pixels whose surroundings differ most."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from kernels_reference.base import one_hot, over_ranks, sanitised, valid_pixels
from kernels_reference.gaussian_window import (
    crop,
    gaussian_window,
    shift_and_variance,
)


def structural_similarity_loss(
    logits: Tensor,
    target: Tensor,
    *,
    window_size: int = 3,
    sigma: float = 1.5,
    beta: float = 0.1,
    stability: float = 0.01,
    bce_weight: float = 0.5,
    padding: str = "zeros",
    hard_mining: bool = True,
    reweight: bool = True,
    ignore_index: int | None = 255,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """bce_weight BCE + (1 - bce_weight) sum(e f bce) / sum(f), SSL paper, Eq. 10-17.

    e is the structural difference, and f = 1[e > beta e_max] keeps the hard samples. Neither
    carries a gradient.
    """
    valid = valid_pixels(target, logits.size(1), ignore_index)
    positive = one_hot(target, logits.size(1))
    z = sanitised(logits, valid)
    cross_entropy = torch.where(valid, -F.logsigmoid(torch.where(positive, z, -z)), 0)
    pixels = over_ranks(valid.sum(), process_group)
    mean_cross_entropy = over_ranks(cross_entropy.sum(), process_group) / pixels.clamp(min=1)

    with torch.no_grad():
        # Detached as well, since no_grad does not keep forward-mode derivatives out.
        e = structural_difference(
            logits.detach(),
            target,
            window_size=window_size,
            sigma=sigma,
            stability=stability,
            padding=padding,
            ignore_index=ignore_index,
        )
        if padding == "valid":
            valid = crop(valid, window_size // 2)
        hard = valid.expand_as(e)
        if hard_mining:
            # As "not below the threshold": a NaN is hard, and so reaches the loss.
            hard = hard & ~(e <= beta * largest_difference(window_size, sigma, stability))
        count = over_ranks(hard.sum(), process_group).clamp(min=1)
        weight = e if reweight else torch.ones_like(e)

    if padding == "valid":
        cross_entropy = crop(cross_entropy, window_size // 2)
    hard_cross_entropy = torch.where(hard, weight * cross_entropy, 0).sum()
    hard_cross_entropy = over_ranks(hard_cross_entropy, process_group) / count
    return bce_weight * mean_cross_entropy + (1 - bce_weight) * hard_cross_entropy


def structural_difference(
    logits: Tensor,
    target: Tensor,
    *,
    window_size: int = 3,
    sigma: float = 1.5,
    stability: float = 0.01,
    padding: str = "zeros",
    ignore_index: int | None = 255,
) -> Tensor:
    """Per pixel and class e = |n(y) - n(p)|, n(x) = (x - mean + C4) / (deviation + C4), Eq. 10.

    Padding "valid" leaves out the pixels whose window leaves the image.
    """
    valid = valid_pixels(target, logits.size(1), ignore_index)
    z = sanitised(logits, valid)
    p = torch.where(valid, z.sigmoid(), 0)
    y = (valid & one_hot(target, logits.size(1))).to(z.dtype)
    if window_size == 1:
        # A window of one pixel has no structure: Eq. 10 is 1 for y and p alike.
        return (y - p).abs()

    def normalized(x: Tensor) -> Tensor:
        shift, variance = shift_and_variance(x, window_size, sigma, padding)
        return (stability - shift) / (variance.sqrt() + stability)

    return (normalized(y) - normalized(p)).abs()


def largest_difference(window_size: int, sigma: float, stability: float) -> float:
    """e_max: a lone 1 among zeros against a lone 0 among ones."""
    if window_size == 1:
        return 1.0
    centre = gaussian_window(window_size, sigma)[window_size // 2] ** 2
    return 2 * (1 - centre) / (math.sqrt(centre * (1 - centre)) + stability)
