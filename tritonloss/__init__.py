"""Fused Triton losses for semantic segmentation."""

__version__ = "0.1.0"

from . import functional
from ._backend import use_backend
from .gaussian_window import gaussian_statistics
from .pixelwise import BinaryCrossEntropyLoss, CrossEntropyLoss, FocalLoss
from .ssim import SSIMLoss
from .structural_similarity import StructuralSimilarityLoss

__all__ = [
    "BinaryCrossEntropyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "SSIMLoss",
    "StructuralSimilarityLoss",
    "functional",
    "gaussian_statistics",
    "use_backend",
]
