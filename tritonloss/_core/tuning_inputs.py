"""Tensors to tune on: random values, and labels in patches like those of annotations."""

from __future__ import annotations

import torch

from .configurations import Shape


def random_map(shape: Shape, layout: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uniform values in [0, 1), in "contiguous", "channels_last" or "strided" layout."""
    if layout == "strided":
        batch, classes, height, width = shape
        wider = torch.rand(batch, classes, height, 2 * width, device=device).to(dtype)
        return wider[..., ::2]
    values = torch.rand(shape, device=device).to(dtype)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    return values


def random_labels(shape: Shape, device: torch.device) -> torch.Tensor:
    """Labels [N, H, W], uint8, the same over 32 x 32 pixels: a program meets few of the classes.

    With one class the labels are 0 and 1.
    """
    batch, classes, height, width = shape
    regions = (batch, -(-height // 32), -(-width // 32))
    coarse = torch.randint(0, max(classes, 2), regions, device=device).to(torch.uint8)
    fine = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return fine[:, :height, :width].contiguous()
