"""The functions of tritonloss in eager PyTorch, written to be read; gradients by autograd."""

from kernels_reference.gaussian_window import gaussian_statistics, gaussian_window
from kernels_reference.region_mutual_information import rmi_loss
from kernels_reference.ssim import ssim, ssim_loss
from kernels_reference.structural_similarity import (
    largest_difference,
    structural_difference,
    structural_similarity_loss,
)

__all__ = [
    "gaussian_statistics",
    "gaussian_window",
    "largest_difference",
    "rmi_loss",
    "ssim",
    "ssim_loss",
    "structural_difference",
    "structural_similarity_loss",
]
