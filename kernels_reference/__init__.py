"""The functions of tritonloss in eager PyTorch, written to be read; gradients by autograd."""

from kernels_reference.gaussian_window import gaussian_statistics, gaussian_window
from kernels_reference.pixelwise import binary_cross_entropy, cross_entropy, focal_loss
from kernels_reference.ssim import ssim, ssim_loss
from kernels_reference.structural_similarity import (
    largest_difference,
    structural_difference,
    structural_similarity_loss,
)

__all__ = [
    "binary_cross_entropy",
    "cross_entropy",
    "focal_loss",
    "gaussian_statistics",
    "gaussian_window",
    "largest_difference",
    "ssim",
    "ssim_loss",
    "structural_difference",
    "structural_similarity_loss",
]
