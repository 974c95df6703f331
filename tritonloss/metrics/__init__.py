"""What is counted of labels and of predictions, and the scores that follow."""

from .confusion import ConfusionMatrix
from .scores import dice_per_class, iou_per_class, mean_iou, pixel_accuracy

__all__ = [
    "ConfusionMatrix",
    "dice_per_class",
    "iou_per_class",
    "mean_iou",
    "pixel_accuracy",
]
