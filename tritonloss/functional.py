"""The functional forms of all losses."""

from .margin_calibration import margin_calibrated_loss
from .pixelwise import binary_cross_entropy, cross_entropy, focal_loss
from .region_mutual_information import rmi_loss
from .ssim import ssim, ssim_loss
from .structural_similarity import structural_similarity_loss

__all__ = [
    "binary_cross_entropy",
    "cross_entropy",
    "focal_loss",
    "margin_calibrated_loss",
    "rmi_loss",
    "ssim",
    "ssim_loss",
    "structural_similarity_loss",
]
