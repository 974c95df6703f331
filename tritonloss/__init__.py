"""Fused Triton losses for semantic segmentation: the published mathematics at memory-bandwidth speed."""

__version__ = "0.1.0"

from . import functional
from ._backend import use_backend
from .gaussian_window import gaussian_statistics
from .structural_similarity import StructuralSimilarityLoss

__all__ = ["StructuralSimilarityLoss", "functional", "gaussian_statistics", "use_backend"]
