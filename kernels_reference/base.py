"""What all references share: the arithmetic's dtype, labels as masks, reductions, ranks.

A map of one class is a binary one: its labels are 0 and 1, and 1 is what belongs to the class.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.nn import functional as F


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast changes no dtype on a tensor's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_labels(logits: Tensor, target: Tensor, upsample: str | None, align_corners: bool) -> Tensor:
    """The logits at the size of the labels: interpolated, or as they are if upsample is None."""
    if upsample is None:
        return logits
    return F.interpolate(
        logits.to(working_dtype(logits.dtype)),
        size=target.shape[1:],
        mode=upsample,
        align_corners=align_corners,
    )


def valid_pixels(target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Valid pixels: a label in range that is not ignore_index, bool [N, 1, H, W].

    The labels in range are 0 to classes - 1; with one class they are 0 and 1.
    """
    label = _widened(target)
    valid = (label >= 0) & (label < (2 if classes == 1 else classes))
    return valid if ignore_index is None else valid & (label != ignore_index)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Whether a pixel's label is the class, or is 1 if there is one class; bool [N, classes, H, W].

    Labels are compared. Nothing is gathered or scattered, so no label can be out of bounds.
    """
    label = _widened(target)
    if classes == 1:
        return label == 1
    return label == torch.arange(classes, device=target.device).view(1, -1, 1, 1)


def _widened(target: Tensor) -> Tensor:
    # In a comparison with uint8 labels a wide number would wrap around: 300 becomes 44.
    return target.to(torch.int64).unsqueeze(1)


def sanitised(logits: Tensor, valid: Tensor) -> Tensor:
    """Logits to compute with, 0 where not valid: no gradient passes through infinities there."""
    return torch.where(valid, logits.to(working_dtype(logits.dtype)), 0)


def reduced(
    loss: Tensor,
    valid: Tensor,
    weight: Tensor,
    reduction: str,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The mean (over the sum of weights), sum or map of a loss per pixel; 0 where not valid.

    Weights that sum to 0 have no mean: NaN, as torch has it.
    """
    loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss
    total = over_ranks(loss.sum(), process_group)
    if reduction == "sum":
        return total
    pixels = over_ranks(valid.sum(), process_group)
    divisor = torch.where(pixels > 0, over_ranks(weight.sum(), process_group), 1)
    return torch.where(divisor == 0, torch.nan, total / divisor)


def over_ranks(part: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The sum of all ranks' parts, whose gradient is that to this part times the number of ranks.

    DistributedDataParallel divides gradients by that number.
    """
    if process_group is None:
        return part
    total = part.detach().clone()
    all_reduce(total, group=process_group)
    if not part.is_floating_point():
        return total
    return total + process_group.size() * (part - part.detach())
