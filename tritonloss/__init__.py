"""Fused Triton losses for semantic segmentation."""

__version__ = "0.1.0"

from . import functional, linalg
from ._backend import use_backend
from .gaussian_window import gaussian_statistics
from .label_statistics import MarginOffsets, count_labels, margin_offsets
from .margin_calibration import MarginCalibratedLoss
from .pixelwise import BinaryCrossEntropyLoss, CrossEntropyLoss, FocalLoss
from .region_mutual_information import RMILoss
from .ssim import SSIMLoss
from .structural_similarity import StructuralSimilarityLoss

__all__ = [
    "BinaryCrossEntropyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "MarginCalibratedLoss",
    "MarginOffsets",
    "RMILoss",
    "SSIMLoss",
    "StructuralSimilarityLoss",
    "count_labels",
    "functional",
    "gaussian_statistics",
    "linalg",
    "margin_offsets",
    "use_backend",
]
