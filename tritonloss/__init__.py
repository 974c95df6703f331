"""Fused Triton losses for semantic segmentation.

Losses are here as modules, and in ``tritonloss.functional`` as functions. ``gaussian_statistics``,
``count_labels``, ``margin_offsets`` and ``linalg`` are parts of them that are useful by themselves.
"""

__version__ = "0.1.0"

from . import functional, linalg, metrics
from ._core.backend import use_backend
from .affinity.adaptive import AdaptiveAffinityFieldLoss
from .affinity.affinity_field import AffinityFieldLoss
from .contrast.memory_bank import MemoryBank
from .contrast.pixel_contrast import PixelContrastLoss
from .contrast.sampling import sample_anchors
from .metrics.confusion import confusion_matrix, predict
from .metrics.label_statistics import MarginOffsets, count_labels, margin_offsets
from .overlap.dice import DiceLoss
from .overlap.generalized_dice import GeneralizedDiceLoss
from .overlap.iou_surrogate import IoUPairs, IoUSurrogate, SurrogateFit, fit_iou_surrogate
from .overlap.lovasz import LovaszSoftmaxLoss
from .overlap.lovasz_hinge import LovaszHingeLoss
from .overlap.neuro_iou import NeuroIoULoss, collect_iou_pairs
from .overlap.soft_iou import SoftIoULoss
from .overlap.tversky import TverskyLoss
from .pixelwise.binary_cross_entropy import BinaryCrossEntropyLoss
from .pixelwise.cross_entropy import CrossEntropyLoss
from .pixelwise.focal_loss import FocalLoss
from .pixelwise.margin_calibration import MarginCalibratedLoss
from .pixelwise.weighted_sum import WeightedSum
from .regions.region_mutual_information import RMILoss
from .windows.gaussian_statistics import gaussian_statistics
from .windows.ssim_loss import SSIMLoss
from .windows.structural_similarity import StructuralSimilarityLoss

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "BinaryCrossEntropyLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "IoUPairs",
    "IoUSurrogate",
    "MarginCalibratedLoss",
    "MarginOffsets",
    "MemoryBank",
    "NeuroIoULoss",
    "PixelContrastLoss",
    "RMILoss",
    "SSIMLoss",
    "SoftIoULoss",
    "StructuralSimilarityLoss",
    "TverskyLoss",
    "WeightedSum",
    "SurrogateFit",
    "collect_iou_pairs",
    "confusion_matrix",
    "count_labels",
    "fit_iou_surrogate",
    "functional",
    "gaussian_statistics",
    "linalg",
    "margin_offsets",
    "metrics",
    "predict",
    "sample_anchors",
    "use_backend",
]
