"""Integer labels as masks.

A map of one channel is a binary one: its labels are 0 and 1, and 1 is what belongs to the channel.
"""

import torch
from torch import Tensor


def valid_pixels(target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Pixels that take part: a label in range that is not ignore_index, bool [N, 1, H, W].

    In range are 0 to classes - 1, and 0 and 1 with one class.
    """
    label = _widened(target)
    valid = (label >= 0) & (label < (2 if classes == 1 else classes))
    return valid if ignore_index is None else valid & (label != ignore_index)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Whether a pixel's label is the class, or is 1 if there is one class; bool [N, classes, H, W].

    A comparison: nothing is gathered or scattered, so no label can be out of bounds.
    """
    label = _widened(target)
    if classes == 1:
        return label == 1
    return label == torch.arange(classes, device=target.device).view(1, -1, 1, 1)


def _widened(target: Tensor) -> Tensor:
    # A narrow label compared with a wide number would wrap: 300 is 44 in uint8.
    return target.to(torch.int64).unsqueeze(1)
