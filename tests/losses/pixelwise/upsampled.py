"""What the tests of losses over interpolated logits share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.losses.pixelwise.margins import offsets_for
from tests.oracle import segmentation_case
from tritonloss.functional import (
    binary_cross_entropy,
    cross_entropy,
    focal_loss,
    margin_calibrated_loss,
)

Size = tuple[int, int]


def margins(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The margin-calibrated loss with offsets for so many classes."""
    options.setdefault("offsets", offsets_for(logits.size(1), logits.device))
    return margin_calibrated_loss(logits, target, **options)


UPSAMPLED = (cross_entropy, binary_cross_entropy, focal_loss, margins)


def upsampled_case(
    low: Size, high: Size, *, classes: int = 3, batch: int = 1, **given: Any
) -> tuple[Tensor, Tensor]:
    """Logits of one size, and labels of another one that they half agree with."""
    logits, _ = segmentation_case((batch, classes, *low), **given)
    _, target = segmentation_case((batch, classes, *high), **given)
    return logits, target
