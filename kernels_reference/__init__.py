"""The functions of tritonloss in eager PyTorch, written to be read; gradients by autograd."""

from kernels_reference.affinity_field import affinity_field_loss
from kernels_reference.confusion_matrix import confusion_matrix, predict
from kernels_reference.gaussian_window import gaussian_statistics, gaussian_window
from kernels_reference.label_statistics import count_labels, margin_offsets
from kernels_reference.lovasz import lovasz_hinge_loss, lovasz_softmax_loss
from kernels_reference.margin_calibration import margin_calibrated_loss, margins
from kernels_reference.neuro_iou import membership_sums, neuro_iou_loss
from kernels_reference.overlap import (
    dice_loss,
    generalized_dice_loss,
    soft_iou_loss,
    tversky_loss,
)
from kernels_reference.pixel_contrast import pixel_contrast_loss
from kernels_reference.pixelwise import binary_cross_entropy, cross_entropy, focal_loss
from kernels_reference.region_mutual_information import rmi_loss
from kernels_reference.ssim import ssim, ssim_loss
from kernels_reference.structural_similarity import (
    largest_difference,
    structural_difference,
    structural_similarity_loss,
)

__all__ = [
    "affinity_field_loss",
    "binary_cross_entropy",
    "confusion_matrix",
    "count_labels",
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "gaussian_statistics",
    "gaussian_window",
    "generalized_dice_loss",
    "largest_difference",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "margin_calibrated_loss",
    "margin_offsets",
    "margins",
    "membership_sums",
    "neuro_iou_loss",
    "pixel_contrast_loss",
    "predict",
    "rmi_loss",
    "soft_iou_loss",
    "ssim",
    "ssim_loss",
    "structural_difference",
    "structural_similarity_loss",
    "tversky_loss",
]
