"""What a network predicts, and how its predictions and the labels go together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_reference.base import at_labels, working_dtype


def predict(
    logits: Tensor,
    size: Sequence[int] | None = None,
    upsample: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """The class of every pixel's largest logit, interpolated to a size; of one channel z > 0."""
    if size is not None and tuple(size) != tuple(logits.shape[2:]):
        wide = logits.to(working_dtype(logits.dtype))
        logits = F.interpolate(wide, tuple(size), mode=upsample, align_corners=align_corners)
    classes = logits.size(1)
    found = (logits > 0).squeeze(1) if classes == 1 else logits.argmax(1)
    return found.to(torch.uint8 if classes <= 256 else torch.int32)


def confusion_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    num_classes: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    ignore_index: int | None = 255,
) -> Tensor:
    """How many pixels of label i are predicted as class j, int64 [C, C]."""
    prediction = logits
    if logits.is_floating_point():
        num_classes = 2 if logits.size(1) == 1 else logits.size(1)
        prediction = predict(at_labels(logits, target, upsample, align_corners))
    assert num_classes is not None
    label, found = target.to(torch.int64), prediction.to(torch.int64)
    valid = (label >= 0) & (label < num_classes) & (found >= 0) & (found < num_classes)
    if ignore_index is not None:
        valid &= label != ignore_index

    # What is not counted has a place of its own, which is cut off.
    pair = torch.where(valid, label * num_classes + found, num_classes**2).flatten()
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=pair.device)
    counts = counts.scatter_add(0, pair, torch.ones_like(pair))
    return counts[:-1].view(num_classes, num_classes)
