"""The functional forms of all losses."""

from .region_mutual_information import rmi_loss
from .ssim import ssim, ssim_loss
from .structural_similarity import structural_similarity_loss

__all__ = ["rmi_loss", "ssim", "ssim_loss", "structural_similarity_loss"]
