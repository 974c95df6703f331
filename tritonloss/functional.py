"""All losses as functions, the similarity ``ssim`` that one is made of, the confusion matrix."""

from .affinity.affinity_field import affinity_field_loss
from .contrast.pixel_contrast import pixel_contrast_loss
from .metrics.confusion import confusion_matrix
from .overlap.dice import dice_loss
from .overlap.generalized_dice import generalized_dice_loss
from .overlap.lovasz import lovasz_softmax_loss
from .overlap.lovasz_hinge import lovasz_hinge_loss
from .overlap.neuro_iou import neuro_iou_loss
from .overlap.soft_iou import soft_iou_loss
from .overlap.tversky import tversky_loss
from .pixelwise.binary_cross_entropy import binary_cross_entropy
from .pixelwise.cross_entropy import cross_entropy
from .pixelwise.focal_loss import focal_loss
from .pixelwise.margin_calibration import margin_calibrated_loss
from .regions.region_mutual_information import rmi_loss
from .windows.ssim import ssim
from .windows.ssim_loss import ssim_loss
from .windows.structural_similarity import structural_similarity_loss

__all__ = [
    "affinity_field_loss",
    "binary_cross_entropy",
    "confusion_matrix",
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "generalized_dice_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "margin_calibrated_loss",
    "neuro_iou_loss",
    "pixel_contrast_loss",
    "rmi_loss",
    "soft_iou_loss",
    "ssim",
    "ssim_loss",
    "structural_similarity_loss",
    "tversky_loss",
]
