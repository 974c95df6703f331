"""Mean and variance of every pixel's neighbourhood under a Gaussian window."""

import math

from torch import Tensor
from torch.nn import functional as F

from kernels_reference.base import working_dtype

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def gaussian_window(window_size: int, sigma: float) -> tuple[float, ...]:
    """One-dimensional Gaussian weights exp(-(i - centre)^2 / (2 sigma^2)), summing to 1."""
    centre = (window_size - 1) / 2
    places = [(i - centre) / sigma for i in range(window_size)]
    weights = [math.exp(-0.5 * place * place) for place in places]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def gaussian_statistics(
    x: Tensor, window_size: int = 3, sigma: float = 1.5, padding: str = "zeros"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every pixel's window: mean = w * x, variance = w * (x - mean)^2."""
    x = x.to(working_dtype(x.dtype))
    shift, variance = shift_and_variance(x, window_size, sigma, padding)
    centre = crop(x, window_size // 2) if padding == "valid" else x
    return centre + shift, variance


def shift_and_variance(
    x: Tensor, window_size: int, sigma: float, padding: str
) -> tuple[Tensor, Tensor]:
    """(mean - x, variance) of every pixel's window, both free of cancellation.

    E[x^2] - E[x]^2 loses every digit on flat maps, so deviations from the centre value are used.
    The rows of a window are merged first. The window's variance is then the mean of its rows'
    variances plus the variance of its rows' means.
    """
    weights = gaussian_window(window_size, sigma)
    reach = window_size // 2
    if padding != "valid" and reach > 0:
        x = F.pad(x, (reach,) * 4, mode=_PAD_MODES[padding])

    row_shift, row_variance = _merge(x, None, weights, dim=-1)
    row_mean = x.narrow(-1, reach, row_shift.size(-1)) + row_shift
    column_shift, variance = _merge(row_mean, row_variance, weights, dim=-2)
    shift = row_shift.narrow(-2, reach, column_shift.size(-2)) + column_shift
    return shift, variance.clamp(min=0)


def crop(x: Tensor, reach: int) -> Tensor:
    """Drop from x [..., H, W] the `reach` outermost rows and columns on each side."""
    return x[..., reach : x.size(-2) - reach, reach : x.size(-1) - reach]


def _merge(
    mean: Tensor, variance: Tensor | None, weights: tuple[float, ...], dim: int
) -> tuple[Tensor, Tensor]:
    """(shift of the mean, variance) of neighbouring groups that are merged along one axis.

    Each group is given by its mean and variance; single values (variance None) have variance 0. The
    shift is from the mean of the middle group.
    """
    reach = len(weights) // 2
    length = mean.size(dim) - 2 * reach
    centre = mean.narrow(dim, reach, length)
    # Zero, but part of the graph: a window of one pixel has a gradient too. NaN stays NaN.
    shift = spread = centre - centre
    for offset, weight in enumerate(weights):
        if offset != reach:
            difference = mean.narrow(dim, offset, length) - centre
            shift = shift.add(difference, alpha=weight)
            spread = spread.addcmul(difference, difference, value=weight)
        if variance is not None:
            spread = spread.add(variance.narrow(dim, offset, length), alpha=weight)
    return shift, spread - shift.square()
