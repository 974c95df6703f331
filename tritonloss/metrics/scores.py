"""Scores of a segmentation, from its confusion matrix."""

from __future__ import annotations

import torch

from .._core import checks


def iou_per_class(matrix: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class: pixels that have it in both, over those in either.

    Args:
        matrix: counts [C, C], integers, rows for labels and columns for predictions, as
            :func:`tritonloss.confusion_matrix` returns them.

    Returns:
        float64 [C]; NaN for a class that is absent: no pixel has it as its label or is predicted
        as it.

    Raises:
        TypeError: matrix does not hold integers.
        ValueError: matrix is not square.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.metrics.iou_per_class(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        tensor([0.7500, 0.8000,    nan], dtype=torch.float64)
    """
    both, labels, predictions = _counts(matrix)
    return both.double() / (labels + predictions - both)


def mean_iou(matrix: torch.Tensor) -> torch.Tensor:
    """Intersection over union, the mean over the classes that are there.

    Args:
        matrix: as in :func:`iou_per_class`.

    Returns:
        float64, a scalar. Absent classes, which no pixel has as its label and none is predicted as,
        are left out; NaN if all are absent.

    Raises:
        TypeError: matrix does not hold integers.
        ValueError: matrix is not square.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.metrics.mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        tensor(0.7750, dtype=torch.float64)
    """
    return iou_per_class(matrix).nanmean()


def dice_per_class(matrix: torch.Tensor) -> torch.Tensor:
    """Dice coefficient (F1 score) of each class: twice the pixels in both, over those of each.

    Args:
        matrix: as in :func:`iou_per_class`.

    Returns:
        float64 [C]; NaN for a class that is absent: no pixel has it as its label or is predicted
        as it.

    Raises:
        TypeError: matrix does not hold integers.
        ValueError: matrix is not square.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.metrics.dice_per_class(torch.tensor([[3, 1], [1, 7]]))
        tensor([0.7500, 0.8750], dtype=torch.float64)
    """
    both, labels, predictions = _counts(matrix)
    return 2 * both.double() / (labels + predictions)


def pixel_accuracy(matrix: torch.Tensor) -> torch.Tensor:
    """The share of pixels that are predicted as their label.

    Args:
        matrix: as in :func:`iou_per_class`.

    Returns:
        float64, a scalar; NaN without a pixel.

    Raises:
        TypeError: matrix does not hold integers.
        ValueError: matrix is not square.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.metrics.pixel_accuracy(torch.tensor([[3, 1], [0, 4]]))
        tensor(0.8750, dtype=torch.float64)
    """
    both, labels, _ = _counts(matrix)
    return both.sum().double() / labels.sum()


def _counts(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each class the pixels that have it in both, as their label, and as their prediction.

    In integers: float64 would round away a rare class beside 2^53 pixels.
    """
    checks.check_labels(matrix, "matrix")
    if matrix.dim() != 2 or matrix.size(0) != matrix.size(1):
        raise ValueError(
            f"matrix must hold counts of shape (C, C); got shape {tuple(matrix.shape)}"
        )
    counts = matrix.to(torch.int64)
    return counts.diagonal(), counts.sum(1), counts.sum(0)
