"""Fused Triton losses for semantic segmentation."""

__version__ = "0.1.0"

from . import functional, linalg
from ._backend import use_backend
from .gaussian_window import gaussian_statistics
from .region_mutual_information import RMILoss
from .ssim import SSIMLoss
from .structural_similarity import StructuralSimilarityLoss

__all__ = [
    "RMILoss",
    "SSIMLoss",
    "StructuralSimilarityLoss",
    "functional",
    "gaussian_statistics",
    "linalg",
    "use_backend",
]
