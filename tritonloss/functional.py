"""The functional forms of all losses."""

from .ssim import ssim, ssim_loss
from .structural_similarity import structural_similarity_loss

__all__ = ["ssim", "ssim_loss", "structural_similarity_loss"]
