"""Integer labels as masks."""

import torch
from torch import Tensor


def valid_pixels(target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Pixels that take part: 0 <= label < classes and label != ignore_index, bool [N, 1, H, W]."""
    label = _widened(target)
    valid = (label >= 0) & (label < classes)
    return valid if ignore_index is None else valid & (label != ignore_index)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Whether a pixel's label is the class, bool [N, classes, H, W].

    A comparison: nothing is gathered or scattered, so no label can be out of bounds.
    """
    return _widened(target) == torch.arange(classes, device=target.device).view(1, -1, 1, 1)


def _widened(target: Tensor) -> Tensor:
    # A narrow label compared with a wide number would wrap: 300 is 44 in uint8.
    return target.to(torch.int64).unsqueeze(1)
