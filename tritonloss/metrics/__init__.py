"""Counts of labels and of predictions, and the margin offsets and scores that follow from them."""

from .confusion import ConfusionMatrix
from .scores import dice_per_class, iou_per_class, mean_iou, pixel_accuracy

__all__ = [
    "ConfusionMatrix",
    "dice_per_class",
    "iou_per_class",
    "mean_iou",
    "pixel_accuracy",
]
